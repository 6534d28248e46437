"""Images and shards that end the process that works on them: told once, never tried for ever."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image
from shards import make_tar

from jobs import embed
from pipeline.errors import JobError
from pipeline.run.guard import guarded
from pipeline.run.isolate import ProcessDiedError, run_apart
from pipeline.run.session import ray_session
from tests.poison import (
    POISON,
    PoisonedPrepare,
    count_and_die,
    die,
    poisoned_read_batches,
    poisoned_read_one_by_one,
)

MODEL = Path(__file__).parent.parent / "pipeline" / "demo" / "model"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def rows(output: Path, name: str) -> list[tuple[Any, ...]]:
    found = [row for p in output.glob(f"{name}/*.parquet") for row in pq.read_table(p).to_pylist()]
    columns = ("shard", "row", "reason", "detail") if name == "errors" else ("shard", "row")
    return sorted(tuple(row[c] for c in columns) for row in found)


@pytest.mark.usefixtures("local_ray")
def test_poison_becomes_an_errors_row_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "PrepareImages", PoisonedPrepare)
    monkeypatch.setattr(embed, "read_batches", poisoned_read_batches)
    monkeypatch.setattr(embed, "read_one_by_one", poisoned_read_one_by_one)
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    images = [png(), POISON, png(), POISON, png()]
    for name in ("a.tar", "b.tar"):
        members = [(f"{i}.png", png() if name == "b.tar" else im) for i, im in enumerate(images)]
        (source / name).write_bytes(make_tar(members))
    assert embed.main([str(source), str(output), "--model", str(MODEL), "--quiet"]) == 0
    assert rows(output, "errors") == [
        ("a.tar", 1, "decoder_crashed", "by SIGSEGV"),
        ("a.tar", 3, "decoder_crashed", "by SIGSEGV"),
        ("b.tar", None, "reader_crashed", "with exit code 7"),
    ]
    whole = [("a.tar", 0), ("a.tar", 2), ("a.tar", 4), ("b.tar", 0), ("b.tar", 1)]
    assert rows(output, "images") == rows(output, "embeddings") == whole
    assert (output / "_SUCCESS").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_stage_whose_workers_keep_dying_ends_the_job() -> None:
    share: dict[str, Any] = {"num_cpus": 0.5, "batch_format": "pyarrow", "batch_size": None}
    lost = ray.data.from_items([{"shard": "x.tar"}]).map_batches(
        guarded(die, max_crashes=2), **share
    )
    with pytest.raises(JobError, match=r"die: its worker died 2 times .* x\.tar$"), ray_session():
        lost.take_all()


@pytest.mark.usefixtures("local_ray")
def test_what_a_stage_did_not_expect_is_told_without_rays_advice() -> None:
    class Surprised:
        def __call__(self, batch: pa.Table) -> pa.Table:
            raise ValueError("image is 48 x 48 pixels")

    share: dict[str, Any] = {"num_cpus": 0.5, "compute": ray.data.ActorPoolStrategy(size=1)}
    failing = ray.data.from_items([{"shard": "x.tar"}]).map_batches(Surprised, **share)
    with pytest.raises(JobError) as caught, ray_session():
        failing.take_all()
    assert str(caught.value) == "a worker failed: ValueError: image is 48 x 48 pixels"


def test_what_a_process_gives_before_it_ends_is_kept() -> None:
    for number, ends in ((signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL"), (0, "")):
        values: list[int] = []
        running = run_apart(count_and_die, int(number))
        with pytest.raises(ProcessDiedError if number else JobError) as caught:
            values.extend(running)
        assert values == [0, 1, 2]
        if isinstance(caught.value, ProcessDiedError):
            assert ends in caught.value.how
            assert caught.value.killed == (number == signal.SIGKILL)
