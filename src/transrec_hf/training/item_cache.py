"""Item vectors of earlier training steps, which histories use again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ItemCache:
    """
    Item vectors that were computed in earlier steps. If an item occurs in a batch only in histories (neither as a
    target nor as a negative) and its vector is recent enough, it is not encoded again (as in SpeedyFeed; Xiao et al.,
    KDD 2022). A cached vector has no gradient and is slightly outdated, so steps are cheaper, but not the same.

    Args:
        num_items (`int`): Number of items of the catalogue.
        hidden_size (`int`): Length of the vectors.
        max_age (`int`): Number of steps for which a vector is used.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Device on which the vectors are kept.
    """

    def __init__(self, num_items: int, hidden_size: int, max_age: int, device: torch.device | str = "cpu"):
        self.max_age = max_age
        self.embeds = torch.zeros(num_items, hidden_size, device=device)
        self.encoded_at = torch.full((num_items,), -max_age - 1, device=device)

    def leave_out(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """The training batch with vectors (`item_embeds`) in place of the contents of the items in the cache."""
        rows = batch["items"].item_rows
        scored = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for name in ("target_index", "negative_index"):
            scored[batch[name][batch[name] >= 0]] = True
        cached = ~scored & (step - self.encoded_at[rows] <= self.max_age)
        return {**batch, "items": batch["items"].select(~cached), "item_embeds": self.embeds[rows]}

    def update(self, batch: dict[str, Any], item_embeds: Tensor, step: int) -> None:
        """Keep the vectors `(n_items, hidden_size)` that were computed for a batch of [`ItemCache.leave_out`]."""
        computed = torch.zeros(len(item_embeds), dtype=torch.bool, device=item_embeds.device)
        for part in batch["items"].parts.values():
            computed[part.rows] = True
        rows = batch["items"].item_rows[computed]
        self.embeds[rows] = item_embeds.detach()[computed].to(self.embeds.dtype)
        self.encoded_at[rows] = step
