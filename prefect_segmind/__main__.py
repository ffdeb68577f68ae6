"""The console script: sets Prefect up for a short command, then hands over to the command line."""

from __future__ import annotations

import os
import sys

from prefect_segmind.cli.streams import restart_in_utf8, unfailing_output


def main() -> None:
    """Runs `prefect-segmind` and exits with its code."""
    restart_in_utf8()
    # Prefect reads these on import. It waits 20 s for its temporary server, too short for a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    # It records task runs one by one, too slow for a batch, and drops those that it cannot keep up with.
    os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE", "100")
    os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE", "100")
    console = "CommandConsole" if "--verbose" in sys.argv else "QuietConsole"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS", f"prefect_segmind.cli.terminal.{console}")
    if sys.argv[1:2] == ["demo"]:
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")  # no request of a demo leaves the machine
        os.environ.setdefault("DO_NOT_TRACK", "1")
    with unfailing_output():
        try:
            from prefect_segmind.cli.commands import run

            code = run(sys.argv[1:])
        except KeyboardInterrupt:  # before a command began, or after
            code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
