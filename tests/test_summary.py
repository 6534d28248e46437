"""The screen at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import segment
from pipeline.run import summary as summaries
from tests.shards import make_tar

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"


def test_a_run_ends_with_what_a_person_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts, failures with names, prompts that found nothing, tables, and the next command."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shard = sorted((DEMO / "shards").glob("*.tar"))[0]
    (source / "a.tar").write_bytes(shard.read_bytes())
    broken = [(f"bad{i}\x1b.png", b"<html>") for i in range(4)]
    (source / "b.tar").write_bytes(make_tar([*broken, ("c.json", b"{}")]))
    argv = [str(source), str(output), "--model", str(DEMO / "model"), "--prompt", "blue"]
    argv += ["--prompt", "forklift", "--threshold", "0.9999", "--local", "--quiet"]
    assert segment.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    import pyarrow.parquet as pq

    masks = [row for part in output.glob("masks/a*") for row in pq.read_table(part).to_pylist()]
    blue = sum(row["area"] > 0 for row in masks if row["prompt"] == "blue")
    images = len(masks) // 2
    assert lines[0].startswith(f"{images + 4} images in 2 shards: {images} done, 4 failed; in ")
    assert lines[0].endswith(" images/s")
    named = "bad0\ufffd, bad1\ufffd, bad2\ufffd, ..."
    assert f"  failed: 4 not_an_image ({named})" in lines
    if blue:
        assert f"  images in which something was found, of {images}: {blue} 'blue'" in lines
    assert any(f"0 of {images} images have anything for " in x and "'forklift'" in x for x in lines)
    assert f"  table {output}/masks/*.parquet: {len(masks)} rows" in lines
    assert f"look: {output}/report/index.html" in lines
    assert f"more images: clipseg-ray view {output}" in lines
    assert f"what failed: clipseg-ray status {output} --errors" in lines
    assert len(lines) < 24
    # The same again: what was found is counted from the receipts.
    assert segment.main(argv) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0] == f"{images + 4} images in 2 shards: {images} done, 4 failed"
    assert again[1:] == lines[1:]
    # Prompts that are added later are counted as well, and of a large run the first shards alone.
    monkeypatch.setattr(summaries, "SHARDS", 1)
    assert segment.main([*argv, "--prompt", "red"]) == 0
    said = capsys.readouterr().out
    assert f"in the first 1 shards, 0 of {images} images have anything for" in said
