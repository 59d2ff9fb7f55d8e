"""
Measure the requests per second that `transrec serve` answers, and the time of the slowest hundredth of them. Each
client waits for its answer. The reference calls the recommender directly, for one user after another. Server and
clients share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
from common import Results, ratios

from transrec_hf import ItemSource, Recommender, TransRecConfig, TransRecModel
from transrec_hf.data.catalogue import Catalogue


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", type=int, default=10_000, help="items of the catalogue; their vectors are random")
    parser.add_argument("--clients", type=int, default=16, help="clients that ask at the same time")
    parser.add_argument("--requests", type=int, default=10_000, help="requests in all rounds together")
    parser.add_argument("--history", type=int, default=20, help="items of a user")


def make_recommender(num_items: int) -> Recommender:
    """Returns a recommender without towers, as they are not measured."""
    model = TransRecModel(TransRecConfig(num_items=num_items, hidden_size=256, max_position_embeddings=50))
    columns = {"item_id": [f"item-{row}" for row in range(num_items)], "text": ["a hat"] * num_items}
    return Recommender(model, ItemSource(Catalogue(datasets.Dataset.from_dict(columns))))


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """Runs `transrec serve` in a process of its own, and yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transrec_cli", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


async def ask(port: int, bodies: list[bytes], clients: int) -> tuple[list[float], int]:
    """Sends the requests. Returns the seconds of each, and how many were not answered with status 200."""
    todo, seconds, errors = iter(bodies), [], 0

    async def client() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in todo:
            start = time.perf_counter()
            head = (
                f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            writer.write(head.encode() + b"\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            seconds.append(time.perf_counter() - start)
            errors += b" 200 " not in answer.split(b"\r\n")[0]
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, errors


def run(options: argparse.Namespace, results: Results) -> None:
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    recommender = make_recommender(options.items)
    count = -(-options.requests // options.repeats)
    rows = rng.integers(options.items, size=(count, options.history))
    histories = [[f"item-{row}" for row in user] for user in rows.tolist()]
    bodies = [json.dumps({"histories": [history], "k": 10}).encode() for history in histories]
    direct: list[float] = []
    through: list[float] = []
    slowest: list[float] = []
    errors = 0
    with tempfile.TemporaryDirectory() as folder:
        recommender.save_pretrained(folder)
        with served(Path(folder)) as port:
            for repeat in range(-1, options.repeats):
                some = slice(None) if repeat >= 0 else slice(200)
                start = time.perf_counter()
                for history in histories[some]:
                    recommender.recommend([history], 10)
                alone = len(histories[some]) / (time.perf_counter() - start)
                start = time.perf_counter()
                seconds, failed = asyncio.run(ask(port, bodies[some], options.clients))
                if repeat >= 0:
                    direct.append(alone)
                    through.append(len(seconds) / (time.perf_counter() - start))
                    slowest.append(float(np.quantile(seconds, 0.99)))
                    errors += failed
    facts = {"data": f"{options.items:,} random vectors", "dtype": "float32"}
    results.add("recommend", "calls", direct, "calls/s", **facts)
    results.add("service", "requests", through, "requests/s", **facts)
    results.add("service", "p99", slowest, "s", **facts)
    results.add("service", "errors", float(errors), "requests", **facts)
    results.add("service", "throughput", ratios(through, direct), "x", reference="recommend", **facts)
