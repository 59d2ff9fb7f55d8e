"""Why an item was recommended: how much lower its score is without parts of the history, or without a modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..items.preparing import ItemSource, pad_right
from ..model.modalities_transrec import COLUMNS
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .histories import History
from .raw import masked, raw_batch, read_raw, without_ids
from .results import Explanation
from .snapshot import Snapshot


@dataclass(frozen=True)
class UserInputs:
    """
    The inputs from which a model computes user vectors.

    Args:
        table (`Tensor` of shape `(n, width)`): Vectors of the items of all histories.
        index (`Tensor` of shape `(n_users, length)`): Rows of the table, oldest first, padded with -1.
        present (`Tensor` of shape `(n, n_modalities)`, *optional*): Which modalities the items have.
        times (`Tensor` of shape `(n_users, length)`, *optional*): When each item was chosen.
        origin (`np.ndarray` of shape `(n,)`): Row of each item in the snapshot; `-1 - i` for the `i`-th raw item.
    """

    table: Tensor
    index: Tensor
    present: Tensor | None
    times: Tensor | None
    origin: np.ndarray


States = Callable[[UserInputs], Tensor]


@dataclass(frozen=True)
class Contents:
    """Where the contents of items are, to read them with one modality hidden."""

    model: TransRecModel
    processor: TransRecProcessor
    sources: Sequence[ItemSource]
    raw: Sequence[Any]

    def hide(self, name: str, origin: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, Tensor] | None:
        """
        The items that also have another modality, as positions in `origin`, and their vectors without the modality
        `name`; `None` if the contents of an item are not available.
        """
        places: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        vectors: list[Tensor] = [torch.empty(0, self.model.config.hidden_size)]
        is_raw = origin < 0
        left = dict(zip(np.flatnonzero(~is_raw).tolist(), ids, strict=True))
        batches = []
        for number, source in reversed(list(enumerate(self.sources))):
            found = source.catalogue.find(list(left.values()))
            own = np.array(list(left))[found >= 0]
            if len(own):
                model = self.model if number == 0 else without_ids(self.model)
                batches.append((own, source.batch(found[found >= 0]), model))
                left = {place: item_id for place, item_id in left.items() if place not in set(own.tolist())}
        if left:
            return None
        if is_raw.any():
            shown = [read_raw(self.raw[-1 - row], self.processor.modalities) for row in origin[is_raw].tolist()]
            batches.append((np.flatnonzero(is_raw), raw_batch(self.processor, shown), without_ids(self.model)))
        for own, batch, model in batches:
            without = masked(batch, name)
            if without is not None:
                hidden = (batch.present[:, COLUMNS[name]] & ~without.present[:, COLUMNS[name]]).numpy()
                places.append(own[hidden])
                device = self.model.device
                vectors.append(model.get_item_features(without.to(device)).float().cpu()[torch.from_numpy(hidden)])
        return np.concatenate(places), torch.cat(vectors)


def explain_users(
    snapshot: Snapshot,
    states_of: States,
    histories: Sequence[History],
    inputs: UserInputs,
    scores: np.ndarray,
    rows: np.ndarray,
    contents: Contents | None,
) -> list[list[Explanation]]:
    """
    Explain the recommendations of users by counterfactual masking: hide a part, and see how the scores change.

    Args:
        snapshot ([`Snapshot`]): The items.
        states_of (`Callable`): Computes user vectors from [`UserInputs`].
        histories (`Sequence[History]`): The histories of the users.
        inputs ([`UserInputs`]): The inputs of the users.
        scores, rows (`np.ndarray` of shape `(n_users, k)`): Scores and rows of the recommended items.
        contents ([`Contents`], *optional*): The contents of the items; without them, modalities are not explained.
    """
    by_modality = {} if contents is None else _without_modalities(snapshot, states_of, inputs, rows, contents)
    explanations = []
    for user, history in enumerate(histories):
        vectors = snapshot.vectors(rows[user])
        effects = _without_items(states_of, inputs, user, vectors, scores[user])
        places = history.places[-effects.shape[0] :]
        explanations.append(
            [
                Explanation(
                    dict(zip(places, effects[:, rank].tolist(), strict=True)),
                    {name: float(scores[user, rank] - of[user, rank]) for name, of in by_modality.items()} or None,
                )
                for rank in range(rows.shape[1])
            ]
        )
    return explanations


def _without_items(
    states_of: States, inputs: UserInputs, user: int, vectors: Tensor, scores: np.ndarray
) -> np.ndarray:
    """How much lower the scores are without each item of a history, `(length, k)`."""
    index = inputs.index[user][inputs.index[user] >= 0]
    length = len(index)
    if length == 1:
        return scores[None].copy()
    others = torch.stack([torch.cat([index[:place], index[place + 1 :]]) for place in range(length)])
    times = None
    if inputs.times is not None:
        own = inputs.times[user][:length]
        times = torch.stack([torch.cat([own[:place], own[place + 1 :]]) for place in range(length)])
    states = states_of(replace(inputs, index=others, times=times))
    return scores[None] - (states.double() @ vectors.double().T).float().cpu().numpy()


def _without_modalities(
    snapshot: Snapshot, states_of: States, inputs: UserInputs, rows: np.ndarray, contents: Contents
) -> dict[str, np.ndarray]:
    """By modality, the scores if neither histories nor recommended items had it, each of shape `(n_users, k)`."""
    model, found = contents.model, {}
    if len(model.config.modalities) < 2:
        return {}
    size = model.config.hidden_size
    unique, places = np.unique(rows, return_inverse=True)
    items = snapshot.vectors(unique)
    known = snapshot.ids(inputs.origin[inputs.origin >= 0])
    for name in model.config.modalities:
        of_history = contents.hide(name, inputs.origin, known)
        of_items = contents.hide(name, unique, snapshot.ids(unique))
        if of_history is None or of_items is None:
            return {}
        table, present = inputs.table.clone(), None if inputs.present is None else inputs.present.clone()
        table[torch.from_numpy(of_history[0]), :size] = of_history[1].to(table)
        if present is not None:
            present[torch.from_numpy(of_history[0]), COLUMNS[name]] = False
        targets = items.clone()
        targets[torch.from_numpy(of_items[0]), :size] = of_items[1].to(targets)
        states = states_of(replace(inputs, table=table, present=present))
        at = targets[torch.from_numpy(places.reshape(rows.shape)).to(targets.device)]
        found[name] = (at.double() @ states.double().unsqueeze(2)).squeeze(2).float().cpu().numpy()
    return found


def padded(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, padded with -1."""
    return torch.from_numpy(pad_right(list(rows))).to(device)
