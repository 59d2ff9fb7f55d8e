"""
Two ways to train the same towers, and everything between them.

The official recipe is implemented again from the description of the method (arXiv 2206.06190 and its released code). A
user has one window per epoch, with up to 25 items of history, the 5 items after them as positives and 5 random
negatives. The loss is a binary cross-entropy. Every slot of the batch is encoded, also duplicates, padded to one
length. The upper two blocks of each tower are trained, and the lower ones run in every step. The optimizer is Adam at
1e-4, with 128 users and in fp32. It is cheaper than the original: padding is not encoded, and all images are already
decoded in memory.

Our recipe is what the package does by default: every position predicts its next item against the distinct items of the
batch. Each item is encoded once, in buckets of similar length and in bf16, and the states of the frozen blocks are
read from a store.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from transrec_hf import TransRecConfig, TransRecModel, TransRecProcessor, encode_catalogue
from transrec_hf.commands.options import CONFIG_FIELDS
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.data.interactions import Split, leave_one_out, load_domain
from transrec_hf.data.statistics import log_popularity
from transrec_hf.evaluation.evaluator import RankingEvaluator
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.items.preparing import PADDING, ItemSource, pad_right, token_budget
from transrec_hf.items.store import ActivationStore
from transrec_hf.model.modalities_transrec import ItemPart
from transrec_hf.training.collator import DataCollatorForNextItem, TrainingWindows
from transrec_hf.training.item_cache import ItemCache
from transrec_hf.training.parameters import part_of


ONE_BUCKET = 2**62  # tokens or images


@dataclass(frozen=True)
class Recipe:
    """
    How to train. The defaults are the official recipe.

    Args:
        unique (`bool`): Whether each distinct item of a batch is encoded once, and not every slot.
        buckets (`bool`): Whether texts run in buckets of similar length and bounded size, and are not padded to one
            length. Images then run in passes of bounded size.
        bf16 (`bool`): Whether to use autocast in bf16.
        store (`bool`): Whether to read the states of the frozen blocks from a store.
        every_position (`bool`): Whether each position predicts the next item against the items of the batch. Otherwise
            only the last position predicts its next five items, against five random ones.
        batch_size (`int`): Number of users in a step.
        learning_rate, tower_learning_rate (`float`): Learning rates of Adam.
        warm_up_steps (`int`): Number of steps in which the rates rise. If there are any, gradients are clipped at 1,
            as `Trainer` does.
        trained_blocks (`int`): Number of trained blocks at the top of each tower.
    """

    unique: bool = False
    buckets: bool = False
    bf16: bool = False
    store: bool = False
    every_position: bool = False
    batch_size: int = 128
    learning_rate: float = 1e-4
    tower_learning_rate: float = 1e-4
    warm_up_steps: int = 0
    trained_blocks: int = 2

    @property
    def levers(self) -> list[str]:
        """Returns the levers that are on."""
        return [name for name, value in asdict(self).items() if value is True]


OFFICIAL = Recipe()
OURS = Recipe(
    unique=True,
    buckets=True,
    bf16=True,
    store=True,
    every_position=True,
    batch_size=256,
    learning_rate=5e-4,
    warm_up_steps=50,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all benchmarks of training have."""
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--text_model", help="folder of the text tower")
    parser.add_argument("--vision_model", help="folder of the vision tower")
    parser.add_argument(
        "--modality_policy", default="one_per_item", help="which modalities of an item are used; the method uses one"
    )
    parser.add_argument("--max_text_length", type=int, default=32, help="tokens, as in the paper")
    parser.add_argument("--max_users", type=int, help="number of users to draw; their sequences stay whole")


class DecodedImages:
    """A preparation in which all images are decoded already, so that a step costs what the towers cost."""

    def __init__(self, source: ItemSource):
        self.units = source.units()["image"]
        self.place = np.cumsum(self.units) - 1
        self.pixels = torch.cat(source.batch(np.flatnonzero(self.units)).parts["image"].values)

    def __call__(self, rows: np.ndarray, slots: torch.Tensor, max_tokens: int) -> ItemPart:
        return ItemPart(slots, [self.pixels[self.place[rows]]])


@dataclass
class Domain:
    """A data set with its split and its items prepared for the towers."""

    catalogue: Catalogue
    split: Split
    processor: TransRecProcessor
    towers: dict[str, str]
    store_folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)

    @classmethod
    def load(cls, options: argparse.Namespace) -> Domain:
        """Loads the data set that the options of the command line name."""
        catalogue, sequences = load_domain(options.data, modality_policy=options.modality_policy)
        if options.max_users is not None:
            chosen = np.random.default_rng(options.seed).permutation(len(sequences))[: options.max_users]
            sequences = sequences.select(np.sort(chosen))
        names = {"text_model": options.text_model, "vision_model": options.vision_model}
        towers = {name: path for name, path in names.items() if path}
        processor = TransRecProcessor.from_towers(**towers, max_text_length=options.max_text_length)
        return cls(catalogue, leave_one_out(sequences), processor, towers)

    @functools.cached_property
    def decoded(self) -> ItemSource:
        """Returns the items with all images decoded."""
        source = ItemSource(self.catalogue, self.processor)
        return source.with_preparations({"image": DecodedImages(source)} if "image" in source.units() else {})

    def build(self, recipe: Recipe, seed: int) -> TransRecModel:
        """Returns a model: with the paper's settings if the recipe is the paper's, otherwise with the defaults."""
        base = TransRecConfig() if recipe.every_position else TransRecConfig.paper()
        fields = {name: getattr(base, name) for name in CONFIG_FIELDS}
        if recipe.every_position:
            fields |= {"hidden_size": 256, "max_position_embeddings": 25}
        torch.manual_seed(seed)
        return TransRecModel.from_text_vision_pretrained(**self.towers, **fields)


