"""Recommendations from a trained model and a catalogue."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import PushToHubMixin

from ..data.catalogue import Catalogue, load_catalogue
from ..errors import DataError, bad_input, hub_errors, pinned, shortened
from ..files import read_whole, recover, written_whole
from ..items.meeting import ItemStatistics
from ..items.preparing import ItemSource
from ..model.user_encoder_transrec import last_state
from ..publishing.checkpoint import HUB_ARGUMENTS, load_model_and_processor
from ..publishing.facts import UNREADABLE
from .approximate import SAMPLE, ApproximateIndex
from .choosing import POOL, allowed_rows, among, as_answers, best_rows, candidate_rows, reordered
from .explaining import Contents, UserInputs, explain_users, padded
from .histories import History, as_histories, check_k, check_on_unknown, find_items, read_histories, read_times
from .index import FORMAT, INDEX_NAME, ItemIndex, read_encoder_hash
from .light import load_without_towers
from .live import LiveItems
from .raw import is_id
from .rerank import Step, as_steps
from .results import Recommendations, UserRecommendations, Versions
from .search import search
from .served import ServedItems
from .snapshot import Snapshot


USERS = 1024  # users whose histories are read at a time


class Recommender(ServedItems, PushToHubMixin):
    """
    Encodes a catalogue once and recommends from it; safe to use from several threads.

    Args:
        model ([`TransRecModel`]): The model.
        source ([`ItemSource`] or [`Catalogue`], *optional*): The items, of any platform if the model reads content.
            Not needed with an index.
        processor ([`TransRecProcessor`], *optional*): The processor of the model; needed if `source` is a
            [`Catalogue`].
        index ([`ItemIndex`] or [`LiveItems`], *optional*): Known vectors of the items. An index of another model is
            not used; items whose contents have changed are encoded again.
        statistics ([`ItemStatistics`], *optional*): What the checkpoint knows about single items; ID vectors and
            popularity are matched to the catalogue by id.
        counts (`dict[str, int]`, *optional*): How often items occur in the training data, for
            [`~Recommender.popular`]; by default, the counts of `statistics`.
        folder (`str`, *optional*): Folder where the index and changes to the items are written.
        load_all (`Callable`, *optional*): Loads the whole model, if `model` has no towers because an index spares
            them.
        kwargs: Further arguments of [`encode_catalogue`], e.g. `batch_size`.

    Raises:
        [`DataError`]: If there is neither a catalogue nor an index that belongs to the model.
        `TypeError`: If `source` is neither a [`Catalogue`] nor an [`ItemSource`].
        `ValueError`: If items with contents are given without a processor.

    Example:

    ```python
    >>> recommender = Recommender.from_pretrained("my_checkpoint", "items.parquet")
    >>> recommender.recommend(["item-17", "item-4"], k=5)

    ```
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        items: Any = None,
        index: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Recommender:
        """
        Load a recommender from a checkpoint (or an adapter) and items.

        Args:
            pretrained_model_name_or_path (`str`): Hub id or folder of a checkpoint with its processor.
            items (*optional*): A [`Catalogue`], or anything that [`load_catalogue`] reads. May be left out if the
                checkpoint holds an item index, or if `index` names one.
            index (`str`, *optional*): Folder of an index, in which changes to the items are kept. It is written if it
                is missing or was made by another model.
            device (`torch.device` or `str`, *optional*): Device of the model; the CPU if not given.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` and `subfolder` as in
                `PreTrainedModel.from_pretrained`, `trust_remote_code` if the tokenizer may run its own code, and
                further arguments of [`Recommender`] and [`encode_catalogue`].

        Raises:
            [`HubError`]: If the checkpoint cannot be loaded, or one of its files is damaged.
            [`DataError`]: If the items are neither given nor in the checkpoint, or have defects.
        """
        if index is not None and items is None and not has_index(index):
            raise DataError(f"{index}: there is no item index here. Give the items, then it is made.")
        place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        with bad_input(f"{name}: not a checkpoint that can be read", *UNREADABLE), hub_errors(name):
            place = pinned(name, place)
            trusted = {**place, "trust_remote_code": kwargs.pop("trust_remote_code", False)}

            def load() -> tuple[Any, ...]:
                own = ItemIndex.from_pretrained(name, **place) if index is None else None
                statistics = ItemStatistics.from_pretrained(name, **place)
                made_by = (own.encoder_hash if own and own.format == FORMAT else None) if index is None else None
                made_by = read_encoder_hash(index) if index is not None else made_by
                light = load_without_towers(name, trusted, made_by) if can_be_light and made_by else None
                return (*(light or load_model_and_processor(name, trusted)), light is not None, own, statistics)

            can_be_light = items is None and (device is None or torch.device(device).type == "cpu")
            model, processor, is_light, own, statistics = read_whole(name, load)
        if is_light:
            kwargs["load_all"] = lambda: load_model_and_processor(name, trusted)[0]
        elif device is not None:
            model = model.to(device)
        found: ItemIndex | LiveItems | None = own
        if index is not None and has_index(index):
            found = LiveItems.open(index, model.config.hidden_size, "cpu" if is_light else model.device)
        if items is not None and not isinstance(items, Catalogue):
            items = load_catalogue(items)
        source = None if items is None else ItemSource(items, processor)
        return cls(model, source, index=found, processor=processor, statistics=statistics, folder=index, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, columns: bool = False, **kwargs: Any) -> None:
        """
        Write model, processor and item index to a folder; `push_to_hub` pushes all three.

        Args:
            save_directory (`str`): The folder.
            columns (`bool`, *optional*, defaults to `False`): Whether texts and other columns of the items are saved.
            kwargs: Further arguments of `PreTrainedModel.save_pretrained`, e.g. `max_shard_size`.

        Raises:
            [`DataError`]: If the model was quantised by PyTorch, so that it has no weights that could be saved.
            `OSError`: If a file cannot be written; then nothing is kept.
        """
        model = self.whole_model()
        if not all(isinstance(value, torch.Tensor) for value in model.state_dict().values()):
            raise DataError("a model that PyTorch has quantised cannot be saved: save the model before quantisation")
        with written_whole(save_directory) as partial:
            model.save_pretrained(partial, **kwargs)
            if self.processor is not None:
                self.processor.save_pretrained(partial)
            self.index.save(partial, columns)
            if self.statistics is not None:
                self.statistics.save(partial)

    @torch.no_grad()
    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        filter: str | Iterable[Any] | None = None,
        candidates: Any = None,
        modality: str | None = None,
        on_unknown: str = "raise",
        rerank: Step | Sequence[Step] | None = None,
        explain: bool = False,
        timestamps: Any = None,
    ) -> Any:
        """
        The best items for one user or several, best first.

        Args:
            histories (`list` or `list[list]`): One history or a list of histories. A history is a list of items,
                oldest first; its last `max_position_embeddings` items are read. An item is an id of the catalogue (a
                string or an integer), or a raw item: a dictionary such as `{"text": "a red hat", "image": image}`, a
                PIL image, or an array of numbers. A string is always an id; a text is `{"text": ...}`. For an empty
                history the answer holds the popular items, and its `fallback` says so.
            k (`int`, *optional*, defaults to 10): Number of items; fewer if there are no more.
            exclude_seen (`bool`, *optional*, defaults to `True`): Whether items of the history are left out.
            filter (`str`, mask or ids, *optional*): Which items may be recommended: an expression over their columns,
                e.g. `"price < 20 and stock > 0"` (see [`matching_rows`]); a boolean for each of `item_ids`; or ids.
            candidates (`list[str]` or `list[list[str]]`, *optional*): Ids of the only items that may be recommended,
                for all users or for each user.
            modality (`str`, *optional*): Recommend only items that have this modality, e.g. `"image"`.
            on_unknown (`"raise"` or `"skip"`, *optional*): What to do about unknown ids in histories, candidates
                and filters; the answer names those of a history that were skipped.
            rerank (`Callable` or list of them, *optional*): Steps that reorder the best items, e.g.
                [`maximal_marginal_relevance`] and [`cap_per_attribute`].
            explain (`bool`, *optional*, defaults to `False`): Whether to tell which items of the history, and which
                modality, raised the score of each recommendation; see [`Explanation`].
            timestamps (`list[int]` or `list[list[int]]`, *optional*): When each item was chosen, in the unit of the
                training data; for models with `time_buckets`.

        Returns:
            [`Recommendations`] for one history, [`UserRecommendations`] for a list of histories.

        Raises:
            [`UnknownItems`]: For ids that are not in the catalogue.
            [`DataError`]: If a history, `k`, a filter or timestamps are wrong, or scores are not finite.
            `ValueError`: If the model needs timestamps, and they are missing.
        """
        k, skips = check_k(k), check_on_unknown(on_unknown)
        snapshot, versions = self._now()
        given, is_one = as_histories(histories)
        times = read_times(timestamps, given, is_one)
        read, raw = read_histories(given, snapshot, skips)
        vectors, present = self._encode_raw(raw)
        allowed = allowed_rows(snapshot, self.model.config.modalities, filter, modality, skips)
        chosen = candidate_rows(snapshot, candidates, len(read), skips)
        if isinstance(chosen, np.ndarray):
            allowed, chosen = among(snapshot, allowed, chosen), None
        steps = as_steps(rerank)
        wanted = max(POOL[0] * k, POOL[1]) if steps else k
        contents = self._contents(raw) if explain else None
        answers: dict[int, Recommendations] = {}
        for user, history in enumerate(read):
            if not history.rows:
                of_user = allowed if chosen is None else among(snapshot, allowed, chosen[user])
                answers[user] = self._popular(snapshot, versions, k, of_user)
                answers[user].fallback = "popular"
        others = [user for user, history in enumerate(read) if history.rows]
        for start in range(0, len(others), USERS):
            block = others[start : start + USERS]
            users = [read[user] for user in block]
            inputs = self._inputs(snapshot, users, vectors, present, times and [times[user] for user in block])
            states = self._states(inputs)
            mine = None if chosen is None else [chosen[user] for user in block]
            found = best_rows(snapshot, states, users, wanted, exclude_seen, allowed, mine)
            scores, rows = reordered(snapshot, steps, *found, k)
            why = explain_users(snapshot, self._states, users, inputs, scores, rows, contents) if explain else None
            answers |= zip(block, as_answers(snapshot, versions, scores, rows, why), strict=True)
        for user, history in enumerate(read):
            answers[user].skipped = history.skipped
        if is_one:
            return answers[0]
        return UserRecommendations((answers[user] for user in range(len(read))), versions)

    def recommend_batch(self, histories: Any, k: int = 10, **kwargs: Any) -> UserRecommendations:
        """[`~Recommender.recommend`] for a list of histories, under its name of version 0.1.0."""
        return self.recommend([list(history) for history in histories], k, **kwargs)

    @torch.no_grad()
    def user_vectors(self, histories: Any, *, on_unknown: str = "raise", timestamps: Any = None) -> np.ndarray:
        """
        The vectors of users, for a search by another program: a score is the dot product with the vector of an item.

        Args:
            histories (`list` or `list[list]`): See [`~Recommender.recommend`]; no history may be empty.
            on_unknown, timestamps: See [`~Recommender.recommend`].

        Returns:
            `np.ndarray` of shape `(width,)` for one history, `(n_users, width)` for a list of histories.
        """
        snapshot = self.items
        given, is_one = as_histories(histories)
        times = read_times(timestamps, given, is_one)
        read, raw = read_histories(given, snapshot, check_on_unknown(on_unknown))
        if not all(user.rows for user in read):
            raise DataError("a history is empty, so there is no user vector: give at least one item, or use `popular`")
        vectors, present = self._encode_raw(raw)
        parts = []
        for start in range(0, len(read), USERS):
            block = slice(start, start + USERS)
            parts.append(self._states(self._inputs(snapshot, read[block], vectors, present, times and times[block])))
        states = torch.cat(parts).cpu().numpy()
        return states[0] if is_one else states

    def approximate(self, recall: float = 0.99, seed: int = 0, file: str | os.PathLike | None = None) -> float:
        """
        Switch to approximate search (needs the extra `faiss`): from now on only so many items are searched as the
        recall needs. The recall is measured by histories of five items that are near each other. When the index is
        written again, it is measured again in a thread.

        Args:
            recall (`float`, *optional*, defaults to 0.99): Share of the exact ten best items that must be found.
            seed (`int`, *optional*, defaults to 0): Seed of the samples.
            file (`str` or `os.PathLike`, *optional*): File for the cells of an index in a folder. The first process
                writes it, other processes map it into their memory. faiss does not check what it reads, so nobody else
                should be able to write it.

        Returns:
            `float`: The measured share of the exact ten best items that was found.
        """

        @torch.no_grad()
        def find_cells(snapshot: Snapshot) -> ApproximateIndex:
            matrix, state = snapshot.segments[0].matrix, snapshot.segments[0].items.state
            if file is not None and os.path.exists(file) and (cells := ApproximateIndex.load(file, state, matrix)):
                return cells
            rows = np.random.default_rng(seed).permutation(len(matrix))[:SAMPLE]
            near = search(matrix, matrix.exact[torch.from_numpy(rows)], 5)[1].cpu().numpy()
            histories = [History(of_user.tolist(), list(range(5))) for of_user in near]
            nobody = self._encode_raw([])
            times = None if not self.model.config.time_buckets else [[0] * 5] * len(histories)
            queries = self._states(self._inputs(snapshot, histories, *nobody, times))
            cells = ApproximateIndex.build(matrix, recall, queries, seed)
            if file is not None and state and not os.path.exists(file):
                cells.save(file, state)
            return cells

        return self.live.search_by(find_cells)

    @torch.no_grad()
    def similar_items(
        self, item: Any, k: int = 10, *, filter: str | Iterable[Any] | None = None, modality: str | None = None
    ) -> Recommendations:
        """
        The items that are most similar to an item of the catalogue, or to a raw one. The score is the cosine of their
        vectors.

        Args:
            item (`str` or raw item): See [`~Recommender.recommend`].
            k, filter, modality: See [`~Recommender.recommend`].
        """
        k = check_k(k)
        snapshot, versions = self._now()
        row = find_items(snapshot, [item]) if is_id(item) else np.empty(0, dtype=np.int64)
        vector = snapshot.vectors(row) if len(row) else self._encode_raw([item])[0]
        query = torch.zeros_like(vector)
        query[:, : snapshot.size] = torch.nn.functional.normalize(vector[:, : snapshot.size], dim=1)
        allowed = allowed_rows(snapshot, self.model.config.modalities, filter, modality)
        search = snapshot.search if self.model.config.similarity == "cosine" else snapshot.nearest
        scores, rows = search(query, k, allowed, (np.zeros(len(row), dtype=np.int64), row))
        return as_answers(snapshot, versions, scores.cpu().numpy(), rows.cpu().numpy())[0]

    @torch.no_grad()
    def score(self, history: Any, item_ids: Any, *, on_unknown: str = "raise", timestamps: Any = None) -> np.ndarray:
        """
        The scores of given items, equal to those of [`~Recommender.recommend`].

        Args:
            history (`list` or `list[list]`): One history or a list of histories, see [`~Recommender.recommend`]; no
                history may be empty.
            item_ids (`list`): Ids or raw items, the same for all users.
            on_unknown, timestamps: See [`~Recommender.recommend`].

        Returns:
            `np.ndarray` of shape `(n_items,)` for one history, `(n_users, n_items)` for a list of histories: The
                scores.
        """
        states = self.user_vectors(history, on_unknown=on_unknown, timestamps=timestamps)
        snapshot = self.items
        if isinstance(item_ids, str) or not isinstance(item_ids, Iterable):
            raise DataError(f"items to score must be a list, got {shortened(repr(item_ids), 40)}: put it in brackets")
        items = list(item_ids)
        wanted = [i for i, item in enumerate(items) if is_id(item)]
        embeds = snapshot.vectors(np.zeros(len(items), dtype=np.int64))
        embeds[wanted] = snapshot.vectors(find_items(snapshot, [items[i] for i in wanted]))
        others = [i for i in range(len(items)) if i not in set(wanted)]
        if others:
            embeds[others] = self._encode_raw([items[i] for i in others])[0].to(embeds)
        return (states.astype(np.float64) @ embeds.cpu().double().numpy().T).astype(np.float32)

    def popular(
        self, k: int = 10, *, filter: str | Iterable[Any] | None = None, modality: str | None = None
    ) -> Recommendations:
        """
        The items that occur most often in the training data, the same for every user.

        Raises:
            [`DataError`]: If the popularity of the items is not known; see `counts` of [`Recommender`].
        """
        k = check_k(k)
        snapshot, versions = self._now()
        return self._popular(
            snapshot, versions, k, allowed_rows(snapshot, self.model.config.modalities, filter, modality)
        )

    def _popular(self, snapshot: Snapshot, versions: Versions, k: int, allowed: Tensor | None) -> Recommendations:
        if snapshot.counts is None:
            raise DataError(
                "a history is empty, and the popularity of the items is not known: give `counts` to the "
                "recommender, or histories of at least one item"
            )
        rows = snapshot.by_popularity
        if allowed is not None:
            rows = rows[allowed.cpu().numpy()[rows]]
        rows = rows[:k]
        return as_answers(snapshot, versions, snapshot.counts[rows].astype(np.float32)[None], rows[None])[0]

    def _now(self) -> tuple[Snapshot, Versions]:
        """The current items, and the versions that answers name."""
        snapshot = self.items
        return snapshot, Versions(self.model_version, snapshot.version)

    def _inputs(
        self,
        snapshot: Snapshot,
        histories: Sequence[History],
        vectors: Tensor,
        present: Tensor,
        times: Sequence[Sequence[int]] | None,
    ) -> UserInputs:
        """The inputs of the model for users; `vectors` and `present` are those of the raw items."""
        length, device = self.model.config.max_position_embeddings, self.device
        ends = [np.asarray(history.rows[-length:], dtype=np.int64) for history in histories]
        origin, places = np.unique(np.concatenate(ends), return_inverse=True)
        raw = torch.from_numpy(-1 - origin[origin < 0])  # they have the lowest numbers
        table = torch.cat(
            [vectors[raw.to(vectors.device)].to(device), snapshot.vectors(origin[origin >= 0]).to(device)]
        )
        shown = snapshot.present(origin[origin >= 0])
        if shown is not None:
            shown = torch.cat([present[raw], shown]).to(device)
        starts = np.cumsum([0, *map(len, ends)])
        index = padded([places[start:end] for start, end in itertools.pairwise(starts)], device)
        clock = None
        if times is not None:
            pairs = zip(times, histories, strict=True)
            clock = padded([np.asarray(user, dtype=np.int64)[of.places][-length:] for user, of in pairs], device)
        return UserInputs(table, index, shown, clock, origin)

    def _states(self, inputs: UserInputs) -> Tensor:
        """The vectors of users, `(n_users, width)`, fp32."""
        states = self.model.get_user_features(inputs.table, inputs.index, inputs.present, inputs.times)
        return last_state(states, inputs.index).float()

    def _contents(self, raw: Sequence[Any]) -> Contents | None:
        """Where explanations read the contents of items."""
        if self.processor is None or not self._sources:
            return None
        return Contents(self.whole_model(), self.processor, self._sources, raw)


def has_index(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an item index."""
    recover(folder)
    return Path(folder, INDEX_NAME).is_file()
