"""What goes wrong in training is said in a sentence, at once: settings that do nothing, NaN, other checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import logging
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from testing_utils import (
    CHECKPOINTS,
    assert_same_weights,
    logged,
    make_catalogue,
    make_config,
    make_model,
    make_processor,
    make_sequences,
    make_split,
    make_trainer,
)
from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from transrec_hf import TransRecModel, TransRecTrainer, TransRecTrainingArguments
from transrec_hf.data.interactions import Split
from transrec_hf.errors import DataError, NotFinite
from transrec_hf.training.arguments import REFUSED
from transrec_hf.training.resuming import last_complete_checkpoint


def ids(**fields: Any) -> Any:
    """The quickest model there is."""
    return make_config("", num_items=12, **fields)


# Arguments

EVALUATES = {"eval_strategy": "epoch", "save_strategy": "epoch"}
WORKS: dict[str, Any] = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "auto_find_batch_size": False,  # needs a device that runs out of memory
    "bf16": True,
    "data_seed": 3,
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "dataloader_persistent_workers": False,  # with workers only, see test_trainer.py
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "eval_delay": 1,
    "eval_on_start": True,
    "eval_steps": 2,
    "eval_strategy": "steps",
    "gradient_accumulation_steps": 2,
    "greater_is_better": True,
    "ignore_data_skip": True,
    "learning_rate": 0.1,
    "load_best_model_at_end": True,
    "log_level": "error",
    "logging_first_step": True,
    "logging_steps": 2,
    "logging_strategy": "epoch",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "max_steps": 2,
    "metric_for_best_model": "hit_rate@5",
    "num_train_epochs": 1.5,
    "optim": "adafactor",
    "optim_args": "scale_parameter=False",
    "per_device_eval_batch_size": 3,
    "per_device_train_batch_size": 3,
    "report_to": "none",
    "restore_callback_states_from_checkpoint": False,
    "run_name": "a run",
    "save_only_model": True,
    "save_steps": 2,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "seed": 3,
    "skip_memory_metrics": False,
    "torch_empty_cache_steps": 2,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "warmup_steps": 2,
    "weight_decay": 0.1,
}
TOGETHER: dict[str, dict[str, Any]] = {
    "load_best_model_at_end": EVALUATES,
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "optim_args": {"optim": "adafactor"},
    "save_steps": {"save_strategy": "steps"},
}
ELSEWHERE = {
    "accelerator_config": "`dispatch_batches` is refused below",
    "dataloader_multiprocessing_context": "test_the_store_goes_to_workers_that_are_spawned",
    "dataloader_num_workers": "test_trainer.py",
    "dataloader_prefetch_factor": "of `DataLoader`, with workers",
    "ddp_backend": "test_distributed.py",
    "ddp_broadcast_buffers": "of DistributedDataParallel",
    "ddp_bucket_cap_mb": "of DistributedDataParallel",
    "ddp_find_unused_parameters": "of DistributedDataParallel",
    "ddp_timeout": "of DistributedDataParallel",
    "do_eval": "for scripts, as `Trainer` says",
    "do_predict": "for scripts, as `Trainer` says",
    "do_train": "for scripts, as `Trainer` says",
    "enable_jit_checkpoint": "of `Trainer`: it saves when the process is told to end",
    "fp16": "needs a GPU, refused below",
    "fsdp": "test_sharded_training.py",
    "fsdp_config": "test_sharded_training.py",
    "full_determinism": "of the whole process",
    "gradient_checkpointing": "the old name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the old name of activation_checkpointing_kwargs",
    "hub_always_push": "test_hub.py",
    "hub_model_id": "test_hub.py",
    "hub_private_repo": "test_hub.py",
    "hub_revision": "test_hub.py",
    "hub_strategy": "test_hub.py",
    "hub_token": "test_hub.py",
    "local_rank": "of the launcher",
    "log_level_replica": "test_distributed.py",
    "log_on_each_node": "of several machines",
    "output_dir": "every test",
    "project": "of a tracker",
    "push_to_hub": "test_hub.py",
    "resume_from_checkpoint": "for scripts, as `Trainer` says; see test_commands.py",
    "save_on_each_node": "of several machines",
    "tf32": "of NVIDIA's GPUs",
    "torch_compile": "test_trainer.py",
    "torch_compile_backend": "test_trainer.py",
    "torch_compile_mode": "of `torch.compile`",
    "trackio_bucket_id": "of a tracker",
    "trackio_space_id": "of a tracker",
    "trackio_static_space_id": "of a tracker",
}
BAD: dict[str, Any] = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "ddp_static_graph": True,
    "debug": "underflow_overflow",
    "deepspeed": {"train_batch_size": 4},
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "fp16_full_eval": True,
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "all",
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "logging_nan_inf_filter": True,
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": "all-linear",
    "parallelism_config": object(),
    "prediction_loss_only": True,
    "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length",
    "use_cache": True,
    "use_liger_kernel": True,
}


def test_each_argument_of_transformers_works_or_is_refused():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {*WORKS, *ELSEWHERE, *REFUSED} == names
    assert BAD.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", BAD)
def test_an_argument_that_would_do_nothing_is_refused(tmp_path, name):
    if name in ("deepspeed", "parallelism_config"):  # `TrainingArguments` itself asks for their packages first
        args = TransRecTrainingArguments(str(tmp_path), use_cpu=True)
        setattr(args, name, BAD[name])
        with pytest.raises(ValueError, match=rf"^{name}=.*Leave it out"):
            args.check()
        return
    with pytest.raises(ValueError, match=rf"^{name}=.*Leave it out"):
        TransRecTrainingArguments(str(tmp_path), use_cpu=True, **{name: BAD[name]})


@pytest.mark.parametrize("name", WORKS)
def test_an_argument_works(tmp_path, name):
    together = {
        "save_strategy": EVALUATES,
        "load_best_model_at_end": EVALUATES,
        "save_steps": {"save_strategy": "steps"},
    }
    together["save_strategy"] = {}
    more = {"lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"}, "optim_args": {"optim": "adafactor"}}
    options = {**together.get(name, {}), **more.get(name, {}), name: WORKS[name]}
    trainer = make_trainer(tmp_path, ids(), **{"num_train_epochs": 1, **options})
    trainer.train()
    assert trainer.state.global_step > 0
    assert all(np.isfinite(loss) for loss in logged(trainer).values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience must be 1 or more"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be 1 or more"),
        (
            {"early_stopping_patience": 1, "eval_strategy": "no", "load_best_model_at_end": False},
            "counts evaluations, but eval_strategy is 'no'",
        ),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"optim": "galore_adamw"}, "makes its own parameter groups"),
        ({"optim": "lomo"}, "makes its own parameter groups"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is not possible"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "min"}},
            "lowers the rate when the metric gets better",
        ),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TransRecTrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"output_dir .*\\xff is not UTF-8"):
        TransRecTrainingArguments(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), use_cpu=True)


@pytest.mark.parametrize(
    ("name", "better", "sentence"),
    [
        ("recall@10", None, "there are hit_rate@5"),
        ("ndcg@1O", None, "did you mean 'ndcg@10'"),
        ("eval_loss", None, "no evaluation has"),
        ("ndcg@10", False, "a higher ndcg@10 is better"),
    ],
)
def test_the_metric_is_checked_before_the_first_epoch(tmp_path, name, better, sentence):
    trainer = make_trainer(tmp_path, ids(), metric_for_best_model=name, greater_is_better=better, **EVALUATES)
    with pytest.raises(ValueError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_the_metric_raises_it(tmp_path, schedule):
    class Better(TransRecTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_ndcg@10": 0.1 * (1 + self.state.epoch)}

    trainer = make_trainer(
        tmp_path,
        ids(),
        trainer_class=Better,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_strategy="epoch",
        num_train_epochs=4,
    )
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"
    assert min(logged(trainer, "learning_rate").values()) == pytest.approx(0.01)  # it gets better, and nothing is cut


# Objects


def parts(folder: Path) -> dict[str, Any]:
    return {
        "model": make_model(ids()),
        "args": TransRecTrainingArguments(str(folder), use_cpu=True),
        "catalogue": make_catalogue(),
        "split": make_split(),
        "processing_class": None,
    }


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("catalogue", datasets.Dataset.from_dict({"item_id": ["a"]}), r"catalogue must be a Catalogue, not a Dataset"),
        ("split", make_sequences([[1, 2, 3]]), r"split must be a Split, not a Sequences: .*leave_one_out"),
        ("split", datasets.DatasetDict(), r"split must be a Split, not a DatasetDict"),
        ("args", TrainingArguments("x", use_cpu=True), r"args must be a TransRecTrainingArguments, not a Training"),
        ("args", None, r"args must be a TransRecTrainingArguments, not a NoneType"),
        ("model", torch.nn.Linear(1, 1), r"model must be a TransRecModel, not a Linear"),
        ("model", None, r"give either a model, or model_init"),
        ("processing_class", make_processor().tokenizer, r"processing_class must be a TransRecProcessor, not a Bert"),
        ("train_dataset", [1], r"takes no train_dataset: give split"),
        ("eval_dataset", [1], r"takes no eval_dataset: give split"),
        ("data_collator", print, r"takes no data_collator: .*get_train_dataloader"),
        ("compute_loss_func", print, r"takes no compute_loss_func: override compute_loss"),
        ("preprocess_logits_for_metrics", print, r"takes no preprocess_logits_for_metrics"),
        ("optimizer_cls_and_kwargs", (torch.optim.SGD, {"lr": 0.1}), r"each part of the model has its own lr"),
        ("model_init", make_model, r"give either a model, or model_init"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_wrong_objects_are_named(tmp_path, name, value, sentence):
    given = {**parts(tmp_path / "run"), name: value}
    with pytest.raises(TypeError, match=sentence):
        TransRecTrainer(given.pop("model"), given.pop("args"), **given)
    assert not (tmp_path / "run").exists()


def test_what_is_evaluated_is_sequences(tmp_path):
    trainer = make_trainer(tmp_path, ids())
    with pytest.raises(TypeError, match=r"must be a Sequences, not a Split: take split\.validation"):
        trainer.evaluate(trainer.split)


def test_an_optimizer_class_gets_the_rates_of_the_parts(tmp_path):
    given = parts(tmp_path)
    given["args"].learning_rate = 0.3
    model, args = given.pop("model"), given.pop("args")
    trainer = TransRecTrainer(model, args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}), **given)
    optimizer = trainer.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}


# Nothing to learn


@pytest.mark.parametrize(
    ("options", "users"),
    [({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}, 10), ({}, 1)],
    ids=["batch of one", "data of one"],
)
def test_batches_without_negatives_are_refused(tmp_path, options, users):
    with pytest.raises(ValueError, match="a batch has only one user, so nothing would be learned"):
        make_trainer(tmp_path, ids(), split=make_split(users, lengths=(5, 5)), **options)
    make_trainer(tmp_path, ids(objective="bce"), split=make_split(users, lengths=(5, 5)), **options).train()


def test_a_batch_size_that_was_found_to_be_one_is_refused(tmp_path, monkeypatch):
    def run_out(self, *args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate everything")

    monkeypatch.setattr(TransRecTrainer, "training_step", run_out)
    trainer = make_trainer(tmp_path, ids(), auto_find_batch_size=True, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="a batch has only one user"):
        trainer.train()


def test_a_batch_of_users_who_share_all_items_is_told_once(tmp_path, caplog):
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    lines = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3], [3, 4, 1, 2]]
    split = Split(make_sequences(lines), make_sequences(lines), make_sequences(lines))
    trainer = make_trainer(tmp_path, ids(), split=split)
    trainer.train()
    assert set(logged(trainer).values()) == {0.0}
    said = [record.message for record in caplog.records if "without negatives" in record.message]
    assert len(said) == 1
    assert "share all their items" in said[0]


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    model = make_model(ids())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"every parameter of the model is frozen.*requires_grad_\(True\)"):
        make_trainer(tmp_path, model=model)


def test_users_that_do_not_fill_a_batch_are_not_left_out_in_silence(tmp_path):
    with pytest.raises(ValueError, match="less than one batch, which dataloader_drop_last leaves out"):
        make_trainer(tmp_path, ids(), dataloader_drop_last=True, per_device_train_batch_size=100)


# Numbers that are not finite


def broken(kind: str) -> type[TransRecTrainer]:
    class Broken(TransRecTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if kind == "loss" and self.state.global_step == 3:
                loss = loss * torch.nan
            return (loss, outputs) if return_outputs else loss

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if kind == "gradient" and self.state.global_step == 3:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = torch.nan
            return loss

    return Broken


@pytest.mark.parametrize(("kind", "clip"), [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_nan_ends_the_run_before_it_reaches_the_weights(tmp_path, kind, clip):
    trainer = make_trainer(
        tmp_path, ids(), trainer_class=broken(kind), max_grad_norm=clip, save_strategy="steps", save_steps=2
    )
    with pytest.raises(NotFinite, match=rf"step 4: the .*{kind} is nan, at a learning rate of 0\.00625.*warmup_steps"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("way", ["save_model", "checkpoint"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, way):
    trainer = make_trainer(tmp_path, ids(), learning_rate=1e38, weight_decay=1e38, **CHECKPOINTS)
    if way == "checkpoint":
        with pytest.raises(NotFinite):
            trainer.train()
    else:
        next(trainer.model.parameters()).data[0] = torch.inf
        with pytest.raises(NotFinite, match=r"is not finite after 0 steps: the model is not saved"):
            trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


# Ranking


def test_predictions_are_a_ranking(tmp_path):
    trainer = make_trainer(tmp_path, ids())
    trainer.train()
    output = trainer.predict(trainer.split.test)
    sequences = trainer.split.test
    targets = sequences.items[sequences.ends - 1]
    assert output.predictions.shape == (len(sequences), 10)
    assert (output.label_ids == targets).all()
    hits = (output.predictions == targets[:, None]).any(axis=1).mean()
    assert output.metrics["test_hit_rate@10"] == pytest.approx(hits)
    assert output.metrics["test_hit_rate@10"] == trainer.evaluate(sequences)["eval_hit_rate@10"]
    for user, recommended in enumerate(output.predictions):
        history = sequences.items[sequences.starts[user] : sequences.ends[user] - 1]
        assert not set(recommended[recommended >= 0]) & set(history), "the history is not recommended again"
        assert len(set(recommended[recommended >= 0])) == (recommended >= 0).sum()
    assert not any("loss" in name for name in output.metrics)


def test_several_sets_are_evaluated_by_name(tmp_path):
    trainer = make_trainer(tmp_path, ids(), metric_for_best_model="late_mrr", eval_strategy="epoch")
    sets = {"early": trainer.split.validation, "late": trainer.split.test}
    metrics = trainer.evaluate(sets)
    for name, sequences in sets.items():
        assert metrics[f"eval_{name}_mrr"] == trainer.evaluate(sequences)["eval_mrr"]
    trainer.eval_dataset = sets
    trainer.train()
    assert trainer.state.best_metric == max(logged(trainer, "eval_late_mrr").values())
    assert trainer.evaluate("late")["eval_mrr"] == trainer.evaluate()["eval_late_mrr"]


def test_metrics_of_ones_own(tmp_path):
    given = parts(tmp_path)
    model, args = given.pop("model"), given.pop("args")

    def first(prediction):
        return {"first": float((prediction.predictions[:, 0] == prediction.label_ids).mean())}

    trainer = TransRecTrainer(model, args, compute_metrics=first, **given)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_first"] <= metrics["eval_hit_rate@5"]


# Several runs


def test_a_search_makes_a_new_model_and_optimizer_for_each_trial(tmp_path, monkeypatch):
    made, optimizers = [], []

    def model_init():
        made.append(make_model(make_config("text")))
        return made[-1]

    class Watched(TransRecTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            optimizers.append({round(group["lr"], 6) for group in optimizer.param_groups})
            assert {p for group in optimizer.param_groups for p in group["params"]} <= set(self.model.parameters())
            return optimizer

    stand_in = types.ModuleType("optuna")
    trial_class = type("BaseTrial", (types.SimpleNamespace,), {})
    stand_in.trial = types.SimpleNamespace(BaseTrial=trial_class)  # type: ignore[attr-defined]
    stand_in.__spec__ = importlib.machinery.ModuleSpec("optuna", None)
    monkeypatch.setitem(sys.modules, "optuna", stand_in)
    trainer = Watched(
        None,
        TransRecTrainingArguments(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=5, num_train_epochs=1, report_to="none"
        ),
        catalogue=make_catalogue(kinds=("text",)),
        split=make_split(),
        processing_class=make_processor("text"),
        model_init=model_init,
    )
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    trainer.compute_objective = lambda metrics: metrics["eval_ndcg@10"]
    rates = [0.01, 0.002, 0.0005]
    for number, rate in enumerate(rates):
        space = {"learning_rate": rate, "tower_learning_rate": rate / 10, "trainable_blocks": 1 + number % 2}
        trainer.args.trainable_blocks = 1
        trainer.train(trial=trial_class(number=number, params=space))
        frozen = [
            p for p in trainer.model.item_encoder.text_model.encoder.layer[0].parameters() if not p.requires_grad
        ]
        assert bool(frozen) == (number % 2 == 0)
    assert optimizers == [{rate, rate / 10} for rate in rates]
    assert len({id(model) for model in made}) == 4  # and the first one, to look at


def test_a_search_optimises_the_metric_of_the_best_model(tmp_path, monkeypatch):
    asked: dict[str, object] = {}

    def search(self, hp_space, compute_objective, n_trials, direction, **kwargs):
        asked.update(direction=direction, value=compute_objective({"eval_ndcg@10": 0.5, "eval_mrr": 0.1}))

    monkeypatch.setattr(transformers.Trainer, "hyperparameter_search", search)
    trainer = make_trainer(tmp_path, ids())
    trainer.hyperparameter_search()
    assert asked == {"direction": "maximize", "value": 0.5}
    with pytest.raises(ValueError, match="needs a direction"):
        trainer.hyperparameter_search(compute_objective=len)


def test_a_second_run_trains_what_is_trainable_then(tmp_path):
    trainer = make_trainer(
        tmp_path, make_config("text"), trainable_blocks=1, catalogue=make_catalogue(kinds=("text",))
    )
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.freeze_towers(None)
    trainer.args.learning_rate = 0.02
    trainer.train()
    assert max(group["initial_lr"] for group in trainer.optimizer.param_groups) == 0.02
    name = "item_encoder.text_model.encoder.layer.0.output.dense.weight"
    assert not torch.equal(trainer.model.state_dict()[name], before[name])


# Going on from a checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, ids(), **CHECKPOINTS).train()
    return folder


def resume(run: Path, config: Any = None, checkpoint: Any = True, **options: Any) -> TransRecTrainer:
    trainer = make_trainer(run, config or ids(), num_train_epochs=3, **{**CHECKPOINTS, **options})
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1, and cannot be resumed with 2"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size=4, and cannot be resumed with 3"),
        ({"optim": "sgd"}, "optim=adamw_torch_fused, and cannot be resumed with sgd"),
        ({"learning_rate": 0.5}, "learning_rate=0.01, and cannot be resumed with 0.5"),
        ({"seed": 7}, "seed=42, and cannot be resumed with 7"),
        ({"warmup_steps": 2}, "warmup_steps=0, and cannot be resumed with 2"),
        ({"trainable_blocks": 1}, "trainable_blocks=None, and cannot be resumed with 1"),
        (
            {"config": ids(hidden_size=32)},
            r"holds another model\. .* has the shape \(.*16.* there and has the shape \(.*32.* here",
        ),
        ({"config": ids(num_hidden_layers=3)}, r"holds another model\. .* is missing there"),
        ({"checkpoint": "nowhere/checkpoint-3"}, "there is no such folder"),
    ],
    ids=str,
)
def test_another_run_cannot_go_on(run, options, sentence):
    with pytest.raises(DataError, match=sentence):
        resume(run, **options)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_without_a_part_is_not_complete(run, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    first, last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (last / name).unlink()
    assert last_complete_checkpoint(folder) == str(first)
    with pytest.raises(DataError, match=rf"{re.escape(name)} is missing or damaged.*from_pretrained"):
        resume(folder, checkpoint=str(last))
    with pytest.raises(DataError, match=r"is the folder of a run, not of a checkpoint\. Give one, such as"):
        resume(folder, checkpoint=str(folder))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_damaged_state_is_named(run, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    last = last_complete_checkpoint(folder)
    assert last is not None
    file = Path(last) / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="of its optimizer or schedule does not fit this run, or is damaged"):
        resume(folder)


def test_weights_alone_start_no_run(tmp_path):
    make_trainer(tmp_path, ids(), save_only_model=True, **CHECKPOINTS).train()
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resume(tmp_path)


def test_other_processes_cannot_go_on(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    last = Path(last_complete_checkpoint(folder) or "")
    shutil.copy(last / "rng_state.pth", last / "rng_state_0.pth")
    (last / "rng_state.pth").rename(last / "rng_state_1.pth")
    with pytest.raises(DataError, match="was saved by 2 processes, and 1 resume"):
        resume(folder)


def test_more_epochs_may_follow(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert resume(folder).state.epoch == 3


def test_weights_are_restored_as_they_were(run):
    trainer = make_trainer(run, ids(), **CHECKPOINTS)
    checkpoint = last_complete_checkpoint(run)
    trainer._load_from_checkpoint(checkpoint)
    assert_same_weights(trainer.model, TransRecModel.from_pretrained(checkpoint))


# The console


def test_progress_bars_can_be_turned_off(tmp_path, capfd):
    def bars(**options: Any) -> str:
        trainer = make_trainer(tmp_path, make_config(), trainable_blocks=1, **options)
        transformers.logging.enable_progress_bar()
        try:
            trainer.fill_store()
        finally:
            transformers.logging.disable_progress_bar()
        return capfd.readouterr().err

    assert "Storing frozen states" in bars(disable_tqdm=False, activation_store=str(tmp_path / "one"))
    assert bars(disable_tqdm=True, activation_store=str(tmp_path / "two")) == ""
