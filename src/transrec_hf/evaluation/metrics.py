"""Ranking metrics of one target per user, as plain functions of its rank.

Ranks count from 1. They are floats, because ties get their expected rank (`ranking.rank_targets`), and infinite for a
target that cannot be recommended. All metrics are means over users, so their sums can be added up over processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from accelerate import Accelerator


DEFAULT_KS = (5, 10, 20, 50)


def hit_rate(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """
    Whether each target is among the first `k`: `[r <= k]`. With one target per user this is recall@k.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)`): Ranks of the targets, from 1; infinite for a sure miss.
        k (`int`): Length of the recommended list.

    Returns:
        `torch.Tensor` of shape `(num_users,)`: 0 or 1 per user, float32; their mean is the hit rate.

    Example:
    ```python
    >>> import torch
    >>> hit_rate(torch.tensor([1.0, 3.0, 10.5, float("inf")]), k=10)
    tensor([1., 1., 0., 0.])

    ```
    """
    return (_checked(ranks, k) <= k).float()


def ndcg(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """
    Normalised discounted cumulative gain of each target: `[r <= k] / log2(r + 1)`; the ideal gain of one target is 1.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)`): Ranks of the targets, from 1; infinite for a sure miss.
        k (`int`): Length of the recommended list.

    Returns:
        `torch.Tensor` of shape `(num_users,)`: Values in [0, 1] per user, float32; their mean is NDCG@k.

    Example:
    ```python
    >>> import torch
    >>> ndcg(torch.tensor([1.0, 3.0, 10.5, float("inf")]), k=10)
    tensor([1.0, 0.5, 0.0, 0.0])

    ```
    """
    return hit_rate(ranks, k) / torch.log2(ranks.float() + 1)


def reciprocal_rank(ranks: torch.Tensor) -> torch.Tensor:
    """
    Reciprocal rank of each target, `1 / r`, over the full ranking.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)`): Ranks of the targets, from 1; infinite for a sure miss.

    Returns:
        `torch.Tensor` of shape `(num_users,)`: Values in [0, 1] per user, float32; their mean is MRR.

    Example:
    ```python
    >>> import torch
    >>> reciprocal_rank(torch.tensor([1.0, 4.0, float("inf")]))
    tensor([1.00, 0.25, 0.00])

    ```
    """
    return 1 / _checked(ranks).float()


def metric_values(ranks: torch.Tensor, metric: str) -> torch.Tensor:
    """
    Per-user values of a metric by its name: `"hit_rate@k"`, `"ndcg@k"` or `"mrr"`.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)`): Ranks of the targets, from 1; infinite for a sure miss.
        metric (`str`): Name of the metric.

    Returns:
        `torch.Tensor` of shape `(num_users,)`, float32.

    Raises:
        `ValueError`: If the metric is unknown, or a rank is NaN or below 1.

    Example:
    ```python
    >>> import torch
    >>> metric_values(torch.tensor([3.0, 7.0]), "ndcg@5")
    tensor([0.5, 0.0])

    ```
    """
    if metric == "mrr":
        return reciprocal_rank(ranks)
    match = re.fullmatch(r"(hit_rate|ndcg)@(\d+)", metric)
    if match is None:
        raise ValueError(f"unknown metric {metric!r}: use 'hit_rate@k', 'ndcg@k' (k a number) or 'mrr'")
    return (hit_rate if match[1] == "hit_rate" else ndcg)(ranks, int(match[2]))


def ranking_metrics(
    ranks: torch.Tensor, ks: Sequence[int] = DEFAULT_KS, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """
    Hit rate and NDCG at every `k`, and MRR, as means over users.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)`):
            Ranks of the targets, from 1; infinite for a sure miss. With an `accelerator`, those of this process's
            users; each process may have any number of users.
        ks (`Sequence[int]`, defaults to `(5, 10, 20, 50)`): Lengths of the recommended list.
        accelerator (`accelerate.Accelerator`, *optional*):
            Adds up the sums and the number of users over all processes, so that all return the same result.

    Returns:
        `dict[str, float]`: `hit_rate@k` and `ndcg@k` for every `k`, and `mrr`.

    Raises:
        `ValueError`: If there are no users, or a rank is NaN or below 1.

    Example:
    ```python
    >>> import torch
    >>> ranking_metrics(torch.tensor([1.0, 3.0, 8.0, float("inf")]), ks=(5,))
    {'hit_rate@5': 0.5, 'ndcg@5': 0.375, 'mrr': 0.3645833...}

    ```
    """
    names = metric_names(ks)
    sums = torch.stack([metric_values(ranks, name).double().sum().cpu() for name in names])
    totals = torch.cat([sums, torch.tensor([len(ranks)], dtype=torch.float64)])
    if accelerator is not None:
        totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
    if totals[-1] == 0:
        raise ValueError("no users to evaluate: the metrics of zero ranks are undefined")
    return dict(zip(names, (totals[:-1] / totals[-1]).tolist(), strict=True))


def metric_names(ks: Sequence[int] = DEFAULT_KS) -> list[str]:
    """
    Names of the reported metrics, in order.

    Example:
    ```python
    >>> metric_names((5, 10))
    ['hit_rate@5', 'hit_rate@10', 'ndcg@5', 'ndcg@10', 'mrr']

    ```
    """
    return [*(f"hit_rate@{k}" for k in ks), *(f"ndcg@{k}" for k in ks), "mrr"]


def bootstrap_interval(
    values: torch.Tensor, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of the mean over users.

    Instead of drawing users, it draws how often each value occurs, which has the same distribution. Values closer than
    1/1000 of their range are replaced by their mean. So a million users cost no more than a thousand.

    Args:
        values (`torch.Tensor` of shape `(num_users,)` or `(num_seeds, num_users)`): A metric's value of each user
            (`metric_values`). With several runs of different seeds, seeds are resampled as well as users.
        confidence (`float`, defaults to 0.95): Share of the resampled means inside the interval.
        num_resamples (`int`, defaults to 1000): Number of resamples.
        seed (`int`, defaults to 0): Seed of the resampling.

    Returns:
        `tuple[float, float]`: Lower and upper end of the interval.

    Example:
    ```python
    >>> import torch
    >>> low, high = bootstrap_interval(torch.tensor([0.0, 1.0]).repeat(200))  # about 0.5 -+ 1.96 * 0.025
    >>> round(low, 2), round(high, 2)
    (0.45, 0.55)

    ```
    """
    array, rng = values.double().cpu().numpy(), np.random.default_rng(seed)
    if array.ndim == 1 or len(array) == 1:
        means = _resampled_means(array.ravel(), num_resamples, rng)
    else:
        drawn = rng.multinomial(len(array), np.full(len(array), 1 / len(array)), size=num_resamples)
        mixes, sizes = np.unique(drawn, axis=0, return_counts=True)  # few seeds have few different draws
        means = np.concatenate(
            [_resampled_means(mix @ array / len(array), size, rng) for mix, size in zip(mixes, sizes, strict=True)]
        )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of users drawn with replacement, `(num_resamples,)`."""
    bins = ((values - values.min()) / (np.ptp(values) or 1) * 1000).astype(np.int64)
    counts = np.bincount(bins)
    sums = np.bincount(bins, weights=values)[counts > 0]
    counts = counts[counts > 0]
    draws = rng.multinomial(len(values), counts / len(values), size=num_resamples)
    return draws @ (sums / counts) / len(values)


def paired_bootstrap(
    ranks: torch.Tensor, other_ranks: torch.Tensor, metric: str = "ndcg@10", **bootstrap_kwargs: Any
) -> dict[str, float]:
    """
    The difference between two models on the same users, with its bootstrap interval. Users are resampled; with several
    runs of each model, seeds are resampled too.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)` or `(num_seeds, num_users)`): Ranks of the targets by the first
            model.
        other_ranks (`torch.Tensor` of the same shape): Ranks of the same targets, in the same order, by the other.
        metric (`str`, defaults to `"ndcg@10"`): Name of the metric.
        bootstrap_kwargs: Passed on to [`bootstrap_interval`].

    Returns:
        `dict[str, float]`: The `difference` of the means (first minus other), and the ends `low` and `high` of its
            interval. If the interval does not contain zero, the difference is significant.

    Raises:
        `ValueError`: If both have different lengths, or the metric is unknown.
    """
    if ranks.shape != other_ranks.shape:
        raise ValueError(
            f"paired ranks must belong to the same users, but there are {len(ranks)} and {len(other_ranks)}"
        )
    differences = metric_values(ranks, metric) - metric_values(other_ranks.to(ranks.device), metric)
    low, high = bootstrap_interval(differences, **bootstrap_kwargs)
    return {"difference": differences.double().mean().item(), "low": low, "high": high}


def _checked(ranks: torch.Tensor, k: int = 1) -> torch.Tensor:
    if k < 1:
        raise ValueError(f"k is {k}: the length of a recommended list must be at least 1")
    if not bool((ranks >= 1).all()):  # NaN compares false
        raise ValueError("ranks must be at least 1 (infinite for a miss), but some are NaN or smaller")
    return ranks
