"""The embed job on a real local Ray, and its tables in readers that we did not write."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import checkpoints
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from shards import make_parquet, make_tar

from jobs import embed, segment
from pipeline import schema
from pipeline.infer.embed import EmbedImages, open_embedder
from tests.pictures import PIXELS, photos

DIMENSION = checkpoints.PROJECTION
CLIP_ALWAYS = ["clip", pytest.param("clipseg", marks=pytest.mark.soak)]


@pytest.fixture(scope="session", params=["clip", "clipseg"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint in the hub's file layout."""
    folder = tmp_path_factory.mktemp(request.param)
    made = checkpoints.small_clip() if request.param == "clip" else checkpoints.small_clipseg()
    checkpoints.save(made, folder)
    checkpoints.write_vocabulary(folder)
    # Of another size than the position table where the model takes that.
    side = 64 if request.param == "clip" else 96
    size = {"size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS | size))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs and one that is none, in a tar."""
    folder = tmp_path_factory.mktemp("shards")
    images = [(f"{i}.jpg", image) for i, image in enumerate(photos())]
    (folder / "0.tar").write_bytes(make_tar([*images[:2], ("bad.jpg", b"<html>"), *images[2:]]))
    return folder


def run(shards: Path, output: Path, model: Path, *options: str) -> None:
    assert (
        embed.main(
            [str(shards), str(output), "--model", str(model), "--quiet", "--local", *options]
        )
        == 0
    )


def read(output: Path) -> Any:
    return polars.read_parquet(output / "embeddings" / "*.parquet").sort("shard", "row")


@torch.inference_mode()
def reference(model: Path) -> np.ndarray:
    """What transformers gives for the photographs, not normalised: (4, DIMENSION)."""
    kind = json.loads((model / "config.json").read_text())["model_type"]
    loader = transformers.CLIPModel if kind == "clip" else transformers.CLIPSegModel
    if kind == "clip":
        oracle = loader.from_pretrained(model).eval()
    else:  # its own loader of the part would draw the weights at random
        oracle = transformers.CLIPSegForImageSegmentation.from_pretrained(model).eval().clip
    config = json.loads((model / "preprocessor_config.json").read_text())
    processor = transformers.ViTImageProcessorPil(**config)
    pictures = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos()]
    pixels = processor(pictures, return_tensors="pt").pixel_values
    return oracle.get_image_features(pixels).pooler_output.numpy()


