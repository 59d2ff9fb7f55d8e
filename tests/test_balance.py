"""Modality balance: dropout of modalities, its measurement, and distillation from uni-modal teachers."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from testing_utils import LINES, make_catalogue, make_collator, make_config, make_model, make_processor, make_trainer
from transformers import TrainerCallback

from transrec_hf import (
    DataError,
    ItemSource,
    RankingEvaluator,
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
)
from transrec_hf.commands.reporting import plot_balance
from transrec_hf.commands.runs import pretrain
from transrec_hf.errors import HubError
from transrec_hf.model.modalities_transrec import COLUMNS, MODALITIES
from transrec_hf.training.balance import ModalityBalanceCallback, views
from transrec_hf.training.ckd import BalancedTrainer, counterfactual_weights, generic_loss, margins, specific_loss
from transrec_hf.training.collator import draw_hidden


BOTH = ("text image",)


def collated(epoch=0, **options):
    features = [{"user": user, "items": np.array(line), "epoch": epoch} for user, line in enumerate(LINES)]
    config = make_config(objective="bpr", num_negatives=3)
    return make_collator(config, make_catalogue(kinds=BOTH), **options)(features)


def test_dropout_hides_one_modality_of_items_that_have_several():
    present = np.zeros((9000, len(MODALITIES)), dtype=bool)
    present[:3000, :1] = present[3000:6000, :2] = present[6000:, 1:4] = True
    hidden = draw_hidden(np.random.default_rng(0), present, 0.4)
    assert not (hidden & ~present).any() and not hidden[:3000].any()
    assert hidden.sum(axis=1).max() == 1
    assert abs(hidden[3000:].any(axis=1).mean() - 0.4) < 0.02
    assert np.abs(hidden[3000:6000, :2].mean(axis=0) - 0.2).max() < 0.03
    assert np.abs(hidden[6000:, 1:4].mean(axis=0) - 0.4 / 3).max() < 0.03
    assert draw_hidden(np.random.default_rng(0), present, 1.0)[3000:].any(axis=1).all()


def test_a_batch_with_dropout_is_the_same_but_for_what_is_hidden():
    plain, hidden, again, later = (
        collated(epoch, modality_dropout=p) for epoch, p in ((0, 0), (0, 0.5), (0, 0.5), (1, 0.5))
    )
    for name in ("history_index", "target_index", "negative_index", "log_popularity"):
        assert torch.equal(plain[name], hidden[name])
    shown = hidden["items"].present
    assert plain["items"].present[:, :2].all() and shown.any(dim=1).all() and not shown[:, :2].all()
    for name, part in hidden["items"].parts.items():
        assert sorted(part.rows.tolist()) == shown[:, COLUMNS[name]].nonzero().squeeze(1).tolist()
    assert torch.equal(shown, again["items"].present)
    assert later["items"].present.shape != shown.shape or not torch.equal(later["items"].present, shown)


def test_dropout_reaches_training_and_not_evaluation(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, catalogue=make_catalogue(kinds=BOTH), modality_dropout=1.0, max_steps=1)
    seen: dict[bool, list] = {True: [], False: []}
    batch = ItemSource.batch

    def spy(self, rows, hidden=None, draws=None):
        items = batch(self, rows, hidden, draws)
        seen[hidden is not None].append(items.present.sum(dim=1))
        return items

    monkeypatch.setattr(ItemSource, "batch", spy)
    trainer.train()
    trainer.evaluate()
    assert set(torch.cat(seen[True]).tolist()) == {1}
    assert set(torch.cat(seen[False]).tolist()) == {2}


def test_items_show_what_is_asked_where_they_have_it():
    source = ItemSource(make_catalogue(kinds=("text", "image", "text image")), make_processor())
    assert source.showing(("image",)).present[:3, :2].tolist() == [[True, False], [False, True], [False, True]]
    assert source.showing(("text",)).present[:3, :2].tolist() == [[True, False], [False, True], [True, False]]
    assert source.present[2, :2].all()
    batch = source.showing(("image",)).batch(np.arange(3))
    assert [batch.parts[name].rows.tolist() for name in ("text", "image")] == [[0], [1, 2]]


def test_dropout_that_hides_nothing_or_is_no_probability_is_refused(tmp_path):
    with pytest.raises(ValueError, match="several, but no item has: leave it out"):
        make_trainer(tmp_path, catalogue=make_catalogue(kinds=("text", "image")), modality_dropout=0.2)
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        TransRecTrainingArguments(str(tmp_path), modality_dropout=1.5, use_cpu=True)


# Measurement


def test_balance_is_measured_at_every_other_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, catalogue=make_catalogue(kinds=BOTH), eval_strategy="steps", eval_steps=1)
    trainer.add_callback(ModalityBalanceCallback(trainer, every=2, references={"image": 0.5}))
    trainer.train()
    balance = trainer.reports["validation"].get("balance")
    measured = [entry for entry in trainer.state.log_history if "eval_text_alone_ndcg@10" in entry]
    assert [entry["step"] for entry in measured] == [1, 3, 5, 7] and balance is None  # nor was the eighth
    last = measured[-1]
    assert last["gap_image"] == pytest.approx(0.5 - last["eval_image_alone_ndcg@10"])
    assert last["gradient_norm_text"] > 0 and last["gradient_norm_image"] > 0 and "gap_text" not in last


def test_what_is_measured_is_what_an_evaluator_says_of_items_without_a_modality(tmp_path):
    catalogue = make_catalogue(kinds=("text image", "text image", "text"))
    trainer = make_trainer(tmp_path, catalogue=catalogue)
    balance = ModalityBalanceCallback(trainer).measure()
    texts = ItemSource(make_catalogue(kinds=("text",)), make_processor())
    evaluator = RankingEvaluator(texts, trainer.split.validation)
    expected = evaluator(trainer.model)
    assert balance["metrics"]["text alone"]["ndcg@10"] == pytest.approx(expected["ndcg@10"])
    whole = trainer.evaluate()["eval_ndcg@10"]
    assert balance["metrics"]["all"]["ndcg@10"] == pytest.approx(whole) != pytest.approx(expected["ndcg@10"])
    assert "gradient_norms" not in balance  # nothing was trained


def test_gradient_norms_are_those_of_what_only_a_modality_passes(tmp_path):
    trainer = make_trainer(tmp_path, catalogue=make_catalogue(kinds=BOTH), max_steps=1)
    callback = ModalityBalanceCallback(trainer)
    trainer.add_callback(callback)
    seen = {}

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            parts = {"text": ("text_model", "text_projection"), "image": ("vision_model", "visual_projection")}
            for name, prefixes in parts.items():
                named = model.item_encoder.named_parameters()
                squares = [
                    p.grad.square().sum() for key, p in named if key.startswith(prefixes) and p.grad is not None
                ]
                seen[name] = float(torch.stack(squares).sum().sqrt())

    trainer.add_callback(Spy)
    trainer.train()
    assert callback.measure()["gradient_norms"] == pytest.approx(seen, rel=1e-5)


def test_three_modalities_are_each_shown_alone_and_left_out():
    assert views(("text", "image")) == {"text alone": ("text",), "image alone": ("image",)}
    three = views(("text", "image", "features"))
    assert three["without text"] == ("image", "features") and len(three) == 6


def test_balance_is_on_the_card_and_in_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(tmp_path, catalogue=make_catalogue(kinds=BOTH), max_steps=2)
    callback = ModalityBalanceCallback(trainer, references={"text": 2.0})
    trainer.add_callback(callback)
    trainer.train()
    callback.measure()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "with all modalities" in line]
    assert "with text alone (" in line and "with image alone." in line
    assert "below a model that reads only it) and" in line
    plot_balance(trainer.state.log_history, tmp_path / "balance.png")
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")


def test_there_is_nothing_to_balance_in_one_modality(tmp_path):
    trainer = make_trainer(tmp_path, make_config("text"), catalogue=make_catalogue(kinds=("text",)))
    with pytest.raises(ValueError, match="nothing to balance"):
        ModalityBalanceCallback(trainer)
    both = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="a reference for audio, but the model reads text, image"):
        ModalityBalanceCallback(both, references={"audio": 0.1})


# Distillation


def test_margins_and_weights_are_those_of_a_loop():
    torch.manual_seed(0)
    states, embeds = torch.randn(3, 4), torch.randn(6, 4)
    target, candidates = torch.tensor([5, 0, 2]), torch.tensor([1, 3, 4])
    found, pairs = margins(states, embeds, target, candidates)
    for row in range(3):
        for column in range(3):
            score = states[row] @ embeds[candidates[column]]
            other = states[row] @ embeds[candidates[(column + 1) % 3]]
            assert found[row, column] == pytest.approx(float(states[row] @ embeds[target[row]] - score), abs=1e-5)
            assert pairs[row, column] == pytest.approx(float(score - other), abs=1e-5)

    whole, text, image = (torch.randn(50) for _ in range(3))
    of_text, of_image = counterfactual_weights(whole, [image, text], [text, image])
    c_text = ((whole - image) / text).clamp(1e-8, 10)
    c_image = ((whole - text) / image).clamp(1e-8, 10)
    assert torch.allclose(of_text, 1 - (c_text - c_image) / (c_text + c_image), atol=1e-4)
    assert torch.allclose(of_text + of_image, torch.full((50,), 2.0))


def test_losses_are_nothing_where_student_and_teacher_agree():
    margin = torch.tensor([-2.0, 0.0, 3.0])
    assert not specific_loss(margin, margin).any()
    assert specific_loss(margin, margin + 1).tolist() == [1, 1, 1] and not specific_loss(margin, margin - 1).any()
    assert generic_loss(margin, margin, 0.5).abs().max() < 1e-5
    student = margin.clone().requires_grad_()
    generic_loss(student, margin + 1, 0.5).sum().backward()
    assert (student.grad < 0).all()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Uni-modal models of the design that students have, trained a little."""
    folders = {}
    for name in ("text", "image"):
        folders[name] = str(tmp_path_factory.mktemp(name))
        trainer = balanced(folders[name], modalities=(name,), trainer_class=TransRecTrainer, max_steps=3)
        trainer.train()
        trainer.save_model()
    return folders


