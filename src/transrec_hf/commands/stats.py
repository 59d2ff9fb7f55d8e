"""`transrec stats`: what you must know about the data to judge results, as text, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Split
from ..data.statistics import data_statistics
from ..errors import bad_input
from ..files import whole_file
from .options import DataArguments, SplitArguments, option
from .parsing import parse_arguments
from .reporting import format_table


logger = logging.get_logger(__name__)


@dataclass
class StatisticsArguments:
    """What is shown, and how."""

    _argument_group_name = "statistics"
    max_history: int = option(
        50, "Number of history items that the model would read, for protocols that depend on it."
    )
    json: bool = option(False, "Print JSON.")
    plot: str | None = option(None, "PNG file for a plot of the lengths of histories and the popularity of items.")


def stats(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Show what a data set holds, and what is left of it after the split.

        transrec stats my_shop
        transrec stats my_shop --plot my_shop.png
        transrec stats org/data --protocol ninerec --max_history 20 --json

    It prints sizes, modalities, lengths of histories, the shares of targets that their user chose before and of
    targets that training never saw, and the popularity of items.
    """
    kinds = (DataArguments, SplitArguments, StatisticsArguments)
    data_args, split_args, args = parse_arguments(kinds, argv, stats, positional="data")
    catalogue, sequences = data_args.load()
    with bad_input(data_args.name):
        split = split_args.apply(sequences, args.max_history)
    statistics = data_statistics(catalogue, split)
    print(json.dumps(statistics, indent=2) if args.json else format_statistics(data_args.name, statistics))
    if args.plot:
        plot_statistics(catalogue, split, Path(args.plot))
    return statistics


def format_statistics(name: str, statistics: Mapping[str, Any]) -> str:
    """The result of [`data_statistics`] as text."""
    shares = statistics["items_with"].items()
    mix = ", ".join(f"{share:.0%} {kind.replace('_', ' ')}" for kind, share in shares if share)
    popularity = statistics["popularity"]
    lines = [
        name,
        f"  {statistics['num_items']:,} items ({mix}), {statistics['num_users']:,} users, "
        f"{statistics['num_interactions']:,} interactions",
        f"  {statistics['users_left_out']:,} users have too few interactions for the split",
        f"  {statistics['cold_catalogue_share']:.1%} of the items do not occur in training; the most popular tenth "
        f"has {popularity['top_decile_share']:.1%} of the interactions (Gini {popularity['gini']:.2f})",
    ]
    header = ["", "sequences", "length: mean", "p10", "median", "p90", "max", "repeated targets", "cold targets"]
    rows = [header]
    for part in ("train", "validation", "test"):
        values = statistics[part]
        length = [f"{values['length'][name]:.1f}" for name in ("mean", "p10", "median", "p90", "max")]
        targets = [f"{values[k]:.1%}" if k in values else "" for k in ("repeat_target_share", "cold_target_share")]
        rows.append([part, f"{values['sequences']:,}", *length, *targets])
    return "\n".join(lines) + "\n\n" + format_table(rows)


def plot_statistics(catalogue: Catalogue, split: Split, file: Path) -> None:
    """Draw lengths of the training sequences and interactions by item. Without Matplotlib, log a warning."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("Nothing was drawn, because Matplotlib is missing: pip install 'transrec-hf[plot]'.")
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    lengths, popularity = figure.subplots(1, 2)
    values, users = np.unique(split.train.lengths, return_counts=True)
    lengths.bar(values, users, width=1.0, color="#1f6f8b")
    lengths.set(title="Histories", xlabel="interactions in training", ylabel="users")
    counts = np.sort(split.train.item_counts(len(catalogue)))[::-1]
    popularity.plot(np.arange(1, len(counts) + 1), counts, color="#e09f3e", linewidth=2)
    popularity.set(title="Items", xlabel="item, most popular first", ylabel="interactions in training", xscale="log")
    for axes in (lengths, popularity):
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(file) as partial:
        figure.savefig(partial, dpi=150, format="png")
