"""Peers of the embed job, each a command of its own:

    python -m benchmarks.embed_peers loop|ray_data|chain SHARDS OUTPUT MODEL

loop: one process, transformers and Pillow, in batches. ray_data: a Ray Data job as Ray's own
image embedding example writes it (read, a preprocessing function per row, an actor class in
map_batches, write_parquet). chain: the stages of our own job, written by Ray's write_parquet:
without fragments, parts, receipts and the account of every row.

All use as many threads for the model as there are CPUs, batches of 16, and write key and vector of
length 1.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

BATCH = 16


class EmbedBatch:
    """transformers' CLIP on the CPU: {"pixel_values": (B, 3, H, W)} -> {"vector": (B, E)}."""

    def __init__(self, folder: str):
        import torch
        from transformers import CLIPModel

        torch.set_num_threads(os.cpu_count() or 1)
        self.model = CLIPModel.from_pretrained(folder).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            pixels = torch.as_tensor(np.asarray(batch["pixel_values"]))
            vectors = self.model.get_image_features(pixel_values=pixels).pooler_output
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return {"key": batch["key"], "vector": vectors.numpy()}


def read_tars(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(key, encoded bytes) of every member."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file:
                    yield member.name.partition(".")[0], file.read()


def loop(source: Path, output: Path, model: str) -> None:
    """A batch at a time: decode, preprocess, embed; one Parquet file."""
    from transformers import AutoImageProcessor

    processor, embed = AutoImageProcessor.from_pretrained(model), EmbedBatch(model)
    keys: list[str] = []
    vectors: list[np.ndarray] = []
    rows = list(read_tars(source))
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in batch]
        pixels = processor(images, return_tensors="np")["pixel_values"]
        keys += [key for key, _ in batch]
        vectors.append(embed({"key": None, "pixel_values": pixels})["vector"])
    output.mkdir()
    table = pa.table({"key": keys, "vector": list(np.concatenate(vectors))})
    pq.write_table(table, output / "vectors.parquet")


def ray_data(source: Path, output: Path, model: str) -> None:
    """Ray's example, on tars: bytes from read_webdataset, as its own decoder is far slower.

    Whole CPUs for all, Ray's default: it then runs the preprocessing in the model's actor, which is
    faster on two cores than tasks of half a CPU beside it (26 s against 92 s for 1,000 images).
    """
    import ray
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(row["jpg"])).convert("RGB")
        pixels = processor(image, return_tensors="np")["pixel_values"][0]
        return {"key": row["__key__"], "pixel_values": pixels}

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [str(path) for path in sorted(source.glob("*.tar"))]
    (
        ray.data.read_webdataset(paths, decoder=None)
        .map(preprocess)
        .map_batches(
            EmbedBatch,
            fn_constructor_args=(model,),
            batch_size=BATCH,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(str(output))
    )


def chain(source: Path, output: Path, model: str) -> None:
    """jobs/embed.py up to the vectors, then Ray's own writer."""
    from pipeline.config.options import WorkerOptions
    from pipeline.infer.embed import EmbedImages, open_embedder
    from pipeline.prepare.images import PrepareImages
    from pipeline.read.inputs import list_shards
    from pipeline.read.records import read_batches
    from pipeline.run.session import open_ray
    from pipeline.run.source import dataset_of
    from pipeline.schema import embeddings
    from pipeline.write.rows import embedding_rows

    embedder = open_embedder(model, text=False, normalize=True, dtype="float32")
    columns = embeddings(embedder.checkpoint.dimension, "float32", {}, text=False)

    def vectors_of(batch: pa.Table) -> pa.Table:
        return embedding_rows(batch.filter(pc.greater_equal(batch["row"], 0)), columns)

    with open_ray(WorkerOptions(batch_size=BATCH)) as engine:
        (
            dataset_of(list_shards(str(source)).shards)
            .map_batches(read_batches, **engine.read)
            .map_batches(PrepareImages(embedder.checkpoint.processor, 50_000_000), **engine.task)
            .map_batches(
                EmbedImages,
                fn_constructor_args=(embedder, engine.device, engine.threads),
                **engine.actor,
            )
            .map_batches(vectors_of, **engine.task)
            .write_parquet(str(output), ray_remote_args={"num_cpus": engine.task["num_cpus"]})
        )


PEERS = {"loop": loop, "ray_data": ray_data, "chain": chain}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