def balanced(folder, modalities=("text", "image"), trainer_class=BalancedTrainer, teachers=None, **options):
    fields = {"item_map": "whitened", "similarity": "cosine", "content_prior": True, "popularity_prior": True}
    model = make_model(make_config(modalities, **fields, **options.pop("fields", {})))
    extra = {} if teachers is None else {"teachers": teachers}
    make = partial(trainer_class, **extra)
    return make_trainer(folder, model=model, catalogue=make_catalogue(kinds=BOTH), trainer_class=make, **options)


def test_the_objective_is_the_same_and_no_item_is_encoded_again(tmp_path, teachers, monkeypatch):
    plain = balanced(tmp_path, trainer_class=TransRecTrainer, max_steps=1)
    plain.train()
    calls = []
    encode = TransRecModel.get_content_features

    def counted(self, name, part):
        calls.append((self.training, name))
        return encode(self, name, part)

    monkeypatch.setattr(TransRecModel, "get_content_features", counted)
    trainer = balanced(tmp_path, teachers=list(teachers.values()), max_steps=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "ckd" in entry]
    (before,) = [entry for entry in plain.state.log_history if "loss" in entry]
    assert entry["ckd"] > 0
    assert entry["loss"] - 0.1 * entry["ckd"] == pytest.approx(before["loss"], rel=1e-4)
    assert sorted(name for training, name in calls if training) == ["image", "text"]


