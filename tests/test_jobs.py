"""The segment job as a whole: every input form, from disk and from S3, read by others.

In this process, but for one test on Ray: its rows are the same to the byte.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest
import ray
import ray.cluster_utils
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from pycocotools import mask as coco
from shards import hugging_face_column, make_parquet, make_tar, write_img2dataset

from jobs import segment
from pipeline import storage
from pipeline.infer.masks import mask_from_probabilities
from pipeline.infer.segment import BLOCK_BYTES
from tests.pictures import PIXELS, photos

PROMPTS = ["a cat", "red circle", "猫"]
THRESHOLD = 0.48


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIPSeg in the hub's file layout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = checkpoints.small_clipseg()
    model.decoder.film_mul.weight.data *= 10  # masks that differ from prompt to prompt
    checkpoints.save(model, folder)
    checkpoints.write_vocabulary(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


def run(source: str, output: str, checkpoint: Path, *options: str) -> int:
    """The job's command line, quiet; the exit code. `--on-ray` is of this function."""
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    common = ["--model", str(checkpoint), "--threshold", str(THRESHOLD), "--quiet"]
    where = [] if "--on-ray" in options else ["--local"]
    more = [option for option in options if option != "--on-ray"]
    return segment.main([source, output, *prompts, *common, *where, *more])


def table(output: str, name: str) -> list[dict[str, Any]]:
    """All rows of a table, through storage, sorted."""
    rows: list[dict[str, Any]] = []
    for file in storage.list_files(storage.join(output, name)):
        data = storage.read_bytes(file.uri)
        rows += pa.parquet.read_table(io.BytesIO(data)).to_pylist()
    return sorted(rows, key=lambda r: (r["shard"], r["row"] or 0, r.get("prompt_id", 0)))


@functools.cache
def reference(checkpoint: Path, image: bytes) -> list[tuple[np.ndarray, float]]:
    """What transformers gives, one call per prompt: the probabilities (H, W) at the image's own
    size, and the largest one on the model's grid."""
    model = transformers.CLIPSegForImageSegmentation.from_pretrained(checkpoint).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoint)
    processor = transformers.ViTImageProcessorPil(**PIXELS)
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    pixels = processor(picture, return_tensors="pt").pixel_values
    out = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = tokenizer([prompt], padding="max_length", max_length=16, return_tensors="pt")
            logits = model(pixel_values=pixels, **ids).logits.reshape(1, 1, 64, 64)
            size = (picture.height, picture.width)
            resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            out.append((torch.sigmoid(resized)[0, 0].numpy(), torch.sigmoid(logits).max().item()))
    return out


def assert_masks_equal_the_reference(
    rows: list[dict[str, Any]], checkpoint: Path, image: bytes
) -> None:
    """The masks of one image, decoded by pycocotools, pixel for pixel up to ties."""
    assert [row["prompt"] for row in rows] == PROMPTS
    areas = set()
    for row, (probability, largest) in zip(rows, reference(checkpoint, image), strict=True):
        mask = coco.decode(row["rle"])
        assert mask.shape == probability.shape == (row["height"], row["width"])
        differs = mask != (probability > THRESHOLD)
        assert np.abs(probability[differs] - THRESHOLD).max(initial=0) < 1e-5
        assert row["area"] == mask.sum()
        assert row["score_max"] == pytest.approx(largest, abs=1e-4)
        if row["area"]:
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert list(row["bbox"]) == box
            assert row["score_mean"] == pytest.approx(probability[mask == 1].mean(), abs=1e-4)
        areas.add(row["area"])
    assert len(areas) > 1  # masks that say something


def write_tar(folder: str, name: str = "00000.tar") -> str:
    members = [(f"x/{i}.{'png' if i == 3 else 'jpg'}", image) for i, image in enumerate(photos())]
    storage.write_bytes(f"{folder}/{name}", make_tar(members))
    return folder


def write_parquet(folder: str) -> str:
    storage.write_bytes(
        f"{folder}/part-0.parquet", make_parquet({"image": pa.array(photos(), pa.binary())})
    )
    return folder


def write_hugging_face(folder: str) -> str:
    cells = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(photos())]
    column = {"image": hugging_face_column(cells), "label": list(range(4))}
    storage.write_bytes(f"{folder}/train-00000-of-00001.parquet", make_parquet(column))
    return folder


