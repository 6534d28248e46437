"""Exports as folders: names, splits, images, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_tables import (
    FORMATS,
    SMALL,
    annotation_rows,
    encode,
    export_labels,
    image_row,
    random_blobs,
    read_json,
    small_labels,
    write_labels,
)
from PIL import Image
from shards import hugging_face_column, make_parquet, make_tar

from jobs import export
from pipeline import schema, storage
from pipeline.annotations.labelled import LabelledImage, read_labels
from pipeline.annotations.pictures import name_file
from pipeline.annotations.splits import Splits, name_image
from pipeline.annotations.temporary import TemporaryFolder
from pipeline.config.export import ExportConfig
from pipeline.errors import JobError, UsageError
from pipeline.prepare.images import _formats

ROOT = Path(__file__).parent.parent


def labelled(shard: str, row: int, key: str) -> LabelledImage:
    columns = {"member": key, "height": 9, "width": 9, "format": "JPEG", "orientation": 1}
    return LabelledImage(shard=shard, row=row, key=key, instances=(), **columns)


def files_of(folder: str) -> dict[str, bytes]:
    found = storage.list_files(folder)
    return {file.uri.removeprefix(f"{folder}/"): storage.read_bytes(file.uri) for file in found}


# Names and splits

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "x" * 300,
    "Ä/ö\u202e\n\x00",
    "",
    ".",
    "CON",
    "nul.txt",
    "a b",
    "a-b",
    "A-B",
    "k",
    "k",
    "\U0001f600",
    "C:\\x|?*",
]


@pytest.mark.parametrize("form", FORMATS)
def test_file_names_are_safe_and_never_equal(form: str, tmp_path: Path) -> None:
    rows = [(image_row(s, i, key, SMALL), random_blobs(i, SMALL))
            for s in ("a.tar", "b/a.tar") for i, key in enumerate(HOSTILE)]  # fmt: skip
    labels = write_labels(f"{tmp_path}/labels", rows)
    assert export_labels(labels, f"{tmp_path}/dest", form) == 0
    index = pq.read_table(tmp_path / "dest/_images-00000.parquet").to_pylist()
    assert [(i["shard"], i["row"], i["key"]) for i in index] == [
        (image["shard"], image["row"], image["key"])
        for image, _ in sorted(rows, key=lambda r: (r[0]["shard"] != "a.tar", r[0]["row"]))
    ]
    names = [i["file_name"] for i in index]
    assert len({name.lower() for name in names}) == 2 * len(HOSTILE)
    for name in names:
        assert len(name) < 100
        assert set(name.removesuffix(".jpg")) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
        )
    outside = {path.name for path in tmp_path.iterdir()}
    assert outside == {"labels", "dest"}


def test_splits_have_their_shares_whatever_the_order() -> None:
    images = [labelled(f"{i % 7}.tar", i, f"key {i}") for i in range(4000)]
    splits = Splits({"train": 0.7, "val": 0.2, "test": 0.1})
    found = [splits.find(image) for image in images]
    counts = Counter(found)
    assert counts["train"] == pytest.approx(2800, abs=120)
    assert counts["test"] == pytest.approx(400, abs=80)
    assert [splits.find(image) for image in reversed(images)] == found[::-1]
    # A larger first split keeps the images that it had.
    more = Splits({"train": 0.8, "val": 0.2})
    assert all(more.find(i) == "train" for i, f in zip(images, found, strict=True) if f == "train")


def test_groups_never_straddle(folder: str) -> None:
    images = [labelled(f"{i % 5}.tar", i, f"key {i}") for i in range(600)]
    group_of = {(i.shard, i.row): i.row % 40 for i in images if i.row % 3}
    rows = [{"group": g, "shard": s, "row": r, "key": "", "cosine": 1.0}
            for (s, r), g in sorted(group_of.items(), key=lambda item: item[1])]  # fmt: skip
    storage.write_bytes(f"{folder}/d.parquet", make_parquet(pa.Table.from_pylist(rows)))
    plain = Splits({"train": 0.5, "val": 0.5})
    splits = Splits({"train": 0.5, "val": 0.5}, f"{folder}/d.parquet")
    found: dict[int, set[str]] = {}
    for image in images:
        group = group_of.get((image.shard, image.row))
        if group is None:
            assert splits.find(image) == plain.find(image)
        else:
            found.setdefault(group, set()).add(splits.find(image))
    assert {len(some) for some in found.values()} == {1}
    assert {split for some in found.values() for split in some} == {"train", "val"}
    by_shard = Splits({"train": 0.5, "val": 0.5}, "shard")
    assert len({(image.shard, by_shard.find(image)) for image in images}) == 5


def test_split_folders_and_files(tmp_path: Path) -> None:
    labels = small_labels(f"{tmp_path}/labels", [f"k{i}" for i in range(40)])
    for form in FORMATS:
        dest = f"{tmp_path}/{form}"
        assert export_labels(labels, dest, form, "--split", "train=0.6,val=0.4") == 0
        index = pq.read_table(f"{dest}/_images-00000.parquet")["split"].to_pylist()
        assert set(index) == {"train", "val"}
        written = files_of(dest)
        assert any("train" in name for name in written)
        assert any("val" in name for name in written)
    train, val = (
        read_json(f"{tmp_path}/coco/annotations/instances_{s}.json") for s in ("train", "val")
    )
    ids = [image["id"] for image in train["images"] + val["images"]]
    assert sorted(ids) == list(range(1, 41))
    images = {a["image_id"] for a in val["annotations"]}
    assert images <= {image["id"] for image in val["images"]}


def test_commands_in_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, _ = photo_labels(str(tmp_path), "tar")
    monkeypatch.chdir(tmp_path)
    columns = {"shard": ["a.tar"], "row": [1], "group": [0]}
    (tmp_path / "duplicates.parquet").write_bytes(make_parquet(columns))
    text = (Path(__file__).parent.parent / "docs" / "exports.md").read_text(encoding="utf-8")
    commands = re.findall(r"^clipseg-ray export (LABELS .*)", text, re.MULTILINE)
    assert len(commands) == 4
    for i, command in enumerate(commands):
        arguments = command.replace("LABELS", labels).replace("DEST", f"dest-{i}").split()
        assert export.main(arguments) == 0, command


# Images


def photos(folder: str, form: str) -> tuple[str, list[bytes]]:
    """A source of three images, the second turned by EXIF; each 40 x 60 as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = [encode((40, 60)), encode((40, 60), exif=exif), encode((40, 60), "PNG")]
    if form == "tar":
        members = [(f"{i}.{'png' if i == 2 else 'jpg'}", d) for i, d in enumerate(data)]
        storage.write_bytes(f"{folder}/in/a.tar", make_tar(members))
        return "a.tar", data
    if form == "parquet":
        column = hugging_face_column([{"bytes": d, "path": None} for d in data])
        storage.write_bytes(f"{folder}/in/a.parquet", make_parquet({"image": column}))
        return "a.parquet", data
    for i, d in enumerate(data):
        storage.write_bytes(f"{folder}/in/{i}.{'png' if i == 2 else 'jpg'}", d)
    return "images-00000", data


