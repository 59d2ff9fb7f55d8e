"""Adapting a model to a catalogue: matching what it knows about items by id, and renewing its statistics."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers.utils import cached_file, logging

from ..data.catalogue import Catalogue
from ..data.interactions import Sequences
from ..data.statistics import co_occurrences, log_popularity
from ..errors import MAX_EXAMPLES, DataError, one_line
from ..files import whole_file
from ..model.modeling_transrec import DECAY, TransRecModel
from .encoding import encode_catalogue, item_states, standardize_projections
from .preparing import ItemSource


logger = logging.get_logger(__name__)

ITEM_STATISTICS_NAME = "item_statistics.parquet"
MAX_SHIFT = 0.04
"""
From this share of the mean in the second moment of whitened states on, a catalogue counts as another one. Between the
platforms that we have, it is .07 to .6 in at least one modality; within one (for the last fifth of its items) at most
.03.
"""
WINDOW = 3  # most steps between two items of a user that are neighbours
NEIGHBOUR_LENGTH = 0.75  # length of an ID vector at the start, relative to the content vector
NEIGHBOUR_DOUBT = 10  # with so many neighbours, it has half of this length
TRIPLES, FEWEST_TRIPLES = 2**16, 100  # most and fewest triples of consecutive items to fit a decay
SAMPLE = 500  # items on which the shift is measured


@dataclass(frozen=True)
class ItemStatistics:
    """
    What a checkpoint knows about single items of its catalogue: the file `item_statistics.parquet` beside the weights.
    Only models with ID vectors, whose rows it names, and models that add popularity to the scores have it.

    Args:
        item_ids (`np.ndarray` of shape `(n_items,)`): The ids, in the order of the ID vectors.
        train_counts (`np.ndarray` of shape `(n_items,)`): How often each item occurs in the training data.
    """

    item_ids: np.ndarray
    train_counts: np.ndarray

    @property
    def log_popularity(self) -> torch.Tensor:
        """
        Logarithm of each item's share of the training data, `(n_items,)`; items without interactions count as one.
        """
        return torch.from_numpy(log_popularity(self.train_counts))

    def rows(self, item_ids: np.ndarray) -> np.ndarray:
        """The row of each id, `-1` for unknown ids: `(n,)`."""
        row_of = {item_id: row for row, item_id in enumerate(self.item_ids.tolist())}
        return np.array([row_of.get(item_id, -1) for item_id in item_ids.tolist()], dtype=np.int64)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_statistics.parquet`."""
        columns = {"item_id": pa.array(self.item_ids.tolist(), pa.string()), "train_count": self.train_counts}
        with whole_file(Path(folder) / ITEM_STATISTICS_NAME) as partial:
            pq.write_table(pa.table(columns), partial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ItemStatistics | None:
        """
        The statistics in a folder or a repository of the Hub, `None` if there are none.

        Raises:
            [`DataError`]: If the file is damaged.
        """
        name = os.fspath(pretrained_model_name_or_path)
        file = cached_file(name, ITEM_STATISTICS_NAME, _raise_exceptions_for_missing_entries=False, **kwargs)
        if file is None:
            return None
        try:
            table = pq.read_table(file, columns=["item_id", "train_count"])
            ids = np.array(table["item_id"].to_pylist(), dtype=str)
            return cls(ids, table["train_count"].to_numpy().astype(np.int64))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: damaged, it should have item_id and train_count ({one_line(error)}). Download the "
                "checkpoint again."
            ) from error


def needs_item_statistics(model: TransRecModel) -> bool:
    """Whether a checkpoint of the model cannot be used without its [`ItemStatistics`]."""
    return model.config.num_items is not None or model.config.popularity_prior


def set_item_vectors(model: TransRecModel, vectors: torch.Tensor | None) -> None:
    """
    Replace the ID vectors of a model, or remove them.

    Args:
        model ([`TransRecModel`]): The model; changed in place, with its `num_items`.
        vectors (`torch.Tensor` of shape `(num_items, hidden_size)`, *optional*): ID vectors of the items of a
            catalogue, zero for unknown items; `None` to remove them.
    """
    encoder = model.item_encoder
    if vectors is not None:
        vectors = vectors.to(model.device, model.dtype)
        encoder.item_embedding = nn.Embedding.from_pretrained(vectors, freeze=False)
    elif hasattr(encoder, "item_embedding"):
        del encoder.item_embedding
    model.config.num_items = None if vectors is None else len(vectors)
    model.config.validate()


