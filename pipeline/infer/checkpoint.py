"""A checkpoint as the driver hands it to the actors.

Stands between the models, which know torch alone, and the stages: every job's model is named,
described and recognised again in the same way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, JobError
from pipeline.model.clip import TextTower, VisionTower
from pipeline.model.tokenizer import Tokenizer
from pipeline.prepare.processor import ImageProcessor


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What decides the results of a model: no weights inside."""

    name: str
    """What the user called it: a folder, a hub id, an s3:// URI."""
    config: dict[str, Any]
    weights_hash: str
    processor: ImageProcessor
    tokenizer_hash: str = ""
    """Tokenizer.content_hash, where texts are encoded."""

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.config.get("projection_dim") or 512)

    def fingerprint(self) -> dict[str, Any]:
        """What of the model decides the results of a run."""
        return {
            "weights_hash": self.weights_hash,
            "model_config": self.config,
            "preprocessing": asdict(self.processor),
            "tokenizer_hash": self.tokenizer_hash,
            "dtype": "float32",
        }

    def check_worker(self, weights_hash: str) -> None:
        """Raise JobError if a worker found other weights under this name than the driver did."""
        if weights_hash != self.weights_hash:
            raise JobError(f"{self.name}: this worker finds other weights than the driver did")


def open_processor(folder: Path, tower: VisionTower) -> ImageProcessor:
    """The image processor of a checkpoint folder.

    Raises CheckpointError where its images have no common size, or one that the checkpoint's
    vision tower does not take.
    """
    processor = ImageProcessor.from_folder(folder)
    size = processor.image_size
    try:
        tower.check_size(*size)
    except ValueError as error:
        raise CheckpointError(f"{folder}: after its image processor an {error}") from error
    return processor


def open_tokenizer(folder: Path, tower: TextTower) -> Tokenizer:
    """A checkpoint folder's tokenizer. Raises CheckpointError if it is not the text tower's."""
    tokenizer = Tokenizer.from_folder(folder)
    known = tower.embeddings.token_embedding.num_embeddings
    if tokenizer.vocab_size > known:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {known}"
        )
    return tokenizer
