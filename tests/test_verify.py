"""Damage to what a run wrote is found, and made again by the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import segment, verify
from pipeline.demo import MODEL, SHARDS
from pipeline.errors import JobError
from pipeline.run.verify import verify_run
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import open_part
from tests.drivers import drive, is_complete


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 4
    path.write_bytes(data)


def parts(output: Path, table: str = "*") -> list[Path]:
    found = sorted(output.glob(f"{table}/*.parquet"))
    return [path for path in found if path.name != EMPTY_PART and path.parent.name[0] != "_"]


def test_a_run_that_is_whole_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert verify.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 finished shards looked at: 6 parts" in said
    assert "0 differences" in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("what", ["flipped", "cut", "gone", "receipt"])
def test_damage_is_told_and_made_again(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(str(tmp_path))
    whole = {path: path.read_bytes() for path in parts(tmp_path)}
    victim = parts(tmp_path, "masks")[0]
    if what == "flipped":
        flip(victim)
    elif what == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif what == "gone":
        victim.unlink()
    else:
        victim = next(iter(sorted(tmp_path.glob("_receipts/*/*.json"))))
        victim.write_bytes(b"{")
    assert verify.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "1 differences" in said.out
    assert victim.name in said.out
    assert "makes those shards again" in said.err
    assert not (tmp_path / "_SUCCESS").exists()
    drive(str(tmp_path))
    assert is_complete(tmp_path)
    assert {path: path.read_bytes() for path in parts(tmp_path)} == whole


def test_a_sample_is_the_same_shards_each_time(tmp_path: Path) -> None:
    drive(str(tmp_path))
    looked_at = [verify_run(str(tmp_path), share=share).looked_at for share in (1e-9, 0.5, 0.5, 1)]
    assert looked_at[0] == 0
    assert looked_at[1] == looked_at[2]
    assert looked_at[3] == 2


def test_pages_have_checksums(tmp_path: Path) -> None:
    drive(str(tmp_path))
    victim = parts(tmp_path, "images")[0]
    flip(victim, 0.02)  # in the first page
    damaged = pytest.raises(JobError, match=r"CRC|[Cc]orrupt|checksum")
    with damaged, open_part(str(victim)) as parquet:
        parquet.read(use_threads=False)


def test_bad_samples_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for sample in ("0", "1.1", "-1"):
        assert verify.main(["out", "--sample", sample]) == 2
        assert "--sample" in capsys.readouterr().err


def test_rows_are_made_again_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a part and its receipt agree: another model under the same name, for one."""
    output = tmp_path / "out"
    source = [str(SHARDS), str(output), "--model", str(MODEL), "--local", "--quiet"]
    assert segment.main([*source, "--prompt", "star"]) == 0
    assert segment.main([*source, "--prompt", "star", "--prompt", "blue"]) == 0  # a pass of its own
    assert verify.main([str(output), "--recompute", "0.001"]) == 0
    assert "1 shards recomputed: 2 parts, 0 differ" in capsys.readouterr().out
    record = json.loads((output / "_run.json").read_text())
    record["config"]["threshold"] = 0.6
    (output / "_run.json").write_text(json.dumps(record))
    assert verify.main([str(output), "--recompute", "1"]) == 1
    said = capsys.readouterr()
    assert "2 shards recomputed: 4 parts, 2 differ" in said.out
    assert "recomputed differently: masks/" in said.out
    assert said.err.startswith("clipseg-ray verify: error: 2 differences")
