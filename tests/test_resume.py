"""A run that is stopped and resumed is the run that was never stopped: same losses, same weights, bit for bit."""

from __future__ import annotations

import csv

import pytest
import torch
from testing_utils import (
    CHECKPOINTS,
    VISION_TOWERS,
    assert_same_weights,
    load_example,
    logged,
    make_catalogue,
    make_config,
    make_paper_config,
    make_trainer,
)
from transformers import TrainerCallback

from transrec_hf import TransRecTrainer
from transrec_hf.training.resuming import last_complete_checkpoint


class Stopped(Exception):
    """What a run dies of here."""


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
RUNS = {
    "dropout": (lambda: make_config(**DROPOUT), {}),
    "negatives": (lambda: make_config(objective="bce", **DROPOUT), {}),
    "paper": (lambda: make_paper_config(**DROPOUT), {"per_device_train_batch_size": 3}),
    "batch statistics": (lambda: make_config("image", vision_config=VISION_TOWERS["resnet"]()), {}),
    "frozen towers": (lambda: make_config(**DROPOUT), {"trainable_blocks": 1}),
    "accumulation": (
        lambda: make_config(**DROPOUT),
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ),
    "workers that stay": (
        lambda: make_config("text", objective="bce"),
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ),
    "evaluations": (
        lambda: make_config(objective="bce", **DROPOUT),
        {"eval_strategy": "steps", "eval_steps": 2},
    ),
    "ids": (lambda: make_config("", num_items=12, objective="bce", **DROPOUT), {}),
}
SLOW_RUNS = {
    "sampled softmax": (lambda: make_config(objective="sampled_softmax"), {}),
    "mobilenet": (lambda: make_config("image", vision_config=VISION_TOWERS["mobilenet_v2"]()), {}),
    "workers": (lambda: make_config(objective="bce"), {"dataloader_num_workers": 2}),
    "bf16": (lambda: make_config(**DROPOUT), {"bf16": True}),
    "gradient checkpointing": (lambda: make_config(**DROPOUT), {"gradient_checkpointing": True}),
}


def start(folder, config, **options) -> TransRecTrainer:
    """Two epochs of four steps."""
    catalogue = make_catalogue(kinds=config.modalities) if len(config.modalities) == 1 else None
    return make_trainer(folder, config, catalogue=catalogue, **options)


def assert_resumes(folder, make, options, stop) -> None:
    """Stops a run with a checkpoint every two steps at the step `stop`."""
    unbroken = start(folder / "unbroken", make(), **options)
    unbroken.train()
    assert unbroken.state.global_step == 8
    saving = {"save_strategy": "steps", "save_steps": 2, **options}
    with pytest.raises(Stopped):
        start(folder / "broken", make(), callbacks=[StopAt(stop)], **saving).train()
    assert last_complete_checkpoint(folder / "broken").endswith(f"-{stop // 2 * 2}")
    torch.manual_seed(1234)  # whatever the process has drawn since
    resumed = start(folder / "broken", make(), **saving)
    resumed.train(resume_from_checkpoint=True)
    for name in ("loss", "grad_norm", "eval_ndcg@10"):
        assert logged(resumed, name) == logged(unbroken, name)
    assert_same_weights(resumed.model, unbroken.model)
    assert_same_optimizers(resumed, unbroken)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_unbroken_run(tmp_path, name):
    assert_resumes(tmp_path, *RUNS[name], stop=7)


def test_a_run_stopped_in_its_first_epoch_equals_the_unbroken_run(tmp_path):
    assert_resumes(tmp_path, *RUNS["negatives"], stop=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_RUNS)
def test_another_resumed_run_equals_the_unbroken_run(tmp_path, name):
    assert_resumes(tmp_path, *SLOW_RUNS[name], stop=7)


def assert_same_optimizers(one: TransRecTrainer, other: TransRecTrainer) -> None:
    states = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for row, state in states[0].items():
        assert all(torch.equal(value, states[1][row][name]) for name, value in state.items())


def test_patience_survives_a_resume(tmp_path):
    """Evaluations without gain before the stop count after it."""
    options = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "num_train_epochs": 6,
        "early_stopping_patience": 3,
        "learning_rate": 1e-12,  # nothing is learned, so nothing gets better
        "tower_learning_rate": 1e-12,
    }
    config = make_config("", num_items=12)
    unbroken = make_trainer(tmp_path / "unbroken", config, **options)
    unbroken.train()
    steps = unbroken.state.global_step // 4
    with pytest.raises(Stopped):
        make_trainer(tmp_path / "broken", config, callbacks=[StopAt(3 * steps)], **options).train()
    resumed = make_trainer(tmp_path / "broken", config, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == unbroken.state.global_step == 4 * steps


def test_a_finished_run_resumes_to_itself(tmp_path):
    trainer = make_trainer(tmp_path, **CHECKPOINTS)
    trainer.train()
    again = make_trainer(tmp_path, **CHECKPOINTS)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == trainer.state.global_step
    assert_same_weights(again.model, trainer.model)


def test_a_run_killed_at_random_steps_equals_the_unbroken_run(tmp_path):
    """The scripted proof in small: one SIGKILL, few steps, forks rather than fresh processes."""
    example = load_example("kill_and_resume")
    arguments = example.KillAndResumeArguments(
        kills=1, max_steps=12, save_steps=2, seed=1, output=str(tmp_path / "out.csv"), start_method="fork"
    )
    assert example.kill_and_resume(arguments)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert {row["bit_equal"] for row in rows} == {"True"}
    assert {int(row["process"]) for row in rows} == {1, 2}
    assert {int(row["step"]) for row in rows} == set(range(1, 13))
    assert all(row["command"] and row["seed"] == "1" and row["machine"] for row in rows)
