"""A model and the items that it serves: encoded, indexed and changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor
from transformers.utils import logging

from ..data.catalogue import Catalogue, load_catalogue
from ..errors import MAX_EXAMPLES, DataError, UnknownItems, one_line, shortened
from ..items.encoding import fit_texts
from ..items.fingerprints import hash_weight
from ..items.meeting import ItemStatistics, match_items
from ..items.preparing import ItemSource
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.checkpoint import check_fits, check_processor
from .building import build_index, columns_of, counts_of, index_of_new, log_popularity_of_new
from .index import ItemIndex, set_statistics
from .live import LiveItems
from .raw import encode_raw, read_raw, without_ids
from .results import Versions
from .snapshot import Change, Snapshot


logger = logging.get_logger(__name__)

MAX_SOURCES = 256  # sources whose contents are kept for explanations


class ServedItems:
    """The items of a [`Recommender`], see there."""

    def __init__(
        self,
        model: TransRecModel,
        source: ItemSource | Catalogue | None = None,
        processor: TransRecProcessor | None = None,
        *,
        index: ItemIndex | LiveItems | None = None,
        statistics: ItemStatistics | None = None,
        counts: Mapping[str, int] | None = None,
        folder: str | os.PathLike | None = None,
        load_all: Callable[[], TransRecModel] | None = None,
        **kwargs: Any,
    ):
        if isinstance(source, Catalogue):
            source = ItemSource(source, processor)
        elif not isinstance(source, ItemSource | None):
            raise TypeError(f"items must be a Catalogue or an ItemSource, not a {type(source).__name__}")
        self.model, self.source, self.statistics = model.eval(), source, statistics
        self.processor = processor = processor if source is None else source.processor
        self.catalogue = None if source is None else source.catalogue
        self._sources = [] if source is None else [source]
        self._encoding = threading.RLock()  # tokenizers and layers that are being packed allow only one thread
        self._load_all = load_all
        self.device = next(value.device for value in model.parameters() if value.device.type != "meta")
        self._kwargs = kwargs
        if source is not None and statistics is not None:
            self.statistics = match_items(model, source.catalogue, statistics)
            if self.statistics is not None and source.log_popularity is None:
                source.log_popularity = self.statistics.log_popularity
        if processor is not None:
            check_processor(processor)
            if source is not None and source.modalities:
                fit_texts(model, source)
            positions = model.item_encoder.positions
            if positions is not None:
                processor.max_text_length = min(processor.max_text_length, positions)
        live = index if isinstance(index, LiveItems) else None
        known = index.base if isinstance(index, LiveItems) else index
        if known is not None and load_all is None and not known.belongs_to(model, processor):
            logger.warning("The item index was made with other weights or another preprocessing, so it is not used.")
            known = live = None
        if source is None:
            if known is None:
                raise DataError("there is no item index of this model: give the catalogue, so that it is encoded")
            set_statistics(model, known.statistics)
            if statistics is not None and known.counts is None:
                rows = statistics.rows(np.array(known.item_ids.tolist(), dtype=str))
                known.counts = torch.from_numpy(np.where(rows < 0, 0, statistics.train_counts[rows.clip(min=0)]))
        else:
            live, known = self._meet(source, known, live, counts, folder, **kwargs)
        self.live = live or LiveItems(known, model.config.hidden_size, folder, self.device)
        self.encoder_hash = self.live.base.encoder_hash
        self.model_version = model_version(model, self.encoder_hash)
        self._unknown = self._popularity_of_new()

    def _meet(
        self,
        source: ItemSource,
        known: ItemIndex | None,
        live: LiveItems | None,
        counts: Any,
        folder: str | os.PathLike | None,
        **kwargs: Any,
    ) -> tuple[LiveItems | None, ItemIndex]:
        """The items of a catalogue. Items that an index already has are taken from it, all others are encoded."""
        catalogue = source.catalogue
        check_fits(self.model, catalogue)
        same = known is not None and np.array_equal(known.item_ids, catalogue.item_ids)
        if known is not None and known.format < 3:
            if same and known.catalogue_hash == catalogue.content_hash():
                known.columns, known.counts = columns_of(catalogue), counts_of(catalogue, self.statistics, counts)
                return None, known
            logger.warning("The item index was made from another catalogue, so it is not used.")
            known = None
        elif live is not None:
            known = live.snapshot.to_index()
        index = self._encode(source, known, counts_of(catalogue, self.statistics, counts), folder, **kwargs)
        if live is not None and known is not None and index.catalogue_hash == known.catalogue_hash:
            if live.snapshot.changes == 0 and _same_columns(index, known):
                return live, known
        if known is not None and index.catalogue_hash == known.catalogue_hash:
            index.scan = known.scan
            index.state = known.state if folder is None else ""
        return None, index

    def _encode(self, source: ItemSource, *args: Any, **kwargs: Any) -> ItemIndex:
        return build_index(self.model, source, *args, **kwargs)

    def whole_model(self) -> TransRecModel:
        """The model with its towers, which are loaded now if that was not necessary before."""
        with self._encoding:
            if self._load_all is not None:
                model = self._load_all().to(self.device).eval()
                set_statistics(model, self.live.base.statistics)
                self.model, self._load_all = model, None
            return self.model

    @property
    def has_towers(self) -> bool:
        """Whether the towers are loaded, so that contents of items can be read at once."""
        return self._load_all is None

    @property
    def items(self) -> Snapshot:
        """
        The current items, with the changes that other processes have made in the folder of the index. If the folder
        was deleted, the items that were last read from it.
        """
        try:
            self.live.refresh()
        except FileNotFoundError as error:
            logger.warning_once(str(error))
        return self.live.snapshot

    @property
    def index(self) -> ItemIndex:
        """The current items as an index."""
        return self.items.to_index()

    @property
    def item_ids(self) -> np.ndarray:
        """The ids of all items, `(n_items,)`."""
        snapshot = self.items
        return np.array(snapshot.ids(snapshot.known_rows))

    @property
    def item_embeds(self) -> Tensor:
        """
        The vectors of all items, `(n_items, hidden_size)`, with the popularity as one more number if the model adds
        it. They are not copied if no item has changed.
        """
        snapshot = self.items
        first = snapshot.segments[0].matrix.exact
        is_whole = len(snapshot) == len(first) == len(snapshot.known_rows)
        return first if is_whole else snapshot.vectors(snapshot.known_rows)

    @property
    def present(self) -> Tensor | None:
        """Which modalities the items show, `(n_items, n_modalities)`."""
        snapshot = self.items
        return snapshot.present(snapshot.known_rows)

    @property
    def versions(self) -> Versions:
        """The versions of model and index that answers name now."""
        return Versions(self.model_version, self.items.version)

    def __len__(self) -> int:
        return self.items.num_items

    def add_items(self, rows: Any, *, exist_ok: bool = False, **kwargs: Any) -> list[str]:
        """
        Add items: from now on they are recommended and may occur in histories.

        Args:
            rows: A [`Catalogue`], or anything that [`load_catalogue`] reads, e.g. a list of dictionaries with
                `item_id` and contents; an image may be a PIL image.
            exist_ok (`bool`, *optional*, defaults to `False`): Whether existing items are updated rather than refused.
                Items with the same contents are not encoded again.
            kwargs: Further arguments of [`encode_catalogue`].

        Returns:
            `list[str]`: The ids.

        Raises:
            [`DataError`]: If an item exists already or has a defect, or the model knows items by their ids only.
        """
        return self._put(rows, None if exist_ok else False, **kwargs)

    def update_items(self, rows: Any, **kwargs: Any) -> list[str]:
        """Like [`~Recommender.add_items`], for existing items. Raises [`UnknownItems`] for others."""
        return self._put(rows, True, **kwargs)

    def remove_items(self, item_ids: Iterable[Any], *, readable: bool = False) -> list[str]:
        """
        Stop recommending items.

        Args:
            item_ids (`Iterable[str]`): Their ids.
            readable (`bool`, *optional*, defaults to `False`): Whether they may still occur in histories; if not, they
                are unknown from now on.

        Returns:
            `list[str]`: The ids.

        Raises:
            [`UnknownItems`]: If an id is unknown.
        """
        return self.live.remove(item_ids, readable)

    def _put(self, rows: Any, exist: bool | None, **kwargs: Any) -> list[str]:
        """Add or update items: with `exist` true all must exist, with false none may, with `None` either is fine."""
        model = self.whole_model()
        if not model.config.modalities or self.processor is None:
            raise DataError(
                "this ID baseline knows items by their ids only, and only those of its training: train a content model"
            )
        catalogue = rows if isinstance(rows, Catalogue) else load_catalogue(_as_table_rows(rows))
        check_fits(without_ids(model), catalogue)
        ids = catalogue.item_ids.tolist()
        source = ItemSource(catalogue, self.processor)
        before = self.items
        self._check_exist(before, ids, exist)
        there = before.find(ids)
        known = before.select(there[there >= 0])
        with self._encoding:
            schema, options = before.columns.schema, {**self._kwargs, **kwargs}
            new = index_of_new(model, source, known, self._unknown, schema, **options)

        def make(snapshot: Snapshot) -> Change:
            self._check_exist(snapshot, ids, exist)
            return Change(new)

        self.live.change(make)
        self._sources = [self._sources[0], *self._sources[1:][-MAX_SOURCES:], source] if self._sources else [source]
        return ids

    def _check_exist(self, snapshot: Snapshot, ids: list[str], exist: bool | None) -> None:
        rows = snapshot.find(ids)
        if exist is False and (rows >= 0).any():
            there = [shortened(ids[i]) for i in np.flatnonzero(rows >= 0)]
            raise DataError(
                f"{len(there)} items exist already: {there[:MAX_EXAMPLES]}. Update them, or leave them out."
            )
        if exist is True and (rows < 0).any():
            raise UnknownItems([ids[i] for i in np.flatnonzero(rows < 0)], "Add them.")

    def _popularity_of_new(self) -> float:
        """The log popularity of items that nobody has chosen yet, as if they were in the catalogue."""
        base = self.live.base
        if not self.model.config.popularity_prior:
            return 0.0
        if base.counts is not None:
            return log_popularity_of_new(base.counts)
        return float(base.item_embeds[:, -1].min())

    def _encode_raw(self, raw: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The vectors of raw items, and the modalities that they have."""
        width = self.model.config.hidden_size + self.model.config.popularity_prior
        if not raw:
            return torch.empty(0, width), torch.empty(0, len(MODALITIES), dtype=torch.bool)
        contents = [read_raw(item, self.model.config.modalities) for item in raw]
        if self.processor is None:
            raise DataError("raw items need the processor of the model: give it to the recommender")
        model = self.whole_model()
        with self._encoding:
            return encode_raw(model, self.processor, contents, self._unknown)


