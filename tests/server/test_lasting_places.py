"""Archive, outbox and publishing place are there when a run is over, whatever becomes of its working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.runtime import deployment

from prefect_segmind import image_to_image, refresh_assets
from prefect_segmind.cli import commands
from prefect_segmind.errors import ConfigurationError
from prefect_segmind.sandbox import Sandbox
from prefect_segmind.services import Services, outbox_folder
from prefect_segmind.settings import load_settings
from prefect_segmind.storage.open_store import is_relative

PREFIX = "PREFECT_INTEGRATIONS_SEGMIND_"


@pytest.fixture
def in_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Prefect has it tested: the runtime tells of a deployment."""
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "6c1e2f7a-3d0b-4f43-9a55-0f6a4d1c7e21")
    assert deployment.id


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.mark.usefixtures("in_deployment")
class TestInADeployment:
    @pytest.mark.parametrize("place", ["pictures", "./pictures", "../pictures", "pictures/2026", " pictures"])
    def test_a_relative_archive_is_refused_by_the_name_of_its_parameter(self, place: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^archive: .* is a relative folder") as caught:
            _ = Services(archive=place).archive
        for said in (repr(place.strip()), "nothing was paid", "s3://bucket/prefix", "/srv/pictures"):
            assert said in str(caught.value)

    def test_and_by_the_name_of_its_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"{PREFIX}ARCHIVE", "pictures")
        with pytest.raises(ConfigurationError, match=f"^{PREFIX}ARCHIVE: 'pictures' is a relative folder"):
            _ = Services().archive

    def test_so_is_an_outbox(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(f"{PREFIX}OUTBOX", "outbox")
        with pytest.raises(ConfigurationError, match=f"^{PREFIX}OUTBOX: 'outbox' is a relative folder"):
            outbox_folder(load_settings())

    def test_so_is_the_outbox_in_a_relative_home_of_prefect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prefect_segmind.settings.PREFECT_HOME.value", lambda: Path("home"), raising=False)
        with pytest.raises(ConfigurationError, match=r"^PREFECT_HOME: 'home/segmind/outbox' is a relative folder"):
            outbox_folder(load_settings())

    @pytest.mark.parametrize("place", ["live", "live/{name}.jpg", "{name}.jpg"])
    def test_so_is_a_place_to_publish_to(self, place: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^publish_to: .* is a relative folder"):
            _ = Services(publish_to=place).publishing

    @pytest.mark.parametrize("folder", ["/tmp/tmpab_12xyzprefect/clone", "/tmp/runner_storage/1f2e/clone"])
    def test_so_is_a_folder_that_prefect_deletes_with_the_run(self, folder: str) -> None:
        with pytest.raises(ConfigurationError, match="in a folder that Prefect deletes"):
            _ = Services(archive=f"{folder}/pictures").archive

    @pytest.mark.parametrize("file", [".env", "prefect.toml", "pyproject.toml"])
    def test_what_a_file_names_is_taken_from_the_folder_of_the_file(self, file: str, folder: Path) -> None:
        write(folder / file, archive="pictures", outbox="../outbox")
        assert Services().archive.url == str(folder / "pictures")
        assert outbox_folder(load_settings()) == folder / "../outbox"

    def test_absolute_folders_homes_and_buckets_are_taken(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder))
        for place in (
            "~/pictures",
            str(folder / "pictures"),
            (folder / "pictures").as_uri(),
            f"file:{folder}/pictures",
        ):
            assert Services(archive=place).archive.url == str(folder / "pictures")
            assert Services(publish_to=place).publishing
        monkeypatch.setenv(f"{PREFIX}OUTBOX", "~/outbox")
        assert outbox_folder(load_settings()) == folder / "outbox"


def write(path: Path, **settings: str) -> None:
    lines = [f'{PREFIX}{name.upper()}="{value}"' for name, value in settings.items()]
    if path.suffix == ".toml":
        header = "[tool.prefect.integrations.segmind]" if path.stem == "pyproject" else "[integrations.segmind]"
        lines = [header, *(f'{name} = "{value}"' for name, value in settings.items())]
    path.write_text("\n".join(lines))


class TestElsewhere:
    def test_a_relative_place_is_taken_from_the_working_directory_of_the_moment(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(f"{PREFIX}OUTBOX", "outbox")
        for here in (folder, tmp_path):
            monkeypatch.chdir(here)
            assert Services(archive="pictures").archive.url == str(here / "pictures")
            assert outbox_folder(load_settings()) == here / "outbox"

    def test_a_variable_wins_over_a_file_and_one_file_over_the_next(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(folder / "pyproject.toml", archive="third", outbox="/third")
        write(folder / "prefect.toml", archive="/second", outbox="second")
        assert Services().archive.url == "/second"
        assert outbox_folder(load_settings()) == folder / "second"
        write(folder / ".env", archive="first")
        assert Services().archive.url == str(folder / "first")
        monkeypatch.setenv(f"{PREFIX}ARCHIVE", "s3://bucket/archive")
        assert load_settings().archive == "s3://bucket/archive"

    @pytest.mark.parametrize("place", ["file:pictures", "FILE:pictures", "file://host/pictures"])
    def test_a_file_url_without_a_whole_path_is_refused(self, place: str) -> None:
        with pytest.raises(ConfigurationError, match="file:///folder"):
            _ = Services(archive=place).archive
        with pytest.raises(ConfigurationError, match="publish_to"):
            _ = Services(publish_to=place).publishing


def test_check_says_what_a_relative_place_is_and_that_deployments_refuse_it(
    sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"{PREFIX}ARCHIVE", "pictures")
    monkeypatch.setenv(f"{PREFIX}OUTBOX", "outbox")
    commands.run(["check"])
    lines = {line.split(": ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for title, place in {"archive": "pictures", "outbox": "outbox"}.items():
        line = lines[f"mind {title}"]
        for said in (str(folder / place), f"{PREFIX}{title.upper()}", "runs of deployments refuse it", "prefect.toml"):
            assert said in line


@pytest.mark.usefixtures("prefect_server")
class TestARun:
    def test_of_a_deployment_with_a_relative_place_fails_before_anything_is_uploaded_or_paid(
        self, sandbox: Sandbox, photo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = {"image": str(photo), "prompt": "a mug"}
        (manifest := photo.with_suffix(".csv")).write_text(f"image,prompt\n{photo.name},a mug\n")
        for place in ("archive", "publish_to"):
            for made, parameters in ((image_to_image, job), (refresh_assets, {"manifest": str(manifest)})):
                with pytest.raises(ConfigurationError, match=f"^{place}: 'pictures' is a relative folder"):
                    run(made, parameters | {place: "pictures"})
        monkeypatch.setenv(f"{PREFIX}OUTBOX", "outbox")
        with pytest.raises(ConfigurationError, match=f"{PREFIX}OUTBOX: 'outbox' is a relative folder"):
            run(image_to_image, job)
        assert not sandbox.ledger.requests
        assert not list(folder.iterdir())

    def test_within_one_of_a_deployment_fails_as_well(self, sandbox: Sandbox, photo: Path) -> None:
        @flow
        def campaign(image: str) -> None:
            image_to_image(image=image, prompt="a mug", archive="pictures")

        with pytest.raises(ConfigurationError, match=r"^archive: 'pictures' is a relative folder"):
            run(campaign, {"image": str(photo)})
        assert not sandbox.ledger.requests

    def test_without_a_deployment_takes_it_from_the_working_directory(
        self, sandbox: Sandbox, photo: Path, folder: Path
    ) -> None:
        archived = image_to_image(image=str(photo), prompt="a mug", archive="pictures")
        assert Path(archived.image).is_relative_to(folder / "pictures")
        assert Path(archived.image).is_file()


def run(made: Flow[..., Any], parameters: dict[str, Any]) -> Any:
    """Runs a flow in this process, as a run of a deployment."""
    with get_client(sync_client=True) as client:
        name = f"lasting-{made.name}"
        deployed: UUID = client.create_deployment(flow_id=client.create_flow(made), name=name)
        created = client.create_flow_run_from_deployment(deployed, parameters=parameters)
    return run_flow(made, flow_run=created, parameters=parameters)


def test_no_deployment_that_is_shipped_names_a_relative_place() -> None:
    file = Path(__file__).parents[2] / "deployments" / "prefect.yaml"
    for deployed in yaml.safe_load(file.read_text())["deployments"]:
        for given in (deployed, *deployed.get("schedules", ())):
            for name in ("archive", "publish_to", "upload_to"):
                assert not is_relative(given.get("parameters", {}).get(name, ""))
