"""Towers: any encoder of `transformers`, its blocks, and running it up to a block or from a block on."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .configuration_transrec import check_foreign, check_sizes


logger = logging.get_logger(__name__)

RECORDING = threading.RLock()  # for the blocks of all towers

WHOLES = {"clap_audio_model": "audio_model", "whisper": "encoder"}
"""For types of configurations, the name of the tower within the model that [`AutoModel`] loads."""


def tower_class(config: Any) -> type[PreTrainedModel]:
    """
    The class of the tower for a configuration.

    Raises:
        `ValueError`: If [`AutoModel`] has no class for it, or the class is not an encoder.
    """
    kind = type(config).__name__
    if config.model_type in WHOLES:
        # a part of what AutoModel loads, which also has a decoder or a text tower
        from transformers import ClapAudioModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return {"clap_audio_model": ClapAudioModel, "whisper": WhisperEncoder}[config.model_type]
    if type(config) not in AutoModel._model_mapping:
        raise ValueError(f"AutoModel knows no model for {kind}: use an encoder that it can load")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has a decoder too, which needs more input than an item: use a plain encoder")
    found = AutoModel._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found  # Funnel also has a class with a decoder


def without_dormant_parts(config: Any) -> dict[str, bool]:
    """
    Switch off parts that are never used and so would never get a gradient: the mask token and the random masking and
    skipping of sound encoders (which would also fail for short sounds and in several processes), and the part of CLAP
    for sounds longer than a window. These are fields of the configuration, which is changed. A learned pooler is
    switched off by the keyword that is returned, if the class has one.
    """
    if getattr(config, "enable_fusion", False):
        config.enable_fusion = False
    for name in ("mask_time_prob", "mask_feature_prob", "layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    if getattr(config, "use_mask_token", False):
        config.use_mask_token = False
    accepts = "add_pooling_layer" in inspect.signature(tower_class(config).__init__).parameters
    return {"add_pooling_layer": False} if accepts else {}


def build_tower(config: Any) -> PreTrainedModel:
    """A tower with new weights for any configuration that [`AutoModel`] knows."""
    if not tower_class(config)._supports_sdpa:
        # a convolutional tower refuses the attention implementation of the whole model
        config._attn_implementation = "eager"
    if config.model_type in WHOLES:
        return tower_class(config)._from_config(config, **without_dormant_parts(config))
    return AutoModel.from_config(config, **without_dormant_parts(config))


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """A context in which a module is in evaluation mode; afterwards each of its parts has its old mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def check_tower(tower: PreTrainedModel, name: str, is_text: bool, depths: list[int]) -> None:
    """
    Raises `ValueError` for a tower that does not turn single texts, images or sounds into states, or has no states
    after one of the given depths. The tower is tried with two equal contents, unless it has no weights yet.
    """
    if tower.device.type == "meta":
        return
    mask = torch.ones(2, 4, dtype=torch.long, device=tower.device) if is_text else None
    try:
        with in_evaluation(tower):
            contents = placeholder(tower, mask)
            if not is_text:
                contents = contents + torch.linspace(-1, 1, contents.shape[-1]).to(contents)
                contents = torch.cat([contents, contents])
            if name == "image" and contents.dim() != 4:
                raise ValueError("it reads videos")
            with recorded(tower, depths) as below:
                output = run_tower(tower, contents, mask)
            states = output.last_hidden_state if is_text else pooled_state(output)
            below = below if is_text else {depth: pooled_depth(found) for depth, found in below.items()}
            for found in (states, *(below[depth] for depth in depths if is_text)):
                if found.shape != ((2, 4, tower_width(tower)) if is_text else (2, tower_width(tower))):
                    raise ValueError(f"they have the shape {tuple(found.shape)}, and the width {tower_width(tower)}")
            if (states[0] - states[1]).abs().max() > 1e-3 * states.abs().max():
                raise ValueError("they differ for equal contents")
    except Exception as error:
        what = "4 tokens" if is_text else {"audio": "a sound", "video": "frames"}.get(name, "an image")
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        other = "another encoder, or text_depths=1" if depths else "another encoder"
        raise ValueError(
            f"{type(tower).__name__} cannot be the {name} tower, which must turn {what} into states ({reason}): use "
            f"{other}"
        ) from error


