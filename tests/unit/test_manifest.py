"""A manifest's text becomes jobs, or every mistake in it is told with its place."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_segmind.api.request import MagicPromptOption
from prefect_segmind.errors import InvalidJobError, ManifestError
from prefect_segmind.jobs.fingerprint import fingerprint
from prefect_segmind.jobs.job import Job, parse_job, shown, unknown
from prefect_segmind.manifest import formats
from prefect_segmind.manifest.expansion import Expansion
from prefect_segmind.manifest.formats import read_text, write_manifest
from prefect_segmind.manifest.model import (
    MAX_ASSETS,
    FoundImage,
    MistakenManifest,
    Notes,
    UnreadableManifest,
)
from prefect_segmind.manifest.schema import json_schema
from prefect_segmind.manifest.templates import TemplateMistake, meant, render, template_names, written

DOCS = Path(__file__).parents[2] / "docs"
ASSET = {"image": "mug.jpg", "prompt": "a red mug"}
Find = Callable[[str, bool], Sequence[FoundImage]]


def as_it_is(image: str, wildcards: bool) -> Sequence[FoundImage]:
    return [FoundImage(image)]


def load(
    text: str, kind: str = "YAML", *, find: Find = as_it_is, unlisted: bool = False, **variables: Any
) -> tuple[list[Job], list[str]]:
    """The jobs and the warnings of a text, as `load_manifest` makes them of a file."""
    mistakes, warnings = Notes(), Notes()
    jobs: list[Job] = []
    try:
        head, rows = read_text(kind, re.findall(r"[^\n]*\n|[^\n]+", text), mistakes)
        expansion = Expansion(
            head, variables, find, mistakes=mistakes, warnings=warnings, allow_unlisted_resolution=unlisted
        )
        jobs = [job for row in rows for job in expansion.jobs(row)]
        expansion.warn_of_unused()
    except UnreadableManifest as error:
        mistakes.add(str(error))
    if mistakes:
        raise mistakes.error("m")
    return jobs, warnings.first()


def jobs(text: str, kind: str = "YAML", **rest: Any) -> list[Job]:
    return load(text, kind, **rest)[0]


def names(text: str, kind: str = "YAML", **rest: Any) -> list[str]:
    return [job.name for job in jobs(text, kind, **rest)]


def mistakes(text: str, kind: str = "YAML", **rest: Any) -> list[str]:
    with pytest.raises(MistakenManifest) as caught:
        load(text, kind, **rest)
    return list(caught.value.mistakes)


def mistake(text: str, kind: str = "YAML", **rest: Any) -> str:
    (line,) = mistakes(text, kind, **rest)
    return line


def asset(**fields: Any) -> str:
    """A YAML manifest of one asset."""
    return json.dumps({"assets": [{**ASSET, **fields}]})


# --- every form -------------------------------------------------------------------------------------------------------

FORMS = {
    "YAML": """
defaults: {style_type: REALISTIC, magic_prompt_option: OFF}
vars: {season: late summer}
assets:
  - name: summer/mug
    image: photos/mug.jpg
    prompt: "{{ product }} in {{ season }} light"
    image_weight: 60
    vars: {product: a ceramic mug}
""",
    "JSON": """
{"$schema": "manifest.schema.json",
 "defaults": {"style_type": "REALISTIC", "magic_prompt_option": "OFF"}, "vars": {"season": "late summer"},
 "assets": [{"name": "summer/mug", "image": "photos/mug.jpg", "prompt": "{{ product }} in {{ season }} light",
             "image_weight": 60, "vars": {"product": "a ceramic mug"}}]}
""",
    "JSON Lines": """
{"defaults": {"style_type": "REALISTIC", "magic_prompt_option": "OFF"}, "vars": {"season": "late summer"}}

{"name": "summer/mug", "image": "photos/mug.jpg", "prompt": "{{ product }} in {{ season }} light", "image_weight": 60,\
 "vars": {"product": "a ceramic mug"}}
""",
    "CSV": """
