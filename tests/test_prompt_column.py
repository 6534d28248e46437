"""Prompts of each image's own: read, encoded once, segmented as --prompt would, accounted for."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shards import make_tar, shards_of
from transformers import AutoTokenizer, CLIPSegForImageSegmentation

from jobs import label, segment
from pipeline.config.segment import SegmentConfig
from pipeline.demo import MODEL
from pipeline.demo.scenes import draw_scene
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.device import Device
from pipeline.infer.phrases import PhraseVectors
from pipeline.infer.segment import SegmentImages, open_segmenter
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.images import PrepareImages
from pipeline.read.inputs import list_shards
from pipeline.read.records import read_batches, read_shard
from pipeline.read.shard import MAX_PHRASES, as_phrases, shard_to_row
from pipeline.run.manifest import name_run
from pipeline.run.resume import find_left, list_passes
from pipeline.write.layout import Ledger

ROOT = Path(__file__).parent.parent
WANTED = as_phrases("caption")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_scene(np.random.default_rng((8, seed))).image).save(file, "PNG")
    return file.getvalue()


def phrases_of(path: Path) -> list[Any]:
    """Of each row: its phrases, or why it failed."""
    (shard,) = list_shards(str(path), text_column=WANTED).shards
    rows = [record for record in read_shard(shard) if record["row"] >= 0]
    assert all(bool(row["image"]) == (not row["reason"]) for row in rows)
    return [row["reason"] or (json.loads(row["text"]) if row["text"] else []) for row in rows]


def parquet(path: Path, captions: list[Any], kind: pa.DataType) -> Path:
    columns = {"image": [png(i) for i in range(len(captions))]}
    table = pa.table({**columns, "caption": pa.array(captions, kind)})
    pq.write_table(table, path)
    return path


def test_phrases_are_read_from_columns_fields_and_texts(tmp_path: Path) -> None:
    texts = [" a star ", "", None, '["no list"]', "x" * 70_000]
    found = phrases_of(parquet(tmp_path / "a.parquet", texts, pa.string()))
    assert found == [["a star"], [], [], ['["no list"]'], "text_too_long"]
    lists = [["star", " moon"], [], None, ["", None, "ring"], ["p"] * (MAX_PHRASES + 1)]
    wanted = [["star", "moon"], [], [], ["ring"], "text_too_long"]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        assert phrases_of(parquet(tmp_path / "b.parquet", lists, kind)) == wanted
    fields = ['{"caption": ["star", 5, "moon"]}', '{"caption": "ring"}', '{"other": 1}', "{", "[]"]
    fields += [r'{"caption": "half \ud83d"}']
    members = [(f"{i}.json", text.encode()) for i, text in enumerate(fields)]
    members += [(f"{i}.png", png(i)) for i in range(len(fields) + 1)]
    members += [("9.png", png(9)), ("9.txt", b"from a text\n")]
    (tmp_path / "c.tar").write_bytes(make_tar(sorted(members)))
    wanted = [["star", "moon"], ["ring"], [], [], [], [r"half \xed\xa0\xbd"], [], ["from a text"]]
    assert phrases_of(tmp_path / "c.tar") == wanted


def logits_of(path: Path, **options: Any) -> tuple[pa.Table, SegmentImages]:
    """What the stages make of the one shard of a path."""
    own = "prompts" not in options
    spec = open_segmenter(str(MODEL), options.pop("prompts", []), per_row=own)
    actor = SegmentImages(spec, "cpu", **options)
    (shard,) = list_shards(str(path), text_column=WANTED).shards
    records = pa.concat_tables(read_batches(pa.Table.from_pylist([shard_to_row(shard)])))
    prepare = PrepareImages(spec.checkpoint.processor, 10**7)
    pixels = prepare(records)
    return pa.concat_tables(list(actor(pixels))), actor


def arrays(table: pa.Table) -> dict[int, np.ndarray]:
    """By row, (P, h, w)."""
    found = {}
    for row in table.to_pylist():
        if row["row"] >= 0:
            flat = np.frombuffer(row["logits"], np.float32)
            found[row["row"]] = flat.reshape(-1, row["logits_height"], row["logits_width"])
    return found


@pytest.mark.parametrize("block_bytes", [1, 4 * 160 * 160 * 2, 2**26])
def test_own_phrases_give_the_bits_of_the_same_prompts(block_bytes: int, tmp_path: Path) -> None:
    captions = [["star", "blue"], None, ["blue"], ["a purple star", "blue", "star"], []]
    path = parquet(tmp_path / "a.parquet", captions, pa.list_(pa.string()))
    own, actor = logits_of(path, block_bytes=block_bytes)
    names = ["blue", "star", "a purple star"]
    every, _ = logits_of(path, prompts=names)
    found, expected = arrays(own), arrays(every)
    assert sorted(found) == list(range(5))
    for row, phrases in enumerate(captions):
        wanted = expected[row][[names.index(phrase) for phrase in phrases or []]]
        assert found[row].tobytes() == wanted.tobytes()
    assert actor.phrases.encoded == 3  # equal ones once


def test_two_rows_with_other_phrases_equal_the_reference(tmp_path: Path) -> None:
    captions = ["a red circle", "something blue"]
    path = parquet(tmp_path / "a.parquet", captions, pa.string())
    own, actor = logits_of(path)
    (shard,) = shards_of(str(path))
    images = [r["image"] for r in read_shard(shard) if r["image"]]
    processor = actor.spec.checkpoint.processor
    pixels = processor([Image.open(io.BytesIO(image)).convert("RGB") for image in images])
    tokens = AutoTokenizer.from_pretrained(MODEL)(captions, padding=True, return_tensors="pt")
    reference = CLIPSegForImageSegmentation.from_pretrained(MODEL).eval()
    with torch.inference_mode():
        logits = reference(**tokens, pixel_values=pixels).logits
    ours = torch.from_numpy(np.concatenate([arrays(own)[0], arrays(own)[1]]))
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_the_last_phrases_are_remembered_and_no_more() -> None:
    vectors = PhraseVectors(OpenModel(str(MODEL), CLIPSeg.from_folder, Device("cpu")), kept=2)
    first = vectors.encode(["star", "blue", "star"])
    assert (vectors.encoded, torch.equal(first[0], first[2])) == (2, True)
    vectors.encode(["star"])
    vectors.encode(["moon"])  # blue goes: it was asked for longest ago
    assert vectors.encoded == 3
    assert torch.equal(vectors.encode(["star"])[0], first[0])
    assert vectors.encoded == 3
    assert torch.equal(vectors.encode(["a", "b", "c", "blue"])[3], first[1])
    assert vectors.encoded == 7


def rows(output: Path, table: str) -> list[dict[str, Any]]:
    return [
        row
        for p in sorted((output / table).glob("*.parquet"))
        for row in pq.read_table(p).to_pylist()
    ]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three tars, each with a row without a phrase, a broken image and a text that is too long."""
    (tmp_path / "in").mkdir()
    for k in range(3):
        members = []
        for i in range(5):
            phrases = [] if i == 1 else ["star", "blue", "ring"][: i or 1]
            field = "x" * 70_000 if i == 4 else phrases
            members.append((f"{i}.json", json.dumps({"caption": field}).encode()))
            members.append((f"{i}.png", png(10 * k + i)[: 40 if i == 2 else None]))
        (tmp_path / "in" / f"{k}.tar").write_bytes(make_tar(members))
    return tmp_path


