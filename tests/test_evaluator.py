"""Ranks against a naive reference, protocols against cases worked out by hand, baselines, and two processes."""

from __future__ import annotations

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from transrec_hf import ItemSource, TransRecConfig, TransRecModel
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.data.interactions import Sequences, leave_one_out
from transrec_hf.evaluation.baselines import ContentNeighbours, CoOccurrence, Popularity, RepeatLast
from transrec_hf.evaluation.evaluator import RankingEvaluator
from transrec_hf.evaluation.protocol import PROTOCOLS, EvaluationProtocol
from transrec_hf.evaluation.ranking import dot_scores, last_items, rank_scores, rank_targets
from transrec_hf.model.configuration_transrec import FORMAT_1


def make_catalogue(num_items: int) -> Catalogue:
    texts = [f"title {row}" for row in range(num_items)]
    return Catalogue(datasets.Dataset.from_dict({"item_id": [str(row) for row in range(num_items)], "text": texts}))


def make_sequences(lines: list[list[int]]) -> Sequences:
    lengths = np.array([len(line) for line in lines])
    ends = np.cumsum(lengths)
    items = np.concatenate(lines).astype(np.int32)
    users = np.array([f"user {row}" for row in range(len(lines))])
    return Sequences(items, np.arange(len(items)), ends - lengths, ends, users)


class FixedScores:
    """Scores that do not depend on the history."""

    max_history = 3

    def __init__(self, scores):
        self.scores = torch.as_tensor(scores, dtype=torch.float32)

    def __call__(self, history):
        return self.scores.repeat(len(history), 1)


def random_case(num_users=33, num_items=40, seed=0):
    rng = np.random.default_rng(seed)
    lines = [rng.integers(num_items, size=rng.integers(3, 15)).tolist() for _ in range(num_users)]
    return make_catalogue(num_items), make_sequences(lines)


def id_model(num_items: int, **settings) -> TransRecModel:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    return TransRecModel(
        TransRecConfig(num_items=num_items, **{**FORMAT_1, **small, "max_position_embeddings": 5, **settings})
    )


# Ranks


def naive_rank(scores, target, excluded, ties="expected", protect_target=False):
    excluded = set(excluded) - ({target} if protect_target else set())
    if target in excluded:
        return math.inf
    others = [s for item, s in enumerate(scores) if item != target and item not in excluded]
    tied = sum(s == scores[target] for s in others)
    return 1 + sum(s > scores[target] for s in others) + tied * (0.5 if ties == "expected" else 1)


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5),
    excluded=st.lists(st.lists(st.integers(-1, 5), min_size=4, max_size=4), min_size=5, max_size=5),
    target=st.integers(0, 5),
    ties=st.sampled_from(["expected", "pessimistic"]),
    protect_target=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_ranks_agree_with_a_naive_reference(scores, excluded, target, ties, protect_target):
    users = len(scores)
    expected = [naive_rank(s, target, set(e) - {-1}, ties, protect_target) for s, e in zip(scores, excluded)]  # noqa: B905
    options = {"ties": ties, "protect_target": protect_target}
    targets, rows = torch.full((users,), target), torch.tensor(excluded[:users])
    assert rank_scores(torch.tensor(scores).float(), targets, rows, **options).tolist() == expected
    identity, values = torch.eye(6), torch.tensor(scores).float()
    for max_scores in (1, 12, 1000):  # one user, two users, all users a block
        assert rank_targets(values, identity, targets, rows, max_scores=max_scores, **options).tolist() == expected


@given(st.permutations(range(8)), st.integers(0, 7))
@settings(deadline=None, max_examples=30)
def test_ranks_do_not_depend_on_the_order_of_items(order, target):
    torch.manual_seed(0)
    users, items = torch.randn(3, 4), torch.randn(8, 4).repeat_interleave(2, dim=0)[:8]  # with twins
    order = torch.tensor(order)
    ranks = rank_targets(users, items, torch.full((3,), target))
    moved = int((order == target).nonzero())
    assert torch.equal(ranks, rank_targets(users, items[order], torch.full((3,), moved)))