def write_folders(folder: str) -> str:
    for i, image in enumerate(photos()):
        name = f"{i}.{'png' if i == 3 else 'JPG'}"
        storage.write_bytes(f"{folder}/{'ab'[i % 2]}/{name}", image)
    storage.write_bytes(f"{folder}/a/notes.txt", b"not an image")
    return folder


def write_numbered(folder: str) -> str:
    write_tar(folder, "part-0007.tar")
    return folder + "/part-{0007..0007}.tar"


def write_globbed(folder: str) -> str:
    write_tar(folder, "deep/er/00000.tar")
    return folder + "/deep/*/*.tar"


FORMS: dict[str, Callable[[str], str]] = {
    "tar": write_tar,
    "braces": write_numbered,
    "glob": write_globbed,
    "parquet": write_parquet,
    "hugging_face": write_hugging_face,
    "folders": write_folders,
    **{
        f"img2dataset_{form}": lambda folder, form=form: (
            write_img2dataset(folder, form, photos()),
            folder,
        )[1]
        for form in ("webdataset", "files", "parquet")
    },
}


# The rest in `make soak`; how each form is planned and read is in test_plan and test_read, too.
ALWAYS = {("tar", "s3"), ("parquet", "s3"), ("folders", "s3"), ("img2dataset_webdataset", "local")}
BOTH = [
    pytest.param(form, where, marks=[] if (form, where) in ALWAYS else [pytest.mark.soak])
    for form in FORMS
    for where in ("local", "s3")
]


@pytest.mark.parametrize(("form", "folder"), BOTH, indirect=["folder"])
def test_every_input_form_gives_the_reference_masks(
    form: str, folder: str, checkpoint: Path
) -> None:
    source, output = FORMS[form](f"{folder}/in"), f"{folder}/out"
    assert run(source, output, checkpoint) == 0
    images, masks = table(output, "images"), table(output, "masks")
    assert len(images) == 4
    assert table(output, "errors") == []
    known = {len(photo): photo for photo in photos()}
    for image in images:
        of_image = [m for m in masks if (m["shard"], m["row"]) == (image["shard"], image["row"])]
        assert {(m["key"], m["height"], m["width"]) for m in of_image} == {
            (image["key"], image["height"], image["width"])
        }
        assert_masks_equal_the_reference(of_image, checkpoint, known[image["size_bytes"]])
    record = json.loads(storage.read_bytes(f"{output}/_run.json"))
    counts = {"shards": 1 if form != "folders" else 2, "shards_failed": 0, "rows_in": 4}
    assert record["counts"] == counts | {
        "rows_ok": 4,
        "rows_error": 0,
        "samples_without_image": 0,
        "images": 4,
        "masks": 12,
    }
    assert storage.exists(f"{output}/_SUCCESS")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("options", [[], ["--actors", "2", "--batch-size", "3"]])
def test_on_ray_the_same_bytes_come_out(
    tmp_path: Path, checkpoint: Path, options: list[str]
) -> None:
    source = write_tar(str(tmp_path / "in"), "0.tar")
    write_tar(str(tmp_path / "in"), "1.tar")
    kept = ["--keep-probabilities", "88", "--embed"]
    assert run(source, str(tmp_path / "here"), checkpoint, *kept) == 0
    before = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert run(source, str(tmp_path / "ray"), checkpoint, "--on-ray", *kept, *options) == 0
    after = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert after <= before  # Ray Data starts three helpers, each in a process of its own
    here, ray_ = (
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("*/*.parquet")}
        for folder in (tmp_path / "here", tmp_path / "ray")
    )
    assert here == ray_
    assert len(here) == 5 + 2 * 4
    record = json.loads((tmp_path / "ray" / "_run.json").read_text())
    assert "SegmentImages" in " ".join(record["throughput"]["stages"])
    assert (tmp_path / "ray" / "report" / "index.html").exists()


