"""
Train the SASRec of RecTools and of RecBole until it no longer improves, and test it as `quality` tests this package.

The protocol is `full`: leave-one-out, every item of the catalogue is ranked but those of the user's history. The best
epoch by validation `ndcg@10` is tested once. Both have the settings that arXiv 2508.06450 publishes for RecTools, but
the softmax over the catalogue instead of 256 sampled items, which takes seconds a step on a CPU. The two need other
versions of their libraries, so each has an environment of its own: `pip install torch==2.13.0`, then
`rectools[torch]==0.19.0` or `-r benchmarks/requirements-peers.txt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import Peer, Results


SETTINGS = {
    "RecTools": {
        "n_factors": 256,
        "n_blocks": 1,
        "n_heads": 1,
        "dropout_rate": 0.2,
        "loss": "softmax",
        "lr": 1e-3,
        "batch_size": 128,
    },
    "RecBole": {
        "hidden_size": 256,
        "inner_size": 256,
        "n_layers": 1,
        "n_heads": 1,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "learning_rate": 1e-3,
        "train_batch_size": 256,
        "mask_history": True,
        "test": True,
    },
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/amazon-beauty", help="folder of the data set")
    parser.add_argument("--peer", required=True, choices=SETTINGS, help="whose SASRec is trained")
    parser.add_argument("--peers_python", required=True, help="Python of the environment of this peer")
    parser.add_argument("--epochs", type=int, default=100, help="the most epochs")
    parser.add_argument("--patience", type=int, default=5, help="epochs without a better validation metric at the end")
    parser.add_argument("--max_length", type=int, default=50, help="items of a history that the model reads")


def run(options: argparse.Namespace, results: Results) -> None:
    settings = {"data": str(Path(options.data).resolve()), "seed": options.seed, "epochs": options.epochs}
    if options.peer == "RecTools":
        settings |= {"patience": options.patience, "session_max_len": options.max_length}
    else:
        settings |= {"stopping_step": options.patience, "MAX_ITEM_LIST_LENGTH": options.max_length}
    with Peer(options.peers_python, f"{options.peer.lower()}_sasrec.py") as peer:
        answer = peer.ask(**settings, **SETTINGS[options.peer])
    variant = f"{options.peer} SASRec, history of {options.max_length}"
    results.add(variant, "seconds per epoch", answer["seconds"], "s", dtype="float32")
    results.add(variant, "best epoch", answer["best_epoch"], "epoch", dtype="float32")
    for name, value in answer["test"].items():
        results.add(variant, f"test {name}", value, "", dtype="float32")
