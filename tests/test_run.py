"""What the driver makes of the account rows that come out of a stream; no Ray is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_account import MODEL, OTHER, config
from test_write import SHARD, TABLES, images

from pipeline.errors import JobError
from pipeline.run.follow import finish
from pipeline.run.lifecycle import open_run
from pipeline.write.rows import make_fragments


@dataclass
class Accounts:
    """Stands for a dataset; none of its rows closes the account of a shard."""

    rows: list[dict[str, Any]]

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield {"shard": SHARD.name, "fragment": "x", "outputs": 1, "total": 0, **row}


@pytest.mark.parametrize(
    ("failed", "stops"),
    [
        ({"images": 0, "errors": 1, "reason": "not_an_image"}, True),
        # A shard that nothing could be read of: a page that says 503, for one.
        ({"images": 0, "errors": 0, "reason": "shard_corrupt"}, True),
        ({"images": 19, "errors": 1, "reason": "not_an_image"}, False),
    ],
)
def test_a_job_that_eats_garbage_is_stopped(
    tmp_path: Path, failed: dict[str, Any], stops: bool
) -> None:
    run = open_run(config(tmp_path), [SHARD, OTHER], model=MODEL, tables=TABLES)
    rows = [failed] * 1_000
    why = f"1,000 of the first 1,000 rows failed, most often with {failed['reason']}"
    with pytest.raises(JobError, match=why if stops else "2 shards were not finished"):
        finish(run, [Accounts(rows)], quiet=True)  # type: ignore[list-item]
    if stops:  # not before the first thousand
        with pytest.raises(JobError, match="2 shards were not finished"):
            finish(run, [Accounts(rows[:999])], quiet=True)  # type: ignore[list-item]


def test_the_account_of_a_shard_that_cannot_be_read_has_its_reason() -> None:
    end = {"shard": "a.tar", "row": -1, "key": "", "total": 0, "reason": "shard_corrupt"}
    end |= {"stage": "read", "detail": "no tar", "retryable": False}
    batch = pa.Table.from_pylist([end])
    (row,) = make_fragments(batch, lambda _: {"images": images()}).to_pylist()
    assert (row["reason"], row["errors"], row["total"]) == ("shard_corrupt", 0, 0)
