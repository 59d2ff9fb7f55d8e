"""Baselines that need no training. They are ranked in the same way as the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ..data.statistics import co_occurrences
from .ranking import dot_scores


if TYPE_CHECKING:
    from ..data.interactions import Sequences


class Scorer(Protocol):
    """
    Anything that scores all items for histories. The input is `(num_users, length)`, rows of the catalogue, oldest
    first and padded on the right with -1. The output is `(num_users, num_items)`, a new tensor, which the caller may
    change. `max_history` is the number of last items that it reads. If `reads_time` is true, it is also called with
    timestamps.
    """

    max_history: int

    def __call__(self, history: torch.Tensor) -> torch.Tensor: ...


class Popularity:
    """
    Scores an item by how often it occurs in the training sequences.

    Args:
        train_counts (`np.ndarray` of shape `(num_items,)`): Occurrences of each item (`Sequences.item_counts`).
    """

    max_history = 1

    def __init__(self, train_counts: np.ndarray):
        self.scores = torch.as_tensor(train_counts, dtype=torch.float32)

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        return self.scores.repeat(len(history), 1)


class RepeatLast:
    """
    Recommends the last items of the history again, the latest first. This is useful only if the history is not masked;
    then a model of repeated consumption has to beat it.

    Args:
        num_items (`int`): Size of the catalogue.
        max_history (`int`, defaults to 10): Number of last items.
    """

    def __init__(self, num_items: int, max_history: int = 10):
        self.num_items = num_items
        self.max_history = max_history

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        recency = torch.arange(1.0, history.shape[1] + 1).expand(len(history), -1) * (history >= 0)
        scores = torch.zeros(len(history), self.num_items)
        return scores.scatter_reduce_(1, history.clamp(min=0), recency, reduce="amax")


class CoOccurrence:
    """
    Item-item neighbours. The score of an item is `sum over the last items h of
    decay**age(h) C[h, item] / sqrt(n_h n_item)`. `C[a, b]` is how often a and b are at most `window` steps apart in a
    training sequence, and `n` are the item counts. The age of the last item is 0, that of the one before it 1, and so
    on.

    Args:
        train (`Sequences`): The training sequences.
        num_items (`int`): Size of the catalogue.
        window (`int`, defaults to 3): Largest distance of two items, in steps.
        max_history (`int`, defaults to 10): Number of last items that vote.
        decay (`float`, defaults to 0.8): Weight of an item's vote, relative to the vote of the next item.
    """

    def __init__(self, train: Sequences, num_items: int, window: int = 3, max_history: int = 10, decay: float = 0.8):
        self.num_items = num_items
        self.max_history = max_history
        self.decay = decay
        norms = np.sqrt(train.item_counts(num_items))
        degrees = np.zeros(num_items, dtype=np.int64)
        neighbours, similarities = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.float32)]
        for pairs, counts in co_occurrences(train, num_items, window):
            left, right = pairs // num_items, pairs % num_items
            degrees += np.bincount(left, minlength=num_items)
            neighbours.append(right.astype(np.int32))
            similarities.append((counts / (norms[left] * norms[right])).astype(np.float32))
        self.neighbours = torch.from_numpy(np.concatenate(neighbours))  # of item 0, of item 1, ...
        self.similarities = torch.from_numpy(np.concatenate(similarities))
        self.starts = torch.from_numpy(np.append(0, np.cumsum(degrees)))

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        real = history >= 0
        user, slot = real.nonzero(as_tuple=True)
        item, votes = history[user, slot], self.decay ** (real.sum(dim=1)[user] - 1 - slot)
        degrees = self.starts[item + 1] - self.starts[item]
        offsets = self.starts[item] - (degrees.cumsum(0) - degrees)
        edges = torch.arange(int(degrees.sum())) + offsets.repeat_interleave(degrees)
        cells = user.repeat_interleave(degrees) * self.num_items + self.neighbours[edges]
        similarities = self.similarities[edges] * votes.repeat_interleave(degrees)
        scores = torch.zeros(len(history) * self.num_items).index_add_(0, cells, similarities)
        return scores.view(len(history), self.num_items)


class ContentNeighbours:
    """
    Zero-shot content: the score is the cosine of an item with the mean of the last items. With vectors of untrained
    encoders it measures the value of content before anything is learned from interactions.

    Args:
        item_vectors (`torch.Tensor` of shape `(num_items, size)`): Content vectors; they are normalised by this class.
        max_history (`int`, defaults to 10): Number of last items in the mean.
    """

    def __init__(self, item_vectors: torch.Tensor, max_history: int = 10):
        self.vectors = torch.nn.functional.normalize(item_vectors.detach().float().cpu(), dim=1)
        self.max_history = max_history

    def __call__(self, history: torch.Tensor) -> torch.Tensor:
        real = (history >= 0).unsqueeze(2)
        means = (self.vectors[history.clamp(min=0)] * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        return dot_scores(means, self.vectors)
