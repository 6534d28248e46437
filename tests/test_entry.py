"""`from pipeline import segment`: a Ray Dataset in and out, with the numbers of the command."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image

import pipeline
from jobs import classify as classify_job
from jobs import embed as embed_job
from jobs import segment as segment_job
from pipeline.config.classify import ClassifyConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.options import WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import UsageError
from pipeline.prepare.images import fail_crashed_image
from pipeline.run.columns import PrepareRecords
from pipeline.run.guard import guarded
from pipeline.schema import MASKS
from tests.poison import POISON, PoisonedPrepare

DEMO = Path(pipeline.__file__).parent / "demo"
MODEL, TAR = str(DEMO / "model"), DEMO / "shards" / "scenes-000000.tar"
LOCAL = WorkerOptions(local=True, quiet=True)
PROMPTS = ["blue", "a purple star"]


def tar_images() -> ray.data.Dataset:
    """The images of the bundled tar, encoded, with their names."""
    with tarfile.open(TAR) as tar:
        images = {
            Path(m.name).stem: tar.extractfile(m).read()  # type: ignore[union-attr]
            for m in tar
            if Path(m.name).suffix in (".jpg", ".png", ".webp")
        }
    return ray.data.from_arrow(pa.table({"name": list(images), "bytes": list(images.values())}))


def of_output(output: Path, name: str, columns: list[str]) -> list[tuple[Any, ...]]:
    found = pa.concat_tables(pq.read_table(path) for path in output.glob(f"{name}/*.parquet"))
    return as_rows(found.to_pylist(), columns)


def as_rows(rows: list[dict[str, Any]], columns: list[str]) -> list[tuple[Any, ...]]:
    return sorted((tuple(row[name] for name in columns) for row in rows), key=str)


def all_rows(dataset: ray.data.Dataset) -> list[dict[str, Any]]:
    """The rows as Arrow has them: lists, not arrays."""
    return pa.concat_tables(ray.get(dataset.to_arrow_refs())).to_pylist()


@pytest.mark.usefixtures("local_ray")
def test_command_job_and_python_give_the_same_rows(tmp_path: Path) -> None:
    columns = [n for n in MASKS.names if n not in ("shard", "row")]
    asked = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    command = [str(TAR), str(tmp_path / "command"), "--model", MODEL, *asked, "--quiet"]
    assert segment_job.main(command) == 0
    config = SegmentConfig(
        input=str(TAR),
        output=str(tmp_path / "job"),
        model=MODEL,
        prompt=tuple(PROMPTS),
        workers=LOCAL,
    )
    segment_job.segment(config)
    before = str(ray.data.DataContext.get_current())
    masks = pipeline.segment(tar_images(), prompts=PROMPTS, model=MODEL, image="bytes", key="name")
    expected = of_output(tmp_path / "command", "masks", columns)
    assert len({row[columns.index("area")] for row in expected}) > 10  # masks that say something
    assert of_output(tmp_path / "job", "masks", columns) == expected
    rows = all_rows(masks)
    assert as_rows(rows, columns) == expected
    assert {(row["name"] == row["key"], row["stage"], row["reason"]) for row in rows} == {
        (True, None, None)
    }
    assert str(ray.data.DataContext.get_current()) == before


@pytest.mark.usefixtures("local_ray")
def test_embeddings_and_labels_are_the_commands(tmp_path: Path) -> None:
    output, labels = str(tmp_path / "vectors"), tmp_path / "labels.txt"
    embed_job.embed(EmbedConfig(input=str(TAR), output=output, model=MODEL, workers=LOCAL))
    found = all_rows(pipeline.embed(tar_images(), model=MODEL, image="bytes", key="name"))
    columns = ["key", "vector"]
    assert as_rows(found, columns) == of_output(Path(output), "embeddings", columns)
    labels.write_text("red\ngreen\nblue\n")
    output = str(tmp_path / "ranked")
    asked = {"labels": str(labels), "template": ("{}",), "top": 2}
    config = ClassifyConfig(input=str(TAR), output=output, model=MODEL, workers=LOCAL, **asked)
    classify_job.classify(config)
    ranked = pipeline.classify(
        tar_images(),
        labels=["red", "green", "blue"],
        templates=["{}"],
        top=2,
        model=MODEL,
        image="bytes",
        key="name",
    )
    columns = ["key", "rank", "label_id", "label", "probability", "logit"]
    expected = of_output(Path(output), "labels", columns)
    assert as_rows(all_rows(ranked), columns) == expected


@pytest.mark.usefixtures("local_ray")
def test_images_as_ray_reads_them_go_to_parquet_lazily(tmp_path: Path) -> None:
    """On two CPUs, beside a task that reads and one that writes, and a user's own stage."""
    folder, output = tmp_path / "photos", str(tmp_path / "masks")
    folder.mkdir()
    for i in range(40):
        size = (30 + i % 3, 40, 3)
        pixels = np.random.default_rng(i).integers(0, 256, size, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    images = ray.data.read_images(str(folder), include_paths=True)
    masks = pipeline.segment(images, prompts="blue", model=MODEL, key="path", max_pixels=31 * 40)
    assert masks.schema(fetch_if_missing=False) is None  # nothing has run
    masks.map(lambda row: row).write_parquet(output)
    rows = pq.read_table(output).to_pylist()
    assert sorted(row["path"] for row in rows) == sorted(map(str, folder.glob("*.png")))
    assert {(row["reason"], row["height"]) for row in rows} == {
        (None, 30),
        (None, 31),
        ("too_many_pixels", None),
    }


@pytest.mark.usefixtures("local_ray")
def test_an_image_that_ends_its_process_is_a_row() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    images = [file.getvalue(), POISON, file.getvalue()]
    spec = pipeline.infer.segment.open_segmenter(MODEL, ["blue"])  # type: ignore[attr-defined]
    decode = guarded(PoisonedPrepare(spec.checkpoint.processor, 1000), fail_crashed_image)
    prepare = PrepareRecords(decode, "image", None, pa.schema([]))
    dataset = ray.data.from_arrow(pa.table({"image": images, "n": range(3)}))
    prepared = dataset.map_batches(prepare, batch_format="pyarrow", batch_size=None, num_cpus=0.5)
    found = [(row["user:n"], row["reason"], row["detail"]) for row in all_rows(prepared)]
    crashed = (1, "decoder_crashed", f"by {signal.SIGSEGV.name}")
    assert sorted(found) == [(0, "", ""), crashed, (2, "", "")]


@pytest.mark.usefixtures("local_ray")
def test_mistakes_are_told_before_anything_runs() -> None:
    images = ray.data.from_arrow(pa.table({"image": [b""], "area": [1]}))
    fine = images.drop_columns(["area"])
    for options, says in (
        ({"prompts": []}, "nothing to segment"),
        ({"prompts": ["x", "x"]}, "given twice"),
        ({"prompts": ["x"], "threshold": 2}, "between 0 and 1"),
        ({"prompts": ["x"], "model": "no/such"}, "no/such"),
        ({"prompts": ["x"], "image": "bytes"}, "no such column; it has image, area"),
        ({"prompts": ["x"]}, "a column 'area', as the results have"),
        ({"prompts": ["x"], "device": "gpu"}, "device='gpu': must be one of auto, cpu, cuda"),
        ({"prompts": ["x"], "mask_size": 88}, "mask_size=88: must be one of image, model"),
        ({"prompts": ["x"], "device": "cuda"}, "GPUs wanted, the cluster has 0"),
    ):
        given = fine if "device" in options else images
        with pytest.raises(UsageError, match=says) as error:
            pipeline.segment(given, **{"model": MODEL, **options})  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_importing_the_package_needs_neither_ray_nor_torch() -> None:
    check = (
        "import sys, pipeline, jobs; "
        "assert {'segment', 'embed', 'classify', 'CLIPSeg'} <= set(dir(pipeline)); "
        "assert not {'ray', 'torch', 'numpy', 'pyarrow'} & set(sys.modules), sys.modules; "
        "pipeline.CLIPSeg; assert 'torch' in sys.modules and 'ray' not in sys.modules; "
        "pipeline.segment; assert 'ray' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'segmnt'"):
        pipeline.segmnt  # noqa: B018
