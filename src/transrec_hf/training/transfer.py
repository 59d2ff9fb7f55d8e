"""The start of a fine-tuning run: which parts of a checkpoint are kept, and which start is best on validation."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import one_line
from ..evaluation.metrics import metric_values
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel


if TYPE_CHECKING:
    from .trainer import TransRecTrainer

logger = logging.get_logger(__name__)

INITS = ("all", "half", "item_encoder", "user_encoder", *MODALITIES, "none", "scratch")
"""
The part of a checkpoint from which a run starts: all of it; half way between it and a new model; its item encoder; its
user encoder; nothing but its towers; or nothing, with the towers as they were before the training of the source. The
name of a modality keeps only what was learned about this modality.
"""
AUTO_INITS = ("scratch", "none", "half", "user_encoder", "item_encoder", "all")
GAIN, ERRORS = 1.02, 0.75
"""
The least validation metric of a source, relative to a start without it, and the least gain in standard errors of the
difference, which counts where users are few: a smaller gain may be chance.
"""


@dataclass(frozen=True)
class Start:
    """
    The start of a model.

    Args:
        init (`str`): One of `INITS`.
        loaded, new (`list[str]`): The parts of the model that come from the checkpoint, and those that are new.
        standardized (`list[str]`): The modalities whose item vectors are standardised on this catalogue.
        values (`dict[str, float]`): For each start, the best validation metric of its short run, if there were such
            runs.
    """

    init: str
    loaded: list[str]
    new: list[str]
    standardized: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = {"from the checkpoint": self.loaded, "new": self.new, "standardised here": self.standardized}
        said = "; ".join(f"{what} {', '.join(names) or 'nothing'}" for what, names in parts.items())
        best = self.values.get(self.init, 0.0)
        others = [
            f"{init} {value:.4f} ({value - best:+.4f})" for init, value in self.values.items() if init != self.init
        ]
        compared = f". On validation {self.init} {best:.4f}, {', '.join(others)}" if others else ""
        return f"{self.init}: {said}{compared}"


def is_kept(name: str, init: str) -> bool:
    """Whether a parameter keeps the values of the checkpoint. Towers do, unless the run starts from scratch."""
    if init == "scratch":
        return False
    towers = [f"item_encoder.{modality.tower}." for modality in MODALITIES.values() if modality.tower]
    if init in ("all", "half") or name.startswith(tuple(towers)):
        return True
    of_items = name.startswith("item_encoder.") and "item_embedding" not in name
    if init == "item_encoder":
        return of_items
    if init == "user_encoder":
        return not name.startswith("item_encoder.")
    if init not in MODALITIES:
        return False
    return name.startswith((f"item_encoder.{MODALITIES[init].projection}.", f"item_encoder.{init}_table."))


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    return ".".join(name.split(".")[:2]) if name.startswith("item_encoder.") else name.split(".")[0]


def added_parts(model: TransRecModel) -> set[str]:
    """The parts that were added to a checkpoint, and add nothing yet: side networks and ID vectors that are zero."""
    ends = ("_side.output.weight", "item_embedding.weight")
    return {part_of(name) for name, weights in model.named_parameters() if name.endswith(ends) and not weights.any()}


def check_init(model: TransRecModel, init: str) -> None:
    """Raises `ValueError` if `init` is not one of `INITS`, or is a modality that the model does not read."""
    if init not in INITS or (init in MODALITIES and init not in model.config.modalities):
        known = [name for name in INITS if name not in MODALITIES or name in model.config.modalities]
        raise ValueError(f"init is {init!r}, but must be one of {', '.join(map(repr, known))}")


@torch.no_grad()
def start_from(model: TransRecModel, init: str, seed: int = 0) -> Start:
    """
    Keep a part of what a model has learned, and initialise the rest again.

    Args:
        model ([`TransRecModel`]): A model loaded from a checkpoint; changed in place.
        init (`str`): One of `INITS`.
        seed (`int`, *optional*, defaults to 0): Seed of the new weights.

    Raises:
        `ValueError`: If `init` is not one of `INITS`, or is a modality that the model does not read; or if it is
            `"scratch"`, and the towers from before cannot be read.
    """
    check_init(model, init)
    towers = model.original_towers() if init == "scratch" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
    loaded, new, added = set(), set(), added_parts(model)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        is_tower = is_kept(name, "none")
        if is_kept(name, init) or (is_tower and name not in towers):
            loaded.add(part)
        else:
            new.add(part)
            parameter.copy_(towers[name] if is_tower else fresh[name])
        if init == "half" and not is_tower:
            parameter.lerp_(fresh[name].to(parameter), 0.5)
    for name, buffer in model.named_buffers():
        if name in towers:
            buffer.copy_(towers[name])
    if "item_encoder.codes_table" in new:
        model.item_encoder.codes_table.is_new.fill_(True)
    whitened = model.config.item_map == "whitened"
    standardized = [
        name for name in model.config.modalities if whitened or f"item_encoder.{MODALITIES[name].projection}" in new
    ]
    return Start(init, sorted(loaded - added), sorted(new - loaded | added), standardized)


def has_trained_towers(model: TransRecModel) -> bool:
    """
    Whether the towers differ from those with which the model was made. If these cannot be read, a warning says so.
    """
    try:
        return bool(model.original_towers())
    except ValueError as error:
        logger.warning_once(  # and not for each cell of a report
            "The towers are taken as they are, since those from before the training of the source are not there: "
            f"{one_line(error)}"
        )
        return False


def choose_start(
    model: TransRecModel,
    make_trainer: Callable[[str, str], TransRecTrainer],
    inits: Sequence[str] = AUTO_INITS,
    seed: int = 0,
) -> Start:
    """
    A guard against negative transfer: train from each start for a short while, and set the model to the start that is
    best on validation. The metric before any training counts too. The start that keeps nothing wins unless another one
    is better by a fiftieth, and by three quarters of the standard error of the difference; it is `"scratch"` if the
    towers were trained, and `"none"` if not. All validation users are ranked, whatever `max_eval_users` says: a few
    thousand users do not tell small differences from chance.

    Args:
        model ([`TransRecModel`]): A model loaded from a checkpoint; it is set to the best start.
        make_trainer (`Callable`): Makes a trainer of this model for a short run in a given folder from a given start.
            With `num_train_epochs=0` the starts are compared without training.
        inits (`Sequence[str]`, *optional*): Some of `INITS`. If several are equal, the first one wins.
        seed (`int`, *optional*, defaults to 0): Seed of new weights.

    Returns:
        [`Start`]: The best start, with the best validation metric of each start in `values`.
    """
    checkpoint = {name: value.clone() for name, value in model.state_dict().items()}
    tried: dict[str, Evaluation] = {}
    if "scratch" in inits and not has_trained_towers(model):
        inits = [init for init in inits if init != "scratch"]
    for init in inits:
        model.load_state_dict(checkpoint)
        start_from(model, init, seed)
        with tempfile.TemporaryDirectory() as folder:
            tried[init] = best_evaluation(make_trainer(folder, init))
        logger.info("Short run from %s: %.4f on validation", init, tried[init].value)
    model.load_state_dict(checkpoint)
    nothing = next((init for init in ("scratch", "none") if init in tried), None)
    helping = [init for init in tried if nothing in (None, init) or tried[init].is_above(tried[nothing])]
    best = max(helping, key=lambda init: tried[init].value)
    return replace(start_from(model, best, seed), values={init: of.value for init, of in tried.items()})


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation on validation.

    Args:
        metric (`str`): Name of the metric that decides.
        value (`float`): Its value.
        ranks (`torch.Tensor` of shape `(num_users,)`): Ranks of the targets.
    """

    metric: str
    value: float
    ranks: torch.Tensor

    def is_above(self, other: Evaluation) -> bool:
        """
        Whether the metric is above that of another evaluation of the same users, by more than may be chance. A metric
        of `compute_metrics` has no values of single users, hence no standard error.
        """
        if self.value < GAIN * other.value:
            return False
        try:
            values, others = (metric_values(of.ranks, self.metric.removeprefix("eval_")) for of in (self, other))
        except ValueError:
            return True
        differences = (values - others).double()
        if len(differences) == 1:
            return False
        return bool(differences.mean() > ERRORS * differences.std() / math.sqrt(len(differences)))


