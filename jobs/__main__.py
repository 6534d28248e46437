"""`clipseg-ray COMMAND ...`: run one of the jobs (`COMMAND --help` tells its options)."""

from __future__ import annotations

import importlib
import sys

from pipeline import __version__

COMMANDS = {
    "segment": "image shards and prompts -> masks, as Parquet tables",
    "embed": "image shards -> CLIP embeddings, as Parquet tables",
    "index": "table of embeddings -> a vector index, for faster searches",
    "search": "table of embeddings -> the nearest rows to texts and images",
    "duplicates": "table of embeddings -> groups of near-duplicates",
}


def main() -> int:
    """Run the job that the first argument names."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        job = importlib.import_module(f"jobs.{arguments[0]}")
        return job.main(arguments[1:])
    if arguments == ["--version"]:
        print(f"clipseg-ray {__version__}")
        return 0
    usage = "usage: clipseg-ray COMMAND ...\n\ncommands:\n" + "".join(
        f"  {name:10} {text}\n" for name, text in COMMANDS.items()
    )
    if arguments in ([], ["-h"], ["--help"]):
        print(usage)
        return 0 if arguments else 2
    known = ", ".join(COMMANDS)
    print(f"clipseg-ray: error: no command {arguments[0]!r}; known: {known}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
