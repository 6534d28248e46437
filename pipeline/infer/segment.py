"""Pixels x prompts -> mask logits, on the actors with the model.

Prompts, of text or of example images, are encoded once per job, by the driver; an actor gets their
embeddings and runs only what masks need: the vision blocks up to the last extract layer, once per
image, and the decoder, once per image and prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import schema
from pipeline.config.fine import FineOptions
from pipeline.config.options import Precision
from pipeline.config.prompt import Prompt
from pipeline.config.segment import MaskRule
from pipeline.infer.blend import BlendLooks, Looked, open_looks
from pipeline.infer.checkpoint import Checkpoint, OpenModel
from pipeline.infer.device import Device, fail_images, has_pixels, pixel_rows, scale_to_unit
from pipeline.infer.phrases import PhraseVectors
from pipeline.infer.texts import Progress
from pipeline.infer.together import SegmentTogether
from pipeline.infer.visual_prompt import encode_prompts
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.windows import Looks
from pipeline.read.shard import parse_phrases

# Logits handed on at once: a block of Ray Data's, which lies in the object store as one piece.
BLOCK_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """A checkpoint and its encoded prompts."""

    checkpoint: Checkpoint
    prompts: list[str]
    conditional: np.ndarray
    """(P, projection_dim) float32."""
    embed: bool
    """Whether images are embedded, too."""
    per_row: bool = False
    """Whether each image has phrases of its own, in its `text`, and `prompts` is empty."""
    rule: MaskRule = field(default_factory=MaskRule)
    """How masks come of logits, where the device does it."""
    looks: Looks | None = None
    """How images are looked at; None: once, as the checkpoint's image processor has it."""
    notes: tuple[str, ...] = ()
    """Lines for the user about the prompts."""

    def only(self, prompts: list[str], *, embed: bool, rule: MaskRule | None = None) -> SegmentSpec:
        """The same with some of the prompts, and a rule of its own if given."""
        where = [self.prompts.index(prompt) for prompt in prompts]
        return replace(
            self,
            prompts=prompts,
            conditional=self.conditional[where],
            embed=embed,
            rule=rule or self.rule,
            looks=self.looks and replace(self.looks, embed=embed),
        )


def open_segmenter(
    name: str,
    prompts: Sequence[str | Prompt],
    *,
    per_row: bool = False,
    embed: bool = False,
    fine: FineOptions = FineOptions(),  # noqa: B008
    max_pixels: int = 50_000_000,
    precision: Precision = "float32",
    on_progress: Progress | None = None,
) -> SegmentSpec:
    """Load a checkpoint, encode phrases and other prompts with it, and let its weights go again.

    `per_row`: see SegmentSpec; `max_pixels` of an example image; `precision` of the actors. Raises
    CheckpointError naming the wrong file, field or tensor, and UsageError for prompts cut to the
    same tokens and naming an unusable example.
    """
    opened = OpenModel(name, CLIPSeg.from_folder, Device("cpu"))
    asked = [Prompt(name=p, texts=(p,)) if isinstance(p, str) else p for p in prompts]
    texts = list(dict.fromkeys(text for prompt in asked for text in prompt.texts))
    notes = opened.describe_texts(texts, "prompt")
    return SegmentSpec(
        checkpoint=opened.describe(precision, texts=True),
        prompts=[prompt.name for prompt in asked],
        conditional=encode_prompts(opened, asked, max_pixels, on_progress)
        if asked
        else np.zeros((0, opened.model.config.projection_dim), np.float32),
        embed=embed,
        per_row=per_row,
        looks=open_looks(opened, fine, embed=embed) if fine.given else None,
        notes=tuple(notes),
    )


