"""Fuzz targets: whatever the bytes, only our own errors come out, and soon.

    python -m tests.fuzz tar 300          # seconds; prints its seed
    python -m tests.fuzz config 300 --seed 7

A target is a function of bytes, as atheris calls it (`atheris.Setup(sys.argv, fuzz_tar)`); atheris
is not needed: the inputs here are good files with random damage. An input that fails is left in the
working folder, and the same seed makes it again.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import gzip
import io
import json
import lzma
import os
import random
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from pipeline.annotations.labelstudio import brush_rle
from pipeline.annotations.truth_coco import open_coco
from pipeline.annotations.truth_cvat import open_cvat
from pipeline.annotations.truth_labelstudio import open_labelstudio
from pipeline.errors import REASONS, CheckpointError, RowError, UsageError
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.config import CLIPSegConfig
from pipeline.prepare.processor import ImageProcessor
from pipeline.read.inflate import inflate
from pipeline.read.tar import read_tar
from tests.shards import link, make_tar

INPUT_TIMEOUT_S = 20


# --------------------------------------------------------------------------------- targets


def fuzz_tar(data: bytes) -> None:
    """Any bytes as a tar shard: samples, then nothing or a RowError with a reason of the list."""
    images = 0
    failure: RowError | None = None
    try:
        for sample in read_tar(io.BufferedReader(io.BytesIO(data)), text="caption"):  # type: ignore[arg-type]
            if sample is None:
                continue
            assert sample.reason == "" or sample.reason in REASONS
            assert not (sample.reason and sample.image)
            (sample.key + sample.member + sample.text).encode()  # nothing that Arrow refuses
            images += len(sample.image)
    except RowError as error:
        failure = error
    if failure:
        assert failure.stage == "read" and failure.reason in REASONS
        failure.detail.encode()
    if not inflate(io.BufferedReader(io.BytesIO(data))).compression:  # type: ignore[arg-type]
        assert images <= len(data)


def fuzz_config(data: bytes) -> None:
    """Any bytes as one of a checkpoint's files: a model and a processor, or a CheckpointError.

    The first byte says which file: config.json, preprocessor_config.json or the weights, the rest
    is its content.
    """
    folder, files = _checkpoint()
    name = list(files)[data[0] % len(files)] if data else "config.json"
    path = folder / name
    path.write_bytes(data[1:])
    try:
        ImageProcessor.from_folder(folder)
        CLIPSeg.from_folder(folder)
    except CheckpointError:
        pass
    finally:
        path.write_bytes(files[name])


def fuzz_truth(data: bytes) -> None:
    """Any bytes as ground truth: its images, or a UsageError of one line.

    The first byte says which: tasks of Label Studio, COCO instances, or CVAT's XML.
    """
    kind, content = (data[0] % 3, data[1:]) if data else (0, b"")
    said = ""
    try:
        if kind == 2:
            truth = open_cvat("truth.xml", content)
        else:
            try:
                value = json.loads(content)
            except (ValueError, RecursionError):
                return  # told by open_truth
            if not isinstance(value, (list, dict)[kind]):
                return
            truth = open_coco("t", value) if kind else open_labelstudio("t", value)
        for index in range(len(truth.images)):
            image = truth.read(index)
            for each in image.instances:
                assert tuple(each.rle["size"]) == image.size
    except UsageError as error:
        said = str(error)
    assert "\n" not in said


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": fuzz_tar,
    "config": fuzz_config,
    "truth": fuzz_truth,
}


# ----------------------------------------------------------------------------- good inputs


@functools.cache
def _checkpoint() -> tuple[Path, dict[str, bytes]]:
    """A folder with a small CLIPSeg of zeros, and the content of its files."""
    config: dict[str, Any] = {
        "model_type": "clipseg",
        "text_config": {"vocab_size": 9, "max_position_embeddings": 8},
        "vision_config": {"image_size": 32, "patch_size": 16},
        "projection_dim": 8,
        "extract_layers": [0, 1],
        "reduce_dim": 8,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 8,
    }
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    for name in ("text_config", "vision_config"):
        config[name] |= {**tower, "num_hidden_layers": 2}
    with torch.device("meta"):
        state = CLIPSeg(CLIPSegConfig.from_dict(config)).state_dict()
    sizes = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    files = {
        "config.json": json.dumps(config).encode(),
        "preprocessor_config.json": json.dumps(
            sizes | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
        ).encode(),
        "model.safetensors": save({k: torch.zeros(v.shape) for k, v in state.items()}),
    }
    folder = Path(_scratch().name)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    CLIPSeg.from_folder(folder)  # or every input would be refused for one reason
    return folder, files


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-")


@functools.cache
def seeds(target: str) -> list[bytes]:
    """Whole inputs of a target, good ones but for a size of a tar."""
    if target == "config":
        contents = _checkpoint()[1].values()
        return [bytes([number]) + content for number, content in enumerate(contents)]
    if target == "truth":
        return _truths()
    members: list[Any] = [
        ("a.jpg", b"one"),
        ("a.json", b'{"caption": "two"}'),
        (f"{'long/' * 40}b.png", b"three" * 200),
        ("caf\udce9.jpg", b""),
        link("c.jpg"),
        ("d.txt", b"four"),
        ("d.json", b'{"caption": "half of an emoji \\ud83d"}'),
        ("d.jpg", b"five" * 1000),
    ]
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    tars = [
        make_tar(members if f != tarfile.USTAR_FORMAT else members[:2], format=f) for f in formats
    ]
    sparse = tarfile.TarInfo("s.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    endless = tarfile.TarInfo("e.jpg")
    endless.pax_headers = {"size": "1" * 5000}
    odd = [sparse.tobuf() + bytes(1024), make_tar([endless])]
    packed = [gzip.compress(tars[1]), bz2.compress(tars[1]), lzma.compress(tars[1])]
    return [*tars, *packed, pa.compress(tars[1], "zstd", asbytes=True), *odd]


def _truths() -> list[bytes]:
    """A file of each kind, with every shape that is read."""
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:7] = 1
    shapes: list[tuple[str, dict[str, Any]]] = [
        ("brushlabels", {"rle": brush_rle(mask)}),
        ("polygonlabels", {"points": [[10, 10], [90, 10], [50, 90.5]]}),
        ("rectanglelabels", {"x": 1, "y": 2, "width": 50, "height": 30.5, "rotation": 20}),
        ("ellipselabels", {"x": 50, "y": 50, "radiusX": 20, "radiusY": 10, "rotation": 0}),
        ("choices", {"choices": ["good"]}),
    ]
    results = [
        {"type": kind, "value": value | {kind: ["a"]}, "original_height": 6, "original_width": 8}
        for kind, value in shapes
    ]
    tasks = [{"data": {"image": "/data/?d=a.jpg", "row": 3}, "annotations": [{"result": results}]}]
    rle = {"size": [6, 8], "counts": [10, 5, 33]}
    objects = [
        {"id": i, "image_id": 1, "category_id": 2, "segmentation": each}
        for i, each in enumerate([rle, [[1, 1, 5, 1, 3, 4.5]]])
    ]
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 6, "width": 8}],
        "categories": [{"id": 2, "name": "a"}],
        "annotations": objects,
    }
    xml = """<?xml version="1.0" encoding="utf-8"?><annotations><meta><task><labels><label>
