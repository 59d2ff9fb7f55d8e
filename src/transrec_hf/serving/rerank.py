"""Steps after ranking: small functions that reorder a pool of good items, or leave some out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import DataError, shortened


@dataclass(frozen=True)
class Pool:
    """
    The best items of one user, best first.

    Args:
        scores (`np.ndarray` of shape `(n,)`): Scores of the items.
        vectors (`np.ndarray` of shape `(n, hidden_size)`): Vectors of the items, scaled to length 1.
        columns (`pa.Table`): Columns of the items.
        counts (`np.ndarray` of shape `(n,)`, *optional*): How often each item occurs in the training data.
    """

    scores: np.ndarray
    vectors: np.ndarray
    columns: pa.Table
    counts: np.ndarray | None = None


Step = Callable[[Pool, int], np.ndarray]
"""A function of a pool and the number of wanted items. It returns positions in the pool, in the new order."""


def as_steps(rerank: Any) -> list[Step]:
    """None, one or several steps as a list. Raises [`DataError`]."""
    steps = [] if rerank is None else [rerank] if callable(rerank) else rerank
    if not isinstance(steps, (list, tuple)) or not all(map(callable, steps)):
        raise DataError(
            "rerank must be a step such as maximal_marginal_relevance(0.3), or a list of steps, got "
            f"{shortened(repr(rerank), 40)}"
        )
    return list(steps)


def maximal_marginal_relevance(weight: float = 0.3) -> Step:
    """
    Diversity (Carbonell and Goldstein, 1998): the next item is the one with the best
    `(1 - weight) relevance - weight similarity`. The relevance is the score, scaled to 0..1 within the pool. The
    similarity is the cosine to the most similar item that was chosen before.

    Args:
        weight (`float`, *optional*, defaults to 0.3): From 0 (the order of the scores) to 1 (diversity alone).
    """
    if not isinstance(weight, numbers.Real) or not 0 <= weight <= 1:
        raise DataError(f"the weight of diversity must be between 0 and 1, got {weight!r}")

    def step(pool: Pool, k: int) -> np.ndarray:
        spread = np.ptp(pool.scores) or 1.0
        relevance = (1 - weight) * (pool.scores - pool.scores.min()) / spread
        nearest = np.zeros(len(relevance))
        left = np.ones(len(relevance), dtype=bool)
        order = []
        for _ in range(min(k, len(relevance))):
            best = int(np.where(left, relevance - weight * nearest, -np.inf).argmax())
            order.append(best)
            left[best] = False
            similar = pool.vectors @ pool.vectors[best]
            nearest = similar if len(order) == 1 else np.maximum(nearest, similar)
        return np.array(order, dtype=np.int64)

    return step


def cap_per_attribute(column: str, most: int = 2) -> Step:
    """
    Limit the number of items with the same value in a column, e.g. of the same brand. Items without a value are not
    limited.

    Args:
        column (`str`): Name of the column.
        most (`int`, *optional*, defaults to 2): Most items with the same value.
    """
    if isinstance(most, bool) or not isinstance(most, numbers.Integral) or most < 1:
        raise DataError(f"the most items of one {column!r} must be a whole number of 1 or more, got {most!r}")

    def step(pool: Pool, k: int) -> np.ndarray:
        if column not in pool.columns.column_names:
            raise DataError(f"there is no column {column!r}: the items have {pool.columns.column_names}")
        seen: dict[str, int] = {}
        kept = []
        for place, value in enumerate(pool.columns[column].to_pylist()):
            key = repr(value)
            seen[key] = seen.get(key, 0) + 1
            if value is None or seen[key] <= most:
                kept.append(place)
        return np.array(kept, dtype=np.int64)

    return step


def dampen_popularity(weight: float = 0.5) -> Step:
    """
    Subtract `weight` times the logarithm of an item's count in the training data from its score.

    Args:
        weight (`float`, *optional*, defaults to 0.5): The weight, in the unit of scores.
    """
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise DataError(f"the weight of popularity must be a finite number, got {weight!r}")

    def step(pool: Pool, k: int) -> np.ndarray:
        if pool.counts is None:
            raise DataError("the popularity of the items is not known: give `counts` to the recommender")
        return np.argsort(-(pool.scores - weight * np.log(np.maximum(pool.counts, 1))), kind="stable")

    return step