name,image,prompt,image_weight,style_type,magic_prompt_option,vars.product,vars.season,seed
summer/mug,photos/mug.jpg,{{ product }} in {{ season }} light,60,REALISTIC, OFF,a ceramic mug,late summer,
,,,,
""",
}
MUG = Job(
    name="summer/mug",
    image="photos/mug.jpg",
    prompt="a ceramic mug in late summer light",
    image_weight=60,
    style_type="REALISTIC",
    magic_prompt_option="OFF",
)


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_says_the_same(kind):
    assert load(FORMS[kind], kind) == ([MUG], [])


@pytest.mark.parametrize("kind", FORMS)
def test_lines_may_end_as_on_windows(kind):
    assert jobs(FORMS[kind].replace("\n", "\r\n"), kind) == [MUG]


@pytest.mark.parametrize(("kind", "text"), [("JSON Lines", '{"templates": true}'), ("CSV", "image,prompt\n")])
def test_there_may_be_no_assets(kind, text):
    assert jobs(text, kind) == jobs("assets: []") == []


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_separator_of_a_csv_is_seen_in_its_first_line(delimiter):
    text = delimiter.join(["name", '"image"', "prompt"]) + "\n" + delimiter.join(["a", "mug.jpg", '"a; b, c\td"'])
    assert jobs(text, "CSV") == [Job(name="a", image="mug.jpg", prompt="a; b, c\td")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize(
    ("first", "separator"),
    [
        ("sep=;", ";"),
        ("SEP=,", ","),
        ("sep=\t", "\t"),
        ("sep=\\t", "\t"),
        ('"sep=;"', ";"),
        ("\ufeffsep=|", "|"),
        ("sep=:", ":"),
        ("sep=;;;", ";"),
        ("", ";"),
    ],
)
def test_a_first_line_may_name_the_separator_of_a_csv(first, separator, end):
    lines = [first, separator.join(["image", "prompt", "seed"]), separator.join(["mug.jpg", "a red, large mug", "1"])]
    if separator == ",":
        lines[2] = 'mug.jpg,"a red, large mug",1'
    text = end.join(lines) + end
    assert mistake(text, "CSV").startswith("line 3: seed: '1' is not allowed" if end != "\r\r\n" else "line 5: seed: ")
    (job,) = jobs(text.replace(f"{separator}1{end}", f"{separator}100{end}"), "CSV")
    assert (job.image, job.prompt, job.seed) == ("mug.jpg", "a red, large mug", 100)


@pytest.mark.parametrize("kind", ["YAML", "JSON", "JSON Lines", "CSV"])
def test_lines_may_end_in_cr_alone(kind):
    assert jobs(FORMS[kind].replace("\n", "\r"), kind) == [MUG]


def test_a_text_in_a_csv_may_have_several_lines():
    (job,) = jobs('image,prompt\nmug.jpg,"a ""red""\n\n mug"\n', "CSV")
    assert job.prompt == 'a "red"\n\n mug'


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u200b", "\ufeff"])
def test_blanks_around_the_cells_of_a_csv_do_not_count(blank):
    lines = [
        ["image", "prompt", "name", "style_type", "vars.what"],
        ["photos/mug.jpg", "a {{ what }} mug", "mug", "ANIME", "red"],
    ]
    spaced = "\n".join(",".join(f"{blank}{cell}{blank}" for cell in line) for line in lines)
    (job,) = jobs(spaced, "CSV")
    assert (job.image, job.prompt, job.name, job.style_type) == ("photos/mug.jpg", "a red mug", "mug", "ANIME")
    assert job.written["prompt"] == f"{blank}a {blank}red{blank} mug{blank}"


def test_quotes_of_a_csv_that_stand_behind_a_blank_are_no_part_of_the_text():
    (job,) = jobs('image, "prompt" , name\n "mug.jpg",  "a ""red"" mug" ,\u00a0"mug"\n', "CSV")
    assert (job.image, job.prompt, job.name) == ("mug.jpg", 'a "red" mug', "mug")
    assert job.written["prompt"] == '  "a ""red"" mug" '
    (job,) = jobs('image,prompt\nmug.jpg,"""red"" and ""blue"""\n', "CSV")
    assert (job.prompt, job.written) == ('"red" and "blue"', {})


def test_names_of_variables_and_texts_have_one_form():
    (job,) = jobs(
        asset(name="gro\u0308\u00dfe", prompt="{{ gro\u0308\u00dfe }}", vars={"gr\u00f6\u00dfe": "cafe\u0301"})
    )
    assert (job.name, job.prompt) == ("gr\u00f6\u00dfe", "caf\u00e9")
    assets = [{**ASSET, "name": name} for name in ("cafe\u0301", "caf\u00e9 ")]
    assert "is already used" in mistake(json.dumps({"assets": assets}))


def test_a_stem_is_composed_and_what_it_was_is_remembered():
    (job,) = jobs(asset(image="cafe\u0301.jpg", prompt="{{ stem }} on a table"))
    assert (job.name, job.prompt, job.written) == (
        "caf\u00e9",
        "caf\u00e9 on a table",
        {"prompt": "cafe\u0301 on a table"},
    )


def test_a_line_of_a_head_alone_is_the_head_and_any_other_an_asset():
    line = json.dumps({**ASSET, "vars": {"x": 1}})
    assert names(line, "JSON Lines") == ["mug"]
    assert mistake('{"vars": {"x": 1}, "name": "a", "image": "m"}', "JSON Lines").startswith(
        "line 1 (a): prompt: missing"
    )


# --- scalars of YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(
            (text, text)
            for text in ("OFF", "on", "yes", "No", "2024-01-31", "0o17", "017", "1:30", "0x1f", ".inf", "1_0")
        ),
        *(("1" * 2000, "1" * 2000), ("'5'", "5"), ('"true"', "true"), ("! 5", "5"), ("!!str 5", "5"), (".", ".")),
        *(("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("!!int '5'", 5)),
        *(
            ("5", 5),
            ("-0", 0),
            ("+12", 12),
            ("1.5", 1.5),
            ("-.5", -0.5),
            ("1e3", 1000.0),
            ("2.", 2.0),
            ("|\n    5", "5\n"),
        ),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written, value):
    head, _ = read_text("YAML", [f"vars:\n  x: {written}\ndefaults:\n  x: {written}\nassets: []"], Notes())
    assert head["vars"] == head["defaults"] == {"x": value}
    assert type(head["defaults"]["x"]) is type(meant(head["vars"]["x"])) is type(value)


def test_a_key_is_a_text():
    head, _ = read_text("YAML", ["vars: {5: a, no: b, 1.10: c, ~: d}\nassets: []"], Notes())
    assert head == {"vars": {"5": "a", "no": "b", "1.10": "c", "~": "d"}}


def test_off_stays_a_text():
    assert jobs("assets: [{image: a, prompt: b, magic_prompt_option: OFF}]")[0].magic_prompt_option == "OFF"


def test_an_alias_stands_for_what_was_said_before():
    text = "assets:\n- &a {image: a.jpg, prompt: &p b}\n- {image: c.jpg, prompt: *p}\n- *a"
    assert mistake(text) == "line 4: name: 'a' is already used by line 2".replace("'", "")
    assert names("defaults: {prompt: b}\nvars: {x: &x [{image: a}]}\nassets: *x") == ["a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("assets:\n\t- a", r"line 2, column 1: .*"),
        ("assets: [", r"line 1, column \d+: .*|line 2, column 1: .*"),
        ("assets: []\n--- \nassets: []", "it holds several documents; a manifest has one"),
        ("a: \x00", r"line 1, column 4: the character '\\x00' is not allowed in YAML"),
        ("a:\n- b\x1b", r"line 2, column 4: the character '\\x1b' is not allowed in YAML"),
        ("a: *b", r"line 1, column 4: the alias \*b has no complete anchor before it"),
        ("a: &a [*a]", r"line 1, column 8: the alias \*a has no complete anchor before it"),
        ("a: !!python/object:os.system x", r"line 1, column 4: the tag tag:yaml.org,2002:python/.* is not supported"),
        ("a: !x [b]", "line 1, column 4: the tag !x is not supported"),
        ("? [a]\n: b", "line 1, column .*: a key must be a plain text"),
        (
            "assets:\n- prompt: {{ product }}",
            r"line 2, column \d+: a key must be a plain text; put a text that begins with \{\{ in quotes",
        ),
        (
            "assets:\n- prompt: {{ a }} in b",
            r"line 2, column \d+: .*; put a text that begins with \{\{ in quotes",
        ),
        ("[" * 5000, "line 1, column (101|1001): nested too deeply"),  # by us, or by a PyYAML that reads so far ahead
        ("a: " + "[" * 120 + "]" * 120, "line 1, column 103: nested too deeply"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
            "too large with each alias written out: use JSON Lines .*",
        ),
        (
            f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1_001)}]",
            "too large with each alias written out: use JSON Lines .*",
        ),
        (
            "a0: &a0 " + "[" * 60 + "]" * 60 + "\na1: " + "[" * 60 + "*a0" + "]" * 60,
            "nested too deeply",
        ),
    ],
)
def test_a_text_that_is_no_yaml_is_told_once_with_its_place(text, told):
    assert re.fullmatch(told, mistake(text))


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("YAML", "", "it is empty; put a list of assets under `assets:`"),
        ("JSON", " \n", "it is empty; put a list of assets under `assets:`"),
        ("YAML", "# a comment\n", "it has no assets; put a list of them under `assets:`"),
        ("YAML", "just a text", "it has no assets; put a list of them under `assets:`"),
        ("YAML", "- {image: a}", "it is a bare list; put it under `assets:`"),
        ("JSON", "[{}]", "it is a bare list; put it under `assets:`"),
        ("JSON", "5", "it has no assets; put a list of them under `assets:`"),
        ("JSON", '{"assets": [}', "line 1, column 13: Expecting value"),
        ("JSON", '{"assets":\n[1,]}', r"line 2, column \d: .*"),
        ("JSON", "[" * 100_000, "nested too deeply"),
        ("JSON", '{"assets": [{"image": ' + "[" * 200 + "]" * 200 + "}]}", "nested too deeply"),
        ("JSON Lines", "", "it has no assets; each line is an asset"),
        ("JSON Lines", "\n \n", "it has no assets; each line is an asset"),
        ("JSON Lines", '{"image": ' + "[" * 200 + "]" * 200 + "}", "line 1: nested too deeply"),
        ("CSV", "", "it is empty; its first line names the columns, image and prompt among them"),
        ("CSV", "\n\n", "it is empty; its first line names the columns, image and prompt among them"),
        ("CSV", "image;prompt\na;b\0", "line 2: a NUL character; save the file as UTF-8"),
        ("CSV", 'image,prompt\na,"b\nc,d\n', "line 3: unexpected end of data; every quote must be closed, .*"),
        ("CSV", 'image,prompt\na,"b"c\n', "line 2: ',' expected after '\"'; every quote must be closed, .*"),
        ("CSV", "image,prompt\na," + "b" * 200_000, r"line 2: field larger than field limit \(131072\); .*"),
    ],
)
def test_a_text_of_another_form_is_told_once(kind, text, told):
    told_all = mistakes(text, kind)
    assert re.fullmatch(told, told_all[-1])
    assert len(told_all) == 1 or text.startswith("[")


def test_a_document_has_limits_that_streams_do_not_have(monkeypatch):
    many = json.dumps({"assets": [{**ASSET, "name": str(n)} for n in range(MAX_ASSETS + 1)]})
    told = "it has 10,001 assets, more than 10,000: use JSON Lines (.jsonl) or CSV, which are read row by row"
    assert mistake(many, "JSON") == told
    monkeypatch.setattr(formats, "MAX_TEXT", 1_000_000)
    told = "it has more than 1 MB: use JSON Lines (.jsonl) or CSV, which are read row by row"
    assert mistake(f"assets: []\n#{'x' * 1_000_000}") == told


def test_the_slower_reader_of_yaml_says_the_same(monkeypatch):
    monkeypatch.setattr(formats, "_LOADER", yaml.SafeLoader)
    assert jobs(FORMS["YAML"]) == [MUG]
    assert mistake("assets:\n\t- a").startswith("line 2, column 1: ")


# --- what an asset takes from its manifest ----------------------------------------------------------------------------


def test_an_asset_s_own_fields_win_over_the_defaults():
    text = "defaults: {image: d.jpg, prompt: d, seed: 100, image_weight: 9}\nassets: [{}, {name: b, seed: 200}]"
    assert [(job.name, job.seed, job.image_weight) for job in jobs(text)] == [("d", 100, 9), ("b", 200, 9)]


def test_a_field_may_be_taken_back():
    text = (
        "defaults: {seed: 100, negative_prompt: blur}\nassets: [{image: a, prompt: b, seed: null, negative_prompt: ~}]"
    )
    assert jobs(text) == [Job(image="a", prompt="b")]


def test_variants_are_a_cross_product_and_name_the_jobs():
    text = "variants: {style_type: [REALISTIC, RENDER_3D], image_weight: [30, 60]}\nassets: [{image: m.jpg, prompt: b}]"
    assert [(job.name, job.style_type.value, job.image_weight) for job in jobs(text)] == [
        ("m/realistic-w30", "REALISTIC", 30),
        ("m/realistic-w60", "REALISTIC", 60),
        ("m/render_3d-w30", "RENDER_3D", 30),
        ("m/render_3d-w60", "RENDER_3D", 60),
    ]


def test_each_axis_has_readable_names():
    axes = {
        "prompt": ["a", "b"],
        "negative_prompt": [None],
        "magic_prompt_option": ["OFF"],
        "resolution": ["RESOLUTION_1280_800", "AUTO"],
        "seed": [4711, "random"],
    }
    text = json.dumps({"assets": [{"name": "n", "image": "m.jpg", "variants": axes}]})
    made = names(text)
    assert made[:3] == [
        f"n/prompt1-negative1-magic-off-{each}"
        for each in ("1280x800-seed4711", "1280x800-seedrandom", "auto-seed4711")
    ]
    assert made[-1] == "n/prompt2-negative1-magic-off-auto-seedrandom"


def test_random_seeds_may_be_drawn_several_times():
    assert names(asset(variants={"seed": ["random", None, "random"]})) == [
        "mug/seedrandom1",
        "mug/seedauto",
        "mug/seedrandom3",
    ]


def test_an_asset_s_variants_replace_the_manifest_s():
    text = "variants: {seed: [100, 200]}\nassets:\n- {image: a, prompt: b, variants: {image_weight: [1]}}\n"
    assert names(text) == ["a/w1"]
    assert names(text.replace("{image_weight: [1]}", "{}")) == ["a"]
    assert names(text.replace("{image_weight: [1]}", "~")) == ["a/seed100", "a/seed200"]


def test_a_field_of_the_asset_s_own_does_not_vary():
    text = "variants: {seed: [100, 200], image_weight: [1, 2]}\nassets: [{image: a, prompt: b, seed: 300}]"
    assert [(job.name, job.seed) for job in jobs(text)] == [("a/w1", 300), ("a/w2", 300)]


def test_variants_win_over_defaults():
    text = "defaults: {seed: 100}\nvariants: {seed: [200]}\nassets: [{image: a, prompt: b}]"
    assert [job.seed for job in jobs(text)] == [200]


def test_variants_have_a_limit():
    axes = {"seed": list(range(100, 201)), "image_weight": list(range(1, 101))}
    assert mistake(asset(variants=axes)) == ("line 1: variants: 10,100 jobs from one asset; at most 10,000 are allowed")
    axes["seed"].pop()
    assert len(jobs(asset(variants=axes))) == 10_000


def test_a_match_of_a_pattern_gets_its_name_below_that_of_the_asset():
    def find(image: str, wildcards: bool) -> Sequence[FoundImage]:
        assert wildcards
        return [FoundImage("/in/a/mug.jpg", "a/mug"), FoundImage("/in/cup.jpg", "cup")]

    inbox = '{name: inbox, image: "*.jpg", prompt: "{{ stem }}"}'
    text = f'assets: [{inbox}, {{image: "*", prompt: b, variants: {{seed: [100]}}}}]'
    assert [(job.name, job.image, job.prompt) for job in jobs(text, find=find)] == [
        ("inbox/a/mug", "/in/a/mug.jpg", "mug"),
        ("inbox/cup", "/in/cup.jpg", "cup"),
        ("a/mug/seed100", "/in/a/mug.jpg", "b"),
        ("cup/seed100", "/in/cup.jpg", "b"),
    ]


@pytest.mark.parametrize(
    ("name", "matches", "remedy"),
    [
        ("in", ["cup.jpg", "cup.PNG"], "put {{ stem }}-{{ suffix }} into name, or {{ suffix }} for a folder each"),
        ("{{ stem }}", ["cup.jpg", "cup.png"], "put {{ stem }}-{{ suffix }} into name"),
        ("{{ stem }}", ["a/cup.jpg", "b/cup.jpg"], "leave {{ stem }} out of name, so that they keep their folders"),
        ("in", ["cup.jpg", "cup.JPG"], "rename one of them"),
        ("in", ["a:b.jpg", "a?b.jpg"], "rename one of them"),
        ("{{ stem }}-{{ suffix }}", ["cup.jpg", "cup.JPG"], "rename one of them"),
    ],
)
def test_matches_that_get_one_name_are_a_mistake_for_each_two_whatever_varies(name, matches, remedy):
    def find(image: str, wildcards: bool) -> list[FoundImage]:
        return [FoundImage(f"/{each}", re.sub("[:?]", "-", each.rpartition(".")[0])) for each in matches]

    text = asset(name=name, image="*", variants={"image_weight": [40, 70], "seed": [100, 200]})
    told = mistake(text, find=find)
    assert told.endswith(f" would be both /{matches[0]} and /{matches[1]}; {remedy}")


def test_each_image_beside_the_first_of_its_name_is_told():
    def find(image: str, wildcards: bool) -> list[FoundImage]:
        return [FoundImage(f"s3://bucket/{name}", name[:-4]) for name in ("a.jpg", "a.png", "a.gif", "b.jpg", "b.png")]

    told = mistakes(asset(name="in", image="*"), find=find)
    assert [re.findall(r"bucket/([\w.]+)", line) for line in told] == [
        ["a.jpg", "a.png"],
        ["a.jpg", "a.gif"],
        ["b.jpg", "b.png"],
    ]


def test_suffix_is_the_image_s_extension_in_templates():
    def find(image: str, wildcards: bool) -> list[FoundImage]:
        return [FoundImage("/in/cup.JPEG", "cup"), FoundImage("/in/cup", "cup")]

    text = asset(name="{{ stem }}-{{ suffix or 'none' }}", image="*", prompt="{{ suffix }}!")
    assert [(job.name, job.prompt) for job in jobs(text, find=find)] == [("cup-jpeg", "jpeg!"), ("cup-none", "!")]
    assert jobs(asset(prompt="{{ suffix }}", vars={"suffix": "of the plant"}))[0].prompt == "of the plant"


def test_a_pattern_without_matches_is_a_warning():
    assert load(asset(), find=lambda image, wildcards: []) == (
        [],
        ["line 1: nothing matches mug.jpg; no job is made"],
    )


def test_what_the_finder_refuses_is_a_mistake_of_the_asset():
    def find(image: str, wildcards: bool) -> Sequence[FoundImage]:
        raise InvalidJobError("points outside the bucket")

    assert mistakes(asset(seed=1), find=find) == [
        "line 1: image: points outside the bucket",
        "line 1: seed: 1 is not allowed; allowed is an integer from 100 to 999999, `random`, or nothing for one "
        "derived from the job. Did you mean 100?",
    ]


# --- templates --------------------------------------------------------------------------------------------------------


def test_of_variables_the_asset_s_win_then_the_run_s_then_the_manifest_s():
    text = 'vars: {a: 1, b: 1, c: 1}\nassets: [{image: m, prompt: "{{ a }}{{ b }}{{ c }}", vars: {c: 3}}]'
    assert jobs(text, b=2, c=2)[0].prompt == "123"


def test_name_image_and_prompts_are_templates():
    text = """
