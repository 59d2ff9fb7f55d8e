"""Reports for people: tables of metrics and plots of learning curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..publishing.card import BASELINE_NAMES, verdict


logger = logging.get_logger(__name__)

SLICE_TITLES = {
    "domain": "domain",
    "target": "target in training",
    "target_modality": "modality of the target",
    "history_length": "length of the history",
    "history_modality": "modality of the history",
}


def format_table(rows: Sequence[Sequence[str]], flush_left: int = 1) -> str:
    """Turn rows of cells, the first one the header, into aligned lines, `flush_left` columns aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < flush_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_report(report: Mapping[str, Any], name: str = "model") -> str:
    """
    A report of [`RankingEvaluator.evaluate`] as text: the model beside the baselines with their intervals, whether the
    model is above them, and the metrics of the model for groups of targets.

    Args:
        report (`dict`): The report.
        name (`str`, *optional*, defaults to `"model"`): Name of the model in the text.
    """
    metrics = list(report["intervals"])
    compared = {name: report, **report.get("baselines", {})}
    rows = [["", *metrics]]
    for row_name, row in compared.items():
        bounds = [(row["metrics"][metric], *row["intervals"][metric]) for metric in metrics]
        cells = [f"{value:.4f} [{low:.4f}, {high:.4f}]" for value, low, high in bounds]
        rows.append([BASELINE_NAMES.get(row_name, row_name), *cells])

    slices = [["users where", "users", *metrics]]
    for slice_name, parts in report["slices"].items():
        for label, part in parts.items():
            cells = [f"{part[metric]:.4f}" for metric in metrics]
            slices.append([f"{SLICE_TITLES[slice_name]}: {label}", str(part["num_users"]), *cells])

    protocol, repeats = report["protocol"], report["repeats"]
    drawn = f" drawn from {protocol['drawn_from']}" if protocol.get("drawn_from") else ""
    facts = (
        f"{protocol['num_users']} users{drawn}, {protocol['num_items']} items ranked, history masked: "
        f"{protocol['mask_history']}"
    )
    if repeats["share"]:
        ceiling = repeats["hit_rate_ceiling"]
        facts += f"; targets chosen before: {repeats['share']:.1%}, so that no hit rate exceeds {ceiling:.4f}"
    above = verdict(report).replace("*", "").replace("`", "")
    parts = [format_table(rows), above, format_table(slices), facts]
    if report.get("against"):
        differences = [["minus (an interval without 0 is more than chance)", *metrics]]
        for other, row in report["against"].items():
            found = [row["differences"][metric] for metric in metrics]
            cells = [f"{of['difference']:+.4f} [{of['low']:+.4f}, {of['high']:+.4f}]" for of in found]
            differences.append([other, *cells])
        parts.insert(2, format_table(differences))
    return "\n\n".join(filter(None, parts))


def format_cosines(cosines: Mapping[str, Mapping[str, float]]) -> str:
    """Cosines between the gradients of data sets, as a table."""
    rows = [[name, *(f"{value:.3f}" for value in row.values())] for name, row in cosines.items()]
    return format_table([["", *cosines], *rows])


def _units(step: Any) -> str:
    """What a step encodes of each modality: the number of contents, and of tokens if these are more."""
    return ", ".join(
        f"{step.contents[name]:,.0f} {name}" + (f" ({units:,.0f} tokens)" if units > step.contents[name] else "")
        for name, units in step.units.items()
    )


