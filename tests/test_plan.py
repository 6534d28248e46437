"""`clipseg-ray plan`: the job's own stages over a sample, and the arithmetic of the estimate."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import encode, photo
from shards import make_tar
from torch.utils.flop_counter import FlopCounterMode

from jobs import embed, plan
from pipeline.config.options import WorkerOptions
from pipeline.demo import MODEL, SHARDS
from pipeline.model.check import read_config
from pipeline.model.clipseg import CLIPSeg
from pipeline.read.inputs import list_shards
from pipeline.read.records import read_batches
from pipeline.run.local import LocalDataset
from pipeline.run.plan import (
    DRIVER_BLOCK_S,
    RAY_BLOCK_S,
    RAY_SHARD_S,
    Machine,
    Sample,
    count_flop,
    estimate,
)
from pipeline.run.sample import ShardsCutShort, choose_sample
from pipeline.write.layout import RUN

SAMPLE = Sample(
    images=100,
    failed=0,
    device="cpu",
    tasks={"read": 0.001, "decode and resize": 0.006, "tables": 0.002, "parts": 0.001},
    model_cpu=0.1,
    model_wall=0.05,
    wait=0.0,
    busy=1.0,
    flop=50e9,
    image_bytes=100_000,
    total=1_000,
    is_exact=True,
    shards=10,
    input_bytes=10**8,
    output_bytes=2_000,
    shard_bytes=5_000,
)
RAY = RAY_BLOCK_S / 64 + RAY_SHARD_S / 100


def say(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = plan.main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("job", "options"),
    [("segment", ["--prompt", "star", "--prompt", "blue"]), ("classify", [])],
)
def test_the_bundled_shards(
    job: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if job == "classify":
        (tmp_path / "labels.txt").write_text("red\nblue\n")
        options = ["--labels", str(tmp_path / "labels.txt")]
    output = tmp_path / "out"
    command = [job, str(SHARDS), str(output), "--model", str(MODEL), *options]
    code, said, _ = say(capsys, *command, "--price-per-hour", "36", "--seconds", "1")
    assert code == 0 and not output.exists()
    total, measured = map(int, re.findall(r"(\d+) (?:images in|of them)", said))
    assert total == pytest.approx(72, rel=0.25) and 2 <= measured <= 72
    (rate,) = re.findall(r"on \d+ CPUs: ([\d,.]+) images/s; the limit: ", said)
    (clock,) = re.findall(r"time: (\d+:\d+:\d+), about 8 s of it to start", said)
    hours, minutes, seconds = map(int, clock.split(":"))
    expected = total / float(rate.replace(",", "")) + 8
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(expected, abs=1)
    (price,) = re.findall(r"price: ([\d.]+) at 36 an hour", said)
    assert float(price) == pytest.approx(expected / 100, abs=0.01)
    assert re.search(r"\nsettings: --device cpu --actors \d+ --batch-size 16\n", said)


def test_what_if_there_were_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["embed", str(SHARDS), str(tmp_path / "out"), "--model", str(MODEL)]
    machine = ["--gpus", "2", "--cpus-per-gpu", "4", "--gpu-tflops", "10"]
    code, said, _ = say(capsys, *command, *machine, "--batch-size", "7", "--seconds", "1")
    assert code == 0
    assert "\non 2 GPUs and 8 CPUs: " in said
    assert "assumed, not measured: a GPU that sustains 10 TFLOP/s" in said
    assert "settings: --device cuda --actors 2 --batch-size 7\n" in said


def test_the_size_of_the_output_is_that_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = [str(SHARDS), str(output), "--model", str(MODEL)]
    code, said, _ = say(capsys, "embed", *command, "--seconds", "60")
    assert code == 0
    assert embed.main([*command, "--local"]) == 0
    size = sum(path.stat().st_size for path in output.glob("*/*.parquet"))
    (number,) = re.findall(r"output: ([\d.]+) kB", said)
    assert float(number) * 1000 == pytest.approx(size, rel=0.1)
    assert (output / RUN).exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"\xff\xd8\xffbroken")
    output = str(tmp_path / "out")
    model = ["--model", str(MODEL)]
    wrong = {
        ("photos", "out"): (2, "no job 'photos' to plan; put `plan` in front of one of segment"),
        ("embed", "in"): (2, "OUTPUT"),
        ("segment", "in", "out"): (2, "plan: error: nothing to segment: give at least"),
        ("embed", "in", "out", "--gpus", "-1"): (2, "--gpus -1: must be at least 0"),
        ("embed", "in", "out", "--seconds", "0"): (2, "--seconds 0.0: must be above 0"),
        ("embed", "in", "out", "--promt", "x"): (2, "no option --promt"),
        ("embed", str(tmp_path / "none"), output, *model): (2, "none"),
        ("embed", str(source), output, *model): (1, "none of the first 1 images came out well: 1 "),
    }
    for argv, (expected, says) in wrong.items():
        code, out, err = say(capsys, *argv)
        assert (code, out) == (expected, ""), err
        (line,) = [line for line in err.splitlines() if "clipseg-ray plan: error: " in line]
        assert says in line


def test_embeddings_are_nothing_to_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    assert embed.main([str(SHARDS), output, "--model", str(MODEL), "--local", "--quiet"]) == 0
    code, _, err = say(capsys, "classify", output, str(tmp_path / "labels"))
    assert code == 2 and "holds embeddings" in err


@pytest.mark.parametrize(
    ("machine", "rate", "limit"),
    [
        (Machine(cpus=2, gpus=0), 2 / (0.11 + RAY), "the model, 91% of the work"),
        # An actor takes a CPU beside its GPU: 15 of 16 are left.
        (Machine(cpus=16, gpus=1), 48e12 / 50e9, "the GPUs"),
        (Machine(cpus=4, gpus=1), 3.5 / (0.01 + RAY), "the CPUs (decode and resize, 60% of"),
        (Machine(cpus=4096, gpus=64), 64 / DRIVER_BLOCK_S, "the driver, which follows every block"),
    ],
)
def test_the_rate_is_that_of_the_narrowest_place(machine: Machine, rate: float, limit: str) -> None:
    found = estimate(SAMPLE, machine, WorkerOptions(), tflops=48)
    assert found.rate == pytest.approx(rate)
    assert found.limit.startswith(limit)


def test_a_local_job_has_its_stages_one_after_the_other() -> None:
    found = estimate(SAMPLE, Machine(cpus=64, gpus=0), WorkerOptions(local=True), tflops=48)
    assert found.rate == pytest.approx(1 / (0.01 + 0.05))


def test_a_slow_storage_holds_the_tasks_that_read() -> None:
    """A task that reads has half a CPU: it may wait as long as it works, at no cost."""
    rates = [
        estimate(replace(SAMPLE, wait=wait), Machine(cpus=2, gpus=0), WorkerOptions(), tflops=1)
        for wait in (0.0, 0.001, 0.101)
    ]
    assert rates[0] == rates[1]
    assert 2 / rates[2].rate == pytest.approx(2 / rates[0].rate + 0.05)


def test_a_measured_gpu_is_taken_as_it_was_measured() -> None:
    sample = replace(SAMPLE, device="cuda", model_wall=0.004)
    found = estimate(sample, Machine(cpus=64, gpus=4), WorkerOptions(), tflops=48)
    assert found.rate == pytest.approx(4 / 0.004) and found.limit == "the GPUs"
    assert estimate(
        sample, Machine(cpus=64, gpus=4), WorkerOptions(actors=2), tflops=48
    ).rate == pytest.approx(2 / 0.004)


@pytest.mark.parametrize("job", ["embed", "segment"])
def test_operations_are_those_that_torch_counts(job: str) -> None:
    """But for the patches, projections and the decoder's last layers, which are left out."""
    model, _ = CLIPSeg.from_folder(MODEL)
    config = read_config(MODEL)
    side, prompts = 224, 3
    decides = {
        "job": job,
        "embed": False,
        "model_config": config,
        "preprocessing": {"size": [side, side]},
        "prompts": ["x"] * prompts,
    }
    pixels = torch.zeros(1, 3, side, side)
    patch = model.config.vision_config.patch_size
    grid = (side // patch, side // patch)
    with torch.inference_mode(), FlopCounterMode(display=False) as encoder:
        if job == "embed":
            model.clip.encode_image(pixels)
        else:
            states = model.vision_model.activations(pixels, model.config.extract_layers)
    counted = encoder.get_total_flops()
    if job == "segment":
        with torch.inference_mode(), FlopCounterMode(display=False) as decoder:
            steps = [step.repeat(prompts, 1, 1) for step in model.decoder.reduce(states)]
            model.decoder(steps, torch.zeros(prompts, model.config.projection_dim), grid)
        counted += 2 * decoder.get_total_flops()
    assert count_flop(decides) == pytest.approx(counted, rel=0.25)


def test_a_sample_is_spread_over_the_input_and_ends_its_shards(tmp_path: Path) -> None:
    small = encode(photo(8, 8), "PNG")
    for shard in range(20):
        data = make_tar([(f"{i}.png", small) for i in range(5 if shard else 100)])
        (tmp_path / f"{shard:02}.tar").write_bytes(data)
    chosen = choose_sample(list_shards(str(tmp_path)).shards)
    names = [shard.name for shard in chosen]
    assert names == [f"{number:02}.tar" for number in (0, 2, 5, 7, 10, 12, 15, 17)]

    def rows(seconds: float) -> tuple[list[tuple[str, int, int]], dict[str, dict[str, float]]]:
        spent: dict[str, dict[str, float]] = {}
        dataset: LocalDataset = ShardsCutShort(chosen, spent, seconds, 16).map_batches(read_batches)
        batches = list(dataset.blocks())
        assert max(map(len, batches)) <= 16
        found = [(r["shard"], r["row"], r["total"]) for b in batches for r in b.to_pylist()]
        return found, spent

    found, spent = rows(60)
    for name, some in itertools.groupby(found, lambda row: row[0]):
        *images, end = some
        count = 64 if name == "00.tar" else 5
        assert [row for _, row, _ in images] == list(range(len(images)))
        assert end[1:] == (-1, len(images)) and count <= len(images) < count + 16
    assert spent["whole"]["rows"] == 7 * 5 and spent["read_batches"]["wall_s"] > 0
    ended, _ = rows(0.0)  # no time: a batch of each shard, twice as large as the one before
    assert [row[2] for row in ended if row[1] < 0] == [2, 4, 5, 5, 5, 5, 5, 5]
