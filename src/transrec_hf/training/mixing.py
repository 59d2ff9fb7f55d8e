"""Pre-training on several data sets: each batch is from one of them, and uses its statistics."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import PredictionOutput, speed_metrics

from ..data.catalogue import Catalogue
from ..data.interactions import Sequences, Split
from ..errors import DataError
from ..model.item_encoder_transrec import WhitenedProjection
from ..model.modeling_transrec import TransRecModel
from .arguments import TransRecTrainingArguments
from .collator import TrainingWindows
from .similarity import SIMILARITIES, GradientSimilarity
from .trainer import TransRecTrainer


class MixedWindows(Dataset):
    """The training windows of several data sets, one after the other; each names its `domain`."""

    def __init__(self, parts: Sequence[TrainingWindows]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def set_epoch(self, epoch: int) -> None:
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        domain = int(np.searchsorted(self.starts, index, side="right")) - 1
        return {**self.parts[domain][index - int(self.starts[domain])], "domain": domain}


def is_same(catalogue: Catalogue, split: Split, other: Catalogue, others: Split) -> bool:
    """Whether two data sets have the same items, and the same histories to train on."""
    pairs = ((catalogue.item_ids, other.item_ids), (split.train.items, others.train.items))
    return all(np.array_equal(*pair) for pair in pairs)


class OneDomainABatch(Sampler):
    """
    An order of windows in which each batch comes from one data set. An epoch has as many batches as all data sets
    together. A data set is drawn with a probability proportional to its number of batches to the power of
    `temperature`: 1 draws all windows alike, 0 all data sets.

    Args:
        windows ([`MixedWindows`]): The windows.
        batch_size (`int`): Number of windows of a batch.
        temperature (`float`, *optional*, defaults to 0.5): See above.
        seed (`int`, *optional*, defaults to 0): Seed of the order, which also depends on the epoch.
    """

    def __init__(self, windows: MixedWindows, batch_size: int, temperature: float = 0.5, seed: int = 0):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.batches = np.array([-(-len(part) // batch_size) for part in windows.parts])
        weights = self.batches.astype(float) ** temperature
        self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return int(self.batches.sum()) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.windows.parts[0].epoch])
        waiting: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in self.windows.parts]
        for domain in rng.choice(len(self.shares), size=self.batches.sum(), p=self.shares):
            while len(waiting[domain]) < self.batch_size:
                again = self.windows.starts[domain] + rng.permutation(len(self.windows.parts[domain]))
                waiting[domain] = np.concatenate([waiting[domain], again])
            yield from waiting[domain][: self.batch_size].tolist()
            waiting[domain] = waiting[domain][self.batch_size :]


class MixedTrainer(TransRecTrainer):
    """
    A [`TransRecTrainer`] on several data sets (domains). Each batch comes from one of them; the loss uses its
    popularity, and a whitened item map its statistics. Reports pool the users of all data sets, and also give the
    metrics of each.

    Args:
        domains (`dict[str, tuple[Catalogue, Split]]`): One or more data sets by name. The saved model has the
            statistics of the first one.
        temperature (`float`, *optional*, defaults to 0.5): See [`OneDomainABatch`].
        similarity (`str`, *optional*): `"grad_cosine"` weighs the steps on sources by how well their gradients agree
            with the target's, see [`GradientSimilarity`]. Reports then hold all cosines, `gradient_cosines`.
        target (`str`, *optional*): With `similarity`, the name of the data set that is the target.
        kwargs: Further arguments of [`TransRecTrainer`].

    Raises:
        [`DataError`]: If a data set has nothing to train on, or is there twice; the message names it.
        `ValueError`: If the model has ID vectors, which belong to one catalogue, or several processes train.
    """

    def __init__(
        self,
        model: TransRecModel,
        args: TransRecTrainingArguments,
        *,
        domains: dict[str, tuple[Catalogue, Split]],
        temperature: float = 0.5,
        similarity: str | None = None,
        target: str | None = None,
        **kwargs: Any,
    ):
        check_similarity(similarity, target, domains, args)
        if model.config.num_items is not None:
            raise ValueError(
                "ID vectors belong to one catalogue: leave out hybrid or id_baseline, or train on one data set"
            )
        if args.world_size > 1 or args.item_cache_age is not None:
            raise ValueError("several data sets need a single process, and no item_cache_age: leave it out")
        own = {name: value for name, value in kwargs.items() if name in ("processing_class", "protocol")}
        make: Callable[..., TransRecTrainer] = partial(TransRecTrainer, model, **own)
        self.parts: dict[str, TransRecTrainer] = {}
        for name, (catalogue, split) in domains.items():
            for other, part in self.parts.items():
                if is_same(part.catalogue, part.split, catalogue, split):
                    raise DataError(f"{name}: holds the same items and histories as {other}. Remove one of them.")
            try:
                self.parts[name] = make(args=copy.copy(args), catalogue=catalogue, split=split)
            except ValueError as error:
                raise DataError(f"{name}: {error}") from error
        first = next(iter(self.parts.values()))
        super().__init__(model, args, catalogue=first.catalogue, split=first.split, **kwargs)
        self.temperature = temperature
        self.item_ids = np.concatenate([part.item_ids for part in self.parts.values()])
        self.train_counts = np.concatenate([part.train_counts for part in self.parts.values()])
        self.train_dataset: Any = MixedWindows([part.train_dataset for part in self.parts.values()])  # type: ignore[misc]
        self.whitening: dict[str, list[dict[str, torch.Tensor]]] = {}
        self.gradients = None if target is None else GradientSimilarity(tuple(self.parts), target)
        if self.gradients is not None:
            self.add_callback(self.gradients)

    def fill_store(self) -> None:
        for part in self.parts.values():
            part.fill_store()

    def prepare_model(self) -> None:
        """Prepare the model on one data set after the other; the statistics of each are kept."""
        self.is_prepared = True
        for name, part in self.parts.items():
            part.prepare_model()
            self.whitening[name] = [
                {statistic: getattr(module, statistic).clone() for statistic in module.statistics}
                for module in self._whitened()
            ]
        self.use(next(iter(self.parts)))

    def _whitened(self) -> list[WhitenedProjection]:
        return [module for module in self.model.modules() if isinstance(module, WhitenedProjection)]

    @torch.no_grad()
    def use(self, name: str) -> None:
        """Give the model the statistics of a data set."""
        for module, statistics in zip(self._whitened(), self.whitening[name], strict=True):
            for statistic, value in statistics.items():
                getattr(module, statistic).copy_(value)

    def get_train_dataloader(self) -> DataLoader:
        """Training batches, each from one data set."""
        collators = [part.make_collator() for part in self.parts.values()]

        def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
            domains = {feature.pop("domain") for feature in features}
            (domain,) = domains
            return {**collators[domain](features), "domain": domain}

        self.data_collator = collate
        return super(TransRecTrainer, self).get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return OneDomainABatch(self.train_dataset, self.args.train_batch_size, self.temperature, seed)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        name = list(self.parts)[inputs.pop("domain")]
        self.use(name)
        if self.gradients is not None:
            self.gradients.domain = name
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like `Trainer.log`; beside the loss, log the cosine of each source with the target."""
        if "loss" in logs and self.gradients is not None:
            cosines = {name: self.gradients.cosine(name, self.gradients.target) for name in self.gradients.averages}
            logs |= {f"cosine_{name}": cosine for name, cosine in cosines.items() if name != self.gradients.target}
        super().log(logs, *args, **kwargs)

    def _rank(self, sequences: Sequences, split: str, prefix: str, max_users: int | None = None) -> PredictionOutput:
        """The pooled metrics of all data sets, for `evaluate`; there are no lists of items from several catalogues."""
        if prefix != "eval" and not prefix.startswith("eval_"):
            raise ValueError(
                "items of several data sets cannot be in one list: predict with a trainer of one data set"
            )
        started = time.time()
        report = self.report(sequences, split, baselines=False, max_users=max_users)
        metrics = {f"{prefix}_{name}": value for name, value in report["metrics"].items()}
        metrics |= speed_metrics(prefix, started, num_samples=report["protocol"]["num_users"])
        return PredictionOutput(predictions=np.empty(0), label_ids=None, metrics=metrics)

    def report(
        self,
        sequences: Sequences | None = None,
        split: str = "test",
        baselines: bool = True,
        content_vectors: torch.Tensor | None = None,
        max_users: int | None = None,
    ) -> dict[str, Any]:
        """The report on the validation or test targets of all data sets: see [`TransRecTrainer.report`]."""
        if not self.is_prepared:
            self.prepare_model()
        reports = {}
        for name, part in self.parts.items():
            self.use(name)
            part.is_prepared = True
            targets = part.split.validation if split == "validation" else part.split.test
            reports[name] = part.report(targets, split, baselines, None, max_users)
        self.use(next(iter(self.parts)))
        self.reports[split] = pooled(reports)
        if self.gradients is not None:
            self.reports[split]["gradient_cosines"] = self.gradients.matrix()
        return self.reports[split]

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """The counts of all data sets together, and the statistics of each."""
        domains = [part.statistics for part in self.parts.values()]
        counts = {name: sum(domain[name] for domain in domains) for name in domains[0] if name.startswith("num_")}
        return {"source": ", ".join(self.parts), **counts, "domains": domains}


