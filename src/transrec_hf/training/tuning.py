"""Tuning modes: which weights a run trains, what that costs, and which of its checkpoints are thin."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..model.modeling_transrec import TransRecModel
from ..model.towers_transrec import tower_blocks
from ..model.tuning_transrec import as_expression, names_as_patterns
from ..publishing.results import describe_device


logger = logging.get_logger(__name__)

PEFT_TUNINGS = ("lora", "dora", "ia3", "ln_tuning")
TUNINGS = ("full", "top_k_blocks", "frozen", *PEFT_TUNINGS, "bottleneck", "side", "codes")
SIZES = {"lora": 8, "dora": 8, "bottleneck": 32, "side": 64}
"""The default rank or width of adapters."""
PAPER_BLOCKS = 2
FROZEN = ("frozen", "side")
"""Modes that train no weights of the towers."""


def resolve_tuning(tuning: str | None, trainable_blocks: int | None, size: int | None) -> int | None:
    """
    The value of `trainable_blocks` for a tuning mode.

    Raises:
        `ValueError`: If the options contradict each other.
    """
    if tuning is not None and tuning not in TUNINGS:
        raise ValueError(f"tuning must be one of {TUNINGS}, got {tuning!r}")
    if size is not None and tuning not in SIZES:
        raise ValueError(f"adapter_size is only for tuning {', '.join(SIZES)}: leave it out")
    if tuning == "top_k_blocks":
        if trainable_blocks == 0:
            raise ValueError(
                "tuning='top_k_blocks' trains at least one block: set trainable_blocks, or tuning='frozen'"
            )
        return PAPER_BLOCKS if trainable_blocks is None else trainable_blocks
    if tuning is not None and trainable_blocks is not None and (tuning not in FROZEN or trainable_blocks):
        raise ValueError(
            f"trainable_blocks={trainable_blocks} means tuning='top_k_blocks', and tuning is {tuning!r}: leave one out"
        )
    return 0 if tuning in FROZEN else trainable_blocks


def is_target(module: nn.Module, tuning: str, pads_as_tensorflow: bool) -> bool:
    """Whether this kind of adapter is added to a module of a block."""
    if tuning == "ln_tuning":
        return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    if isinstance(module, nn.Conv2d):  # not depthwise ones, since no rank divides their groups
        return module.groups == 1 and (not pads_as_tensorflow or module.kernel_size == (1, 1))
    return isinstance(module, nn.Linear)


def target_modules(model: TransRecModel, tuning: str) -> str:
    """
    A regular expression for the modules that get adapters: the linear layers, the ordinary and pointwise convolutions,
    or the layer norms in the blocks of all towers and in the user encoder.

    Raises:
        `ValueError`: If there are no such modules.
    """
    wanted = []
    names = {module: name for name, module in model.named_modules()}
    for tower in model.item_encoder.towers.values():
        pads = bool(getattr(tower.config, "tf_padding", False))
        wanted += [names[module] for module in tower_blocks(tower).modules() if is_target(module, tuning, pads)]
    wanted += [names[module] for module in model.user_encoder.modules() if is_target(module, tuning, False)]
    if not wanted:
        raise ValueError(f"tuning={tuning!r} finds no layer to adapt in this model: use another tuning")
    return as_expression(names_as_patterns(wanted, set(names.values()) - set(wanted)))


def trained_whole(model: TransRecModel) -> list[str]:
    """Modules that are trained as a whole beside adapters: projections, pooling, side networks, ID vectors, scales."""
    encoder = model.item_encoder
    modules = [encoder.projection(name) for name in model.config.modalities]
    for owner, name in (
        *((encoder, f"{name}_{part}") for name in model.config.modalities for part in ("pooling", "side")),
        *((encoder, name) for name in ("item_embedding", "modality_scale")),
        *((model, name) for name in ("content_prior", "logit_scale", "popularity_weight")),
    ):
        modules += [getattr(owner, name)] if hasattr(owner, name) else []
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules]


def adapter_config(model: TransRecModel, tuning: str, size: int | None = None) -> Any:
    """
    The configuration of a PEFT adapter on towers and user encoder. Its modules are found by the structure of the
    model.

    Args:
        model ([`TransRecModel`]): The model.
        tuning (`str`): One of `PEFT_TUNINGS`.
        size (`int`, *optional*): The rank of `"lora"` and `"dora"`; 8 if not given.

    Raises:
        `ImportError`: If PEFT is not installed.
    """
    try:
        from peft import IA3Config, LNTuningConfig, LoraConfig
    except ImportError as error:
        raise ImportError(f"tuning={tuning!r} needs PEFT: pip install 'transrec-hf[peft]'") from error
    common: dict[str, Any] = {
        "target_modules": target_modules(model, tuning),
        "modules_to_save": trained_whole(model) or None,
    }
    if tuning == "ia3":
        return IA3Config(feedforward_modules=[], **common)
    if tuning == "ln_tuning":
        return LNTuningConfig(**common)
    rank = SIZES[tuning] if size is None else size
    return LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=tuning == "dora", **common)


def check_base_items(model: TransRecModel, tuning: str) -> None:
    """Raises `ValueError` if the ID vectors of a model are not those of the checkpoint that it was loaded from."""
    base = model.config._name_or_path
    if not base:
        return
    commit = getattr(model.config, "_commit_hash", None)
    num_items = type(model.config).from_pretrained(base, revision=commit or "main").num_items
    if num_items != model.config.num_items:
        raise ValueError(
            f"an adapter of tuning={tuning!r} is saved without its base {base}, which has ID vectors of "
            f"{num_items or 'no'} items, not of the {model.config.num_items or 0} items here: use tuning='bottleneck'"
        )


def tune(model: Any, args: Any) -> None:
    """
    Freeze and adapt a model as `args.tuning` and `args.trainable_blocks` say. An adapter that an earlier run has added
    stays.

    Args:
        model ([`TransRecModel`]): The model; changed in place.
        args ([`TransRecTrainingArguments`]): The arguments.

    Raises:
        `ValueError`: If the model already has an adapter, which decides itself what is trained.
    """
    if args.tuning is not None and getattr(model, "tuned_by", None) == args.tuning:
        return
    if getattr(model, "peft_config", None):
        if args.trainable_blocks is not None or args.tuning is not None:
            name = "trainable_blocks" if args.tuning is None else "tuning"
            raise ValueError(f"the model has an adapter, which decides what is trained: leave out {name}")
        return
    if args.tuning in PEFT_TUNINGS:
        check_base_items(model, args.tuning)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # PEFT means layer norms
                model.add_adapter(adapter_config(model, args.tuning, args.adapter_size))
        model.tuned_by = args.tuning
    elif args.tuning in ("bottleneck", "side"):
        size = SIZES[args.tuning] if args.adapter_size is None else args.adapter_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            if args.tuning == "side":
                model.add_side(size)
            else:
                model.add_bottlenecks(size, args.bottleneck_places, args.bottleneck_parallel)
    elif args.tuning == "codes":
        if "codes" not in model.config.modalities:
            raise ValueError("tuning='codes' trains the code table, but this model reads no codes: use another tuning")
        model.requires_grad_(False)
        model.item_encoder.codes_table.requires_grad_(True)
    elif args.trainable_blocks is not None or args.tuning == "full":
        model.freeze_towers(args.trainable_blocks)


def has_own_projections(model: Any) -> bool:
    """Whether the adapter of a model includes projections, which may then be adapted to this catalogue."""
    encoder: Any = getattr(model, "item_encoder", None)
    names = [] if encoder is None else model.config.modalities
    return bool(names) and all(hasattr(encoder.projection(name), "modules_to_save") for name in names)


@contextmanager
def thin_checkpoints(model: Any, args: Any) -> Iterator[None]:
    """
    A context in which checkpoints of the run are thin if `args.thin_checkpoints` is true. If it is not given, they are
    thin if blocks are frozen, nothing is pushed, and the model was not loaded from the folder of the run, whose old
    checkpoints are deleted.
    """
    before = getattr(model, "saves_thin", False)
    if args.thin_checkpoints is None and isinstance(model, TransRecModel) and not args.push_to_hub:
        towers = model.item_encoder.towers.values()
        is_frozen = any(not parameter.requires_grad for tower in towers for parameter in tower.parameters())
        origins = [model.config._name_or_path, *(source["name"] for source in model.config.weights_from or [])]
        folders = [Path(name).resolve() for name in origins if os.path.isdir(name)]
        inside = any(folder.is_relative_to(Path(args.output_dir).resolve()) for folder in folders)
        model.saves_thin = is_frozen and not inside
    try:
        yield
    finally:
        if hasattr(model, "saves_thin"):
            model.saves_thin = before


class Cost(NamedTuple):
    """The number of parameters that a run trains, and its costs."""

    trainable_parameters: int
    parameters: int
    peak_memory_gb: float | None
    seconds_per_1000_users: float

    def __str__(self) -> str:
        memory = "" if self.peak_memory_gb is None else f", {self.peak_memory_gb:.1f} GB of memory at most"
        share = 100 * self.trainable_parameters / max(1, self.parameters)
        return (
            f"Trained {self.trainable_parameters:,} of {self.parameters:,} parameters ({share:.1f} %)"
            f"{memory}, {self.seconds_per_1000_users:.2f} seconds for 1,000 users"
        )


class CostCallback(TrainerCallback):
    """Measures the training steps without evaluation and saving, and logs their cost at the end."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.started = 0.0, 0, 0.0
        self.cost: Cost | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.monotonic() - self.started
        self.steps += 1

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        users = self.steps * state.train_batch_size * args.gradient_accumulation_steps * args.world_size
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        self.cost = Cost(
            sum(size for size, trained in sizes if trained),
            sum(size for size, _ in sizes),
            describe_device(args.device)["peak_memory_gb"],
            1000 * self.seconds / max(1, users),
        )
        logger.info("%s", self.cost)
