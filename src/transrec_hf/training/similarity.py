"""Which data set helps which: cosines of their gradients, and steps weighted by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from .adapters import base_of


logger = logging.get_logger(__name__)

SIMILARITIES = ("grad_cosine",)
DECAY = 0.9  # decay of the averages of gradients, at each step on the data set


class GradientSimilarity(TrainerCallback):
    """
    Weighs each step of a run on several data sets by how well its gradient agrees with the target's. For each data
    set, the gradients of the user encoder, which all data sets share, are averaged over its last steps. The weight of
    a step on a source is the cosine between its average and the target's, divided by the largest such cosine of all
    sources; it is zero if the cosine is negative. Steps on the target count in full. The cost is one dot product for
    each step.

    This is a first-order reconstruction of meta-transfer with rescaled gradients (MetaRec, arXiv 2411.01785, whose
    code is not public). A resumed run starts its averages again.

    Args:
        names (`Sequence[str]`): Names of the data sets.
        target (`str`): The name of the target.

    Attributes:
        domain (`str`, *optional*): The data set of the current step, set by the code that makes the batches.
    """

    def __init__(self, names: Sequence[str], target: str):
        self.names, self.target = tuple(names), target
        self.domain: str | None = None
        self.averages: dict[str, Tensor] = {}
        self.seen: dict[str, list[float]] = {name: [] for name in self.names}  # cosines with the target

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Weigh the gradients after they were clipped, since clipping would undo the weights."""
        transrec: Any = base_of(model)  # type: ignore[arg-type]
        shared = [weight.grad for weight in transrec.user_encoder.parameters() if weight.grad is not None]
        if self.domain is None or not shared:
            return
        gradient = torch.cat([part.flatten().float() for part in shared])
        before = self.averages.get(self.domain, gradient)
        self.averages[self.domain] = DECAY * before + (1 - DECAY) * gradient
        weight = self.weight(self.domain)
        if self.domain != self.target and self.target in self.averages:
            self.seen[self.domain].append(self.cosine(self.domain, self.target))
        if weight < 1:
            for parameter in transrec.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(weight)

    def cosine(self, one: str, other: str) -> float:
        """The cosine between the averages of two data sets; 0 if one of them had no step yet."""
        if one not in self.averages or other not in self.averages:
            return 0.0
        return float(nn.functional.cosine_similarity(self.averages[one], self.averages[other], dim=0))

    def weight(self, name: str) -> float:
        """The current weight of a step on a data set."""
        if name == self.target or self.target not in self.averages:
            return 1.0
        others = [other for other in self.names if other != self.target and other in self.averages]
        cosines = {other: max(0.0, self.cosine(other, self.target)) for other in others}
        return cosines[name] / max(cosines.values()) if cosines[name] else 0.0

    def matrix(self) -> dict[str, dict[str, float]]:
        """The current cosines between all data sets."""
        return {one: {other: self.cosine(one, other) for other in self.names} for one in self.names}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, cosines in self.seen.items():
            mean = sum(cosines) / max(1, len(cosines))
            if mean < 0:
                logger.warning(
                    f"{name} pulls against {self.target}: the mean cosine of their gradients is {mean:.3f}, and steps "
                    "with a negative cosine had no weight. Leave out this source, or try the target alone."
                )
