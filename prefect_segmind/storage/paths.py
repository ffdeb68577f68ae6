"""Local paths as people write them: another form of Unicode, backslashes, typing mistakes."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path

from prefect_segmind.text import spellings


def found_path(given: str | Path) -> Path:
    r"""The path of a file or folder, each part of it as it is given or, where that is not there, in another spelling.

    Other spellings are the other forms of Unicode, which look alike: macOS and some archives decompose names. And a
    path of Windows, `photos\mug.jpg`, is one with slashes. A path that is not found is returned as it is given.
    """
    path = Path(given)
    try:
        wanted = path.expanduser()
        if is_there(wanted) or (str(wanted).isascii() and "\\" not in str(wanted)):
            return path
        for each in dict.fromkeys((wanted, Path(str(wanted).replace("\\", "/")))):
            found = Path(each.anchor)
            for part in each.parts[bool(each.anchor) :]:
                found = next((there for form in spellings(part) if is_there(there := found / form)), found / part)
            if is_there(found):
                return found
        return path
    except RuntimeError:  # the home of an unknown user
        return path


def is_there(path: Path) -> bool:
    """Whether a path leads to something."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that this system does not allow
        return False


def missing_file(path: Path, *, folders: bool = False) -> str:
    """Why there is no such file, with the nearest name in its folder: `does not exist (did you mean mug.jpg?)`.

    Args:
        path: The path that leads to nothing.
        folders: Whether a folder is meant.
    """
    names: list[str] = []
    with suppress(OSError, ValueError):  # a folder that cannot be listed is named all the same
        names = [each.name for each in path.parent.iterdir() if each.is_dir() or not folders]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"does not exist ({f'did you mean {near[0]}?' if near else f'looked in {path.parent.absolute()}'})"


def missing(image: str) -> str:
    """The mistake of a local image that does not exist."""
    if os.name != "nt" and on_windows(image):
        hint = "a path on a Windows disk, which this machine does not have; write one relative to the manifest"
        return f"image: {image} does not exist ({hint})"
    return f"image: {image} {missing_file(found_path(image).expanduser())}"


def on_windows(image: str) -> bool:
    r"""Whether this is a whole path of Windows, `C:\photos\mug.jpg` or `\\server\photos\mug.jpg`."""
    return re.match(r"[A-Za-z]:[\\/]|\\\\\w", image) is not None
