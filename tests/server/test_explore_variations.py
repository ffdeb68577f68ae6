"""A grid of variations on a real Prefect server: its price before, one picture of all of them afterwards."""

from __future__ import annotations

import json
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from prefect_segmind import BatchError, explore_variations
from prefect_segmind.batch import results
from prefect_segmind.errors import ConfigurationError, InvalidJobError, ManifestError, SourceImageError
from prefect_segmind.reporting.artifacts import artifact_key
from prefect_segmind.sandbox import Answer, Sandbox
from prefect_segmind.services import Services

pytestmark = pytest.mark.usefixtures("prefect_server")


def sheet(uri: str | None) -> Image.Image:
    assert uri
    found = Services().archive.content(uri)
    assert found
    return Image.open(BytesIO(found))


def test_every_combination_is_a_picture_and_all_are_on_one_sheet(sandbox: Sandbox, photo: Path) -> None:
    result = explore_variations(
        str(photo), "a red mug", styles=["ANIME", "DESIGN"], weights=[30, 70], seeds=[100, 4711]
    )
    assert (result.generated, result.cost_usd) == (8, Decimal("0.40"))
    archive = Services().archive
    sent = [json.loads(archive.content(each.sidecar) or b"")["request"] for each in result.images]
    assert {(each["style_type"], each["image_weight"], each["seed"]) for each in sent} == {
        (style, weight, seed) for style in ("ANIME", "DESIGN") for weight in (30, 70) for seed in (100, 4711)
    }
    assert "mug/anime-w30-seed100" in {each.name for each in result.images}
    picture = sheet(result.contact_sheet)
    assert picture.format == "JPEG"
    assert min(picture.size) > 500
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key("mug", "contact-sheet")]))
        artifact = client.read_artifacts(artifact_filter=wanted)[-1]
    assert "data:image/jpeg" in str(artifact.data)


def test_by_itself_it_varies_styles_and_weights_with_one_seed(sandbox: Sandbox, photo: Path) -> None:
    result = explore_variations(str(photo), "a red mug", dry_run=True)
    assert (result.generated, result.planned_usd, result.contact_sheet) == (15, Decimal("0.75"), None)
    assert [each.needs for each in result.jobs] == ["generate"] * 15
    assert "would generate 15; would cost 0.75 USD" in result.sentence()
    assert not sandbox.ledger.requests
    explore_variations(str(photo), "a red mug", styles=["ANIME", "DESIGN"], weights=[50])
    assert len({each.seed for each in sandbox.ledger.requests}) == 1


def test_every_picture_is_on_the_sheet_however_few_a_result_names(
    sandbox: Sandbox, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid: dict[str, Any] = {"styles": ["ANIME", "DESIGN"], "weights": [30], "seeds": [100]}
    whole = explore_variations(str(photo), "a red mug", **grid)
    monkeypatch.setattr(results, "NAMED", 1)
    again = explore_variations(str(photo), "a red mug", **grid)
    assert (len(whole.images), len(again.images)) == (2, 1)
    assert again.contact_sheet == whole.contact_sheet, "its name is that of its content"


def test_again_it_pays_nothing_and_makes_the_same_sheet(sandbox: Sandbox, photo: Path) -> None:
    grid: dict[str, Any] = {"styles": ["ANIME"], "weights": [30, 70]}
    first = explore_variations(str(photo), "a red mug", **grid)
    second = explore_variations(str(photo), "a red mug", **grid)
    assert (second.reused, second.cost_usd) == (2, Decimal(0))
    assert first.contact_sheet == second.contact_sheet
    wider = explore_variations(str(photo), "a red mug", styles=["ANIME"], weights=[30, 70, 90])
    assert (wider.reused, wider.generated, sandbox.ledger.billed) == (2, 1, 3)


def test_a_variation_that_fails_leaves_its_cell_empty(sandbox: Sandbox, photo: Path) -> None:
    sandbox.play(Answer(status=422, body='{"error": "unsafe"}'))
    with pytest.raises(BatchError) as error:
        explore_variations(str(photo), "a red mug", styles=["ANIME"], weights=[30, 70], max_concurrency=1)
    result = error.value.result
    assert (result.generated, result.failed) == (1, 1)
    assert sheet(result.contact_sheet).width > 500  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"styles": ["anime"]}, "Did you mean ANIME"),
        ({"weights": [0]}, "1 to 100"),
        ({"seeds": [7]}, "100 to 999999"),
        ({"styles": []}, "at least one value"),
        ({"resolution": "RESOLUTION_800_1280"}, "RESOLUTION_768_1280"),
        ({"prompt": " "}, "not blank"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_paid(
    sandbox: Sandbox, photo: Path, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises((InvalidJobError, ManifestError), match=told):
        explore_variations(**{"image": str(photo), "prompt": "a red mug", **wrong})
    assert sandbox.ledger.requests == ()


def test_more_than_a_contact_sheet_holds_is_refused(sandbox: Sandbox, photo: Path) -> None:
    with pytest.raises(ConfigurationError, match="500 rows"):
        explore_variations(str(photo), "a red mug", styles=["ANIME"], weights=[50], seeds=list(range(100, 601)))


def test_an_image_that_cannot_be_used_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(SourceImageError, match="does not exist"):
        explore_variations(str(tmp_path / "lost.jpg"), "a red mug")
