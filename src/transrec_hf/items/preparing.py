"""From catalogue rows to batches that a model reads."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
import torch
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..model.modalities_transrec import COLUMNS, MODALITIES, ItemBatch, ItemPart, showing
from ..model.processing_transrec import TransRecProcessor


PADDING = -1
TOKENS_ON_CPU = 2048  # tokens in one pass of a text tower
TEXTS_AT_A_TIME = 2048  # texts that are tokenised in one call


def token_budget(device: torch.device | str | None = None) -> int:
    """
    The number of tokens in one pass of a text tower: on a CPU what its cache holds, elsewhere enough to keep the
    device busy.

    Args:
        device (`torch.device` or `str`, *optional*): Device of the tower; by default the accelerator of this machine,
            if it has one.
    """
    if device is None:
        return 32768 if torch.accelerator.is_available() else TOKENS_ON_CPU
    return TOKENS_ON_CPU if torch.device(device).type == "cpu" else 32768


def bucket_by_tokens(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """
    Indices of `lengths` `(n,)` in buckets of similar length, short ones first. Padded to its longest text, a bucket
    holds at most `budget` tokens, or one text.
    """
    order = np.argsort(lengths, kind="stable")
    buckets, start = [], 0
    while start < len(order):
        # a bucket is padded to its last text, the longest
        padded = lengths[order[start:]] * np.arange(1, len(order) - start + 1)
        size = max(1, int(np.searchsorted(padded, budget, side="right")))
        buckets.append(order[start : start + size])
        start += size
    return buckets


def pad_right(rows: list[np.ndarray], length: int | None = None) -> np.ndarray:
    """Join rows of different lengths into one `(n_rows, length)` array, filled with `-1` on the right."""
    length = length or max(len(row) for row in rows)
    padded = np.full((len(rows), length), PADDING, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


class Preparation(Protocol):
    """How the contents of one modality become inputs of its tower."""

    @property
    def units(self) -> np.ndarray:
        """A number to which the cost of each item is proportional, `(n_items,)`, int64; 0 if it lacks the modality."""

    def __call__(self, rows: np.ndarray, slots: torch.Tensor, max_tokens: int) -> ItemPart:
        """
        The contents of catalogue rows `(n,)`, all of which have the modality, for the rows `slots` `(n,)` of a batch.
        If the modality has tokens, they come in buckets of at most `max_tokens`.
        """


class TextPreparation:
    """
    Texts in buckets of similar length. The token ids of all texts of a catalogue are computed once and kept in one
    flat array of 4 bytes per token.
    """

    def __init__(self, catalogue: Catalogue, processor: TransRecProcessor):
        self.processor = processor
        rows = np.flatnonzero(catalogue.has("text"))
        parts: list[np.ndarray] = []
        self.units = np.zeros(len(catalogue), dtype=np.int64)
        starts = range(0, len(rows), TEXTS_AT_A_TIME)
        for start in logging.tqdm(starts, desc="Tokenising texts", delay=2, leave=False):
            some = rows[start : start + TEXTS_AT_A_TIME]
            token_ids = processor.tokenize([catalogue.read(row, ["text"])["text"] for row in some])
            self.units[some] = [len(ids) for ids in token_ids]
            parts.append(np.concatenate(token_ids).astype(np.int32))
        self.token_ids = torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int32))
        self.starts = np.cumsum(self.units) - self.units

    def __call__(self, rows: np.ndarray, slots: torch.Tensor, max_tokens: int) -> ItemPart:
        buckets = bucket_by_tokens(self.units[rows], max_tokens)
        padded = [self.processor.pad([self.tokens(row) for row in rows[bucket]]) for bucket in buckets]
        values, masks = ([bucket[name] for bucket in padded] for name in ("input_ids", "attention_mask"))
        return ItemPart(slots[torch.from_numpy(np.concatenate(buckets))], values, masks)

    def tokens(self, row: int) -> torch.Tensor:
        """Token ids of the text of a catalogue row."""
        return self.token_ids[self.starts[row] : self.starts[row] + self.units[row]]


class ContentPreparation:
    """Contents of one shape, read and prepared by the processor when a batch needs them."""

    def __init__(self, catalogue: Catalogue, processor: TransRecProcessor, name: str):
        self.catalogue, self.processor, self.name = catalogue, processor, name
        self.units = catalogue.has(name).astype(np.int64)

    def __call__(self, rows: np.ndarray, slots: torch.Tensor, max_tokens: int) -> ItemPart:
        return ItemPart(slots, [self.prepared(rows)[MODALITIES[self.name].values]])

    def prepared(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The processor's output for the contents of catalogue rows, all of which have the modality."""
        form = self.processor.form(self.name)
        contents = [self.catalogue.read(row, [self.name], **form, **self.place())[self.name] for row in rows]
        return self.processor.prepare(self.name, contents)

    def place(self) -> dict[str, Any]:
        """The position of the windows in a content, as an argument of the reader."""
        return {}


