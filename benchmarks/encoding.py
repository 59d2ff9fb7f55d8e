"""
Compare encoding the texts of a catalogue with `encode` of sentence-transformers, with the same text model, in fp32 and
in bf16.

    python benchmarks/run.py encoding --data data/amazon-beauty --text_model all-MiniLM-L6-v2 \
        --peers_python peers/bin/python

Both start from the texts, so that the time of both includes tokenising. Both cut texts at the same length and use the
same number of threads. sentence-transformers runs in a process of its own, which has loaded everything before the
clock starts. Its rounds alternate with those of this package, and it uses the best of three batch sizes. A projection
that is the identity makes the item vectors of this package equal to those of the text model alone, and the vectors of
both must agree.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Peer, Results, interleaved, ratios
from transformers import AutoConfig

from transrec_hf import Catalogue, TransRecModel, TransRecProcessor, encode_catalogue, load_catalogue
from transrec_hf.items.preparing import ItemSource


OURS, PEER = "transrec-hf", "sentence-transformers"
PEER_BATCH_SIZES = (32, 64, 128)
SAMPLE = 1024  # texts on which the peer's batch size is chosen
TOLERANCE = 1e-4  # between normalised vectors in fp32


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/amazon-beauty", help="folder of the data set")
    parser.add_argument("--text_model", default="all-MiniLM-L6-v2", help="folder of a model of sentence-transformers")
    parser.add_argument("--peers_python", required=True, help="Python of the environment with requirements-peers.txt")
    parser.add_argument("--num_items", type=int, default=4096, help="items drawn from the catalogue, if it has more")
    parser.add_argument("--batch_size", type=int, default=128, help="batch size of this package")
    parser.add_argument("--max_text_length", type=int, default=256, help="tokens after which a text is cut")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes of the model")


def text_encoder(text_model: str) -> TransRecModel:
    """Returns a model whose item vectors are the mean token states of its text tower."""
    width = AutoConfig.from_pretrained(text_model).hidden_size
    model = TransRecModel.from_text_vision_pretrained(text_model, hidden_size=width, text_pooling="mean")
    projection = model.item_encoder.text_projection
    with torch.no_grad():
        projection.weight.copy_(torch.eye(width))
        projection.bias.zero_()
    return model.eval()


def compare(dtype: str, options: argparse.Namespace, catalogue: Catalogue, texts: Path, results: Results) -> None:
    model = text_encoder(options.text_model).to(getattr(torch, dtype))
    processor = TransRecProcessor.from_towers(options.text_model, max_text_length=options.max_text_length)
    stride = max(1, len(catalogue) // SAMPLE)
    encoded = {}

    def encode(items: Catalogue) -> None:
        encoded[OURS] = encode_catalogue(model, ItemSource(items, processor), batch_size=options.batch_size)

    with Peer(options.peers_python, "sentence_encoder.py", options.text_model, dtype, str(texts)) as peer:
        trials = {str(size): partial(peer.ask, batch_size=size, stride=stride) for size in PEER_BATCH_SIZES}
        trial_seconds = interleaved(trials, repeats=2)
        peer_batch_size = min(PEER_BATCH_SIZES, key=lambda size: min(trial_seconds[str(size)]))

        encode(catalogue.select(np.arange(0, len(catalogue), stride)))  # warm
        # A catalogue keeps its tokens, so each round gets a new one without tokens
        fresh = iter([catalogue.select(np.arange(len(catalogue))) for _ in range(options.repeats)])
        variants = {OURS: lambda: encode(next(fresh)), PEER: lambda: peer.ask(batch_size=peer_batch_size)}
        seconds = interleaved(variants, options.repeats, warm_up=0)

        saved = texts.with_suffix(".npy")
        facts = peer.ask(save_to=str(saved))
    same = {"threads": torch.get_num_threads(), "max_length": options.max_text_length, "dtype": dtype}
    if facts != same:
        raise RuntimeError(f"the two do not run alike: {PEER} with {facts}, {OURS} with {same}")

    ours = torch.nn.functional.normalize(encoded[OURS], dim=1)
    theirs = torch.nn.functional.normalize(torch.from_numpy(np.load(saved)).float(), dim=1)
    difference = (ours - theirs).abs().max().item()
    if dtype == "float32" and difference >= TOLERANCE:
        raise RuntimeError(f"the vectors differ by up to {difference:.2g}")
    for variant, values in seconds.items():
        results.add(variant, "speed", [len(catalogue) / value for value in values], "items/s", dtype=dtype)
    results.add(PEER, "batch size", peer_batch_size, "items", dtype=dtype)
    results.add(OURS, "speedup", ratios(seconds[PEER], seconds[OURS]), "x", dtype=dtype, reference=PEER)
    results.add(OURS, "largest difference", difference, "", dtype=dtype, reference=PEER)
    lowest = torch.nn.functional.cosine_similarity(ours.double(), theirs.double()).min().item()
    results.add(OURS, "lowest cosine", lowest, "", dtype=dtype, reference=PEER)


def run(options: argparse.Namespace, results: Results) -> None:
    catalogue = load_catalogue(options.data)
    rows = np.random.default_rng(options.seed).permutation(len(catalogue))[: options.num_items]
    catalogue = catalogue.select(np.sort(rows))
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.json"
        texts.write_text(json.dumps([catalogue.text(row) for row in range(len(catalogue))]), encoding="utf-8")
        for dtype in options.dtypes:
            compare(dtype, options, catalogue, texts, results)
