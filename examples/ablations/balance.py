"""
Compare four ways to train one model on texts and images: as it is ("joint"), with modality dropout, with distillation
from uni-modal teachers (CKD), and with both; see docs/balance.md.

    python examples/ablations/balance.py --data data/hm --text_model all-MiniLM-L6-v2 \\
        --vision_model mobilenet-v1-0.25-128 --results examples/results/balance.csv

The towers are frozen and their states are stored. Each model is trained on the same users, and its epoch is chosen on
the validation targets. Then it ranks the targets with both modalities and with each of them alone. Differences are
those to `joint`, with 95 % intervals over users and seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_table import OF_A_RUN, append_rows
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from transrec_hf import (
    Split,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
    load_domain,
    paired_bootstrap,
)
from transrec_hf.evaluation.metrics import metric_values
from transrec_hf.training.ckd import BalancedTrainer


MODALITIES = ("text", "image")
VARIANTS = ("joint", "dropout", "ckd", "dropout and ckd")
METRICS = ("hit_rate@10", "ndcg@10")
COLUMNS = (
    *("data", "variant", "shown", "metric", "value", "difference", "low", "high"),
    *("users", *OF_A_RUN),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of a data set with texts and images")
    parser.add_argument("--text_model", required=True, help="folder of the text tower")
    parser.add_argument("--vision_model", required=True, help="folder of the vision tower")
    parser.add_argument(
        "--users", type=int, default=1000, help="number of users to train on; targets of all users are ranked"
    )
    parser.add_argument("--epochs", type=int, default=3, help="epochs of training; validation chooses the best one")
    parser.add_argument("--hidden_size", type=int, default=128, help="size of item vectors and user encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, order and users")
    parser.add_argument("--dropout", type=float, default=0.3, help="modality_dropout")
    parser.add_argument("--weight", type=float, default=0.3, help="weight of the distillation")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of the distillation")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="some of " + ", ".join(VARIANTS))
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="whose targets are ranked")
    parser.add_argument("--max_targets", type=int, default=3000, help="number of users whose targets are ranked")
    parser.add_argument("--store", default="store", help="folder of stored tower states")
    parser.add_argument("--results", help="table to add rows to")
    return parser.parse_args()


class Domain:
    """One data set, on which models are trained with one seed after another."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.towers = {"text_model": options.text_model, "vision_model": options.vision_model}
        self.processor = TransRecProcessor.from_towers(**self.towers)
        self.catalogue, sequences = load_domain(options.data)
        self.whole = leave_one_out(sequences)

    def train(
        self, folder: str, seed: int, shown: tuple[str, ...] = MODALITIES, dropout: float = 0.0, **distillation: Any
    ) -> TransRecTrainer:
        options, whole = self.options, self.whole
        drawn = np.random.default_rng(seed).permutation(len(whole.train))[: options.users]
        arguments = TransRecTrainingArguments(
            folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            trainable_blocks=0,
            activation_store=options.store,
            modality_dropout=dropout,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_eval_users=1000,
            save_total_limit=1,
            save_only_model=True,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
        )
        set_seed(seed)
        make: Any = BalancedTrainer if distillation else TransRecTrainer
        trainer = make(
            TransRecModel.from_text_vision_pretrained(**self.towers, hidden_size=options.hidden_size),
            arguments,
            catalogue=self.catalogue,
            split=Split(whole.train.select(np.sort(drawn)), whole.validation, whole.test),
            processing_class=self.processor,
            **distillation,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.source = trainer.source.showing(shown)
        trainer.train()
        return trainer

    def ranks(self, trainer: TransRecTrainer, shown: tuple[str, ...]) -> torch.Tensor:
        source = trainer.source
        trainer.source = source.showing(shown)
        targets = getattr(self.whole, self.options.split)
        ranking = trainer.ranking_evaluator(targets, max_users=self.options.max_targets).rank_model(trainer.model)
        trainer.source = source
        return ranking.ranks


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    domain = Domain(options)
    ranks: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)

    def rank(trainer: TransRecTrainer, variant: str, *views: str) -> None:
        for view in views:
            found = domain.ranks(trainer, MODALITIES if view == "both" else (view,))
            ranks[variant, view].append(found)
            values = " ".join(f"{metric_values(found, metric).mean():.4f}" for metric in METRICS)
            print(f"{variant:16} {view:6} {values}  {trainer.train_seconds:.0f} s", flush=True)

    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            teachers = []
            for modality in MODALITIES:
                trainer = domain.train(f"{folder}/{modality}", seed, (modality,))
                trainer.save_model()
                rank(trainer, "teacher", modality)
                teachers.append(f"{modality}={folder}/{modality}")
            distillation = {
                "teachers": teachers,
                "distillation": options.weight,
                "temperature": options.temperature,
            }
            for variant in options.variants:
                more: dict[str, Any] = distillation if "ckd" in variant else {}
                dropout = options.dropout if "dropout" in variant else 0.0
                trainer = domain.train(f"{folder}/{variant}", seed, dropout=dropout, **more)
                rank(trainer, variant, "both", *MODALITIES)

    rows = []
    for (variant, view), found in ranks.items():
        for metric in METRICS:
            mean = metric_values(torch.cat(found), metric).mean().item()
            row = {"variant": variant, "shown": view, "metric": metric, "value": f"{mean:.5f}"}
            if ("joint", view) in ranks and variant != "joint":
                compared = paired_bootstrap(torch.stack(found), torch.stack(ranks["joint", view]), metric)
                row |= {name: f"{value:.5f}" for name, value in compared.items()}
            rows.append(row)
            print(" ".join(row.values()))
    if options.results:
        about = {"data": Path(options.data).name, "users": options.users}
        append_rows(options.results, COLUMNS, [row | about for row in rows], options.seeds)


if __name__ == "__main__":
    main()