@pytest.mark.parametrize("num_users", [1, 2, 3, 5, 7, 33])
@pytest.mark.parametrize("num_items", [101, 1503])
def test_collapsed_model_gets_the_expected_rank(num_users, num_items):
    """Equal items must score equally in any shape of block, which a product in fp32 does not grant."""
    torch.manual_seed(0)
    users, items = torch.randn(num_users, 100), torch.randn(1, 100).repeat(num_items, 1)
    targets = torch.arange(num_users) * 3
    assert rank_targets(users, items, targets).tolist() == [(num_items + 1) / 2] * num_users
    assert rank_targets(users, items, targets, ties="pessimistic").tolist() == [num_items] * num_users


def test_scores_are_of_full_precision_under_autocast():
    torch.manual_seed(0)
    users, items, targets = torch.randn(20, 16), torch.randn(300, 16), torch.arange(20)
    ranks = rank_targets(users, items, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rank_targets(users, items, targets), ranks)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_vectors_are_an_error(value):
    users, items = torch.ones(4, 2), torch.ones(5, 2)
    users[2, 0] = value
    with pytest.raises(ValueError, match="scores of 1 of 4 users are NaN or infinite"):
        rank_targets(users, items, torch.zeros(4, dtype=torch.int64))
    items[3] = value  # even where it is masked
    with pytest.raises(ValueError, match="scores of 4 of 4 users"):
        rank_targets(torch.ones(4, 2), items, torch.zeros(4, dtype=torch.int64), torch.full((4, 1), 3))


@pytest.mark.parametrize("cached", [1, 8, 100])
def test_scores_do_not_depend_on_how_many_are_cached(cached, monkeypatch):
    torch.manual_seed(0)
    users, items = torch.randn(7, 33), torch.randn(101, 33)
    expected = (users.double() @ items.double().T).float()
    monkeypatch.setattr("transrec_hf.evaluation.ranking.CACHED_SCORES", cached)
    assert torch.equal(dot_scores(users, items), expected)
    assert dot_scores(users[:0], items).shape == (0, 101)


def test_last_items():
    sequences = make_sequences([[1, 2, 3, 4], [5, 6]])
    assert last_items(sequences, np.array([0, 1]), 2).tolist() == [[2, 3], [5, -1]]
    assert last_items(sequences, np.array([1, 0]), None).tolist() == [[5, -1, -1], [1, 2, 3]]
    assert last_items(sequences, np.array([1]), 9).tolist() == [[5]]
    assert last_items(sequences, np.array([0, 1]), 0).shape == (2, 0)


# Protocols: L = 2, items score by their row, so item 9 comes first


def ranks_under(protocol, lines, num_items=10, scores=None, max_history=2, train_counts=None):
    catalogue, sequences = make_catalogue(num_items), make_sequences(lines)
    evaluator = RankingEvaluator(
        ItemSource(catalogue), sequences, protocol=protocol, train_counts=train_counts, ks=(1, 5)
    )
    ranking = evaluator.rank(FixedScores(np.arange(num_items) if scores is None else scores), max_history=max_history)
    return ranking.ranks.tolist(), evaluator.report(ranking)


def test_what_each_preset_masks():
    line = [9, 8, 7, 6, 5, 0]  # six interactions, the target is item 0; NineRec keeps the last L + 3 = 5
    everyone = list(range(1, 10))  # makes every item a candidate, target 9
    expected = {
        "full": 10 - 5,  # 9, 8, 7, 6, 5 masked: 4, 3, 2, 1 remain before the target
        "hllm": 10 - 5,
        "transrec-paper": 10 - 5,
        "ninerec": 10 - 4,  # L + 2: 8, 7, 6, 5
        "pmmrec": 10 - 3,  # L + 1: 7, 6, 5
        "recbole": 10,
    }
    for name, rank in expected.items():
        protocol = replace(PROTOCOLS[name], candidates="catalogue")
        assert ranks_under(protocol, [line, everyone])[0][0] == rank, name


def test_a_short_line_is_masked_alike_by_all_that_mask():
    for name in ("full", "ninerec", "pmmrec"):
        protocol = replace(PROTOCOLS[name], candidates="catalogue")
        assert ranks_under(protocol, [[9, 8, 0]])[0] == [8]


def test_window_may_equal_the_input_of_the_model():
    """HSTU masks what its model reads."""
    assert ranks_under(EvaluationProtocol("window"), [[9, 8, 7, 6, 0]])[0] == [8]


