"""The identity of a job's picture: two jobs with the same fingerprint ask for the same picture, paid for once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from prefect_segmind.api.request import ENDPOINT


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes.

    Args:
        value: A JSON value.

    Example:
        >>> canonical_json({"b": 1, "a": "é"}).decode()
        '{"a":"é","b":1}'
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def fingerprint(source: str, parameters: Mapping[str, object]) -> str:
    """SHA-256, in hex, of everything that changes the picture.

    Args:
        source: SHA-256 of the source image's content; earlier versions took that of its URL where it could not be read.
        parameters: Every parameter of the request but `image_file`, the seed included. Not the attempt, the host, the
            key or the job's name: they do not change the picture.

    Example:
        >>> fingerprint("0" * 64, {"prompt": "a red mug", "seed": 100})[:8]
        'c4edeff8'
    """
    what = {"endpoint": ENDPOINT, "source": source, "parameters": _plain(parameters)}
    return hashlib.sha256(canonical_json(what)).hexdigest()


def derived_seed(source: str, parameters: Mapping[str, object]) -> int:
    """The seed, 100 to 999999, of a job without one: the same job always gets the same seed.

    Args:
        source: As for `fingerprint`.
        parameters: As for `fingerprint`, without the seed.
    """
    digest = hashlib.sha256(canonical_json({"source": source, "parameters": _plain(parameters)})).digest()
    return 100 + int.from_bytes(digest, "big") % 999_900


def _plain(parameters: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in parameters.items() if value is not None}
