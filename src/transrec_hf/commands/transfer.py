"""`transrec transfer-report`: whether models that were trained on other platforms help on the targets."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..errors import DataError, bad_input, one_line
from ..evaluation.metrics import metric_values, paired_bootstrap
from ..evaluation.protocol import PROTOCOLS
from ..files import STATISTICS_NAME, whole_file, write_json, write_text
from ..items.meeting import ItemStatistics, set_item_vectors
from ..model.modalities_transrec import MODALITIES
from ..publishing.checkpoint import check_fits, load_checkpoint
from ..publishing.facts import read_json
from ..training.adapters import merge_adapter
from ..training.arguments import TransRecTrainingArguments
from ..training.transfer import has_trained_towers
from ..training.transfer_cells import MODELS, REFERENCES, WITH_POPULARITY, Cell, Source, Target, cells_of
from .options import DataArguments, option
from .parsing import parse_arguments
from .reporting import format_table


logger = logging.get_logger(__name__)

COLUMNS = (
    *("target", "model", "source", "fraction", "train_users", "seeds", "ndcg@10", "hit_rate@10"),
    *("compared_with", "difference", "low", "high", "verdict"),
)
OF_A_REPORT = ("sources", "targets", "models", "fractions", "seeds", "output_dir", "use_cpu", "dataloader_num_workers")
"""Options that may change between calls with the same folder: they add cells, and change none."""
LIKE_COUNTS = 0.8  # from this correlation of their log counts on, two lists of items count as the same


@dataclass
class TransferArguments:
    """What the report compares, and how the models are trained."""

    _argument_group_name = "transfer report"
    sources: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub ids of source models."})
    targets: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub ids of the target data sets."})
    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": f"Which models to compare: {', '.join(MODELS)}."}
    )
    fractions: list[str] = field(
        default_factory=lambda: ["0.01", "0.05", "0.1", "0.25", "0.5", "1"],
        metadata={"help": "Shares of the target's training users, separated by commas or spaces."},
    )
    seeds: list[str] = field(
        default_factory=lambda: ["0", "1", "2"], metadata={"help": "Seeds, separated by commas or spaces."}
    )
    output_dir: str = option("runs/transfer_report", "Folder for the results, the table, the JSON file and the plots.")
    modality: str | None = option(
        None,
        "Keep only the targets' items that have this modality, and only this content of them.",
        choices=tuple(MODALITIES),
    )
    protocol: str = option("full", "Evaluation protocol.", choices=tuple(PROTOCOLS))
    epochs: float = option(10, "Most epochs of a training run; the best one on validation is kept.")
    patience: int = option(3, "Number of evaluations without a gain after which a run stops.")
    init_epochs: float = option(1, "Epochs of the short run from each start; 0 for no such runs.")
    batch_size: int = option(128, "Users per step; at least 16, and fewer than this if there are few users.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    trainable_blocks: int = option(0, "Blocks trained at the top of each tower; 0 freezes them.")
    max_eval_users: int | None = option(None, "Number of users drawn to validate an epoch [all].")
    bf16: bool = option(False, "Compute in bf16.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")
    dataloader_num_workers: int = option(0, "Number of processes that read and decode items.")

    def __post_init__(self) -> None:
        self.shares = [_number(part, float, "fractions") for part in _parts(self.fractions)]
        self.draws = [_number(part, int, "seeds") for part in _parts(self.seeds)]
        for name in ("sources", "targets", "fractions", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"there are no {name}: give --{name} with one or more")
        wrong = [share for share in self.shares if not 0 < share <= 1]
        if wrong:
            raise ValueError(f"fractions must be above 0 and at most 1, got {wrong[0]:g}")
        if self.epochs <= 0 or self.init_epochs < 0:
            raise ValueError("epochs must be above 0, and init_epochs at least 0")
        unknown = [model for model in self.models if model not in MODELS]
        if unknown:
            raise ValueError(f"models: there is no model {unknown[0]!r}; choose from {', '.join(MODELS)}")

    def training(self) -> TransRecTrainingArguments:
        """The arguments of the training runs."""
        return TransRecTrainingArguments(
            str(Path(self.output_dir, "run")),
            num_train_epochs=self.epochs,
            early_stopping_patience=self.patience,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            trainable_blocks=self.trainable_blocks,
            activation_store=str(Path(self.output_dir, "store")),
            max_eval_users=self.max_eval_users,
            bf16=self.bf16,
            use_cpu=self.use_cpu,
            dataloader_num_workers=self.dataloader_num_workers,
            save_total_limit=1,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
        )


def _parts(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in str(value).split(",") if part]


def _number(value: str, kind: type, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name}: {value!r} is not a number") from None


def transfer_report(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Tell whether models of other platforms help on yours.

        transrec transfer-report --sources runs/films runs/products --targets my_shop
        transrec transfer-report --sources runs/films --targets my_shop --fractions 0.01,0.1,1 --seeds 0,1,2
        transrec transfer-report examples/transfer/mixed_to_text.yaml

    For each source, each target and each share of its training users, the report compares popularity, co-occurrence,
    neighbours by content, an ID baseline tuned on validation, and the model: untrained, zero-shot, trained from
    scratch, fine-tuned, and the last two again with ID vectors. Validation chooses how much of a source is kept, also
    for zero-shot. All models are tested on the same users. The verdict is helps or negative where the 95 % interval of
    the difference, over users and seeds, does not contain zero.

    The folder output_dir holds one file for each model, target, share and seed with the ranks of all users. Results
    that are there are not computed again.
    """
    (args,) = parse_arguments((TransferArguments,), argv, transfer_report)
    report = report_on(args)
    print(f"\n{format_rows(report['rows'])}\n")
    logger.info("The report is in %s", args.output_dir)
    return report


