"""
Make the tables and plots of the pages from the tables of results:

    python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import FOLDER, Row, learning_curve, rows_of


ROOT = FOLDER.parent
PAGES = [FOLDER / "README.md", ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "quickstart.md"]
"""Pages whose tables this program fills."""

DOMAINS = {
    "amazon-beauty": "Amazon Beauty",
    "amazon-toys": "Amazon Toys",
    "hm": "H&M, one week",
    "movielens-2000s": "films of the 2000s",
    "yelp": "Yelp",
}
MODELS = {
    "hybrid": "**TransRec, hybrid**",
    "untrained hybrid": "TransRec, hybrid, untrained",
    "untrained": "TransRec, content alone, untrained",
    "id_baseline": "ID baseline, tuned",
    "co_occurrence": "item co-occurrence",
    "popularity": "popularity",
}
METRICS = ("test hit_rate@10", "test ndcg@10")


def short(data: str) -> str:
    """Shortens `data/hm` to `hm`."""
    return Path(data).name


def format_row(row: Row) -> str:
    """Returns one line of a table."""
    number = f"{float(row['value']):.3g}"
    if row["low"]:
        number += f" [{float(row['low']):.3g}, {float(row['high']):.3g}]"
    reference = f", over {row['reference']}" if row["reference"] else ""
    facts = " ".join([short(row["data"]), row["dtype"]]).strip()
    return f"| {row['variant']} | {facts} | {row['metric']}{reference} | {number} {row['unit']} |"


def fill_tables(page: str, path: str | Path) -> str:
    """
    Returns the page with its tables made again. Each table stands between its comment and `<!-- end -->`:

    * `<!-- table NAME of VARIANT: METRIC, METRIC -->`: the rows of a benchmark with these metrics, and with variants
      that begin with VARIANT. Without metrics or variant, all are taken.
    * `<!-- quality -->`: the models of the benchmark `quality` next to published numbers.
    * `<!-- runs FILE: RUN MODEL = NAME; RUN MODEL = NAME -->`: rows of a table of `examples/results/`.
    """

    def table(match: re.Match) -> str:
        metrics = [name.strip() for name in match["metrics"].split(",")] if match["metrics"] else None
        rows = [row for row in rows_of(path, match["name"]) if metrics is None or row["metric"] in metrics]
        rows = [row for row in rows if row["variant"].startswith(match["variant"] or "")]
        head = "| | data | | median [lowest, highest] |\n|---|---|---|---|\n"
        return f"{match['start']}\n\n{head}" + "".join(f"{format_row(row)}\n" for row in rows) + "\n<!-- end -->"

    start = r"(?P<start><!-- table (?P<name>\w+)( of (?P<variant>[^:>]+))?(: (?P<metrics>[^>]+?))? -->)"
    page = re.sub(f"{start}.*?<!-- end -->", table, page, flags=re.DOTALL)
    quality = f"<!-- quality -->\n\n{quality_table(path)}\n<!-- end -->"
    page = re.sub("<!-- quality -->.*?<!-- end -->", lambda _: quality, page, flags=re.DOTALL)
    runs = r"(?P<start><!-- runs (?P<file>[\w./]+): (?P<runs>[^>]+?) -->).*?<!-- end -->"
    return re.sub(
        runs, lambda m: f"{m['start']}\n\n{runs_table(m['file'], m['runs'])}\n<!-- end -->", page, flags=re.DOTALL
    )


def decimal(value: float) -> str:
    """Formats a metric as papers of the field do: `.1208`."""
    return f"{value:.4f}".removeprefix("0")


def quality_table(path: str | Path) -> str:
    """
    Returns a table of `hit_rate@10` / `ndcg@10` of each model on each data set, of seed 0, the best of each in bold.
    """
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows_of(path, "quality"):
        if row["seed"] != "0":
            continue
        values.setdefault((row["variant"], short(row["data"])), {})[row["metric"]] = float(row["value"])
    names = dict(MODELS)
    with open(FOLDER / "published.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if short(row["data"]) not in DOMAINS:  # of another protocol; for the page of its method
                continue
            names[row["model"]] = f"published: {row['model']} ({row['source']})"
            values.setdefault((row["model"], short(row["data"])), {})[row["metric"]] = float(row["value"])
    best = {
        domain: [
            max(
                found[metric]
                for (variant, data), found in values.items()
                if variant in names and data == domain and metric in found
            )
            for metric in METRICS
        ]
        for domain in DOMAINS
    }
    lines = ["| | " + " | ".join(DOMAINS.values()) + " |", "|---|" + "---|" * len(DOMAINS)]
    for variant, name in names.items():
        cells = []
        for domain in DOMAINS:
            found = values.get((variant, domain), {})
            pair = [decimal(found[metric]) for metric in METRICS if metric in found]
            is_best = [
                metric in found and found[metric] == top for metric, top in zip(METRICS, best[domain], strict=True)
            ]
            cells.append(" / ".join(f"**{n}**" if b else n for n, b in zip(pair, is_best, strict=False)) or "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def runs_table(file: str, runs: str) -> str:
    """Returns a table of the test metrics of runs, with their 95 % intervals."""
    with open(ROOT / "examples" / "results" / file, newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table) if row["split"] == "test"]
    found = {(row["run"], row["model"], row["metric"]): row for row in rows}
    lines = ["| | hit_rate@10 | ndcg@10 |", "|---|---|---|"]
    for entry in runs.split(";"):
        which, _, name = entry.strip().partition(" = ")
        run, _, model = which.partition(" ")
        cells = [found[run, model, metric] for metric in ("hit_rate@10", "ndcg@10")]
        numbers = (f"{float(c['value']):.3f} [{float(c['low']):.3f}, {float(c['high']):.3f}]" for c in cells)
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"


# Plots are SVG files. Their colours follow the light or dark screen of the reader; letters are large enough for a
# phone

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2a78b8", "#d97b23", "#3a9a6d", "#8a63b8", "#9aa3ad"
PEERS = {
    "throughput": "the paper's recipe",
    "id_baseline": "RecBole's SASRec",
    "encoding": "sentence-transformers",
    "ranking": "sorting all scores",
}
LEVERS = {
    "unique": "each item of a batch once",
    "buckets": "texts of like length together",
    "bf16": "bf16",
    "store": "stored states of frozen blocks",
    "every_position": "a target at every position",
}


def plot_speedups(path: str | Path, output: Path) -> None:
    """Draws every ratio that the benchmarks report, grouped by its reference, on one logarithmic axis."""
    groups = {name: [r for r in rows_of(path, name) if r["metric"] == "speedup"] for name in PEERS}
    bars: list[tuple[str, float | None, str]] = []
    for (name, rows), colour in zip(groups.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
        bars.append((f"against {PEERS[name]}", None, colour))
        for row in rows:
            sizes = re.search(r"(\d+)000 items, size (\d+)", row["data"])
            what = f"{sizes[1]}k items, {sizes[2]} wide" if sizes else f"{short(row['data'])}, {row['dtype']}"
            bars.append((what, float(row["value"]), colour))
    bar_plot(bars, "times as fast", [1, 2, 5, 10, 20], output / "speedups.svg")


def plot_ablation(path: str | Path, output: Path) -> None:
    """Draws how many times as fast as the official recipe each lever is alone, and all levers but one are."""
    rows = {row["variant"]: float(row["value"]) for row in rows_of(path, "ablation") if row["metric"] == "speedup"}
    if not rows:
        return
    bars: list[tuple[str, float | None, str]] = [("one lever alone", None, BLUE)]
    bars += [(LEVERS[name], rows[f"{name} alone"], BLUE) for name in LEVERS if f"{name} alone" in rows]
    bars += [("all levers", rows["all levers"], GREEN), ("all but one", None, ORANGE)]
    bars += [
        (f"without: {LEVERS[name]}", rows[f"all but {name}"], ORANGE) for name in LEVERS if f"all but {name}" in rows
    ]
    bar_plot(bars, "times as fast as the official recipe", [1, 2, 5, 10, 20], output / "ablation.svg")


def bar_plot(bars: list[tuple[str, float | None, str]], title: str, ticks: list[float], file: Path) -> None:
    """Draws bars with their values on a logarithmic axis. An entry without a value is a heading."""
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(bars) + 1.2))
    for place, (_, value, colour) in enumerate(reversed(bars)):
        if value is not None:
            axes.barh(place, value, left=0, color=colour, height=0.72)
            axes.text(value * 1.03, place, f"{value:.3g}x", va="center", fontsize=13)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)], fontsize=13)
    for tick, (_, value, colour) in zip(axes.get_yticklabels(), reversed(bars), strict=True):
        if value is None:
            tick.set(color=colour, fontweight="bold")
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=13)
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(1, max(value for _, value, _ in bars if value) * 1.5)
    axes.set_xlabel(title, fontsize=13)
    axes.axvline(1, color="black", linewidth=1)
    save(figure, file)


def plot_quality(path: str | Path, output: Path) -> None:
    """Draws validation ndcg@10 over the time of training, in one panel for each data set, one below the other."""
    rows = rows_of(path, "time_to_quality")
    panels = sorted({row["data"] for row in rows})
    if not panels:
        return
    figure, all_axes = plt.subplots(len(panels), 1, figsize=(7, 3.2 * len(panels)), squeeze=False)
    for axes, data in zip(all_axes[:, 0], panels, strict=True):
        for variant, colour, name in (
            ("official", ORANGE, "the paper's recipe, written anew"),
            ("ours", BLUE, "this package"),
        ):
            seconds, quality = learning_curve(row for row in rows if row["data"] == data and row["variant"] == variant)
            axes.plot([value / 60 for value in seconds], quality, "o-", color=colour, label=name, markersize=4)
        axes.set_title(short(data), fontsize=14)
        axes.set_ylabel("validation ndcg@10", fontsize=13)
        axes.set_xscale("symlog", linthresh=1)
        ticks = [0, 1, 10, 60, 300]
        axes.set_xticks(ticks, ["0", "1 min", "10 min", "1 h", "5 h"], fontsize=13)
        axes.set_ylim(bottom=0)
        axes.minorticks_off()
    handles, names = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=13, frameon=False, loc="upper center", ncols=2)
    save(figure, output / "time_to_quality.svg")


COMPRESSED = {
    "untrained": "untrained",
    "beauty_teacher": "trained",
    "ml_teacher": "teacher, 6 blocks",
    "ml_student2": "student, 2 blocks",
    "ml_student1": "student, 1 block",
    "ml_student1_e0": "the same, map fitted only",
    "ml_nested": "trained with prefixes",
}


def plot_compression(path: str | Path, output: Path) -> None:
    """Draws hit_rate@10 over bytes, in one panel for each data set: codes solid, prefixes dashed."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for row in rows_of(path, "compression"):
        model, _, form = row["variant"].partition(", ")
        if form and model != "ml_whole":  # a second training of the teacher, to compare with `ml_nested`
            models = found.setdefault(row["data"], {})
            models.setdefault(model, {}).setdefault(form, {})[row["metric"]] = float(row["value"])
    figure, all_axes = plt.subplots(len(found), 1, figsize=(7, 4.2 * len(found)), squeeze=False)
    for axes, (data, models) in zip(all_axes[:, 0], found.items(), strict=True):
        ordered = sorted(models, key=lambda model: [*COMPRESSED, model].index(model))
        for model, colour in zip(ordered, itertools.cycle((BLUE, ORANGE, GREEN, PURPLE, GREY)), strict=False):
            points = {form: (each["size"], each["hit_rate@10"]) for form, each in models[model].items()}
            shorter = sorted(point for form, point in points.items() if form == "fp32" or "prefix" in form)
            others = sorted(point for form, point in points.items() if "prefix" not in form)
            axes.plot(*zip(*others, strict=True), "o-", color=colour, label=COMPRESSED.get(model, model))
            axes.plot(*zip(*shorter, strict=True), "x--", color=colour)
        sizes = {"96": "96\ncodes", "192": "192\ncodes", "384": "384", "768": "768\nint8", "1536": "1536\nfp16"}
        axes.set_xscale("log")
        axes.set_xticks([*map(int, sizes), 3072], [*sizes.values(), "3072\nfp32"], fontsize=13)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=13)
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.set_title(short(data), fontsize=14)
        axes.set_ylabel("test hit_rate@10", fontsize=13)
        axes.legend(fontsize=13, frameon=False, loc="lower right")
    all_axes[-1, 0].set_xlabel("bytes an item; dashed: the first numbers of each vector alone", fontsize=13)
    save(figure, output / "compression.svg")


