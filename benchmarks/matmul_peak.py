"""
Measure the share of the machine's matmul peak that encoding texts reaches, with the given text tower and with a tower
of the size of BERT-base, which has random weights and the same tokenizer.

The peak is the rate of square matrix products in the same dtype: the best of several sizes and of the two libraries
that PyTorch has for them, measured in the same rounds. Only the work for real tokens counts, 2 FLOP for each pair of a
multiplication and an addition in the linear layers and in attention. Padding, embeddings, norms, activations,
tokenising and copies therefore lower the share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import Results, interleaved, ratios
from transformers import AutoConfig, BertConfig

from transrec_hf import TransRecConfig, TransRecModel, TransRecProcessor, encode_catalogue
from transrec_hf.data.catalogue import load_catalogue
from transrec_hf.items.encoding import has_packed_linears
from transrec_hf.items.preparing import ItemSource


SIZES = (1024, 2048, 4096)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument(
        "--text_model", required=True, help="folder of the text tower; BERT-base uses its tokenizer too"
    )
    parser.add_argument("--num_items", type=int, default=1500, help="number of items drawn from the catalogue")
    parser.add_argument("--max_text_length", type=int, default=64)


def useful_flop(config: BertConfig, lengths: np.ndarray) -> float:
    """Returns the FLOP of a forward pass over texts with the given numbers of tokens."""
    width, inner = config.hidden_size, config.intermediate_size
    linear = 2 * lengths.sum() * (4 * width**2 + 2 * width * inner)
    return float(config.num_hidden_layers * (linear + 4 * width * (lengths.astype(float) ** 2).sum()))


def packed_product(b_packed: torch.Tensor, a: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Computes a product with oneDNN, for which the weight is packed once."""
    return torch.ops.mkldnn._linear_pointwise(a, b_packed, None, "none", [], "")


def matmul_rate(dtype: torch.dtype) -> float:
    """Returns the FLOP per second of the fastest square product, of MKL or oneDNN."""
    best = 0.0
    for size in SIZES:
        a, b = torch.randn(2, size, size).to(dtype)
        products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.matmul]
        if has_packed_linears(dtype):
            b_packed = torch.ops.mkldnn._reorder_linear_weight(b)
            products.append(partial(packed_product, b_packed))
        for product in products:
            product(a, b)
            started = time.perf_counter()
            for _ in range(3):
                product(a, b)
            best = max(best, 3 * 2 * size**3 / (time.perf_counter() - started))
    return best


def run(options: argparse.Namespace, results: Results) -> None:
    catalogue = load_catalogue(options.data).with_policy("text")
    rows = np.random.default_rng(options.seed).permutation(len(catalogue))[: options.num_items]
    catalogue = catalogue.select(np.sort(rows))
    processor = TransRecProcessor.from_towers(options.text_model, max_text_length=options.max_text_length)
    source = ItemSource(catalogue, processor)
    lengths = source.units()["text"]
    small = AutoConfig.from_pretrained(options.text_model)
    base = BertConfig(vocab_size=small.vocab_size)
    for name, config in ((f"{small.hidden_size} wide, {small.num_hidden_layers} layers", small), ("BERT-base", base)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(options.seed)
            model = TransRecModel(TransRecConfig(text_config=config, hidden_size=256)).to(dtype)
            peaks: list[float] = []

            def encode(model: TransRecModel = model) -> None:
                encode_catalogue(model, source, batch_size=512)

            def peak(dtype: torch.dtype = dtype, peaks: list[float] = peaks) -> None:
                peaks.append(matmul_rate(dtype))

            seconds = interleaved({"encode": encode, "peak": peak}, options.repeats)
            rates = [useful_flop(config, lengths) / value for value in seconds["encode"]]
            kept, label = peaks[-options.repeats :], str(dtype).removeprefix("torch.")
            results.add(name, "encoding", [rate / 1e9 for rate in rates], "GFLOP/s", dtype=label)
            results.add(name, "matmul peak", [value / 1e9 for value in kept], "GFLOP/s", dtype=label)
            results.add(name, "share of peak", ratios(rates, kept), "x", reference="matmul peak", dtype=label)
            items = [len(catalogue) / value for value in seconds["encode"]]
            results.add(name, "items per second", items, "items/s", dtype=label)
