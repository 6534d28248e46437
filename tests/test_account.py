"""Which runs an output takes, which shards are left, and when the account closes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.options import RunOptions, WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import JobError, UsageError
from pipeline.read.shard import Shard
from pipeline.run import manifest as record
from pipeline.run.close import close_run
from pipeline.run.lifecycle import open_run
from pipeline.write.layout import shard_id
from tests.outputs import SHARD, TABLES, images, ledger_of, masks, part
from tests.outputs import finish as finish_tables

MODEL = {"weights_hash": "abc"}
OTHER = replace(SHARD, name="c.tar", version="v1")


def config(output: Path, **values: Any) -> SegmentConfig:
    return SegmentConfig(input="in", output=str(output), **{"prompt": ("x", "y"), **values})


def finish(output: Path, shard=SHARD, rows: int = 2) -> dict[str, Any]:
    numbers = range(rows)
    made = {"images": images(*numbers), "masks": masks(*numbers)}
    return finish_tables(ledger_of(output), shard, *([made] if rows else []))


def test_every_table_can_be_read_from_the_start(tmp_path: Path) -> None:
    settings = config(tmp_path, keep_probabilities="88")
    run = open_run(settings, [SHARD], model=MODEL, tables=settings.tables(28, "abc"))
    assert run.first.todo == [SHARD]
    for table in ("images", "masks", "errors", "probabilities"):
        (file,) = (tmp_path / table).glob("*.parquet")
        assert pq.read_metadata(file).num_rows == 0


def test_the_record_of_a_run_tells_everything(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    finish(tmp_path)
    counts = close_run(run, 2.0)
    assert counts == {
        "shards": 1,
        "shards_failed": 0,
        "rows_in": 2,
        "rows_ok": 2,
        "rows_error": 0,
        "samples_without_image": 0,
        "images": 2,
        "masks": 4,
    }
    record = json.loads((tmp_path / "_run.json").read_text())
    assert (record["status"], record["counts"]) == ("complete", counts)
    assert record["config"]["prompt"] == ["x", "y"]
    assert record["fingerprint"]["weights_hash"] == "abc"
    told = {"seconds": 2.0, "images": 2, "images_per_s": 1.0, "stages": {}}
    assert record["throughput"] == told
    assert set(record["versions"]) >= {"clipseg_ray", "torch", "ray", "python"}
    assert (tmp_path / "_SUCCESS").exists()
    assert not (tmp_path / "_staging").exists()


def test_success_is_taken_back_while_there_is_more_to_do(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    finish(tmp_path)
    close_run(run, 1.0)
    open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    assert (tmp_path / "_SUCCESS").exists()  # nothing was added
    open_run(config(tmp_path), [SHARD, OTHER], model=MODEL, tables=TABLES)
    assert not (tmp_path / "_SUCCESS").exists()


def test_a_finished_shard_is_not_done_again(tmp_path: Path) -> None:
    open_run(config(tmp_path), [SHARD, OTHER], model=MODEL, tables=TABLES)
    finish(tmp_path)
    faster = config(tmp_path, workers=WorkerOptions(batch_size=3, actors=2, quiet=True))
    run = open_run(faster, [SHARD, OTHER], model=MODEL, tables=TABLES)
    assert run.first.todo == [OTHER]
    finish(tmp_path, OTHER, rows=0)
    assert close_run(run, 1.0)["images"] == 2


def test_a_shard_that_changed_is_done_again(tmp_path: Path) -> None:
    open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    finish(tmp_path)
    changed = replace(SHARD, version="v2")
    run = open_run(config(tmp_path), [changed], model=MODEL, tables=TABLES)
    assert run.first.todo == [changed]
    assert not part(tmp_path, "masks").exists()  # old rows never stand beside new ones
    finish(tmp_path, changed, rows=3)
    assert close_run(run, 1.0)["images"] == 3


def test_a_file_that_is_split_in_another_way_leaves_no_old_rows(tmp_path: Path) -> None:
    """The names of its shards change, so old parts would stand beside the new ones."""

    def shards(*names: str) -> list[Shard]:
        return [replace(SHARD, name=name, version=str(names)) for name in names]

    gone = shards("gone.parquet#rows=0-9", "gone-rows-1.tar")
    for now in (
        [*shards("a/x.parquet"), *gone],
        shards("a/x.parquet#rows=00-14", "a/x.parquet#rows=15-19"),
        shards("a/x.parquet#rows=00-11", "a/x.parquet#rows=12-15", "a/x.parquet#rows=16-19"),
        shards("a/x.parquet"),
    ):
        run = open_run(config(tmp_path), now, model=MODEL, tables=TABLES)
        assert run.first.todo == now
        for shard in now:
            finish(tmp_path, shard)
        assert close_run(run, 1.0)["masks"] == 4 * len(now)
        paths = {f"{shard_id(shard.name)}.parquet" for shard in [*now, *gone]}
        found = {p.name for p in (tmp_path / "masks").iterdir() if pq.read_metadata(p).num_rows}
        assert found == paths
    warned = "2 finished shards are no longer in the input (gone.parquet#rows=0-9, gone-rows-1.tar)"
    assert warned in run.notes[-1]


def test_a_folder_with_fewer_images_leaves_no_old_rows(tmp_path: Path) -> None:
    """What was in its second group is in the first now."""

    def shards(*names: str) -> list[Shard]:
        return [replace(SHARD, name=name, version=str(names)) for name in names]

    kept, gone = shards("images-00000.tar"), shards("other/images-00000")
    for now in (
        [*shards("images-00000", "images-00001", "a/images-00000", "a/images-00001"), *gone],
        shards("images-00000", "a/images-00000"),
    ):
        run = open_run(config(tmp_path), [*now, *kept], model=MODEL, tables=TABLES)
        for shard in run.first.todo:
            finish(tmp_path, shard)
        close_run(run, 1.0)
    paths = {f"{shard_id(shard.name)}.parquet" for shard in [*now, *kept, *gone]}
    found = {p.name for p in (tmp_path / "masks").iterdir() if pq.read_metadata(p).num_rows}
    assert found == paths
    assert "1 finished shards are no longer in the input (other/im" in run.notes[-1]


def test_a_shard_whose_part_is_gone_is_done_again(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), [SHARD, OTHER], model=MODEL, tables=TABLES)
    finish(tmp_path)
    finish(tmp_path, OTHER)
    part(tmp_path, "masks").unlink()
    with pytest.raises(JobError, match=r"1 of 2 shards are not complete .*: a/b\.tar"):
        close_run(run, 1.0)
    run = open_run(config(tmp_path), [SHARD, OTHER], model=MODEL, tables=TABLES)
    assert run.first.todo == [SHARD]
    finish(tmp_path)
    assert close_run(run, 1.0)["masks"] == 8


def test_a_driver_that_lives_on_after_a_restart_does_not_close_the_new_run(tmp_path: Path) -> None:
    """Nor does what it still writes count there."""
    old = open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    again = config(tmp_path, threshold=0.25, run=RunOptions(restart=True))
    new = open_run(again, [SHARD], model=MODEL, tables=TABLES)
    finish_tables(old.first.ledger, SHARD, {"images": images(0), "masks": masks(0)})
    for run, why in ((old, "started it over"), (new, "1 of 1 shards are not complete")):
        with pytest.raises(JobError, match=why):
            close_run(run, 1.0)
    run = open_run(config(tmp_path, threshold=0.25), [SHARD], model=MODEL, tables=TABLES)
    assert run.first.todo == [SHARD]


def test_another_run_is_refused_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    with pytest.raises(UsageError, match=r"threshold was 0\.5, now 0\.4"):
        open_run(config(tmp_path, threshold=0.4), [SHARD], model=MODEL, tables=TABLES)
    with pytest.raises(UsageError, match='weights_hash was "abc", now "abd"'):
        open_run(config(tmp_path), [SHARD], model={"weights_hash": "abd"}, tables=TABLES)
    monkeypatch.setattr(record, "RESULTS_VERSION", 0)
    with pytest.raises(UsageError, match="results_version was"):
        open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)


def test_files_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not from a run"):
        open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    inside = SegmentConfig(input=str(tmp_path), output=str(tmp_path / "out"), prompt=("x",))
    with pytest.raises(UsageError, match="inside the input"):
        open_run(inside, [SHARD], model=MODEL, tables=TABLES)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_run.json").write_text("{")
    with pytest.raises(UsageError, match="not readable"):
        open_run(config(tmp_path), [SHARD], model=MODEL, tables=TABLES)


def test_a_run_without_all_its_shards_is_not_closed(tmp_path: Path) -> None:
    run = open_run(config(tmp_path), [SHARD, OTHER], model=MODEL, tables=TABLES)
    finish(tmp_path)
    with pytest.raises(JobError, match=r"1 of 2 shards are not complete .*: c\.tar"):
        close_run(run, 1.0)
    assert not (tmp_path / "_SUCCESS").exists()
