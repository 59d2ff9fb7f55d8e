"""Planning: the time, memory and disk space of a training run on this machine, before it is started."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.catalogue import Catalogue
from ..data.interactions import Split
from ..data.statistics import log_popularity
from ..errors import DataError
from ..items.preparing import ItemSource, token_budget
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.towers_transrec import frozen_depth
from ..publishing.results import describe_device
from .arguments import TransRecTrainingArguments
from .calibration import BATCHES, Calibration, Costs, Counts, count_items, memory_of, simulate_steps
from .collator import DataCollatorForNextItem, TrainingWindows


FACTORS = (2, 4, 8)  # factors of the larger batches that are considered
ROOM = 0.7  # share of the memory that a run may use: the allocator of a CPU holds up to 1.4 times what is in use
WORTH = 0.9  # a change must reduce the time to this share


@dataclass(frozen=True)
class Forecast:
    """
    The predicted costs of one way of training.

    Args:
        prepare_seconds (`float`): Seconds to read, decode and collate a batch, in one process.
        step_seconds, epoch_seconds (`float`): Seconds of training, with the waiting for batches.
        evaluation_seconds (`float`): Seconds to encode the catalogue and rank the validation targets.
        step_tflop, epoch_tflop (`float`): 10^12 floating-point operations of training.
        tower_share (`float`): Share of these operations in the towers.
        memory_gb (`float`): Peak memory in 2^30 bytes, of the GPU or of the process on the host.
        chunk_memory_gb (`dict[int, float]`): The peak memory for each `item_chunk_size`.
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
    A run and its predicted costs.

    Args:
        machine, dtype (`str`): The machine and the precision of the measurement.
        steps_per_epoch (`int`): Number of batches of an epoch.
        step ([`Counts`]): Counts of a batch.
        larger_steps (`dict[int, Counts]`): Counts of batches of several times as many users, by factor.
        larger_batches (`dict[int, Forecast]`): Costs of the run with these batches, by factor.
        without_store ([`Forecast`]): Costs if frozen blocks run in every step.
        with_store ([`Forecast`], *optional*): Costs if an [`ActivationStore`] has their states; `None` if no block is
            frozen.
        uses_store (`bool`): Whether the run uses a store.
        store_pays (`bool`): Whether a store saves more time than filling it takes.
        fill_seconds, store_gb (`float`): Seconds to fill the store once, and its size on the disk in 2^30 bytes.
        available_gb (`float`): Memory of the device that is available to the run.
        calibration_seconds (`float`): Seconds that the measurement took.
        advice (`list[str]`): What to change or to leave, and why.
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
    store_pays: bool
    fill_seconds: float
    store_gb: float
    available_gb: float
    calibration_seconds: float
    advice: list[str]

    @property
    def forecast(self) -> Forecast:
        """The costs of the run with the given options."""
        return self.with_store if self.uses_store and self.with_store is not None else self.without_store

    @property
    def advised(self) -> Forecast:
        """The costs of the run, with a store if that pays; the other advice starts from these."""
        return self.with_store if self.store_pays and self.with_store is not None else self.forecast


def side_by_side(prepare: float, compute: float, workers: int, device: torch.device) -> float:
    """
    Seconds of a step whose batch is prepared before it, or at the same time by workers, which share the CPU cores.
    """
    if not workers:
        return prepare + compute
    shared = prepare / (os.cpu_count() or 1) if device.type == "cpu" else 0.0
    return max(compute + shared, prepare / workers)


def training_bytes(counts: Counts, costs: Costs, chunk: int | None = None) -> float:
    """
    Peak bytes of a step. Texts are encoded bucket by bucket, then the images together, then the rest. All keep their
    activations until the backward pass; with a chunk size they keep none, and fewer items are encoded at a time.
    """
    at_once = counts.at_once
    if chunk is not None:
        of_chunk = {name: chunk * units / max(counts.contents[name], 1) for name, units in counts.units.items()}
        at_once = {name: min(units, of_chunk[name]) for name, units in at_once.items()}
    held = peak = sum(cost.input_bytes * counts.units[modality] for modality, cost in costs.towers.items())
    for modality, cost in costs.towers.items():
        kept = cost.held_bytes if chunk is None else 0.0
        held += kept * counts.units[modality]
        peak = max(peak, held + (cost.train_bytes - kept) * at_once[modality])
    return max(peak, held + costs.user_bytes)


