"""
Measure how the quality of a ranking changes when item vectors are compressed, and what compression costs: half
precision, bytes, shorter vectors, and codes of an `ItemQuantizer`. Several models can be compared, for example a
teacher and its students.

Test targets are ranked with the compressed vectors, in the histories too. Popularity stays one number per item.
Without a checkpoint the model is untrained: it uses whitened item vectors and the recency-weighted mean of the
history. A plot of quality over bytes is written next to the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Results, interleaved
from page import plot_compression

from transrec_hf import (
    ItemSource,
    RankingEvaluator,
    TransRecModel,
    TransRecProcessor,
    encode_catalogue,
    leave_one_out,
    load_domain,
)
from transrec_hf.data.statistics import log_popularity
from transrec_hf.items.codes import ItemQuantizer
from transrec_hf.items.meeting import standardize_for


METRICS = ("hit_rate@10", "ndcg@10")
TIMED_ITEMS, TIMED_USERS = 1000, 200


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--text_model", help="folder of the text tower")
    parser.add_argument("--vision_model", help="folder of the vision tower")
    parser.add_argument("--checkpoints", nargs="*", default=[], help="folders of trained models")
    parser.add_argument(
        "--shares", type=int, nargs="*", default=[8, 16, 32], help="how many times smaller codes are than fp32"
    )
    parser.add_argument(
        "--prefixes", type=int, nargs="*", default=[2, 4, 8], help="how many times shorter prefixes are"
    )
    parser.add_argument("--methods", nargs="*", default=["product"], help="methods of the quantizer")
    parser.add_argument(
        "--rotations", type=int, default=0, help="rotations of the method product; whitened vectors need none"
    )
    parser.add_argument("--max_users", type=int, help="number of users to rank for")


def forms(vectors: torch.Tensor, options: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yields the ways to store vectors: a name, the vectors that are scored instead, and the bytes per item."""
    size = vectors.shape[1]
    yield "fp32", vectors, 4 * size
    yield "fp16", vectors.half().float(), 2 * size
    scale = vectors.abs().amax(dim=1, keepdim=True) / 127
    yield "int8", (vectors / scale).round() * scale, size + 4
    for share in options.prefixes:
        yield f"prefix of {size // share}", vectors[:, : size // share], 4 * (size // share)
    for method in options.methods:
        for share in options.shares if len(vectors) >= 256 else ():
            num = 4 * size // share
            quantizer = ItemQuantizer.fit(vectors, num, method=method, rotations=options.rotations, seed=options.seed)
            print(f"{method}, {num} codes: {quantizer.report(vectors)}", flush=True)
            yield f"{method}, {num} codes", quantizer.decode(quantizer.encode(vectors)), quantizer.bytes_per_item


def measure(
    name: str,
    model: TransRecModel,
    source: ItemSource,
    evaluator: RankingEvaluator,
    options: argparse.Namespace,
    results: Results,
) -> None:
    """Measures one model and adds its rows to the table."""
    standardize_for(model, source, seed=options.seed)
    few = source.select(np.random.default_rng(options.seed).permutation(len(source))[:TIMED_ITEMS])
    seconds = interleaved({name: partial(encode_catalogue, model, few)}, options.repeats)
    results.add(name, "encoding", [len(few) / each for each in seconds[name]], "items/s")
    whole = encode_catalogue(model, source).float()
    vectors, popularity = whole[:, : model.config.hidden_size], whole[:, model.config.hidden_size :]
    states = torch.randn(TIMED_USERS, vectors.shape[1])
    for form, scored, bytes_an_item in forms(vectors, options):
        padded = torch.nn.functional.pad(scored, (0, vectors.shape[1] - scored.shape[1]))
        if model.config.similarity == "cosine":
            padded = torch.nn.functional.normalize(padded, dim=-1)
        metrics = evaluator.evaluate(model, item_embeds=torch.cat([padded, popularity], dim=1))["metrics"]
        results.add(f"{name}, {form}", "size", float(bytes_an_item), "bytes an item")
        for metric in METRICS:
            results.add(f"{name}, {form}", metric, metrics[metric], "")
        columns = scored.T.contiguous()

        def rank(columns: torch.Tensor = columns) -> None:
            for state in states[:, : len(columns)]:
                (state @ columns).topk(10)

        seconds = interleaved({form: rank}, options.repeats)
        results.add(f"{name}, {form}", "search", [1000 * each / len(states) for each in seconds[form]], "ms a user")


def run(options: argparse.Namespace, results: Results) -> None:
    torch.set_num_threads(1)
    catalogue, sequences = load_domain(options.data)
    split = leave_one_out(sequences)
    for checkpoint in options.checkpoints or [None]:
        torch.manual_seed(options.seed)
        if checkpoint:
            model = TransRecModel.from_pretrained(checkpoint)
            processor = TransRecProcessor.from_pretrained(checkpoint)
        else:
            towers = {
                name: getattr(options, name) for name in ("text_model", "vision_model") if getattr(options, name)
            }
            model = TransRecModel.from_text_vision_pretrained(**towers)
            processor = TransRecProcessor.from_towers(**towers)
        source = ItemSource(catalogue, processor)
        evaluator = RankingEvaluator(
            source, split.test, train=split.train, max_users=options.max_users, seed=options.seed
        )
        source.log_popularity = torch.from_numpy(log_popularity(split.train.item_counts(len(catalogue))))
        name = Path(checkpoint).name if checkpoint else "untrained"
        measure(name, model.eval(), source, evaluator, options, results)
    plot_compression(results.path, Path(results.path).parent)
