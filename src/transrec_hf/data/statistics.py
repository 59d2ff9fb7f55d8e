"""Statistics of the data that a reader of results must know."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import cached_file

from ..errors import DataError, hub_errors, pinned
from ..files import STATISTICS_NAME, write_json
from ..model.modalities_transrec import MODALITIES
from .catalogue import Catalogue
from .interactions import Sequences, Split, flat_column
from .reading import BLOCK


def log_popularity(counts: np.ndarray) -> np.ndarray:
    """The logarithm of every item's share of the interactions, (N,) float32; an item without interactions counts as
    one.

    It is the `log p` of the debiased cross-entropy (Yi et al., RecSys 2019), computed from training counts.
    """
    counts = np.asarray(counts, dtype=np.float64)
    return np.log(np.maximum(counts, 1) / max(counts.sum(), 1)).astype(np.float32)


def co_occurrences(train: Sequences, num_items: int, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Pairs of different items within a window, in both orders, and their counts. A pair is the number
    `left * num_items + right`. Pairs are sorted and come in blocks.
    """
    pairs = flat_column(2 * window * int(train.lengths.sum()), np.int64)
    size = 0
    for block in train.blocks():
        users, place = block.expand()
        items = block.items[place].astype(np.int64)
        for gap in range(1, window + 1):
            near = (users[gap:] == users[:-gap]) & (items[gap:] != items[:-gap])
            left, right = items[:-gap][near], items[gap:][near]
            for found in (left * num_items + right, right * num_items + left):
                pairs[size : size + len(found)] = found
                size += len(found)
    pairs = pairs[:size]
    pairs.sort()
    start = 0
    while start < size:
        last = pairs[min(start + BLOCK, size) - 1]
        end = int(np.searchsorted(pairs, last, side="right"))
        yield np.unique(pairs[start:end], return_counts=True)
        start = end


def data_statistics(catalogue: Catalogue, split: Split) -> dict[str, Any]:
    """Statistics of the data that a reader of results must know, as a small dictionary that JSON can hold.

    It holds counts, lengths, the mix of modalities, repeats (targets that the user chose before; they cannot be hit
    when the history is masked), the cold share (items without training interactions) and popularity. Shares are
    between 0 and 1.
    """
    counts = split.train.item_counts(len(catalogue))
    parts = split.train, split.validation, split.test
    bounds = ([getattr(part, name) for part in parts] for name in ("starts", "ends", "user_ids"))
    shown = split.train._with_views(*map(np.concatenate, bounds))
    return {
        "source": catalogue.source,
        "num_items": len(catalogue),
        "num_users": len(set(split.train.user_ids) | set(split.test.user_ids)),
        "num_interactions": int(shown._disjoint().lengths.sum()),
        "users_left_out": split.users_left_out,
        "items_with": modality_shares(catalogue),
        "train": {
            "sequences": len(split.train),
            "interactions": int(counts.sum()),
            "length": length_statistics(split.train.lengths),
        },
        "validation": _target_statistics(split.validation, counts),
        "test": _target_statistics(split.test, counts),
        "cold_catalogue_share": float((counts == 0).mean()),
        "popularity": popularity_statistics(counts),
    }


def modality_shares(catalogue: Catalogue) -> dict[str, float]:
    """The shares of items with one modality only, `NAME_only`, and with several, `both`; the shares add up to 1."""
    present = np.stack([catalogue.has(name) for name in MODALITIES], axis=1)
    several = present.sum(axis=1) > 1
    only = {name: float((present[:, index] & ~several).mean()) for index, name in enumerate(MODALITIES)}
    shown = {f"{name}_only": share for name, share in only.items() if name in ("text", "image") or share}
    return {**shown, "both": float(several.mean())}


def length_statistics(lengths: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1])
    names = ("min", "p10", "median", "p90", "max")
    return {"mean": float(lengths.mean()), **{name: float(q) for name, q in zip(names, quantiles, strict=True)}}


def _target_statistics(sequences: Sequences, train_counts: np.ndarray) -> dict[str, Any]:
    """Statistics of views whose last item is the target."""
    targets = sequences.items[sequences.ends - 1]
    repeated = 0
    for block in sequences.blocks():
        view, place = block.expand()
        same = block.items[place] == block.items[block.ends - 1][view]  # the target itself is one of them
        repeated += int((np.bincount(view[same]) > 1).sum())
    return {
        "sequences": len(sequences),
        "length": length_statistics(sequences.lengths),
        "repeat_target_share": repeated / len(sequences),
        "cold_target_share": float((train_counts[targets] == 0).mean()),
    }


def popularity_statistics(counts: np.ndarray) -> dict[str, Any]:
    """The Gini coefficient of the training counts, and the share of interactions of every tenth of the catalogue."""
    ascending = np.sort(counts).astype(np.float64)
    total, size = max(ascending.sum(), 1.0), len(ascending)
    gini = 2 * (np.arange(1, size + 1) * ascending).sum() / (size * total) - (size + 1) / size
    deciles = [float(part.sum() / total) for part in np.array_split(ascending[::-1], 10)]
    return {"gini": float(gini), "top_decile_share": deciles[0], "decile_shares": deciles}


def save_statistics(statistics: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write statistics as `data_statistics.json` in the folder `path` (or to the file, if it ends in `.json`)."""
    return write_json(_statistics_file(path), statistics)


def load_statistics(path: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
    """
    Read what [`save_statistics`] wrote, from a file, a folder, or a repository of the Hub (with `kwargs` as in
    `PreTrainedModel.from_pretrained`: `revision`, `token`, `cache_dir`, ...).
    """
    file = _statistics_file(path)
    if not file.parent.exists():
        with hub_errors(path):
            file = Path(cached_file(path, STATISTICS_NAME, **pinned(path, kwargs)))
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Compute it again with `data_statistics`.") from error


def _statistics_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / STATISTICS_NAME
