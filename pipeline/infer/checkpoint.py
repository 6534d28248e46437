"""The one way to open a checkpoint, and its description as the driver hands it to the actors.

Stands between the models, which know torch alone, and the stages: every job's model is named,
loaded, described and recognised again in the same way.

Shapes: P texts, E projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from pipeline.config.options import Precision
from pipeline.errors import CheckpointError, JobError
from pipeline.infer.device import Device
from pipeline.infer.fetch import DEMO, fetch
from pipeline.infer.texts import (
    Progress,
    describe_cut,
    describe_vocabulary,
    encode_texts,
    find_cut,
    longest_text,
    name_texts,
)
from pipeline.model.check import read_config
from pipeline.model.clip import CLIP, TextTower, VisionTower
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.encoders import ImageClassifier, ImageEncoder, TextEncoder
from pipeline.model.tokenizer import Tokenizer
from pipeline.prepare.processor import ImageProcessor

Model = TypeVar("Model", bound=CLIPSeg | CLIP | TextEncoder | ImageEncoder | ImageClassifier)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Description of a model, without its weights."""

    name: str
    """As the user gave it: a folder, a hub id, an s3:// URI."""
    config: dict[str, Any]
    weights_hash: str
    processor: ImageProcessor
    tokenizer_hash: str = ""
    """Tokenizer.content_hash, where texts are encoded."""
    precision: Precision = "float32"
    """Of weights and activations on the actors: see device.Device. The driver's are float32."""

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.config.get("projection_dim") or 512)

    def fingerprint(self) -> dict[str, Any]:
        """Facts of the model deciding the results of a run."""
        return {
            "weights_hash": self.weights_hash,
            "model_config": self.config,
            "preprocessing": asdict(self.processor),
            "tokenizer_hash": self.tokenizer_hash,
            "dtype": self.precision,
        }


class OpenModel(Generic[Model]):
    """The model of a checkpoint on a device, with the tokenizer and image processor beside it.

    These two are read, and held against the model's towers, when they are first asked for.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[Path], tuple[Model, str]],
        device: Device,
    ):
        """Fetch `name` and `load` its folder, as a model's from_folder does.

        Raises CheckpointError naming the wrong file, field or tensor.
        """
        self.name, self.device = name, device
        self.folder = fetch(name)
        model, self.weights_hash = load(self.folder)
        device.place(model)
        self.model = model

    @classmethod
    def on_worker(
        cls, known: Checkpoint, load: Callable[[Path], tuple[Model, str]], device: Device
    ) -> OpenModel[Model]:
        """The model described by the driver. Raises JobError if its weights are others here."""
        found = cls(known.name, load, device)
        if found.weights_hash != known.weights_hash:
            raise JobError(f"{known.name}: this worker finds other weights than the driver did")
        return found

    @cached_property
    def processor(self) -> ImageProcessor:
        """The folder's image processor. Raises CheckpointError if it is not the vision tower's."""
        if isinstance(self.model, TextEncoder):
            raise TypeError("a text encoder takes no images")
        return open_processor(self.folder, self.model.vision_model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer. Raises CheckpointError if it is not the text tower's."""
        return open_tokenizer(self.folder, self._text_model().text_model)

    def describe(self, precision: Precision = "float32", *, texts: bool) -> Checkpoint:
        """The checkpoint of a model for images, to be run in a precision on the actors; with
        `texts`, of one for texts, too."""
        return Checkpoint(
            name=self.name,
            config=read_config(self.folder),
            weights_hash=self.weights_hash,
            processor=self.processor,
            tokenizer_hash=self.tokenizer.content_hash if texts else "",
            precision=precision,
        )

    def encode_texts(self, texts: Sequence[str], on_progress: Progress | None = None) -> Tensor:
        """Projected embeddings (P, E) float32 on the CPU of at least one text, not normalised.

        See texts.encode_texts.
        """
        model = self._text_model()
        tower = model.text_model
        return encode_texts(
            model.encode_text, tower, self.tokenizer, texts, self.device, on_progress
        )

    def describe_texts(
        self, names: Sequence[str], what: str, templates: Sequence[str] = ("{}",)
    ) -> list[str]:
        """Lines for the user on the texts of a job; `what` they are there: "prompt".

        Raises UsageError for different texts cut to the same tokens.
        """
        tower = self._text_model().text_model
        cut = find_cut(tower, self.tokenizer, names, what, templates)
        return [
            *describe_vocabulary(tower, self.tokenizer),
            *describe_cut(cut, what, longest_text(tower)),
            *(self._describe_unlearnt(names, what) if self.name == DEMO else []),
        ]

    def _describe_unlearnt(self, names: Sequence[str], what: str) -> list[str]:
        """A line on texts with words spelt in letters by the bundled model's vocabulary."""
        new = [name for name in names if len(self.tokenizer.encode(name)) > len(name.split()) + 2]
        return name_texts(new, what, "not in the bundled model's vocabulary, of coloured shapes")

    def _text_model(self) -> CLIPSeg | CLIP | TextEncoder:
        if isinstance(self.model, ImageEncoder | ImageClassifier):
            raise TypeError("an image encoder takes no texts")
        return self.model


def open_processor(folder: Path, tower: VisionTower) -> ImageProcessor:
    """The image processor of a checkpoint folder.

    Raises CheckpointError if its images have no common size, or one unfit for the checkpoint's
    vision tower.
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
