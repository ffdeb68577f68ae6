"""The text of a manifest: YAML, JSON, JSON Lines or CSV to plain values with their places, and jobs back to YAML.

Scalars of YAML are read as YAML 1.2 has them: only true and false are booleans, so `OFF` stays a text, and there are
no dates, octal or sexagesimal numbers. Those of `vars` remember how they were written, for they end up in prompts.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice
from typing import Any, NamedTuple

import yaml

from prefect_segmind.jobs.job import Job
from prefect_segmind.manifest.model import (
    FIELDS,
    HEAD,
    MAX_ASSETS,
    TEXTS,
    Notes,
    Row,
    UnreadableManifest,
    shown,
    unknown,
)
from prefect_segmind.manifest.templates import Written, meant, written
from prefect_segmind.text import Spelled, spelled, stripped

KINDS = {".yaml": "YAML", ".yml": "YAML", ".json": "JSON", ".csv": "CSV"} | dict.fromkeys(
    (".jsonl", ".ndjson"), "JSON Lines"
)
"""The kind of a manifest by the extension of its name."""
MAX_TEXT = 50_000_000
"""Characters of a YAML or JSON manifest, and of one line of the others."""
_STREAMS = "use JSON Lines (.jsonl) or CSV, which are read row by row"
_DEPTH = 100
_WEIGHT = 100_000_000  # characters and values of a YAML file with each alias written out

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
    """What a manifest says beside its assets, and the assets, which are read while iterated."""

    head: Mapping[str, Any]
    rows: Iterator[Row]


def read_text(kind: str, lines: Iterable[str], mistakes: Notes) -> Parsed:
    r"""The head and the assets of a manifest; those of JSON Lines and CSV are read one by one.

    Args:
        kind: One of the values of `KINDS`.
        lines: The text, each line with its line break.
        mistakes: Where mistakes of the form go; the values themselves are not checked.

    Raises:
        UnreadableManifest: Nothing can be read from some place on, also while the rows are iterated.

    Example:
        >>> head, rows = read_text("CSV", ["image,prompt\n", "mug.jpg,a red mug\n"], Notes())
        >>> next(rows)
        Row(where='line 2', values={'image': 'mug.jpg', 'prompt': 'a red mug'})
    """
    return {"YAML": _yaml, "JSON": _json, "JSON Lines": _json_lines, "CSV": _csv}[kind](lines, mistakes)


def write_manifest(jobs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A manifest in YAML that makes exactly these jobs, piece by piece.

    It says `templates: false`, so that no text is taken for a template or a pattern.

    Args:
        jobs: The fields of each; what is None or the default of `Job` is left out.

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
        said = {field: value for field, value in plain.items() if value not in (None, Job.model_fields[field].default)}
        yield "\n  - " + "\n    ".join(f"{field}: {_written(value)}" for field, value in said.items())
        end = "\n"
    yield end


def _written(value: object) -> str:
    """A scalar as JSON writes it, with what YAML does not take as it is, or folds, as an escape."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


# --- documents: YAML and JSON -----------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A list or mapping of YAML whose end has not been read yet, and how much is in it."""

    value: Any
    key: list[Any]  # of a mapping, the key that waits for its value
    anchor: str | None
    line: int
    weight: int = 1
    depth: int = 1


def _yaml(lines: Iterable[str], mistakes: Notes) -> Parsed:
    text = _whole(lines)
    if bad := _UNPRINTABLE.search(text):
        before = text[: bad.start()].split("\n")
        raise _broken(text, len(before) - 1, len(before[-1]), f"the character {bad[0]!r} is not allowed in YAML")
    places: list[int] = []
    try:
        value = _yaml_value(text, places, mistakes)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        problem = error.problem or "cannot be read"
        # PyYAML reads ahead, and from 6.0.4 on stops at a depth of its own.
        raise _broken(text, mark.line, mark.column, "nested too deeply" if "nesting" in problem else problem) from None
    return _document(value, lambda n: f"line {places[n]}" if n < len(places) else f"asset {n + 1}", mistakes)


