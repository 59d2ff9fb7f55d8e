"""
Compare the ID baseline with RecBole's SASRec: seconds per epoch, and quality on the test targets.

    python benchmarks/run.py id_baseline --data data/amazon-beauty --peers_python peers/bin/python

Both are causal Transformers over item vectors of the same width, layers, heads, feed-forward width, history length and
dropout. Both see the same users, items and targets, which is checked. Both train for the same number of epochs, and
the epoch with the best validation ndcg@10 is tested once, in fp32, with every item ranked and nothing masked (protocol
"recbole"). An epoch has the same targets on both sides: RecBole reads the items before each target anew, this package
reads a user's items once and has a target at every position. The seconds of an epoch are those of training alone.

Both use the softmax over the catalogue and a constant learning rate. The layers differ: RecBole normalises after a
sub-layer, this package before it.

The defaults were chosen with `--tune` on the validation targets of amazon-beauty, from the first one or two epochs of
a few settings; RecBole's batch of 256 was chosen with histories of 20. The learning rate of both is 3e-3 and not 1e-3.
RecBole's batch is 256 and not its default 2048, because few epochs of large batches have too few steps. Dropout is
that of RecBole, for both. For this package four epochs of each setting were compared. They chose "full_softmax" over
"in_batch", 64 users over 32, 48 or 128, and a constant rate of 3e-3 over 2e-3 and over a rate that falls to zero,
which learns too little in so few epochs. Choices without an option were tried in the code: warm-up, clipping, norms
after a sub-layer, the scale of the initial weights and Adam's second moment changed little or made it worse.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from typing import Any

from common import Peer, Results
from transformers import TrainerCallback, set_seed

from transrec_hf import (
    PROTOCOLS,
    Catalogue,
    Sequences,
    Split,
    TransRecConfig,
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
    load_domain,
)


OURS, PEER = "transrec-hf ID baseline", "RecBole SASRec"
METRICS = ("hit_rate@10", "ndcg@10")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/amazon-beauty", help="folder of the data set")
    parser.add_argument("--peers_python", required=True, help="Python of the environment with requirements-peers.txt")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of both models")
    parser.add_argument(
        "--hidden_size", type=int, default=64, help="width of both models; four times as wide inside the layers"
    )
    parser.add_argument("--num_layers", type=int, default=2, help="layers of both models")
    parser.add_argument("--num_heads", type=int, default=2, help="heads of both models")
    parser.add_argument("--max_length", type=int, default=50, help="items of a history that both models read")
    parser.add_argument("--dropout", type=float, default=0.5, help="dropout of both models; RecBole's default")
    parser.add_argument("--objective", default="full_softmax", help="objective of the ID baseline")
    parser.add_argument("--batch_size", type=int, default=64, help="users in a step of the ID baseline")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="rate of the ID baseline")
    parser.add_argument("--peer_batch_size", type=int, default=256, help="targets in a step of RecBole")
    parser.add_argument("--peer_learning_rate", type=float, default=3e-3, help="learning rate of RecBole")
    parser.add_argument("--alone", action="store_true", help="train only the ID baseline, with the given settings")
    parser.add_argument("--tune", choices=("ours", "peer"), help="train only this model, without the test targets")


class EpochTimer(TrainerCallback):
    """Notes the seconds that each training epoch takes, without evaluation and checkpoint."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def targets(catalogue: Catalogue, sequences: Sequences, every_position: bool) -> dict[str, Any]:
    """Returns the number of targets of a split and a hash of the pairs of user and target, as the peer does."""
    pairs = []
    for row in range(len(sequences)):
        items = sequences[row]["items"]
        user = sequences.user_ids[row]
        pairs += [f"{user} {catalogue.item_ids[item]}" for item in (items[1:] if every_position else items[-1:])]
    return {"count": len(pairs), "sha256": hashlib.sha256("\n".join(sorted(pairs)).encode()).hexdigest()}


def train(options: argparse.Namespace, catalogue: Catalogue, split: Split) -> dict[str, Any]:
    """Trains the ID baseline. Returns the same facts about its epochs as the peer returns about its own."""
    set_seed(options.seed)
    config = TransRecConfig(
        num_items=len(catalogue),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=options.max_length,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        objective=options.objective,
    )
    timer = EpochTimer()
    with tempfile.TemporaryDirectory() as folder:
        args = TransRecTrainingArguments(
            folder,
            seed=options.seed,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            disable_tqdm=True,
        )
        trainer = TransRecTrainer(
            TransRecModel(config), args, catalogue=catalogue, split=split, protocol="recbole", callbacks=[timer]
        )
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
        best = max(evaluations, key=lambda entry: entry["eval_ndcg@10"])
        answer = {
            "seconds": timer.seconds,
            "validation_ndcg@10": [entry["eval_ndcg@10"] for entry in evaluations],
            "best_epoch": round(best["epoch"]),
            "validation": {name: best[f"eval_{name}"] for name in METRICS},
            "users": len(split.test),
            "items": len(catalogue),
            "targets": {
                name: targets(catalogue, getattr(split, name), every_position=name == "train")
                for name in ("train", "validation", "test")
            },
        }
        if not options.tune:
            metrics = trainer.report(split.test, baselines=False)["metrics"]
            answer["test"] = {name: metrics[name] for name in METRICS}
    return answer


def ask_peer(options: argparse.Namespace) -> dict[str, Any]:
    with Peer(options.peers_python, "recbole_sasrec.py") as peer:
        return peer.ask(
            data=options.data,
            seed=options.seed,
            epochs=options.epochs,
            hidden_size=options.hidden_size,
            inner_size=4 * options.hidden_size,
            n_layers=options.num_layers,
            n_heads=options.num_heads,
            MAX_ITEM_LIST_LENGTH=options.max_length,
            hidden_dropout_prob=options.dropout,
            attn_dropout_prob=options.dropout,
            train_batch_size=options.peer_batch_size,
            learning_rate=options.peer_learning_rate,
            test=not options.tune,
        )


def record(results: Results, variant: str, answer: dict[str, Any]) -> None:
    """Adds the rows of one side to the table."""
    results.add(variant, "seconds per epoch", answer["seconds"], "s", dtype="float32")
    results.add(variant, "best epoch", answer["best_epoch"], "epoch", dtype="float32")
    for name in METRICS:
        results.add(variant, f"validation {name}", answer["validation"][name], "", dtype="float32")
        results.add(variant, f"test {name}", answer["test"][name], "", dtype="float32")


def run(options: argparse.Namespace, results: Results) -> None:
    catalogue, sequences = load_domain(options.data)
    split = PROTOCOLS["recbole"].split(sequences)
    if options.tune:
        answer = ask_peer(options) if options.tune == "peer" else train(options, catalogue, split)
        print({name: answer[name] for name in ("seconds", "validation_ndcg@10", "best_epoch", "validation")})
        return
    if options.alone:
        answer = train(options, catalogue, split)
        variant = f"{OURS}, {options.objective}, {options.epochs} epochs, batch {options.batch_size}"
        record(results, variant, answer)
        return
    answers = {OURS: train(options, catalogue, split), PEER: ask_peer(options)}
    for fact in ("users", "items", "targets"):
        ours, peer = (answer[fact] for answer in answers.values())
        if ours != peer:
            raise RuntimeError(f"the two models do not see the same {fact}: {ours} and {peer}")
    for variant, answer in answers.items():
        record(results, variant, answer)
    speedups = [peer / ours for ours, peer in zip(*(answer["seconds"] for answer in answers.values()), strict=True)]
    results.add(OURS, "speedup", speedups, "x", dtype="float32", reference=PEER)