def test_what_teachers_say_is_what_their_models_say(tmp_path, teachers):
    trainer = balanced(tmp_path, teachers=[teachers["image"]])
    trainer.prepare()
    teacher = trainer.teachers["image"]
    windows = torch.tensor([3, 0])
    states = teacher.states_of(windows)
    for row, window in enumerate(windows.tolist()):
        history = torch.from_numpy(trainer.windows[window]["items"][:-1])[None]
        expected = teacher.model.get_user_features(teacher.item_embeds, history)[0]
        assert torch.allclose(states[row, : history.shape[1]], expected, atol=0.02)
        assert not states[row, history.shape[1] :].any()
    own = balanced(tmp_path, modalities=("image",), trainer_class=TransRecTrainer, fields={})
    own.model.load_state_dict(teacher.model.state_dict())
    own.is_prepared = True
    assert trainer.references() == {"image": pytest.approx(own.evaluate()["eval_ndcg@10"])}


@pytest.mark.parametrize("objective", ["in_batch", "cpc", "bpr"])
def test_a_student_comes_to_rank_as_its_teacher(tmp_path, teachers, objective):
    trainer = balanced(
        tmp_path,
        teachers=list(teachers.values()),
        fields={"objective": objective},
        num_train_epochs=12,
        trainable_blocks=0,
    )
    trainer.distillation = 10.0
    trainer.train()
    learned = [entry["ckd"] for entry in trainer.state.log_history if "ckd" in entry]
    assert np.mean(learned[-6:]) < 0.8 * np.mean(learned[:6])


