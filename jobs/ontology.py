"""Make an ontology file from a list of classes in another tool's format.

    python -m jobs.ontology --from data.yaml ontology.yaml

`clipseg-ray ontology` is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline import storage
from pipeline.config.command import run_command
from pipeline.config.ontology_from import OntologyConfig, convert_to_ontology, to_yaml
from pipeline.errors import UsageError


def ontology(config: OntologyConfig) -> None:
    """Read the classes, and write or print the ontology."""
    found = convert_to_ontology(config.source)
    text = to_yaml(found)
    if config.output is None:
        print(text, end="")
        return
    try:
        storage.write_new(storage.check_uri(config.output), text.encode())
    except FileExistsError as error:
        raise UsageError(f"{config.output}: exists already; choose another name") from error
    print(f"{len(found.classes):,} classes\n  {config.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(OntologyConfig, ontology, "clipseg-ray ontology", argv)


if __name__ == "__main__":
    sys.exit(main())
