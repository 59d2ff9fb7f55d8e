"""The tokens of a catalogue's texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .contents import Content


TEXTS_AT_A_TIME = 2048  # tokenised in one call


class CatalogueTokens:
    """
    The token ids of all texts of a catalogue, computed once and kept in one flat array: 4 bytes a token.

    Args:
        texts ([`Content`]): the texts of the items.
        tokenizer (`PreTrainedTokenizerBase`): of the text tower.
        max_length (`int`): tokens after which a text is cut.
    """

    def __init__(self, texts: Content, tokenizer: Any, max_length: int):
        self.tokenizer, self.max_length, self.vocabulary_size = tokenizer, max_length, len(tokenizer)
        self.padding = tokenizer.pad_token_id or 0
        rows = np.flatnonzero(texts.present)
        parts: list[np.ndarray] = []
        self.lengths = np.zeros(len(texts.present), dtype=np.int64)
        starts = range(0, len(rows), TEXTS_AT_A_TIME)
        for start in logging.tqdm(starts, desc="Tokenising texts", delay=2, leave=False):
            some = rows[start : start + TEXTS_AT_A_TIME]
            token_ids = tokenizer([texts.read(row) for row in some], truncation=True, max_length=max_length)[
                "input_ids"
            ]
            self.lengths[some] = [len(ids) for ids in token_ids]
            parts.append(np.concatenate(token_ids).astype(np.int32))
        self.token_ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def are_of(self, tokenizer: Any, max_length: int) -> bool:
        """Whether these are what the tokenizer, as it is now, would give."""
        known = (self.max_length, self.vocabulary_size)
        return self.tokenizer is tokenizer and known == (max_length, len(tokenizer))

    def pad(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask of the given catalogue rows, both `(n_rows, longest)`, padded on the right."""
        lengths = self.lengths[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]
        index = self.starts[rows][:, None] + np.arange(mask.shape[1])
        token_ids = np.where(mask, self.token_ids[np.minimum(index, len(self.token_ids) - 1)], self.padding)
        return torch.from_numpy(token_ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))