def photo_labels(folder: str, form: str) -> tuple[str, list[bytes]]:
    shard, data = photos(folder, form)
    rows = []
    for i in range(3):
        size = (60, 40) if i == 1 else (40, 60)
        facts = {"orientation": 6 if i == 1 else 1, "format": "PNG" if i == 2 else "JPEG"}
        rows.append((image_row(shard, i, str(i), size, **facts), random_blobs(i, size)))
    return write_labels(f"{folder}/labels", rows, source=f"{folder}/in"), data


@pytest.mark.parametrize("form", ["tar", "parquet", "folder"])
def test_images_are_copied_as_they_are(form: str, folder: str) -> None:
    labels, data = photo_labels(folder, form)
    assert export.main([labels, f"{folder}/dest", "--format", "coco"]) == 0
    content = read_json(f"{folder}/dest/annotations/instances_train.json")
    for image, before in zip(content["images"], data, strict=True):
        path = f"{folder}/dest/images/train/{image['file_name']}"
        assert storage.read_bytes(path) == before
        assert path.endswith(".png" if image["row"] == 2 else ".jpg")


def test_images_of_several_inputs(tmp_path: Path) -> None:
    for name in ("x", "y"):
        photos(f"{tmp_path}/{name}", "tar")
    rows = [(image_row(f"{n}/in/a.tar", 0, "0", (40, 60)), []) for n in ("x", "y")]
    source = f"{tmp_path}/x/in::{tmp_path}/y/in"
    labels = write_labels(f"{tmp_path}/labels", rows, source=source)
    assert export.main([labels, f"{tmp_path}/y/in/d", "--format", "coco"]) == 2
    assert export.main([labels, f"{tmp_path}/dest", "--format", "coco"]) == 0
    assert len(list(Path(tmp_path, "dest/images/train").iterdir())) == 2


