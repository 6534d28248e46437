"""Options of `clipseg-ray reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.config.options import check_file, check_positive
from pipeline.errors import UsageError

DataSet = Literal["phrasecut", "pascal-5i", "coco-20i"]
PromptKind = Literal["text", "image"]


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Measure a CLIPSeg on a data set of its paper, by the paper's settings, beside its figures."""

    data_set: Annotated[tyro.conf.Positional[DataSet], tyro.conf.arg(metavar="DATASET")]
    """phrasecut, pascal-5i or coco-20i."""

    data: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Local folder of the data set in its own layout; docs/reproduce.md."""

    model: str
    """CLIPSeg checkpoint, as `segment` takes it."""

    prompt: PromptKind | None = None
    """Name the class by a text, or by an example image with its mask. By default text for
    phrasecut, image for the others."""

    folds: tuple[int, ...] = (0, 1, 2, 3)
    """Folds of pascal-5i and coco-20i; figures are means over them."""

    seed: int = 0
    """Of the choice of classes and examples."""

    limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Samples of each fold, for a trial; by default all of them, 1,000 of coco-20i."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display."""

    def __post_init__(self) -> None:
        check_file("--data", self.data)
        check_positive(self, "limit")
        if self.data_set == "phrasecut" and self.prompt == "image":
            raise UsageError("--prompt image: phrasecut has phrases alone; leave it out")
        if not self.folds or not set(self.folds) <= {0, 1, 2, 3}:
            raise UsageError(f"--folds {' '.join(map(str, self.folds))}: must be among 0 1 2 3")

    @property
    def kind(self) -> PromptKind:
        """The kind of prompt used."""
        return self.prompt or ("text" if self.data_set == "phrasecut" else "image")
