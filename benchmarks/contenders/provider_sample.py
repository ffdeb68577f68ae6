"""The provider's own sample in a loop, as a first script of somebody who has read its page.

    python -m benchmarks.contenders.provider_sample batch.csv pictures/ 1

One request after the other, no retry, and nothing remembers what was paid for. The page's sample prints
`response.json()`, which fails on a picture; here the picture is written to a file. The image is public already.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import requests


def main() -> None:
    manifest, archive, _ = sys.argv[1:]
    api_key = os.environ["SEGMIND_API_KEY"]
    url = os.environ["SEGMIND_BASE_URL"] + "/ideogram-2a-img-2-img"
    with Path(manifest).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        data = {
            "image_file": "https://example.com/photo.jpg",
            "prompt": row["prompt"],
            "image_weight": 50,
            "magic_prompt_option": "AUTO",
            "resolution": "RESOLUTION_1024_1024",
            "seed": int(row["seed"]),
            "style_type": "GENERAL",
        }
        response = requests.post(url, json=data, headers={"x-api-key": api_key})
        file_name = Path(archive, f"{row['name']}.jpg")
        file_name.parent.mkdir(parents=True, exist_ok=True)
        file_name.write_bytes(response.content)


if __name__ == "__main__":
    main()
