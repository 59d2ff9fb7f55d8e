"""Interactions as sequences of users, and their filters and splits."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.utils.data
from transformers.utils import logging

from ..errors import DataError, Defects, raise_defects, shortened
from .catalogue import EMPTY_ID, Catalogue, load_catalogue
from .columns import FLOAT_IDS, SECOND, Timestamps, encode_ids, missing_words, were_rounded
from .places import Place, bad_table, open_source
from .reading import BLOCK, read_interactions


logger = logging.get_logger(__name__)

MAX_IN_MEMORY = 2**22
"""Up to this number of interactions, columns are in memory; longer columns are in temporary files."""
GUESTS = "Give these rows an id (for guests, one id for each visit) or delete them."
TIMES = "Write an integer, for example seconds since 1970, or a date such as 2025-10-15 10:40:41."
ROUNDED = "Write them again as int64, from a source in which they are not rounded."
NEAR_IDS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda item_id: re.sub(r"\.0+$", "", item_id), FLOAT_IDS),
    (str.strip, "remove the blanks around the ids."),
    (lambda item_id: item_id.lstrip("0") or "0", "write leading zeros in both files, or in neither."),
)
"""Ways in which an id may differ between the two tables, and what to do about each."""


@dataclass(frozen=True, eq=False, repr=False)
class Sequences(torch.utils.data.Dataset):
    """Users' item sequences in time order, as views on flat columns.

    View `i` is `items[starts[i]:ends[i]]`. Views share the columns, so splits and windows copy no interaction.

    Attributes:
        items (`np.ndarray` of shape `(n,)`, int32): Catalogue rows.
        timestamps (`np.ndarray` of shape `(n,)`, int64): Timestamps, in the unit of the data.
        starts, ends (`np.ndarray` of shape `(views,)`, int64): Bounds of the views.
        user_ids (`np.ndarray` of shape `(views,)`, str): The user of every view.
    """

    items: np.ndarray
    timestamps: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    user_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = slice(self.starts[index], self.ends[index])
        return {
            "user": int(index),
            "items": self.items[view].astype(np.int64),
            "timestamps": self.timestamps[view].astype(np.int64),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Sequences(users={len(self)}, interactions={int(self.lengths.sum())})"

    @property
    def lengths(self) -> np.ndarray:
        """The number of items in every view, (views,) int64."""
        return self.ends - self.starts

    def select(self, rows: np.ndarray | slice) -> Sequences:
        """The views at `rows` (indices, a boolean mask or a slice)."""
        return self._with_views(self.starts[rows], self.ends[rows], self.user_ids[rows])

    def truncate(self, keep_last: int) -> Sequences:
        """Every view cut to its last `keep_last` items."""
        return self._with_views(np.maximum(self.starts, self.ends - keep_last), self.ends, self.user_ids)

    def windows(self, length: int) -> Sequences:
        """Every view cut, from its end, into windows of at most `length` items that overlap by one.

        Every (previous, next) pair is in exactly one window, and the last window of a user is full when the view is
        long enough. Views of one item hold no pair and give no window.
        """
        if length < 2:
            raise ValueError(f"a window needs at least 2 items, got length={length}")
        step = length - 1
        counts = -(-np.maximum(self.lengths - 1, 0) // step)
        view = np.repeat(np.arange(len(self)), counts)
        back = np.arange(len(view)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = self.ends[view] - back * step
        return self._with_views(np.maximum(self.starts[view], ends - length), ends, self.user_ids[view])

    def expand(self) -> tuple[np.ndarray, np.ndarray]:
        """For every item of every view, the view and the flat position; both (sum of lengths,) int64."""
        view = np.repeat(np.arange(len(self)), self.lengths)
        return view, np.arange(len(view)) + np.repeat(self.ends - np.cumsum(self.lengths), self.lengths)

    def item_counts(self, num_items: int) -> np.ndarray:
        """The number of interactions of every item, (num_items,) int64; one that is in several views counts once."""
        counts = np.zeros(num_items, dtype=np.int64)
        for block in self._disjoint().blocks():
            counts += np.bincount(self.items[block.expand()[1]], minlength=num_items)
        return counts

    def blocks(self) -> Iterator[Sequences]:
        """The views in parts of about `BLOCK` items, for work that needs memory for every item."""
        parts = np.cumsum(self.lengths) // BLOCK
        bounds = [0, *(np.flatnonzero(np.diff(parts)) + 1), len(self)]
        return (self.select(slice(start, end)) for start, end in pairwise(bounds))

    def _disjoint(self) -> Sequences:
        """Views of the same interactions that do not overlap."""
        order = np.argsort(self.starts, kind="stable")
        starts, ends = self.starts[order], self.ends[order]
        starts[1:] = np.maximum(starts[1:], np.maximum.accumulate(ends)[:-1])
        shown = starts < ends
        return self._with_views(starts[shown], ends[shown], self.user_ids[order][shown])

    def _with_views(self, starts: np.ndarray, ends: np.ndarray, user_ids: np.ndarray) -> Sequences:
        return Sequences(self.items, self.timestamps, starts, ends, user_ids)


def flat_column(length: int, dtype: type) -> np.ndarray:
    """An empty column, in memory or, if it is long, in a temporary file that is deleted with it."""
    import datasets

    if length <= MAX_IN_MEMORY:
        return np.empty(length, dtype)
    folder = Path(datasets.config.HF_DATASETS_CACHE)  # `/tmp` may be memory
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process when the column is filled
            os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
        return np.asarray(np.memmap(file, dtype, shape=length))


def _group_by_user(items: np.ndarray, timestamps: np.ndarray, users: np.ndarray, names: np.ndarray) -> Sequences:
    """Sequences of interactions sorted by user, then time; equal times keep their order.

    Consecutive users form parts of about `BLOCK` interactions. Each interaction goes to the part of its user, and then
    each part is sorted.
    """
    size = len(users)
    counts = np.zeros(len(names), dtype=np.int64)
    for start in range(0, size, BLOCK):
        counts += np.bincount(users[start : start + BLOCK], minlength=len(names))
    ends = np.cumsum(counts)
    starts = ends - counts
    is_first = np.diff(np.maximum(ends - 1, 0) // BLOCK, prepend=-1) > 0
    part_of, bounds = np.cumsum(is_first) - 1, np.append(starts[is_first], size)

    columns = flat_column(size, np.int32), flat_column(size, np.int64), flat_column(size, np.int32)
    free = bounds[:-1].copy()
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        parts = part_of[users[block]]
        order = np.argsort(parts, kind="stable")
        cuts = np.searchsorted(parts[order], np.arange(len(bounds)))
        for part, rows in enumerate(np.split(order, cuts[1:-1])):
            for column, values in zip(columns, (items, timestamps, users), strict=True):
                column[free[part] : free[part] + len(rows)] = values[block][rows]
            free[part] += len(rows)
    for low, high in pairwise(bounds):
        parted = [column[low:high] for column in columns]
        order = np.lexsort((parted[1], parted[2]))
        for column in parted[:2]:
            column[:] = column[order]
    present = counts > 0
    return Sequences(*columns[:2], starts[present], ends[present], names[present])


def load_interactions(
    source: Any, catalogue: Catalogue, *, revision: str | None = None, split: str | None = None
) -> Sequences:
    """Read and validate interactions as users' sequences in time order.

    Rows may come in any order; equal timestamps of a user keep the order of the file. A row that occurs twice counts
    as two interactions. Timestamps are integers of any unit and sign, or dates (columns of dates, or ISO 8601 such as
    `2025-10-15 10:40:41`). Dates become seconds since 1970. Dates without a time zone are in UTC. Fractions of a
    second are dropped, but still order the interactions of a user.

    Args:
        source (`str`, `os.PathLike`, `datasets.Dataset` or table):
            See [`load_catalogue`], with `interactions` in place of `items`.
        catalogue ([`Catalogue`]):
            The items that interactions refer to.
        revision (`str`, *optional*):
            Revision of the Hub data set.
        split (`str`, *optional*):
            Which split of a data set that has several; `"train+test"` joins two.

    Raises:
        [`DataError`]: If the interactions have a defect.
    """
    place = open_source(source, "interactions", revision, split)
    with bad_table(place.name):
        return _read(place, catalogue)


def _read(place: Place, catalogue: Catalogue | None) -> Sequences:
    """The interactions. If there is a catalogue, unknown items are defects."""
    size, blocks = read_interactions(place)
    if size == 0:
        raise DataError(f"{place.name}: there are no interactions. Add rows of user_id, item_id, timestamp.")
    users, items, timestamps = (flat_column(size, dtype) for dtype in (np.int32, np.int32, np.int64))
    code_of: dict[str, int] = {}
    defects, first, notations = Defects(), 0, set()
    for block in logging.tqdm(blocks, total=-(-size // BLOCK), desc="Reading interactions", delay=2):
        rows = slice(first, first + len(block))
        codes, ids = encode_ids(block["user_id"], "user_id", place.name)
        defects.add("empty user_id", codes < 0, GUESTS, first)
        words = np.append(missing_words(ids), False)[codes]
        label = partial(_cell, block["user_id"], "user_id")
        defects.add("user_id that is a missing value written as a word", words, GUESTS, first, label)
        known = [code_of.setdefault(user, len(code_of)) for user in ids.to_pylist()]
        users[rows] = np.array([*known, -1])[codes]

        codes, ids = encode_ids(block["item_id"], "item_id", place.name)
        defects.add("empty item_id", codes < 0, EMPTY_ID, first)
        if catalogue is not None:
            found = catalogue.find(ids.to_pylist())
            items[rows] = np.append(found, 0)[codes]  # 0 for code -1, which has its own defect
            label = partial(_cell, block["item_id"], "item_id")
            for place_of, mend in _mends(catalogue, ids, found):
                unknown = np.append(place_of, False)[codes]
                defects.add("unknown item_id", unknown, mend, first, label)

        times = Timestamps(block["timestamp"])
        timestamps[rows] = times.numbers
        if not times.missing.all():
            notations.add(times.are_dates)
        label = partial(_cell, block["timestamp"], "")
        defects.add("missing timestamp", times.missing, TIMES, first)
        what = f"timestamp that is not an integer (column of {times.kind})"
        defects.add(what, times.wrong, TIMES, first, label)
        what = f"timestamp that the type {times.kind} has rounded, since it cannot hold all integers of that size"
        defects.add(what, times.inexact, ROUNDED, first, label)
        first += len(block)
    lines = defects.describe()
    if len(notations) > 1:
        lines.append("some timestamps are numbers and some are dates. Write all in one notation.")
    raise_defects(place.name, lines)
    if notations == {False} and were_rounded(timestamps):
        logger.warning(
            f"{place.name}: the timestamps were probably rounded, as float32 can hold all of them. {ROUNDED}"
        )
    sequences = _group_by_user(items, timestamps, users, np.array(list(code_of), dtype=object))
    if notations == {True}:
        for start in range(0, size, BLOCK):
            sequences.timestamps[start : start + BLOCK] //= SECOND
    return sequences


def _mends(catalogue: Catalogue, ids: pa.StringArray, found: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Groups of the distinct `ids` that were not `found`, each with what to do; ids with a near miss are separate."""
    left = found < 0
    for changed, mend in NEAR_IDS:
        if left.any():
            near = np.zeros(len(ids), dtype=bool)
            unknown = np.flatnonzero(left)
            near[unknown] = catalogue.find([changed(ids[row].as_py()) for row in unknown.tolist()]) >= 0
            yield near, f"{catalogue.source} has these ids in another form: {mend}"
            left = left & ~near
    yield left, f"Add these items to {catalogue.source} or delete the rows."


