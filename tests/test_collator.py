"""The collator against a naive reference, and properties that hold for any users."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_utils import LINES, make_catalogue, make_collator, make_config, make_processor, make_sequences
from torch.utils.data import DataLoader

from transrec_hf import ItemSource
from transrec_hf.items.preparing import bucket_by_tokens, pad_right
from transrec_hf.model.configuration_transrec import OBJECTIVES
from transrec_hf.model.modalities_transrec import MODALITIES
from transrec_hf.training.collator import TrainingWindows, draw_negatives


NUM_ITEMS = 30
CATALOGUE = make_catalogue(NUM_ITEMS, kinds=("text",))
LENGTH = 6  # of a history
PER_POSITION = ("bce", "bpr")

lines_of_users = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=12), min_size=1, max_size=5)
any_objective = st.sampled_from([name for name in OBJECTIVES if name != "masked"])


def id_collator(objective="in_batch", num_positives=3, num_negatives=2, mask_probability=0.15, **options):
    """Of an ID baseline, which reads no content: quick."""
    fields = {"objective": objective, "num_positives": num_positives, "num_negatives": num_negatives}
    fields["mask_probability"] = mask_probability
    fields["is_causal"] = objective != "masked"
    config = make_config("", num_items=NUM_ITEMS, max_position_embeddings=LENGTH, **fields)
    return make_collator(config, CATALOGUE, **options)


def features(lines, epoch=0):
    return [{"user": user, "items": np.array(line), "epoch": epoch} for user, line in enumerate(lines)]


def to_ids(batch, name):
    """An index tensor as catalogue rows, -1 for padding."""
    ids = torch.cat([batch["items"].item_rows, torch.tensor([-1])])
    return ids[batch[name]].tolist()


def padded(rows):
    length = max(len(row) for row in rows)
    return [row + [-1] * (length - len(row)) for row in rows]


def naive_histories_and_targets(objective, lines, num_positives=3):
    histories, targets = [], []
    for line in lines:
        if objective == "cpc":
            count = min(num_positives, len(line) - 1)
            histories.append(line[: len(line) - count][-LENGTH:])
            targets.append(line[len(line) - count :])
        else:
            line = line[-(LENGTH + 1) :]
            histories.append(line[:-1])
            targets.append(line[1:])
    return padded(histories), padded(targets)


@given(lines=lines_of_users, objective=any_objective)
@settings(deadline=None, max_examples=100)
def test_histories_and_targets_equal_a_naive_reference(lines, objective):
    batch = id_collator(objective)(features(lines))
    histories, targets = naive_histories_and_targets(objective, lines)
    assert to_ids(batch, "history_index") == histories
    assert to_ids(batch, "target_index") == targets


@given(lines=lines_of_users, objective=any_objective)
@settings(deadline=None, max_examples=100)
def test_items_are_the_distinct_real_ones(lines, objective):
    batch = id_collator(objective)(features(lines))
    ids = batch["items"].item_rows.tolist()
    assert ids == sorted(set(ids))
    names = {"history_index", "target_index", "negative_index"} & set(batch)
    used = {int(i) for name in names for i in batch[name].flatten() if i >= 0}
    if objective == "full_softmax":
        assert ids == list(range(NUM_ITEMS))
    else:
        assert used == set(range(len(ids)))
    assert all(batch[name].min() >= -1 for name in names)
    counts = np.arange(NUM_ITEMS) + 1
    np.testing.assert_allclose(batch["log_popularity"], np.log(counts[ids] / counts.sum()), rtol=1e-6)


@given(lines=lines_of_users, objective=any_objective)
@settings(deadline=None, max_examples=100)
def test_padding_is_on_the_right(lines, objective):
    batch = id_collator(objective)(features(lines))
    for name in ("history_index", "target_index"):
        real = batch[name] >= 0
        assert torch.equal(real, real.long().cummin(dim=1).values.bool())
        assert real[:, 0].all()
        assert real.any(dim=0).all()  # no column of padding alone


@given(lines=lines_of_users, objective=any_objective)
@settings(deadline=None, max_examples=100)
def test_no_target_leaks_into_the_history_that_predicts_it(lines, objective):
    """Sequences of distinct positions: the target is never at or before the last item that is read."""
    positions = [[LENGTH + offset for offset in range(len(line))] for line in lines]
    batch = id_collator(objective)(features(positions))
    histories, targets = to_ids(batch, "history_index"), to_ids(batch, "target_index")
    for history, target in zip(histories, targets, strict=True):
        if objective == "cpc":
            assert max(history) < min(place for place in target if place >= 0)
        else:
            assert all(later == earlier + 1 for earlier, later in zip(history, target, strict=True) if later >= 0)


@given(lines=lines_of_users, objective=st.sampled_from(("cpc", *PER_POSITION)))
@settings(deadline=None, max_examples=100)
def test_negatives_are_none_of_the_users_own_items(lines, objective):
    batch = id_collator(objective)(features(lines))
    histories, targets = naive_histories_and_targets(objective, lines)
    for history, target, negatives in zip(histories, targets, np.array(to_ids(batch, "negative_index")), strict=True):
        assert not set(negatives.flatten()) & ({*history, *target} - {-1})
        if objective in PER_POSITION:
            assert negatives.shape == (len(target), 2)
            assert ((negatives == -1).all(axis=1) == (np.array(target) == -1)).all()
        else:
            assert negatives.shape == (2,)


@pytest.mark.parametrize("objective", ["in_batch", "full_softmax"])
def test_objectives_without_negatives_draw_none(objective):
    assert "negative_index" not in id_collator(objective)(features(LINES))


def test_sampled_softmax_draws_by_popularity():
    batches = [id_collator("sampled_softmax", num_negatives=500)(features(LINES, epoch)) for epoch in range(4)]
    drawn = np.concatenate([to_ids(batch, "negative_index") for batch in batches])
    counts = np.arange(NUM_ITEMS) + 1
    np.testing.assert_allclose(np.bincount(drawn, minlength=NUM_ITEMS) / len(drawn), counts / counts.sum(), atol=0.02)


def test_histories_shorter_than_the_positives_keep_one_item():
    """The paper's five positives of a user with few items: one stays the history, the rest are positives."""
    batch = id_collator("cpc", num_positives=5)(features([[4, 9], [1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]))
    assert to_ids(batch, "history_index") == [[4, -1], [1, -1], [0, 1]]
    assert to_ids(batch, "target_index") == [[9, -1, -1, -1, -1], [2, 3, -1, -1, -1], [2, 3, 4, 5, 6]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sequence_of_one_item_is_refused(objective):
    with pytest.raises(ValueError, match="at least two items"):
        id_collator(objective)(features([[1, 2], [3]]))


# Hidden items


@given(lines=lines_of_users, seed=st.integers(0, 99), probability=st.sampled_from([0.01, 0.15, 0.9]))
@settings(deadline=None, max_examples=100)
def test_targets_of_masked_are_items_of_the_history(lines, seed, probability):
    batch = id_collator("masked", seed=seed, mask_probability=probability)(features(lines))
    history, target = batch["history_index"], batch["target_index"]
    assert to_ids(batch, "history_index") == padded([line[-LENGTH:] for line in lines])
    assert history.shape == target.shape and "negative_index" not in batch
    hidden = target >= 0
    assert torch.equal(target[hidden], history[hidden])
    assert hidden.any(dim=1).all()  # every user teaches something


def test_the_last_item_is_hidden_where_none_would_be():
    batch = id_collator("masked", mask_probability=1e-9)(features([[3, 4, 5], [6, 7]]))
    assert to_ids(batch, "target_index") == [[-1, -1, 5], [-1, 7, -1]]


def test_so_many_items_are_hidden_and_other_ones_in_another_epoch():
    lines = [list(range(6))] * 2000
    first, second = (to_ids(id_collator("masked")(features(lines, epoch)), "target_index") for epoch in (0, 1))
    assert first != second
    shares = (np.array(first) >= 0).mean(axis=0)
    np.testing.assert_allclose(shares[:-1], 0.15, atol=0.03)
    assert shares[-1] == pytest.approx(0.15 + 0.85**6, abs=0.03)


# Negatives


@given(
    seen=st.lists(st.lists(st.integers(-1, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100)
def test_drawn_negatives_are_unseen(seen, seed):
    negatives = draw_negatives(np.random.default_rng(seed), 10, np.array(seen), 3)
    assert negatives.shape == (len(seen), 3)
    for own, drawn in zip(seen, negatives.tolist(), strict=True):
        assert not set(own) - {-1} & set(drawn)
        assert all(0 <= item < 10 for item in drawn)


def test_drawn_negatives_are_uniform():
    negatives = draw_negatives(np.random.default_rng(0), 5, np.array([[0, 1, -1]]), 3000)
    shares = np.bincount(negatives.flatten(), minlength=5) / 3000
    np.testing.assert_allclose(shares, [0, 0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)


def test_who_has_seen_everything_gets_no_negative():
    negatives = draw_negatives(np.random.default_rng(0), 3, np.array([[0, 1, 2], [0, 1, -1]]), 2)
    assert negatives.tolist() == [[-1, -1], [2, 2]]


@pytest.mark.parametrize("objective", ["cpc", *PER_POSITION, "sampled_softmax"])
def test_negatives_depend_on_seed_epoch_and_users_alone(objective):
    def negatives(seed=0, epoch=0, lines=LINES):
        np.random.seed(np.random.randint(1000))  # the global state is nothing to it
        return to_ids(id_collator(objective, num_negatives=8, seed=seed)(features(lines, epoch)), "negative_index")

    assert negatives() == negatives()
    assert negatives(seed=1) != negatives()
    assert negatives(epoch=1) != negatives()


@pytest.mark.parametrize("persistent_workers", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(num_workers, persistent_workers):
    """Nor on whether the workers stay: each epoch has negatives of its own."""
    windows = TrainingWindows(make_sequences(LINES), LENGTH)
    persistent = persistent_workers and num_workers > 0
    collator = id_collator("bce")
    loader = DataLoader(
        windows, batch_size=2, collate_fn=collator, num_workers=num_workers, persistent_workers=persistent
    )
    for epoch in range(2):
        windows.set_epoch(epoch)
        expected = [collator([{**windows[i], "epoch": epoch} for i in rows]) for rows in ([0, 1], [2, 3])]
        for found, batch in zip(loader, expected, strict=True):
            items, wanted = found.pop("items"), batch.pop("items")
            assert torch.equal(items.item_rows, wanted.item_rows)
            assert all(torch.equal(found[name], batch[name]) for name in batch)


# Windows


@given(lines=lines_of_users)
@settings(deadline=None, max_examples=50)
def test_windows_cover_every_step_once(lines):
    windows = TrainingWindows(make_sequences(lines), LENGTH)
    collator = id_collator()
    steps: list[tuple[tuple[int, ...], int]] = []
    for row in range(len(windows)):
        batch = collator([windows[row]])
        assert batch["history_index"].shape[1] <= LENGTH
        (history,), (target,) = to_ids(batch, "history_index"), to_ids(batch, "target_index")
        steps += zip(history, target, strict=True)
    assert sorted(steps) == sorted(step for line in lines for step in pairwise(line))


def test_windows_of_several_targets_leave_room_for_the_whole_history():
    """Otherwise the positions at the end of a long history, which evaluation uses, would never be trained."""
    windows = TrainingWindows(make_sequences([list(range(20))]), LENGTH, num_targets=3)
    batch = id_collator("cpc", num_positives=3)([windows[0]])
    assert to_ids(batch, "target_index") == [[17, 18, 19]]
    assert to_ids(batch, "history_index") == [[11, 12, 13, 14, 15, 16]]


# Content


def test_content_batch_equals_one_made_item_by_item():
    config = make_config()
    catalogue = make_catalogue()
    batch = make_collator(config, catalogue)(features(LINES))
    processor = make_processor()
    rows = batch["items"].item_rows.tolist()
    texts = [catalogue.text(row) for row in rows]
    items = batch["items"]
    assert items.present.tolist() == [[bool(catalogue.has(name)[r]) for name in MODALITIES] for r in rows]
    part, at = items.parts["text"], 0
    for ids, mask in zip(part.values, part.masks, strict=True):
        assert mask.any(dim=0).all()  # no token of padding alone
        for row_ids, row_mask in zip(ids, mask, strict=True):
            expected = processor(text=[texts[part.rows[at]]])["input_ids"][0]
            assert torch.equal(row_ids[row_mask.bool()], expected)
            at += 1
    assert at == len(part.rows) == sum(text is not None for text in texts)
    pictures = items.parts["image"]
    for pixels, index in zip(torch.cat(pictures.values), pictures.rows, strict=True):
        assert torch.equal(pixels, processor(images=[catalogue.image(rows[index])])["pixel_values"][0])
    assert len(pictures.rows) == sum(catalogue.image(row) is not None for row in rows)


def test_texts_come_in_buckets_of_like_length():
    catalogue = make_catalogue(200, kinds=("text",))
    batch = ItemSource(catalogue, make_processor("text"), 128).batch(np.arange(200))
    part = batch.parts["text"]
    lengths = [mask.sum(dim=1).tolist() for mask in part.masks]
    assert max(mask.numel() for mask in part.masks) <= 128
    assert all((len(a) + 1) * b[0] > 128 for a, b in pairwise(lengths))  # none could have taken in one more
    flat = [length for bucket in lengths for length in bucket]
    assert flat == sorted(flat)
    assert [mask.shape[1] for mask in part.masks] == [max(bucket) for bucket in lengths]
    assert sorted(part.rows.tolist()) == list(range(200))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 100))
def test_buckets_hold_each_text_once_within_the_budget(lengths, budget):
    buckets = bucket_by_tokens(np.array(lengths, dtype=int), budget)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        longest = max(lengths[index] for index in bucket)
        assert len(bucket) == 1 or len(bucket) * longest <= budget


def test_an_item_that_the_processor_cannot_read_is_refused():
    with pytest.raises(ValueError, match="item 1 has none of the processor's modalities"):
        ItemSource(make_catalogue(kinds=("text", "image")), make_processor("text")).batch(np.array([0, 1]))


def test_texts_are_tokenised_once_and_those_that_a_policy_hides_not_at_all(monkeypatch):
    catalogue, processor = make_catalogue(), make_processor()
    calls = []

    def tokenize(texts):
        calls.append(texts)
        return [[1]] * len(texts)

    monkeypatch.setattr(processor, "tokenize", tokenize)
    source = ItemSource(catalogue.with_policy("one_per_item"), processor)
    assert (source.units()["text"] > 0).tolist() == source.catalogue.has("text").tolist()
    source.units()
    source.batch(np.arange(3))
    assert [len(texts) for texts in calls] == [source.catalogue.has("text").sum()]


def test_a_tokenizer_that_pads_on_the_left_is_padded_on_the_right():
    """Or the processor of a model card and the batches of the training would give different vectors."""
    processor = make_processor("text")
    processor.tokenizer.padding_side = "left"
    catalogue = make_catalogue(kinds=("text",))
    part = ItemSource(catalogue, processor).batch(np.arange(3)).parts["text"]
    flat = processor(text=[catalogue.text(int(row)) for row in part.rows])
    assert torch.equal(flat["input_ids"], torch.cat(part.values)) and torch.equal(
        flat["attention_mask"], torch.cat(part.masks)
    )
    assert flat["attention_mask"][:, 0].all() and not flat["attention_mask"].all()


def test_only_the_batch_of_items_is_read(monkeypatch):
    """Images are decoded when a batch needs them, not before, and each once."""
    catalogue = make_catalogue(kinds=("image",))
    decoded = []
    read = catalogue.read

    def decode(row, names):
        decoded.append(int(row))
        return read(row, names)

    monkeypatch.setattr(catalogue, "read", decode)
    make_collator(make_config("image"), catalogue)(features([[1, 2, 1], [2, 1]]))
    assert decoded == [1, 2]


def test_pad_right():
    assert pad_right([np.array([1, 2, 3]), np.array([4])]).tolist() == [[1, 2, 3], [4, -1, -1]]
    assert pad_right([np.array([1])], length=3).tolist() == [[1, -1, -1]]