def test_every_format_that_is_decoded_has_an_ending() -> None:
    for form in (*_formats(), "MPO"):
        image = replace(labelled("a", 0, "k"), format=form)
        assert name_file("x", image, "copy") != "x.img", form


def test_upright_turns_only_what_is_turned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, data = photo_labels(str(tmp_path), "tar")
    assert export.main([labels, f"{tmp_path}/c", "--format", "coco"]) == 0
    assert (
        "images turned by their EXIF orientation, with upright masks: 1;" in capsys.readouterr().out
    )
    assert export.main([labels, f"{tmp_path}/u", "--format", "coco", "--images", "upright"]) == 0
    assert "turned" not in capsys.readouterr().out
    content = read_json(f"{tmp_path}/u/annotations/instances_train.json")
    for image, before in zip(content["images"], data, strict=True):
        after = storage.read_bytes(f"{tmp_path}/u/images/train/{image['file_name']}")
        assert (after == before) == (image["row"] != 1)
        # As a trainer opens it: the size of its mask, and nothing left to turn.
        picture = Image.open(io.BytesIO(after))
        assert (picture.height, picture.width) == (image["height"], image["width"])
        assert picture.getexif().get(0x0112, 1) == 1
        if image["row"] == 1:  # red grew to the right, and grows downwards once turned by 90°
            pixels = np.asarray(picture).astype(int)
            assert pixels[-5, 20, 0] > pixels[5, 20, 0] + 100
            assert pixels[30, 5, 1] > pixels[30, -5, 1] + 100


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_holds_the_images(form: str, tmp_path: Path) -> None:
    labels, data = photo_labels(str(tmp_path), "folder")
    assert export.main([labels, f"{tmp_path}/dest", "--format", form]) == 0
    if form == "hf":
        rows = pq.read_table(tmp_path / "dest/data/train-00000.parquet").to_pylist()
        assert [row["image"]["bytes"] for row in rows] == data
    else:
        written = list(files_of(f"{tmp_path}/dest").values())
        assert all(some in written for some in data)


def test_images_of_a_run_that_was_made_from_a_run(tmp_path: Path) -> None:
    run_, data = photo_labels(str(tmp_path), "tar")
    rows = [(image_row("a.tar", 0, "0", (40, 60)), random_blobs(0, (40, 60)))]
    labels = write_labels(f"{tmp_path}/again", rows)
    record = read_json(f"{labels}/_run.json")
    record["config"] = {"input": run_}
    storage.write_bytes(f"{labels}/_run.json", json.dumps(record).encode())
    assert export.main([labels, f"{tmp_path}/dest", "--format", "labelme"]) == 0
    (path,) = Path(tmp_path, "dest/train").glob("*.jpg")
    assert path.read_bytes() == data[0]


def test_an_export_among_the_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, _ = photo_labels(str(tmp_path), "folder")
    assert export.main([labels, f"{tmp_path}/in/export", "--format", "png"]) == 2
    assert "lies inside the images' folder" in capsys.readouterr().err


def test_images_that_have_changed_end_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, _ = photo_labels(str(tmp_path), "tar")
    storage.write_bytes(f"{tmp_path}/in/a.tar", make_tar([("0.jpg", encode((40, 60)))]))
    assert export.main([labels, f"{tmp_path}/dest", "--format", "coco"]) == 1
    assert "a.tar has changed since it was labelled; --images none" in capsys.readouterr().err
    storage.delete_file(f"{tmp_path}/in/a.tar")
    storage.write_bytes(f"{tmp_path}/in/b.tar", make_tar([]))
    assert export.main([labels, f"{tmp_path}/dest", "--format", "coco"]) == 1
    assert "a.tar: not in" in capsys.readouterr().err


