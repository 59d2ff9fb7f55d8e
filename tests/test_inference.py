"""Recommendations: from which items, in which order, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from testing_utils import make_catalogue, make_config, make_model, make_processor

from transrec_hf import ItemSource, Recommender
from transrec_hf.errors import DataError
from transrec_hf.items.encoding import encode_catalogue
from transrec_hf.model.user_encoder_transrec import last_state


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender(make_model(), ItemSource(make_catalogue(), make_processor()))


HISTORY = ["item-3", "item-1", "item-8"]


def scores_by_hand(model, catalogue, processor, history):
    items = encode_catalogue(model, ItemSource(catalogue, processor))
    index = torch.from_numpy(catalogue.rows(history))[None]
    with torch.no_grad():
        states = model.get_user_features(items, index, ItemSource(catalogue, processor).present)
    return (last_state(states, index) @ items.T)[0]


def ids(recommendations) -> list[str]:
    return [recommendation.item_id for recommendation in recommendations]


def test_the_best_items_come_first(recommender):
    scores = scores_by_hand(recommender.model, make_catalogue(), make_processor(), HISTORY)
    scores[[3, 1, 8]] = -torch.inf
    best = recommender.recommend(HISTORY, k=5)
    assert ids(best) == [f"item-{row}" for row in scores.argsort(descending=True)[:5]]
    assert [item.score for item in best] == pytest.approx(scores.sort(descending=True).values[:5].tolist(), abs=1e-5)
    assert [item.text for item in best] == [make_catalogue().text(int(item.item_id[5:])) for item in best]


def test_the_history_is_left_out_unless_told_otherwise(recommender):
    assert not set(HISTORY) & set(ids(recommender.recommend(HISTORY, k=12)))
    assert set(HISTORY) <= set(ids(recommender.recommend(HISTORY, k=12, exclude_seen=False)))


def test_all_of_a_long_history_is_left_out_though_its_end_alone_is_read(recommender):
    history = [f"item-{row}" for row in range(10)]
    assert set(ids(recommender.recommend(history))) == {"item-10", "item-11"}
    one, other = (recommender.recommend(h, exclude_seen=False) for h in (history, history[-6:]))
    assert ids(one) == ids(other)


def test_a_k_larger_than_the_catalogue_gives_all_there_is(recommender):
    assert len(recommender.recommend(HISTORY, k=1000)) == 9
    assert len(recommender.recommend(HISTORY, k=1000, exclude_seen=False)) == 12


def test_repeats_in_a_history_are_fine(recommender):
    assert len(recommender.recommend(["item-1", "item-1"], k=12)) == 11


def test_users_do_not_depend_on_their_batch(recommender):
    histories = [HISTORY, ["item-0"], [f"item-{row}" for row in range(9)]]
    together = recommender.recommend(histories, k=3)
    for history, found in zip(histories, together, strict=True):
        alone = recommender.recommend(history, k=3)
        assert ids(found) == ids(alone)
        assert [item.score for item in found] == pytest.approx([item.score for item in alone], abs=1e-5)


def test_an_unknown_item_is_named(recommender):
    with pytest.raises(DataError, match=r"unknown item ids: .*'item-99'"):
        recommender.recommend(["item-1", "item-99"])


def test_an_empty_history_is_refused_where_popularity_is_unknown(recommender):
    with pytest.raises(ValueError, match="at least one item"):
        recommender.recommend([])
    with pytest.raises(ValueError, match="at least one item"):
        recommender.recommend([HISTORY, []])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_serves_in_the_dtype_it_was_saved_in(tmp_path, dtype):
    make_model().to(dtype).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path, make_catalogue(), batch_size=5)
    assert loaded.model.dtype == dtype
    assert not loaded.model.training
    expected = Recommender(make_model().to(dtype), ItemSource(make_catalogue(), make_processor()))
    assert ids(loaded.recommend(HISTORY)) == ids(expected.recommend(HISTORY))
    assert np.isfinite([item.score for item in loaded.recommend(HISTORY)]).all()


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_checkpoint_of_one_modality_serves_any_platform_that_has_it(tmp_path, modality):
    make_model(make_config(modality)).save_pretrained(tmp_path)
    make_processor(modality).save_pretrained(tmp_path)
    for kinds in ((modality,), ("text image",)):
        loaded = Recommender.from_pretrained(tmp_path, make_catalogue(7, kinds=kinds))
        assert len(loaded.recommend(["item-0"], k=7)) == 6


def test_a_platform_is_read_from_its_file(tmp_path, recommender):
    recommender.save_pretrained(tmp_path / "model")
    make_catalogue().items.to_parquet(tmp_path / "items.parquet")
    loaded = Recommender.from_pretrained(tmp_path / "model", str(tmp_path / "items.parquet"))
    assert ids(loaded.recommend(HISTORY)) == ids(recommender.recommend(HISTORY))


def test_an_id_baseline_needs_no_processor(tmp_path):
    make_model(make_config("", num_items=12)).save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path, make_catalogue())
    assert len(loaded.recommend(HISTORY, k=4)) == 4


def test_a_model_in_training_mode_serves_in_evaluation_mode():
    model = make_model(make_config(hidden_dropout_prob=0.5)).train()
    recommender = Recommender(model, ItemSource(make_catalogue(), make_processor()))
    one, other = (recommender.recommend(HISTORY) for _ in range(2))
    assert one == other