def encoding_bytes(counts: Counts, costs: Costs, batch_size: int) -> float:
    """Peak bytes of one batch when all items in `counts` are encoded."""
    share = min(1.0, batch_size / counts.items)
    units = {modality: count * share for modality, count in counts.units.items()}
    at_once = {modality: min(counts.at_once[modality], count) for modality, count in units.items()}
    inputs = sum(cost.input_bytes * units[modality] for modality, cost in costs.towers.items())
    return inputs + max((cost.eval_bytes * at_once[modality] for modality, cost in costs.towers.items()), default=0.0)


def encoding_seconds(counts: Counts, costs: Costs, args: TransRecTrainingArguments) -> float:
    """Seconds to encode all items in `counts` without gradients."""
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
    Compute the costs of a run from the costs of its parts.

    Args:
        args ([`TransRecTrainingArguments`]): The arguments.
        num_steps (`int`): Number of steps of an epoch.
        step, everything ([`Counts`]): What a step encodes, and what an evaluation encodes.
        costs ([`Costs`]): The costs of the parts.
        filling (`float`, *optional*): Peak bytes of filling a store.
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
    Predict the costs of a run of [`TransRecTrainer`] with these arguments on this machine, in one process.

    Args:
        model ([`TransRecModel`]): The model. It is frozen and run as in training, but does not change.
        args ([`TransRecTrainingArguments`]): The arguments. `item_cache_age` and `torch_compile` are not considered.
        catalogue ([`Catalogue`]): The items.
        split ([`Split`]): Training and validation sequences.
        processing_class ([`TransRecProcessor`], *optional*): The processor of the model; the ID baseline has none.
        protocol (`str` or [`EvaluationProtocol`], *optional*, defaults to `"full"`): How targets are ranked.
        seconds (`float`, *optional*, defaults to 10): Approximate seconds of the measurement; large towers take
            longer.

    Raises:
        [`DataError`]: If no training sequence has two items.
        `ValueError`: If the run has a store, but no block is frozen or a tower cannot continue from stored states.
    """
    config, processor = model.config, processing_class if model.config.modalities else None
    windows = TrainingWindows(split.train, config.max_position_embeddings, config.num_targets)
    if not len(windows):
        raise DataError("no training sequence has two items: every user needs a history and a next item")
    if args.trainable_blocks is not None:
        model.freeze_towers(args.trainable_blocks)
    depths = {name: frozen_depth(tower) for name, tower in model.item_encoder.towers.items()}
    if args.activation_store is not None and not all(depths.values()):
        raise ValueError("no block of a tower is frozen, so there is nothing to store: lower trainable_blocks")
    model.to(args.device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    model.item_chunk_size = args.item_chunk_size

    popularity, max_tokens = log_popularity(split.train.item_counts(len(catalogue))), token_budget(args.device)
    source = ItemSource(catalogue, processor, max_tokens)
    collator = DataCollatorForNextItem(ItemSource(catalogue, None, max_tokens), config, popularity, seed=args.seed)
    units = source.units()
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
        calibration = Calibration(model, args, source, seconds)
        costs = calibration.rest(usual, collator, calibration.ranking(split, protocol))
        bar.update()
        if processor is not None:
            rows = np.random.default_rng(args.seed).permutation(collator(usual)["items"].item_rows.numpy())
            rows = np.sort(calibration.affordable(rows, share=0.12))
            prepare_seconds, towers = calibration.towers(rows)
            costs = replace(costs, prepare_seconds=prepare_seconds, towers=towers)
        bar.update()
        pooled = [name for name in depths if name in units and model.item_encoder.is_stored_pooled(name)]
        if depths and all(depths.values()) and (store := calibration.store(folder, rows)) is not None:
            stored, store_bytes = calibration.fill(store, rows, units, pooled)
            again = np.resize(np.arange(len(rows)), int(step.items))
            prepare_seconds, towers = calibration.towers(calibration.affordable(again, 0.05, stored), stored)
            stored_costs = replace(costs, prepare_seconds=prepare_seconds, towers=towers)
        calibration.update()  # so that gradients and optimizer states exist, as between two steps
        base_bytes, free_bytes = memory_of(args.device)
        bar.update()

    costs = replace(costs, base_bytes=base_bytes)
    without_store = make_forecast(args, num_steps(), step, everything, costs)
    used, used_pooled, filling, store_pays = costs, list[str](), 0.0, False
    if stored_costs is not None:
        filling = encoding_bytes(everything, costs, args.per_device_eval_batch_size)
        stored_costs = replace(stored_costs, base_bytes=base_bytes)
        counts = step.stored(pooled), everything.stored(pooled)
        with_store = make_forecast(args, num_steps(), *counts, stored_costs, filling)
        # the time that later evaluations save; clip at zero, since a coarse clock can measure the store as slower
        fill_seconds = max(0.0, without_store.evaluation_seconds - with_store.evaluation_seconds)
        saved = epoch_seconds(without_store, args) - epoch_seconds(with_store, args)
        store_pays = saved * args.num_train_epochs > fill_seconds
        if args.activation_store is not None or store_pays:
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
        uses_store=args.activation_store is not None and stored_costs is not None,
        store_pays=store_pays,
        fill_seconds=fill_seconds,
        store_gb=store_bytes / 2**30,
        available_gb=(base_bytes + free_bytes) / 2**30,
        calibration_seconds=time.perf_counter() - started,
        advice=[],
    )
    advice = [advise_store(plan, args), advise_batch(plan), advise_chunk(plan, args), advise_workers(plan, args)]
    return replace(plan, advice=advice if depths else advice[-1:])


def epoch_seconds(way: Forecast, args: TransRecTrainingArguments) -> float:
    """Seconds of an epoch with the evaluation after it, if there is one."""
    return way.epoch_seconds + (args.eval_strategy == "epoch") * way.evaluation_seconds


def advise_store(plan: Plan, args: TransRecTrainingArguments) -> str:
    """Whether the states of the frozen blocks are worth storing."""
    if plan.with_store is None:
        return (
            "activation_store: no, a tower is trained whole, or cannot continue from stored states; those of a tower "
            "that is frozen as a whole (trainable_blocks=0) can be stored."
        )
    without, stored = (epoch_seconds(way, args) for way in (plan.without_store, plan.with_store))
    facts = f"an epoch takes {stored:.0f} s instead of {without:.0f} s"
    facts += f", and filling it {plan.fill_seconds:.0f} s and {plan.store_gb:.2f} GB"
    if not plan.store_pays:
        return f"activation_store: no, {facts}, which {args.num_train_epochs:g} epochs do not pay back."
    return f"activation_store: yes, {facts}, which pays after {plan.fill_seconds / (without - stored):.1f} epochs."


def advise_batch(plan: Plan) -> str:
    """Whether a larger batch, which has more repeated items, is worth it."""
    best, now = 1, plan.advised
    for factor, way in plan.larger_batches.items():
        if way.epoch_seconds > WORTH * now.epoch_seconds or way.memory_gb > ROOM * plan.available_gb:
            break
        best, now = factor, way
    share = f"{plan.step.distinct_share:.0%} of a step's items are distinct"
    with_store = " with the store" if plan.store_pays else ""
    if best == 1:
        return f"batch: keep it; {share}, and a larger one would save little time or need too much memory."
    return (
        f"batch: {best} times as many users, if the metrics do not suffer: {now.epoch_seconds:.0f} s an epoch"
        f"{with_store} and {now.memory_gb:.1f} GB; {share}, then {plan.larger_steps[best].distinct_share:.0%}."
    )


def advise_chunk(plan: Plan, args: TransRecTrainingArguments) -> str:
    """Whether memory makes it necessary to encode fewer items at a time."""
    now, room = plan.advised, ROOM * plan.available_gb
    memory = f"the run takes {now.memory_gb:.1f} of {plan.available_gb:.1f} GB"
    if now.memory_gb < room:
        return f"item_chunk_size: {args.item_chunk_size or 'none'}, {memory}."
    fitting = [chunk for chunk, size in now.chunk_memory_gb.items() if size < room]
    if not fitting:
        return f"item_chunk_size: no value is small enough, as {memory}; lower per_device_train_batch_size."
    return f"item_chunk_size: {fitting[-1]}, as {memory}; with it {now.chunk_memory_gb[fitting[-1]]:.1f} GB."


def advise_workers(plan: Plan, args: TransRecTrainingArguments) -> str:
    """Whether batches should be prepared by other processes."""
    now, cores = plan.advised, os.cpu_count() or 1
    if args.dataloader_num_workers:
        return f"dataloader_num_workers: keep {args.dataloader_num_workers}."
    compute = now.step_seconds - now.prepare_seconds
    best = {n: side_by_side(now.prepare_seconds, compute, n, args.device) for n in range(1, cores + 1)}
    fewest = next(n for n, seconds in best.items() if seconds <= 1.01 * min(best.values()))
    share = f"preparing batches takes {now.prepare_seconds / now.step_seconds:.0%} of the time"
    if best[fewest] > WORTH * now.step_seconds:
        return f"dataloader_num_workers: 0, {share}."
    return f"dataloader_num_workers: {fewest}, {share}; a step would take {best[fewest]:.2g} s."
