"""Promises of `prefect_segmind.storage.reserved_file`: what has come is on the disk, and the disk had room for it."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from prefect_segmind.storage.reserved_file import release, replacing, reserve


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "answer.part"


class FullDisk(io.FileIO):
    """A disk with room for `room` bytes, and for those of the reserved space once that is given up."""

    room = 5

    def write(self, data: Any) -> int:
        room = (
            self.room + (0 if (space := Path(str(self.name)).with_suffix(".space.part")).exists() else 10) - self.tell()
        )
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(space))
        return super().write(data[:room])


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return FullDisk(path, "w") if mode == "wb" and path.suffix == ".part" else real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", opened)


def test_what_was_written_is_in_the_file_at_once_and_nothing_else(file: Path) -> None:
    file.write_bytes(b"an earlier answer")
    with replacing(file) as write:
        assert file.read_bytes() == b""
        write(b"half")
        assert file.read_bytes() == b"half"
        write(b" and half")
        assert file.read_bytes() == b"half and half"


def test_the_space_is_used_when_the_disk_is_full_otherwise(file: Path, full_disk: None) -> None:
    reserve(file, 10)
    with replacing(file) as write:
        write(b"0123")
        assert file.with_suffix(".space.part").exists()
        write(b"456789")
        assert not file.with_suffix(".space.part").exists()
    assert file.read_bytes() == b"0123456789"


def test_what_a_disk_has_written_before_it_failed_is_not_there_twice(
    file: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FullDisk.write

    def written_and_failed(disk: FullDisk, data: Any) -> int:
        had_space = file.with_suffix(".space.part").exists()
        count = real(disk, data)
        if had_space:
            raise OSError(errno.ENOSPC, "No space left on device")
        return count

    monkeypatch.setattr(FullDisk, "write", written_and_failed)
    reserve(file, 10)
    with replacing(file) as write:
        write(b"0123456789")
    assert file.read_bytes() == b"0123456789"


def test_a_disk_that_is_full_all_the_same_is_an_error_and_what_fits_stays(file: Path, full_disk: None) -> None:
    reserve(file, 10)
    with pytest.raises(OSError, match="No space left"), replacing(file) as write:
        write(b"0123456789abcdefgh")
    assert file.read_bytes() == b"0123456789abcde"


def test_the_space_is_given_up_once(file: Path) -> None:
    reserve(file, 10)
    assert (release(file), release(file)) == (True, False)
    assert file.exists()


@pytest.mark.parametrize("is_reserved", [True, False])
def test_nobody_else_may_read_it(file: Path, is_reserved: bool) -> None:
    if is_reserved:
        reserve(file, 10)
    with replacing(file) as write:
        write(b"a signed link")
        assert file.stat().st_mode & 0o077 == 0
    assert file.stat().st_mode & 0o077 == 0
