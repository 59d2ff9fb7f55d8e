"""What all benchmarks share: measuring side by side, one table of results, one description of the machine."""

from __future__ import annotations

import csv
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transrec_hf.publishing.results import describe_device


FOLDER = Path(__file__).parent
COLUMNS = (
    *("benchmark", "variant", "metric", "value", "unit", "low", "high", "repeats", "reference"),
    *("data", "dtype", "seed", "machine", "command", "date", "commit"),
)


Row = dict[str, str]


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """
    Measure the seconds that each variant takes. Every round runs all variants, so that a busy machine slows all of
    them alike.

    Args:
        variants (`dict[str, Callable]`): What to measure, by name.
        repeats (`int`): Number of rounds that count.
        warm_up (`int`, *optional*, defaults to 1): Number of rounds before them, which do not count.
        clock (`Callable`, *optional*): Returns seconds; `time.process_time` for those of the processor, which other
            programs disturb less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(-warm_up, repeats):
        for name, function in variants.items():
            started = clock()
            function()
            elapsed = clock() - started
            if repeat >= 0:
                seconds[name].append(elapsed)
                print(f"  {name}: {elapsed:.2f} s", file=sys.stderr, flush=True)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Returns the ratio of two numbers for each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


class Peer:
    """
    A script of `peers/` that runs in an environment of its own. It is started once and can be asked many times. This
    class is a context manager.

    Args:
        python (`str`): Python of the environment with `requirements-peers.txt`.
        script (`str`): Name of the script in `peers/`.
        arguments (`str`): Arguments of the script.
    """

    def __init__(self, python: str, script: str, *arguments: str):
        command = [python, str(FOLDER / "peers" / script), *arguments]
        self.script = script
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer of the script to a request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.script} ended with exit code {self.process.wait()} instead of an answer")
        return json.loads(answer)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.process.communicate()


class Results:
    """
    The table of results, to which each benchmark adds its rows.

    Args:
        path (`str`): CSV file with the columns `COLUMNS`. It is created if it does not exist.
        benchmark (`str`): Name of the benchmark.
        facts: Columns that all its rows share, for example `data`, `seed` and `dtype`.
    """

    def __init__(self, path: str | Path, benchmark: str, **facts: Any):
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.path = Path(path)
        self.facts = {
            "benchmark": benchmark,
            "machine": describe_device(device or torch.device("cpu"))["device"],
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "commit": git.stdout.strip(),
            **facts,
        }

    def add(self, variant: str, metric: str, values: float | Sequence[float], unit: str, **facts: Any) -> float:
        """
        Add one row: the median of `values`, with the lowest and the highest if there are several values.

        Args:
            variant (`str`): What was measured.
            metric (`str`): Name of the metric, for example `"speedup"`, which needs a `reference` among the facts.
            values (`float` or `list[float]`): One value for each repetition.
            unit (`str`): Unit of the values, for example `"items/s"`, or `"x"` for a ratio.
            facts: Further columns, for example `reference="official"`.
        """
        values = [values] if isinstance(values, (int, float)) else list(values)
        median = statistics.median(values)
        several = {"low": min(values), "high": max(values)} if len(values) > 1 else {}
        row = {**self.facts, **several, "variant": variant, "metric": metric, "value": median, "unit": unit}
        row |= {"repeats": len(values), **facts}
        is_new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
        print(f"{variant}: {metric} {median:.4g} {unit}", flush=True)
        return median


def rows_of(path: str | Path, benchmark: str) -> list[Row]:
    """Returns the rows of one benchmark. If a row was measured again with the same seed, it is the last one."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    latest = {tuple(row[name] for name in ("variant", "metric", "data", "dtype", "seed")): row for row in rows}
    return list(latest.values())


def learning_curve(rows: Iterable[Row]) -> tuple[list[float], list[float]]:
    """
    Returns the seconds and the ndcg@10 after each epoch. Seconds that were not measured are the seconds of one epoch
    times the number of epochs.
    """
    values = {row["metric"]: float(row["value"]) for row in rows}
    start = "ndcg@10 after epoch "
    epochs = sorted(int(name.removeprefix(start)) for name in values if name.startswith(start))
    seconds = [values.get(f"seconds after epoch {epoch}", values.get("epoch", 0.0) * epoch) for epoch in epochs]
    return seconds, [values[f"{start}{epoch}"] for epoch in epochs]