def _cell(column: pa.ChunkedArray, name: str, row: int) -> str:
    cell = column[row]
    try:
        text = shortened(cell)
    except (ValueError, OverflowError):  # a date that Python cannot represent
        text = shortened(getattr(cell, "value", cell.type))
    return f"{name} {text!r}" if name else text


def load_domain(
    path: Any,
    *,
    revision: str | None = None,
    split: str | None = None,
    image_folder: str | os.PathLike | None = None,
    modality_policy: str = "both",
    seed: int = 0,
) -> tuple[Catalogue, Sequences]:
    """
    Read the catalogue and the sequences of one folder or one Hub data set; see [`load_catalogue`] and
    [`load_interactions`]. One error reports the defects of both tables.
    """
    try:
        catalogue = load_catalogue(
            path,
            revision=revision,
            split=split,
            image_folder=image_folder,
            modality_policy=modality_policy,
            seed=seed,
        )
    except DataError as error:
        try:
            place = open_source(path, "interactions", revision, split)
            with bad_table(place.name):
                _read(place, None)
        except DataError as other:
            raise DataError(f"{error}\n{other}") from error
        raise
    return catalogue, load_interactions(path, catalogue, revision=revision, split=split)


def keep_items(catalogue: Catalogue, sequences: Sequences, keep: np.ndarray) -> tuple[Catalogue, Sequences]:
    """The items for which the mask `keep`, (N,) bool, is true, and their interactions."""
    view, place = sequences.expand()
    kept = keep[sequences.items[place]]
    view, place = view[kept], place[kept]
    rows = np.cumsum(keep) - 1
    items = rows[sequences.items[place]]
    return catalogue.select(keep), _group_by_user(items, sequences.timestamps[place], view, sequences.user_ids)


