"""Keeps Prefect's temporary server, which runs where none is configured, alive through Ctrl-C and a hang-up."""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
from typing import Any

from prefect.settings import PREFECT_API_URL


def shield_temporary_server() -> None:
    """Makes the temporary server that Prefect may start ignore Ctrl-C and SIGHUP; Prefect still stops it.

    A terminal sends both to the server too. Without the server a run could not end: Prefect retries it for minutes.
    """
    if sys.platform == "win32" or PREFECT_API_URL.value():
        return
    from prefect.server.api.server import SubprocessASGIServer  # slow to import

    class ShieldedServer(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            # uvicorn sets its own handlers, so ignoring the signals is not enough; a blocked signal stays blocked.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            try:
                # Before an interrupt is raised, so that `stop` finds it.
                self.server_process = super()._run_uvicorn_command()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return self.server_process

    atexit.register(ShieldedServer().stop)  # Prefect reuses the first instance
