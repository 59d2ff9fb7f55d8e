"""`transrec evaluate`: rank the held-out items of a data set with a trained model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import DataError, bad_input
from ..evaluation.metrics import paired_bootstrap
from ..files import write_json
from ..model.modalities_transrec import MODALITIES
from ..publishing.checkpoint import load_checkpoint
from ..training.adapters import merge_adapter
from ..training.arguments import TransRecTrainingArguments
from ..training.trainer import TransRecTrainer
from .options import DataArguments, SplitArguments, content_baseline, fit_to, option
from .parsing import parse_arguments
from .reporting import format_report


@dataclass
class EvaluationArguments:
    """What is evaluated, and how."""

    _argument_group_name = "evaluation"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    part: Literal["validation", "test"] = option("test", "Which part of the split is ranked.")
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "Other models: is the difference to each, on the same users, more than chance?"},
    )
    output_file: str | None = option(None, "JSON file for the whole report.")
    json: bool = option(False, "Print the report as JSON.")
    max_users: int | None = option(None, "Users to rank for, drawn at random [all].")
    seed: int = option(0, "Seed for max_users.")
    text_model: str | None = option(
        None, "Folder or Hub id of a text encoder, for a baseline that uses content alone."
    )
    vision_model: str | None = option(None, "Folder or Hub id of an image encoder, for the same baseline.")
    audio_model: str | None = option(None, "Folder or Hub id of a sound encoder, for the same baseline.")
    video_model: str | None = option(
        None, "Folder or Hub id of an encoder of images or videos, for the same baseline."
    )
    activation_store: str | None = option(
        None, "Folder in which the outputs of the towers are kept for the next call."
    )
    trainable_blocks: int = option(0, "To read the activation store of a run: its trainable_blocks.")
    bf16: bool = option(False, "Compute in bf16.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")
    batch_size: int = option(256, "Number of users that are ranked, and of items that are encoded, at a time.")
    num_workers: int = option(0, "Number of processes that read and decode items.")


def evaluate(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Rank the held-out items of a data set with a trained model, and report under a protocol.

        transrec evaluate runs/my_target --data my_target
        transrec evaluate runs/my_source --data my_target --protocol ninerec        # zero-shot
        transrec evaluate runs/my_target --data my_target --against runs/other      # which of two is better
        transrec evaluate runs/my_target --data my_target --json > report.json

    It prints the metrics of the model beside baselines that need no training, with 95 % intervals, says whether the
    model is above them, and gives its metrics for groups of targets. With text_model, vision_model, audio_model or
    video_model, the nearest items by these untrained encoders are a baseline too. With against, other models are
    ranked for the same users, and the interval of each difference is that of a paired bootstrap.
    """
    kinds = (DataArguments, SplitArguments, EvaluationArguments)
    data_args, split_args, args = parse_arguments(kinds, argv, evaluate, positional="checkpoint")
    if not args.checkpoint:
        raise DataError("there is no model: give the folder or Hub id of a TransRec model as the first argument")
    loaded = {checkpoint: load_checkpoint(checkpoint) for checkpoint in (args.checkpoint, *args.against)}
    catalogue, sequences = data_args.load()

    def ranked(checkpoint: str, baselines: bool = False) -> tuple[dict[str, Any], TransRecTrainer]:
        """The report on a model, and the trainer that ranked with it."""
        model, processor = loaded[checkpoint]
        merge_adapter(model)
        known = fit_to(catalogue, model, checkpoint)
        trainer = TransRecTrainer(
            model,
            TransRecTrainingArguments(
                scratch,
                bf16=args.bf16,
                use_cpu=args.use_cpu,
                seed=args.seed,
                activation_store=args.activation_store,
                trainable_blocks=args.trainable_blocks if processor is not None else None,
                per_device_eval_batch_size=args.batch_size,
                dataloader_num_workers=args.num_workers,
                report_to="none",
            ),
            catalogue=catalogue,
            split=split_args.apply(sequences, model.config.max_position_embeddings),
            processing_class=processor,
            protocol=split_args.protocol,
        )
        if known is not None:
            trainer.source.log_popularity = known.log_popularity
        towers = {modality.tower: getattr(args, modality.tower) for modality in MODALITIES.values() if modality.tower}
        vectors = content_baseline(trainer, towers) if baselines else None
        users = getattr(trainer.split, args.part)
        return trainer.report(users, args.part, baselines, vectors, args.max_users), trainer

    with tempfile.TemporaryDirectory() as scratch, bad_input("bad options"):
        report, trainer = ranked(args.checkpoint, baselines=True)
        for other in args.against:
            other_report, rival = ranked(other)
            if not np.array_equal(getattr(trainer.split, args.part).ends, getattr(rival.split, args.part).ends):
                raise DataError(
                    f"{other} has other targets than {args.checkpoint} under this protocol: give another one"
                )
            report.setdefault("against", {})[other] = {
                "metrics": other_report["metrics"],
                "differences": {
                    metric: paired_bootstrap(trainer.ranks, rival.ranks, metric) for metric in report["intervals"]
                },
            }
    report["model"] = {"checkpoint": args.checkpoint, "data": data_args.name, "part": args.part}
    if trainer.is_world_process_zero():
        if args.output_file:
            write_json(args.output_file, report)
        title = f"{args.checkpoint}, {args.part} targets of {data_args.name}"
        print(json.dumps(report, indent=2) if args.json else f"\n{title}\n\n{format_report(report)}\n")
    return report
