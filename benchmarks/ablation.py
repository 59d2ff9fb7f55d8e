"""
What each lever of the training speed is worth: users per second of the official recipe, of that recipe with one lever,
with all levers, and with all levers but one.

The levers: `unique` encodes each distinct item of a batch once. `buckets` groups texts by length within a budget of
tokens and encodes a bounded number of images at a time. `bf16` is autocast. `store` reads the states of the frozen
blocks. `every_position` trains every position against the items of the batch, and not the last position against random
items.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import recipes
from common import Results, interleaved, ratios
from recipes import OFFICIAL, Domain, Recipe, Training


def add_options(parser: argparse.ArgumentParser) -> None:
    recipes.add_options(parser)
    parser.add_argument("--steps", type=int, default=1, help="steps of each variant in a round")


def run(options: argparse.Namespace, results: Results) -> None:
    levers = [field.name for field in dataclasses.fields(Recipe) if field.type == "bool"]
    together = dataclasses.replace(OFFICIAL, **dict.fromkeys(levers, True))
    variants = {"official": OFFICIAL, "all levers": together}
    variants |= {f"{lever} alone": dataclasses.replace(OFFICIAL, **{lever: True}) for lever in levers}
    variants |= {f"all but {lever}": dataclasses.replace(together, **{lever: False}) for lever in levers}
    domain = Domain.load(options)
    trainings = {name: Training(domain, recipe, options.seed) for name, recipe in variants.items()}
    seconds = interleaved(
        {name: partial(training.steps, options.steps) for name, training in trainings.items()},
        options.repeats,
    )
    for name, recipe in variants.items():
        dtype = "bf16" if recipe.bf16 else "fp32"
        # every recipe has the same users in a step
        rate = [options.steps * recipe.batch_size / value for value in seconds[name]]
        results.add(name, "users per second", rate, "users/s", dtype=dtype)
        if name != "official":
            speedup = ratios(seconds["official"], seconds[name])
            results.add(name, "speedup", speedup, "x", reference="official", dtype=dtype)
