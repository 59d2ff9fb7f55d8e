"""The ranking metrics as `evaluate.Metric`s, to share or combine with others; `metrics` computes, this only wraps.

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
    description = "Share of users whose target is among the first k recommendations."

    def _compute(self, predictions: list[float], k: int = 10) -> dict[str, float]:
        return {f"hit_rate@{k}": hit_rate(torch.as_tensor(predictions), k).mean().item()}


class NDCG(_RankMetric):
    description = "Normalised discounted cumulative gain at k of one target per user."

    def _compute(self, predictions: list[float], k: int = 10) -> dict[str, float]:
        return {f"ndcg@{k}": ndcg(torch.as_tensor(predictions), k).mean().item()}


class MRR(_RankMetric):
    description = "Mean reciprocal rank of one target per user."

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"mrr": reciprocal_rank(torch.as_tensor(predictions)).mean().item()}