def test_every_image_is_accounted_for_and_a_stop_is_completed(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(photos / "in"), "--model", str(MODEL), "--local", "--batch-size", "2"]
    command += ["--prompt-column", "caption", "--keep-probabilities", "88", "--embed"]
    output = photos / "out"
    assert segment.main([*command, str(output)]) == 0
    said = capsys.readouterr().out
    assert "15 images in 3 shards: 9 done, 6 failed" in said
    assert "12 masks; 3 images had no prompt" in said
    masks = rows(output, "masks")
    ids = [(m["row"], m["prompt_id"], m["prompt"]) for m in masks if m["shard"] == "1.tar"]
    assert ids == [(0, 0, "star"), (3, 0, "star"), (3, 1, "blue"), (3, 2, "ring")]
    maps = [(m["row"], m["prompt"]) for m in rows(output, "probabilities")]
    assert maps == [(m["row"], m["prompt"]) for m in masks]
    reasons = {(e["row"], e["reason"]) for e in rows(output, "errors")}
    assert {row for row, _ in reasons} == {2, 4}
    # One shard is lost, one is left in the middle: the same command makes the same parts.
    wanted = {p: p.read_bytes() for p in output.glob("*/*.parquet")}
    for path in output.glob("_receipts/1-tar*/*"):
        path.unlink()
    for path in output.glob("*/1-tar*.parquet"):
        path.unlink()
    (output / "_SUCCESS").unlink()
    assert segment.main([*command, str(output)]) == 0
    assert {p: p.read_bytes() for p in output.glob("*/*.parquet")} == wanted


def test_own_prompts_and_prompts_for_all_exclude_each_other(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(photos / "in"), str(photos / "out"), "--model", str(MODEL), "--local"]
    own = ["--prompt-column", "caption", "--keep-probabilities", "88"]
    assert segment.main([*command, *own, "--prompt", "star"]) == 2
    assert "--prompt-column caption: each image has its own prompts" in capsys.readouterr().err
    assert segment.main([*command, *own]) == 0
    assert segment.main([*command, "--prompt-column", "other"]) == 2
    assert "holds another run" in capsys.readouterr().err
    (photos / "o.yaml").write_text("classes: [star]\n")
    options = ["--ontology", str(photos / "o.yaml"), "--local"]
    assert label.main([str(photos / "out"), str(photos / "labels"), *options]) == 2
    assert "its images have prompts of their own, from 'caption'" in capsys.readouterr().err
    path = parquet(photos / "a.parquet", ["star"], pa.string())
    assert segment.main([str(path), str(photos / "x"), *command[2:], "--prompt-column", "no"]) == 2
    assert "no column 'no' of text (--prompt-column)" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from jobs import segment
class Dying(segment.WriteFragments):
    calls = 0
    def __call__(self, batch):
        Dying.calls += 1
        if Dying.calls == 7:  # in the middle of the second shard
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)
segment.WriteFragments = Dying
segment.main(sys.argv[1:])
"""


def test_rows_that_a_kill_left_in_fragments_are_not_made_again(photos: Path) -> None:
    command = [str(photos / "in"), "--model", str(MODEL), "--local", "--batch-size", "2"]
    command += ["--prompt-column", "caption"]
    assert segment.main([*command, str(photos / "calm")]) == 0
    output = photos / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command, str(output)], cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    staged = {path.name for path in output.glob("_staging/*/*.arrows")}
    assert staged
    record = json.loads((output / "_run.json").read_text())
    tables = SegmentConfig(input="in", output="out", prompt_column="caption").tables(1, "")
    ledger = Ledger(output=str(output), run=name_run(record))
    shards = list_shards(str(photos / "in"), text_column=WANTED).shards
    left = find_left(ledger, shards, tables, list_passes([ledger], tables), forget=set())
    assert {f.name for kept in left.kept.values() for f in kept} & staged
    assert any(shard.skip for shard in left.todo)
    assert segment.main([*command, str(output)]) == 0
    for table in ("images", "masks", "errors"):
        assert rows(output, table) == rows(photos / "calm", table)
