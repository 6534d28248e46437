"""Every name in OUTPUT.

    _run.json                               configuration, fingerprint, versions, counts
    _SUCCESS                                the receipts equal the shards; names the run, additions
    <table>/_schema.parquet                 a part without rows, there from the start
    <table>/<id>.parquet                    the part of one shard
    _receipts/<id>/<receipt>.json           the shard is finished; written last, never overwritten
    _staging/<id>/<fragment>.arrows         rows of a shard in work
    _staging/<id>/<version>.decision        the fragments chosen for the shard; create-only
    _prompts.npy                            embeddings of the prompts of segment, (P, E) float32
    _prompts/<first>.json                   prompts added, from number <first> on
    _prompts/<first>/{_receipts,_staging}/  the ledger of their pass over the shards
    <table>/<id>.from-<first>.parquet       and its parts
    report/index.html                       a page about the run; may go at any time

`<id>` stands for the shard's name, `<version>` for its content and the run.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from pipeline import storage

RUN = "_run.json"
SUCCESS = "_SUCCESS"
RECEIPTS = "_receipts"
STAGING = "_staging"
PROMPTS = "_prompts"
PROMPT_VECTORS = "_prompts.npy"
ERRORS = "errors"
REPORT = "report"
REPORT_PAGE = f"{REPORT}/index.html"
# The file of each table that exists from the start and holds no rows, so that a reader's glob
# always matches something, even where no row ever failed.
EMPTY_PART = "_schema.parquet"
DECISION = ".decision"
_UNREADABLE = re.compile(r"[^A-Za-z0-9]+")


def shard_id(name: str) -> str:
    """The file name, without ending, for a shard: readable, safe and unique.

    The readable part is cut and cleaned, because a storage may hold any name; the hash makes it
    unique.
    """
    readable = _UNREADABLE.sub("-", name).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The account of one pass over the shards of a run: names of its files, nothing else.

    A run has one ledger, and one more for each addition of prompts.
    """

    output: str
    run: str = ""
    """Hash of the run: files of another run are ignored."""
    first_prompt: int = 0
    """prompt_id of the first prompt of the pass; above 0 for added prompts."""

    @property
    def added(self) -> bool:
        """Whether the pass is of prompts added later."""
        return self.first_prompt > 0

    @property
    def folder(self) -> str:
        """The folder of receipts and staging."""
        if not self.added:
            return self.output
        return storage.join(self.output, PROMPTS, str(self.first_prompt))

    @property
    def receipts(self) -> str:
        """The folder of all receipts."""
        return storage.join(self.folder, RECEIPTS)

    @property
    def staging(self) -> str:
        """The folder of all shards in work."""
        return storage.join(self.folder, STAGING)

    def version(self, shard_version: str) -> str:
        """Eight hexadecimal digits for the content of a shard in this run."""
        return hashlib.sha256(f"{self.run}{shard_version}".encode()).hexdigest()[:8]

    def part(self, table: str, shard_id: str) -> str:
        """Path of a part, relative to the output."""
        return f"{table}/{shard_id}{self._ending}"

    @property
    def _ending(self) -> str:
        return f".from-{self.first_prompt}.parquet" if self.added else ".parquet"


def parse_part(file: str) -> tuple[int, str] | None:
    """The first prompt of the pass, and the shard_id, in the file name of a part (see Ledger.part).

    None for other files.
    """
    name = file.removesuffix(".parquet")
    if name == file or file == EMPTY_PART:
        return None
    id_, addition, first = name.rpartition(".from-")
    if not addition:
        return 0, name
    return (int(first), id_) if first.isdecimal() else None
