"""The command line, `prefect-segmind`.

Exit codes: 0 done; 1 it failed; 2 bad input, nothing paid; 3 the account refused; 4 no money.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from prefect_segmind import __version__
from prefect_segmind.archiving import ArchivedImage
from prefect_segmind.checks import Found, all_checks
from prefect_segmind.console import print_facts
from prefect_segmind.errors import AccountError, InputError, InsufficientCreditsError, SegmindError, redact
from prefect_segmind.flows import image_to_image
from prefect_segmind.price import usd
from prefect_segmind.record import OnUnknown
from prefect_segmind.request import name_from_image, parse_job
from prefect_segmind.resolution import DEFAULT_RESOLUTION
from prefect_segmind.settings import load_settings

DONE, FAILED, BAD_INPUT, ACCOUNT_REFUSED, NO_MONEY = range(5)

app = App(
    name="prefect-segmind",
    version=__version__,
    help="Pictures from pictures with Segmind's Ideogram 2a, paid for once.",
    result_action="return_value",
)
_people = Console(stderr=True)


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """How a command speaks.

    Attributes:
        json: Print one JSON object on standard output and nothing else there.
        verbose: Show tracebacks and every line of Prefect's log.
    """

    json: bool = False
    verbose: bool = False


def run(arguments: Sequence[str]) -> int:
    """Runs a command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code.
    """
    try:
        result = app(list(arguments), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        text = str(error)
        if "--json" in arguments:
            print(json.dumps(_failure("", InputError(text))))
        _people.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        _people.print("prefect-segmind --help tells what there is.")
        return BAD_INPUT
    except Exception as error:
        return _explain(error, verbose="--verbose" in arguments)
    return result if isinstance(result, int) else DONE


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
    block: str | None = None,
    on_unknown: OnUnknown = "repay",
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
        block: Name of a SegmindCredentials block; SEGMIND_API_KEY if left out.
        on_unknown: Send another request (repay) or not (fail) after one that may have been billed.
        output: How to speak.
    """
    output = output or Output()
    with suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = name or name_from_image(image)

    job: dict[str, Any] = {
        "image": image,
        "prompt": prompt,
        "name": name,
        "image_weight": image_weight,
        "style_type": style_type,
        "resolution": resolution,
        "seed": int(seed) if seed is not None and re.fullmatch(r"-?[0-9]{1,9}", seed) else seed,
        "magic_prompt_option": magic_prompt_option,
        "negative_prompt": negative_prompt,
        "allow_extreme_ratio": allow_extreme_ratio,
    }
    settings: dict[str, Any] = {
        "archive": archive,
        "upload_to": upload_to,
        "credentials_block": block,
        "on_unknown": on_unknown,
    }
    try:
        # Before Prefect sees the parameters and keeps them: a secret in them would stay in its database.
        parse_job(job, allow_unlisted_resolution=load_settings().allow_unlisted_resolution)
        archived = cast(ArchivedImage, image_to_image(**job, **settings))
    except (Exception, KeyboardInterrupt) as error:
        if output.json:
            print(json.dumps(_failure(name, error)))
        return _explain(error, output.verbose)
    if output.json:
        print(json.dumps(success(archived)))
    else:
        print_facts(Console(), outcome(archived))
    return DONE


@app.command
def demo(*, folder: Path = Path("segmind-demo"), verbose: bool = False) -> int:
    """Watch a picture being made against a local sandbox, a rate limit and a gateway error included. Costs nothing.

    Args:
        folder: Where the pictures go; each demo makes a folder of its own in it.
        verbose: Show tracebacks and every line of Prefect's log.
    """
    from prefect_segmind.demonstration import demonstrate

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
) -> int:
    """Serve a stand-in for the API and an S3 server on this machine until Ctrl-C, and print the exports for them.

    Args:
        folder: What the S3 server serves: plain files.
        port: Of the API.
        s3_port: Of the S3 server.
        latency: Seconds that a picture takes.
        credits: USD on the sandbox's account.
        requests_per_minute: A rate limit, if there is to be one.
    """
    from prefect_segmind.demonstration import serve_sandbox

    serve_sandbox(folder, port, s3_port, latency, credits, requests_per_minute, Console())
    return DONE


