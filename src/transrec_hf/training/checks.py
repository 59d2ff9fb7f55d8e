"""Checks of what a trainer is given: the right classes, and a metric that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch

from ..evaluation.evaluator import LIST_LENGTH
from ..evaluation.metrics import DEFAULT_KS, ranking_metrics
from ..items.preparing import ItemSource
from .adapters import base_of
from .arguments import TransRecTrainingArguments


COVERAGE = f"coverage@{LIST_LENGTH}"
INSTEAD = {
    "compute_loss_func": "override compute_loss for another objective",
    "data_collator": "batches are made from the catalogue: override get_train_dataloader to change them",
    "eval_dataset": "give split, whose validation targets are ranked; for other sequences call evaluate(...)",
    "preprocess_logits_for_metrics": "compute_metrics gets the recommended items and the targets",
    "tokenizer": "give processing_class, the processor of the model",
    "train_dataset": "give split, whose training sequences are trained on",
}
"""Arguments of `Trainer` that do not apply here, and what to do instead."""


def check_kind(what: str, value: Any, kind: str, mend: str) -> None:
    """
    Raises `TypeError` for a value of another class, compared by name, since checkpoints may hold our classes too.
    """
    if not any(base.__name__ == kind for base in type(value).__mro__):
        raise TypeError(f"{what} must be a {kind}, not a {type(value).__name__}: {mend}")


def check_objects(
    model: Any, args: Any, catalogue: Any, split: Any, processor: Any, model_init: Any, others: dict[str, Any]
) -> None:
    """Raises `TypeError` for an argument that [`TransRecTrainer`] does not take."""
    for name in others.keys() & INSTEAD.keys():
        raise TypeError(f"TransRecTrainer takes no {name}: {INSTEAD[name]}")
    if (model is None) == (model_init is None):
        raise TypeError("give either a model, or model_init, a function that makes one")
    if model is not None:
        check_kind("model", base_of(model), "TransRecModel", "make one with TransRecModel(config) or from_pretrained")
    check_kind("args", args, "TransRecTrainingArguments", "it takes the same options, and those of this model")
    check_kind("catalogue", catalogue, "Catalogue", "make one with Catalogue(dataset), or load_domain(folder)")
    check_kind("split", split, "Split", "make one with leave_one_out(sequences)")
    if processor is not None:
        check_kind(
            "processing_class", processor, "TransRecProcessor", "make one with TransRecProcessor(tokenizer, ...)"
        )
    options: dict[str, Any] = (others.get("optimizer_cls_and_kwargs") or (None, {}))[1]
    if wrong := options.keys() & {"lr", "weight_decay", "params"}:
        raise TypeError(f"each part of the model has its own {min(wrong)}: leave it to the arguments of the run")


def check_dropout(modality_dropout: float, source: ItemSource) -> None:
    """Raises `ValueError` if there is a modality dropout, but no item with several modalities."""
    if modality_dropout and not (source.present.sum(dim=1) > 1).any():
        raise ValueError(
            f"modality_dropout={modality_dropout:g} hides one modality of items that have several, but no item has: "
            "leave it out"
        )


def check_metric(args: TransRecTrainingArguments, sets: Iterable[str] = ()) -> None:
    """
    Raises `ValueError` if evaluations will not have `metric_for_best_model`, or if it would be minimised.

    Args:
        args ([`TransRecTrainingArguments`]): The arguments.
        sets (`Iterable[str]`, *optional*): Names of the evaluation sets, if there are several.
    """
    name = args.metric_for_best_model
    if name is None:
        return
    metrics = [*ranking_metrics(torch.ones(1), DEFAULT_KS), COVERAGE]
    known = [f"{key}_{metric}" for key in sets for metric in metrics] or metrics
    if name.removeprefix("eval_") not in known:
        near = difflib.get_close_matches(name.removeprefix("eval_"), known, n=1)
        listed = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no evaluation has metric_for_best_model={name!r}: {listed}")
    if not args.greater_is_better:
        raise ValueError(f"a higher {name} is better: leave out greater_is_better=False")
