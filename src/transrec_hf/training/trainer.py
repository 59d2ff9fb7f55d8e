"""Training: `transformers.Trainer` with next-item batches, a rate for each part, and ranking as its evaluation."""

from __future__ import annotations

import functools
import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME as PICKLED_ARGS_NAME
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Sequences, Split
from ..data.statistics import STATISTICS_NAME, data_statistics, log_popularity
from ..errors import DataError
from ..evaluation.evaluator import LIST_LENGTH, RankingEvaluator
from ..evaluation.protocol import EvaluationProtocol
from ..files import written_whole
from ..items.encoding import encode_catalogue, standardize_projections
from ..items.meeting import ItemStatistics, needs_item_statistics, standardize_for
from ..items.preparing import ItemSource, token_budget
from ..items.store import ActivationStore
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.card import non_default_arguments, write_model_card
from ..publishing.checkpoint import (
    EVALUATION_NAME,
    TRAINING_ARGS_NAME,
    last_complete_checkpoint,
    load_evaluation,
    named_source,
    towers_of_run,
)
from ..publishing.results import describe_device, versions
from .arguments import TransRecTrainingArguments
from .collator import DataCollatorForNextItem, TrainingWindows
from .item_cache import ItemCache
from .saving import WholeCheckpoints
from .sharding import check_sharding, copy_of, load_whole_weights, own_class, whole_weights
from .tuning import CostCallback, has_own_projections, tune


logger = logging.get_logger(__name__)


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to: `"tower"`, `"projection"` or `"user_encoder"`."""
    if any(f"{modality.tower}." in name for modality in MODALITIES.values() if modality.tower):
        return "tower"
    # the ID baseline's table is learned from scratch like the user encoder
    return "projection" if "item_encoder." in name and "item_embedding" not in name else "user_encoder"


def parameter_groups(model: nn.Module, args: TransRecTrainingArguments, decayed: set[str]) -> list[dict[str, Any]]:
    """
    Optimizer groups of the trainable parameters: a learning rate and a weight decay for each part, and no decay for
    biases and norms.

    Args:
        model (`nn.Module`): the model.
        args ([`TransRecTrainingArguments`]): the rates and decays.
        decayed (`set[str]`): names of the parameters that decay, see `Trainer.get_decay_parameter_names`.
    """

    def either(value: float | None, default: float) -> float:
        return default if value is None else value

    rates = {
        "tower": (args.tower_learning_rate, args.tower_weight_decay),
        "projection": (
            either(args.projection_learning_rate, args.learning_rate),
            either(args.projection_weight_decay, args.weight_decay),
        ),
        "user_encoder": (args.learning_rate, args.weight_decay),
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name in decayed and parameter.dim() > 1  # the scales of batch norms are not among the norms known
            groups.setdefault((part_of(name), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part][0], "weight_decay": rates[part][1] if decays else 0.0}
        for (part, decays), parameters in groups.items()
    ]


def has_adapter(model: nn.Module) -> bool:
    """Whether a PEFT adapter was added to the model, by `get_peft_model` or by `add_adapter`."""
    return bool(getattr(model, "peft_config", None))


def load_adapter_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load the weights of an adapter that the model has already."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(os.fspath(folder), device="cpu")
    if isinstance(model, TransRecModel):  # `add_adapter`, which leaves the names of the modules as they were
        weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    set_peft_model_state_dict(model, weights)


class EpochCallback(TrainerCallback):
    """Tells the training windows their epoch, hence new negatives; over several processes, nothing else does."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
        train_dataloader.dataset.set_epoch(int(state.epoch))


