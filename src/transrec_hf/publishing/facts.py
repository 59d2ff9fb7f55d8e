"""Facts about a checkpoint from its small files. This module does not import torch, so that it is fast."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open

from ..errors import DataError, bad_input
from ..files import STATISTICS_NAME, read_whole, write_json
from ..model.modalities_transrec import MODALITIES


if TYPE_CHECKING:
    from ..model.configuration_transrec import TransRecConfig


CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
TRAINING_ARGS_NAME = "training_args.json"
ADAPTER_NAME = "adapter_config.json"
UNKNOWN_LICENCE = "unknown: check"
MAX_SMALL_FILE = 2**26  # bytes of a JSON file
MAX_CARD = 2**20
UNREADABLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError)
"""Errors, besides `ValueError`, that libraries raise on a checkpoint that is damaged or forged."""
FIRST_USER_ENCODER = "transformer"  # of checkpoints that are older than the field
STATISTICS = re.compile(r"\.(running_mean|running_var|num_batches_tracked|is_new|num_fitted|mean|axes|whitening)$")
"""Names of weights of batch norms and item maps that are not parameters."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "num_items")
PARTS = {
    **{f"item_encoder.{modality.tower}.": f"{name} tower" for name, modality in MODALITIES.items()},
    "item_encoder.item_embedding.": "item embeddings",
    "item_encoder.": "fusion",
    "": "user encoder",
}
"""Names of the parts of the model, by the beginnings of the names of their weights."""


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a small JSON file; empty if it does not exist. Raises [`DataError`]."""
    try:
        if file.stat().st_size > MAX_SMALL_FILE:
            raise ValueError(f"larger than {MAX_SMALL_FILE >> 20} MB")
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not readable as JSON ({error}). Write it again.") from error
    return values


def load_evaluation(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of `evaluation.json` in a checkpoint folder; empty if it does not exist."""
    file = Path(folder) / EVALUATION_NAME
    evaluation = read_json(file)
    towers, parent = evaluation.get("towers") or [], evaluation.get("finetuned_from") or {"name": "", "on_hub": False}
    groups = [evaluation.get(name) or {} for name in ("reports", "run", "arguments", "metadata", "results")]
    valid = all(isinstance(group, dict) for group in groups) and isinstance(towers, list)
    valid = valid and all(isinstance(report, dict) for report in groups[0].values())
    for tower in [*towers, parent] if valid else ():
        valid = valid and isinstance(tower, dict) and {"name", "on_hub"} <= tower.keys()
        valid = valid and isinstance(tower["name"], str | None)
    if not valid:
        raise DataError(f"{file}: was not written by a run. Remove it, or let a run write it again.")
    return evaluation


def save_evaluation(evaluation: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Write `evaluation.json`."""
    return write_json(Path(folder) / EVALUATION_NAME, evaluation)


def named_source(name_or_path: str) -> dict[str, Any]:
    """The name of a source in a card: a Hub id as it is, a folder without its path."""
    name_or_path = str(name_or_path)
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) is not None and not os.path.exists(name_or_path)
    return {"name": name_or_path if on_hub else Path(name_or_path).name, "on_hub": on_hub}


def describe_towers(
    config: Mapping[str, Any], licence_of: Callable[[str], str] = lambda name: UNKNOWN_LICENCE
) -> list[dict[str, Any]]:
    """
    Modality, architecture, name and licence of each tower. A tower without a name was not pre-trained.

    Args:
        config (`dict`): The fields of a [`TransRecConfig`].
        licence_of (`Callable`, *optional*): [`read_licence`], if the names in `config` were given by the user, and not
            by a stranger. Without it, no folder is read and no request is made.
    """
    towers: list[dict[str, Any]] = []
    for modality in MODALITIES.values():
        tower = config.get(modality.config) if modality.tower is not None else None
        if tower is not None:
            name = tower.get("_name_or_path")
            source: dict[str, Any] = named_source(name) if name else {"name": None, "on_hub": False}
            source["licence"] = licence_of(name) if name else None
            towers.append({"modality": modality.name, "architecture": tower["model_type"], **source})
    return towers


def towers_of_run(config: TransRecConfig) -> list[dict[str, Any]]:
    """Like [`describe_towers`], for a model in training; for a fine-tuned model, from the files of its parent."""
    parent = config._name_or_path
    if not parent:
        return describe_towers(config.to_dict(), read_licence)
    if not os.path.isdir(parent):
        parent = _folder_of_cached(parent)
    return (load_evaluation(parent).get("towers") if parent else None) or describe_towers(config.to_dict())


def _folder_of_cached(repo_id: str) -> str | None:
    try:
        return os.path.dirname(hf_hub_download(repo_id, EVALUATION_NAME))
    except (OSError, ValueError, HfHubHTTPError):
        return None


class _NoAliases(yaml.SafeLoader):
    """Refuses YAML with aliases, of which a few lines can become gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


@functools.cache
def read_licence(name_or_path: str) -> str:
    """The licence in the card of a model, from a folder, the cache or the Hub; otherwise `"unknown: check"`."""
    try:
        card = Path(name_or_path) / CARD_NAME
        if not os.path.isdir(name_or_path):
            card = Path(hf_hub_download(name_or_path, CARD_NAME))
        with open(card, encoding="utf-8") as file:
            found = re.match(r"---\s*\n(.*?)\n---", file.read(MAX_CARD), flags=re.DOTALL)
        data = yaml.load(found[1], _NoAliases) if found else {}
        licence = data.get("license_name") or data.get("license") or UNKNOWN_LICENCE
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError, HfHubHTTPError):
        return UNKNOWN_LICENCE
    return ", ".join(map(str, licence))[:100] if isinstance(licence, list) else str(licence)[:100]


