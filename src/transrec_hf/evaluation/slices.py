"""Groups of users by the modality of target and history, and by the length of the history."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..model.modalities_transrec import MODALITIES


if TYPE_CHECKING:
    from ..data.interactions import Sequences
    from ..items.preparing import ItemSource

LENGTH_EDGES = (5, 10, 20, 50)
LENGTH_LABELS = ("1-4", "5-9", "10-19", "20-49", "50+")


def modality_combinations(source: ItemSource) -> tuple[tuple[str, ...], np.ndarray]:
    """
    The combinations of modalities that the items of a catalogue have, whatever a model reads. The names are `"text"`,
    `"image"`, `"both"` (if there are no other modalities), and otherwise names joined by `+`. Also returns the index
    of the combination of each item, `(N,)`.
    """
    names = tuple(name for name in MODALITIES if source.catalogue.has(name).any())
    bits = [source.catalogue.has(name).astype(np.int64) << i for i, name in enumerate(names)]
    combination = np.sum(bits, axis=0) - 1
    labels = ["+".join(name for i, name in enumerate(names) if code >> i & 1) for code in range(1, 2 ** len(names))]
    if len(names) == 2:
        labels[-1] = "both"
    return tuple(labels), combination


def history_mix(
    sequences: Sequences, combination: np.ndarray, num_combinations: int, max_history: int | None
) -> np.ndarray:
    """For each user, the combination that all items of the history share, or `num_combinations` if they differ."""
    histories, size = replace(sequences, ends=sequences.ends - 1), num_combinations
    mixes = []
    for block in (histories if max_history is None else histories.truncate(max_history)).blocks():
        users, place = block.expand()
        counts = np.bincount(size * users + combination[block.items[place]], minlength=size * len(block))
        pure = counts.reshape(-1, size) == block.lengths[:, None]
        mixes.append(np.where(pure.any(axis=1), pure.argmax(axis=1), size))
    return np.concatenate(mixes)
