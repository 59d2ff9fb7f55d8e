"""
Training objectives: pure functions of user states, item vectors and index tensors.

Shapes: `B` users, `L` positions, `U` distinct items of the batch, `d` the hidden size. An index of `-1` is padding;
positions without a target are not computed. Scores are raw dot products in fp32, and each function returns a scalar.
`mean` averages values under a mask: [`masked_mean`], or [`masked_mean_across_ranks`] if several processes share one
batch. The functions with which processes share items are at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


Mean = Callable[[Tensor, Tensor], Tensor]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where the boolean `mask` of the same shape is true; 0 if it is true nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def scores(states: Tensor, item_embeds: Tensor) -> Tensor:
    """Dot products of `states` `(..., d)` with every row of `item_embeds` `(U, d)`, in fp32: `(..., U)`."""
    with torch.autocast(states.device.type, enabled=False):
        return states.float() @ item_embeds.float().T


def paired_scores(states: Tensor, item_embeds: Tensor) -> Tensor:
    """Dot products of `states` `(..., d)` with their own items `(..., K, d)`, in fp32: `(..., K)`."""
    with torch.autocast(states.device.type, enabled=False):
        return (states.float().unsqueeze(-2) * item_embeds.float()).sum(-1)


def batch_slots(history_index: Tensor, target_index: Tensor) -> Tensor:
    """All items of each user's window, the first input and then the targets: `(B, L + 1)`."""
    return torch.cat([history_index[:, :1], target_index], dim=1)


def count_slots(slots: Tensor, num_items: int) -> Tensor:
    """For each of `num_items` items, the number of slots `(B, L + 1)` that hold it: `(U,)`."""
    return torch.bincount(slots[slots >= 0], minlength=num_items)


def in_batch_softmax(
    states: Tensor,
    item_embeds: Tensor,
    target_index: Tensor,
    slots: Tensor,
    slot_counts: Tensor,
    log_popularity: Tensor,
    mean: Mean = masked_mean,
) -> Tensor:
    r"""
    In-batch debiased cross-entropy on unique items.

    With state \\(h_{ij}\\) of user \\(i\\) at position \\(j\\), items \\(a\\) of the batch, popularity \\(p_a\\) and
    \\(m_a\\) slots of the batch holding \\(a\\):

    $$ z_{ija} = h_{ij} e_a - \log p_a + \log m_a, \quad z_{ij,target} = h_{ij} e_{target} - \log p_{target} $$
    $$ L = - mean_{ij} \log softmax(z_{ij})_{target} $$

    where the user's own other items are left out. It equals the cross-entropy over all slots of the batch with the
    logQ correction of Yi et al. (RecSys 2019), as used by MoRec and PMMRec, but computes far fewer columns.

    Args:
        states (`Tensor` of shape `(B, L, d)`): User states.
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of the distinct candidate items.
        target_index (`Tensor` of shape `(B, L)`): Row of the next item, `-1` where there is none.
        slots (`Tensor` of shape `(B, L + 1)`): Rows of the user's own items, `-1` for padding.
        slot_counts (`Tensor` of shape `(U,)`): Slots of the whole batch that hold each item.
        log_popularity (`Tensor` of shape `(U,)`): Log of each item's share of the training interactions.
        mean (`Callable`, *optional*): How positions are averaged.
    """
    users, positions = (target_index >= 0).nonzero(as_tuple=True)
    target = target_index[users, positions].unsqueeze(-1)
    logits = scores(states[users, positions], item_embeds) - log_popularity.float()
    target_logits = logits.gather(-1, target)
    own = torch.zeros(len(slots), len(item_embeds) + 1, dtype=torch.bool, device=slots.device)
    own = own.scatter(1, slots.where(slots >= 0, len(item_embeds)), True)[:, :-1]
    negatives = (logits + slot_counts.float().log()).masked_fill(own[users], -torch.inf)
    nll = torch.logsumexp(negatives.scatter(-1, target, target_logits), dim=-1, keepdim=True) - target_logits
    return mean(nll, target >= 0)


def full_softmax(states: Tensor, item_embeds: Tensor, target_index: Tensor, mean: Mean = masked_mean) -> Tensor:
    r"""
    Cross-entropy over the whole catalogue: \\( L = - mean_{ij} \log softmax_a(h_{ij} e_a)_{target} \\).

    Args:
        states (`Tensor` of shape `(B, L, d)`): User states.
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of every item of the catalogue.
        target_index (`Tensor` of shape `(B, L)`): Row of the next item, `-1` where there is none.
    """
    users, positions = (target_index >= 0).nonzero(as_tuple=True)
    target = target_index[users, positions]
    nll = F.cross_entropy(scores(states[users, positions], item_embeds), target, reduction="none")
    return mean(nll, target >= 0)


