"""Every error the pipeline raises, and every reason an image or a shard can fail for.

PipelineError
├── UsageError          the command, input, output or model cannot be used: exit code 2
│   └── CheckpointError     a model folder incomplete, malformed or unsafe
├── StorageError        reading or writing storage failed
│   ├── NotFoundError       the object is not there
│   ├── ChangedError        overwritten since it was listed, or while it was read
│   ├── CredentialsError    refused for who we are: stops the job at once
│   └── TransientError      may work when tried again
├── RowError            one image, or the rest of one shard: a row of the errors table
└── JobError            the job is not complete, or its account does not close: exit code 1
"""

from __future__ import annotations

# Where in the flow a row failed: the `stage` column of the errors table.
STAGES = ("read", "decode", "segment", "embed", "classify", "write")

# Why it failed: the closed list of the `reason` column.
REASONS = {
    # shards
    "shard_missing": "the shard is not there (any more)",
    "shard_unreadable": "the storage failed while the shard was read",
    "shard_changed": "the shard was overwritten since it was listed, or while it was read",
    "shard_empty": "the shard has no bytes at all, or nothing but zeros",
    "shard_corrupt": "the archive or Parquet structure is damaged; rows before the damage are kept",
    "shard_truncated": "the shard ends early; rows before the end are kept",
    "reader_crashed": "the shard ended the process that read it; rows before it are kept",
    "shard_encrypted": "the Parquet shard, or a column of it, is encrypted: decrypt it first",
    "column_missing": "the Parquet shard has no such column, or one of another type",
    # rows
    "no_image": "the sample has no image, or the image column is null",
    "file_missing": "the image file is not there (any more)",
    "file_unreadable": "the storage failed while the image file, or the text beside it, was read",
    "file_changed": "the image file, or the text beside it, was overwritten since it was listed",
    "no_text": "the sample has no such text, or the text column is null",
    "text_too_long": "the text has more than 64 KiB",
    "name_too_long": "the key or the path has more than 4,096 bytes; both are cut to that",
    "image_empty": "zero bytes",
    "not_an_image": "text, HTML, JSON or unknown bytes",
    "unsupported_format": "a format, or a layout of it, that is not decoded (HEIC, 12-bit JPEG)",
    "image_corrupt": "an image that breaks off or fails its checksums",
    "too_many_pixels": "more pixels than --max-pixels; never decoded",
    "extreme_aspect": "one side is more than 1,000 times the other; never decoded",
    "decoder_crashed": "the image ended the process that decoded it",
    "member_unsupported": "a tar member that is not a plain file (a link, a device, or sparse)",
    "member_too_large": "a tar member, file or cell larger than the reader's bound",
    "no_vector": "the table of embeddings has neither a vector nor an error for the row",
    "no_map": "the run that labels are cut from has neither a map of each prompt nor an error",
    "model_failed": "what the model gives for the image, or for its text, is not finite",
}

# Faults of the storage: nothing is known of the bytes, so the account of the shard stays open.
STORAGE_REASONS = frozenset(
    (
        *("shard_missing", "shard_unreadable", "shard_changed"),
        *("file_missing", "file_unreadable", "file_changed"),
    )
)


class PipelineError(Exception):
    """The root of the tree above."""


class UsageError(PipelineError, ValueError):
    """A request impossible to carry out; the message says what, where, what to do."""


class CheckpointError(UsageError):
    """An unusable checkpoint; the message names the file or tensor."""


class StorageError(PipelineError):
    """Storage failed; the message names the URI."""


class NotFoundError(StorageError):
    """Nothing is stored under this URI."""


class ChangedError(StorageError):
    """The object was overwritten since it was listed, or while it was being read."""


class CredentialsError(StorageError):
    """The storage refused us: missing, wrong or expired credentials, or no permission."""


class TransientError(StorageError):
    """A transient fault: throttling, a reset connection, a cut body."""


class RowError(PipelineError):
    """One image, or the rest of one shard, cannot be used.

    `stage` is one of STAGES, `reason` one of REASONS, `detail` a short free text (at most 500
    characters are kept), `retryable` whether the same bytes may work another time.
    """

    def __init__(self, stage: str, reason: str, detail: str = "", *, retryable: bool = False):
        super().__init__(stage, reason, detail)  # as pickle will call it
        self.stage, self.reason, self.detail = stage, reason, detail[:500]
        self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}: {self.detail}"


class JobError(PipelineError):
    """A job without a complete result; the message names the missing part."""


def one_line(text: str, characters: int = 300) -> str:
    """At most so many printable characters: nothing that moves a cursor or ends a line.

    For text on a terminal or a page: names of an input are hostile.
    """
    shown = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:characters]
    )
    return shown if len(text) <= characters else f"{shown}..."
