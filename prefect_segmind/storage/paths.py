"""Local paths as people write them: other forms of Unicode, backslashes, typing mistakes."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path

from prefect_segmind.text import spellings


def found_path(given: str | Path) -> Path:
    r"""The path of a file or folder, each part as given or, if that does not exist, in another spelling.

    Other spellings are the other forms of Unicode, which look alike: macOS and some archives decompose names. A Windows
    path, `photos\mug.jpg`, is also tried with slashes.

    Args:
        given: The path.

    Returns:
        The path that exists; the given one if none does.
    """
    path = Path(given)
    with suppress(RuntimeError, ValueError):  # the home of an unknown user, or one that cannot be a user's name
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


def is_there(path: Path) -> bool:
    """Whether a path exists.

    Args:
        path: The path; one that this system does not allow does not exist.
    """
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for names that the system does not allow


def may_be_there(path: Path) -> bool:
    """Whether a file is there, or the disk cannot tell: False only where there is certainly none.

    Args:
        path: The file.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def missing_file(path: Path, *, folders: bool = False) -> str:
    """A message about a missing file, with the nearest name in its folder: `does not exist (did you mean mug.jpg?)`.

    Args:
        path: The path that does not exist.
        folders: Whether to look for folders only.
    """
    names: list[str] = []
    with suppress(OSError, ValueError):  # the message then has the folder alone
        names = [each.name for each in path.parent.iterdir() if each.is_dir() or not folders]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"does not exist ({f'did you mean {near[0]}?' if near else f'looked in {path.parent.absolute()}'})"


def missing(image: str) -> str:
    """A message about a missing local image, with a hint.

    Args:
        image: The path as given.
    """
    if os.name != "nt" and on_windows(image):
        hint = "a path on a Windows disk, which this machine does not have; write one relative to the manifest"
        return f"image: {image} does not exist ({hint})"
    return f"image: {image} {missing_file(found_path(image).expanduser())}"


def on_windows(image: str) -> bool:
    r"""Whether a path is an absolute one of Windows, `C:\photos\mug.jpg` or `\\server\photos\mug.jpg`.

    Args:
        image: The path as given.
    """
    return re.match(r"[A-Za-z]:[\\/]|\\\\\w", image) is not None
