"""The formats of manifests: YAML, JSON, JSON Lines or CSV to plain values with their places, and jobs back to YAML.

YAML scalars follow YAML 1.2: only true and false are booleans, so `OFF` stays text, and there are no dates, octal or
sexagesimal numbers. Scalars in `vars` keep their spelling, as they end up in prompts. So only PyYAML's events are used;
some versions of its composer also crash the process on deeply nested text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple

import yaml

from prefect_segmind.errors import writable
from prefect_segmind.jobs.job import Job, shown, unknown
from prefect_segmind.manifest.model import (
    FIELDS,
    HEAD,
    MAX_ASSETS,
    TEXTS,
    Notes,
    Row,
    UnreadableManifest,
)
from prefect_segmind.manifest.templates import Written, meant, written
from prefect_segmind.text import Spelled, spelled, stripped

KINDS = {".yaml": "YAML", ".yml": "YAML", ".json": "JSON", ".csv": "CSV"} | dict.fromkeys(
    (".jsonl", ".ndjson"), "JSON Lines"
)
"""The format of a manifest by its file extension."""
MAX_TEXT = 50_000_000
"""Characters of a YAML or JSON manifest, and of one line of the others."""
_STREAMS = "use JSON Lines (.jsonl) or CSV, which are read row by row"
_DEPTH = 100
_WEIGHT = 100_000_000  # characters of a document with each alias written out, 20 more for each value

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "null", "bool", "int", "float")}
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,999})")
_FLOAT = re.compile(r"(?=.*[.eE])[-+]?(0|[1-9][0-9]*)?(\.[0-9]+|(?<=[0-9])\.?)([eE][-+]?[0-9]+)?")
_SEPARATOR = re.compile(r'(?i)\ufeff? *"?sep="?(\\t|[^"\r\n])"?"?[\s,;]*')
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


class Parsed(NamedTuple):
    """A manifest that has been read.

    Attributes:
        head: All of it but the assets.
        rows: The assets, read while iterated.
    """

    head: Mapping[str, Any]
    rows: Iterator[Row]


def read_text(kind: str, lines: Iterable[str], mistakes: Notes) -> Parsed:
    r"""Parses a manifest; the assets of JSON Lines and CSV are read one by one.

    Args:
        kind: One of the values of `KINDS`.
        lines: The text, each line with its line break.
        mistakes: Collects mistakes of form; the values themselves are not checked.

    Raises:
        UnreadableManifest: The rest of the text cannot be read; also raised while the rows are iterated.

    Example:
        >>> head, rows = read_text("CSV", ["image,prompt\n", "mug.jpg,a red mug\n"], Notes())
        >>> next(rows)
        Row(where='line 2', values={'image': 'mug.jpg', 'prompt': 'a red mug'})
    """
    return {"YAML": _yaml, "JSON": _json, "JSON Lines": _json_lines, "CSV": _csv}[kind](lines, mistakes)


def write_manifest(jobs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yields, in pieces, a YAML manifest that makes exactly these jobs.

    It has `templates: false`, so that no text is taken for a template or a pattern.

    Args:
        jobs: The fields of each job; None and the defaults of `Job` are left out.

    Example:
        >>> print("".join(write_manifest([{"image": "/in/mug.jpg", "prompt": "a {red} mug", "seed": None}])), end="")
        templates: false
        assets:
          - image: "/in/mug.jpg"
            prompt: "a {red} mug"
    """
    yield "templates: false\nassets:"
    end = " []\n"
    for job in jobs:
        plain = {field: value.value if isinstance(value := job.get(field), Enum) else value for field in FIELDS}
        given = {field: value for field, value in plain.items() if value not in (None, Job.model_fields[field].default)}
        yield "\n  - " + "\n    ".join(f"{field}: {_written(value)}" for field, value in given.items())
        end = "\n"
    yield end