vars: {sku: 007, words: [blur, text]}
defaults: {image: "photos/{{ sku }}.jpg"}
assets:
  - name: "{{ sku }}/{{ stem }}"
    variants:
      prompt: ["{{ stem }} {# not said #}in light", "{% if sku %}in rain{% endif %}"]
      negative_prompt: ["{{ words | join(', ') }}"]
"""
    assert [(job.name, job.image, job.prompt, job.negative_prompt) for job in jobs(text)] == [
        ("007/007/prompt1-negative1", "photos/007.jpg", "007 in light", "blur, text"),
        ("007/007/prompt2-negative1", "photos/007.jpg", "in rain", "blur, text"),
    ]


SCALARS = [
    *("1.10", "3.10", "2.0", "1e3", "1.5E+3", "-.5", "2.", "+1", "007", "1_000", "0x1F", "0o17", "5", "1" * 30),
    *(
        "no",
        "yes",
        "on",
        "off",
        "NO",
        "true",
        "True",
        "FALSE",
        "~",
        "null",
        "Null",
        "12:30",
        "2026-11-26",
        "2026-11-26",
    ),
    *("1.2.3", "12e", ".5e-3", "1.10 EUR", "50%", ".inf", ".NaN"),
]


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_template_sees_a_scalar_of_yaml_as_it_was_written(scalar):
    text = f"""
