"""Manifests of a few mugs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def mugs(
    photo: Path, count: int, prompt: str, *, name: str = "mug/{}", first_seed: int | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """Assets of one photo, each with a name of its own, and with a seed of its own if there is a first one."""
    assets = [{"name": name.format(n), "image": photo.name, "prompt": prompt.format(n), **fields} for n in range(count)]
    if first_seed is not None:
        for seed, asset in enumerate(assets, first_seed):
            asset["seed"] = seed
    return assets


def write_campaign(photo: Path, assets: list[dict[str, Any]], **top: Any) -> str:
    """Writes `campaign.yaml` beside the photo; its path."""
    path = photo.with_name("campaign.yaml")
    path.write_text(yaml.safe_dump({"assets": assets, **top}, allow_unicode=True))
    return str(path)
