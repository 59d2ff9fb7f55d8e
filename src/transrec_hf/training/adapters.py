"""PEFT adapters in training: which one is trained, which ones can be saved and loaded again, and their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..model.modalities_transrec import MODALITIES
from ..publishing.facts import named_source


def has_adapter(model: nn.Module) -> bool:
    """Whether a PEFT adapter was added to the model, by `get_peft_model` or by `add_adapter`."""
    return bool(getattr(model, "peft_config", None))


def base_of(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper of `get_peft_model`."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that is trained. Raises `ValueError` if it is not exactly one."""
    active: Any = model.active_adapters
    names = list(active() if callable(active) else active)  # a method of transformers, a property of PEFT
    if len(names) != 1:
        raise ValueError(
            f"only one adapter can be trained at a time, but {names} are active: choose one with set_adapter(...)"
        )
    return names[0]


def merge_adapter(model: Any) -> None:
    """
    Write the adapter of `add_adapter`, if a model has one, into its weights, which changes the model in place. It then
    computes the same, and is a model without adapters.

    PEFT itself cannot do that if modules without a weight of their own were trained whole.
    """
    if not has_adapter(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    adapter = active_adapter(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[adapter])
    model.peft_config, model._hf_peft_config_loaded = {}, False
    vars(model).pop("_weight_conversions", None)  # the names of an adapter file, which the model would be saved with
    model.requires_grad_(True)


def check_adapters(model: nn.Module, saves: bool, pushes: bool = False) -> None:
    """
    Refuse adapters that could not be loaded again.

    Args:
        model (`nn.Module`): A model with or without adapters.
        saves (`bool`): Whether checkpoints will be written.
        pushes (`bool`, *optional*, defaults to `False`): Whether they will be pushed.

    Raises:
        `ValueError`: If several adapters are active, the base model was never saved, or is a folder and the adapter
            would be pushed, or an adapter was added to a part of the model only.
    """
    if has_adapter(model):
        active_adapter(model)
        if saves:
            check_base(model)
        base: Any = base_of(model)
        if pushes and not named_source(base.config._name_or_path)["on_hub"]:
            raise ValueError(
                "the adapter would be pushed without the model under it, which is the folder "
                f"{base.config._name_or_path}: push that folder first, and start from its name on the Hub"
            )
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
    """Raises `ValueError` for an adapter whose base was never saved, since the adapter alone would be useless."""
    if not getattr(base_of(model).config, "_name_or_path", ""):
        raise ValueError(
            "the model under the adapter was never saved, and an adapter is saved without it: save the model with "
            "save_pretrained, load it with from_pretrained, and add the adapter to the loaded model, as `transrec "
            "finetune` does"
        )


def load_adapter_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Load the weights of an adapter that the model already has. Raises `ValueError` if the file is of another adapter.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(os.fspath(folder), device="cpu")
    if base_of(model) is model:  # an adapter of `add_adapter`, which does not change the names of modules
        weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    name = active_adapter(model)
    try:
        found = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: holds an adapter of another shape. Add an adapter with the configuration of this folder."
        ) from error
    missing = [key for key in found.missing_keys if f".{name}." in f"{key}."]
    if wrong := found.unexpected_keys + missing:
        raise ValueError(
            f"{folder}: holds another adapter, which differs in {wrong[0]}. Add an adapter with its configuration."
        )


def lift_adapter(model: nn.Module, folder: Path) -> None:
    """Move the files of the trained adapter to the folder itself, where PEFT puts only an adapter named `default`."""
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