class Training:
    """
    A model and its optimizer under one recipe.

    Args:
        domain ([`Domain`]): The data.
        recipe ([`Recipe`]): How to train.
        seed (`int`): Seed of weights, order and negatives.
        model ([`TransRecModel`], *optional*): The model to train further. Without it a new model is built.
    """

    def __init__(self, domain: Domain, recipe: Recipe, seed: int, model: TransRecModel | None = None):
        self.domain, self.recipe, self.seed = domain, recipe, seed
        self.model = model or domain.build(recipe, seed)
        self.model.freeze_towers(recipe.trained_blocks)
        if not recipe.buckets:
            self.model.images_per_pass = ONE_BUCKET
        config, train = self.model.config, domain.split.train
        if not recipe.every_position:
            train = train.truncate(config.max_position_embeddings + config.num_positives)  # one window per user
        self.windows = TrainingWindows(train, config.max_position_embeddings, config.num_targets)
        popularity = log_popularity(domain.split.train.item_counts(len(domain.catalogue)))
        self.collator = DataCollatorForNextItem(ItemSource(domain.catalogue), config, popularity, seed)
        self.source = domain.decoded
        self.source.max_tokens = token_budget(self.model.device) if recipe.buckets else ONE_BUCKET
        self.cache: ItemCache | None = None
        started = time.perf_counter()
        if recipe.store:
            with self.autocast():
                dtype = torch.bfloat16 if recipe.bf16 else torch.float32
                store = ActivationStore(domain.store_folder.name, self.model, self.source, dtype)
                store.fill()
                self.source = store.source
        if recipe.every_position:
            with self.autocast():
                standardize_projections(self.model, self.source, seed=seed)
        self.preparation_seconds = time.perf_counter() - started
        towers: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (towers if part_of(name) == "tower" else rest).append(parameter)
        groups = [{"params": towers, "lr": recipe.tower_learning_rate}, {"params": rest, "lr": recipe.learning_rate}]
        self.optimizer = torch.optim.AdamW([{**group, "peak": group["lr"]} for group in groups], weight_decay=0.0)
        self.num_steps = 0
        self.batches = self.endless()

    def autocast(self) -> torch.autocast:
        """Returns autocast in the dtype of the recipe."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.windows) // self.recipe.batch_size)

    def endless(self) -> Iterator[list[dict[str, Any]]]:
        """Yields batches of users without end, in another order in each epoch."""
        rng = np.random.default_rng(self.seed)
        while True:
            order = rng.permutation(len(self.windows))
            for start in range(0, len(order), self.recipe.batch_size):
                yield [self.windows[index] for index in order[start : start + self.recipe.batch_size]]
            self.windows.set_epoch(self.windows.epoch + 1)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns a batch of model inputs as the recipe asks for it."""
        windows = [self.collator.split(np.asarray(feature["items"])) for feature in features]
        history, target = (pad_right(part) for part in zip(*windows, strict=True))
        negative = self.collator.negatives(features, np.concatenate([history, target], axis=1), target)
        indices = {"history_index": history, "target_index": target}
        if negative.size:
            indices["negative_index"] = negative
        slots = np.concatenate([index.ravel() for index in indices.values()])
        if self.recipe.unique:
            rows, place = np.unique(slots[slots != PADDING], return_inverse=True)
        else:
            rows = slots[slots != PADDING]
            place = np.arange(len(rows))
        flat = np.full(len(slots), PADDING)
        flat[slots != PADDING] = place
        batch: dict[str, Any] = {"items": self.source.batch(rows)}
        batch["log_popularity"] = torch.from_numpy(self.collator.log_popularity[rows])
        sizes = np.cumsum([index.size for index in indices.values()])[:-1]
        for (name, index), part in zip(indices.items(), np.split(flat, sizes), strict=True):
            batch[name] = torch.from_numpy(part.reshape(index.shape))
        return batch

    def steps(self, count: int) -> tuple[int, int]:
        """Trains for some steps. Returns the numbers of users and of encoded items in them."""
        users = items = 0
        self.model.train()
        for step in range(count):
            features = next(self.batches)
            batch = self.collate(features)
            if self.cache is not None:
                batch = self.cache.leave_out(batch, step)
            with self.autocast():
                output = self.model(**batch)
            output.loss.backward()
            if self.recipe.warm_up_steps:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.num_steps += 1
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * min(1.0, self.num_steps / self.recipe.warm_up_steps)
            if self.cache is not None:
                self.cache.update(batch, output.item_embeds, step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            users += len(features)
            items += len({row for part in batch["items"].parts.values() for row in part.rows.tolist()})
        return users, items

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics on the validation targets."""
        evaluator = RankingEvaluator(self.source, self.domain.split.validation)
        with self.autocast():
            embeds = encode_catalogue(self.model, self.source)
            return evaluator(self.model, item_embeds=embeds)
