"""Masked item modelling: what is hidden is not seen, and the next item is found as a hidden one at the end."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from testing_utils import assert_same_weights, logged, make_config, make_model, make_sequences, make_trainer

from transrec_hf import TransRecConfig, TransRecModel
from transrec_hf.data.interactions import Split
from transrec_hf.model.user_encoder_transrec import hide_next


MASKED = {"objective": "masked", "is_causal": False}
PRIORS = [{}, {"content_prior": True, "user_hidden_size": 16}]


@pytest.mark.parametrize("prior", PRIORS, ids=["encoder alone", "content prior"])
def test_a_hidden_item_is_not_seen_and_the_others_are_from_both_sides(prior):
    model = make_model(make_config("", num_items=6, **MASKED, **prior))
    for parameter in model.parameters():  # what starts as zero would hide a fault
        torch.nn.init.normal_(parameter, std=0.3)
    items = torch.nn.functional.normalize(torch.randn(6, model.config.hidden_size), dim=-1)
    history = torch.tensor([[0, 1, 2, 3]])
    hidden = torch.tensor([[False, False, True, False]])

    def states(history):
        return model.get_user_features(items, history, hidden=hidden)

    torch.testing.assert_close(states(torch.tensor([[0, 1, 5, 3]])), states(history))
    for position in (0, 3):
        other = history.clone()
        other[0, position] = 4
        assert (states(other)[0, 2] - states(history)[0, 2]).abs().max() > 1e-3


def test_the_next_item_is_hidden_behind_the_history():
    index, hidden = hide_next(torch.tensor([[4, 5, 6], [7, -1, -1]]), longest=5)
    assert index.tolist() == [[4, 5, 6, -1], [7, -1, -1, -1]]
    assert hidden.tolist() == [[False, False, False, True], [False, True, False, False]]
    index, hidden = hide_next(torch.tensor([[4, 5, 6], [7, 8, -1]]), longest=3)
    assert index.tolist() == [[5, 6, -1], [7, 8, -1]]  # the first one makes room
    assert hidden.tolist() == [[False, False, True]] * 2


def test_padding_changes_nothing():
    model = make_model(make_config("", num_items=6, **MASKED))
    items = torch.randn(6, model.config.hidden_size)
    alone = model.get_user_features(items, torch.tensor([[3, 1]]))
    beside = model.get_user_features(items, torch.tensor([[3, 1, -1, -1], [0, 2, 4, 5]]))
    torch.testing.assert_close(beside[:1, :2], alone)
    assert alone[0, 1].abs().sum() > 0 and not alone[0, 0].any()


@pytest.mark.parametrize("prior", PRIORS, ids=["encoder alone", "content prior"])
def test_it_learns_what_comes_next(prior, tmp_path):
    """Users walk round a circle of 12 items."""
    walks = [[(start + step) % 12 for step in range(length)] for start in range(12) for length in (5, 7, 9)]
    sequences = make_sequences(walks)
    targets = make_sequences([[(start + step) % 12 for step in range(4)] for start in range(12)])
    config = make_config("", num_items=12, mask_probability=0.3, **MASKED, **prior)
    split = Split(train=sequences, validation=targets, test=targets)
    trainer = make_trainer(tmp_path, config, split=split, num_train_epochs=20)
    before = trainer.evaluate()["eval_ndcg@10"]
    trainer.train()
    losses = list(logged(trainer).values())
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_ndcg@10"] > max(0.8, before)


def test_a_user_encoder_trained_on_hidden_items_goes_on_with_another_objective(tmp_path):
    model = make_model(make_config(**MASKED))
    model.save_pretrained(tmp_path)
    loaded = TransRecModel.from_pretrained(tmp_path, objective="cpc")
    assert_same_weights(loaded, model)
    assert loaded.config.objective == "cpc" and not loaded.config.is_causal


def test_the_paper_is_pre_trained_in_two_stages():
    assert TransRecConfig.paper(objective="masked").num_targets == 0


@pytest.mark.parametrize("fields", [{"is_causal": True}, {"mask_probability": 0}])
def test_what_cannot_be_found_out_is_refused(fields):
    with pytest.raises(StrictDataclassClassValidationError, match="is_causal=False and mask_probability above 0"):
        make_config("", num_items=6, **{**MASKED, **fields})
