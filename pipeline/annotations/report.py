"""The report at the end of a run: OUTPUT/report/index.html.

What the page needs is imported when it is made: a job's --help does without.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline import storage
from pipeline.config import log
from pipeline.errors import one_line
from pipeline.run.lifecycle import Run
from pipeline.run.progress import phase
from pipeline.write.layout import REPORT_PAGE


def end_with_report(run: Run) -> str | None:
    """Write the report of a run at its end; the URI of the page, None without one.

    A run with nothing to do keeps its page. A report never fails a run: a line says why there is
    none.
    """
    page = storage.join(run.output, REPORT_PAGE)
    if run.sample_s or run.record["config"]["run"]["only"]:  # made to be measured or compared
        return None
    try:
        if not run.is_done or not storage.exists(page):
            shards = {shard.name: replace(shard, text="") for shard in run.first.shards}
            with phase("writing the report"):
                from pipeline.annotations.report_gather import write_report

                write_report(run.output, run.record, page, shards=shards)
    except Exception as error:  # whatever it is, the tables are there and whole
        why = one_line(str(error) or type(error).__name__)
        log.say("note", f"clipseg-ray: no report: {why}; the run itself is complete")
        return None
    return page