def drop_unused(catalogue: Catalogue, sequences: Sequences) -> tuple[Catalogue, Sequences]:
    """The catalogue without the items that occur in no view, and the sequences with the new rows."""
    return keep_items(catalogue, sequences, sequences.item_counts(len(catalogue)) > 0)


def k_core(catalogue: Catalogue, sequences: Sequences, k: int) -> tuple[Catalogue, Sequences]:
    """Keep only users and items with at least `k` interactions each; repeated until nothing changes.

    Repeats count as interactions. Raises [`DataError`] when nothing is left, or `k` is below 1.
    """
    if k < 1:
        raise DataError(f"k_core must be 1 or more, got {k}")
    view, place = sequences.expand()
    while len(place):
        items = sequences.items[place]
        keep = (np.bincount(view)[view] >= k) & (np.bincount(items)[items] >= k)
        if keep.all():
            break
        view, place = view[keep], place[keep]
    if len(place) == 0:
        raise DataError(f"{catalogue.source}: the {k}-core is empty. Use a smaller k.")
    core = _group_by_user(sequences.items[place], sequences.timestamps[place], view, sequences.user_ids)
    return drop_unused(catalogue, core)


def of_modality(catalogue: Catalogue, sequences: Sequences, modality: str) -> tuple[Catalogue, Sequences]:
    """
    Keep the items that have a modality, and only this content of them. Raises [`DataError`] when nothing is left.
    """
    view, place = sequences.expand()
    keep = catalogue.has(modality)[sequences.items[place]]
    if not keep.any():
        raise DataError(f"{catalogue.source}: no user chose an item with {modality}. Choose another modality.")
    view, place = view[keep], place[keep]
    kept = _group_by_user(sequences.items[place], sequences.timestamps[place], view, sequences.user_ids)
    catalogue, kept = drop_unused(catalogue, kept)
    return catalogue.with_policy(modality), kept