def test_teachers_that_cannot_teach_are_refused_before_anything_runs(tmp_path, teachers):
    def refuse(said, *names, **options):
        with pytest.raises((DataError, ValueError), match=said):
            balanced(tmp_path / "refused", teachers=list(names), **options)

    text, image = teachers["text"], teachers["image"]
    refuse("no such folder", str(tmp_path / "nowhere"))
    refuse("a second teacher of text", text, text)
    refuse("reads text, but it should teach 'image'", f"image={text}")
    refuse("teaches image, but the student reads text", image, modalities=("text",))
    refuse("reads histories of 6 items, but the student needs 9", text, fields={"max_position_embeddings": 9})
    refuse("objective 'masked'", text, fields={"objective": "masked", "is_causal": False})
    several = balanced(tmp_path / "several", trainer_class=TransRecTrainer)
    several.save_model()
    refuse("reads text and image: say which modality it teaches, as in text=", str(tmp_path / "several"))
    assert balanced(tmp_path, teachers=[f"image={tmp_path / 'several'}"]).teachers["image"].modality == "image"
    other = make_model(make_config("text", popularity_prior=True))
    trainer = make_trainer(tmp_path / "other", model=other, catalogue=make_catalogue(9, kinds=("text",)))
    trainer.save_model()
    refuse("was trained on another catalogue. 3 items are only there or only in", str(tmp_path / "other"))


def test_the_command_measures_and_learns_from_teachers(tmp_path, capsys):
    common = ["demo:target", "--num_train_epochs", "1", "--use_cpu", "--report_to", "none", "--max_train_users", "60"]
    common += ["--disable_tqdm", "true", "--max_eval_users", "30", "--logging_steps", "1"]
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    pretrain([*common, "--output_dir", teacher])
    options = ["--ckd_teachers", f"image={teacher}", "--balance_every", "1", "--balance_references", "text=0.5"]
    pretrain([*common, "--output_dir", student, *options])
    balance = json.loads((tmp_path / "student" / "evaluation.json").read_text())["reports"]["validation"]["balance"]
    assert set(balance["gaps"]) == {"text", "image"} and balance["references"]["text"] == 0.5
    assert (tmp_path / "student" / "modality_balance.png").exists()
    history = json.loads((tmp_path / "student" / "trainer_state.json").read_text())["log_history"]
    assert any("ckd" in entry for entry in history)
    with pytest.raises(DataError, match="leave out more_data"):
        pretrain([*common, "--more_data", "demo:source", "--output_dir", str(tmp_path / "two"), *options[:2]])
    for references in (["text"], ["text=nan"], ["text=-1"], ["text=.1", "text=.2"]):
        with pytest.raises(DataError, match="must be MODALITY=NUMBER"):
            pretrain([*common, "--balance_every", "1", "--balance_references", *references])
    for option in ("--ckd_weight", "--ckd_temperature"):
        for value in ("0", "nan", "inf"):
            with pytest.raises(DataError, match=f"{option[2:]} must be above 0"):
                pretrain([*common, option, value])
    with pytest.raises(HubError):
        pretrain([*common, "--output_dir", str(tmp_path / "two"), "--ckd_teachers", "me/nobody"])
    assert not (tmp_path / "two").exists()
