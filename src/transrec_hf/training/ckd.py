"""Counterfactual knowledge distillation (CKD): one teacher for each modality, beside any next-item objective."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..errors import MAX_EXAMPLES, DataError
from ..evaluation.metrics import ranking_metrics
from ..items.encoding import encode_catalogue
from ..items.meeting import ItemStatistics, match_items
from ..items.preparing import ItemSource, pad_right
from ..items.store import ActivationStore
from ..model.loss_transrec import masked_mean, paired_scores, scores
from ..model.modalities_transrec import COLUMNS, ItemBatch, showing
from ..model.modeling_transrec import TransRecModel
from ..model.user_encoder_transrec import last_state
from ..publishing.checkpoint import check_fits, load_checkpoint
from .adapters import base_of
from .arguments import TransRecTrainingArguments
from .collator import DataCollatorForNextItem, TrainingWindows
from .trainer import TransRecTrainer


CANDIDATES = 256  # items of a batch with which targets are compared, drawn at each step
GENERIC = 5.0  # weight of the generic loss, relative to the specific one
LEAST, MOST = 1e-8, 10.0  # limits of the contribution of a modality to a margin


def margins(states: Tensor, item_embeds: Tensor, target: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """
    The margins of each state: by how much its target scores higher than each candidate, and by how much each candidate
    scores higher than the next one; both `(n, n_candidates)`.

    Args:
        states (`Tensor` of shape `(n, width)`): User states.
        item_embeds (`Tensor` of shape `(n_items, width)`): Item vectors.
        target (`Tensor` of shape `(n,)`): Rows of the items that came next.
        candidates (`Tensor` of shape `(n_candidates,)`): Rows of other items.
    """
    found = scores(states, item_embeds[candidates])
    return paired_scores(states, item_embeds[target].unsqueeze(1)) - found, found - found.roll(-1, dims=1)


@torch.no_grad()
def counterfactual_weights(whole: Tensor, without: Sequence[Tensor], alone: Sequence[Tensor]) -> list[Tensor]:
    """
    Weights of the modalities, which add up to the number of modalities. The less a modality contributes to a margin,
    relative to its margin alone, the larger its weight. For two modalities this is the rule of the paper's code.

    Args:
        whole (`Tensor`): Margins with all modalities.
        without, alone (`Sequence[Tensor]`): Margins without each modality, and with it alone, of the same shape.
    """
    ratios = [((whole - rest) / own).nan_to_num(nan=1.0) for rest, own in zip(without, alone, strict=True)]
    inverse = [1 / ratio.clamp(LEAST, MOST) for ratio in ratios]
    return [len(inverse) * part / sum(inverse) for part in inverse]


def specific_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the student's margins between targets and others are below the teacher's."""
    return (teacher - student).clamp(min=0)


