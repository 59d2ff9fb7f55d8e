"""
Time to quality against the official recipe: after each epoch the ranking of the validation targets.

The official recipe takes hours on a CPU, so what it learns and how long it takes are measured apart. What it learns:
the same windows, negatives, loss, rates and batches, but with each distinct item encoded once, in bf16 and from stored
states (losses and gradients are equal but for rounding, and for dropout, which two slots of one item then share). How
long it takes: the median seconds of real steps of the official recipe, times the steps of an epoch. Our own recipe is
timed as it runs. Evaluation is timed on neither side; the filling of our store is.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import recipes
from common import Results, learning_curve, rows_of
from recipes import OFFICIAL, OURS, Domain, Training


def add_options(parser: argparse.ArgumentParser) -> None:
    recipes.add_options(parser)
    parser.add_argument("--official_epochs", type=int, default=0, help="what the official recipe learns")
    parser.add_argument("--our_epochs", type=int, default=0, help="what ours learns, timed")
    parser.add_argument("--official_steps", type=int, default=0, help="real steps of the official recipe, timed")
    parser.add_argument("--summary", action="store_true", help="compare what the table has")
    parser.add_argument("--learning_rate", type=float, default=OURS.learning_rate, help="of ours")
    parser.add_argument("--tower_learning_rate", type=float, default=OURS.tower_learning_rate, help="of ours")


def run(options: argparse.Namespace, results: Results) -> None:
    if options.summary:
        summarise(options.data, results)
        return
    domain = Domain.load(options)
    if options.official_epochs:
        quick = dataclasses.replace(OFFICIAL, unique=True, buckets=True, bf16=True, store=True)
        learn("official", Training(domain, quick, options.seed), options.official_epochs, results)
    if options.our_epochs:
        rates = {"learning_rate": options.learning_rate, "tower_learning_rate": options.tower_learning_rate}
        training = Training(domain, dataclasses.replace(OURS, **rates), options.seed)
        results.add("ours", "preparation", training.preparation_seconds, "s", dtype="bf16")
        learn("ours", training, options.our_epochs, results, training.preparation_seconds)
    if options.official_steps:
        training, seconds = Training(domain, OFFICIAL, options.seed), []
        for step in range(-1, options.official_steps):
            started = time.perf_counter()
            training.steps(1)
            if step >= 0:
                seconds.append(time.perf_counter() - started)
        results.add("official", "step", seconds, "s", dtype="fp32")
        results.add("official", "epoch", statistics.median(seconds) * training.steps_per_epoch, "s", dtype="fp32")


def learn(variant: str, training: Training, num_epochs: int, results: Results, seconds: float = 0.0) -> None:
    """Train and rank; the seconds since the start are reported with each epoch."""
    for epoch in range(num_epochs + 1):
        if epoch:
            started = time.perf_counter()
            training.steps(training.steps_per_epoch)
            seconds += time.perf_counter() - started
        metrics = training.evaluate()
        results.add(variant, f"ndcg@10 after epoch {epoch}", metrics["ndcg@10"], "", dtype="bf16")
        results.add(variant, f"hit_rate@10 after epoch {epoch}", metrics["hit_rate@10"], "", dtype="bf16")
        if variant == "ours" or epoch == 0:
            results.add(variant, f"seconds after epoch {epoch}", seconds, "s", dtype="bf16")


def summarise(data: str, results: Results) -> None:
    """How much sooner ours reaches the best that the official recipe does, and what it reaches itself."""
    rows = [row for row in rows_of(results.path, "time_to_quality") if row["data"] == data]
    curves = {
        variant: learning_curve(row for row in rows if row["variant"] == variant) for variant in ("official", "ours")
    }
    for variant, (_, quality) in curves.items():
        results.add(variant, "best ndcg@10", max(quality), "")
    goal = max(curves["official"][1])
    needed = {
        variant: next((time for time, value in zip(*curve, strict=True) if value >= goal), float("inf"))
        for variant, curve in curves.items()
    }
    for variant, seconds in needed.items():
        results.add(variant, "time to the official recipe's best", seconds, "s")
    results.add("ours", "sooner", needed["official"] / needed["ours"], "x", reference="official")