class SegmentImages:
    """An actor of the segment stage: schema.PIXELS -> schema.LOGITS, on a GPU -> schema.RUNS.

    From a CPU logits go on, and tasks make the masks, on other threads than the model's. From a GPU
    they would be 0.5 MB a prompt, as much to copy as ten times its work: masks are made there.

    Refuses to start if the weights under the model's name differ from the driver's. `device` and
    `threads` as in Device. About `block_bytes` of logits are handed on at once.
    """

    def __init__(
        self,
        spec: SegmentSpec,
        device: str | Device,
        threads: int | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
    ):
        self.spec, self.block_bytes = spec, block_bytes
        self.device = Device.of(device, threads, spec.checkpoint.precision)
        opened = OpenModel.on_worker(spec.checkpoint, CLIPSeg.from_folder, self.device)
        self.model = opened.model
        self.phrases = PhraseVectors(opened)
        self.conditional = torch.from_numpy(spec.conditional.copy()).to(self.device.torch)
        patch = self.model.config.vision_config.patch_size
        height, width = spec.checkpoint.processor.image_size
        self.grid = (height // patch, width // patch)
        self.looks = spec.looks and BlendLooks(spec.looks, self.model, self.device, self._encode)
        self.together: SegmentTogether | None = None
        if not self.device.alone and not self.looks:
            self.together = SegmentTogether(
                device=self.device,
                model=self.model,
                encode=self._encode,
                processor=spec.checkpoint.processor,
                rule=spec.rule,
                conditional=self.conditional,
                phrases=self.phrases if spec.per_row else None,
            )

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Failed records pass first, then images in their order, prompts in runs."""
        good = has_pixels(batch)
        if self.together:
            yield from self.together(batch, good)
            return
        if not good.all():
            yield _with_logits(batch.filter(pa.array(~good)), None, 0, None)
        images = batch.filter(pa.array(good))
        if not len(images):
            return
        if self.looks:
            yield from self._look(self.looks, images)
            return
        steps, vectors = self._encode_rows(images["pixels"])
        patch = self.model.config.vision_config.patch_size
        pairs = max(1, self.block_bytes // (4 * self.grid[0] * self.grid[1] * patch**2))
        if self.spec.per_row:
            yield from self._decode_own(images, steps, vectors, pairs)
            return
        prompts = min(len(self.conditional), pairs)
        count = max(1, pairs // prompts)
        for i in range(0, len(images), count):
            some = [step[i : i + count] for step in steps]
            yield from self._decode(images.slice(i, count), some, vectors[i : i + count], prompts)

    def _look(self, looks: BlendLooks, images: pa.Table) -> Iterator[pa.Table]:
        """Tables of one image each, as finely as is asked for, all their looks encoded at once."""
        pixels = [np.frombuffer(each.as_buffer(), np.uint8) for each in images["pixels"]]
        sizes = (images[name].to_pylist() for name in ("height", "width"))
        looked = looks.look(list(zip(pixels, *sizes, strict=True)))
        for i, each in enumerate(looked):
            record, conditional = images.slice(i, 1), self.conditional
            if self.spec.per_row:
                own = parse_phrases(record["text"][0].as_py())
                conditional = self.phrases.encode(own) if own else torch.zeros(0, 1)
                conditional = conditional.to(self.device.torch)
            yield from self._decode_looked(looks, record, each, conditional)

    def _decode_looked(
        self, looks: BlendLooks, record: pa.Table, looked: Looked, conditional: Tensor
    ) -> Iterator[pa.Table]:
        """Tables of one image with prompts (P, E), at least one."""
        vectors = looked.vector[None]
        prompts = max(1, self.block_bytes // (4 * looked.size[0] * looked.size[1]))
        for first in range(0, max(1, len(conditional)), prompts):
            logits = looks.logits(looked, conditional[first : first + prompts])
            masked, fine = bool(torch.isfinite(logits).all()), bool(np.isfinite(vectors).all())
            if not (masked and fine):
                failed = fail_images(record, np.array([masked]), np.array([fine]))
                yield _with_logits(failed, None, 0, None)
                return
            yield _with_logits(record, logits[None], first, vectors if first == 0 else None)

    def _encode_rows(self, column: pa.ChunkedArray) -> tuple[list[Tensor], np.ndarray]:
        """As _encode, of the `pixels` of N records on a CPU."""
        processor = self.spec.checkpoint.processor
        pixels = pixel_rows(column, processor)
        group = self.device.group(self.model.vision_model, processor.image_size)

        def encode(some: slice) -> tuple[list[Tensor], Tensor]:
            steps, vectors = self._encode(self.device.load_pixels(pixels[some], processor, group))
            count = len(pixels[some])
            return [step[:count] for step in steps], vectors[:count]

        encoded = list(self.device.over(len(pixels), 1, encode, group=group))
        steps = [torch.cat(step) for step in zip(*(e[0] for e in encoded), strict=True)]
        return steps, torch.cat([e[1] for e in encoded]).numpy()

    def _encode(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Activations for the decoder of images (B, 3, H, W), whatever the prompt, and embeddings
        (B, E) of length 1, or (B, 0)."""
        tower = self.model.vision_model
        wanted = self.model.config.extract_layers
        if not self.spec.embed:
            states = tower.activations(pixels, wanted)
            return self.model.decoder.reduce(states), torch.zeros(len(pixels), 0)
        deepest = len(tower.encoder.layers) - 1
        layers = wanted if wanted[-1] == deepest else (*wanted, deepest)
        states = tower.activations(pixels, layers)
        vectors = self.model.clip.visual_projection(tower.pool(states[-1]))
        return self.model.decoder.reduce(states[: len(wanted)]), scale_to_unit(vectors).cpu()

    def _decode(
        self, rows: pa.Table, steps: list[Tensor], vectors: np.ndarray, prompts: int
    ) -> Iterator[pa.Table]:
        """Tables of so many `prompts` of the images in `rows`; `steps` and `vectors` of _encode."""
        for first in range(0, len(self.conditional), prompts):
            logits = self._logits(steps, self.conditional[first : first + prompts])
            if first == 0:
                # An image that overflows does so with every prompt: it fails here, as a whole.
                masked = torch.isfinite(logits).flatten(1).all(1).numpy()
                fine = np.isfinite(vectors).all(axis=1)
                good = masked & fine
                if not good.all():
                    failed = fail_images(rows, masked, fine)
                    yield _with_logits(failed.filter(pa.array(~good)), None, 0, None)
                    rows, where = rows.filter(pa.array(good)), torch.from_numpy(good)
                    steps = [step[where] for step in steps]
                    logits, vectors = logits[where], vectors[good]
            yield _with_logits(rows, logits, first, vectors if first == 0 else None)

    def _logits(self, steps: list[Tensor], conditional: Tensor) -> Tensor:
        """(B, P, H, W) float32 on the CPU of every image with every prompt (P, E)."""
        shape = (len(steps[0]), len(conditional))
        image, prompt = torch.cartesian_prod(*(torch.arange(n) for n in shape)).T
        return self._decode_pairs(steps, image, conditional, prompt).unflatten(0, shape)

    def _decode_pairs(
        self, steps: list[Tensor], image: Tensor, conditional: Tensor, prompt: Tensor
    ) -> Tensor:
        """(N, H, W) float32 on the CPU of N pairs: indices of images and of prompts (P, E)."""

        def decode(some: slice) -> Tensor:
            states = [step[image[some]] for step in steps]  # indexing copies
            return self.model.decoder(states, conditional[prompt[some]], self.grid)

        return torch.cat(self.device.run(decode, self.device.split(len(image), 1)))

    def _decode_own(
        self, rows: pa.Table, steps: list[Tensor], vectors: np.ndarray, pairs: int
    ) -> Iterator[pa.Table]:
        """Tables of about so many `pairs` of images in `rows` and phrases in their `text`."""
        asked = [parse_phrases(text) for text in rows["text"].to_pylist()]
        ends = np.cumsum([len(phrases) for phrases in asked])
        for block in range(int(ends[-1]) // pairs + 1):
            some = np.flatnonzero(ends // pairs == block)
            if len(some):
                yield from self._own_logits(rows, steps, vectors, asked, some)

    def _own_logits(
        self,
        rows: pa.Table,
        steps: list[Tensor],
        vectors: np.ndarray,
        asked: list[list[str]],
        some: np.ndarray,
    ) -> Iterator[pa.Table]:
        """The images `some`, with logits of their own phrases."""
        counts = [len(asked[i]) for i in some]
        patch = self.model.config.vision_config.patch_size
        logits = torch.zeros(0, self.grid[0] * patch, self.grid[1] * patch)
        if phrases := [phrase for i in some for phrase in asked[i]]:
            conditional = self.phrases.encode(phrases)
            image = torch.from_numpy(np.repeat(some, counts))
            logits = self._decode_pairs(steps, image, conditional, torch.arange(len(phrases)))
        found = [part.contiguous().numpy() for part in logits.split(counts)]
        masked = np.array([np.isfinite(part).all() for part in found])
        fine = np.isfinite(vectors[some]).all(axis=1)
        images = fail_images(rows.take(some), masked, fine)
        good = masked & fine
        sizes = logits.shape[1:]
        data = [part.tobytes() if ok else b"" for part, ok in zip(found, good, strict=True)]
        kept = [v.tobytes() if ok else b"" for v, ok in zip(vectors[some], good, strict=True)]
        known = [pa.array(np.full(len(some), value, np.int32)) for value in (0, *sizes)]
        binary = [pa.array(values, pa.large_binary()) for values in (data, kept)]
        columns = [*images.drop_columns(["pixels"]).columns, *known, *binary]
        yield pa.table(columns, schema=schema.LOGITS)


def _with_logits(
    records: pa.Table, logits: Tensor | None, first_prompt: int, vectors: np.ndarray | None
) -> pa.Table:
    """Records with their pixels exchanged for logits (B, P, h, w), or for nothing."""
    count = len(records)
    height, width = logits.shape[2:] if logits is not None else (0, 0)
    sizes = [pa.array(np.full(count, v, np.int32)) for v in (first_prompt, height, width)]
    values = (None if logits is None else logits.contiguous().numpy(), vectors)
    columns = [*records.drop_columns(["pixels"]).columns, *sizes]
    columns += [_binary(array, count) for array in values]
    return pa.table(columns, schema=schema.LOGITS)


def _binary(array: np.ndarray | None, count: int) -> pa.Array:
    """Each of the `count` rows of an array as bytes, without a copy; None: nothing in each."""
    data = pa.py_buffer(b"" if array is None else np.ascontiguousarray(array))
    offsets = np.arange(count + 1, dtype=np.int64) * (data.size // max(count, 1))
    buffers = [None, pa.py_buffer(offsets), data]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, buffers)
