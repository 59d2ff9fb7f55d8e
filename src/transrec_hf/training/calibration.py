"""The costs of the parts of training steps and evaluations on this machine, counted or timed on a few items."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..data.interactions import Split
from ..evaluation.evaluator import RankingEvaluator
from ..items.encoding import packed_linears
from ..items.preparing import ItemSource, bucket_by_tokens
from ..items.store import ActivationStore
from ..model.modalities_transrec import MODALITIES, ItemBatch
from ..model.modeling_transrec import TransRecModel
from ..model.towers_transrec import in_evaluation
from .arguments import TransRecTrainingArguments
from .collator import DataCollatorForNextItem, TrainingWindows
from .trainer import TransRecTrainer


BATCHES = 50  # most batches of an epoch that are simulated
SMALL = 16  # items with which operations and bytes are counted
RANKED = (512, 2048)  # users with which ranking is timed, to predict the time of more


@dataclass(frozen=True)
class Counts:
    """
    How much is encoded together, as the mean over training steps.

    Args:
        items (`float`): Number of distinct items.
        contents (`dict[str, float]`): For each modality that the model reads, how many of these items have it.
        units (`dict[str, float]`): For each modality, the number to which the cost of its tower is proportional:
            tokens, with the padding of their buckets, or contents.
        at_once (`dict[str, float]`): For each modality, the units of the largest forward pass.
        users (`float`, *optional*): Number of training windows.
        slots (`float`, *optional*): Number of items in histories, targets and negatives, repeats included.
    """

    items: float
    contents: dict[str, float]
    units: dict[str, float]
    at_once: dict[str, float]
    users: float = 0.0
    slots: float = 0.0

    @property
    def distinct_share(self) -> float:
        """The number of distinct items divided by the number with repeats."""
        return self.items / self.slots

    def stored(self, pooled: Collection[str]) -> Counts:
        """The same counts with a store, which has one state for each content of the modalities in `pooled`."""
        as_stored = {name: self.contents[name] for name in pooled if name in self.contents}
        return replace(self, units=self.units | as_stored, at_once=self.at_once | as_stored)

    @classmethod
    def mean(cls, counts: Sequence[Counts]) -> Counts:
        """The mean of several counts, field by field."""

        def of(name: str) -> Any:
            values = [getattr(count, name) for count in counts]
            if not isinstance(values[0], dict):
                return statistics.fmean(values)
            return {key: statistics.fmean(value[key] for value in values) for key in values[0]}

        return cls(*(of(field.name) for field in fields(cls)))


@dataclass(frozen=True)
class TowerCost:
    """The cost of a tower for one unit: an image, or a token with its share of the work for its text."""

    train_seconds: float
    eval_seconds: float
    train_flop: float
    train_bytes: float  # at the peak of forward and backward pass
    held_bytes: float  # from the forward to the backward pass
    eval_bytes: float
    input_bytes: float


@dataclass(frozen=True)
class Costs:
    """
    The costs of the parts of a run.

    Args:
        collate_seconds, user_seconds, user_flop, user_bytes (`float`): Costs of a step without the contents of items.
        optimizer_seconds (`float`): Seconds of an optimizer update.
        ranking_seconds (`float`): Seconds to rank all validation targets.
        base_bytes (`float`): Bytes in use before each step: weights, gradients, optimizer, and the process.
        prepare_seconds (`float`, *optional*): Seconds to read and decode an item.
        towers (`dict[str, TowerCost]`, *optional*): Costs of the towers, by modality.
    """

    collate_seconds: float
    user_seconds: float
    user_flop: float
    user_bytes: float
    optimizer_seconds: float
    ranking_seconds: float
    base_bytes: float = 0.0
    prepare_seconds: float = 0.0
    towers: dict[str, TowerCost] = field(default_factory=dict)

    def of_users(self, factor: float) -> Costs:
        """The costs for `factor` times as many users."""
        names = ("collate_seconds", "user_seconds", "user_flop", "user_bytes")
        return replace(self, **{name: getattr(self, name) * factor for name in names})


def count_items(units: dict[str, np.ndarray], rows: np.ndarray, max_tokens: int) -> Counts:
    """The counts of catalogue rows that are encoded together in buckets of `max_tokens`; see [`ItemSource.units`]."""
    contents: dict[str, float] = {}
    totals: dict[str, float] = {}
    largest: dict[str, float] = {}
    for name, of_items in units.items():
        own = of_items[rows][of_items[rows] > 0]
        passes = [int(own.sum())]
        if MODALITIES[name].has_tokens:
            passes = [int(own[bucket].max()) * len(bucket) for bucket in bucket_by_tokens(own, max_tokens)]
        contents[name], totals[name], largest[name] = len(own), sum(passes), max(passes, default=0)
    return Counts(len(rows), contents, totals, largest)


def simulate_steps(
    windows: TrainingWindows,
    collator: DataCollatorForNextItem,
    batch_size: int,
    units: dict[str, np.ndarray],
    max_batches: int = BATCHES,
) -> tuple[Counts, list[dict[str, Any]]]:
    """
    Draw batches of an epoch and count their items, without reading a text or an image.

    Args:
        windows ([`TrainingWindows`]): The training windows of the run.
        collator ([`DataCollatorForNextItem`]): The collator of the run, but without a processor.
        batch_size (`int`): Windows in a batch.
        units (`dict[str, np.ndarray]`): See [`ItemSource.units`].
        max_batches (`int`, *optional*, defaults to 50): Most batches that are drawn.

    Returns:
        The mean counts, and the windows of the batch that is nearest to the mean.
    """
    rng = np.random.default_rng(collator.seed)
    order = rng.permutation(len(windows))
    starts = np.arange(0, len(order), batch_size)
    drawn, counts = [], []
    for start in rng.permutation(starts)[:max_batches]:
        features = [windows[int(index)] for index in order[start : start + batch_size]]
        batch = collator(features)
        encoded = count_items(units, batch["items"].item_rows.numpy(), collator.source.max_tokens)
        slots = sum(len(feature["items"]) for feature in features)
        slots += int((batch["negative_index"] >= 0).sum()) if "negative_index" in batch else 0
        counts.append(replace(encoded, users=len(features), slots=max(slots, encoded.items)))
        drawn.append(features)
    mean = Counts.mean(counts)
    nearest = np.argmin([abs(count.items - mean.items) + abs(count.users - mean.users) for count in counts])
    return mean, drawn[nearest]


def count_flop(function: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions in a call."""
    # with eager attention, since fused attention is not counted on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class _Allocations(TorchDispatchMode):
    """Counts the bytes of living tensors that were made inside this context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._meet((args, kwargs), is_new=False)
        made = func(*args, **(kwargs or {}))
        self._meet(made, is_new=True)
        return made

    def _meet(self, values: Any, is_new: bool) -> None:
        for storage in (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)):
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes() if is_new else 0
                weakref.finalize(storage, self._forget, storage._cdata)
                self.now += self.known[storage._cdata]
                self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.known.pop(key)


def count_bytes(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of the tensors that a call makes: at the peak, and those that its result keeps alive."""
    with _Allocations() as allocations:
        returned = function()
    kept = allocations.now
    del returned
    return allocations.peak, kept


