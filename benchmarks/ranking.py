"""
Compare ranking all items, for given user and item vectors, with sorting the scores.

    python benchmarks/run.py ranking

Sorting is what research code usually does: it computes the scores of a batch of users in fp32, masks the items of the
history, sorts all items and looks up the target in that order. This package counts the scores above the score of the
target. It sums scores in fp64, so that equal items tie and a rank does not depend on the batch.
"""

from __future__ import annotations

import argparse

import torch
from common import Results, interleaved, ratios
from large_catalogue import Memory

from transrec_hf.evaluation.metrics import ranking_metrics
from transrec_hf.evaluation.ranking import rank_targets


COUNT, SORT = "transrec-hf", "argsort"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["10000x12000x64", "10000x12000x256", "1024x200000x64", "1024x200000x256"],
        help="numbers of users and items, and size of their vectors: users x items x size",
    )
    parser.add_argument("--history", type=int, default=20, help="number of items masked for each user")
    parser.add_argument(
        "--sort_batch_size", type=int, default=512, help="number of users whose scores are sorted at a time"
    )


@torch.no_grad()
def sort_ranks(
    users: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, history: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Returns the ranks of the targets, found by sorting all items for each user."""
    ranks = []
    for start in range(0, len(users), batch_size):
        batch = slice(start, start + batch_size)
        scores = users[batch] @ items.T
        scores.scatter_(1, history[batch], -torch.inf)
        order = scores.argsort(dim=1, descending=True)
        ranks.append((order == targets[batch, None]).nonzero()[:, 1] + 1)
    return torch.cat(ranks).float()


def compare(size: str, options: argparse.Namespace, results: Results) -> None:
    num_users, num_items, width = map(int, size.split("x"))
    torch.manual_seed(options.seed)
    users, items = torch.randn(num_users, width), torch.randn(num_items, width)
    targets = torch.randint(num_items // 2, (num_users,))
    items[: num_items // 2] += 0.1 * users.mean(dim=0)
    users += 0.3 * items[targets]  # so that there is something to hit
    history = torch.randint(num_items // 2, num_items, (num_users, options.history))
    ranks: dict[str, torch.Tensor] = {}
    functions = {
        COUNT: lambda: ranks.update({COUNT: rank_targets(users, items, targets, history)}),
        SORT: lambda: ranks.update({SORT: sort_ranks(users, items, targets, history, options.sort_batch_size)}),
    }
    seconds = interleaved(functions, options.repeats)
    agreement = (ranks[COUNT] == ranks[SORT]).float().mean().item()
    metrics = {name: ranking_metrics(values) for name, values in ranks.items()}
    for name, value in metrics[COUNT].items():
        assert abs(value - metrics[SORT][name]) < 1e-3, f"{name} is {value}, sorted {metrics[SORT][name]}"
    facts = {"dtype": "float32", "data": f"random vectors: {num_users} users, {num_items} items, size {width}"}
    memory = Memory()
    for name, function in functions.items():
        results.add(name, "ranking_speed", [num_users / value for value in seconds[name]], "users/s", **facts)
        before = memory.now()["peak_private"]
        with memory.phase(name):
            function()
        results.add(name, "peak_memory", memory.phases[name]["peak_private"][0] - before, "MiB", **facts)
    results.add(COUNT, "speedup", ratios(seconds[SORT], seconds[COUNT]), "x", reference=SORT, **facts)
    results.add(COUNT, "equal_ranks", agreement, "share of users", reference=SORT, **facts)


def run(options: argparse.Namespace, results: Results) -> None:
    for size in options.sizes:
        compare(size, options, results)