def check_similarity(
    similarity: str | None, target: str | None, domains: Collection[str], args: TransRecTrainingArguments
) -> None:
    """Raises `ValueError` if the similarity of the data sets cannot be measured."""
    if similarity not in (None, *SIMILARITIES):
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    if (similarity is None) != (target is None):
        raise ValueError("similarity and target need each other: give both, or leave out both")
    if target is not None and (target not in domains or len(domains) < 2):
        raise ValueError(f"the target {target!r} must be one of the data sets, which are {', '.join(domains)}")
    if similarity is not None and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"similarity {similarity!r} needs steps on one data set: leave out gradient_accumulation_steps"
        )


def pooled(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    One report on the users of several data sets. Its metrics are means over all users, its intervals those of a sum of
    independent means, and its slices are the data sets.
    """
    users = {name: report["protocol"]["num_users"] for name, report in reports.items()}
    shares = {name: count / sum(users.values()) for name, count in users.items()}
    first = next(iter(reports.values()))

    def mean(part: str) -> dict[str, float]:
        return {key: sum(shares[name] * report[part][key] for name, report in reports.items()) for key in first[part]}

    metrics = mean("metrics")

    def interval(metric: str) -> tuple[float, float]:
        squares = [0.0, 0.0]
        for name, report in reports.items():
            for end in (0, 1):
                squares[end] += (shares[name] * (report["intervals"][metric][end] - report["metrics"][metric])) ** 2
        return metrics[metric] - squares[0] ** 0.5, metrics[metric] + squares[1] ** 0.5

    result = {
        "protocol": {
            **first["protocol"],
            "num_users": sum(users.values()),
            "num_items": sum(report["protocol"]["num_items"] for report in reports.values()),
        },
        "metrics": metrics,
        "intervals": {metric: interval(metric) for metric in first["intervals"]},
        "slices": {
            "domain": {name: {"num_users": users[name], **report["metrics"]} for name, report in reports.items()}
        },
        "repeats": mean("repeats"),
        "recommendations": mean("recommendations"),
    }
    if "baselines" in first:
        result["baselines"] = {
            baseline: pooled({name: report["baselines"][baseline] for name, report in reports.items()})
            for baseline in first["baselines"]
        }
    return result