def sampled_softmax(
    states: Tensor,
    item_embeds: Tensor,
    target_index: Tensor,
    negative_index: Tensor,
    log_popularity: Tensor,
    mean: Mean = masked_mean,
) -> Tensor:
    r"""
    Cross-entropy of the target against `K` negatives shared by the batch and drawn with probability \\(q = p\\), the
    popularity, with the logQ correction of Bengio and Senécal (2008): \\( z_{ija} = h_{ij} e_a - \log q_a \\). A
    negative that happens to be the target is left out.

    Args:
        states (`Tensor` of shape `(B, L, d)`): User states.
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of the distinct items of the batch.
        target_index (`Tensor` of shape `(B, L)`): Row of the next item, `-1` where there is none.
        negative_index (`Tensor` of shape `(K,)`): Rows of the sampled items.
        log_popularity (`Tensor` of shape `(U,)`): Log of the probability to be sampled.
    """
    users, positions = (target_index >= 0).nonzero(as_tuple=True)
    states, target = states[users, positions], target_index[users, positions].unsqueeze(-1)
    corrected = log_popularity.float()
    positive = paired_scores(states, item_embeds[target]) - corrected[target]
    negative = scores(states, item_embeds[negative_index]) - corrected[negative_index]
    negative = negative.masked_fill(negative_index == target, -torch.inf)
    nll = torch.logsumexp(torch.cat([positive, negative], dim=-1), dim=-1, keepdim=True) - positive
    return mean(nll, target >= 0)


def cpc(
    user_embeds: Tensor,
    item_embeds: Tensor,
    target_index: Tensor,
    negative_index: Tensor,
    mean: Mean = masked_mean,
) -> Tensor:
    r"""
    The paper's contrastive predictive coding: a binary cross-entropy in which all next items of one user vector are
    positives, and random items are negatives.

    $$ L = mean_{u,p} \log(1 + e^{-h_u e_p}) + mean_{u,n} \log(1 + e^{h_u e_n}) $$

    Args:
        user_embeds (`Tensor` of shape `(B, d)`): State at each user's last position.
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of the distinct items of the batch.
        target_index (`Tensor` of shape `(B, P)`): Rows of the next items, `-1` for padding.
        negative_index (`Tensor` of shape `(B, N)`): Rows of the negatives, `-1` for padding.
    """
    positive = paired_scores(user_embeds, item_embeds[target_index.clamp(min=0)])
    negative = paired_scores(user_embeds, item_embeds[negative_index.clamp(min=0)])
    return mean(F.softplus(-positive), target_index >= 0) + mean(F.softplus(negative), negative_index >= 0)


def bce(
    states: Tensor,
    item_embeds: Tensor,
    target_index: Tensor,
    negative_index: Tensor,
    mean: Mean = masked_mean,
) -> Tensor:
    r"""
    Binary cross-entropy at all positions (SASRec; NineRec's "SASRec", MoRec's "bce").

    $$ L = mean_{ij} \log(1 + e^{-h_{ij} e_{target}}) + mean_{ij,n} \log(1 + e^{h_{ij} e_n}) $$

    Args:
        states (`Tensor` of shape `(B, L, d)`): User states.
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of the distinct items of the batch.
        target_index (`Tensor` of shape `(B, L)`): Row of the next item, `-1` where there is none.
        negative_index (`Tensor` of shape `(B, L, N)`): Rows of the negatives of each position, `-1` for padding.
    """
    users, positions = (target_index >= 0).nonzero(as_tuple=True)
    states, negatives = states[users, positions], negative_index[users, positions]
    target = target_index[users, positions].unsqueeze(-1)
    positive = paired_scores(states, item_embeds[target])
    negative = paired_scores(states, item_embeds[negatives.clamp(min=0)])
    return mean(F.softplus(-positive), target >= 0) + mean(F.softplus(negative), negatives >= 0)