vars: {{a: {scalar}, list: [{scalar}, {{b: {scalar}}}]}}
assets:
- {{image: m, prompt: '{{{{ a }}}} {{{{ list[1].b }}}} {{{{ own }}}} {{{{ list[0] }}}}',
   vars: {{own: {scalar}}}}}
"""
    assert jobs(text)[0].prompt == " ".join([scalar] * 4)


def test_what_has_no_text_is_written_as_nothing():
    assert jobs("vars: {a: }\nassets: [{image: m, prompt: 'a{{ a }}b'}]")[0].prompt == "ab"


@pytest.mark.parametrize("kind", ["JSON", "JSON Lines"])
@pytest.mark.parametrize("number", ["1.10", "1e3", "1.5E+3", "-0.50", "0", "12", "1" * 30, "true", "false", "null"])
def test_a_template_sees_a_scalar_of_json_as_it_was_written(kind, number):
    own = '{"image": "m", "prompt": "{{ a }} {{ list[0][0] }} {{ own }}", "vars": {"own": NUMBER}}'
    own, head = (text.replace("NUMBER", number) for text in (own, '"vars": {"a": NUMBER, "list": [[NUMBER]]}'))
    text = f'{{{head}, "assets": [{own}]}}' if kind == "JSON" else f"{{{head}}}\n{own}"
    assert jobs(text, kind)[0].prompt == " ".join([number] * 3)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{ price * 2 }}", "2.2"),
        ("{{ price + count }}", "4.1"),
        ("{{ count + 1 }} {{ -count }} {{ count // 2 }}", "4 -3 1"),
        ("{% if count > 2 and price < 2 %}many{% endif %}", "many"),
        ("{{ price | round(1) }} {{ price | int }} {{ '%.3f' | format(price) }}", "1.1 1 1.100"),
        ("{{ prices | sum }} {{ prices | max }} {{ prices | join(', ') }}", "3.6 2.50 1.10, 2.50"),
        ("{% for n in range(count) %}{{ n }}{% endfor %}", "012"),
        ("{% if sale %}sale{% endif %}{% if not full %} here{% endif %}", "sale here"),
        ("{{ sale is true }} {{ sale is boolean }} {{ sale == true }} {{ full is false }}", "True True True True"),
        ("{{ gone is none }} {{ gone == none }} {{ gone | default('x', true) }} {{ 'y' if gone else 'n' }}",
         "True True x n"),
        ("{{ count is number }} {{ count is integer }} {{ sale is integer }} {{ gone is number }}",
         "True True False False"),
        ("{{ facts | tojson }}", '{"a": [1.1, true, null]}'),
        ("{{ sale }} {{ full }} {{ gone }} {{ price ~ ' EUR' }}", "true False ~ 1.10 EUR"),
    ],
)  # fmt: skip
def test_what_was_written_goes_on_to_be_what_it_means(template, rendered):
    variables = (
        "price: 1.10, prices: [1.10, 2.50], count: 3, sale: true, full: False, gone: ~, facts: {a: [1.10, true, ~]}"
    )
    assert jobs(f"vars: {{{variables}}}\nassets: [{{image: m, prompt: {json.dumps(template)}}}]")[0].prompt == rendered


def test_outside_of_vars_a_scalar_is_what_it_means():
    text = """
