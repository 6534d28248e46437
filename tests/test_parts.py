"""Reading parts of tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import JobError
from pipeline.write.parts import open_part, read_part

TABLE = pa.table({"row": [0, 1], "reason": ["a", "b"], "more": [1, 2]})


def test_columns_of_a_part(tmp_path: Path) -> None:
    part = str(tmp_path / "a.parquet")
    pq.write_table(TABLE, part)
    assert read_part(part, ["reason", "row"]).select(["row", "reason"]).equals(TABLE.select([0, 1]))


def test_what_is_no_part_is_named(tmp_path: Path) -> None:
    part = tmp_path / "a.parquet"
    pq.write_table(TABLE, part)
    with pytest.raises(JobError, match=r"a\.parquet: .* no column 'shard'"):
        read_part(str(part), ["shard", "row"])
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(JobError, match=r"a\.parquet: damaged or not Parquet"):
        read_part(str(part), ["row"])
    with pytest.raises(JobError, match=r"a\.parquet: damaged"), open_part(str(part)):
        pass


def test_who_has_read_a_part_can_end(tmp_path: Path) -> None:
    """With pq.read_table, four in ten of such processes were aborted when they were done."""
    part = str(tmp_path / "a.parquet")
    pq.write_table(TABLE, part)
    code = f"from pipeline.write.parts import read_part; read_part({part!r}, ['row'])"
    ended = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(8)]
    assert [process.wait() for process in ended] == [0] * 8
