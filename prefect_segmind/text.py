"""Texts as people write them: surrounding blanks, control characters, forms of Unicode."""

from __future__ import annotations

import re
import unicodedata

from prefect_segmind.errors import ConfigurationError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Characters that no address, setting or name may contain."""
BLANK = r"[\s\u200b\u200e\u200f\u202a\u2060\ufeff]"  # the invisible ones are easily copied with a text
_CONTROLS_TERMINAL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Where blanks begin, so that those inside a text are looked at once and not once from each of them.
_ENDS = re.compile(rf"\A{BLANK}+|(?<!{BLANK}){BLANK}+\Z")


class Spelled(str):
    """A text in normalized spelling, which remembers how it was written.

    Args:
        text: The normalized text.
        written: The text as it was written.

    Attributes:
        written: The text as it was written.
    """

    written: str

    def __new__(cls, text: str, written: str) -> Spelled:
        """Create the text, whose type is immutable."""
        made = super().__new__(cls, text)
        made.written = written
        return made

    def __reduce__(self) -> tuple[type[Spelled], tuple[str, str]]:
        """Copy and pickle both spellings."""
        return Spelled, (str(self), self.written)


def stripped(text: str) -> str:
    """A text without surrounding blanks, including invisible ones unless the text has nothing else.

    Args:
        text: The text.
    """
    return _ENDS.sub("", text) or text.strip()


def printable(text: str) -> str:
    r"""A text without what controls a terminal, or the direction of writing.

    Args:
        text: The text, of unknown origin.

    Example:
        >>> printable("no \x1b[31mcredits\r\n")
        'no [31mcredits'
    """
    return "".join(filter(str.isprintable, text))


def composed(text: str) -> str:
    """A text in Unicode's composed form, NFC.

    Args:
        text: The text.
    """
    return unicodedata.normalize("NFC", text)


def spelled(text: str) -> str:
    r"""A text in normalized spelling: composed (NFC), without surrounding blanks, its lines ended by `\n`.

    Args:
        text: The text; blanks inside it stay.

    Returns:
        The same text, or a `Spelled` if the spelling differs.

    Example:
        >>> spelled("a cafe\u0301 mug\u00a0 ")
        'a café mug'
    """
    clean = composed(stripped(text)).replace("\r\n", "\n").replace("\r", "\n")
    return text if clean == text else Spelled(clean, as_written(text))


def as_written(text: str) -> str:
    """A text as it was written, before it was normalized.

    Args:
        text: The text.
    """
    return text.written if isinstance(text, Spelled) else text


def spellings(location: str) -> list[str]:
    """A location as given, then in the other forms of Unicode, which look alike.

    Args:
        location: The location.
    """
    forms = (unicodedata.normalize(form, location) for form in ("NFC", "NFD"))
    return list(dict.fromkeys((location, *forms)))


QUOTED = re.compile(r"""(?s)(["']).*\1""")
"""A value with its quotes, as `docker run --env-file` passes them on."""


def given_text(field: str, text: str | None) -> str | None:
    """A parameter or variable without surrounding blanks, such as the CR of a Windows line; None if nothing is left.

    Args:
        field: Its name, for the message.
        text: Its value, if there is one.

    Raises:
        ConfigurationError: The value contains a control character.
    """
    clean = stripped(text or "")
    if CONTROL.search(clean):
        raise ConfigurationError(f"{field}: {clean!r} contains a control character; write it again")
    return clean or None


def visible(text: str) -> str:
    r"""A text for people, in which what would steer a terminal or turn the direction of reading is shown as an escape.

    Args:
        text: The text.

    Example:
        >>> visible("mug\u202egpj.exe")
        'mug\\u202egpj.exe'
    """
    return _CONTROLS_TERMINAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
