"""Modality balance: measuring during training how well a model uses each modality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..evaluation.metrics import ranking_metrics
from .adapters import base_of


if TYPE_CHECKING:
    from .trainer import TransRecTrainer

METRIC = "ndcg@10"
"""The metric of the references and the gaps."""
MEASURED = ("hit_rate@10", METRIC)


def views(modalities: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Sets of modalities that are shown, by name: each one alone and, if there are more than two, all but one."""
    alone: dict[str, tuple[str, ...]] = {f"{name} alone": (name,) for name in modalities}
    if len(modalities) < 3:
        return alone
    return alone | {f"without {name}": tuple(other for other in modalities if other != name) for name in modalities}


class ModalityBalanceCallback(TrainerCallback):
    """
    At every `every`-th evaluation, rank the validation targets with all modalities of the items, and with each one
    alone. An item that lacks the modality keeps the contents that it has. The numbers are logged, and are under
    `"balance"` in the validation report, hence in `evaluation.json` and on the model card.

    A joint model first learns the modality that is easier to fit, and the others stay under-trained ("1 + 1 < 2").
    Signs are small gradients, and a modality that alone is far worth less than in a model that reads only this
    modality: its *under-optimisation gap*.

    Args:
        trainer ([`TransRecTrainer`]): The trainer of the model, on one data set.
        every (`int`, *optional*, defaults to 1): Measure at the first evaluation and then at every `every`-th one.
        references (`dict[str, float]`, *optional*): For each modality, the validation ndcg@10 of a model that reads
            only this modality. The references of the teachers of a [`BalancedTrainer`] are measured.

    Raises:
        `ValueError`: If the model reads only one modality, a reference names a modality that it does not read, or
            there are several data sets.

    Example:
    ```python
    >>> trainer.add_callback(ModalityBalanceCallback(trainer, references={"text": 0.051, "image": 0.032}))
    ```
    """

    def __init__(self, trainer: TransRecTrainer, every: int = 1, references: Mapping[str, float] | None = None):
        self.trainer, self.every, self.references = trainer, every, dict(references or {})
        model: Any = base_of(trainer.model)
        self.modalities: tuple[str, ...] = model.config.modalities
        if len(self.modalities) < 2:
            raise ValueError(
                f"this model reads {self.modalities or 'item ids'}, so there is nothing to balance: leave "
                "balance_every out"
            )
        if hasattr(trainer, "parts"):
            raise ValueError(
                "modality balance can be measured on one data set only, and there are several: leave it out"
            )
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        if unknown := set(self.references) - set(self.modalities):
            raise ValueError(
                f"there is a reference for {min(unknown)}, but the model reads {', '.join(self.modalities)}: remove it"
            )
        self.norms: dict[str, list[Tensor]] = defaultdict(list)  # since the last measurement

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measured = getattr(self.trainer, "references", None)
        if measured is not None:
            self.references = {**measured(), **self.references}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        encoder: Any = base_of(self.trainer.model).item_encoder
        for name in self.modalities:
            weights = (weight for module in encoder.parts_of(name) for weight in module.parameters())
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            norm: Any = nn.utils.get_total_norm(gradients)
            self.norms[name].append(getattr(norm, "full_tensor", lambda norm=norm: norm)())  # for sharded weights

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        evaluations = sum(f"eval_{METRIC}" in entry for entry in state.log_history)
        if f"eval_{METRIC}" in (metrics or {}) and (evaluations - 1) % self.every == 0:
            self.measure(self.trainer.reports["validation"])

    def measure(self, report: dict[str, Any] | None = None) -> dict[str, Any]:
        """
        Measure now, and log the numbers.

        Args:
            report (`dict`, *optional*): The validation report to which the numbers are added; made if not given.

        Returns:
            `dict`, fit for JSON: `metrics` with all modalities (`all`) and with each set of them; `gradient_norms` of
            the tower, pooling and projection of each modality, as means of the steps since the last measurement;
            `references`; and `gaps`, the differences between the references and the modalities alone.
        """
        trainer = self.trainer
        if report is None:
            of_users = trainer.args.max_eval_users
            report = trainer.report(trainer.split.validation, "validation", baselines=False, max_users=of_users)
        balance: dict[str, Any] = {"metrics": {"all": {name: report["metrics"][name] for name in MEASURED}}}
        for name, shown in views(self.modalities).items():
            balance["metrics"][name] = self._rank(shown)
        if self.norms:
            balance["gradient_norms"] = {name: float(torch.stack(norms).mean()) for name, norms in self.norms.items()}
            self.norms.clear()
        if self.references:
            balance["references"] = self.references
            alone = {name: balance["metrics"][f"{name} alone"][METRIC] for name in self.references}
            balance["gaps"] = {name: reference - alone[name] for name, reference in self.references.items()}
        report["balance"] = balance
        trainer.log(flat(balance))
        return balance

    def _rank(self, shown: Collection[str]) -> dict[str, float]:
        trainer = self.trainer
        source = trainer.source
        trainer.source = source.showing(shown)
        try:
            _, ranking = trainer._ranking(trainer.split.validation, False, trainer.args.max_eval_users)
        finally:
            trainer.source = source
        metrics = ranking_metrics(ranking.ranks, (10,))
        return {name: metrics[name] for name in MEASURED}


def flat(balance: Mapping[str, Any]) -> dict[str, float]:
    """
    The numbers of a measurement that are logged, e.g. `eval_text_alone_ndcg@10`, `gradient_norm_text`, `gap_text`.
    """
    logs = {
        f"eval_{view.replace(' ', '_')}_{metric}": value
        for view, metrics in balance["metrics"].items()
        for metric, value in metrics.items()
        if view != "all"
    }
    logs |= {f"gradient_norm_{name}": norm for name, norm in balance.get("gradient_norms", {}).items()}
    return logs | {f"gap_{name}": gap for name, gap in balance.get("gaps", {}).items()}


__all__ = ["ModalityBalanceCallback"]
