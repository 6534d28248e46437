"""Train the bundled CLIPSeg on synthetic scenes and write it as a hub checkpoint.

    python -m pipeline.demo.train --output pipeline/demo/model

56 minutes on 2 cores of an x86-64 virtual machine, beside other work. It starts from an
initialisation of our own (transformers' decoder, drawn with standard deviation 1, never starts to
learn) and goes through two stages, see STAGES, and the last step in compose.py. Four losses:

    masks     the decoder's logits for a few phrases per image, half of them absent from it
    patches   last-block patch tokens against phrase embeddings: how much of the patch is covered
    names     the same cosines among colours, among shapes, among pairs: which one is it
    images    pooled image embeddings against phrase embeddings: is it there at all
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from pipeline.demo import MODEL
from pipeline.demo.compose import compose
from pipeline.demo.scenes import COLOURS, SEEN_PAIRS, SHAPES, SIZE_PX, UNNAMED_PAIRS, Pair
from pipeline.demo.start import Muon, initialise, small_config
from pipeline.demo.teach import MAX_OBJECTS, Texts, choose_concepts, draw_pool, object_concepts
from pipeline.demo.vocabulary import save_tokenizer
from pipeline.model.clipseg import CLIPSeg

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training; the next one starts from its checkpoint."""

    number: int
    objects: tuple[Pair, ...]
    """Contents of scenes, drawn evenly."""
    scenes: int
    """Scenes drawn beforehand; they come again, mirrored or not."""
    steps: int
    rest: int
    """Steps before the decoder starts: until patches know phrases it has nothing to decode."""
    rate: float
    """Learning rate: up over 150 steps, level, then down to nothing over `cooldown` steps."""
    cooldown: int
    weights: tuple[float, float, float, float]
    """Of the losses of masks, patches, names and images."""

    def rate_at(self, step: int) -> float:
        return self.rate * min(1, (step + 1) / 150, (self.steps - step) / self.cooldown)


STAGES = (
    Stage(
        number=0,
        objects=SEEN_PAIRS,
        scenes=6_000,
        steps=2_900,
        rest=1_000,
        rate=1e-3,
        cooldown=1_050,
        weights=(1.0, 5.0, 0.1, 0.5),
    ),
    # Where red stars were never seen, redness has become evidence against stars. Half of the
    # objects now have colours without a name, in every shape, so that shape and colour part.
    Stage(
        number=1,
        objects=SEEN_PAIRS + 7 * UNNAMED_PAIRS,
        scenes=3_000,
        steps=550,
        rest=0,
        rate=5e-4,
        cooldown=400,
        weights=(1.0, 0.0, 0.2, 0.0),
    ),
)
BATCH = 24  # images a step, over all workers
PHRASES_PER_IMAGE = 2  # decoded for each image, half of them absent from it


# ---- losses


class Alignment(nn.Module):
    """Cosines, scaled and shifted, as logits; the shift is used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_bias = nn.Parameter(torch.tensor(-4.0))
        self.image_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self, model: CLIPSeg, states: Tensor, text: Tensor, objects: Tensor, concepts: Tensor
    ) -> Tensor:
        """(3,): the losses of patches, names and images.

        Last-block states (B, L, D), phrase embeddings (K, E), one-hot labels (B, O, H, W) and
        which object answers to which concept (B, O, K).
        """
        clip = model.clip
        tokens = F.normalize(
            clip.visual_projection(clip.vision_model.post_layernorm(states)), dim=-1
        )
        cosine = tokens @ F.normalize(text, dim=-1).T * clip.logit_scale.exp()  # (B, L, K)
        patches = cosine[:, 1:]
        covered = F.avg_pool2d(objects, 16).flatten(2).transpose(1, 2) @ concepts  # (B, n, K)
        patch_loss = F.binary_cross_entropy_with_logits(
            patches + self.patch_bias, covered.clamp(max=1)
        )
        sizes = (len(COLOURS), len(SHAPES), len(SEEN_PAIRS))  # the order of CONCEPTS
        name_loss = torch.zeros(())
        for logits, share in zip(patches.split(sizes, 2), covered.split(sizes, 2), strict=True):
            name_loss = name_loss - (share * logits.log_softmax(2)).sum() / share.sum()
        present = concepts.amax(1)
        image_loss = F.binary_cross_entropy_with_logits(cosine[:, 0] + self.image_bias, present)
        return torch.stack([patch_loss, name_loss, image_loss])


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus 0.3 Dice of logits and 0 or 1, both (S, H, W).

    Dice is smoothed by 64 pixels: for an absent phrase it grows with the number of stray pixels.
    """
    p = logits.sigmoid()
    overlap = (p * target).sum((1, 2))
    dice = 1 - (2 * overlap + 64) / (p.sum((1, 2)) + target.sum((1, 2)) + 64)
    return F.binary_cross_entropy_with_logits(logits, target) + 0.3 * dice.mean()