def _written(value: object) -> str:
    """A scalar as JSON, with characters escaped that YAML forbids or folds."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


# --- documents: YAML and JSON -----------------------------------------------------------------------------------------


def _yaml(lines: Iterable[str], mistakes: Notes) -> Parsed:
    text = _whole(lines)
    if bad := _UNPRINTABLE.search(text):
        before = text[: bad.start()].split("\n")
        raise _broken(text, len(before) - 1, len(before[-1]), f"the character {bad[0]!r} is not allowed in YAML")
    reader = _YamlReader(text, mistakes)
    try:
        value = reader.document()
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        problem = error.problem or "cannot be read"
        # PyYAML reads ahead, and since 6.0.4 has its own limit of depth.
        raise _broken(text, mark.line, mark.column, "nested too deeply" if "nesting" in problem else problem) from None
    return _document(_plain(value), mistakes, reader.asset_lines)


class _YamlReader:
    """Builds values from the events of a text: `Written` scalars in lists and mappings; an alias shares its anchor's.

    Attributes:
        asset_lines: The line of each asset below `assets`.
    """

    def __init__(self, text: str, mistakes: Notes) -> None:
        kinds = yaml.NodeEvent | yaml.CollectionEndEvent
        self._events: Iterator[Any] = (event for event in yaml.parse(text, Loader=_LOADER) if isinstance(event, kinds))
        self._mistakes = mistakes
        self._anchors: dict[str, Any] = {}
        self.asset_lines: list[int] = []

    def document(self) -> Any:
        """The value of the only document; None where there is none."""
        value = next((self._value(event, ()) for event in self._events), None)
        if next(self._events, None):
            raise UnreadableManifest("it holds several documents; a manifest has one")
        return value

    def _value(self, event: Any, path: tuple[Any, ...]) -> Any:
        value: Any
        items = takewhile(lambda each: not isinstance(each, yaml.CollectionEndEvent), self._events)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _misplaced(event, f"the alias *{event.anchor} has no complete anchor before it")
            return self._anchors[event.anchor]
        if event.tag not in (None, "!", *_TAGS):
            raise _misplaced(event, f"the tag {event.tag} is not supported")
        if len(path) >= _DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise _misplaced(event, "nested too deeply")
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            for item in items:
                if path == ("assets",):
                    self.asset_lines.append(item.start_mark.line + 1)
                value.append(self._value(item, (*path, None)))
        else:
            value = {}
            for item in items:
                if isinstance(key := self._value(item, (*path, None)), dict | list):
                    raise _misplaced(item, "a key must be a plain text")
                if (key := str(key)) in value:
                    self._mistakes.add(f"line {item.start_mark.line + 1}: {shown(key)} is given twice in one mapping")
                value[key] = self._value(next(items), (*path, key))
        if event.anchor:
            self._anchors[event.anchor] = value
        return value


def _misplaced(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _scalar(event: yaml.ScalarEvent) -> Any:
    value: str = event.value
    if event.tag in ("!", "tag:yaml.org,2002:str") or (event.tag is None and not event.implicit[0]):
        return value  # tagged as text, in quotes, or a block
    if value in _WORDS:
        return written(value, _WORDS[value])
    if _INTEGER.fullmatch(value):
        return written(value, int(value))
    return written(value, float(value)) if _FLOAT.fullmatch(value) else value


def _broken(text: str, line: int, column: int, what: str) -> UnreadableManifest:
    near = " ".join(text.split("\n")[max(0, line - 1) : line + 1])
    hint = "; put a text that begins with {{ in quotes" if re.search(r"[:-] +\{\{", near) else ""
    return UnreadableManifest(f"line {line + 1}, column {column + 1}: {what}{hint}")


def _json(lines: Iterable[str], mistakes: Notes) -> Parsed:
    return _document(_json_value(_whole(lines), "", mistakes), mistakes)


def _json_value(text: str, where: str, mistakes: Notes) -> Any:
    """A JSON text's value; duplicate keys, NaN and Infinity are mistakes."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                mistakes.add(f"{where}{shown(name)} is given twice in one mapping")
            made[name] = value
        return made

    def invalid(word: str) -> None:
        mistakes.add(f"{where}{word} is not valid JSON")

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=invalid,
            parse_int=_integer,
            parse_float=lambda digits: written(digits, float(digits)),
        )
    except json.JSONDecodeError as error:
        at = where.removesuffix(": ") or f"line {error.lineno}"
        raise UnreadableManifest(f"{at}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UnreadableManifest(f"{where}nested too deeply") from None
    return _plain(value, where)


def _integer(digits: str) -> Written | str:
    return written(digits, int(digits)) if len(digits) <= 1000 else digits  # Python refuses to read very long ones


def _whole(lines: Iterable[str]) -> str:
    pieces: list[str] = []
    size = 0
    for line in lines:
        pieces.append(line)
        size += len(line)
        if size > MAX_TEXT:
            raise UnreadableManifest(f"it has more than {MAX_TEXT // 1_000_000} MB: {_STREAMS}")
    if not (text := "".join(pieces)).strip():
        raise UnreadableManifest("it is empty; put a list of assets under `assets:`")
    return text


def _document(value: Any, mistakes: Notes, lines: Sequence[int] = ()) -> Parsed:
    if not isinstance(value, dict):
        bare = "it is a bare list; put it" if isinstance(value, list) else "it has no assets; put a list of them"
        raise UnreadableManifest(f"{bare} under `assets:`")
    if not isinstance(assets := value.pop("assets", None), list):
        mistakes.add(f"assets: {shown(assets)} is not allowed; allowed is a list of assets")
        assets = []
    if len(assets) > MAX_ASSETS:
        raise UnreadableManifest(f"it has {len(assets):,} assets, more than {MAX_ASSETS:,}: {_STREAMS}")
    places = [f"line {line}" for line in lines] or [f"asset {number}" for number in range(1, len(assets) + 1)]
    return Parsed(value, _rows(zip(places, assets, strict=False), mistakes))


def _rows(items: Iterable[tuple[str, Any]], mistakes: Notes) -> Iterator[Row]:
    for where, asset in items:
        if isinstance(asset, dict):
            yield Row(where, asset)
        else:
            mistakes.add(f"{where}: {shown(asset)} is not an asset; an asset is a mapping of fields to values")


def _plain(document: Any, where: str = "") -> Any:
    """A copy of a document without shared parts; only scalars in `vars` keep their spelling.

    Raises:
        UnreadableManifest: It is nested too deeply, or too large with its aliases written out.
    """
    weight = 0

    def plain(value: Any, depth: int, in_vars: bool) -> Any:
        nonlocal weight
        weight += 20 + (len(value) if isinstance(value, str) else 0)
        if depth > _DEPTH:
            raise UnreadableManifest(f"{where}nested too deeply")
        if weight > _WEIGHT:
            raise UnreadableManifest(f"{where}too large with each alias written out: {_STREAMS}")
        if isinstance(value, dict):
            return {writable(key): plain(each, depth + 1, in_vars or key == "vars") for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each, depth + 1, in_vars) for each in value]
        if in_vars and (value is None or isinstance(value, bool)):
            return written(json.dumps(value), value)  # JSON has one spelling of each, which its reader drops
        return value if in_vars else meant(value)

    return plain(document, 0, False)