def match_items(model: TransRecModel, catalogue: Catalogue, known: ItemStatistics | None) -> ItemStatistics | None:
    """
    Match what a checkpoint knows about single items to a catalogue, by id. New items get ID vectors of zero. If all
    items are new, as on another platform, a model that reads content loses its ID vectors.

    Args:
        model ([`TransRecModel`]): The model; its ID vectors are put into the order of the catalogue.
        catalogue ([`Catalogue`]): The items.
        known ([`ItemStatistics`], *optional*): Those of the checkpoint. Without them the model stays as it is.

    Returns:
        [`ItemStatistics`]: Those of the items of the catalogue; `None` if no item is known.

    Raises:
        [`DataError`]: If a model that reads no content does not know an item.
    """
    if known is None:
        return None
    rows = known.rows(catalogue.item_ids)
    new = np.flatnonzero(rows < 0)
    has_vectors, reads_content = model.config.num_items is not None, bool(model.config.modalities)
    if len(new) and not reads_content:
        raise DataError(
            f"{catalogue.source}: {len(new)} of {len(catalogue)} items are new to this ID baseline "
            f"({', '.join(catalogue.item_ids[new[:MAX_EXAMPLES]])}), which cannot leave the catalogue of its "
            "training. Give that catalogue (and its k_core), or a content model."
        )
    if has_vectors and len(new) == len(rows):
        set_item_vectors(model, None)
    elif has_vectors and not np.array_equal(rows, np.arange(model.config.num_items)):
        vectors = model.item_encoder.item_embedding.weight.detach()
        matched = vectors[torch.from_numpy(rows.clip(min=0)).to(vectors.device)]
        matched[torch.from_numpy(new).to(vectors.device)] = 0
        set_item_vectors(model, matched)
    if len(new) == len(rows):
        return None
    if len(new):
        logger.info("%s of %s items are new to this model", f"{len(new):,}", f"{len(rows):,}")
    return ItemStatistics(catalogue.item_ids, np.where(rows < 0, 0, known.train_counts[rows.clip(min=0)]))


@torch.no_grad()
def start_from_data(model: TransRecModel, source: ItemSource, train: Sequences) -> None:
    """
    Initialise new parts of a model from the data: the decay of its content prior, see [`fitted_decay`], and the ID
    vectors of a hybrid, see [`neighbour_vectors`]. Parts that were trained before stay as they are. A model without a
    whitened item map stays as it is, because its untrained content vectors mean nothing.

    Args:
        model ([`TransRecModel`]): The model; changed in place.
        source ([`ItemSource`]): The items.
        train ([`Sequences`]): The training data.
    """
    config, encoder = model.config, model.item_encoder
    if not (config.modalities and encoder.is_whitened):
        return
    vectors = getattr(encoder, "item_embedding", None)
    prior = model.content_prior if config.content_prior else None
    new_vectors = isinstance(vectors, nn.Embedding) and not vectors.weight.any()
    new_decay = prior is not None and prior.decay == torch.full_like(prior.decay, DECAY)
    if (vectors is not None and not new_vectors) or not (new_vectors or new_decay):
        return
    content = nn.functional.normalize(encode_catalogue(model, source)[:, : config.hidden_size], dim=1).cpu()
    decay = fitted_decay(content, train)
    if prior is not None and new_decay and decay is not None:
        prior.decay.fill_(math.log(decay / (1 - decay)))
    if isinstance(vectors, nn.Embedding) and new_vectors:
        vectors.weight.copy_(neighbour_vectors(content, train) * encoder.length)