def content_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, without its header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory that this process uses, and that are free."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available


def units_of(batch: ItemBatch) -> dict[str, int]:
    """The units of a batch for each modality: tokens (padding included), windows or contents."""
    units = {}
    for name, part in batch.parts.items():
        masks = part.masks or []
        if MODALITIES[name].is_windowed:
            units[name] = sum(int((mask > 0).sum()) for mask in masks) or len(part.rows)
        else:
            units[name] = sum(mask.numel() for mask in masks) or len(part.rows)
    return units


class Calibration:
    """
    Measures the time of parts of training steps and evaluations. The model does not change.

    Args:
        model ([`TransRecModel`]): The model on its device, frozen as in the run.
        args ([`TransRecTrainingArguments`]): The arguments of the run.
        source ([`ItemSource`]): The items.
        seconds (`float`): Seconds that all measurements should take together, approximately.
    """

    def __init__(self, model: TransRecModel, args: TransRecTrainingArguments, source: ItemSource, seconds: float):
        self.model, self.args, self.seconds, self.source = model, args, seconds, source
        self.device = model.device
        self.dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.optimizer: Any = None

    def autocast(self) -> torch.autocast:
        is_mixed = self.args.bf16 or self.args.fp16
        return torch.autocast(self.device.type, self.dtype if is_mixed else None, enabled=is_mixed)

    def clock(self, function: Callable[[], Any], share: float = 0.05) -> float:
        """Median seconds of a call. The first call does not count, unless it took `share` of the available time."""
        seconds: list[float] = []
        while len(seconds) < 2 or sum(seconds) < share * self.seconds:
            started = time.perf_counter()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            if seconds[0] > share * self.seconds:
                break
        return statistics.median(seconds[1:] or seconds)

    def prepare(self, rows: np.ndarray, source: ItemSource | None = None) -> ItemBatch:
        """A batch of catalogue rows on the device, from `source` (such as that of a store) if it is given."""
        return (source or self.source).batch(rows).to(self.device)

    def encode(self, batch: ItemBatch, modality: str) -> Tensor:
        with self.autocast():
            return self.model.get_content_features(modality, batch.parts[modality])

    def train(self, batch: ItemBatch, modality: str) -> None:
        self.model.zero_grad()
        self.encode(batch, modality).float().sum().backward()

    @torch.no_grad()
    def evaluate(self, batch: ItemBatch, modality: str) -> None:
        with in_evaluation(self.model):
            self.encode(batch, modality)

    def affordable(self, rows: np.ndarray, share: float, source: ItemSource | None = None) -> np.ndarray:
        """As many of the rows as can be prepared and trained on once in a share of the available time."""
        few = rows[:SMALL]

        def step() -> None:
            batch = self.prepare(few, source)
            for modality in units_of(batch):
                self.train(batch, modality)

        return rows[: max(len(few), int(len(few) * share * self.seconds / self.clock(step, share=0.01)))]

    def towers(self, rows: np.ndarray, source: ItemSource | None = None) -> tuple[float, dict[str, TowerCost]]:
        """Seconds to prepare an item, and the cost of each tower, with `source` if it is given."""
        prepare_seconds = self.clock(lambda: self.prepare(rows, source)) / len(rows)
        batch, few, more = (self.prepare(some, source) for some in (rows, rows[:SMALL], rows[: 2 * SMALL]))
        return prepare_seconds, {modality: self.tower(modality, batch, few, more) for modality in units_of(batch)}

    def tower(self, modality: str, batch: ItemBatch, few: ItemBatch, more: ItemBatch) -> TowerCost:
        """The cost of a tower: the seconds for `batch`, and the growth of bytes from `few` items to `more`."""
        units = units_of(batch)[modality]
        part = batch.parts[modality]
        chunk, self.model.item_chunk_size = self.model.item_chunk_size, None

        def growth(function: Callable[..., Any], kept: bool = False) -> float:
            # the difference leaves out what exists once: gradients, and weights cast to bf16
            low, high = (count_bytes(partial(function, part, modality))[kept] for part in (few, more))
            return max(0.0, (high - low) / (units_of(more)[modality] - units_of(few).get(modality, 0)))

        grows = units_of(more).get(modality, 0) > units_of(few).get(modality, 0)
        train_bytes, held_bytes, eval_bytes = (
            (growth(self.train), growth(self.encode, kept=True), growth(self.evaluate)) if grows else (0.0, 0.0, 0.0)
        )
        self.model.item_chunk_size = chunk
        measured = more if modality in units_of(more) else batch
        with self.autocast(), packed_linears(self.model):
            eval_seconds = self.clock(lambda: self.evaluate(batch, modality)) / units
        return TowerCost(
            train_seconds=self.clock(lambda: self.train(batch, modality)) / units,
            eval_seconds=eval_seconds,
            train_flop=count_flop(lambda: self.train(measured, modality)) / units_of(measured)[modality],
            train_bytes=train_bytes,
            held_bytes=held_bytes,
            eval_bytes=eval_bytes,
            input_bytes=sum(value.nbytes for value in [*part.values, *(part.masks or [])]) / units,
        )

    def users(self, batch: dict[str, Any]) -> None:
        """
        A step without the towers: forward and backward pass from random item vectors (for an ID baseline: a whole
        step).
        """
        self.model.zero_grad()
        with self.autocast():
            if not self.model.config.modalities:
                loss = self.model(**batch).loss
            else:
                size = (len(batch["items"]), self.model.config.hidden_size)
                vectors = torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=True)
                present = self.source.present[batch["items"].item_rows.cpu()].to(self.device)
                rest = {name: value for name, value in batch.items() if name != "items"}
                times = rest.pop("timestamps", None)
                states = self.model.get_user_features(vectors, batch["history_index"], present, times)
                scored = self.model.with_popularity(vectors, batch["log_popularity"])
                loss = self.model.compute_loss(states, scored, **rest)
        loss.backward()

    def update(self) -> None:
        """An update with gradients of zero, after clipping."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm or math.inf)
        if self.optimizer is None:
            optimizer_class, options = TransRecTrainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameters, **{**options, "lr": 0.0})
        self.optimizer.step()

    def ranking(self, split: Split, protocol: Any) -> float:
        """Seconds to rank all validation targets."""
        counts, num_users = split.train.item_counts(len(self.source)), len(split.validation)
        num_users = min(num_users, self.args.max_eval_users or num_users)
        vectors = torch.randn(len(self.source), self.model.config.hidden_size, device=self.device)
        vectors = self.model.with_popularity(vectors, None)

        def seconds_for(size: int) -> float:
            evaluator = RankingEvaluator(
                self.source, split.validation, protocol=protocol, train_counts=counts, max_users=size
            )
            with self.autocast():
                return self.clock(lambda: evaluator.evaluate(self.model, item_embeds=vectors), share=0.03)

        few, many = (min(size, num_users) for size in RANKED)
        low, high = seconds_for(few), seconds_for(many)
        return high + max(0.0, high - low) / max(many - few, 1) * (num_users - many)

    def rest(self, features: list[dict[str, Any]], collator: DataCollatorForNextItem, ranking_seconds: float) -> Costs:
        """The costs of everything but the towers for a batch of these windows."""
        batch = {name: value.to(self.device) for name, value in collator(features).items()}
        return Costs(
            collate_seconds=self.clock(lambda: collator(features), share=0.01),
            user_seconds=self.clock(lambda: self.users(batch)),
            user_flop=count_flop(lambda: self.users(batch)),
            user_bytes=count_bytes(lambda: self.users(batch))[0],
            optimizer_seconds=self.clock(self.update, share=0.02),
            ranking_seconds=ranking_seconds,
        )

    def store(self, folder: str, rows: np.ndarray) -> ActivationStore | None:
        """An empty store of some catalogue rows; `None` if this run has none, and a tower cannot have one."""
        try:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            return ActivationStore(folder, self.model, self.source.select(rows), dtype=dtype)
        except ValueError:
            if self.args.activation_store is not None:
                raise
            return None

    def fill(
        self, store: ActivationStore, rows: np.ndarray, units: dict[str, np.ndarray], pooled: Collection[str]
    ) -> tuple[ItemSource, float]:
        """The items at `rows` with stored states, and the bytes of a store of all items."""
        with self.autocast():
            store.fill(batch_size=self.args.per_device_eval_batch_size)
        num_bytes = 0.0
        for name, of_modality in store.states.items():
            counts = units[name]
            states = counts > 0 if name in pooled else counts
            stored_bytes = sum(content_bytes(path) for path in of_modality.folder.glob("*"))
            num_bytes += stored_bytes * int(states.sum()) / max(int(states[rows].sum()), 1)
        return store.source, num_bytes
