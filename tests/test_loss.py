"""Objectives against formulas written out with loops, and what they must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_utils import make_batch, make_collator, make_config, make_model

from transrec_hf.model.loss_transrec import (
    batch_slots,
    bce,
    bpr,
    count_slots,
    cpc,
    full_softmax,
    in_batch_softmax,
    masked_mean,
    sampled_softmax,
)
from transrec_hf.model.modalities_transrec import ItemBatch


def dot(one, other):
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def softplus(value):
    return math.log1p(math.exp(-abs(value))) + max(value, 0)


def mean(values):
    return sum(values) / len(values)


def cross_entropy(positive, negatives):
    """Of one logit against others."""
    top = max([positive, *negatives])
    return top + math.log(sum(math.exp(logit - top) for logit in [positive, *negatives])) - positive


# In-batch debiased cross-entropy


def slot_wise_loss(states, item_embeds, lines, log_popularity):
    """
    The loss as its equation has it: every slot of the batch is a candidate, one by one. `lines` are the users' items
    (inputs and final target), `states[i][j]` is the state after `lines[i][j]`.
    """
    slots = [(user, place, item) for user, line in enumerate(lines) for place, item in enumerate(line)]
    losses = []
    for user, line in enumerate(lines):
        for place in range(len(line) - 1):
            target = (user, place + 1, line[place + 1])
            candidates = [slot for slot in slots if slot == target or slot[2] not in line]
            logits = {
                slot: dot(states[user][place], item_embeds[slot[2]]) - float(log_popularity[slot[2]])
                for slot in candidates
            }
            positive = logits.pop(target)
            losses.append(cross_entropy(positive, logits.values()))
    return mean(losses)


def random_case(lines, hidden_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_items = 1 + max(item for line in lines for item in line)
    length = max(len(line) for line in lines) - 1
    states = torch.randn(len(lines), length, hidden_size, generator=generator)
    item_embeds = torch.randn(num_items, hidden_size, generator=generator)
    popularity = torch.rand(num_items, generator=generator) + 0.1
    return states, item_embeds, (popularity / popularity.sum()).log()


def indices(lines):
    """`history_index` and `target_index` of a batch, padded on the right."""
    length = max(len(line) for line in lines) - 1
    rows = [[*line, *[-1] * (length + 1 - len(line))] for line in lines]
    target = torch.tensor([row[1:] for row in rows])
    history = torch.tensor([line[:-1] + [-1] * (length + 1 - len(line)) for line in lines])
    return history, target


def unique_item_loss(states, item_embeds, lines, log_popularity):
    history, target = indices(lines)
    slots = batch_slots(history, target)
    counts = count_slots(slots, len(item_embeds))
    return in_batch_softmax(states, item_embeds, target, slots, counts, log_popularity)


IN_BATCH_CASES = {
    "distinct items": [[0, 1, 2], [3, 4, 5]],
    "items shared by users": [[0, 1, 2, 3], [2, 4, 1, 5], [5, 0, 6, 7]],
    "padding": [[0, 1, 2, 3, 4, 5], [3, 6], [7, 8, 0]],
    "repeats within a user": [[0, 1, 0, 1, 2], [2, 2, 2], [3, 0, 3]],
    "target repeated in own history": [[0, 1, 0], [2, 3, 4]],
    "one popular item in every line": [[0, 1, 2], [0, 3, 4], [5, 0], [6, 7, 0, 8]],
    "users who share all items": [[0, 1, 2], [2, 1, 0], [1, 0, 2]],
    "one user": [[0, 1, 2, 3]],
}


@pytest.mark.parametrize("lines", IN_BATCH_CASES.values(), ids=IN_BATCH_CASES.keys())
def test_unique_item_loss_equals_the_slot_wise_loss(lines):
    states, items, popularity = random_case(lines)
    expected = slot_wise_loss(states, items, lines, popularity)
    assert unique_item_loss(states, items, lines, popularity).item() == pytest.approx(expected, abs=1e-6, rel=1e-6)


@given(
    lines=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_unique_item_loss_equals_the_slot_wise_loss_on_any_batch(lines, seed):
    states, items, popularity = random_case(lines, seed=seed)
    expected = slot_wise_loss(states, items, lines, popularity)
    assert unique_item_loss(states, items, lines, popularity).item() == pytest.approx(expected, abs=2e-6, rel=2e-6)


def test_users_who_share_all_items_give_no_nan():
    """No negative is left: the loss is zero and so is its gradient."""
    lines = [[0, 1, 2], [2, 1, 0]]
    states, item_embeds, log_popularity = random_case(lines)
    states.requires_grad_(), item_embeds.requires_grad_()
    loss = unique_item_loss(states, item_embeds, lines, log_popularity)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert states.grad.abs().max() < 1e-6
    assert item_embeds.grad.abs().max() < 1e-6


def test_scale_of_popularity_cancels():
    lines = IN_BATCH_CASES["padding"]
    states, item_embeds, log_popularity = random_case(lines)
    one, other = (unique_item_loss(states, item_embeds, lines, log_popularity + shift) for shift in (0, 3.5))
    assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_popularity_correction_favours_rare_negatives():
    """A rare negative stands for many more of its kind than a popular one."""
    lines = [[0, 1], [2, 3]]
    states, item_embeds, _ = random_case(lines)
    item_embeds[2:] = item_embeds[2]
    popular, rare = (torch.tensor([0.0, 0.0, value, value]) for value in (-1.0, -8.0))
    losses = [unique_item_loss(states[:, :1], item_embeds, lines[:1] + [[2, 3]], p) for p in (popular, rare)]
    assert losses[0] < losses[1]


# The other objectives


def random_index(*shape, num_items, padded=0.3):
    index = torch.randint(num_items, shape)
    index[torch.rand(shape) < padded] = -1
    index.view(-1)[0] = 1  # never all padding
    return index


@pytest.fixture
def case():
    """Three users, four positions, seven items."""
    return {
        "states": torch.randn(3, 4, 5),
        "item_embeds": torch.randn(7, 5),
        "target_index": random_index(3, 4, num_items=7),
    }


def real(target_index):
    return [(int(user), int(place)) for user, place in (target_index >= 0).nonzero()]


def test_full_softmax_equals_its_formula(case):
    states, items, target = case.values()
    losses = []
    for user, place in real(target):
        logits = [dot(states[user, place], item) for item in items]
        losses.append(cross_entropy(logits.pop(target[user, place]), logits))
    assert full_softmax(**case).item() == pytest.approx(mean(losses), rel=1e-6)


def test_sampled_softmax_equals_its_formula(case):
    states, items, target = case.values()
    negatives = [2, 5, 1, 5, 0]
    log_popularity = torch.log_softmax(torch.randn(7), dim=0)
    losses = []
    for user, place in real(target):

        def logit(item, state=states[user, place]):
            return dot(state, items[item]) - float(log_popularity[item])

        positive = int(target[user, place])
        losses.append(cross_entropy(logit(positive), [logit(item) for item in negatives if item != positive]))
    assert any(item in negatives for item in target.flatten().tolist())
    loss = sampled_softmax(**case, negative_index=torch.tensor(negatives), log_popularity=log_popularity)
    assert loss.item() == pytest.approx(mean(losses), rel=1e-6)


def test_sampled_softmax_with_every_item_once_and_uniform_popularity_is_the_full_softmax(case):
    loss = sampled_softmax(**case, negative_index=torch.arange(7), log_popularity=torch.zeros(7))
    torch.testing.assert_close(loss, full_softmax(**case))


def test_cpc_equals_its_formula():
    users, items = torch.randn(3, 5), torch.randn(7, 5)
    target, negative = random_index(3, 4, num_items=7), random_index(3, 2, num_items=7)
    positives = [softplus(-dot(users[user], items[target[user, place]])) for user, place in real(target)]
    negatives = [softplus(dot(users[user], items[negative[user, place]])) for user, place in real(negative)]
    loss = cpc(users, items, target, negative)
    assert loss.item() == pytest.approx(mean(positives) + mean(negatives), rel=1e-6)


@pytest.fixture
def negative_index(case):
    """Two negatives for each real position, some of them missing."""
    index = random_index(3, 4, 2, num_items=7, padded=0.2)
    return index.masked_fill(case["target_index"].unsqueeze(-1) < 0, -1)


def test_bce_equals_its_formula(case, negative_index):
    states, items, target = case.values()
    positives = [softplus(-dot(states[place], items[target[place]])) for place in real(target)]
    negatives = [
        softplus(dot(states[place], items[item]))
        for place in real(target)
        for item in negative_index[place]
        if item >= 0
    ]
    assert bce(**case, negative_index=negative_index).item() == pytest.approx(
        mean(positives) + mean(negatives), rel=1e-6
    )


def test_bpr_equals_its_formula(case, negative_index):
    states, items, target = case.values()
    losses = [
        softplus(dot(states[place], items[item]) - dot(states[place], items[target[place]]))
        for place in real(target)
        for item in negative_index[place]
        if item >= 0
    ]
    assert bpr(**case, negative_index=negative_index).item() == pytest.approx(mean(losses), rel=1e-6)


@pytest.mark.parametrize("objective", [bce, bpr])
def test_states_of_positions_without_a_target_are_not_read(objective, case, negative_index):
    states = case["states"].masked_fill(case["target_index"].unsqueeze(-1) < 0, torch.nan)
    loss = objective(**{**case, "states": states}, negative_index=negative_index)
    assert loss.item() == objective(**case, negative_index=negative_index).item()


def test_mean_over_nothing_is_zero():
    values = torch.randn(4, requires_grad=True)
    loss = masked_mean(values, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert values.grad.eq(0).all()


# Through the model, on batches of the collator


OBJECTIVES = {
    "in_batch": {},
    "cpc": {"is_causal": False, "num_positives": 2},
    "bce": {"num_negatives": 2},
    "bpr": {"num_negatives": 2},
    "full_softmax": {},
    "sampled_softmax": {"num_negatives": 6},
    "masked": {"is_causal": False, "mask_probability": 0.5},
}


@pytest.fixture(params=OBJECTIVES)
def config(request):
    return make_config(objective=request.param, **OBJECTIVES[request.param])


def test_loss_and_gradients_are_finite_in_bf16_autocast(config):
    model = make_model(config).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**make_batch(config)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert loss.item() == pytest.approx(model(**make_batch(config)).loss.item(), rel=0.1)


def test_loss_does_not_depend_on_the_order_of_users(config):
    model, batch = make_model(config), make_batch(config)
    order = torch.tensor([2, 0, 3, 1])
    names = ["history_index", "target_index"]
    if batch.get("negative_index", torch.empty(0)).dim() > 1:
        names.append("negative_index")
    other = {**batch, **{name: batch[name][order] for name in names}}
    torch.testing.assert_close(model(**other).loss, model(**batch).loss)


def test_loss_does_not_depend_on_the_order_of_items(config):
    """Items are addressed by their row in the batch; the rows may come in any order."""
    model, batch = make_model(config), make_batch(config)
    num_items = len(batch["items"])
    row_of = torch.cat([torch.randperm(num_items), torch.tensor([-1])])  # the last one keeps padding what it is
    order, items = row_of[:-1].argsort(), batch["items"]
    parts = {name: replace(part, rows=row_of[part.rows]) for name, part in items.parts.items()}
    other = {**batch, "items": ItemBatch(items.present[order], parts, items.item_rows[order])}
    for name in ("history_index", "target_index", "negative_index"):
        if name in batch:
            other[name] = row_of[batch[name]]
    other["log_popularity"] = batch["log_popularity"][order]
    torch.testing.assert_close(model(**other).loss, model(**batch).loss)


def test_loss_does_not_depend_on_padding(config):
    model, batch = make_model(config), make_batch(config, lines=((0, 1, 2), (5, 3), (1, 4, 2)))

    def pad(index):
        return torch.nn.functional.pad(index, [0, 0] * (index.dim() - 2) + [0, 2], value=-1)

    other = {**batch, **{name: pad(batch[name]) for name in ("history_index", "target_index")}}
    if batch.get("negative_index", torch.empty(0)).dim() > 1:
        other["negative_index"] = pad(batch["negative_index"])
    torch.testing.assert_close(model(**other).loss, model(**batch).loss)


def test_users_with_a_single_pair_train(config):
    model = make_model(config).train()
    loss = model(**make_batch(config, lines=((0, 1), (2, 3)))).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_few_steps_lower_the_loss(config):
    model, batch = make_model(config).train(), make_batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_id_baseline_of_the_full_softmax_ranks_the_whole_table():
    config = make_config("", num_items=12, objective="full_softmax")
    model = make_model(config)
    batch = make_collator(config)([{"user": 0, "items": [0, 1, 2]}])
    output = model(**batch)
    logits = output.last_hidden_state[0] @ model.item_encoder.item_embedding.weight.T
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(output.loss, expected)