class KeepBest(TrainerCallback):
    """
    Keeps the best evaluation of a run, its start included.

    Args:
        trainer ([`TransRecTrainer`]): The trainer of the run.
    """

    def __init__(self, trainer: TransRecTrainer):
        self.trainer = trainer
        self.best = Evaluation(trainer.args.best_metric, -math.inf, trainer.ranks)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if metrics[self.best.metric] > self.best.value:
            self.best = replace(self.best, value=metrics[self.best.metric], ranks=self.trainer.ranks)


def best_evaluation(trainer: TransRecTrainer) -> Evaluation:
    """The best evaluation of a short run or, with no epochs, that of the model as it is; of all users."""
    trainer.args = copy.copy(trainer.args)  # which may be those of other runs too
    trainer.args.max_eval_users = None
    keeper = KeepBest(trainer)
    trainer.add_callback(keeper)
    if trainer.args.num_train_epochs > 0:
        trainer.train()
    else:
        if not trainer.is_prepared:
            trainer.fill_store()
            trainer.prepare_model()
        trainer.evaluate()
    return keeper.best


def best_value(trainer: TransRecTrainer) -> float:
    """The best validation metric of a run, its start included."""
    return max(learning_curve(trainer).values())


def learning_curve(trainer: TransRecTrainer) -> dict[float, float]:
    """The validation metric of a run after each epoch; epoch 0 is its start."""
    metric = trainer.args.best_metric
    return {entry["epoch"]: entry[metric] for entry in trainer.state.log_history if metric in entry}


__all__ = ["AUTO_INITS", "INITS", "Start", "check_init", "choose_start", "has_trained_towers", "start_from"]
