"""Arguments of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SchedulerType

from ..errors import printable
from ..model.configuration_transrec import BOTTLENECK_PLACES
from .tuning import TUNINGS, resolve_tuning


RANKS = "evaluation ranks items and does not keep outputs of the model"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "average_tokens_across_devices": ((True,), "the loss is always that of the batches of all processes together"),
    "batch_eval_metrics": ((False,), RANKS),
    "bf16_full_eval": ((False,), "evaluation computes as training does: set bf16"),
    "ddp_static_graph": ((None, False), "a batch may lack a modality, so the graph is not always the same"),
    "debug": (([],), "a run stops at its first loss or gradient that is not finite, and names the step"),
    "deepspeed": ((None,), "models are sharded by FSDP: use examples/accelerate_configs/fsdp2.yaml"),
    "eval_accumulation_steps": ((None,), RANKS),
    "eval_do_concat_batches": ((True,), RANKS),
    "eval_use_gather_object": ((False,), RANKS),
    "fp16_full_eval": ((False,), "evaluation computes as training does: set fp16"),
    "include_for_metrics": (([],), "compute_metrics gets the recommended items and the targets"),
    "include_num_input_tokens_seen": (("no",), "a batch is made of items, and images have no tokens"),
    "label_names": ((None,), "targets are the next items of the sequences"),
    "label_smoothing_factor": ((0.0,), "no objective smooths its targets"),
    "length_column_name": (("length",), "users are drawn whatever the length of their sequences"),
    "liger_kernel_config": ((None,), "Liger has no kernels for this model"),
    "logging_nan_inf_filter": ((False,), "a run stops at its first loss that is not finite, and never hides it"),
    "neftune_noise_alpha": ((None,), "noise on tokens is for language models: set hidden_dropout_prob instead"),
    "optim_target_modules": ((None,), "it belongs to optimizers that make their own groups of parameters"),
    "parallelism_config": (
        (None,),
        "processes share the batch, not the model: start several processes, or shard the model by FSDP",
    ),
    "prediction_loss_only": ((False,), RANKS),
    "remove_unused_columns": ((False,), "sequences have no columns"),
    "train_sampling_strategy": (("random", "sequential"), "users are drawn whatever the length of their sequences"),
    "use_cache": ((False,), "nothing is generated token by token"),
    "use_liger_kernel": ((False,), "Liger has no kernels for this model"),
}
"""Arguments of `TrainingArguments` that have no effect here: the values that they may have, and the reason."""
OWN_GROUPS = ("adalomo", "apollo", "galore", "lomo")
"""Optimizers that make their own parameter groups, and so cannot give each part of a model its own rate."""


@dataclass
class TransRecTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with a learning rate and a weight decay for each part of the model, and other
    defaults.

    > [!NOTE]
    > Defaults that differ from `TrainingArguments`: `learning_rate=1e-3`, `per_device_train_batch_size=128`,
    > `num_train_epochs=10`, `eval_strategy="epoch"`, `save_strategy="epoch"`, `save_total_limit=2`,
    > `load_best_model_at_end=True`, `metric_for_best_model="ndcg@10"`, `eval_on_start=True`,
    > `remove_unused_columns=False`, `logging_nan_inf_filter=False`,
    > `restore_callback_states_from_checkpoint=True`. With `torch_compile=True` each block is compiled rather than the
    > whole model, see [`~TransRecModel.compile_blocks`]. Schedules that follow a metric know whether a higher value of
    > it is better. Arguments that would have no effect are refused, see [`~TransRecTrainingArguments.check`].

    Args:
        tower_learning_rate (`float`, *optional*, defaults to 1e-4): Peak learning rate of the towers.
        tower_weight_decay (`float`, *optional*, defaults to 0.0): Weight decay of the towers.
        projection_learning_rate (`float`, *optional*): Peak learning rate of pooling, projections and fusion;
            `learning_rate` if not given.
        projection_weight_decay (`float`, *optional*): Weight decay of the same parts; `weight_decay` if not given.
        trainable_blocks (`int`, *optional*): Blocks at the top of each tower that are trained. 0 freezes the towers;
            if not given, the whole towers are trained. The paper trains 2.
        tuning (`str`, *optional*): What is trained. Projections, priors, scales and ID vectors are trained in every
            mode but `"codes"`. `"full"`: everything. `"top_k_blocks"`: `trainable_blocks` of each tower. `"frozen"`:
            no tower. `"lora"`, `"dora"`, `"ia3"` or `"ln_tuning"`: an adapter of PEFT on towers and user encoder.
            `"bottleneck"`: the adapters of Houlsby et al., see [`~TransRecModel.add_bottlenecks`]. `"side"`: networks
            beside frozen towers, which do not run at all with an `activation_store`, see [`~TransRecModel.add_side`].
            `"codes"`: only the vectors of codes, as VQ-Rec does on a target. Adapters in towers learn at
            `tower_learning_rate`, for which 1e-3 is a good start.
        adapter_size (`int`, *optional*): Rank of `"lora"` and `"dora"` (8 if not given), or width of `"bottleneck"`
            (32) or `"side"` (64).
        bottleneck_places (`str`, *optional*, defaults to `"houlsby"`): Where `"bottleneck"` adapters are:
            `"houlsby"`, after attention and feed-forward layers, or `"pfeiffer"`, after feed-forward layers only.
        bottleneck_parallel (`bool`, *optional*, defaults to `False`): Whether these adapters read the inputs of the
            layers rather than their outputs.
        thin_checkpoints (`bool`, *optional*): Whether checkpoints leave out weights that the model was made with and
            that have not changed, see [`~TransRecModel.save_pretrained`]. `True`: all checkpoints and the model at the
            end. `False`: none. If not given: the checkpoints of a run with frozen blocks, but not the model at the
            end.
        activation_store (`str`, *optional*): Folder in which the states of the frozen blocks are computed once per
            item and kept, see [`ActivationStore`]; without it they are computed in every step.
        item_chunk_size (`int`, *optional*): Number of contents that are encoded at a time in a training step; they are
            encoded once more for the gradients. Memory then depends on the chunk rather than the batch.
        item_cache_age (`int`, *optional*): Number of steps for which histories use the vector of an item again, see
            [`ItemCache`]. For the objective `"cpc"`, where items of a history are not targets too.
        modality_dropout (`float`, *optional*, defaults to 0.0): In training, probability of hiding one modality of an
            item that has several, so that the model learns to do without it.
        max_eval_users (`int`, *optional*): Number of users for whom validation during training ranks the catalogue,
            drawn once at random; all if not given. Reports on the test targets always rank for all users.
        early_stopping_patience (`int`, *optional*): Number of evaluations without a better `metric_for_best_model`
            after which training stops.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the user encoder."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Users per device and step."})
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Number of users that are ranked, and of items that are encoded, at a time."}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "Epochs over the training sequences."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to rank the validation targets."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Number of checkpoints that are kept, besides the best one."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(
        default="ndcg@10", metadata={"help": "The metric that decides which checkpoint is best."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Evaluate before training, since the start may be the best."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false, since sequences have no columns."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false, since NaN ends a run."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Restore the number of evaluations without a gain from the checkpoint."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trainable parameter gets a gradient in every step."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Pin batches in host memory [with a GPU]."}
    )
    tower_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the towers."})
    tower_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the towers."})
    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of pooling, projections and fusion [learning_rate]."}
    )
    projection_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of pooling, projections and fusion [weight_decay]."}
    )
    trainable_blocks: int | None = field(
        default=None, metadata={"help": "Blocks trained at the top of each tower; 0 freezes them [all]."}
    )
    tuning: str | None = field(
        default=None,
        metadata={"help": "What is trained [everything, or what trainable_blocks says].", "choices": TUNINGS},
    )
    adapter_size: int | None = field(
        default=None, metadata={"help": "Rank or width of the adapters of tuning [8, bottleneck: 32, side: 64]."}
    )
    bottleneck_places: str = field(
        default="houlsby",
        metadata={"help": "Where adapters of tuning bottleneck are.", "choices": BOTTLENECK_PLACES},
    )
    bottleneck_parallel: bool = field(
        default=False, metadata={"help": "Adapters of tuning bottleneck read the inputs of layers, not their outputs."}
    )
    thin_checkpoints: bool | None = field(
        default=None,
        metadata={
            "help": "Checkpoints refer to unchanged weights instead of holding them [during a run with frozen blocks]."
        },
    )
    activation_store: str | None = field(
        default=None,
        metadata={"help": "Folder in which the states of frozen blocks are kept [they are computed in every step]."},
    )
    item_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Number of items that are encoded at a time in a training step, to save memory [all]."},
    )
    item_cache_age: int | None = field(
        default=None,
        metadata={"help": "For the objective cpc: steps for which histories use an item's vector again [never]."},
    )
    modality_dropout: float = field(
        default=0.0, metadata={"help": "Probability of hiding, in a batch, one modality of an item that has several."}
    )
    max_eval_users: int | None = field(
        default=None, metadata={"help": "Number of users for validation during training, drawn once [all]."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Number of evaluations without a gain after which training stops [never]."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # set explicitly, or bf16 would be refused
        if self.eval_strategy == "no":
            self.eval_on_start = False
        super().__post_init__()
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            given: dict[str, Any] = self.lr_scheduler_kwargs or {}  # type: ignore[has-type]
            self.lr_scheduler_kwargs = {"mode": self.better, **given}
        self.check()

    @property
    def best_metric(self) -> str:
        """The name of `metric_for_best_model` in the results of evaluations, e.g. `"eval_ndcg@10"`."""
        return f"eval_{(self.metric_for_best_model or 'ndcg@10').removeprefix('eval_')}"

    @property
    def better(self) -> str:
        """Whether a higher or a lower `metric_for_best_model` is better, `"max"` or `"min"`."""
        return "max" if self.greater_is_better else "min"

    def check(self) -> None:
        """
        Refuse arguments that are impossible, or would have no effect.

        Raises:
            `ValueError`: The message names the argument and what to do.
        """
        if any("\ud800" <= char <= "\udfff" for char in self.output_dir):
            raise ValueError(
                f"output_dir {printable(self.output_dir)} is not UTF-8, as names in its files must be: choose another"
            )
        for name, (possible, why) in REFUSED.items():
            if (value := getattr(self, name)) not in possible:
                raise ValueError(f"{name}={value!r} is not possible: {why}. Leave it out.")
        if self.optim.value.startswith(OWN_GROUPS):
            raise ValueError(
                f"optim={self.optim.value!r} makes its own parameter groups, and so cannot give each part of the "
                "model its own rate: use another one, such as 'adamw_torch'"
            )
        if getattr(self.accelerator_config, "dispatch_batches", None):
            raise ValueError("dispatch_batches is not possible: each process makes its batches itself. Leave it out.")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU: leave it out, or set bf16")
        if (mode := (self.lr_scheduler_kwargs or {}).get("mode", self.better)) != self.better:
            raise ValueError(
                f"a schedule with mode={mode!r} lowers the rate when the metric gets better: leave out mode"
            )
        if self.trainable_blocks is not None and self.trainable_blocks < 0:
            raise ValueError(f"trainable_blocks must be 0 or more, got {self.trainable_blocks}")
        self.trainable_blocks = resolve_tuning(self.tuning, self.trainable_blocks, self.adapter_size)
        if not 0 <= self.modality_dropout <= 1:
            raise ValueError(f"modality_dropout must be between 0 and 1, got {self.modality_dropout}")
        names = ("adapter_size", "item_chunk_size", "item_cache_age", "max_eval_users", "early_stopping_patience")
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.early_stopping_patience is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "early_stopping_patience counts evaluations, but eval_strategy is 'no': set it to 'epoch'"
            )
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            strategy = self.hub_strategy.value
            raise ValueError(
                f"hub_strategy={strategy!r} would push the optimizer as a pickle: use 'every_save' or 'end'"
            )
