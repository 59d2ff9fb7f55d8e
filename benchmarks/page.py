"""
Makes the tables and plots of README.md from the table of results:

    python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib.pyplot as plt
from common import FOLDER, Row, learning_curve, rows_of


def short(data: str) -> str:
    """`data/hm` to `hm`."""
    return Path(data).name


def format_row(row: Row) -> str:
    """One line of a table."""
    number = f"{float(row['value']):.3g}"
    if row["low"]:
        number += f" [{float(row['low']):.3g}, {float(row['high']):.3g}]"
    reference = f", over {row['reference']}" if row["reference"] else ""
    facts = " ".join([short(row["data"]), row["dtype"]]).strip()
    return f"| {row['variant']} | {facts} | {row['metric']}{reference} | {number} {row['unit']} |"


def fill_tables(page: str, path: str | Path) -> str:
    """
    The page with its tables made anew: between `<!-- table NAME of VARIANT: METRIC, METRIC -->` and `<!-- end -->` are
    the rows of that benchmark with these metrics, or with all, and with variants that begin so, or with all.
    """

    def table(match: re.Match) -> str:
        metrics = [name.strip() for name in match["metrics"].split(",")] if match["metrics"] else None
        rows = [row for row in rows_of(path, match["name"]) if metrics is None or row["metric"] in metrics]
        rows = [row for row in rows if row["variant"].startswith(match["variant"] or "")]
        head = "| | data | | median [lowest, highest] |\n|---|---|---|---|\n"
        return f"{match['start']}\n\n{head}" + "".join(f"{format_row(row)}\n" for row in rows) + "\n<!-- end -->"

    start = r"(?P<start><!-- table (?P<name>\w+)( of (?P<variant>[^:>]+))?(: (?P<metrics>[^>]+?))? -->)"
    return re.sub(f"{start}.*?<!-- end -->", table, page, flags=re.DOTALL)


def plot_speedups(path: str | Path, output: Path) -> None:
    """Every ratio that the benchmarks report, on one logarithmic axis."""
    names = ("throughput", "id_baseline", "encoding", "ranking")
    rows = [row for name in names for row in rows_of(path, name) if row["metric"] == "speedup"]
    data = [short(row["data"]).removeprefix("random vectors: ") for row in rows]
    labels = [f"{row['benchmark']}, {name}, {row['dtype']}" for row, name in zip(rows, data, strict=True)]
    figure, axes = plt.subplots(figsize=(10, 0.4 * len(rows) + 1))
    values = [float(row["value"]) for row in rows]
    axes.barh(labels[::-1], values[::-1], color="tab:blue")
    for place, value in enumerate(values[::-1]):
        axes.text(value, place, f" {value:.2g}x", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as the reference")
    axes.margins(x=0.25)
    save(figure, output / "speedups.png")


def plot_ablation(path: str | Path, output: Path) -> None:
    """Users per second of each combination of levers."""
    rows = [row for row in rows_of(path, "ablation") if row["metric"] == "users per second"]
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1))
    axes.barh([row["variant"] for row in rows][::-1], [float(row["value"]) for row in rows][::-1], color="tab:green")
    axes.set(xscale="log", xlabel="users per second")
    save(figure, output / "ablation.png")


def plot_quality(path: str | Path, output: Path) -> None:
    """ndcg@10 of the validation targets over the time of training, one panel for each data set."""
    rows = rows_of(path, "time_to_quality")
    panels = sorted({row["data"] for row in rows})
    if not panels:
        return
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axes, data in zip(all_axes[0], panels, strict=True):
        for variant, colour in (("official", "tab:red"), ("ours", "tab:blue")):
            seconds, quality = learning_curve(row for row in rows if row["data"] == data and row["variant"] == variant)
            axes.plot([value / 60 for value in seconds], quality, "o-", color=colour, label=variant, markersize=3)
        axes.set(title=short(data), xlabel="minutes of training", ylabel="validation ndcg@10", xscale="symlog")
        axes.legend()
    save(figure, output / "time_to_quality.png")


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=FOLDER / "results.csv", help="table to plot")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of README.md and the plots")
    options = parser.parse_args()
    for plot in (plot_speedups, plot_ablation, plot_quality):
        plot(options.results, options.output)
    page = options.output / "README.md"
    page.write_text(fill_tables(page.read_text(encoding="utf-8"), options.results), encoding="utf-8")


if __name__ == "__main__":
    main()
