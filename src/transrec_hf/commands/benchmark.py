"""`transrec benchmark ninerec`: compares an ID model, a model from scratch and a pre-trained one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from ..data.layouts import open_published
from ..data.published import Parts, name_of
from ..data.writing import write_published
from ..errors import DataError
from ..files import whole_file, written_whole
from .options import option
from .parsing import parse_arguments
from .reporting import format_table
from .transfer import TransferArguments, check_settings, report_on


logger = logging.get_logger(__name__)

MODELS = {"id_baseline": "ID", "from_scratch": "scratch", "fine_tuned": "pre-trained"}
PUBLISHED = {
    "text": {
        "Food": (18.09, 18.03, 19.59),
        "Dance": (23.46, 23.49, 25.41),
        "Movie": (11.40, 11.64, 12.63),
        "Cartoon": (11.63, 11.94, 13.75),
        "Music": (19.16, 19.42, 20.65),
        "KU": (28.36, 30.77, 31.36),
        "QB": (33.92, 34.27, 34.60),
        "TN": (15.74, 15.11, 16.85),
        "DY": (15.92, 14.35, 14.49),
    },
    "image": {
        "Food": (18.09, 17.20, 18.72),
        "Dance": (23.46, 21.63, 22.16),
        "Movie": (11.40, 10.30, 11.50),
        "Cartoon": (11.63, 11.09, 11.78),
        "Music": (19.16, 17.17, 17.56),
        "KU": (28.36, 33.08, 33.03),
        "QB": (33.92, 32.39, 33.57),
        "TN": (15.74, 14.12, 14.44),
        "DY": (15.92, 14.08, 14.68),
    },
}
"""Published HR@10 in %: SASRec with IDs, with a tower without pre-training on a source, and with such pre-training."""
TOWERS = {"text": "BERT base", "image": "Swin base"}
FOOTNOTES = """\
hit_rate@10 in %. For each user with 5 items or more, the last item is ranked among the items that occur among the last
L + 3 of any user, except those of this user. Published: SASRec, one seed, L = 20, towers trained end to end, titles in
Chinese. Here: the ID baseline is eSASRec with the best of three settings on validation; the model from scratch has the
towers of the source and nothing else of it; the pre-trained model starts from the part of the source that validation
prefers. The verdict compares these two over users and seeds."""


@dataclass
class BenchmarkArguments(TransferArguments):
    """Where the data sets and the source models are, and how they are trained."""

    _argument_group_name = "benchmark"
    folder: str | None = option(None, "Folder with the targets in NineRec's layout.")
    language: Literal["en", "zh"] = option("en", "Language of the titles.")
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": f"Of {', '.join(MODELS)}."})
    fractions: list[str] = field(
        default_factory=lambda: ["1"], metadata={"help": "Shares of the target's training users; the table shows all."}
    )
    seeds: list[str] = field(default_factory=lambda: ["0"], metadata={"help": "Seeds, separated by commas or spaces."})
    output_dir: str = option("runs/ninerec", "Folder for the targets, the results, the table and the JSON file.")
    protocol: str = option("ninerec", "Evaluation protocol.", choices=("ninerec",))

    def __post_init__(self) -> None:
        if self.folder is None:
            raise ValueError("no folder: give --folder with the data sets in NineRec's layout")
        files = Parts(self.folder, "ninerec").files("*_item.csv")
        found = list(dict.fromkeys(name_of(file).removesuffix("_item.csv") for file in files))
        self.targets = self.targets or [name for name in found if not name.startswith("Bili_")]
        if not self.targets:
            raise ValueError(
                f"{self.folder}: no target of NineRec's layout (D_item.csv, for D as TN). Name its folder"
            )
        if unknown := set(self.targets) - set(found):
            raise ValueError(f"{self.folder}: no target {sorted(unknown)[0]}. Name some of {', '.join(found)}")
        super().__post_init__()


def benchmark(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Run a published benchmark: compare an ID baseline, a model from scratch and a pre-trained one on every target.

        transrec benchmark ninerec --folder NineRec --sources runs/bili --output_dir runs/ninerec
        transrec benchmark ninerec --folder NineRec --sources runs/bili --targets TN QB --seeds 0,1,2

    Every data set D of the folder (D_item.csv, D_pair.csv and D_cover/) is a target, unless --targets names some. A
    source is a trained model. To make one, run `transrec prepare --layout ninerec --domain Bili_500K`, then
    `transrec pretrain` with --max_position_embeddings 20, the history length of the protocol.

    Results that are in output_dir are not computed again. table.csv shows the numbers beside the published ones.
    """
    words = list(argv or ())
    if words[:1] == ["ninerec"]:
        words.pop(0)
    elif not {"-h", "--help"} & set(words):
        raise DataError("which benchmark? There is one: transrec benchmark ninerec --folder FOLDER --sources MODEL")
    (args,) = parse_arguments((BenchmarkArguments,), words, benchmark)
    output = Path(args.output_dir)
    check_settings(output, args)
    names = list(dict.fromkeys(args.targets))
    published = {name: open_published("ninerec", args.folder, name, args.language) for name in names}
    for name in names:
        if not (output / "data" / name / "interactions.parquet").exists():
            with written_whole(output / "data" / name) as partial:
                done = write_published(published[name], partial)
            logger.info(
                "%s: %s", name, "; ".join((*done["notes"], *(f"{n:,} {k}" for k, n in done["dropped"].items())))
            )
    args.targets = [str(output / "data" / name) for name in names]
    report = report_on(args)
    rows = [row for name in names for row in rows_of(name, report["rows"])]
    with whole_file(output / "table.csv") as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shown = format_table([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)], flush_left=2)
    print(f"\n{shown}\n\n{FOOTNOTES}")
    return {**report, "table": rows}


def rows_of(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a target in the table, one for each source: our numbers and the published ones, in %."""
    mine = [row for row in rows if Path(row["target"]).name == name and row["fraction"] == 1]
    table = []
    sources = dict.fromkeys(row["source"] for row in mine if row["source"])
    for source in sources or (None,):
        values = {row["model"]: 100 * row["hit_rate@10"] for row in mine if row["source"] in (None, source)}
        row: dict[str, Any] = {"target": name, "source": source}
        row |= {short: round(values[model], 2) for model, short in MODELS.items() if model in values}
        tuned = [other for other in mine if other["model"] == "fine_tuned" and other["source"] == source]
        row["verdict"] = tuned[0].get("verdict") if tuned else None
        for modality, numbers in PUBLISHED.items():
            shown = numbers.get(name, (None, None, None))
            row |= {f"{TOWERS[modality]}: {short}": value for short, value in zip(MODELS.values(), shown, strict=True)}
        table.append(row)
    return table


def _cell(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.2f}"
