"""Parts of a model, each with its own learning rate and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.modalities_transrec import MODALITIES
from .arguments import TransRecTrainingArguments


def part_of(name: str) -> str:
    """The part of a model to which a parameter belongs: `"tower"`, `"projection"` or `"user_encoder"`."""
    if any(f"{modality.tower}." in name for modality in MODALITIES.values() if modality.tower):
        return "tower"
    # ID vectors are learned from scratch, like the user encoder
    return "projection" if "item_encoder." in name and "item_embedding" not in name else "user_encoder"


def parameter_groups(model: nn.Module, args: TransRecTrainingArguments, decayed: set[str]) -> list[dict[str, Any]]:
    """
    Optimizer groups of the trainable parameters, with a learning rate and a weight decay for each part. Biases and
    norms have no weight decay.

    Args:
        model (`nn.Module`): The model.
        args ([`TransRecTrainingArguments`]): The rates and decays.
        decayed (`set[str]`): Names of the parameters that decay, see `Trainer.get_decay_parameter_names`.
    """

    def either(value: float | None, default: float) -> float:
        return default if value is None else value

    rates = {
        "tower": (args.tower_learning_rate, args.tower_weight_decay),
        "projection": (
            either(args.projection_learning_rate, args.learning_rate),
            either(args.projection_weight_decay, args.weight_decay),
        ),
        "user_encoder": (args.learning_rate, args.weight_decay),
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name in decayed and parameter.dim() > 1  # `Trainer` does not know batch norms
            groups.setdefault((part_of(name), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part][0], "weight_decay": rates[part][1] if decays else 0.0}
        for (part, decays), parameters in groups.items()
    ]
