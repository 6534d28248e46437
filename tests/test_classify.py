"""The classify job on a real local Ray: equal to transformers, and the same from a table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from embeddings import embedding_part, random_vectors, write_part, write_table
from PIL import Image
from shards import make_tar

from jobs import classify, embed
from pipeline import schema
from pipeline.config.classify import ClassifyConfig
from pipeline.embeddings.source import ReadEmbeddings, open_embeddings
from pipeline.embeddings.vectors import EmbeddingTable
from pipeline.errors import CheckpointError, UsageError
from pipeline.infer.checkpoint import Checkpoint
from pipeline.infer.classify import (
    Classifier,
    ClassifyVectors,
    open_classifier,
    rank_labels,
)
from pipeline.model.weights import hash_weights
from pipeline.prepare.processor import ImageProcessor
from pipeline.read.shard import Shard, shard_to_row
from pipeline.run.finished import list_finished
from pipeline.run.manifest import name_run
from tests.pictures import PIXELS, photos

LABELS = ["cat", "red star", "{}", "猫", "a dog's 12"]
TEMPLATES = ["a photo of a {}.", "the {}", "{} !! circle"]


def save(model: Any, folder: Path) -> Path:
    """A checkpoint in the hub's file layout."""
    checkpoints.save(model, folder)
    checkpoints.write_vocabulary(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP whose logits differ from image to image and from label to label."""
    model = checkpoints.small_clip()
    model.logit_scale.data.fill_(3.7)
    return save(model, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(checkpoints.small_clipseg(), tmp_path_factory.mktemp("clipseg"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint of an image classifier with seven classes."""
    torch.manual_seed(0)
    names = {i: f"class {i}" for i in range(7)}
    config = transformers.CLIPConfig(
        text_config=checkpoints.TEXT,
        vision_config=checkpoints.VISION,
        projection_dim=checkpoints.PROJECTION,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    model = transformers.CLIPForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.2)
    return save(model, tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs and one that is none; a shard without any image that can be read; an empty
    one."""
    folder = tmp_path_factory.mktemp("shards")
    images = [(f"{i}.jpg", image) for i, image in enumerate(photos())]
    (folder / "0.tar").write_bytes(make_tar([*images[:2], ("bad.jpg", b"<html>"), *images[2:]]))
    (folder / "1.tar").write_bytes(make_tar([("x.jpg", b""), ("y.jpg", b"<html>")]))
    (folder / "2.tar").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("labels") / "labels.txt"
    file.write_text("\n\n".join(LABELS) + "\n", encoding="utf-8")
    return file


def run(source: Path, output: Path, *options: object) -> int:
    return classify.main([str(source), str(output), "--quiet", "--local", *map(str, options)])


def templates(*some: str) -> list[str]:
    return [argument for template in some for argument in ("--template", template)]


def read(output: Path, table: str = "labels") -> Any:
    frame = polars.read_parquet(output / table / "*.parquet")
    return frame.sort("shard", "row", *(["rank"] if table == "labels" else []))


def pixels(model: Path) -> torch.Tensor:
    config = json.loads((model / "preprocessor_config.json").read_text())
    pictures = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos()]
    return transformers.ViTImageProcessorPil(**config)(pictures, return_tensors="pt").pixel_values


@torch.inference_mode()
def reference(model: Path, some: list[str]) -> np.ndarray:
    """What transformers gives for the photographs and LABELS: logits (4, C)."""
    if json.loads((model / "config.json").read_text())["model_type"] == "clip":
        oracle = transformers.CLIPModel.from_pretrained(model).eval()
    else:  # its own loader of the part would draw the weights at random
        oracle = transformers.CLIPSegForImageSegmentation.from_pretrained(model).eval().clip
    tokenizer = transformers.CLIPTokenizer.from_pretrained(model)
    length = checkpoints.TEXT["max_position_embeddings"]
    means = []
    for label in LABELS:
        texts = [template.replace("{}", label) for template in some]
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        each = torch.nn.functional.normalize(oracle.get_text_features(**ids).pooler_output, dim=-1)
        means.append(torch.nn.functional.normalize(each.mean(0), dim=-1))
    images = oracle.get_image_features(pixels(model)).pooler_output
    images = torch.nn.functional.normalize(images, dim=-1)
    logits = (images @ torch.stack(means).T) * oracle.logit_scale.exp()
    if len(some) == 1:  # then the model itself says the same
        texts = [some[0].replace("{}", label) for label in LABELS]
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        whole = oracle(pixel_values=pixels(model), **ids).logits_per_image
        assert torch.allclose(whole, logits, atol=1e-5)
    return logits.numpy()


def assert_ranked(frame: Any, logits: np.ndarray, names: list[str], top: int) -> None:
    """The rows of the photographs are the best labels of these logits."""
    order = np.argsort(-logits, axis=1)[:, :top]
    wanted = torch.softmax(torch.from_numpy(logits), 1).numpy()
    assert frame["rank"].to_list() == list(range(top)) * 4
    assert frame["row"].to_list() == np.repeat([0, 1, 3, 4], top).tolist()
    assert frame["key"].to_list() == np.repeat(["0", "1", "2", "3"], top).tolist()
    assert frame["label_id"].to_list() == order.reshape(-1).tolist()
    assert frame["label"].to_list() == [names[i] for i in order.reshape(-1)]
    found = frame["probability"].to_numpy().reshape(4, top)
    assert found == pytest.approx(np.take_along_axis(wanted, order, 1), rel=1e-4)
    found = frame["logit"].to_numpy().reshape(4, top)
    assert found == pytest.approx(np.take_along_axis(logits, order, 1), rel=1e-4, abs=1e-5)


# ------------------------------------------------------------------------------ the job


def test_images_and_their_embeddings_give_what_the_reference_does(
    tmp_path: Path, shards: Path, clip: Path, labels: Path
) -> None:
    asked = ["--labels", labels, *templates(*TEMPLATES), "--top", 3]
    assert run(shards, tmp_path / "images", "--model", clip, *asked) == 0
    frame = read(tmp_path / "images")
    assert_ranked(frame, reference(clip, TEMPLATES), LABELS, 3)
    errors = read(tmp_path / "images", "errors")
    assert errors.filter(polars.col("shard") == "0.tar")["reason"].to_list() == ["not_an_image"]
    assert set(errors["reason"]) == {"not_an_image", "image_empty", "shard_empty"}
    counts = json.loads((tmp_path / "images" / "_run.json").read_text())["counts"]
    assert (counts["rows_in"], counts["images"], counts["rows_error"]) == (7, 4, 3)

    # Un-normalised vectors, and read by the folder of the parts.
    table = tmp_path / "vectors"
    raw = ["--model", str(clip), "--no-normalize", "--quiet", "--local"]
    assert embed.main([str(shards), str(table), *raw]) == 0
    assert run(table / "embeddings", tmp_path / "out", *asked) == 0
    again = read(tmp_path / "out")
    ids = ["shard", "row", "key", "rank", "label_id", "label"]
    assert again.select(ids).equals(frame.select(ids))
    assert np.abs(again["probability"].to_numpy() - frame["probability"].to_numpy()).max() < 1e-6
    assert read(tmp_path / "out", "errors").equals(errors)
    assert not (tmp_path / "out" / "images").exists()
    found = json.loads((tmp_path / "out" / "_run.json").read_text())["counts"]
    assert found == {name: n for name, n in counts.items() if name != "images"}
    for name in ("images", "out"):
        for part in (tmp_path / name / "labels").glob("*.parquet"):
            metadata = pq.read_schema(part).metadata
            assert metadata[b"clipseg_ray.model"].decode() == str(clip)
            assert metadata[b"clipseg_ray.weights_hash"].decode() == hash_weights(clip)


def test_a_clipseg_checkpoint_and_the_template_of_its_own(
    tmp_path: Path, shards: Path, clipseg: Path, labels: Path
) -> None:
    assert run(shards, tmp_path, "--model", clipseg, "--labels", labels, "--top", 50) == 0
    assert_ranked(read(tmp_path), reference(clipseg, ["a photo of a {}."]), LABELS, len(LABELS))


def test_a_head_has_labels_of_its_own(tmp_path: Path, shards: Path, head: Path) -> None:
    assert run(shards, tmp_path, "--model", head) == 0
    oracle = transformers.CLIPForImageClassification.from_pretrained(head).eval()
    with torch.inference_mode():
        logits = oracle(pixels(head)).logits.numpy()
    assert_ranked(read(tmp_path), logits, [f"class {i}" for i in range(7)], 5)


def test_a_table_that_grows_is_completed_later(
    tmp_path: Path, clip: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run with other labels is another run."""
    facts = {"model": str(clip), "weights_hash": hash_weights(clip)}
    vectors = random_vectors(9, checkpoints.PROJECTION).astype(np.float16)
    table, output = tmp_path / "table", tmp_path / "out"
    write_part(str(table), embedding_part(vectors[:5], "a/0.tar"), **facts)
    (table / "_run.json").write_text("{}")
    assert run(table, output, "--labels", labels, "--top", 2) == 0
    said = capsys.readouterr().err
    assert "its run is not finished" in said
    assert said.count("\n") == 1
    first = read(output)
    write_part(str(table), embedding_part(vectors[5:], "a/1.tar"), **facts)
    (table / "_SUCCESS").write_text(name_run({}))
    assert run(table, output, "--labels", labels, "--top", 2) == 0
    assert capsys.readouterr().err == ""
    both = read(output)
    assert both.filter(polars.col("shard") == "a/0.tar").equals(first)
    assert both.select("shard", "row").unique().height == 9
    assert run(table, output, "--labels", labels, "--top", 2, *templates("{}")) == 2
    assert "templates was" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the stages


def records(count: int) -> Any:
    """schema.VECTORS of images that came out well, without their vectors."""
    empty = {f.name: "" if f.type == "string" else 0 for f in schema.RANKED}
    empty = {name: value for name, value in empty.items() if name not in RANKS}
    rows = [empty | {"shard": "s", "row": i, "retryable": False} for i in range(count)]
    columns = schema.pa.schema([f for f in schema.RANKED if f.name not in RANKS])
    return schema.pa.Table.from_pylist(rows, schema=columns)


RANKS = ("label_id", "probability", "logit")


def test_ties_are_ranked_by_label_id() -> None:
    logits = np.tile([1.0, 3.0, 1.0, 3.0 + 1e-12, 3.0], (2, 1))
    ranked = rank_labels(records(2), np.ones(2, bool), logits, 4)
    assert ranked["label_id"].to_pylist() == [[1, 3, 4, 0]] * 2
    assert ranked["label_id"].type.value_type == "int32"


def test_an_image_without_finite_logits_fails_alone() -> None:
    logits = np.array([[1.0, 2.0], [np.nan, 1.0], [np.inf, 0.0]])
    ranked = rank_labels(records(4), np.array([True, True, False, True]), logits, 1)
    assert ranked["label_id"].to_pylist() == [[1], [], [], []]
    assert ranked["reason"].to_pylist() == ["", "model_failed", "", "model_failed"]
    assert set(ranked["stage"].to_pylist()) == {"", "classify"}


HEADS: dict[str, dict[str, Any]] = {
    "softmax": {"num_labels": 3},
    "single label": {"num_labels": 3, "problem_type": "single_label_classification"},
    "multi label": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "one label": {"num_labels": 1},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "regressions": {"num_labels": 3, "problem_type": "regression"},
}


@pytest.mark.parametrize("kind", HEADS)
def test_probabilities_of_a_head_are_the_pipelines(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    sizes = {"text_config": checkpoints.TEXT, "vision_config": checkpoints.VISION}
    config = transformers.CLIPConfig(**sizes, projection_dim=checkpoints.PROJECTION, **HEADS[kind])
    model = transformers.CLIPForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=2)
    folder = save(model, tmp_path / "head")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    processor = transformers.ViTImageProcessorPil(**settings)
    oracle = transformers.pipeline("image-classification", model=model, image_processor=processor)
    pictures = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos()]
    wanted = oracle(pictures, top_k=2)
    classifier = open_classifier(str(folder), ClassifyConfig(input="in", output="out", top=2))
    logits = model(pixels(folder)).logits.double().detach().numpy()
    assert (
        classifier.function
        == {"s": "softmax", "m": "sigmoid", "o": "sigmoid", "r": "none"}[kind[0]]
    )
    good = np.ones(4, bool)
    ranked = rank_labels(records(4), good, logits, classifier.top, classifier.function)
    for found, labels, answers in zip(
        ranked["probability"].to_pylist(), ranked["label_id"].to_pylist(), wanted, strict=True
    ):
        assert found == pytest.approx([answer["score"] for answer in answers], rel=1e-4)
        assert [classifier.labels[i] for i in labels] == [answer["label"] for answer in answers]


def test_a_problem_type_that_is_none_is_named(tmp_path: Path, head: Path) -> None:
    config = json.loads((head / "config.json").read_text()) | {"problem_type": "ranking"}
    folder = checkpoints.copy_with(head, tmp_path / "head", config=config)
    with pytest.raises(CheckpointError, match=r"config\.json: problem_type is 'ranking', not one"):
        open_classifier(str(folder), ClassifyConfig(input="in", output="out"))


def test_labels_given_twice_keep_their_ids(tmp_path: Path, clip: Path) -> None:
    """Both are ranked, and both have their share of the probability."""
    (tmp_path / "labels").write_text("cat\nred star\n12\nred star\ncat\n")
    config = ClassifyConfig(input="in", output="out", labels=str(tmp_path / "labels"), top=5)
    classifier = open_classifier(str(clip), config)
    assert classifier.labels == ["cat", "red star", "12", "red star", "cat"]
    assert np.array_equal(classifier.vectors[1], classifier.vectors[3])
    (note,) = classifier.notes
    assert note.startswith("2 labels are given more than once, each with a label_id of its own: ")
    assert note.endswith("'cat', 'red star'")
    logits = classifier.logits(random_vectors(3, checkpoints.PROJECTION))
    ranked = rank_labels(records(3), np.ones(3, bool), logits, 5)
    for ids in ranked["label_id"].to_pylist():
        assert sorted(ids) == [0, 1, 2, 3, 4]
        assert ids.index(3) == ids.index(1) + 1


def test_labels_that_are_cut_are_named(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "labels").write_text("cat\n" + "red " * 20 + "\n")
    asked = {"input": "in", "output": "out", "labels": str(tmp_path / "labels")}
    (note,) = open_classifier(str(clip), ClassifyConfig(**asked)).notes
    assert note.startswith("1 label is longer than the 14 tokens that the model reads: 'red red")
    (tmp_path / "labels").write_text("red " * 30 + "\n" + "red " * 20 + "\n")
    with pytest.raises(UsageError, match=r"the labels 'red .* do not differ in the 14 tokens"):
        open_classifier(str(clip), ClassifyConfig(**asked))


def test_large_logits_do_not_overflow() -> None:
    ranked = rank_labels(records(1), np.ones(1, bool), np.array([[5e3, -5e3]]), 2, "sigmoid")
    assert ranked["probability"].to_pylist() == [[1.0, 0.0]]
    ranked = rank_labels(records(1), np.ones(1, bool), np.array([[5000.0, 4999.0]]), 2)
    assert ranked["probability"].to_pylist()[0] == pytest.approx([0.7310586, 0.2689414])


def vector_records(
    table: EmbeddingTable, shard: Shard, batch_rows: int = 1024
) -> Iterator[pa.Table]:
    """A shard of a finished table as the stage reads it."""
    read = ReadEmbeddings(table, batch_rows=batch_rows)
    return read(pa.Table.from_pylist([shard_to_row(shard)]))


def test_vectors_without_a_direction_fail(clip: Path, tmp_path: Path) -> None:
    vectors = random_vectors(4, 6)
    vectors[1], vectors[2, 0] = 0, np.nan
    table = open_embeddings(write_table(str(tmp_path), vectors, parts=1))
    assert table is not None
    classifier = Classifier(
        checkpoint=Checkpoint(
            name="x", config={}, weights_hash="", processor=ImageProcessor.from_folder(clip)
        ),
        labels=["a", "b"],
        templates=["{}"],
        vectors=random_vectors(2, 6, seed=1).astype(np.float64),
        scale=10.0,
        top=2,
    )
    (shard,) = list_finished(table.output, "embeddings")
    stage = ClassifyVectors(classifier)
    ranked = [row for t in vector_records(table, shard) for row in stage(t).to_pylist()]
    assert [row["reason"] for row in ranked] == ["", "model_failed", "model_failed", "", ""]
    assert [len(row["label_id"]) for row in ranked] == [2, 0, 0, 2, 0]


# ------------------------------------------------------------------------------ the table


def test_every_row_of_a_shard_is_accounted_for(tmp_path: Path) -> None:
    """Rows with vectors, rows that failed, and rows of which the table knows nothing."""
    part = embedding_part(random_vectors(5), "a.tar").filter([True, True, False, True, False])
    write_part(str(tmp_path), part)
    write_part(str(tmp_path), embedding_part(random_vectors(0), ""))
    errors = [
        {"shard": "a.tar", "row": 4, "key": "k4", "stage": "decode", "reason": "image_corrupt"},
        {"shard": "a.tar", "row": None, "key": None, "stage": "read", "reason": "shard_truncated"},
    ]
    errors = [error | {"detail": "why", "retryable": True} for error in errors]
    (tmp_path / "errors").mkdir()
    columns = schema.pa.Table.from_pylist(errors, schema=schema.ERRORS)
    pq.write_table(columns, tmp_path / "errors" / "a.tar.parquet")
    # Row 0 failed when prompts were added to the run, which has its vector all the same.
    later = schema.pa.Table.from_pylist([errors[0] | {"row": 0}], schema=schema.ERRORS)
    pq.write_table(later, tmp_path / "errors" / "a.tar.from-2.parquet")
    table = open_embeddings(str(tmp_path))
    assert table is not None
    (shard,) = list_finished(table.output, "embeddings")
    assert (shard.name, len(shard.files)) == ("a.tar", 2)
    batches = list(vector_records(table, shard, batch_rows=2))
    assert all(batch.schema == schema.VECTORS for batch in batches)
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert [(r["row"], r["key"], r["stage"], r["reason"]) for r in rows] == [
        (0, "key-0", "", ""),
        (1, "key-1", "", ""),
        (3, "key-3", "", ""),
        (2, "", "read", "no_vector"),
        (4, "k4", "decode", "image_corrupt"),
        (-1, "", "read", "shard_truncated"),
    ]
    assert [row["total"] for row in rows] == [-1] * 5 + [5]
    assert [row["detail"] for row in rows[4:]] == ["why", "why"]


def test_a_damaged_part_is_the_failure_of_its_shard(tmp_path: Path) -> None:
    write_table(str(tmp_path), random_vectors(3000, 64))
    table = open_embeddings(str(tmp_path))
    assert table is not None
    shard = list_finished(table.output, "embeddings")[1]
    path = tmp_path / "embeddings" / "01.tar.parquet"
    data = bytearray(path.read_bytes())
    data[100_000:200_000] = bytes(100_000)
    path.write_bytes(data)
    *_, end = [r for t in vector_records(table, shard, batch_rows=50) for r in t.to_pylist()]
    assert (end["row"], end["reason"]) == (-1, "shard_corrupt")
    assert "01.tar.parquet" in end["detail"]
    path.unlink()
    (end,) = [r for t in vector_records(table, shard) for r in t.to_pylist()]
    assert (end["row"], end["total"], end["reason"]) == (-1, 0, "shard_missing")


def test_what_holds_images_is_no_table(tmp_path: Path, shards: Path) -> None:
    pq.write_table(schema.pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    for source in (tmp_path, tmp_path / "a.parquet", shards, shards / "0.tar", "/no/such/*.tar"):
        assert open_embeddings(str(source)) is None


# ------------------------------------------------------------------------------ wrong usage


def test_wrong_usage_is_one_line(
    tmp_path: Path,
    shards: Path,
    clip: Path,
    head: Path,
    labels: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = {"model": "./other", "weights_hash": "ab" * 32}
    table = write_table(str(tmp_path / "t"), random_vectors(9, checkpoints.PROJECTION), **facts)
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    good = ["--labels", labels, "--model", clip]
    crop = {"image_processor_type": "CLIPImageProcessor", "crop_size": 48}
    small = checkpoints.copy_with(clip, tmp_path / "small", preprocessor_config=crop)
    small_head = checkpoints.copy_with(head, tmp_path / "small head", preprocessor_config=crop)
    for source, options, says in [
        (shards, ["--model", clip], "needs --labels FILE"),
        (shards, [*good, "--template", "a photo"], "--template 'a photo': must contain {} exactly"),
        (shards, [*good, "--template", "{} {}"], "must contain {} exactly once"),
        (shards, [*good, "--top", "0"], "--top 0: must be at least 1"),
        (shards, ["--model", clip, "--labels", tmp_path / "gone"], "No such file"),
        (shards, ["--model", clip, "--labels", tmp_path / "blank"], "no labels in it"),
        (shards, ["--model", clip, "--labels", tmp_path / "bytes"], "not a UTF-8 text file"),
        (shards, ["--model", head, "--labels", labels], "--labels: "),
        (shards, ["--model", head, "--template", "{}"], "7 labels of its own"),
        (table, ["--model", head], "its head classifies images"),
        (table, good, f"but {clip} has the weights {hash_weights(clip)[:16]}"),
        (table, good, "the model ./other with the weights abababababababab"),
        (table, ["--labels", labels], "; --model says where the model of this table is"),
        (tmp_path / "gone", good, "no such file or folder"),
        (shards, ["--labels", labels, "--model", small], "image is 48 x 48 pixels"),
        (shards, ["--model", small_head], "image is 48 x 48 pixels"),
    ]:
        assert run(Path(source), tmp_path / "out", *options) == 2, options
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
