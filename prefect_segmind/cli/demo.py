"""The `demo` and `sandbox` commands: the plugin at work against stand-ins on this machine."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from prefect_segmind.cli.output import address_in_ui
from prefect_segmind.cli.terminal import print_facts
from prefect_segmind.flows import image_to_image
from prefect_segmind.money import LIST_PRICE_USD, usd
from prefect_segmind.sandbox import Answer, Sandbox, sample_photo
from prefect_segmind.tasks.interrupts import end_command_on_signals

PROMPT = "a ceramic mug on a picnic blanket, late summer light, soft shadows"


def demonstrate(folder: Path, console: Console) -> None:
    """Makes a picture of a drawn photo twice, against a sandbox that first answers 429, then loses an answer.

    Args:
        folder: Where to create the demo's own folder.
        console: Where to print.
    """
    home = (folder / datetime.now().strftime("%Y%m%d-%H%M%S")).resolve()
    home.mkdir(parents=True)
    photo = home / "mug.jpg"
    photo.write_bytes(sample_photo())
    with Sandbox(home, latency=2.0) as sandbox:
        os.environ.pop("AWS_PROFILE", None)
        os.environ.update(sandbox.environment())
        sandbox.play(Answer(status=429, reset_in=3), Answer(status=502, billed=True))
        console.rule("A local photo becomes a picture; the API refuses once, and then the answer is lost")
        console.print(
            f"The price: 1 picture, {usd(LIST_PRICE_USD)} USD at the list price (this sandbox takes no real money)."
        )
        state = image_to_image(
            image=str(photo), prompt=PROMPT, style_type="ANIME", image_weight=60, resolution="AUTO", return_state=True
        )
        first = state.result()
        console.rule("The same job again")
        second = image_to_image(image=str(photo), prompt=PROMPT, style_type="ANIME", image_weight=60, resolution="AUTO")
        billed, spent = sandbox.ledger.billed, sandbox.ledger.billed_usd
    console.rule("The result")
    after = home / "s3" / first.image.removeprefix("s3://")
    facts = {
        "before": str(photo),
        "after": str(after),
        "sidecar": str(after.with_suffix(".json")),
        "first run": f"{first.status} after {first.attempts} requests, paid {usd(first.cost_usd)} USD"
        " (the answer was a 502; the picture is from the provider's history, and not paid for again)",
        "second run": f"{second.status}, paid {usd(second.cost_usd)} USD",
        "ledger": f"the sandbox billed {billed} picture{'s' * (billed != 1)}, {usd(spent)} USD",
        "in the UI": address_in_ui(str(state.state_details.flow_run_id)),
    }
    print_facts(console, facts)


def serve(sandbox: Sandbox, console: Console) -> None:
    """Serves a sandbox until Ctrl-C, SIGTERM or SIGHUP, and prints the exports that point the plugin at it.

    Args:
        sandbox: The sandbox, not started yet.
        console: Where to print.
    """
    end_command_on_signals()
    with sandbox:
        lines = (
            "# The sandbox runs until Ctrl-C. In another terminal: paste these lines, then prefect-segmind generate …",
            f"# Pictures are plain files in {sandbox.folder / 's3/segmind/archive'}; the key is new at each start.",
            "unset AWS_PROFILE",
            *(f"export {name}={shlex.quote(value)}" for name, value in sandbox.environment().items()),
        )
        for line in lines:
            console.print(Text(line), soft_wrap=True)
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            ledger = sandbox.ledger
            console.print(f"\n{ledger.billed} pictures billed, {usd(ledger.billed_usd)} USD of no real money.")
