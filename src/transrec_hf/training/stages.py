"""Training in two stages: first the user encoder on item vectors as they are, then everything."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback


class UserEncoderFirst(TrainerCallback):
    """
    Keeps the item encoder as it is for the first epochs of a run, by dropping its gradients before the optimizer step.

    Args:
        epochs (`float`): Number of these epochs.
    """

    def __init__(self, epochs: float):
        self.epochs = epochs

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if model is None or (state.epoch or 0.0) >= self.epochs:
            return
        for name, parameter in model.named_parameters():
            if "item_encoder." in name:
                parameter.grad = None
