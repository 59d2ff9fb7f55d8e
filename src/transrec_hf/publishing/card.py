"""Model cards, written from the small JSON files that a run leaves beside its weights.

A checkpoint folder holds `config.json`, `data_statistics.json`, `training_args.json` and `evaluation.json`. The card
depends only on these four files, so it can be written again at any time without the data. `evaluation.json` holds

- `reports`: the last report of each evaluated split, see [`RankingEvaluator.report`];
- `towers`: names and licences of the pre-trained towers, read when the model was trained;
- `run`: device, time, steps and versions;
- `arguments`: the training arguments that influenced the result;
- `metadata`: facts that only a person can tell, such as the licence;
- `results`: the file and the names of its rows, if the numbers were taken from a table by [`read_results`].
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from ..errors import bad_input
from ..evaluation.metrics import metric_names
from ..evaluation.protocol import PROTOCOLS, EvaluationProtocol
from ..files import STATISTICS_NAME, read_whole, write_json, write_text, written_whole
from ..model.configuration_transrec import TransRecConfig
from .checkpoint import parameter_counts, read_config
from .facts import (
    ADAPTER_NAME,
    CARD_NAME,
    EVALUATION_NAME,
    TRAINING_ARGS_NAME,
    UNREADABLE,
    data_name,
    describe_towers,
    facts_of,
    headline_report,
    load_evaluation,
    named_source,
    other_weights,
    read_json,
)
from .markdown import Markdown, code, plain, render, shares_in_words
from .results import BOOTSTRAP, read_results


TAGS = ("transrec", "recommendation", "sequential-recommendation")
TASK = "sequential-recommendation"
BASELINE_NAMES = {
    "popularity": "popularity",
    "repeat_last": "repeat-last",
    "co_occurrence": "co-occurrence",
    "content_neighbours": "content neighbours",
    "id_baseline": "ID baseline",
}
SLICE_NAMES = {
    "target": "target in training (warm) or not (cold)",
    "target_modality": "modality of the target",
    "history_length": "items in the history",
    "history_modality": "modality of the history",
}
# where a run was saved, logged and pushed does not matter for its result
NOT_SHOWN = re.compile(
    r"output_dir|run_name|project|hub_|push_to_hub|report_to|trackio|log|disable_tqdm|save_|eval_|.*_eval_|do_|debug|"
    r"resume_|ignore_data_skip|local_rank|dataloader_|ddp_|skip_memory|activation_store|use_cpu|load_best|metric_for|"
    r"greater_is|remove_unused|restore_callback"
)
ALWAYS_SHOWN = ("learning_rate", "tower_learning_rate", "per_device_train_batch_size", "num_train_epochs", "seed")


def non_default_arguments(args: Mapping[str, Any], of: type[TrainingArguments] = TrainingArguments) -> dict[str, Any]:
    """The saved arguments that influenced the result: those that differ from the defaults, and always a few."""
    defaults = {}
    for field in dataclasses.fields(of):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        defaults[field.name] = getattr(default, "value", default)
    shown = {}
    for name, value in args.items():
        default = defaults.get(name)
        # different ways of leaving an argument out are equal; but 0 trainable blocks is a value
        changed = value != default and bool(value or default or type(value) is int)
        if not NOT_SHOWN.match(name) and (name in ALWAYS_SHOWN or (changed and not isinstance(value, dict))):
            shown[name] = value
    return shown


def _arguments(evaluation: Mapping[str, Any], args: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments that a card shows; those of a run of version 0.1 are compared with the defaults of `Trainer`."""
    if "arguments" in evaluation:
        return evaluation["arguments"]
    return non_default_arguments(args) if "output_dir" in args else args


