"""`transrec finetune`: what it starts from, said and kept, and ID vectors beside content."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from testing_utils import QUICK

from transrec_hf import DataError, TransRecTrainer
from transrec_hf.commands.runs import finetune
from transrec_hf.publishing.checkpoint import load_checkpoint
from transrec_hf.training.transfer import AUTO_INITS


pytestmark = pytest.mark.usefixtures("workplace")


def test_validation_chooses_the_start(capsys):
    report = finetune(["source", "--data", "demo:target", "--hybrid", "--output_dir", "auto", *QUICK])
    start = report["start"]
    assert set(start["values"]) == {*AUTO_INITS} - {"scratch"}, "the towers of this source were not trained"
    assert start["init"] == "none" or start["values"][start["init"]] == max(start["values"].values())
    assert start["standardized"] == ["text", "image"]
    printed = capsys.readouterr().out
    assert f"Started from {start['init']}: from the checkpoint" in printed and "On validation" in printed
    assert json.loads(open("auto/report.json").read())["start"] == start
    model, _ = load_checkpoint("auto")
    assert model.config.num_items == 40
    resumed = finetune(["source", "--data", "demo:target", "--hybrid", "--output_dir", "auto", "--resume", *QUICK])
    assert resumed["start"] == start


def test_a_short_run_is_no_longer_than_the_run_itself(monkeypatch):
    """Whose length may be given in steps."""
    steps, train = [], TransRecTrainer.train

    def counted(trainer, **kwargs):
        train(trainer, **kwargs)
        steps.append(trainer.state.global_step)

    monkeypatch.setattr(TransRecTrainer, "train", counted)
    finetune(["source", "--data", "demo:target", "--output_dir", "steps", *QUICK, "--max_steps", "2"])
    assert steps == [2] * len(AUTO_INITS), "all starts but scratch, and the run"


def test_without_training_validation_chooses_what_is_kept():
    """Zero-shot, as far as the source helps: nothing is trained, and the model that is saved is a start."""
    quick = [*QUICK, "--num_train_epochs", "0"]
    report = finetune(["source", "--data", "demo:target", "--output_dir", "chosen", *quick])
    values, init = report["start"]["values"], report["start"]["init"]
    asked = finetune(["source", "--data", "demo:target", "--output_dir", "asked", "--init", init, *quick])
    assert asked["metrics"] == report["metrics"] and set(values) == {
        "none",
        "half",
        "user_encoder",
        "item_encoder",
        "all",
    }
    source, chosen = load_checkpoint("source")[0], load_checkpoint("chosen")[0]
    same = torch.equal(source.user_encoder.final_norm.weight, chosen.user_encoder.final_norm.weight)
    assert same == (init in ("all", "user_encoder"))


@pytest.mark.parametrize("options", [QUICK, QUICK[:-2], QUICK[:-4]], ids=["with store", "frozen", "trained"])
def test_a_store_is_advised_where_towers_are_frozen(options, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.INFO)
    quick = [*options, "--max_steps", "1", "--output_dir", str(tmp_path)]
    finetune(["source", "--data", "demo:target", "--init", "all", *quick])
    assert ("with --activation_store FOLDER" in caplog.text) == (options == QUICK[:-2])


def test_a_start_can_be_asked_for():
    report = finetune(["source", "--data", "demo:target", "--init", "user_encoder", "--output_dir", "asked", *QUICK])
    assert report["start"]["init"] == "user_encoder" and report["start"]["values"] == {}
    assert "user_encoder" in report["start"]["loaded"] and "item_encoder.text_projection" in report["start"]["new"]


@pytest.mark.parametrize(("tuning", "starts"), [("lora", 0), ("bottleneck", 5), ("side", 5)])
def test_starts_of_a_model_with_adapters(tuning, starts):
    """Adapters of PEFT go on the whole checkpoint, without which they are saved; others are of any start."""
    options = [option for option in QUICK if option not in ("--trainable_blocks", "0", "--activation_store", "store")]
    report = finetune(["source", "--data", "demo:target", "--tuning", tuning, "--output_dir", tuning, *options])
    assert len(report["start"]["values"]) == starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init", "some"), "invalid choice: 'some'"),
        (("--init", "features"), "init is 'features', but must be one of 'all', 'half'"),
        (("--init_epochs", "-1"), "init_epochs must be at least 0"),
    ],
)
def test_bad_starts_are_refused_before_anything_runs(options, message, tmp_path):
    with pytest.raises(DataError, match=message):
        finetune(["source", "--data", "demo:target", "--output_dir", str(tmp_path / "bad"), *options, *QUICK])
    assert not (tmp_path / "bad").exists()