def model_version(model: TransRecModel, encoder: str) -> str:
    """A version that changes with the weights and settings of a model; `encoder` is its [`encoder_hash`]."""
    digest = hashlib.sha256(encoder.encode())
    settings = json.loads(model.config.to_json_string())
    digest.update(json.dumps([settings.get("user_encoder"), settings.get("num_attention_heads")]).encode())
    for name, value in model.state_dict().items():
        if not name.startswith("item_encoder."):
            digest.update(name.encode())
            hash_weight(digest, value)
    return digest.hexdigest()[:16]


def _same_columns(one: ItemIndex, other: ItemIndex) -> bool:
    return one.columns is not None and other.columns is not None and one.columns.equals(other.columns)


def _as_table_rows(rows: Any) -> Any:
    """Rows as a table holds them, with images as the bytes of files. Raises [`DataError`] for mixed columns."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        return rows
    for name in {name for row in rows for name in row} - {"item_id", *MODALITIES}:
        try:
            pa.array([row.get(name) for row in rows], from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"the column {shortened(repr(name))} of the items cannot be kept ({shortened(one_line(error), 200)}). "
                "Give its cells one type of 64 bits."
            ) from error

    def encoded(value: Any) -> Any:
        if not isinstance(value, PIL.Image.Image):
            return value
        file = io.BytesIO()
        value.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    return [{name: encoded(value) for name, value in row.items()} for row in rows]
