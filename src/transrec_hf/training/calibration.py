"""What the pieces of training steps and evaluations take on this machine: counted, or timed on a few items."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
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

from ..data.catalogue import Catalogue
from ..data.interactions import Split
from ..evaluation.evaluator import RankingEvaluator
from ..items.encoding import item_modalities, move, packed_linears
from ..items.preparing import bucket_by_tokens, prepare_items, token_budget
from ..items.store import ActivationStore
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .arguments import TransRecTrainingArguments
from .collator import DataCollatorForNextItem, TrainingWindows
from .trainer import TransRecTrainer


BATCHES = 50  # simulated of an epoch, at most
SMALL = 16  # items, for what needs no clock: operations and bytes
RANKED = (512, 2048)  # users, to time the ranking of more
INPUTS = {"text": ("input_ids", "attention_mask", "text_states"), "image": ("pixel_values", "image_states")}


@dataclass(frozen=True)
class Counts:
    """
    What is encoded together, as the mean over training steps.

    Args:
        items (`float`): distinct items.
        texts, images (`float`): of those items, as far as the model reads them.
        tokens (`float`): of those texts, with the padding of their buckets.
        bucket_tokens (`float`): of the largest bucket.
        users (`float`, *optional*): windows of users.
        slots (`float`, *optional*): items in their histories, targets and negatives, repeats included.
    """

    items: float
    texts: float
    images: float
    tokens: float
    bucket_tokens: float
    users: float = 0.0
    slots: float = 0.0

    @property
    def units(self) -> dict[str, float]:
        """By modality, what the cost of its tower is proportional to."""
        return {"text": self.tokens, "image": self.images}

    @property
    def distinct_share(self) -> float:
        """Encodings for each one that would be made if repeats were encoded again."""
        return self.items / self.slots

    def stored(self, pooled: bool) -> Counts:
        """The same as a store has it: one state for each text if it has them pooled."""
        return replace(self, tokens=self.texts, bucket_tokens=self.texts) if pooled else self


@dataclass(frozen=True)
class TowerCost:
    """What a tower takes for a unit: an image, or a token with its share of all that is done for its text."""

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
    What the pieces of a run take.

    Args:
        collate_seconds, user_seconds, user_flop, user_bytes (`float`): of a step, without the items' contents.
        optimizer_seconds (`float`): of an update.
        ranking_seconds (`float`): of all validation targets.
        base_bytes (`float`): that are there before each step: weights, gradients, optimizer, and the process.
        prepare_seconds (`float`, *optional*): to read and decode an item.
        towers (`dict[str, TowerCost]`, *optional*): by modality.
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
        """For so many times as many users."""
        names = ("collate_seconds", "user_seconds", "user_flop", "user_bytes")
        return replace(self, **{name: getattr(self, name) * factor for name in names})


def count_units(catalogue: Catalogue, processor: TransRecProcessor | None) -> dict[str, np.ndarray]:
    """By modality that the model reads: tokens of each item's text, and whether it has an image; `(n_items,)`."""
    units = {}
    if processor is not None and "text" in processor.modalities:
        units["text"] = catalogue.tokens(processor.tokenizer, processor.max_text_length).lengths
    if processor is not None and "image" in processor.modalities:
        units["image"] = catalogue.has_image.astype(np.int64)
    return units


def count_items(units: dict[str, np.ndarray], rows: np.ndarray, max_tokens: int) -> Counts:
    """Catalogue rows that are encoded together, with buckets of `max_tokens`."""
    nothing = np.zeros(int(rows.max(initial=0)) + 1, dtype=np.int64)
    tokens, images = (units.get(modality, nothing)[rows] for modality in ("text", "image"))
    tokens = tokens[tokens > 0]
    buckets = [int(tokens[bucket].max()) * len(bucket) for bucket in bucket_by_tokens(tokens, max_tokens)]
    return Counts(len(rows), len(tokens), int(images.sum()), sum(buckets), max(buckets, default=0))


