"""Fetch a checkpoint: from a local folder, the Hugging Face hub, or a folder on S3.

The result is a local folder with the files of NEEDED and one form of the weights. Nothing in the
folder is ever run as code.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import log
from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.model.weight_files import (
    PICKLES,
    PICKLES_VARIANTS,
    SAFETENSORS,
    SAFETENSORS_VARIANTS,
    find_weights,
)
from pipeline.storage import FileInfo, check_uri, is_s3, list_files, open_read

NEEDED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "open_clip_config.json",  # never read; it tells what the folder is
)
# In the order of preference; only one of them is downloaded.
_FORMS = (SAFETENSORS, PICKLES, SAFETENSORS_VARIANTS, PICKLES_VARIANTS)
# The model that ships with the project.
DEMO = "demo"
_BUNDLED = Path(__file__).parent.parent / "demo" / "model"
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_COPY_BYTES = 8 << 20
# Repositories on the hub that a mistyped one may have meant.
KNOWN = (
    *("CIDAS/clipseg-rd64-refined", "CIDAS/clipseg-rd64", "CIDAS/clipseg-rd16"),
    *("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"),
    *("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"),
)


def fetch(model: str) -> Path:
    """The local folder of a checkpoint: a folder, `org/name[@revision]` or `s3://bucket/folder`.

    `demo` is the bundled model, in whatever folder a process stands; a folder of that name is
    written ./demo. Else what exists here is taken for a folder; what looks like a path (begins
    with . / ~ or has more than one slash) is never looked up on the hub. Of a remote checkpoint
    only the needed files are downloaded, a .bin only if there are no safetensors, and kept: in the
    hub's own cache, or for S3 below $CLIPSEG_RAY_CACHE (default ~/.cache/clipseg-ray).
    CheckpointError says what is wrong in one line.
    """
    if not model.strip():
        raise CheckpointError(
            "the model is an empty string; name a folder, a hub id or an s3:// URI"
        )
    if model == DEMO:
        if Path(DEMO, "config.json").exists():  # never another model than was meant, in silence
            raise CheckpointError(
                "demo: is the bundled model, and here a folder of that name with a checkpoint: "
                f"write ./demo for the folder, or {_BUNDLED} for the bundled model"
            )
        return _BUNDLED
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
    names = _list_names(folder)
    if "config.json" not in names:
        if any(name.startswith("open_clip") for name in names):
            raise CheckpointError(
                f"{model}: holds a model in open_clip's own format, which is not read; name the "
                "same model in transformers' format, a folder or repository with config.json and "
                "model.safetensors (many hold both)"
            )
        raise CheckpointError(f"{model}: has no config.json, so it is no checkpoint")
    if find_weights(names, model) is None:
        raise CheckpointError(f"{model}: has no weights (model.safetensors or pytorch_model.bin)")
    return folder


def _list_names(folder: Path) -> list[str]:
    """The plain files of a folder; the client makes none if there is nothing to download."""
    return [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []


def _fetch_hub(repo: str, revision: str | None) -> Path:
    """A snapshot of the needed files: from the hub, or its cache if the hub is out of reach."""
    from huggingface_hub import errors, snapshot_download  # 0.4 s, which local folders do not need

    # Read now, where the client would have read it when it was imported.
    where = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    download = partial(
        snapshot_download, repo, revision=revision, endpoint=where, tqdm_class=_count_bytes()
    )
    name = f"{repo}@{revision}" if revision else repo
    try:
        for form in _FORMS:
            folder = Path(download(allow_patterns=[*NEEDED, *form]))
            if find_weights(_list_names(folder), name):
                break
        return folder
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: the hub asks for an agreement to its terms; accept them on its page there, "
            "then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the hub's {repo} has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder, and no such model on the hub{_suggest(repo)} (a private one "
            "needs `hf auth login`)"
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


def _count_bytes() -> Any:
    """A progress bar drawing nothing; it tells the running phase how much is downloaded."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bytes(tqdm):  # type: ignore[misc]  # the client wants a subclass
        def __init__(self, *arguments: Any, **options: Any):
            # Of the client's own class alone.
            known = {k: v for k, v in options.items() if k not in ("name", "disable")}
            super().__init__(*arguments, **known, file=io.StringIO())

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B" and self.total and log.how_far:
                done, total = (f"{n / 1e6:,.1f}" for n in (self.n, self.total))
                log.how_far[-1](f"{done} of {total} MB downloaded from the hub")

    return Bytes


def _suggest(repo: str) -> str:
    near = difflib.get_close_matches(repo, KNOWN, 1, cutoff=0.8)
    return f"; did you mean {near[0]}?" if near else ""


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
        files = {Path(file.uri).name: file for file in list_files(uri, recursive=False)}
        objects = _select(files, uri)
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


def _select(files: dict[str, FileInfo], folder: str) -> dict[str, FileInfo]:
    """The needed files of a folder, sorted by name."""
    found = find_weights(files, folder) or ""
    form = next((form for form in _FORMS if _matches(found, form)), ())
    return {name: files[name] for name in sorted(files) if _matches(name, NEEDED + form)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _download(objects: dict[str, FileInfo], folder: Path) -> None:
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
