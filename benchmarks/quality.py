"""
Measure the ranking quality of the default design on a whole data set: untrained, trained from scratch, and as a hybrid
with ID vectors. It is compared with item co-occurrence, popularity and the ID baseline.

The epoch is chosen by validation ndcg@10, and the test targets are ranked once, at the end. The towers are frozen and
their states are stored. `--source` adds runs that start from a checkpoint, with the guard against negative transfer:
`--init` "none", "half" and "all" are each trained for one epoch, and the best start on the validation targets goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from common import Results
from transformers import set_seed

from transrec_hf import (
    TransRecConfig,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
    load_domain,
)
from transrec_hf.training.transfer import choose_start


VARIANTS = ("untrained", "untrained hybrid", "scratch", "hybrid", "id_baseline")
METRICS = ("hit_rate@10", "ndcg@10")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--text_model", help="folder of the text tower")
    parser.add_argument("--vision_model", help="folder of the vision tower")
    parser.add_argument("--source", help="folder of a checkpoint for runs that start from it")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="some of " + ", ".join(VARIANTS))
    parser.add_argument(
        "--user_fraction", type=float, default=1.0, help="share of the users to train on; all users are ranked for"
    )
    parser.add_argument("--epochs", type=int, default=6, help="epochs of training")
    parser.add_argument("--store", default="store", help="folder of stored tower states")
    parser.add_argument("--save", help="folder for the last model, from which other runs can start")


def run(options: argparse.Namespace, results: Results) -> None:
    torch.set_num_threads(1)
    catalogue, sequences = load_domain(options.data)
    split = leave_one_out(sequences)
    if options.user_fraction < 1:
        size = max(2, round(options.user_fraction * len(split.train)))
        chosen = np.random.default_rng(options.seed).permutation(len(split.train))[:size]
        split.train = split.train.select(np.sort(chosen))
    towers = {name: getattr(options, name) for name in ("text_model", "vision_model") if getattr(options, name)}
    processor = TransRecProcessor.from_towers(**towers) if towers else None
    users = f" of {options.user_fraction:.0%} of the users" if options.user_fraction < 1 else ""

    def trainer_of(model: TransRecModel, folder: str, epochs: float) -> TransRecTrainer:
        steps = max(1, -(-len(split.train) // 128))
        arguments = TransRecTrainingArguments(
            folder,
            num_train_epochs=epochs,
            trainable_blocks=None if not model.config.modalities else 0,
            activation_store=options.store if model.config.modalities else None,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, steps),
            per_device_train_batch_size=128 if steps > 8 else 32,
            max_eval_users=4000,
            save_total_limit=1,
            save_only_model=True,
            early_stopping_patience=3,
            disable_tqdm=True,
            report_to="none",
            seed=options.seed,
        )
        of_content = processor if model.config.modalities else None
        return TransRecTrainer(model, arguments, catalogue=catalogue, split=split, processing_class=of_content)

    def report(trainer: TransRecTrainer, variant: str, baselines: bool = False) -> None:
        tested = trainer.report(baselines=baselines)
        validated = trainer.evaluate()
        for metric in METRICS:
            results.add(variant + users, f"validation {metric}", validated[f"eval_{metric}"], "", dtype="float32")
            results.add(variant + users, f"test {metric}", tested["metrics"][metric], "", dtype="float32")
        for name, other in tested.get("baselines", {}).items():
            for metric in METRICS:
                results.add(name + users, f"test {metric}", other["metrics"][metric], "", dtype="float32")

    def build(variant: str) -> TransRecModel:
        set_seed(options.seed)
        if variant == "id_baseline":
            return TransRecModel(TransRecConfig.esasrec(len(catalogue)))
        hybrid: dict[str, Any] = {"num_items": len(catalogue)} if variant.endswith("hybrid") else {}
        if not variant.startswith("source"):
            return TransRecModel.from_text_vision_pretrained(**towers, **hybrid)
        model = TransRecModel.from_pretrained(options.source, **hybrid)
        if hybrid:
            torch.nn.init.zeros_(model.item_encoder.item_embedding.weight)
        return model

    variants = [*options.variants, *(["source", "source hybrid"] if options.source else [])]
    for variant in variants:
        model = build(variant)
        with tempfile.TemporaryDirectory() as folder:
            if variant.startswith("untrained"):
                trainer = trainer_of(model, folder, 1)
                trainer.fill_store()
                trainer.prepare_model()
                report(trainer, variant, baselines=variant == "untrained")
                continue
            if variant.startswith("source"):
                zero_shot = trainer_of(model, folder, 1)
                zero_shot.fill_store()
                zero_shot.prepare_model()
                report(zero_shot, f"{variant}, zero-shot")

                def short_run(place: str, init: str, model: TransRecModel = model) -> TransRecTrainer:
                    return trainer_of(model, place, 1)

                start = choose_start(model, short_run, ("none", "half", "all"))
                print(f"{variant}: {start}", flush=True)
            trainer = trainer_of(model, folder, options.epochs)
            trainer.train()
            report(trainer, variant)
            print(f"{variant}: {trainer.train_seconds:.0f} s", flush=True)
            if options.save:
                model.save_pretrained(options.save)
                processor.save_pretrained(options.save)
