"""A model without its towers, for histories of items whose vectors are in an index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from ..model.configuration_transrec import TransRecConfig
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.towers_transrec import build_tower
from ..publishing.checkpoint import check_processor, check_room, check_weights
from ..publishing.facts import ADAPTER_NAME
from .index import encoder_hash, is_made_by


def load_without_towers(
    checkpoint: str | os.PathLike, place: Mapping[str, Any], made_by: str
) -> tuple[TransRecModel, TransRecProcessor] | None:
    """
    A model whose towers are on the device "meta", and its processor. The weights of the towers are read once for their
    hash, and not kept. The result is `None` if the checkpoint is not a single file of fp32 weights (adapters, shards
    and thin checkpoints, for example); such a checkpoint is loaded as a whole, which also reports its errors.

    Args:
        checkpoint (`str`): Folder or Hub id.
        place (`dict`): `revision`, `token` and other keywords that say where the checkpoint is; and
            `trust_remote_code`.
        made_by (`str`): The [`encoder_hash`] of the index. If the model has another hash, the result is `None`.
    """
    place = dict(place)
    trusted = place.pop("trust_remote_code", False)
    found = {
        name: cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **place)
        for name in ("config.json", SAFE_WEIGHTS_NAME, ADAPTER_NAME)
    }
    if found[ADAPTER_NAME] or not (found["config.json"] and found[SAFE_WEIGHTS_NAME]):
        return None
    fields, _ = PreTrainedConfig.get_config_dict(checkpoint, **place)
    if fields.get("model_type") != TransRecConfig.model_type or fields.get("quantization_config"):
        return None
    config = TransRecConfig.from_dict(fields)
    if not config.modalities or config.weights_from or config.bottleneck or config.dtype not in (None, torch.float32):
        return None
    if os.path.isdir(checkpoint):
        folder = Path(checkpoint, place.get("subfolder", ""))
        check_weights(folder)
        check_room(config, folder)
    modalities = [MODALITIES[name] for name in config.modalities]
    with torch.device("meta"):
        towers = {of.tower: build_tower(getattr(config, of.config)) for of in modalities if of.tower is not None}
    model = TransRecModel(config, **towers).eval()
    of_towers = tuple(f"item_encoder.{name}." for name in towers)
    with safe_open(found[SAFE_WEIGHTS_NAME], framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # mapped, not read
    kept = {name: value.clone() for name, value in weights.items() if not name.startswith(of_towers)}
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(of_towers)}
    if any(name not in kept or kept[name].dtype != value.dtype for name, value in own.items()) or len(kept) != len(
        own
    ):
        return None
    if any(kept[name].shape != value.shape for name, value in own.items()):
        return None
    model.load_state_dict(kept, strict=False, assign=True)
    processor = TransRecProcessor.from_pretrained(checkpoint, trust_remote_code=trusted, **place)
    check_processor(processor)
    if model.item_encoder.positions is not None:
        processor.max_text_length = min(processor.max_text_length, model.item_encoder.positions)
    start = "item_encoder."
    encoder = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
    return (model, processor) if is_made_by(made_by, encoder_hash(model, processor, weights=encoder)) else None