vars: {w: &w 0.7e2, flag: &flag true, nothing: &nothing ~}
defaults: {image_weight: *w, allow_extreme_ratio: *flag, negative_prompt: *nothing}
variants: {seed: [1e3, +200]}
assets: [{image: m, prompt: "{{ w }} {{ flag }} {{ nothing }}"}]
"""
    made = jobs(text)
    assert [(job.image_weight, job.allow_extreme_ratio, job.negative_prompt) for job in made] == [(70, True, None)] * 2
    assert [(job.name, job.seed, job.prompt) for job in made] == [
        ("m/seed1000-0", 1000, "0.7e2 true ~"),
        ("m/seed200", 200, "0.7e2 true ~"),
    ]
    assert mistake(asset(prompt=3.5)) == "line 1: prompt: 3.5 is not text; put a number in quotes"


def test_a_price_and_a_country_are_those_of_the_manifest():
    text = """
vars: {country: no, price: 1.10}
assets: [{image: m, prompt: 'made in {{ country }}, {{ price }} EUR'}]
"""
    assert jobs(text)[0].prompt == "made in no, 1.10 EUR"


def test_stem_may_be_given_another_meaning():
    assert jobs(asset(prompt="{{ stem }}", vars={"stem": "of the plant"}))[0].prompt == "of the plant"
    assert "'stem'" in mistake(asset(image="{{ stem }}.jpg"))


def test_the_line_break_at_the_end_of_a_block_is_no_part_of_the_text():
    assert jobs("assets:\n- image: a\n  prompt: |\n    one\n\n    two\n")[0].prompt == "one\n\ntwo"


def test_without_templates_every_text_is_taken_literally():
    def find(image: str, wildcards: bool) -> Sequence[FoundImage]:
        assert not wildcards
        return [FoundImage(image)]

    (job,) = jobs(
        f"templates: false\nassets: [{json.dumps({'image': '*{{ a }}', 'prompt': '{{ a' + chr(10)})}]", find=find
    )
    assert (job.image, job.prompt) == ("*{{ a }}", "{{ a")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (
            "{{ seasn }}",
            "uses 'seasn', which is not given. Did you mean season? Or give it in the asset's "
            "vars, in the manifest's vars, or with --set seasn=value (the flow's `variables`)",
        ),
        (
            "{{ zzz }}",
            "uses 'zzz', which is not given. Give it in the asset's vars, in the manifest's vars, "
            "or with --set zzz=value (the flow's `variables`)",
        ),
        ("{{ a.b }}", "fails: UndefinedError: 'dict object' has no attribute 'b'"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        (
            "{{ season.__class__.mro() }}",
            "fails: SecurityError: access to attribute '__class__' ",
        ),
        ("{{ season", "is wrong: unexpected end of template"),
        ("a\n{% for %}", "is wrong in its line 2: "),
        ("{{ season | nosuch }}", "is wrong: No filter named 'nosuch'"),
        ("{{ " + "(" * 5000 + " }}", "fails: RecursionError"),
        ("{{ [].pop() }}", "is refused: the method pop is not for templates; "),
        ("{% include 'x' %}", "fails: TypeError: no loader"),
    ],
)
def test_a_template_that_fails_names_the_field_and_what_to_do(prompt, told):
    line = mistake(json.dumps({"vars": {"season": "summer", "a": {}}, "assets": [{"image": "m", "prompt": prompt}]}))
    assert line.startswith(f"line 1: prompt: the template {told}")


def test_every_name_that_is_not_given_is_told_and_none_that_need_not_be():
    text = "{{ a }}{% if b is defined %}{{ b }}{% endif %}{{ c }}{{ 1 / (c | length) }}"
    with pytest.raises(TemplateMistake) as caught:
        render(text, {})
    assert [re.findall(r"'(\w+)'", line) for line in caught.value.lines] == [["a"], ["c"]]
    with pytest.raises(TemplateMistake, match="'a'"):
        render("{{ a }}", {})
    with pytest.raises(TemplateMistake, match="'x'"):
        render("{{ x }}", {"x": render.__globals__["StrictUndefined"](name="x")})


def test_the_names_of_a_text_are_those_it_reads():
    assert template_names("{% for a in b %}{{ a }}{{ c.d }}{% endfor %}") == {"b", "c"}
    assert template_names("no { template } at all") == template_names("{{ broken") == frozenset()


def test_a_variable_of_the_run_that_nothing_names_is_a_warning():
    text = 'defaults: {negative_prompt: "{{ bad }}"}\nassets: [{image: m, prompt: "{{ season }}", negative_prompt: x}]'
    _, warnings = load(text, season="summer", bad="blur", seasn="winter", zzz=1)
    assert warnings == [
        "variable seasn: no template in the manifest uses it; did you mean season?",
        "variable zzz: no template in the manifest uses it",
    ]
    assert load("templates: false\nassets: []", a=1)[1] == ["variable a: templates are switched off"]


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_a_text_without_marks_is_no_template(text):
    text = re.sub(r"\{(?=[{%#])", "", text)
    assert render(text, {}) == text


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_every_mistake_of_the_whole_file_is_told_with_its_place():
    text = """
