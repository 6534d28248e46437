"""S3 requests of a job, by shard and by fragment, and what they cost for very many images.

    python -m benchmarks.requests

`segment --local` with the bundled model, input and output on an S3 in memory (stub_s3) that counts,
for few and more shards of few and more images: the differences are what a shard and what a fragment
of it cost. Prices are those of S3 Standard in us-east-1: 0.005 USD for 1,000 PUT and LIST, 0.0004
for 1,000 GET and HEAD; deletions are free.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.shards import small_images, write_tars
from benchmarks.stub_s3 import StubS3
from jobs import segment
from pipeline.demo import MODEL

BATCH = 16
USD = {
    **dict.fromkeys(("PutObject", "ListObjectsV2"), 0.005 / 1000),
    **dict.fromkeys(("GetObject", "HeadObject"), 0.0004 / 1000),
}


def count(s3: StubS3, shards: int, images: int) -> Counter[str]:
    """Requests of a job over so many shards of so many images."""
    name = f"{shards}-{images}"
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder, "in"), small_images(shards * images, 64), shards)
        for path in sorted(Path(folder, "in").iterdir()):
            s3.put(f"bucket/{name}/in/{path.name}", path.read_bytes())
    s3.counts.clear()
    options = ["--model", str(MODEL), "--prompt", "star", "--batch-size", str(BATCH)]
    where = [f"s3://bucket/{name}/in", f"s3://bucket/{name}/out"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = segment.main([*where, *options, "--local", "--quiet"])
    assert code == 0
    return Counter(s3.counts)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=float, default=1e8, help="of the whole input")
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "some-key", "AWS_SECRET_ACCESS_KEY": "secret"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    with StubS3(0.0) as s3:
        os.environ["AWS_ENDPOINT_URL"] = s3.endpoint
        few, more = count(s3, 2, BATCH), count(s3, 6, BATCH)
        long = count(s3, 2, 3 * BATCH)
    names = sorted({*few, *more, *long})
    fragment = {n: (long[n] - few[n]) / 4 for n in names}
    shard = {n: (more[n] - few[n]) / 4 - fragment[n] for n in names}
    job = {n: few[n] - 2 * (shard[n] + fragment[n]) for n in names}
    print("| requests | a job | a shard | a fragment |")
    print("| --- | --- | --- | --- |")
    for name in names:
        print(f"| {name} | {job[name]:g} | {shard[name]:g} | {fragment[name]:g} |")
    print()
    print("| images | a shard | a fragment | requests | USD |")
    print("| --- | --- | --- | --- | --- |")
    for of_shard, of_fragment in ((1_000, 64), (1_000, 7), (10_000, 64), (10_000, 256)):
        shards, fragments = options.images / of_shard, options.images / of_fragment
        sent = {n: shards * shard[n] + fragments * fragment[n] for n in names}
        usd = sum(USD.get(name, 0.0) * count for name, count in sent.items())
        total = sum(sent.values())
        print(
            f"| {options.images:,.0f} | {of_shard:,} | {of_fragment} | {total:,.0f} | {usd:,.0f} |"
        )


if __name__ == "__main__":
    main()
