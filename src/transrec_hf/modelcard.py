"""Model cards, rendered from the small JSON files that a run leaves beside its weights.

A checkpoint folder holds `config.json`, `data_statistics.json`, `training_args.json` and `evaluation.json`; the card
is a function of these four, so it can be rendered again at any time and without the data. `evaluation.json` holds

- `reports`: the last report of each evaluated split, see [`RankingEvaluator.report`];
- `towers`: names and licences of the pre-trained towers, read when the model was trained;
- `run`: device, time, steps and versions;
- `metadata`: what only a person can tell, such as the licence;
- `results`: the file and the row names, where the numbers were taken from a table of results by [`read_results`].
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers import __version__ as transformers_version

from .configuration_transrec import TransRecConfig
from .data import STATISTICS_NAME, DataError
from .evaluator import PROTOCOLS, EvaluationProtocol
from .metrics import metric_names
from .modeling_transrec import TransRecModel
from .training_args import TransRecTrainingArguments


EVALUATION_NAME = "evaluation.json"
TRAINING_ARGS_NAME = "training_args.json"
CARD_NAME = "README.md"
TEMPLATES = Path(__file__).parent / "templates"

TAGS = ("transrec", "recommendation", "sequential-recommendation")
TASK = "sequential-recommendation"
UNKNOWN_LICENCE = "unknown: check"
BOOTSTRAP = "95 % bootstrap interval over users"
RESULT_COLUMNS = (
    *("run", "command", "seed", "data", "machine", "protocol", "split", "model", "metric", "value", "low", "high"),
    *("num_users", "seconds", "peak_memory_gb", "date", "commit"),
)
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
# where a run was kept, watched and shared says nothing about what was learned
NOT_SHOWN = re.compile(
    r"output_dir|run_name|project|hub_|push_to_hub|report_to|trackio|log|disable_tqdm|save_|eval_|.*_eval_|do_|debug|"
    r"resume_|ignore_data_skip|local_rank|dataloader_|ddp_|skip_memory|activation_store|use_cpu|load_best|metric_for|"
    r"greater_is|remove_unused"
)
ALWAYS_SHOWN = ("learning_rate", "tower_learning_rate", "per_device_train_batch_size", "num_train_epochs", "seed")


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def load_evaluation(folder: str | os.PathLike) -> dict[str, Any]:
    """What `evaluation.json` of a checkpoint folder holds; empty if there is none."""
    return _read_json(Path(folder) / EVALUATION_NAME)


def save_evaluation(evaluation: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Writes `evaluation.json`."""
    file = Path(folder) / EVALUATION_NAME
    file.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    return file


