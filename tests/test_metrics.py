"""Metrics against hand values, an outside implementation and their properties."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Qrel, ScoredDoc, Success, nDCG

import transrec_hf
from transrec_hf.evaluation.metrics import (
    bootstrap_interval,
    hit_rate,
    metric_values,
    ndcg,
    paired_bootstrap,
    ranking_metrics,
    reciprocal_rank,
)


RANKS = torch.tensor([1.0, 2.0, 5.0, 10.0, 10.5, 11.0, math.inf])
ranks_of_users = st.lists(
    st.one_of(st.integers(2, 400).map(lambda twice: twice / 2), st.just(math.inf)), min_size=1, max_size=30
).map(lambda ranks: torch.tensor(ranks, dtype=torch.float32))


def test_hand_values():
    assert hit_rate(RANKS, 10).tolist() == [1, 1, 1, 1, 0, 0, 0]
    expected = [1, 1 / math.log2(3), 1 / math.log2(6), 1 / math.log2(11), 0, 0, 0]
    assert ndcg(RANKS, 10).tolist() == pytest.approx(expected)
    assert reciprocal_rank(RANKS).tolist() == pytest.approx([1, 1 / 2, 1 / 5, 1 / 10, 1 / 10.5, 1 / 11, 0])
    metrics = ranking_metrics(RANKS, ks=(5, 10))
    assert list(metrics) == ["hit_rate@5", "hit_rate@10", "ndcg@5", "ndcg@10", "mrr"]
    assert metrics["hit_rate@5"] == pytest.approx(3 / 7)
    assert metrics["ndcg@10"] == pytest.approx(sum(expected) / 7)
    assert all(type(value) is float for value in metrics.values())


def test_agrees_with_ir_measures():
    rng = np.random.default_rng(0)
    num_users, num_items, ks = 40, 60, (5, 10, 20, 50)
    scores = rng.permuted(np.tile(np.arange(num_items, dtype=float), (num_users, 1)), axis=1)
    targets = rng.integers(num_items, size=num_users)
    ranks = 1 + (scores > scores[np.arange(num_users), targets][:, None]).sum(axis=1)
    run = [ScoredDoc(str(u), str(i), scores[u, i]) for u in range(num_users) for i in range(num_items)]
    qrels = [Qrel(str(u), str(target), 1) for u, target in enumerate(targets)]
    ours = ranking_metrics(torch.tensor(ranks, dtype=torch.float32), ks)
    theirs = ir_measures.calc_aggregate([m @ k for k in ks for m in (Success, nDCG)] + [RR], qrels, run)
    assert ours["mrr"] == pytest.approx(theirs[RR])
    for k in ks:
        assert ours[f"hit_rate@{k}"] == pytest.approx(theirs[Success @ k])
        assert ours[f"ndcg@{k}"] == pytest.approx(theirs[nDCG @ k])


@given(ranks_of_users)
@settings(deadline=None, max_examples=50)
def test_properties(ranks):
    metrics = ranking_metrics(ranks, ks=(1, 5, 10))
    for name in ("hit_rate", "ndcg"):
        assert 0 <= metrics[f"{name}@1"] <= metrics[f"{name}@5"] <= metrics[f"{name}@10"] <= 1
    for k in (1, 5, 10):
        assert metrics[f"ndcg@{k}"] <= metrics[f"hit_rate@{k}"]
    assert metrics["ndcg@1"] == metrics["hit_rate@1"]
    assert ranking_metrics(ranks.flip(0), ks=(1, 5, 10)) == pytest.approx(metrics)
    worse = ranking_metrics(ranks + 1, ks=(1, 5, 10))
    assert all(worse[name] <= metrics[name] for name in metrics)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hit_rate(torch.tensor([math.nan]), 10), "NaN"),
        (lambda: reciprocal_rank(torch.tensor([0.0])), "at least 1"),
        (lambda: ndcg(RANKS, 0), "k is 0"),
        (lambda: metric_values(RANKS, "map@10"), "unknown metric 'map@10'"),
        (lambda: ranking_metrics(torch.tensor([])), "no users"),
        (lambda: paired_bootstrap(RANKS, RANKS[:2]), "same users"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bootstrap_interval_is_the_bootstrap():
    """Drawing value counts equals drawing users: compare with the latter, which holds users x resamples."""
    rng = np.random.default_rng(1)
    ranks = torch.from_numpy(rng.geometric(0.02, size=500)).float()
    for name in ("hit_rate@10", "ndcg@10", "mrr"):
        values = metric_values(ranks, name)
        draws = values.numpy()[rng.integers(500, size=(4000, 500))].mean(axis=1)
        low, high = bootstrap_interval(values, num_resamples=4000)
        width = high - low
        assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.06 * width)
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_interval_covers_the_mean_in_95_percent_of_samples():
    rng = np.random.default_rng(2)
    samples = torch.from_numpy(rng.random((400, 300)) < 0.3).float()
    bounds = np.array([bootstrap_interval(sample, num_resamples=400) for sample in samples])
    assert 0.91 <= ((bounds[:, 0] <= 0.3) & (bounds[:, 1] >= 0.3)).mean() <= 0.98


def test_bootstrap_of_a_constant_is_a_point():
    assert bootstrap_interval(torch.ones(5)) == (1, 1)


def test_paired_bootstrap_sees_what_single_intervals_cannot():
    rng = np.random.default_rng(3)
    ranks = torch.from_numpy(rng.integers(1, 40, size=400)).float()
    better = torch.where(torch.from_numpy(rng.random(400) < 0.3), (ranks - 1).clamp(min=1), ranks)
    difference = paired_bootstrap(better, ranks, "ndcg@10")
    assert 0 < difference["low"] < difference["difference"] < difference["high"]
    single = [bootstrap_interval(metric_values(r, "ndcg@10")) for r in (better, ranks)]
    assert single[0][0] < single[1][1]  # they overlap
    assert paired_bootstrap(ranks, ranks) == {"difference": 0, "low": 0, "high": 0}


def test_evaluate_metrics_agree_with_the_functions(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    from transrec_hf.evaluation.metrics_evaluate import MRR, NDCG, HitRate

    ranks = RANKS[:6]
    combined = evaluate.combine([metric(cache_dir=str(tmp_path)) for metric in (HitRate, NDCG, MRR)])
    combined.add_batch(predictions=ranks[:4].tolist())
    combined.add_batch(predictions=ranks[4:].tolist())
    assert combined.compute() == pytest.approx(
        {"hit_rate@10": 4 / 6, "ndcg@10": ndcg(ranks, 10).mean().item(), "mrr": reciprocal_rank(ranks).mean().item()}
    )
    assert HitRate(cache_dir=str(tmp_path)).compute(predictions=ranks.tolist(), k=5) == {"hit_rate@5": 0.5}


def test_importing_the_package_does_not_import_evaluate():
    modules = "transrec_hf.evaluation.metrics, transrec_hf.evaluation.evaluator"
    code = f"import sys, {modules}; sys.exit('evaluate' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(transrec_hf.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
