"""Items and sums that several processes have in common in one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def masked_mean_across_ranks(values: Tensor, mask: Tensor) -> Tensor:
    """
    This rank's share of the masked mean over all ranks, times the number of ranks: averaged over ranks, as data
    parallel training averages gradients, it is the mean over the concatenated batch.
    """
    count = mask.sum()
    dist.all_reduce(count)
    return (values * mask).sum() * dist.get_world_size() / count.clamp(min=1)


class SumAcrossRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, on each of them. So is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


@dataclass
class SharedItems:
    """
    The distinct items of all ranks' batches, and who encodes them.

    Args:
        num_items (`int`): distinct items of all ranks, `C`.
        rows (`Tensor` of shape `(U,)`): which of them each of this rank's items is.
        owned (`Tensor` of shape `(U,)`): boolean, the items whose vectors this rank gives to the others.
        encoded (`Tensor` of shape `(U,)`): boolean, the items it has to encode: those, or one if there are none.
    """

    num_items: int
    rows: Tensor
    owned: Tensor
    encoded: Tensor


def share_items(item_rows: Tensor) -> SharedItems:
    """
    Decide which rank encodes which item, so that each distinct item of all batches is encoded once. An item that
    several ranks have goes to each of them in turn.

    Args:
        item_rows (`Tensor` of shape `(U,)`): catalogue rows of this rank's distinct items.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    sizes = item_rows.new_zeros(num_ranks)
    sizes[rank] = len(item_rows)
    dist.all_reduce(sizes)
    padding = item_rows.new_full((int(sizes.max()) - len(item_rows),), -1)
    by_rank = [torch.empty(int(sizes.max()), dtype=item_rows.dtype, device=item_rows.device) for _ in range(num_ranks)]
    dist.all_gather(by_rank, torch.cat([item_rows, padding]))
    ids, columns = torch.stack(by_rank).unique(return_inverse=True)
    has = torch.zeros(num_ranks, len(ids), dtype=torch.long, device=ids.device).scatter(1, columns, 1)
    if ids[0] == -1:
        ids, has = ids[1:], has[:, 1:]
    turn = torch.arange(len(ids), device=ids.device) % has.sum(dim=0)
    rows = torch.searchsorted(ids, item_rows)
    owned = ((has[rank] == 1) & (has.cumsum(dim=0)[rank] - 1 == turn))[rows]
    encoded = owned.clone()
    encoded[0] |= not owned.any()
    return SharedItems(len(ids), rows, owned, encoded)


def gather_items(item_embeds: Tensor, shared: SharedItems) -> Tensor:
    """
    Vectors of the distinct items of all ranks, with gradients back to the rank that encoded them: `(C, d)`.

    Args:
        item_embeds (`Tensor` of shape `(U, d)`): vectors of this rank's items; only those that it owns are read.
        shared ([`SharedItems`]): see [`share_items`].
    """
    own = item_embeds.new_zeros(shared.num_items, item_embeds.shape[1])
    return SumAcrossRanks.apply(own.index_copy(0, shared.rows[shared.owned], item_embeds[shared.owned]))


def gather_counts(slot_counts: Tensor, log_popularity: Tensor, shared: SharedItems) -> tuple[Tensor, Tensor]:
    """
    Slot counts summed over all ranks, and log popularities, of the distinct items of all ranks: both `(C,)`.

    Args:
        slot_counts (`Tensor` of shape `(U,)`): slots of this rank that hold each of its items.
        log_popularity (`Tensor` of shape `(U,)`): log popularity of each of them.
        shared ([`SharedItems`]): see [`share_items`].
    """
    counts = slot_counts.new_zeros(shared.num_items).index_copy(0, shared.rows, slot_counts)
    dist.all_reduce(counts)
    popularity = log_popularity.new_full((shared.num_items,), -torch.inf).index_copy(0, shared.rows, log_popularity)
    dist.all_reduce(popularity, dist.ReduceOp.MAX)
    return counts, popularity
