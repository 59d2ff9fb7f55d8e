"""Towers: any encoder of `transformers`, its blocks, and running it from or up to one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .configuration_transrec import check_sizes


logger = logging.get_logger(__name__)


def without_dormant_parts(config: Any) -> dict[str, bool]:
    """
    Leave out what nothing here reads and so would never get a gradient: the mask token, in the configuration, and a
    learned pooler, by the keyword that is returned where the class of the model has one.
    """
    if getattr(config, "use_mask_token", False):
        config.use_mask_token = False
    accepts = "add_pooling_layer" in inspect.signature(AutoModel._model_mapping[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if accepts else {}


def build_tower(config: Any) -> PreTrainedModel:
    """A tower with fresh weights for any configuration that [`AutoModel`] knows."""
    if not AutoModel._model_mapping[type(config)]._supports_sdpa:
        # a convolutional tower refuses an attention implementation that was chosen for the whole model
        config._attn_implementation = "eager"
    return AutoModel.from_config(config, **without_dormant_parts(config))


def load_tower(name_or_path: str, part: str, **kwargs: Any) -> PreTrainedModel:
    """A pre-trained tower; of a two-tower checkpoint such as CLIP its `part`: `"text_config"` or `"vision_config"`."""
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}  # neither code nor pickles of others
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    config = getattr(config, part, None) or config
    check_sizes(config, part)
    if "/" in str(config._attn_implementation):
        raise ValueError(f"{name_or_path} names the code of {config._attn_implementation}, which is not run")
    kwargs |= without_dormant_parts(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of the heads that a tower leaves behind
    try:
        tower, found = AutoModel.from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    fresh = sorted(found["missing_keys"])
    if fresh:
        logger.warning(f"{name_or_path}: {len(fresh)} weights are not in it and start at random, such as {fresh[0]}.")
    return tower


def tower_width(tower: PreTrainedModel) -> int:
    """Number of channels at the output of a tower; convolutional configurations do not always name it."""
    config = tower.config
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    return [module for module in tower.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def tower_blocks(tower: nn.Module) -> nn.ModuleList:
    """The outermost list of blocks of a tower: Transformer layers, ResNet stages, MobileNet convolutions."""
    level = [tower]
    while level:
        for module in level:
            if isinstance(module, nn.ModuleList):
                return module
        level = [child for module in level for child in module.children()]
    raise ValueError(f"{type(tower).__name__} has no list of blocks, so its top blocks cannot be told from the rest")


def frozen_depth(tower: nn.Module) -> int:
    """How many of the lower blocks of a tower are frozen, together with everything before them."""
    blocks = tower_blocks(tower)
    block_of = {parameter: depth for depth, block in enumerate(blocks) for parameter in block.parameters()}
    in_blocks = False
    for parameter in tower.parameters():  # in order of registration, which is that of execution
        in_blocks = in_blocks or parameter in block_of
        if parameter.requires_grad:
            return block_of.get(parameter, len(blocks) if in_blocks else 0)
    return len(blocks)


class _Reached(Exception):
    """Carries the states out of a tower that need not run further."""


def lower_states(tower: PreTrainedModel, depth: int, run: Callable[[], Any]) -> Tensor:
    """States after the first `depth` blocks of a tower when `run()` runs it; what lies above them does not run."""

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output)

    hook = tower_blocks(tower)[depth - 1].register_forward_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise RuntimeError(f"{type(tower).__name__} did not run its block {depth - 1}")


@contextmanager
def resumed_from(tower: PreTrainedModel, depth: int, states: Tensor) -> Iterator[None]:
    """Inside, the first `depth` blocks of a tower do nothing but hand `states` on to the next one."""
    lower = tower_blocks(tower)[:depth]
    compiled = [block._compiled_call_impl for block in lower]
    for block in lower:
        block.forward, block._compiled_call_impl = lambda *args, **kwargs: states, None
    try:
        yield
    finally:
        for block, call in zip(lower, compiled, strict=True):
            del block.forward
            block._compiled_call_impl = call


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has no trainable parameter."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def training_batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms inside that are in training mode: their output depends on the batch, and they count it."""
    norms = (part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.training]


@contextmanager
def keep_running_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode do not update their running statistics: a second pass must not count."""
    norms = training_batch_norms(module)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def evaluate_frozen(module: nn.Module) -> None:
    """Put every sub-module without a trainable parameter in evaluation mode: no dropout, no batch-norm updates."""
    if is_frozen(module) and next(module.parameters(), None) is not None:
        module.eval()
        return
    for child in module.children():
        evaluate_frozen(child)


def mend_convolutions(tower: nn.Module) -> None:
    """Give adapted convolutions what MobileNets read of them to pad as TensorFlow does, and PEFT leaves out."""
    for module in tower.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Conv2d) and not hasattr(module, "stride"):
            for name in ("stride", "kernel_size", "dilation", "padding"):
                setattr(module, name, getattr(base, name))


__all__ = [
    "build_tower",
    "frozen_depth",
    "load_tower",
    "lower_states",
    "resumed_from",
    "tower_blocks",
    "tower_width",
]
