"""
Measure which sources help which target. A text model is pre-trained on one source, on all sources mixed evenly or by
temperature, and on all sources with each step weighted by how well its gradient agrees with that of the target. Then
it is trained on the target: the whole of it or, of the mixtures, also as much as validation chooses (`guarded`). See
docs/meta_transfer.md.

    python examples/ablations/meta_transfer.py --text_model all-MiniLM-L6-v2 \\
        --sources data/movielens-1m data/amazon-games data/amazon-toys data/yelp \\
        --targets data/amazon-beauty data/movielens-2000s data/hm --results examples/results/meta_transfer.csv

The tower is frozen and its states are stored. Only a part of the users of each source and target is used. Differences
are those to `scratch`, which starts from the same seed, with 95 % intervals over users and seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_table import OF_A_RUN, append_rows
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from transrec_hf import (
    Catalogue,
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
from transrec_hf.training.mixing import MixedTrainer
from transrec_hf.training.transfer import choose_start, start_from


METRICS = ("hit_rate@10", "ndcg@10")
MIXTURES = {"equal": 0.0, "temperature 0.5": 0.5}
COLUMNS = (
    *("target", "strategy", "metric", "value", "difference", "low", "high", "cosine", "starts"),
    *OF_A_RUN,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", required=True, help="folder of the text tower")
    parser.add_argument("--sources", nargs="+", required=True, help="folders of the source data sets")
    parser.add_argument("--targets", nargs="+", required=True, help="folders of the target data sets")
    parser.add_argument("--source_share", type=float, default=0.02, help="share of the sources' users")
    parser.add_argument("--target_users", type=int, default=300, help="number of users to train on; more are ranked")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of pre-training; one more follows on the target")
    parser.add_argument("--hidden_size", type=int, default=128, help="size of item vectors and user encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, order and users")
    parser.add_argument("--max_targets", type=int, default=3000, help="number of users whose test targets are ranked")
    parser.add_argument("--store", default="store", help="folder of stored tower states")
    parser.add_argument("--results", help="table to add rows to")
    return parser.parse_args()


@cache
def load(folder: str) -> tuple[Catalogue, Split]:
    """Returns the texts and the split of a data set."""
    catalogue, sequences = load_domain(folder, modality_policy="text")
    return catalogue, leave_one_out(sequences)


def sample(folder: str, seed: int, share: float = 0.0, users: int = 0) -> tuple[Catalogue, Split]:
    """Returns a data set with a sample of its training users."""
    catalogue, whole = load(folder)
    number = users or max(2, round(share * len(whole.train)))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(whole.train))[:number])
    return catalogue, Split(whole.train.select(drawn), whole.validation, whole.test)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    processor = TransRecProcessor.from_towers(text_model=options.text_model)
    ranks: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    cosines: dict[tuple[str, str], list[float]] = defaultdict(list)
    starts: dict[tuple[str, str], list[str]] = defaultdict(list)

    def arguments(folder: str, seed: int, **more: Any) -> TransRecTrainingArguments:
        return TransRecTrainingArguments(
            folder,
            per_device_train_batch_size=32,
            trainable_blocks=0,
            activation_store=options.store,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
            save_total_limit=1,
            save_only_model=True,
            max_eval_users=1000,
            **more,
        )

    never: dict[str, Any] = {"save_strategy": "no", "load_best_model_at_end": False}

    def pretrain(folder: str, seed: int, domains: dict[str, tuple[Catalogue, Split]], **mixing: Any) -> MixedTrainer:
        set_seed(seed)
        model = TransRecModel.from_text_vision_pretrained(options.text_model, hidden_size=options.hidden_size)
        args = arguments(folder, seed, num_train_epochs=options.epochs, eval_strategy="no", **never)
        trainer = MixedTrainer(model, args, domains=domains, processing_class=processor, **mixing)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.save_pretrained(folder)
        return trainer

    def evaluate(folder: str, seed: int, target: str, strategy: str, checkpoint: str) -> None:
        model = TransRecModel.from_pretrained(checkpoint)
        catalogue, split = sample(target, seed, users=options.target_users)

        def trainer_of(place: str, epochs: int, **more: Any) -> TransRecTrainer:
            args = arguments(place, seed, num_train_epochs=epochs, **more)
            trainer = TransRecTrainer(model, args, catalogue=catalogue, split=split, processing_class=processor)
            trainer.remove_callback(PrinterCallback)
            return trainer

        name = Path(target).name
        if strategy.endswith("guarded"):
            start = choose_start(model, lambda place, init: trainer_of(place, 1, **never), seed=seed).init
            starts[name, strategy].append(start)
        else:
            start_from(model, "none" if strategy == "scratch" else "all", seed)
        set_seed(seed)
        trainer = trainer_of(folder, options.epochs + 1)
        trainer.train()
        evaluator = trainer.ranking_evaluator(split.test, max_users=options.max_targets)
        found = evaluator.rank_model(trainer.model).ranks
        ranks[name, strategy].append(found)
        values = " ".join(f"{metric_values(found, metric).mean():.4f}" for metric in METRICS)
        print(f"{seed} {name:16} {strategy:29} {values} {' '.join(starts[name, strategy][-1:])}", flush=True)

    names = {Path(source).name: source for source in options.sources}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            sources = {name: sample(source, seed, options.source_share) for name, source in names.items()}
            checkpoints = {name: f"{folder}/{name}" for name in (*sources, *MIXTURES)}
            for name, domain in sources.items():
                pretrain(checkpoints[name], seed, {name: domain})
            for strategy, temperature in MIXTURES.items():
                pretrain(checkpoints[strategy], seed, sources, temperature=temperature)
            checkpoints["scratch"] = checkpoints["equal"]
            for target in options.targets:
                name = Path(target).name
                domains = {**sources, name: sample(target, seed, users=options.target_users)}
                checkpoints["gradient similarity"] = f"{folder}/towards {name}"
                towards: dict[str, Any] = {"similarity": "grad_cosine", "target": name}
                trainer = pretrain(checkpoints["gradient similarity"], seed, domains, **towards)
                assert trainer.gradients is not None
                for source, seen in trainer.gradients.seen.items():
                    cosines[name, source].append(float(np.mean(seen)) if seen else 0.0)
                for strategy, checkpoint in checkpoints.items():
                    evaluate(f"{folder}/run", seed, target, strategy, checkpoint)
                for strategy in (*MIXTURES, "gradient similarity"):
                    evaluate(f"{folder}/run", seed, target, f"{strategy}, guarded", checkpoints[strategy])

    rows = []
    for (target, strategy), found in ranks.items():
        for metric in METRICS:
            mean = metric_values(torch.cat(found), metric).mean().item()
            row = {"target": target, "strategy": strategy, "metric": metric, "value": f"{mean:.5f}"}
            if strategy != "scratch":
                compared = paired_bootstrap(torch.stack(found), torch.stack(ranks[target, "scratch"]), metric)
                row |= {name: f"{value:.5f}" for name, value in compared.items()}
            if (target, strategy) in cosines:
                row["cosine"] = f"{np.mean(cosines[target, strategy]):.3f}"
            row["starts"] = " ".join(starts[target, strategy])
            rows.append(row)
            print(" ".join(row.values()))
    if options.results:
        append_rows(options.results, COLUMNS, rows, options.seeds)


if __name__ == "__main__":
    main()