def load_tower(name_or_path: str, part: str, **kwargs: Any) -> PreTrainedModel:
    """A pre-trained tower; from a checkpoint with two towers, such as CLIP, its `part` (`"text_config"`, ...)."""
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}  # run no code, and read no pickles
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    whole, config = config, getattr(config, part, None) or config
    is_part = config.model_type in WHOLES and (whole is not config or whole.is_encoder_decoder)
    cls = AutoModel if is_part or config.model_type not in WHOLES else tower_class(config)
    tower_class(config)
    check_sizes(config, part)
    check_foreign(whole)
    kwargs |= without_dormant_parts(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of unused heads
    try:
        read = whole if is_part else config
        tower, found = cls.from_pretrained(name_or_path, config=read, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    if is_part:
        tower = getattr(tower, WHOLES[config.model_type])
        tower.config._name_or_path, tower.config._commit_hash = name_or_path, getattr(whole, "_commit_hash", None)
    fresh = sorted(found["missing_keys"])
    if fresh:
        logger.warning(f"{name_or_path}: {len(fresh)} weights are missing and start at random, such as {fresh[0]}.")
    return tower


def tower_width(tower: PreTrainedModel) -> int:
    """Width of the output of a tower; convolutional configurations do not always name it."""
    config = tower.config
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    convolutions = [module for module in tower.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"{type(config).__name__} does not name the width of its output: use another encoder")
    return convolutions[-1].out_channels


def text_positions(tower: nn.Module) -> int | None:
    """The number of tokens for which a text tower has positions; `None` if its positions are relative."""
    for name, module in tower.named_modules():
        if name.endswith(("position_embeddings", "position_embedding")) and isinstance(module, nn.Embedding):
            before = module.padding_idx  # RoBERTa's family counts positions from the one after it
            return module.num_embeddings - (0 if before is None else before + 1)
    return None


def tower_blocks(tower: nn.Module) -> nn.ModuleList:
    """The outermost list of blocks of a tower: Transformer layers, ResNet stages, MobileNet convolutions."""
    level: list[nn.Module] = [tower]
    while level:
        for module in level:
            if isinstance(module, nn.ModuleList):
                return module
        # the part that makes frames of samples has its own list of convolutions
        level = [child for module in level for name, child in module.named_children() if name != "feature_extractor"]
    raise ValueError(
        f"{type(tower).__name__} has no list of blocks, so its top blocks cannot be found: use another encoder"
    )


def compile_each(blocks: Iterable[nn.Module], **kwargs: Any) -> None:
    """Compile modules one by one, for any shape, in place; `kwargs` are arguments of `torch.compile`."""
    # by default a function may be compiled 8 times, but all layers of transformers share one entry, and the 27 kinds
    # of layers of MobileNet are each compiled with and without gradients and autocast
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 1024)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4096)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True, **kwargs)


def frozen_depth(tower: nn.Module) -> int:
    """The number of lower blocks of a tower that are frozen together with everything before them."""
    blocks = tower_blocks(tower)
    block_of = {parameter: depth for depth, block in enumerate(blocks) for parameter in block.parameters()}
    in_blocks = False
    for parameter in tower.parameters():  # in order of registration, which is that of execution
        in_blocks = in_blocks or parameter in block_of
        if parameter.requires_grad:
            return block_of.get(parameter, len(blocks) if in_blocks else 0)
    return len(blocks)


