"""`make bench-gpu` runs, as far as that can be told without a card."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu import PROMPTS, describe, run


def test_the_benchmark_of_a_card_runs_small_on_a_cpu(tmp_path: Path) -> None:
    found = run("cpu", ["float32", "bf16"], tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()).keys() == found.keys()
    assert [each["precision"] for each in found["runs"]] == ["float32", "bf16"]
    for each in found["runs"]:
        assert [actor["prompts"] for actor in each["actor"]] == list(PROMPTS)
        assert each["matrix_tflops"] > 0 and each["tower_share_of_matrix"] > 0
        # The model is scaled to masks of a few runs: far below a map of the model's grid.
        assert all(0 < a["bytes_out_per_mask"] < 4 * 96 * 96 for a in each["actor"])
    assert len(describe(found)) == 2 + 2 * (1 + len(PROMPTS))
    bars = ElementTree.parse(tmp_path / "gpu.svg").findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + 2 * 2 * len(PROMPTS)