def plot_balance(output: Path) -> None:
    """Draws hit_rate@10 with both modalities and with each alone, for each way to balance them."""
    with open(ROOT / "examples" / "results" / "balance.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "hit_rate@10"]
    colours = {"both": BLUE, "text": ORANGE, "image": GREEN}
    names = {"teacher": "a model of each alone", "joint": "joint", "dropout": "modality dropout", "ckd": "CKD"}
    names["dropout and ckd"] = "dropout and CKD"
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, all_axes = plt.subplots(len(sets), figsize=(7, 5.5 * len(sets)), squeeze=False)
    for data, axes in zip(sets, all_axes[:, 0], strict=True):
        values = {(row["variant"], row["shown"]): float(row["value"]) for row in rows if row["data"] == data}
        for place, variant in enumerate(reversed(names)):
            for step, (shown, colour) in enumerate(colours.items()):
                if (variant, shown) in values:
                    height, value = place + 0.27 * (1 - step), values[variant, shown]
                    axes.barh(height, value, color=colour, height=0.25, label=shown if variant == "joint" else None)
                    axes.text(value + 0.002, height, decimal(value), va="center", fontsize=13)
        axes.set_yticks(range(len(names)), list(names.values())[::-1], fontsize=13)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=13)
        axes.set_title(data, fontsize=14)
        axes.margins(x=0.12)
    all_axes[-1, 0].set_xlabel("test hit_rate@10, shown both or one alone", fontsize=13)
    figure.legend(*all_axes[0, 0].get_legend_handles_labels(), fontsize=13, frameon=False, loc="upper center", ncols=3)
    save(figure, output / "balance.svg")


