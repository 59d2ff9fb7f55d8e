"""Evaluation protocols: which items are ranked, and which are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..data.interactions import leave_one_out
from .ranking import check_option


if TYPE_CHECKING:
    from ..data.interactions import Sequences, Split


@dataclass(frozen=True)
class EvaluationProtocol:
    """
    Which items are ranked, and which are left out. Numbers under different protocols are not comparable.

    `L` is the number of last items that the model reads: `max_history` or, if that is None, the model's
    `max_position_embeddings`.

    Args:
        mask_history (`"none"`, `"window"` or `"full"`, defaults to `"full"`):
            Which items of the user cannot be recommended: none of them, the last `L + window_extra` before the target,
            or all.
        window_extra (`int`, defaults to 0): See `mask_history`.
        max_history (`int`, *optional*): `L`; the model's if None.
        keep_extra (`int`, *optional*): Only the last `L + keep_extra` items of a user are kept.
        min_interactions (`int`, defaults to 3): [`split`] leaves out users with fewer items.
        candidates (`"catalogue"` or `"interacted"`, defaults to `"catalogue"`):
            Whether all items are ranked, or only those in the kept sequence of some user.
        ties (`"expected"` or `"pessimistic"`, defaults to `"expected"`):
            Whether half or all of the items with the same score as the target are ranked before it.
        protect_target (`bool`, defaults to `False`):
            Whether the target is never masked. Otherwise a target that the user had before is a sure miss.
    """

    mask_history: Literal["none", "window", "full"] = "full"
    window_extra: int = 0
    max_history: int | None = None
    keep_extra: int | None = None
    min_interactions: int = 3
    candidates: Literal["catalogue", "interacted"] = "catalogue"
    ties: Literal["expected", "pessimistic"] = "expected"
    protect_target: bool = False

    def __post_init__(self) -> None:
        check_option("mask_history", self.mask_history, ("none", "window", "full"))
        check_option("candidates", self.candidates, ("catalogue", "interacted"))
        check_option("ties", self.ties, ("expected", "pessimistic"))

    def mask_window(self, max_history: int | None) -> int | None:
        """The number of masked items before the target; None for all."""
        if self.mask_history == "window":
            return self._length(max_history) + self.window_extra
        return None if self.mask_history == "full" else 0

    def keep_last(self, max_history: int | None) -> int | None:
        """The number of last items of a user that are kept, with the target; None for all."""
        return None if self.keep_extra is None else self._length(max_history) + self.keep_extra

    def split(self, sequences: Sequences, max_history: int | None = None) -> Split:
        """The leave-one-out split of whole sequences under this protocol; `max_history` is that of the model."""
        return leave_one_out(sequences, self.min_interactions, keep_last=self.keep_last(max_history))

    def _length(self, max_history: int | None) -> int:
        length = self.max_history or max_history
        if length is None:
            raise ValueError("this protocol depends on the history length of the model: give it as `max_history`")
        return length


PROTOCOLS = {
    # The default: everything that the user had is masked, and the whole history is kept.
    "full": EvaluationProtocol(),
    # NineRec, MoRec, Adapter4Rec (L = 20): the last L + 3 items of users with at least 5, all but the target masked.
    "ninerec": EvaluationProtocol(keep_extra=3, min_interactions=5, candidates="interacted"),
    # PMMRec (L = 20): the same truncation, but only the last L + 1 items before the target are masked.
    "pmmrec": EvaluationProtocol("window", window_extra=1, keep_extra=3, candidates="interacted"),
    # RecBole's sequential models (UniSRec, VQ-Rec, MISSRec) and Recformer: nothing is masked.
    "recbole": EvaluationProtocol("none"),
    # PixelRec (L = 10) and HLLM (L = 10 or 50): the whole history is masked.
    "hllm": EvaluationProtocol("full"),
    # TransRec (L = 25): the whole line but the target is masked.
    "transrec-paper": EvaluationProtocol("full"),
}
