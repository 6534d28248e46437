"""Damage to what a run wrote is found, and made again by the same command."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_commit import drive, is_complete

from jobs import verify
from pipeline.errors import JobError
from pipeline.run.verify import verify_run
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import open_part


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