def test_repeated_target_is_a_sure_miss_unless_protected():
    lines = [[9, 8, 9], [8, 7, 9]]
    ranks, report = ranks_under("full", lines)
    assert ranks == [math.inf, 1]
    assert report["repeats"] == {"share": 0.5, "hit_rate_ceiling": 0.5}
    assert report["metrics"]["hit_rate@5"] == 0.5
    ranks, report = ranks_under(EvaluationProtocol(protect_target=True), lines)
    assert ranks == [1, 1]
    assert report["repeats"] == {"share": 0.5, "hit_rate_ceiling": 1}
    ranks, report = ranks_under("recbole", lines)
    assert ranks == [1, 1]
    assert report["repeats"] == {"share": 0.5, "hit_rate_ceiling": 1}


def test_forgotten_repeat_can_be_hit():
    """The trap of windows: a repeat older than the window is no miss, in NineRec it is not even known."""
    line = [9, 1, 2, 3, 4, 9]
    assert ranks_under("full", [line])[0] == [math.inf]
    ranks, report = ranks_under("ninerec", [line])  # keeps 1, 2, 3, 4, 9
    assert ranks == [1]
    assert report["repeats"] == {"share": 0, "hit_rate_ceiling": 1}
    ranks, report = ranks_under(EvaluationProtocol("window", window_extra=1), [line])
    assert ranks == [1]
    assert report["repeats"] == {"share": 1, "hit_rate_ceiling": 1}
    pmmrec = [1, 9, 2, 3, 4, 9]  # L + 3 keeps the first 9, L + 1 does not mask it
    assert ranks_under("ninerec", [pmmrec])[0] == [math.inf]
    assert ranks_under("pmmrec", [pmmrec])[0] == [1]


def test_ninerec_ranks_only_items_of_kept_lines():
    line = [9, 1, 2, 3, 4, 0]  # keeps 1, 2, 3, 4, 0; 9 and 5-8 occur in no kept line
    ranks, report = ranks_under("ninerec", [line])
    assert ranks == [1]
    assert report["protocol"]["num_items"] == 5
    train_counts = np.array([0] * 8 + [3, 0])  # item 8 occurs in another user's training part
    ranks, report = ranks_under("ninerec", [line], train_counts=train_counts)
    assert ranks == [2]
    assert report["protocol"]["num_items"] == 6


def test_ninerec_split():
    sequences = make_sequences([[9, 8, 7, 6, 5, 4, 0], [1, 2, 3, 4]])
    split = PROTOCOLS["ninerec"].split(sequences, max_history=2)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [1, 1, 1]  # four items are too few
    assert [part[0]["items"].tolist() for part in (split.train, split.validation, split.test)] == [
        [7, 6, 5],
        [7, 6, 5, 4],
        [7, 6, 5, 4, 0],
    ]
    pmmrec = PROTOCOLS["pmmrec"].split(sequences, max_history=2)
    assert len(pmmrec.test) == 2
    whole = PROTOCOLS["full"].split(sequences)
    assert whole.test[0]["items"].tolist() == [9, 8, 7, 6, 5, 4, 0]


def test_protocol_of_its_own_length_overrides_the_model():
    protocol = replace(PROTOCOLS["pmmrec"], max_history=1, candidates="catalogue")
    ranks, report = ranks_under(protocol, [[9, 8, 7, 6, 5, 0]], max_history=2)
    assert ranks == [10 - 2]
    assert report["protocol"]["max_history"] == 1


def test_ties_modes():
    flat = np.zeros(10)
    ranks, report = ranks_under("full", [[9, 8, 0]], scores=flat)
    assert ranks == [1 + 7 / 2]
    assert ranks_under(EvaluationProtocol(ties="pessimistic"), [[9, 8, 0]], scores=flat)[0] == [8]
    assert report["protocol"]["ties"] == "expected"


# Reports


