"""
Files and folders that are written as a whole or not at all, even if the process is killed.

Files that belong together are first written into a hidden folder inside of their destination and flushed to the disk.
One file is then renamed. Several files are first listed in a journal; if the process dies while it moves them, the
next reader or writer of the folder completes the move ([`recover`]). `config.json`, which makes a folder a checkpoint,
is removed first and put back last: until then, programs that know no journal find no checkpoint rather than a mixture.

Locks are those of the operating system, which ends them with the process; a forked child does not inherit them.

After a power loss, everything that a writer has finished is there; an unfinished write leaves the old state or the new
one, if the file system keeps the order of flushed writes (ext4, xfs, btrfs, APFS).
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
except ImportError:  # Windows: files are written as a whole there too, but two writers do not know of each other
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

PARTIAL = ".partial-"
"""The names of folders with unfinished files begin with this."""
JOURNAL = ".commit"
LOCK, TRAINING_LOCK = ".lock", ".training.lock"
HEADS = ("config.json", "adapter_config.json")
STATISTICS_NAME = "data_statistics.json"
PATIENCE = 30.0  # seconds for which a reader or a writer waits for another writer

_locks: set[int] = set()  # descriptors of this process


class NotWritten(OSError):
    """A file or folder could not be written, and nothing of it was kept."""

    def __init__(self, folder: str | os.PathLike, reason: str):
        super().__init__(
            f"{folder}: could not be written, and nothing was kept ({reason}). Free disk space, or choose another "
            "folder."
        )
        self.reason = reason


def _forget_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _take(path: Path, flags: int, surely: bool = False) -> int | None:
    """
    A descriptor of `path` with a lock on it; `None` if another process holds the lock, or the path no longer exists.
    On a file system without locks this succeeds, unless the lock must be certain (`surely`).
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
    A context in which no other process is inside a block with the same folder and name.

    Args:
        folder (`str` or `os.PathLike`): Where the lock file is, for as long as it is held.
        name (`str`, *optional*): The name of the lock file.
        wait (`float`, *optional*): Seconds to wait for another process, `PATIENCE` if not given.
        why (`str`, *optional*): What the error says about that process.

    Raises:
        `OSError`: If another process still holds the lock.
    """
    path, end = Path(folder) / name, time.monotonic() + (PATIENCE if wait is None else wait)
    while (descriptor := _take(path, os.O_RDWR | os.O_CREAT)) is None:
        if time.monotonic() > end:
            raise OSError(f"{folder}: {why}. Wait until it has ended, or choose another folder.")
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
    A temporary folder whose files appear in `folder` together at the end of the block, or not at all if the block
    fails. Files get the permissions that the umask gives. A link of the same name is replaced, not followed.

    Args:
        folder (`str` or `os.PathLike`): Where the files go. Other files that are already there stay, except shards of
            weights that are replaced.
        writes (`bool`, *optional*, defaults to `True`): False on the processes that do not write.
        replaces_all (`bool`, *optional*, defaults to `False`): Whether all other files of the folder are removed.

    Raises:
        `OSError`: If a file cannot be written (then nothing is kept), or if another process writes there.
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
                f"{folder}: the write could not be finished; the next program that opens the folder finishes it"
            ) from error
        raise NotWritten(folder, error.reason if isinstance(error, NotWritten) else one_line(error)) from error
    finally:
        for path in new_folders:
            with suppress(OSError):
                path.rmdir()  # only if it is empty


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A hidden folder in `place` for unfinished files, which readers ignore; it is removed at the end of the block."""
    partial, descriptor = place / f"{PARTIAL}{os.urandom(6).hex()}", None
    try:
        partial.mkdir(parents=True)
        descriptor = _take(partial, os.O_RDONLY) if os.name == "posix" else None
        yield partial
    finally:
        if _journal_of(place) != partial.name:  # otherwise the next program that opens the folder completes the move
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
    Complete the write of a process that died, or wait until a living process has finished its write.

    Raises:
        `OSError`: If the folder is constantly being written, cannot be written, or was copied during a write.
    """
    if os.path.lexists(Path(folder) / JOURNAL):
        with locked(folder):
            _complete(Path(folder).resolve())


def read_whole(folder: str | os.PathLike, read: Callable[[], T]) -> T:
    """
    The result of `read()`, read from a single state of a folder: if another process replaced files meanwhile, `read`
    is called again. If `folder` is not a folder, such as a repository of the Hub, `read` is called once.
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
            raise OSError(f"{folder}: is constantly being written. Read it when the writer has ended.")


def _state(folder: Path) -> set[tuple[str, int, int]]:
    """A value that changes whenever a file of the checkpoint in a folder is replaced."""
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
    """Flush a file, or the names in a folder, to the disk."""
    if os.name != "posix":  # Windows cannot open folders, and cannot flush files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Give all files the permissions that the umask gives, and flush everything to the disk."""
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if not file.is_symlink():
                file.chmod(mode)
                _flush(file)
        _flush(root)


def _commit(partial: Path, folder: Path, replaces_all: bool) -> None:
    """Move the files of `partial` to `folder`, with a journal if that takes more than one step."""
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
    Old files that must go because they would be read with the new ones: weights in another number of shards, the ids
    of an index of format 1, changes to another index, item statistics of other weights.
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
    """Take the steps of a journal that were not taken yet, and remove the journal."""
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
    """The name of the folder from which the files of a journal are moved."""
    try:
        return json.loads((folder / JOURNAL).read_text(encoding="utf-8"))["from"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _complete(folder: Path) -> None:
    """Take the remaining steps of a journal, and remove files that dead processes left. Needs the lock."""
    path = folder / JOURNAL
    if os.path.lexists(path):
        try:
            journal = json.loads(path.read_text(encoding="utf-8"))
            partial = folder / journal["from"]
            names = (journal["from"], *journal["move"], *journal["remove"])
            valid = all(name == os.path.basename(name) and name not in ("", ".", "..") for name in names)
            # a journal from elsewhere, for example from a copy or a clone, is not obeyed
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
