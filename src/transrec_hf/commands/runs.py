"""Training runs from options to files: `transrec pretrain`, `transrec finetune` and `transrec plan`."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Split
from ..errors import DataError, HubError, bad_input
from ..files import write_json, written_whole
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.towers_transrec import is_frozen
from ..publishing.checkpoint import check_fits
from ..publishing.results import append_results, describe_device
from ..training.adapters import merge_adapter
from ..training.arguments import TransRecTrainingArguments
from ..training.balance import ModalityBalanceCallback
from ..training.ckd import BalancedTrainer
from ..training.mixing import MixedTrainer
from ..training.planning import Plan, plan_run
from ..training.resuming import last_complete_checkpoint
from ..training.similarity import SIMILARITIES
from ..training.stages import UserEncoderFirst
from ..training.trainer import TransRecTrainer
from ..training.transfer import INITS, Start, check_init, choose_start, start_from
from ..training.tuning import PEFT_TUNINGS
from .options import CONFIG_FIELDS, DataArguments, ModelArguments, SplitArguments, content_baseline, option
from .parsing import parse_arguments
from .reporting import format_cosines, format_plan, format_report, plot_balance, plot_learning_curve


logger = logging.get_logger(__name__)

START_NAME = "start.json"


@dataclass
class RunArguments(TransRecTrainingArguments):
    """[`TransRecTrainingArguments`] of a command."""

    _argument_group_name = "training"
    resume: bool = option(False, "Continue from the newest complete checkpoint in output_dir, if there is one.")
    results_csv: str | None = option(None, "CSV file to which the test metrics are added, under run_name.")
    balance_every: int | None = option(None, "Measure each modality alone at every n-th evaluation [never].")
    balance_references: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Validation ndcg@10 of models that read one modality, as text=0.051."}
    )
    ckd_teachers: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Models of one modality, trained on the same items, to learn from; write text=FOLDER for a "
            "model of several."
        },
    )
    ckd_weight: float = option(0.1, "Weight of the loss of ckd_teachers, beside the objective.")
    ckd_temperature: float = option(1.0, "Temperature of the margins of the teachers' scores.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("balance_every", "ckd_weight", "ckd_temperature"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.balance_references and self.balance_every is None:
            raise ValueError("balance_references need balance_every: set it, for example to 1")
        pairs = [reference.partition("=") for reference in self.balance_references or []]
        try:
            self.references = {name: float(value) for name, _, value in pairs}
        except ValueError:
            self.references = {"": math.nan}
        if len(self.references) < len(pairs) or not all(0 <= value <= 1 for value in self.references.values()):
            raise ValueError(
                "balance_references must be MODALITY=NUMBER, as text=0.051, each modality once and each number from "
                f"0 to 1, not {self.balance_references}"
            )


@dataclass
class PretrainArguments(RunArguments):
    """[`RunArguments`], and the options of training on several data sets."""

    more_data: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "More data sets, given as --data: each batch is from one of them."}
    )
    mixing_temperature: float = option(
        0.5, "A data set is drawn by its number of batches to this power: 1 draws all batches alike, 0 all data sets."
    )

    mixing_similarity: str | None = option(
        None,
        "Weigh the steps on other data sets by how well their gradients agree with mixing_target.",
        choices=SIMILARITIES,
    )
    mixing_target: str | None = option(None, "The one of data and more_data that is the target of mixing_similarity.")
    user_encoder_epochs: float = option(
        0, "First epochs in which only the user encoder is trained, on item vectors as they are."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.user_encoder_epochs < 0:
            raise ValueError(f"user_encoder_epochs must be 0 or more, got {self.user_encoder_epochs}")
        if (self.mixing_similarity or self.mixing_target) and not self.more_data:
            raise ValueError("mixing_similarity and mixing_target compare several data sets: give more_data")
        if not 0 <= self.mixing_temperature <= 1:
            raise ValueError(f"mixing_temperature must be between 0 and 1, got {self.mixing_temperature}")


@dataclass
class FinetuneArguments(RunArguments):
    """[`RunArguments`], and which part of the checkpoint is kept."""

    init: str = option(
        "auto",
        "Which part of the checkpoint the run starts from: auto tries several, and validation chooses.",
        choices=("auto", *INITS),
    )  # adapters of PEFT are saved without the checkpoint, so they need it unchanged
    init_epochs: float = option(
        1,
        "Epochs of the short run from each start that auto tries, at most those of the run; 0 compares the starts "
        "without training.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_epochs < 0:
            raise ValueError(f"init_epochs must be at least 0, got {self.init_epochs}")
        if self.tuning in PEFT_TUNINGS and self.init not in ("auto", "all"):
            raise ValueError(
                f"tuning={self.tuning!r} puts an adapter on the unchanged checkpoint, and init={self.init!r} changes "
                "it: leave out init, or use tuning='bottleneck'"
            )
        if self.tuning in PEFT_TUNINGS:
            self.init = "all"


@dataclass
class PlanArguments(RunArguments):
    """[`RunArguments`], and how the plan is printed."""

    json: bool = option(False, "Print JSON.")


OFTEN = (
    *("output_dir", "run_name", "seed", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "bf16", "use_cpu", "dataloader_num_workers", "logging_steps"),
    *("report_to", "push_to_hub", "hub_model_id"),
)
"""Options of `TrainingArguments` that `--help` lists among ours."""
LATER = {
    "settings of the model, the fields of TransRecConfig": CONFIG_FIELDS,
    "all other options of transformers.TrainingArguments": {
        field.name for field in dataclasses.fields(TrainingArguments) if field.name not in OFTEN
    },
}


def pretrain(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Train a new model on the items and interactions of one platform.

        transrec pretrain demo:source                                # the built-in demo world, tiny towers
        transrec pretrain run.yaml --seed 1                          # options from a file, one of them changed
        transrec pretrain my_source --text_model sentence-transformers/all-MiniLM-L6-v2 \\
            --vision_model google/mobilenet_v2_1.0_224 --trainable_blocks 2 --output_dir runs/my_source

        transrec pretrain films --more_data games yelp --text_model sentence-transformers/all-MiniLM-L6-v2
        transrec pretrain films --more_data games beauty --mixing_similarity grad_cosine --mixing_target beauty ...

    The folder output_dir then holds the model with its processor, data statistics and model card, report.json with the
    metrics on the test targets, and learning_curve.png; with --balance_every also modality_balance.png.
    """
    return run_training(*_parse(PretrainArguments, argv, pretrain, output_dir="runs/pretrain"))