def format_plan(plan: Any) -> str:
    """A [`Plan`] as text: one fact on each line, then its advice."""
    step = plan.step
    lines = [
        f"{plan.machine}, {plan.dtype}",
        f"  an epoch        {plan.steps_per_epoch:,} steps of {step.users:,.0f} users",
        f"  a step encodes  {step.items:,.0f} distinct items of {step.slots:,.0f} ({step.distinct_share:.0%}): "
        + _units(step),
        "",
    ]
    ways = {"without a store": plan.without_store, "with a store": plan.with_store}
    ways = {name: way for name, way in ways.items() if way is not None}
    rows = {
        "TFLOP of an epoch": lambda way: f"{way.epoch_tflop:,.1f}",
        "share of the towers": lambda way: f"{way.tower_share:.0%}",
        "seconds of a step": lambda way: f"{way.step_seconds:,.2f}",
        "seconds of an epoch": lambda way: f"{way.epoch_seconds:,.0f}",
        "seconds of an evaluation": lambda way: f"{way.evaluation_seconds:,.1f}",
        "peak memory, GB": lambda way: f"{way.memory_gb:.1f}",
    }
    lines.append(" " * 26 + "".join(f"{name:>18}" for name in ways))
    lines += [f"  {name:<24}" + "".join(f"{cell(way):>18}" for way in ways.values()) for name, cell in rows.items()]
    if plan.with_store is not None:
        lines += ["", f"  filling the store once takes {plan.fill_seconds:.0f} s and {plan.store_gb:.2f} GB of disk"]
    return "\n".join([*lines, "", *(f"  {sentence}" for sentence in plan.advice)])


def new_figure() -> Any:
    """A figure of two panels; without Matplotlib, `None` and a warning."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No learning curve was drawn, because Matplotlib is missing: pip install 'transrec-hf[plot]'.")
        return None
    return Figure(figsize=(9, 3.5), layout="constrained")


def plot_balance(log_history: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
    """
    Draw the metric of each modality alone and the norms of its gradients, as [`ModalityBalanceCallback`] logs them,
    into a PNG file. A dotted line shows the metric of a model that reads only this modality, if it is known.

    Args:
        log_history (`list[dict]`): `Trainer.state.log_history`.
        path (`str` or `os.PathLike`): File to write.
    """
    figure = new_figure()
    if figure is None:
        return
    metric, gradient = "ndcg@10", "gradient_norm_"
    keys = list(dict.fromkeys(key for entry in log_history for key in entry))
    shown = [key for key in keys if key.startswith("eval_") and key.endswith(f"_{metric}")]
    groups = (
        (f"validation {metric}", {key: key[5 : -len(metric) - 1] or "all" for key in shown}),
        ("gradient norm", {key: key.removeprefix(gradient) for key in keys if key.startswith(gradient)}),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 2), groups, strict=True):
        for key, label in lines.items():
            points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
            (line,) = axes.plot(*zip(*points, strict=True), marker=".", label=label.replace("_", " "))
            gap = "gap_" + label.removesuffix("_alone")
            for known in [entry[key] + entry[gap] for entry in log_history if key in entry and gap in entry][:1]:
                axes.axhline(known, color=line.get_color(), linestyle=":")
        axes.set(title=title, xlabel="epoch", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        if lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")


def plot_learning_curve(log_history: Sequence[Mapping[str, float]], path: str | os.PathLike, metric: str) -> None:
    """
    Draw the training loss and the validation metric of a run into a PNG file. Without Matplotlib, log a warning.

    Args:
        log_history (`list[dict]`): `Trainer.state.log_history`.
        path (`str` or `os.PathLike`): File to write.
        metric (`str`): Name of the metric, e.g. `"ndcg@10"`.
    """
    figure = new_figure()
    if figure is None:
        return
    panels = {"training loss": "loss", f"validation {metric}": f"eval_{metric}"}
    for axes, (title, key) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None)
        if points and key.startswith("eval_"):  # from zero, so that noise does not look like a trend
            epoch, best = max(points, key=lambda point: point[1])
            axes.plot(epoch, best, marker="o", markersize=9, markerfacecolor="none", color="#9e2a2b")
            axes.annotate(f"best: {best:.4f}", (epoch, best), (0, -14), textcoords="offset points", ha="center")
            axes.set_ylim(0, 1.1 * best or None)
        axes.set(title=title, xlabel="epoch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