def other_weights(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Names and commits of the checkpoints from which a thin checkpoint takes weights; empty if it is not thin."""
    sources = read_json(Path(folder) / "config.json").get("weights_from") or []
    return [{**named_source(source["name"]), "revision": source["revision"]} for source in sources]


def data_name(evaluation: Mapping[str, Any], statistics: Mapping[str, Any]) -> tuple[str, bool]:
    """The name of the training data, and whether it is the id of a Hub data set."""
    given = evaluation.get("metadata", {}).get("datasets")
    if given:
        return given[0], True
    if evaluation.get("data"):
        return evaluation["data"], False
    if statistics.get("domains"):
        return " and ".join(data_name({}, domain)[0] for domain in statistics["domains"]), False
    source = statistics.get("source", "catalogue")
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+) \(items\)", source)
    if hub:
        return hub[1], True
    path = Path(source)
    name = path.parent.name if path.stem in ("items", "metadata") and path.suffix else path.stem
    return ("unnamed data" if name in ("", "items", "catalogue") else name), False


def headline_report(evaluation: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split whose report a card shows (test, otherwise validation, otherwise another one), and the report."""
    reports = evaluation.get("reports", {})
    for split in ("test", "validation", *reports):
        if split in reports:
            return split, reports[split]
    return "", {}


def count_parameters(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Parameters of each part of a model, from the names and sizes of its weights."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, size in sizes:
        counts[next(part for prefix, part in PARTS.items() if name.startswith(prefix))] += size
    return {part: count for part, count in counts.items() if count}


def facts_of(folder: Path, config: Mapping[str, Any], parameters: Mapping[str, int]) -> dict[str, Any]:
    """
    The facts about a checkpoint: `modalities`, `towers`, the checkpoints that hold other weights (`elsewhere`),
    `sizes`, `parameters`, `data`, `metrics` with `intervals`, and the `split` and `protocol` of these metrics. Fit for
    JSON.

    Args:
        folder (`Path`): The checkpoint.
        config (`dict`): The fields of its [`TransRecConfig`].
        parameters (`dict[str, int]`): See [`count_parameters`].

    Raises:
        [`DataError`]: If one of its files is damaged.
    """
    evaluation, statistics = load_evaluation(folder), read_json(folder / STATISTICS_NAME)
    split, report = headline_report(evaluation)
    counts = ("num_items", "num_users", "num_interactions", "items_with")
    return {
        "adapter": read_json(folder / ADAPTER_NAME).get("peft_type"),
        "modalities": [name for name, modality in MODALITIES.items() if config.get(modality.config) is not None],
        "towers": evaluation.get("towers") or describe_towers(config),
        "elsewhere": other_weights(folder),
        "user_encoder": config.get("user_encoder", FIRST_USER_ENCODER),
        "objective": config["objective"],
        "sizes": {name: config[name] for name in SIZES if config.get(name) is not None},
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


def look(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    The facts about a complete checkpoint, see [`facts_of`], from its small files and the headers of its weights;
    `None` for any other checkpoint, which [`describe_checkpoint`] reads.

    Raises:
        [`DataError`]: If one of its files is damaged.
    """
    place = Path(folder)

    def read() -> dict[str, Any] | None:
        config = read_json(place / "config.json")
        sizes = list(_sizes_of_weights(place)) if _is_plain(config) else []
        return facts_of(place, config, count_parameters(sizes)) if sizes else None

    with bad_input(f"{folder}: not what a run writes", *UNREADABLE):
        return read_whole(place, read)


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration can be shown as they are, and all weights are in the folder."""
    names = [config.get("model_type"), config.get("objective"), config.get("user_encoder", FIRST_USER_ENCODER)]
    towers = [config.get(modality.config) for modality in MODALITIES.values() if modality.tower is not None]
    names += [tower.get("model_type") if isinstance(tower, dict) else None for tower in towers if tower is not None]
    is_named = all(isinstance(name, str) and re.fullmatch(r"[\w-]+", name, re.ASCII) for name in names)
    is_sized = all(isinstance(config.get(name, 0), int) for name in SIZES if name != "num_items" or config.get(name))
    is_whole = not any(config.get(name) for name in ("weights_from", "bottleneck", "side"))
    return is_whole and is_named and is_sized and names[0] == "transrec"


def _sizes_of_weights(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size of each parameter in the files of weights; buffers are left out."""
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():
                if not STATISTICS.search(name):
                    yield name, math.prod(weights.get_slice(name).get_shape())
