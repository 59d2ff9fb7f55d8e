"""Recommend spoken titles by their sound: `python examples/spoken_titles.py DATA --audio_model YAMNET`.

This tests the pipeline on real sound; it is no evidence for anything else. `espeak-ng` (a package of Debian) reads the
titles of some items aloud. A sound encoder that was not trained on these recordings turns them into vectors, and a
user encoder is trained on the vectors. DATA is a folder with `items.parquet` and `interactions.parquet`.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import set_seed

from transrec_hf import (
    Catalogue,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
    load_domain,
)
from transrec_hf.data.interactions import keep_items
from transrec_hf.publishing.results import append_results, describe_device


VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb-scotland+f4")


def spoken(text: str, voice: str) -> bytes:
    """Returns the bytes of a WAV file of a title."""
    return subprocess.run(["espeak-ng", "-v", voice, "--stdout", text], check=True, capture_output=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--audio_model", required=True)
    parser.add_argument("--items", type=int, default=400, help="Number of items: those that most users chose.")
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results_csv", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    catalogue, sequences = load_domain(args.data)
    counts = sequences.item_counts(len(catalogue))
    keep = np.zeros(len(catalogue), dtype=bool)
    keep[np.argsort(-counts, kind="stable")[: args.items]] = True
    catalogue, sequences = keep_items(catalogue, sequences, keep & catalogue.has_text)
    sequences = sequences.select(sequences.lengths >= 3)

    titles = [catalogue.text(row) or "" for row in range(len(catalogue))]
    with ThreadPoolExecutor() as pool:
        sounds = list(pool.map(spoken, titles, [VOICES[row % len(VOICES)] for row in range(len(titles))]))
    heard = {"item_id": catalogue.item_ids.tolist(), "audio": [{"bytes": sound, "path": None} for sound in sounds]}
    catalogue = Catalogue(datasets.Dataset.from_dict(heard), "spoken titles")
    print(f"{len(catalogue)} titles, {catalogue.contents['audio'].lengths().sum():.0f} seconds of speech")  # type: ignore[attr-defined]

    set_seed(args.seed)
    model = TransRecModel.from_text_vision_pretrained(
        audio_model=args.audio_model, hidden_size=64, item_map="whitened", similarity="cosine"
    )
    with tempfile.TemporaryDirectory() as folder:
        options = TransRecTrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            learning_rate=1e-3,
            trainable_blocks=0,
            activation_store=f"{folder}/store",
            per_device_train_batch_size=64,
            early_stopping_patience=3,
            report_to="none",
            seed=args.seed,
        )
        trainer = TransRecTrainer(
            model,
            options,
            catalogue=catalogue,
            split=leave_one_out(sequences),
            processing_class=TransRecProcessor.from_towers(audio_model=args.audio_model),
        )
        trainer.train()
        report = trainer.report()
    value, chance = report["metrics"]["hit_rate@10"], 10 / len(catalogue)
    popular = report["baselines"]["popularity"]["metrics"]["hit_rate@10"]
    print(f"hit_rate@10 {value:.3f}, popularity {popular:.3f}, chance {chance:.3f}")
    if args.results_csv:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        baseline = {**report["baselines"]["popularity"], "protocol": report["protocol"]}
        append_results(
            args.results_csv,
            {f"sound of {args.items} titles": report, f"popularity of {args.items} titles": baseline},
            run="spoken titles",
            command=f"python examples/spoken_titles.py {args.data.name} --audio_model yamnet --items {args.items}",
            seed=args.seed,
            data=args.data.name,
            machine=describe_device(torch.device("cpu"))["device"],
            protocol="full",
            split="test",
            seconds=round(time.perf_counter() - started),
            date=datetime.date.today().isoformat(),
            commit=commit.stdout.strip(),
        )


if __name__ == "__main__":
    main()
