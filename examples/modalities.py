"""Measure which modalities transfer: every subset of those of the demo world, from scratch and transferred.

`python examples/modalities.py --seeds 0 1 2` writes a row for each subset and seed into
`examples/results/modalities.csv`. If it is stopped and started again, it goes on where it was. A subset takes half a
minute to three minutes on one CPU core, so all fifteen with three seeds take an hour or more.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from transrec_hf import TransRecModel, TransRecTrainer, TransRecTrainingArguments, leave_one_out
from transrec_hf.data.demo import DemoPlatform, demo_config, demo_processor, demo_world
from transrec_hf.items.preparing import ContentPreparation
from transrec_hf.model.modalities_transrec import ItemPart
from transrec_hf.publishing.results import append_results, describe_device


MODALITIES = ("text", "image", "audio", "video")
SUBSETS = [names for size in range(1, 5) for names in combinations(MODALITIES, size)]
RESULTS = Path(__file__).parent / "results" / "modalities.csv"


class Kept:
    """A preparation that decodes each item once and not in every epoch, as the items are few and small."""

    def __init__(self, preparation: ContentPreparation):
        self.units = preparation.units
        rows = np.flatnonzero(self.units)
        self.place = np.full(len(self.units), -1)
        self.place[rows] = np.arange(len(rows))
        self.part = preparation(rows, torch.from_numpy(rows), 0)

    def __call__(self, rows: np.ndarray, slots: torch.Tensor, max_tokens: int) -> ItemPart:
        index = torch.from_numpy(self.place[rows])
        masks = self.part.masks and [self.part.masks[0][index]]
        return ItemPart(slots, [self.part.values[0][index]], masks)


def make_trainer(
    model: TransRecModel,
    platform: DemoPlatform,
    names: Sequence[str],
    rate: float,
    seed: int,
    folder: str,
    **more: Any,
) -> TransRecTrainer:
    """Returns a trainer of a demo model on a platform."""
    args = TransRecTrainingArguments(
        folder,
        learning_rate=rate,
        tower_learning_rate=rate,
        warmup_steps=20,
        per_device_train_batch_size=32,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=seed,
        use_cpu=True,
        **more,
    )
    split = leave_one_out(platform.sequences)
    trainer = TransRecTrainer(
        model, args, catalogue=platform.catalogue, split=split, processing_class=demo_processor(names)
    )
    trainer.remove_callback(PrinterCallback)
    made = trainer.source.preparations.items()
    kept: Any = {name: Kept(one) for name, one in made if isinstance(one, ContentPreparation)}
    trainer.source = trainer.source.with_preparations(kept)
    return trainer


def compare(names: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Returns reports on the target: of the source model as it is and fine-tuned, a new model, and popularity."""
    world = demo_world(seed, names)
    set_seed(seed)
    model, scratch = (TransRecModel(demo_config(names)) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(model, world.source, names, 2e-3, seed, folder, num_train_epochs=3).train()
        reports = {"zero-shot": make_trainer(model, world.target, names, 0, seed, folder).report(baselines=False)}
        for name, start, rate, epochs in (("fine-tuned", model, 5e-4, 8), ("from scratch", scratch, 1e-3, 20)):
            trainer = make_trainer(start, world.target, names, rate, seed, folder, num_train_epochs=epochs)
            trainer.train()
            reports[name] = trainer.report(baselines=name == "from scratch")
    baselines = reports["from scratch"].pop("baselines")
    return {**reports, "popularity": {**baselines["popularity"], "protocol": reports["zero-shot"]["protocol"]}}


def print_table(file: Path) -> None:
    """Prints the mean hit rate of each subset over its seeds."""
    with open(file, encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["metric"] == "hit_rate@10"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    print(f"\n{'hit_rate@10':<26}" + "".join(f"{model:>14}" for model in models) + f"{'seeds':>7}")
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        values = [[float(row["value"]) for row in mine if row["model"] == model] for model in models]
        cells = "".join(f"{sum(value) / len(value):>14.3f}" for value in values)
        print(f"{run:<26}{cells}{len(values[0]):>7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modalities", nargs="+", help="One subset, for example `text audio` [all fifteen].")
    parser.add_argument("--results_csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    done = set()
    if args.results_csv.is_file():
        with open(args.results_csv, encoding="utf-8", newline="") as stream:
            done = {(row["run"], int(row["seed"])) for row in csv.DictReader(stream)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    for seed in args.seeds:
        for names in [tuple(args.modalities)] if args.modalities else SUBSETS:
            run = " + ".join(names)
            if (run, seed) in done:
                continue
            started = time.perf_counter()
            reports = compare(names, seed)
            append_results(
                args.results_csv,
                reports,
                run=run,
                command=f"python examples/modalities.py --seeds {seed} --modalities {' '.join(names)}",
                seed=seed,
                data="demo:target",
                machine=describe_device(torch.device("cpu"))["device"],
                protocol="full",
                split="test",
                seconds=round(time.perf_counter() - started),
                date=datetime.date.today().isoformat(),
                commit=commit.stdout.strip(),
            )
            print(f"{run}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print_table(args.results_csv)


if __name__ == "__main__":
    main()