class WindowPreparation(ContentPreparation):
    """Contents of one or several windows each; see [`ContentPreparation`]."""

    draws: np.random.Generator | None = None

    def __init__(self, catalogue: Catalogue, processor: TransRecProcessor, name: str):
        super().__init__(catalogue, processor, name)
        rows = np.flatnonzero(catalogue.has(name))
        contents: Any = catalogue.contents.get(name)
        self.units[rows] = processor.windows(name, contents.lengths()[rows])

    def __call__(self, rows: np.ndarray, slots: torch.Tensor, max_tokens: int) -> ItemPart:
        prepared, modality = self.prepared(rows), MODALITIES[self.name]
        return ItemPart(slots, [prepared[modality.values]], [prepared[str(modality.mask)]])

    def drawn(self, draws: np.random.Generator) -> WindowPreparation:
        """The same, with windows at random positions."""
        other = copy.copy(self)
        other.draws = draws
        return other

    def place(self) -> dict[str, Any]:
        return {} if self.draws is None else {"at": float(self.draws.random())}


class ItemSource:
    """
    The items of a catalogue, read and prepared for a model when a batch needs them. It is what all other classes take
    as their items.

    Args:
        catalogue ([`Catalogue`]): The items.
        processor ([`TransRecProcessor`], *optional*): The processor of the model. Without one, items have no contents,
            only their rows, which an ID baseline reads.
        max_tokens (`int`, *optional*): Most tokens of a bucket of texts, see [`token_budget`].

    Attributes:
        present (`torch.Tensor` of shape `(n_items, len(MODALITIES))`): Boolean, the modalities of each item that are
            read.
        log_popularity (`torch.Tensor` of shape `(n_items,)`, *optional*): Logarithm of each item's share of the
            training data, if it is known; `None` at first.
    """

    def __init__(
        self, catalogue: Catalogue, processor: TransRecProcessor | None = None, max_tokens: int | None = None
    ):
        self.catalogue, self.processor = catalogue, processor
        self.max_tokens = token_budget() if max_tokens is None else max_tokens
        self.modalities: tuple[str, ...] = () if processor is None else tuple(processor.modalities)
        has = [catalogue.has(name) & (name in self.modalities) for name in MODALITIES]
        self.present = torch.from_numpy(np.stack(has, axis=1))
        self.log_popularity: torch.Tensor | None = None
        self._preparations: dict[str, Preparation] = {}

    def __len__(self) -> int:
        return len(self.catalogue)

    @property
    def preparations(self) -> dict[str, Preparation]:
        """The preparation of each modality. Texts are tokenised at the first use."""
        for name in self.modalities:
            if name not in self._preparations and self.catalogue.has(name).any():
                self._preparations[name] = self._preparation(name)
        return self._preparations

    def _preparation(self, name: str) -> Preparation:
        assert self.processor is not None
        if MODALITIES[name].has_tokens:
            return TextPreparation(self.catalogue, self.processor)
        if MODALITIES[name].is_windowed:
            return WindowPreparation(self.catalogue, self.processor, name)
        return ContentPreparation(self.catalogue, self.processor, name)

    def forget(self, name: str) -> None:
        """Forget the prepared contents of one modality, after the settings of its processor have changed."""
        self._preparations.pop(name, None)

    def units(self) -> dict[str, np.ndarray]:
        """
        For each modality, a number to which the cost of each item is proportional, `(n_items,)`: tokens, windows, or
        1.
        """
        return {name: preparation.units for name, preparation in self.preparations.items()}

    def with_preparations(self, preparations: dict[str, Preparation]) -> ItemSource:
        """The same items with other preparations of some modalities, such as stored states."""
        other = copy.copy(self)
        other._preparations = {**self._preparations, **preparations}
        return other

    def select(self, rows: np.ndarray) -> ItemSource:
        """The items at catalogue rows, in that order."""
        return ItemSource(self.catalogue.select(rows), self.processor, self.max_tokens)

    def showing(self, modalities: Collection[str]) -> ItemSource:
        """The same items with all but these modalities hidden; an item that has none of them keeps its contents."""
        other = copy.copy(self)
        other.present = showing(self.present, modalities)
        return other

    def batch(
        self, rows: np.ndarray, hidden: torch.Tensor | None = None, draws: np.random.Generator | None = None
    ) -> ItemBatch:
        """
        A batch of the items at catalogue rows `(n_items,)`.

        Args:
            rows (`np.ndarray` of shape `(n_items,)`): The rows.
            hidden (`torch.Tensor` of shape `(n_items, len(MODALITIES))`, *optional*): Boolean, contents that are
                hidden and not read.
            draws (`np.random.Generator`, *optional*): Generator for random positions of the windows of long contents,
                as in training; without it each window is in the middle of its part.

        Raises:
            `ValueError`: If an item has none of the modalities that are read.
        """
        present = self.present[rows] if hidden is None else self.present[rows] & ~hidden
        batch = ItemBatch(present, item_rows=torch.as_tensor(rows, dtype=torch.long))
        if not self.modalities:
            return batch
        empty = (~present.any(dim=1)).nonzero()
        if len(empty):
            raise ValueError(f"item {rows[int(empty[0])]} has none of the processor's modalities: {self.modalities}")
        for name, preparation in self.preparations.items():
            slots = present[:, COLUMNS[name]].nonzero().squeeze(1)
            if draws is not None and isinstance(preparation, WindowPreparation):
                preparation = preparation.drawn(draws)
            if len(slots):
                batch.parts[name] = preparation(rows[slots.numpy()], slots, self.max_tokens)
        return batch


__all__ = ["ItemSource"]
