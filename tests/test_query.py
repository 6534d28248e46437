"""Queries of texts and images, equal to transformers', and the search command around them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from embeddings import (
    embedding_part,
    full_sort,
    ids_of,
    random_vectors,
    write_part,
    write_table,
)
from PIL import Image

from jobs import index, search
from pipeline import storage
from pipeline.model.weights import hash_weights

ROOT = Path(__file__).parent.parent
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP in the hub's file layout."""
    folder = tmp_path_factory.mktemp("clip")
    checkpoints.save(checkpoints.small_clip(), folder)
    checkpoints.write_vocabulary(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def table(tmp_path: Path, clip: Path) -> str:
    """The output folder of a run of that model."""
    vectors = random_vectors(200, checkpoints.PROJECTION)
    weights_hash = hash_weights(clip)
    return write_table(str(tmp_path / "t"), vectors, model=str(clip), weights_hash=weights_hash)


def reference_texts(clip: Path, texts: list[str]) -> np.ndarray:
    """Text vectors of length 1, by transformers."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(clip)
    length = checkpoints.TEXT["max_position_embeddings"]
    ids = tokens(texts, padding="max_length", max_length=length, return_tensors="pt")
    with torch.inference_mode():
        vectors = model.get_text_features(**ids).pooler_output
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def reference_image(clip: Path, image: Image.Image) -> np.ndarray:
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = transformers.CLIPImageProcessorPil(**PROCESSOR)(image, return_tensors="pt")
    with torch.inference_mode():
        vectors = model.get_image_features(**pixels).pooler_output
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()[0]


def results(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def assert_rows(rows: list[dict[str, Any]], query: np.ndarray, top: int) -> None:
    vectors = random_vectors(200, checkpoints.PROJECTION)
    (wanted,) = full_sort(vectors, query[None], top)
    assert [(row["shard"], row["row"]) for row in rows] == [found[:2] for found in wanted]
    assert [row["rank"] for row in rows] == list(range(1, top + 1))
    assert [row["cosine"] for row in rows] == pytest.approx([w[2] for w in wanted], abs=1e-5)


def test_texts_images_and_what_to_avoid_make_one_query(
    table: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 90, 3), np.uint8))
    image.save(tmp_path / "a.png")
    out = tmp_path / "out.parquet"
    options = ["--text", "a cat", "--text", "red star", "--image", str(tmp_path / "a.png")]
    minus = ["--minus", "blue", "--minus", "blue"]
    assert search.main([table, *options, *minus, "--top", "9", "--output", str(out)]) == 0
    cat, star, blue = reference_texts(clip, ["a cat", "red star", "blue"])
    assert_rows(results(out), cat + star + reference_image(clip, image) - 2 * blue, 9)
    shown = capsys.readouterr().out
    assert "a cat + red star + a.png - blue - blue" in shown
    assert all(row["key"] in shown for row in results(out))


def test_many_queries_in_one_pass(table: str, clip: Path, tmp_path: Path) -> None:
    lines = [f"{a} {b}" for a in ("a", "red", "blue") for b in ("cat", "dog", "12")] * 40
    (tmp_path / "q.txt").write_text("\n\n".join(lines))
    out = tmp_path / "out.parquet"
    options = ["--queries", str(tmp_path / "q.txt"), "--text", "star", "--top", "3", "--quiet"]
    assert search.main([table, *options, "--output", str(out)]) == 0
    rows = results(out)
    assert len(rows) == 361 * 3
    for i, vector in enumerate(reference_texts(clip, ["star", *lines])):
        assert {row["query"] for row in rows[3 * i : 3 * i + 3]} == {["star", *lines][i]}
        assert {row["query_id"] for row in rows[3 * i : 3 * i + 3]} == {i}
        assert_rows(rows[3 * i : 3 * i + 3], vector, 3)


def test_rows_of_the_table_are_queries(
    table: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By key, alone and with a text; in two parts, each with its own row group."""
    key = 'it\'s "5"'
    vectors = random_vectors(5, checkpoints.PROJECTION, seed=7)
    names = ["a", key, "same", "same", "same"]
    part = embedding_part(vectors * np.float32(3), "z.tar", keys=names)
    facts = {"model": str(clip), "weights_hash": hash_weights(clip)}
    write_part(table, part, group_rows=2, **facts)
    assert index.main([table, str(tmp_path / "i")]) == 0
    out = tmp_path / "out.parquet"
    everything = np.concatenate([random_vectors(200, checkpoints.PROJECTION), vectors])
    ids = [*ids_of(200), *(("z.tar", row) for row in range(5))]
    for source in (table, str(tmp_path / "i")):
        for text in ([], ["--text", "a cat"]):
            query = vectors[1] + (reference_texts(clip, ["a cat"])[0] if text else 0)
            options = ["--like", key, *text, "--top", "4", "--output", str(out)]
            assert search.main([source, *options]) == 0
            best = np.argsort(-(everything @ query))[:4]
            assert [(row["shard"], row["row"]) for row in results(out)] == [ids[i] for i in best]
        for other, says in (("gone", "no row has this key"), ("same", "z.tar row 2, z.tar row 3")):
            assert search.main([source, "--like", "a", "--like", other]) == 2
            said = capsys.readouterr().err
            assert f"--like {other}: " in said and says in said
            assert said.count("\n") == 1


def test_a_search_for_rows_of_the_table_needs_no_torch(tmp_path: Path) -> None:
    table = write_table(str(tmp_path), random_vectors(9), parts=1)
    code = (
        "import sys; from jobs.search import main; "
        f"assert main([{table!r}, '--like', 'key-3', '--top', '2']) == 0; "
        "assert not {'torch', 'ray', 'lancedb', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "1.0000" in done.stdout


def test_a_clipseg_checkpoint_encodes_queries(tmp_path: Path) -> None:
    folder = tmp_path / "clipseg"
    checkpoints.save(checkpoints.small_clipseg(), folder)
    checkpoints.write_vocabulary(folder)
    size = {"height": 96, "width": 96}  # not the position table's
    options = {"size": size, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    vectors = random_vectors(20, checkpoints.PROJECTION)
    facts = {"model": str(folder), "weights_hash": hash_weights(folder)}
    output = write_table(str(tmp_path / "t"), vectors, **facts)
    found = str(tmp_path / "out.parquet")
    options = ["--text", "cat", "--image", str(tmp_path / "a.png"), "--output", found]
    assert search.main([output, *options]) == 0


def test_a_model_with_other_weights_is_refused_with_both_named(
    table: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = checkpoints.copy_with(clip, tmp_path / "other")
    checkpoints.save(checkpoints.small_clip(seed=1), other)
    assert search.main([table, "--text", "cat", "--model", str(other)]) == 2
    said = capsys.readouterr().err
    for model in (clip, other):
        assert str(model) in said
        assert hash_weights(model)[:16] in said
    # The same weights under another name are the same model.
    moved = checkpoints.copy_with(clip, tmp_path / "moved")
    assert search.main([table, "--text", "cat", "--model", str(moved)]) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crop_size": 48}, "image is 48 x 48 pixels; without interpolated positions"),
        ({"do_center_crop": False}, "images have no common size"),
    ],
)
def test_a_query_image_of_a_size_that_the_model_does_not_take(
    change: dict[str, Any], says: str, table: str, clip: Path, tmp_path: Path, capsys
) -> None:
    Image.new("RGB", (90, 64), "red").save(tmp_path / "q.png")
    model = checkpoints.copy_with(clip, tmp_path / "m", preprocessor_config=PROCESSOR | change)
    assert search.main([table, "--image", str(tmp_path / "q.png"), "--model", str(model)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_wrong_usage_is_one_line(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "blank.txt").write_text("\n \n")
    write_table(str(tmp_path / "moved"), random_vectors(9), model="./gone")
    text = ["--text", "cat"]
    for arguments, says in [
        ([table], "nothing to look for"),
        ([table, *text, "--top", "0"], "--top 0"),
        ([table, "--minus", "cat"], "--minus"),
        ([table, "--text", " "], "--text: it is empty"),
        ([table, *text, "--quiet"], "--quiet"),
        ([table, "--queries", str(tmp_path / "blank.txt")], "no queries in it"),
        ([table, "--queries", str(tmp_path / "gone.txt")], "No such file"),
        ([table, "--image", str(tmp_path / "gone.png")], "gone.png: no such file"),
        ([table, "--image", str(tmp_path / "text.png")], "text.png: text, HTML"),
        ([table, *text, "--minus", "cat"], "cancels out"),
        ([table, *text, "--column", "text_vector"], "embedded no texts"),
        ([table, *text, "--gallery", str(tmp_path / "x.html")], "_run.json is gone"),
        ([table, *text, "--gallery", "x.html", "--top", "9999"], "too many for a page"),
        ([str(tmp_path / "moved"), *text], "--model says where"),
        ([str(tmp_path / "gone"), *text], "no such folder"),
        (["s3://key:secret@bucket/x", *text], "must not hold credentials"),
    ]:
        assert search.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


def test_hostile_keys_do_not_reach_the_terminal(
    table: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["\x1b]0;owned\x07", "[red]x[/red]", "a\nb"]
    part = embedding_part(random_vectors(3, checkpoints.PROJECTION), "h", keys=keys)
    write_part(str(tmp_path / "h"), part, model=str(clip), weights_hash=hash_weights(clip))
    assert search.main([str(tmp_path / "h"), "--text", "cat"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]x[/red]" in shown


def test_results_are_written_to_either_storage(table: str, folder: str) -> None:
    output = f"{folder}/deep/out.parquet"
    assert search.main([table, "--text", "cat", "--quiet", "--output", output]) == 0
    data = pq.read_table(io.BytesIO(storage.read_bytes(output)))
    assert data.num_rows == 20