def run_tower(tower: PreTrainedModel, values: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Run a tower on contents `(n, ...)`. With a mask, the output has token states."""
    if mask is not None:
        return tower(**{tower.main_input_name: values, "attention_mask": mask}, **kwargs)
    if getattr(tower.config, "tf_padding", False):
        mend_convolutions(tower)
    layout = torch.channels_last if values.dim() == 4 else torch.preserve_format
    return tower(**{tower.main_input_name: values.to(tower.dtype, memory_format=layout)}, **kwargs)


def pooled_state(output: Any) -> Tensor:
    """Turn the output of a tower into one state per content, `(n, width)`, with the tower's own pooling."""
    states = output.last_hidden_state
    pooled = output.get("pooler_output")
    if pooled is None:
        pooled = states[:, 0] if states.dim() == 3 else states.mean(dim=(2, 3))
    return pooled.flatten(1)


def pooled_depth(states: Tensor) -> Tensor:
    """The mean `(n, width)` of states of images after some block, which are those of patches or a map of channels."""
    return states.flatten(2).mean(dim=-1) if states.dim() == 4 else states.mean(dim=1)


@torch.no_grad()
def depth_widths(tower: PreTrainedModel, depths: list[int]) -> list[int]:
    """The widths of the states of a tower after these numbers of blocks."""
    mask = torch.ones(1, 4, dtype=torch.long, device=tower.device) if tower.main_input_name == "input_ids" else None
    with in_evaluation(tower), recorded(tower, depths) as found:
        run_tower(tower, placeholder(tower, mask), mask)
    return [pooled_depth(found[depth]).shape[-1] for depth in depths]


def lower_depths(tower: PreTrainedModel, number: int) -> list[int]:
    """
    The numbers of blocks after which the states of a tower are read besides the last ones, for `number` depths in
    total (or as many as the tower has): 0 for the word embeddings, and further ones evenly spaced.
    """
    last = len(tower_blocks(tower)) if number > 1 else 0
    return sorted({round(last * i / (number - 1)) for i in range(number - 1)} - {last})


@contextmanager
def recorded(tower: PreTrainedModel, depths: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """
    A context that records the states of a tower after these numbers of blocks; 0 means the input of the first block.
    The tower must run once inside. Only one thread at a time, since all threads share the blocks.
    """
    if not depths:
        yield {}
        return
    states: dict[int, Tensor] = {}
    blocks = tower_blocks(tower)

    def recording(block: nn.Module, depth: int) -> Callable[..., Any]:
        call = block._compiled_call_impl or block._call_impl

        def call_and_record(*args: Any, **kwargs: Any) -> Any:
            states.setdefault(depth, args[0] if args else kwargs["hidden_states"])
            output = call(*args, **kwargs)
            states.setdefault(depth + 1, output if isinstance(output, Tensor) else output[0])
            return output

        return call_and_record

    with RECORDING:
        calls = {block: block._compiled_call_impl for block in blocks}
        # replaces the compiled call, which hooks would not reach
        for depth in {max(0, depth - 1) for depth in depths}:
            blocks[depth]._compiled_call_impl = recording(blocks[depth], depth)
        try:
            yield states
        finally:
            for block, call in calls.items():
                block._compiled_call_impl = call


def reads_clips(tower: PreTrainedModel) -> bool:
    """Whether a tower reads the frames of a video together, `(n, frames, channels, height, width)`."""
    return hasattr(tower.config, "num_frames")


def placeholder(tower: PreTrainedModel, mask: Tensor | None) -> Tensor:
    """
    Contents without meaning for the layers below the blocks of a tower that resumes: tokens under a mask, or a single
    image or sound, since these layers do not depend on the number of contents.
    """
    if mask is not None:
        return torch.zeros_like(mask)
    config = tower.config
    shape: tuple[int, ...] = ()
    if hasattr(config, "conv_stride"):
        shape = (8 * math.prod(config.conv_stride),)
    elif hasattr(config, "max_source_positions"):
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
    elif hasattr(config, "spec_size"):
        shape = (1, config.spec_size**2 // config.num_mel_bins, config.num_mel_bins)
    elif hasattr(config, "num_mel_bins"):
        shape = (config.max_length, config.num_mel_bins)
    if shape:
        return torch.zeros(1, *shape, dtype=tower.dtype, device=tower.device)
    size = getattr(config, "image_size", 64)
    sides = size if isinstance(size, list | tuple) else (size, size)
    if reads_clips(tower):
        sides = (config.num_frames, config.num_channels, *sides)
        return torch.zeros(1, *sides, dtype=tower.dtype, device=tower.device)
    return torch.zeros(1, getattr(config, "num_channels", 3), *sides, dtype=tower.dtype, device=tower.device)


class NotRun(RuntimeError):
    """A tower does not run its blocks one by one."""


class _Reached(Exception):
    """Carries the output of a block out of a tower that need not run further."""


def lower_output(tower: PreTrainedModel, depth: int, values: Tensor, mask: Tensor | None = None) -> Any:
    """
    The output of the first `depth` blocks of a tower: the states of contents or, in some families, a tuple that begins
    with them. The layers above do not run.
    """

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    hook = tower_blocks(tower)[depth - 1].register_forward_hook(stop)
    try:
        run_tower(tower, values, mask)
    except _Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise NotRun(f"{type(tower).__name__} did not run its block {depth - 1}")


def lower_states(tower: PreTrainedModel, depth: int, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The states of contents `(n, ...)` after the first `depth` blocks of a tower."""
    output = lower_output(tower, depth, values, mask)
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def with_states(output: Any, states: Tensor) -> Any:
    """The output of a block with other states, and without further tensors, which belong to the old contents."""
    if isinstance(output, Tensor):
        return states
    return (with_states(output[0], states), *(None if isinstance(part, Tensor) else part for part in output[1:]))


def resume_tower(tower: PreTrainedModel, depth: int, states: Tensor, mask: Tensor | None = None) -> Any:
    """The output of a tower for contents whose states after its first `depth` blocks are known, `(n, ...)`."""
    contents = placeholder(tower, mask)
    known = vars(tower).setdefault("_handed_on", {})
    if depth not in known:  # whether blocks return states alone, or in a tuple with further values, such as sizes
        with torch.no_grad():
            output = lower_output(tower, depth, contents[:1], None if mask is None else mask[:1])
        known[depth] = with_states(output, torch.empty(0))
    with resumed_from(tower, depth, with_states(known[depth], states)):
        return run_tower(tower, contents, mask)


@contextmanager
def resumed_from(tower: PreTrainedModel, depth: int, output: Any) -> Iterator[None]:
    """A context in which the first `depth` blocks of a tower only pass `output` to the next one."""
    lower = tower_blocks(tower)[:depth]
    compiled = [block._compiled_call_impl for block in lower]
    for block in lower:
        block.forward, block._compiled_call_impl = lambda *args, **kwargs: output, None
    try:
        yield
    finally:
        for block, call in zip(lower, compiled, strict=True):
            del block.forward
            block._compiled_call_impl = call


def freeze_below(tower: PreTrainedModel, trainable_blocks: int | None) -> None:
    """
    Train only the top blocks of a tower and everything after them; the whole tower if `trainable_blocks` is `None`.
    Weights after the blocks that frozen blocks read too, such as a table of relative positions, are frozen.
    """
    tower.requires_grad_(trainable_blocks is None)
    if not trainable_blocks:
        return
    blocks = tower_blocks(tower)
    depth = max(0, len(blocks) - trainable_blocks)
    first = next(blocks[depth].parameters())
    reached = False
    for parameter in tower.parameters():  # in order of registration, which is that of execution but for what follows
        reached = reached or parameter is first
        parameter.requires_grad_(reached)
    in_blocks = set(blocks.parameters())
    after = [parameter for parameter in tower.parameters() if parameter.requires_grad and parameter not in in_blocks]
    if depth and after and tower.device.type != "meta":
        with suppress(NotRun):
            for parameter in read_below(tower, depth, after):
                parameter.requires_grad_(False)


def read_below(tower: PreTrainedModel, depth: int, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that influence the states after the first `depth` blocks."""
    trained = {parameter: parameter.requires_grad for parameter in tower.parameters()}
    mask = torch.ones(1, 4, dtype=torch.long, device=tower.device) if tower.main_input_name == "input_ids" else None

    def have_part(some: list[nn.Parameter]) -> bool:
        for parameter in trained:
            parameter.requires_grad_(any(parameter is one for one in some))
        with torch.enable_grad():
            return lower_states(tower, depth, placeholder(tower, mask), mask).requires_grad

    try:
        with in_evaluation(tower):
            return [one for one in parameters if have_part([one])] if have_part(parameters) else []
    finally:
        for parameter, was_trained in trained.items():
            parameter.requires_grad_(was_trained)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has no trainable parameter."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def evaluate_frozen(item_encoder: nn.Module) -> None:
    """
    Put the frozen modules of an item encoder into evaluation mode, without dropout. This includes modules without
    parameters below the first trained one, such as the rotation of positions in DINOv3, which is random in training
    mode; and all batch norms: with the averages of their batch, towers would be others than in evaluation, and than
    those whose outputs were whitened.
    """
    for part in item_encoder.children():
        _evaluate_frozen(part)
    for module in item_encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _evaluate_frozen(module: nn.Module, below: bool | None = None) -> bool | None:
    """
    Like [`evaluate_frozen`], for one module. `below` says whether all modules before it are frozen, `None` if there
    are none; the result says the same for the modules that follow.
    """
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if not any(trained):
        if trained or below:
            module.eval()
        return True if trained and below is None else below
    if all(trained):
        return False
    if own := list(module.parameters(recurse=False)):
        below = below is not False and not any(parameter.requires_grad for parameter in own)
    for child in module.children():
        below = _evaluate_frozen(child, below)
    return False


def mend_convolutions(tower: nn.Module) -> None:
    """
    Give adapted convolutions the attributes that MobileNets need to pad as in TensorFlow, and that PEFT leaves out.
    """
    for module in tower.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Conv2d) and not hasattr(module, "stride"):
            for name in ("stride", "kernel_size", "dilation", "padding"):
                setattr(module, name, getattr(base, name))


__all__ = ["build_tower", "freeze_below", "frozen_depth", "load_tower", "resume_tower", "tower_blocks", "tower_width"]