def plot_sources(output: Path) -> None:
    """Draws how far each start is from one without sources, with its interval, in one panel for each target."""
    with open(ROOT / "examples" / "results" / "meta_transfer.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "hit_rate@10" and row["difference"]]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure, all_axes = plt.subplots(len(targets), figsize=(7, 4.4 * len(targets)), sharex=True, squeeze=False)
    for target, axes in zip(targets, all_axes[:, 0], strict=True):
        mine = [row for row in rows if row["target"] == target][::-1]
        for height, row in enumerate(mine):
            middle, low, high = (float(row[name]) for name in ("difference", "low", "high"))
            colour = GREEN if "guarded" in row["strategy"] else ORANGE if high < 0 else BLUE
            axes.plot((low, high), (height, height), color=colour, linewidth=2)
            axes.plot(middle, height, "o", color=colour, markersize=6)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_yticks(range(len(mine)), [row["strategy"] for row in mine], fontsize=13)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=13)
        axes.set_title(f"to {target}", fontsize=14)
    all_axes[-1, 0].set_xlabel("test hit_rate@10, less that of a start on the target", fontsize=13)
    save(figure, output / "meta_transfer.svg")


def plot_quickstart(output: Path) -> None:
    """Draws the comparison with its intervals, and below it the learning curves."""
    with open(ROOT / "examples" / "results" / "quickstart.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    colours = {"fine-tuned": BLUE, "zero-shot": PURPLE, "from scratch": ORANGE, "ID baseline": GREEN}
    figure, (bars, curves) = plt.subplots(2, 1, figsize=(7, 8.5))
    test = [row for row in rows if row["split"] == "test" and row["metric"] == "hit_rate@10"]
    for row in sorted(test, key=lambda row: float(row["value"])):
        value, low, high = (float(row[name]) for name in ("value", "low", "high"))
        bars.barh(row["model"], value, color=colours.get(row["model"], GREY), height=0.7)
        bars.errorbar(value, row["model"], xerr=[[value - low], [high - value]], color="black", capsize=3)
        bars.text(high + 0.008, row["model"], f"{value:.3f}", va="center", fontsize=13)
    bars.set_xlabel("test hit_rate@10 on the target, with 95 % intervals", fontsize=13)
    bars.margins(x=0.14)
    bars.tick_params(axis="y", length=0)
    for model in ("fine-tuned", "from scratch", "ID baseline"):
        line = [row for row in rows if row["model"] == model and row["split"] == "validation"]
        epochs, values = [float(row["metric"].split()[-1]) for row in line], [float(row["value"]) for row in line]
        curves.plot(epochs, values, color=colours[model], linewidth=2)
        curves.text(epochs[-1] + 1, values[-1], model, color=colours[model], va="center", fontsize=13)
    curves.set_xlim(0, 1.3 * curves.dataLim.xmax)  # room for the names
    curves.set_ylim(0, None)
    curves.set_xlabel("epochs on the target, until training stopped early", fontsize=13)
    curves.set_ylabel("validation ndcg@10", fontsize=13)
    for axes in (bars, curves):
        axes.tick_params(labelsize=13)
    save(figure, output / "quickstart.svg")


DARK = "<style>@media (prefers-color-scheme: dark) { svg { filter: invert(0.93) hue-rotate(180deg) } }</style>"


def save(figure: Any, path: Path) -> None:
    """
    Saves an SVG, which has the same bytes whenever it is drawn. Its ground is white, or dark on a dark screen.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.95 if figure.legends else 1))
    drawn = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "transrec", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = re.sub(r"[ \t]+$", "", drawn.getvalue(), flags=re.MULTILINE)
    path.write_text(re.sub(r"(<svg [^>]*>)", rf"\1\n{DARK}", text, count=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=FOLDER / "results.csv", help="table to plot")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the plots")
    options = parser.parse_args()
    for plot in (plot_speedups, plot_ablation, plot_quality, plot_compression):
        plot(options.results, options.output)
    plot_balance(ROOT / "examples" / "results")
    plot_sources(ROOT / "examples" / "results")
    plot_quickstart(ROOT / "docs")
    for page in PAGES:
        page.write_text(fill_tables(page.read_text(encoding="utf-8"), options.results), encoding="utf-8")


if __name__ == "__main__":
    main()