def model_card(
    folder: str | os.PathLike,
    config: TransRecConfig | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelCard:
    """
    Make the card of a checkpoint.

    Args:
        folder (`str`): The checkpoint: a folder with `config.json` or `adapter_config.json`, and, if they exist,
            `data_statistics.json`, `training_args.json` and `evaluation.json`.
        config ([`TransRecConfig`], *optional*): The configuration of the model, if `folder` does not hold it.
        changes (`dict[str, dict]`, *optional*): New contents of these files, by file name.

    Returns:
        [`~huggingface_hub.ModelCard`], with the metrics as `model-index` in its metadata.

    Raises:
        [`DataError`]: If `folder` has no configuration, or one of the files is damaged.
    """
    place = Path(folder)

    def read() -> ModelCard:
        small = (ADAPTER_NAME, STATISTICS_NAME, TRAINING_ARGS_NAME)
        files = {EVALUATION_NAME: load_evaluation(place), **{name: read_json(place / name) for name in small}}
        return _render(place, read_config(place) if config is None else config, {**files, **(changes or {})})

    names = f"{EVALUATION_NAME}, {STATISTICS_NAME} or {TRAINING_ARGS_NAME}"
    with bad_input(f"{folder}: {names} is damaged", *UNREADABLE, jinja2.TemplateError):
        return read_whole(place, read)


def _render(folder: Path, config: TransRecConfig, files: Mapping[str, Mapping[str, Any]]) -> ModelCard:
    adapter, statistics, evaluation = files[ADAPTER_NAME], files[STATISTICS_NAME], files[EVALUATION_NAME]
    towers = evaluation.get("towers") or describe_towers(config.to_dict())
    metadata = evaluation.get("metadata", {})
    model_id = str(metadata.get("model_id") or folder.resolve().name)
    name, on_hub = data_name(evaluation, statistics)
    split, report = headline_report(evaluation)

    parents = [tower["name"] for tower in towers if tower["on_hub"]]
    parent = evaluation.get("finetuned_from")
    if adapter:
        base = adapter.get("base_model_name_or_path")
        parent = named_source(base) if base else parent or {"name": "the model it was trained on", "on_hub": False}
    if parent:
        parents = [parent["name"]] if parent["on_hub"] else []
    card_data = ModelCardData(
        base_model=parents or None,
        datasets=[name] if on_hub else None,
        eval_results=eval_results(report, name, split, on_hub) if report else None,
        language=metadata.get("language"),
        library_name="peft" if adapter else "transformers",
        license=metadata.get("license"),
        metrics=[metric for metric in _ranked(report) if metric.startswith(("hit_rate", "ndcg"))] or None,
        model_name=model_id.split("/")[-1],
        tags=[*TAGS, *(["multimodal"] if len(towers) > 1 else []), *metadata.get("tags", [])],
    )
    values = {
        "model_id": model_id,
        "title": model_id.split("/")[-1],
        "adapter": adapter,
        "card_license": metadata.get("license"),
        "parent": parent,
        "config": config,
        "parameters": parameter_counts(config),
        "towers": towers,
        "elsewhere": other_weights(folder),
        "data": name,
        "statistics": statistics,
        "data_of": lambda domain: data_name({}, domain)[0],
        "split": split,
        "report": report,
        "interval": (report or {}).get("interval", BOOTSTRAP),
        "protocol": [Markdown(line) for line in describe_protocol(report["protocol"])] if report else [],
        "metrics": _headline(report),
        "table": comparison(report) if report else [],
        "verdict": Markdown(verdict(report)),
        "lengths": _by_length(report),
        "slices": _slice_rows(report),
        "balance": Markdown(describe_balance(evaluation)),
        "arguments": _arguments(evaluation, files[TRAINING_ARGS_NAME]),
        "run": evaluation.get("run", {}),
        "results": evaluation.get("results"),
        "shares_in_words": shares_in_words,
        "number": "{:,}".format,
        "percent": "{:.1%}".format,
        "score": "{:.4f}".format,
        "duration": duration,
    }
    return render(ModelCard, "model_card.md", card_data, values)


def write_model_card(
    folder: str | os.PathLike,
    config: TransRecConfig | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """
    Write the card of a checkpoint, see [`model_card`], as `README.md`, and the files in `changes`.
    """
    with written_whole(folder) as partial:
        for name, values in (changes or {}).items():
            write_json(partial / name, values)
        write_text(partial / CARD_NAME, str(model_card(folder, config, changes)))
    return Path(folder) / CARD_NAME


def update_model_card(
    folder: str | os.PathLike,
    results: Mapping[str, Any] | None = None,
    output: str | os.PathLike | None = None,
    **metadata: Any,
) -> Path:
    """
    Write the card of a checkpoint again.

    Args:
        folder (`str`): The checkpoint.
        results (`dict`, *optional*): Numbers to show instead of those of the run, from [`read_results`]. If the
            numbers of the old card came from a table that still exists, the table is read again.
        output (`str`, *optional*): Another folder for the card and the small files that it is made from, without local
            paths. The weights stay where they are.
        metadata: Facts that only a person can tell: `model_id`, `license`, `language`, `tags`, `datasets`. They are
            kept for later cards.

    Returns:
        `Path`: The card.

    Raises:
        [`DataError`]: See [`model_card`] and [`read_results`].
    """
    folder = Path(folder)
    config, evaluation = read_config(folder), load_evaluation(folder)
    table = evaluation.get("results")
    if results is None and table and _is_below(table["file"]) and Path(table["file"]).is_file():
        results = read_results(table["file"], table["run"], table["model"], table["split"])
    if results is not None:
        results = {**results, "reports": _with_slices(results["reports"], evaluation.get("reports", {}))}
    evaluation = {"towers": describe_towers(config.to_dict()), **evaluation, **(results or {})}
    evaluation["metadata"] = {**evaluation.get("metadata", {}), **metadata}
    if output is None:
        return write_model_card(folder, config, {EVALUATION_NAME: evaluation})
    small = _small_files(folder, evaluation)
    return write_model_card(output, config, {**small, EVALUATION_NAME: evaluation})


def _is_below(file: str) -> bool:
    """Whether a path, which may come from a stranger's file, is inside the working directory."""
    return not os.path.isabs(file) and Path(file).resolve().is_relative_to(Path.cwd())


def _with_slices(reports: Mapping[str, Any], of_run: Mapping[str, Any]) -> dict[str, Any]:
    """The reports of a table, with the further contents of the run's own reports if their metrics are the same."""
    merged = dict(reports)
    for split, report in reports.items():
        other = of_run.get(split, {})
        if other.get("metrics") == report["metrics"]:
            merged[split] = {**other, **report, "protocol": {**report["protocol"], **other["protocol"]}}
    return merged


def _small_files(folder: Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration, arguments and statistics by file, without local paths, for publication."""
    files = {name: read_json(folder / name) for name in ("config.json", TRAINING_ARGS_NAME, STATISTICS_NAME)}
    for tower in TransRecConfig.sub_configs_defaults:
        if name := (files["config.json"].get(tower) or {}).get("_name_or_path"):
            files["config.json"][tower]["_name_or_path"] = named_source(name)["name"]
    files[TRAINING_ARGS_NAME] = dict(_arguments(evaluation, files[TRAINING_ARGS_NAME]))
    if files[STATISTICS_NAME]:
        for part in (*files[STATISTICS_NAME].get("domains", ()), files[STATISTICS_NAME]):
            part["source"] = data_name({}, part)[0]
    return {name: values for name, values in files.items() if values}


def describe_checkpoint(folder: str | os.PathLike, local: bool = True) -> dict[str, Any]:
    """
    The facts about a checkpoint and its metrics, see [`facts_of`].

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        local (`bool`, *optional*, defaults to `True`): Whether the base of an adapter is looked for on this machine
            only, and not on the Hub.

    Raises:
        [`DataError`]: If the folder is not a checkpoint, or one of its files is damaged.
    """
    place = Path(folder)

    def read() -> dict[str, Any]:
        config = read_config(place, local)
        return facts_of(place, config.to_dict(), parameter_counts(config))

    with bad_input(f"{folder}: the files of this checkpoint are damaged", *UNREADABLE):
        return read_whole(place, read)


def eval_results(report: Mapping[str, Any], data: str, split: str, on_hub: bool = False) -> list[EvalResult]:
    """Hit rates, NDCGs and MRR of a report as entries of the `model-index`."""
    return [
        EvalResult(
            task_type=TASK,
            task_name="Sequential recommendation",
            dataset_type=data if on_hub else re.sub(r"[^\w.-]+", "-", data).lower(),
            dataset_name=data,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric,
            metric_value=report["metrics"][metric],
        )
        for metric in _ranked(report)
    ]


def comparison(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The main metrics, with intervals, of the model and of its baselines, best baseline first."""
    metrics, baselines = _headline(report), report.get("baselines", {})
    order = sorted(baselines, key=lambda name: -baselines[name]["metrics"].get(_primary(report), 0.0))
    rows = [("this model", report), *((BASELINE_NAMES.get(name, name), baselines[name]) for name in order)]
    return [
        {
            "name": name,
            "cells": {
                metric: (scores["metrics"].get(metric), scores.get("intervals", {}).get(metric)) for metric in metrics
            },
        }
        for name, scores in rows
    ]


def verdict(report: Mapping[str, Any]) -> str:
    """
    One sentence: the baselines that the model is above in NDCG, with or without overlapping intervals, and the others.
    """
    metric = _primary(report)
    groups: dict[str, list[str]] = {"above": [], "above, but with overlapping intervals,": [], "**not** above": []}
    above, barely, below = groups.values()
    for name, scores in report.get("baselines", {}).items():
        if metric in scores["metrics"]:
            low = report["intervals"].get(metric, (report["metrics"][metric],))[0]
            high = scores.get("intervals", {}).get(metric, (scores["metrics"][metric],))[-1]
            higher = report["metrics"][metric] > scores["metrics"][metric]
            group = (above if low > high else barely) if higher else below
            group.append(plain(BASELINE_NAMES.get(name, name)))
    parts = [f"{word} {_listed(names)}" for word, names in groups.items() if names]
    return f"In `{metric}` it is {'; it is '.join(parts)}." if parts else ""


def describe_balance(evaluation: Mapping[str, Any]) -> str:
    """One sentence: the metric of each modality alone, if a report of the run has it."""
    measured = [report["balance"] for report in evaluation.get("reports", {}).values() if "balance" in report]
    if not measured:
        return ""
    metrics, gaps = dict(measured[0]["metrics"]), measured[0].get("gaps", {})
    whole = metrics.pop("all")["ndcg@10"]
    parts = []
    for view, values in metrics.items():
        gap = gaps.get(view.removesuffix(" alone"))
        compared = (
            "" if gap is None else f" ({abs(gap):.4f} {'below' if gap > 0 else 'above'} a model that reads only it)"
        )
        parts.append(f"{values['ndcg@10']:.4f} {'' if view.startswith('without') else 'with '}{plain(view)}{compared}")
    return f"Validation `ndcg@10` is {whole:.4f} with all modalities, {_listed(parts)}."


def _listed(names: list[str]) -> str:
    """Names in a sentence: `"a, b and c"`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def describe_protocol(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol in words: which items were ranked, which were left out, and how ties count."""
    fields = {field.name: field.default for field in dataclasses.fields(EvaluationProtocol)}
    if not fields.keys() & protocol.keys():  # not one of our protocols: there is only a name
        return [f"Protocol {code(protocol['name'])}."] if protocol.get("name") else []
    protocol = {
        name: value if isinstance(value, (int, type(None))) else plain(value) for name, value in protocol.items()
    }
    chosen = {name: protocol.get(name, default) for name, default in fields.items()}
    presets = {name: dataclasses.asdict(preset) for name, preset in PROTOCOLS.items()}
    same = (name for name, preset in presets.items() if {**preset, "max_history": chosen["max_history"]} == chosen)
    preset = protocol.get("name") or next(same, None)
    length = f"{protocol['max_history']}" if protocol.get("max_history") else "L"
    extra = f" + {chosen['window_extra']}" if chosen["window_extra"] else ""
    masked = {
        "none": "nothing is masked: items that the user had before can be recommended again",
        "window": f"the last {length}{extra} items before the target cannot be recommended",
        "full": "no item that the user had before can be recommended",
    }[chosen["mask_history"]]
    if chosen["mask_history"] != "none" and not chosen["protect_target"]:
        masked += "; a target among them is a sure miss"
    users = f"each of the {protocol['num_users']:,} users" if protocol.get("num_users") else "every user"
    if protocol.get("drawn_from"):
        users = f"each of {protocol['num_users']:,} users drawn from {protocol['drawn_from']:,}"
    ranked = "all items" if chosen["candidates"] == "catalogue" else "all items that some user chose"
    ties = "half" if chosen["ties"] == "expected" else "all"
    count = f", {protocol['num_items']:,} in number" if protocol.get("num_items") else ""
    lines = [
        f"Preset: {code(preset)}." if preset else "",
        f"Targets: the last item of {users} with at least {chosen['min_interactions']} interactions.",
        f"Ranked: {ranked}{count}, none sampled, by the raw dot product.",
        f"Masking (`{chosen['mask_history']}`): {masked}.",
        f"Ties (`{chosen['ties']}`): of the items with the same score as the target, {ties} count as ranked before "
        "it.",
        f"History: the last {length} items." if protocol.get("max_history") else "",
    ]
    return [line for line in lines if line]


def duration(seconds: float) -> str:
    """A time in words: `"47 s"`, `"12 min"`, `"3.5 h"`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _ranked(report: Mapping[str, Any]) -> list[str]:
    """The ranking metrics that a report has, in order."""
    ks = sorted({int(name.split("@")[1]) for name in report.get("metrics", {}) if re.fullmatch(r"\w+@\d+", name)})
    return [name for name in metric_names(ks) if name in report.get("metrics", {})]


def _headline(report: Mapping[str, Any]) -> list[str]:
    """The metrics of the first table: those at 10 (or at the largest length), and the MRR."""
    names = _ranked(report)
    ks = [int(name.split("@")[1]) for name in names if "@" in name]
    best = 10 if 10 in ks else max(ks, default=10)
    return [name for name in (f"hit_rate@{best}", f"ndcg@{best}", "mrr") if name in names]


def _primary(report: Mapping[str, Any]) -> str:
    """The metric by which models are compared: NDCG, if the report has it."""
    names = _headline(report)
    return next((name for name in names if name.startswith("ndcg")), names[0] if names else "")


def _by_length(report: Mapping[str, Any]) -> list[tuple[int, Any, Any]]:
    metrics = report.get("metrics", {})
    ks = sorted({int(name.split("@")[1]) for name in _ranked(report) if "@" in name})
    return [(k, metrics.get(f"hit_rate@{k}"), metrics.get(f"ndcg@{k}")) for k in ks]


def _slice_rows(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any], list[Any]]]:
    """Group, label, scores and main values of every slice; a slice with all users is left out."""
    return [
        (SLICE_NAMES.get(group, group), label, part, [part.get(metric) for metric in _headline(report)])
        for group, parts in report.get("slices", {}).items()
        for label, part in parts.items()
        if len(parts) > 1
    ]
