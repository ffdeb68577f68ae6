"""Templates in a manifest's texts: Jinja2 in its sandbox, where a name that nobody has given is a mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

_SANDBOX = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_MARK = re.compile(r"\{[{%#]")


class TemplateMistake(ValueError):
    """A template cannot be rendered.

    Attributes:
        lines: What is wrong, a line each.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def template_names(text: str) -> frozenset[str]:
    """The variables that a text names; none where it is no template, or a wrong one.

    Example:
        >>> sorted(template_names("{{ product }} in {% if season %}{{ season }}{% endif %}"))
        ['product', 'season']
    """
    if not _MARK.search(text):
        return frozenset()
    try:
        return _compiled(text)[1]
    except TemplateMistake:
        return frozenset()


def render(text: str, variables: Mapping[str, Any]) -> str:
    """A text with its variables filled in; one without `{{`, `{%` or `{#` as it is.

    Args:
        text: The template.
        variables: What it may name.

    Raises:
        TemplateMistake: Its syntax is wrong, it names what is not given, or it fails while it runs.

    Example:
        >>> render("{{ product }} in a meadow", {"product": "a red mug"})
        'a red mug in a meadow'
    """
    if not _MARK.search(text):
        return text
    template, _ = _compiled(text)
    given = dict(variables)
    missing: list[str] = []
    while True:
        try:
            rendered = template.render(given)
        except UndefinedError as error:
            name = re.fullmatch(r"'(\w+)' is undefined", str(error))
            if name is None or name[1] in given:
                raise _failure(error) from None
            missing.append(name[1])
            given[name[1]] = ""  # once more, for the names that come after it
        except Exception as error:  # noqa: BLE001 - a template is a program: it can fail in any way
            if missing:
                break
            raise _failure(error) from None
        else:
            if missing:
                break
            return rendered
    raise TemplateMistake(_not_given(name, variables) for name in missing)


@lru_cache(maxsize=256)
def _compiled(text: str) -> tuple[Template, frozenset[str]]:
    try:
        tree = _SANDBOX.parse(text)
        names = frozenset(meta.find_undeclared_variables(tree))
        return Template.from_code(_SANDBOX, _SANDBOX.compile(tree), _SANDBOX.make_globals(None)), names
    except TemplateSyntaxError as error:
        said = " ".join((error.message or "").split())
        where = f" in its line {error.lineno}" if "\n" in text else ""
        raise TemplateMistake([f"the template is wrong{where}: {said}"]) from None
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        raise _failure(error) from None  # nested too deeply for Python, or a constant that cannot be computed


def _failure(error: Exception) -> TemplateMistake:
    said = " ".join(str(error).split())[:200]
    return TemplateMistake([f"the template fails: {type(error).__name__}" + (f": {said}" if said else "")])


def _not_given(name: str, variables: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(variables), n=1)
    hint = f"Did you mean {near[0]}? Or give" if near else "Give"
    where = f"the asset's vars, in the manifest's vars, or with --set {name}=value (the flow's `variables`)"
    return f"the template names {name!r}, which is not given. {hint} it in {where}"