# --- streams: JSON Lines and CSV --------------------------------------------------------------------------------------


def _json_lines(lines: Iterable[str], mistakes: Notes) -> Parsed:
    def items() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(_lines(lines), start=1):
            if line.strip():
                try:
                    yield f"line {number}", _json_value(line, f"line {number}: ", mistakes)
                except UnreadableManifest as error:
                    mistakes.add(str(error))

    rest = items()
    first = list(islice(rest, 1))
    if not first and not mistakes:
        raise UnreadableManifest("it has no assets; each line is an asset")
    value = first[0][1] if first else None
    if isinstance(value, dict) and value.keys() & {*HEAD} and not value.keys() & {"image", "prompt", "name"}:
        if "assets" in value:
            mistakes.add(f"{first[0][0]}: assets: put each asset on its own line")
        return Parsed(value, _rows(rest, mistakes))
    return Parsed({}, _rows(chain(first, rest), mistakes))


def _lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines, also those that end in CR alone, as some spreadsheets write them."""
    for line in lines:
        yield from filter(None, re.split(r"(?<=\r)(?!\n)", line)) if "\r" in line else (line,)


_NO_COLUMNS = "it is empty; its first line names the columns, image and prompt among them"


def _csv(lines: Iterable[str], mistakes: Notes) -> Parsed:
    rest, start, delimiter = _lines(lines), [""], ""
    while not start[-1].strip():
        if (line := next(rest, None)) is None:
            raise UnreadableManifest(_NO_COLUMNS)
        if not delimiter and (found := _SEPARATOR.fullmatch(line)):
            line, delimiter = "\n", found[1].replace("\\t", "\t")
        start.append(line)
    records = _records(chain(start[1:], rest), delimiter or _delimiter(start[-1]))
    if (head := next(records, None)) is None:
        raise UnreadableManifest(_NO_COLUMNS)
    where, cells = head
    columns = [str(spelled(cell)) for cell in cells]
    for column in filter(None, dict.fromkeys(columns)):
        if columns.count(column) > 1:
            mistakes.add(f"{where}: there are several columns {shown(column)}")
        if column not in FIELDS and not re.match(r"vars\..", column):
            mistakes.add(f"{where}: column {unknown(column, [*FIELDS, 'vars.NAME'], 'column')}")
    if absent := [column for column in ("image", "prompt") if column not in columns]:
        mistakes.add(f"{where}: missing column{'s' * (len(absent) > 1)} {' and '.join(absent)}")
        return Parsed({}, iter(()))
    return Parsed({}, _csv_rows(records, columns, mistakes))


def _csv_rows(records: Iterable[tuple[str, list[str]]], columns: list[str], mistakes: Notes) -> Iterator[Row]:
    for where, cells in records:
        given = [(column, cell) for column, cell in zip(columns, cells, strict=False) if stripped(cell)]
        if any(not column for column, _ in given) or "".join(cells[len(columns) :]).strip():
            mistakes.add(f"{where}: more cells than columns; put a text that contains the separator in quotes")
            continue
        values: dict[str, Any] = {
            column: cell if column in TEXTS else stripped(cell) for column, cell in given if column in FIELDS
        }
        if variables := {column[5:]: spelled(cell) for column, cell in given if column.startswith("vars.")}:
            values["vars"] = variables
        yield Row(where, values)


def _records(lines: Iterable[str], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not blank, each with the line on which it ends."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            text = "".join(cells)
            if "\0" in text:
                raise UnreadableManifest(f"line {reader.line_num}: a NUL character; save the file as UTF-8")
            if text.strip():
                yield f"line {reader.line_num}", [_unquoted(cell) for cell in cells]
    except csv.Error as error:
        hint = "every quote must be closed, and one inside a quoted text doubled"
        raise UnreadableManifest(f"line {reader.line_num}: {error}; {hint}") from None


def _unquoted(cell: str) -> str:
    """A cell without quotes that follow a blank, which the reader takes as part of the text."""
    text = stripped(cell)
    if cell.startswith('"') or len(text) < 2 or not (text[0] == text[-1] == '"'):
        return cell
    return Spelled(text[1:-1].replace('""', '"'), cell)


def _delimiter(header: str) -> str:
    """The delimiter, of comma, semicolon, tab and bar, with which the header has the most known columns."""
    cells = {delimiter: [cell.strip().strip('"') for cell in header.split(delimiter)] for delimiter in ",;\t|"}
    return max(cells, key=lambda delimiter: sum(c in FIELDS or c.startswith("vars.") for c in cells[delimiter]))
