"""All overrides of private parts of `transformers.Trainer`, each with its reason."""

from __future__ import annotations

import ctypes
import math
import operator
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME as PICKLED_ARGS_NAME
from transformers.utils import logging

from ..errors import DataError, NotFinite, one_line
from ..files import written_whole
from ..items.meeting import catalogue_shift
from ..model.towers_transrec import is_frozen
from ..publishing.facts import load_evaluation
from .adapters import base_of, check_base, has_adapter, lift_adapter, load_adapter_weights
from .resuming import NEW_RUN
from .saving import WholeCheckpoints
from .sharding import copy_of, load_whole_weights, one_unit, own_class


logger = logging.get_logger(__name__)


class EpochCallback(TrainerCallback):
    """
    Tells the training windows their epoch, so that new negatives are drawn; with several processes, nothing else does
    that. Also gives memory of the previous epoch back to the system.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch)
        train_dataloader.dataset.set_epoch(epoch)
        if epoch:  # not in the first epoch, since getting memory again takes time
            give_back_memory()


def give_back_memory() -> None:
    """
    Give the freed memory of this process back to the system. Batches differ in size, and the allocator of Linux keeps
    the gaps between them: without this, a process grew by a quarter of a gigabyte in each epoch on a small data set.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class TrainerBase(WholeCheckpoints):
    """A [`~transformers.Trainer`] that stops at NaN, shares no pickles, and loads weights by the modules' names."""

    optimizer: Any
    control: Any
    reports: dict[str, dict[str, Any]]
    train_started: float
    start: tuple[float, dict[str, torch.Tensor]] | None = None  # its metric and weights

    def prepare(self) -> None:
        """Prepare a run before its first step, when its model and arguments are final."""

    def check_batch(self, users: int) -> None:
        """Raises `ValueError` if nothing can be learned from batches with this many users per process."""

    def save_beside(self, folder: Path) -> None:
        """Write what belongs beside the weights of a checkpoint."""

    def check_finite(self, what: str, value: float) -> None:
        """Raises [`NotFinite`] if a value of the coming step, such as the loss, is not finite."""
        if not math.isfinite(value):
            raise NotFinite(
                f"step {self.state.global_step + 1}: the {what} is {value}, at a learning rate of "
                f"{self._get_learning_rate():.3g}. The run ends here, and nothing of this step is saved. Resume from "
                "the last checkpoint with a lower learning_rate or a longer warmup_steps; if it is the first step, "
                "look for numbers that are not finite in the model and the features of the items."
            )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A context without progress bars if `args.disable_tqdm`."""
        shown, of_hub = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
        if self.args.disable_tqdm:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
            (disable_progress_bars if of_hub else enable_progress_bars)()

    # Before the run

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        accelerator_args = super()._build_accelerator_args(**kwargs)
        accelerator_args.pop("dynamo_plugin", None)  # the blocks are compiled, not the whole model
        return accelerator_args

    def hyperparameter_search(
        self,
        hp_space: Callable[..., Any] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Like `Trainer.hyperparameter_search`, but without a `compute_objective` it optimises `metric_for_best_model`.

        Args:
            hp_space (`Callable`, *optional*): Returns the arguments of a trial, such as `learning_rate`.
            compute_objective (`Callable`, *optional*): Returns a number for the metrics of an evaluation.
            n_trials (`int`, *optional*, defaults to 20): Number of trials.
            direction (`str`, *optional*): Whether to `"maximize"` or to `"minimize"` this number.
            kwargs: See `Trainer`.
        """
        if compute_objective is None:
            direction = direction or f"{self.args.better}imize"
            compute_objective = operator.itemgetter(self.args.best_metric)
        if direction is None:
            raise ValueError("compute_objective needs a direction: give direction='maximize' or 'minimize'")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self.prepare()  # called late in `Trainer.train`, when model and arguments are those of a trial

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        # not in `train`: special tokens of a processor without a tokenizer would be aligned, and the store is filled
        self.processing_class = self.callback_handler.processing_class
        self.train_started = time.time()
        self.check_batch(batch_size or self.args.train_batch_size)  # `auto_find_batch_size` calls this for each size
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with one_unit(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        names = [set(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            now = [set(group) for group in self.optimizer.param_groups]
            if names != now and not self.is_fsdp_enabled:
                raise ValueError("it is another optimizer's")
        except (ValueError, LookupError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise DataError(  # torch would say which list has another length, or fail in the first step
                f"{checkpoint}: the state of its optimizer or schedule does not fit this run, or is damaged "
                f"({one_line(error)}). Resume with the model and the arguments that it was saved with. {NEW_RUN}"
            ) from error

    # The start, which may be the best

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        if self.state.global_step == 0 and self.args.load_best_model_at_end and not self.is_fsdp_enabled:
            value = metrics[self.args.best_metric]
            self.start = (value, copy_of(self.accelerator.unwrap_model(self.model).state_dict()))
        return metrics

    def return_to_start(self) -> None:
        """Restore the weights of the start if no later evaluation was better."""
        if self.start is None:
            return
        value, best = self.start[0], self.state.best_metric
        if best is not None and (best > value if self.args.greater_is_better else best < value):
            return
        logger.warning(
            f"No evaluation was better than the start ({self.args.metric_for_best_model} {value:.4f}), so the model "
            "is as it was before training."
        )
        load_whole_weights(self.accelerator.unwrap_model(self.model), self.start[1])
        self.state.best_metric, self.state.best_model_checkpoint, self.state.best_global_step = value, None, 0

    # In a step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        Like `Trainer.training_step`; a loss that is not finite ends the run, and a batch without negatives gives a
        warning.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        value = float(loss)
        self.check_finite("loss", value)
        if value == 0 and self.model.config.objective == "in_batch":
            logger.warning_once(
                "A batch without negatives taught nothing: it had one user, or its users share all their items. Set "
                "dataloader_drop_last if it was the last batch of an epoch, or raise per_device_train_batch_size."
            )
        return loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        return self.accelerator.autocast()  # `Trainer` leaves it to the model's forward, but encoding calls others

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock estimate multiplies tokens by all parameters, images and users included

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # once a step, just before the optimizer's: the last moment to keep NaN out of the weights
        grad_norm = super()._get_grad_norm(model, grad_norm)
        scaler = self.accelerator.scaler  # of fp16: it leaves out a step that overflows, and lowers its scale
        if scaler is None or scaler.get_scale() < 1:
            self.check_finite("norm of the gradient", float(grad_norm))
        return grad_norm

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.reports = load_evaluation(self.state.best_model_checkpoint).get("reports", {})
        self._restore(self.state.best_model_checkpoint)

    def _restore(self, checkpoint: str) -> None:
        if has_adapter(self.model):
            load_adapter_weights(self.model, checkpoint)
            return
        # `Trainer` loads the file's keys as they are, but those of some towers (ViT) are not the names of the modules
        loaded, found = type(self.model).from_pretrained(checkpoint, output_loading_info=True)
        there = {name: weight for name, weight in loaded.state_dict().items() if name not in found["missing_keys"]}
        here = self.model.state_dict()
        for name in sorted({*there, *here}):
            of_both = [tuple(weights[name].shape) if name in weights else None for weights in (there, here)]
            if of_both[0] != of_both[1]:
                shapes = ["is missing" if shape is None else f"has the shape {shape}" for shape in of_both]
                raise DataError(
                    f"{checkpoint}: holds another model. {name} {shapes[0]} there and {shapes[1]} here: make the "
                    "model with the settings of its config.json."
                )
        load_whole_weights(self.model, there)

    def note_shift(self) -> None:
        """Note in the configuration how far trained towers have moved the items; not under FSDP, which shards them."""
        model: Any = base_of(self.accelerator.unwrap_model(self.model))
        towers = model.item_encoder.towers.values()
        if model.config.item_map != "whitened" or all(map(is_frozen, towers)) or self.is_fsdp_enabled:
            return
        with self.quiet(), self.autocast_smart_context_manager():
            shifts = catalogue_shift(model, self.source, self.args.seed)
            model.config.catalogue_shift = round(max([0.0, *shifts.values()]), 4)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        weights: dict[str, Any] = self.model.state_dict() if state_dict is None else state_dict
        for name, weight in weights.items():
            if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not weight.isfinite().all():
                raise NotFinite(f"{name} is not finite after {self.state.global_step} steps: the model is not saved")
        if has_adapter(self.model):
            check_base(self.model)
        self.note_shift()
        with written_whole(output_dir or self.args.output_dir, writes=self.args.should_save) as folder:
            with own_class(self.model):
                super()._save(str(folder), state_dict)
            if self.args.should_save:
                (folder / PICKLED_ARGS_NAME).unlink()  # a pickle; the same is written as JSON
                lift_adapter(self.model, folder)
                self.save_beside(folder)
