"""
Files and folders that are written whole or not at all, whatever happens meanwhile.

What belongs together is written into a hidden folder inside of its destination and flushed to the disk. One file is
then renamed; several are listed in a journal first, and if the process dies among them, whoever opens the folder next,
reader or writer, completes it ([`recover`]). The file without which a folder is no checkpoint (`config.json`) is taken
away first and put back last: a program that knows no journal finds no checkpoint then, rather than a mixture of two.

Locks are those of the operating system, which ends them with the process; a forked child does not inherit them.

On power loss: what a writer has returned from is there; before, the old state is, or the new one, where the file
system keeps the order of what is flushed (ext4, xfs, btrfs, APFS).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from .errors import one_line


try:
    import fcntl
except ImportError:  # Windows: files are whole there too, but two writers do not know of each other
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

PARTIAL = ".partial-"
"""Begins the name of a folder that holds what is not yet written whole."""
JOURNAL = ".commit"
LOCK, TRAINING_LOCK = ".lock", ".training.lock"
HEADS = ("config.json", "adapter_config.json")
STATISTICS_NAME = "data_statistics.json"
PATIENCE = 30.0  # seconds for which a reader or a writer waits for another writer

_locks: set[int] = set()  # descriptors of this process


class NotWritten(OSError):
    """Something could not be written, and nothing of it was kept."""

    def __init__(self, folder: str | os.PathLike, reason: str):
        super().__init__(
            f"{folder}: could not be written, nothing of it was kept ({reason}). Make room, or choose another folder."
        )
        self.reason = reason


def _forget_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _take(path: Path, flags: int, surely: bool = False) -> int | None:
    """
    A descriptor of `path` with a lock on it; `None` if another process has it, or the path is gone meanwhile. Where
    the file system has no locks, it counts as taken, unless it must be `surely`.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is None:
            taken = not surely
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        taken = False
    except OSError:
        taken = not surely
    if taken:
        _locks.add(descriptor)
        return descriptor
    os.close(descriptor)
    return None


def _release(descriptor: int) -> None:
    if descriptor in _locks:  # not in a forked child, which has closed it
        _locks.remove(descriptor)
        os.close(descriptor)


@contextmanager
def locked(
    folder: str | os.PathLike,
    name: str = LOCK,
    wait: float | None = None,
    why: str = "another process is writing there",
) -> Iterator[None]:
    """
    Inside, no other process is in a block with the same folder and name.

    Args:
        folder (`str` or `os.PathLike`): Where the lock file is, for as long as it is held.
        name (`str`, *optional*): The name of the lock file.
        wait (`float`, *optional*): Seconds to wait for another process, `PATIENCE` if not given.
        why (`str`, *optional*): What is said of that process.

    Raises:
        `OSError`: If another process still holds it.
    """
    path, end = Path(folder) / name, time.monotonic() + (PATIENCE if wait is None else wait)
    while (descriptor := _take(path, os.O_RDWR | os.O_CREAT)) is None:
        if time.monotonic() > end:
            raise OSError(f"{folder}: {why}. Wait for its end, or choose another folder.")
        time.sleep(0.01)
    try:
        yield
    finally:
        if descriptor in _locks:
            path.unlink(missing_ok=True)
        _release(descriptor)


@contextmanager
def written_whole(folder: str | os.PathLike, writes: bool = True, replaces_all: bool = False) -> Iterator[Path]:
    """
    A temporary folder whose files appear in `folder` together at the end of the block, or not at all if it fails. They
    get the permissions that the umask says. A link of the same name is replaced, not followed.

    Args:
        folder (`str` or `os.PathLike`): Where the files go; what is there already stays, if it has another name and is
            not a shard of weights that are replaced.
        writes (`bool`, *optional*, defaults to `True`): False on the processes that do not write.
        replaces_all (`bool`, *optional*, defaults to `False`): Whether everything that is there already goes away.

    Raises:
        `OSError`: If something cannot be written, and then nothing of it is kept; or if another process writes there.
    """
    place = Path(folder).resolve()
    if not writes:
        yield place / f"{PARTIAL}elsewhere"
        return
    new_folders = [path for path in (place, *place.parents) if not path.exists()]
    try:
        with partial_folder(place) as partial:
            yield partial
            _settle(partial)
            with locked(place):
                _complete(place)
                _commit(partial, place, replaces_all)
    except (OSError, SafetensorError) as error:
        if os.path.lexists(place / JOURNAL):
            raise OSError(
                f"{folder}: could not be written to the end, which is done when it is next opened"
            ) from error
        raise NotWritten(folder, error.reason if isinstance(error, NotWritten) else one_line(error)) from error
    finally:
        for path in new_folders:
            with suppress(OSError):
                path.rmdir()  # only if it is empty


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A hidden folder in `place`, for what is not there for readers; it goes away at the end, or with the process."""
    partial, descriptor = place / f"{PARTIAL}{os.urandom(6).hex()}", None
    try:
        partial.mkdir(parents=True)
        descriptor = _take(partial, os.O_RDONLY) if os.name == "posix" else None
        yield partial
    finally:
        if _journal_of(place) != partial.name:  # else whoever opens the folder next completes it
            shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            _release(descriptor)


@contextmanager
def whole_file(file: str | os.PathLike) -> Iterator[Path]:
    """A temporary path for one file, see [`written_whole`]."""
    file = Path(file)
    with written_whole(file.parent) as partial:
        yield partial / file.name


def write_text(file: str | os.PathLike, text: str) -> Path:
    """Writes a text file, see [`written_whole`], and returns its path."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(file)


