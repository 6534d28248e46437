"""Configuration of `clipseg-ray demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.config.options import check_file

PROMPTS = ("blue", "star", "a purple star")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Try everything on bundled images with the bundled model: segment, label, export, view."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")] = "demo-output"
    """Folder for all of it; about 5 MB."""

    def __post_init__(self) -> None:
        check_file("DIR", self.folder)

    def commands(self) -> list[list[str]]:
        """Command lines of the demo, in order; each but the first reads what those before wrote."""
        folder = self.folder.rstrip("/") or "/"
        shards, run, labels, coco = (f"{folder}/{n}" for n in ("shards", "run", "labels", "coco"))
        ontology = ["--ontology", f"{folder}/ontology.yaml"]
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        sheet = ["--contact-sheet", f"{folder}/contact-sheet.png"]
        return [
            ["segment", shards, run, "--model", "demo", *prompts, *ontology, *sheet, "--local"],
            ["label", run, labels, *ontology, "--local"],
            ["export", labels, coco, "--format", "coco"],
            ["view", run, "--output", f"{folder}/view.html"],
        ]
