"""The ranking metrics as `evaluate.Metric`s, to share them or to combine them with others.

`predictions` are the ranks of the targets, one per user, as `ranking.rank_targets` returns them.

Example:
```python
>>> from transrec_hf.metrics import NDCG

>>> NDCG().compute(predictions=[1.0, 3.0, 12.5], k=10)
{'ndcg@10': 0.5}

```
"""

from __future__ import annotations

import datasets
import evaluate
import torch

from .metrics import hit_rate, ndcg, reciprocal_rank


class _RankMetric(evaluate.Metric):
    description = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: rank of the target of each user, from 1; infinite for a miss.",
            features=datasets.Features({"predictions": datasets.Value("float32")}),
        )


class HitRate(_RankMetric):
    """
    Share of users whose target is among the first `k` recommendations, as a metric of `evaluate`.

    Call `compute(predictions=ranks, k=10)` with the rank of each user's target, from 1; a miss is infinite. It returns
    `{"hit_rate@10": float}`, between 0 and 1.
    """

    description = "Share of users whose target is among the first k recommendations."

    def _compute(self, predictions: list[float], k: int = 10) -> dict[str, float]:
        return {f"hit_rate@{k}": hit_rate(torch.as_tensor(predictions), k).mean().item()}


class NDCG(_RankMetric):
    """
    Normalised discounted cumulative gain of one target for each user: `1 / log2(1 + rank)` up to rank `k`, as a metric
    of `evaluate`.

    Call `compute(predictions=ranks, k=10)` with the rank of each user's target, from 1; a miss is infinite. It returns
    `{"ndcg@10": float}`, between 0 and 1.
    """

    description = "Normalised discounted cumulative gain at k of one target per user."

    def _compute(self, predictions: list[float], k: int = 10) -> dict[str, float]:
        return {f"ndcg@{k}": ndcg(torch.as_tensor(predictions), k).mean().item()}


class MRR(_RankMetric):
    """
    Mean of `1 / rank` of the target over users, as a metric of `evaluate`.

    Call `compute(predictions=ranks)` with the rank of each user's target, from 1; a miss is infinite. It returns
    `{"mrr": float}`, between 0 and 1.
    """

    description = "Mean reciprocal rank of one target per user."

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"mrr": reciprocal_rank(torch.as_tensor(predictions)).mean().item()}
