"""From a catalogue to the index of a model: known vectors are used again, all other items are encoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.statistics import log_popularity
from ..files import whole_file
from ..items.encoding import encode_catalogue
from ..items.meeting import ItemStatistics, standardize_for
from ..items.preparing import ItemSource
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel
from .index import ItemIndex, encoder_hash, hash_of_items, set_statistics, statistics_of
from .raw import without_ids


logger = logging.get_logger(__name__)

BLOCK = 2**13  # items that are encoded before their vectors are saved
RESUMED = 2 * BLOCK  # catalogues of at least so many items are saved block by block
NEW_SHARE = 0.2  # from this share of new or changed items on, the catalogue may be another one


NUMBER = r"^\s*-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?\s*$"
"""Strings that are read as numbers; `007` is a name."""


def columns_of(catalogue: Catalogue, like: pa.Schema | None = None) -> pa.Table:
    """
    The columns of the items that an index keeps beside the vectors: all columns of plain values. A hidden text is
    null. Cells of a CSV file are strings; if all cells of a column look like numbers, they become numbers.

    Args:
        catalogue ([`Catalogue`]): The items.
        like (`pa.Schema`, *optional*): Existing columns of the index, whose types decide which columns are numbers.
    """
    left_out = {"item_id", *MODALITIES} - {"text"}
    table: pa.Table = catalogue.items.with_format("arrow")[:] if len(catalogue.items.column_names) else pa.table({})
    names = [field.name for field in table.schema if field.name not in left_out and _is_plain(field.type)]
    table = table.select(names)
    if "text" in names and not catalogue.has("text").all():
        texts = pa.chunked_array([pa.array(catalogue.has("text"))])
        hidden = pc.if_else(texts, table["text"], pa.scalar(None, table["text"].type))
        table = table.set_column(names.index("text"), "text", hidden)
    for place, name in enumerate(names):
        if name != "text" and pa.types.is_string(table[name].type):
            table = table.set_column(place, name, _as_numbers(table[name], like and _type_in(like, name)))
    return table.replace_schema_metadata() if names else pa.table({"text": pa.nulls(len(catalogue), pa.string())})


def _type_in(schema: pa.Schema, name: str) -> pa.DataType | None:
    return schema.field(name).type if name in schema.names else None


def _as_numbers(column: pa.ChunkedArray, kind: pa.DataType | None) -> pa.ChunkedArray:
    """A column of strings as numbers, if all its cells are numbers and `kind` is not a string type."""
    written = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    is_text = kind is not None and pa.types.is_string(kind)
    if is_text or written.null_count == len(written) or not pc.all(pc.match_substring_regex(written, NUMBER)).as_py():
        return column
    numbers = pc.cast(pc.utf8_trim_whitespace(written), pa.float64())
    is_whole = not pc.any(pc.match_substring(written, ".")).as_py()
    return numbers.cast(pa.int64()) if is_whole and pc.max(pc.abs(numbers)).as_py() < 2**53 else numbers


def _is_plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def counts_of(catalogue: Catalogue, statistics: ItemStatistics | None, counts: Any) -> Tensor | None:
    """How often each item occurs in the training data, of shape `(n_items,)`; `None` if that is not known."""
    if isinstance(counts, Mapping):
        return torch.tensor([int(counts.get(item_id, 0)) for item_id in catalogue.item_ids.tolist()])
    if counts is not None:
        return torch.as_tensor(counts).long()
    if statistics is None:
        return None
    rows = statistics.rows(catalogue.item_ids)
    return torch.from_numpy(np.where(rows < 0, 0, statistics.train_counts[rows.clip(min=0)]))


def log_popularity_of_new(counts: Tensor | np.ndarray | None) -> float:
    """The log popularity that a model uses for an item that nobody has chosen yet."""
    return 0.0 if counts is None else float(log_popularity(np.append(np.asarray(counts), 0))[-1])


def build_index(
    model: TransRecModel,
    source: ItemSource,
    known: ItemIndex | None = None,
    counts: Tensor | None = None,
    folder: str | os.PathLike | None = None,
    **kwargs: Any,
) -> ItemIndex:
    """
    The index of a catalogue.

    Args:
        model ([`TransRecModel`]): The model. For another catalogue, a whitened item map takes the statistics of this
            catalogue; for the same catalogue with a few more items, it takes those of `known`.
        source ([`ItemSource`]): The items.
        known ([`ItemIndex`], *optional*): An index of the same model. The vectors of items whose contents have not
            changed are used again.
        counts (`Tensor` of shape `(n_items,)`, *optional*): See [`ItemIndex`].
        folder (`str`, *optional*): Where finished vectors of a large catalogue are saved during the encoding. If the
            process dies, the next one continues from them.
        kwargs: Further arguments of [`encode_catalogue`].
    """
    catalogue, ids = source.catalogue, source.catalogue.item_ids
    hashes = catalogue.item_hashes()
    rows = np.full(len(ids), -1)
    hidden = None
    if known is not None and known.item_hashes is not None and model.config.num_items is None:
        row_of = {item_id: row for row, item_id in enumerate(known.item_ids.tolist())}
        rows = np.array([row_of.get(item_id, -1) for item_id in ids.tolist()])
        if known.hidden is not None:
            hidden = known.hidden[torch.from_numpy(rows.clip(min=0))] & torch.from_numpy(rows >= 0)
        rows[(known.item_hashes[rows.clip(min=0)] != hashes).any(axis=1)] = -1
        set_statistics(model, known.statistics)
    if (rows < 0).mean() > NEW_SHARE and standardize_for(model, source):
        rows[:] = -1
    if (rows >= 0).all():
        assert known is not None
        embeds = known.item_embeds if _is_whole(rows, known) else known.item_embeds[torch.from_numpy(rows)]
    elif (rows < 0).all():
        embeds = _encode(model, source, hashes, folder, **kwargs)
    else:
        assert known is not None
        new = np.flatnonzero(rows < 0)
        logger.info("%s of %s items are new or have changed", f"{len(new):,}", f"{len(rows):,}")
        embeds = known.item_embeds[torch.from_numpy(rows.clip(min=0))].to(model.device)
        some = source.select(new)
        embeds[torch.from_numpy(new).to(embeds.device)] = _encode(model, some, hashes[new], folder, **kwargs)
    if model.config.popularity_prior and source.log_popularity is not None and (rows >= 0).any():
        embeds = model.with_popularity(embeds[:, : model.config.hidden_size], source.log_popularity)
    return ItemIndex(
        ids,
        embeds.cpu(),
        source.present,
        hash_of_items(ids, hashes),
        encoder_hash(model, source.processor),
        item_hashes=hashes,
        columns=columns_of(catalogue),
        counts=counts,
        hidden=hidden,
        statistics=statistics_of(model),
    )


def _is_whole(rows: np.ndarray, known: ItemIndex) -> bool:
    return len(rows) == len(known) and np.array_equal(rows, np.arange(len(rows)))


def _encode(
    model: TransRecModel, source: ItemSource, hashes: np.ndarray, folder: str | os.PathLike | None, **kwargs: Any
) -> Tensor:
    """Vectors of items. Many items are encoded and saved block by block, so that finished work is not lost."""
    if folder is None or len(source) < RESUMED or model.config.num_items is not None or "accelerator" in kwargs:
        return encode_catalogue(model, source, **kwargs)
    digest = hashlib.sha256(encoder_hash(model, source.processor).encode())
    for value in statistics_of(model).values():
        digest.update(value.cpu().flatten().numpy().tobytes())
    parts, files = [], []
    for start in logging.tqdm(range(0, len(source), BLOCK), desc="Encoding blocks of items", unit="block"):
        block = np.arange(start, min(start + BLOCK, len(source)))
        of_block = digest.copy()
        of_block.update(hashes[block].tobytes())
        file = Path(folder) / f".encoding-{of_block.hexdigest()[:32]}.safetensors"
        files.append(file)
        if not file.is_file():
            some = source.select(block)
            some.log_popularity = None if source.log_popularity is None else source.log_popularity[block]
            with whole_file(file) as partial:
                save_file({"vectors": encode_catalogue(model, some, **kwargs).cpu()}, partial)
        parts.append(load_file(file)["vectors"])
    embeds = torch.cat(parts)
    for file in files:
        file.unlink(missing_ok=True)
    return embeds.to(model.device)


def index_of_new(
    model: TransRecModel,
    source: ItemSource,
    known: ItemIndex | None,
    unknown: float,
    like: pa.Schema | None = None,
    **kwargs: Any,
) -> ItemIndex:
    """
    The index of items that are added to a known catalogue. The statistics of the catalogue stay as they are, and the
    new items have no ID vectors.

    Args:
        model ([`TransRecModel`]): The model.
        source ([`ItemSource`]): The new items.
        known ([`ItemIndex`], *optional*): An index of items with the same ids. If the contents are the same, the
            vectors are used again.
        unknown (`float`): The log popularity of an item that nobody has chosen yet.
        like (`pa.Schema`, *optional*): See [`columns_of`].
        kwargs: Of [`encode_catalogue`].
    """
    catalogue, hashes = source.catalogue, source.catalogue.item_hashes()
    old: dict[str, int] = {}
    if known is not None:
        old = {item_id: row for row, item_id in enumerate(known.item_ids.tolist())}
    rows = np.array([old.get(item_id, -1) for item_id in catalogue.item_ids.tolist()])
    same = rows >= 0
    if known is not None and known.item_hashes is not None:
        same &= (known.item_hashes[rows.clip(min=0)] == hashes).all(axis=1)
    else:
        same[:] = False
    embeds = torch.zeros(len(rows), model.config.hidden_size + model.config.popularity_prior)
    counts = torch.zeros(len(rows), dtype=torch.long)
    if model.config.popularity_prior:
        embeds[:, -1] = unknown
    new = np.flatnonzero(~same)
    if len(new):
        some = source.select(new)
        vectors = encode_catalogue(without_ids(model), some, **kwargs).cpu()
        embeds[torch.from_numpy(new), : model.config.hidden_size] = vectors[:, : model.config.hidden_size]
    if known is not None:
        was = torch.from_numpy(np.flatnonzero(rows >= 0))
        before = torch.from_numpy(rows[rows >= 0])
        embeds[was, model.config.hidden_size :] = known.item_embeds[before, model.config.hidden_size :].cpu()
        embeds[torch.from_numpy(np.flatnonzero(same))] = known.item_embeds[torch.from_numpy(rows[same])].cpu()
        if known.counts is not None:
            counts[was] = known.counts[before]
    return ItemIndex(
        catalogue.item_ids,
        embeds,
        source.present,
        "",
        "",
        item_hashes=hashes,
        columns=columns_of(catalogue, like),
        counts=counts,
    )
