"""
Compare the tuning modes: the quality of each, the share of the model that it trains, and its cost. Each mode runs in a
process of its own, so that the peak memory belongs to this mode alone:

    python benchmarks/run.py tuning --tuning frozen --epochs 6 --save base ...
    python benchmarks/run.py tuning --tuning lora --base base ...

Without `--tuning` nothing is trained, and the parameters that each mode would train are counted.

All modes start from the same base model, which was trained with frozen towers. They train in bf16 with the same users,
epochs and batches. The epoch is chosen by validation ndcg@10, and the base itself cannot be chosen; test targets are
ranked once. Only the most popular items are kept. A sample of the users is trained on, and all users are ranked for.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import numpy as np
import torch
from common import Results
from transformers import set_seed

from transrec_hf import (
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
    load_domain,
)
from transrec_hf.data.interactions import keep_items
from transrec_hf.training.tuning import FROZEN, SIZES, TUNINGS, tune


METRICS = ("hit_rate@10", "ndcg@10")
TOWER_RATES = {"full": 1e-4, "top_k_blocks": 1e-4}  # adapters have higher rates, see TransRecTrainingArguments


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="no data", help="folder of the data set")
    parser.add_argument("--text_model", help="folder of the text tower")
    parser.add_argument("--vision_model", help="folder of the vision tower")
    parser.add_argument("--tuning", choices=TUNINGS, help="the mode [count parameters]")
    parser.add_argument("--adapter_size", type=int, help="rank or width of adapters [default of the package]")
    parser.add_argument("--base", help="folder of the model to start from [the towers alone]")
    parser.add_argument("--save", help="folder for the model at the end")
    parser.add_argument("--max_users", type=int, help="users to train on [all]")
    parser.add_argument("--max_items", type=int, default=1200, help="items to keep, the most popular ones")
    parser.add_argument("--max_text_length", type=int, default=16, help="tokens")
    parser.add_argument("--history", type=int, default=10, help="items of a history")
    parser.add_argument("--batch_size", type=int, default=32, help="windows of users in a step")
    parser.add_argument("--epochs", type=float, default=2, help="epochs of training")
    parser.add_argument("--store", default="store", help="folder of the stored states of frozen blocks")


def count(options: argparse.Namespace, results: Results, model: TransRecModel) -> None:
    """Counts the parameters of a model that each mode trains."""
    size = model.num_parameters()
    for mode in SIZES if options.adapter_size else (mode for mode in TUNINGS if mode != "codes"):
        tuned = copy.deepcopy(model)
        tune(tuned, TransRecTrainingArguments("", tuning=mode, adapter_size=options.adapter_size, seed=options.seed))
        trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
        variant = f"{mode}, size {options.adapter_size}" if options.adapter_size else mode
        results.add(variant, "trained parameters", trained, "")
        results.add(variant, "share of full tuning's", 100 * trained / size, "%")


def run(options: argparse.Namespace, results: Results) -> None:
    torch.set_num_threads(1)
    towers = {name: getattr(options, name) for name in ("text_model", "vision_model") if getattr(options, name)}
    set_seed(options.seed)
    if options.tuning is None:
        count(
            options,
            results,
            TransRecModel.from_text_vision_pretrained(**towers, max_position_embeddings=options.history),
        )
        return
    catalogue, sequences = load_domain(options.data)
    counts = sequences.item_counts(len(catalogue))
    popular = np.argsort(-counts, kind="stable")[: options.max_items]
    catalogue, sequences = keep_items(catalogue, sequences, np.isin(np.arange(len(catalogue)), popular))
    split = leave_one_out(sequences)
    chosen = np.random.default_rng(options.seed).permutation(len(split.train))[: options.max_users]
    split.train = split.train.select(np.sort(chosen))
    if options.base:
        model = TransRecModel.from_pretrained(options.base)
        processor = TransRecProcessor.from_pretrained(options.base)
    else:
        model = TransRecModel.from_text_vision_pretrained(**towers, max_position_embeddings=options.history)
        processor = TransRecProcessor.from_towers(**towers, max_text_length=options.max_text_length)
    size = model.num_parameters()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TransRecTrainingArguments(
            folder,
            tuning=options.tuning,
            adapter_size=options.adapter_size,
            tower_learning_rate=TOWER_RATES.get(options.tuning, 1e-3),
            activation_store=options.store if options.tuning in (*FROZEN, "top_k_blocks") else None,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            bf16=True,
            eval_on_start=False,
            save_total_limit=1,
            save_only_model=True,
            disable_tqdm=True,
            report_to="none",
            seed=options.seed,
        )
        trainer = TransRecTrainer(model, arguments, catalogue=catalogue, split=split, processing_class=processor)
        trainer.train()
        tested, cost = trainer.report(baselines=False), trainer.cost.cost
        epochs = [entry for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
        if options.save:
            model.save_pretrained(options.save)
            processor.save_pretrained(options.save)
    variant = options.tuning if options.base else f"base ({options.tuning})"
    best = max(epochs, key=lambda entry: entry["eval_ndcg@10"])
    for metric in METRICS:
        results.add(variant, f"validation {metric}", best[f"eval_{metric}"], "", dtype="bfloat16")
        results.add(variant, f"test {metric}", tested["metrics"][metric], "", dtype="bfloat16")
    for epoch, entry in enumerate(epochs, start=1):
        results.add(variant, f"validation ndcg@10 after epoch {epoch}", entry["eval_ndcg@10"], "", dtype="bfloat16")
    results.add(variant, "trained parameters", cost.trainable_parameters, "")
    results.add(variant, "share of full tuning's", 100 * cost.trainable_parameters / size, "%")
    results.add(variant, "peak memory", cost.peak_memory_gb, "GB", dtype="bfloat16")
    results.add(variant, "1,000 users", cost.seconds_per_1000_users, "s", dtype="bfloat16")
