"""What a training run will take on this machine, found out before it is started."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
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
from tqdm.auto import tqdm
from transformers import set_seed

from .activation_store import ActivationStore
from .arguments import DataArguments, ModelArguments, SplitArguments
from .checkpoint import bad_input, check_fits
from .data import Catalogue, DataError, Split, log_popularity
from .data_collator import DataCollatorForNextItem, TrainingWindows, bucket_by_tokens, prepare_items, token_budget
from .encoding import item_modalities, move
from .evaluator import RankingEvaluator
from .modelcard import describe_device
from .modeling_transrec import TransRecModel, frozen_depth
from .processing_transrec import TransRecProcessor
from .trainer import TransRecTrainer
from .training_args import TransRecTrainingArguments


BATCHES = 50  # simulated of an epoch, at most
FACTORS = (2, 4, 8)  # by which larger batches are looked at
SMALL = 16  # items, for what needs no clock: operations and bytes
RANKED = (512, 2048)  # users, to time the ranking of more
ROOM = 0.9  # of the memory, which a run may take
WORTH = 0.9  # of the time, to which a change has to bring it down
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


@dataclass(frozen=True)
class Forecast:
    """
    What a way of training takes.

    Args:
        prepare_seconds (`float`): to read, decode and collate a batch, in one process.
        step_seconds, epoch_seconds (`float`): of training; this includes what is not prepared meanwhile by workers.
        evaluation_seconds (`float`): of encoding the catalogue and ranking the validation targets.
        step_tflop, epoch_tflop (`float`): 10^12 floating-point operations of training.
        tower_share (`float`): how much of them the towers take.
        memory_gb (`float`): 2^30 bytes at the peak; of the GPU, or of the process on the host.
        chunk_memory_gb (`dict[int, float]`): the same by `item_chunk_size`.
    """

    prepare_seconds: float
    step_seconds: float
    epoch_seconds: float
    evaluation_seconds: float
    step_tflop: float
    epoch_tflop: float
    tower_share: float
    memory_gb: float
    chunk_memory_gb: dict[int, float]


@dataclass(frozen=True)
class Plan:
    """
    A run and what it takes.

    Args:
        machine, dtype (`str`): where and in which precision was calibrated.
        steps_per_epoch (`int`): batches of an epoch.
        step ([`Counts`]): of a batch.
        larger_steps (`dict[int, Counts]`): of batches of several times as many users.
        larger_batches (`dict[int, Forecast]`): of the run with those.
        without_store ([`Forecast`]): where frozen blocks run in every step.
        with_store ([`Forecast`], *optional*): where an [`ActivationStore`] has their states; `None` if there are none.
        uses_store (`bool`): which of the two the run is.
        fill_seconds, store_gb (`float`): to fill the store once, and its size on the disk in 2^30 bytes.
        available_gb (`float`): memory of the device that the run could have.
        calibration_seconds (`float`): that it took to find out.
        advice (`list[str]`): what to change, or not, and why.
    """

    machine: str
    dtype: str
    steps_per_epoch: int
    step: Counts
    larger_steps: dict[int, Counts]
    larger_batches: dict[int, Forecast]
    without_store: Forecast
    with_store: Forecast | None
    uses_store: bool
    fill_seconds: float
    store_gb: float
    available_gb: float
    calibration_seconds: float
    advice: list[str]

    @property
    def forecast(self) -> Forecast:
        """Of the run as it was asked for."""
        return self.with_store if self.uses_store and self.with_store is not None else self.without_store


# Counting -----------------------------------------------------------------------------------------------------------


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


# Timing -------------------------------------------------------------------------------------------------------------


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
        return TowerCost(
            train_seconds=self.clock(lambda: self.train(batch, modality)) / units,
            eval_seconds=self.clock(lambda: self.evaluate(batch, modality)) / units,
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


# Forecast -----------------------------------------------------------------------------------------------------------


def side_by_side(prepare: float, compute: float, workers: int, device: torch.device) -> float:
    """Seconds of a step whose batch is prepared before it, or by workers beside it; on a CPU they share its cores."""
    if not workers:
        return prepare + compute
    shared = prepare / (os.cpu_count() or 1) if device.type == "cpu" else 0.0
    return max(compute + shared, prepare / workers)


def training_bytes(counts: Counts, costs: Costs, chunk: int | None = None) -> float:
    """
    What a step makes at its peak: texts are encoded bucket by bucket, then the images at once, then comes the rest.
    Until the backward pass each keeps what that reads; with a chunk size nothing, and fewer items are encoded at once.
    """
    at_once = {"text": counts.bucket_tokens, "image": counts.images}
    if chunk is not None:
        at_once["text"] = min(counts.bucket_tokens, chunk * counts.tokens / max(counts.texts, 1))
        at_once["image"] = min(counts.images, chunk)
    held = peak = sum(cost.input_bytes * counts.units[modality] for modality, cost in costs.towers.items())
    for modality, cost in costs.towers.items():
        kept = cost.held_bytes if chunk is None else 0.0
        held += kept * counts.units[modality]
        peak = max(peak, held + (cost.train_bytes - kept) * at_once[modality])
    return max(peak, held + costs.user_bytes)


def encoding_bytes(counts: Counts, costs: Costs, batch_size: int) -> float:
    """What one batch of the items in `counts` makes at its peak when all of them are encoded."""
    share = min(1.0, batch_size / counts.items)
    units = {modality: count * share for modality, count in counts.units.items()}
    at_once = {"text": min(counts.bucket_tokens, units["text"]), "image": units["image"]}
    inputs = sum(cost.input_bytes * units[modality] for modality, cost in costs.towers.items())
    return inputs + max((cost.eval_bytes * at_once[modality] for modality, cost in costs.towers.items()), default=0.0)


def encoding_seconds(counts: Counts, costs: Costs, args: TransRecTrainingArguments) -> float:
    """Of all items in `counts`, without gradients."""
    compute = sum(cost.eval_seconds * counts.units[modality] for modality, cost in costs.towers.items())
    return side_by_side(costs.prepare_seconds * counts.items, compute, args.dataloader_num_workers, args.device)


def make_forecast(
    args: TransRecTrainingArguments,
    num_steps: int,
    step: Counts,
    everything: Counts,
    costs: Costs,
    filling: float = 0.0,
) -> Forecast:
    """
    From what the pieces take to what a run takes.

    Args:
        args ([`TransRecTrainingArguments`]): the arguments.
        num_steps (`int`): of an epoch.
        step, everything ([`Counts`]): what a step encodes, and what an evaluation does.
        costs ([`Costs`]): what the pieces take.
        filling (`float`, *optional*): bytes that the filling of a store makes at its peak.
    """

    def total(which: str) -> float:
        return sum(getattr(cost, which) * step.units[modality] for modality, cost in costs.towers.items())

    def memory_gb(chunk: int | None) -> float:
        evaluation_bytes = encoding_bytes(everything, costs, args.per_device_eval_batch_size)
        return (costs.base_bytes + max(training_bytes(step, costs, chunk), evaluation_bytes, filling)) / 2**30

    prepare_seconds = costs.collate_seconds + costs.prepare_seconds * step.items
    update_seconds = costs.optimizer_seconds / args.gradient_accumulation_steps
    compute_seconds = total("train_seconds") + costs.user_seconds + update_seconds
    step_seconds = side_by_side(prepare_seconds, compute_seconds, args.dataloader_num_workers, args.device)
    tower_flop = total("train_flop")
    flop = tower_flop + costs.user_flop
    chunks = [2**power for power in range(4, 13) if 2**power < step.items] if costs.towers else []
    return Forecast(
        prepare_seconds=prepare_seconds,
        step_seconds=step_seconds,
        epoch_seconds=step_seconds * num_steps,
        evaluation_seconds=encoding_seconds(everything, costs, args) + costs.ranking_seconds,
        step_tflop=flop / 1e12,
        epoch_tflop=flop / 1e12 * num_steps,
        tower_share=tower_flop / flop,
        memory_gb=memory_gb(args.item_chunk_size),
        chunk_memory_gb={chunk: memory_gb(chunk) for chunk in chunks},
    )


# Plan ---------------------------------------------------------------------------------------------------------------


def plan_run(
    model: TransRecModel,
    args: TransRecTrainingArguments,
    *,
    catalogue: Catalogue,
    split: Split,
    processing_class: TransRecProcessor | None = None,
    protocol: Any = "full",
    seconds: float = 10.0,
) -> Plan:
    """
    Predict what [`TransRecTrainer`] with these arguments takes on this machine, in one process.

    Args:
        model ([`TransRecModel`]): the model; it is frozen and run as in training, but learns nothing.
        args ([`TransRecTrainingArguments`]): the arguments. `item_cache_age` and `torch_compile` are not considered.
        catalogue ([`Catalogue`]): the items.
        split ([`Split`]): training and validation sequences.
        processing_class ([`TransRecProcessor`], *optional*): of the model; the ID baseline has none.
        protocol (`str` or [`EvaluationProtocol`], *optional*, defaults to `"full"`): how targets are ranked.
        seconds (`float`, *optional*, defaults to 10): to spend on calibration, about: large towers take longer.

    Raises:
        [`DataError`]: if no training sequence has two items.
        `ValueError`: if states are to be stored and nothing is frozen.
    """
    config, processor = model.config, processing_class if model.config.modalities else None
    windows = TrainingWindows(split.train, config.max_position_embeddings, config.num_targets)
    if not len(windows):
        raise DataError("no training sequence has two items: every user needs a history and a next item")
    if args.trainable_blocks is not None:
        model.freeze_towers(args.trainable_blocks)
    depths = [frozen_depth(tower) for tower in model.item_encoder.towers.values()]
    if args.activation_store is not None and not all(depths):
        raise ValueError("no block of a tower is frozen, so there is nothing to store: lower trainable_blocks")
    model.to(args.device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    model.item_chunk_size = args.item_chunk_size

    popularity, max_tokens = log_popularity(split.train.item_counts(len(catalogue))), token_budget(args.device)
    collator = DataCollatorForNextItem(catalogue, None, config, popularity, seed=args.seed, max_tokens=max_tokens)
    units = count_units(catalogue, processor)
    everything = count_items(units, np.arange(len(catalogue)), max_tokens)
    users = args.train_batch_size
    step, usual = simulate_steps(windows, collator, users, units)
    larger_steps = {
        factor: simulate_steps(windows, collator, users * factor, units, BATCHES // factor)[0]
        for factor in FACTORS
        if users * factor <= len(windows)
    }

    def num_steps(factor: int = 1) -> int:
        steps = len(windows) / (users * factor)
        return max(1, math.floor(steps) if args.dataloader_drop_last else math.ceil(steps))

    started = time.perf_counter()
    stored_costs, with_store, fill_seconds, store_bytes = None, None, 0.0, 0.0
    with tqdm(total=3, desc="Calibrating", leave=False) as bar, tempfile.TemporaryDirectory() as folder:
        calibration = Calibration(model, args, catalogue, processor, seconds)
        costs = calibration.rest(usual, collator, calibration.ranking(split, protocol))
        bar.update()
        if processor is not None:
            rows = np.random.default_rng(args.seed).permutation(collator(usual)["item_ids"].numpy())
            rows = np.sort(calibration.affordable(rows, share=0.12))
            prepare_seconds, towers = calibration.towers(rows)
            costs = replace(costs, prepare_seconds=prepare_seconds, towers=towers)
        bar.update()
        pooled = "text" in units and model.item_encoder.is_stored_pooled("text")
        if depths and all(depths):
            store, store_bytes = calibration.fill(folder, rows, units, pooled)
            again = np.resize(np.arange(len(rows)), int(step.items))
            prepare_seconds, towers = calibration.towers(calibration.affordable(again, 0.05, store), store)
            stored_costs = replace(costs, prepare_seconds=prepare_seconds, towers=towers)
        calibration.update()  # gradients and the states of the optimizer are there, as between two steps
        base_bytes, free_bytes = memory_of(args.device)
        bar.update()

    costs = replace(costs, base_bytes=base_bytes)
    without_store = make_forecast(args, num_steps(), step, everything, costs)
    used, used_pooled, filling = costs, False, 0.0
    if stored_costs is not None:
        filling = encoding_bytes(everything, costs, args.per_device_eval_batch_size)
        stored_costs = replace(stored_costs, base_bytes=base_bytes)
        counts = step.stored(pooled), everything.stored(pooled)
        with_store = make_forecast(args, num_steps(), *counts, stored_costs, filling)
        # what evaluations are spared later; not less than nothing where the clock is coarser than the tower
        fill_seconds = max(0.0, without_store.evaluation_seconds - with_store.evaluation_seconds)
        if args.activation_store is not None:
            used, used_pooled = stored_costs, pooled
    larger_batches = {
        factor: make_forecast(
            args, num_steps(factor), larger.stored(used_pooled), everything.stored(used_pooled), used.of_users(factor)
        )
        for factor, larger in larger_steps.items()
    }
    plan = Plan(
        machine=describe_device(args.device)["device"],
        dtype=str(calibration.dtype).removeprefix("torch."),
        steps_per_epoch=num_steps(),
        step=step,
        larger_steps=larger_steps,
        larger_batches=larger_batches,
        without_store=without_store,
        with_store=with_store,
        uses_store=used is stored_costs,
        fill_seconds=fill_seconds,
        store_gb=store_bytes / 2**30,
        available_gb=(base_bytes + free_bytes) / 2**30,
        calibration_seconds=time.perf_counter() - started,
        advice=[],
    )
    advice = [advise_store(plan, args), advise_batch(plan), advise_chunk(plan, args), advise_workers(plan, args)]
    return replace(plan, advice=advice if depths else advice[-1:])


def advise_store(plan: Plan, args: TransRecTrainingArguments) -> str:
    """Whether the states of the frozen blocks are worth storing."""
    if plan.with_store is None:
        return "activation_store: no, a tower is trained whole; lower trainable_blocks to store what is below them."
    without, stored = (
        way.epoch_seconds + (args.eval_strategy == "epoch") * way.evaluation_seconds
        for way in (plan.without_store, plan.with_store)
    )
    facts = f"an epoch takes {stored:.0f} s instead of {without:.0f} s"
    facts += f", and filling it {plan.fill_seconds:.0f} s and {plan.store_gb:.2f} GB"
    if (without - stored) * args.num_train_epochs <= plan.fill_seconds:
        return f"activation_store: no, {facts}, not paid back within {args.num_train_epochs:g} epochs."
    return f"activation_store: yes, {facts}, paid back after {plan.fill_seconds / (without - stored):.1f} epochs."


def advise_batch(plan: Plan) -> str:
    """Whether a larger batch, in which more items are repeats, is worth it."""
    best, now = 1, plan.forecast
    for factor, way in plan.larger_batches.items():
        if way.epoch_seconds > WORTH * now.epoch_seconds or way.memory_gb > ROOM * plan.available_gb:
            break
        best, now = factor, way
    share = f"{plan.step.distinct_share:.0%} of a step's items are distinct"
    if best == 1:
        return f"batch: as it is; {share}, and a larger one would save little time or take too much memory."
    return (
        f"batch: {best} times as many users if the metrics bear it, for {now.epoch_seconds:.0f} s an epoch and "
        f"{now.memory_gb:.1f} GB; {share}, {plan.larger_steps[best].distinct_share:.0%} would be."
    )


def advise_chunk(plan: Plan, args: TransRecTrainingArguments) -> str:
    """Whether memory makes it necessary to encode fewer items at a time."""
    now, room = plan.forecast, ROOM * plan.available_gb
    memory = f"the run takes {now.memory_gb:.1f} of {plan.available_gb:.1f} GB"
    if now.memory_gb < room:
        return f"item_chunk_size: {args.item_chunk_size or 'none'}, {memory}."
    fitting = [chunk for chunk, size in now.chunk_memory_gb.items() if size < room]
    if not fitting:
        return f"item_chunk_size: none is small enough, {memory}; lower per_device_train_batch_size."
    return f"item_chunk_size: {fitting[-1]}, as {memory}; with it {now.chunk_memory_gb[fitting[-1]]:.1f} GB."


def advise_workers(plan: Plan, args: TransRecTrainingArguments) -> str:
    """Whether batches should be prepared by other processes."""
    now, cores = plan.forecast, os.cpu_count() or 1
    if args.dataloader_num_workers:
        return f"dataloader_num_workers: as it is, {args.dataloader_num_workers}."
    compute = now.step_seconds - now.prepare_seconds
    best = {n: side_by_side(now.prepare_seconds, compute, n, args.device) for n in range(1, cores + 1)}
    fewest = next(n for n, seconds in best.items() if seconds <= 1.01 * min(best.values()))
    share = f"preparing batches takes {now.prepare_seconds / now.step_seconds:.0%} of the time"
    if best[fewest] > WORTH * now.step_seconds:
        return f"dataloader_num_workers: 0, {share}."
    return f"dataloader_num_workers: {fewest}, {share}; a step would take {best[fewest]:.2g} s."


def plan_options(
    model_args: ModelArguments, data_args: DataArguments, split_args: SplitArguments, args: TransRecTrainingArguments
) -> Plan:
    """[`plan_run`] of the options of a script. Raises [`DataError`] for whatever is wrong with them."""
    catalogue, sequences = data_args.load()
    set_seed(args.seed)
    model, processor = model_args.load(catalogue, data_args.is_demo)
    check_fits(model, catalogue)
    with bad_input("bad options"):
        split = split_args.apply(sequences, model.config.max_position_embeddings)
        return plan_run(
            model, args, catalogue=catalogue, split=split, processing_class=processor, protocol=split_args.protocol
        )


__all__ = ["Plan", "plan_options", "plan_run"]
