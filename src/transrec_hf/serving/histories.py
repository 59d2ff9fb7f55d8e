"""From requests (one or several histories of ids and raw items) to rows of the catalogue and a table of raw items."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from ..errors import DataError, UnknownItems, shortened
from .raw import HOW, is_id
from .snapshot import Snapshot


MENDS = {None: "Add them, or leave them out.", False: "Add them, leave them out, or skip them: on_unknown='skip'."}


@dataclass
class History:
    """
    The items that one user chose.

    Args:
        rows (`list[int]`): Rows of the catalogue, oldest first; `-1 - i` for the `i`-th raw item of all users.
        places (`list[int]`): Position of each of these items in the history that was given.
        skipped (`list[str]`): Unknown ids that were skipped.
    """

    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def known(self) -> list[int]:
        """The rows of the items that the catalogue has."""
        return [row for row in self.rows if row >= 0]


def as_histories(
    given: Any, what: str = "a history must be a list of items, oldest first"
) -> tuple[list[list[Any]], bool]:
    """
    The histories of several users, and whether the input was the history of one user. A list whose elements are lists,
    or arrays of ids, holds several histories; any other list is one history.

    Raises:
        [`DataError`]: If the input is neither; the message begins with `what`.
    """
    if isinstance(given, (set, frozenset)):
        raise DataError(f"{what}, got a set, which has no order: make it a list")
    if isinstance(given, (str, bytes, int, dict, PIL.Image.Image, Tensor)) or not isinstance(given, Iterable):
        raise DataError(f"{what}, got {shortened(repr(given), 40)}: put it in brackets")
    if is_ids(given):
        return [list(given)], True
    elements = list(given)
    several = [isinstance(element, (list, tuple)) or is_ids(element) for element in elements]
    if not any(several):
        return [elements], True
    if not all(several):
        raise DataError(
            f"give either a list of lists (several histories) or a list of items (one history), not a mixture; {HOW}"
        )
    return [list(element) for element in elements], False


def is_ids(value: Any) -> bool:
    """Whether a value is an array of ids; an array of floats is a vector, and so a raw item."""
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "USOTiu"


def check_k(k: Any) -> int:
    """The number of items that are wanted. Raises [`DataError`]."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise DataError(f"k must be a whole number of 1 or more, got {shortened(repr(k))}")
    return int(k)


def check_on_unknown(on_unknown: str) -> bool:
    """Whether unknown ids are skipped. Raises [`DataError`]."""
    if on_unknown not in ("raise", "skip"):
        raise DataError(f"on_unknown must be 'raise' or 'skip', got {shortened(repr(on_unknown))}")
    return on_unknown == "skip"


def find_items(snapshot: Snapshot, item_ids: Iterable[Any], skips: bool | None = None) -> np.ndarray:
    """
    Rows of ids, of shape `(n,)`. Unknown ids are left out if `skips`, and an error otherwise (`None`: the caller
    offers no skipping, so the error does not propose it). Raises [`DataError`].
    """
    if isinstance(item_ids, (str, bytes)) or not isinstance(item_ids, Iterable):
        raise DataError(f"item ids must be a list, got {shortened(repr(item_ids), 40)}: put it in brackets")
    ids = []
    for item_id in item_ids:
        if not is_id(item_id):
            raise DataError(f"an item id must be a string, got {type(item_id).__name__}")
        ids.append(str(item_id))
    rows = snapshot.find(ids)
    if not skips and (rows < 0).any():
        raise UnknownItems([ids[i] for i in np.flatnonzero(rows < 0)], MENDS[skips])
    return rows[rows >= 0]


def read_histories(
    histories: Sequence[Sequence[Any]], snapshot: Snapshot, skips: bool
) -> tuple[list[History], list[Any]]:
    """
    The histories as rows of the catalogue, and the raw items in them.

    Args:
        histories (`Sequence[Sequence]`): Items of each user.
        snapshot ([`Snapshot`]): The catalogue.
        skips (`bool`): Whether unknown ids are left out.

    Raises:
        [`UnknownItems`]: If there are unknown ids, and they are not skipped.
    """
    flat = [str(item) for history in histories for item in history if is_id(item)]
    found = iter(snapshot.find(flat).tolist())
    read, raw = [], []
    for items in histories:
        history = History()
        for place, item in enumerate(items):
            if not is_id(item):
                raw.append(item)
                row = -len(raw)
            elif (row := next(found)) < 0:
                history.skipped.append(str(item))
                continue
            history.rows.append(row)
            history.places.append(place)
        read.append(history)
    if not skips and (unknown := [item_id for history in read for item_id in history.skipped]):
        raise UnknownItems(unknown, MENDS[False])
    return read, raw


def read_times(timestamps: Any, histories: list[list[Any]], is_one: bool) -> list[list[int]] | None:
    """When each item of each history was chosen. Raises [`DataError`]."""
    if timestamps is None:
        return None
    try:
        users = [timestamps] if is_one else timestamps
        times = [np.array([operator.index(time) for time in of], dtype=np.int64).tolist() for of in users]
    except (TypeError, OverflowError):
        times = []
    if [len(user) for user in times] != [len(history) for history in histories]:
        raise DataError("timestamps must have one entry for each item of each history, a whole number of 64 bits")
    return times