def fitted_decay(content: torch.Tensor, train: Sequences) -> float | None:
    """
    The weight of an item for the next choice, relative to the weight of the item after it. It is the ratio of the
    coefficients in a least-squares fit of an item's content on the content of the two items before it. `None` if there
    are too few such triples.

    Args:
        content (`torch.Tensor` of shape `(n_items, size)`): Vectors of the items.
        train ([`Sequences`]): The training data.
    """
    found = []
    for block in train.blocks():
        users, place = block.expand()
        same = users[2:] == users[:-2]
        items = block.items[place]
        found.append(np.stack([items[2:][same], items[1:-1][same], items[:-2][same]]))
        if sum(part.shape[1] for part in found) >= TRIPLES:
            break
    triples = torch.from_numpy(np.concatenate(found, axis=1)[:, :TRIPLES].astype(np.int64))
    if triples.shape[1] < FEWEST_TRIPLES:
        return None
    following, *before = (content - content.mean(dim=0))[triples].double()
    gram = torch.stack([torch.stack([(a * b).sum() for a in before]) for b in before])
    last, earlier = torch.linalg.lstsq(gram, torch.stack([(a * following).sum() for a in before])).solution.tolist()
    return min(max(earlier / last, 0.3), 0.95) if last > 0 else None


def neighbour_vectors(content: torch.Tensor, train: Sequences) -> torch.Tensor:
    """
    ID vectors from the content of an item's neighbours, the items that users chose shortly before or after it. `c_ij`
    is how often that happened, `n_i` its sum over `j`, and `e_j` are the unit content vectors:

        v_i = 0.75 n_i / (n_i + 10) unit(sum over j of c_ij (1 + n_j)^(-1/2) e_j)

    Args:
        content (`torch.Tensor` of shape `(n_items, size)`): Unit vectors of the items.
        train ([`Sequences`]): The training data.

    Returns:
        `torch.Tensor` of shape `(n_items, size)`: The vectors, zero for items without neighbours.
    """
    size = len(content)
    blocks = [(pairs, torch.from_numpy(counts).float()) for pairs, counts in co_occurrences(train, size, WINDOW)]
    edges = [(torch.from_numpy(np.stack([pairs // size, pairs % size])), counts) for pairs, counts in blocks]
    total, sums = torch.zeros(size), torch.zeros_like(content)
    for (left, _), counts in edges:
        total.index_add_(0, left, counts)
    for places, counts in edges:
        weights = counts * (1 + total[places[1]]).rsqrt()
        sums += torch.sparse_coo_tensor(places, weights, (size, size), check_invariants=False) @ content
    length = NEIGHBOUR_LENGTH * total / (total + NEIGHBOUR_DOUBT)
    return length[:, None] * nn.functional.normalize(sums, dim=1)


@torch.no_grad()
def catalogue_shift(model: TransRecModel, source: ItemSource, seed: int = 0) -> dict[str, float]:
    """
    The distance of the items from the catalogue whose statistics a whitened item map has: for each modality, the share
    of the mean in the second moment of the whitened states of a sample, minus the share that such a sample has by
    chance.
    """
    shifts = {}
    for name in model.config.modalities:
        states = item_states(model, source, name, SAMPLE, seed)
        if len(states) > 1:
            white = model.item_encoder.projection(name).whiten(states).double()  # type: ignore[operator]
            share = white.mean(dim=0).square().sum() / white.square().sum(dim=1).mean().clamp(min=1e-12)
            shifts[name] = float(share) - 1 / len(states)
    return shifts


def standardize_for(model: TransRecModel, source: ItemSource, seed: int = 0) -> bool:
    """
    Prepare a model for a catalogue on which it is not trained: if its item map is whitened, and its statistics belong
    to another catalogue, compute the statistics of this one. A few new items do not make another catalogue. Neither do
    towers that were trained: how far they have moved the catalogue of the training is a field of the configuration.

    Args:
        model ([`TransRecModel`]): The model; changed in place.
        source ([`ItemSource`]): The items.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.

    Returns:
        `bool`: Whether the statistics were renewed.
    """
    if model.config.item_map != "whitened" or source.processor is None:
        return False
    shifts = catalogue_shift(model, source, seed)
    said = ", ".join(f"{name} {shift:.3f}" for name, shift in shifts.items())
    fitted = all(model.item_encoder.projection(name).num_fitted for name in shifts)
    if fitted and max(shifts.values(), default=0.0) <= MAX_SHIFT + model.config.catalogue_shift:
        logger.debug("The statistics of the model fit these items (shift of the mean: %s)", said)
        return False
    if fitted:
        logger.info_once(
            "This is another catalogue (shift of the mean: %s), so the statistics of the model are computed again",
            said,
        )
    standardize_projections(model, source, seed=seed)
    return True


__all__ = [
    "ItemStatistics",
    "catalogue_shift",
    "match_items",
    "set_item_vectors",
    "standardize_for",
    "start_from_data",
]
