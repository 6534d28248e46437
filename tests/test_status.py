"""What a run tells of itself, and which of its shards are made anew on request."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from shards import make_tar

from jobs import retry_failed, segment, status
from pipeline.config.options import WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.config.status import config_from_record
from pipeline.errors import UsageError
from pipeline.run.lifecycle import open_run
from pipeline.write.commit import finish_shard
from tests.drivers import drive, write_fragments
from tests.outputs import SHARDS, TABLES, finish, ledger_of, rows_of

MODEL = Path(__file__).parent.parent / "pipeline" / "demo" / "model"


def begin(output: str) -> None:
    """A run of two shards of which one is finished."""
    config = SegmentConfig(input="in", output=output, prompt=("x", "y"))
    run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    ledger, shard = run.first.ledger, SHARDS[0]
    finish_shard(ledger, shard, write_fragments(ledger, shard), (4, 0), TABLES)


def test_status_of_a_run_that_stopped(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    begin(folder)
    assert status.main([folder]) == 0
    said = capsys.readouterr().out
    assert "segment, not complete: the same command again does the rest" in said
    assert "1 done, 1 left of 2" in said
    assert "images: 3 done, 1 failed" in said
    assert "no_image: 1" in said
    drive(folder)
    assert status.main([folder]) == 0
    assert "segment, complete" in capsys.readouterr().out


def test_errors_are_named_with_their_reasons_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(str(tmp_path))
    shard = SHARDS[1]
    rows = [{"row": i, "key": f"k{i:02}", "reason": "image_corrupt"} for i in range(30)]
    of_shard = {"row": None, "key": None, "reason": "shard_truncated", "detail": "a\x1b[2J"}
    failed = {"errors": rows_of("errors", *rows, of_shard)}
    finish(ledger_of(tmp_path), shard, failed, total=30)
    assert status.main([str(tmp_path), "--errors"]) == 0
    said = capsys.readouterr().out
    assert "image_corrupt: 30 (an image that breaks off or fails its checksums)" in said
    assert "  k00 (b.tar, row 0)\n" in said
    assert "k19" in said and "k20" not in said
    assert f"  and 10 more: {tmp_path}/errors/*.parquet has every row" in said
    assert "  b.tar (the shard): a\ufffd[2J" in said
    assert "1 shards are damaged" in said


def test_status_names_no_errors_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(str(tmp_path))
    for part in tmp_path.glob("errors/[!_]*"):
        part.unlink()
    assert status.main([str(tmp_path), "--errors"]) == 0
    assert "no image failed" in capsys.readouterr().out


def test_status_does_without_ray(tmp_path: Path) -> None:
    begin(str(tmp_path))
    code = (
        "import sys; sys.modules['ray'] = None\n"
        f"from jobs import status; sys.exit(status.main([{str(tmp_path)!r}]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("job", [status, retry_failed])
def test_what_is_no_run_is_refused(job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([str(tmp_path)]) == 2
    assert "no _run.json there" in capsys.readouterr().err
    (tmp_path / "_run.json").write_text("[]")
    assert job.main([str(tmp_path)]) == 2
    assert "not the record of a run" in capsys.readouterr().err


def test_nothing_is_forgotten_where_another_time_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert retry_failed.main([str(tmp_path)]) == 0
    assert "--all reprocesses those with other failures" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_forgotten_before_the_job_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model is gone."""
    drive(str(tmp_path))
    record = json.loads((tmp_path / "_run.json").read_text())
    record["config"]["model"] = str(tmp_path / "gone")
    (tmp_path / "_run.json").write_text(json.dumps(record))
    before = sorted(tmp_path.rglob("*"))
    assert retry_failed.main([str(tmp_path), "--all"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_that_left_the_input_is_not_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can make its rows anew. It is not among those that are done, either."""
    drive(str(tmp_path))
    before = {path for path in tmp_path.glob("*/*.parquet") if "/a-" in str(path)}
    drive(str(tmp_path), SHARDS[1:], retry="all")
    assert {path for path in tmp_path.glob("*/*.parquet") if "/a-" in str(path)} == before
    config = SegmentConfig(input="in", output=str(tmp_path), prompt=("x", "y"))
    plan = [SHARDS[1], replace(SHARDS[0], name="c.tar")]
    open_run(config, plan, model={"weights_hash": "abc"}, tables=TABLES)
    capsys.readouterr()
    assert status.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 done, 1 left of 2" in said
    assert "1 more, done before, are no longer in the input" in said


def test_what_an_interrupted_retry_left_is_done_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shard has failures any more, and one is not made yet."""
    asked = []
    monkeypatch.setattr(segment, "segment", asked.append)
    drive(str(tmp_path))
    (tmp_path / "_SUCCESS").unlink()
    assert retry_failed.main([str(tmp_path)]) == 0
    (job,) = asked
    assert (job.run.retry, job.run.restart, job.prompt) == ("retryable", False, ("x", "y"))


def test_the_model_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = SegmentConfig(input="in", output="out", prompt=("x",), model="model")
    open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["config"]["model"] == str(tmp_path / "model")


def test_a_config_comes_back_from_its_record() -> None:
    config = SegmentConfig(
        input="in", output="out", prompt=("x",), workers=WorkerOptions(actors=2, quiet=True)
    )
    from dataclasses import asdict

    assert config_from_record(SegmentConfig, asdict(config)) == config
    with pytest.raises(UsageError, match="another version"):
        config_from_record(SegmentConfig, {"prompt": ["x"]})


def test_failed_shards_are_made_anew_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard whose rows failed for a passing reason; the run then looks as without the fault."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 0, 255)).save(picture, "PNG")
    for name in ("a.tar", "b.tar"):
        (source / name).write_bytes(make_tar([("0.png", picture.getvalue())]))
    arguments = [
        str(source),
        str(output),
        "--model",
        str(MODEL),
        "--prompt",
        "blue",
        "--quiet",
        "--local",
    ]
    assert segment.main(arguments) == 0
    wanted = {path.name: path.read_bytes() for path in output.glob("masks/a-*.parquet")}
    others = {path: path.stat().st_mtime_ns for path in output.glob("*/b-*.parquet")}
    make_failed(output, source)
    (tmp_path / "prompts.txt").unlink(missing_ok=True)
    assert status.main([str(output)]) == 0
    assert f"1 failures are retryable: clipseg-ray retry-failed {output}" in capsys.readouterr().out
    assert retry_failed.main([str(output), "--quiet", "--local"]) == 0
    assert "1 shards have retryable failures" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in output.glob("masks/a-*.parquet")} == wanted
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/b-*.parquet")} == others
    assert not list(output.glob("errors/a-*.parquet"))
    assert (output / "_SUCCESS").exists()


def make_failed(output: Path, source: Path) -> None:
    """Put the shard a.tar where a worker that was killed would have left it."""
    from pipeline.run.resume import discard_shard
    from pipeline.write.layout import shard_id
    from tests.shards import shards_of

    shard, ledger = shards_of(str(source))[0], ledger_of(output)
    discard_shard(ledger, shard_id(shard.name), ["images", "masks"])
    failed = rows_of("errors", {"row": 0, "reason": "decoder_crashed", "retryable": True})
    finish(ledger, shard, {"errors": failed})


@pytest.mark.parametrize(
    ("kept", "says"),
    [("352", "Or cut labels at any threshold"), ("none", "A run with --keep-probabilities 352")],
)
def test_another_threshold_points_at_the_way_without_the_model(
    tmp_path: Path, kept: str, says: str
) -> None:
    config = SegmentConfig(
        input="in", output=str(tmp_path / "a b"), prompt=("x",), keep_probabilities=kept
    )
    open_run(config, SHARDS, model={}, tables=TABLES)
    with pytest.raises(UsageError) as caught:
        open_run(replace(config, threshold=0.3), SHARDS, model={}, tables=TABLES)
    assert says in str(caught.value)
    assert f"clipseg-ray label '{tmp_path}/a b' LABELS --ontology FILE" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        open_run(replace(config, threshold=0.3, mask_size="model"), SHARDS, model={}, tables=TABLES)
    assert "label" not in str(caught.value)