<name>a</name></label></labels></task></meta><image id="0" name="a.jpg" width="8" height="6">
<mask label="a" left="2" top="1" width="3" height="2" rle="0, 4, 2"/><tag label="a"/>
<polygon label="a" points="1.5,2;7,3;4,5"><attribute name="x">1</attribute></polygon>
<box label="a" xtl="1" ytl="2" xbr="5.5" ybr="4" rotation="12"/>
<ellipse label="a" cx="4" cy="3" rx="2" ry="1" rotation="30"/></image></annotations>"""
    files = (json.dumps(tasks), json.dumps(instances), xml)
    return [bytes([kind]) + file.encode() for kind, file in enumerate(files)]


# fmt: off
TOKENS = {
    "tar": [
        b"\0" * 512, b"00000000000\0", b"77777777777\0", b"\x80\0\0\0\x7f\xff\xff\xff",
        b"ustar", b"12 path=x.jpg\n", b"18 GNU.sparse.a=1\n", b"19 size=99999999999\n",
        b"x", b"L", b"K", b"S", b"5011 size=" + b"1" * 5000 + b"\n", b"\\ud83d",
    ],
    "config": [
        b"null", b"-1", b"1e999", b"NaN", b"1000000000000", b"[]", b"{}", b'""', b"true", b"0.5",
        b"[[[[", b'"F16"', b"hidden_size", b'"\\ud800"', b"\xff", b"0", b"[1,2]",
    ],
    "truth": [
        b"null", b"-1", b"1e999", b"NaN", b"1000000", b"[]", b"{}", b'""', b"0.5", b"[[[[", b"0",
        b"<image>", b"</image>", b"<!-- -->", b"&#0;", b"&lt;", b'"', b"/>", b"<!DOCTYPE a [",
        b"9" * 9,
    ],
}
# fmt: on


def damage(random_: random.Random, target: str) -> bytes:
    """A good input with one to eight changes."""
    data = bytearray(random_.choice(seeds(target)))
    for _ in range(random_.randint(1, 8)):
        at = random_.randrange(len(data) + 1)
        end = min(len(data), at + random_.choice((1, 4, 12, 512, 5000)))
        kind = random_.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[at:end] = random_.randbytes(end - at)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            token = random_.choice(TOKENS[target])
            data[at : at + random_.choice((0, len(token)))] = token
        elif kind == 5 and target == "tar":
            _sign(data, at // 512 * 512, random_)
        elif kind == 5:
            _replace_value(data, random_)
        elif random_.random() < 0.2:
            del data[at:]
    return bytes(data)


def _sign(data: bytearray, at: int, random_: random.Random) -> None:
    """Change a field of the tar header at an offset, and make its checksum right."""
    block = data[at : at + 512]
    if len(block) == 512:
        field = random_.choice((slice(0, 100), slice(124, 136), slice(156, 157), slice(345, 500)))
        value = random_.choice(TOKENS["tar"]) + random_.randbytes(4)
        block[field] = value[: field.stop - field.start].ljust(field.stop - field.start, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[at : at + 512] = block


def _replace_value(data: bytearray, random_: random.Random) -> None:
    """Put a token in the place of a JSON value, so that the file still parses."""
    colons = [i for i, c in enumerate(data[:20_000]) if c == ord(":")]
    if colons:
        start = random_.choice(colons) + 1
        ends = [i for i in (data.find(c, start) for c in (b",", b"}")) if i >= 0]
        data[start : min(ends, default=len(data))] = random_.choice(TOKENS["config"])


# ------------------------------------------------------------------------------------- run


def fuzz(target: str, seconds: float, seed: int) -> int:
    """Feed a target damaged inputs for so long; returns how many. Raises what it lets through."""
    _checkpoint()
    end = time.monotonic() + seconds
    count = 0
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        while time.monotonic() < end:
            data = damage(random.Random(f"{seed}:{count}"), target)
            signal.alarm(INPUT_TIMEOUT_S)
            try:
                TARGETS[target](data)
            except BaseException:
                path = Path(f"fuzz-{target}-{seed}-{count}.bin")
                path.write_bytes(data)
                print(f"input {count} of seed {seed} fails: {path}", flush=True)
                raise
            count += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return count


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"an input that takes more than {INPUT_TIMEOUT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    count = fuzz(arguments.target, arguments.seconds, arguments.seed)
    print(f"{count:,} inputs, none let another error through")


if __name__ == "__main__":
    main()
