"""
The items of a recommender, which change while it serves. With a folder, a change is in its journal before anybody sees
it; when the journal has grown, index and journal are written anew as one file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers.utils import logging

from ..errors import DataError
from ..files import locked, read_whole
from .approximate import ApproximateIndex
from .histories import find_items
from .index import INDEX_NAME, ItemIndex
from .journal import JOURNAL_NAME, append_record, read_journal
from .snapshot import Change, Snapshot


logger = logging.get_logger(__name__)

INDEX_LOCK = ".index.lock"
WAIT = 30.0  # seconds for another process that changes the same index
MIN_COMPACTED = 2**13  # rows that were added or have gone before an index is written anew
COMPACTED_SHARE = 0.25  # of all rows


class LiveItems:
    """
    The items of a recommender, and their changes.

    Args:
        items ([`ItemIndex`]): Those to begin with.
        size (`int`, *optional*): Numbers of an item vector without the popularity, which the model knows; not given
            where items are looked at and removed, but not searched.
        folder (`str`, *optional*): Where the index is, if changes are to be kept.
        device (`torch.device`, *optional*): Where it is searched.

    Attributes:
        snapshot ([`Snapshot`]): The items now.
    """

    def __init__(
        self,
        items: ItemIndex,
        size: int | None = None,
        folder: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        *,
        _seen: tuple[int, ...] = (),
    ):
        self.size, self.device = size, device
        self.folder = None if folder is None else Path(folder)
        self._lock = threading.RLock()
        self._find_cells: Callable[[Snapshot], ApproximateIndex] | None = None
        self._end = 0
        self._seen = _seen
        self._start(items)
        if self.folder is not None:
            if not items.state:
                items = self.snapshot.to_index()
                self._start(replace(items, state=items.save(self.folder)))
            self.refresh()

    @classmethod
    def open(cls, folder: str | os.PathLike, size: int | None = None, device: torch.device | str = "cpu") -> LiveItems:
        """
        The items of an index in a folder, with all changes.

        Raises:
            [`DataError`]: If there is none, or it is damaged.
        """
        seen, items = read_whole(folder, lambda: (_stamp(folder, INDEX_NAME), ItemIndex.from_pretrained(folder)))
        if items is None:
            raise DataError(f"{folder}: there is no item index here ({INDEX_NAME}). Make one: transrec encode.")
        return cls(items, size, folder, device, _seen=seen)

    def remove(self, item_ids: Iterable[Any], readable: bool = False) -> list[str]:
        """
        Stop recommending items.

        Args:
            item_ids (`Iterable[str]`): Their ids.
            readable (`bool`, *optional*, defaults to `False`): Whether they may still stand in histories.

        Returns:
            `list[str]`: The ids.

        Raises:
            [`UnknownItems`]: If one is not there.
        """
        removed: list[str] = []
        item_ids = item_ids if isinstance(item_ids, str) else list(item_ids)

        def make(snapshot: Snapshot) -> Change | None:
            removed[:] = dict.fromkeys(snapshot.ids(find_items(snapshot, item_ids)))
            return (Change(hidden=removed) if readable else Change(removed=removed)) if removed else None

        self.change(make)
        return removed

    def _start(self, items: ItemIndex) -> None:
        version = items.state or f"{items.catalogue_hash[:32]}{items.encoder_hash[:32]}"
        self.base_version = version[:16]
        known = 0 if items.scan is None else items.scan.values.shape[1]
        size = known if self.size is None else self.size
        self.snapshot = Snapshot.of(items, size, self.base_version, self.device)
        self._end = 0
        if self._find_cells is not None:
            threading.Thread(target=self._renew_cells, name="transrec-cells", daemon=True).start()

    @property
    def base(self) -> ItemIndex:
        """The index without the changes since it was written."""
        return self.snapshot.segments[0].items

    def refresh(self) -> bool:
        """
        See what other processes have changed in the folder.

        Returns:
            `bool`: Whether there was anything.

        Raises:
            `FileNotFoundError`: If the index is gone.
            [`DataError`]: If it is damaged.
        """
        if self.folder is None or self._stamp() == self._seen:
            return False
        with self._lock:
            before = self.snapshot.version
            while (stamp := self._stamp()) != self._seen:
                items = read_whole(self.folder, self._reread)
                if items is not None:
                    self._start(items)
                records, self._end = read_journal(self.folder, self.base.state, self._end)
                for record in records:
                    self._apply(Change.from_bytes(record, self.base.encoder_hash))
                self._seen = stamp
            return self.snapshot.version != before

    def _stamp(self) -> tuple[int, ...]:
        """What tells one state of the folder from another one."""
        assert self.folder is not None
        return (*_stamp(self.folder, INDEX_NAME), *_stamp(self.folder, JOURNAL_NAME))

    def _reread(self) -> ItemIndex | None:
        """The index in the folder, if it is not the one that is known."""
        assert self.folder is not None
        if self._seen and self._stamp()[:3] == self._seen[:3]:
            return None
        items = ItemIndex.from_pretrained(self.folder)
        if items is None:
            raise FileNotFoundError(f"{self.folder}: the item index is gone ({INDEX_NAME}). Make it again.")
        return None if items.state == self.base.state else items

    def change(self, make: Callable[[Snapshot], Change | None]) -> Snapshot:
        """
        Make a change, and keep it.

        Args:
            make (`Callable`): From the items as they are to the change; nothing happens if it returns `None`.

        Raises:
            `OSError`: If it cannot be written, or another process is changing the index all the time.
        """
        with self._lock:
            if self.folder is None:
                change = make(self.snapshot)
                if change is not None:
                    self._check(change)
                    self._apply(change)
                    if self._has_grown():
                        before = self.snapshot
                        self._start(before.to_index())
                        self.snapshot = replace(self.snapshot, version=before.version, changes=before.changes)
                return self.snapshot
            with locked(self.folder, INDEX_LOCK, WAIT, "another process is changing this index"):
                self.refresh()
                change = make(self.snapshot)
                if change is not None:
                    self._check(change)
                    self._end = append_record(self.folder, self.base.state, self._end, change.to_bytes())
                    self._apply(change)
                    self._seen = self._stamp()
                    if self._has_grown():
                        self._write()
            return self.snapshot

    def search_by(self, find_cells: Callable[[Snapshot], ApproximateIndex]) -> float:
        """
        Look through the index as it is written by its cells; what came since is searched exactly. When it is written
        anew, its cells are found anew in a thread, and all is searched exactly until they are there.

        Args:
            find_cells (`Callable`): From the items to the cells of the index among them.

        Returns:
            `float`: The recall that was measured.
        """
        cells = find_cells(self.snapshot)
        self._find_cells = find_cells
        if not self._set_cells(cells):
            self._renew_cells()
        return cells.recall

    def _set_cells(self, cells: ApproximateIndex) -> bool:
        """Search by cells, unless they are those of an index that has been written anew."""
        with self._lock:
            is_current = cells.matrix is self.snapshot.segments[0].matrix
            if is_current:
                self.snapshot = replace(self.snapshot, cells=cells)
            return is_current

    def _renew_cells(self) -> None:
        assert self._find_cells is not None
        try:
            while not self._set_cells(self._find_cells(self.snapshot)):
                pass
        except DataError as error:
            logger.warning("The items are searched exactly: %s", error)

    def compact(self) -> None:
        """Write the index anew, with all changes in it. Raises `OSError`."""
        with self._lock:
            assert self.folder is not None, "an index that is not in a folder has no journal"
            with locked(self.folder, INDEX_LOCK, WAIT, "another process is changing this index"):
                self.refresh()
                if self.snapshot.changes:
                    self._write()

    def _write(self) -> None:
        assert self.folder is not None
        self.snapshot.to_index().save(self.folder)  # the journal goes with the index that it is of
        self._start(read_whole(self.folder, lambda: ItemIndex.from_pretrained(self.folder)))  # type: ignore[arg-type]
        self._seen = self._stamp()

    def _has_grown(self) -> bool:
        gone = len(self.snapshot) - self.snapshot.num_items
        changed = len(self.snapshot) - len(self.base) + gone
        return changed > max(MIN_COMPACTED, COMPACTED_SHARE * len(self.base))

    def _check(self, change: Change) -> None:
        """Refuse columns of another kind than those that are there, which no filter reads. Raises [`DataError`]."""
        there = self.snapshot.columns.schema
        for new in [] if change.added is None or change.added.columns is None else change.added.columns.schema:
            kinds = {_kind(new.type), _kind(there.field(new.name).type) if new.name in there.names else "null"}
            if len(kinds - {"null"}) > 1:
                raise DataError(
                    f"the column {new.name!r} of the items holds {new.type}, and that of the index "
                    f"{there.field(new.name).type}. Write it as there."
                )

    def _apply(self, change: Change) -> None:
        number = self.snapshot.changes + 1
        self.snapshot = self.snapshot.changed(change, f"{self.base_version}+{number}")


def _stamp(folder: str | os.PathLike, name: str) -> tuple[int, int, int]:
    """What tells one state of a file from another one."""
    try:
        status = os.stat(Path(folder, name))
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _kind(kind: pa.DataType) -> str:
    """Which types of Arrow can be in one column."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)
