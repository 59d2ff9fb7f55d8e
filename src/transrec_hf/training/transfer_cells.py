"""The cells of a transfer report: one model on one target, trained on a share of its users, with one seed."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Split
from ..evaluation.baselines import ContentNeighbours, CoOccurrence, Popularity
from ..items.encoding import content_of, standardize_projections
from ..items.meeting import set_item_vectors
from ..items.preparing import ItemSource
from ..items.store import ActivationStore
from ..model.configuration_transrec import TransRecConfig
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .arguments import TransRecTrainingArguments
from .trainer import TransRecTrainer
from .transfer import best_value, choose_start, learning_curve, start_from
from .tuning import CostCallback


logger = logging.get_logger(__name__)

WITH_POPULARITY = "_popularity"  # suffix of models that also know the target's popularity
MODELS = (
    *("popularity", "co_occurrence", "content_neighbours", "id_baseline", "untrained", "zero_shot"),
    *("untrained_popularity", "zero_shot_popularity", "untrained_hybrid", "from_scratch", "fine_tuned"),
    *("scratch_hybrid", "hybrid"),
)
REFERENCES = {
    "zero_shot": "untrained",
    "zero_shot_popularity": "untrained_popularity",
    "fine_tuned": "from_scratch",
    "scratch_hybrid": "id_baseline",
    "hybrid": "scratch_hybrid",
}
"""For each model, the reference that it must beat for the source to help."""
SCRATCH = ("from_scratch", "scratch_hybrid", "content_neighbours")
"""Models that know nothing of the source, beside the untrained ones."""
WITHOUT_SOURCE = ("popularity", "co_occurrence", "id_baseline")
WITHOUT_USERS = (
    "content_neighbours",
    "untrained",
    "zero_shot",
)  # models that train on no users of the target, so all shares give the same result
ID_SEARCH: tuple[dict[str, Any], ...] = ({}, {"hidden_dropout_prob": 0.5}, {"content_prior": False})
"""Settings of the ID baseline, from which validation chooses."""


@dataclass(frozen=True)
class Cell:
    """
    One model on one target.

    Args:
        target (`str`): The target data set.
        model (`str`): One of `MODELS`.
        source (`str`, *optional*): The checkpoint of the source; `None` for models that do not use it.
        fraction (`float`, *optional*): Share of the target's training users; `None` if the model trains on none.
        seed (`int`, *optional*): Seed of weights, order and the draw of users; `None` if nothing is drawn.
    """

    target: str
    model: str
    source: str | None = None
    fraction: float | None = None
    seed: int | None = None

    @classmethod
    def of(cls, target: str, model: str, source: str | None, fraction: float, seed: int) -> Cell:
        """The cell of a model, without the arguments on which this model does not depend."""
        if model in ("content_neighbours", "zero_shot"):
            return cls(target, model, source)
        if model in WITHOUT_USERS:
            return cls(target, model, source, seed=seed)
        return cls(target, model, None if model in WITHOUT_SOURCE else source, fraction, seed)


@dataclass
class Source:
    """
    The checkpoint of a source; no cell changes it.

    Args:
        name (`str`): Folder or Hub id.
        model ([`TransRecModel`]): The model.
        processor ([`TransRecProcessor`]): The processor of the model.
        scratch (`str`): The start of models that know nothing of the source: `"scratch"` if its towers were trained,
            `"none"` if not.
    """

    name: str
    model: TransRecModel
    processor: TransRecProcessor | None
    scratch: str = "none"


class Target:
    """
    A target data set, whose items each tower reads only once.

    Args:
        catalogue ([`Catalogue`]): The items.
        split ([`Split`]): The split of all users. All cells are validated and tested on the same users.
        args ([`TransRecTrainingArguments`]): Arguments of the training runs; runs with few users have smaller batches.
        protocol (`str`): How targets are ranked.
        init_epochs (`float`): Epochs of the short runs with which validation chooses the start.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        split: Split,
        args: TransRecTrainingArguments,
        protocol: str = "full",
        init_epochs: float = 1,
    ):
        self.catalogue, self.split, self.args, self.protocol = catalogue, split, args, protocol
        self.init_epochs = init_epochs
        self.read: dict[tuple[str, bool], tuple[ActivationStore | None, ItemSource]] = {}

    def run(self, cell: Cell, source: Source) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        The ranks of the test targets, `(num_users,)`, and facts about the run.

        Args:
            cell ([`Cell`]): A cell of this target.
            source ([`Source`]): The checkpoint of the cell; for a model without one, a checkpoint with the same
            design.
        """
        started = time.time()
        split = few_users(self.split, 1.0 if cell.fraction is None else cell.fraction, cell.seed or 0)
        set_seed(cell.seed or 0)
        with tempfile.TemporaryDirectory() as folder:
            ranks, facts = self._ranks(cell, source, split, folder)
        return ranks, {"train_users": len(split.train), "seconds": round(time.time() - started, 1), **facts}

    def _ranks(self, cell: Cell, source: Source, split: Split, folder: str) -> tuple[torch.Tensor, dict[str, Any]]:
        if cell.model == "id_baseline":
            return self._id_baseline(source, cell, split, folder)
        model = copy.deepcopy(source.model)
        if cell.model.endswith("hybrid"):
            set_item_vectors(model, torch.zeros(len(self.catalogue), model.config.hidden_size))
        seed, init = cell.seed or 0, "all"
        facts: dict[str, Any] = {}
        is_trained = not cell.model.startswith(("untrained", "zero_shot"))

        def ready(trainer: TransRecTrainer) -> TransRecTrainer:
            """A trainer whose model is prepared on the target (statistics, popularity), unless it is trained."""
            if cell.model in WITHOUT_USERS:
                trainer.source.log_popularity, trainer.is_prepared = None, True
                standardize_projections(model, trainer.source, seed=seed)
            elif not is_trained:
                trainer.prepare_model()
            return trainer

        if cell.model.startswith("untrained") or cell.model in SCRATCH:
            init = start_from(model, source.scratch, seed).init
        elif cell.model in ("fine_tuned", "hybrid") or cell.model.startswith("zero_shot"):
            epochs = self.init_epochs if is_trained else 0

            def short_run(place: str, init: str) -> TransRecTrainer:
                return ready(self.trainer(model, source, split, place, seed, init, epochs))

            start = choose_start(model, short_run, seed=seed)
            init, facts = start.init, {"start": start.init, "starts": start.values}
        trainer = self.trainer(model, source, split, folder, cell.seed, init)
        set_seed(seed)
        if cell.model in ("popularity", "co_occurrence", "content_neighbours"):
            evaluator = trainer.ranking_evaluator(split.test)
            counts, num_items = split.train.item_counts(len(self.catalogue)), len(self.catalogue)
            if cell.model == "popularity":
                scorer: Any = Popularity(counts)
            elif cell.model == "co_occurrence":
                scorer = CoOccurrence(split.train, num_items)
            else:
                scorer = ContentNeighbours(content_of(model, trainer.source))
            return evaluator.rank(scorer, max_history=model.config.max_position_embeddings).ranks, {}
        ready(trainer)
        if is_trained:
            trainer.train()
            curve = learning_curve(trainer)
            facts |= {"validation": max(curve.values()), "learning_curve": curve}
        return self._test(trainer, split), facts

    def _id_baseline(
        self, source: Source, cell: Cell, split: Split, folder: str
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        length = source.model.config.max_position_embeddings
        best: tuple[float, torch.Tensor, dict[str, Any]] | None = None
        for settings in ID_SEARCH:
            set_seed(cell.seed or 0)
            config = TransRecConfig.esasrec(len(self.catalogue), max_position_embeddings=length, **settings)
            trainer = self.trainer(TransRecModel(config), None, split, folder, cell.seed, "all")
            trainer.train()
            value = best_value(trainer)
            if best is None or value > best[0]:
                best = value, self._test(trainer, split), settings
        assert best is not None
        return best[1], {"validation": best[0], "settings": best[2]}

    def trainer(
        self,
        model: TransRecModel,
        source: Source | None,
        split: Split,
        folder: str,
        seed: int | None,
        init: str,
        epochs: float | None = None,
    ) -> TransRecTrainer:
        """
        A trainer of a model, set to the start `init`, on a part of the users, with items that are already read and
        encoded. With `epochs`, it is for a short run that saves nothing.
        """
        args = copy.copy(self.args)
        args.output_dir, args.seed = folder, seed or 0
        args.per_device_train_batch_size = max(16, min(args.per_device_train_batch_size, len(split.train) // 8))
        if source is None or not model.item_encoder.towers:
            args.activation_store = args.trainable_blocks = None
        if epochs is not None:
            args.num_train_epochs, args.early_stopping_patience = epochs, None
            args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        trainer = TransRecTrainer(
            model,
            args,
            catalogue=self.catalogue,
            split=split,
            processing_class=None if source is None else source.processor,
            protocol=self.protocol,
        )
        for callback in (PrinterCallback, CostCallback):  # their lines for each of many runs are of no use
            trainer.remove_callback(callback)
        if source is not None:
            read = source.name, init == "scratch"  # with which towers
            if read not in self.read:
                trainer.fill_store()
                self.read[read] = trainer.store, trainer.source
            popularity = trainer.source.log_popularity
            trainer.store, shared = self.read[read]
            trainer.source = copy.copy(shared)
            trainer.source.log_popularity = popularity
        return trainer

    def _test(self, trainer: TransRecTrainer, split: Split) -> torch.Tensor:
        with trainer.quiet(), trainer.autocast_smart_context_manager():
            return trainer.ranking_evaluator(split.test).rank_model(trainer.model).ranks


def few_users(split: Split, fraction: float, seed: int) -> Split:
    """A split with a share of the training users; a smaller share is part of a larger one."""
    drawn = np.random.default_rng(seed).permutation(len(split.train))
    kept = np.sort(drawn[: max(1, round(fraction * len(drawn)))])
    return split if fraction == 1 else dataclasses.replace(split, train=split.train.select(kept))


def cells_of(
    targets: Sequence[str],
    sources: Sequence[str],
    models: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> list[Cell]:
    """All cells, each once; the references of many comparisons come first."""
    cells = (
        Cell.of(target, model, source, fraction, seed)
        for target in targets
        for model in models
        for source in sources
        for fraction in sorted(fractions, reverse=True)
        for seed in seeds
    )
    return list(dict.fromkeys(cells))