def report_on(args: TransferArguments) -> dict[str, Any]:
    """Compute the missing cells, and write the report; see [`transfer_report`]."""
    folder = Path(args.output_dir)
    check_settings(folder, args)
    sources = {name: load_source(name) for name in dict.fromkeys(args.sources)}
    models = list(args.models)
    if not all(source.model.config.popularity_prior for source in sources.values()):
        models = [model for model in models if not model.endswith(WITH_POPULARITY)]
    hybrids = [model for model in models if model.endswith("hybrid")]
    if hybrids and not all(source.model.config.objective == "in_batch" for source in sources.values()):
        logger.warning("The models with ID vectors are left out: they need sources with the objective 'in_batch'")
        models = [model for model in models if model not in hybrids]
    loaded, first = {}, next(iter(sources.values()))
    for name in dict.fromkeys(args.targets):
        catalogue, sequences = DataArguments(data=name, modality=args.modality).load()
        counts = sequences.item_counts(len(catalogue))
        for source in sources.values():
            check_fits(source.model, catalogue)
            check_no_source(source.name, name, catalogue, counts)
        try:
            with bad_input("cannot be split"):
                split = PROTOCOLS[args.protocol].split(sequences, first.model.config.max_position_embeddings)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        loaded[name] = catalogue, split
    cells = cells_of(list(loaded), list(sources), models, args.shares, args.draws)
    write_json(folder / "settings.json", settings_of(args))

    results: dict[Cell, tuple[torch.Tensor, dict[str, Any]]] = {}
    with logging.tqdm(total=len(cells), desc="Cells", unit="cell") as progress:
        for name, (catalogue, split) in loaded.items():
            target = Target(catalogue, split, args.training(), args.protocol, args.init_epochs)
            for cell in (cell for cell in cells if cell.target == name):
                file = folder / "cells" / f"{file_name(cell)}.safetensors"
                if not file.exists():
                    ranks, facts = target.run(cell, sources[cell.source] if cell.source else first)
                    write_cell(file, cell, ranks, facts)
                results[cell] = read_cell(file, len(split.test))
                progress.update()
    rows = compare(results, list(loaded), list(sources), models, args.shares, args.draws)
    report = {"settings": settings_of(args), "rows": rows, "cells": [_described(*item) for item in results.items()]}
    write_json(folder / "report.json", report)
    write_text(folder / "report.csv", as_csv(rows))
    plot_curves(rows, folder)
    return report