# The folder


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_was_stopped_is_run_again(form: str, tmp_path: Path) -> None:
    stop_and_run_again(form, str(tmp_path))


@pytest.mark.parametrize("form", ["coco", "hf"])  # one file in the end, and several by and by
def test_an_export_into_a_bucket_is_run_again(form: str, bucket: str) -> None:
    stop_and_run_again(form, bucket)


def stop_and_run_again(form: str, folder: str) -> None:
    labels, _ = photo_labels(folder, "tar")
    whole, dest = f"{folder}/whole", f"{folder}/dest"
    assert export.main([labels, whole, "--format", form]) == 0
    wanted = files_of(whole)
    marker = read_json(f"{whole}/_export.json")
    assert marker["status"] == "complete"
    assert (marker["images"], marker["annotations"]) == (3, 6)
    for name, data in list(wanted.items())[::2]:  # as a killed one leaves it
        if name != "_export.json":
            storage.write_bytes(f"{dest}/{name}", data[: len(data) // 2])
    stopped = {"status": "running", "asked": marker["asked"]}
    storage.write_bytes(f"{dest}/_export.json", json.dumps(stopped).encode())
    assert export.main([labels, dest, "--format", form, "--images", "upright"]) == 2
    assert export.main([labels, dest, "--format", form]) == 0
    found = files_of(dest)
    assert found.keys() == wanted.keys()
    for name, data in wanted.items():
        assert found[name].replace(dest.encode(), whole.encode()) == data, name


KILLED = """
import os, signal, sys
from pipeline.annotations.export import export_labels
from pipeline.config.export import ExportConfig
seen = []
def on_image(total):
    seen.append(total)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
export_labels(ExportConfig(labels=sys.argv[1], dest=sys.argv[2], format=sys.argv[3]), on_image)
"""


def test_an_export_that_was_killed_is_completed_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, _ = photo_labels(str(tmp_path), "tar")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert export.main([labels, f"{tmp_path}/whole", "--format", "labelme"]) == 0
    assert not list(temporary.iterdir())
    command = [sys.executable, "-c", KILLED, labels, f"{tmp_path}/dest", "labelme"]
    env = {**os.environ, "TMPDIR": str(temporary)}
    killed = subprocess.run(command, env=env, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_json(f"{tmp_path}/dest/_export.json")["status"] == "running"
    (left,) = temporary.iterdir()
    (temporary / "clipseg-ray-export-mine").mkdir()  # without a lock: just being made
    assert export.main([labels, f"{tmp_path}/dest", "--format", "labelme"]) == 0
    assert [path.name for path in temporary.iterdir()] == ["clipseg-ray-export-mine"]
    assert not left.exists()
    wanted, found = files_of(f"{tmp_path}/whole"), files_of(f"{tmp_path}/dest")
    # A file that was just being written stays, hidden: whose it was is not known.
    found = {name: data for name, data in found.items() if not name.endswith(".tmp")}
    told = found["_export.json"].replace(b"/dest/", b"/whole/")
    assert found | {"_export.json": told} == wanted


def test_an_export_at_work_keeps_its_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = TemporaryFolder()
    second = TemporaryFolder()
    assert {first.path, second.path} == set(tmp_path.iterdir())
    first.cleanup()
    assert list(tmp_path.iterdir()) == [second.path]
    second.cleanup()


def test_other_folders_are_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = small_labels(f"{folder}/labels", ["a", "b"])
    dest = f"{folder}/dest"
    storage.write_bytes(f"{folder}/other/x.txt", b"mine")
    assert export_labels(labels, dest) == 0
    said = capsys.readouterr().out
    before = files_of(dest)
    assert export_labels(labels, dest) == 0
    assert capsys.readouterr().out == said.rstrip("\n") + "\n  nothing was left to do\n"
    assert files_of(dest) == before
    assert export_labels(labels, dest, "yolo") == 2
    assert "holds another export, finished" in capsys.readouterr().err
    for where, says in [
        (f"{folder}/other", "holds files that are not from an export"),
        (labels, "lies inside LABELS"),
        (f"{labels}/x", "lies inside LABELS"),
    ]:
        assert export_labels(labels, where) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert storage.read_bytes(f"{folder}/other/x.txt") == b"mine"
    marker = read_json(f"{dest}/_export.json")
    for content in (b"{}", b"[", json.dumps({**marker, "status": "running"}).encode()):
        storage.write_bytes(f"{dest}/_export.json", content)
        assert export_labels(labels, dest, "cvat") == 2
    assert "with other options (format)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--split", "train=0.8"], "add up to 0.8, not 1"),
        (["--split", "train=0.8,train=0.2"], "train is there twice"),
        (["--split", "train=0.8,Train=0.2"], "is there twice"),
        (["--split", "../x=1"], "cannot name a split"),
        (["--split", "a=x"], "no share in"),
        (["--split", "a=-1,b=2"], "must be above 0"),
        (["--split", "a=nan"], "must be above 0"),
        (["--group", "colour"], "--group colour: no such file, and none of shard, key, member"),
        (["--counts", "list", "--format", "yolo"], "only --format coco"),
    ],
)
def test_wrong_usage_is_one_line(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = small_labels(f"{tmp_path}/labels", ["a"])
    assert export_labels(labels, f"{tmp_path}/dest", "coco", *options) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "dest").exists()