def simulate_steps(
    windows: TrainingWindows,
    collator: DataCollatorForNextItem,
    batch_size: int,
    units: dict[str, np.ndarray],
    max_batches: int = BATCHES,
) -> tuple[Counts, list[dict[str, Any]]]:
    """
    Draw batches of an epoch and count, without reading a text or an image.

    Args:
        windows ([`TrainingWindows`]): of the run.
        collator ([`DataCollatorForNextItem`]): of the run, but without a processor.
        batch_size (`int`): windows in a batch.
        units (`dict[str, np.ndarray]`): see [`count_units`].
        max_batches (`int`, *optional*, defaults to 50): how many to draw.

    Returns:
        The means, and the windows of the batch that is nearest to them.
    """
    rng = np.random.default_rng(collator.seed)
    order = rng.permutation(len(windows))
    starts = np.arange(0, len(order), batch_size)
    drawn, counts = [], []
    for start in rng.permutation(starts)[:max_batches]:
        features = [windows[int(index)] for index in order[start : start + batch_size]]
        batch = collator(features)
        encoded = count_items(units, batch["item_ids"].numpy(), collator.max_tokens)
        slots = sum(len(feature["items"]) for feature in features)
        slots += int((batch["negative_index"] >= 0).sum()) if "negative_index" in batch else 0
        counts.append(astuple(replace(encoded, users=len(features), slots=max(slots, encoded.items))))
        drawn.append(features)
    mean = Counts(*np.mean(counts, axis=0).tolist())
    nearest = np.argmin([abs(count[0] - mean.items) + abs(count[5] - mean.users) for count in counts])
    return mean, drawn[nearest]