def load_source(checkpoint: str) -> Source:
    """
    A source as another platform sees it: the ID vectors of a hybrid stay behind, and an adapter is a part of the
    weights. Raises [`DataError`].
    """
    model, processor = load_checkpoint(checkpoint)
    merge_adapter(model)
    if model.config.modalities:
        set_item_vectors(model, None)
    return Source(checkpoint, model, processor, "scratch" if has_trained_towers(model) else "none")


def check_settings(folder: Path, args: TransferArguments) -> None:
    """Raise [`DataError`] if a folder has cells with other settings."""
    if not (folder / "settings.json").is_file():
        return
    before, now = read_json(folder / "settings.json"), settings_of(args)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise DataError(
            f"{folder}: its results were made with {changed[0]} {before.get(changed[0])}, not {now[changed[0]]}. "
            "Choose another --output_dir, or use the same settings."
        )


def settings_of(args: TransferArguments) -> dict[str, Any]:
    """The settings that all cells of a folder share."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in OF_A_REPORT}


def check_no_source(checkpoint: str, target: str, catalogue: Catalogue, counts: np.ndarray) -> None:
    """
    Refuse a target on which the source was trained. The files of the source tell that, by the name of its data, or if
    most items of the target have ids of the source's items and are chosen about as often. Equal ids alone prove
    nothing, since many shops number their items from one.

    Args:
        checkpoint, target (`str`): Names of the source model and of the target.
        catalogue ([`Catalogue`]): The target's items.
        counts (`np.ndarray` of shape `(n_items,)`): How often each was chosen.

    Raises:
        [`DataError`]: If the source was trained on the target.
    """
    known = ItemStatistics.from_pretrained(checkpoint)
    told = read_json(Path(checkpoint) / STATISTICS_NAME) if Path(checkpoint).is_dir() else {}
    domains = [domain for domain in told.get("domains") or [told] if isinstance(domain, dict)]
    sources = [domain.get("source") for domain in domains]
    sizes: list[Any] = [domain.get("num_items") for domain in domains]
    parts = []
    if known is not None:
        if not all(isinstance(size, int) for size in sizes) or sum(sizes) != len(known.item_ids):
            sizes = [len(known.item_ids)]
        ends = np.cumsum(sizes)[:-1]
        parts = list(zip(np.split(known.item_ids, ends), np.split(known.train_counts, ends), strict=True))
    if any(_is_alike(ItemStatistics(*part), catalogue, counts) for part in parts) or (
        catalogue.source in sources and not DataArguments(data=target).is_demo
    ):  # the demo data have one name
        raise DataError(f"{target}: the source {checkpoint} was trained on this data set. Leave out one of the two.")


def _is_alike(known: ItemStatistics, catalogue: Catalogue, counts: np.ndarray) -> bool:
    """Whether most items are known, and are chosen about as often."""
    rows = known.rows(catalogue.item_ids)
    same = rows >= 0
    if same.mean() <= 0.5:
        return False
    theirs, ours = np.log1p(known.train_counts[rows[same]]), np.log1p(counts[same])
    varied = theirs.std() > 0 and ours.std() > 0
    return not varied or bool(np.corrcoef(theirs, ours)[0, 1] > LIKE_COUNTS)


def file_name(cell: Cell) -> str:
    """The file name of a cell, which tells all that the cell depends on."""
    parts = [
        cell.target,
        cell.model,
        cell.source or "",
        f"{cell.fraction or ''}",
        f"{'' if cell.seed is None else cell.seed}",
    ]
    return "+".join(re.sub(r"[^\w.-]+", "_", part).strip("_") for part in parts)


def write_cell(file: Path, cell: Cell, ranks: torch.Tensor, facts: Mapping[str, Any]) -> None:
    """Write a cell into one file, as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        save_file(
            {"ranks": ranks}, partial, {"cell": json.dumps(dataclasses.asdict(cell)), "facts": json.dumps(facts)}
        )


