"""Models that FSDP has sharded: which settings can train them, and how all their weights are had again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule


def check_sharding(plugin: Any) -> None:
    """
    Raises `ValueError` for settings of FSDP under which the model cannot be trained. The blocks of a tower cannot be
    units of their own: in a step one process may read three buckets of texts and another two, or no image at all, and
    then they would wait for each other's weights. The model as a whole is one unit.
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
        raise ValueError(f"FSDP needs {', '.join(wrong)}: take examples/accelerate_configs/fsdp2.yaml")


@contextmanager
def one_unit(model: Any) -> Iterator[None]:
    """
    Inside, accelerate shards a model as one unit. It would make the input embeddings a unit of their own whatever the
    wrapping policy is, and processes that read a different number of buckets of texts would wait for each other.
    """
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, each process has all weights of a model that FSDP has sharded, and may run any part of it any time."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def load_whole_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """As `load_state_dict`; of a model that FSDP has sharded each process keeps its part."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Inside, a model that FSDP has sharded is of its own class again, whose code goes with its weights."""
    sharded = type(model)
    if issubclass(sharded, FSDPModule):
        model.__class__ = sharded.__mro__[2]
    try:
        yield
    finally:
        model.__class__ = sharded


def copy_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights on the host, which no training changes."""
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