def generic_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between teacher and student on which of two items is preferred; 0 if both agree."""
    wanted = (teacher / temperature).sigmoid()
    found = F.binary_cross_entropy_with_logits(student / temperature, wanted, reduction="none")
    return found - F.binary_cross_entropy(wanted, wanted, reduction="none")


@dataclass
class Teacher:
    """
    A frozen model that ranks by one modality. Its outputs are computed once.

    Args:
        modality (`str`): The modality that it teaches.
        place (`str`): Folder or Hub id of the checkpoint.
        model ([`TransRecModel`]): The model.
        source ([`ItemSource`]): The items, prepared for this model.
    """

    modality: str
    place: str
    model: TransRecModel
    source: ItemSource

    @classmethod
    def load(cls, teacher: str, student: TransRecModel, catalogue: Catalogue) -> Teacher:
        """
        Load the teacher that an option names: a folder or Hub id, with `MODALITY=` before it if its model reads
        several.

        Raises:
            [`DataError`]: If it cannot teach this student on these items.
        """
        named, _, place = teacher.rpartition("=")
        model, processor = load_checkpoint(place)
        read = model.config.modalities
        modality = named or (read[0] if len(read) == 1 else "")
        if modality not in read:
            what = f"reads {' and '.join(read)}" if read else "reads no contents"
            mend = f": say which modality it teaches, as in {read[0]}={place}" if len(read) > 1 and not named else ""
            raise DataError(f"{place}: this teacher {what}{mend or f', but it should teach {modality or None!r}'}")
        if modality not in student.config.modalities:
            raise DataError(
                f"{place}: teaches {modality}, but the student reads {' and '.join(student.config.modalities)}: leave "
                "out this teacher"
            )
        needed, reaches = student.config.max_position_embeddings, model.config.max_position_embeddings
        if reaches < needed:
            raise DataError(
                f"{place}: reads histories of {reaches} items, but the student needs {needed}: train the student with "
                f"max_position_embeddings={min(needed, reaches)}, or the teacher with {needed}"
            )
        known = ItemStatistics.from_pretrained(place)
        if known is not None:
            strange = sorted(set(known.item_ids.tolist()) ^ set(catalogue.item_ids.tolist()))
            if strange:
                raise DataError(
                    f"{place}: was trained on another catalogue. {len(strange)} items are only there or only in "
                    f"{catalogue.source}, e.g. {', '.join(strange[:MAX_EXAMPLES])}: train the teacher on this "
                    "catalogue."
                )
        counts = match_items(model, catalogue, known)
        check_fits(model, catalogue)
        source = ItemSource(catalogue, processor)
        source.log_popularity = None if counts is None else counts.log_popularity
        return cls(modality, place, model.eval().requires_grad_(False), source.showing((modality,)))

    @torch.no_grad()
    def read(
        self, windows: TrainingWindows, collator: DataCollatorForNextItem, args: TransRecTrainingArguments
    ) -> None:
        """
        Compute item vectors and the user states of all training windows.

        Args:
            windows ([`TrainingWindows`]): The windows.
            collator ([`DataCollatorForNextItem`]): Cuts them into histories and targets.
            args ([`TransRecTrainingArguments`]): The arguments of the run.
        """
        model, source = self.model.to(args.device), self.source
        if args.activation_store is not None and model.item_encoder.towers:
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            store = ActivationStore(args.activation_store, model, source, dtype=dtype)
            store.fill(batch_size=args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers)
            source = store.source
        self.item_embeds = encode_catalogue(model, source, batch_size=args.per_device_eval_batch_size)
        present = source.present.to(args.device)
        lengths = np.maximum(windows.windows.lengths - collator.config.num_targets, 1)
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        shape = (int(lengths.sum()), self.item_embeds.shape[1])
        with tempfile.TemporaryFile() as file:  # an unnamed file, of which only the parts that are read are in memory
            self.states = np.memmap(file, dtype=np.float16, shape=shape)  # type: ignore[call-overload]
        size = args.per_device_eval_batch_size
        for start in logging.tqdm(
            range(0, len(windows), size), desc=f"User states of the {self.modality} teacher", delay=2, leave=False
        ):
            some = [windows[index] for index in range(start, min(start + size, len(windows)))]
            history, times = (
                torch.from_numpy(pad_right([collator.split(window[name])[0] for window in some])).to(args.device)
                for name in ("items", "timestamps")
            )
            states = model.get_user_features(self.item_embeds, history, present, times)[history >= 0]
            self.states[self.starts[start] : self.ends[start + len(some) - 1]] = states.half().cpu().numpy()

    def states_of(self, windows: Tensor) -> Tensor:
        """The states of training windows `(n,)`: `(n, length, width)`, zero in the padding."""
        rows = windows.tolist()
        found = [torch.from_numpy(np.array(self.states[self.starts[row] : self.ends[row]])) for row in rows]
        return nn.utils.rnn.pad_sequence(found, batch_first=True).to(self.item_embeds)


class BalancedTrainer(TransRecTrainer):
    """
    A [`TransRecTrainer`] whose model (the student) also learns from one teacher for each modality: when it sees one
    modality alone, it learns to rank as this teacher. The towers run once for each item, as without teachers.

    Args:
        teachers (`Sequence[str]`): Folders or Hub ids of models that were trained on the same catalogue. For a model
            that reads several modalities, write `MODALITY=` before it.
        distillation (`float`, *optional*, defaults to 0.1): Weight of the distillation, relative to the objective.
        temperature (`float`, *optional*, defaults to 1.0): Temperature of the margins in the generic loss.
        kwargs: Further arguments of [`TransRecTrainer`].

    Raises:
        [`DataError`]: If a teacher cannot teach this model on this catalogue.
        `ValueError`: If the objective is `"masked"`, or several processes train.

    Example:
    ```python
    >>> trainer = BalancedTrainer(model, args, teachers=["runs/text", "runs/image"], catalogue=catalogue, split=split)
    ```
    """

    def __init__(
        self,
        model: TransRecModel,
        args: TransRecTrainingArguments,
        *,
        teachers: Sequence[str],
        distillation: float = 0.1,
        temperature: float = 1.0,
        **kwargs: Any,
    ):
        if args.world_size > 1 or args.item_cache_age is not None:
            raise ValueError("teachers need a single process, and no item_cache_age: leave it out")
        if model.config.objective == "masked":
            raise ValueError(
                "teachers rank the next item, but objective 'masked' predicts hidden items: leave out one of them"
            )
        super().__init__(model, args, **kwargs)
        found = [Teacher.load(teacher, model, self.catalogue) for teacher in teachers]
        self.teachers = {teacher.modality: teacher for teacher in found}
        if len(self.teachers) < len(found):
            raise DataError(
                f"{found[-1].place}: is a second teacher of {found[-1].modality}: give one teacher for each modality"
            )
        if not (0 < distillation < math.inf and 0 < temperature < math.inf):
            raise ValueError(f"distillation and temperature must be above 0, got {distillation} and {temperature}")
        self.distillation, self.temperature = distillation, temperature
        self.distilled: list[Tensor] = []  # since the last log

    def prepare_model(self) -> None:
        super().prepare_model()
        with self.quiet(), self.autocast_smart_context_manager():
            for teacher in self.teachers.values():
                if teacher.source.log_popularity is None:
                    teacher.source.log_popularity = self.source.log_popularity
                teacher.read(self.windows, self.make_collator(), self.args)

    def references(self) -> dict[str, float]:
        """For each modality, the validation ndcg@10 of its teacher, for [`ModalityBalanceCallback`]."""
        evaluator = self.ranking_evaluator(self.split.validation, max_users=self.args.max_eval_users)
        found = {}
        for name, teacher in self.teachers.items():
            evaluator.source = teacher.source
            ranking = evaluator.rank_model(teacher.model, item_embeds=teacher.item_embeds)
            found[name] = ranking_metrics(ranking.ranks, (10,))["ndcg@10"]
        return found

    def get_train_dataloader(self) -> DataLoader:
        """Training batches that also hold the indices of their windows."""
        collator = self.make_collator()

        def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collator(features), "windows": torch.tensor([feature["user"] for feature in features])}

        self.data_collator = collate
        return super(TransRecTrainer, self).get_train_dataloader()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        windows, items = inputs.pop("windows"), inputs["items"]
        student: Any = base_of(self.accelerator.unwrap_model(model))
        contents = {name: (student.get_content_features(name, part), part.rows) for name, part in items.parts.items()}
        known: dict[str, Any] = {"items": ItemBatch(items.present, item_rows=items.item_rows)}
        known["item_embeds"] = item_vectors(student, contents, items.present, items.item_rows)
        loss, outputs = super().compute_loss(model, {**inputs, **known}, return_outputs=True, **kwargs)
        learned = self.distil(student, contents, {**inputs, **known}, outputs.last_hidden_state, windows)
        self.distilled.append(learned.detach())
        loss = loss + self.distillation * learned
        return (loss, outputs) if return_outputs else loss

    def distil(
        self,
        student: TransRecModel,
        contents: Mapping[str, tuple[Tensor, Tensor]],
        inputs: dict[str, Any],
        states: Tensor,
        windows: Tensor,
    ) -> Tensor:
        """
        The distillation loss of one batch.

        Args:
            student ([`TransRecModel`]): The student.
            contents (`dict[str, tuple[Tensor, Tensor]]`): For each modality, the vectors of contents and their item
                rows.
            inputs (`dict`): The batch, with `item_embeds`.
            states (`Tensor` of shape `(n_users, length, width)`): States of the student with all modalities.
            windows (`Tensor` of shape `(n_users,)`): The training windows of the users.
        """
        history, targets, popularity = (inputs[name] for name in ("history_index", "target_index", "log_popularity"))
        items, times = inputs["items"], inputs.get("timestamps")
        with_popularity = partial(student.with_popularity, log_popularity=popularity)
        users, positions = (targets >= 0).nonzero(as_tuple=True)
        target = targets[users, positions]
        candidates = torch.randperm(len(items), device=target.device)[:CANDIDATES]

        def at_targets(states: Tensor) -> Tensor:
            if student.config.objective == "cpc":
                return last_state(states, history)[users]
            return states[users, positions]

        def of_student(shown: Collection[str]) -> tuple[Tensor, Tensor]:
            present = showing(items.present, shown)
            embeds = with_popularity(item_vectors(student, contents, present, items.item_rows))
            found = student.get_user_features(embeds, history, present, times)
            return margins(at_targets(found), embeds, target, candidates)

        alone = {name: of_student((name,)) for name in self.teachers}
        whole = with_popularity(inputs["item_embeds"])
        weights = self.weights(margins(at_targets(states), whole, target, candidates)[0], alone, of_student)
        slots = torch.cat([history, targets], dim=1)
        own = torch.zeros(len(slots), len(items) + 1, dtype=torch.bool, device=slots.device)
        own = own.scatter(1, slots.where(slots >= 0, len(items)), True)[users][:, candidates]
        total = states.new_zeros(())
        for name, weight in weights.items():
            teacher = self.teachers[name]
            embeds = teacher.item_embeds[items.item_rows]
            taught = margins(at_targets(teacher.states_of(windows)), embeds, target, candidates)
            shows = items.present[:, COLUMNS[name]]
            of_two, shown = shows[candidates] & shows[candidates].roll(-1), shows[target].unsqueeze(1)
            specific = weight * specific_loss(alone[name][0], taught[0])
            generic = weight.mean(dim=1, keepdim=True) * generic_loss(alone[name][1], taught[1], self.temperature)
            total = total + masked_mean(specific, shown & shows[candidates] & ~own)
            total = total + GENERIC * masked_mean(generic, of_two.expand_as(generic))
        return total

    @torch.no_grad()
    def weights(
        self,
        whole: Tensor,
        alone: Mapping[str, tuple[Tensor, Tensor]],
        of_student: Callable[[Collection[str]], tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """
        The [`counterfactual_weights`] of the modalities, from margins with all, without each, and with each alone.
        """
        if len(alone) == 1:
            return {name: torch.ones_like(whole) for name in alone}
        without = []
        for name in alone:
            rest = tuple(other for other in self.model.config.modalities if other != name)
            without.append((alone[rest[0]] if rest == (rest[0],) and rest[0] in alone else of_student(rest))[0])
        found = counterfactual_weights(whole, without, [margin for margin, _ in alone.values()])
        return dict(zip(alone, found, strict=True))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like `Trainer.log`; beside the loss, log the part of it that is the distillation."""
        if "loss" in logs and self.distilled:
            logs["ckd"] = float(torch.stack(self.distilled).mean())
            self.distilled.clear()
        super().log(logs, *args, **kwargs)


def item_vectors(
    model: TransRecModel, contents: Mapping[str, tuple[Tensor, Tensor]], present: Tensor, item_rows: Tensor
) -> Tensor:
    """
    Vectors of items with the modalities in `present`, from the vectors of their contents: `(n_items, hidden_size)`.

    Args:
        model ([`TransRecModel`]): The model.
        contents (`dict[str, tuple[Tensor, Tensor]]`): For each modality, vectors `(n, hidden_size)` and items `(n,)`.
        present (`Tensor` of shape `(n_items, len(MODALITIES))`): Boolean, the modalities to use.
        item_rows (`Tensor` of shape `(n_items,)`): Rows in the catalogue.
    """
    shown = {}
    for name, (vectors, rows) in contents.items():
        kept = present[rows, COLUMNS[name]]
        if kept.any():
            shown[name] = (vectors[kept], rows[kept])
    embeds = model.item_encoder.fuse(shown, present)
    if model.config.num_items is not None:
        embeds = embeds + model.item_encoder.item_embedding(item_rows).to(embeds.dtype)
    return model._finished(embeds)


__all__ = ["BalancedTrainer"]
