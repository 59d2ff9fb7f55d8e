"""The vectors of a catalogue, their ids and what they were made from, in one file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from ..errors import DataError, one_line
from ..files import whole_file
from ..items.fingerprints import adapter_settings, tower_settings
from ..model.item_encoder_transrec import WhitenedProjection
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor


INDEX_NAME = "item_index.safetensors"
IDS_NAME = "item_index.json"
"""The ids of an index of format 1, which had them in a file of their own."""
FORMAT = 2


def encoder_hash(model: TransRecModel, processor: TransRecProcessor | None, index_format: int = FORMAT) -> str:
    """
    SHA-256 over all that item vectors depend on besides the items: weights and their dtype, settings of the towers,
    pooling and projections, the adapters in use, and the preprocessing.

    Args:
        model ([`TransRecModel`]): The model.
        processor ([`TransRecProcessor`], *optional*): Of the model; the ID baseline has none.
        index_format (`int`, *optional*): Of the index that the hash is compared with; 1 knew of weights, pooling and
            preprocessing alone.
    """
    config, encoder = model.config, model.item_encoder
    settings: list[Any] = [config.text_pooling]
    if index_format > 1:
        settings += [tower_settings(tower) for tower in encoder.towers.values()] + adapter_settings(encoder)
        settings.append(config.num_attention_heads if config.text_pooling == "attention" else None)
        settings.append(config.hidden_act if config.projection_hidden_size is not None else None)
        settings += [config.item_map, config.similarity, config.content_prior]
    settings += [processor.fingerprint(modality) for modality in processor.modalities] if processor else []
    digest = hashlib.sha256(json.dumps(settings).encode())
    of_catalogue = {  # made from the items, of which the hash knows nothing
        f"{name}.{statistic}"
        for name, module in encoder.named_modules()
        if isinstance(module, WhitenedProjection)
        for statistic in module.statistics
    }
    values = [value for name, value in encoder.state_dict().items() if name not in of_catalogue]
    for value in values:  # without the names, which change between libraries' versions
        if not isinstance(value, torch.Tensor):  # of a quantised layer
            digest.update(repr(value).encode())
            continue
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        value = value.dequantize() if value.is_quantized else value
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class ItemIndex:
    """
    The vectors of a catalogue, and what they were made from.

    Args:
        item_ids (`np.ndarray` of shape `(n_items,)`): Ids, in catalogue order.
        item_embeds (`torch.Tensor` of shape `(n_items, hidden_size)`): Item vectors, fp32.
        item_modalities (`torch.Tensor` of shape `(n_items, n_modalities)`, *optional*): Which of them the model read.
        catalogue_hash (`str`): See [`Catalogue.content_hash`].
        encoder_hash (`str`): See [`encoder_hash`].
        format (`int`, *optional*): Of the file that it came from.

    Raises:
        [`DataError`]: If ids and vectors do not belong together, or one of them is none.
    """

    item_ids: np.ndarray
    item_embeds: torch.Tensor
    item_modalities: torch.Tensor | None
    catalogue_hash: str
    encoder_hash: str
    format: int = FORMAT

    def __post_init__(self) -> None:
        ids, embeds, modalities = self.item_ids, self.item_embeds, self.item_modalities
        wrong = None
        if ids.ndim != 1 or ids.dtype.kind not in "UTO" or not len(ids) or embeds.ndim != 2:
            wrong = "it holds no list of ids with a vector each"
        elif len(ids) != len(embeds) or (modalities is not None and len(modalities) != len(ids)):
            wrong = f"{len(ids)} ids, but {len(embeds)} vectors"
        elif len(unique := np.unique(ids)) != len(ids):
            wrong = f"only {len(unique)} of {len(ids)} ids differ"
        elif not embeds.is_floating_point() or not (finite := embeds.isfinite().all(dim=1)).all():
            row = int((~finite).nonzero()[0]) if embeds.is_floating_point() else 0
            wrong = f"the vector of item {ids[row]!r} (row {row + 1}) is not finite"
        elif modalities is not None and (modalities.dtype != torch.bool or modalities.ndim != 2):
            wrong = "what was read of each item is not told by true and false"
        if wrong:
            raise DataError(f"item index: {wrong}. Make it again: `Recommender(model, source)`.")

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_index.safetensors`: vectors, ids and hashes in one file, which is old or new as a whole."""
        tensors = {
            "item_embeds": self.item_embeds.contiguous().cpu(),
            "item_ids": torch.frombuffer(bytearray(json.dumps(self.item_ids.tolist()), "utf-8"), dtype=torch.uint8),
        }
        if self.item_modalities is not None:
            tensors["item_modalities"] = self.item_modalities.contiguous().cpu()
        made_from = {"catalogue_hash": self.catalogue_hash, "encoder_hash": self.encoder_hash, "format": str(FORMAT)}
        with whole_file(Path(folder) / INDEX_NAME) as partial:
            save_file(tensors, partial, {**made_from, "contents_hash": _contents_hash(tensors)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ItemIndex | None:
        """
        The index in a folder or a repository of the Hub, `None` if there is none.

        Raises:
            [`DataError`]: If it is damaged, or its parts do not belong together.
        """
        kwargs["_raise_exceptions_for_missing_entries"] = False
        file = cached_file(pretrained_model_name_or_path, INDEX_NAME, **kwargs)
        if file is None:
            return None
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}
                made_from = content.metadata() or {}
            index_format = int(made_from.get("format", 1))
            if index_format > FORMAT:
                raise ValueError(f"format {index_format}, and this version of transrec-hf reads up to {FORMAT}")
            if index_format > 1:
                if made_from["contents_hash"] != _contents_hash(tensors):
                    raise ValueError("its contents have changed since it was written")
                ids = json.loads(tensors["item_ids"].numpy().tobytes())
                beside = Path(pretrained_model_name_or_path, kwargs.get("subfolder", ""), IDS_NAME)
                if beside.is_file() and json.loads(beside.read_text(encoding="utf-8")) != ids:
                    raise ValueError(f"{beside} has other ids: delete it")  # of an index that was there before
            else:
                ids_file = cached_file(pretrained_model_name_or_path, IDS_NAME, **kwargs)
                if ids_file is None:
                    return None
                ids = json.loads(Path(ids_file).read_text(encoding="utf-8"))
            if not isinstance(ids, list) or not all(isinstance(item_id, str) for item_id in ids):
                raise ValueError("its ids are not a list of strings")
            hashes = (made_from["catalogue_hash"], made_from["encoder_hash"])
            return cls(np.array(ids), tensors["item_embeds"], tensors.get("item_modalities"), *hashes, index_format)
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            raise DataError(
                f"{pretrained_model_name_or_path}: {INDEX_NAME} cannot be used ({one_line(error)})"
            ) from error

    def belongs_to(self, model: TransRecModel, processor: TransRecProcessor | None) -> bool:
        """Whether the vectors are those that the model makes."""
        width = model.config.hidden_size + model.config.popularity_prior  # with what scores add for popularity
        own = encoder_hash(model, processor, self.format)
        return self.item_embeds.shape[1] == width and self.encoder_hash == own


def _contents_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
