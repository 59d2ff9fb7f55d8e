"""
The items of a recommender at one moment. A request takes one snapshot, so changes during the request do not affect it.
A change makes a new snapshot, which adds rows at the end and marks removed rows.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..errors import DataError
from ..model.modalities_transrec import MODALITIES
from .approximate import ApproximateIndex
from .filters import matching_rows
from .index import ItemIndex
from .search import Matrix, merged, search


MIN_SCANNED = 2**16  # from so many items on, the smaller copy of the vectors is kept in the file


@dataclass(frozen=True)
class Change:
    """
    One change to the items.

    Args:
        added ([`ItemIndex`], *optional*): Items that are new, or replace items with the same ids.
        removed (`Sequence[str]`): Ids of items that are removed.
        hidden (`Sequence[str]`): Ids of items that are no longer recommended, but may occur in histories.
    """

    added: ItemIndex | None = None
    removed: Sequence[str] = ()
    hidden: Sequence[str] = ()

    def to_bytes(self) -> bytes:
        """The change as bytes, for a journal."""
        head = json.dumps({"removed": list(self.removed), "hidden": list(self.hidden)}).encode()
        return len(head).to_bytes(8, "little") + head + (self.added.to_bytes() if self.added is not None else b"")

    @classmethod
    def from_bytes(cls, record: bytes, encoder_hash: str) -> Change:
        """The change from the bytes of [`~Change.to_bytes`]."""
        end = 8 + int.from_bytes(record[:8], "little")
        head, rest = json.loads(record[8:end]), record[end:]
        added = ItemIndex.from_bytes(rest, encoder_hash) if rest else None
        return cls(added, head["removed"], head["hidden"])


@dataclass(frozen=True, eq=False)
class Segment:
    """Items that were added together, in consecutive rows from `start` on."""

    items: ItemIndex
    matrix: Matrix
    row_of: dict[str, int]
    start: int

    @classmethod
    def of(cls, items: ItemIndex, size: int, start: int, device: torch.device | str) -> Segment:
        ids = items.item_ids.tolist()
        row_of = dict(zip(ids, range(start, start + len(ids)), strict=True))
        if len(row_of) != len(ids):
            raise DataError(f"item index: only {len(row_of)} of {len(ids)} ids differ. Make it again.")
        matrix = Matrix.of(items.item_embeds.to(device), size, items.scan)
        return cls(items, matrix, row_of, start)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """
    The items at one moment, in rows of which some may be empty.

    Args:
        segments (`tuple[Segment, ...]`): The items, in the order of their rows.
        known (`Tensor` of shape `(n_rows,)`): Boolean, rows that may occur in histories.
        offered (`Tensor` of shape `(n_rows,)`): Boolean, rows that may be recommended.
        version (`str`): See [`Versions`].
        size (`int`): Length of an item vector without the popularity.
        changes (`int`): Number of changes since the index was written.
        cells ([`ApproximateIndex`], *optional*): The cells of the first segment, for approximate search.
    """

    segments: tuple[Segment, ...]
    known: Tensor
    offered: Tensor
    version: str
    size: int
    changes: int = 0
    cells: ApproximateIndex | None = None
    _filters: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, items: ItemIndex, size: int, version: str, device: torch.device | str) -> Snapshot:
        known = torch.ones(len(items), dtype=torch.bool)
        offered = known if items.hidden is None else ~items.hidden
        return cls((Segment.of(items, size, 0, device),), known.to(device), offered.to(device), version, size)

    def __len__(self) -> int:
        return len(self.known)

    @functools.cached_property
    def num_items(self) -> int:
        """Number of items that may occur in histories."""
        return int(self.known.count_nonzero())

    def find(self, item_ids: Iterable[str]) -> np.ndarray:
        """The row of each id, -1 for unknown ids, of shape `(n,)`."""
        rows = np.fromiter(map(self._row, item_ids), dtype=np.int64)
        return np.where((rows >= 0) & self._known[rows], rows, -1) if len(rows) else rows

    def _row(self, item_id: str) -> int:
        for segment in reversed(self.segments):
            row = segment.row_of.get(item_id)
            if row is not None:
                return row
        return -1

    @functools.cached_property
    def _known(self) -> np.ndarray:
        return self.known.cpu().numpy()

    @functools.cached_property
    def known_rows(self) -> np.ndarray:
        """The rows that may occur in histories."""
        return self._known.nonzero()[0]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.array([segment.start + len(segment) for segment in self.segments])

    def places(self, rows: np.ndarray) -> Iterable[tuple[Segment, np.ndarray, np.ndarray]]:
        """For each segment that has some of the rows: the positions in `rows`, and the rows within the segment."""
        if len(self.segments) == 1:
            yield self.segments[0], np.arange(len(rows)), rows
            return
        number = np.searchsorted(self._ends, rows, side="right")
        for i, segment in enumerate(self.segments):
            which = np.flatnonzero(number == i)
            if len(which):
                yield segment, which, rows[which] - segment.start

    def ids(self, rows: np.ndarray) -> list[str]:
        """The ids of rows."""
        found = np.empty(len(rows), dtype=object)
        for segment, which, local in self.places(rows):
            found[which] = segment.items.item_ids[local]
        return list(map(str, found))

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Item vectors, `(n, width)`."""
        first = self.segments[0].matrix.exact
        found = first.new_empty(len(rows), first.shape[1])
        for segment, which, local in self.places(rows):
            found[torch.from_numpy(which)] = segment.matrix.exact[torch.from_numpy(local).to(first.device)]
        return found

    def present(self, rows: np.ndarray) -> Tensor | None:
        """The modalities of the items in some rows, `(n, n_modalities)`; `None` if they are not known."""
        if any(segment.items.item_modalities is None for segment in self.segments):
            return None
        found = torch.zeros(len(rows), len(MODALITIES), dtype=torch.bool)
        for segment, which, local in self.places(rows):
            some = segment.items.item_modalities[torch.from_numpy(local)]  # type: ignore[index]
            found[torch.from_numpy(which), : some.shape[1]] = some
        return found

    @functools.cached_property
    def all_present(self) -> Tensor | None:
        """Like [`~Snapshot.present`], for all rows, on the device of the search."""
        present = self.present(np.arange(len(self)))
        return None if present is None else present.to(self.known.device)

    @functools.cached_property
    def columns(self) -> pa.Table:
        """The further columns of the items, one line for each row."""
        tables = [
            segment.items.columns if segment.items.columns is not None else _no_columns(len(segment))
            for segment in self.segments
        ]
        return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")

    def take_columns(self, rows: np.ndarray) -> pa.Table:
        """The columns of some rows."""
        return self.columns.take(pa.array(rows))

    @functools.cached_property
    def counts(self) -> np.ndarray | None:
        """How often the items occur in the training data, `(n_rows,)`; `None` if that is not known."""
        base = self.segments[0].items.counts
        if base is None:
            return None
        rest = [np.zeros(len(of)) if of.items.counts is None else of.items.counts.numpy() for of in self.segments[1:]]
        return np.concatenate([base.numpy(), *rest]).astype(np.int64)

    @functools.cached_property
    def by_popularity(self) -> np.ndarray:
        """The rows that may be recommended, the most popular first."""
        rows = self.offered.cpu().numpy().nonzero()[0]
        return rows if self.counts is None else rows[np.argsort(-self.counts[rows], kind="stable")]

    def matching(self, expression: str) -> Tensor:
        """
        The rows for which an expression over the columns and `item_id` is true, `(n_rows,)`; see [`matching_rows`].
        """
        if expression not in self._filters:
            if len(self._filters) > 32:
                self._filters.clear()
            columns = self.columns
            if "item_id" in expression and "item_id" not in columns.column_names:
                columns = columns.append_column("item_id", pa.array(self.ids(np.arange(len(self)))))
            rows = torch.from_numpy(matching_rows(expression, columns).copy())
            self._filters[expression] = rows.to(self.known.device)
        return self._filters[expression]

    def search(
        self,
        queries: Tensor,
        k: int,
        allowed: Tensor | None = None,
        excluded: tuple[np.ndarray, np.ndarray] | None = None,
        matrices: Sequence[Matrix] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        The best of the allowed rows, see [`search`]. Without `allowed`, all rows that may be recommended are allowed.
        `excluded` holds pairs of users and rows that are left out.
        """
        everything = allowed is None and self._offers_all
        allowed = self.offered if allowed is None else allowed
        parts = []
        for number, segment in enumerate(self.segments):
            rows = slice(segment.start, segment.start + len(segment))
            of_segment = None
            if excluded is not None:
                inside = (excluded[1] >= rows.start) & (excluded[1] < rows.stop)
                users, places = excluded[0][inside], excluded[1][inside] - rows.start
                of_segment = (torch.from_numpy(users).to(queries.device), torch.from_numpy(places).to(queries.device))
            some = None if everything else allowed[rows]
            matrix = segment.matrix if matrices is None else matrices[number]
            if number == 0 and self.cells is not None and matrices is None:
                scores, found = self.cells.search(queries, k, some, of_segment)
            else:
                scores, found = search(matrix, queries, k, some, of_segment)
            parts.append((scores, found + segment.start))
        return parts[0] if len(parts) == 1 else merged(parts, k)

    def nearest(
        self,
        queries: Tensor,
        k: int,
        allowed: Tensor | None = None,
        excluded: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like [`~Snapshot.search`], by the cosine."""
        return self.search(queries, k, allowed, excluded, self._of_unit_length)

    @functools.cached_property
    def _of_unit_length(self) -> list[Matrix]:
        units = (torch.nn.functional.normalize(of.matrix.exact[:, : self.size], dim=1) for of in self.segments)
        width = self.segments[0].matrix.exact.shape[1]
        return [Matrix.of(torch.nn.functional.pad(unit, (0, width - self.size)), self.size) for unit in units]

    def select(self, rows: np.ndarray) -> ItemIndex | None:
        """The index of the items in some rows; `None` if there are no rows."""
        if not len(rows):
            return None
        first, parts = self.segments[0].items, [segment.items for segment in self.segments]
        hashes = None
        if all(part.item_hashes is not None for part in parts):
            hashes = np.concatenate([part.item_hashes for part in parts])[rows]  # type: ignore[misc]
        counts, offered = self.counts, self.offered.cpu()[torch.from_numpy(rows)]
        return replace(
            first,
            item_ids=np.array(self.ids(rows), dtype=object),
            item_embeds=self.vectors(rows).cpu(),
            item_modalities=self.present(rows),
            item_hashes=hashes,
            columns=self.take_columns(rows) if any(part.columns is not None for part in parts) else None,
            counts=None if counts is None else torch.from_numpy(counts[rows]),
            hidden=None if offered.all() else ~offered,
            scan=None,
            state="",
        )

    @functools.cached_property
    def _offers_all(self) -> bool:
        return bool(self.offered.all())

    def changed(self, change: Change, version: str) -> Snapshot:
        """The items after a change."""
        known, offered, segments = self.known.clone(), self.offered.clone(), list(self.segments)
        added = [] if change.added is None else change.added.item_ids.tolist()
        gone = self.find(itertools.chain(change.removed, added))
        known[torch.from_numpy(gone[gone >= 0])] = False
        offered[torch.from_numpy(gone[gone >= 0])] = False
        kept = self.find(change.hidden)
        offered[torch.from_numpy(kept[kept >= 0])] = False
        if change.added is not None:
            new = torch.ones(len(added), dtype=torch.bool, device=known.device)
            hides = change.added.hidden
            known = torch.cat([known, new])
            offered = torch.cat([offered, new if hides is None else ~hides.to(known.device)])
            items = change.added
            while len(segments) > 1 and len(segments[-1]) <= 2 * len(items):
                items = joined(segments.pop().items, items)
            start = segments[-1].start + len(segments[-1])
            device = self.segments[0].matrix.exact.device
            ids = items.item_ids.tolist()
            row_of = dict(
                zip(ids, range(start, start + len(ids)), strict=True)
            )  # if an item was added twice, its last row counts
            segments.append(Segment(items, Matrix.of(items.item_embeds.to(device), self.size), row_of, start))
        return Snapshot(tuple(segments), known, offered, version, self.size, self.changes + 1, self.cells)

    def to_index(self) -> ItemIndex:
        """The items without gaps, as they are written."""
        first = self.segments[0]
        items = first.items
        if len(self.segments) > 1 or not self._known.all():
            items = self.select(self.known_rows)  # type: ignore[assignment]
            if items is None:
                raise DataError("no item would be left, and an index needs at least one: keep one")
        elif not self._offers_all:
            items = replace(items, hidden=~self.offered.cpu())
        if items.scan is None and first.matrix.scan is not None and len(items) >= MIN_SCANNED:
            is_whole = items.item_embeds is first.items.item_embeds
            matrix = first.matrix if is_whole else Matrix.of(items.item_embeds, self.size)
            items = replace(items, scan=matrix.scan)
        return items


def joined(first: ItemIndex, second: ItemIndex) -> ItemIndex:
    """The items of two small indexes, one after the other."""

    def both(name: str) -> Tensor | None:
        parts = [getattr(first, name), getattr(second, name)]
        return None if any(part is None for part in parts) else torch.cat(parts)

    hashes = [first.item_hashes, second.item_hashes]
    tables = [_no_columns(len(of)) if of.columns is None else of.columns for of in (first, second)]
    result = replace(second)  # its fields are set below, because an id may be in both
    result.item_ids = np.concatenate([first.item_ids, second.item_ids])
    result.item_embeds = torch.cat([first.item_embeds, second.item_embeds])
    result.item_modalities, result.counts = both("item_modalities"), both("counts")
    result.item_hashes = None if any(part is None for part in hashes) else np.concatenate(hashes)  # type: ignore
    result.columns = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    result.hidden = None
    return result


def _no_columns(n: int) -> pa.Table:
    return pa.table({"text": pa.nulls(n, pa.string())})
