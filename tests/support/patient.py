"""A client for a Prefect server whose database is locked now and then."""

from __future__ import annotations

import time

import httpx


class PatientTransport(httpx.HTTPTransport):
    """Asks again where the answer is 503, as Prefect's own clients do."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for _ in range(40):
            response = super().handle_request(request)
            if response.status_code != 503:
                break
            response.close()
            time.sleep(0.25)
        return response