def append_results(path: str | os.PathLike, reports: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """
    Adds the metrics of reports to a table of results, see [`read_results`].

    Args:
        path (`str`): The file, made if there is none.
        reports (`dict[str, dict]`): For the name of each model its report, see [`RankingEvaluator.report`].
        facts: The columns that are the same for all: `run`, `command`, `seed`, `data`, `machine`, `protocol`, `split`,
            and as far as known `seconds`, `peak_memory_gb`, `date` and `commit`.
    """
    is_new = not Path(path).exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RESULT_COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for model, report in reports.items():
            for metric, value in report["metrics"].items():
                low, high = report["intervals"].get(metric, ("", ""))
                row = {"model": model, "metric": metric, "value": value, "low": low, "high": high}
                writer.writerow({**facts, **row, "num_users": report["protocol"]["num_users"]})


def read_results(
    path: str | os.PathLike, run: str | None = None, model: str | None = None, split: str = "test"
) -> dict[str, Any]:
    """
    One model's numbers from a table of results, in the form of `evaluation.json`.

    The table is a CSV with one row per metric and the columns `RESULT_COLUMNS`. Several seeds become their mean, with
    the lowest and the highest as interval. All other rows of the same data, protocol and split are what the model is
    compared with.

    Args:
        path (`str`): The file.
        run, model (`str`, *optional*): Which rows; needed where the table holds several.
        split (`str`, *optional*, defaults to `"test"`): Which targets.

    Raises:
        [`DataError`]: If columns or rows are missing, a cell is no number, or the choice is not unique.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file (now in {os.getcwd()}). Check the path.")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in RESULT_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: missing column {', '.join(missing)}.")
        rows = [row for row in reader if row["split"] == split]
    mine = rows
    for name, value in (("run", run), ("model", model)):
        found = sorted({row[name] for row in mine})
        if value is None and len(found) > 1:
            raise DataError(f"{path}: which {name}? There are {', '.join(found)}.")
        if not mine or (value is not None and value not in found):
            raise DataError(f"{path}: no {split} row of {name} {value!r}, only of {', '.join(found) or 'none'}.")
        mine = [row for row in mine if value in (None, row[name])]
    compared = ("data", "protocol")
    for name in compared:
        found = sorted({row[name] for row in mine})
        if len(found) > 1:
            raise DataError(f"{path}: run {mine[0]['run']!r} mixes {name} {', '.join(found)}: name them apart.")
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
    """Metrics and intervals of one model; over several seeds the mean, the lowest and the highest."""
    by_metric: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    metrics, intervals, kind = {}, {}, BOOTSTRAP
    for metric, group in by_metric.items():
        values = [_number(path, row, "value") for row in group]
        if len({row["seed"] for row in group}) < len(group):
            raise DataError(f"{path}: {metric} of {group[0]['model']!r} occurs twice for a seed. Keep one.")
        metrics[metric] = sum(values) / len(values)
        if len(group) > 1:
            intervals[metric] = [min(values), max(values)]
            kind = f"lowest and highest of {len(group)} seeds"
        elif group[0]["low"] and group[0]["high"]:
            intervals[metric] = [_number(path, group[0], "low"), _number(path, group[0], "high")]
    return {"metrics": metrics, "intervals": intervals, "interval": kind}


def _mean(path: Any, rows: list[dict[str, str]], column: str) -> float | None:
    """Mean over seeds of a column that says the same in every row of a seed; `None` where it is empty."""
    values = {row["seed"]: _number(path, row, column) for row in rows if row.get(column)}
    return sum(values.values()) / len(values) if values else None


def _number(path: Any, row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise DataError(f"{path}: {column} of {row['metric']} is {row[column]!r}, not a number.") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({error}). Write it again.") from error


# --------------------------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------------------------


def named_source(name_or_path: str) -> dict[str, Any]:
    """How a card names where something came from: a Hub id as it is, a folder without the way to it."""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) is not None and not os.path.exists(name_or_path)
    return {"name": name_or_path if on_hub else Path(name_or_path).name, "on_hub": on_hub}


def describe_towers(config: TransRecConfig) -> list[dict[str, Any]]:
    """Modality, architecture, name and licence of each tower; a tower without a name had no pre-trained weights."""
    towers: list[dict[str, Any]] = []
    configs: tuple[tuple[str, Any], ...] = (("text", config.text_config), ("image", config.vision_config))
    for modality, tower in configs:
        if tower is not None:
            name = tower._name_or_path
            source = named_source(name) if name else {"name": None, "on_hub": False}
            licence = read_licence(name) if name else None
            towers.append({"modality": modality, "architecture": tower.model_type, **source, "licence": licence})
    return towers


@functools.cache
def read_licence(name_or_path: str) -> str:
    """The licence that a model's own card states, from a folder, the cache or the Hub; else `"unknown: check"`."""
    card = Path(name_or_path) / CARD_NAME
    try:
        data = ModelCard.load(card if card.is_file() else name_or_path, ignore_metadata_errors=True).data
    except (OSError, ValueError, HfHubHTTPError):
        return UNKNOWN_LICENCE
    return data.get("license_name") or data.get("license") or UNKNOWN_LICENCE


def parameter_counts(config: TransRecConfig) -> dict[str, int]:
    """Parameters of each part of the model, counted without making weights."""
    parts = {
        "item_encoder.text_model.": "text tower",
        "item_encoder.vision_model.": "image tower",
        "item_encoder.item_embedding.": "item embeddings",
        "item_encoder.": "fusion",
        "": "user encoder",
    }
    with torch.device("meta"):
        model = TransRecModel(config)
    counts = dict.fromkeys(parts.values(), 0)
    for name, parameter in model.named_parameters():
        counts[next(part for prefix, part in parts.items() if name.startswith(prefix))] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name of the device, and the peak memory of this process in GB: on a GPU of that, else of the host."""
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
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions that numbers depend on most."""
    from . import __version__

    return {"transrec-hf": __version__, "transformers": transformers_version, "torch": torch.__version__}


def non_default_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of saved [`TransRecTrainingArguments`] those that shaped the result: not the default ones, and a few always."""
    shown = {}
    for field in dataclasses.fields(TransRecTrainingArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = getattr(default, "value", default)
        if field.name not in args or NOT_SHOWN.match(field.name):
            continue
        value = args[field.name]
        changed = value != default and (value or default)  # not from one way of saying nothing to another
        if field.name in ALWAYS_SHOWN or (changed and not isinstance(value, dict)):
            shown[field.name] = value
    return shown


def data_name(evaluation: Mapping[str, Any], statistics: Mapping[str, Any]) -> tuple[str, bool]:
    """What the training data are called, and whether that is the id of a Hub data set."""
    given = evaluation.get("metadata", {}).get("datasets")
    if given:
        return given[0], True
    if evaluation.get("data"):
        return evaluation["data"], False
    source = statistics.get("source", "catalogue")
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+) \(items\)", source)
    if hub:
        return hub[1], True
    path = Path(source)
    name = path.parent.name if path.stem in ("items", "metadata") and path.suffix else path.stem
    return ("unnamed data" if name in ("", "items", "catalogue") else name), False


# --------------------------------------------------------------------------------------------------------------------
# Cards
# --------------------------------------------------------------------------------------------------------------------


def model_card(folder: str | os.PathLike, config: TransRecConfig | None = None) -> ModelCard:
    """
    Renders the card of a checkpoint.

    Args:
        folder (`str`): The checkpoint: a folder with `config.json` or `adapter_config.json`, and as far as there are
            `data_statistics.json`, `training_args.json` and `evaluation.json`.
        config ([`TransRecConfig`], *optional*): Of the model, if `folder` does not hold it.

    Returns:
        [`~huggingface_hub.ModelCard`], with the metrics as `model-index` in its metadata.

    Raises:
        [`DataError`]: If `folder` holds no configuration, or one of the files is damaged.
    """
    folder = Path(folder)
    adapter = _read_json(folder / "adapter_config.json")
    if config is None:
        config = read_config(folder)
    statistics, evaluation = _read_json(folder / STATISTICS_NAME), load_evaluation(folder)
    towers = evaluation.get("towers") or describe_towers(config)
    metadata = evaluation.get("metadata", {})
    model_id = metadata.get("model_id") or folder.resolve().name
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
    card = ModelCard.from_template(
        card_data,
        template_str=(TEMPLATES / "model_card.md").read_text(encoding="utf-8"),
        model_id=model_id,
        title=model_id.split("/")[-1],
        adapter=adapter,
        card_license=metadata.get("license"),
        parent=parent,
        config=config,
        parameters=parameter_counts(config),
        towers=towers,
        data=name,
        statistics=statistics,
        split=split,
        report=report,
        interval=(report or {}).get("interval", BOOTSTRAP),
        protocol=describe_protocol(report["protocol"]) if report else [],
        metrics=_headline(report),
        table=comparison(report) if report else [],
        verdict=verdict(report),
        lengths=_by_length(report),
        slices=_slice_rows(report),
        arguments=non_default_arguments(_read_json(folder / TRAINING_ARGS_NAME)),
        run=evaluation.get("run", {}),
        results=evaluation.get("results"),
        number="{:,}".format,
        percent="{:.1%}".format,
        score="{:.4f}".format,
        duration=duration,
        cell=lambda text: str(text).replace("|", "\\|"),
    )
    return card


def write_model_card(folder: str | os.PathLike, config: TransRecConfig | None = None) -> Path:
    """Renders the card of a checkpoint, see [`model_card`], and writes it as its `README.md`."""
    file = Path(folder) / CARD_NAME
    model_card(folder, config).save(file)
    return file


def update_model_card(
    folder: str | os.PathLike,
    results: Mapping[str, Any] | None = None,
    output: str | os.PathLike | None = None,
    **metadata: Any,
) -> Path:
    """
    Renders the card of a checkpoint again.

    Args:
        folder (`str`): The checkpoint.
        results (`dict`, *optional*): Numbers to show instead of those of the run, from [`read_results`]. A card whose
            numbers came from a table before reads it again, if it is still there.
        output (`str`, *optional*): Another folder to put the card in, with the small files that it is made of, less
            the local paths in them. The weights stay where they are.
        metadata: What only a person can tell: `model_id`, `license`, `language`, `tags`, `datasets`. Kept.

    Returns:
        `Path`: The card.

    Raises:
        [`DataError`]: See [`model_card`] and [`read_results`].
    """
    folder = Path(folder)
    config, evaluation = read_config(folder), load_evaluation(folder)
    table = evaluation.get("results")
    if results is None and table and Path(table["file"]).is_file():
        results = read_results(table["file"], table["run"], table["model"], table["split"])
    if results is not None:
        results = {**results, "reports": _with_slices(results["reports"], evaluation.get("reports", {}))}
    evaluation = {"towers": describe_towers(config), **evaluation, **(results or {})}
    evaluation["metadata"] = {**evaluation.get("metadata", {}), **metadata}
    if output is not None:
        _copy_small_files(folder, Path(output))
        folder = Path(output)
    save_evaluation(evaluation, folder)
    return write_model_card(folder, config)


def _with_slices(reports: Mapping[str, Any], of_run: Mapping[str, Any]) -> dict[str, Any]:
    """Reports of a table, and what the run's own reports know besides, if their metrics are the same."""
    merged = dict(reports)
    for split, report in reports.items():
        other = of_run.get(split, {})
        if other.get("metrics") == report["metrics"]:
            merged[split] = {**other, **report, "protocol": {**report["protocol"], **other["protocol"]}}
    return merged


def _copy_small_files(folder: Path, output: Path) -> None:
    """Copies configuration, arguments and statistics, for eyes that need not know where things lay."""
    output.mkdir(parents=True, exist_ok=True)
    files = {name: _read_json(folder / name) for name in ("config.json", TRAINING_ARGS_NAME, STATISTICS_NAME)}
    for tower in ("text_config", "vision_config"):
        if name := (files["config.json"].get(tower) or {}).get("_name_or_path"):
            files["config.json"][tower]["_name_or_path"] = named_source(name)["name"]
    files[TRAINING_ARGS_NAME] = non_default_arguments(files[TRAINING_ARGS_NAME])
    if files[STATISTICS_NAME]:
        files[STATISTICS_NAME]["source"] = data_name({}, files[STATISTICS_NAME])[0]
    for name, values in files.items():
        if values:
            (output / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe_checkpoint(folder: str | os.PathLike) -> dict[str, Any]:
    """
    What a checkpoint is and what it is worth, from its small files: `modalities`, `towers`, `sizes`, `parameters`,
    `data`, `metrics` with `intervals`, and the `split` and `protocol` they were measured on. Fit for JSON.
    """
    folder = Path(folder)
    config, evaluation, statistics = read_config(folder), load_evaluation(folder), _read_json(folder / STATISTICS_NAME)
    split, report = headline_report(evaluation)
    parameters = parameter_counts(config)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "num_items")
    counts = ("num_items", "num_users", "num_interactions", "items_with")
    return {
        "adapter": _read_json(folder / "adapter_config.json").get("peft_type"),
        "modalities": list(config.modalities),
        "towers": evaluation.get("towers") or describe_towers(config),
        "objective": config.objective,
        "sizes": {name: getattr(config, name) for name in sizes if getattr(config, name) is not None},
        "parameters": {**parameters, "total": sum(parameters.values())},
        "data": {
            "name": data_name(evaluation, statistics)[0],
            **{name: statistics[name] for name in counts if name in statistics},
        },
        "split": split or None,
        "protocol": report.get("protocol", {}),
        "metrics": report.get("metrics", {}),
        "intervals": report.get("intervals", {}),
        "baselines": {name: scores["metrics"] for name, scores in report.get("baselines", {}).items()},
    }


def read_config(folder: str | os.PathLike) -> TransRecConfig:
    """The configuration of a checkpoint, for an adapter that of its base. Raises [`DataError`] if there is none."""
    folder = Path(folder)
    source: Any = folder
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (now in {os.getcwd()}). Check the path.")
    if not (folder / "config.json").is_file():
        source = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not source:
            raise DataError(f"{folder}: no config.json here. Give the folder of a checkpoint.")
    elif (kind := _read_json(folder / "config.json").get("model_type")) != TransRecConfig.model_type:
        raise DataError(f"{folder}: a checkpoint of {kind!r}, not of {TransRecConfig.model_type!r}.")
    return TransRecConfig.from_pretrained(source)


def headline_report(evaluation: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split whose report a card shows, test before validation before any other, and the report."""
    reports = evaluation.get("reports", {})
    for split in ("test", "validation", *reports):
        if split in reports:
            return split, reports[split]
    return "", {}


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
    """The headline metrics, with intervals, of the model and of what it is compared with; best baseline first."""
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
    """One sentence: what the model is above in NDCG, with its interval or without, and what it is not above."""
    metric = _primary(report)
    groups: dict[str, list[str]] = {"above": [], "above, but with overlapping intervals,": [], "**not** above": []}
    above, barely, below = groups.values()
    for name, scores in report.get("baselines", {}).items():
        if metric in scores["metrics"]:
            low = report["intervals"].get(metric, (report["metrics"][metric],))[0]
            high = scores.get("intervals", {}).get(metric, (scores["metrics"][metric],))[-1]
            higher = report["metrics"][metric] > scores["metrics"][metric]
            group = (above if low > high else barely) if higher else below
            group.append(BASELINE_NAMES.get(name, name))
    parts = [f"{word} {_listed(names)}" for word, names in groups.items() if names]
    return f"In `{metric}` it is {'; it is '.join(parts)}." if parts else ""


def _listed(names: list[str]) -> str:
    """Names in a sentence: `"a, b and c"`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def describe_protocol(protocol: Mapping[str, Any]) -> list[str]:
    """What was ranked, what was left out and how ties count, in words."""
    fields = {field.name: field.default for field in dataclasses.fields(EvaluationProtocol)}
    if not fields.keys() & protocol.keys():  # not one of ours: there is only its name
        return [f"Protocol `{protocol['name']}`."] if protocol.get("name") else []
    chosen = {name: protocol.get(name, default) for name, default in fields.items()}
    presets = {name: dataclasses.asdict(preset) for name, preset in PROTOCOLS.items()}
    same = (name for name, preset in presets.items() if {**preset, "max_history": chosen["max_history"]} == chosen)
    preset = protocol.get("name") or next(same, None)
    length = f"{protocol['max_history']}" if protocol.get("max_history") else "L"
    extra = f" + {chosen['window_extra']}" if chosen["window_extra"] else ""
    masked = {
        "none": "nothing is masked: items that the user had can be recommended again",
        "window": f"the last {length}{extra} items before the target cannot be recommended",
        "full": "no item that the user had can be recommended",
    }[chosen["mask_history"]]
    if chosen["mask_history"] != "none" and not chosen["protect_target"]:
        masked += "; a target among them is a sure miss"
    users = f"each of the {protocol['num_users']:,} users" if protocol.get("num_users") else "every user"
    if protocol.get("drawn_from"):
        users = f"each of {protocol['num_users']:,} users drawn from {protocol['drawn_from']:,}"
    ranked = "all items" if chosen["candidates"] == "catalogue" else "all items that somebody chose"
    ties = "half" if chosen["ties"] == "expected" else "all"
    count = f", {protocol['num_items']:,} in number" if protocol.get("num_items") else ""
    lines = [
        f"Preset: `{preset}`." if preset else "",
        f"Targets: the last item of {users} with at least {chosen['min_interactions']} interactions.",
        f"Ranked: {ranked}{count}, none sampled, by the raw dot product.",
        f"Masking (`{chosen['mask_history']}`): {masked}.",
        f"Ties (`{chosen['ties']}`): of the items that score like the target, {ties} count as ranked before it.",
        f"History: the last {length} items." if protocol.get("max_history") else "",
    ]
    return [line for line in lines if line]


def duration(seconds: float) -> str:
    """Seconds in words: `"47 s"`, `"12 min"`, `"3.5 h"`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _ranked(report: Mapping[str, Any]) -> list[str]:
    """The ranking metrics that a report has, in order."""
    ks = sorted({int(name.split("@")[1]) for name in report.get("metrics", {}) if re.fullmatch(r"\w+@\d+", name)})
    return [name for name in metric_names(ks) if name in report.get("metrics", {})]


def _headline(report: Mapping[str, Any]) -> list[str]:
    """The metrics of the first table: those at 10, or at the greatest length, and the MRR."""
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
    """Group, label, scores and headline values of every slice; a slice that holds all users tells nothing new."""
    return [
        (SLICE_NAMES.get(group, group), label, part, [part.get(metric) for metric in _headline(report)])
        for group, parts in report.get("slices", {}).items()
        for label, part in parts.items()
        if len(parts) > 1
    ]


__all__ = [
    "append_results",
    "describe_checkpoint",
    "load_evaluation",
    "model_card",
    "read_results",
    "save_evaluation",
    "update_model_card",
    "write_model_card",
]