def count_flop(function: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions in a call."""
    # written out, as fused attention goes uncounted on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class _Allocations(TorchDispatchMode):
    """Bytes of those living tensors that were made inside."""

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
    """Bytes of the tensors that a call makes: at the peak, and of those that what it returns keeps alive."""
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
    """Bytes of the device that this process has, and that are free."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available


def units_of(batch: dict[str, Any]) -> dict[str, int]:
    """What a batch has of each modality: tokens, padding included, and images."""
    units = {"text": sum(mask.numel() for mask in batch.get("attention_mask", []))}
    units["image"] = len(batch.get("image_index", []))
    return {modality: count for modality, count in units.items() if count}


def _given(vectors: Tensor, **inputs: Any) -> Tensor:
    return vectors


class Calibration:
    """
    Times pieces of steps and evaluations of a model, which learns nothing of it.

    Args:
        model ([`TransRecModel`]): on its device, frozen as it will be.
        args ([`TransRecTrainingArguments`]): of the run.
        catalogue ([`Catalogue`]): the items.
        processor ([`TransRecProcessor`] or `None`): of the model.
        seconds (`float`): that all pieces together should take, about.
    """

    def __init__(
        self,
        model: TransRecModel,
        args: TransRecTrainingArguments,
        catalogue: Catalogue,
        processor: TransRecProcessor | None,
        seconds: float,
    ):
        self.model, self.args, self.seconds = model, args, seconds
        self.catalogue, self.processor = catalogue, processor
        self.device = model.device
        self.dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.optimizer: Any = None

    def autocast(self) -> torch.autocast:
        is_mixed = self.args.bf16 or self.args.fp16
        return torch.autocast(self.device.type, self.dtype if is_mixed else None, enabled=is_mixed)

    def clock(self, function: Callable[[], Any], share: float = 0.05) -> float:
        """Median seconds of a call, without the first one unless that took `share` of all the time there is."""
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

    def prepare(self, rows: np.ndarray, store: ActivationStore | None = None) -> dict[str, Any]:
        """Model inputs of catalogue rows, on the device; those of the store's catalogue if there is a store."""
        catalogue = store.catalogue if store else self.catalogue
        return move(prepare_items(catalogue, rows, self.processor, store, token_budget(self.device)), self.device)

    def encode(self, batch: dict[str, Any], modality: str) -> Tensor:
        with self.autocast():
            if modality == "image":
                return self.model.get_image_features(batch.get("pixel_values"), batch.get("image_states"))
            return self.model.get_text_features(
                batch.get("input_ids"), batch["attention_mask"], batch.get("text_states")
            )

    def train(self, batch: dict[str, Any], modality: str) -> None:
        self.model.zero_grad()
        self.encode(batch, modality).float().sum().backward()

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any], modality: str) -> None:
        self.model.eval()
        self.encode(batch, modality)
        self.model.train()

    def affordable(self, rows: np.ndarray, share: float, store: ActivationStore | None = None) -> np.ndarray:
        """As many of the rows as can be prepared and trained on once in a share of the time."""
        few = rows[:SMALL]

        def step() -> None:
            batch = self.prepare(few, store)
            for modality in units_of(batch):
                self.train(batch, modality)

        return rows[: max(len(few), int(len(few) * share * self.seconds / self.clock(step, share=0.01)))]

    def towers(self, rows: np.ndarray, store: ActivationStore | None = None) -> tuple[float, dict[str, TowerCost]]:
        """Seconds to prepare an item, and what each tower takes; from the stored states if there is a store."""
        prepare_seconds = self.clock(lambda: self.prepare(rows, store)) / len(rows)
        batch, few, more = (self.prepare(some, store) for some in (rows, rows[:SMALL], rows[: 2 * SMALL]))
        return prepare_seconds, {modality: self.tower(modality, batch, few, more) for modality in units_of(batch)}

    def tower(self, modality: str, batch: dict[str, Any], few: dict[str, Any], more: dict[str, Any]) -> TowerCost:
        """What a tower takes: seconds on `batch`, bytes by how they grow from `few` items to `more`."""
        units = units_of(batch)[modality]
        inputs = [batch[name] for name in INPUTS[modality] if name in batch]
        chunk, self.model.item_chunk_size = self.model.item_chunk_size, None

        def growth(function: Callable[..., Any], kept: bool = False) -> float:
            # leaves out what is there once: gradients, and weights cast to bf16
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
            input_bytes=sum(value.nbytes for value in tree_leaves(inputs)) / units,
        )

    def users(self, batch: dict[str, Any]) -> None:
        """A step without the towers: random item vectors to users and loss, and back; of an ID baseline, all of it."""
        modalities = item_modalities(self.catalogue, self.model)
        self.model.zero_grad()
        if modalities is not None:
            size = (len(batch["item_ids"]), self.model.config.hidden_size)
            vectors = torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=True)
            batch = batch | {"item_modalities": modalities[batch["item_ids"].cpu()].to(self.device)}
            batch |= {"text_index": vectors, "image_index": vectors}  # no tower is left out
            self.model.get_item_features = partial(_given, vectors)  # type: ignore[method-assign]
        try:
            with self.autocast():
                loss = self.model(**batch).loss
        finally:
            self.model.__dict__.pop("get_item_features", None)
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
        counts, num_users = split.train.item_counts(len(self.catalogue)), len(split.validation)
        num_users = min(num_users, self.args.max_eval_users or num_users)
        vectors = torch.randn(len(self.catalogue), self.model.config.hidden_size, device=self.device)

        def seconds_for(size: int) -> float:
            evaluator = RankingEvaluator(
                self.catalogue, split.validation, protocol=protocol, train_counts=counts, max_users=size
            )
            with self.autocast():
                return self.clock(lambda: evaluator.evaluate(self.model, item_embeds=vectors), share=0.03)

        few, many = (min(size, num_users) for size in RANKED)
        low, high = seconds_for(few), seconds_for(many)
        return high + max(0.0, high - low) / max(many - few, 1) * (num_users - many)

    def rest(self, features: list[dict[str, Any]], collator: DataCollatorForNextItem, ranking_seconds: float) -> Costs:
        """What all but the towers takes for a batch of these windows."""
        batch = move(collator(features), self.device)
        return Costs(
            collate_seconds=self.clock(lambda: collator(features), share=0.01),
            user_seconds=self.clock(lambda: self.users(batch)),
            user_flop=count_flop(lambda: self.users(batch)),
            user_bytes=count_bytes(lambda: self.users(batch))[0],
            optimizer_seconds=self.clock(self.update, share=0.02),
            ranking_seconds=ranking_seconds,
        )

    def fill(
        self, folder: str, rows: np.ndarray, units: dict[str, np.ndarray], pooled: bool
    ) -> tuple[ActivationStore, float]:
        """A store of some catalogue rows, and the bytes of one of all items."""
        dtype, sample = torch.bfloat16 if self.args.bf16 else torch.float32, self.catalogue.select(rows)
        with self.autocast():
            store = ActivationStore(folder, self.model, self.processor, sample, dtype=dtype)  # type: ignore[arg-type]
            store.fill(batch_size=self.args.per_device_eval_batch_size)
        num_bytes = 0.0
        for modality, counts in units.items():
            states = counts > 0 if modality == "text" and pooled else counts
            stored_bytes = sum(content_bytes(path) for path in Path(folder).glob(f"{modality}-*/*"))
            num_bytes += stored_bytes * int(states.sum()) / max(int(states[rows].sum()), 1)
        return store, num_bytes