def write_json(file: str | os.PathLike, values: Any) -> Path:
    """Writes indented JSON, see [`written_whole`], and returns its path."""
    return write_text(file, json.dumps(values, indent=2) + "\n")


def recover(folder: str | os.PathLike) -> None:
    """
    Complete what a process was writing when it died, or wait for the end of one that is alive.

    Raises:
        `OSError`: If the folder is written all the time or cannot be written, or was copied while it was written.
    """
    if os.path.lexists(Path(folder) / JOURNAL):
        with locked(folder):
            _complete(Path(folder).resolve())


def read_whole(folder: str | os.PathLike, read: Callable[[], T]) -> T:
    """
    What `read()` returns, all of it from one state of a folder: if another process has replaced files meanwhile, it is
    read again. Of what is no folder, such as a repository of the Hub, just what it returns.
    """
    place, end = Path(folder), time.monotonic() + PATIENCE
    if not place.is_dir():
        return read()
    while True:
        recover(place)
        before = _state(place)
        try:
            result = read()
        except Exception:
            if _state(place) == before:
                raise
        else:
            if _state(place) == before:
                return result
        if time.monotonic() > end:
            raise OSError(f"{folder}: is being written all the time. Read it when that has ended.")


def _state(folder: Path) -> set[tuple[str, int, int]]:
    """What tells one state of the files that make a checkpoint from another one."""
    found = set()
    for entry in os.scandir(folder):
        if entry.name == JOURNAL or (
            entry.name.endswith((".json", ".parquet", ".safetensors")) and not entry.name.startswith(".")
        ):
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                found.add((entry.name, status.st_ino, status.st_mtime_ns))
    return found


def _flush(path: str | os.PathLike) -> None:
    """Write a file, or the names in a folder, to the disk."""
    if os.name != "posix":  # Windows neither opens folders nor flushes what it has opened to read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Give all files the permissions that the umask says, and flush everything to the disk."""
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if not file.is_symlink():
                file.chmod(mode)
                _flush(file)
        _flush(root)


def _commit(partial: Path, folder: Path, replaces_all: bool) -> None:
    """Move what is in `partial` to `folder`, by way of a journal if that takes more than one step."""
    new = sorted({path.name for path in partial.iterdir()}, key=lambda name: (name in HEADS, name))
    old = {path.name for path in folder.iterdir() if not path.name.startswith((PARTIAL, LOCK, TRAINING_LOCK))}
    superseded = (old if replaces_all else _superseded(set(new), old)) - set(new)
    gone = sorted(superseded, key=lambda name: (name not in HEADS, name))
    journal = {"from": partial.name, "inode": partial.stat().st_ino, "move": new, "remove": gone}
    if len(new) + len(gone) > 1:
        (partial / JOURNAL).write_text(json.dumps(journal), encoding="utf-8")
        _flush(partial / JOURNAL)
        os.replace(partial / JOURNAL, folder / JOURNAL)
        _flush(folder)
    _move(journal, folder)


def _superseded(new: set[str], old: set[str]) -> set[str]:
    """
    Files that would be read with the new ones: weights in another number of shards, the ids of an index of format 1,
    changes to another index, what other weights knew of their items.
    """
    gone = {"item_index.json", "item_index.journal"} if "item_index.safetensors" in new else set()
    if "config.json" in new:
        gone.add("item_statistics.parquet")
    for kind in ("model", "adapter_model"):
        pattern = re.compile(rf"{kind}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        if any(pattern.fullmatch(name) for name in new):
            gone |= {name for name in old if pattern.fullmatch(name)}
    return gone & old


def _move(journal: dict[str, Any], folder: Path) -> None:
    """Take the steps of a journal that are not taken yet, and end it."""
    partial = folder / journal["from"]
    waiting = [name for name in journal["move"] if os.path.lexists(partial / name)]
    heads = set(HEADS) & set(waiting) if len(journal["move"]) > 1 else set()
    for name in (*heads, *journal["remove"]):
        _remove(folder / name)
    for name in waiting:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            _remove(folder / name)
        os.replace(partial / name, folder / name)
    _flush(folder)
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _journal_of(folder: Path) -> str | None:
    """The name of the folder that a journal says files come from."""
    try:
        return json.loads((folder / JOURNAL).read_text(encoding="utf-8"))["from"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _complete(folder: Path) -> None:
    """Take the steps that a journal still lists, and remove what processes that died have left; under the lock."""
    path = folder / JOURNAL
    if os.path.lexists(path):
        try:
            journal = json.loads(path.read_text(encoding="utf-8"))
            partial = folder / journal["from"]
            names = (journal["from"], *journal["move"], *journal["remove"])
            valid = all(name == os.path.basename(name) and name not in ("", ".", "..") for name in names)
            # a journal that came from elsewhere, as with a copy or a clone, is not obeyed
            valid = valid and partial.lstat().st_ino == journal["inode"] and journal["from"].startswith(PARTIAL)
        except (OSError, ValueError, LookupError, TypeError, RecursionError, AttributeError):
            valid = False
        if not valid:
            raise OSError(f"{path}: this folder was copied while it was being written. Copy it again, or delete it.")
        _move(journal, folder)
    for partial in folder.glob(f"{PARTIAL}*"):
        if os.name == "posix" and partial.is_dir() and not partial.is_symlink():
            with suppress(OSError):
                if (descriptor := _take(partial, os.O_RDONLY, surely=True)) is not None:
                    shutil.rmtree(partial, ignore_errors=True)
                    _release(descriptor)