def assert_every_part_tells_what_it_holds(output: Path, model: Path) -> None:
    record = json.loads((output / "_run.json").read_text())["fingerprint"]
    parts = list((output / "embeddings").glob("*.parquet"))
    assert len(parts) == 2
    for part in parts:
        file = pq.ParquetFile(part)
        metadata = file.schema_arrow.metadata
        assert metadata[b"clipseg_ray.weights_hash"].decode() == record["weights_hash"]
        assert metadata[b"clipseg_ray.model"].decode() == str(model)
        assert metadata[b"clipseg_ray.dimension"] == str(DIMENSION).encode()
        assert metadata[b"clipseg_ray.normalized"] == b"true"
        if file.metadata.num_rows:
            column = file.metadata.row_group(0).column(3)
            assert column.path_in_schema == "vector.list.element"
            assert "BYTE_STREAM_SPLIT" in column.encodings
            assert not {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & set(column.encodings)


def test_vectors_equal_the_reference(tmp_path: Path, shards: Path, model: Path) -> None:
    run(shards, tmp_path, model)
    frame = read(tmp_path)
    assert frame.select("row", "key").rows() == [(0, "0"), (1, "1"), (3, "2"), (4, "3")]
    expected = reference(model)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(frame["vector"].to_numpy() - expected).max() < 1e-4
    errors = polars.read_parquet(tmp_path / "errors" / "*.parquet")
    assert errors.select("row", "key", "reason").rows() == [(2, "bad", "not_an_image")]
    counts = json.loads((tmp_path / "_run.json").read_text())["counts"]
    assert (counts["rows_in"], counts["embeddings"], counts["rows_error"]) == (5, 4, 1)
    assert_every_part_tells_what_it_holds(tmp_path, model)


@pytest.mark.parametrize("model", CLIP_ALWAYS, indirect=True)
def test_vectors_as_the_model_gives_them(tmp_path: Path, shards: Path, model: Path) -> None:
    run(shards, tmp_path, model, "--no-normalize", "--dtype", "float16")
    frame = read(tmp_path)
    expected = reference(model)
    found = np.array(frame["vector"].to_list(), np.float32)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_one_pass_gives_masks_and_embeddings(
    tmp_path: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(checkpoints.small_clipseg(), folder)
    checkpoints.write_vocabulary(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    common = [
        "--model",
        str(folder),
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--quiet",
        "--local",
    ]
    assert segment.main([str(shards), str(tmp_path / "both"), *common, "--embed"]) == 0
    assert segment.main([str(shards), str(tmp_path / "masks"), *common]) == 0
    run(shards, tmp_path / "vectors", folder)
    both, vectors = read(tmp_path / "both"), read(tmp_path / "vectors")
    assert both.select("shard", "row", "key").equals(vectors.select("shard", "row", "key"))
    assert np.abs(both["vector"].to_numpy() - vectors["vector"].to_numpy()).max() < 1e-6
    masks = [
        polars.read_parquet(tmp_path / name / "masks" / "*.parquet").sort("row", "prompt_id")
        for name in ("both", "masks")
    ]
    assert masks[0].equals(masks[1])


CAPTIONS = ["a cat", "猫 don't", "", "a red star of 12"]


def write_texts(folder: Path, form: str) -> str:
    """The photographs with captions beside them; returns the column's name."""
    folder.mkdir()
    if form == "parquet":
        columns = {"image": pa.array(photos(), pa.binary()), "caption": CAPTIONS}
        (folder / "0.parquet").write_bytes(make_parquet(columns))
    elif form == "json":
        texts = [json.dumps({"caption": text, "url": "x"}).encode() for text in CAPTIONS]
        pairs = zip(photos(), texts, strict=True)
        members = [
            (f"{i}.{e}", d)
            for i, p in enumerate(pairs)
            for e, d in zip(("jpg", "json"), p, strict=True)
        ]
        (folder / "0.tar").write_bytes(make_tar(members))
    elif form == "txt":
        pairs = zip(photos(), CAPTIONS, strict=True)
        both = [((f"{i}.jpg", p), (f"{i}.txt", t.encode())) for i, (p, t) in enumerate(pairs)]
        (folder / "0.tar").write_bytes(make_tar([member for pair in both for member in pair]))
    else:
        for i, (photo, text) in enumerate(zip(photos(), CAPTIONS, strict=True)):
            (folder / f"{i}.jpg").write_bytes(photo)
            (folder / f"{i}.txt").write_text(text)
    return "caption"


@pytest.mark.parametrize(
    "form",
    ["parquet", "txt", *(pytest.param(form, marks=pytest.mark.soak) for form in ("json", "files"))],
)
def test_texts_beside_the_images(
    form: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    oracle = checkpoints.small_clip()
    checkpoints.save(oracle, folder)
    checkpoints.write_vocabulary(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    column = write_texts(tmp_path / "in", form)
    run(tmp_path / "in", tmp_path / "out", folder, "--text-column", column)
    frame = read(tmp_path / "out")
    assert frame["text"].to_list() == CAPTIONS
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = oracle.get_text_features(**ids).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    assert np.abs(frame["text_vector"].to_numpy() - expected).max() < 1e-4


def pixels_of(*texts: str) -> pa.Table:
    """schema.PIXELS of random images with these texts, and the end of the shard."""
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.PIXELS}
    empty |= {"shard": "s", "pixels": b"", "retryable": False}
    images = np.random.default_rng(0).integers(0, 255, (len(texts), 64, 64, 3), np.uint8)
    rows = [
        empty | {"row": i, "text": text, "pixels": image.tobytes()}
        for i, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    return pa.Table.from_pylist([*rows, empty | {"row": -1}], schema=schema.PIXELS)


@pytest.mark.parametrize(
    ("tensor", "factor", "options"),
    [
        ("visual_projection.weight", 3e38, {"normalize": True, "dtype": "float32"}),
        ("visual_projection.weight", 1e6, {"normalize": False, "dtype": "float16"}),
        ("text_projection.weight", 1e6, {"normalize": False, "dtype": "float16"}),
    ],
)
def test_an_embedding_that_overflows_fails_as_a_row(
    tensor: str, factor: float, options: Any, tmp_path: Path
) -> None:
    checkpoints.save(checkpoints.small_clip(), tmp_path)
    checkpoints.write_vocabulary(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    checkpoints.change_tensors(tmp_path, lambda t: t[tensor].mul_(factor).clamp_(-3e38, 3e38))
    actor = EmbedImages(open_embedder(str(tmp_path), text=True, **options), "cpu")
    rows = actor(pixels_of("a cat", "red")).to_pylist()
    assert [row["reason"] for row in rows] == ["model_failed", "model_failed", ""]
    assert {(r["stage"], r["detail"]) for r in rows[:2]} == {
        ("embed", f"the embedding is not finite as {options['dtype']}")
    }
    assert not any(row["vector"] or row["text_vector"] for row in rows)


def test_a_long_embedding_is_normalised_and_not_lost(tmp_path: Path) -> None:
    """Its length overflows float32, its numbers do not."""
    checkpoints.save(checkpoints.small_clip(), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    checkpoints.change_tensors(tmp_path, lambda t: t["visual_projection.weight"].mul_(1e30))
    options: Any = {"text": False, "normalize": True, "dtype": "float32"}
    table = EmbedImages(open_embedder(str(tmp_path), **options), "cpu")(pixels_of("", ""))
    data = b"".join(vector.as_buffer() for vector in table["vector"])
    vectors = np.frombuffer(data, np.float32).reshape(2, -1)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


@pytest.mark.parametrize("model", CLIP_ALWAYS, indirect=True)
def test_an_image_without_its_text_is_an_error(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    members = [("a.jpg", photos()[0]), ("b.jpg", photos()[1]), ("b.txt", b"a cat")]
    (tmp_path / "in" / "0.tar").write_bytes(make_tar(members))
    run(tmp_path / "in", tmp_path / "out", model, "--text-column", "caption")
    assert read(tmp_path / "out")["key"].to_list() == ["b"]
    errors = polars.read_parquet(tmp_path / "out" / "errors" / "*.parquet")
    assert errors.select("key", "reason").rows() == [("a", "no_text")]


CROP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}}


@pytest.mark.parametrize(
    ("made", "processor", "options", "says"),
    [
        (transformers.CLIPVisionModel, PIXELS, [], "has no visual_projection.weight"),
        (transformers.CLIPForImageClassification, PIXELS, [], "has no visual_projection.weight"),
        (transformers.CLIPTextModelWithProjection, PIXELS, [], "it has no vision tower"),
        (
            transformers.CLIPVisionModelWithProjection,
            PIXELS,
            ["--text-column", "caption"],
            "is a clip_vision_model, one tower alone",
        ),
        (
            transformers.CLIPModel,
            CROP | {"crop_size": 48},
            [],
            "image is 48 x 48 pixels; without interpolated positions this model takes 64 x 64",
        ),
        (transformers.CLIPModel, CROP | {"do_center_crop": False}, [], "have no common size"),
        (
            transformers.CLIPModel,
            PIXELS,
            ["--text-column", "caption"],
            "the tokenizer has 558 tokens, the model 557",
        ),
    ],
)
def test_a_model_that_cannot_embed_is_told_before_anything_starts(
    made: Any, processor: Any, options: list[str], says: str, tmp_path: Path, shards: Path, capsys
) -> None:
    config = checkpoints.small_clip().config
    part = {"Text": config.text_config, "Vision": config.vision_config}
    model = made(next((part[name] for name in part if name in made.__name__), config))
    checkpoints.save(model, tmp_path / "m")
    merges = [*checkpoints.small_merges(), ("a</w>", "an</w>")]  # one more than the model knows
    checkpoints.write_vocabulary(tmp_path / "m", merges)
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(processor))
    arguments = [str(shards), str(tmp_path / "out"), "--model", str(tmp_path / "m"), "--quiet"]
    assert embed.main([*arguments, *options]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_text_column_that_is_not_there(tmp_path: Path, model: Path, capsys) -> None:
    write_texts(tmp_path / "in", "parquet")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(model)]
    assert embed.main([*arguments, "--text-column", "title"]) == 2
    assert "no column 'title' of text" in capsys.readouterr().err


@pytest.fixture(scope="session")
def table(
    tmp_path_factory: pytest.TempPathFactory, shards: Path
) -> tuple[Path, np.ndarray, list[str]]:
    """A finished output, its vectors and its keys in the order of the rows."""
    output, folder = tmp_path_factory.mktemp("table"), tmp_path_factory.mktemp("model")
    checkpoints.save(checkpoints.small_clip(), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    run(shards, output, folder)
    frame = read(output)
    return output, frame["vector"].to_numpy(), frame["key"].to_list()


def test_duckdb_ranks_by_cosine(table) -> None:
    output, vectors, keys = table
    query = vectors[2]
    found = duckdb.execute(
        f"""SELECT key, list_cosine_similarity(vector, ?::FLOAT[{DIMENSION}]) AS cosine
            FROM '{output}/embeddings/*.parquet' ORDER BY cosine DESC""",
        [query.tolist()],
    ).fetchall()
    order = np.argsort(-(vectors @ query))
    assert [row[0] for row in found] == [keys[i] for i in order]
    assert found[0][1] == pytest.approx(1, abs=1e-5)


def test_pandas_reads_it(table) -> None:
    pandas = pytest.importorskip("pandas")
    output, vectors, _ = table
    frame = pandas.read_parquet(output / "embeddings").sort_values("row")
    assert np.array_equal(np.stack(frame["vector"]), vectors)


def test_hugging_face_datasets_reads_it(table, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    output, vectors, _ = table
    found = datasets.load_dataset(
        "parquet", data_dir=str(output / "embeddings"), split="train", cache_dir=str(tmp_path)
    )
    assert found.features["vector"].length == DIMENSION
    assert np.array_equal(np.array(found["vector"], np.float32), vectors)


def test_lancedb_searches_it(table, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    output, vectors, keys = table
    made = lancedb.connect(tmp_path).create_table("images", pq.read_table(output / "embeddings"))
    hits = made.search(vectors[1]).metric("cosine").limit(4).to_list()
    assert [hit["key"] for hit in hits] == [keys[i] for i in np.argsort(-(vectors @ vectors[1]))]
