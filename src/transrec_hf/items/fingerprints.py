"""The settings, besides weights, on which item vectors and stored states depend, in a form that can be hashed."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


ELSEWHERE = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache")
"""Fields of configurations that change nothing, or that are hashed with the weights."""
OF_TRAINING = ("dropout", "drop_path", "initializer", "gradient_checkpointing", "label")


def tower_settings(tower: PreTrainedModel) -> dict[str, Any]:
    """
    The settings of a tower that change its outputs, such as the epsilon of layer norms, but not training settings.
    """
    settings = json.loads(tower.config.to_json_string(use_diff=True))
    return {
        name: settings[name]
        for name in sorted(settings)
        if name not in ELSEWHERE and not any(part in name for part in OF_TRAINING)
    }


def adapter_settings(model: nn.Module) -> list[Any]:
    """The adapters of a model, or of a part of it, that are in use, with their scales."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            active = [adapter for adapter in module.active_adapters if adapter in module.scaling]
            used = {adapter: module.scaling[adapter] for adapter in active}
            found.append([name, module.disable_adapters, module.merged, used])
    return found


def hash_weight(digest: Any, value: Any) -> None:
    """Add one value of a state dictionary to a hash; quantised layers have tuples of tensors there."""
    if isinstance(value, tuple):
        for part in value:
            hash_weight(digest, part)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        value = value.dequantize() if value.is_quantized else value
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
