"""Tables of results, and facts about the machine on which they were measured."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from ..errors import DataError
from ..evaluation.protocol import PROTOCOLS
from ..files import locked, write_text


BOOTSTRAP = "95 % bootstrap interval over users"
RESULT_COLUMNS = (
    *("run", "command", "seed", "data", "machine", "protocol", "split", "model", "metric", "value", "low", "high"),
    *("num_users", "seconds", "peak_memory_gb", "date", "commit"),
)


SECRET = re.compile(r"token$|secret|passw|api[-_]?key|credential", re.IGNORECASE)
HIDDEN = "***"


def without_secrets(command: str) -> str:
    """A command line in which the values of tokens, passwords and keys are hidden."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("--"):
            word = HIDDEN
        hide = name.startswith("-") and not equals and SECRET.search(name) is not None
        if equals and SECRET.search(name):
            word = f"{name}={HIDDEN}"
        shown.append(re.sub(r"hf_\w{4,}|(?<=://)[^/@\s]+(?=@)", HIDDEN, word))
    return command if shown == words else shlex.join(shown).replace(f"'{HIDDEN}'", HIDDEN)


def append_results(path: str | os.PathLike, reports: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """
    Add the metrics of reports to a table of results, see [`read_results`].

    Args:
        path (`str`): The file, which is made if it does not exist.
        reports (`dict[str, dict]`): The report of each model by name, see [`RankingEvaluator.report`].
        facts: The columns that are the same for all rows: `run`, `command` (without its secrets), `seed`, `data`,
            `machine`, `protocol`, `split`, and, if known, `seconds`, `peak_memory_gb`, `date` and `commit`.
    """
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, RESULT_COLUMNS, lineterminator="\n")
    if "command" in facts:
        facts["command"] = without_secrets(str(facts["command"]))
    for model, report in reports.items():
        for metric, value in report["metrics"].items():
            low, high = report["intervals"].get(metric, ("", ""))
            row = {"model": model, "metric": metric, "value": value, "low": low, "high": high}
            writer.writerow({**facts, **row, "num_users": report["protocol"]["num_users"]})
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent, f".{file.name}.lock"):  # if two runs end at the same time, no rows are lost
        before = file.read_bytes().decode("utf-8") if file.exists() else ",".join(RESULT_COLUMNS)
        separator = "" if before.endswith("\n") else "\n"
        write_text(file, before + separator + rows.getvalue())


def read_results(
    path: str | os.PathLike, run: str | None = None, model: str | None = None, split: str = "test"
) -> dict[str, Any]:
    """
    The numbers of one model from a table of results, in the form of `evaluation.json`.

    The table is a CSV with one row per metric and the columns `RESULT_COLUMNS`. For several seeds the mean is taken,
    with the lowest and the highest value as the interval. All other models with the same data, protocol and split
    become the baselines.

    Args:
        path (`str`): The file.
        run, model (`str`, *optional*): Run and model of the rows; needed if the table holds several.
        split (`str`, *optional*, defaults to `"test"`): Split of the rows.

    Raises:
        [`DataError`]: If columns or rows are missing, a cell is not a number, or the choice is not unique.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file (now in {os.getcwd()}). Check the path.")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in RESULT_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: has no column {', '.join(missing)}. Give a table of --results_csv.")
        rows = [row for row in reader if row["split"] == split]
    mine = rows
    for name, value in (("run", run), ("model", model)):
        found = sorted({row[name] for row in mine})
        if value is None and len(found) > 1:
            raise DataError(f"{path}: has several values of {name}: {', '.join(found)}. Give one of them.")
        if not mine or (value is not None and value not in found):
            raise DataError(
                f"{path}: has no {split} row of {name} {value!r}, only of {', '.join(found) or 'none'}. Give one of "
                "these."
            )
        mine = [row for row in mine if value in (None, row[name])]
    compared = ("data", "protocol")
    for name in compared:
        found = sorted({row[name] for row in mine})
        if len(found) > 1:
            raise DataError(
                f"{path}: run {mine[0]['run']!r} has several values of {name}: {', '.join(found)}. Give them "
                "different run names."
            )
    first = mine[0]
    others: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        same_task = all(row[name] == first[name] for name in compared)
        if same_task and (row["run"], row["model"]) != (first["run"], first["model"]):
            label = row["model"] if row["run"] == first["run"] else f"{row['model']} ({row['run']})"
            others.setdefault(label, []).append(row)
    protocol = PROTOCOLS.get(first["protocol"])
    report = {
        "protocol": {
            "name": first["protocol"],
            **(dataclasses.asdict(protocol) if protocol else {}),
            "num_users": int(_mean(path, mine, "num_users") or 0) or None,
        },
        **_scores(path, mine),
        "baselines": {label: _scores(path, group) for label, group in others.items()},
    }
    shown = {name: first.get(name) or None for name in ("command", "date", "commit")}
    shown["command"] = shown["command"] and without_secrets(shown["command"])
    return {
        "reports": {split: report},
        "run": {
            "device": first["machine"],
            "seconds": _mean(path, mine, "seconds"),
            "peak_memory_gb": _mean(path, mine, "peak_memory_gb"),
            "seeds": sorted({row["seed"] for row in mine}),
            **shown,
        },
        "data": first["data"],
        "results": {"file": Path(path).as_posix(), "run": first["run"], "model": first["model"], "split": split},
    }


def _scores(path: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Metrics and intervals of one model; for several seeds the mean, the lowest and the highest value."""
    by_metric: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    metrics, intervals, kind = {}, {}, BOOTSTRAP
    for metric, group in by_metric.items():
        values = [_number(path, row, "value") for row in group]
        if len({row["seed"] for row in group}) < len(group):
            raise DataError(f"{path}: {metric} of {group[0]['model']!r} occurs twice for a seed. Keep one row.")
        metrics[metric] = sum(values) / len(values)
        if len(group) > 1:
            intervals[metric] = [min(values), max(values)]
            kind = f"lowest and highest of {len(group)} seeds"
        elif group[0]["low"] and group[0]["high"]:
            intervals[metric] = [_number(path, group[0], "low"), _number(path, group[0], "high")]
    return {"metrics": metrics, "intervals": intervals, "interval": kind}


def _mean(path: Any, rows: list[dict[str, str]], column: str) -> float | None:
    """Mean over seeds of a column that is the same in every row of a seed; `None` if it is empty."""
    values = {row["seed"]: _number(path, row, column) for row in rows if row.get(column)}
    return sum(values.values()) / len(values) if values else None


def _number(path: Any, row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise DataError(f"{path}: {column} of {row['metric']} is {row[column]!r}, not a number.") from None


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name of the device, and the peak memory of this process in GB, on the GPU or otherwise on the host."""
    if device.type == "cuda":
        return {
            "device": torch.cuda.get_device_name(device),
            "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 2**30,
        }
    name = f"{os.cpu_count()} cores of {cpu_name()}" if device.type == "cpu" else device.type
    if sys.platform == "win32":
        return {"device": name, "peak_memory_gb": None}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"device": name, "peak_memory_gb": round(peak / 2**30, 2)}


def cpu_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of the libraries on which numbers depend most."""
    from .. import __version__

    return {"transrec-hf": __version__, "transformers": transformers_version, "torch": torch.__version__}
