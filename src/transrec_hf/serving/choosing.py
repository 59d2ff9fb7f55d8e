"""From the vectors of users to answers: the allowed rows, the best of them, their order, and their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, shortened
from ..model.modalities_transrec import COLUMNS
from .histories import History, as_histories, find_items
from .rerank import Pool, Step
from .results import Explanation, Recommendation, Recommendations, Versions
from .snapshot import Snapshot


POOL = (10, 100)  # items that are reordered: this many for each item that is wanted, at least this many


def allowed_rows(
    snapshot: Snapshot,
    modalities: Sequence[str],
    chosen: Any = None,
    modality: str | None = None,
    skips: bool | None = None,
) -> Tensor | None:
    """
    The rows that may be recommended, `(n_rows,)`, bool; `None` if nothing restricts them.

    Args:
        snapshot ([`Snapshot`]): The items.
        modalities (`Sequence[str]`): The modalities that the model reads.
        chosen (`str`, mask or ids, *optional*): An expression over columns, a boolean for each item, or ids.
        modality (`str`, *optional*): A modality that the items must have.
        skips (`bool`, *optional*): What to do about unknown ids, see [`find_items`].

    Raises:
        [`DataError`]: If one of these arguments is wrong.
    """
    allowed = None
    if isinstance(chosen, str):
        allowed = snapshot.matching(chosen) & snapshot.offered
    elif chosen is not None:
        allowed = among(snapshot, None, _chosen_rows(snapshot, chosen, skips))
    if modality is None:
        return allowed
    if modality not in modalities:
        raise DataError(f"modality must be one of {', '.join(modalities) or 'none'}, got {shortened(repr(modality))}")
    present = snapshot.all_present
    if present is None:
        raise DataError(
            "this item index does not hold the modalities of the items: encode them again, or leave out modality"
        )
    return present[:, COLUMNS[modality]] & (snapshot.offered if allowed is None else allowed)


def _chosen_rows(snapshot: Snapshot, chosen: Any, skips: bool | None) -> np.ndarray:
    """The rows of a mask or of ids."""
    if isinstance(chosen, Tensor):
        chosen = chosen.cpu()
    if isinstance(chosen, (bytes, Mapping)) or not isinstance(chosen, Iterable):
        raise DataError(
            "a filter must be an expression over columns, a boolean for each item, or a list of ids, got "
            f"{shortened(repr(chosen), 40)}"
        )
    values = np.asarray(chosen) if hasattr(chosen, "__array__") else list(chosen)
    is_mask = len(values) > 0 and all(isinstance(value, (bool, np.bool_)) for value in values)
    if not is_mask:
        return find_items(snapshot, values, skips)
    known = snapshot.known_rows
    if len(values) != len(known):
        raise DataError(
            f"the filter has {len(values):,} entries for {len(known):,} items: give one entry for each item"
        )
    return known[np.asarray(values, dtype=bool)]


def among(snapshot: Snapshot, allowed: Tensor | None, rows: np.ndarray) -> Tensor:
    """Which rows are among some given rows and are allowed, `(n_rows,)`, bool."""
    found = torch.zeros_like(snapshot.offered)
    found[torch.from_numpy(rows).to(found.device)] = True
    return found & (snapshot.offered if allowed is None else allowed)


def candidate_rows(
    snapshot: Snapshot, candidates: Any, num_users: int, skips: bool
) -> np.ndarray | list[np.ndarray] | None:
    """The rows of the candidates, for all users or for each user. Raises [`DataError`]."""
    if candidates is None:
        return None
    candidates = list(candidates) if isinstance(candidates, (set, frozenset)) else candidates
    lists, is_shared = as_histories(candidates, "candidates must be a list of ids")
    if is_shared:
        return find_items(snapshot, lists[0], skips)
    if len(lists) != num_users:
        raise DataError(f"{len(lists)} lists of candidates for {num_users} users: give one for all, or one for each")
    return [find_items(snapshot, of_user, skips) for of_user in lists]


def best_rows(
    snapshot: Snapshot,
    states: Tensor,
    histories: Sequence[History],
    k: int,
    exclude_seen: bool,
    allowed: Tensor | None,
    candidates: Sequence[np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Scores and rows of the best items of users.

    Args:
        snapshot ([`Snapshot`]): The items.
        states (`Tensor` of shape `(n_users, width)`): The vectors of the users.
        histories (`Sequence[History]`): The histories of the users.
        k (`int`): Number of items for each user.
        exclude_seen (`bool`): Whether items of the history are left out.
        allowed (`Tensor` of shape `(n_rows,)`, *optional*): Boolean, the rows that may be recommended to all users.
        candidates (`Sequence[np.ndarray]`, *optional*): The rows that may be recommended to each user.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Scores and rows, both `(n_users, at most k)`; where a user has fewer items,
            the score is minus infinity.
    """
    seen: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(histories)
    if exclude_seen:
        seen = [np.unique(np.array(history.known(), dtype=np.int64)) for history in histories]
    if candidates is None:
        users = np.repeat(np.arange(len(seen)), [len(rows) for rows in seen])
        scores, rows = snapshot.search(states, k, allowed, (users, np.concatenate(seen)) if len(users) else None)
        return scores.cpu().numpy(), rows.cpu().numpy()
    width = min(k, len(snapshot))
    best_scores = np.full((len(seen), width), -np.inf, dtype=np.float32)
    best = np.zeros((len(seen), width), dtype=np.int64)
    for user, (mine, had) in enumerate(zip(candidates, seen, strict=True)):
        excluded = (np.zeros(len(had), dtype=np.int64), had)
        found = snapshot.search(states[user : user + 1], k, among(snapshot, allowed, mine), excluded)
        scores_of_user, rows_of_user = (part[0].cpu().numpy() for part in found)
        best_scores[user, : len(scores_of_user)], best[user, : len(rows_of_user)] = scores_of_user, rows_of_user
    return best_scores, best