@dataclass
class Split:
    """Views for training, validation and test. In the last two, the last item of each view is the target."""

    train: Sequences
    validation: Sequences
    test: Sequences
    users_left_out: int = 0


def leave_one_out(sequences: Sequences, min_interactions: int = 3, keep_last: int | None = None) -> Split:
    """Train on all but a user's last two items, validate on the one before the last, test on the last.

    Args:
        sequences ([`Sequences`]):
            One view per user.
        min_interactions (`int`, *optional*, defaults to 3):
            Users with fewer interactions are left out, and counted.
        keep_last (`int`, *optional*):
            Keep only the last `keep_last` items of every user (history length + 3 in the NineRec protocol).

    Raises:
        [`DataError`]: When no user is left.
    """
    if min_interactions < 3 or (keep_last is not None and keep_last < 3):
        raise ValueError("leave-one-out needs at least 3 interactions per user: train, validation, test")
    long_enough = sequences.lengths >= min_interactions
    left_out = int((~long_enough).sum())
    if not long_enough.any():
        longest = int(sequences.lengths.max(initial=0))
        raise DataError(
            f"no user has {min_interactions} interactions (the longest history has {longest}), so none can be split. "
            "Add interactions, or lower min_interactions (3 is the least)."
        )
    if left_out:
        logger.warning(f"{left_out} of {len(sequences)} users have fewer than {min_interactions} interactions.")
    lines = sequences.select(long_enough)
    lines = lines if keep_last is None else lines.truncate(keep_last)
    train, validation = (lines._with_views(lines.starts, lines.ends - cut, lines.user_ids) for cut in (2, 1))
    return Split(train, validation, lines, left_out)


