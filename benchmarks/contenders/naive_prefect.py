"""A batch as Prefect's introduction suggests it: four tasks, mapped over all rows, each with retries.

    python -m benchmarks.contenders.naive_prefect batch.csv s3://bench/archive 64

Each picture is four task runs, whose results stay in memory until the flow ends. A flow that is run again pays for
everything anew, and so does a retry after an answer that was lost.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import boto3
import httpx
from botocore.config import Config
from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner

MANIFEST, ARCHIVE, AT_ONCE = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
BUCKET = "bench"
s3 = boto3.client("s3", config=Config(signature_version="s3v4", max_pool_connections=AT_ONCE))


@task(retries=3, retry_delay_seconds=[2, 4, 8])
def upload(row: dict[str, str]) -> str:
    key = f"uploads/{row['name']}.jpg"
    s3.put_object(Bucket=BUCKET, Key=key, Body=(MANIFEST.parent / row["image"]).read_bytes())
    return key


@task(retries=3, retry_delay_seconds=[2, 4, 8])
def presign(key: str) -> str:
    return s3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=3600)


@task(retries=3, retry_delay_seconds=[2, 4, 8])
def generate(address: str, row: dict[str, str]) -> bytes:
    answer = httpx.post(
        os.environ["SEGMIND_BASE_URL"] + "/ideogram-2a-img-2-img",
        headers={"x-api-key": os.environ["SEGMIND_API_KEY"]},
        json={"image_file": address, "prompt": row["prompt"], "seed": int(row["seed"])},
        timeout=180,
    )
    answer.raise_for_status()
    return answer.content


@task(retries=3, retry_delay_seconds=[2, 4, 8])
def archive(picture: bytes, row: dict[str, str]) -> None:
    if ARCHIVE.startswith("s3://"):
        prefix = ARCHIVE.removeprefix(f"s3://{BUCKET}/")
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{row['name']}.jpg", Body=picture)
    else:
        path = Path(ARCHIVE, f"{row['name']}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)


@flow(task_runner=ThreadPoolTaskRunner(max_workers=AT_ONCE))  # type: ignore[arg-type]  # Prefect's own is invariant
def refresh() -> None:
    with MANIFEST.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    addresses = presign.map(upload.map(rows))
    archive.map(generate.map(addresses, rows), rows).result()


if __name__ == "__main__":
    refresh()
