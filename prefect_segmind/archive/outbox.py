"""The outbox: a folder on this machine that holds a paid picture from the moment its answer has been read until the
archive has it. Each archive has its own outbox, as it has its own records.

A picture is `{fingerprint}.{sha256[:16]}.{ext}`, its facts are in the same name with `.json`; earlier versions wrote
`{fingerprint}.{ext}`. Two pictures that were paid for under one fingerprint lie side by side. An answer that is still
arriving is `{fingerprint}.{run}.part`, which is as long as what has arrived, whatever ends the run. Where the system
supports it, space for an answer is reserved before the request is sent, in `….space.part` beside it, so that a full
disk costs nothing.

What a request is for is in `{fingerprint}.{run}.asked.json`, as long as nothing else says it. (Earlier versions take no
file for a picture that ends in `.json`.)

An answer that was paid for and could not be read as a picture is `{fingerprint}.{run}.{number}.answer`, as received,
readable by the user only, since a link in it may be signed; the facts in its headers are in `….answer.json`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from pathlib import Path

from pydantic import BaseModel, ValidationError

from prefect_segmind.api.picture import Answered, PaidPicture
from prefect_segmind.api.response import Link, picture_or_link
from prefect_segmind.archive.record import Asked, Attempt
from prefect_segmind.errors import ApiError, OutboxError, ResultLinkError
from prefect_segmind.images.inspection import BrokenPicture, Picture, picture_of, read_picture
from prefect_segmind.storage.disk_errors import disk_errors, reason
from prefect_segmind.storage.local import sync
from prefect_segmind.storage.paths import may_be_there
from prefect_segmind.storage.reserved_file import SPACE_SUFFIX, release, reserve

RESERVED_BYTES = 8 << 20
"""Bytes reserved on disk before a request is sent; more than the largest picture of the listed resolutions needs."""

_NO_PICTURES = (".json", ".facts", ".part", ".found", ".answer")
_LOOKS = 10
"""How often the folder is listed again because a file in it has vanished meanwhile."""
ABANDONED_SECONDS = 86_400.0
"""The age of reserved space that no request needs any more."""
_REMEDY = "nothing was paid (free space there, or set PREFECT_INTEGRATIONS_SEGMIND_OUTBOX to another folder)"

Reader = Callable[[Path, Path], Picture]
"""Reads the picture in the body of a 200, the first file; writes it to the second if the body is not the picture."""


class OutboxEntry(Asked):
    """The facts of a picture in the outbox.

    Attributes:
        paid: The facts of the picture.
        attempts: The requests that were sent for it.
    """

    paid: PaidPicture
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class Waiting:
    """A file in an outbox that was paid for.

    Attributes:
        path: The file.
        fingerprint: The job's.
        size_bytes: Its size.
        written: When it was written, UTC.
        asked: What it is for.
        cost_usd: What was paid for it; None if that is not known.
        is_answer: Whether it is an answer that could not be read as a picture.
    """

    path: Path
    fingerprint: str
    size_bytes: int
    written: datetime
    asked: Asked
    cost_usd: Decimal | None
    is_answer: bool


@dataclass(frozen=True)
class Outbox:
    """The folder of paid pictures.

    Attributes:
        folder: Created when it is first needed. In a container it must be on a volume.
        min_free_bytes: The free space without which nothing is paid for.
        also: More folders that may have pictures for the same archive; nothing new is put there.
    """

    folder: Path
    min_free_bytes: int = 100_000_000
    also: tuple[Path, ...] = ()

    def reaching(self, fingerprint: str, kept: Iterable[str]) -> Outbox:
        """The outbox, and the other folders that a record names, as far as this machine can read them.

        Args:
            fingerprint: The record's; a file whose name does not begin with it is not taken.
            kept: Paths and hosts, as in `Attempt.kept`.
        """
        folders = []
        for each in kept:
            path = path_and_host(each)[0]
            with suppress(OSError, ValueError):
                theirs = path.is_absolute() and path.name.startswith(f"{fingerprint}.")
                # By now it may have another name there: a run that was interrupted had read it.
                if theirs and any(os.access(each, os.R_OK) for each in path.parent.glob(f"{fingerprint}.*")):
                    folders.append(path.parent)
        return replace(self, also=(*self.also, *folders)) if folders else self

    def check(self) -> None:
        """Create the folder, and check that it can take a picture.

        Raises:
            OutboxError: It cannot be created or written, or has too little free space. Nothing was paid.
        """
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        if free < self.min_free_bytes:
            raise self._unusable(f"{free / 1e6:.0f} MB are free, {self.min_free_bytes / 1e6:.0f} MB are needed")
        if not os.access(self.folder, os.W_OK):
            raise self._unusable("it cannot be written")

    @contextmanager
    def receive(self, fingerprint: str, run: str, asked: Asked | None = None) -> Iterator[Path]:
        """Yield the file for the answer to the next request, with its space reserved.

        It is removed if the API has answered with an error, or its answer was cut. After anything else, an interrupt
        for example, the bytes received so far stay: they may be a picture, and paid for. No other user can read them.

        Args:
            fingerprint: The job's.
            run: The run that sends the request.
            asked: What it is for.

        Raises:
            OutboxError: The space cannot be reserved. Nothing was paid.
        """
        self.check()
        part = self._part(fingerprint, run)
        try:
            with self._disk_errors():
                reserve(part, RESERVED_BYTES)
                if asked:
                    _write(_asked_path(part), asked)
            yield part
        except BaseException as error:
            with suppress(OSError, OutboxError):  # the failure counts, not what becomes of its remains
                if (isinstance(error, ApiError) and error.answered is None) or not _arrived(part):
                    part.unlink(missing_ok=True)
            raise
        else:
            _discard(part)
        finally:
            release(part)
            with suppress(OSError):  # nor does it count that the disk cannot tell what is left
                if not part.exists() and not part.with_suffix(".1.answer").exists():
                    _discard(_asked_path(part))

    def arrived(self, part: Path) -> Path | None:
        """The file for an answer, if something has arrived in it, which stays when the run is interrupted now.

        Args:
            part: The file.
        """
        with suppress(OutboxError):
            return part if _arrived(part) else None
        return part

    def keep(self, fingerprint: str, part: Path, entry: OutboxEntry) -> Path:
        """Make a received answer durable: synced to disk and renamed, so that a crash leaves it whole or not at all.

        Args:
            fingerprint: The job's.
            part: The picture as received.
            entry: Its facts.

        Returns:
            The picture's path.

        Raises:
            OutboxError: The disk failed under a picture that was paid for.
        """
        path = part.with_name(f"{fingerprint}.{entry.paid.sha256[:16]}.{entry.paid.extension}")
        facts = part.with_suffix(".facts")
        try:
            renamed = False
            try:
                sync(part)
            except FileNotFoundError:  # another run of the same job has renamed it
                renamed = True
            _note(facts, entry)  # first: wherever the process is killed, the picture has its facts beside it
            with suppress(FileNotFoundError):
                part.replace(path)
            if renamed:
                sync(path)
            sync(path.parent)
        except OSError as error:
            failure = f"outbox: {part} holds a picture that was paid for and could not be made durable: {reason(error)}"
            raise OutboxError(failure, status=200, possibly_billed=True) from error
        with suppress(OSError):  # the picture is found without its facts too
            facts.replace(path.with_suffix(".json"))
            _discard(_asked_path(part))
        return path

    def keep_answer(self, part: Path, answered: Answered) -> Path | None:
        """Keep the body of a 200 that could not be read as a picture, for good: no later one replaces it.

        Args:
            part: The body as received; a file beside it with the suffix `.found` is the download of a link in it.
            answered: The facts in the headers.

        Returns:
            Its new path; None if there is none, or it was empty.

        Raises:
            OutboxError: The disk failed; the body is still in `part`.
        """
        found = part.with_suffix(".found")
        try:
            if found.exists():
                self._set_aside(found, answered)
            return self._set_aside(part, answered)
        except OSError as error:
            failure = f"outbox: {part} holds an answer that was paid for and could not be made durable: {reason(error)}"
            raise OutboxError(failure, status=200) from error

    def remove_answer(self, fingerprint: str, sent: Attempt, attempts: Iterable[Attempt]) -> None:
        """Remove the answer without a picture to a request whose picture has come by another way, as far as possible.

        Args:
            fingerprint: The job's.
            sent: The request. A process that was killed may not have noted where its answer is kept.
            attempts: All requests for the picture; answers to others stay.
        """
        others = [each for each in attempts if each.request != sent.request]
        if any(each.run == sent.run and not each.kept and each.possibly_billed is not False for each in others):
            return  # it may be the answer to that one
        stay = {path_and_host(each.kept)[0].name for each in others if each.kept}
        stem = self._part(fingerprint, sent.run).stem
        with suppress(OutboxError):
            for each in self.reaching(fingerprint, [sent.kept] if sent.kept else []).answers(fingerprint):
                if each.name.startswith(f"{stem}.") and each.name not in stay:
                    _discard(_facts_path(each), each)

    def _set_aside(self, file: Path, answered: Answered | None) -> Path | None:
        if not file.exists():
            return None
        if not file.stat().st_size:
            file.unlink()
            return None
        file.chmod(0o600)
        sync(file)
        path = next(path for number in count(1) if not (path := file.with_suffix(f".{number}.answer")).exists())
        file.rename(path)
        sync(path.parent)
        with suppress(OSError):  # the answer is safe, and is read without its facts too
            if answered is not None:
                _write(_facts_path(path), answered)
        return path

    def answers(self, fingerprint: str) -> list[Path]:
        """The paid answers for a job that could not be read as a picture.

        Args:
            fingerprint: The job's.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        return sorted(each for each in self._listed(fingerprint) if each.suffix == ".answer")

    def read_again(
        self,
        fingerprint: str,
        run: str,
        read: Reader,
        *,
        seed: int,
        list_price_usd: Decimal,
        attempts: Sequence[Attempt] = (),
    ) -> tuple[Path, OutboxEntry] | None:
        """The picture in an answer that could not be read at first, made durable; None if it still cannot be read.

        The same for an answer that a run had received whole when it was interrupted.

        Args:
            fingerprint: The job's.
            run: The run that reads.
            read: Reads an answer.
            seed: The job's.
            list_price_usd: The assumed cost of an answer whose headers were not kept.
            attempts: All requests for the picture, as far as they are known.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        received = list(filter(_arrived, self._listed(fingerprint)))
        for body in (*self.answers(fingerprint), *received):
            found = body.with_name(self._part(fingerprint, run).with_suffix(".found").name)
            try:
                found.unlink(missing_ok=True)
                picture = read(body, found)
                answered = _facts_of(body) or _assumed(body, list_price_usd)
            except ApiError as error:
                self._keep_found(found, body)
                if isinstance(error, ResultLinkError) and body in received:
                    with suppress(OSError):  # an answer with a link in it is whole
                        self._set_aside(body, None)
                continue
            except FileNotFoundError:
                continue  # another run has read it meanwhile
            except OSError as error:
                raise self._unusable(f"{body.name} cannot be read: {reason(error)}") from error
            try:
                entry = OutboxEntry(paid=answered.brought(picture, seed), **_asked(body).model_dump())
                path = self.keep(fingerprint, found if found.exists() else body, entry)
            except (FileNotFoundError, OutboxError):
                if may_be_there(body):
                    raise
                continue  # another run has kept it meanwhile
            _discard(body, _facts_path(body))
            sent = next((each for each in reversed(attempts) if each.run == entry.run), None)
            if sent is not None and body in received:  # it may have been downloaded after an answer without a picture
                self.remove_answer(fingerprint, sent, attempts)
            return path, entry
        return None

    def _keep_found(self, found: Path, body: Path) -> None:
        """Keep the download of a link in an answer, unless it is kept already: the link may expire."""
        with suppress(OSError):
            new = found.read_bytes()
            known = _facts_of(body)
            same = any(each.read_bytes() == new for each in self.answers(_fingerprint(found)))
            if same or known is None:
                found.unlink()
            else:
                self._set_aside(found, known)

    def find(
        self, fingerprint: str, *, seed: int, list_price_usd: Decimal, unfinished: bool
    ) -> tuple[Path, OutboxEntry] | None:
        """The paid picture of a job and its facts.

        After a crash between reading an answer and writing its facts, the picture may be there without them; it is
        found all the same.

        Args:
            fingerprint: The job's.
            seed: The job's; for a picture without facts.
            list_price_usd: The assumed cost of such a picture.
            unfinished: Whether to take an answer that a dead run had received whole but not yet renamed.

        Raises:
            OutboxError: The outbox cannot be read, or the picture in it is damaged; neither is taken for "not there".
        """
        for _ in range(_LOOKS):
            with self._disk_errors(": it cannot be read"), suppress(FileNotFoundError):
                return self._find(self._listed(fingerprint), fingerprint, seed, list_price_usd, unfinished)
            # Another run has renamed or archived a file: look again.
        raise self._unusable(f"the files of {fingerprint} change all the time; run again")

    def _find(
        self, files: list[Path], fingerprint: str, seed: int, list_price_usd: Decimal, unfinished: bool
    ) -> tuple[Path, OutboxEntry] | None:
        """As `find`, in these files; raises FileNotFoundError if one of them has vanished."""
        paths = sorted(filter(_is_picture, files), key=lambda each: (each.stat().st_mtime, each.name))
        broken: OutboxError | None = None
        for path in (*paths, *(filter(_arrived, files) if unfinished else ())):
            try:
                picture = read_picture(path)
                assumed = _assumed(path, list_price_usd)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise self._unusable(f"{path.name} cannot be read: {reason(error)}") from error
            except BrokenPicture as error:
                if path in paths:
                    broken = broken or OutboxError(
                        f"outbox: {path} was paid for and {error}; restore it, or move it away and pay once more "
                        '(on_kept="repay")'
                    )
                continue
            if known := _known(files, picture.sha256):
                return path, known
            notices = ("recovered after a crash: its cost and request id are not known",)
            paid = assumed.brought(picture, seed).model_copy(update={"notices": notices})
            entry = OutboxEntry(paid=paid, **_asked(path).model_dump())
            try:
                return (path if path in paths else self.keep(fingerprint, path, entry)), entry
            except OutboxError:
                if may_be_there(path):
                    raise
                raise FileNotFoundError(path) from None
        if broken:
            raise broken
        return None

    def others(self, fingerprint: str, sha256: str, in_doubt: Collection[str] | None = None) -> list[Path]:
        """Further pictures that were paid for under the same fingerprint, and are not archived.

        Args:
            fingerprint: The job's.
            sha256: The SHA-256 of its picture that is archived, or is about to be.
            in_doubt: The runs that may have been billed for another picture; None if that is not known. A link that
                any other run has received leads to this one.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        found = (each for each in self._listed(fingerprint) if _is_picture(each) or _arrived(each))
        doubted = None if in_doubt is None else {self._part(fingerprint, run).name for run in in_doubt}
        return sorted(each for each in found if _is_another(each, sha256, doubted))

    def fingerprints(self) -> set[str]:
        """The fingerprints of all pictures in the outbox, by the names of the files; only what interrupted runs had
        received is read.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        return {_fingerprint(each) for each in self._all() if _is_picture(each) or _has_picture(each)}

    def has(self, fingerprint: str) -> bool:
        """Whether it has any file of a job.

        Args:
            fingerprint: The job's.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        return bool(self._listed(fingerprint))

    def waiting(self) -> list[Waiting]:
        """All pictures and answers in the outbox, the oldest first; what interrupted runs had received is among them.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        found: list[Waiting] = []
        jobs: dict[str, list[Path]] = {}
        for each in self._all():
            jobs.setdefault(_fingerprint(each), []).append(each)
        for fingerprint, files in jobs.items():
            for each in files:
                if each.suffix == ".answer" or _is_picture(each) or _has_picture(each):
                    with suppress(OSError):  # it is archived by now
                        found.append(_waiting(each, fingerprint, files))
        return sorted(found, key=lambda each: (each.written, each.path))

    def give_up_abandoned_space(self) -> None:
        """Remove the space that requests had reserved whose process was killed, a day after they began.

        A request has ended long before that. What had arrived of its answer stays.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        for each in self._all():
            with suppress(OSError):  # its run has removed it, or cannot
                if each.name.endswith(SPACE_SUFFIX) and time.time() - each.stat().st_mtime > ABANDONED_SECONDS:
                    each.unlink()

    def unread(self) -> set[str]:
        """The fingerprints of jobs with answers in the outbox that could not be read as a picture.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        return {_fingerprint(each) for each in self._all() if each.suffix == ".answer"}

    def is_readable(self, fingerprint: str) -> bool:
        """Whether a kept answer of a job holds a picture that can be read now; links are not followed.

        Args:
            fingerprint: The job's.

        Raises:
            OutboxError: The outbox cannot be read.
        """
        return any(map(_is_readable, self.answers(fingerprint)))

    def remove(self, fingerprint: str, sha256: str, in_doubt: Collection[str] | None = None) -> None:
        """Remove a picture that the archive has, and what unfinished requests for it have left.

        Another picture that was paid for stays, and so do answers without a picture: only a person can judge them. A
        file that cannot be removed does no harm.

        Args:
            fingerprint: The job's.
            sha256: The SHA-256 of the picture in the archive.
            in_doubt: As for `others`.
        """
        with suppress(OutboxError):
            files = self._listed(fingerprint)
            stay = {*self.others(fingerprint, sha256, in_doubt), *(each for each in files if each.suffix == ".answer")}
            stay |= {
                about for each in stay for about in (_facts_path(each), each.with_suffix(".json"), _asked_path(each))
            }
            _discard(*(each for each in files if each not in stay))

    def _part(self, fingerprint: str, run: str) -> Path:
        return self.folder / f"{fingerprint}.{hashlib.sha256(run.encode()).hexdigest()[:16]}.part"

    def _all(self) -> list[Path]:
        """All files."""
        return self._beginning_with("")

    def _listed(self, fingerprint: str) -> list[Path]:
        return self._beginning_with(f"{fingerprint}.")

    def _beginning_with(self, start: str) -> list[Path]:
        """The files with such names. `glob` would silently find none in an unreadable folder.

        Hundreds of requests at once have a thousand files here: paths are made only of the names that are asked for.
        """
        folders = [self.folder]
        if self.also:
            folders = list({os.path.realpath(each): each for each in (*self.also, self.folder)}.values())
        with self._disk_errors(": it cannot be read"):
            found = ((each, os.listdir(each)) for each in folders if each.is_dir())  # noqa: PTH208
            return [folder / name for folder, names in found for name in names if name.startswith(start)]

    def _unusable(self, why: str) -> OutboxError:
        return OutboxError(f"outbox: {self.folder} cannot take a picture: {why}; {_REMEDY}")

    def _disk_errors(self, what: str = "") -> AbstractContextManager[None]:
        return disk_errors(f"outbox: {self.folder} cannot take a picture{what}", OutboxError, _REMEDY)


def _arrived(file: Path) -> bool:
    """Whether a file is what has arrived of an answer, which may be whole.

    Raises:
        OutboxError: The file cannot be read, which is not taken for "nothing has arrived".
    """
    if file.suffix != ".part":
        return False
    with disk_errors(f"outbox: {file} cannot be read", OutboxError, _REMEDY):
        try:
            size = file.stat().st_size if file.is_file() else 0
            return size > 0 and not (size == RESERVED_BYTES and _ends_in_zeros(file))
        except FileNotFoundError:  # renamed by its run at this moment
            return False


def _is_picture(file: Path) -> bool:
    """Whether a file is a picture, by its name; a file of an earlier version has no hash in its name."""
    return file.suffix not in _NO_PICTURES


def _is_another(file: Path, sha256: str, doubted: Collection[str] | None) -> bool:
    """Whether a file holds another paid picture than this one, or a link that may lead to one.

    Args:
        file: A picture, or an answer that has arrived.
        sha256: The SHA-256 of the picture.
        doubted: The names of the files in which a link may lead to another picture; None for all.
    """
    if file.suffixes[-2:-1] == [f".{sha256[:16]}"]:
        return False
    try:
        data = file.read_bytes()
        if _is_picture(file):
            return hashlib.sha256(data).hexdigest() != sha256
        held = picture_or_link(data)
        if isinstance(held, Link):
            return doubted is None or file.name in doubted
        return picture_of(data if held is None else held).sha256 != sha256
    except FileNotFoundError:
        return False
    except OSError:
        return _is_picture(file)
    except (ApiError, BrokenPicture):  # in an answer: no picture has come in it
        return False


def _known(files: Iterable[Path], sha256: str) -> OutboxEntry | None:
    """The facts of a picture, if they were written; those of a run that died before it renamed them too."""
    for each in files:
        if each.suffix in (".json", ".facts") and not each.name.endswith(".answer.json"):
            with suppress(OSError, ValidationError):
                known = OutboxEntry.model_validate_json(each.read_bytes())
                if known.paid.sha256 == sha256:
                    return known
    return None


def _waiting(file: Path, fingerprint: str, files: Iterable[Path]) -> Waiting:
    """What is known of a file that was paid for, by the files of its job; raises OSError if it has vanished."""
    about = file.stat()
    known = file, fingerprint, about.st_size, datetime.fromtimestamp(about.st_mtime, UTC)
    if file.suffix == ".answer":
        answered = _facts_of(file)
        return Waiting(*known, _asked(file), answered.cost_usd if answered else None, is_answer=True)
    entry = _known(files, hashlib.sha256(file.read_bytes()).hexdigest())
    return Waiting(*known, entry or _asked(file), entry.paid.cost_usd if entry else None, is_answer=False)


def _asked_path(file: Path) -> Path:
    """Where it is written what the request is for that has brought an answer."""
    return file.with_name(".".join([*file.name.split(".")[:2], "asked", "json"]))


def _asked(file: Path) -> Asked:
    """What the request was for that has brought an answer, as far as it was written."""
    with suppress(OSError, ValidationError):
        return Asked.model_validate_json(_asked_path(file).read_bytes())
    return Asked()


def _write(path: Path, facts: BaseModel) -> None:
    """Write facts for the user alone."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(facts.model_dump_json(indent=2).encode())