def _yaml_value(text: str, places: list[int], mistakes: Notes) -> Any:
    """The value of a document and the line of each asset, made of its events: without recursion, whatever it is."""
    stack: list[_Open] = []
    anchors: dict[str, tuple[Any, int, int]] = {}
    documents: list[Any] = []
    for event in yaml.parse(text, Loader=_LOADER):
        mark: Any = event.start_mark
        line, column, anchor, depth = mark.line, mark.column, getattr(event, "anchor", None), 0
        if (tag := getattr(event, "tag", None)) not in (None, "!", *_TAGS):
            raise _broken(text, line, column, f"the tag {tag} means nothing here")
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(_Open([] if isinstance(event, yaml.SequenceStartEvent) else {}, [], anchor, line))
            if len(stack) > _DEPTH:
                raise _broken(text, line, column, "nested too deeply")
            continue
        if isinstance(event, yaml.ScalarEvent):
            value, weight = _scalar(event), 1 + len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in anchors:
                raise _broken(text, line, column, f"the alias *{anchor} stands for nothing that ends before it")
            (value, weight, depth), anchor = anchors[anchor], None
        elif isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            value, weight, depth, anchor, line = done.value, done.weight, done.depth, done.anchor, done.line
        else:
            continue
        if anchor is not None:
            anchors[anchor] = (value, weight, depth)
        if not stack:
            documents.append(value)
            continue
        into = stack[-1]
        into.weight, into.depth = into.weight + weight, max(into.depth, depth + 1)
        if into.weight > _WEIGHT or into.depth + len(stack) > _DEPTH:
            raise _broken(text, line, column, "nested too deeply, or its aliases make too much of it")
        if isinstance(into.value, list):
            into.value.append(value)
            if len(stack) == 2 and stack[0].key == ["assets"]:
                places.append(line + 1)
        elif into.key:
            into.value[into.key.pop()] = value
        elif isinstance(value, dict | list):
            raise _broken(text, line, column, "a key must be a plain text")
        else:
            if value in into.value:
                mistakes.add(f"line {line + 1}: {shown(value)} is given twice in one mapping")
            into.key.append(value)
    if len(documents) > 1:
        raise UnreadableManifest("it holds several documents; a manifest is one")
    return documents[0] if documents else None


def _scalar(event: yaml.ScalarEvent) -> Any:
    value: str = event.value
    if event.tag in ("!", "tag:yaml.org,2002:str") or (event.tag is None and not event.implicit[0]):
        return value  # said to be a text, or in quotes, or a block
    if value in _WORDS:
        return written(value, _WORDS[value])
    if _INTEGER.fullmatch(value):
        return written(value, int(value))
    return written(value, float(value)) if _FLOAT.fullmatch(value) else value


def _broken(text: str, line: int, column: int, what: str) -> UnreadableManifest:
    near = " ".join(text.split("\n")[max(0, line - 1) : line + 1])
    hint = "; a text that begins with {{ must stand in quotes" if re.search(r"[:-] +\{\{", near) else ""
    return UnreadableManifest(f"line {line + 1}, column {column + 1}: {what}{hint}")


def _json(lines: Iterable[str], mistakes: Notes) -> Parsed:
    return _document(_json_value(_whole(lines), "", mistakes), lambda n: f"asset {n + 1}", mistakes)


def _json_value(text: str, where: str, mistakes: Notes) -> Any:
    """A JSON text's value; doubled keys and numbers that are none are noted."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                mistakes.add(f"{where}{shown(name)} is given twice in one mapping")
            made[name] = value
        return made

    def no_number(word: str) -> None:
        mistakes.add(f"{where}{word} is no JSON")

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=no_number, parse_int=_integer, parse_float=_float
        )
    except json.JSONDecodeError as error:
        at = where.removesuffix(": ") or f"line {error.lineno}"
        raise UnreadableManifest(f"{at}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UnreadableManifest(f"{where}nested too deeply") from None
    if text.count("[") + text.count("{") > _DEPTH and _too_deep(value):
        raise UnreadableManifest(f"{where}nested too deeply")
    return value


def _integer(digits: str) -> Written | str:
    return written(digits, int(digits)) if len(digits) <= 1000 else digits  # Python refuses to read very long ones


def _float(digits: str) -> Written:
    return written(digits, float(digits))


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEPTH):
        lists = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [inner for each in lists for inner in each]
    return bool(level)


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


def _document(value: Any, where: Callable[[int], str], mistakes: Notes) -> Parsed:
    if not isinstance(value, dict):
        bare = "it is a bare list; put it" if isinstance(value, list) else "it has no assets; put a list of them"
        raise UnreadableManifest(f"{bare} under `assets:`")
    assets = meant(value.get("assets", []))
    if "assets" not in value:
        mistakes.add("assets: missing; needed is a list of assets")
    elif not isinstance(assets, list):
        mistakes.add(f"assets: {shown(assets)} is not allowed; allowed is a list of assets")
        assets = []
    elif len(assets) > MAX_ASSETS:
        raise UnreadableManifest(f"it has {len(assets):,} assets, more than {MAX_ASSETS:,}: {_STREAMS}")
    head = {key: inner for key, inner in value.items() if key not in ("assets", "$schema")}
    return Parsed(_section(head), _rows(((where(number), asset) for number, asset in enumerate(assets)), mistakes))


def _rows(items: Iterable[tuple[str, Any]], mistakes: Notes) -> Iterator[Row]:
    for where, asset in items:
        if isinstance(asset, dict):
            yield Row(where, _section(asset))
        else:
            mistakes.add(f"{where}: {shown(meant(asset))} is no asset; an asset is a mapping of fields to values")


def _section(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The head or an asset: its variables with how each was written, all else without."""
    return {
        key: _each(value, _as_written if key == "vars" and isinstance(value, dict) else meant, {})
        for key, value in values.items()
    }