def read_cell(file: Path, num_users: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read the ranks and facts of a cell. Raises [`DataError`] if the file is damaged or has other users."""
    try:
        with safe_open(file, framework="pt") as content:
            ranks, facts = content.get_tensor("ranks"), json.loads(content.metadata()["facts"])
        if len(ranks) != num_users:
            raise ValueError(f"it has ranks of {len(ranks)} users, but the target has {num_users} users")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be used ({one_line(error)}). Delete it, then it is computed again."
        ) from error
    return ranks, facts


def _described(cell: Cell, result: tuple[torch.Tensor, dict[str, Any]]) -> dict[str, Any]:
    ranks, facts = result
    metrics = {name: metric_values(ranks, name).mean().item() for name in ("ndcg@10", "hit_rate@10")}
    return {**dataclasses.asdict(cell), **metrics, **facts}


def compare(
    results: Mapping[Cell, tuple[torch.Tensor, dict[str, Any]]],
    targets: Sequence[str],
    sources: Sequence[str],
    models: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """One row per target, share of users, source and model: means over seeds, and the difference to its reference."""
    rows, done = [], set()
    for target in targets:
        for fraction in sorted(fractions):
            for source in sources:
                for model in models:
                    cells = [Cell.of(target, model, source, fraction, seed) for seed in seeds]
                    if cells[0] in done:
                        continue
                    done.add(cells[0])
                    ranks = torch.stack([results[cell][0] for cell in cells])
                    row = {
                        "target": target,
                        "model": model,
                        "source": cells[0].source,
                        "fraction": cells[0].fraction,
                        "train_users": results[cells[0]][1]["train_users"] if cells[0].fraction else None,
                        "seeds": len(set(cells)),
                        "ndcg@10": metric_values(ranks, "ndcg@10").mean().item(),
                        "hit_rate@10": metric_values(ranks, "hit_rate@10").mean().item(),
                    }
                    reference = REFERENCES.get(model)
                    if reference is not None and reference in models:
                        others = [results[Cell.of(target, reference, source, fraction, seed)][0] for seed in seeds]
                        found = paired_bootstrap(ranks, torch.stack(others))
                        row |= {"compared_with": reference, **found, "verdict": verdict(found["low"], found["high"])}
                    rows.append(row)
    return rows


def verdict(low: float, high: float) -> str:
    """The verdict that follows from the interval of a difference."""
    return "helps" if low > 0 else "negative" if high < 0 else "no difference"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for other programs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for people, one of each target."""
    tables = []
    for target in dict.fromkeys(row["target"] for row in rows):
        cells = [["model", "source", "users", "ndcg@10", "compared with", "difference", "verdict"]]
        for row in (row for row in rows if row["target"] == target):
            users = "" if row["fraction"] is None else f"{row['fraction']:.0%} ({row['train_users']:,})"
            cell = [row["model"].replace("_", " "), row["source"] or "", users, f"{row['ndcg@10']:.4f}"]
            if "verdict" in row:
                difference = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
                cell += [row["compared_with"].replace("_", " "), difference, row["verdict"]]
            cells.append([*cell, *[""] * (len(cells[0]) - len(cell))])
        tables.append(f"{target}\n\n{format_table(cells, flush_left=2)}")
    return "\n\n".join(tables)


def plot_curves(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw ndcg@10 against the share of users into one PNG file per target. Without Matplotlib, log a warning."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No curves were drawn, because Matplotlib is missing: pip install 'transrec-hf[plot]'.")
        return
    for target in dict.fromkeys(row["target"] for row in rows):
        curves: dict[str, list[tuple[float | None, float]]] = defaultdict(list)
        for row in (row for row in rows if row["target"] == target):
            name = row["model"].replace("_", " ") + (f", {Path(row['source']).name}" if row["source"] else "")
            curves[name].append((row["fraction"], row["ndcg@10"]))
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            if points[0][0] is None:
                axes.axhline(points[0][1], label=name, linestyle=":", color=f"C{len(axes.lines) % 10}")
            else:
                axes.plot(*zip(*((100 * (x or 0), y) for x, y in points), strict=True), marker=".", label=name)
        axes.set(xscale="log", xlabel="% of the training users", ylabel="ndcg@10", title=target)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
        stem = re.sub(r"[^\w.-]+", "_", target).strip("_")
        with whole_file(folder / f"{stem}.png") as partial:
            figure.savefig(partial, dpi=150, format="png")