defaults: {style_type: REALISTC, name: x, promt: y}
vars: [1]
variants: {prompt: a, style: [ANIME], seed: [7, 200], image_weight: []}
templates: maybe
varients: {}
assets:
  - name: a
    image: a.jpg
    prompt: b
    image_weight: 150
    promt: c
  - b
  - {name: a, image: c.jpg, seed: 100, variants: {seed: [200]}, vars: 5}
  - {name: 2024, image: [x], prompt: b, prompt: c}
"""
    assert mistakes(text) == [
        "line 15: prompt is given twice in one mapping",
        "defaults.style_type: 'REALISTC' is not allowed; allowed is one of GENERAL, REALISTIC, DESIGN, RENDER_3D, "
        "ANIME. Did you mean REALISTIC?",
        "defaults.name: there is no such field; allowed is one of image, prompt, image_weight, magic_prompt_option, "
        "negative_prompt, resolution, seed, style_type, allow_extreme_ratio",
        "defaults.promt: there is no such field. Did you mean prompt?",
        "vars: [1] is not allowed; allowed is a mapping of names to values.",
        "variants.prompt: 'a' is not allowed; allowed is a list of at least one value.",
        "variants.image_weight: [] is not allowed; allowed is a list of at least one value.",
        "variants.seed: 7 is not allowed; allowed is an integer from 100 to 999999, `random`, or nothing for one "
        "derived from the job. Did you mean 100?",
        "variants.style: there is no such field. Did you mean style_type?",
        "templates: 'maybe' is not allowed; allowed is true or false.",
        "varients: there is no such field. Did you mean variants?",
        "line 8 (a): promt: there is no such field. Did you mean prompt?",
        "line 8 (a): image_weight: 150 is not allowed; allowed is an integer from 1 to 100. Did you mean 100?",
        "line 13: b is not an asset; an asset is a mapping of fields to values",
        "line 14 (a): vars: 5 is not allowed; allowed is a mapping of names to values.",
        "line 14 (a): variants.seed: the asset gives seed as well; keep one of the two",
        "line 14 (a): prompt: missing; needed is a text that is not blank",
        "line 15 (2024): image: ['x'] is not text; put a number in quotes",
        "line 15 (2024): name: 2024 is not text; put a number in quotes",
    ]


@pytest.mark.parametrize(
    ("kind", "text", "where"),
    [
        (
            "YAML",
            "assets:\n- {image: m, prompt: a}\n- image: m\n  prompt: b",
            "line 3: name: m is already used by line 2",
        ),
        (
            "JSON",
            '{"assets": [{"image": "m", "prompt": "a"}, {"name": "m", "image": "m", "prompt": "b"}]}',
            "asset 2 (m): name: m is already used by asset 1",
        ),
        (
            "JSON Lines",
            '{"image": "m", "prompt": "a"}\n\n{"image": "m", "prompt": "b"}',
            "line 3: name: m is already used by line 1",
        ),
        ("CSV", 'image,prompt\nm,"a\nb"\n\nm,b', "line 5: name: m is already used by line 3"),
        (
            "YAML",
            "assets: [{image: m, prompt: a, variants: {seed: [100, 100]}}]",
            "line 1: name: m/seed100 is already used by line 1",
        ),
    ],
)
def test_a_name_is_given_once_in_the_whole_manifest(kind, text, where):
    assert mistake(text, kind) == where


COLUMNS = ", ".join([*Job.model_fields, "vars.NAME"])


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        (
            "YAML",
            "assetz: []",
            [
                "assets: None is not allowed; allowed is a list of assets",
                "assetz: there is no such field. Did you mean assets?",
            ],
        ),
        ("YAML", "assets:", ["assets: None is not allowed; allowed is a list of assets"]),
        ("YAML", "assets: {image: m}", ["assets: {'image': 'm'} is not allowed; allowed is a list of assets"]),
        (
            "YAML",
            "5: x\nassets: []",
            [
                "5: there is no such field; allowed is one of $schema, defaults, vars, variants, templates, assets",
            ],
        ),
        (
            "YAML",
            "variants: {zzz: [1]}\nassets: []",
            [
                "variants.zzz: there is no such field; allowed is one of prompt, negative_prompt, image_weight, "
                "magic_prompt_option, resolution, seed, style_type",
            ],
        ),
        (
            "JSON Lines",
            '{"templates": false, "assets": [{}]}\n{"image": "m", "prompt": "a"}',
            ["line 1: assets: put each asset on its own line"],
        ),
        ("YAML", "assets: []\nassets: []", ["line 2: assets is given twice in one mapping"]),
        ("JSON", '{"vars": {"a": 1, "a": 2, "a": 3}, "assets": []}', ["a is given twice in one mapping"] * 2),
        (
            "JSON",
            '{"vars": {"a": NaN, "b": -Infinity}, "assets": []}',
            ["NaN is not valid JSON", "-Infinity is not valid JSON"],
        ),
        (
            "JSON Lines",
            '{"image": "m", "prompt": "a", "prompt": "b"}\n{"image"}\n[1]\n',
            [
                "line 1: prompt is given twice in one mapping",
                "line 2, column 9: Expecting ':' delimiter",
                "line 3: [1] is not an asset; an asset is a mapping of fields to values",
            ],
        ),
        (
            "CSV",
            "image,promt,image\n",
            [
                "line 1: there are several columns image",
                "line 1: column promt: there is no such column. Did you mean prompt?",
                "line 1: missing column prompt",
            ],
        ),
        (
            "CSV",
            "a,b\n1,2",
            [
                f"line 1: column a: there is no such column; allowed is one of {COLUMNS}",
                f"line 1: column b: there is no such column; allowed is one of {COLUMNS}",
                "line 1: missing columns image and prompt",
            ],
        ),
        (
            "CSV",
            "image,prompt,,vars.\nm,b,c\nm,b,,,d\nm,b,,,\nn",
            [
                "line 1: column vars.: there is no such column. Did you mean vars.NAME?",
                "line 2: more cells than columns; put a text that contains the separator in quotes",
                "line 3: more cells than columns; put a text that contains the separator in quotes",
                "line 5: prompt: missing; needed is a text that is not blank",
            ],
        ),
    ],
)
def test_a_wrong_form_does_not_hide_other_mistakes(kind, text, told):
    assert mistakes(text, kind) == told


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../x"},
        {"name": "a/", "variants": {"seed": [100]}},
        {"seed": 10**400},
        {"image_weight": 1e300},
        {"image": ""},
        {"image": None},
        {"prompt": " "},
        {"prompt": None},
        {"prompt": {"a": [1]}},
        {"resolution": "RESOLUTION_2048_2048"},
        {"variants": {"style_type": ["realistic", ["x"], {}]}},
        {"variants": {"resolution": ["wide"]}},
        {"variants": {"prompt": [5]}},
        {"allow_extreme_ratio": "perhaps"},
        {"name": "\ud800", "\ud800": 1, "prompt": "\ud800"},
    ],
)
def test_what_no_job_takes_is_told_on_lines_that_can_be_printed(fields):
    for line in mistakes(asset(**fields), "JSON"):
        assert line.isprintable()
        assert line.startswith("asset 1")
        assert len(line) < 400


def test_a_mistake_of_all_variants_is_told_once():
    assert len(mistakes(asset(seed=1, variants={"image_weight": [1, 2, 3], "style_type": ["ANIME", "DESIGN"]}))) == 1


def test_other_sizes_go_through_where_that_is_allowed():
    text = "defaults: {resolution: RESOLUTION_2048_2048}\nassets: [{image: m, prompt: a}]"
    assert jobs(text, unlisted=True)[0].resolution == "RESOLUTION_2048_2048"


def test_a_name_is_taken_by_a_row_with_another_mistake_too():
    with pytest.raises(ManifestError) as caught:
        load("name,image,prompt,seed\nm,a.jpg,x,1\nm,b.jpg,x,\n", "CSV")
    assert [line.partition(":")[0] for line in caught.value.mistakes] == ["line 2 (m)", "line 3 (m)"]  # type: ignore[attr-defined]
    assert "m is already used by line 2" in caught.value.mistakes[1]  # type: ignore[attr-defined]


def test_a_name_made_of_the_images_own_is_the_whole_name_of_a_match():
    def find(image: str, wildcards: bool) -> list[FoundImage]:
        return [FoundImage("/in/mug.jpg", "mug"), FoundImage("/in/cup.jpg", "cup")]

    text = 'assets: [{name: "deep/{{ stem }}", image: "in/*.jpg", prompt: x}, {name: inbox, image: "in/*", prompt: x}]'
    assert [job.name for job in jobs(text, find=find)] == ["deep/mug", "deep/cup", "inbox/mug", "inbox/cup"]


def test_the_message_shows_a_hundred_mistakes_and_counts_the_others():
    rows = "".join(f"m{n},b,{n}\n" for n in range(1_000, 12_000))
    with pytest.raises(ManifestError) as caught:
        load(f"image,prompt,image_weight\n{rows}", "CSV")
    assert isinstance(caught.value, MistakenManifest)
    first, *lines = str(caught.value).split("\n")
    assert first == "m: 11000 mistakes; nothing was uploaded or paid."
    assert len(lines) == 101
    assert lines[0].startswith("  line 2: image_weight: '1000' is not allowed")
    assert lines[-1] == "  … and 10900 more"
    assert len(caught.value.mistakes) == 10_000
    assert str(Notes().error("m")).startswith("m: 0 mistake")


def test_no_mistake_shows_a_secret():
    secret = "https://b.example/k.jpg?X-Amz-Signature=HIDDENWORD"
    text = json.dumps(
        {
            "SG_0123456789abcdef": 1,
            "vars": [secret],
            "variants": {secret: [1], "seed": secret},
            "assets": [secret, {"name": secret, "image": secret, "prompt": "{{ 1 / 0 }}", secret: 1}],
        }
    )
    text = "\n".join(mistakes(text, "JSON"))
    assert "HIDDENWORD" not in text
    assert "SG_0123456789abcdef" not in text


def test_what_is_shown_is_one_short_line():
    assert shown("a\x1b[31m\nb") == "'a\\x1b[31m\\nb'"
    assert shown("x" * 100) == "x" * 79 + "…"
    assert unknown("zzz", ["image", "prompt"]) == "zzz: there is no such field; allowed is one of image, prompt"


# --- written and read back --------------------------------------------------------------------------------------------

ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PROMPTS = (
    ENCODABLE | st.sampled_from(["{{ a }}", "{% x", "\ufeff", "\u2028", "\x85", "é\r\n", "'\"", "- :", "\U0001fffe🎨"])
).filter(lambda text: text.strip())
NAMES = st.from_regex(r"[a-z0-9{}%'!&é]{1,9}(/[a-z]{1,9})?", fullmatch=True)
JOBS = st.lists(
    st.builds(
        Job,
        name=NAMES,
        image=NAMES.map(lambda name: f"s3://bucket/{name}*?.jpg")
        | PROMPTS.filter(lambda text: not re.search(r"(?i)://|\0|^\W*(https?|s3):", text)),
        prompt=PROMPTS,
        image_weight=st.integers(1, 100),
        magic_prompt_option=st.sampled_from(MagicPromptOption),
        negative_prompt=st.none() | PROMPTS,
        resolution=st.sampled_from(["AUTO", "RESOLUTION_1280_800", "RESOLUTION_1024_1024"]),
        seed=st.none() | st.just("random") | st.integers(100, 999_999),
        style_type=st.sampled_from(["GENERAL", "ANIME"]),
        allow_extreme_ratio=st.booleans(),
    ),
    max_size=4,
    unique_by=lambda job: job.name,
)
wide = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@wide
@given(JOBS)
def test_a_manifest_written_out_makes_the_same_jobs(made):
    assert jobs("".join(write_manifest(job.model_dump(mode="json") for job in made))) == made
    assert jobs("".join(write_manifest(job.model_dump() for job in made))) == made


def test_a_written_manifest_says_no_more_than_needed_and_streams():
    pieces = write_manifest(iter([MUG.model_dump(), Job(image="a", prompt="b").model_dump(mode="json")]))
    assert next(pieces) + next(pieces) == (
        'templates: false\nassets:\n  - name: "summer/mug"\n    image: "photos/mug.jpg"\n'
        '    prompt: "a ceramic mug in late summer light"\n    image_weight: 60\n    magic_prompt_option: "OFF"\n'
        '    style_type: "REALISTIC"'
    )
    assert "".join(pieces) == '\n  - name: "a"\n    image: "a"\n    prompt: "b"\n'
    assert "".join(write_manifest([])) == "templates: false\nassets: []\n"


def shared(made: Sequence[Job]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A head that holds something, and the assets."""
    head = {"templates": False, "defaults": {"seed": 4711, "prompt": "{{"}, "vars": {"a": [1, {"b": None}], "ü": 1.5}}
    return head, [job.model_dump(mode="json") for job in made]


