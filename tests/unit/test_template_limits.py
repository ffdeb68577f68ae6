"""A template never takes long or much memory: what would is refused, in the same way on every machine."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefect_segmind.errors import ManifestError
from prefect_segmind.manifest.expansion import Expansion
from prefect_segmind.manifest.loading import expand
from prefect_segmind.manifest.model import FoundImage, Row
from prefect_segmind.manifest.template_limits import LARGEST, LONGEST
from prefect_segmind.manifest.templates import TemplateMistake, render

VARS = {
    "a": "x" * 1000,
    "n": 7,
    "f": 1.5,
    "xs": [1, 2, 3],
    "facts": {"a": [1, 2]},
    "products": [{"sku": str(number), "name": f"product {number}"} for number in range(2000)],
}

# Each would compute something of a gigabyte at least, or for minutes.
HOSTILE = r"""
{{ 3**(10**9) }}
{{ n**(10**9) }}
{{ 2**4000 * 2**4000 }}
{{ 'x' * 10**9 }}
{{ 10**9 * 'x' }}
{{ [1] * 10**9 }}
{{ xs * 9999 * 9999 * 9999 }}
{{ ('f' * 99999) | int(base=16) }}
{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}
{% for x in range(99999) recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}
{% macro m(k) %}{% if k %}{{ m(k-1) }}{{ m(k-1) }}{% endif %}{% endmacro %}{{ m(60) }}
{{ a | center(10**9) }}
{{ a | center(1000000000) }}
{{ a | center(width=1000000000) }}
{% filter center(1000000000) %}x{% endfilter %}
{{ a.center(10**9) }}
{{ a['center'](10**9) }}
{{ (a | attr('ljust'))(10**9) }}
{{ a.zfill(10**9) }}
{{ a.expandtabs(10**9) }}
{{ a.translate({120: a}) }}
{{ n.to_bytes(10**9, 'big') }}
{{ a | indent(10**9, true) }}
{{ ('\n' * 99999) | indent(a * 100) }}
{{ (a * 100) | wordwrap(1) }}
{{ a | wordwrap(1, wrapstring=a * 100) }}
{{ a | replace('x', a * 100) | replace('x', a) }}
{{ (a * 100).replace('', a) }}
{{ (a * 100).join(range(9999) | map('string')) }}
{{ range(99999) | join(a) }}
{{ range(99999) | map('center', 999) | list }}
{{ range(99999) | list }}
{{ '%999999999d' | format(1) }}
{{ '%999999999d' % 1 }}
{{ '%.999999999f' % f }}
{{ '%*d' % (999999999, 1) }}
{{ '{:999999999}'.format(1) }}
{{ '{:{}}'.format(1, 999999999) }}
{{ ('%s' * 9999) % ((a * 100,) * 9999) }}
{{ ('{0}' * 9999).format(a * 1000) }}
{{ '{a}'.format_map({'a': 1}) }}
{{ facts | tojson(indent=10**9) }}
{{ (range(9999) | list) | tojson(1000) }}
{{ n | round(10**9, 'floor') }}
{{ xs | batch(10**9, 'x') | list }}
{{ xs | slice(10**9) | list }}
{{ [[1]] | sum(start=[]) }}
{{ ('<' * 999999) | escape | escape | escape | escape }}
{% set s = a * 999 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}
{% set s = a * 999 %}{% for i in range(99999) %}{% if s == i %}{% endif %}{% endfor %}
{% set s = a * 999 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}
{% set s = a * 999 %}{% for i in range(99999) %}{% if s is upper %}{% endif %}{% endfor %}
{% set s = a * 999 %}{% for i in range(99999) %}{% set t = s.upper() %}{% endfor %}
{% set x %}{% for i in range(99999) %}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{% endfor %}{% endset %}{{ x }}
{% for i in range(99999) %}{% for k in products %}{% if k.sku == '1' %}{% endif %}{% endfor %}{% endfor %}
{% for i in range(9999) %}{{ range(40000) | sum }}{% endfor %}
{% for i in range(9999) %}{{ 'x' in range(40000) }}{% endfor %}
{{ (a * 3000) | sort | first }}
{% set s = a * 40 %}{% for i in range(9999) %}{{ s | unique | first }}{% endfor %}
{% set s = a * 3000 %}{% for i in range(9999) %}{{ s.count('y') }}{% endfor %}
{% set s = a * 3000 %}{% for i in range(9999) %}{{ s.rstrip('x') }}{% endfor %}
{{ (a * 3000).strip('y' * 3000000 ~ 'x') }}
{{ (a * 3000) | trim('y' * 3000000 ~ 'x') }}
{{ ('<a>' * 999999) | striptags }}
{{ '%(a)9999999999d' % {'a': 1} }}
{{ '%((a))9999999999d' % {'(a)': 1} }}
{{ '%(a)*d' % {'a': 1} }}
{{ '{0[}]:9999999999}'.format({'}': 1}) }}
{{ '{0[}]:{1}}'.format({'}': 1}, 9999999999) }}
{{ xs.append(xs) }}
{{ lipsum(10**9) }}
""".strip().splitlines()
HOSTILE += [
    "{% set b = [1, 2] %}" + "{% set b = [b, b] %}" * 40 + "{{ b }}",
    "{% set b = [1, 2] %}" + "{% set b = {1: b, 2: b} %}" * 40 + "{{ b }}",
    "{% set b = [1, 2] %}" + "{% set b = (b, b) %}" * 40 + "{{ b }}",
    "{% set b = [1] %}" + "{% set b = (b + b) | batch(2) | list %}" * 40 + "{{ b }}",
    "{% set b = a %}" + "{% set b = b ~ b %}" * 40 + "{{ b | length }}",
    "{% set b = a %}" + "{% set b = b + b %}" * 40 + "{{ b | length }}",
    "{% set b = a %}" + "{% set b = [b, b] | join %}" * 40 + "{{ b | length }}",
    "{% set b = n %}" + "{% set b = b * b %}" * 40 + "{{ b }}",
    "{% for x in range(1999) %}" + "{% if 0 %}{% endif %}" * 2000 + "{% endfor %}",
    "{{ " + "-" * 40_000 + "1 }}",
    "{{ 1" + "+1" * 20_000 + " }}",
    "x" * LONGEST + "{{ a }}",
]


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:60])
def test_a_template_that_would_take_too_much_is_refused(template: str) -> None:
    with pytest.raises(TemplateMistake) as caught:
        render(template, VARS)
    (line,) = caught.value.lines
    assert len(line) < 400
    assert "MemoryError" not in line


def test_it_is_a_mistake_of_its_asset_like_any_other() -> None:
    values = {"image": "m.jpg", "prompt": "{{ 'x' * 10**9 }}"}
    expansion = Expansion({}, {}, lambda image, wildcards: [FoundImage(image)])
    with pytest.raises(
        ManifestError, match=r"line 3: prompt: the template is refused: it computes a text that is too l"
    ):
        expand("m.yaml", expansion, [Row("line 3", values)])


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{ '%(a)s in %(b)s (Berlin) 2026' % {'a': 1, 'b': 2} }}", "1 in 2 (Berlin) 2026"),
        ("{{ '{} of {:>4} (Berlin) 2026'.format('a mug', 7) }}", "a mug of    7 (Berlin) 2026"),
        ("{{ ' a mug.'.strip().rstrip('.') }}{{ '<b>x</b>' | striptags | trim }}", "a mugx"),
        ("{% for n in range(500) %}{{ n }},{% endfor %}", "".join(f"{n}," for n in range(500))),
        ("{{ products | selectattr('sku', 'eq', '77') | map(attribute='name') | first }}", "product 77"),
        ("{{ products[:2] | map(attribute='name') | join(', ') }}", "product 0, product 1"),
        ("{% for each in xs %}{{ each }}{{ ', ' if not loop.last }}{% endfor %} of {{ xs | length }}", "1, 2, 3 of 3"),
        ("{% for each in xs %}{{ loop.index }}/{{ loop.length }} {% endfor %}", "1/3 2/3 3/3 "),
        ("{% for k, v in facts.items() %}{{ k }}={{ v }}{% endfor %}", "a=[1, 2]"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ m('b') }}", "<1><b>"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "123"),
        ("{% set x %}a {{ n }}{% endset %}{{ x | upper }}", "A 7"),
        ("{{ 'a-b'.replace('-', ' ').title() }} {{ '7'.zfill(3) }} {{ ', '.join(['a', 'b']) }}", "A B 007 a, b"),
        ("{{ '%05.1f and %s' % (f, 'x') }} {{ '{:>4}|{}'.format(n, 'y') }}", "001.5 and x    7|y"),
        ("{{ '%s in 2026, 100 %% wool' | format('made') }}", "made in 2026, 100 % wool"),
        (
            "{{ 2**10 }} {{ n * 1000000 }} {{ 'ab' * 3 }} {{ -n }} {{ 7 // 2 }} {{ 7 % 4 }}",
            "1024 7000000 ababab -7 3 3",
        ),
        ("{{ 'a' ~ n ~ 'b' }} {{ (1, 2) }} {{ {'k': 1} }} {{ missing is defined }}", "a7b (1, 2) {'k': 1} False"),
        ("{{ a[:3] }} {{ a | truncate(9) }} {{ 'b c' | wordwrap(1) | replace('\\n', '/') }}", "xxx xxxxxx... b/c"),
        ("{{ cycler('a', 'b').next() }} {{ [3, 1] | sort }} {{ xs | batch(2) | list }}", "a [1, 3] [[1, 2], [3]]"),
        ("{{ xs | sum }} {{ 'x' in a }} {{ 1 < n <= 7 }} {{ facts | tojson(indent=1) | length }}", "6 True True 23"),
        ("{{ 'two\nlines' | indent }}", "two\n    lines"),
    ],
)
def test_what_templates_are_used_for_works(template: str, rendered: str) -> None:
    assert render(template, VARS) == rendered


EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "n", "f", "xs", "facts", "'<b>'", "99999", "range(9999)", "[a, xs]", "(n,)"]),
    lambda inner: st.one_of(
        st.builds(
            "({} {} {})".format, inner, st.sampled_from(["+", "*", "**", "%", "~", "-", "//", "in", "=="]), inner
        ),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{'k': {}}}".format, inner),
        st.builds(
            "({} | {})".format,
            inner,
            st.sampled_from(
                [
                    "list",
                    "string",
                    "join",
                    "join(a)",
                    "center(900)",
                    "replace('x', a)",
                    "batch(3)",
                    "tojson",
                    "indent(a)",
                    "escape",
                    "map('center', 99)",
                    "sum",
                    "sort",
                    "length",
                    "wordwrap(2)",
                    "format(a)",
                    "title",
                    "int",
                ]
            ),
        ),
        st.builds("{}.join({})".format, inner, inner),
        st.builds("{}[1:]".format, inner),
    ),
    max_leaves=25,
)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's, of constants in the code that Jinja makes
@settings(deadline=None)
@example("'<b>' ~ 99999[1:]")
@given(EXPRESSIONS)
def test_whatever_a_template_computes_it_is_small_or_refused(expression: str) -> None:
    template = f"{{% for i in range(3) %}}{{% set b = {expression} %}}{{{{ b }}}}{{{{ b is string }}}}{{% endfor %}}"
    try:
        rendered = render(template, VARS)
    except TemplateMistake:
        return
    assert len(rendered) <= LARGEST * 64


def test_only_so_many_missing_names_are_looked_for() -> None:
    template = "".join(f"{{{{ v{number} }}}}" for number in range(3000))
    with pytest.raises(TemplateMistake) as caught:
        render(template, {})
    assert len(caught.value.lines) == 20
