"""What a secret looks like in a text, and how it is left out: keys, signatures, queries and passwords of addresses.

Every rule takes time in proportion to the text, which may be a stranger's.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final

CREDENTIALS: Final = frozenset(
    re.findall(
        r"\w+",
        "auth authorization authkey bearer token jwt hdnts hdnea hdntl key secret sig s sign signed signature hash "
        "hmac policy keypairid accesskeyid awsaccesskeyid googleaccessid ossaccesskeyid credential credentials user "
        "username pass passwd passphrase password pw pwd pin otp code ticket nonce session sessionid sid jsessionid "
        "phpsessid se sp sr sv st e exp expires md5",
    )
)
"""The usual names of credentials, and of what comes with them, in addresses: in small letters, without punctuation."""
_ENDINGS: Final = ("apikey", "authkey", "accesskey", "secret", "signature", "token", "password", "credential", "jwt")
_FAMILIES: Final = ("xamz", "xgoog", "xoss", "xms")

JWT: Final = re.compile(r"(?<![\w-])eyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?", re.ASCII)
"""A JSON Web Token."""

_CODED = re.compile(
    r"%(?:25)*([0-9A-Fa-f]{2})|\\u00([0-9A-Fa-f]{2})|\\x([0-9A-Fa-f]{2})|&#[xX]0*([0-9A-Fa-f]{2});"
    r"|&#0*(\d{2,3});|&(amp|lt|gt|quot|apos);|\\(/)"
)
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}
_ROUNDS = 3  # of coding: a query in a query in JSON
_CODED_END = "\ufffc"  # stands for a coded character that would end an address if it were not coded

_KEY = re.compile(r"(?:SG_|(?<![a-z])sg_(?=[0-9a-f]{12}))([0-9A-Za-z]{6,})")
# Of any scheme. The query is optional, so that what was searched for one is not searched again. A single quote may be
# part of an address; it ends one if the text closes after it. A question mark in `s3://` belongs to the key.
_QUERY = re.compile(r"""(?<![sS]3)://[^\s?"<>]+(?:\?((?:[^\s"'<>]|'(?![\s,.;:)\]}>"']|$))*))?""")
_USERINFO = re.compile(r"""://([^\s/"<>]*)@""")
# Anywhere in a text: an address with a space in it is not recognized. What is part of a key in S3 is no query.
_PAIR = re.compile(
    rf"""(?ix) s3://[^\s"'<>]+
    | (?: (?:signature|[_-]?token|api[_-]?key|auth[_-]?key|access[_-]?key|secret|passw(?:or)?d|jwt
        |x-(?:amz|goog|oss)-[a-z-]{{1,40}} |\b(?:sig|hmac|hdn(?:ts|ea|tl)|key-pair-id|awsaccesskeyid))
      | [?&;\#{_CODED_END}](?:s[eprtv]?|e|key|auth(?:orization)?|policy|pass|pwd|exp(?:ires)?|session(?:id)?) )
    (?: [=>] | :\s{{0,9}}(?=[0-9a-f]{{32}})
      | \\{{0,3}}["'{_CODED_END}]\s{{0,9}}[=:]\s{{0,9}}\\{{0,3}}["'{_CODED_END}] ) (?!…(?:\W|\Z)) ([^\s&"'<>]+)"""
)
# As a header is written, in a list or an object too: its value may have blanks in it.
_HEADER = re.compile(
    rf"""(?i)\b(?:(?:proxy-)?authorization|x-api-key|x-amz-security-token|(?:set-)?cookie)\b"""
    rf"""(?:\\{{0,3}}["'{_CODED_END}]\s{{0,9}}[:=,]|\s{{0,9}}[:=])\s{{0,9}}(?:b?\\{{0,3}}["'{_CODED_END}])?([^\r\n"']+)"""
)


def is_credential(name: str) -> bool:
    """Whether a name in an address is a usual one for a credential, or for what comes with one.

    Args:
        name: The name, decoded; case and punctuation do not count.

    Example:
        >>> is_credential("X-Amz-Date"), is_credential("upload_token"), is_credential("width")
        (True, True, False)
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    family = plain.startswith(_FAMILIES) and plain != "xossprocess"  # which resizes
    return plain in CREDENTIALS or plain.endswith(_ENDINGS) or family


def writable(text: str) -> str:
    r"""A text that can be written anywhere: bytes of a file's name that are not UTF-8 are shown as escapes.

    Args:
        text: The text.

    Example:
        >>> writable("caf\udce9.jpg")
        'caf\\udce9.jpg'
    """
    return text.encode(errors="backslashreplace").decode()


def redact(text: str, *secrets: str) -> str:
    """A text without API keys, the given secrets, and the queries and passwords of URLs; it is `writable` too.

    They are recognized in any coding: percent-encoded, as escapes of JSON or HTML, each more than once, in any case.

    Args:
        text: The text.
        secrets: Secrets to leave out.

    Example:
        >>> redact("GET https://b.example/k?X-Amz-Signature=ab with SG_0123456789abcdef")
        'GET https://b.example/k?… with SG_…'
        >>> redact("GET https%3A%2F%2Fb.example%2Fk%3FX-Amz-Signature%3Dab")
        'GET https%3A%2F%2Fb.example%2Fk%3F…'
    """
    text = writable(text)
    view, starts = _decoded(text)
    named = (
        re.sub(r"\\[\s&]|[\"'<>]", rf"[\g<0>{_CODED_END}]", re.escape(_decoded(each)[0])) for each in secrets if each
    )
    cuts = [match.span() for each in named for match in re.finditer(each, view, re.I)]
    cuts += [match.span() for match in JWT.finditer(view)]
    for form in (_KEY, _QUERY, _USERINFO, _PAIR, _HEADER):
        cuts += [match.span(1) for match in form.finditer(view) if match[1] is not None]
    shown, at = list[str](), 0
    for start, end in sorted(cuts):
        if starts:
            start, end = starts[start], starts[end]
        if start >= at or not shown:
            shown += [text[at:start], "…"]
        at = max(at, end)
    return "".join([*shown, text[at:]])


def _decoded(text: str) -> tuple[str, list[int]]:
    """A text without codings, and where each of its characters begins in the text; no places where nothing is coded.

    A coded blank or quote never ends an address or a value.
    """
    view, starts = text, list[int]()
    for _ in range(_ROUNDS):
        if not _CODED.search(view):
            break
        starts = starts or list(range(len(text) + 1))
        characters, places, at = list[str](), list[int](), 0
        for match in _CODED.finditer(view):
            characters += [view[at : match.start()], _character(match)]
            places += [*starts[at : match.start()], starts[match.start()]]
            at = match.end()
        view, starts = "".join([*characters, view[at:]]), places + starts[at:]
    if not starts:
        return view, starts
    coded = (end - start > 1 for start, end in pairwise(starts))
    return "".join(
        _CODED_END if is_coded and (each.isspace() or each in "\"'<>&") else each
        for each, is_coded in zip(view, coded, strict=True)
    ), starts


def _character(match: re.Match[str]) -> str:
    *hexadecimal, decimal, entity, slash = match.groups()
    if entity or slash:
        return _ENTITIES[entity] if entity else str(slash)
    return chr(int(next(filter(None, hexadecimal)), 16) if decimal is None else int(decimal))