@wide
@given(JOBS, st.booleans())
def test_a_manifest_in_json_and_in_json_lines_is_read_as_it_was_written(made, ascii_only):
    head, assets = shared(made)
    assert jobs(json.dumps({**head, "assets": assets}, ensure_ascii=ascii_only), "JSON") == made
    lines = (json.dumps(line, ensure_ascii=ascii_only) for line in [head, *assets])
    assert jobs("\n".join(lines), "JSON Lines") == made


NUMBER_OF_YAML_1_2 = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@wide
@given(JOBS, st.sampled_from(["'", '"', "|", None]))
def test_a_manifest_of_pyyaml_is_read_as_it_was_written(made, style):
    head, assets = shared(made)
    text = yaml.safe_dump({**head, "assets": assets}, allow_unicode=True, default_style=style, sort_keys=False)
    if yaml.safe_load(text) == {**head, "assets": assets}:  # PyYAML loses a line break of its own at times
        if style is None and any(NUMBER_OF_YAML_1_2.fullmatch(str(each)) for job in assets for each in job.values()):
            return  # PyYAML, which knows YAML 1.1, writes it without quotes
        assert jobs(text) == made


NOT_IN_CSV = re.compile(r"\{[{%#]|\0|[\r\n]\Z")  # its texts are always templates, and NUL is no text


