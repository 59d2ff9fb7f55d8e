"""PEFT adapters in training: which one is trained, what it must be to be found again, and its file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..model.modalities_transrec import MODALITIES


def has_adapter(model: nn.Module) -> bool:
    """Whether a PEFT adapter was added to the model, by `get_peft_model` or by `add_adapter`."""
    return bool(getattr(model, "peft_config", None))


def base_of(model: nn.Module) -> nn.Module:
    """The model itself, without what `get_peft_model` wraps it in."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that is trained. Raises `ValueError` if it is not exactly one."""
    active: Any = model.active_adapters
    names = list(active() if callable(active) else active)  # a method of transformers, a property of PEFT
    if len(names) != 1:
        raise ValueError(f"one adapter is trained at a time, and {names} are active: set_adapter(...) to one of them")
    return names[0]


def check_adapters(model: nn.Module, saves: bool) -> None:
    """
    Refuse adapters that could not be loaded again.

    Args:
        model (`nn.Module`): With adapters or without.
        saves (`bool`): Checkpoints are to be written.

    Raises:
        `ValueError`: If several are active, the base was never saved, or one was added to a part of the model.
    """
    if has_adapter(model):
        active_adapter(model)
        if saves:
            check_base(model)
        return
    towers = (modality.tower for modality in MODALITIES.values() if modality.tower)
    for tower in towers:
        part = getattr(getattr(model, "item_encoder", None), tower, None)
        if part is not None and has_adapter(part):
            raise ValueError(
                f"an adapter of {tower} alone would not be found in a checkpoint: add it to the whole model, with "
                f"target_modules that name its layers, such as r'.*{tower}.*query'"
            )


def check_base(model: nn.Module) -> None:
    """Raises `ValueError` for an adapter whose base was never saved: the adapter alone would be worth nothing."""
    if not getattr(base_of(model).config, "_name_or_path", ""):
        raise ValueError(
            "the model under the adapter was never saved, and an adapter is saved alone: save the model with "
            "save_pretrained, load it with from_pretrained, and add the adapter to that one, as `transrec finetune` "
            "does"
        )


def load_adapter_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load the weights of an adapter that the model has already. Raises `ValueError` if they are those of another."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(os.fspath(folder), device="cpu")
    if base_of(model) is model:  # `add_adapter`, which leaves the names of the modules as they were
        weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    name = active_adapter(model)
    try:
        found = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: holds an adapter of another shape. Add one with the configuration there."
        ) from error
    missing = [key for key in found.missing_keys if f".{name}." in f"{key}."]
    if wrong := found.unexpected_keys + missing:
        raise ValueError(f"{folder}: holds another adapter, which differs in {wrong[0]}. Add one like it.")


def lift_adapter(model: nn.Module, folder: Path) -> None:
    """Put the files of the trained adapter into the folder itself, where PEFT writes those named `default` only."""
    if not has_adapter(model) or base_of(model) is model:
        return
    adapters: Any = model.peft_config
    for name in adapters:
        inner = folder / name
        if name != "default" and inner.is_dir():
            if name == active_adapter(model):
                for file in inner.iterdir():
                    file.replace(folder / file.name)
            shutil.rmtree(inner)
