"""A model meets a catalogue: ID vectors and popularity by item id, and statistics of whoever's items they are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from testing_utils import make_catalogue, make_config, make_processor, make_split, make_trainer

from transrec_hf import DataError, ItemSource, Recommender, TransRecModel, encode_catalogue
from transrec_hf.commands.options import fit_to
from transrec_hf.items import meeting
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.items.meeting import (
    ITEM_STATISTICS_NAME,
    ItemStatistics,
    catalogue_shift,
    match_items,
    set_item_vectors,
    standardize_for,
)
from transrec_hf.publishing.checkpoint import load_checkpoint
from transrec_hf.serving.index import encoder_hash


DESIGN = {"item_map": "whitened", "similarity": "cosine", "content_prior": True, "popularity_prior": True}
ITEMS = 12


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A checkpoint with ID vectors and popularity, of items 0 to 11."""
    folder = tmp_path_factory.mktemp("hybrid")
    torch.manual_seed(0)
    model = TransRecModel(make_config("text image", **DESIGN, num_items=ITEMS))
    trainer = make_trainer(folder / "run", model=model, split=make_split(), num_train_epochs=1)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    torch.manual_seed(0)
    model = TransRecModel(make_config((), num_items=ITEMS))
    trainer = make_trainer(folder / "run", model=model, split=make_split(), num_train_epochs=1)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return folder / "model"


def vectors_of(model):
    return model.item_encoder.item_embedding.weight.detach()


def test_only_models_that_need_them_keep_item_statistics(hybrid, baseline, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / ITEM_STATISTICS_NAME).exists()
    counts = make_split().train.item_counts(ITEMS)
    for folder in (hybrid, baseline):
        known = ItemStatistics.from_pretrained(folder)
        assert known.item_ids.tolist() == [f"item-{row}" for row in range(ITEMS)]
        np.testing.assert_array_equal(known.train_counts, counts)
    assert ItemStatistics.from_pretrained(tmp_path / "model") is None


def test_items_are_matched_by_id(hybrid):
    before = vectors_of(load_checkpoint(str(hybrid))[0])
    grown = make_catalogue(ITEMS + 3).select(np.array([13, *range(ITEMS)[::-1], 12, 14]))
    model, _ = load_checkpoint(str(hybrid))
    known = fit_to(grown, model, str(hybrid))
    after = vectors_of(model)
    assert torch.equal(after[1 : ITEMS + 1], before.flip(0)) and before.abs().sum() > 0
    assert after[[0, -2, -1]].eq(0).all() and model.config.num_items == ITEMS + 3
    assert known.train_counts[0] == 0 and known.log_popularity[0] == known.log_popularity.min()


def test_a_recommender_knows_popularity_and_new_items(hybrid, tmp_path):
    model, processor = load_checkpoint(str(hybrid))
    source = ItemSource(make_catalogue(ITEMS), processor)
    source.log_popularity = ItemStatistics.from_pretrained(hybrid).log_popularity
    expected = Recommender(model, source).recommend(["item-3", "item-4"], k=5)
    served = Recommender.from_pretrained(hybrid, make_catalogue(ITEMS))
    assert served.recommend(["item-3", "item-4"], k=5) == expected
    served.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path)
    assert [item.item_id for item in again.recommend(["item-3", "item-4"], 5)] == [item.item_id for item in expected]
    grown = Recommender.from_pretrained(tmp_path, make_catalogue(ITEMS + 2))
    assert len(grown.recommend(["item-13"], k=20)) == ITEMS + 1


def test_another_platform_has_no_id_vectors(hybrid):
    model, _ = load_checkpoint(str(hybrid))
    strange = ItemStatistics(np.array([f"elsewhere-{row}" for row in range(ITEMS)]), np.ones(ITEMS, dtype=np.int64))
    assert match_items(model, make_catalogue(5), strange) is None
    assert model.config.num_items is None and not hasattr(model.item_encoder, "item_embedding")
    encode_catalogue(model, ItemSource(make_catalogue(5), make_processor()))
    set_item_vectors(model, torch.zeros(5, model.config.hidden_size))
    assert model.config.is_hybrid


