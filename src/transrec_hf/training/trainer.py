"""Training: `transformers.Trainer` with next-item batches, a rate for each part, and ranking as evaluation."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction
from transformers.trainer_utils import IntervalStrategy, PredictionOutput, SaveStrategy, speed_metrics
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Sequences, Split
from ..data.statistics import data_statistics, log_popularity
from ..errors import DataError
from ..evaluation.evaluator import Ranking, RankingEvaluator
from ..evaluation.protocol import EvaluationProtocol
from ..files import STATISTICS_NAME
from ..items.encoding import fit_texts, standardize_projections
from ..items.meeting import ItemStatistics, needs_item_statistics, standardize_for, start_from_data
from ..items.preparing import ItemSource, token_budget
from ..items.store import ActivationStore
from ..model.configuration_transrec import TransRecConfig
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.card import non_default_arguments, write_model_card
from ..publishing.checkpoint import check_fits
from ..publishing.facts import EVALUATION_NAME, TRAINING_ARGS_NAME, load_evaluation, named_source, towers_of_run
from ..publishing.results import describe_device, versions
from .adapters import base_of, check_adapters, has_adapter
from .arguments import TransRecTrainingArguments
from .checks import COVERAGE, check_dropout, check_kind, check_metric, check_objects
from .collator import DataCollatorForNextItem, TrainingWindows
from .item_cache import ItemCache
from .parameters import parameter_groups
from .resuming import check_resumable, last_complete_checkpoint
from .sharding import check_sharding, whole_weights
from .trainer_base import EpochCallback, TrainerBase
from .tuning import CostCallback, has_own_projections, tune


logger = logging.get_logger(__name__)


class TransRecTrainer(TrainerBase):
    r"""
    Trains a [`TransRecModel`] on users' sequences and ranks the validation targets at each evaluation.

    Args:
        model ([`TransRecModel`]): The model. If it has a PEFT adapter, only the adapter is trained and saved.
        args ([`TransRecTrainingArguments`]): The arguments.
        catalogue ([`Catalogue`]): The items.
        split ([`Split`]): Training sequences, and validation sequences whose last item is the target.
        processing_class ([`TransRecProcessor`], *optional*): The processor; the ID baseline has none.
        protocol (`str` or [`EvaluationProtocol`], *optional*, defaults to `"full"`): How targets are ranked.
        model_init (`Callable`, *optional*): Makes a new model, for each trial of `hyperparameter_search`; then `model`
            is `None`.
        compute_metrics (`Callable`, *optional*): Computes further metrics from an [`~transformers.EvalPrediction`],
            whose contents are those of [`~TransRecTrainer.predict`].
        kwargs: Further arguments of [`~transformers.Trainer`], e.g. `callbacks`.

    Raises:
        `TypeError`: If an argument has the wrong class; the message says what to do.
        `ValueError`: If model, data and arguments do not fit together.

    Example:
    ```python
    >>> catalogue, sequences = load_domain("my_data")
    >>> args, split = TransRecTrainingArguments("run"), leave_one_out(sequences)
    >>> trainer = TransRecTrainer(model, args, catalogue=catalogue, split=split, processing_class=processor)
    >>> trainer.train()
    ```
    """

    loss_is_scaled_for_ga = False  # a contrastive loss is a mean over its batch

    def __init__(
        self,
        model: TransRecModel | None,
        args: TransRecTrainingArguments,
        *,
        catalogue: Catalogue,
        split: Split,
        processing_class: TransRecProcessor | None = None,
        protocol: str | EvaluationProtocol = "full",
        model_init: Callable[..., TransRecModel] | None = None,
        **kwargs: Any,
    ):
        check_objects(model, args, catalogue, split, processing_class, model_init, kwargs)
        self.args: Any = args
        self.catalogue, self.split, self.protocol = catalogue, split, protocol
        self.reports: dict[str, dict[str, Any]] = {}  # the last report of each split, for the card
        self.ranks = torch.empty(0)  # of the targets in the last evaluation
        self.metadata: dict[str, Any] = {}  # facts for the card that only a person can tell
        self.train_seconds, self.train_started = 0.0, 0.0
        self.item_ids, self.train_counts = catalogue.item_ids, split.train.item_counts(len(catalogue))
        self.items = ItemSource(catalogue, processing_class, token_budget(args.device))
        if model is not None:
            self.adopt(model)
        super().__init__(
            model,
            args,
            train_dataset=None,
            eval_dataset=split.validation,
            processing_class=processing_class,
            model_init=model_init,
            **kwargs,
        )
        self.train_dataset: Any = self.windows
        self.data_collator: Any = None  # made with the first batches, since it reads the store
        self.owns_optimizer = self.optimizer is None
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_sharding(plugin)
            plugin.mixed_precision_policy = None  # autocast instead: the loss and its inputs stay in fp32
        self.add_callback(EpochCallback)
        self.cost = CostCallback()
        self.add_callback(self.cost)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def adopt(self, model: TransRecModel) -> None:
        """Check that model, data and arguments fit together, and set up the model as the arguments say."""
        args, config = self.args, model.config
        check_fits(model, self.catalogue)
        if config.modalities and self.items.processor is None:
            raise ValueError("a content model needs its processor: pass it as processing_class")
        self.source = self.items if config.modalities else ItemSource(self.catalogue)
        check_dropout(args.modality_dropout, self.source)
        self.source.log_popularity = torch.from_numpy(log_popularity(self.train_counts))
        self.store: ActivationStore | None = None
        self.is_prepared = False  # for these items
        self.windows = TrainingWindows(self.split.train, config.max_position_embeddings, config.num_targets)
        if not len(self.windows):
            raise DataError("no training sequence has two items: every user needs a history and a next item")
        if args.dataloader_drop_last and len(self.windows) < args.train_batch_size * args.world_size:
            raise ValueError(
                f"there are {len(self.windows)} training sequences, less than one batch, which dataloader_drop_last "
                "leaves out: make per_device_train_batch_size smaller"
            )
        self.check_batch(args.train_batch_size, config)
        if args.item_cache_age is not None and config.objective != "cpc":
            raise ValueError(
                f"item_cache_age saves nothing with objective {config.objective!r}, in which items of a history are "
                "targets too: leave it out, or train with 'cpc'"
            )
        tune(model, args)
        saves = args.save_strategy != SaveStrategy.NO or args.push_to_hub
        check_adapters(model, saves=saves, pushes=args.push_to_hub)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "every parameter of the model is frozen, so there is nothing to train: call model.requires_grad_(True)"
            )
        if config.modalities:
            fit_texts(model, self.source)
        transrec: Any = base_of(model)
        transrec.item_chunk_size = args.item_chunk_size
        transrec.saves_thin = bool(args.thin_checkpoints)
        if args.torch_compile:
            transrec.compile_blocks(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.item_cache: ItemCache | None = None
        if args.item_cache_age is not None:
            self.item_cache = ItemCache(len(self.catalogue), config.hidden_size, args.item_cache_age, args.device)

    def check_batch(self, users: int, config: TransRecConfig | None = None) -> None:
        """Raises `ValueError` if a batch with this many users per process has no negatives."""
        config = config or self.model.config
        if config.objective == "in_batch" and (users * self.args.world_size == 1 or len(self.windows) == 1):
            raise ValueError(
                "objective 'in_batch' takes the items of other users as negatives, but a batch has only one user, so "
                "nothing would be learned. Take more users, raise per_device_train_batch_size (item_chunk_size saves "
                "memory; gradient_accumulation_steps adds no negatives), or train with 'sampled_softmax'."
            )

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model of `model_init`, set up for this run."""
        model = super().call_model_init(trial)
        check_kind("what model_init makes", base_of(model), "TransRecModel", "make one with TransRecModel(config)")
        self.adopt(model)
        return model

    def prepare(self) -> None:
        """Begin a training: set up the model, fill the store, and initialise new projections from the data."""
        self.args.check()
        if self.model_init is not None:
            self.adopt(self.model)
            self.train_dataset = self.windows
        if self.owns_optimizer:
            self.optimizer = None  # the trained parts and their rates may have changed since the last run
        self.fill_store()
        self.prepare_model()

    def fill_store(self) -> None:
        """
        Compute the states of all items after the frozen blocks that `args.activation_store` lacks. Training and
        evaluation call this at their start.
        """
        if self.args.activation_store is None or (self.store is not None and self.store.is_current):
            return
        with self.quiet(), self.autocast_smart_context_manager():
            store = ActivationStore(
                self.args.activation_store,
                self.model,
                self.source if self.store is None else self.store.contents,
                dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
            store.fill(
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                accelerator=self.accelerator,
            )
        self.store, self.source = store, store.source

    def prepare_model(self) -> None:
        """Initialise the new parts of the model from the data; `train` begins with it."""
        self.is_prepared = True
        keeps_own = has_adapter(self.model) and not has_own_projections(self.model)
        prepare = standardize_for if keeps_own else standardize_projections
        if self.source.processor is not None:
            with self.quiet(), self.autocast_smart_context_manager(), whole_weights(self.model):
                prepare(self.model, self.source, seed=self.args.seed)
                start_from_data(self.model, self.source, self.split.train)

    def get_train_dataloader(self) -> DataLoader:
        """The training batches, with items from the store if there is one."""
        self.data_collator = self.make_collator()
        return super().get_train_dataloader()

    def make_collator(self) -> DataCollatorForNextItem:
        """The collator that makes batches of training windows."""
        args, popularity = self.args, log_popularity(self.train_counts)
        seed = args.seed if args.data_seed is None else args.data_seed
        return DataCollatorForNextItem(self.source, self.model.config, popularity, seed, args.modality_dropout)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self.item_cache is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = self.item_cache.leave_out(inputs, self.state.global_step)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.item_cache.update(inputs, outputs.item_embeds, self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """An optimizer with a rate and a decay for each part of the model, see [`parameter_groups`]."""
        if self.optimizer is not None:
            return self.optimizer
        model, given = model or self.model, self.optimizer_cls_and_kwargs
        optimizer_class, kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        groups = parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))
        self.optimizer_cls_and_kwargs: Any = (optimizer_class, {**kwargs, "params": groups})
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given  # the next run has other groups

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Like `Trainer.train`; `resume_from_checkpoint=True` takes the newest complete checkpoint. With
        `load_best_model_at_end` and `eval_on_start`, our defaults, the start is evaluated too: if no later state is
        better, the model ends as it began.

        Raises:
            `ValueError`: If there is no such checkpoint, or a run with these settings cannot be resumed from it.
            [`NotFinite`]: At the first loss or gradient that is not finite.
        """
        has_own = type(self).evaluate is not TransRecTrainer.evaluate or self.compute_metrics is not None
        if self.args.eval_strategy != IntervalStrategy.NO and not has_own:
            check_metric(self.args, self.eval_dataset if isinstance(self.eval_dataset, dict) else ())
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"there is no complete checkpoint in {self.args.output_dir}: leave out resume_from_checkpoint"
                )
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.args)
        if self.args.process_index == 0:  # otherwise a truncated image would end the run later
            self.source.catalogue.check_contents(self.source.modalities)
        before = load_evaluation(resume_from_checkpoint) if resume_from_checkpoint else {}
        self.reports = before.get("reports", self.reports)
        self.train_seconds = before.get("run", {}).get("seconds", 0.0)
        processor = self.source.processor
        if processor is not None and processor.tokenizer is None:
            self.processing_class: Any = None  # otherwise `Trainer` would align special tokens
        self.start = None
        try:
            with self.alone(), self.quiet():
                result = super().train(resume_from_checkpoint, **kwargs)
            self.return_to_start()
            return result
        finally:
            self.processing_class = self.callback_handler.processing_class
            self.train_seconds, self.train_started = self._seconds(), 0.0

    def evaluate(
        self,
        eval_dataset: Sequences | dict[str, Sequences] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Rank the last item of every sequence among the whole catalogue.

        Args:
            eval_dataset ([`Sequences`] or `dict`, *optional*): Histories that end with their target; by default the
                validation sequences, or `args.max_eval_users` of them. In a `dict`, the name of each set is put before
                the names of its metrics.
            ignore_keys: Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the name of each metric.
        """
        sequences: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sequences, str):
            sequences = self.eval_dataset[sequences]
        if isinstance(sequences, dict):
            each = [self.evaluate(of, ignore_keys, f"{metric_key_prefix}_{name}") for name, of in sequences.items()]
            return {name: value for metrics in each for name, value in metrics.items()}
        self._memory_tracker.start()
        of_run = sequences is self.split.validation and eval_dataset is None
        metrics = self._rank(
            sequences,
            "validation" if metric_key_prefix == "eval" else metric_key_prefix.removeprefix("eval_"),
            metric_key_prefix,
            self.args.max_eval_users if of_run else None,
        ).metrics
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self, test_dataset: Sequences, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        The items that are recommended after the history of each sequence.

        Args:
            test_dataset ([`Sequences`]): Histories that end with their target.
            ignore_keys: Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`): Prefix of the name of each metric.

        Returns:
            `PredictionOutput` of `predictions` `(n_users, 10)`, the catalogue rows of the recommended items, best
            first, -1 where there is none; `label_ids` `(n_users,)`, the rows of the targets; and `metrics`, those of
            [`~TransRecTrainer.evaluate`].
        """
        self._memory_tracker.start()
        output = self._rank(test_dataset, metric_key_prefix, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        self._memory_tracker.stop_and_update_metrics(output.metrics)
        return output

    def _rank(self, sequences: Sequences, split: str, prefix: str, max_users: int | None = None) -> PredictionOutput:
        """Recommendations, targets and metrics."""
        started = time.time()
        check_kind("what is evaluated", sequences, "Sequences", "take split.validation or split.test")
        evaluator, ranking = self._ranking(sequences, False, max_users)
        report = self.reports[split] = evaluator.report(ranking)
        recommended, targets = ranking.lists.numpy(), evaluator.targets
        values = {**report["metrics"], COVERAGE: report["recommendations"][COVERAGE]}
        if self.compute_metrics is not None:
            values |= self.compute_metrics(EvalPrediction(predictions=recommended, label_ids=targets))
        metrics = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in values.items()
        }
        metrics |= speed_metrics(prefix, started, num_samples=len(recommended))
        return PredictionOutput(predictions=recommended, label_ids=targets, metrics=metrics)

    def report(
        self,
        sequences: Sequences | None = None,
        split: str = "test",
        baselines: bool = True,
        content_vectors: torch.Tensor | None = None,
        max_users: int | None = None,
    ) -> dict[str, Any]:
        """
        The full report on the model for one split. The model card shows the last report of a split, and is written
        again if the model has been saved.

        Args:
            sequences ([`Sequences`], *optional*): Histories that end with their target; the test sequences if not
                given.
            split (`str`, *optional*, defaults to `"test"`): Name of the split; the report is kept as `reports[split]`.
            baselines (`bool`, *optional*, defaults to `True`): Whether to report baselines that need no training. The
                report of another model, such as the ID baseline, may be added to `reports[split]["baselines"]`.
            content_vectors (`torch.Tensor` of shape `(num_items, size)`, *optional*): For a baseline of content only.
            max_users (`int`, *optional*): Number of users to rank for, drawn by the seed of the run; all if not given.

        Returns:
            `dict`: See [`RankingEvaluator.evaluate`].
        """
        sequences = self.split.test if sequences is None else sequences
        evaluator, ranking = self._ranking(sequences, baselines, max_users, content_vectors)
        report = self.reports[split] = evaluator.report(ranking)
        if baselines:
            with self.quiet():
                report["baselines"] = evaluator.evaluate_baselines(ranking.max_history, self.accelerator)
        return report

    def _ranking(
        self, sequences: Sequences, baselines: bool, max_users: int | None, content_vectors: torch.Tensor | None = None
    ) -> tuple[RankingEvaluator, Ranking]:
        """The targets of sequences ranked by the model."""
        self.fill_store()
        evaluator = self.ranking_evaluator(sequences, baselines, max_users, content_vectors)
        model = self.accelerator.unwrap_model(self.model)
        with self.quiet(), self.autocast_smart_context_manager(), whole_weights(model):
            if not self.is_prepared:
                standardize_for(model, self.source, seed=self.args.seed)
                self.is_prepared = True
            ranking = evaluator.rank_model(model, accelerator=self.accelerator)
        self.ranks = ranking.ranks
        return evaluator, ranking

    def ranking_evaluator(
        self,
        sequences: Sequences,
        baselines: bool = False,
        max_users: int | None = None,
        content_vectors: torch.Tensor | None = None,
    ) -> RankingEvaluator:
        """The evaluator of this run's protocol for the given sequences, e.g. `split.test`."""
        return RankingEvaluator(
            self.source,
            sequences,
            protocol=self.protocol,
            train=self.split.train if baselines else None,
            train_counts=self.train_counts,
            content_vectors=content_vectors,
            max_users=max_users,
            seed=self.args.seed,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
        )

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card of the run to `output_dir`, with the small files that it is made from. Facts that are
        given here are kept for later cards.

        Args:
            language, license (`str`, *optional*): Language and licence of the model.
            tags (`str` or `list[str]`, *optional*): Tags besides those that every card has.
            model_name (`str`, *optional*): Name or Hub id of the model.
            finetuned_from (`str`, *optional*): The checkpoint that it was trained from; by default the one that it was
                loaded from.
            dataset_tags (`str` or `list[str]`, *optional*): Id of the Hub data set of the training.
            dataset, tasks, dataset_args: Not used.
        """
        given = {
            "language": language,
            "license": license,
            "tags": [tags] if isinstance(tags, str) else tags,
            "datasets": [dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
            "model_id": self.hub_model_id or model_name,
            "finetuned_from": finetuned_from,
        }
        self.metadata |= {name: value for name, value in given.items() if value is not None}
        if self.is_world_process_zero():
            self.describe(Path(self.args.output_dir))

    def save_beside(self, folder: Path) -> None:
        """Write the other files of a checkpoint beside its weights."""
        if needs_item_statistics(self.accelerator.unwrap_model(self.model)):
            ItemStatistics(self.item_ids, self.train_counts).save(folder)
        self.describe(folder)

    def describe(self, folder: Path) -> None:
        """Write the files that describe a checkpoint: arguments, statistics, reports, and the card made from them."""
        model = self.accelerator.unwrap_model(self.model)
        parent = self.metadata.get("finetuned_from") or model.config._name_or_path
        arguments = json.loads(self.args.to_json_string())  # without the tokens
        run = describe_device(self.args.device) | {
            "num_processes": self.args.world_size,
            "seconds": round(self._seconds(), 1),
            "steps": self.state.global_step,
            "epochs": self.state.epoch or 0.0,
            "versions": versions(),
        }
        evaluation = {
            "reports": self.reports,
            "catalogue_shift": model.config.catalogue_shift,  # an adapter has no configuration of its own
            "towers": towers_of_run(model.config),
            "finetuned_from": named_source(parent) if parent else None,
            "run": run,
            "arguments": non_default_arguments(arguments, type(self.args)),
            "metadata": {"model_id": self.hub_model_id or Path(self.args.output_dir).resolve().name, **self.metadata},
        }
        files = {TRAINING_ARGS_NAME: arguments, STATISTICS_NAME: self.statistics, EVALUATION_NAME: evaluation}
        write_model_card(folder, model.config, files)

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """See [`data_statistics`]."""
        return data_statistics(self.catalogue, self.split)

    def _seconds(self) -> float:
        """Seconds of training, including those of a resumed checkpoint."""
        return self.train_seconds + (time.time() - self.train_started if self.train_started else 0.0)
