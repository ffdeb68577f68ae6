"""Jinja's sandbox with limits of size and time: a template is a program, and may be a stranger's.

Nothing is measured by a clock, so a template works everywhere or nowhere. Three rules bound it:

- No value that it computes has more than `LARGEST` units. A value and each of its items are one unit, and each 64
  characters one more. Where an operation could make much of little, as `*` and `center` do, the size is known before.
- All values that it computes, compares and prints together have at most `MOST` units; each round of a loop and each
  call counts as much as the template has nodes.
- Methods of values are those that change nothing and make nothing larger, beside a few whose result is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import unwrap
from itertools import islice
from string import Formatter
from typing import Any, Final, cast

from jinja2 import StrictUndefined, nodes
from jinja2.environment import Environment
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer

LARGEST: Final = 50_000
"""Units of a value; 3.2 million characters."""
MOST: Final = 500_000
"""Units of all values of one rendering."""
LONGEST: Final = 50_000
"""Characters of a template."""
_TO_A_UNIT: Final = 64
_BITS: Final = 4096  # of an integer
_WIDEST: Final = 1000  # a width, an indentation, a number of digits


class TooLarge(ValueError):
    """A template computes something too large, or too much."""

    def __init__(self, what: str = "it computes too much") -> None:
        super().__init__(what)


@dataclass
class _Meter:
    """What a rendering may still compute, and the units of a round of a loop or a call."""

    left: int
    step: int


_METER: ContextVar[_Meter] = ContextVar("_METER")


@contextmanager
def metered(step: int) -> Iterator[None]:
    """Gives what is compiled or rendered in the block the limits of one rendering.

    Args:
        step: The number of the template's nodes.
    """
    token = _METER.set(_Meter(MOST, step))
    try:
        yield
    finally:
        _METER.reset(token)


def _charge(units: int) -> None:
    meter = _METER.get()
    meter.left -= units
    if meter.left < 0:
        raise TooLarge


def _units(value: Any) -> int:
    """The units of a value, up to a little more than `LARGEST`; an item counts wherever it occurs."""
    units, pending = 0, [value]
    while pending and units + len(pending) <= LARGEST:
        each = pending.pop()
        units += 1
        if isinstance(each, StrictUndefined):
            continue
        if isinstance(each, str | bytes):
            units += len(each) // _TO_A_UNIT
        elif isinstance(each, int) and each.bit_length() > _BITS:
            raise TooLarge("it computes a huge number")
        elif isinstance(each, Mapping):
            pending += islice((part for pair in each.items() for part in pair), LARGEST)
        elif isinstance(each, Iterable) and not isinstance(each, Iterator):
            pending += islice(each, LARGEST)
    return units + len(pending)


def measured(value: Any) -> Any:
    """The value, if it is not too large, counted; what an iterator gives as a list.

    Args:
        value: The value.

    Raises:
        TooLarge: It is, or all values so far are.
    """
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        value = list(islice(value, LARGEST + 1))
    units = _units(value)
    _charge(units)
    if units > LARGEST:
        raise TooLarge("it computes a value that is too large")
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _charge(_METER.get().step)
        yield value


def _joined(parts: list[Any]) -> str:
    return "".join(map(str, measured(parts)))


# --- how large a result becomes, at most, in characters ---------------------------------------------------------------


def _characters(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else _units(value) * _TO_A_UNIT


def _narrow(*numbers: object) -> None:
    for number in numbers:
        if isinstance(number, int | float) and not -_WIDEST <= number <= _WIDEST:
            raise TooLarge(f"a width or a count in it is beyond {_WIDEST}")


def _padded(subject: Any, *arguments: Any, **named: Any) -> int:
    _narrow(*arguments, *named.values())
    return 0


def _per_line(subject: Any, *arguments: Any, **named: Any) -> int:
    given = (*arguments, *named.values())
    _narrow(*given)
    widest = max((len(each) if isinstance(each, str) else _WIDEST for each in given), default=4)
    return (str(subject).count("\n") + 1) * widest


def _wrapped(subject: Any, *arguments: Any, **named: Any) -> int:
    longest = max((len(each) for each in (*arguments, *named.values()) if isinstance(each, str)), default=1)
    return len(text := str(subject)) * max(longest, len(text) // _TO_A_UNIT)  # as it copies what is left for each line


def _replaced(subject: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    return len(str(new)) * (str(subject).count(str(old)) + 1)


def _between(items: Any, separator: Any = "", *_: Any, d: Any = "", **__: Any) -> int:
    many = len(items) if hasattr(items, "__len__") else LARGEST
    return max(len(str(separator)), len(str(d))) * many


def _indented(subject: Any, indent: Any = None) -> int:
    _narrow(indent)
    return _units(subject) * (len(indent) if isinstance(indent, str) else _WIDEST if indent else 1)


def _percented(subject: Any, *arguments: Any, **named: Any) -> int:
    """Of a text with places such as `%5d`; a width must be written out, and be narrow."""
    text = str(subject)
    if re.search(r"%[^a-zA-Z%]*\*|%\([^()]*\)[^a-zA-Z%]*\*|%\([^()]*\(", text):
        raise TooLarge("a width in it is a variable")
    places = re.findall(r"%(?:\([^()]*\))?[^a-zA-Z%]*", text)
    _narrow(*(float(number) for place in places for number in re.findall(r"\d+", place.rpartition(")")[2])))
    return _filled(len(places), arguments, named)


def _braced(subject: Any, *arguments: Any, **named: Any) -> int:
    """Of a text with places such as `{:5}`; a width must be written out, and be narrow."""
    forms = [form or "" for _, field, form, _ in Formatter().parse(str(subject)) if field is not None]
    if any("{" in form for form in forms):
        raise TooLarge("a width in it is a variable")
    _narrow(*(float(number) for form in forms for number in re.findall(r"\d+", form)))
    return _filled(len(forms), arguments, named)


def _filled(places: int, *values: Any) -> int:
    return places * (_WIDEST + _units(values) * _TO_A_UNIT)


def _trimmed(subject: Any, characters: Any = None) -> int:
    _narrow(len(characters) if isinstance(characters, str) else 0)  # each of the text's is looked for among them
    return 0


def _summed(items: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise TooLarge("it adds up other things than numbers")
    return 0


_FILTERS: Final[dict[str, Callable[..., int]]] = {
    "batch": _padded, "center": _padded, "round": _padded, "slice": _padded, "truncate": _padded, "indent": _per_line,
    "wordwrap": _wrapped, "replace": _replaced, "join": _between, "tojson": _indented, "format": _percented,
    "sum": _summed, "trim": _trimmed,
}  # fmt: skip
_BY_ITEM: Final = frozenset(
    re.findall(
        r"\w+",
        "batch groupby join list map max min reject rejectattr select selectattr slice sort striptags sum unique",
    )
)
"""Filters that take a text character by character, or for each tag in it once more."""
_METHODS: Final[dict[str, Callable[..., int]]] = {
    "center": _padded, "ljust": _padded, "rjust": _padded, "zfill": _padded, "replace": _replaced,
    "format": _braced, "strip": _trimmed, "lstrip": _trimmed, "rstrip": _trimmed,
    "join": lambda separator, items: _between(items, separator),
}  # fmt: skip
_PLAIN_METHODS: Final = frozenset(
    re.findall(
        r"\w+",
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
        "isspace istitle isupper lower partition removeprefix removesuffix rfind rindex rpartition rsplit "
        "split splitlines startswith swapcase title upper get items keys values copy is_integer",
    )
)
_VALUES: Final = (str, bytes, int, float, list, tuple, dict, set, frozenset)


def _fits(characters: int) -> None:
    if characters > LARGEST * _TO_A_UNIT:
        raise TooLarge("it computes a text that is too large")


def _limited(
    function: Callable[..., Any], estimate: Callable[..., int] | None, *, by_item: bool = False
) -> Callable[..., Any]:
    """A filter or a test whose arguments and result are counted."""

    @wraps(function)  # with what it says of its first argument
    def limited(*arguments: Any, **named: Any) -> Any:
        given = arguments[isinstance(arguments[0], Context | EvalContext | Environment) :]
        for each in (*given, *named.values()):
            _charge(_units(each))
        if by_item and isinstance(given[0], str | bytes):
            _fits(len(given[0]) * _TO_A_UNIT)
            _charge(len(given[0]))
        if estimate is not None:
            _fits(estimate(*given, **named))
        return measured(function(*arguments, **named))

    return limited


class _Metered(NodeTransformer):
    """Has everything counted that does not go through a method of the environment."""

    def generic_visit(self, node: Any, *arguments: Any, **named: Any) -> Any:
        super().generic_visit(node, *arguments, **named)
        if isinstance(node, nodes.For):
            node.iter = _filtered(node.iter, "_counted")
        elif isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = _filtered(node.expr, "_measured")
        elif isinstance(node, nodes.Concat):
            return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")
        elif (
            isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            return _filtered(node, "_measured")
        return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class LimitedSandbox(SandboxedEnvironment):
    """Jinja's sandbox with the limits of this module."""

    intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=measured, **options)
        for name in ("lipsum", "namespace"):  # a namespace hides what it holds, be it a thousandfold
            del self.globals[name]
        for name in ("pprint", "urlize", "xmlattr"):  # made for debugging and HTML, and slow on hostile texts
            del self.filters[name]

    def limit(self) -> None:
        """Counts what filters and tests compute; called once, when all of them are there."""
        self.filters = {
            name: _limited(each, _FILTERS.get(name), by_item=name in _BY_ITEM) for name, each in self.filters.items()
        }
        self.filters |= {"_counted": _counted, "_measured": measured, "_joined": _joined}
        self.tests = {name: _limited(cast(Callable[..., Any], each), None) for name, each in self.tests.items()}

    def limited(self, tree: nodes.Template) -> nodes.Template:
        """The tree of a template in which everything is counted.

        Args:
            tree: The tree, which is changed.
        """
        _Metered().visit(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, if it is not too large."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and not isinstance(one, int | float):
                    _fits(_characters(one) * max(0, other))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _BITS:
                raise TooLarge("it computes a huge number")
        elif operator == "%" and isinstance(left, str | bytes):
            _fits(_percented(left, right))
        return measured(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """The result of a call, if it is allowed and not too large."""
        _charge(_METER.get().step)
        if isinstance(subject := getattr(unwrap(function), "__self__", None), _VALUES):
            name = function.__name__
            for each in (subject, *arguments):
                _charge(_units(each) if isinstance(each, str | bytes) else 1)
            if estimate := _METHODS.get(name):
                _fits(estimate(subject, *arguments, **named))
            elif name not in _PLAIN_METHODS:
                raise TooLarge(f"the method {name} is not for templates")
        elif isinstance(function, LoopContext):
            arguments = (_counted(arguments[0]), *arguments[1:])
        return measured(super().call(context, function, *arguments, **named))
