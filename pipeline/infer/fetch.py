"""Where a checkpoint comes from: a local folder, the Hugging Face hub, or a folder on S3.

The first step of every model: whatever the user named becomes a local folder that holds the files
of NEEDED and one form of the weights. Nothing in the folder is ever run as code.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.model.weights import PICKLES, SAFETENSORS, WEIGHT_FILES
from pipeline.storage import Stored, check_uri, is_s3, list_files, open_read

NEEDED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_COPY_BYTES = 8 << 20


def fetch(model: str) -> Path:
    """The local folder of a checkpoint: a folder, `org/name[@revision]` or `s3://bucket/folder`.

    What exists here is taken for a folder; what looks like a path (begins with . / ~ or has more
    than one slash) is never looked up on the hub. Of a remote checkpoint only what is needed is
    downloaded, a .bin only where there are no safetensors, and kept: in the hub's own cache, or
    for S3 below $CLIPSEG_RAY_CACHE (default ~/.cache/clipseg-ray). CheckpointError says what is
    wrong in one line.
    """
    if not model.strip():
        raise CheckpointError(
            "the model is an empty string; name a folder, a hub id or an s3:// URI"
        )
    if "://" in model:
        try:
            uri = check_uri(model)
        except UsageError as error:
            raise CheckpointError(f"the model: {error}") from error
        if is_s3(uri):
            return _check_folder(_fetch_s3(uri), uri)
        model = uri
    path = Path(model).expanduser()
    if path.is_dir():
        return _check_folder(path, model)
    if path.exists():
        raise CheckpointError(f"{model}: is a file; name the folder that holds it")
    match = _HUB_ID.fullmatch(model)
    if match is None or model[0] in "./~" or match[1].count("/") != 1:
        hint = "" if "/" in model else " (a model on the hub is named org/name)"
        raise CheckpointError(f"{model}: no such folder{hint}")
    return _check_folder(_fetch_hub(match[1], match[2]), model)


def _check_folder(folder: Path, model: str) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model}: has no config.json, so it is no checkpoint")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise CheckpointError(f"{model}: has no weights (model.safetensors or pytorch_model.bin)")
    return folder


def _fetch_hub(repo: str, revision: str | None) -> Path:
    """A snapshot of the needed files, from the hub or, where that is out of reach, its cache."""
    from huggingface_hub import errors, snapshot_download  # 0.4 s, which local folders do not need

    # Read now, where the client would have read it when it was imported.
    where = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    download = partial(snapshot_download, repo, revision=revision, endpoint=where)
    name = f"{repo}@{revision}" if revision else repo
    try:
        folder = Path(download(allow_patterns=[*NEEDED, *SAFETENSORS]))
        if not any((folder / file).is_file() for file in WEIGHT_FILES[:2]):
            folder = Path(download(allow_patterns=[*NEEDED, *PICKLES]))
        return folder
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: the hub asks for an agreement to its terms; accept them on its page there, "
            "then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the hub's {repo} has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder, and no such model on the hub (a private one needs "
            "`hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_offline(name)) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder, and no valid hub id") from error
    # The client lets errors of its HTTP library through, and which one depends on the version.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        reason = re.sub(r"://\S*@", "://", reason)  # HF_ENDPOINT may hold a name and a password
        raise CheckpointError(f"{name}: could not be downloaded from the hub: {reason}") from error


def _offline(name: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set; unset it"
    else:
        why = "the hub cannot be reached; connect"
    return (
        f"{name}: no such folder, not (completely) in the hub's cache {constants.HF_HUB_CACHE}, "
        f"and {why}, or download it elsewhere (`hf download {name.replace('@', ' --revision ')}`) "
        "and name the folder"
    )


def _fetch_s3(uri: str) -> Path:
    """A copy of the needed objects, in a folder named after the URI and all their versions.

    The folder appears whole or not at all, so any number of processes may fetch at once.
    """
    try:
        objects = _select({Path(file.uri).name: file for file in list_files(uri, recursive=False)})
        if not objects:
            raise CheckpointError(f"{uri}: holds no checkpoint (no config.json, no weights)")
        versions = [f"{name}\0{file.version}\0{file.size_bytes}" for name, file in objects.items()]
        key = hashlib.sha256("\0".join([uri, *versions]).encode()).hexdigest()[:32]
        folder = _cache() / "models" / key
        if not folder.is_dir():
            _download(objects, folder)
        return folder
    except StorageError as error:
        raise CheckpointError(f"the model cannot be read: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{uri}: cannot be stored in {_cache()}: {error.strerror}") from error


def _select(files: dict[str, Stored]) -> dict[str, Stored]:
    """What is needed of a folder's files, sorted by name; .bin only where nothing else is."""
    weights = SAFETENSORS if files.keys() & set(WEIGHT_FILES[:2]) else PICKLES
    patterns = NEEDED + weights
    return {n: files[n] for n in sorted(files) if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


def _download(objects: dict[str, Stored], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        for name, stored in objects.items():
            copy = partial / name
            with open_read(stored.uri, version=stored.version) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
            if copy.stat().st_size != stored.size_bytes:
                raise CheckpointError(f"{stored.uri}: ended early; try again")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cache() -> Path:
    return Path(os.environ.get("CLIPSEG_RAY_CACHE") or "~/.cache/clipseg-ray").expanduser()
