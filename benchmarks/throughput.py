"""
Compare the speed of training with that of the official recipe, with the same towers: users, that is sequences, per
second.

Both train the upper two blocks of each tower. Whole steps are timed in rounds, including reading and the optimizer.
The time to fill our store is not included, because the store is filled once; it is reported separately, in seconds.
"""

from __future__ import annotations

import argparse
from functools import partial

import recipes
from common import Results, interleaved, ratios
from recipes import OFFICIAL, OURS, Domain, Training


def add_options(parser: argparse.ArgumentParser) -> None:
    recipes.add_options(parser)
    parser.add_argument("--steps", type=int, default=2, help="steps of each recipe in a round")


def run(options: argparse.Namespace, results: Results) -> None:
    domain = Domain.load(options)
    trainings = {
        name: Training(domain, recipe, options.seed) for name, recipe in (("official", OFFICIAL), ("ours", OURS))
    }
    results.add("ours", "preparation", trainings["ours"].preparation_seconds, "s", dtype="bf16")
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in trainings}

    def train(name: str) -> None:
        found[name].append(trainings[name].steps(options.steps))

    seconds = interleaved({name: partial(train, name) for name in trainings}, options.repeats)
    rates = {}
    for name, dtype in (("official", "fp32"), ("ours", "bf16")):
        counts = found[name][-options.repeats :]
        rates[name] = ratios([users for users, _ in counts], seconds[name])
        results.add(name, "users per second", rates[name], "users/s", dtype=dtype)
        results.add(name, "encoded items per user", [items / users for users, items in counts], "", dtype=dtype)
    results.add("ours", "speedup", ratios(rates["ours"], rates["official"]), "x", reference="official", dtype="bf16")
