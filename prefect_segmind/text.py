"""Texts as people write them: blanks around them, control characters, their forms in Unicode."""

from __future__ import annotations

import re
import unicodedata

from prefect_segmind.errors import ConfigurationError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What no place, setting or name holds."""
BLANK = r"[\s\u200b\u200e\u200f\u202a\u2060\ufeff]"  # what cannot be seen at the end of a text, and is copied with it
_ENDS = re.compile(rf"\A{BLANK}+|{BLANK}+\Z")


class Spelled(str):
    """A text in its one spelling.

    Attributes:
        written: How it was written.
    """

    written: str

    def __new__(cls, text: str, written: str) -> Spelled:
        """A text and how it was written."""
        made = super().__new__(cls, text)
        made.written = written
        return made

    def __reduce__(self) -> tuple[type[Spelled], tuple[str, str]]:
        """For copies and pickles."""
        return Spelled, (str(self), self.written)


def stripped(text: str) -> str:
    """A text without the blanks around it, those of no width too unless there is nothing else."""
    return _ENDS.sub("", text) or text.strip()


def composed(text: str) -> str:
    """A text in the form of Unicode that is used for texts, NFC."""
    return unicodedata.normalize("NFC", text)


def spelled(text: str) -> str:
    r"""A text in its one spelling: composed (NFC), nothing blank around it, its lines ended by `\n`.

    Where that changes it, it is a `Spelled`, which knows how it was written. What is blank inside of it stays.

    Example:
        >>> spelled("a cafe\u0301 mug\u00a0 ")
        'a café mug'
    """
    clean = composed(stripped(text)).replace("\r\n", "\n").replace("\r", "\n")
    return text if clean == text else Spelled(clean, as_written(text))


def as_written(text: str) -> str:
    """A text as it was written, before it got its one spelling."""
    return text.written if isinstance(text, Spelled) else text


def spellings(location: str) -> list[str]:
    """A location as it is given, then in the other forms of Unicode: who names a file does not see which it has."""
    forms = (unicodedata.normalize(form, location) for form in ("NFC", "NFD"))
    return list(dict.fromkeys((location, *forms)))


QUOTED = re.compile(r"""(?s)(["']).*\1""")
"""A value whose quotes have become part of it, as `docker run --env-file` passes them on."""


def given_text(field: str, text: str | None) -> str | None:
    """A parameter or variable without the blanks around it, such as the CR of a Windows line; None if nothing is left.

    Args:
        field: What it is called, for the message.
        text: Its value, if it is given.

    Raises:
        ConfigurationError: There is a control character in it.
    """
    clean = stripped(text or "")
    if CONTROL.search(clean):
        raise ConfigurationError(f"{field}: {clean!r} holds a control character; write it anew")
    return clean or None
