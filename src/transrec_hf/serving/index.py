"""The vectors of a catalogue, with ids, columns and the hashes of their origin, in one memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from transformers.utils import cached_file

from ..errors import DataError, one_line
from ..files import whole_file
from ..items.fingerprints import adapter_settings, hash_weight, tower_settings
from ..model.item_encoder_transrec import WhitenedProjection
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .search import Scan


INDEX_NAME = "item_index.safetensors"
IDS_NAME = "item_index.json"
"""The file of the ids of an index of format 1."""
FORMAT = 3
MAX_LENGTH = 2.0**60  # of a vector, so that the product of two fits into fp32
MAX_CHECKED = 2**28  # up to so many bytes, vectors are checked whenever they are read; larger ones only by `verify`


def encoder_hash(
    model: TransRecModel,
    processor: TransRecProcessor | None,
    index_format: int = FORMAT,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """
    SHA-256 over everything that item vectors depend on, except the items: weights and their dtype, settings of the
    towers, pooling and projections, the adapters in use, and the preprocessing. A hash of the axes of each whitened
    item map that has met a catalogue follows. A map that has not met one may take the axes of an index.

    Args:
        model ([`TransRecModel`]): The model.
        processor ([`TransRecProcessor`], *optional*): The processor of the model; the ID baseline has none.
        index_format (`int`, *optional*): The format of the index that the hash is compared with; the hash of format 1
            covered only weights, pooling and preprocessing.
        weights (`dict[str, Tensor]`, *optional*): The weights of the item encoder, if the model itself lacks some.
    """
    config, encoder = model.config, model.item_encoder
    settings: list[Any] = [config.text_pooling]
    if index_format > 1:
        settings += [tower_settings(tower) for tower in encoder.towers.values()] + adapter_settings(encoder)
        has_heads = "attention" in (config.text_pooling, config.window_pooling)
        settings.append(config.num_attention_heads if has_heads else None)
        settings.append(config.hidden_act if config.projection_hidden_size is not None else None)
        settings += [config.item_map, config.similarity, config.content_prior]
        settings += [json.dumps(config.side, sort_keys=True)] if config.side else []
    settings += [processor.fingerprint(modality) for modality in processor.modalities] if processor else []
    digest = hashlib.sha256(json.dumps(settings).encode())
    whitened = {name: of for name, of in encoder.named_modules() if isinstance(of, WhitenedProjection)}
    of_catalogue = {f"{name}.{statistic}" for name, of in whitened.items() for statistic in of.statistics}
    axes = {f"{name}.axes" for name in whitened} if index_format > 2 else set()
    state = encoder.state_dict() if weights is None else weights
    values = [value for name, value in state.items() if name not in of_catalogue | axes]
    if index_format < 3:
        for value in values:
            hash_weight(digest, value)
        return digest.hexdigest()
    digests = []
    for value in values:  # without their names, which differ between versions of libraries and in files
        hash_weight(of_value := hashlib.sha256(), value)
        digests.append(of_value.digest())
    digest.update(b"".join(sorted(digests)))
    parts = [digest.hexdigest()]
    for name in sorted(whitened):
        if state[f"{name}.num_fitted"]:
            hash_weight(of_axes := hashlib.sha256(name.encode()), state[f"{name}.axes"])
            parts.append(of_axes.hexdigest())
    return "-".join(parts)


def is_made_by(made_by: str, own: str) -> bool:
    """Whether an index with the [`encoder_hash`] `made_by` was made by the model with the hash `own`."""
    return set(own.split("-")) <= set(made_by.split("-"))


def read_encoder_hash(folder: str | os.PathLike) -> str | None:
    """The [`encoder_hash`] of the index in a folder; `None` without an index of this format."""
    try:
        with safe_open(Path(folder) / INDEX_NAME, framework="pt") as content:
            made_from = content.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return made_from.get("encoder_hash") if made_from.get("format") == str(FORMAT) else None


def check_beside(file: Path, ids: Any) -> None:
    """Raises `ValueError` if beside an index there is an ids file of format 1 with other ids."""
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != list(ids):
        raise ValueError(f"{file} is of an older index and has other ids: delete it")


@dataclass
class ItemIndex:
    """
    The vectors of a catalogue, and the hashes of the items and of the model that they were made from.

    Args:
        item_ids (`np.ndarray` of shape `(n_items,)`): Ids, in catalogue order.
        item_embeds (`torch.Tensor` of shape `(n_items, hidden_size)`): Item vectors, fp32.
        item_modalities (`torch.Tensor` of shape `(n_items, n_modalities)`, *optional*): Boolean, the modalities that
            the model read of each item.
        catalogue_hash (`str`): See [`hash_of_items`]; up to format 2, [`Catalogue.content_hash`].
        encoder_hash (`str`): See [`encoder_hash`].
        format (`int`, *optional*): Format of the file that the index was read from.
        item_hashes (`np.ndarray` of shape `(n_items, 16)`, *optional*): Hashes of the contents of each item; see
            [`Catalogue.item_hashes`].
        columns (`pa.Table`, *optional*): Further columns of the items, e.g. texts and prices, row by row.
        counts (`torch.Tensor` of shape `(n_items,)`, *optional*): How often each item occurs in the training data.
        hidden (`torch.Tensor` of shape `(n_items,)`, *optional*): Boolean, items that may occur in histories but are
            not recommended.
        statistics (`dict[str, torch.Tensor]`, *optional*): Statistics of the catalogue with which the vectors were
            whitened, and the axes.
        scan ([`Scan`], *optional*): A smaller copy of the vectors, for fast scans.
        state (`str`, *optional*): The hash of the contents of the file that the index was read from.

    Raises:
        [`DataError`]: If ids and vectors do not belong together, or are invalid.
    """

    item_ids: np.ndarray
    item_embeds: torch.Tensor
    item_modalities: torch.Tensor | None
    catalogue_hash: str
    encoder_hash: str
    format: int = FORMAT
    item_hashes: np.ndarray | None = None
    columns: pa.Table | None = None
    counts: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scan: Scan | None = None
    state: str = ""

    def __post_init__(self) -> None:
        ids, embeds = self.item_ids, self.item_embeds
        beside = [self.item_modalities, self.item_hashes, self.columns, self.counts, self.hidden, self.scan]
        wrong = None
        if ids.ndim != 1 or ids.dtype.kind not in "UTO" or not len(ids) or embeds.ndim != 2:
            wrong = "it does not hold a list of ids with one vector for each"
        elif len(ids) != len(embeds) or any(part is not None and len(part) != len(ids) for part in beside):
            wrong = f"{len(ids)} ids, but {len(embeds)} vectors"
        elif self.item_modalities is not None and (
            self.item_modalities.dtype != torch.bool or self.item_modalities.ndim != 2
        ):
            wrong = "the modalities of its items are not true or false"
        elif embeds.nbytes <= MAX_CHECKED:
            wrong = self._defect()
        if wrong:
            raise DataError(f"item index: {wrong}. Make it again: `Recommender(model, source)`.")

    def __len__(self) -> int:
        return len(self.item_ids)

    def _defect(self) -> str | None:
        """What is wrong with single ids or vectors."""
        ids, embeds = self.item_ids, self.item_embeds
        if (unique := len(set(ids.tolist()))) != len(ids):
            return f"only {unique} of {len(ids)} ids differ"
        if not embeds.is_floating_point():
            return f"its vectors hold {embeds.dtype}"
        usable = torch.linalg.vector_norm(embeds, dim=1) < MAX_LENGTH
        if not usable.all():
            row = int((~usable).nonzero()[0])
            return f"the vector of item {ids[row]!r} (row {row + 1}) is not finite, or too long for finite scores"
        return None

    def verify(self) -> None:
        """Check every id and vector, and the hash of the file that the index was read from. Raises [`DataError`]."""
        wrong = self._defect()
        if not wrong and self.state and self.format == FORMAT and _contents_hash(self._tensors()) != self.state:
            wrong = "its contents have changed since it was written"
        if wrong:
            raise DataError(f"item index: {wrong}. Make it again, or download it again.")

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the index, except the hashes of its origin."""
        ids = pa.table({"item_id": pa.array(self.item_ids, pa.string())})
        tensors = {"item_embeds": self.item_embeds, "items": _as_bytes(ids)}
        parts = {
            "item_modalities": self.item_modalities,
            "item_hashes": None if self.item_hashes is None else torch.from_numpy(self.item_hashes),
            "columns": None if self.columns is None else _as_bytes(self.columns),
            "counts": self.counts,
            "hidden": self.hidden,
        }
        if self.scan is not None:
            parts |= {f"scan.{name}": part for name, part in self.scan._asdict().items()}
        tensors |= {name: part for name, part in parts.items() if part is not None}
        tensors |= {f"statistics.{name}": value for name, value in self.statistics.items()}
        return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def save(self, folder: str | os.PathLike, columns: bool = True) -> str:
        """
        Write the index into one file, `item_index.safetensors`, which is replaced as a whole.

        Args:
            folder (`str`): Output folder.
            columns (`bool`, *optional*, defaults to `True`): Whether texts and other columns of the items are saved.

        Returns:
            `str`: The hash of the contents.
        """
        tensors = replace(self, columns=self.columns if columns else None)._tensors()
        made_from = {"catalogue_hash": self.catalogue_hash, "encoder_hash": self.encoder_hash, "format": str(FORMAT)}
        state = _contents_hash(tensors)
        with whole_file(Path(folder) / INDEX_NAME) as partial:
            save_file(tensors, partial, {**made_from, "contents_hash": state})
        return state

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ItemIndex | None:
        """
        The index in a folder or a repository of the Hub, `None` if there is none. The vectors are mapped into memory,
        and read when they are used.

        Raises:
            [`DataError`]: If the index is damaged, or its parts do not belong together. The hash of a file of more
                than `MAX_CHECKED` bytes is checked only by [`~ItemIndex.verify`].
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
                raise ValueError(
                    f"it has format {index_format}, but this version of transrec-hf reads up to {FORMAT}: update "
                    "transrec-hf"
                )
            state = made_from["contents_hash"] if index_format > 1 else ""
            is_small = os.path.getsize(file) <= MAX_CHECKED
            if index_format > 1 and (is_small or index_format == 2) and state != _contents_hash(tensors):
                raise ValueError("its contents have changed since it was written")
            hashes = (made_from["catalogue_hash"], made_from["encoder_hash"])
            beside = Path(pretrained_model_name_or_path, kwargs.get("subfolder", ""), IDS_NAME)
            if index_format > 2:
                found = cls._from_tensors(tensors, *hashes, state)
                check_beside(beside, found.item_ids)
                return found
            if index_format > 1:
                ids = json.loads(tensors["item_ids"].numpy().tobytes())
                check_beside(beside, ids)
            else:
                ids_file = cached_file(pretrained_model_name_or_path, IDS_NAME, **kwargs)
                if ids_file is None:
                    return None
                ids = json.loads(Path(ids_file).read_text(encoding="utf-8"))
            if not isinstance(ids, list) or not all(isinstance(item_id, str) for item_id in ids):
                raise ValueError("its ids are not a list of strings")
            parts = (tensors["item_embeds"], tensors.get("item_modalities"))
            return cls(np.array(ids), *parts, *hashes, index_format, state=state)
        except (LookupError, RecursionError, SafetensorError, TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{pretrained_model_name_or_path}: {INDEX_NAME} cannot be used ({one_line(error)})"
            ) from error

    @classmethod
    def _from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], catalogue_hash: str, encoder_hash: str, state: str = ""
    ) -> ItemIndex:
        ids = _from_bytes(tensors["items"])["item_id"].to_numpy(zero_copy_only=False)
        hashes = tensors.get("item_hashes")
        start = "statistics."
        return cls(
            ids,
            tensors["item_embeds"],
            tensors.get("item_modalities"),
            catalogue_hash,
            encoder_hash,
            item_hashes=None if hashes is None else hashes.numpy(),
            columns=_from_bytes(tensors["columns"]) if "columns" in tensors else None,
            counts=tensors.get("counts"),
            hidden=tensors.get("hidden"),
            statistics={name.removeprefix(start): of for name, of in tensors.items() if name.startswith(start)},
            scan=Scan(*(tensors[f"scan.{name}"] for name in Scan._fields)) if "scan.values" in tensors else None,
            state=state,
        )

    def to_bytes(self) -> bytes:
        """The index as bytes, for a journal."""
        return save(self._tensors())

    @classmethod
    def from_bytes(cls, data: bytes, encoder_hash: str) -> ItemIndex:
        """The index from the bytes of [`~ItemIndex.to_bytes`]."""
        return cls._from_tensors(load(data), "", encoder_hash)

    def belongs_to(self, model: TransRecModel, processor: TransRecProcessor | None) -> bool:
        """Whether the vectors were made by this model."""
        width = model.config.hidden_size + model.config.popularity_prior  # one more number for the popularity
        own = encoder_hash(model, processor, self.format)
        return self.item_embeds.shape[1] == width and is_made_by(self.encoder_hash, own)


def hash_of_items(item_ids: np.ndarray, item_hashes: np.ndarray) -> str:
    """SHA-256 over ids and the hashes of the contents, in catalogue order."""
    digest = hashlib.sha256(json.dumps(item_ids.tolist()).encode())
    digest.update(np.ascontiguousarray(item_hashes).data)
    return digest.hexdigest()


def statistics_of(model: TransRecModel) -> dict[str, torch.Tensor]:
    """The catalogue statistics of a whitened item map, by modality and name; empty for other models."""
    return {
        f"{name}.{statistic}": getattr(projection, statistic).detach().clone()
        for name in model.config.modalities
        if isinstance(projection := model.item_encoder.projection(name), WhitenedProjection)
        for statistic in (*projection.statistics, "axes")
    }


def set_statistics(model: TransRecModel, statistics: Mapping[str, torch.Tensor]) -> None:
    """Set the catalogue statistics of a model to those that [`statistics_of`] returned."""
    for key, value in statistics.items():
        name, _, statistic = key.partition(".")
        getattr(model.item_encoder.projection(name), statistic).copy_(value)


def _as_bytes(table: pa.Table) -> torch.Tensor:
    """A table as a tensor of bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)


def _from_bytes(tensor: torch.Tensor) -> pa.Table:
    """The table of a tensor of bytes, whose memory it shares."""
    with pa.ipc.open_stream(pa.py_buffer(tensor.numpy())) as reader:
        return reader.read_all()


def _contents_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
