"""Catalogue rows to model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.catalogue import Catalogue
from ..model.processing_transrec import TransRecProcessor


if TYPE_CHECKING:
    from .store import ActivationStore

PADDING = -1
TOKENS_ON_CPU = 2048  # in one pass of a text tower


def token_budget(device: torch.device) -> int:
    """Tokens in one pass of a text tower: on a CPU what its cache holds, elsewhere enough to keep all units busy."""
    return TOKENS_ON_CPU if device.type == "cpu" else 32768


def bucket_by_tokens(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """
    Indices of `lengths` `(n,)` in buckets of like length, short ones first. Padded to its longest text, a bucket holds
    at most `budget` tokens, or one text.
    """
    order = np.argsort(lengths, kind="stable")
    buckets, start = [], 0
    while start < len(order):
        # padded to its last text, the longest, a bucket grows with every text it takes in
        padded = lengths[order[start:]] * np.arange(1, len(order) - start + 1)
        size = max(1, int(np.searchsorted(padded, budget, side="right")))
        buckets.append(order[start : start + size])
        start += size
    return buckets


def prepare_items(
    catalogue: Catalogue,
    rows: np.ndarray,
    processor: TransRecProcessor | None,
    store: ActivationStore | None = None,
    max_tokens: int = TOKENS_ON_CPU,
) -> dict[str, Any]:
    """
    Model inputs of the given catalogue rows, read and decoded now; or from a store of the frozen blocks' states.

    Texts come in buckets of like length, each padded to its own longest text; their tokens are computed once for the
    whole catalogue.

    Args:
        catalogue ([`Catalogue`]): the items.
        rows (`np.ndarray` of shape `(n_items,)`): which of them.
        processor ([`TransRecProcessor`]): of the model; `None` for the ID baseline.
        store ([`ActivationStore`], *optional*): of the frozen blocks' states, filled.
        max_tokens (`int`, *optional*, defaults to 2048): tokens of a bucket, see [`token_budget`].

    Returns:
        `dict` with `item_ids` `(n_items,)` and, unless `processor` is `None`, the output of [`TransRecProcessor`] with
        lists of tensors, one per bucket, for `input_ids` and `attention_mask`.
    """
    batch: dict[str, Any] = {"item_ids": torch.as_tensor(rows, dtype=torch.long)}
    if processor is None:
        return batch
    if store is not None:
        return batch | store.prepare(rows, max_tokens)
    has_text = catalogue.has_text[rows] & ("text" in processor.modalities)
    has_image = catalogue.has_image[rows] & ("image" in processor.modalities)
    batch["item_modalities"] = torch.from_numpy(np.stack([has_text, has_image], axis=1))
    empty = np.flatnonzero(~(has_text | has_image))
    if len(empty):
        raise ValueError(f"item {rows[empty[0]]} has none of the processor's modalities: {processor.modalities}")
    if has_text.any():
        tokens = catalogue.tokens(processor.tokenizer, processor.max_text_length)
        slots = np.flatnonzero(has_text)
        buckets = bucket_by_tokens(tokens.lengths[rows[slots]], max_tokens)
        padded = [tokens.pad(rows[slots[bucket]]) for bucket in buckets]
        batch["input_ids"], batch["attention_mask"] = map(list, zip(*padded, strict=True))
        batch["text_index"] = torch.from_numpy(slots[np.concatenate(buckets)])
    if has_image.any():
        slots = np.flatnonzero(has_image)
        batch["pixel_values"] = processor(images=[catalogue.image(row) for row in rows[slots]])["pixel_values"]
        batch["image_index"] = torch.from_numpy(slots)
    return batch


def pad_right(rows: Sequence[np.ndarray], length: int | None = None) -> np.ndarray:
    """Ragged rows to one `(n_rows, length)` array, filled with `-1` on the right."""
    length = length or max(len(row) for row in rows)
    padded = np.full((len(rows), length), PADDING, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
