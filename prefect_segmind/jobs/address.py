"""What may stand in the address of a source image, which Prefect, records and sidecars keep."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_plus, urlsplit

from prefect_segmind.redaction import JWT, is_credential

PLAIN: Final = frozenset(
    re.findall(
        r"\w+",
        "w width h height wid hei sw sh maxw maxh minw minh maxwidth maxheight minwidth minheight imwidth imheight "
        "size dim dims dpr dpi scale scalemode resize resolution res rs tr rect rxy xywh ar ratio aspect "
        "aspectratio x y left top right bottom canvas zoom anchor align position gravity focus focal fpx fpy fpz "
        "fpdebug facepad faceindex crop cropmode fit sm mode trim pad padding border bg bgc bgcolor background "
        "backgroundcolor fill color colour colorspace profile icc txt text class blur sharp sharpen unsharp usm "
        "opusm opsharpen resmode bri brightness con contrast sat saturation hue gamma vib invert tint opacity "
        "sepia grayscale greyscale monochrome rotate rot rotation orient flip flop method filter op strip metadata "
        "interlace progressive lossless optimize optimise compress compression frame imdensity impolicy imformat "
        "imbypass fmt fm fl qlt q quality format f ext type mime output auto dl download attachment inline raw ssl "
        "alt variant preset style thumb thumbnail small medium large original v ver version rev revision cb "
        "cachebust cachebuster etag itok rnd rand t ts time timestamp date updated updatedat modified lang locale "
        "page p id index no number name title sku product category brand file filename path url src image img "
        "photo ixlib cs usp utmsource utmmedium utmcampaign utmcontent utmterm source xossprocess c r d random",
    )
)
"""The names of plain parameters, in small letters, without `-` and `_`."""
_PLACES: Final = frozenset({"file", "filename", "path", "url", "src", "image", "img", "photo"})
_LONGEST, _LONGEST_PLACE = 32, 256  # characters of a value
_WORDS = re.compile(r"[\w .,:/|()*+!~-]*", re.ASCII)
# A digest, a key or a coded signature: long, and of letters and digits, or too long for a word.
_RANDOM = re.compile(r"(?=[a-z]*\d|\d+[a-z])[a-z\d]{16,}|[a-z\d]{32,}", re.ASCII | re.I)
_ROUNDS = 4  # of percent-encoding: what is still coded then is not plain


class SecretAddress(ValueError):
    """An address holds a secret."""


class UnclearAddress(ValueError):
    """An address may hold a secret."""


def check_address(address: str) -> None:
    """Checks that an `http(s)` address holds no secret, since a run's parameters, records and sidecars keep it.

    The rule, in any percent-encoding:

    - There is no user and no password, no JSON Web Token, and no pair `name=value` with the usual name of a
      credential: not in the query, in the fragment, or in a segment of the path.
    - Each parameter of the query has one of the names in `PLAIN`, in any case, and a value of at most 32 characters,
      letters, digits, blanks and `.,:/|()*+!~_-`, without a run of letters and digits that looks random: 16 with both,
      or 32. The value of a place, such as `url`, may have 256. A number of at most 14 digits and a preset, `$large$`,
      need no name.
    - A fragment is a word of such characters, or follows the rule of a query.

    Args:
        address: The address.

    Raises:
        SecretAddress: It holds a secret.
        UnclearAddress: Its query or its fragment is not plain.
        ValueError: It is not a URL.

    Example:
        >>> check_address("https://cdn.example/mug.jpg?w=800&q=80&auto=format,compress&v=1690000000")
        >>> check_address("https://cdn.example/mug.jpg?w=800&hdnts=exp~hmac")
        Traceback (most recent call last):
        prefect_segmind.jobs.address.SecretAddress
    """
    parts = urlsplit(address)
    whole = _decoded(address)
    if "@" in _decoded(parts.netloc) or JWT.search(whole) or any(map(is_credential, _names(whole))):
        raise SecretAddress
    fragment = _decoded(parts.fragment)
    if not (_is_plain_query(parts.query) and (_is_word(fragment, _LONGEST) or _is_plain_query(parts.fragment))):
        raise UnclearAddress


def _names(text: str) -> list[str]:
    """The names of all pairs `name=value` in an address."""
    return re.findall(r"(?<![^?#&;/,~=])([^?#&;/,~=]+)=", text)


def _is_plain_query(query: str) -> bool:
    return all(_is_plain(*map(_decoded, part.partition("=")[::2])) for part in query.split("&"))


def _is_plain(name: str, value: str) -> bool:
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in PLAIN:
        return _is_word(value, _LONGEST_PLACE if plain in _PLACES else _LONGEST)
    if plain == "ixid":  # by which Unsplash counts views: no secret, and in every address that one copies there
        return re.fullmatch(r"[\w-]{0,128}={0,2}", value, re.ASCII) is not None
    is_preset = (
        name.startswith("$") and name.endswith("$") and _is_word(name.strip("$"), _LONGEST)
    )  # of Adobe's servers
    return not value and (is_preset or re.fullmatch(r"\d{0,14}", name, re.ASCII) is not None)


def _is_word(text: str, longest: int) -> bool:
    return len(text) <= longest and bool(_WORDS.fullmatch(text)) and not _RANDOM.search(text)


def _decoded(text: str) -> str:
    for _ in range(_ROUNDS):
        text = unquote_plus(text)
    return text
