"""`clipseg-ray COMMAND ...`: run one of the jobs (`COMMAND --help` tells its options)."""

from __future__ import annotations

import importlib
import sys

from pipeline import __version__

COMMANDS = {
    "segment": "image shards and prompts -> masks, as Parquet tables",
    "embed": "image shards -> CLIP embeddings, as Parquet tables",
    "classify": "image shards or embeddings, and labels -> the labels that fit best, as tables",
    "export": "labels -> COCO, YOLO, VOC, LabelMe, Label Studio, CVAT, PNG, Hugging Face or SAM",
    "status": "what of a run is done, failed and left",
    "verify": "parts of a run -> held against the hashes in their receipts",
    "retry-failed": "reprocess the shards of a run with retryable failures",
    "index": "table of embeddings -> a vector index, for faster searches",
    "search": "table of embeddings -> the nearest rows to texts and images",
    "duplicates": "table of embeddings -> groups of near-duplicates",
}


def main() -> int:
    """Run the job that the first argument names."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        job = importlib.import_module(f"jobs.{arguments[0].replace('-', '_')}")
        return job.main(arguments[1:])
    if arguments == ["--version"]:
        print(f"clipseg-ray {__version__}")
        return 0
    usage = "usage: clipseg-ray COMMAND ...\n\ncommands:\n" + "".join(
        f"  {name:12} {text}\n" for name, text in COMMANDS.items()
    )
    if arguments in ([], ["-h"], ["--help"]):
        print(usage)
        return 0 if arguments else 2
    known = ", ".join(COMMANDS)
    print(f"clipseg-ray: error: no command {arguments[0]!r}; known: {known}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
