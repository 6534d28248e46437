"""`clipseg-ray COMMAND ...`: run one of the jobs (`COMMAND --help` tells its options)."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from pipeline import __version__

COMMANDS = {
    "demo": "everything once, on bundled images with the bundled model: look here first",
    "segment": "image shards and prompts -> masks, as Parquet tables",
    "embed": "image shards -> CLIP embeddings, as Parquet tables",
    "classify": "image shards or embeddings, and labels -> most probable labels, as tables",
    "ontology": "a list of classes in another tool's format -> an ontology file",
    "label": "kept probability maps of segment, and an ontology -> annotations, as tables",
    "export": "labels -> COCO, YOLO, VOC, LabelMe, Label Studio, CVAT, PNG, Hugging Face or SAM",
    "report": "run, finished or not -> a page with its counts, classes, pictures and errors",
    "view": "run of segment -> a page with images and their masks, for a browser",
    "review": "labels -> the images worth a person's time, as a page or for an annotation tool",
    "evaluate": "kept maps or labels, and ground truth -> IoU, AP, calibration, a page",
    "calibrate": "kept maps, ground truth, an ontology -> its thresholds and gates, chosen",
    "reproduce": "data set of CLIPSeg's paper -> its figures, beside the published ones",
    "plan": "a job's command -> its time, its limit and its price, from a few images",
    "status": "progress of a run: shards and rows done, failed and left",
    "verify": "parts of a run, compared with the hashes in their receipts",
    "retry-failed": "reprocess shards with retryable failures",
    "index": "table of embeddings -> a vector index, for faster searches",
    "search": "table of embeddings -> the nearest rows to texts and images",
    "duplicates": "table of embeddings -> groups of near-duplicates",
}


def main() -> int:
    """Run the job named by the first argument."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        job = importlib.import_module(f"jobs.{arguments[0].replace('-', '_')}")
        del sys.argv[1]
        code: int = job.main()
        return code
    if arguments == ["--version"]:
        print(f"clipseg-ray {__version__}")
        return 0
    usage = "usage: clipseg-ray COMMAND ...\n\ncommands:\n" + "".join(
        f"  {name:12} {text}\n" for name, text in COMMANDS.items()
    )
    if arguments in ([], ["-h"], ["--help"]):
        print(usage)
        return 0 if arguments else 2
    near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
    print(f"clipseg-ray: error: no command {arguments[0]!r}; {hint}", file=sys.stderr)
    return 2


def run() -> None:
    """Run the command, and end the process without the second of tearing it down."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
