"""
A journal of the changes to an item index: each change is on the disk as a whole before any reader sees it.

The file begins with the state of the index that its changes belong to; a journal of another state is an old one and is
not read. A record is the length of its contents, their SHA-256, and the contents. An incomplete last record of a
process that died is not read, and the next record overwrites it.
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
    The records of the changes to an index in the given state.

    Args:
        folder (`str`): Folder of the index.
        state (`str`): The hash of the contents of the index.
        start (`int`, *optional*, defaults to 0): Position in the file from which records are not known yet.

    Returns:
        `tuple[list[bytes], int]`: The records, and the position in the file where they end.

    Raises:
        [`DataError`]: If the head of the file is damaged, or a record that is not the last one.
    """
    path, head = Path(folder) / JOURNAL_NAME, _head(state)
    try:
        with open(path, "rb") as file:
            found = file.read(len(head))
            if found != head:
                if len(found) == len(head) and not re.match(MAGIC + rb"[0-9a-f]*\n", found):
                    raise DataError(f"{path}: its head is damaged. Delete it; its changes are lost.")
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
                "or delete this file; its changes are lost."
            )
        if not is_whole:
            break
        records.append(record)
        end = after
    return records, (start or len(head)) + end


def append_record(folder: str | os.PathLike, state: str, end: int, record: bytes) -> int:
    """
    Add a record at the position `end`, and return the position where it ends. If it cannot be written, nothing is
    kept.

    Raises:
        `OSError`: If the record cannot be written, for example because the disk is full.
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
    """Each record, the position where it ends, and whether it is complete."""
    place = 0
    while place < len(content):
        begin = place + LENGTH + DIGEST
        length = int.from_bytes(content[place : place + LENGTH], "little")
        place = begin + length
        record = content[begin:place]
        digest = content[begin - DIGEST : begin]
        yield record, min(place, len(content)), len(record) == length and hashlib.sha256(record).digest() == digest
