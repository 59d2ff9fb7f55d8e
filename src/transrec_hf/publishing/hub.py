"""Pushing checkpoints to the Hub."""

from __future__ import annotations

import fnmatch
import json
import os
import pickletools
import shutil
import tempfile
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..errors import DataError, bad_input
from ..files import HEADS, partial_folder, read_whole, written_whole
from ..items.meeting import ITEM_STATISTICS_NAME
from ..model.tuning_transrec import refuse_local
from .checkpoint import load_checkpoint
from .facts import ADAPTER_NAME, named_source, read_json


logger = logging.get_logger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
"""Formats that can run code when they are read. They are never pushed."""
NOT_PUSHED = (*PICKLES, "_*", ".*", "checkpoint-*")
"""Files of a run that do not belong to its result. They are not pushed, without a warning."""
TEXTS = ("", ".csv", ".jinja", ".md", ".py", ".tiktoken", ".toml", ".txt", ".yaml", ".yml")
BINARIES = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".webp": (b"RIFF",),
    ".parquet": (b"PAR1",),
    ".model": (b"\n",),  # the vocabulary of a sentencepiece tokenizer: a protocol buffer
}
"""The first bytes of files of these kinds."""
MAX_TEXT = 2**28  # bytes
OF_CODE = {"BUILD", "GLOBAL", "INST", "NEWOBJ", "OBJ", "REDUCE", "STACK_GLOBAL"}


def check_pushable(folder: str | os.PathLike, name: str | None = None) -> None:
    """
    Raise [`DataError`] if only this machine could load a checkpoint: one that is thin or an adapter, and whose other
    weights are in a folder.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        name (`str`, *optional*): Its name in the error.
    """
    place, name = Path(folder), name or str(folder)
    with bad_input(name):
        refuse_local(read_json(place / HEADS[0]).get("weights_from") or [])
    base = read_json(place / ADAPTER_NAME).get("base_model_name_or_path")
    if base and not named_source(base)["on_hub"]:
        raise DataError(
            f"{name}: an adapter of the folder {base} works only on this machine: push that folder first, then write "
            f"its name on the Hub into {ADAPTER_NAME}, as base_model_name_or_path"
        )


def make_whole(folder: str | os.PathLike) -> None:
    """Write into a thin checkpoint the weights that it only names. Other checkpoints stay as they are."""
    place = Path(folder)
    if not read_json(place / HEADS[0]).get("weights_from"):
        return
    model, _ = load_checkpoint(str(place))
    with written_whole(place) as partial:
        model.save_pretrained(partial, thin=False)
        if (place / ITEM_STATISTICS_NAME).exists():  # they belong to these weights, which are the same
            shutil.copyfile(place / ITEM_STATISTICS_NAME, partial / ITEM_STATISTICS_NAME)


def upload_checkpoint(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> Any:
    """
    Push a folder with a checkpoint (model, processor, statistics, card, index) in one commit. All files are in one
    state, even if another process writes to the folder meanwhile.

    Only files of known kinds are pushed, recognised by their contents: safetensors, JSON, text, images and
    vocabularies. Hidden files, the checkpoints of a training run, pickles under any name, and links out of the folder
    are not pushed.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): An existing repository.
        kwargs: Further arguments of [`~huggingface_hub.HfApi.upload_folder`]: `token`, `revision`, `commit_message`,
            `create_pr`, `path_in_repo`, `run_as_future`.

    Raises:
        [`DataError`]: If the configuration of the checkpoint is among the files that are not pushed.
    """
    place = Path(folder).resolve()
    with ExitStack() as stack:
        if os.access(place, os.W_OK):  # so that files are linked rather than copied
            partial = stack.enter_context(partial_folder(place))
        else:
            partial = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="transrec-push-")))
        snapshot = partial / "snapshot"
        left = read_whole(place, lambda: _collect(place, snapshot))
        check_pushable(snapshot, str(folder))
        for name in HEADS:
            if name in left:
                raise DataError(
                    f"{folder}: {name} cannot be pushed: it is {left[name]}. Replace it by a regular file, then push "
                    "again."
                )
        if left:
            logger.warning("Not pushed: %s", "; ".join(f"{name} ({reason})" for name, reason in sorted(left.items())))
        with warnings.catch_warnings():  # the item statistics are a table, but not a data set
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            result: Any = HfApi().upload_folder(folder_path=str(snapshot), repo_id=repo_id, **kwargs)
        if kwargs.get("run_as_future"):
            held = stack.pop_all()
            result.add_done_callback(lambda _: held.close())
        return result


def _collect(folder: Path, snapshot: Path) -> dict[str, str]:
    """Put the files to push into a separate folder, and return why each of the other files is not pushed."""
    shutil.rmtree(snapshot, ignore_errors=True)  # files that were collected during a write
    snapshot.mkdir()
    left = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _stays_behind(name)]
        linked = [name for name in folders if Path(root, name).is_symlink()]
        for name in [*linked, *(name for name in files if not _stays_behind(name))]:
            path = Path(root, name)
            relative = path.relative_to(folder)
            if reason := _why_not(path, folder):
                left[relative.as_posix()] = reason
                continue
            target = snapshot / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), target)
            except OSError:  # another file system
                shutil.copyfile(path, target)
    return left


def _stays_behind(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in NOT_PUSHED)


def _why_not(path: Path, folder: Path) -> str | None:
    """Why a file is not pushed."""
    if path.is_symlink() and not path.resolve().is_relative_to(folder):
        return "a link out of the folder"
    if not path.is_file():
        return "not a file"
    suffix, name = path.suffix.lower(), path.name
    if suffix == ".safetensors":
        with suppress(SafetensorError, OSError):
            with safe_open(path, framework="np"):
                return None
        return "not what its name says"
    with open(path, "rb") as file:
        start = file.read(16)
        if name == ITEM_STATISTICS_NAME:
            return None if start.startswith(b"PAR1") else "not what its name says"
        if suffix in BINARIES or name.startswith("events.out.tfevents."):
            known = start.startswith(BINARIES.get(suffix, b""))
            return None if known and not _is_pickle(path) else "not what its name says"
        if suffix not in (".json", *TEXTS):
            return "of no kind that a checkpoint has"
        if path.stat().st_size > MAX_TEXT:
            return "too large for a text"
        try:
            text = path.read_text(encoding="utf-8")
            if suffix == ".json":
                json.loads(text)
        except (ValueError, RecursionError):
            return "not what its name says"
    return "a pickle" if "\0" in text or _is_pickle(path) else None


def _is_pickle(path: Path) -> bool:
    """Whether reading the file as a pickle would call a function."""
    calls = False
    with open(path, "rb") as file:
        try:
            for operation, _, _ in pickletools.genops(file):
                calls |= operation.name in OF_CODE
        except Exception:  # no pickle
            return False
    return calls
