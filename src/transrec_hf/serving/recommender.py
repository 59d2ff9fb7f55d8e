"""Recommendations from a trained model and a catalogue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import PushToHubMixin, logging

from ..data.catalogue import Catalogue, load_catalogue
from ..errors import DataError, bad_input, hub_errors, pinned
from ..files import read_whole, written_whole
from ..items.encoding import encode_catalogue
from ..items.meeting import ItemStatistics, match_items, standardize_for
from ..items.preparing import ItemSource, pad_right
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.user_encoder_transrec import last_state
from ..publishing.checkpoint import HUB_ARGUMENTS, UNREADABLE, check_processor, load_model_and_processor
from .index import ItemIndex, encoder_hash


logger = logging.get_logger(__name__)

SCORES = 2**26  # computed at a time


@dataclass
class Recommendation:
    """
    One recommended item.

    Args:
        item_id (`str`): its id in the catalogue.
        score (`float`): dot product with the user vector; comparable within one user only.
        text (`str`, *optional*): its text.
    """

    item_id: str
    score: float
    text: str | None


class Recommender(PushToHubMixin):
    """
    Encodes a catalogue once and recommends from it.

    Args:
        model ([`TransRecModel`]): the model.
        source ([`ItemSource`], *optional*): the items, of any platform if the model reads content. Not needed with an
            index, but then recommendations have no text.
        index ([`ItemIndex`], *optional*): the items' vectors, if they are known already. They are computed anew when
            they were made from another catalogue or by another model.
        processor ([`TransRecProcessor`], *optional*): of the model, where the items do not bring it.
        statistics ([`ItemStatistics`], *optional*): what the model's checkpoint keeps of single items: ID vectors and
            popularity are matched to the catalogue by id.
        kwargs: further arguments of [`encode_catalogue`], e.g. `batch_size`.

    Raises:
        [`DataError`]: if there is no catalogue, and no index that belongs to the model.

    Example:

    ```python
    >>> recommender = Recommender.from_pretrained("my_checkpoint", "items.parquet")
    >>> recommender.recommend(["item-17", "item-4"], top_k=5)
    >>> recommender.push_to_hub("me/my_recommender")  # the index goes along
    ```
    """

    def __init__(
        self,
        model: TransRecModel,
        source: ItemSource | None = None,
        *,
        index: ItemIndex | None = None,
        processor: TransRecProcessor | None = None,
        statistics: ItemStatistics | None = None,
        **kwargs: Any,
    ):
        self.model, self.source, self.statistics = model.eval(), source, statistics
        self.processor = processor = processor if source is None else source.processor
        self.catalogue = catalogue = None if source is None else source.catalogue
        if source is not None and statistics is not None:
            self.statistics = match_items(model, source.catalogue, statistics)
            if self.statistics is not None and source.log_popularity is None:
                source.log_popularity = self.statistics.log_popularity
        if processor is not None:
            check_processor(processor)
        if index is not None and not index.belongs_to(model, processor):
            logger.warning("The item index was made with other weights or another preprocessing: it is not used.")
            index = None
        if (
            index is not None
            and catalogue is not None
            and not (
                index.catalogue_hash == catalogue.content_hash() and np.array_equal(index.item_ids, catalogue.item_ids)
            )
        ):
            logger.warning("The item index was made from another catalogue: it is not used.")
            index = None
        if index is None and catalogue is None:
            raise DataError("no item index that belongs to this model: give the catalogue, so that it is encoded")
        self.index = index or self._encode(**kwargs)
        self.item_ids = self.index.item_ids
        self.item_embeds = self.index.item_embeds.to(model.device)
        modalities = self.index.item_modalities
        self.present = None if modalities is None else modalities.to(model.device)
        self._row_of = {item_id: row for row, item_id in enumerate(self.item_ids.tolist())}

    def _encode(self, **kwargs: Any) -> ItemIndex:
        source = self.source
        assert source is not None
        standardize_for(self.model, source)
        return ItemIndex(
            source.catalogue.item_ids,
            encode_catalogue(self.model, source, **kwargs),
            source.present,
            source.catalogue.content_hash(),
            encoder_hash(self.model, self.processor),
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, items: Any = None, **kwargs: Any
    ) -> Recommender:
        """
        A recommender from a checkpoint, or an adapter, and items.

        Args:
            pretrained_model_name_or_path (`str`): Hub id or folder of a checkpoint with its processor.
            items (*optional*): a [`Catalogue`], or whatever [`load_catalogue`] reads; may be left out if the
                checkpoint holds an item index.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` and `subfolder` as in
                `PreTrainedModel.from_pretrained`, `trust_remote_code` if its tokenizer may run code of its own, and
                further arguments of [`encode_catalogue`].

        Raises:
            [`HubError`]: if the checkpoint cannot be had, or a file of it is damaged.
            [`DataError`]: if the items are not given and not in the checkpoint, or have defects.
        """
        place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        with bad_input(f"{name}: not a checkpoint that can be read", *UNREADABLE), hub_errors(name):
            place = pinned(name, place)
            trusted = {**place, "trust_remote_code": kwargs.pop("trust_remote_code", False)}
            (model, processor), index, statistics = read_whole(
                name,
                lambda: (
                    load_model_and_processor(name, trusted),
                    ItemIndex.from_pretrained(name, **place),
                    ItemStatistics.from_pretrained(name, **place),
                ),
            )
        if items is not None and not isinstance(items, Catalogue):
            items = load_catalogue(items)
        source = None if items is None else ItemSource(items, processor)
        return cls(model, source, index=index, processor=processor, statistics=statistics, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Write model, processor and item index to a folder; [`~Recommender.push_to_hub`] pushes the three.

        Args:
            save_directory (`str`): the folder.
            kwargs: further arguments of `PreTrainedModel.save_pretrained`, e.g. `max_shard_size`.
        """
        with written_whole(save_directory) as partial:
            self.model.save_pretrained(partial, **kwargs)
            if self.processor is not None:
                self.processor.save_pretrained(partial)
            self.index.save(partial)
            if self.statistics is not None:
                self.statistics.save(partial)

    def recommend(
        self,
        history: Sequence[str],
        top_k: int = 10,
        exclude_history: bool = True,
        timestamps: Sequence[int] | None = None,
    ) -> list[Recommendation]:
        """
        The best items for one user, best first.

        Args:
            history (`Sequence[str]`): item ids, oldest first; the last `max_position_embeddings` of them are read.
            top_k (`int`, *optional*, defaults to 10): how many; fewer if the catalogue has no more.
            exclude_history (`bool`, *optional*, defaults to `True`): leave out what the user had.
            timestamps (`Sequence[int]`, *optional*): when each item was chosen, in the unit of the training data; for
                models with `time_buckets`.

        Raises:
            `DataError`: if an id is not in the catalogue, the history is no list of ids or is empty, `top_k` is not
                positive, or scores are not finite.
            `ValueError`: if the model needs the timestamps of all its items.
        """
        times = None if timestamps is None else [timestamps]
        return self.recommend_batch([history], top_k, exclude_history, times)[0]

    @torch.no_grad()
    def recommend_batch(
        self,
        histories: Sequence[Sequence[str]],
        top_k: int = 10,
        exclude_history: bool = True,
        timestamps: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Recommendation]]:
        """The best items for several users; see [`~Recommender.recommend`]."""
        if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1:
            raise DataError(f"top_k must be a whole number of 1 or more, got {top_k!r}")
        rows = [self._rows(history) for history in histories]
        if not all(len(history) for history in rows):
            raise DataError("a history is empty: the model recommends from at least one item")
        if timestamps is not None and [len(user) for user in timestamps] != [len(history) for history in rows]:
            raise ValueError("timestamps must have one entry for each item of each history")
        found: list[list[Recommendation]] = []
        size = max(1, min(1024, SCORES // len(self.item_ids)))  # users whose scores are there at a time
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            times = None if timestamps is None else timestamps[block]
            found += self._recommend(rows[block], times, top_k, exclude_history)
        return found

    def _recommend(
        self, rows: list[np.ndarray], timestamps: Sequence[Sequence[int]] | None, top_k: int, exclude_history: bool
    ) -> list[list[Recommendation]]:
        length = self.model.config.max_position_embeddings
        index = torch.from_numpy(pad_right([history[-length:] for history in rows])).to(self.item_embeds.device)
        times = None
        if timestamps is not None:
            padded = pad_right([np.asarray(user[-length:], dtype=np.int64) for user in timestamps])
            times = torch.from_numpy(padded).to(index.device)
        states = self.model.get_user_features(self.item_embeds, index, self.present, times)
        scores = last_state(states, index).float() @ self.item_embeds.T
        if exclude_history:
            users = np.repeat(np.arange(len(rows)), [len(history) for history in rows])
            scores[users, np.concatenate(rows)] = -torch.inf
        best = scores.topk(min(top_k, scores.shape[1]), dim=1)
        if best.values.isnan().any() or best.values.isposinf().any():  # they count as the highest
            raise DataError("scores are not finite: there is a NaN or an infinity in the weights or the item vectors")
        return [
            [
                Recommendation(str(self.item_ids[row]), score, self.catalogue.text(row) if self.catalogue else None)
                for row, score in zip(found, values, strict=True)
                if score > -np.inf
            ]
            for found, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _rows(self, history: Sequence[str]) -> np.ndarray:
        if isinstance(history, str):
            raise DataError(f"a history is a list of item ids, got the text {history[:40]!r}: put it in brackets")
        history = [str(item_id) if isinstance(item_id, int | np.integer) else item_id for item_id in history]
        if wrong := [item_id for item_id in history if not isinstance(item_id, str)]:
            raise DataError(f"an item id is a string, got {type(wrong[0]).__name__}: give a list of ids for each user")
        if self.catalogue is not None:
            return self.catalogue.rows(history)
        unknown = [item_id for item_id in history if item_id not in self._row_of]
        if unknown:
            raise DataError(f"the item index has no {unknown[0]!r} ({len(unknown)} unknown ids in this history)")
        return np.array([self._row_of[item_id] for item_id in history], dtype=np.int64)