def _as_written(value: Any) -> Any:
    """JSON's reader does not tell these three, but they are written in one way only."""
    return written(json.dumps(value), value) if value is None or isinstance(value, bool) else value


def _each(value: Any, change: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    """A copy with each scalar changed. What aliases repeat is copied once."""
    if not isinstance(value, dict | list):
        return change(value)
    if id(value) not in known:
        if isinstance(value, dict):
            known[id(value)] = {meant(key): _each(inner, change, known) for key, inner in value.items()}
        else:
            known[id(value)] = [_each(inner, change, known) for inner in value]
    return known[id(value)]


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
        raise UnreadableManifest("it has no assets; each line is one")
    value = first[0][1] if first else None
    if isinstance(value, dict) and value.keys() & {*HEAD} and not value.keys() & {"image", "prompt", "name"}:
        return Parsed(_section({key: inner for key, inner in value.items() if key != "$schema"}), _rows(rest, mistakes))
    return Parsed({}, _rows(chain(first, rest), mistakes))


def _lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines that end in CR alone, as some spreadsheets write them, are lines too."""
    for line in lines:
        yield from filter(None, re.split(r"(?<=\r)(?!\n)", line)) if "\r" in line else (line,)


def _csv(lines: Iterable[str], mistakes: Notes) -> Parsed:
    rest, start, delimiter = _lines(lines), [""], ""
    while not start[-1].strip():
        if (line := next(rest, None)) is None:
            raise UnreadableManifest("it is empty; its first line names the columns, image and prompt among them")
        if not delimiter and (found := _SEPARATOR.fullmatch(line)):
            line, delimiter = "\n", found[1].replace("\\t", "\t")
        start.append(line)
    records = _records(chain(start[1:], rest), delimiter or _delimiter(start[-1]))
    where, cells = next(records)
    columns = [str(spelled(cell)) for cell in cells]
    for column in filter(None, dict.fromkeys(columns)):
        if columns.count(column) > 1:
            mistakes.add(f"{where}: there are several columns {shown(column)}")
        if column not in FIELDS and not re.match(r"vars\..", column):
            mistakes.add(f"{where}: column {unknown(column, FIELDS).replace('field', 'column')}")
    if absent := [column for column in ("image", "prompt") if column not in columns]:
        mistakes.add(f"{where}: there is no column {' and none '.join(absent)}")
        return Parsed({}, iter(()))
    return Parsed({}, _csv_rows(records, columns, mistakes))


def _csv_rows(records: Iterable[tuple[str, list[str]]], columns: list[str], mistakes: Notes) -> Iterator[Row]:
    for where, cells in records:
        given = [(column, cell) for column, cell in zip(columns, cells, strict=False) if stripped(cell)]
        if any(not column for column, _ in given) or "".join(cells[len(columns) :]).strip():
            mistakes.add(f"{where}: more cells than columns; a text with the separator in it must stand in quotes")
            continue
        values: dict[str, Any] = {
            column: cell if column in TEXTS else stripped(cell) for column, cell in given if column in FIELDS
        }
        if variables := {column[5:]: spelled(cell) for column, cell in given if column.startswith("vars.")}:
            values["vars"] = variables
        yield Row(where, values)


def _records(lines: Iterable[str], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that hold anything, each with where it ends."""
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
    """A cell without quotes that stand behind a blank, which the reader takes for a part of the text."""
    text = stripped(cell)
    if cell.startswith('"') or len(text) < 2 or not (text[0] == text[-1] == '"'):
        return cell
    return Spelled(text[1:-1].replace('""', '"'), cell)


def _delimiter(header: str) -> str:
    """Of comma, semicolon, tab and bar the one that makes most known columns of the first line."""
    cells = {delimiter: [cell.strip().strip('"') for cell in header.split(delimiter)] for delimiter in ",;\t|"}
    return max(cells, key=lambda delimiter: sum(c in FIELDS or c.startswith("vars.") for c in cells[delimiter]))
