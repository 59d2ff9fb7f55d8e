"""From sequences of users to batches of distinct items, with indices into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..data.interactions import Sequences
from ..items.preparing import PADDING, ItemSource, pad_right
from ..model.configuration_transrec import TransRecConfig


class TrainingWindows(torch.utils.data.Dataset):
    """
    Sequences of users, cut into windows. A window is a history of at most `max_history` items and its targets. With
    one target at each position, every item except the first of a user is a target once. The windows know the epoch,
    which gives the collator a new seed for negatives.

    Args:
        sequences ([`Sequences`]): The training sequences.
        max_history (`int`): Number of items that the model reads.
        num_targets (`int`, *optional*, defaults to 1): Number of targets after the history; see
            [`~TransRecConfig.num_targets`].
    """

    def __init__(self, sequences: Sequences, max_history: int, num_targets: int = 1):
        self.windows = sequences.windows(max_history + num_targets)
        self._epoch = torch.zeros(
            1, dtype=torch.long
        ).share_memory_()  # shared with workers that live longer than an epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.windows[index], "epoch": self.epoch}


def draw_negatives(
    rng: np.random.Generator, num_items: int, seen: np.ndarray, num_negatives: int, rounds: int = 100
) -> np.ndarray:
    """
    Negatives for each user, drawn uniformly from the catalogue without the user's own items.

    Args:
        seen (`np.ndarray` of shape `(n_users, length)`): Each user's own items, `-1` for padding.
        num_negatives (`int`): Items per user.

    Returns:
        `np.ndarray` of shape `(n_users, num_negatives)`; `-1` where `rounds` draws found none, for example for a user
        who has chosen the whole catalogue.
    """
    users = np.arange(len(seen))[:, None]
    own = np.unique((users * num_items + seen)[seen != PADDING])
    negatives = rng.integers(num_items, size=(len(seen), num_negatives))
    for _ in range(rounds):
        rejected = np.isin(users * num_items + negatives, own)
        if not rejected.any():
            return negatives
        negatives[rejected] = rng.integers(num_items, size=int(rejected.sum()))
    negatives[np.isin(users * num_items + negatives, own)] = PADDING
    return negatives


def draw_hidden(rng: np.random.Generator, present: np.ndarray, probability: float) -> np.ndarray:
    """
    The contents that modality dropout hides: of each item with several modalities, one of them with this probability.

    Args:
        present (`np.ndarray` of shape `(n_items, n_modalities)`): Boolean, the modalities of each item.

    Returns:
        `np.ndarray` of the same shape, boolean: the modalities to hide.
    """
    counts = present.sum(axis=1)
    hides = (rng.random(len(present)) < probability) & (counts > 1)
    one = (present.cumsum(axis=1) > (rng.random(len(present)) * counts)[:, None]).argmax(axis=1)
    return hides[:, None] & (np.arange(present.shape[1]) == one[:, None])


@dataclass
class DataCollatorForNextItem:
    """
    Makes batches for next-item prediction from sequences of users. Each distinct item of a batch is prepared once, and
    histories, targets and negatives are indices into these items. Padding is never encoded.

    The negatives of a batch, and the windows of its long sounds and videos, depend only on `seed`, the epoch and the
    users of the batch, not on the global random state or the number of workers. So a resumed run draws the same ones.

    Args:
        source ([`ItemSource`]): The items.
        config ([`TransRecConfig`]): The configuration of the model, with the objective and the history length.
        log_popularity (`np.ndarray` of shape `(len(source),)`): Logarithm of each item's share of the training data.
        seed (`int`, *optional*, defaults to 0): Seed of the negatives.
        modality_dropout (`float`, *optional*, defaults to 0.0): Probability of hiding, in a batch, one modality of an
            item that has several, see [`draw_hidden`]. It has a separate random stream, so it does not change the
            negatives.

    Call it with a list of `{"items": catalogue rows, "timestamps": of each item, "user": int, "epoch": int}` with at
    least two items each, as [`TrainingWindows`] yields them. It returns a dictionary. `L` is the longest history of
    the batch, `P` the number of positives, `N` the number of negatives.

    - `items`, an [`ItemBatch`] of the distinct items, and their `log_popularity` `(n_items,)`;
    - `history_index` `(n_users, L)`, and `target_index` `(n_users, L)`, or `(n_users, P)` for `"cpc"`; the targets of
      `"masked"` are items of the history;
    - `negative_index`, if the objective draws negatives: `(n_users, N)` for `"cpc"`, `(n_users, L, N)` for `"bce"` and
      `"bpr"`, `(N,)` for `"sampled_softmax"`;
    - `timestamps` `(n_users, L)` for a model with `time_buckets`.
    """

    source: ItemSource
    config: TransRecConfig
    log_popularity: np.ndarray
    seed: int = 0
    modality_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.source.units()  # texts are tokenised now, not in each worker

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        windows = [self.split(np.asarray(feature["items"])) for feature in features]
        histories, targets = zip(*windows, strict=True)
        history, target = pad_right(histories), pad_right(targets)
        seed = [self.seed, features[0].get("epoch", 0), *(int(feature.get("user", 0)) for feature in features)]
        rng = np.random.default_rng(seed)
        if self.config.objective == "masked":
            target = np.where(self.hidden(rng, history != PADDING), history, PADDING)
        slots = np.concatenate([history, target], axis=1)
        negative = self.negatives(rng, slots, target)

        used = [slots.ravel(), negative.ravel()]
        if self.config.objective == "full_softmax":
            used.append(np.arange(len(self.source)))
        rows = np.unique(np.concatenate(used))
        rows = rows[rows != PADDING]
        hidden = None
        if self.modality_dropout:
            own = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
            hidden = torch.from_numpy(draw_hidden(own, self.source.present[rows].numpy(), self.modality_dropout))
        draws = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        batch: dict[str, Any] = {"items": self.source.batch(rows, hidden, draws)}
        batch["log_popularity"] = torch.from_numpy(self.log_popularity[rows])
        indices = {"history_index": history, "target_index": target}
        if negative.size:
            indices["negative_index"] = negative
        for name, values in indices.items():
            index = np.where(values == PADDING, PADDING, np.searchsorted(rows, values))
            batch[name] = torch.from_numpy(index)
        if self.config.time_buckets:
            times = [self.split(np.asarray(feature["timestamps"]))[0] for feature in features]
            batch["timestamps"] = torch.from_numpy(pad_right(times))
        return batch

    def split(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The history and the targets of a sequence. By default the targets are the history shifted by one. For `"cpc"`
        the targets are the last items, and the history is everything before. For `"masked"` both are all items.
        """
        if len(items) < 2:
            raise ValueError("a training sequence needs at least two items: a history and a target")
        length = self.config.max_position_embeddings
        if self.config.objective == "cpc":
            num_positives = min(self.config.num_positives, len(items) - 1)
            return items[:-num_positives][-length:], items[-num_positives:]
        if self.config.objective == "masked":
            return items[-length:], items[-length:]
        items = items[-(length + 1) :]
        return items[:-1], items[1:]

    def hidden(self, rng: np.random.Generator, real: np.ndarray) -> np.ndarray:
        """Which of the `real` items of histories, `(n_users, L)`, are hidden: at least one in each history."""
        hidden = real & (rng.random(real.shape) < self.config.mask_probability)
        none = ~hidden.any(axis=1)
        hidden[none, real[none].sum(axis=1) - 1] = True
        return hidden

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """The cumulative popularity over the catalogue."""
        return np.cumsum(np.exp(self.log_popularity.astype(np.float64)))

    def negatives(self, rng: np.random.Generator, slots: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The catalogue rows of the negatives for the objective; empty if it draws none."""
        num_items, num_negatives = len(self.source), self.config.num_negatives
        if self.config.objective == "cpc":
            return draw_negatives(rng, num_items, slots, num_negatives)
        if self.config.objective in ("bce", "bpr"):
            drawn = draw_negatives(rng, num_items, slots, target.shape[1] * num_negatives)
            drawn = drawn.reshape(*target.shape, num_negatives)
            return np.where(target[..., None] == PADDING, PADDING, drawn)
        if self.config.objective == "sampled_softmax":
            drawn = rng.random(num_negatives) * self._cumulative[-1]
            return np.searchsorted(self._cumulative, drawn, side="right").clip(max=num_items - 1)
        return np.empty(0, dtype=np.int64)
