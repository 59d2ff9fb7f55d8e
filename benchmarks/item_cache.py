"""
What an item cache saves and what it costs: the encoded items per user, and the ranking of the validation targets after
training, for several ages of the cache. Training uses the paper's objective and long histories, and trains the upper
two blocks of the towers.
"""

from __future__ import annotations

import argparse
import dataclasses

import recipes
from common import Results
from recipes import OFFICIAL, Domain, Training

from transrec_hf.training.item_cache import ItemCache


def add_options(parser: argparse.ArgumentParser) -> None:
    recipes.add_options(parser)
    parser.add_argument(
        "--ages", type=int, nargs="+", default=[0, 5, 20], help="largest age of a vector in steps; 0: no cache"
    )
    parser.add_argument("--num_epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-3)


def run(options: argparse.Namespace, results: Results) -> None:
    domain = Domain.load(options)
    levers = {"unique": True, "buckets": True, "bf16": True, "store": True, "batch_size": 64}
    recipe = dataclasses.replace(OFFICIAL, learning_rate=options.learning_rate, **levers)
    for age in options.ages:
        training = Training(domain, recipe, options.seed)
        if age:
            training.cache = ItemCache(len(domain.catalogue), training.model.config.hidden_size, age)
        name = f"age {age}" if age else "no cache"
        users, items = training.steps(options.num_epochs * training.steps_per_epoch)
        results.add(name, "encoded items per user", items / users, "", dtype="bf16")
        for metric, value in training.evaluate().items():
            if metric in ("ndcg@10", "hit_rate@10"):
                results.add(name, metric, value, "", dtype="bf16")
