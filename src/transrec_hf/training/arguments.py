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


RANKS = "evaluation ranks items, and keeps no outputs of the model"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "average_tokens_across_devices": ((True,), "the objective is always that of the batch of all processes"),
    "batch_eval_metrics": ((False,), RANKS),
    "bf16_full_eval": ((False,), "evaluation computes as training does: set bf16"),
    "ddp_static_graph": ((None, False), "a batch may lack a modality, so the graph is not always the same"),
    "debug": (([],), "a run stops at its first loss or gradient that is not finite, and names the step"),
    "deepspeed": ((None,), "models are sharded by FSDP: take examples/accelerate_configs/fsdp2.yaml"),
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
    "logging_nan_inf_filter": ((False,), "a run stops at its first loss that is not finite, and hides none"),
    "neftune_noise_alpha": ((None,), "noise on tokens is made for language models: set hidden_dropout_prob"),
    "optim_target_modules": ((None,), "it belongs to optimizers that make their own groups of parameters"),
    "parallelism_config": ((None,), "processes share the batch, not the model: start several, or shard it by FSDP"),
    "prediction_loss_only": ((False,), RANKS),
    "remove_unused_columns": ((False,), "sequences have no columns"),
    "train_sampling_strategy": (("random", "sequential"), "users are drawn whatever the length of their sequences"),
    "use_cache": ((False,), "nothing is generated token by token"),
    "use_liger_kernel": ((False,), "Liger has no kernels for this model"),
}
"""Arguments of `TrainingArguments` that mean nothing here: the values that they may have, and why no other."""
OWN_GROUPS = ("adalomo", "apollo", "galore", "lomo")
"""Optimizers that make their own groups of parameters, and so cannot give each part of a model its rate."""