class TransRecTrainer(WholeCheckpoints):
    r"""
    Trains a [`TransRecModel`] on users' sequences and ranks the validation targets at each evaluation.

    Args:
        model ([`TransRecModel`]): the model, or one with a PEFT adapter, of which that alone is trained and saved.
        args ([`TransRecTrainingArguments`]): the arguments.
        catalogue ([`Catalogue`]): the items.
        split ([`Split`]): training sequences, and validation sequences whose last item is the target.
        processing_class ([`TransRecProcessor`], *optional*): of the model; the ID baseline has none.
        protocol (`str` or [`EvaluationProtocol`], *optional*, defaults to `"full"`): how targets are ranked.
        kwargs: further arguments of [`~transformers.Trainer`], e.g. `callbacks`.

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
        model: TransRecModel,
        args: TransRecTrainingArguments,
        *,
        catalogue: Catalogue,
        split: Split,
        processing_class: TransRecProcessor | None = None,
        protocol: str | EvaluationProtocol = "full",
        **kwargs: Any,
    ):
        config = model.config
        if config.modalities:
            catalogue.require(config.modalities)
        if config.modalities and processing_class is None:
            raise ValueError("a content model needs its processor: pass it as processing_class")
        if config.num_items is not None and config.num_items != len(catalogue):
            raise ValueError(f"num_items is {config.num_items}, but the catalogue has {len(catalogue)} items")
        train_dataset = TrainingWindows(split.train, config.max_position_embeddings, config.num_targets)
        if not len(train_dataset):
            raise DataError("no training sequence has two items: every user needs a history and a next item")
        if args.item_cache_age is not None and config.objective != "cpc":
            raise ValueError(
                f"item_cache_age saves nothing with objective {config.objective!r}, which scores the items of a "
                "history as well: leave it out, or train with 'cpc'"
            )
        tune(model, args)
        self.catalogue, self.split, self.protocol = catalogue, split, protocol
        self.reports: dict[str, dict[str, Any]] = {}  # the last one of each split, for the card
        self.metadata: dict[str, Any] = {}  # of the card, what only a person can tell
        self.train_seconds, self.train_started = 0.0, 0.0
        self.is_prepared = False  # for the items at hand
        self.item_ids, self.train_counts = catalogue.item_ids, split.train.item_counts(len(catalogue))
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=split.validation,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_sharding(plugin)
            plugin.mixed_precision_policy = None  # autocast instead: the loss and its inputs stay in fp32
        processor = processing_class if config.modalities else None
        self.source = ItemSource(catalogue, processor, token_budget(args.device))
        self.source.log_popularity = torch.from_numpy(log_popularity(self.train_counts))
        self.data_collator: Any = None  # made with the batches: it reads the store, if there is to be one
        self.store: ActivationStore | None = None
        transrec = model.get_base_model() if hasattr(model, "get_base_model") else model
        transrec.item_chunk_size = args.item_chunk_size
        transrec.saves_thin = bool(args.thin_checkpoints)
        if args.torch_compile:
            transrec.compile_blocks(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.item_cache: ItemCache | None = None
        if args.item_cache_age is not None:
            self.item_cache = ItemCache(len(catalogue), config.hidden_size, args.item_cache_age, args.device)
        self.add_callback(EpochCallback)
        self.cost = CostCallback()
        self.add_callback(self.cost)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def fill_store(self) -> None:
        """
        Compute the states of all items after the frozen blocks, as far as `args.activation_store` lacks them. Training
        and evaluation call it at their start.
        """
        if self.args.activation_store is None or self.store is not None:
            return
        with self.autocast_smart_context_manager():
            store = ActivationStore(
                self.args.activation_store,
                self.model,
                self.source,
                dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
            store.fill(
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                accelerator=self.accelerator,
            )
        self.store, self.source = store, store.source

    def prepare_model(self) -> None:
        """Give new projections their data-dependent start, see [`standardize_projections`]; `train` begins with it."""
        self.is_prepared = True
        keeps_own = has_adapter(self.model) and not has_own_projections(self.model)
        prepare = standardize_for if keeps_own else standardize_projections
        if self.source.processor is not None:
            with self.autocast_smart_context_manager(), whole_weights(self.model):
                prepare(self.model, self.source, seed=self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of training windows, of items as the store has them."""
        self.data_collator = self.make_collator()
        return super().get_train_dataloader()

    def make_collator(self) -> DataCollatorForNextItem:
        """What makes batches of training windows."""
        return DataCollatorForNextItem(
            self.source,
            self.model.config,
            log_popularity(self.train_counts),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        accelerator_args = super()._build_accelerator_args(**kwargs)
        accelerator_args.pop("dynamo_plugin", None)  # the blocks are compiled, not the whole model
        return accelerator_args

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self.item_cache is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = self.item_cache.leave_out(inputs, self.state.global_step)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.item_cache.update(inputs, outputs.item_embeds, self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        return self.accelerator.autocast()  # `Trainer` leaves it to the model's forward, but encoding calls others

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            model = model or self.model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))
            self.optimizer_cls_and_kwargs: Any = (optimizer_class, {**kwargs, "params": groups})
        return super().create_optimizer(model)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock estimate multiplies tokens by all parameters, images and users included

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As in `Trainer`; `resume_from_checkpoint=True` takes the newest checkpoint that was saved completely. With
        `load_best_model_at_end` and `eval_on_start`, our defaults, the start counts as an evaluation too: if nothing
        is better, the model ends as it began.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir} to resume from")
        if "image" in self.source.modalities and self.args.process_index == 0:
            self.source.catalogue.check_images()  # or a truncated one ends the run when a batch first has it
        before = load_evaluation(resume_from_checkpoint) if resume_from_checkpoint else {}
        self.reports = before.get("reports", self.reports)
        self.fill_store()
        self.prepare_model()
        self.train_seconds, self.train_started = before.get("run", {}).get("seconds", 0.0), time.time()
        processor = self.source.processor
        if processor is not None and processor.tokenizer is None:
            self.processing_class: Any = None  # or `Trainer` would align the special tokens of its tokenizer
        self.start: tuple[float, dict[str, torch.Tensor]] | None = None
        try:
            with self.alone():
                result = super().train(resume_from_checkpoint, **kwargs)
            self._return_to_start()
            return result
        finally:
            self.processing_class = self.callback_handler.processing_class
            self.train_seconds, self.train_started = self._seconds(), 0.0

    def _return_to_start(self) -> None:
        """Take the weights of the start again if no evaluation since was better."""
        if self.start is None or (self.state.best_metric is not None and self.state.best_metric > self.start[0]):
            return
        logger.warning(
            f"No evaluation was better than the start ({self.args.metric_for_best_model} {self.start[0]:.4f}): the "
            "model is what it was before training."
        )
        load_whole_weights(self.accelerator.unwrap_model(self.model), self.start[1])
        self.state.best_metric, self.state.best_model_checkpoint, self.state.best_global_step = self.start[0], None, 0

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.processing_class = self.callback_handler.processing_class  # to be saved with the checkpoints
        return super()._inner_training_loop(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Sequences | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Rank the last item of every sequence among the whole catalogue.

        Args:
            eval_dataset ([`Sequences`], *optional*): histories that end with their target; if not given, the
                validation sequences, or as many of them as `args.max_eval_users` says.
            ignore_keys: not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): put before the name of each metric.
        """
        started = time.time()
        sequences = self.eval_dataset if eval_dataset is None else eval_dataset
        report = self.report(
            sequences,
            "validation" if metric_key_prefix == "eval" else metric_key_prefix,
            baselines=False,
            max_users=self.args.max_eval_users if eval_dataset is None else None,
        )
        coverage = f"coverage@{LIST_LENGTH}"
        ranked = {**report["metrics"], coverage: report["recommendations"][coverage]}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in ranked.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=report["protocol"]["num_users"])
        keeps_best = self.args.load_best_model_at_end and not self.is_fsdp_enabled
        if self.is_in_train and self.state.global_step == 0 and keeps_best:
            value = metrics[f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"]
            self.start = (value, copy_of(self.accelerator.unwrap_model(self.model).state_dict()))
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def report(
        self,
        sequences: Sequences | None = None,
        split: str = "test",
        baselines: bool = True,
        content_vectors: torch.Tensor | None = None,
        max_users: int | None = None,
    ) -> dict[str, Any]:
        """
        Everything there is to say about the model on one split. The model card shows the last report of a split, and
        is rendered again if the model has been saved.

        Args:
            sequences ([`Sequences`], *optional*): histories that end with their target; the test sequences if not
                given.
            split (`str`, *optional*, defaults to `"test"`): what to call them; the report is kept as `reports[split]`.
            baselines (`bool`, *optional*, defaults to `True`): report what needs no training as well. The report
                of another model, such as the ID baseline, may be added to `reports[split]["baselines"]`.
            content_vectors (`torch.Tensor` of shape `(num_items, size)`, *optional*): for a baseline of content alone.
            max_users (`int`, *optional*): rank for so many users, drawn at random by the seed of the run; for all if
                not given.

        Returns:
            `dict`: see [`RankingEvaluator.evaluate`].
        """
        self.fill_store()
        targets = self.split.test if sequences is None else sequences
        evaluator = self.ranking_evaluator(targets, baselines, max_users, content_vectors)
        model = self.accelerator.unwrap_model(self.model)
        broadcast(list(model.buffers()))  # averages of batch norms, of which those of the first process are saved
        with self.autocast_smart_context_manager(), whole_weights(model):
            if not self.is_prepared:
                standardize_for(model, self.source, seed=self.args.seed)
                self.is_prepared = True
            item_embeds = encode_catalogue(
                model,
                self.source,
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                accelerator=self.accelerator,
            )
            report = evaluator.evaluate(model, item_embeds=item_embeds, accelerator=self.accelerator)
        self.reports[split] = report
        return report

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
        Render the model card from the run, and write it to `output_dir` with the small files that it is made of. What
        is said here once is kept for the cards that follow.

        Args:
            language, license (`str`, *optional*): of the model.
            tags (`str` or `list[str]`, *optional*): besides those that every card has.
            model_name (`str`, *optional*): name or Hub id of the model.
            finetuned_from (`str`, *optional*): the checkpoint it was trained from; the one it was loaded from if not
                given.
            dataset_tags (`str` or `list[str]`, *optional*): id of the Hub data set of the training.
            dataset, tasks, dataset_args: not used.
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
            self._describe(Path(self.args.output_dir))

    def _describe(self, folder: Path) -> None:
        """Write what a reader of the checkpoint has to know: arguments, statistics, reports, and the card of them."""
        model = self.accelerator.unwrap_model(self.model)
        parent = self.metadata.get("finetuned_from") or model.config._name_or_path
        arguments = json.loads(self.args.to_json_string())  # which hides the tokens
        run = {
            **describe_device(self.args.device),
            "num_processes": self.args.world_size,
            "seconds": round(self._seconds(), 1),
            "steps": self.state.global_step,
            "epochs": self.state.epoch or 0.0,
            "versions": versions(),
        }
        evaluation = {
            "reports": self.reports,
            "towers": towers_of_run(model.config),
            "finetuned_from": named_source(parent) if parent else None,
            "run": run,
            "arguments": non_default_arguments(arguments, TransRecTrainingArguments),
            "metadata": {"model_id": self.hub_model_id or Path(self.args.output_dir).resolve().name, **self.metadata},
        }
        files = {TRAINING_ARGS_NAME: arguments, STATISTICS_NAME: self.statistics, EVALUATION_NAME: evaluation}
        write_model_card(folder, model.config, files)

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """See [`data_statistics`]."""
        return data_statistics(self.catalogue, self.split)

    def _seconds(self) -> float:
        """Time spent in training, that of a resumed checkpoint included."""
        return self.train_seconds + (time.time() - self.train_started if self.train_started else 0.0)

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
        load_whole_weights(self.model, TransRecModel.from_pretrained(checkpoint).state_dict())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with written_whole(output_dir or self.args.output_dir, writes=self.args.should_save) as folder:
            with own_class(self.model):
                super()._save(str(folder), state_dict)
            if self.args.should_save:
                (folder / PICKLED_ARGS_NAME).unlink()  # a pickle; the same is written as JSON
                if needs_item_statistics(self.accelerator.unwrap_model(self.model)):
                    ItemStatistics(self.item_ids, self.train_counts).save(folder)
                self._describe(folder)
