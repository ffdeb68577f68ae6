"""Templates in a manifest's texts: Jinja2's sandbox with limits, and with undefined names as mistakes."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta
from jinja2.nodes import Node

from prefect_segmind.manifest.template_limits import LONGEST, LimitedSandbox, TooLarge, measured, metered

_MISSING = 20  # names of variables that are not given, in one template
_MARK = re.compile(r"\{[{%#]")


class Written:
    """A scalar that prints as the manifest spells it, `1.10` or `~`, and has its usual value otherwise.

    Attributes:
        text: Its spelling.
        value: Its value.
    """

    text: str
    value: int | float | bool | None

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


class _Integer(Written, int):
    """An integer; a boolean too, which cannot be subclassed."""


class _Float(Written, float):
    """A number with a fraction or an exponent."""


class _Null(Written):
    """Null, in any spelling."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return meant(other) is None

    def __hash__(self) -> int:
        return hash(None)


def written(text: str, value: int | float | bool | None) -> Written:
    """A scalar that keeps its spelling.

    Args:
        text: The spelling.
        value: The value.

    Example:
        >>> price = written("1.10", 1.10)
        >>> f"{price} EUR, {price * 2} EUR"
        '1.10 EUR, 2.2 EUR'
    """
    made = _Null() if value is None else _Float(value) if isinstance(value, float) else _Integer(value)
    made.text, made.value = text, value
    return made


def meant(value: object) -> Any:
    """The plain value of a scalar; anything else unchanged."""
    return value.value if isinstance(value, Written) else value


def _sandbox() -> LimitedSandbox:
    """The sandbox; `is none`, `is boolean` and the like, and `tojson`, take a scalar's plain value."""
    made = LimitedSandbox(undefined=StrictUndefined, keep_trailing_newline=True)

    def of_meaning(test: Callable[..., bool]) -> Callable[[Any], bool]:
        return lambda value: test(meant(value))

    for name in ("none", "boolean", "true", "false", "integer", "number"):
        made.tests[name] = of_meaning(cast(Callable[..., bool], made.tests[name]))
    made.policies["json.dumps_function"] = _json
    made.limit()
    return made


def _json(value: object, **options: Any) -> str:
    def plain(value: object) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else meant(value)

    return json.dumps(plain(value), **options)


_SANDBOX = _sandbox()


class TemplateMistake(ValueError):
    """A template cannot be rendered.

    Attributes:
        lines: A line for each mistake.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def template_names(text: str) -> frozenset[str]:
    """The variables that a template uses; none for plain text and invalid templates.

    Example:
        >>> sorted(template_names("{{ product }} in {% if season %}{{ season }}{% endif %}"))
        ['product', 'season']
    """
    if not _MARK.search(text):
        return frozenset()
    try:
        return _compiled(text).names
    except TemplateMistake:
        return frozenset()


def render(text: str, variables: Mapping[str, Any]) -> str:
    """Renders a template; a text without `{{`, `{%` or `{#` is returned unchanged.

    Args:
        text: The template.
        variables: The variables that it may use.

    Raises:
        TemplateMistake: Its syntax is wrong, it uses a variable that is not given, or rendering fails.

    Example:
        >>> render("{{ product }} in a meadow", {"product": "a red mug"})
        'a red mug in a meadow'
    """
    if not _MARK.search(text):
        return text
    compiled = _compiled(text)
    with metered(compiled.nodes):
        return _rendered(compiled, variables)


def _rendered(compiled: _Compiled, variables: Mapping[str, Any]) -> str:
    given = dict(variables)
    missing: list[str] = []
    while True:
        try:
            for each in compiled.names & given.keys():
                measured(given[each])
            rendered: str = measured(compiled.template.render(given))
        except UndefinedError as error:
            name = re.fullmatch(r"'(\w+)' is undefined", str(error))
            if name is None or name[1] in given:
                raise _failure(error) from None
            missing.append(name[1])
            given[name[1]] = ""
            if len(missing) < _MISSING:
                continue  # render again, to find the other missing names
            rendered = ""
        except Exception as error:  # noqa: BLE001 - a template is a program: it can fail in any way
            if not missing:
                raise _failure(error) from None
            rendered = ""
        if missing:
            raise TemplateMistake(_not_given(name, variables) for name in missing)
        return rendered


class _Compiled(NamedTuple):
    template: Template
    names: frozenset[str]
    nodes: int


@lru_cache(maxsize=256)
def _compiled(text: str) -> _Compiled:
    if len(text) > LONGEST:
        raise TemplateMistake([f"the template has more than {LONGEST:,} characters"])
    try:
        tree = _SANDBOX.parse(text)
        names, count = frozenset(meta.find_undeclared_variables(tree)), sum(1 for _ in tree.find_all(Node))
        with metered(count):  # what is constant is computed now
            code = _SANDBOX.compile(_SANDBOX.limited(tree))
        return _Compiled(Template.from_code(_SANDBOX, code, _SANDBOX.make_globals(None)), names, count)
    except TemplateSyntaxError as error:
        problem = " ".join((error.message or "").split())
        where = f" in its line {error.lineno}" if "\n" in text else ""
        raise TemplateMistake([f"the template is wrong{where}: {problem}"]) from None
    except Exception as error:  # noqa: BLE001 - nested too deeply for Python, or a constant that fails in any way
        raise _failure(error) from None


def _failure(error: Exception) -> TemplateMistake:
    if isinstance(error, TooLarge):
        return TemplateMistake([f"the template is refused: {error}; write what it gives into the text or into vars"])
    problem = " ".join(str(error).split())[:200]
    return TemplateMistake([f"the template fails: {type(error).__name__}" + (f": {problem}" if problem else "")])


def _not_given(name: str, variables: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(variables), n=1)
    hint = f"Did you mean {near[0]}? Or give" if near else "Give"
    where = f"the asset's vars, in the manifest's vars, or with --set {name}=value (the flow's `variables`)"
    return f"the template uses {name!r}, which is not given. {hint} it in {where}"