# ---- the run


def train(rank: int, stage: Stage, args: argparse.Namespace, meeting: str) -> None:
    """One of two processes learning together, each on scenes of its own; the first one saves.

    Two single-threaded processes, meeting once a step, are faster than one with two threads, the
    more so on busy cores.
    """
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model, alignment, texts = CLIPSeg(small_config()), Alignment(), Texts()
    initialise(model)
    if stage.number:
        model.load_state_dict(load_file(args.output / "model.safetensors"))
    average = deepcopy(model)
    seed = WORKERS * (args.seed + stage.number) + rank
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    start = time.monotonic()
    pool = draw_pool(seed, stage.scenes // WORKERS, stage.objects)
    parameters = [*model.parameters(), *alignment.parameters()]
    inner = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    outer = [p for p in parameters if all(p is not q for q in inner)]
    muon, adam = Muon(inner), torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.02)
    weights, log = torch.tensor(stage.weights), torch.zeros(4)
    for step in range(stage.steps):
        scenes = pool.batch(rng, BATCH // WORKERS)
        phrases_per_image = PHRASES_PER_IMAGE if step >= stage.rest else 0
        losses = compute_losses(model, alignment, texts, scenes, phrases_per_image)
        model.zero_grad()
        alignment.zero_grad()
        (losses * weights).sum().backward()
        share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step(stage.rate_at(step))
        adam.param_groups[0]["lr"] = stage.rate_at(step)
        adam.step()
        follow(average, model, step)
        log += losses.detach()
        if rank == 0 and (step + 1) % 50 == 0:
            figures = " ".join(f"{x / 50:.4f}" for x in log.tolist())
            print(f"step {step + 1} {time.monotonic() - start:.0f} s {figures}", flush=True)
            log.zero_()
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == stage.steps):
            save(average, args.output)


def compute_losses(
    model: CLIPSeg,
    alignment: Alignment,
    texts: Texts,
    scenes: tuple[Tensor, Tensor, Tensor],
    phrases_per_image: int,
) -> Tensor:
    """(4,): the losses of masks, patches, names and images; without phrases the first is 0."""
    pixels, objects, pairs = scenes
    concepts = object_concepts(pairs)  # (B, O, K)
    text = model.encode_text(*texts.sample())
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    activations = model.activations(normalised)
    aligned = alignment(model, activations[-1], text, objects, concepts)
    mask_term = torch.zeros(())
    if phrases_per_image:
        chosen = choose_concepts(concepts.amax(1), phrases_per_image)  # (B, P)
        of_object = concepts.gather(2, chosen[:, None].expand(-1, MAX_OBJECTS, -1))
        target = torch.einsum("bohw,bop->bphw", objects, of_object)
        logits = model.decode(activations, text[chosen], model.grid(pixels))
        mask_term = mask_loss(logits.flatten(0, 1), target.flatten(0, 1))
    return torch.cat([mask_term[None], aligned])


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= WORKERS
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


@torch.no_grad()
def follow(average: CLIPSeg, model: CLIPSeg, step: int) -> None:
    """Move the average, to be shipped, towards the model."""
    model.clip.logit_scale.clamp_(max=math.log(30))
    share = max(0.003, 1 - (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


def save(model: CLIPSeg, folder: Path) -> None:
    """Write the checkpoint: config.json, preprocessor_config.json, tokenizer files, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    preprocessor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "ViTImageProcessor",
        "image_std": STD,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": SIZE_PX[0], "width": SIZE_PX[1]},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_tokenizer(folder)
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            spawn(train, (stage, args, f"{folder}/meeting"), nprocs=WORKERS)
    torch.set_num_threads(1)
    model = CLIPSeg(small_config())
    model.load_state_dict(load_file(args.output / "model.safetensors"))
    compose(model, args.seed)
    save(model, args.output)


if __name__ == "__main__":
    main()
