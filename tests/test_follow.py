"""The account rows of a stream as the driver adds them up; no Ray is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import RunOptions, WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import JobError
from pipeline.read.shard import Shard
from pipeline.run.engine import Engine, stage_seconds
from pipeline.run.follow import follow_run
from pipeline.run.lifecycle import Pass, open_run
from pipeline.run.manifest import read_run
from tests.outputs import SHARD, TABLES, images, masks, write

SHARDS = [replace(SHARD, name=f"{i}.tar", size_bytes=100) for i in range(4)]


@dataclass
class Accounts:
    """Stands for a dataset."""

    rows: list[dict[str, Any]]
    text: str = ""

    def stats(self) -> str:
        return self.text

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            empty = {"shard": SHARDS[0].name, "images": 0, "errors": 0, "reason": "", "outputs": 0}
            yield (
                empty
                | {"size_bytes": 0, "total": -1, "skipped": 0, "fragment": "", "fault": ""}
                | row
            )


def follow(output: Path, rows: list[dict[str, Any]], shards: list[Shard] = SHARDS) -> None:
    config = SegmentConfig(
        input="in", output=str(output), prompt=("x", "y"), run=RunOptions(max_error_rate=0.1)
    )
    run = open_run(config, shards, model={"weights_hash": "abc"}, tables=TABLES)
    follow_run(run, lambda *_: Accounts(rows), WorkerOptions(local=True, quiet=True))


def made(output: Path, shard: Shard, rows: int) -> list[dict[str, Any]]:
    """The account rows of a shard whose images came out well before a driver was killed."""
    config = SegmentConfig(input="in", output=str(output), prompt=("x", "y"))
    run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    numbers = range(rows)
    tables = {"images": images(*numbers), "masks": masks(*numbers)}
    (name,) = write(run.first.ledger, shard, tables)
    assert name
    return [{"shard": shard.name, "total": rows}]


def test_the_account_goes_on_while_shards_are_finished(tmp_path: Path) -> None:
    """At most so many at a time as the engine says; the others wait, and the stream does not."""
    shards = [replace(SHARD, name=f"{i:02}.tar", size_bytes=1) for i in range(20)]
    config = SegmentConfig(input="in", output=str(tmp_path), prompt=("x", "y"))
    run = open_run(config, shards, model={"weights_hash": "abc"}, tables=TABLES)
    begun: list[tuple[Future[Any], Callable[[], Any]]] = []
    seen: list[int] = []

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        begun.append((Future(), lambda: function(*arguments)))
        if seen:  # the stream has ended
            finish_all()
        return begun[-1][0]

    def finish_all() -> None:
        for future, call in begun:
            if not future.done():
                future.set_result(call())

    class Stream(Accounts):
        def iter_rows(self) -> Iterator[dict[str, Any]]:
            yield from super().iter_rows()
            seen.append(len(begun))
            finish_all()

    stream = Stream([{"shard": shard.name, "total": 0} for shard in shards])

    def stream_of(_: Pass, engine: Engine) -> Accounts:
        return stream

    follow_run(
        run,
        stream_of,
        WorkerOptions(local=True, quiet=True),
        engine=lambda engine: replace(engine, submit=submit, finishers=3),
    )
    assert seen == [3]
    assert len(begun) == 20
    assert (tmp_path / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("failed", "stops"),
    [
        ({"errors": 1, "reason": "not_an_image"}, True),
        ({"images": 19, "errors": 1, "reason": "not_an_image"}, False),
    ],
)
def test_a_job_that_eats_garbage_is_stopped(
    tmp_path: Path, failed: dict[str, Any], stops: bool
) -> None:
    rows = [failed] * 1_000
    why = "1,000 of the first 1,000 rows failed, most often with not_an_image"
    with pytest.raises(JobError, match=why if stops else "4 of 4 shards are not complete"):
        follow(tmp_path, rows)
    if stops:  # not before the first thousand
        with pytest.raises(JobError, match="4 of 4 shards are not complete"):
            follow(tmp_path, rows[:999])


@pytest.mark.parametrize("fault", [True, False])
def test_a_shard_that_cannot_be_read_counts_by_its_share_of_the_input(
    tmp_path: Path, fault: bool
) -> None:
    """It used to count as one row, so that half of an input could go with success."""
    lost = {"fault": "shard_missing: x"} if fault else {"reason": "shard_corrupt", "total": 0}
    why = "did not give 25%" if fault else "1,000 of the first 2,000 rows failed, most often with"
    for turn in (1, -1) if fault else (1,):
        output = tmp_path / str(turn)
        rows = [*made(output, SHARDS[0], 1_000), {"shard": SHARDS[1].name, **lost}]
        with pytest.raises(JobError, match=why):
            follow(output, rows[::turn])


def test_a_shard_that_the_storage_did_not_give_stays_open(tmp_path: Path) -> None:
    lost = [{"shard": shard.name, "fault": "shard_missing: gone"} for shard in SHARDS[1:]]
    why = r"3 of 4 shards are not complete \(75% of the bytes\): 1.tar shard_missing: gone; .*again"
    with pytest.raises(JobError, match=why):
        follow(tmp_path, [*made(tmp_path, SHARDS[0], 2), *lost])
    assert not (tmp_path / "_SUCCESS").exists()
    assert len(list(tmp_path.glob("_receipts/*/*"))) == 1
    record = read_run(str(tmp_path))
    assert record is not None
    assert (record["status"], record["missing"]["1.tar"]) == ("incomplete", "shard_missing: gone")
    rest = [row for shard in SHARDS[1:] for row in made(tmp_path, shard, 3)]
    follow(tmp_path, rest)
    assert (tmp_path / "_SUCCESS").exists()


def test_a_storage_that_gives_nothing_ends_the_job_early(tmp_path: Path) -> None:
    """One that answers is asked for every shard: those that are there are finished."""
    shards = [replace(SHARD, name=f"{i:03}.tar", size_bytes=1) for i in range(100)]
    lost = [{"shard": shard.name, "fault": "shard_unreadable: silent"} for shard in shards]
    with pytest.raises(JobError, match="the storage gave nothing of the first 10 shards"):
        follow(tmp_path, lost, shards)
    record = read_run(str(tmp_path))
    assert record is not None
    assert (record["status"], len(record["missing"])) == ("incomplete", 10)
    gone = [{"shard": shard.name, "fault": "shard_missing: gone"} for shard in shards[1:]]
    rest = {"shard": shards[0].name, "total": 0}
    with pytest.raises(JobError, match="99 of 100 shards are not complete"):
        follow(tmp_path, [*gone, rest], shards)
    assert len(list(tmp_path.glob("_receipts/*/*"))) == 1


def test_shards_that_are_lost_first_do_not_stop_the_others(tmp_path: Path) -> None:
    """Not more than the share that may fail, though the first that came is less."""
    shards = [replace(SHARD, name=f"{i:03}.tar", size_bytes=100) for i in range(100)]
    lost = [{"shard": shard.name, "fault": "shard_missing: gone"} for shard in shards[:10]]
    rest = [{"shard": shard.name, "errors": 0, "images": 100} for shard in shards[10:]]
    with pytest.raises(JobError, match=r"100 of 100 shards are not complete"):
        follow(tmp_path, [*lost, *rest], shards)


def test_the_busy_seconds_of_stages_are_read_from_the_text_that_ray_makes() -> None:
    """Without starting Ray: from statistics of blocks, as its executor gathers them."""
    from ray.data._internal.stats import DatasetStats
    from ray.data.block import BlockExecStats, BlockStats

    def block(seconds: float) -> BlockStats:
        times = {"start_time_s": 0.0, "end_time_s": seconds, "wall_time_s": seconds}
        ran = BlockExecStats(node_id="n", task_idx=0, cpu_time_s=0.1, **times)
        return BlockStats(num_rows=1, size_bytes=1, exec_stats=ran)

    first = "MapBatches(read_batches)->MapBatches(PrepareImages)"
    stats = DatasetStats(metadata={"Input": []}, parent=None)
    stats = DatasetStats(metadata={first: [block(1.5), block(0.25)]}, parent=stats)
    stats = DatasetStats(metadata={"MapBatches(SegmentImages)": [block(0.002)]}, parent=stats)
    text = stats.to_summary().to_string()
    wanted = {"read_batches + PrepareImages": 1.75, "SegmentImages": 0.002}
    assert stage_seconds(Accounts([], text)) == pytest.approx(wanted)
    assert stage_seconds(Accounts([], "")) == {}
