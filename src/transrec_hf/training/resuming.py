"""Resuming from a checkpoint: what it must hold, and which settings must not change."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..errors import DataError
from ..files import recover
from ..publishing.checkpoint import checkpoints_of
from ..publishing.facts import TRAINING_ARGS_NAME, read_json
from .arguments import TransRecTrainingArguments


AS_BEFORE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "seed", "data_seed"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "trainable_blocks"),
    *("warmup_steps", "lr_scheduler_kwargs"),
    *("learning_rate", "tower_learning_rate", "projection_learning_rate"),
    *("weight_decay", "tower_weight_decay", "projection_weight_decay"),
)
"""Arguments that must not change: a change would be ignored, or give another order of users or another schedule."""
NEW_RUN = "To start a new run from its weights, load it with TransRecModel.from_pretrained."


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The checkpoint with the most steps from which a run can be resumed; `None` if there is none."""
    for checkpoint in reversed(checkpoints_of(output_dir)):
        recover(checkpoint)
        if not what_is_missing(checkpoint):
            return str(checkpoint)
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """The first file that resuming needs and that a checkpoint lacks, or has only in part."""
    state: dict[str, Any] = {}
    with suppress(DataError):
        state = read_json(checkpoint / TRAINER_STATE_NAME)
    if not state:
        return TRAINER_STATE_NAME
    if not any(checkpoint.glob("*.safetensors")):
        return "model.safetensors"
    if not any((checkpoint / name).exists() for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)):
        return OPTIMIZER_NAME
    if not (checkpoint / SCHEDULER_NAME).exists():
        return SCHEDULER_NAME
    return None if any(checkpoint.glob("rng_state*.pth")) else "rng_state.pth"


def check_resumable(checkpoint: str | os.PathLike, args: TransRecTrainingArguments) -> None:
    """
    Refuse a checkpoint from which a run with these arguments would not continue as before.

    Args:
        checkpoint (`str` or `os.PathLike`): The folder.
        args ([`TransRecTrainingArguments`]): The arguments of the run.

    Raises:
        [`DataError`]: The message names what is missing, or the argument that differs.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise DataError(
            f"{checkpoint}: there is no such folder. Give a checkpoint of a run, such as run/checkpoint-500."
        )
    if missing := what_is_missing(folder):
        inside = checkpoints_of(folder)
        if inside:
            raise DataError(
                f"{checkpoint}: is the folder of a run, not of a checkpoint. Give one, such as {inside[-1]}."
            )
        raise DataError(
            f"{checkpoint}: training cannot be resumed from it, as {missing} is missing or damaged. Saving it was "
            f"interrupted, or it was saved with save_only_model. {NEW_RUN}"
        )
    states, world_size = {path.name for path in folder.glob("rng_state*.pth")}, args.world_size
    if states != ({f"rng_state_{rank}.pth" for rank in range(world_size)} if world_size > 1 else {"rng_state.pth"}):
        raise DataError(
            f"{checkpoint}: was saved by {len(states)} processes, and {world_size} resume: start as many as before."
        )
    before = read_json(folder / TRAINING_ARGS_NAME)
    now = json.loads(args.to_json_string())
    for name in AS_BEFORE:
        found_out = name == "per_device_train_batch_size" and args.auto_find_batch_size
        if name in before and before[name] != now[name] and not found_out:
            raise DataError(
                f"{checkpoint}: was saved with {name}={before[name]}, and cannot be resumed with {now[name]}: leave "
                f"it as it was. {NEW_RUN}"
            )
