"""Training: what is trained at which rate, what is kept, and what becomes of a run that goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from testing_utils import (
    BEST_CHECKPOINT,
    CHECKPOINTS,
    VISION_TOWERS,
    assert_same_weights,
    gradients,
    logged,
    make_batch,
    make_catalogue,
    make_config,
    make_model,
    make_paper_config,
    make_sequences,
    make_split,
    make_trainer,
)
from transformers import AutoModel, AutoProcessor

from transrec_hf import TransRecModel, TransRecProcessor, TransRecTrainer, TransRecTrainingArguments
from transrec_hf.data.interactions import Split
from transrec_hf.data.statistics import load_statistics
from transrec_hf.errors import DataError
from transrec_hf.training.resuming import last_complete_checkpoint


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def checkpoints(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# What is trained


def settings_by_name(trainer) -> dict[str, tuple[float, float]]:
    """Peak rate and weight decay of every parameter in the optimizer."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = [
        (names[parameter], (group["lr"], group["weight_decay"]))
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


RATES = {
    "learning_rate": 0.1,
    "weight_decay": 0.01,
    "tower_learning_rate": 0.2,
    "tower_weight_decay": 0.02,
    "projection_learning_rate": 0.3,
    "projection_weight_decay": 0.03,
}


def test_each_part_has_a_rate_and_a_decay_of_its_own(tmp_path):
    found = settings_by_name(make_trainer(tmp_path, make_paper_config(), **RATES))
    assert found["item_encoder.text_model.encoder.layer.0.output.dense.weight"] == (0.2, 0.02)
    assert found["item_encoder.text_model.encoder.layer.0.output.dense.bias"] == (0.2, 0)
    assert found["item_encoder.vision_model.embedder.embedder.convolution.weight"] == (0.2, 0.02)
    assert found["item_encoder.text_pooling.query.weight"] == (0.3, 0.03)
    assert found["item_encoder.visual_projection.weight"] == (0.3, 0.03)
    assert found["item_encoder.visual_projection.bias"] == (0.3, 0)
    assert found["item_encoder.missing_embeds"] == (0.3, 0.03)
    assert found["user_encoder.layers.0.output.weight"] == (0.1, 0.01)
    assert found["user_encoder.layers.0.output_norm.weight"] == (0.1, 0)


def test_projections_follow_the_user_encoder_unless_told_otherwise(tmp_path):
    rates = {name: value for name, value in RATES.items() if "projection" not in name}
    found = settings_by_name(make_trainer(tmp_path, **rates))
    assert found["item_encoder.text_projection.weight"] == (0.1, 0.01)


def test_the_table_of_an_id_baseline_is_trained_like_the_user_encoder(tmp_path):
    found = settings_by_name(make_trainer(tmp_path, make_config("", num_items=12), **RATES))
    assert found["item_encoder.item_embedding.weight"] == (0.1, 0.01)


def test_norms_and_biases_do_not_decay(tmp_path):
    trainer = make_trainer(tmp_path, make_paper_config(), **RATES)
    decays = {name: decay for name, (_, decay) in settings_by_name(trainer).items()}
    for name, parameter in trainer.model.named_parameters():
        assert (decays[name] == 0) == (parameter.dim() == 1), name


def test_the_optimizer_holds_the_trainable_parameters_and_no_others(tmp_path):
    trainer = make_trainer(tmp_path, trainable_blocks=1)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert set(settings_by_name(trainer)) == trainable
    assert len(trainable) < len(list(trainer.model.parameters()))


