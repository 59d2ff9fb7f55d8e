"""Exact ranks over a whole catalogue, in blocks of users, and the indexing of sequences for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from ..data.interactions import Sequences

MAX_USERS = 256  # users that are ranked at a time, fewer for a large catalogue
MAX_SCORES = 2**26  # scores in memory at a time: 256 MiB in fp32
CACHED_SCORES = 2**19  # scores in fp64 at a time: 4 MiB, which fit into the cache of a CPU


def dot_scores(user_embeds: torch.Tensor, item_embeds: torch.Tensor) -> torch.Tensor:
    """
    Dot products in fp32, summed in fp64 if the device can. So autocast, TF32 and the size of a block do not change a
    score, and equal items get equal scores.

    Args:
        user_embeds (`torch.Tensor` of shape `(num_users, hidden_size)`): User vectors.
        item_embeds (`torch.Tensor` of shape `(num_items, hidden_size)`): Item vectors.

    Returns:
        `torch.Tensor` of shape `(num_users, num_items)`: Scores, float32.
    """
    users, num_items = precise(user_embeds), len(item_embeds)
    chunk = max(1, CACHED_SCORES // max(1, len(users))) if users.device.type == "cpu" else num_items
    scores = torch.empty(len(users), num_items, device=users.device)
    for start in range(0, num_items, chunk):
        scores[:, start : start + chunk] = users @ precise(item_embeds[start : start + chunk]).T
    return scores


def precise(embeds: torch.Tensor) -> torch.Tensor:
    """Vectors in fp64 if the device supports it."""
    return embeds.float() if embeds.device.type == "mps" else embeds.double()


def rank_scores(
    scores: torch.Tensor,
    target_rows: torch.Tensor,
    excluded: torch.Tensor | None = None,
    *,
    candidates: torch.Tensor | None = None,
    ties: str = "expected",
    protect_target: bool = False,
) -> torch.Tensor:
    """
    Ranks of the targets among the scores of all items: `1 + #(s > s_t) + #(s == s_t, others) / 2`.

    The scores are changed in place: those of excluded items and of non-candidates become minus infinity.

    Args:
        scores (`torch.Tensor` of shape `(num_users, num_items)`): Scores of all items, float32.
        target_rows (`torch.Tensor` of shape `(num_users,)`): Row of each user's target.
        excluded (`torch.Tensor` of shape `(num_users, any)`, *optional*):
            Rows that cannot be recommended; -1 is padding.
        candidates (`torch.Tensor` of shape `(num_items,)`, *optional*): Boolean; all other items are left out.
        ties (`"expected"` or `"pessimistic"`): Whether half or all of the items that score like the target precede it.
        protect_target (`bool`): Never excludes the target. Otherwise an excluded target has an infinite rank.

    Returns:
        `torch.Tensor` of shape `(num_users,)`: Ranks, float32; NaN for a user with a score that is not finite.
    """
    target_rows = target_rows.to(scores.device).unsqueeze(1)
    finite = scores.sum(dim=1).isfinite()
    if candidates is not None:
        scores.masked_fill_(~candidates.to(scores.device), -torch.inf)
    if excluded is not None:
        masked = excluded >= 0
        if protect_target:
            masked &= excluded != target_rows.to(excluded.device)
        user, slot = masked.nonzero(as_tuple=True)
        scores[user.to(scores.device), excluded[user, slot].to(scores.device)] = -torch.inf
    target_scores = scores.gather(1, target_rows)
    better = _count(operator.gt, scores, target_scores)
    tied = _count(operator.eq, scores, target_scores) - 1
    ranks = (1 + better + tied * (0.5 if ties == "expected" else 1.0)).float()
    ranks = ranks.masked_fill(target_scores.squeeze(1) == -torch.inf, torch.inf)
    return ranks.masked_fill(~finite, torch.nan)


def _count(compare: Callable, scores: torch.Tensor, target_scores: torch.Tensor) -> torch.Tensor:
    """
    For each user, the number of scores for which `compare` with the target's score is true: `(num_users,)`, int64.
    """
    if scores.device.type != "cpu":
        return compare(scores, target_scores).count_nonzero(dim=1)
    # row by row the comparisons stay in the cache, and NumPy counts ten times faster than torch
    rows = zip(scores.detach().numpy(), target_scores.detach().numpy(), strict=True)
    return torch.tensor([np.count_nonzero(compare(row, target)) for row, target in rows])


def rank_targets(
    user_embeds: torch.Tensor,
    item_embeds: torch.Tensor,
    target_rows: torch.Tensor,
    excluded: torch.Tensor | None = None,
    *,
    ties: str = "expected",
    protect_target: bool = False,
    max_scores: int = MAX_SCORES,
) -> torch.Tensor:
    """
    Ranks of the targets by the dot products of users and items. Users come in blocks, so that never all scores are in
    memory.

    Args:
        user_embeds (`torch.Tensor` of shape `(num_users, hidden_size)`): User vectors.
        item_embeds (`torch.Tensor` of shape `(num_items, hidden_size)`): Item vectors.
        target_rows (`torch.Tensor` of shape `(num_users,)`): Row of each user's target.
        excluded (`torch.Tensor` of shape `(num_users, any)`, *optional*):
            Rows that cannot be recommended; -1 is padding.
        ties (`"expected"` or `"pessimistic"`): Whether half or all of the items that score like the target precede it.
        protect_target (`bool`): Never excludes the target. Otherwise an excluded target has an infinite rank.
        max_scores (`int`): Most scores in memory at a time (at least those of one user).

    Returns:
        `torch.Tensor` of shape `(num_users,)`: Ranks from 1, float32, infinite for a sure miss.

    Raises:
        `ValueError`: If a score is not finite.

    Example:
    ```python
    >>> import torch
    >>> items = torch.tensor([[3.0], [2.0], [2.0], [1.0]])
    >>> rank_targets(torch.ones(2, 1), items, torch.tensor([1, 3]), excluded=torch.tensor([[-1], [0]]))
    tensor([2.5, 3.0])

    ```
    """
    check_option("ties", ties, ("expected", "pessimistic"))
    block = min(MAX_USERS, max(1, max_scores // len(item_embeds)))
    ranks = [
        rank_scores(
            dot_scores(user_embeds[start : start + block], item_embeds),
            target_rows[start : start + block],
            None if excluded is None else excluded[start : start + block],
            ties=ties,
            protect_target=protect_target,
        )
        for start in range(0, len(user_embeds), block)
    ]
    return check_finite(torch.cat(ranks))


def last_items(
    sequences: Sequences, users: np.ndarray, length: int | None, values: np.ndarray | None = None
) -> torch.Tensor:
    """
    The last `length` items before each user's target (all if None), oldest first. With `values`, such as
    `sequences.timestamps`, these values of the interactions instead of the items.

    Returns:
        `torch.Tensor` of shape `(len(users), at most length)`: Rows of the catalogue, int64, padded on the right
        with -1.
    """
    values = sequences.items if values is None else values
    ends = sequences.ends[users].astype(np.int64) - 1
    starts = sequences.starts[users].astype(np.int64)
    longest = int((ends - starts).max(initial=0))
    width = longest if length is None else min(length, longest)
    index = np.maximum(starts, ends - width)[:, None] + np.arange(width)
    rows = values[np.minimum(index, len(values) - 1)].astype(np.int64)
    return torch.from_numpy(np.where(index < ends[:, None], rows, -1))


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Raises `ValueError` with the list of options if `value` is not one of them."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, options))}")


def check_finite(ranks: torch.Tensor) -> torch.Tensor:
    """Raises `ValueError` if a rank is NaN, which marks a user whose scores are not finite."""
    broken = int(ranks.isnan().sum())
    if broken:
        raise ValueError(
            f"scores of {broken} of {len(ranks)} users are NaN or infinite, because user or item vectors are: look "
            "for a diverged training (lower the learning rate) or a broken checkpoint"
        )
    return ranks
