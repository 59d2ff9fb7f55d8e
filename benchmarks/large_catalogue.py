"""
Take a large synthetic catalogue from its files to its metrics: seconds and peak memory of each phase.

    python benchmarks/run.py large_catalogue --num_items 1000000 --num_interactions 10000000

Titles consist of invented words, some items have an image of noise, and users choose items by Zipf's law. There is
nothing to learn; only the cost counts. All phases run one after another in one new process. Its memory is reported as
`peak_rss`, which includes pages of mapped files that the system may drop, and as `peak_private`, which does not
include them.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Results
from PIL import Image


ITEM_ROWS, INTERACTION_ROWS = 5_000, 250_000  # rows per row group; a reader holds one group
IMAGE_SIZE = 32  # pixels, both sides
NUM_WORDS = 2_000
HIDDEN_SIZE = 64
MAX_HISTORY = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_items", type=int, default=1_000_000)
    parser.add_argument("--num_interactions", type=int, default=10_000_000)
    parser.add_argument("--num_users", type=int, help="number of users [a tenth of the interactions]")
    parser.add_argument("--num_images", type=int, help="items with an image [a twentieth of the items]")
    parser.add_argument("--steps", type=int, default=50, help="steps of training")
    parser.add_argument("--batch_size", type=int, default=64, help="users per step")
    parser.add_argument(
        "--trainable_blocks", type=int, default=0, help="trained blocks of each tower; 0 freezes the towers"
    )
    parser.add_argument("--activation_store", action="store_true", help="compute the frozen blocks once per item")
    parser.add_argument("--eval_users", type=int, default=2_000, help="number of users for whom all items are ranked")
    parser.add_argument("--baselines", action="store_true", help="also evaluate the baselines without training")
    parser.add_argument("--folder", help="folder for files and caches [a temporary one, which is deleted]")


def run(options: argparse.Namespace, results: Results) -> None:
    options.num_users = options.num_users or max(1, options.num_interactions // 10)
    options.num_images = options.num_items // 20 if options.num_images is None else options.num_images
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_domain(Path(folder), options)
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            phases = pool.submit(measure, folder, options).result()
    variant = (
        f"{options.num_items:,} items, {options.num_images:,} images, {options.num_users:,} users, "
        f"{options.num_interactions:,} interactions"
    )
    facts = {"dtype": "float32"}
    for phase, numbers in phases.items():
        for metric, (value, unit) in numbers.items():
            results.add(f"{phase} ({variant})", metric, value, unit, **facts)


# Data


def write_domain(folder: Path, options: argparse.Namespace) -> None:
    """Writes `items.parquet` and `interactions.parquet`, a part at a time."""
    rng = np.random.default_rng(options.seed)
    write_table(folder / "items.parquet", item_parts(rng, options.num_items, options.num_images))
    lengths = user_lengths(rng, options.num_users, options.num_interactions)
    write_table(folder / "interactions.parquet", interaction_parts(rng, lengths, options.num_items))


def write_table(path: Path, parts: Iterator[pa.Table]) -> None:
    first = next(parts)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for part in parts:
            writer.write_table(part)


def item_parts(rng: np.random.Generator, num_items: int, num_images: int) -> Iterator[pa.Table]:
    words = invented_words(NUM_WORDS)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("item_id", pa.string()), ("text", pa.string()), ("image", image)])
    for start in range(0, num_items, ITEM_ROWS):
        rows = np.arange(start, min(start + ITEM_ROWS, num_items))
        sizes = rng.integers(3, 9, size=len(rows))
        titles = [
            " ".join(title)
            for title in np.split(words[rng.integers(NUM_WORDS, size=sizes.sum())], sizes.cumsum()[:-1])
        ]
        # The items with an image are spread evenly
        pictured = (rows + 1) * num_images // num_items > rows * num_images // num_items
        images = [{"bytes": noise(rng), "path": None} if has_image else None for has_image in pictured]
        ids = [f"item-{row}" for row in rows]
        yield pa.table({"item_id": ids, "text": titles, "image": pa.array(images, image)}, schema)


def invented_words(number: int) -> np.ndarray:
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    pairs = [first + second for first in syllables for second in syllables]
    return np.array(pairs[:number], dtype=object)


def noise(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    pixels = rng.integers(255, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def user_lengths(rng: np.random.Generator, num_users: int, num_interactions: int) -> np.ndarray:
    """Returns the number of interactions of each user: at least three, and the rest is shared out geometrically."""
    if num_interactions < 3 * num_users:
        raise ValueError(f"{num_interactions} interactions are fewer than three for each of {num_users} users")
    shares = rng.exponential(size=num_users)
    bounds = np.round(np.cumsum(shares) / shares.sum() * (num_interactions - 3 * num_users)).astype(np.int64)
    return 3 + np.diff(bounds, prepend=0)


def interaction_parts(rng: np.random.Generator, lengths: np.ndarray, num_items: int) -> Iterator[pa.Table]:
    """Yields the interactions in order of time, so that each part mixes the users."""
    popularity = np.cumsum(1 / (np.arange(num_items) + 10.0))
    names = rng.permutation(num_items)
    users = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    rng.shuffle(users)
    for start in range(0, len(users), INTERACTION_ROWS):
        part = users[start : start + INTERACTION_ROWS]
        items = names[np.searchsorted(popularity, rng.random(len(part)) * popularity[-1])]
        yield pa.table(
            {
                "user_id": [f"user-{user}" for user in part.tolist()],
                "item_id": [f"item-{item}" for item in items.tolist()],
                "timestamp": np.arange(start, start + len(part)),
            }
        )


# Phases


class Memory:
    """Measures the peak memory of this process in MiB, for each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, tuple[float, str]]] = {}
        self.peaks = self.now()
        threading.Thread(target=self.watch, daemon=True).start()

    def now(self) -> dict[str, float]:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return {
            name: int(fields[field].split()[0]) / 1024
            for name, field in (("peak_rss", "VmRSS"), ("peak_private", "RssAnon"))
        }

    def watch(self) -> None:
        while True:
            self.peaks = {name: max(peak, self.peaks[name]) for name, peak in self.now().items()}
            time.sleep(0.02)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.peaks = self.now()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        numbers = {name: (max(peak, self.peaks[name]), "MiB") for name, peak in self.now().items()}
        self.phases[name] = {"seconds": (seconds, "s"), **numbers}
        print(name, {metric: round(value, 1) for metric, (value, _) in self.phases[name].items()}, flush=True)


