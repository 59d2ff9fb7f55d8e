"""A training run from options to files: what pre-training and fine-tuning have in common."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Split
from ..errors import DataError, bad_input
from ..items.encoding import content_vectors
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.checkpoint import check_fits, written_whole
from ..publishing.results import append_results, describe_device
from ..training.arguments import TransRecTrainingArguments
from ..training.planning import Plan, plan_run
from ..training.trainer import TransRecTrainer, last_complete_checkpoint
from .options import DataArguments, ModelArguments, SplitArguments, option
from .reporting import format_report, plot_learning_curve


logger = logging.get_logger(__name__)


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


@dataclass
class RunArguments(TransRecTrainingArguments):
    """[`TransRecTrainingArguments`] of a script."""

    resume: bool = option(False, "Go on from the newest complete checkpoint in output_dir, if there is one.")
    results_csv: str | None = option(None, "Table of results to add the test metrics to, under run_name.")


def check_output_dir(output_dir: str | os.PathLike, resumes: bool = False) -> None:
    """Refuse an output folder that cannot be made or holds another run. Raises [`DataError`]."""
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise DataError(f"{output_dir}: {existing} is a file. Choose another output folder.")
    if not os.access(existing, os.W_OK):
        raise DataError(f"{output_dir}: no permission to write in {existing}. Choose another output folder.")
    if not resumes and any(folder.glob("checkpoint-*")):
        raise DataError(
            f"{output_dir}: holds the checkpoints of another run. Add --resume to go on with it, or choose another "
            "--output_dir, or delete it."
        )


def prepare_run(
    model_args: ModelArguments, data_args: DataArguments, split_args: SplitArguments, seed: int
) -> tuple[Catalogue, Split, TransRecModel, TransRecProcessor | None]:
    """
    Read everything that a run needs and check it, images included, before anything is written.

    Raises:
        [`DataError`]: for whatever is wrong with data, model or options.
    """
    catalogue, sequences = data_args.load()
    set_seed(seed)
    model, processor = model_args.load(catalogue, data_args.is_demo)
    check_fits(model, catalogue)
    with bad_input("bad options"):
        split = split_args.apply(sequences, model.config.max_position_embeddings)
    if "image" in model.config.modalities and os.environ.get("RANK", "0") == "0":
        catalogue.check_images()
    return catalogue, split, model, processor


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    split_args: SplitArguments,
    args: RunArguments,
) -> dict[str, Any]:
    """
    Train a model, save it and report on it.

    `args.output_dir` gets the model with its processor and `data_statistics.json`, and then `report.json`,
    `trainer_state.json` and `learning_curve.png`.

    Returns:
        `dict`: the report on the test targets, see [`RankingEvaluator.evaluate`].

    Raises:
        [`DataError`]: for bad input, before anything is written.
        `OSError`: if something cannot be written.
    """
    check_output_dir(args.output_dir, resumes=args.resume or args.resume_from_checkpoint is not None)
    with args.main_process_first(desc="reading the data"):  # the others find it in the cache
        catalogue, split, model, processor = prepare_run(model_args, data_args, split_args, args.seed)
    with bad_input("bad options"):
        trainer = TransRecTrainer(
            model, args, catalogue=catalogue, split=split, processing_class=processor, protocol=split_args.protocol
        )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("Training %s of %s parameters", f"{trainable:,}", f"{model.num_parameters():,}")

    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and args.resume:
        checkpoint = last_complete_checkpoint(args.output_dir)
        logger.info("Resuming from %s", checkpoint or "nothing: there is no complete checkpoint yet")
    trainer.train(resume_from_checkpoint=checkpoint)
    with written_whole(args.output_dir, writes=args.should_save) as folder:
        trainer.save_model(str(folder))

    vectors = None
    if model_args.text_model or model_args.vision_model:
        vectors = content_vectors(
            model_args.text_model,
            model_args.vision_model,
            catalogue,
            device=args.device,
            batch_size=args.per_device_eval_batch_size,
            accelerator=trainer.accelerator,
        )
    report = trainer.report(content_vectors=vectors)
    if args.should_save:
        with written_whole(args.output_dir) as folder:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            write_json(report, folder / "report.json")
            metric = (args.metric_for_best_model or "ndcg@10").removeprefix("eval_")
            plot_learning_curve(trainer.state.log_history, folder / "learning_curve.png", metric)
            if args.results_csv:
                record_results(args.results_csv, args, data_args, split_args, report, trainer)
        print(f"\nTest targets of {data_args.name}\n\n{format_report(report)}\n")
        logger.info("The model and its report are in %s", args.output_dir)
    return report


def record_results(
    path: str,
    args: RunArguments,
    data_args: DataArguments,
    split_args: SplitArguments,
    report: dict[str, Any],
    trainer: TransRecTrainer,
) -> None:
    """Add the test metrics of the model and its baselines to the table at `path`, with all it takes to repeat them."""
    device = describe_device(args.device)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    append_results(
        path,
        {"model": report, **report.get("baselines", {})},
        run=args.run_name or Path(args.output_dir).name,
        command=shlex.join(["python", *sys.argv]),
        seed=args.seed,
        data=data_args.name,
        machine=device["device"],
        protocol=split_args.protocol,
        split="test",
        seconds=round(trainer.train_seconds),
        peak_memory_gb=device["peak_memory_gb"],
        date=datetime.date.today().isoformat(),
        commit=git.stdout.strip(),
    )


def write_json(values: Any, path: Path) -> None:
    """Indented JSON, in UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
