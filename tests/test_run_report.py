"""The report of a run: its figures are the tables', and no run is too large or too odd for it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from jobs import classify, embed, label, report, segment, status, verify
from pipeline import schema
from pipeline.annotations import report_sample
from pipeline.annotations.choose import list_parts_by_shard
from pipeline.annotations.report_page import MOST_BYTES
from pipeline.annotations.report_rows import KINDS
from pipeline.annotations.report_sample import read_sample
from pipeline.annotations.report_vectors import read_vectors
from pipeline.demo import MODEL, SHARDS
from pipeline.run.manifest import name_run
from pipeline.write.layout import Ledger, shard_id
from pipeline.write.receipts import write_receipt
from tests.embeddings import random_vectors, write_table
from tests.label_tables import SMALL, annotation_rows, image_row, random_blobs, write_labels
from tests.outputs import rows_of
from tests.shards import make_tar, shards_of, write_img2dataset

ONTOLOGY = MODEL.parent / "ontology.yaml"
RUN = ["--model", str(MODEL), "--local", "--quiet"]
HOSTILE = "</h3><script>alert(1)</script>\x1b[2J\"' onerror=x"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in` holds a bundled shard and a broken one; masks, labels, vectors and classes are runs."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "in").mkdir()
    shutil.copy(*SHARDS.glob("*.parquet"), folder / "in")
    broken = [(f"bad{i}\x1b.png", b"<html>") for i in range(7)]
    (folder / "in" / "b.tar").write_bytes(make_tar([*broken, ("c.json", b"{}")]))
    (folder / "labels.txt").write_text("red\nblue\nstar\n")
    at = {name: str(folder / name) for name in ("in", "masks", "labels", "vectors", "classes")}
    prompts = ["--ontology", str(ONTOLOGY), "--prompt", "forklift", "--embed"]
    assert segment.main([at["in"], at["masks"], *prompts, *RUN]) == 0
    cut = ["--ontology", str(ONTOLOGY), "--local", "--quiet"]
    assert label.main([at["masks"], at["labels"], *cut]) == 0
    assert embed.main([at["in"], at["vectors"], "--text-column", "caption", *RUN]) == 0
    some = ["--labels", f"{folder}/labels.txt", "--template", "{}", "--top", "2"]
    assert classify.main([at["vectors"], at["classes"], *some, *RUN]) == 0
    return folder


def page_of(run: Path) -> str:
    return (run / "report" / "index.html").read_text()


def rows(run: Path, table: str) -> list[dict[str, Any]]:
    parts = sorted((run / table).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def coverage(page: str) -> dict[str, list[str]]:
    """The cells of each class in the first table."""
    body = re.findall("<tbody>(.*?)</tbody>", page, re.DOTALL)[0]
    lines = re.findall("<tr>(.*?)</tr>", body)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
    return {re.sub("<.*?>", "", name): rest for name, *rest in cells}


def pictures(page: str) -> list[Image.Image]:
    found = re.findall('src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


# ------------------------------------------------------------------------------- the figures


def test_the_figures_of_masks_are_those_of_the_table(made: Path) -> None:
    page = page_of(made / "masks")
    masks = rows(made / "masks", "masks")
    shown = coverage(page)
    assert list(shown) == ["forklift", "blue", "star", "a purple star"]
    for name, cells in shown.items():
        some = [row for row in masks if row["prompt"] == name]
        found = [row for row in some if row["area"] > 0]
        near = [r for r in some if abs(r["score_max"] - r["threshold"]) < 0.1]
        assert cells[0] == f"{len(found)} of {len(some)}"
        assert cells[1] == f"{100 * len(found) / len(some):.1f} %"
        if found:
            share = np.mean([row["area"] / np.prod(row["rle"]["size"]) for row in found])
            assert cells[3] == f"{100 * share:.1f} %"
            assert cells[4] == f"{np.mean([row['score_max'] for row in found]):.3f}"
        assert cells[5:] == [f"{len(near)}", "0.50"]
    assert "All 32 images of the finished shards" in page
    assert "<dt>images failed</dt><dd>7</dd>" in page and "<dd>2 of 2</dd>" in page
    assert page.count("bad0\ufffd") == 1 and "not_an_image: 7" in page and "<li>...</li>" in page
    record = json.loads((made / "masks" / "_run.json").read_text())
    for fact in (
        record["fingerprint"]["weights_hash"],
        str(MODEL),
        record["started_at"],
        record["finished_at"],
    ):
        assert fact in page
    assert f"{record['throughput']['images_per_s']:,.1f} images/s" in page
    stages = record["throughput"]["stages"]
    of_stream = ["read_batches", "PrepareImages", "SegmentImages", "WriteFragments"]
    assert list(stages) == [*of_stream, "finish_shard"]
    assert 0 < sum(stages.values()) <= record["throughput"]["seconds"]
    for name, busy in stages.items():
        assert f'<th scope="row">{name}</th><td>{busy:,.2f} s</td>' in page


def test_a_histogram_counts_every_image_and_shows_the_threshold(made: Path) -> None:
    """Its bars, from their heights, are those of numpy."""
    page = page_of(made / "masks")
    masks = rows(made / "masks", "masks")
    scores = [row["score_max"] for row in masks if row["prompt"] == "star"]
    wanted = np.histogram(scores, 50, (0, 1))[0]
    (plot,) = re.findall(r'aria-label="largest probability of star in.*?</svg>', page, re.DOTALL)
    bars = re.findall('<rect class="(under|over)" x="(.*?)" y=".*?" height="(.*?)"/>', plot)
    found = np.zeros(50)
    for kind, x, height in bars:
        at = round((float(x) - 4) / 8)
        found[at] = float(height)
        assert kind == ("over" if at >= 25 else "under")
    assert found**2 / 90**2 * wanted.max() == pytest.approx(wanted, abs=0.05 * wanted.max())
    assert '<line class="limit" x1="204.0"' in plot


def test_each_group_of_pictures_has_the_images_of_its_order(made: Path) -> None:
    page = page_of(made / "masks")
    masks = [row for row in rows(made / "masks", "masks") if row["prompt"] == "star"]
    section = next(s for s in page.split("<h3>")[1:] if "</svg>star</h3>" in s)
    groups = {
        name: re.findall(r"<bdi>(scene.*?)</bdi>", cells)
        for name, cells in re.findall(r"<h4>(.*?)</h4>\s*<ol>(.*?)</ol>", section, re.DOTALL)
    }
    found = {row["key"]: row["area"] > 0 for row in masks}
    assert all(found[key] for key in groups["random, of those found"])
    seen = set(groups["random, of those found"])
    for name, worth in (
        ("highest score", lambda row: -row["score_max"]),
        ("most uncertain: nearest to the threshold", lambda r: abs(r["score_max"] - 0.5)),
        ("lowest score", lambda row: row["score_max"]),
    ):
        order = [row["key"] for row in sorted(masks, key=worth) if row["key"] not in seen]
        assert groups[name] == order[:4], name
        seen |= set(groups[name])
    assert len(seen) == 16


def test_an_overlay_is_pale_outside_its_mask(made: Path) -> None:
    page = page_of(made / "masks")
    alt, data = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="(blue in .*?)"', page)[0][
        ::-1
    ]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.int16)
    key = alt.removeprefix("blue in ").partition(":")[0]
    (row,) = [r for r in rows(made / "masks", "masks") if r["key"] == key and r["prompt"] == "blue"]
    mask = Image.fromarray(coco.decode(row["rle"]) * 255).resize(drawn.shape[1::-1])
    inside = np.asarray(mask) > 127
    assert np.ptp(drawn, axis=2)[inside].mean() > 3 * np.ptp(drawn, axis=2)[~inside].mean()


def test_the_figures_of_labels_are_those_of_the_table(made: Path) -> None:
    page = page_of(made / "labels")
    annotations = rows(made / "labels", "annotations")
    shown = coverage(page)
    assert list(shown) == ["blue", "star"]
    for name, cells in shown.items():
        some = [row for row in annotations if row["class"] == name]
        presence = {row["row"]: row["presence"] for row in some}
        assert cells[0] == f"{len(presence)} of 32"
        assert cells[4] == f"{np.mean(list(presence.values())):.3f}"
        assert cells[6] == f"{some[0]['threshold']:.2f}"
    assert 'fill="#e69f00"' in page and 'fill="#e20074"' in page


def test_the_figures_of_classes_are_those_of_the_table(made: Path) -> None:
    page = page_of(made / "classes")
    first = [row for row in rows(made / "classes", "labels") if row["rank"] == 0]
    counts = Counter(row["label"] for row in first)
    shown = coverage(page)
    assert {name: cells[0] for name, cells in shown.items()} == {
        name: f"{count} of 32" for name, count in counts.items()
    }
    second = {r["row"]: r["probability"] for r in rows(made / "classes", "labels") if r["rank"]}
    for name, cells in shown.items():
        some = [row for row in first if row["label"] == name]
        assert cells[3] == f"{np.mean([row['probability'] for row in some]):.3f}"
        near = sum(row["probability"] - second[row["row"]] < 0.1 for row in some)
        assert cells[4] == str(near)
    assert "most uncertain: nearest to another label" in page and len(pictures(page)) > 10


def test_the_neighbours_of_embeddings_are_the_nearest(made: Path) -> None:
    for run in ("vectors", "masks"):
        page = page_of(made / run)
        table = rows(made / run, "embeddings")
        matrix = np.array([row["vector"] for row in table], np.float64)
        cosines = matrix @ matrix.T
        np.fill_diagonal(cosines, -2)
        place = {row["key"]: i for i, row in enumerate(table)}
        groups = re.findall("<ol>(.*?)</ol>", page.split('id="vectors"')[1], re.DOTALL)
        for group in groups[:8]:
            first, *near = re.findall(r"<bdi>(.*?)</bdi></span>\s*<span>(.*?)</span>", group)
            row = cosines[place[first[0]]]
            assert [c for _, c in near] == [f"{c:.4f}" for c in np.sort(row)[::-1][:3]]
            assert all(f"{row[place[key]]:.4f}" == c for key, c in near)
        (pair,) = re.findall('<ol class="pair">(.*?)</ol>', page, re.DOTALL)[:1]
        assert f"{cosines.max():.4f}" in pair
    assert "cosine of each image to its own text" in page_of(made / "vectors")


# --------------------------------------------------------------------------- when it is made


def test_a_finished_run_given_again_keeps_its_page(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = made / "vectors" / "report" / "index.html"
    argv = [str(made / "in"), str(made / "vectors"), "--text-column", "caption", *RUN]
    page.write_text("kept")
    assert embed.main(argv) == 0
    assert page.read_text() == "kept"
    assert f"look: {page}" in capsys.readouterr().out
    page.unlink()
    assert embed.main(argv) == 0
    assert "<h2" in page.read_text()
    page.write_text("old")
    (page.parent / "more.html").write_text("old")
    assert status.main([str(made / "vectors")]) == 0
    assert verify.main([str(made / "vectors"), "--recompute", "0.1"]) == 0
    assert page.read_text() == "old"
    said = capsys.readouterr()
    assert "complete" in said.out and " 0 differ" in said.out and "report" not in said.err
    assert embed.main([*argv, "--restart"]) == 0
    assert page.read_text() != "old" and not (page.parent / "more.html").exists()


def test_a_report_that_fails_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands in the place of its folder."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 0, 255)).save(picture, "PNG")
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.tar"):
        (tmp_path / "in" / name).write_bytes(make_tar([("0.png", picture.getvalue())]))
    argv = [str(tmp_path / "in"), str(tmp_path / "out"), "--prompt", "blue", *RUN]
    assert segment.main(argv) == 0
    shutil.rmtree(tmp_path / "out" / "report")
    (tmp_path / "out" / "report").write_text("")
    (tmp_path / "in" / "c.tar").write_bytes(make_tar([("0.png", picture.getvalue())]))
    capsys.readouterr()
    assert segment.main(argv) == 0
    said = capsys.readouterr()
    assert said.err.count("no report: ") == 1 and "the run itself is complete" in said.err
    assert "index.html" not in said.out
    assert f"look: clipseg-ray view {tmp_path}/out" in said.out
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_run_whose_images_are_gone_has_a_report_without_pictures(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "masks", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "_run.json").read_text())
    record["config"]["input"] = str(tmp_path / "gone")
    (tmp_path / "run" / "_run.json").write_text(json.dumps(record))
    assert report.main([str(tmp_path / "run"), "--output", f"{tmp_path}/x.html"]) == 0
    page = (tmp_path / "x.html").read_text()
    assert not pictures(page) and "the images of the run are not there any more" in page
    assert coverage(page) == coverage(page_of(made / "masks"))
    said = capsys.readouterr().out
    assert f"look: {tmp_path}/x.html" in said and "moved? --input-moved-to says where" in said
    moved = ["--input-moved-to", str(made / "in"), "--output", f"{tmp_path}/y.html"]
    assert report.main([str(tmp_path / "run"), *moved]) == 0
    found = [one.tobytes() for one in pictures((tmp_path / "y.html").read_text())]
    assert found == [one.tobytes() for one in pictures(page_of(made / "masks"))]
    assert report.main([str(made / "in")]) == 2
    assert "no _run.json there" in capsys.readouterr().err


def test_a_run_that_is_not_finished_has_a_report(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(made / "masks", output)
    (output / "_SUCCESS").unlink()
    for path in [*output.glob("*/scenes*.parquet"), *output.glob("_receipts/scenes*/*")]:
        path.unlink()
    shutil.rmtree(output / "report")
    assert report.main([str(output)]) == 0
    page = page_of(output)
    assert "not complete: the same command again does the rest" in page
    assert "No image came out well yet" in page and "<dd>1 of 2</dd>" in page
    assert "not_an_image: 7" in page


def test_a_report_needs_no_torch_and_no_ray() -> None:
    code = "import sys, jobs.report; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ----------------------------------------------------------------------- hostile and large


def test_names_cannot_leave_their_place(made: Path, tmp_path: Path) -> None:
    """Keys, prompts, shards, reasons, details and what the record says."""
    output = tmp_path / "run"
    shutil.copytree(made / "masks", output)
    texts = {"key", "prompt", "reason", "detail"}
    tables = {"masks": schema.MASKS, "images": schema.IMAGES, "errors": schema.ERRORS}
    for table, columns in tables.items():
        for part in (output / table).glob("[!_]*.parquet"):
            changed = [
                row | dict.fromkeys(texts & row.keys(), HOSTILE)
                for row in pq.read_table(part).to_pylist()
            ]
            pq.write_table(pa.Table.from_pylist(changed, schema=columns), part)
    record = json.loads((output / "_run.json").read_text())
    record["config"] |= {"model": HOSTILE, HOSTILE: HOSTILE}
    record["fingerprint"] |= {"job": HOSTILE, "prompts": [HOSTILE]}
    record["started_at"] = record["finished_at"] = HOSTILE
    (output / "_run.json").write_text(json.dumps(record))
    assert report.main([str(output)]) == 0
    page = page_of(output)
    bare = re.sub("<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert "<script" not in bare and "\x1b" not in page
    assert page.count("onerror") == page.count("&#x27; onerror") > 20
    assert html.escape(HOSTILE.replace("\x1b", "\ufffd")) in page


def noise(count: int, side: int) -> list[bytes]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        file = io.BytesIO()
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        found.append(file.getvalue())
    return found


def write_large(folder: Path, shards: int, classes: int, images: int) -> Path:
    """A run over shards of noise, with names as long and as odd as they come."""
    output = folder / "out"
    names = [f"{i:03}" + "<&\"'>" * 200 for i in range(classes)]
    write_img2dataset(str(folder / "in"), "webdataset", noise(images, 400))
    (tar,) = (folder / "in").glob("*.tar")
    rle = {"size": [400, 400], "counts": coco.encode(np.eye(400, dtype=np.uint8, order="F"))}
    rle["counts"] = rle["counts"]["counts"].decode()
    record = {"config": {"input": str(folder / "in"), "run": {"only": []}}, "tables": ["masks"]}
    record |= {"fingerprint": {"job": "segment", "prompts": names}, "status": "running"}
    record["started_at"] = "2026-01-01T00:00:00"
    record["config"] |= {f"{i}{'&' * 100}": "<" * 1000 for i in range(200)}
    output.mkdir(parents=True)
    (output / "_run.json").write_text(json.dumps(record))
    content = {"rows_ok": images, "rows_error": 0, "samples_without_image": 0}
    content |= {"shard_error": None, "parts": []}
    for there in shards_of(str(folder / "in")):
        content["version"] = there.version
        write_receipt(Ledger(output=str(output), run=name_run(record)), there, content)
    for table in ("masks", "images", "errors"):
        (output / table).mkdir()
    for number in range(shards):
        shard = tar.name if not number else f"{number:05}.tar"
        of_shard = {"shard": shard, "height": 400, "width": 400, "threshold": 0.5}
        made = [
            {"row": row, "key": f"{row}" + "'" * 300, **of_shard}
            | {"prompt_id": i, "prompt": name, "area": 400, "rle": rle}
            | {"score_max": (row * classes + i) % 97 / 97}
            for row in range(images)
            for i, name in enumerate(names)
        ]
        failed = [{"row": i, "key": "<" * 300, "detail": "&" * 500} for i in range(30)]
        failed = [one | {"reason": f"reason{i}" * 20} for i, one in enumerate(failed)]
        pictures = [{"row": row, **of_shard} for row in range(images)]
        pictures = [{k: v for k, v in one.items() if k != "threshold"} for one in pictures]
        for table, some in (("masks", made), ("images", pictures), ("errors", failed)):
            rows = rows_of(table, *[{**one, "shard": shard} for one in some])
            pq.write_table(rows, output / table / f"{shard_id(shard)}.parquet")
    return output


def test_no_run_is_too_large_for_a_page(tmp_path: Path) -> None:
    """Hundreds of classes with hostile names, and pictures that JPEG cannot make small."""
    output = write_large(tmp_path, shards=2, classes=310, images=6)
    moved = ["--input-moved-to", str(tmp_path / "in")]
    assert report.main([str(output), *moved]) == 0
    page = page_of(output)
    assert len(page.encode()) <= MOST_BYTES
    shown = pictures(page)
    assert len(shown) > 50 and min(max(image.size) for image in shown) < 400
    assert "Figures of 300 classes; there are more" in page
    assert "Pictures and plots of the first 60 classes" in page
    assert "500 rows of an image and class, drawn by chance from" in page


def test_of_a_large_run_a_sample_is_read_and_said(tmp_path: Path) -> None:
    """The parts that are not read are damaged, and nobody notices."""
    labels = str(tmp_path / "labels")
    images = [
        (image_row(f"{i:04}.tar", 0, f"k{i}", SMALL), random_blobs(i, SMALL)) for i in range(130)
    ]
    write_labels(labels, images, tables=["annotations", "images"])
    parts = sorted((tmp_path / "labels" / "annotations").iterdir())
    read = {parts[i * len(parts) // 64] for i in range(64)}
    for part in set(parts) - read:
        part.write_bytes(b"damaged")
    assert report.main([labels]) == 0
    page = page_of(Path(labels))
    assert "A sample: 64 images of 64 of 130 shards, evenly spread" in page
    assert "Not read" not in page
    next(iter(read)).write_bytes(b"damaged")
    assert report.main([labels]) == 0
    page = page_of(Path(labels))
    assert "A sample: 63 images of 63 of 130 shards" in page
    assert page.count("Not read: ") == 1 and "damaged or not Parquet" in page


@pytest.mark.parametrize("table", ["annotations", "masks"])
def test_of_a_large_part_the_first_rows_are_read_image_by_image(
    tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups part an image in the midst; what is counted does not depend on them."""
    output = tmp_path / "labels"
    images = [(image_row("a.tar", i, f"k{i}", SMALL), random_blobs(i, SMALL)) for i in range(40)]
    write_labels(str(output), images)
    if table == "masks":
        made = rows_of(
            "masks",
            *(
                {"row": i, "prompt": f"p{k}", "prompt_id": k, "score_max": k / 3, "area": k}
                for i in range(40)
                for k in range(3)
            ),
        )
        (output / "masks").mkdir()
    else:
        every = [row for image, found in images for row in annotation_rows(image, found)]
        made = pa.Table.from_pylist(every, schema=schema.ANNOTATIONS)
    (name,) = [path.name for path in (output / "images").iterdir()]
    found = {}
    for group in (7, 1000):
        pq.write_table(made, output / table / name, row_group_size=group)
        parts = list_parts_by_shard(str(output), table)
        sample = read_sample(str(output), KINDS[table], parts, [], set(parts))
        found[group] = [(c.name, c.images, c.found, c.scores, c.near) for c in sample.classes]
        assert sample.whole and sample.images == 40
    assert found[7] == found[1000]
    pq.write_table(made, output / table / name, row_group_size=7)
    monkeypatch.setattr(report_sample, "ROWS", 20)
    sample = read_sample(str(output), KINDS[table], parts, [], set(parts))
    # The last image that was met may go on behind what was read.
    assert not sample.whole and sample.images == max(made.slice(0, 21)["row"].to_pylist())


def test_vectors_that_are_no_directions_are_counted(tmp_path: Path) -> None:
    vectors = random_vectors(90)
    vectors[3], vectors[50] = 0, np.nan
    write_table(str(tmp_path), vectors)
    parts = list_parts_by_shard(str(tmp_path), "embeddings")
    sample = read_vectors(parts, list(parts))
    assert sample is not None and (sample.vectors, sample.bad, sample.dimension) == (90, 2, 24)
    assert sample.lengths == pytest.approx((1, 1, 1), abs=1e-6)
    assert sum(sample.nearest) == 88
    assert read_vectors({}, []) is None
