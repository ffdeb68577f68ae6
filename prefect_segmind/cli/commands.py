"""The command line, `prefect-segmind`.

Exit codes: 0 done; 1 it failed, or some assets did; 2 bad input, nothing paid; 3 the account refused; 4 no money;
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.progress import TimeElapsedColumn
from rich.text import Text

from prefect_segmind._version import __version__
from prefect_segmind.api.resolutions import DEFAULT_RESOLUTION
from prefect_segmind.archive.record import OnKept, OnUnknown
from prefect_segmind.batch.tally import BatchError
from prefect_segmind.cli.arguments import money, number, pairs, typed
from prefect_segmind.cli.check import CheckResult, all_checks
from prefect_segmind.cli.ephemeral_server import shield_temporary_server
from prefect_segmind.cli.listeners import BatchRun, Run, live
from prefect_segmind.cli.output import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTS,
    batch,
    batch_facts,
    batch_failure,
    dry_run_facts,
    exit_code,
    failure,
    message,
    picture_facts,
    print_json,
    reconcile_failure,
    show_failure,
)
from prefect_segmind.cli.streams import unreadable
from prefect_segmind.cli.submitted import has_submitted
from prefect_segmind.cli.terminal import people, print_facts
from prefect_segmind.errors import InputError
from prefect_segmind.flows import image_to_image, refresh_assets
from prefect_segmind.jobs.job import name_from_image, parse_job
from prefect_segmind.pipeline.archive import ArchivedImage
from prefect_segmind.reporting.listener import heard_by
from prefect_segmind.settings import load_settings
from prefect_segmind.storage.http_environment import check_environment
from prefect_segmind.tasks.interrupts import end_command_on_signals

app = App(
    name="prefect-segmind",
    version=__version__,
    help="Pictures from pictures with Segmind's Ideogram 2a, paid for once.",
    result_action="return_value",
)


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """The output options of a command.

    Attributes:
        json: Print one JSON object, and nothing else, on standard output.
        verbose: Show tracebacks and every line of Prefect's log.
    """

    json: bool = False
    verbose: bool = False


def run(arguments: Sequence[str]) -> int:
    """Runs a command line.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit code.
    """
    try:
        if (found := unreadable(arguments)) is not None:
            raise CycloptsError(
                f"{found!r} is not text in the encoding of this terminal: rename the file, or type it in a UTF-8 locale"
            )
        result = app(list(arguments), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        text = str(error)
        if "--json" in arguments:
            wrong = InputError(text)
            print_json(_nothing_done(arguments[0], wrong))
        people.print(text, style="red", soft_wrap=True)
        people.print("See prefect-segmind --help.")
        return BAD_INPUT
    except Exception as error:
        return show_failure(error, verbose="--verbose" in arguments)
    return result if isinstance(result, int) else DONE


def _nothing_done(command: str, error: InputError) -> dict[str, Any]:
    """The JSON object of a command that was not begun."""
    if command == "reconcile":
        return reconcile_failure(error)
    return batch_failure(error) if command == "refresh" else failure("", error)


def _prepare_for_interrupts() -> None:
    """Makes SIGTERM and SIGHUP end a command as Ctrl-C does, without ending Prefect's temporary server."""
    end_command_on_signals()
    shield_temporary_server()


@app.command
def generate(
    image: str,
    prompt: str,
    /,
    *,
    name: str | None = None,
    image_weight: int = 50,
    style_type: str = "GENERAL",
    resolution: str = DEFAULT_RESOLUTION,
    seed: str | None = None,
    magic_prompt_option: str = "AUTO",
    negative_prompt: str | None = None,
    allow_extreme_ratio: Annotated[bool, Parameter(negative="")] = False,
    archive: str | None = None,
    upload_to: str | None = None,
    publish_to: str | None = None,
    block: str | None = None,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    output: Output | None = None,
) -> int:
    """Make one picture of an image and a prompt, and archive it. The same command again pays nothing.

    Args:
        image: A local path, s3://bucket/key, or an http(s):// address.
        prompt: What the picture should show.
        name: Where the picture goes in the archive; the image's name if left out.
        image_weight: 1 to 100; higher keeps more of the source image.
        style_type: GENERAL, REALISTIC, DESIGN, RENDER_3D or ANIME.
        resolution: One of the 78 sizes, RESOLUTION_1280_800 for example, or AUTO for the one that crops least.
        seed: 100 to 999999, or random; derived from the job if left out.
        magic_prompt_option: AUTO, ON or OFF: whether the model may rewrite the prompt.
        negative_prompt: What the picture should not show.
        allow_extreme_ratio: Take an image wider or taller than 3 to 1.
        archive: s3://bucket/prefix or a folder; PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE if left out.
        upload_to: s3://bucket/prefix; PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO if left out.
        publish_to: Copy the picture to an address that stays: s3://bucket/live gives live/{name}.png.
        block: Name of a SegmindCredentials block; SEGMIND_API_KEY if left out.
        on_unknown: Send another request (repay) or not (fail) after one that may have been billed.
        on_kept: Wait or pay once more (repay) for a picture that is paid for and lies in another machine's outbox.
        output: Output options.
    """
    output = output or Output()
    _prepare_for_interrupts()
    name, run = name or name_from_image(image), Run()
    job: dict[str, Any] = {
        "image": image,
        "prompt": prompt,
        "name": name,
        "image_weight": image_weight,
        "style_type": style_type,
        "resolution": resolution,
        "seed": None if seed is None else number(seed),
        "magic_prompt_option": magic_prompt_option,
        "negative_prompt": negative_prompt,
        "allow_extreme_ratio": allow_extreme_ratio,
    }
    try:
        check_environment()
        # Before Prefect sees the parameters and keeps them: a secret in them would stay in its database.
        parse_job(job, allow_unlisted_resolution=load_settings().allow_unlisted_resolution)
        with heard_by(run), live(people, name, TimeElapsedColumn()):
            made = image_to_image(
                **job,
                archive=archive,
                upload_to=upload_to,
                publish_to=publish_to,
                credentials_block=block,
                on_unknown=on_unknown,
                on_kept=on_kept,
            )
            archived = cast(ArchivedImage, made)
    except (Exception, *INTERRUPTS) as error:
        submitted = has_submitted(error, run.ledger, archive)
        if output.json:
            print_json(failure(name, error, run.ledger, submitted=submitted))
        return show_failure(error, output.verbose, run.ledger.totals, run.facts(), submitted=submitted)
    if output.json:
        print_json(archived.model_dump())
    else:
        print_facts(Console(), picture_facts(archived) | run.facts())
    return DONE


