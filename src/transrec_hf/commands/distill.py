"""`transrec distill`: a smaller model that learns the item vectors of a larger one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging

from ..data.interactions import leave_one_out
from ..errors import DataError, bad_input
from ..files import write_json, written_whole
from ..items.meeting import standardize_for
from ..items.preparing import ItemSource
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.towers_transrec import load_tower
from ..publishing.checkpoint import check_place, load_checkpoint, save_checkpoint
from ..training.distilling import distill_items, distill_users, make_student
from .options import DataArguments, fit_to, option
from .parsing import parse_arguments


logger = logging.get_logger(__name__)

REPORT_NAME = "distillation.json"


@dataclass
class DistillationArguments:
    """Which teacher, what kind of student, and how it learns."""

    _argument_group_name = "distillation"
    checkpoint: str | None = option(None, "Folder or Hub id of the teacher, a TransRec model.")
    output_dir: str | None = option(None, "Folder for the student.")
    num_blocks: int | None = option(None, "Number of blocks to keep of each tower, evenly spaced.")
    text_model: str | None = option(None, "Folder or Hub id of a smaller text encoder, instead of fewer blocks.")
    vision_model: str | None = option(None, "Folder or Hub id of a smaller image encoder, instead of fewer blocks.")
    max_text_length: int | None = option(None, "Most tokens that the student reads of a text [as the teacher].")
    epochs: int = option(3, "Epochs over the items.")
    user_epochs: int = option(0, "Epochs over the interactions, in which the student learns the user states too.")
    batch_size: int = option(128, "Items in a step.")
    learning_rate: float = option(1e-3, "Peak learning rate of projections.")
    tower_learning_rate: float = option(1e-4, "Peak learning rate of towers.")
    seed: int = option(0, "Seed of the batches and of new weights.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")

    def __post_init__(self) -> None:
        for name, least in (("num_blocks", 1), ("epochs", 0), ("user_epochs", 0), ("batch_size", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        for name in ("learning_rate", "tower_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")
        if not self.output_dir:
            raise ValueError("there is no folder for the student: give output_dir")
        if not (self.num_blocks or self.text_model or self.vision_model):
            raise ValueError("the student needs smaller towers: give num_blocks, or text_model, vision_model or both")


def distill(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Make a smaller and faster model (the student) that learns the item vectors of a larger one (the teacher).

        transrec distill runs/my_target --data my_target --num_blocks 2 --output_dir runs/my_student
        transrec distill runs/my_target --items all_items.csv --text_model prajjwal1/bert-tiny --output_dir runs/tiny
        transrec distill runs/my_target --data my_target --num_blocks 2 --user_epochs 1 --output_dir runs/my_student

    The student keeps some blocks of the teacher's towers, or gets smaller towers; all other parts are copied from the
    teacher. It learns from a catalogue and needs no interactions. The output folder is a checkpoint like any other.
    """
    data_args, args = parse_arguments((DataArguments, DistillationArguments), argv, distill, positional="checkpoint")
    if not args.checkpoint:
        raise DataError("there is no teacher: give the folder or Hub id of a TransRec model as the first argument")
    if (Path(args.output_dir) / "config.json").exists():
        raise DataError(f"{args.output_dir}: already holds a model. Choose another --output_dir, or delete it.")
    teacher, processor = load_checkpoint(args.checkpoint)
    if args.user_epochs:
        catalogue, sequences = data_args.load()
    else:
        catalogue, sequences = data_args.load_items(), None
    known = fit_to(catalogue, teacher, args.checkpoint)
    catalogue.check_contents(teacher.config.modalities)
    set_seed(args.seed)
    with bad_input("student"):
        student = make_student(teacher, args.num_blocks, **load_towers(args, teacher))
    assert processor is not None  # or there would be no tower
    of_student = student_processor(args, processor)
    if torch.accelerator.is_available() and not args.use_cpu:
        device: Any = torch.accelerator.current_accelerator()
        teacher.to(device), student.to(device)
    source, own = ItemSource(catalogue, processor), ItemSource(catalogue, of_student)
    source.log_popularity = own.log_popularity = None if known is None else known.log_popularity
    standardize_for(teacher, source, args.seed)
    rates = {"learning_rate": args.learning_rate, "tower_learning_rate": args.tower_learning_rate}
    cosines = distill_items(
        student, teacher, source, own, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed, **rates
    )
    if not all(map(math.isfinite, cosines.values())):
        raise DataError("the vectors of the student are not finite. Lower learning_rate and tower_learning_rate.")
    report: dict[str, Any] = {
        "teacher": Path(args.checkpoint).name,
        "parameters": {"teacher": teacher.num_parameters(), "student": student.num_parameters()},
        "cosine_of_vectors": cosines,
    }
    if sequences is not None:
        train = leave_one_out(sequences).train
        report["cosine_of_states"] = distill_users(
            student, teacher, source, train, own, epochs=args.user_epochs, seed=args.seed
        )
    save_checkpoint(args.output_dir, student.cpu(), of_student)
    with written_whole(args.output_dir) as folder:
        write_json(folder / REPORT_NAME, report)
        if known is not None:
            known.save(folder)
    print(json.dumps(report, indent=2))
    return report


def load_towers(args: DistillationArguments, teacher: TransRecModel) -> dict[str, Any]:
    """The towers that the student has instead of its teacher's. Raises [`DataError`]."""
    towers = {}
    for name, field in (("text_model", "text_config"), ("vision_model", "vision_config")):
        if place := getattr(args, name):
            check_place(place)
            with bad_input(f"{name} {place}"):
                towers[name] = load_tower(place, field)
    return towers


def student_processor(args: DistillationArguments, of_teacher: TransRecProcessor) -> TransRecProcessor:
    """The processor of the teacher, with the parts that other towers of the student need."""
    student = copy.copy(of_teacher)
    if args.text_model or args.vision_model:
        fresh = TransRecProcessor.from_towers(args.text_model, args.vision_model)
        student.tokenizer = fresh.tokenizer or student.tokenizer
        student.image_processor = fresh.image_processor or student.image_processor
    student.max_text_length = args.max_text_length or student.max_text_length
    return student