def test_report_slices_warm_and_cold_modality_and_length():
    items = datasets.Dataset.from_dict(
        {"item_id": list("abcdef"), "text": ["a", "b", None, None, "e", "f"]}
    ).add_column("image", [None, None, png(1), png(2), png(3), None])
    catalogue = Catalogue(items)  # text, text, image, image, both, text
    sequences = make_sequences([[0, 1, 5], [2, 3, 4], [0, 2, 3], [5, 0, 1, 0, 1, 5, 0]])
    train_counts = np.array([3, 2, 2, 0, 1, 0])
    evaluator = RankingEvaluator(
        ItemSource(catalogue), sequences, protocol="recbole", train_counts=train_counts, ks=(1, 2)
    )
    report = evaluator.report(evaluator.rank(FixedScores([1, 2, 3, 4, 5, 6]), max_history=2))
    assert json.loads(json.dumps(report))["slices"] == report["slices"]
    slices = report["slices"]
    assert {label: part["num_users"] for label, part in slices["target"].items()} == {"cold": 2, "warm": 2}
    assert slices["target"]["cold"]["hit_rate@1"] == 0.5  # items 5 (rank 1) and 3 (rank 3)
    assert slices["target"]["warm"]["mrr"] == pytest.approx((1 / 2 + 1 / 6) / 2)  # items 4 and 0
    assert {label: part["num_users"] for label, part in slices["target_modality"].items()} == {
        "text": 2,
        "image": 1,
        "both": 1,
    }
    assert {label: part["num_users"] for label, part in slices["history_length"].items()} == {"1-4": 3, "5-9": 1}
    assert {label: part["num_users"] for label, part in slices["history_modality"].items()} == {
        "text": 2,
        "image": 1,
        "mixed": 1,
    }
    assert report["protocol"]["num_users"] == 4
    assert report["protocol"]["mask_history"] == "none"
    assert report["metrics"]["hit_rate@2"] == 0.5
    low, high = report["intervals"]["ndcg@2"]
    assert low < report["metrics"]["ndcg@2"] < high


def png(seed: int) -> dict:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (seed, seed, seed)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_report_coverage_and_popularity():
    catalogue, sequences = make_catalogue(40), make_sequences([[0, 1, 2], [3, 4, 5]])
    counts = np.arange(40)
    evaluator = RankingEvaluator(ItemSource(catalogue), sequences, train_counts=counts)
    report = evaluator.report(evaluator.rank(Popularity(counts)))
    assert report["recommendations"]["coverage@10"] == 10 / 40
    expected = np.log(np.arange(30, 40) / counts.sum()).mean()
    assert report["recommendations"]["mean_log_popularity@10"] == pytest.approx(expected, rel=1e-6)


def test_lists_shorter_than_ten_hold_no_masked_item():
    catalogue, sequences = make_catalogue(4), make_sequences([[0, 1, 2]])
    ranking = RankingEvaluator(ItemSource(catalogue), sequences).rank(FixedScores([3, 2, 1, 0]))
    assert ranking.recommended.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["full", "ninerec"])
