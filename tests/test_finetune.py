"""`transrec finetune`: what it starts from, said and kept, and ID vectors beside content."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from testing_utils import QUICK

from transrec_hf import DataError, ItemSource, TransRecTrainer
from transrec_hf.commands.evaluate import evaluate
from transrec_hf.commands.runs import finetune
from transrec_hf.commands.transfer import transfer_report
from transrec_hf.data.demo import demo_world
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.items.meeting import MAX_SHIFT, catalogue_shift, standardize_for
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


def test_a_model_with_trained_towers_is_evaluated_as_it_was_reported(tmp_path):
    """Though its towers have moved its items from the statistics of their whitening."""
    target, run = ["--data", "demo:target"], ["--output_dir", str(tmp_path / "moved")]
    few = ["--num_train_epochs", "4", "--tower_learning_rate", "0.02", "--load_best_model_at_end", "no"]
    first = finetune(["source", *target, "--tuning", "full", "--init", "all", *few, *run])
    model, processor = load_checkpoint(str(tmp_path / "moved"))
    own, other = (ItemSource(world.catalogue, processor) for world in (demo_world().target, demo_world().source))
    assert model.config.catalogue_shift > MAX_SHIFT
    assert evaluate([str(tmp_path / "moved"), *target])["metrics"] == pytest.approx(first["metrics"])
    assert not standardize_for(model, own)
    means = model.item_encoder.text_projection.mean.clone()
    shift = max(catalogue_shift(model, other).values())
    renewed = standardize_for(model, other)
    assert renewed == (shift > MAX_SHIFT + load_checkpoint(str(tmp_path / "moved"))[0].config.catalogue_shift)
    standardize_projections(model, other)
    assert model.config.catalogue_shift == 0 and not torch.equal(means, model.item_encoder.text_projection.mean)


@pytest.mark.parametrize("tuning", ["lora", "dora", "ia3", "ln_tuning"])
def test_a_checkpoint_that_is_an_adapter(tuning, tmp_path, monkeypatch):
    """It is evaluated; it goes on as an adapter from all of itself, as a model from other starts and in a report."""
    source = str(Path("source").resolve())
    monkeypatch.chdir(tmp_path)
    few = ["--max_steps", "2", "--report_to", "none", "--disable_tqdm"]
    target = ["--data", "demo:target"]
    first = finetune([source, *target, "--tuning", tuning, "--output_dir", "adapter", *few])
    found = evaluate(["adapter", *target])
    assert found["metrics"] == pytest.approx(first["metrics"])
    again = finetune(["adapter", *target, "--init", "all", "--output_dir", "again", *few])
    assert again["start"]["values"] == {} and (Path("again") / "adapter_model.safetensors").exists()
    options = ["--tuning", "frozen", "--num_train_epochs", "0"]
    chosen = finetune(["adapter", *target, *options, "--output_dir", "whole", "--report_to", "none"])
    assert {"none", "half", "all"} <= set(chosen["start"]["values"])
    assert evaluate(["whole", *target])["metrics"] == pytest.approx(chosen["metrics"])
    sources = ["--sources", "adapter", "--targets", "demo:source", "--models", "untrained", "zero_shot"]
    report = transfer_report([*sources, "--fractions", "1", "--seeds", "0", "--output_dir", "report"])
    assert {row["model"] for row in report["rows"]} == {"untrained", "zero_shot"}


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
