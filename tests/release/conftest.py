from tests.server.conftest import _prefect_server, prefect_server

__all__ = ["_prefect_server", "prefect_server"]
