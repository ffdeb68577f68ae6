"""Prefect's temporary server, which runs where none is configured, kept alive through a Ctrl-C and a hang-up."""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
from typing import Any

from prefect.settings import PREFECT_API_URL


def shield_temporary_server() -> None:
    """Makes the temporary server that Prefect may start deaf to Ctrl-C and SIGHUP; Prefect still ends it.

    A terminal sends both to the server too. Without the server a run could not end: Prefect asks it for minutes.
    """
    if sys.platform == "win32" or PREFECT_API_URL.value():
        return
    from prefect.server.api.server import SubprocessASGIServer  # slow to import

    class ShieldedServer(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            # uvicorn sets a handler of its own, so that an ignored signal would not do; a blocked one is inherited.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            try:
                self.server_process = super()._run_uvicorn_command()  # known to `stop` before an interrupt is raised
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return self.server_process

    atexit.register(ShieldedServer().stop)  # the first one that is made is the one that Prefect uses
