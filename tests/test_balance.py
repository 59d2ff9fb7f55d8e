"""Modality balance: dropout of modalities, its measurement, and distillation from uni-modal teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from testing_utils import LINES, make_catalogue, make_collator, make_config, make_processor, make_trainer

from transrec_hf import ItemSource, TransRecTrainingArguments
from transrec_hf.model.modalities_transrec import COLUMNS, MODALITIES
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

    def spy(self, rows, hidden=None):
        items = batch(self, rows, hidden)
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
    with pytest.raises(ValueError, match="several, and none does: leave it out"):
        make_trainer(tmp_path, catalogue=make_catalogue(kinds=("text", "image")), modality_dropout=0.2)
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        TransRecTrainingArguments(str(tmp_path), modality_dropout=1.5, use_cpu=True)
