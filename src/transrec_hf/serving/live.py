"""
The items of a recommender, which may change while it serves. With a folder, a change is written to its journal before
any reader sees it; when the journal has grown, index and journal are written again as one file.
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
MIN_COMPACTED = 2**13  # added or removed rows after which an index is written again
COMPACTED_SHARE = 0.25  # of all rows


class LiveItems:
    """
    The items of a recommender, and their changes.

    Args:
        items ([`ItemIndex`]): The items at the start.
        size (`int`, *optional*): Length of an item vector without the popularity, which the model tells. Leave it out
            to read and remove items without searching them.
        folder (`str`, *optional*): Folder of the index, if changes are to be kept.
        device (`torch.device`, *optional*): Device on which the items are searched.

    Attributes:
        snapshot ([`Snapshot`]): The current items.
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
            raise DataError(f"{folder}: there is no item index here ({INDEX_NAME}). Make one with transrec encode.")
        return cls(items, size, folder, device, _seen=seen)

    def remove(self, item_ids: Iterable[Any], readable: bool = False) -> list[str]:
        """
        Stop recommending items.

        Args:
            item_ids (`Iterable[str]`): Their ids.
            readable (`bool`, *optional*, defaults to `False`): Whether they may still occur in histories.

        Returns:
            `list[str]`: The ids.

        Raises:
            [`UnknownItems`]: If an id is unknown.
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
        """The index as it was written, without later changes."""
        return self.snapshot.segments[0].items

    def refresh(self) -> bool:
        """
        Read the changes that other processes have made in the folder.

        Returns:
            `bool`: Whether there were changes.

        Raises:
            `FileNotFoundError`: If the index was deleted.
            [`DataError`]: If the index is damaged.
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
        """A value that changes whenever the folder changes."""
        assert self.folder is not None
        return (*_stamp(self.folder, INDEX_NAME), *_stamp(self.folder, JOURNAL_NAME))

    def _reread(self) -> ItemIndex | None:
        """The index in the folder; `None` if it is the known one."""
        assert self.folder is not None
        if self._seen and self._stamp()[:3] == self._seen[:3]:
            return None
        items = ItemIndex.from_pretrained(self.folder)
        if items is None:
            raise FileNotFoundError(f"{self.folder}: the item index ({INDEX_NAME}) was deleted. Make it again.")
        return None if items.state == self.base.state else items

    def change(self, make: Callable[[Snapshot], Change | None]) -> Snapshot:
        """
        Make a change, and save it.

        Args:
            make (`Callable`): Returns the change for the current items, or `None` for no change.

        Raises:
            `OSError`: If the change cannot be written, or other processes constantly change the index.
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
        Search the written index by its cells, and later items exactly. When the index is written again, its cells are
        computed again in a thread, and until then all items are searched exactly.

        Args:
            find_cells (`Callable`): Returns the cells for the current items.

        Returns:
            `float`: The measured recall.
        """
        cells = find_cells(self.snapshot)
        self._find_cells = find_cells
        if not self._set_cells(cells):
            self._renew_cells()
        return cells.recall

    def _set_cells(self, cells: ApproximateIndex) -> bool:
        """Search by these cells, unless the index has been written again since they were computed."""
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
        """Write the index again, with all changes in it. Raises `OSError`."""
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
        """Raise [`DataError`] if a new column has another type than in the index, since no filter could read both."""
        there = self.snapshot.columns.schema
        for new in [] if change.added is None or change.added.columns is None else change.added.columns.schema:
            kinds = {_kind(new.type), _kind(there.field(new.name).type) if new.name in there.names else "null"}
            if len(kinds - {"null"}) > 1:
                raise DataError(
                    f"the column {new.name!r} of the items has the type {new.type}, but in the index it has "
                    f"{there.field(new.name).type}. Give it the type of the index."
                )

    def _apply(self, change: Change) -> None:
        number = self.snapshot.changes + 1
        self.snapshot = self.snapshot.changed(change, f"{self.base_version}+{number}")


def _stamp(folder: str | os.PathLike, name: str) -> tuple[int, int, int]:
    """A value that changes whenever a file is replaced."""
    try:
        status = os.stat(Path(folder, name))
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _kind(kind: pa.DataType) -> str:
    """A name for all Arrow types that fit into one column."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)