def test_labels_that_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = small_labels(f"{tmp_path}/labels", ["a", "b"])
    success = storage.read_bytes(f"{labels}/_SUCCESS")
    storage.delete_file(f"{labels}/_SUCCESS")
    assert export_labels(labels, f"{tmp_path}/d") == 2
    assert "not finished" in capsys.readouterr().err
    assert export_labels(f"{tmp_path}/nothing", f"{tmp_path}/d") == 2
    assert "not the output of clipseg-ray label" in capsys.readouterr().err
    storage.write_bytes(f"{labels}/_SUCCESS", success)
    storage.write_bytes(f"{labels}/annotations/zz.parquet", b"PAR1")
    assert export_labels(labels, f"{tmp_path}/d") == 1
    assert "annotations/zz.parquet has no images/zz.parquet" in capsys.readouterr().err
    other = write_labels(f"{tmp_path}/other", [(image_row("a", 0, "k", SMALL), [])], fingerprint={})
    assert export_labels(other, f"{tmp_path}/d") == 2
    assert "names no classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"row": 9}, "has no row 9 in its place"),
        ({"class_id": 3}, "of class 3 of 3"),
        ({"area": 0}, "empty mask"),
        ({"rle": {"size": [4, 5], "counts": "d0"}}, "make the labels at the size of the images"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    image = image_row("a", 0, "k", SMALL)
    labels = write_labels(str(tmp_path), [(image, random_blobs(0, SMALL))])
    rows = annotation_rows(image, random_blobs(0, SMALL))
    rows[-1] |= change
    (path,) = Path(tmp_path, "annotations").glob("*.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.ANNOTATIONS), path)
    with pytest.raises(JobError, match=says):
        list(read_labels(labels, path.name, 3))


def test_classes_without_annotations_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.ones(SMALL, np.uint8)
    labels = write_labels(f"{tmp_path}/l", [(image_row("a", 0, "k", SMALL), [(1, mask)])])
    assert export_labels(labels, f"{tmp_path}/d", "hf") == 0
    said = capsys.readouterr().out
    assert "1 images (0 without annotations), 1 annotations" in said
    assert "warning: no annotations of cat, Straßenbahn & <co>" in said


def test_a_table_of_groups_must_be_one(tmp_path: Path) -> None:
    for columns, says in [
        ({"shard": ["a"], "row": [1]}, "no column 'group'"),
        ({"shard": ["a"], "row": [1], "group": [0.5]}, "whole numbers"),
    ]:
        pq.write_table(pa.table(columns), tmp_path / "g.parquet")
        with pytest.raises(UsageError, match=says):
            Splits({"train": 1.0}, str(tmp_path / "g.parquet"))


def test_the_default_is_one_split() -> None:
    config = ExportConfig(labels="a", dest="b", format="coco")
    assert config.shares() == {"train": 1.0}
    assert len(name_image(labelled("a", 0, "x"))) > 20
