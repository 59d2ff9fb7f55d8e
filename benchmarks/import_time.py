"""
How long `import transrec_hf` takes, including its registration with the Auto classes, compared with importing what
every model of transformers needs. The processor seconds of a fresh interpreter are counted.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

from common import Results, ratios


STATEMENTS = {"transformers": "from transformers import PreTrainedModel", "transrec_hf": "import transrec_hf"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(repeats=9)


def processor_seconds(statement: str) -> float:
    """Returns the processor seconds of a fresh interpreter that runs one statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(options: argparse.Namespace, results: Results) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(options.repeats + 1):  # the first round reads the files from disk
        for name, statement in STATEMENTS.items():
            seconds[name].append(processor_seconds(statement))
    for name in STATEMENTS:
        results.add(name, "import", seconds[name][1:], "s")
    times = ratios(seconds["transrec_hf"][1:], seconds["transformers"][1:])
    results.add("transrec_hf", "time of import", times, "x", reference="transformers")
