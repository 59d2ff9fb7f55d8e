"""Vectors of earlier steps: read in histories only, and only while they are young."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from testing_utils import (
    assert_same_weights,
    logged,
    make_batch,
    make_catalogue,
    make_config,
    make_model,
    make_trainer,
)

from transrec_hf.training.item_cache import ItemCache


CPC = {"objective": "cpc", "num_positives": 1, "num_negatives": 1, "is_causal": False}
LINES = ((0, 1, 2, 3), (4, 1, 0))  # 3 and 0 are the targets


def left_out(batch):
    """Which items of a batch come without their contents."""
    contents = torch.cat([part.rows for part in batch["items"].parts.values()])
    return ~torch.isin(torch.arange(len(batch["items"])), contents)


def test_young_vectors_stand_for_items_that_are_read_and_not_scored():
    batch = make_batch(make_config(**CPC), LINES)
    scored = {*batch["items"].item_rows[batch["target_index"]].flatten().tolist()}
    scored |= {*batch["items"].item_rows[batch["negative_index"]].flatten().tolist()}
    cache = ItemCache(12, 16, max_age=2)
    first = cache.leave_out(batch, step=5)
    assert not left_out(first).any()
    vectors = torch.randn(len(batch["items"]), 16)
    cache.update(first, vectors, step=5)
    for step, known in ((6, True), (7, True), (8, False)):
        found = cache.leave_out(batch, step)
        ids = batch["items"].item_rows[left_out(found)].tolist()
        assert set(ids) == ({*batch["items"].item_rows.tolist()} - scored if known else set())
        torch.testing.assert_close(found["item_embeds"][left_out(found)], vectors[left_out(found)])


def test_an_update_keeps_the_age_of_what_was_read():
    batch, cache = make_batch(make_config(**CPC), LINES), ItemCache(12, 16, max_age=2)
    vectors = torch.randn(len(batch["items"]), 16)
    cache.update(cache.leave_out(batch, 0), vectors, 0)
    second = cache.leave_out(batch, 1)
    cache.update(second, vectors + 1, 1)
    read = batch["items"].item_rows[left_out(second)]
    assert len(read) and (cache.encoded_at[read] == 0).all()
    torch.testing.assert_close(cache.embeds[read], vectors[left_out(second)])
    others = np.setdiff1d(batch["items"].item_rows.numpy(), read.numpy())
    assert (cache.encoded_at[others] == 1).all()


def test_with_vectors_that_are_not_stale_the_loss_is_the_same_but_no_gradient_passes():
    model = make_model(make_config(**CPC)).train()
    batch, cache = make_batch(model.config, LINES), ItemCache(12, 16, max_age=2)
    output = model(**cache.leave_out(batch, 0))
    cache.update(cache.leave_out(batch, 0), output.item_embeds, 0)
    again = model(**cache.leave_out(batch, 1))
    torch.testing.assert_close(again.loss, output.loss)
    gradients = []
    for loss in (output.loss, again.loss):
        model.zero_grad()
        loss.backward()
        gradients.append(model.item_encoder.text_projection.weight.grad.clone())
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.allclose(*gradients)


def test_a_run_reads_the_cache(tmp_path):
    config = make_config(**CPC)
    plain, cached = (make_trainer(tmp_path / str(age), config, item_cache_age=age) for age in (None, 3))
    for trainer in (plain, cached):
        trainer.train()
    assert logged(plain)[1] == pytest.approx(logged(cached)[1], abs=1e-5)  # the first step knows nothing
    assert logged(plain) != pytest.approx(logged(cached), abs=1e-5)
    with pytest.raises(AssertionError):
        assert_same_weights(plain.model, cached.model)


def test_an_objective_that_scores_histories_has_no_use_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"item_cache_age saves nothing with objective 'in_batch'.*'cpc'"):
        make_trainer(tmp_path, make_config(), catalogue=make_catalogue(), item_cache_age=3)
