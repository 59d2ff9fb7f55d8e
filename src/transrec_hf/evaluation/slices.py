"""Groups of users by the modality of target and history, and by the length of the history."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from ..data.catalogue import Catalogue
    from ..data.interactions import Sequences

LENGTH_EDGES = (5, 10, 20, 50)
LENGTH_LABELS = ("1-4", "5-9", "10-19", "20-49", "50+")
MODALITY_LABELS = ("text", "image", "both")


def _modality(catalogue: Catalogue) -> np.ndarray:
    """Of each item, the index in `MODALITY_LABELS`."""
    return np.where(catalogue.has_text, np.where(catalogue.has_image, 2, 0), 1)


def _history_mix(sequences: Sequences, modality: np.ndarray, max_history: int | None) -> np.ndarray:
    """Of each user, the modality that all items of the input share, or 3."""
    histories = replace(sequences, ends=sequences.ends - 1)
    mixes = []
    for block in (histories if max_history is None else histories.truncate(max_history)).blocks():
        users, place = block.expand()
        shares = np.bincount(3 * users + modality[block.items[place]], minlength=3 * len(block)).reshape(-1, 3)
        pure = shares == block.lengths[:, None]
        mixes.append(np.where(pure.any(axis=1), pure.argmax(axis=1), 3))
    return np.concatenate(mixes)
