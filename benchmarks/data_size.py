"""
How the cost grows with the data: seconds of an epoch with 1, 2, 4 and 8 eighths of the users, and the exponent that
fits them (1 is linear). This is our recipe, with the upper two blocks trained and the states of the other blocks
stored.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import recipes
from common import Results, interleaved
from recipes import OURS, Domain, Training


EIGHTHS = (1, 2, 4, 8)


def add_options(parser: argparse.ArgumentParser) -> None:
    recipes.add_options(parser)


def run(options: argparse.Namespace, results: Results) -> None:
    domain = Domain.load(options)
    train = domain.split.train
    order = np.random.default_rng(options.seed).permutation(len(train))
    trainings = {}
    for eighths in EIGHTHS:
        domain.split.train = train.select(np.sort(order[: len(order) * eighths // 8]))
        trainings[eighths] = Training(domain, OURS, options.seed)
    seconds = interleaved(
        {f"{eighths}/8": partial(training.steps, training.steps_per_epoch) for eighths, training in trainings.items()},
        options.repeats,
        warm_up=0,
    )
    users = {eighths: len(training.windows) for eighths, training in trainings.items()}
    for eighths in EIGHTHS:
        results.add(f"{eighths}/8 of the users", "epoch", seconds[f"{eighths}/8"], "s", dtype="bf16")
        results.add(f"{eighths}/8 of the users", "sequences", users[eighths], "", dtype="bf16")
    rounds = np.log([[seconds[f"{eighths}/8"][r] for eighths in EIGHTHS] for r in range(options.repeats)])
    slopes = [float(np.polyfit(np.log([users[e] for e in EIGHTHS]), times, 1)[0]) for times in rounds]
    results.add("1/8 to 8/8", "exponent", slopes, "", dtype="bf16")
