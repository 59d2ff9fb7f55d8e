"""Models that FSDP has sharded: the settings that can train them, and collecting all their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule


def check_sharding(plugin: Any) -> None:
    """
    Raises `ValueError` for FSDP settings with which the model cannot be trained. The whole model must be one unit. If
    the blocks of a tower were units, processes would wait for each other's weights, because in one step they may read
    different numbers of text batches, or no image at all.
    """
    state_dict_type = getattr(plugin.state_dict_type, "name", plugin.state_dict_type)
    found = {
        "version": (plugin.fsdp_version, 2),
        "auto_wrap_policy": ("NO_WRAP" if plugin.auto_wrap_policy is None else plugin.auto_wrap_policy, "NO_WRAP"),
        "state_dict_type": (state_dict_type, "FULL_STATE_DICT"),
        "cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
    }
    wrong = [f"{name} {needed} (not {value})" for name, (value, needed) in found.items() if value != needed]
    if wrong:
        raise ValueError(f"FSDP needs {', '.join(wrong)}: use examples/accelerate_configs/fsdp2.yaml")


@contextmanager
def one_unit(model: Any) -> Iterator[None]:
    """
    A context in which accelerate shards a model as one unit. Otherwise it makes the input embeddings a separate unit,
    whatever the wrapping policy is, and processes with different numbers of text batches wait for each other.
    """
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """A context in which each process has all weights of a sharded model, and can run any part of it at any time."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def load_whole_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Like `load_state_dict`; for a sharded model, each process keeps its part."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """A context in which a sharded model has its original class again, so that its code is saved with its weights."""
    sharded = type(model)
    if issubclass(sharded, FSDPModule):
        model.__class__ = sharded.__mro__[2]
    try:
        yield
    finally:
        model.__class__ = sharded


def copy_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of weights on the host, which training does not change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