def test_other_readers_read_the_tables(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "out"
    source = write_tar(str(tmp_path / "in"))
    assert run(source, str(output), checkpoint, "--keep-probabilities", "88") == 0
    rows = duckdb.sql(
        f"""SELECT m.key, m.prompt, m.area, m.rle.counts, i.format
            FROM '{output}/masks/*.parquet' m JOIN '{output}/images/*.parquet' i
            USING (shard, "row") ORDER BY m."row", m.prompt_id"""
    ).fetchall()
    assert [row[:2] for row in rows] == [(f"x/{i}", p) for i in range(4) for p in PROMPTS]
    assert [row[4] for row in rows[::3]] == ["JPEG", "JPEG", "JPEG", "PNG"]
    frame = polars.read_parquet(output / "masks" / "*.parquet").sort("row", "prompt_id")
    assert frame["area"].to_list() == [row[2] for row in rows]
    assert frame["rle"].struct.field("counts").to_list() == [row[3] for row in rows]
    assert frame["bbox"].dtype == polars.Array(polars.Float32, 4)
    errors = f"SELECT count(*) FROM '{output}/errors/*.parquet'"
    assert duckdb.sql(errors).fetchall() == [(0,)]
    maps = polars.read_parquet(output / "probabilities" / "*.parquet").sort("row", "prompt_id")
    for kept, row in zip(maps.iter_rows(named=True), frame.iter_rows(named=True), strict=True):
        size = kept["size"]
        grid = np.frombuffer(kept["map"], np.uint8).reshape(size)
        again = mask_from_probabilities(grid, (row["height"], row["width"]), THRESHOLD)
        mask = coco.decode(row["rle"])
        union = (again | mask).sum()
        assert union == 0 or (again & mask).sum() / union > 0.97


def test_masks_on_the_models_grid(tmp_path: Path, checkpoint: Path) -> None:
    source, output = write_tar(str(tmp_path / "in")), str(tmp_path / "out")
    assert run(source, output, checkpoint, "--mask-size", "model") == 0
    for row in table(output, "masks"):
        assert row["rle"]["size"] == [64, 64]
        assert (row["height"], row["width"]) != (64, 64)


def test_what_fails_is_a_row_of_errors_and_never_stops_the_job(
    tmp_path: Path, checkpoint: Path
) -> None:
    good = photos()
    members = [("a.jpg", good[0]), ("b.jpg", b"<html>"), ("c.jpg", good[1][:900]), ("d.txt", b"")]
    whole = make_tar([*members, ("e.jpg", good[2])])
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.tar").write_bytes(whole)
    (folder / "cut.tar").write_bytes(make_tar([("a.jpg", good[0]), ("b.jpg", good[1])])[:-9000])
    (folder / "empty.tar").write_bytes(b"")
    output = str(tmp_path / "out")
    assert run(str(folder), output, checkpoint, "--batch-size", "2") == 0
    errors = [(e["shard"], e["row"], e["key"], e["reason"]) for e in table(output, "errors")]
    assert sorted(errors, key=str) == [
        ("bad.tar", 1, "b", "not_an_image"),
        ("bad.tar", 2, "c", "image_corrupt"),
        ("cut.tar", None, None, "shard_truncated"),
        ("empty.tar", None, None, "shard_empty"),
    ]
    images = [(i["shard"], i["row"]) for i in table(output, "images")]
    assert images == [("bad.tar", 0), ("bad.tar", 3), ("cut.tar", 0)]
    counts = json.loads((tmp_path / "out" / "_run.json").read_text())["counts"]
    assert counts == {
        "shards": 3,
        "shards_failed": 2,
        "rows_in": 5,
        "rows_ok": 3,
        "rows_error": 2,
        "samples_without_image": 1,
        "images": 3,
        "masks": 9,
    }


def test_many_prompts_come_in_runs_and_come_out_whole(tmp_path: Path, checkpoint: Path) -> None:
    """On a grid of 512 x 512, 67 prompts make more logits than one block of the stream may hold."""
    large = tmp_path / "model"
    shutil.copytree(checkpoint, large)
    size = {"size": {"height": 512, "width": 512}}
    (large / "preprocessor_config.json").write_text(json.dumps(PIXELS | size))
    prompts = [argument for i in range(64) for argument in ("--prompt", f"a cat {i}")]
    (tmp_path / "in").mkdir()
    tar = make_tar([("a.jpg", photos()[0]), ("b.jpg", b""), ("c.jpg", photos()[1])])
    (tmp_path / "in" / "0.tar").write_bytes(tar)
    assert BLOCK_BYTES // (4 * 512 * 512) < 67
    assert run(str(tmp_path / "in"), str(tmp_path / "out"), large, *prompts) == 0
    masks = table(str(tmp_path / "out"), "masks")
    ids = [(m["row"], m["prompt_id"]) for m in masks]
    assert ids == [(row, i) for row in (0, 2) for i in range(67)]


def test_the_same_command_completes_a_run(tmp_path: Path, checkpoint: Path) -> None:
    folder, output = tmp_path / "in", str(tmp_path / "out")
    write_tar(str(folder), "0.tar")
    assert run(str(folder), output, checkpoint) == 0
    (part,) = (tmp_path / "out" / "masks").glob("0-tar*")
    before = part.stat().st_mtime_ns
    write_tar(str(folder), "1.tar")
    assert run(str(folder), output, checkpoint) == 0
    assert part.stat().st_mtime_ns == before  # neither read nor written again
    assert [i["shard"] for i in table(output, "images")] == ["0.tar"] * 4 + ["1.tar"] * 4
    assert run(str(folder), output, checkpoint) == 0  # nothing left to do


def test_prompts_that_are_added_give_what_all_at_once_give(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tar(str(tmp_path / "in"))
    kept = ["--keep-probabilities", "88"]
    once, later = str(tmp_path / "once"), str(tmp_path / "later")
    assert run(source, once, checkpoint, *kept) == 0
    first = ["--prompt", PROMPTS[0], "--model", str(checkpoint), "--threshold", str(THRESHOLD)]
    assert segment.main([source, later, *first, "--quiet", "--local", *kept]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "later").glob("*/0*.parquet")}
    capsys.readouterr()
    assert run(source, later, checkpoint, *kept, "--contact-sheet", str(tmp_path / "a.png")) == 0
    assert "4 images in" in capsys.readouterr().out
    assert len(before) == 3
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((tmp_path / "later").glob("*/0*.parquet"))) == 5
    for name in ("images", "masks", "probabilities", "errors"):
        assert table(later, name) == table(once, name)
    assert Image.open(tmp_path / "a.png").width > 300