def measure(folder: str, options: argparse.Namespace) -> dict[str, dict[str, tuple[float, str]]]:
    """Returns the seconds and the peak memory of each phase and of all phases together."""
    memory = Memory()
    started = time.perf_counter()
    with memory.phase("import"):
        from transrec_hf import TransRecTrainer, TransRecTrainingArguments, data_statistics, leave_one_out, load_domain
        from transrec_hf.items.encoding import encode_catalogue
    with memory.phase("read and check"):
        catalogue, sequences = load_domain(folder)
    with memory.phase("split"):
        split = leave_one_out(sequences)
    with memory.phase("statistics"):
        data_statistics(catalogue, split)
    model, processor = make_model(options.seed)
    with memory.phase(f"train {options.steps} steps"):
        arguments = TransRecTrainingArguments(
            str(Path(folder, "run")),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            trainable_blocks=options.trainable_blocks,
            activation_store=str(Path(folder, "store")) if options.activation_store else None,
            seed=options.seed,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TransRecTrainer(model, arguments, catalogue=catalogue, split=split, processing_class=processor)
        trainer.train()
    with memory.phase("encode the catalogue"):
        item_embeds = encode_catalogue(model, trainer.source, batch_size=256)
    with memory.phase(f"rank all items for {options.eval_users} users"):
        evaluator = trainer.ranking_evaluator(split.test, max_users=options.eval_users)
        evaluator.evaluate(model, item_embeds=item_embeds)
    if options.baselines:
        with memory.phase(f"baselines for {options.eval_users} users"):
            evaluator.train = split.train
            evaluator.evaluate_baselines(MAX_HISTORY)
    names = ("peak_rss", "peak_private")
    peaks = {name: (max(phase[name][0] for phase in memory.phases.values()), "MiB") for name in names}
    return {**memory.phases, "all": {"seconds": (time.perf_counter() - started, "s"), **peaks}}


def make_model(seed: int) -> tuple[Any, Any]:
    """Returns a model and its processor: towers of two layers, with a vocabulary of the invented words."""
    import torch
    from transformers import BertConfig, BertTokenizer, ResNetConfig, ViTImageProcessorPil

    from transrec_hf import TransRecConfig, TransRecModel, TransRecProcessor

    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *invented_words(NUM_WORDS))
    transformer = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 4 * HIDDEN_SIZE,
    }
    config = TransRecConfig(
        text_config=BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **transformer),
        vision_config=ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
        max_position_embeddings=MAX_HISTORY,
        **transformer,
    )
    torch.manual_seed(seed)
    processor = TransRecProcessor(
        BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}),
        ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        max_text_length=16,
    )
    return TransRecModel(config), processor