def bpr(
    states: Tensor,
    item_embeds: Tensor,
    target_index: Tensor,
    negative_index: Tensor,
    mean: Mean = masked_mean,
) -> Tensor:
    r"""
    Bayesian personalised ranking at all positions (Rendle et al., UAI 2009).

    $$ L = - mean_{ij,n} \log \sigma(h_{ij} e_{target} - h_{ij} e_n) $$

    Args:
        states (`Tensor` of shape `(B, L, d)`): User states.
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of the distinct items of the batch.
        target_index (`Tensor` of shape `(B, L)`): Row of the next item, `-1` where there is none.
        negative_index (`Tensor` of shape `(B, L, N)`): Rows of the negatives of each position, `-1` for padding.
    """
    users, positions = (target_index >= 0).nonzero(as_tuple=True)
    states, negatives = states[users, positions], negative_index[users, positions]
    target = target_index[users, positions].unsqueeze(-1)
    positive = paired_scores(states, item_embeds[target])
    negative = paired_scores(states, item_embeds[negatives.clamp(min=0)])
    return mean(-F.logsigmoid(positive - negative), negatives >= 0)


def prefix_of(vectors: Tensor, size: int, config: Any) -> Tensor:
    """
    The first `size` numbers of vectors `(..., width)`, and the numbers after `hidden_size`, such as the popularity of
    items. If scores are cosines, a prefix is scaled to the length of the whole vector.
    """
    whole, rest = vectors[..., : config.hidden_size], vectors[..., config.hidden_size :]
    part = whole[..., :size]
    if config.similarity == "cosine":
        part = F.normalize(part.float(), dim=-1) * whole.float().norm(dim=-1, keepdim=True)
    return torch.cat([part.to(rest.dtype), rest], dim=-1) if rest.shape[-1] else part


def nested(
    compute: Callable[..., Tensor], config: Any, given: tuple[Tensor, Tensor, Tensor], *index: Any, **kwargs: Any
) -> Tensor:
    """
    The mean of an objective on whole vectors and on their prefixes of `config.matryoshka_dims` numbers (Matryoshka
    representations, arXiv 2205.13147), so that an index may keep only the beginning of each vector.

    Args:
        compute (`Callable`): The objective, see [`~TransRecModel.compute_loss`].
        config ([`TransRecConfig`]): The configuration of the model.
        given (`tuple[Tensor]`): User states, vectors of the items of the batch, and vectors of all candidates.
        index, kwargs: Further arguments of the objective.
    """

    def of(states: Tensor, item_embeds: Tensor, candidates: Tensor) -> Tensor:
        return compute(states, item_embeds, *index, candidates=candidates, **kwargs)

    losses = [of(*given)]
    for size in config.matryoshka_dims or ():
        losses.append(of(*(prefix_of(vectors, size, config) for vectors in given)))
    return torch.stack(losses).mean()


def masked_mean_across_ranks(values: Tensor, mask: Tensor) -> Tensor:
    """
    This rank's share of the masked mean over all ranks, times the number of ranks. Data-parallel training averages
    over ranks, which gives the mean over the concatenated batch.
    """
    count = mask.sum()
    dist.all_reduce(count)
    return (values * mask).sum() * dist.get_world_size() / count.clamp(min=1)


class SumAcrossRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, on each of them; its gradient is summed too."""

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
    The distinct items of the batches of all ranks, and which rank encodes which item.

    Args:
        num_items (`int`): Number of distinct items of all ranks, `C`.
        rows (`Tensor` of shape `(U,)`): The index of each of this rank's items among them.
        owned (`Tensor` of shape `(U,)`): Boolean, the items whose vectors this rank gives to the others.
        encoded (`Tensor` of shape `(U,)`): Boolean, the items that this rank encodes: those, or one if there are none.
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
        item_rows (`Tensor` of shape `(U,)`): Catalogue rows of this rank's distinct items.
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
        item_embeds (`Tensor` of shape `(U, d)`): Vectors of this rank's items; only those that it owns are read.
        shared ([`SharedItems`]): See [`share_items`].
    """
    own = item_embeds.new_zeros(shared.num_items, item_embeds.shape[1])
    return SumAcrossRanks.apply(own.index_copy(0, shared.rows[shared.owned], item_embeds[shared.owned]))


def gather_counts(slot_counts: Tensor, log_popularity: Tensor, shared: SharedItems) -> tuple[Tensor, Tensor]:
    """
    Slot counts summed over all ranks, and log popularities, of the distinct items of all ranks: both `(C,)`.

    Args:
        slot_counts (`Tensor` of shape `(U,)`): Slots of this rank that hold each of its items.
        log_popularity (`Tensor` of shape `(U,)`): Log popularity of each of them.
        shared ([`SharedItems`]): See [`share_items`].
    """
    counts = slot_counts.new_zeros(shared.num_items).index_copy(0, shared.rows, slot_counts)
    dist.all_reduce(counts)
    popularity = log_popularity.new_full((shared.num_items,), -torch.inf).index_copy(0, shared.rows, log_popularity)
    dist.all_reduce(popularity, dist.ReduceOp.MAX)
    return counts, popularity
