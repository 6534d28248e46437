"""What labels cost beside the run that they are cut from: `segment` and `label` as commands.

    python -m benchmarks.label_job [--images 240] [--repeats 3]

The bundled scenes, model and ontology, eight tars, both without Ray. Wall time is from start to
exit; CPU time does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shards import write_tars
from pipeline.demo import MODEL
from pipeline.demo.make_shards import make_sample

ONTOLOGY = MODEL.parent / "ontology.yaml"
SHARDS = 8


def run_job(*arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    options = ["--ontology", str(ONTOLOGY), "--local", "--quiet"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", *arguments, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def main() -> None:
    """Print the medians of both jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"segment": [], "label": []}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "in")
        write_tars(source, (make_sample(i).image for i in range(arguments.images)), SHARDS)
        for i in range(arguments.repeats):
            maps, labels = f"{name}/maps-{i}", f"{name}/labels-{i}"
            found["segment"].append(
                run_job("jobs.segment", str(source), maps, "--model", str(MODEL))
            )
            found["label"].append(run_job("jobs.label", maps, labels))
    print("| job | seconds | CPU seconds |\n| --- | --- | --- |")
    for job, times in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {job} | {wall:.1f} | {cpu:.1f} |")


if __name__ == "__main__":
    main()