def test_wrong_usage_is_told_before_anything_starts(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, output = write_tar(str(tmp_path / "in")), str(tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    column = write_parquet(str(tmp_path / "parquet"))
    assert run(tar, output, checkpoint) == 0
    capsys.readouterr()
    cases = [
        (["no/such/folder", "x"], "no/such/folder"),
        ([str(tmp_path / "nothing"), "x"], "nothing"),
        ([tar, "x", "--model", "no/such/model"], "no/such/model"),
        ([tar, "x", "--model", str(tmp_path / "in")], "config.json"),
        ([column, "x", "--image-column", "picture"], "picture"),
        ([tar, output, "--threshold", "0.9"], "holds another run (threshold was 0.48, now 0.9)"),
        ([tar, str(tmp_path)], "not from a run"),
        ([tar, "s3://key:secret@bucket/x"], "must not hold credentials"),
    ]
    for arguments, says in cases:
        assert run(arguments[0], arguments[1], checkpoint, *arguments[2:]) == 2, arguments
        said = capsys.readouterr().err
        assert says in said
        assert "secret" not in said
        assert said.count("\n") == 1
    assert not Path("x").exists()


@pytest.mark.usefixtures("local_ray")
def test_gpus_are_never_replaced_in_silence(tmp_path: Path, checkpoint: Path, capsys) -> None:
    source = write_tar(str(tmp_path / "in"))
    cuda = ["--device", "cuda"]
    assert run(source, str(tmp_path / "out"), checkpoint, "--on-ray", *cuda) == 2
    assert "the cluster has 0" in capsys.readouterr().err
    assert run(source, str(tmp_path / "out"), checkpoint, *cuda) == 2
    assert "--local: runs on the CPU" in capsys.readouterr().err


@pytest.mark.soak
def test_one_cpu_of_a_running_cluster_is_enough(tmp_path: Path, checkpoint: Path) -> None:
    """Attached through RAY_ADDRESS, on one CPU: no stage waits for another's CPU for ever."""
    source, output = write_tar(str(tmp_path / "in")), str(tmp_path / "out")
    cluster = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        command = [sys.executable, "-m", "jobs.segment", source, output, "--model", checkpoint]
        done = subprocess.run(
            [*map(str, command), "--prompt", "a cat"],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    assert len(table(output, "masks")) == 4
    assert "4 images" in done.stdout