def _note(path: Path, facts: BaseModel) -> None:
    """Write facts to last, whole or not at all; the picture that they are about is safe without them."""
    try:
        _write(path, facts)
        sync(path)
    except OSError:
        _discard(path)


def path_and_host(kept: str) -> tuple[Path, str]:
    """The two parts of a place in `Attempt.kept`.

    Args:
        kept: The place.

    Example:
        >>> path, host = path_and_host("/srv/outbox/a on b/ab.jpg on worker-1")
        >>> path.as_posix(), host
        ('/srv/outbox/a on b/ab.jpg', 'worker-1')
    """
    path, _, host = kept.rpartition(" on ")
    return Path(path), host


def _ends_in_zeros(file: Path) -> bool:
    """Whether it ends in reserved space, which the version before had within the file."""
    with file.open("rb") as content:
        content.seek(-4096, os.SEEK_END)
        return not any(content.read())


def _has_picture(file: Path) -> bool:
    return _arrived(file) and _is_readable(file)


def _is_readable(body: Path) -> bool:
    """Whether the body of an answer holds a picture that can be read; a link is not followed."""
    with suppress(OSError, ApiError, BrokenPicture):
        data = body.read_bytes()
        held = picture_or_link(data)
        if not isinstance(held, Link):
            picture_of(data if held is None else held)
            return True
    return False


def _fingerprint(file: Path) -> str:
    return file.name.partition(".")[0]


def _discard(*files: Path) -> None:
    """Remove files, as far as possible."""
    for each in files:
        with suppress(OSError):
            each.unlink()


def _assumed(file: Path, list_price_usd: Decimal) -> Answered:
    """The facts of an answer whose headers were not kept."""
    written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return Answered(cost_usd=list_price_usd, cost_source="list price", at=written)


def _facts_path(body: Path) -> Path:
    return body.with_suffix(".answer.json")


def _facts_of(body: Path) -> Answered | None:
    """The facts in the headers of a kept answer, if they were kept too."""
    with suppress(OSError, ValidationError):
        return Answered.model_validate_json(_facts_path(body).read_bytes())
    return None
