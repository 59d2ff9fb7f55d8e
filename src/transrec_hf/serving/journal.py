"""
Changes to an item index, written ahead: each one is on the disk, whole, before anybody sees it.

The file begins with the state of the index that its changes are of; one that is of another state is left over, and not
read. A record is its length, the SHA-256 of its contents, and these; what a process that died has left of its last one
is not read, and overwritten by the next.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError


JOURNAL_NAME = "item_index.journal"
MAGIC = b"transrec journal 1\n"
LENGTH, DIGEST = 8, 32  # bytes


def read_journal(folder: str | os.PathLike, state: str, start: int = 0) -> tuple[list[bytes], int]:
    """
    The records of the changes to an index that is in `state`.

    Args:
        folder (`str`): Where the index is.
        state (`str`): The hash of its contents.
        start (`int`, *optional*, defaults to 0): Where in the file the records begin that are not known yet.

    Returns:
        `tuple[list[bytes], int]`: The records, and where in the file they end.

    Raises:
        [`DataError`]: If its head is damaged, or a record that is followed by others.
    """
    path, head = Path(folder) / JOURNAL_NAME, _head(state)
    try:
        with open(path, "rb") as file:
            found = file.read(len(head))
            if found != head:
                if len(found) == len(head) and not re.match(MAGIC + rb"[0-9a-f]*\n", found):
                    raise DataError(f"{path}: its head is damaged. Delete it, and all changes with it.")
                return [], 0
            file.seek(start or len(head))
            content = file.read()
    except FileNotFoundError:
        return [], 0
    records, end = [], 0
    for record, after, is_whole in _records(content):
        if not is_whole and after < len(content):
            raise DataError(
                f"{path}: a change is damaged, {len(content) - after:,} bytes before the end. Make the index again, "
                "or delete this file, and all changes with it."
            )
        if not is_whole:
            break
        records.append(record)
        end = after
    return records, (start or len(head)) + end


def append_record(folder: str | os.PathLike, state: str, end: int, record: bytes) -> int:
    """
    Add a record where the others end, and return where it ends; nothing of it is kept if it cannot be written.

    Raises:
        `OSError`: If there is no room for it, say.
    """
    path, head = Path(folder) / JOURNAL_NAME, _head(state)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        content = b"" if end else head
        content += len(record).to_bytes(LENGTH, "little") + hashlib.sha256(record).digest() + record
        os.ftruncate(descriptor, end)
        os.lseek(descriptor, end, os.SEEK_SET)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)
    if is_new and os.name == "posix":
        folder_descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder_descriptor)
        finally:
            os.close(folder_descriptor)
    return end + len(content)


def _head(state: str) -> bytes:
    return MAGIC + state.encode() + b"\n"


def _records(content: bytes) -> Iterator[tuple[bytes, int, bool]]:
    """Each record, where it ends, and whether it is whole."""
    place = 0
    while place < len(content):
        begin = place + LENGTH + DIGEST
        length = int.from_bytes(content[place : place + LENGTH], "little")
        place = begin + length
        record = content[begin:place]
        digest = content[begin - DIGEST : begin]
        yield record, min(place, len(content)), len(record) == length and hashlib.sha256(record).digest() == digest