@app.command
def refresh(
    manifest: str,
    /,
    *,
    archive: str | None = None,
    upload_to: str | None = None,
    publish_to: str | None = None,
    block: str | None = None,
    max_concurrency: int = 16,
    requests_per_minute: int | None = None,
    budget_usd: str | None = None,
    budget_name: str | None = None,
    approve_above_usd: str | None = None,
    yes: Annotated[bool, Parameter(name=("--yes", "-y"), negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    on_unknown: OnUnknown = "repay",
    on_kept: OnKept = "wait",
    shards: int = 1,
    variables: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    defaults: Annotated[tuple[str, ...], Parameter(name="--default", negative="")] = (),
    output: Output | None = None,
) -> int:
    """Make the pictures of a manifest, and archive them. The same command again makes only what is missing.

    Args:
        manifest: A YAML, JSON, JSON Lines or CSV file: a local path or s3://bucket/key.
        archive: s3://bucket/prefix or a folder; PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE if left out.
        upload_to: s3://bucket/prefix; PREFECT_INTEGRATIONS_SEGMIND_UPLOAD_TO if left out.
        publish_to: Copy each picture to an address that stays: s3://bucket/live gives live/{name}.png.
        block: Name of a SegmindCredentials block; SEGMIND_API_KEY if left out.
        max_concurrency: Requests to the API at once, at most.
        requests_per_minute: Requests to the API in any minute, at most.
        budget_usd: What the run may spend; at the limit it stops with exit code 4.
        budget_name: A name for the budget, which all runs share that give it and have this archive.
        approve_above_usd: Ask before a run that may cost more; the setting APPROVE_ABOVE_USD if left out.
        yes: Do not ask, whatever it costs.
        dry_run: Only plan: what would be made, and what it would cost.
        on_unknown: Send another request (repay) or not (fail) after one that may have been billed.
        on_kept: Wait or pay once more (repay) for a picture that is paid for and lies in another machine's outbox.
        shards: Have so many runs of the deployment refresh-assets/sharded make the pictures, on other machines.
        variables: key=value, for the manifest's templates; may be given several times.
        defaults: field=value, for assets that do not give the field, style_type=ANIME for example.
        output: Output options.
    """
    output, run = output or Output(), BatchRun(people, yes=yes)
    _prepare_for_interrupts()
    try:
        check_environment()
        with heard_by(run), run.bar:
            result = refresh_assets(
                manifest=manifest,
                archive=archive,
                upload_to=upload_to,
                publish_to=publish_to,
                credentials_block=block,
                variables=pairs("--set", variables),
                defaults=typed(pairs("--default", defaults)),
                max_concurrency=max_concurrency,
                requests_per_minute=requests_per_minute,
                budget_usd=money("budget_usd", budget_usd),
                budget_name=budget_name,
                approve_above_usd=money("approve_above_usd", approve_above_usd),
                dry_run=dry_run,
                on_unknown=on_unknown,
                on_kept=on_kept,
                shards=shards,
            )
    except (Exception, *INTERRUPTS) as error:
        # After a retry of the flow Prefect may raise what an earlier try has ended with.
        ended = run.result or (error.result if isinstance(error, BatchError) else None)
        if output.json:
            totals = run.ledger.totals
            why = message(error, totals, submitted=bool(ended and ended.submitted))
            print_json(batch(ended) | {"error": why} if ended else batch_failure(error))
        if not ended:
            return show_failure(error, output.verbose, run.ledger.totals, run.facts())
        if output.verbose:
            people.print_exception()
        if not output.json:
            print_facts(Console(), batch_facts(ended) | run.facts())
        return exit_code(error)
    if output.json:
        print_json(batch(result))
    else:
        print_facts(Console(), (dry_run_facts(result) if dry_run else batch_facts(result)) | run.facts())
    return DONE


@app.command
def outbox(*, archive: Annotated[bool, Parameter(negative="")] = False, output: Output | None = None) -> int:
    """List what was paid for on this machine and is not archived yet: pictures, and answers without a picture.

    Args:
        archive: Archive the pictures too, each under the name of its job; that costs nothing.
        output: Output options.
    """
    from prefect_segmind.cli.outbox import look

    output = output or Output()
    _prepare_for_interrupts()
    try:
        check_environment()
        found = look(archive=archive)
    except (Exception, *INTERRUPTS) as error:
        if output.json:
            print_json({"files": [], "error": message(error)})
        return show_failure(error, output.verbose)
    if output.json:
        print_json({"files": [each.model_dump(mode="json") for each in found]})
    else:
        facts = {str(number): each.sentence() for number, each in enumerate(found, start=1)}
        print_facts(Console(), facts or {"outbox": "nothing waits to be archived"})
    return FAILED if any(each.problem for each in found) else DONE


@app.command
def reconcile(archive: str | None = None, /, *, block: str | None = None, output: Output | None = None) -> int:
    """Look up at the provider what became of requests of unknown outcome, and archive what was paid for. Free.

    Args:
        archive: s3://bucket/prefix or a folder; PREFECT_INTEGRATIONS_SEGMIND_ARCHIVE if left out.
        block: Name of a SegmindCredentials block; SEGMIND_API_KEY if left out.
        output: Output options.
    """
    from prefect_segmind.cli.reconcile import facts, settle, table

    output = output or Output()
    _prepare_for_interrupts()
    try:
        check_environment()
        with live(people, "asking the provider", TimeElapsedColumn()):
            found = settle(archive, block)
    except (Exception, *INTERRUPTS) as error:
        if output.json:
            print_json(reconcile_failure(error))
        return show_failure(error, output.verbose)
    if output.json:
        print_json(found.model_dump(mode="json"))
    else:
        if found.pictures:
            Console().print(table(found))
        print_facts(Console(), facts(found))
    return DONE if found.is_whole else FAILED


@app.command
def demo(*, folder: Path = Path("segmind-demo"), verbose: bool = False) -> int:
    """Watch a picture being made against a local sandbox, a rate limit and a gateway error included. Costs nothing.

    Args:
        folder: Where each demo creates a folder for its pictures.
        verbose: Show tracebacks and every line of Prefect's log.
    """
    from prefect_segmind.cli.demo import demonstrate

    _prepare_for_interrupts()
    check_environment()
    demonstrate(folder, Console())
    return DONE


@app.command
def sandbox(
    *,
    folder: Path = Path("segmind-sandbox"),
    port: int = 8787,
    s3_port: int = 8788,
    latency: float = 2.0,
    credits: str = "10.00",
    requests_per_minute: int | None = None,
    sketch: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Serve a stand-in for the API and an S3 server on this machine until Ctrl-C, and print the exports for them.

    Args:
        folder: What the S3 server serves: plain files.
        port: Of the API.
        s3_port: Of the S3 server.
        latency: Seconds that a picture takes.
        credits: USD on the sandbox's account.
        requests_per_minute: A rate limit, if there is to be one.
        sketch: Answer sketches, which take next to no time to draw: for measuring many at once.
    """
    from prefect_segmind.cli.demo import serve
    from prefect_segmind.sandbox import Sandbox

    stand_in = Sandbox(
        folder.resolve(),
        port=port,
        s3_port=s3_port,
        latency=latency,
        credits=credits,
        requests_per_minute=requests_per_minute,
        sketch=sketch,
    )
    serve(stand_in, Console())
    return DONE


@app.command
def check(*, block: str | None = None, archive: str | None = None, upload_to: str | None = None) -> int:
    """Check key and credits, upload place, archive, outbox and Prefect; each line is ok or has the remedy. Free.

    Args:
        block: Name of a SegmindCredentials block.
        archive: s3://bucket/prefix or a folder.
        upload_to: s3://bucket/prefix.
    """
    console = Console()
    codes = []
    for title, look in all_checks(block, archive, upload_to):
        try:
            found, code = look(), DONE
        except Exception as error:
            found, code = CheckResult(message(error), "bad"), exit_code(error)
        colour = {"ok": "green", "mind": "yellow", "bad": "red"}[found.mark]
        line = Text.assemble((f"{found.mark:<4}", colour), " ", (title, "bold"), ": ", found.text)
        console.print(line, soft_wrap=True)
        codes.append(code)
    return max(codes)
