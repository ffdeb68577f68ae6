"""The console script: sets Prefect up for a short command, then hands over to the command line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs `prefect-segmind` and exits with its code."""
    # Prefect reads these when it is imported. Its temporary server gives up after 20 s, too soon for a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    if "--verbose" not in sys.argv:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS", "prefect_segmind.console.QuietConsole")
    if sys.argv[1:2] == ["demo"]:
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")  # no request of a demo leaves the machine
        os.environ.setdefault("DO_NOT_TRACK", "1")
    from prefect_segmind.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