def temporal_split(sequences: Sequences, validation_from: Any, test_from: Any) -> Split:
    """Split by time: train before `validation_from`; the target is a user's first event of a period.

    The history of a target is everything before it. Users without an event before the period have no history and are
    not evaluated in this period.

    Args:
        sequences ([`Sequences`]):
            One view per user.
        validation_from, test_from (`int`, `str` or `datetime`):
            First timestamp of the validation period `[validation_from, test_from)` and of the test period. It may be a
            date of ISO 8601 (in UTC) if the timestamps are seconds, milliseconds, microseconds or nanoseconds since
            1970; the unit is recognised by their size.

    Raises:
        [`DataError`]: When a bound is not a date, a period has no event, or no user has a history before it.
    """
    starts = sequences.starts
    bounds = [_time(sequences, bound) for bound in (validation_from, test_from)]
    validation, test = (_first_from(sequences, bound) for bound in bounds)

    def views(chosen: np.ndarray, ends: np.ndarray) -> Sequences:
        return sequences._with_views(starts[chosen], ends[chosen], sequences.user_ids[chosen])

    parts = {
        "training": views(validation > starts, validation),
        "validation": views((validation > starts) & (validation < test), validation + 1),
        "test": views((test > starts) & (test < sequences.ends), test + 1),
    }
    for name, part in parts.items():
        if len(part) == 0:
            times = sequences.timestamps[sequences.expand()[1]]
            raise DataError(
                f"temporal split: no user for {name} (validation_from={validation_from}, test_from={test_from}; the "
                f"data run from {times.min()} to {times.max()}). Move the bounds"
                f"{': the validation comes before the test' if bounds[0] > bounds[1] else ''}."
            )
    left_out = len(sequences) - len(parts["training"])
    return Split(parts["training"], parts["validation"], parts["test"], left_out)


def _time(sequences: Sequences, bound: Any) -> int:
    """A bound of a period in the unit of the timestamps."""
    if isinstance(bound, (int, np.integer)):
        return int(bound)
    time = Timestamps(pa.chunked_array([[str(bound)]]))
    if (time.missing | time.wrong | time.inexact)[0]:
        raise DataError(f"temporal split: {bound!r} is not a date. {TIMES}")
    if not time.are_dates:
        return int(time.numbers[0])
    last = int(sequences.timestamps[sequences.expand()[1]].max(initial=0))
    ticks = next((unit for unit in (1, 10**3, 10**6) if last < 10**11 * unit), 10**9)  # 10**11 seconds: year 5138
    return int(time.numbers[0]) * ticks // SECOND


def _first_from(sequences: Sequences, time: int) -> np.ndarray:
    """Flat position of the first event of every view at `time` or later (or the end of the view), (views,) int64."""
    earlier = []
    for block in sequences.blocks():
        view, place = block.expand()
        earlier.append(np.bincount(view[sequences.timestamps[place] < time], minlength=len(block)))
    return sequences.starts + np.concatenate(earlier)
