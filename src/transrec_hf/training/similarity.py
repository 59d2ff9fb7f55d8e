"""Which domain helps which: cosines of their gradients, and steps weighted by them."""

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
DECAY = 0.9  # of the averages of gradients, at each step of the domain


class GradientSimilarity(TrainerCallback):
    """
    Weighs each step of a run on several domains by whether it goes the way that a target would go. Of each domain the
    gradients of the user encoder, which is what all of them share, are averaged over its last steps; a step of a
    source counts as much as the cosine of its average with the target's, over that of the source most like it, and
    nothing if it is negative. Steps of the target count in full. The cost is a dot product a step.

    This is a first-order reconstruction of meta-transfer with rescaled gradients (MetaRec, arXiv 2411.01785, whose
    code is not public). A resumed run averages anew.

    Args:
        names (`Sequence[str]`): Of the domains.
        target (`str`): One of them.

    Attributes:
        domain (`str`, *optional*): Of the step at hand; whoever makes the batches sets it.
    """

    def __init__(self, names: Sequence[str], target: str):
        self.names, self.target = tuple(names), target
        self.domain: str | None = None
        self.averages: dict[str, Tensor] = {}
        self.seen: dict[str, list[float]] = {name: [] for name in self.names}  # cosines with the target

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """After the gradients were clipped, or clipping would undo the weights."""
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
        """Of the averages of two domains; 0 if one of them was not met yet."""
        if one not in self.averages or other not in self.averages:
            return 0.0
        return float(nn.functional.cosine_similarity(self.averages[one], self.averages[other], dim=0))

    def weight(self, name: str) -> float:
        """What a step of a domain counts now."""
        if name == self.target or self.target not in self.averages:
            return 1.0
        others = [other for other in self.names if other != self.target and other in self.averages]
        cosines = {other: max(0.0, self.cosine(other, self.target)) for other in others}
        return cosines[name] / max(cosines.values()) if cosines[name] else 0.0

    def matrix(self) -> dict[str, dict[str, float]]:
        """Which domain (rows) goes the way of which other one (columns): cosines, as they are now."""
        return {one: {other: self.cosine(one, other) for other in self.names} for one in self.names}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, cosines in self.seen.items():
            mean = sum(cosines) / max(1, len(cosines))
            if mean < 0:
                logger.warning(
                    f"{name} pulls against {self.target}: the mean cosine of their gradients is {mean:.3f}, and steps "
                    "against it counted nothing. Leave it out of the sources, or see if the target alone is better."
                )