def test_sample_of_users_has_the_ranks_of_these_users(name):
    catalogue, sequences = random_case(num_users=30, num_items=60)
    scorer = FixedScores(np.random.default_rng(1).normal(size=60))
    whole = RankingEvaluator(ItemSource(catalogue), sequences, protocol=name).rank(scorer, max_history=2)

    def sample(seed):
        evaluator = RankingEvaluator(ItemSource(catalogue), sequences, protocol=name, max_users=8, seed=seed)
        ranking = evaluator.rank(scorer, max_history=2)
        users = [sequences.user_ids.tolist().index(user) for user in evaluator.sequences.user_ids]
        assert torch.equal(ranking.ranks, whole.ranks[users])
        assert torch.equal(ranking.candidates, whole.candidates)  # those of all users
        protocol = evaluator.report(ranking)["protocol"]
        assert (protocol["num_users"], protocol["drawn_from"]) == (8, 30)
        return users

    drawn = [sample(seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 8
    assert drawn[0] != drawn[2] != drawn[3]


def test_sample_as_large_as_the_split_is_the_split():
    catalogue, sequences = random_case(num_users=9)
    evaluators = [RankingEvaluator(ItemSource(catalogue), sequences, max_users=number) for number in (None, 9, 100)]
    scorer = FixedScores(range(len(catalogue)))
    reports = [evaluator.report(evaluator.rank(scorer)) for evaluator in evaluators]
    assert reports[0] == reports[1] == reports[2]
    assert "drawn_from" not in reports[0]["protocol"]


# Models


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_model_against_a_naive_loop(name, monkeypatch):
    catalogue, sequences = random_case()
    model, length = id_model(len(catalogue)), 5
    monkeypatch.setattr("transrec_hf.evaluation.evaluator.MAX_USERS", 7)
    evaluator = RankingEvaluator(ItemSource(catalogue), sequences, protocol=name)
    ranking = evaluator.rank_model(model)
    protocol = PROTOCOLS[name]
    embeds = model.item_encoder.item_embedding.weight.detach()
    model.eval()
    lines = [row["items"].tolist() for row in sequences]
    lines = lines if protocol.keep_extra is None else [line[-length - protocol.keep_extra :] for line in lines]
    known = set(range(len(catalogue))) if protocol.candidates == "catalogue" else {i for line in lines for i in line}
    masked = {"none": 0, "full": 100, "window": length + protocol.window_extra}[protocol.mask_history]
    for line, rank in zip(lines, ranking.ranks.tolist(), strict=True):
        *history, target = line
        with torch.no_grad():
            states = model.get_user_features(embeds, torch.tensor([history[-length:]]))
        scores = (embeds @ states[0, -1]).tolist()
        excluded = set(history[-masked:] if masked else []) | (set(range(len(catalogue))) - known)
        assert rank == naive_rank(scores, target, excluded)


def test_call_returns_plain_floats_and_leaves_the_mode():
    catalogue, sequences = random_case()
    model = id_model(len(catalogue)).train()
    evaluator = RankingEvaluator(ItemSource(catalogue), sequences)
    metrics = evaluator(model)
    assert model.training
    assert all(type(value) is float for value in metrics.values())
    assert {"hit_rate@10", "ndcg@10", "mrr", "coverage@10"} <= set(metrics)
    assert metrics == evaluator(model.eval())
    assert not model.training


def test_bfloat16_model():
    catalogue, sequences = random_case()
    model = id_model(len(catalogue)).bfloat16()
    assert RankingEvaluator(ItemSource(catalogue), sequences)(model)["mrr"] > 0


def test_diverged_model_is_an_error():
    catalogue, sequences = random_case()
    model = id_model(len(catalogue))
    torch.nn.init.constant_(model.item_encoder.item_embedding.weight, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        RankingEvaluator(ItemSource(catalogue), sequences)(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c, s: RankingEvaluator(ItemSource(c), s, protocol="movielens"),
            "protocol is 'movielens', but must be one of 'full'",
        ),
        (lambda c, s: EvaluationProtocol("all"), "mask_history is 'all'"),
        (lambda c, s: EvaluationProtocol(ties="optimistic"), "ties is 'optimistic'"),
        (lambda c, s: EvaluationProtocol(candidates="sampled"), "candidates is 'sampled'"),
        (lambda c, s: RankingEvaluator(ItemSource(c), make_sequences([[1, 2], [3]])), "1 of 2 sequences .* user 1"),
        (lambda c, s: RankingEvaluator(ItemSource(c), s.select(np.array([], dtype=int))), "no sequences"),
        (lambda c, s: RankingEvaluator(ItemSource(c), s, max_users=0), "max_users must be 1 or more"),
        (lambda c, s: RankingEvaluator(ItemSource(c), s).evaluate_baselines(), "train=split.train"),
        (lambda c, s: RankingEvaluator(ItemSource(c), s, protocol="ninerec").rank(RepeatLast(40)), "`max_history`"),
        (
            lambda c, s: RankingEvaluator(ItemSource(c), s, train_counts=np.ones(39)),
            "train_counts has 39 entries, .* 40 items",
        ),
        (
            lambda c, s: RankingEvaluator(ItemSource(c), s, candidates=np.arange(40) < 1).rank(RepeatLast(40)),
            "not among the cand",
        ),
    ],
)
def test_bad_input(call, message):
    catalogue, sequences = random_case()
    with pytest.raises(ValueError, match=message):
        call(catalogue, sequences)


# Baselines


def test_popularity_and_repeat_last():
    history = torch.tensor([[3, 1, -1], [2, 0, 2]])
    assert Popularity(np.array([5, 0, 2, 1]))(history).tolist() == [[5, 0, 2, 1]] * 2
    assert RepeatLast(4)(history).tolist() == [[0, 2, 0, 1], [2, 0, 3, 0]]


def test_co_occurrence_against_a_naive_loop():
    catalogue, sequences = random_case()
    num_items, train = len(catalogue), leave_one_out(sequences).train
    counts, together = train.item_counts(num_items), np.zeros((num_items, num_items))
    for row in train:
        items = row["items"]
        for i in range(len(items)):
            for j in range(max(0, i - 3), min(len(items), i + 4)):
                together[items[i], items[j]] += items[i] != items[j]
    history = last_items(sequences, np.arange(len(sequences)), 4)
    expected = np.zeros((len(history), num_items))
    for user, rows in enumerate(history.tolist()):
        rows = [row for row in rows if row >= 0]
        for age, row in enumerate(reversed(rows)):
            expected[user] += 0.8**age * together[row] / np.sqrt(np.maximum(counts[row] * counts, 1))
    scores = CoOccurrence(train, num_items, max_history=4)(history)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_blocks_of_sequences_change_no_report(monkeypatch):
    catalogue, sequences = random_case()
    split, model = leave_one_out(sequences), id_model(len(catalogue))
    evaluators = [
        RankingEvaluator(ItemSource(catalogue), split.test, protocol=name, train=split.train)
        for name in ("full", "pmmrec")
    ]
    whole = [evaluator.evaluate(model) for evaluator in evaluators]
    monkeypatch.setattr("transrec_hf.data.interactions.BLOCK", 7)
    monkeypatch.setattr("transrec_hf.data.statistics.BLOCK", 7)
    monkeypatch.setattr("transrec_hf.data.interactions.MAX_IN_MEMORY", 0)
    assert [evaluator.evaluate(model) for evaluator in evaluators] == whole


def test_content_neighbours():
    vectors = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    scores = ContentNeighbours(vectors)(torch.tensor([[0, -1], [0, 1]]))
    half = math.sqrt(0.5)
    assert scores.tolist() == [pytest.approx([1, 0, half]), pytest.approx([0.5, 0.5, half])]


def test_evaluate_reports_the_baselines():
    catalogue, sequences = random_case()
    split = leave_one_out(sequences)
    evaluator = RankingEvaluator(
        ItemSource(catalogue),
        split.test,
        protocol="ninerec",
        train=split.train,
        content_vectors=torch.randn(len(catalogue), 4),
    )
    report = evaluator.evaluate(id_model(len(catalogue)))
    names = ["popularity", "repeat_last", "co_occurrence", "content_neighbours"]
    assert list(report["baselines"]) == names
    assert all(report["baselines"][name]["protocol"] == report["protocol"] for name in names)
    json.dumps(report, allow_nan=False)


# Two processes


class BrokenInTheFirstProcess(FixedScores):
    def __init__(self, scores, accelerator):
        super().__init__(scores)
        self.broken = accelerator is None or accelerator.is_main_process

    def __call__(self, history):
        return super().__call__(history) * (math.nan if self.broken else 1.0)


def evaluate_33_users(accelerator=None) -> list:
    catalogue, sequences = random_case(num_users=33)
    split = leave_one_out(sequences)
    model = id_model(len(catalogue))
    with torch.no_grad():  # equal items, so that ties must come out the same
        model.item_encoder.item_embedding.weight[20:] = model.item_encoder.item_embedding.weight[:20]
    evaluator = RankingEvaluator(ItemSource(catalogue), split.test, train=split.train)
    results = [evaluator.evaluate(model, accelerator=accelerator), evaluator(model, accelerator)]
    with pytest.raises(ValueError, match="NaN or infinite"):  # in both, and without waiting for each other
        evaluator.rank(BrokenInTheFirstProcess(range(len(catalogue)), accelerator), accelerator=accelerator)
    return results


def evaluate_in_a_process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)  # the threads of the parent did not survive the fork
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)
    results = evaluate_33_users(Accelerator(cpu=True))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """17 users in one process and 16 in the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = torch.multiprocessing.start_processes(
        evaluate_in_a_process, (port, str(tmp_path)), nprocs=2, join=False, start_method="fork"
    )
    try:
        assert any(workers.join(timeout=60) for _ in range(2)), "the processes wait for each other"
    finally:
        for process in workers.processes:
            process.kill()
    expected = json.loads(json.dumps(evaluate_33_users()))
    assert expected[0]["protocol"]["num_users"] == 33
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