@app.command
def check(*, block: str | None = None, archive: str | None = None, upload_to: str | None = None) -> int:
    """Check key and credits, upload place, archive, outbox and Prefect; each line is ok or says what to do. Free.

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
        except SegmindError as error:
            found, code = Found(str(error), "bad"), exit_code(error)
        except Exception as error:
            found, code = Found(redact(f"{type(error).__name__}: {error}"), "bad"), FAILED
        colour = {"ok": "green", "mind": "yellow", "bad": "red"}[found.mark]
        console.print(f"[{colour}]{found.mark:<4}[/] [bold]{title}[/]: ", end="")
        console.print(found.text, markup=False, highlight=False, soft_wrap=True)
        codes.append(code)
    return max(codes)


def exit_code(error: BaseException) -> int:
    """The exit code for an error."""
    table: tuple[tuple[type[BaseException], int], ...] = (
        (InputError, BAD_INPUT),
        (AccountError, ACCOUNT_REFUSED),
        (InsufficientCreditsError, NO_MONEY),
        (KeyboardInterrupt, 130),
    )
    return next((code for kind, code in table if isinstance(error, kind)), FAILED)


def success(archived: ArchivedImage) -> dict[str, Any]:
    """What `generate --json` prints of a picture: money as text, all else as it is."""
    return {
        **archived.model_dump(mode="json"),
        "cost_usd": usd(archived.cost_usd),
        "possibly_billed_usd": usd(archived.possibly_billed_usd),
    }


def _failure(name: str, error: BaseException) -> dict[str, Any]:
    known = error if isinstance(error, SegmindError) else SegmindError(_told(error))
    vars(known).update(vars(_noted(error)))
    return {
        "status": "failed",
        "name": name,
        **dict.fromkeys(("image", "sidecar", "fingerprint", "sha256", "width", "height", "seed")),
        "fingerprint": known.fingerprint,
        "cost_usd": usd(known.cost_usd),
        "possibly_billed_usd": usd(known.possibly_billed_usd),
        "attempts": known.requests_sent,
        "error": str(known),
    }


def outcome(archived: ArchivedImage) -> dict[str, str]:
    """What people see of a picture in the terminal."""
    facts = {
        archived.status: archived.name,
        "picture": archived.image,
        "sidecar": archived.sidecar,
        "size, seed": f"{archived.width}×{archived.height}, {archived.seed}",
        "paid": f"{usd(archived.cost_usd)} USD in {archived.attempts} request{'s' * (archived.attempts != 1)}",
    }
    if archived.possibly_billed_usd:
        facts["possibly paid"] = f"{usd(archived.possibly_billed_usd)} USD more"
    return facts


def _explain(error: BaseException, verbose: bool) -> int:
    """Says what went wrong in a few lines, with a traceback only for those who ask."""
    if verbose:
        _people.print_exception()
    _people.print(_told(error), style="red", markup=False, highlight=False, soft_wrap=True)
    if isinstance(error, SegmindError) and error.decision:
        _people.print(f"Not sent again: {error.decision.reason}.", markup=False, highlight=False)
    noted = _noted(error)
    paid = getattr(noted, "cost_usd", Decimal(0))
    possibly = getattr(noted, "possibly_billed_usd", Decimal(0))
    if paid or possibly:
        _people.print(f"Paid: {usd(paid)} USD; possibly billed: {usd(possibly)} USD.", highlight=False)
    elif isinstance(error, SegmindError):
        _people.print("This run paid nothing.")
    return exit_code(error)


def _noted(error: BaseException) -> BaseException:
    """The error on which the stage that pays has noted what was under way; Prefect raises another one after SIGTERM."""
    inner: BaseException | None = error
    while inner is not None and not hasattr(inner, "requests_sent"):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _told(error: BaseException) -> str:
    """An error in words for people."""
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted; a request that was under way may be billed, and the same command again recovers its picture "
            "if it had arrived"
        )
    return str(error) if isinstance(error, SegmindError) else redact(f"{type(error).__name__}: {error}")
