"""
Compare our search for the nearest items with plain torch and `faiss.IndexFlatIP`, in the same run and in one thread.
It measures one user at a time (p50 and p99 of single requests), batches of 256, filters that leave 1 % and 50 % of the
items, recall@10 of every kind of index, adding 1,000 items to an index on the disk, and the start of a new process
from such an index.

    OMP_NUM_THREADS=1 python benchmarks/run.py nearest --num_items 100000

Vectors are drawn in clusters, and users are noisy means of five items that are near each other. It needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import Results, interleaved, ratios

from transrec_hf import ItemIndex
from transrec_hf.serving.approximate import ApproximateIndex
from transrec_hf.serving.live import LiveItems
from transrec_hf.serving.search import Matrix, search
from transrec_hf.serving.snapshot import Change


K, SIZE, SCALE = 10, 256, 12.0
START = """
import sys, time
import numpy, pyarrow, torch
import transrec_hf.serving.recommender
from transrec_hf.serving.live import LiveItems
torch.set_num_threads(1)
pages = lambda: list(map(int, open("/proc/self/statm").read().split()))
rss = lambda: 4096 * pages()[1]
private = lambda: 4096 * (pages()[1] - pages()[2])
before, private_before, started = rss(), private(), time.perf_counter()
snapshot = LiveItems.open(sys.argv[1], int(sys.argv[2])).snapshot
seconds = time.perf_counter() - started
snapshot.search(snapshot.vectors(numpy.array([0])), 10)
print(seconds, time.perf_counter() - started, rss() - before, private() - private_before)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_items", type=int, default=100_000)
    parser.add_argument(
        "--without_cells", action="store_true", help="leave out faiss IVF, which takes minutes to build"
    )
    parser.add_argument("--requests", type=int, default=100, help="requests of one user in each round")
    parser.add_argument("--recall", type=float, default=0.99, help="recall that the approximate index has to reach")


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws items in clusters, and users near them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.05, SIZE)
    centres = torch.randn(max(100, n // 200), SIZE, generator=generator) * spread
    own = torch.randint(len(centres), (n,), generator=generator)
    items = centres[own] + torch.randn(n, SIZE, generator=generator) * spread
    items = torch.nn.functional.normalize(items, dim=1)
    first = torch.randint(n, (256,), generator=generator)
    near = search(Matrix.of(items, SIZE), items[first], 5)[1]
    users = items[near].mean(dim=1) + 0.02 * torch.randn(256, SIZE, generator=generator)
    return items, torch.nn.functional.normalize(users, dim=1) * SCALE


def one_by_one(find: Callable[[torch.Tensor], Any], users: torch.Tensor) -> list[float]:
    """Returns the seconds of each request for one user."""
    seconds = []
    for user in users.split(1):
        started = time.perf_counter()
        find(user)
        seconds.append(time.perf_counter() - started)
    return seconds


def share(rows: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the share of the exact rows that were found."""
    return float((rows[:, :, None] == exact[:, None, :]).any(dim=1).float().mean())


def run(options: argparse.Namespace, results: Results) -> None:
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    n = options.num_items
    results.facts["data"] = f"{n:,} vectors of {SIZE}"
    items, users = draw(n, options.seed)
    matrix = Matrix.of(items, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, items, matrix)
        add_to(folder, items, results, options.repeats)
        write(folder, items, matrix)
        results.add(
            "ours", "index on the disk", sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6, "MB"
        )
        starts = [start(folder) for _ in range(options.repeats)]
        for column, (metric, unit, factor) in enumerate(
            (
                ("start", "s", 1),
                ("start and first request", "s", 1),
                ("memory", "MB", 1e-6),
                ("private memory", "MB", 1e-6),
            )
        ):
            results.add("ours", metric, [factor * values[column] for values in starts], unit)

    flat = faiss.IndexFlatIP(SIZE)
    flat.add(items.numpy())
    kinds: dict[str, Callable[[torch.Tensor], Any]] = {
        "ours": lambda some: search(matrix, some, K)[1],
        "torch": lambda some: (some @ items.T).topk(K, dim=1).indices,
        "faiss IndexFlatIP": lambda some: torch.from_numpy(flat.search(some.numpy(), K)[1]),
    }
    if not options.without_cells:
        started = time.perf_counter()
        cells = ApproximateIndex.build(matrix, options.recall, users, options.seed)
        results.add("faiss IVF,SQ8", "build", time.perf_counter() - started, "s")
        results.add("faiss IVF,SQ8", "cells looked at", cells.nprobe, f"of {cells.num_cells}")
        kinds["faiss IVF,SQ8"] = lambda some: cells.search(some, K)[1]
    exact = torch.cat([kinds["torch"](some) for some in users.split(32)])
    for name, find in kinds.items():
        results.add(name, "recall@10", share(torch.cat([find(some) for some in users.split(32)]), exact), "")

    singles: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for repeat in range(-1, options.repeats):
        for name, find in kinds.items():
            seconds = one_by_one(find, users[: options.requests])
            if repeat >= 0:
                singles[name].append(seconds)
    medians = {name: [float(np.median(round_)) for round_ in rounds] for name, rounds in singles.items()}
    for name, rounds in singles.items():
        results.add(name, "one user, p50", [1e3 * value for value in medians[name]], "ms")
        results.add(name, "one user, p99", [1e3 * float(np.quantile(round_, 0.99)) for round_ in rounds], "ms")
    best = [min(pair) for pair in zip(medians["torch"], medians["faiss IndexFlatIP"], strict=True)]
    results.add("ours", "one user", ratios(medians["ours"], best), "x", reference="the faster of torch and faiss flat")

    batches = {
        name: (lambda find=find: find(users)) for name, find in kinds.items() if n <= 200_000 or "Flat" not in name
    }
    together = interleaved(batches, options.repeats)
    for name, values in together.items():
        results.add(name, "256 users", [1e3 * value for value in values], "ms")
    results.add("ours", "256 users", ratios(together["ours"], together["torch"]), "x", reference="torch")

    for part in (0.01, 0.5):
        allowed = torch.rand(n, generator=torch.Generator().manual_seed(1)) < part
        right = torch.cat(
            [(some @ items.T).masked_fill(~allowed, -torch.inf).topk(K).indices for some in users.split(32)]
        )
        filtered = {"ours": lambda some, allowed=allowed: search(matrix, some, K, allowed)[1]}
        if not options.without_cells:
            filtered["faiss IVF,SQ8"] = lambda some, allowed=allowed: cells.search(some, K, allowed)[1]
        for name, find in filtered.items():
            what = f"filter that leaves {part:.0%}"
            results.add(name, f"recall@10, {what}", share(find(users), right), "")
            single = [
                1e3 * float(np.median(one_by_one(find, users[: options.requests]))) for _ in range(options.repeats)
            ]
            results.add(name, f"one user, p50, {what}", single, "ms")


def index_of(vectors: torch.Tensor, first: int) -> ItemIndex:
    ids = np.array([f"item-{row}" for row in range(first, first + len(vectors))], dtype=object)
    columns = pa.table({"text": ids, "price": np.arange(len(ids))})
    present = torch.ones(len(ids), 4, dtype=torch.bool)
    hashes = np.zeros((len(ids), 16), dtype=np.uint8)
    return ItemIndex(ids, vectors, present, "", "model", item_hashes=hashes, columns=columns)


def write(folder: str, items: torch.Tensor, matrix: Matrix) -> None:
    index = index_of(items, 0)
    index.scan = matrix.scan
    index.save(folder)


def add_to(folder: str, items: torch.Tensor, results: Results, repeats: int) -> None:
    live = LiveItems.open(folder, SIZE)
    seconds = []
    for repeat in range(repeats):
        new = index_of(items[:1000].clone(), len(items) + 1000 * repeat)
        started = time.perf_counter()
        live.change(always(Change(new)))
        seconds.append(time.perf_counter() - started)
    results.add("ours", "adding 1,000 items, on the disk", [1e3 * value for value in seconds], "ms")


def always(change: Change) -> Callable[[Any], Change]:
    return lambda snapshot: change


def start(folder: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", START, folder, str(SIZE)], capture_output=True, text=True, check=True)
    return list(map(float, done.stdout.split()))
