"""
Compare the time to quality with that of the official recipe: the validation targets are ranked after each epoch.

The official recipe takes hours on a CPU, so its quality and its time are measured separately. For its quality it is
trained with the same windows, negatives, loss, rates and batches, but each distinct item is encoded once, in bf16 and
from stored states. (Losses and gradients are equal except for rounding, and for dropout, which two slots of one item
then share.) Its time is the median of some real steps, times the steps of an epoch. Our own recipe trains some epochs
with frozen towers and then some epochs with the upper two blocks. It is timed as it runs, including the time to fill
its stores. The time of evaluation does not count on either side.

The learning rates and the numbers of epochs of our recipe were chosen among ten settings, on the validation targets of
3,000 users of amazon-beauty and of hm with seed 0. With frozen towers alone the model soon overfits so few users, at
1e-3 more than at 3e-4, and also with more dropout or weight decay. Training the upper blocks brings more than any of
these.
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
    parser.add_argument(
        "--official_epochs", type=int, default=0, help="epochs of the official recipe, for its quality"
    )
    parser.add_argument("--frozen_epochs", type=int, default=0, help="timed epochs of ours with frozen towers")
    parser.add_argument("--our_epochs", type=int, default=0, help="timed epochs of ours with the upper two blocks")
    parser.add_argument("--official_steps", type=int, default=0, help="timed real steps of the official recipe")
    parser.add_argument("--summary", action="store_true", help="compare the rows that the table has")


def run(options: argparse.Namespace, results: Results) -> None:
    if options.summary:
        summarise(results)
        return
    domain = Domain.load(options)
    if options.official_epochs:
        quick = dataclasses.replace(OFFICIAL, unique=True, buckets=True, bf16=True, store=True)
        learn("official", Training(domain, quick, options.seed), options.official_epochs, results)
        domain = Domain.load(options)  # without a store: the time to fill it counts
    if options.frozen_epochs:
        frozen = dataclasses.replace(OURS, batch_size=128, trained_blocks=0)
        upper = dataclasses.replace(OURS, batch_size=128, learning_rate=2e-4)
        training = Training(domain, frozen, options.seed)
        seconds = learn("ours", training, options.frozen_epochs, results, training.preparation_seconds)
        training = Training(domain, upper, options.seed, training.model)
        seconds += training.preparation_seconds
        learn("ours", training, options.our_epochs, results, seconds, first=options.frozen_epochs + 1)
    if options.official_steps:
        training, times = Training(domain, OFFICIAL, options.seed), []
        for step in range(-1, options.official_steps):
            started = time.perf_counter()
            training.steps(1)
            if step >= 0:
                times.append(time.perf_counter() - started)
        results.add("official", "step", times, "s", dtype="fp32")
        results.add("official", "epoch", statistics.median(times) * training.steps_per_epoch, "s", dtype="fp32")


def learn(
    variant: str, training: Training, num_epochs: int, results: Results, seconds: float = 0.0, first: int = 0
) -> float:
    """Trains and ranks. The seconds of training so far are reported with each epoch. Returns their sum."""
    for epoch in range(first, first + num_epochs + (first == 0)):
        if epoch:
            started = time.perf_counter()
            training.steps(training.steps_per_epoch)
            seconds += time.perf_counter() - started
        metrics = training.evaluate()
        for metric in ("ndcg@10", "hit_rate@10"):
            results.add(variant, f"{metric} after epoch {epoch}", metrics[metric], "", dtype="bf16")
        if variant == "ours":
            results.add(variant, f"seconds after epoch {epoch}", seconds, "s", dtype="bf16")
    return seconds


def summarise(results: Results) -> None:
    """Adds how much sooner our recipe reaches the best value of the official one, and its own best value."""
    rows = [row for row in rows_of(results.path, "time_to_quality") if row["data"] == results.facts["data"]]
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
        results.add(variant, "time to the official recipe's best", seconds, "s")  # infinite if it never reaches that
    results.add("ours", "sooner", needed["official"] / needed["ours"], "x", reference="official")