@dataclass
class TransRecTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with a rate and a decay for each part of the model, and other defaults.

    > [!NOTE]
    > Defaults that differ from `TrainingArguments`: `learning_rate=1e-3`, `per_device_train_batch_size=128`,
    > `num_train_epochs=10`, `eval_strategy="epoch"`, `save_strategy="epoch"`, `save_total_limit=2`,
    > `load_best_model_at_end=True`, `metric_for_best_model="ndcg@10"`, `eval_on_start=True`,
    > `remove_unused_columns=False`, `logging_nan_inf_filter=False`,
    > `restore_callback_states_from_checkpoint=True`. With `torch_compile=True` each block is compiled, see
    > [`~TransRecModel.compile_blocks`], and not the whole model. Schedules that follow a metric raise it where more of
    > it is better. What would do nothing is refused, see [`~TransRecTrainingArguments.check`].

    Args:
        tower_learning_rate (`float`, *optional*, defaults to 1e-4): Peak rate of the text and vision towers.
        tower_weight_decay (`float`, *optional*, defaults to 0.0): Decay of the towers.
        projection_learning_rate (`float`, *optional*): Peak rate of pooling, projections and fusion; `learning_rate`
            if not given.
        projection_weight_decay (`float`, *optional*): Their decay; `weight_decay` if not given.
        trainable_blocks (`int`, *optional*): Blocks at the top of each tower that are trained: 0 freezes the towers,
            not giving it trains them whole. The paper trains 2.
        tuning (`str`, *optional*): What is trained, beside projections, priors, scales and ID vectors, which always
            are: `"full"`, everything; `"top_k_blocks"`, `trainable_blocks` of each tower; `"frozen"`, no tower;
            `"lora"`, `"dora"`, `"ia3"` or `"ln_tuning"`, an adapter of PEFT on towers and user encoder;
            `"bottleneck"`, the adapters of Houlsby et al., see [`~TransRecModel.add_bottlenecks`]; `"side"`, networks
            beside frozen towers, which do not run at all with an `activation_store`, see [`~TransRecModel.add_side`];
            `"codes"`, the vectors of codes and nothing else, as VQ-Rec fine-tunes on a target. Adapters in towers
            learn at `tower_learning_rate`, for which 1e-3 is a good start.
        adapter_size (`int`, *optional*): Rank of `"lora"` and `"dora"`, 8 if not given, or width of `"bottleneck"`,
            32, or `"side"`, 64.
        bottleneck_places (`str`, *optional*, defaults to `"houlsby"`): Where `"bottleneck"` adapters are:
            `"houlsby"`, after attention and feed-forward layers, or `"pfeiffer"`, after the latter.
        bottleneck_parallel (`bool`, *optional*, defaults to `False`): They read what these layers read, and not what
            they say.
        thin_checkpoints (`bool`, *optional*): Leave out of checkpoints the weights that the model was made with and
            that have not changed, see [`~TransRecModel.save_pretrained`]: of all, the model at the end included; of
            none; or, if not given, of those of a run whose towers are frozen, in whole or in part, and not of the
            model at the end.
        activation_store (`str`, *optional*): Folder where the states of the frozen blocks are computed once per item
            and kept, see [`ActivationStore`]; without it they are computed in every step.
        item_chunk_size (`int`, *optional*): Texts, and images, that are encoded at a time in a training step; their
            activations are computed again for the gradients. Memory then depends on the chunk and not on the batch,
            for one more forward pass.
        item_cache_age (`int`, *optional*): Steps for which an item's vector is read again in histories, see
            [`ItemCache`]. For the objective `"cpc"`, where items of a history are not targets as well.
        modality_dropout (`float`, *optional*, defaults to 0.0): In training, probability with which one modality of an
            item that has several is hidden from a batch, so that each learns to do without the others.
        max_eval_users (`int`, *optional*): Users for whom validation during training ranks the catalogue, drawn once
            at random; all if not given. Reports of the test targets always rank for all users.
        early_stopping_patience (`int`, *optional*): Evaluations without a better `metric_for_best_model` after which
            training stops.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the user encoder."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Users per device and step."})
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Users and items ranked or encoded at once."}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the training sequences."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to rank the validation targets."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one besides."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "What 'best' means."})
    eval_on_start: bool = field(default=True, metadata={"help": "Rank before training: the start may be the best."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: there are no columns."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false: NaN ends a run."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Go on counting evaluations without gain where the checkpoint was."}
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
        metadata={"help": "What is trained [everything, or as trainable_blocks says].", "choices": TUNINGS},
    )
    adapter_size: int | None = field(
        default=None, metadata={"help": "Rank or width of the adapters of tuning [8, bottleneck: 32, side: 64]."}
    )
    bottleneck_places: str = field(
        default="houlsby",
        metadata={"help": "Where adapters of tuning bottleneck are.", "choices": BOTTLENECK_PLACES},
    )
    bottleneck_parallel: bool = field(
        default=False, metadata={"help": "They read what the layers read, not what these say."}
    )
    thin_checkpoints: bool | None = field(
        default=None,
        metadata={"help": "Checkpoints name unchanged weights instead of holding them [while training, if frozen]."},
    )
    activation_store: str | None = field(
        default=None, metadata={"help": "Folder that keeps the states of the frozen blocks [computed in every step]."}
    )
    item_chunk_size: int | None = field(
        default=None, metadata={"help": "Items encoded at a time in a training step, to save memory [all]."}
    )
    item_cache_age: int | None = field(
        default=None, metadata={"help": "Steps for which histories read an item's vector again, for cpc [never]."}
    )
    modality_dropout: float = field(
        default=0.0, metadata={"help": "Probability to hide, in a batch, one modality of an item that has several."}
    )
    max_eval_users: int | None = field(
        default=None, metadata={"help": "Users drawn for validation during training, always the same [all]."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without gain after which training stops [never]."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # said aloud, or bf16 would be refused
        if self.eval_strategy == "no":
            self.eval_on_start = False
        super().__post_init__()
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            given: dict[str, Any] = self.lr_scheduler_kwargs or {}  # type: ignore[has-type]
            self.lr_scheduler_kwargs = {"mode": self.better, **given}
        self.check()

    @property
    def best_metric(self) -> str:
        """What evaluations call `metric_for_best_model`, e.g. `"eval_ndcg@10"`."""
        return f"eval_{(self.metric_for_best_model or 'ndcg@10').removeprefix('eval_')}"

    @property
    def better(self) -> str:
        """Whether more or less of `metric_for_best_model` is better, `"max"` or `"min"`."""
        return "max" if self.greater_is_better else "min"

    def check(self) -> None:
        """
        Refuse what cannot be done, or would do nothing.

        Raises:
            `ValueError`: With the argument and the mend.
        """
        if any("\ud800" <= char <= "\udfff" for char in self.output_dir):
            raise ValueError(
                f"output_dir {printable(self.output_dir)} is not UTF-8, as its files are: name another one"
            )
        for name, (possible, why) in REFUSED.items():
            if (value := getattr(self, name)) not in possible:
                raise ValueError(f"{name}={value!r} is not possible: {why}. Leave it out.")
        if self.optim.value.startswith(OWN_GROUPS):
            raise ValueError(
                f"optim={self.optim.value!r} makes its own groups of parameters, and so cannot give each part of the "
                "model its rate: take 'adamw_torch', say"
            )
        if getattr(self.accelerator_config, "dispatch_batches", None):
            raise ValueError("dispatch_batches is not possible: each process makes its batches itself. Leave it out.")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU: leave it out, or set bf16")
        if (mode := (self.lr_scheduler_kwargs or {}).get("mode", self.better)) != self.better:
            raise ValueError(f"a schedule with mode={mode!r} cuts the rate when the metric gets better: leave it out")
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
            raise ValueError("early_stopping_patience counts evaluations, and eval_strategy is 'no': set 'epoch'")
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            strategy = self.hub_strategy.value
            raise ValueError(
                f"hub_strategy={strategy!r} would push the optimizer as a pickle: use 'every_save' or 'end'"
            )