def test_an_id_baseline_meets_its_items_in_any_order_and_no_others(baseline):
    model, _ = load_checkpoint(str(baseline))
    before = vectors_of(model)
    fit_to(make_catalogue(ITEMS).select(np.array([4, 2, 0])), model, str(baseline))
    assert torch.equal(vectors_of(model), before[[4, 2, 0]])
    with pytest.raises(DataError, match=r"2 of 14 items are new to this ID baseline \(item-12, item-13\)"):
        fit_to(make_catalogue(ITEMS + 2), load_checkpoint(str(baseline))[0], str(baseline))


def test_id_vectors_on_top_of_a_content_model_are_zero(tmp_path):
    TransRecModel(make_config("text", **DESIGN)).save_pretrained(tmp_path)
    make_processor("text").save_pretrained(tmp_path)
    model, _ = load_checkpoint(str(tmp_path), num_items=7)
    assert vectors_of(model).shape[0] == 7 and vectors_of(model).eq(0).all()


def test_damaged_item_statistics_are_named(tmp_path):
    pq.write_table(pa.table({"item": ["a"]}), tmp_path / ITEM_STATISTICS_NAME)
    with pytest.raises(DataError, match=r"item_statistics\.parquet: damaged"):
        ItemStatistics.from_pretrained(tmp_path)


# Statistics of the catalogue


@pytest.fixture
def shifted(monkeypatch):
    """A fitted model, and a way to say what its tower says of the next catalogue."""
    torch.manual_seed(0)
    model, source = TransRecModel(make_config("text", **DESIGN)), ItemSource(make_catalogue(3), make_processor("text"))
    said = {"states": torch.randn(400, model.item_encoder.text_projection.mean.numel())}
    monkeypatch.setattr(meeting, "item_states", lambda *args: said["states"])
    monkeypatch.setattr(
        meeting,
        "standardize_projections",
        lambda model, *args, **kwargs: model.item_encoder.text_projection.fit(said["states"]),
    )
    assert standardize_for(model, source), "nothing has been fitted yet"
    return model, source, said


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda states: states, False),
        (lambda states: torch.cat([states, states[:40] + 1]), False),
        (lambda states: states[:30], False),
        (lambda states: states + 0.5, True),
    ],
    ids=["the same", "some new items", "a part", "another"],
)
def test_another_catalogue_is_told_by_its_mean(shifted, change, is_another):
    model, source, said = shifted
    before = model.item_encoder.text_projection.mean.clone()
    said["states"] = change(said["states"])
    assert standardize_for(model, source) == is_another
    assert torch.equal(model.item_encoder.text_projection.mean, before) != is_another
    assert catalogue_shift(model, source)["text"] < meeting.MAX_SHIFT


def test_a_trainer_and_a_recommender_meet_a_catalogue(tmp_path):
    torch.manual_seed(0)
    model = TransRecModel(make_config("text image", **DESIGN))
    assert not model.item_encoder.text_projection.num_fitted
    Recommender(model, ItemSource(make_catalogue(ITEMS), make_processor()))
    assert model.item_encoder.text_projection.num_fitted
    other = TransRecModel(make_config("text image", **DESIGN))
    trainer = make_trainer(tmp_path, model=other, split=make_split())
    assert not other.item_encoder.text_projection.num_fitted
    trainer.evaluate()
    assert other.item_encoder.text_projection.num_fitted


def test_an_index_belongs_to_a_model_whatever_the_statistics(tmp_path):
    model, source = TransRecModel(make_config("text", **DESIGN)), ItemSource(make_catalogue(9), make_processor("text"))
    before = encoder_hash(model, source.processor)
    model.item_encoder.text_projection.get_buffer("mean").add_(1)
    assert encoder_hash(model, source.processor) == before
    standardize_projections(model, source)
    model.item_encoder.text_projection.get_buffer("axes").add_(1)
    assert encoder_hash(model, source.processor) != before
