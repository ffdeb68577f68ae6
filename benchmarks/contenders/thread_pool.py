"""A pool of threads with httpx and boto3, no orchestration: the floor of what a batch costs in Python.

    python -m benchmarks.contenders.thread_pool batch.csv s3://bench/archive 64

The image is uploaded once; a picture is one signed address, one request and one write. Nothing is tried again, and
nothing remembers what was paid for: a second run pays for everything anew.
"""

from __future__ import annotations

import csv
import os
import ssl
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import httpx
from botocore.config import Config

BUCKET, SOURCE = "bench", "uploads/photo.jpg"


def main() -> None:
    manifest, archive, at_once = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    s3 = boto3.client("s3", config=Config(signature_version="s3v4", max_pool_connections=at_once))
    s3.put_object(Bucket=BUCKET, Key=SOURCE, Body=(manifest.parent / rows[0]["image"]).read_bytes())
    url = os.environ["SEGMIND_BASE_URL"] + "/ideogram-2a-img-2-img"
    headers = {"x-api-key": os.environ["SEGMIND_API_KEY"]}
    certificates = ssl.create_default_context()
    mine = threading.local()

    def make(row: dict[str, str]) -> None:
        if not hasattr(mine, "client"):  # one each: a pool that many threads share slows down
            mine.client = httpx.Client(timeout=180, verify=certificates, headers=headers)
        address = s3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": SOURCE}, ExpiresIn=3600)
        body = {"image_file": address, "prompt": row["prompt"], "seed": int(row["seed"])}
        answer = mine.client.post(url, json=body)
        answer.raise_for_status()
        if archive.startswith("s3://"):
            prefix = archive.removeprefix(f"s3://{BUCKET}/")
            s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{row['name']}.jpg", Body=answer.content)
        else:
            path = Path(archive, f"{row['name']}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(answer.content)

    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(make, rows):
            pass


if __name__ == "__main__":
    main()
