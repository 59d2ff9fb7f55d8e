"""The vectors of a catalogue and what they were made from, in files."""

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

from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor


INDEX_NAME = "item_index.safetensors"
INDEX_IDS_NAME = "item_index.json"


def encoder_hash(model: TransRecModel, processor: TransRecProcessor | None) -> str:
    """SHA-256 over all that item vectors depend on besides the items: weights, their dtype, and the preprocessing."""
    settings = [
        model.config.text_pooling,
        *((processor.fingerprint(m) for m in processor.modalities) if processor else ()),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for (
        tensor
    ) in model.item_encoder.state_dict().values():  # without the names, which change between libraries' versions
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class ItemIndex:
    """
    The vectors of a catalogue, and what they were made from.

    Args:
        item_ids (`np.ndarray` of shape `(n_items,)`): ids, in catalogue order.
        item_embeds (`torch.Tensor` of shape `(n_items, hidden_size)`): item vectors, fp32.
        item_modalities (`torch.Tensor` of shape `(n_items, 2)`, *optional*): which of text and image the model read.
        catalogue_hash (`str`): see [`Catalogue.content_hash`].
        encoder_hash (`str`): see [`encoder_hash`].
    """

    item_ids: np.ndarray
    item_embeds: torch.Tensor
    item_modalities: torch.Tensor | None
    catalogue_hash: str
    encoder_hash: str

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_index.safetensors` and `item_index.json`, the ids."""
        tensors = {"item_embeds": self.item_embeds.contiguous()}
        if self.item_modalities is not None:
            tensors["item_modalities"] = self.item_modalities
        made_from = {"catalogue_hash": self.catalogue_hash, "encoder_hash": self.encoder_hash}
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, Path(folder) / INDEX_NAME, made_from)
        (Path(folder) / INDEX_IDS_NAME).write_text(json.dumps(self.item_ids.tolist()), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ItemIndex | None:
        """The index in a folder or a repository of the Hub, `None` if there is none."""
        files = [
            cached_file(pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **kwargs)
            for name in (INDEX_NAME, INDEX_IDS_NAME)
        ]
        if None in files:
            return None
        with safe_open(files[0], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            made_from = file.metadata()
        item_ids = np.array(json.loads(Path(files[1]).read_text(encoding="utf-8")))
        return cls(item_ids, tensors["item_embeds"], tensors.get("item_modalities"), **made_from)
