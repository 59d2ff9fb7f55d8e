"""The programs in `examples/`: they run one after the other, and the explicit loop trains as the trainer does."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from testing_utils import in_processes, load_example, logged
from transformers import set_seed

from transrec_hf import (
    Recommender,
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
)
from transrec_hf.data import demo
from transrec_hf.data.demo import demo_config, demo_processor, demo_world


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A demo world of a few dozen items and users, in an empty folder."""
    monkeypatch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
    monkeypatch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=30))
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a program asks for, it trains for one."""
    init = TransRecTrainingArguments.__init__

    def short(self: TransRecTrainingArguments, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "num_train_epochs": 1})

    monkeypatch.setattr(TransRecTrainingArguments, "__init__", short)


def test_the_examples_run_one_after_the_other(one_epoch: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("pretrain", "finetune", "finetune_no_trainer", "recommend"):
        load_example(name).main()
    printed = capsys.readouterr().out
    assert printed.count("popularity") == 2 and "zero-shot" in printed and printed.count("is recommended") == 3
    made = {"pretrain", "finetune", "finetune_no_trainer", "recommender"}
    assert made == {path.name for path in (tmp_path / "runs").iterdir()}
    TransRecModel.from_pretrained("runs/finetune_no_trainer")
    assert Recommender.from_pretrained("runs/recommender").recommend(["target-item-0001"], k=1)


@pytest.mark.parametrize("name", ["sounds", "videos"])
def test_sounds_and_videos_are_recommended(
    name: str, one_epoch: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("av")
    load_example(name).main()
    printed = capsys.readouterr().out
    assert printed.count("target-item-") == 5 and "ndcg@10" in printed
    assert (tmp_path / "runs" / name / "README.md").is_file()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(Path(__file__).parents[1] / "examples" / "first_steps.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not kept: they grow old"
    source = str(Path(__file__).parents[1] / "src")
    kernel = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=kernel)
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    text = "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in shown)
    values = dict(re.findall(r"^(from the source|from scratch|popularity) +[\d.]+ +([\d.]+)$", text, re.M))
    assert float(values["from the source"]) > float(values["popularity"]) > 0
    assert "target-item-" in text and not [out for out in shown if out.output_type == "error"]


@pytest.mark.slow
def test_a_search_goes_on_where_it_was(one_epoch: None, capsys: pytest.CaptureFixture) -> None:
    optuna = pytest.importorskip("optuna")
    example = load_example("search")
    assert 0 <= example.main(n_trials=1).objective <= 1
    again = example.main(n_trials=1)
    assert {"learning_rate", "tower_learning_rate", "trainable_blocks", "num_hidden_layers"} <= set(
        again.hyperparameters
    )
    trials = optuna.load_study(study_name="demo", storage="sqlite:///runs/search.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert trials[0].params != trials[1].params and capsys.readouterr().out.count("best ndcg@10") == 2


def arguments(folder: str, **options: Any) -> TransRecTrainingArguments:
    """Ten steps and more over several epochs: batches, dropout, negatives, rates, decay and clipping count."""
    settings = {
        "seed": 3,
        "num_train_epochs": 4,
        "warmup_steps": 3,
        "trainable_blocks": 1,
        "learning_rate": 5e-3,
        "tower_learning_rate": 1e-3,
        "weight_decay": 0.1,
        "tower_weight_decay": 0.05,
        "per_device_train_batch_size": 10,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TransRecTrainingArguments(folder, **{**settings, **options})


def losses_of_loop_and_trainer(objective: str, **options: Any) -> tuple[list[float], list[float]]:
    platform = demo_world().target
    catalogue, split = platform.catalogue, leave_one_out(platform.sequences)
    models = []
    for _ in range(2):
        set_seed(0)
        models.append(TransRecModel(demo_config(objective=objective)))
    loop = load_example("finetune_no_trainer")
    losses = loop.train(models[0], demo_processor(), catalogue, split, arguments("loop", **options))
    trainer = TransRecTrainer(
        models[1],
        arguments("trainer", **options),
        catalogue=catalogue,
        split=split,
        processing_class=demo_processor(),
    )
    trainer.train()
    return losses, list(logged(trainer).values())


@pytest.mark.parametrize("objective", ["in_batch", "bce", "cpc"])
def test_loop_and_trainer_have_the_same_losses(objective: str) -> None:
    losses, expected = losses_of_loop_and_trainer(objective)
    assert len(losses) >= 10 and len(set(losses)) == len(losses)
    assert losses == expected


@pytest.mark.slow
def test_loop_and_trainer_have_the_same_losses_in_two_processes(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 5}
    results = in_processes(_small, 2, tmp_path, options)
    for losses, expected in results:
        assert len(losses) >= 10
        assert np.allclose(losses, expected, atol=1e-6)


def _small(options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """In a fresh process, which has the whole demo world."""
    torch.use_deterministic_algorithms(False)
    demo.TARGET = dataclasses.replace(demo.TARGET, num_items=40, num_users=30)
    return losses_of_loop_and_trainer("bce", **options)