@pytest.mark.parametrize("trainable_blocks", [None, 1, 0])
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_training_changes_what_is_trainable_and_nothing_else(tmp_path, trainable_blocks, vision):
    config = make_config(vision_config=VISION_TOWERS[vision]())
    trainer = make_trainer(tmp_path, config, trainable_blocks=trainable_blocks)
    before = snapshot(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed & set(dict(trainer.model.named_parameters())) == trainable
    averages = {name for name in before if "running_" in name}  # of batch norms, which keep those of the pre-training
    assert bool(averages) == (vision == "resnet") and not averages & changed


def test_training_learns(tmp_path):
    """Users walk to the next item: that can be learned from ids in a few epochs, and is found by the evaluation."""
    config = make_config("", num_items=12)
    trainer = make_trainer(tmp_path, config, split=make_split(60), num_train_epochs=8, per_device_train_batch_size=16)
    before = trainer.evaluate()
    trainer.train()
    losses = list(logged(trainer).values())
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate()["eval_ndcg@10"] > 1.2 * before["eval_ndcg@10"]


def test_one_modality_per_item_trains_both_towers_on_mixed_sequences(tmp_path):
    catalogue = make_catalogue(kinds=("text image",)).with_policy("one_per_item", seed=1)
    assert not (catalogue.has_text & catalogue.has_image).any()
    trainer = make_trainer(tmp_path, catalogue=catalogue)
    windows = trainer.train_dataset
    kinds = [set(catalogue.has_text[windows[row]["items"]]) for row in range(len(windows))]
    assert {True, False} in kinds
    before = snapshot(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    for part in ("text_model", "vision_model", "text_projection", "visual_projection"):
        assert all(not torch.equal(before[name], after[name]) for name in before if f"{part}." in name)


@pytest.mark.parametrize("call", ["evaluate", "report", "train"])
def test_a_new_trainer_has_changed_nothing_yet(tmp_path, call):
    """What is computed is computed when it is asked for; and only training changes weights."""
    model = TransRecModel(make_config())
    before = snapshot(model)
    options = {"trainable_blocks": 1, "activation_store": str(tmp_path / "store"), "learning_rate": 0.0}
    trainer = make_trainer(tmp_path / "run", model=model, tower_learning_rate=0.0, **options)
    assert not (tmp_path / "store").exists()
    getattr(trainer, call)()
    assert list(tmp_path.glob("store/*/*.safetensors"))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    projections = {
        f"item_encoder.{part}.{name}"
        for part in ("text_projection", "visual_projection")
        for name in ("weight", "bias")
    }
    assert changed == (projections if call == "train" else set())


def test_a_text_shop_trains_a_model_of_both(tmp_path):
    trainer = make_trainer(tmp_path, catalogue=make_catalogue(kinds=("text",)))
    before = snapshot(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    assert not torch.equal(*(state["item_encoder.text_projection.weight"] for state in (before, after)))


# How


class RememberingTrainer(TransRecTrainer):
    """Keeps its batches."""

    batches: tuple[dict, ...] = ()

    def training_step(self, model, inputs, *args):
        self.batches = (*self.batches, inputs)
        return super().training_step(model, inputs, *args)


@pytest.mark.parametrize("objective", ["in_batch", "bce"])
def test_accumulated_gradients_are_the_mean_over_the_small_batches(tmp_path, objective):
    """
    For losses whose negatives are the batch itself this is not the gradient of one large batch: with half of the
    candidates in each, the small batches are an easier task. To have more negatives, enlarge the batch.
    """
    config = make_config(objective=objective)
    trainer = make_trainer(
        tmp_path,
        config,
        trainer_class=RememberingTrainer,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=1.0,
        tower_learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=1,
    )
    reference = make_model(config).train()
    trainer.train()
    losses = [reference(**batch).loss for batch in trainer.batches]
    assert len(losses) == 2
    (sum(losses) / 2).backward()
    after = dict(trainer.model.named_parameters())
    assert logged(trainer)[1] == pytest.approx(sum(loss.item() for loss in losses) / 2, abs=1e-4)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(after[name], parameter - parameter.grad, msg=name)


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "trainable_blocks": 1, "bf16": True},
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {**BEST_CHECKPOINT, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    ],
    ids=" ".join,
)
def test_options_of_the_trainer_work(tmp_path, arguments):
    trainer = make_trainer(tmp_path, **arguments)
    trainer.train()
    losses = list(logged(trainer).values())
    assert len(losses) == trainer.state.max_steps
    assert all(0 <= loss < 30 for loss in losses)  # 0 where a last batch has a single user, and so no negative
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_towers_of_many_kinds_of_blocks_are_compiled(tmp_path, bf16):
    """More often than dynamo compiles a code by default; with frozen blocks, autocast, and two runs in a process."""
    config = make_config("image", vision_config=VISION_TOWERS["mobilenet_v1"]())
    options = {"bf16": bf16, "trainable_blocks": 20, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make_trainer(tmp_path, config, catalogue=make_catalogue(kinds=("image",)), max_steps=2, **options)
    trainer.train()
    assert all(0 < loss < 30 for loss in logged(trainer).values())


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
        {"item_chunk_size": 2},
        pytest.param(COMPILED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_options_that_must_not_change_the_result_do_not(tmp_path, arguments):
    plain, other = make_trainer(tmp_path / "plain"), make_trainer(tmp_path / "other", **arguments)
    for trainer in (plain, other):
        trainer.train()
    assert logged(other) == pytest.approx(logged(plain), abs=1e-3)


def test_a_seed_makes_a_run(tmp_path):
    def run(seed):
        trainer = make_trainer(tmp_path, make_config(objective="bce", hidden_dropout_prob=0.1), seed=seed)
        trainer.train()
        return trainer

    one, same, other = run(1), run(1), run(2)
    assert logged(one) == logged(same)
    assert logged(one) != logged(other)
    assert_same_weights(one.model, same.model)


def test_tensorboard_gets_losses_and_metrics(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    options = {"report_to": "tensorboard", "eval_strategy": "epoch"}
    make_trainer(tmp_path, make_config("", num_items=12), **options).train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = event_accumulator.EventAccumulator(str(file.parent)).Reload()
    assert {"train/loss", "eval/ndcg@10", "eval/hit_rate@10", "eval/mrr"} <= set(events.Tags()["scalars"])


# Evaluation


def test_evaluation_ranks_the_validation_targets(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate()
    assert {"eval_hit_rate@10", "eval_ndcg@10", "eval_mrr", "eval_runtime"} <= set(metrics)
    evaluator = trainer.ranking_evaluator(trainer.split.validation)
    expected = evaluator(trainer.model)
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert logged(trainer, "eval_ndcg@10") == {0: metrics["eval_ndcg@10"]}


def test_evaluation_of_other_sequences_has_its_own_prefix(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate(trainer.split.test, metric_key_prefix="test")
    assert all(name.startswith("test_") for name in set(metrics) - {"epoch"})
    assert metrics["test_ndcg@10"] == pytest.approx(
        trainer.ranking_evaluator(trainer.split.test)(trainer.model)["ndcg@10"]
    )


def test_validation_during_training_may_rank_for_a_sample_of_the_users(tmp_path):
    trainer = make_trainer(tmp_path, make_config(), max_eval_users=4, eval_strategy="epoch")
    trainer.train()
    evaluator = trainer.ranking_evaluator(trainer.split.validation, max_users=4)
    assert len(evaluator.sequences) == 4
    expected = evaluator.evaluate(trainer.model)["metrics"]
    assert logged(trainer, "eval_mrr").popitem()[1] == pytest.approx(expected["mrr"])
    assert (
        trainer.reports["validation"]["protocol"] | {"num_users": 4, "drawn_from": 10}
        == (trainer.reports["validation"]["protocol"])
    )
    assert trainer.evaluate(trainer.split.validation)["eval_mrr"] != pytest.approx(expected["mrr"])
    assert trainer.report()["protocol"]["num_users"] == 10
    assert trainer.report(max_users=3, baselines=False)["protocol"]["num_users"] == 3


def test_evaluation_leaves_the_model_in_training_mode(tmp_path):
    trainer = make_trainer(tmp_path, trainable_blocks=1)
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    trainer.evaluate()
    assert [module.training for module in trainer.model.modules()] == modes


class ScriptedTrainer(TransRecTrainer):
    """Its validation metric is the next one of `script`, whatever the model."""

    script: tuple[float, ...] = ()

    def evaluate(self, *args, **kwargs):
        step = self.state.global_step
        metrics = {"eval_ndcg@10": self.script[len(logged(self, "eval_ndcg@10"))]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        assert self.state.global_step == step
        return metrics


def scripted(script, folder, **options) -> TransRecTrainer:
    trainer_class = type("Scripted", (ScriptedTrainer,), {"script": script})
    return make_trainer(
        folder, trainer_class=trainer_class, num_train_epochs=len(script), **{**BEST_CHECKPOINT, **options}
    )


def test_training_ends_with_the_best_checkpoint_bit_for_bit(tmp_path):
    """`Trainer` itself would load a file whose names are not those of ViT's modules, and change nothing, silently."""
    trainer = scripted((0.1, 0.9, 0.2, 0.3), tmp_path)
    steps = trainer.train().global_step // 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * steps}")
    best, last = (TransRecModel.from_pretrained(tmp_path / f"checkpoint-{n * steps}") for n in (2, 4))
    assert set(load_file(tmp_path / f"checkpoint-{2 * steps}" / "model.safetensors")) != set(best.state_dict())
    assert_same_weights(trainer.model, best)
    with pytest.raises(AssertionError):
        assert_same_weights(trainer.model, last)


def test_batch_statistics_are_those_of_the_best_checkpoint(tmp_path):
    trainer = scripted((0.9, 0.1), tmp_path, config=make_config(vision_config=VISION_TOWERS["resnet"]()))
    trainer.train()
    assert_same_weights(trainer.model, TransRecModel.from_pretrained(trainer.state.best_model_checkpoint))


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path):
    trainer = scripted((0.1, 0.9, 0.2, 0.3), tmp_path, save_total_limit=2)
    steps = trainer.train().global_step // 4
    assert checkpoints(tmp_path) == [2 * steps, 4 * steps]


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (None, 6)])
def test_training_stops_when_the_metric_does_not_rise(tmp_path, patience, epochs):
    script = (0.1, 0.5, 0.4, 0.3, 0.2, 0.1)
    trainer = scripted(script, tmp_path, config=make_config("", num_items=12), early_stopping_patience=patience)
    trainer.train()
    assert len(logged(trainer, "eval_ndcg@10")) == epochs


# Checkpoints


@pytest.fixture
def trained(tmp_path) -> TransRecTrainer:
    trainer = make_trainer(tmp_path, **CHECKPOINTS)
    trainer.train()
    return trainer


def test_a_checkpoint_holds_model_processor_and_statistics(trained, tmp_path):
    folder = last_complete_checkpoint(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(folder), trained.model)
    assert type(AutoProcessor.from_pretrained(folder)) is TransRecProcessor
    assert load_statistics(folder)["num_items"] == 12
    assert json.loads((tmp_path / folder / "training_args.json").read_text())["tower_learning_rate"] == 1e-3
    assert not os.path.exists(os.path.join(folder, "training_args.bin"))


def test_a_saved_model_serves_without_the_trainer(trained, tmp_path):
    trained.save_model(tmp_path / "final")
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "data_statistics.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    model, processor = AutoModel.from_pretrained(tmp_path / "final"), AutoProcessor.from_pretrained(tmp_path / "final")
    assert model(**processor(text=["red hat"])).item_embeds.shape == (1, 16)


def test_no_run_has_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*: leave out"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["no state", "half a state"])
def test_a_half_written_checkpoint_is_skipped(trained, tmp_path, damage):
    first, last = (tmp_path / f"checkpoint-{step}" for step in checkpoints(tmp_path))
    assert last_complete_checkpoint(tmp_path) == str(last)
    state = last / "trainer_state.json"
    content = state.read_text()
    state.unlink()
    if damage == "half a state":
        state.write_text(content[: len(content) // 2])
    assert last_complete_checkpoint(tmp_path) == str(first)
    again = make_trainer(tmp_path, **CHECKPOINTS)
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(trained)
    assert_same_weights(again.model, trained.model)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state", "model"])
def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, part):
    trainer = make_trainer(tmp_path, **CHECKPOINTS)
    steps = len(trainer.get_train_dataloader())

    def fill_the_disk_after_one_epoch(*args, **kwargs):
        if trainer.state.global_step > steps:
            no_space()
        return whole(*args, **kwargs)

    owner, name = (trainer.model, "save_pretrained") if part == "model" else (trainer, part)
    whole = getattr(owner, name)
    monkeypatch.setattr(owner, name, fill_the_disk_after_one_epoch)
    with pytest.raises(OSError, match=r"could not be written and was removed .*No space left.*free disk space"):
        trainer.train()
    assert checkpoints(tmp_path) == [steps]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{steps}")


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="needs to mount a small disk")
@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=700k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        trainer = make_trainer(disk, **CHECKPOINTS, num_train_epochs=5, save_total_limit=None)
        with pytest.raises(OSError, match="free disk space"):
            trainer.train()
        assert last_complete_checkpoint(disk) == str(disk / f"checkpoint-{checkpoints(disk)[-1]}")
    finally:
        os.system(f"umount {disk}")


# Bad input


def test_items_that_the_model_cannot_read_are_refused_before_training(tmp_path):
    with pytest.raises(DataError, match="no item has text"):
        make_trainer(tmp_path, make_config("text"), catalogue=make_catalogue(kinds=("image",)))


def test_an_id_baseline_of_another_catalogue_is_refused(tmp_path):
    with pytest.raises(ValueError, match="12 items, but this ID baseline knows 7"):
        make_trainer(tmp_path, make_config("", num_items=7))


def test_a_content_model_without_processor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass it as processing_class"):
        TransRecTrainer(
            make_model(), TransRecTrainingArguments(str(tmp_path)), catalogue=make_catalogue(), split=make_split()
        )


def test_users_of_one_item_are_refused(tmp_path):
    one = make_sequences([[0], [1]])
    with pytest.raises(DataError, match="no training sequence has two items"):
        make_trainer(tmp_path, split=Split(one, one, one))


def test_negative_trainable_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 or more, got -1"):
        TransRecTrainingArguments(str(tmp_path), trainable_blocks=-1)


def test_losses_of_a_resnet_batch_of_one_image_are_finite(tmp_path):
    """Batch statistics of a single image exist as long as it has more than one pixel left; here, frozen ones do."""
    model = make_model(make_config(vision_config=VISION_TOWERS["resnet"]())).train()
    model.freeze_towers(0)
    catalogue = make_catalogue(kinds=("text", "image"))
    loss = model(**make_batch(model.config, lines=((0, 1, 2),), catalogue=catalogue)).loss
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_rates_fall_over_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    rates = list(logged(trainer, "learning_rate").values())
    assert all(later < earlier for earlier, later in pairwise(rates))
