"""Write the rows of an ablation's table: what was compared, and how to repeat it."""

from __future__ import annotations

import csv
import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transrec_hf.publishing.results import describe_device


OF_A_RUN = ("seeds", "command", "machine", "date")


def append_rows(path: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """
    Add the rows of this run to a table. A table that does not exist yet is created.

    Args:
        path (`str`): The CSV file.
        columns (`Sequence[str]`): The columns of the table, including those of `OF_A_RUN`.
        rows (`Sequence[Mapping]`): The rows, without the columns of `OF_A_RUN`.
        seeds (`Sequence[int]`): The seeds of the run.
    """
    about = {
        "seeds": " ".join(map(str, seeds)),
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_device(torch.device("cpu"))["device"],
        "date": datetime.date.today().isoformat(),
    }
    is_new = not Path(path).exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
