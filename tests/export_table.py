"""All exports of 50 random masks and back: a table of IoUs, as docs/exports.md has it.

    python tests/export_table.py                 # write into a temporary folder, and read
    python tests/export_table.py write FOLDER    # with this project installed
    python tests/export_table.py read FOLDER     # anywhere: whatever can be imported there reads

The readers that pull in much (LARGE in export_readers.py) are left out where they are missing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from export_readers import LARGE, TOLD, Truth, compare

FORMATS = ("coco", "coco-list", "yolo", "voc", "labelme", "labelstudio", "cvat", "png", "hf", "sam")


def write(folder: Path, *, images: int = 25, size: tuple[int, int] = (480, 640)) -> None:
    """Labels of `images` pictures with two masks each and of one without, every export of them,
    and the masks themselves."""
    from label_tables import CLASSES, encode, image_row, random_blobs, write_labels

    from jobs import export
    from pipeline import storage
    from pipeline.annotations.labelled import LabelledImage
    from pipeline.annotations.splits import name_image

    blobs = {f"photo {i}": random_blobs(i, size) for i in range(images)} | {"nothing": []}
    for key in blobs:
        storage.write_bytes(f"{folder}/photos/{key}.jpg", encode(size))
    rows = [image_row("images-00000", i, key, size) for i, key in enumerate(sorted(blobs))]
    labels = [(row, blobs[row["key"]]) for row in rows]
    write_labels(f"{folder}/labels", labels, source=f"{folder}/photos")
    for name in FORMATS:
        form, _, counts = name.partition("-")
        options = ["--counts", counts] if counts else []
        command = [f"{folder}/labels", f"{folder}/{name}", "--format", form, *options]
        assert export.main(command) == 0
    truth = {}
    for row, found in labels:
        known = {name: row[name] for name in LabelledImage.__dataclass_fields__ if name in row}
        truth[name_image(LabelledImage(**known, instances=()))] = found
    arrays = {f"{n}/{i}": mask for n, found in truth.items() for i, (_, mask) in enumerate(found)}
    np.savez_compressed(folder / "truth.npz", **arrays)
    names = {n: [CLASSES[c][0] for c, _ in found] for n, found in truth.items()}
    (folder / "truth.json").write_text(json.dumps(names))


def read_truth(folder: Path) -> Truth:
    """The masks that went in, by the name of their image."""
    names = json.loads((folder / "truth.json").read_text())
    with np.load(folder / "truth.npz") as arrays:
        return {
            name: [(label, arrays[f"{name}/{i}"] > 0) for i, label in enumerate(labels)]
            for name, labels in names.items()
        }


def read(folder: Path) -> None:
    """Print a row for each reader that is there."""
    truth = read_truth(folder)
    print("| format | reader | masks | IoU mean | least |\n| --- | --- | --- | --- | --- |")
    for name, reader, function, how in [*TOLD, *LARGE]:
        try:
            ious = compare(truth, function(folder / name), how)
        except ImportError as error:
            print(f"{name}: {reader}: {error}", file=sys.stderr)
            continue
        mean, least = f"{np.mean(ious):.5f}", f"{min(ious):.5f}"
        print(f"| {name} | {reader} | {len(ious)} | {mean} | {least} |", flush=True)


def main() -> None:
    """See the module's docstring."""
    if len(sys.argv) == 3:
        {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]).absolute())
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        read(Path(folder))


if __name__ == "__main__":
    main()
