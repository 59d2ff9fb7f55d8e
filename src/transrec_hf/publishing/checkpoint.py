"""Checkpoint folders: reading and writing them whole, and the small JSON files in them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.statistics import save_statistics
from ..errors import DataError, bad_input, one_line
from ..model.configuration_transrec import TransRecConfig
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor


CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
TRAINING_ARGS_NAME = "training_args.json"
UNKNOWN_LICENCE = "unknown: check"


def load_evaluation(folder: str | os.PathLike) -> dict[str, Any]:
    """What `evaluation.json` of a checkpoint folder holds; empty if there is none."""
    return _read_json(Path(folder) / EVALUATION_NAME)


def save_evaluation(evaluation: Mapping[str, Any], folder: str | os.PathLike) -> Path:
    """Writes `evaluation.json`."""
    file = Path(folder) / EVALUATION_NAME
    file.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{file}: not readable as JSON ({error}). Write it again.") from error


def named_source(name_or_path: str) -> dict[str, Any]:
    """How a card names where something came from: a Hub id as it is, a folder without the way to it."""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) is not None and not os.path.exists(name_or_path)
    return {"name": name_or_path if on_hub else Path(name_or_path).name, "on_hub": on_hub}


def describe_towers(config: TransRecConfig) -> list[dict[str, Any]]:
    """Modality, architecture, name and licence of each tower; a tower without a name had no pre-trained weights."""
    towers: list[dict[str, Any]] = []
    for modality in (MODALITIES[name] for name in config.modalities):
        if modality.tower is not None:
            tower = getattr(config, modality.config)
            name = tower._name_or_path
            source = named_source(name) if name else {"name": None, "on_hub": False}
            licence = read_licence(name) if name else None
            towers.append({"modality": modality.name, "architecture": tower.model_type, **source, "licence": licence})
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
        **{f"item_encoder.{modality.tower}.": f"{name} tower" for name, modality in MODALITIES.items()},
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


PARTIAL_NAME = ".partial"
"""Folder inside of the destination that holds what is not yet written whole."""


def check_place(name_or_path: str) -> None:
    """Refuse what is neither a folder nor can be the id of a Hub repository. Raises [`DataError`]."""
    if not os.path.isdir(name_or_path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path):
        raise DataError(f"{name_or_path}: no such folder (now in {os.getcwd()}). Check the path.")


def load_checkpoint(checkpoint: str, **overrides: Any) -> tuple[TransRecModel, TransRecProcessor | None]:
    """
    A model and its processor, which the ID baseline lacks.

    Args:
        checkpoint (`str`): folder or Hub id.
        overrides: fields of [`TransRecConfig`] to set otherwise, as long as the weights still fit, e.g. `objective`.

    Raises:
        [`DataError`]: if there is no checkpoint, it is none of a TransRec model, a file of it is damaged, or its
            weights and its configuration do not fit.
    """
    check_place(checkpoint)
    if os.path.isdir(checkpoint) and not os.path.isfile(os.path.join(checkpoint, "config.json")):
        newest = get_last_checkpoint(checkpoint)
        mend = f"Take {newest}, or let the run finish with --resume." if newest else "Check the path."
        raise DataError(f"{checkpoint}: there is no model in this folder (no config.json). {mend}")
    with bad_input(f"{checkpoint}: not a checkpoint that can be read"):
        fields, _ = PreTrainedConfig.get_config_dict(checkpoint)
    if fields.get("model_type") != TransRecConfig.model_type:
        raise DataError(
            f"{checkpoint}: a checkpoint of architecture {fields.get('model_type')!r}, not 'transrec'. A text or "
            "vision encoder goes to --text_model or --vision_model; a recommender is what pretrain.py writes."
        )
    with bad_input(f"{checkpoint}: not a checkpoint that can be read"), _without_load_report():
        config = TransRecConfig.from_dict({**fields, **overrides})
        model, found = TransRecModel.from_pretrained(
            checkpoint, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor = TransRecProcessor.from_pretrained(checkpoint) if config.modalities else None
    problems = {"missing": "missing_keys", "unknown": "unexpected_keys", "of another shape": "mismatched_keys"}
    wrong = {
        problem: sorted(key if isinstance(key, str) else key[0] for key in found[keys])
        for problem, keys in problems.items()
        if found[keys]
    }
    if wrong:
        parts = "; ".join(f"{problem}: {keys[0]} ({len(keys)} in all)" for problem, keys in wrong.items())
        changed = f" as changed by {', '.join(overrides)}" if overrides else ""
        raise DataError(f"{checkpoint}: the weights do not fit config.json{changed}. {parts}. Undo what differs.")
    return model, processor


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Without the table of keys that do not fit: the error names them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_fits(model: TransRecModel, catalogue: Catalogue) -> None:
    """Raises [`DataError`] if the model cannot represent every item of the catalogue."""
    catalogue.require(model.config.modalities)
    size = getattr(catalogue.contents.get("features"), "size", 0)
    if size and model.config.features_size not in (None, size):
        raise DataError(
            f"{catalogue.source}: the vectors in features have {size} numbers, but this model reads vectors of "
            f"{model.config.features_size}. Make them as for its training, or train one with features_size {size}."
        )
    if model.config.num_items not in (None, len(catalogue)):
        raise DataError(
            f"{catalogue.source}: {len(catalogue)} items, but this ID baseline knows {model.config.num_items} and "
            "cannot leave the catalogue that it was trained on. Give that one (and its k_core), or a content model."
        )


@contextmanager
def written_whole(folder: str | os.PathLike, writes: bool = True) -> Iterator[Path]:
    """
    A temporary folder whose files appear in `folder` together at the end of the block, or not at all if it fails.

    Args:
        folder (`str` or `os.PathLike`): where the files go; what is there already stays, if it has another name.
        writes (`bool`, *optional*, defaults to `True`): false on the processes that do not write.

    Raises:
        `OSError`: if something cannot be written; then nothing is left of it.
    """
    folder = Path(folder)
    partial = folder / PARTIAL_NAME
    if not writes:
        yield partial
        return
    is_new = not folder.exists()
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        _move(partial, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder}: could not be written, nothing of it was kept ({one_line(error)}). "
            "Make room, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty


def _move(source: Path, target: Path) -> None:
    """Move the files, `config.json` last: without it, a folder is no checkpoint."""
    files = sorted(source.iterdir(), key=lambda file: file.name == "config.json")
    names = {file.name for file in files}
    if any(name.startswith("model") for name in names):
        for old in target.glob("model*.safetensors*"):  # shards of another number, say
            if old.name not in names:
                old.unlink()
    for file in files:
        file.replace(target / file.name)


def save_checkpoint(
    folder: str | os.PathLike,
    model: TransRecModel,
    processor: TransRecProcessor | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """
    Write a model, its processor and the statistics of its data, all of them or none.

    Args:
        folder (`str` or `os.PathLike`): where to; see [`written_whole`].
        model ([`TransRecModel`]): the model.
        processor ([`TransRecProcessor`], *optional*): of the model; the ID baseline has none.
        statistics (`dict`, *optional*): see [`data_statistics`].

    Raises:
        `OSError`: if something cannot be written, as on a full disk.
    """
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        if statistics is not None:
            save_statistics(statistics, partial)
