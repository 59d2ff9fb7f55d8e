"""Checkpoint folders: reading and writing them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from ..data.catalogue import Catalogue
from ..data.statistics import save_statistics
from ..errors import DataError, bad_input, hub_errors
from ..files import PARTIAL, read_whole, recover, written_whole
from ..items.codes import check_quantizer, quantizer_of_start
from ..model.configuration_transrec import MAX_SIDE, TransRecConfig
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .facts import (
    ADAPTER_NAME,
    EVALUATION_NAME,
    UNREADABLE,
    count_parameters,
    read_json,
)


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
MAX_SECONDS = 600  # most seconds of a sound


def parameter_counts(config: TransRecConfig) -> dict[str, int]:
    """Parameters of each part of the model, counted without making weights."""
    with torch.device("meta"):
        model = TransRecModel(config)
    return count_parameters((name, parameter.numel()) for name, parameter in model.named_parameters())


def read_config(folder: str | os.PathLike, local: bool = True) -> TransRecConfig:
    """
    The configuration of a checkpoint; for an adapter, that of its base.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        local (`bool`, *optional*, defaults to `True`): Whether the base of an adapter is looked for on this machine
            only.

    Raises:
        [`DataError`]: If there is none, or it is damaged.
    """
    place = Path(folder)
    source: Any = place
    if not place.is_dir():
        raise DataError(f"{folder}: no such folder (now in {os.getcwd()}). Check the path.")
    recover(place)
    if not (place / "config.json").is_file():
        source = read_json(place / ADAPTER_NAME).get("base_model_name_or_path")
        if not source:
            raise DataError(f"{folder}: there is no config.json here. Give the folder of a checkpoint.")
    elif (kind := read_json(place / "config.json").get("model_type")) != TransRecConfig.model_type:
        raise DataError(
            f"{folder}: is a checkpoint of {kind!r}, not of {TransRecConfig.model_type!r}. Give another folder."
        )
    with bad_input(f"{folder}: not a checkpoint that can be read", *UNREADABLE):
        return TransRecConfig.from_pretrained(source, local_files_only=local)


ITEM_VECTORS = "item_encoder.item_embedding.weight"


def check_place(name_or_path: str) -> None:
    """Raise [`DataError`] if a name is neither a folder nor can be the id of a Hub repository."""
    if not os.path.isdir(name_or_path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path):
        raise DataError(f"{name_or_path}: no such folder (now in {os.getcwd()}). Check the path.")


def load_checkpoint(checkpoint: str, **overrides: Any) -> tuple[TransRecModel, TransRecProcessor | None]:
    """
    Load a model and its processor (the ID baseline has none). Weights are read from safetensors only, and code in a
    checkpoint is not run.

    Args:
        checkpoint (`str`): Folder or Hub id.
        overrides: Fields of [`TransRecConfig`] to change, e.g. `objective`, as long as the weights still fit.

    Raises:
        [`DataError`]: If there is no checkpoint, it is not that of a TransRec model, one of its files is damaged, or
            its weights do not fit its configuration.
        [`HubError`]: If it cannot be downloaded from the Hub.
    """
    check_place(checkpoint)
    from_hub = nullcontext() if os.path.isdir(checkpoint) else hub_errors(checkpoint)
    with bad_input(f"{checkpoint}: not a checkpoint that can be read", *UNREADABLE), from_hub:
        return read_whole(checkpoint, lambda: load_model_and_processor(checkpoint, {}, **overrides))


def load_model_and_processor(
    checkpoint: str | os.PathLike, place: Mapping[str, Any], **overrides: Any
) -> tuple[TransRecModel, TransRecProcessor | None]:
    """
    Like [`load_checkpoint`], but errors of libraries are not translated. An adapter is put on its base.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder or Hub id.
        place (`dict`): `revision`, `token` and other keywords that say where the checkpoint is; and
            `trust_remote_code`, if its tokenizer may run its own code.
        overrides: Fields of [`TransRecConfig`].
    """
    place = dict(place)
    trusted = place.pop("trust_remote_code", False)
    folder = Path(checkpoint, place.get("subfolder", "")) if os.path.isdir(checkpoint) else None
    if folder is not None:
        check_weights(folder)
    adapter = cached_file(checkpoint, ADAPTER_NAME, _raise_exceptions_for_missing_entries=False, **place)
    base = read_json(Path(adapter)).get("base_model_name_or_path") if adapter else None
    if base and os.path.isdir(base):
        check_weights(Path(base))
    fields, _ = PreTrainedConfig.get_config_dict(base or checkpoint, **({} if base else place))
    if fields.get("model_type") != TransRecConfig.model_type:
        raise DataError(
            f"{checkpoint}: is a checkpoint of architecture {fields.get('model_type')!r}, not 'transrec'. Pass a text "
            "or vision encoder as --text_model or --vision_model; a recommender is made by `transrec pretrain`."
        )
    if base:
        beside = cached_file(checkpoint, EVALUATION_NAME, _raise_exceptions_for_missing_entries=False, **place)
        fields["catalogue_shift"] = read_json(Path(beside)).get("catalogue_shift", 0) if beside else 0
    config = TransRecConfig.from_dict({**fields, **overrides})
    if folder is not None and not base:
        check_room(TransRecConfig.from_dict(fields), folder)
    with _without_load_report():
        model, found = TransRecModel.from_pretrained(
            checkpoint,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            **place,
        )
    if fields.get("num_items") is None and ITEM_VECTORS in found["missing_keys"]:  # it is loaded as a hybrid
        torch.nn.init.zeros_(model.get_parameter(ITEM_VECTORS))
        found["missing_keys"].remove(ITEM_VECTORS)
    problems = {"missing": "missing_keys", "unknown": "unexpected_keys", "of another shape": "mismatched_keys"}
    wrong = {
        problem: sorted(key if isinstance(key, str) else key[0] for key in found[keys])
        for problem, keys in problems.items()
        if found[keys]
    }
    if wrong:
        parts = "; ".join(f"{keys[0]} ({len(keys)} in all) is {problem}" for problem, keys in wrong.items())
        changed = f" as changed by {', '.join(overrides)}" if overrides else ""
        raise DataError(f"{checkpoint}: the weights do not fit config.json{changed}: {parts}. Undo the change.")
    if not config.modalities:
        return model, None
    processor = TransRecProcessor.from_pretrained(checkpoint, trust_remote_code=trusted, **place)
    check_processor(processor)
    return model, processor


def check_room(config: TransRecConfig, folder: Path) -> None:
    """
    Raise [`DataError`] if a configuration needs more weights than the files can hold in any dtype, before memory is
    taken for them.
    """
    widths: dict[str, Any] = {"config.json": config}
    if not config.weights_from:  # a thin checkpoint does not hold its towers
        widths |= {name: getattr(config, name) for name in config.sub_configs_defaults}
    room = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for name, part in widths.items():
        width = getattr(part, "hidden_size", 0)
        layers = (config.num_hidden_layers if config.user_encoder != "mean" else 0) if part is config else 1
        rows = sum(getattr(part, of, 0) or 0 for of in ("num_items", "vocab_size"))
        weights = width * (layers * width + rows) if isinstance(width, int) else 0
        if weights > max(2 * room, 2**24):  # 4 bits each; small models do no harm, and are compared later
            raise DataError(
                f"{folder}: the weights do not fit {name}, which needs at least {weights:,} of them; their files have "
                f"{room:,} bytes. Undo the change of {name}."
            )


def check_processor(processor: TransRecProcessor) -> None:
    """Raise [`DataError`] if a processor would make images or sounds so large that they fill the memory."""
    seconds = processor.form("audio")["seconds"] if "audio" in processor.modalities else 1
    if not (0 < seconds <= MAX_SECONDS):
        raise DataError(
            f"feature extractor: it reads {seconds:,} seconds of every sound, and at most {MAX_SECONDS:,} are "
            "allowed. Correct processor_config.json."
        )
    settings = processor.image_processor.to_dict() if processor.image_processor is not None else {}
    for name in ("size", "crop_size", "pad_size"):
        size = settings.get(name)
        for side in size.values() if isinstance(size, dict) else [size]:
            if isinstance(side, int | float) and not (0 < side <= MAX_SIDE):
                raise DataError(
                    f"image processor: {name} makes images of {side:,} pixels a side, and at most {MAX_SIDE:,} are "
                    "allowed. Correct preprocessor_config.json or processor_config.json."
                )


def check_weights(folder: Path) -> None:
    """
    Raise [`DataError`] if weights are pickled, missing, or in files outside of their folder.
    """
    if not (folder / "config.json").is_file() and not (folder / ADAPTER_NAME).is_file():
        newest = next(reversed(checkpoints_of(folder)), None)
        mend = f"Use {newest}, or let the run finish with --resume." if newest else "Check the path."
        raise DataError(f"{folder}: there is no model in this folder (no config.json). {mend}")
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
        if pickled:
            raise DataError(
                f"{folder}: its weights are pickled ({pickled[0]}), and reading a pickle can run code. If you trust "
                "them, convert them: torch.load, then safetensors.torch.save_file to model.safetensors."
            )
        raise DataError(f"{folder}: there are no weights in this folder (no model.safetensors). Download it again.")
    for index in folder.glob("*.safetensors.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any(
            not isinstance(shard, str) or shard != os.path.basename(shard) or shard not in names
            for shard in shards.values()
        ):
            raise DataError(f"{index}: names files that are not in its folder. Download the checkpoint again.")


@contextmanager
def _without_load_report() -> Iterator[None]:
    """A context without the logged table of keys that do not fit, since the error names them."""
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
            f"{model.config.features_size}. Use the encoder of its training, or train with features_size {size}."
        )
    if "codes" in model.config.modalities and "codes" in catalogue.contents:
        codes: Any = catalogue.contents["codes"]
        catalogue.check_codes(model.config.num_codebooks or 0, model.config.codebook_size)
        check_quantizer(model.config.quantizer_hash, codes.quantizer)
        quantizer_of_start(model, catalogue)
    if model.config.num_items not in (None, len(catalogue)):
        raise DataError(
            f"{catalogue.source}: has {len(catalogue)} items, but this ID baseline knows {model.config.num_items} and "
            "cannot leave the catalogue of its training. Give that catalogue (and its k_core), or a content model."
        )


def save_checkpoint(
    folder: str | os.PathLike,
    model: TransRecModel,
    processor: TransRecProcessor | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """
    Write a model, its processor and the statistics of its data: all of them, or nothing.

    Args:
        folder (`str` or `os.PathLike`): Output folder; see [`written_whole`].
        model ([`TransRecModel`]): The model.
        processor ([`TransRecProcessor`], *optional*): The processor of the model; the ID baseline has none.
        statistics (`dict`, *optional*): See [`data_statistics`].

    Raises:
        `OSError`: If a file cannot be written, for example on a full disk.
    """
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        if statistics is not None:
            save_statistics(statistics, partial)


def steps_of(checkpoint: str | os.PathLike) -> int:
    """The step in the name of a folder `checkpoint-STEP`."""
    return int(str(checkpoint).rpartition("-")[2])


def checkpoints_of(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, ordered by step and not by time."""
    folders = (path for path in Path(run_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in folders if path.is_dir()), key=steps_of)


def remove_old_checkpoints(run_dir: str | os.PathLike, limit: int | None, current: int, best: str | None) -> None:
    """
    Delete the checkpoints of a run with the fewest steps until `limit` are left. The newest and the best one stay, and
    so do checkpoints of more than the `current` steps, which belong to another run.
    """
    found = [path for path in checkpoints_of(run_dir) if steps_of(path) <= current]
    kept = [path for path in found if best is not None and path.resolve() == Path(best).resolve()]
    kept += [path for path in reversed(found) if path not in kept]
    kept = sorted(kept, key=lambda path: path != found[-1])  # so that the newest one is deleted last
    for path in kept[max(limit, 2 if best else 1) :] if limit else ():
        trash = path.with_name(f"{PARTIAL}{path.name}-{os.urandom(6).hex()}")
        path.rename(trash)  # so that a killed process does not leave half a checkpoint
        shutil.rmtree(trash, ignore_errors=True)
