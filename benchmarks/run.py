"""
Run one benchmark and add its rows to a table:

    python benchmarks/run.py encoding --data data/amazon-beauty --text_model all-MiniLM-L6-v2

Each benchmark is a module of this folder; `BENCHMARK --help` describes it. README.md in this folder has the results.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from common import FOLDER, Results


BENCHMARKS = (
    *("throughput", "time_to_quality", "ablation", "id_baseline", "encoding", "matmul_peak", "data_size", "ranking"),
    *("large_catalogue", "plan_accuracy", "item_cache", "import_time", "quality", "nearest", "service", "versions"),
    *("compression", "tuning", "media", "published_sasrec"),
)


def data_of(options: argparse.Namespace) -> str:
    """Returns the name of the data in the table: the folder, and the number of users if they are a sample."""
    sample = f", {options.max_users} users" if getattr(options, "max_users", None) else ""
    return getattr(options, "data", "synthetic") + sample


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in BENCHMARKS:
        print(f"{__doc__}\nBenchmarks: {', '.join(BENCHMARKS)}")
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=f"run.py {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=FOLDER / "results.csv", help="table to add rows to")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and samples")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds; their median is reported")
    module.add_options(parser)
    options = parser.parse_args(sys.argv[2:])
    module.run(options, Results(options.results, name, seed=options.seed, data=data_of(options)))


if __name__ == "__main__":
    main()
