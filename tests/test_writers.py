"""
Whatever is written is the old state or the new one, never a mixture: the process is killed before each of its file
operations in turn, or told there that the disk is full; readers and other writers come at any time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from transrec_hf import files
from transrec_hf.files import locked, read_whole, recover, whole_file, written_whole


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
KILLED = 9


def _steps(folder: Path, stop: Callable[[], None], at: int) -> Callable[[], bool]:
    """
    From now on in this process, call `stop` before the file operation number `at` below a folder. Tells whether it
    has been reached.
    """
    count, fsync = 0, os.fsync

    def step() -> None:
        nonlocal count
        count += 1
        if count == at:
            stop()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            inside = os.path.abspath(os.fsdecode(arguments[0])).startswith(str(folder)) or event == "os.rmdir"
            if inside and not reads:
                step()

    def counted_fsync(descriptor: int) -> None:
        step()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    return lambda: count >= at


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            work()
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(
    folder: Path, prepare: Callable[[], None], write: Callable[[], None], *, full_disk: bool = False
) -> Iterator[int]:
    """
    Brings a folder into its old state and writes to it, once for each file operation that this takes, and stops it
    there. Yields after each of them; the last one was not stopped.
    """
    at, status = 0, KILLED
    while status:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        prepare()

        def work(at: int = at) -> None:
            reached = _steps(folder, _no_space if full_disk else lambda: os._exit(KILLED), at)
            with contextlib.suppress(OSError) if full_disk else contextlib.nullcontext():
                write()
            os._exit(KILLED if reached() else 0)

        status = in_child(work)
        assert status in (0, KILLED)
        yield at
    assert at > 3, "no operation was seen"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def texts(folder: Path) -> dict[str, str]:
    """What is seen by a program that knows nothing of ours."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.name[0] != "."}


# Folders


OLD = {"config.json": "old", "model-00001-of-00002.safetensors": "old", "kept.txt": "kept"}
NEW = {"config.json": "new", "model.safetensors": "new", "processor_config.json": "new"}
BOTH = {**NEW, "kept.txt": "kept"}


def fill(folder: Path, contents: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "folder", OLD)
    return tmp_path / "folder"


def write_new(folder: Path) -> None:
    with written_whole(folder) as partial:
        fill(partial, NEW)


@pytest.mark.parametrize("full_disk", [False, True], ids=["killed", "full disk"])
def test_a_folder_is_old_or_new_at_every_operation(folder: Path, full_disk: bool) -> None:
    seen = set()
    for _ in interrupted(folder, lambda: fill(folder, OLD), lambda: write_new(folder), full_disk=full_disk):
        assert "config.json" not in texts(folder) or texts(folder) in (OLD, BOTH)
        recover(folder)
        assert texts(folder) in (OLD, BOTH)
        seen.add(texts(folder) == BOTH)
        write_new(folder)  # and the next writer clears up what the killed one has left
        assert texts(folder) == BOTH and names(folder) == set(BOTH)
    assert seen == {False, True}


def test_a_killed_completion_is_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader that completes is killed as well, at each of its operations."""

    def killed_with_its_journal_written() -> None:
        fill(folder, OLD)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_move", lambda *_: os._exit(KILLED))
            assert in_child(lambda: write_new(folder)) == KILLED
        assert files.JOURNAL in names(folder) and texts(folder) == OLD

    for _ in interrupted(folder, killed_with_its_journal_written, lambda: recover(folder)):
        assert "config.json" not in texts(folder) or texts(folder) in (OLD, BOTH)
        recover(folder)
        assert texts(folder) == BOTH


def test_an_error_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    for place in (folder, tmp_path / "a" / "b"):
        with (
            pytest.raises(OSError, match=r"nothing of it was kept \(full\). Make room"),
            written_whole(place) as partial,
        ):
            (partial / "config.json").write_text("new")
            raise OSError("full")
    assert names(folder) == set(OLD) and not (tmp_path / "a").exists()


def test_permissions_are_those_of_the_umask(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        with written_whole(folder) as partial:
            (partial / "secret").touch(0o600)
            (partial / "open").touch()
    finally:
        os.umask(before)
    assert {(folder / name).stat().st_mode & 0o777 for name in ("secret", "open")} == {0o640}


def test_a_link_is_replaced_and_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (folder / "card").symlink_to(tmp_path / "target")
    with whole_file(folder / "card") as partial:
        partial.write_text("theirs")
    assert (tmp_path / "target").read_text() == "mine" and (folder / "card").read_text() == "theirs"


def test_replacing_all(folder: Path) -> None:
    (folder / "sub").mkdir()
    with written_whole(folder, replaces_all=True) as partial:
        fill(partial, NEW)
    assert texts(folder) == NEW


# Several processes


def test_two_writers_of_other_files_do_not_disturb_each_other(tmp_path: Path) -> None:
    with written_whole(tmp_path / "run") as one:
        (one / "one.json").write_text("1")
        with written_whole(tmp_path / "run") as two:
            (two / "two.json").write_text("2")
    assert texts(tmp_path / "run") == {"one.json": "1", "two.json": "2"}


def test_a_writer_is_refused_while_another_one_moves_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with locked(folder), pytest.raises(OSError, match="another process is writing there"):
        write_new(folder)
    assert names(folder) == set(OLD)
    (folder / files.JOURNAL).write_text("{}")
    with locked(folder), pytest.raises(OSError, match="another process is writing there"):
        recover(folder)


def test_the_lock_of_a_process_ends_with_it_and_is_not_inherited(folder: Path) -> None:
    def die_with_the_lock() -> None:
        with locked(folder):
            os._exit(KILLED)

    assert in_child(die_with_the_lock) == KILLED
    with locked(folder, wait=0):
        orphan = os.fork()
        if orphan == 0:  # as a worker of a loader that outlives its parent for some seconds
            time.sleep(60)
            os._exit(0)
    try:
        with locked(folder, wait=0):
            pass
    finally:
        os.kill(orphan, 9)
        os.waitpid(orphan, 0)
    assert names(folder) == set(OLD)


def test_many_writers_leave_the_files_of_one(folder: Path) -> None:
    children = []
    for writer in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(OSError):
                for _ in range(5):
                    with written_whole(folder) as partial:
                        fill(partial, dict.fromkeys(("config.json", "model.safetensors", "a.json"), str(writer)))
                status = 0
            os._exit(status)
        children.append(child)
    torn = 0
    while children:
        found = read_whole(folder, lambda: texts(folder))
        torn += len({text for name, text in found.items() if not name.startswith(("kept", "model-"))}) > 1
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    assert torn == 0
    assert len(set(texts(folder).values()) - {"kept"}) == 1


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "[]",
        "[" * 9999,
        '{"from": ".partial-0", "inode": 0, "move": [], "remove": ["kept.txt"]}',
        '{"from": "..", "inode": INODE, "move": [], "remove": ["kept.txt"]}',
        '{"from": ".partial-1", "inode": INODE, "move": ["../target"], "remove": []}',
        '{"from": ".partial-1", "inode": INODE, "move": [], "remove": ["/etc/passwd"]}',
        '{"from": ".partial-1", "inode": 1, "move": [], "remove": ["kept.txt"]}',
    ],
)
def test_a_journal_of_somebody_else_is_not_obeyed(folder: Path, journal: str) -> None:
    (folder / ".partial-1").mkdir()
    inode = str((folder / ".partial-1").stat().st_ino)
    (folder / files.JOURNAL).write_text(journal.replace("INODE", inode))
    with pytest.raises(OSError, match="was copied while it was being written"):
        recover(folder)
    assert texts(folder) == OLD