def finetune(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Go on training a model on the items and interactions of another platform.

        transrec finetune runs/my_source --data my_target --output_dir runs/my_target
        transrec finetune runs/my_source --data my_target --user_fraction 0.1
        transrec finetune runs/my_source --data my_target --num_train_epochs 0     # zero-shot, as far as it helps
        transrec finetune run.yaml --seed 1                          # options from a file, one of them changed
        transrec finetune runs/my_source --data my_target --balance_every 1 --ckd_teachers runs/text runs/image

    The checkpoint cannot do harm: short runs start from the whole checkpoint, from parts of it, from nothing but its
    towers, and from the towers as they were before its training, if that changed them. The run that is best on
    validation goes on. The report tells which one, and how much it gained.
    Give --init to choose the start yourself. --hybrid adds a vector for the id of each item of the target; it starts
    from the content of the item's neighbours in histories.

    All other options and the files in output_dir are those of `transrec pretrain`.
    """
    options = _parse(FinetuneArguments, argv, finetune, positional="from_checkpoint", output_dir="runs/finetune")
    if not options[0].from_checkpoint:
        raise DataError(
            "there is no model to fine-tune: give the folder or Hub id of a TransRec model as the first argument"
        )
    return run_training(*options)


def plan(argv: Sequence[str] | None = None) -> Plan:
    """
    Predict the time, memory and disk space of a training run on this machine, and advise on its options.

        transrec plan my_source --text_model sentence-transformers/all-MiniLM-L6-v2 --trainable_blocks 2
        transrec plan run.yaml --json

    It takes the options of `transrec pretrain`, draws batches of the data, and measures parts of a training step for
    about ten seconds. Then it prints the number of encoded items, the operations, the memory, the time, and the gain
    of the activation store. Nothing is written.
    """
    model_args, data_args, split_args, args = _parse(PlanArguments, argv, plan, output_dir="runs/plan")
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > cores:
        logger.warning(
            "This machine is busy (load %.1f on %d cores): all predicted times will be too long.", load, cores
        )
    result = plan_options(model_args, data_args, split_args, args)
    print(json.dumps(dataclasses.asdict(result), indent=2) if args.json else format_plan(result))
    return result


def _parse(
    kind: type[RunArguments], argv: Sequence[str] | None, verb: Any, positional: str = "data", **defaults: Any
) -> tuple[Any, ...]:
    kinds = (ModelArguments, DataArguments, SplitArguments, kind)
    return parse_arguments(kinds, argv, verb, positional=positional, later=LATER, logging_steps=20, **defaults)


def plan_options(
    model_args: ModelArguments, data_args: DataArguments, split_args: SplitArguments, args: TransRecTrainingArguments
) -> Plan:
    """Call [`plan_run`] with the options of a command. Raises [`DataError`] if an option is wrong."""
    catalogue, sequences = data_args.load()
    set_seed(args.seed)
    model, processor = model_args.load(catalogue, data_args.is_demo)
    check_fits(model, catalogue)
    with bad_input("bad options"):
        split = split_args.apply(sequences, model.config.max_position_embeddings)
        return plan_run(
            model, args, catalogue=catalogue, split=split, processing_class=processor, protocol=split_args.protocol
        )


def check_output_dir(output_dir: str | os.PathLike, resumes: bool = False) -> None:
    """Raise [`DataError`] if an output folder cannot be made or holds another run."""
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise DataError(f"{output_dir}: {existing} is a file. Choose another output folder.")
    if not os.access(existing, os.W_OK):
        raise DataError(f"{output_dir}: no permission to write in {existing}. Choose another output folder.")
    if not resumes and any(folder.glob("checkpoint-*")):
        raise DataError(
            f"{output_dir}: holds the checkpoints of another run. Add --resume to continue it, choose another "
            "--output_dir, or delete it."
        )


def prepare_run(
    model_args: ModelArguments, data_args: DataArguments, split_args: SplitArguments, seed: int
) -> tuple[Catalogue, Split, TransRecModel, TransRecProcessor | None]:
    """
    Read and check everything that a run needs, images included, before anything is written.

    Raises:
        [`DataError`]: If anything is wrong with data, model or options.
    """
    catalogue, sequences = data_args.load()
    set_seed(seed)
    model, processor = model_args.load(catalogue, data_args.is_demo)
    check_fits(model, catalogue)
    with bad_input("bad options"):
        split = split_args.apply(sequences, model.config.max_position_embeddings)
    if os.environ.get("RANK", "0") == "0":
        catalogue.check_contents(model.config.modalities)
    return catalogue, split, model, processor


def find_start(trainer: TransRecTrainer, args: FinetuneArguments) -> Start:
    """
    Set the model of a run to the start that its options ask for. A resumed run has already chosen its start, which is
    read from its folder.
    """
    file = Path(args.output_dir) / START_NAME
    is_resumed = file.exists() and (args.resume or args.resume_from_checkpoint)
    users = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # of a step
    longest = args.max_steps * users / len(trainer.windows) if args.max_steps > 0 else args.num_train_epochs
    epochs = min(args.init_epochs, longest)

    def short_run(folder: str, init: str) -> TransRecTrainer:
        short = copy.copy(args)
        short.output_dir, short.num_train_epochs, short.max_steps = folder, epochs, -1
        short.eval_strategy, short.save_strategy = IntervalStrategy.EPOCH, SaveStrategy.NO
        short.eval_on_start, short.load_best_model_at_end, short.early_stopping_patience = True, False, None
        short.report_to, short.push_to_hub = [], False
        tried = TransRecTrainer(
            trainer.model,
            short,
            catalogue=trainer.catalogue,
            split=trainer.split,
            processing_class=trainer.processing_class,
            protocol=trainer.protocol,
        )
        if init != "scratch":  # which has other towers
            tried.store, tried.source = trainer.store, trainer.source  # neither read nor encoded again
        return tried

    if is_resumed:
        start = Start(**json.loads(file.read_text(encoding="utf-8")))
        if start.init == "scratch":  # its towers are not those of the checkpoint
            start_from(trainer.model, start.init, args.seed)
    elif args.init == "auto":
        start = choose_start(trainer.model, short_run, seed=args.seed)
        set_seed(args.seed)
    else:
        start = start_from(trainer.model, args.init, args.seed)
    if start.init == "scratch":
        trainer.store, trainer.source = None, trainer.items  # which other towers have read
    if not is_resumed:
        logger.info("Starting from %s", start)
        if args.should_save:
            write_json(file, dataclasses.asdict(start))
    return start


def prepare_domain(
    name: str, data_args: DataArguments, split_args: SplitArguments, model: TransRecModel
) -> tuple[Catalogue, Split]:
    """Read and check one more data set of a run. Raises [`DataError`]."""
    catalogue, sequences = dataclasses.replace(data_args, data=name, items=None, interactions=None).load()
    check_fits(model, catalogue)
    try:
        with bad_input("bad options"):
            split = split_args.apply(sequences, model.config.max_position_embeddings)
    except DataError as error:  # say which of several data sets it is
        raise DataError(f"{name}: {error}") from error
    catalogue.check_contents(model.config.modalities)
    return catalogue, split


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
        `dict`: The report on the test targets, see [`RankingEvaluator.evaluate`].

    Raises:
        [`DataError`]: For bad input, before anything is written.
        `OSError`: If something cannot be written.
    """
    check_output_dir(args.output_dir, resumes=args.resume or args.resume_from_checkpoint is not None)
    with args.main_process_first(desc="reading the data"):  # the others find it in the cache
        catalogue, split, model, processor = prepare_run(model_args, data_args, split_args, args.seed)
        if isinstance(args, FinetuneArguments) and args.init != "all":
            merge_adapter(model)  # other starts change what is under the adapter
        domains = {data_args.name: (catalogue, split)}
        for name in (args.more_data or []) if isinstance(args, PretrainArguments) else []:
            if name in domains:
                raise DataError(f"{name} is given twice: remove it from more_data")
            domains[name] = prepare_domain(name, data_args, split_args, model)
    try:
        with bad_input("bad options"):
            if isinstance(args, FinetuneArguments) and args.init != "auto":
                check_init(model, args.init)
                if args.init == "scratch":
                    model.original_towers()
            options: dict[str, Any] = {"processing_class": processor, "protocol": split_args.protocol}
            if args.ckd_teachers and len(domains) > 1:
                raise ValueError("ckd_teachers need a single data set: leave out more_data")
            if isinstance(args, PretrainArguments) and len(domains) > 1:
                options |= {"domains": domains, "temperature": args.mixing_temperature}
                options |= {"similarity": args.mixing_similarity, "target": args.mixing_target}
                trainer: TransRecTrainer = MixedTrainer(model, args, **options)
            elif args.ckd_teachers:
                options |= {"teachers": args.ckd_teachers, "distillation": args.ckd_weight}
                options |= {"temperature": args.ckd_temperature}
                trainer = BalancedTrainer(model, args, catalogue=catalogue, split=split, **options)
            else:
                trainer = TransRecTrainer(model, args, catalogue=catalogue, split=split, **options)
            if isinstance(args, PretrainArguments) and args.user_encoder_epochs:
                trainer.add_callback(UserEncoderFirst(args.user_encoder_epochs))
            balance = None
            if args.balance_every is not None:
                balance = ModalityBalanceCallback(trainer, args.balance_every, args.references)
                trainer.add_callback(balance)
            trainer.fill_store()
    except (DataError, HubError):
        with suppress(OSError):
            Path(args.output_dir).rmdir()  # which `Trainer` has made, if it is empty
        raise
    towers = model.item_encoder.towers
    if args.activation_store is None and towers and all(is_frozen(tower) for tower in towers.values()):
        logger.info(
            "All towers are frozen: with --activation_store FOLDER they read each item once, not in each epoch"
        )
    start = find_start(trainer, args) if isinstance(args, FinetuneArguments) else None
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("Training %s of %s parameters", f"{trainable:,}", f"{model.num_parameters():,}")

    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and args.resume:
        checkpoint = last_complete_checkpoint(args.output_dir)
        logger.info("Resuming from %s", checkpoint or "nothing: there is no complete checkpoint yet")
    trainer.train(resume_from_checkpoint=checkpoint)
    if balance is not None:
        balance.measure()
    trainer.save_model()

    vectors = content_baseline(trainer, model_args.towers) if len(domains) == 1 else None
    report, data = trainer.report(content_vectors=vectors), " and ".join(domains)
    if start is not None:
        report["start"] = dataclasses.asdict(start)
    trainer.create_model_card()
    if args.should_save:
        with written_whole(args.output_dir) as folder:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            metric = args.best_metric.removeprefix("eval_")
            plot_learning_curve(trainer.state.log_history, folder / "learning_curve.png", metric)
            if balance is not None:
                plot_balance(trainer.state.log_history, folder / "modality_balance.png")
            if args.results_csv:
                record_results(args.results_csv, args, data, split_args, report, trainer)
        print(f"\nTest targets of {data}\n\n{format_report(report)}\n")
        if "gradient_cosines" in report:
            print(f"Cosines of gradients\n\n{format_cosines(report['gradient_cosines'])}\n")
        if start is not None:
            print(f"Started from {start}\n")
        logger.info("The model and its report are in %s", args.output_dir)
    return report


def record_results(
    path: str,
    args: RunArguments,
    data: str,
    split_args: SplitArguments,
    report: dict[str, Any],
    trainer: TransRecTrainer,
) -> None:
    """
    Add the test metrics of the model and its baselines to the table at `path`, with what is needed to repeat them.
    """
    device = describe_device(args.device)
    commit = ""
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    append_results(
        path,
        {"model": report, **report.get("baselines", {})},
        run=args.run_name or Path(args.output_dir).name,
        command=command_line(),
        seed=args.seed,
        data=data,
        machine=device["device"],
        protocol=split_args.protocol,
        split="test",
        seconds=round(trainer.train_seconds),
        peak_memory_gb=device["peak_memory_gb"],
        date=datetime.date.today().isoformat(),
        commit=commit,
    )


def command_line() -> str:
    """How this process was started, as one would type it."""
    program, *arguments = sys.argv
    is_ours = Path(program).stem in ("transrec", "transrec_cli")
    return shlex.join([*(["transrec"] if is_ours else ["python", program]), *arguments])