def reordered(
    snapshot: Snapshot, steps: Sequence[Step], scores: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` items of each user, reordered by `steps`; scores and rows are those of [`best_rows`]."""
    if not steps or not rows.size:
        return scores[:, :k], rows[:, :k]
    new_scores = np.full((len(rows), min(k, rows.shape[1])), -np.inf, dtype=np.float32)
    new_rows = np.zeros(new_scores.shape, dtype=np.int64)
    for user in range(len(rows)):
        keep = np.flatnonzero(scores[user] > -np.inf)
        mine = rows[user, keep]
        unit = torch.nn.functional.normalize(snapshot.vectors(mine)[:, : snapshot.size], dim=1).cpu().numpy()
        columns, order = snapshot.take_columns(mine), np.arange(len(keep))
        for step in steps:
            counts = None if snapshot.counts is None else snapshot.counts[mine[order]]
            order = order[step(Pool(scores[user, keep[order]], unit[order], columns.take(order), counts), k)]
        best = keep[order[:k]]
        new_scores[user, : len(best)], new_rows[user, : len(best)] = scores[user, best], rows[user, best]
    return new_scores, new_rows


def as_answers(
    snapshot: Snapshot,
    versions: Versions,
    scores: np.ndarray,
    rows: np.ndarray,
    explanations: Sequence[Sequence[Explanation]] | None = None,
) -> list[Recommendations]:
    """The answers for users, with the columns of their items; `scores` and `rows` are those of [`best_rows`]."""
    real = scores > -np.inf
    unique, places = np.unique(rows[real], return_inverse=True)
    ids = snapshot.ids(unique)
    columns = snapshot.take_columns(unique).to_pylist() if len(unique) else []
    texts = [of_item.pop("text", None) for of_item in columns]
    place = iter(places.tolist())
    answers = []
    for user in range(len(rows)):
        items = []
        for rank, score in enumerate(scores[user][real[user]].tolist()):
            at = next(place)
            why = None if explanations is None else explanations[user][rank]
            items.append(Recommendation(ids[at], score, texts[at], dict(columns[at]), why))
        answers.append(Recommendations(items, versions))
    return answers
