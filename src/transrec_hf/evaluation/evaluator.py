"""Exact ranking over the whole catalogue: protocols, evaluation in blocks of users, slices and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from ..data.statistics import log_popularity
from ..items.encoding import encode_catalogue
from ..model.towers_transrec import in_evaluation
from ..model.user_encoder_transrec import last_state
from .baselines import ContentNeighbours, CoOccurrence, Popularity, RepeatLast, Scorer
from .metrics import DEFAULT_KS, bootstrap_interval, metric_values, ranking_metrics
from .protocol import PROTOCOLS, EvaluationProtocol
from .ranking import MAX_SCORES, MAX_USERS, check_finite, check_option, dot_scores, last_items, rank_scores
from .slices import LENGTH_EDGES, LENGTH_LABELS, history_mix, modality_combinations


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data.interactions import Sequences
    from ..items.preparing import ItemSource

LIST_LENGTH = 10  # length of the lists whose coverage and popularity are reported


@dataclass
class Ranking:
    """
    The result of ranking the target of every user.

    Args:
        ranks (`torch.Tensor` of shape `(num_users,)`): Ranks from 1, float32 on the CPU, in the order of the users.
        lists (`torch.Tensor` of shape `(num_users, 10)`):
            The first ten items of each user, the best one first, as rows of the catalogue; -1 where there is none.
        candidates (`torch.Tensor` of shape `(num_items,)`): Boolean, the items that were ranked.
        sequences (`Sequences`): The part of the sequences that the protocol keeps.
        max_history (`int`, *optional*): The history length of the model, or of the model with which a baseline is
            compared.
    """

    ranks: torch.Tensor
    lists: torch.Tensor
    candidates: torch.Tensor
    sequences: Sequences
    max_history: int | None

    @property
    def recommended(self) -> torch.Tensor:
        """For each item, the number of users who have it among their first ten items: `(num_items,)`."""
        return self.lists[self.lists >= 0].bincount(minlength=len(self.candidates))


class RankingEvaluator:
    """
    Ranks the last item of every sequence among the whole catalogue, given the items before it.

    The catalogue is encoded once, and users are ranked in blocks. With an `Accelerator`, the users are divided among
    the processes; the result is exact for any number of users.

    Args:
        source (`ItemSource`): The items.
        sequences (`Sequences`): Histories, each with its target as the last item: `split.validation` or `split.test`.
        protocol (`str` or `EvaluationProtocol`, defaults to `"full"`): A protocol or the name of one in `PROTOCOLS`.
        train (`Sequences`, *optional*): The training sequences; with them, [`evaluate`] also reports baselines.
        train_counts (`np.ndarray` of shape `(num_items,)`, *optional*):
            Occurrences of each item in the training sequences, for the slices of warm and cold targets and for the
            popularity of recommendations. If `train` is given, they are computed from it.
        candidates (`np.ndarray` of shape `(num_items,)`, *optional*):
            Boolean, the items to rank, instead of those of the protocol. With a protocol of `"interacted"` candidates,
            items that occur in `sequences` or in training are ranked; in validation, items that occur only as test
            targets are then missing.
        content_vectors (`torch.Tensor` of shape `(num_items, size)`, *optional*):
            Item vectors of untrained encoders, for the zero-shot baseline.
        max_users (`int`, *optional*):
            Number of sequences whose targets are ranked, drawn at random; all if None. The candidates of the protocol
            are still those of all sequences.
        seed (`int`, defaults to 0): Seed of this draw.
        ks (`Sequence[int]`, defaults to `(5, 10, 20, 50)`): Lengths of the recommended list.
        batch_size (`int`, defaults to 128): Items encoded at a time.
        num_workers (`int`, defaults to 0): Processes that prepare the items.

    Raises:
        `ValueError`: If a sequence has no history, or counts, candidates or vectors do not fit the catalogue.

    Example:
    ```python
    >>> source = ItemSource(catalogue, processor)
    >>> evaluator = RankingEvaluator(source, split.test, protocol="ninerec", train=split.train)
    >>> report = evaluator.evaluate(model)
    >>> report["metrics"]["ndcg@10"], report["intervals"]["ndcg@10"], report["baselines"]["popularity"]["metrics"]
    ```
    """

    def __init__(
        self,
        source: ItemSource,
        sequences: Sequences,
        *,
        protocol: str | EvaluationProtocol = "full",
        train: Sequences | None = None,
        train_counts: np.ndarray | None = None,
        candidates: np.ndarray | None = None,
        content_vectors: torch.Tensor | None = None,
        max_users: int | None = None,
        seed: int = 0,
        ks: Sequence[int] = DEFAULT_KS,
        batch_size: int = 128,
        num_workers: int = 0,
    ):
        if isinstance(protocol, str):
            check_option("protocol", protocol, tuple(PROTOCOLS))
            protocol = PROTOCOLS[protocol]
        if train is not None:
            train_counts = train.item_counts(len(source))
        of_items = {"train_counts": train_counts, "candidates": candidates, "content_vectors": content_vectors}
        for name, values in of_items.items():
            if values is not None and len(values) != len(source):
                raise ValueError(f"{name} has {len(values)} entries, but the catalogue has {len(source)} items")
        if max_users is not None and max_users < 1:
            raise ValueError(f"max_users must be 1 or more, got {max_users}")
        _check_sequences(sequences)
        self.source = source
        self.all_sequences = self.sequences = sequences
        if max_users is not None and max_users < len(sequences):
            drawn = np.random.default_rng(seed).permutation(len(sequences))[:max_users]
            self.sequences = sequences.select(np.sort(drawn))
        self.protocol = protocol
        self.train = train
        self.train_counts = train_counts
        self.candidates = candidates
        self.content_vectors = content_vectors
        self.ks = tuple(ks)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.targets = self.sequences.items[self.sequences.ends - 1].astype(np.int64)

    def __call__(
        self, model: Any, accelerator: Accelerator | None = None, item_embeds: torch.Tensor | None = None
    ) -> dict[str, float]:
        """
        The metrics of a model, for a training loop.

        Returns:
            `dict[str, float]`: `hit_rate@k`, `ndcg@k`, `mrr` and `coverage@10`.
        """
        ranking = self.rank_model(model, item_embeds=item_embeds, accelerator=accelerator)
        return {**ranking_metrics(ranking.ranks, self.ks), f"coverage@{LIST_LENGTH}": _coverage(ranking)}

    def evaluate(
        self, model: Any, *, item_embeds: torch.Tensor | None = None, accelerator: Accelerator | None = None
    ) -> dict[str, Any]:
        """
        The full report on a model, with baselines if the evaluator has `train`.

        Args:
            model (`TransRecModel`): The model, on its device.
            item_embeds (`torch.Tensor` of shape `(num_items, hidden_size)`, *optional*): The encoded catalogue.
            accelerator (`accelerate.Accelerator`, *optional*): Its processes share the work, and all get the report.

        Returns:
            `dict`, fit for JSON: see [`report`]; `baselines` holds such a report for each baseline.
        """
        ranking = self.rank_model(model, item_embeds=item_embeds, accelerator=accelerator)
        report = self.report(ranking)
        if self.train is not None:
            report["baselines"] = self.evaluate_baselines(ranking.max_history, accelerator)
        return report

    def evaluate_baselines(
        self, max_history: int | None = None, accelerator: Accelerator | None = None
    ) -> dict[str, dict[str, Any]]:
        """
        The reports of the baselines that need no training: `popularity`, `repeat_last` and `co_occurrence`; with
        `content_vectors` also `content_neighbours`.

        Args:
            max_history (`int`, *optional*): History length of the model to compare with, for protocols that depend on
                it.
            accelerator (`accelerate.Accelerator`, *optional*): Shares the work among its processes.

        Raises:
            `ValueError`: If the evaluator was made without `train`.
        """
        if self.train is None:
            raise ValueError("baselines learn from the training sequences: give `train=split.train` to the evaluator")
        num_items = len(self.source)
        scorers: dict[str, Scorer] = {
            "popularity": Popularity(self.train.item_counts(num_items)),
            "repeat_last": RepeatLast(num_items),
            "co_occurrence": CoOccurrence(self.train, num_items),
        }
        if self.content_vectors is not None:
            scorers["content_neighbours"] = ContentNeighbours(self.content_vectors)
        return {
            name: self.report(self.rank(scorer, max_history=max_history, accelerator=accelerator))
            for name, scorer in scorers.items()
        }

    def rank_model(
        self, model: Any, *, item_embeds: torch.Tensor | None = None, accelerator: Accelerator | None = None
    ) -> Ranking:
        """Rank the targets by a model; see [`evaluate`] for the arguments."""
        with in_evaluation(model):
            if item_embeds is None:
                item_embeds = encode_catalogue(
                    model,
                    self.source,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    accelerator=accelerator,
                )
            max_history = self.protocol.max_history or model.config.max_position_embeddings
            scorer = _ModelScorer(model, item_embeds, self.source.present, max_history)
            return self.rank(scorer, max_history=max_history, accelerator=accelerator)

    @torch.no_grad()
    def rank(
        self, scorer: Scorer, *, max_history: int | None = None, accelerator: Accelerator | None = None
    ) -> Ranking:
        """
        Rank the targets by any scorer, under this evaluator's protocol.

        Args:
            scorer (`Scorer`): Scores all items for a block of histories.
            max_history (`int`, *optional*): History length of the model, for protocols that depend on it.
            accelerator (`accelerate.Accelerator`, *optional*): Shares the users among its processes.

        Raises:
            `ValueError`: If a score is not finite (then on all processes), a target is not a candidate, or the
                protocol needs `max_history`.
        """
        max_history = self.protocol.max_history or max_history
        window, keep_last = self.protocol.mask_window(max_history), self.protocol.keep_last(max_history)
        sequences = self.sequences if keep_last is None else self.sequences.truncate(keep_last)
        candidates, num_items = self._candidates(keep_last), len(self.source)
        process, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        device = accelerator.device if accelerator else torch.device("cpu")
        # users with histories of similar length in one block, so that the model reads little padding
        users = np.argsort(sequences.lengths, kind="stable")[process::num_processes]
        block = min(MAX_USERS, max(1, MAX_SCORES // num_items))
        ranks = torch.zeros(len(sequences))
        lists = torch.zeros(len(sequences), min(LIST_LENGTH, num_items), dtype=torch.int32)  # rows, counted from 1
        for start in logging.tqdm(
            range(0, len(users), block), desc="Ranking", unit="block", delay=2, leave=False, disable=process > 0
        ):
            mine = users[start : start + block]
            inputs = [last_items(sequences, mine, scorer.max_history)]
            if getattr(scorer, "reads_time", False):
                inputs.append(last_items(sequences, mine, scorer.max_history, sequences.timestamps))
            scores = scorer(*inputs)
            block_ranks = rank_scores(
                scores,
                torch.from_numpy(self.targets[mine]),
                last_items(sequences, mine, window),
                candidates=candidates,
                ties=self.protocol.ties,
                protect_target=self.protocol.protect_target,
            )
            ranks[torch.from_numpy(mine)] = block_ranks.cpu()
            best = scores.topk(lists.shape[1], dim=1)
            lists[torch.from_numpy(mine)] = ((best.indices + 1) * (best.values > -torch.inf)).int().cpu()
        if accelerator is not None:
            ranks = accelerator.reduce(ranks.to(device), reduction="sum").cpu()
            lists = accelerator.reduce(lists.to(device), reduction="sum").cpu()
        return Ranking(check_finite(ranks), lists - 1, candidates, sequences, max_history)

    def report(self, ranking: Ranking) -> dict[str, Any]:
        """
        Turn ranks into the report.

        Returns:
            `dict`, fit for JSON: `protocol` (masking, ties, `max_history`, `num_items` ranked, `num_users`, and, for a
            sample of users, the number that they are `drawn_from`, ...), `metrics`, `intervals` (95 % bootstrap over
            users), `slices` (by `target`, `target_modality`, `history_length`, `history_modality`), `repeats` (the
            `share` of targets that are in the history, and the `hit_rate_ceiling` that follows from the masking) and
            `recommendations` (`coverage@10`, and `mean_log_popularity@10` if training counts are known).
        """
        headline = LIST_LENGTH if LIST_LENGTH in self.ks else max(self.ks)
        protocol = {
            **asdict(self.protocol),
            "max_history": ranking.max_history,
            "num_items": int(ranking.candidates.sum()),
            "num_users": len(ranking.ranks),
        }
        if len(self.sequences) < len(self.all_sequences):
            protocol["drawn_from"] = len(self.all_sequences)
        return {
            "protocol": protocol,
            "metrics": ranking_metrics(ranking.ranks, self.ks),
            "intervals": {
                name: bootstrap_interval(metric_values(ranking.ranks, name))
                for name in (f"hit_rate@{headline}", f"ndcg@{headline}", "mrr")
            },
            "slices": self._slices(ranking),
            "repeats": self._repeats(ranking),
            "recommendations": self._recommendations(ranking),
        }

    def _slices(self, ranking: Ranking) -> dict[str, dict[str, dict[str, float]]]:
        (labels, combination), lengths = modality_combinations(self.source), ranking.sequences.lengths - 1
        mix = history_mix(ranking.sequences, combination, len(labels), ranking.max_history)
        slices = {
            "target_modality": (labels, combination[self.targets]),
            "history_length": (LENGTH_LABELS, np.digitize(lengths, LENGTH_EDGES)),
            "history_modality": ((*labels, "mixed"), mix),
        }
        if self.train_counts is not None:
            warm = np.asarray(self.train_counts)[self.targets] > 0
            slices = {"target": (("cold", "warm"), warm.astype(int)), **slices}
        return {name: self._sliced(ranking.ranks, *labelled) for name, labelled in slices.items()}

    def _sliced(self, ranks: torch.Tensor, labels: Sequence[str], codes: np.ndarray) -> dict[str, dict[str, float]]:
        parts = {label: ranks[torch.from_numpy(codes == code)] for code, label in enumerate(labels)}
        return {
            label: {"num_users": len(part), **ranking_metrics(part, self.ks)}
            for label, part in parts.items()
            if len(part)
        }

    def _repeats(self, ranking: Ranking) -> dict[str, float]:
        nearest = []  # steps from each target back to the same item, infinite if the item is new to the user
        for block in ranking.sequences.blocks():
            users, place = block.expand()
            steps = block.ends[users] - 1 - place
            same = (block.items[place] == block.items[block.ends - 1][users]) & (steps > 0)
            nearest.append(np.full(len(block), np.inf))
            np.minimum.at(nearest[-1], users[same], steps[same])
        steps, window = np.concatenate(nearest), self.protocol.mask_window(ranking.max_history)
        masked = (steps < np.inf) & (steps <= (np.inf if window is None else window))
        sure_misses = 0.0 if self.protocol.protect_target else masked.mean()
        return {"share": float((steps < np.inf).mean()), "hit_rate_ceiling": float(1 - sure_misses)}

    def _recommendations(self, ranking: Ranking) -> dict[str, float]:
        described = {f"coverage@{LIST_LENGTH}": _coverage(ranking)}
        if self.train_counts is not None and ranking.recommended.any():
            popularity = np.average(log_popularity(self.train_counts), weights=ranking.recommended.numpy())
            described[f"mean_log_popularity@{LIST_LENGTH}"] = float(popularity)
        return described

    def _candidates(self, keep_last: int | None) -> torch.Tensor:
        num_items = len(self.source)
        if self.candidates is not None:
            candidates = self.candidates
        elif self.protocol.candidates == "catalogue":
            return torch.ones(num_items, dtype=torch.bool)
        else:
            trained = 0 if self.train_counts is None else self.train_counts
            sequences = self.all_sequences if keep_last is None else self.all_sequences.truncate(keep_last)
            candidates = sequences.item_counts(num_items) + trained > 0
        missing = int((~candidates[self.targets]).sum())
        if missing:
            raise ValueError(f"{missing} of {len(self.targets)} targets are not among the candidates: add their items")
        return torch.from_numpy(candidates)


class _ModelScorer:
    """Scores by the dot product of the last user state and the item vectors, on the model's device."""

    def __init__(self, model: Any, item_embeds: torch.Tensor, present: torch.Tensor, max_history: int):
        self.model = model
        self.item_embeds = item_embeds.float()
        self.history_embeds = item_embeds.to(model.dtype)
        self.present = present.to(item_embeds.device)
        self.max_history = max_history
        self.reads_time = bool(model.config.time_buckets)

    def __call__(self, history: torch.Tensor, timestamps: torch.Tensor | None = None) -> torch.Tensor:
        history = history.to(self.item_embeds.device)
        timestamps = None if timestamps is None else timestamps.to(history.device)
        states = self.model.get_user_features(self.history_embeds, history, self.present, timestamps)
        return dot_scores(last_state(states, history), self.item_embeds)


def _check_sequences(sequences: Sequences) -> None:
    short = np.flatnonzero(sequences.lengths < 2)
    if len(sequences) == 0:
        raise ValueError("there are no sequences to evaluate: no user has enough interactions for the split")
    if len(short):
        raise ValueError(
            f"{len(short)} of {len(sequences)} sequences lack a history or a target (the first is of user "
            f"{sequences.user_ids[short[0]]}): leave them out, as `leave_one_out` does"
        )


def _coverage(ranking: Ranking) -> float:
    return int((ranking.recommended > 0).sum()) / int(ranking.candidates.sum())