@wide
@given(JOBS, st.sampled_from(",;\t"))
def test_a_manifest_in_csv_is_read_as_it_was_written(made, delimiter):
    made = [
        job
        for job in made
        if not any(NOT_IN_CSV.search(text or "") for text in (job.name, job.image, job.prompt, job.negative_prompt))
    ]
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, [*Job.model_fields], delimiter=delimiter)
    writer.writeheader()
    for job in made:
        writer.writerow(job.model_dump(mode="json"))
    assert jobs(written.getvalue(), "CSV") == made


@wide
@given(JOBS, st.randoms())
def test_the_order_of_fields_changes_no_fingerprint(made, random):
    def shuffled(job: Job) -> dict[str, Any]:
        fields = list(job.model_dump(mode="json").items())
        random.shuffle(fields)
        return dict(fields)

    again = jobs(json.dumps({"templates": False, "assets": [shuffled(job) for job in made]}), "JSON")
    assert [fingerprint("0" * 64, job.parameters()) for job in again] == [
        fingerprint("0" * 64, job.parameters()) for job in made
    ]


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["{{ a }}", "random"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*Job.model_fields, "vars", "variants", "templates", "defaults", "assets"]) | st.text(max_size=5)


@wide
@given(st.dictionaries(KEYS, ANY, max_size=5), st.lists(st.dictionaries(KEYS, ANY, max_size=6), max_size=3))
def test_whatever_is_written_is_jobs_or_mistakes(head, assets):
    for text, kind in (
        (json.dumps({**head, "assets": assets}), "JSON"),
        ("\n".join(map(json.dumps, [head, *assets])), "JSON Lines"),
    ):
        made: list[Job] = []
        with suppress(ManifestError):
            made = jobs(text, kind)
        assert [parse_job(job.model_dump()) for job in made] == made


@pytest.mark.parametrize("text", [",", ",,\n,\n", "sep=;\n;;\n"])
def test_a_csv_of_separators_alone_is_empty(text: str) -> None:
    assert mistake(text, "CSV").startswith("it is empty; its first line names the columns")


@wide
@given(st.text(max_size=200), st.sampled_from(["YAML", "JSON", "JSON Lines", "CSV"]))
def test_any_text_at_all_is_jobs_or_mistakes(text, kind):
    with suppress(ManifestError):
        jobs(text, kind)


# --- the schema and the example ---------------------------------------------------------------------------------------


def test_the_schema_in_the_docs_is_the_one_of_the_code():
    assert (DOCS / "manifest.schema.json").read_text(encoding="utf-8") == json.dumps(json_schema(), indent=2) + "\n"


def test_the_schema_is_one_and_describes_every_field():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert all(schema["$defs"][field]["description"] for field in Job.model_fields)
    assert len(schema["$defs"]["resolution"]["enum"]) == 79


def test_the_example_fits_the_schema_and_makes_what_it_says():
    text = (DOCS / "manifest.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=manifest.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json_schema(), jsonschema.Draft202012Validator)
    made = jobs(text)
    assert len(made) == 8
    assert made[0].name == "summer/mug/realistic-w30"
    assert made[-1].prompt == "cup on a wooden table,\nin late summer light"
    more = text[text.index("#  - name: inbox") :].replace("#  ", "  ")
    assert len(jobs(text + more)) == 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"assets": [{**ASSET, "promt": "x"}]},
        {"assets": [{**ASSET, "image_weight": 101}]},
        {"assets": [{**ASSET, "seed": 99}]},
        {"assets": [{**ASSET, "style_type": "realistic"}]},
        {"assets": [{**ASSET, "resolution": "RESOLUTION_800_1280"}]},
        {"assets": [{**ASSET, "variants": {"seed": []}}]},
        {"assets": [], "defaults": {"name": "x"}},
        {"assets": [], "templates": "no"},
        {"vars": {}},
        [],
    ],
)
def test_the_schema_refuses_what_is_refused(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema(), jsonschema.Draft202012Validator)
    with pytest.raises(ManifestError):
        load(json.dumps(wrong), "JSON")


def test_what_an_alias_repeats_is_written_as_at_its_first_place():
    text = "vars: {a: &a {b: 1.10}, c: *a}\nassets: [{image: m, prompt: '{{ a.b }} {{ c.b }}'}]"
    assert jobs(text)[0].prompt == "1.10 1.10"


def test_nothing_is_a_key_as_ever():
    keys: dict[object, int] = {None: 1}
    assert keys[written("~", None)] == 1
