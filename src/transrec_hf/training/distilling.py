"""Distillation: a smaller model learns the item vectors of a larger one from a catalogue, and then its user states."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.interactions import Sequences
from ..items.encoding import MAX_FITTED, encode_catalogue, fit_texts, item_loader, item_states, packed_linears
from ..items.preparing import ItemSource, pad_right
from ..model.item_encoder_transrec import WhitenedProjection
from ..model.modalities_transrec import COLUMNS, MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.towers_transrec import build_tower, tower_blocks
from .parameters import part_of


logger = logging.get_logger(__name__)

SHARPNESS = 20.0  # factor of the cosines between items, before the softmax whose distribution a student matches
RANKING = 1.0  # weight of this ranking loss, relative to the cosine to the teacher's vector
HELD_OUT = 0.05  # share of the items on which the cosine to the teacher is measured
RIDGE = 1e-3  # ridge penalty of the map from states to vectors, as a share of the mean variance of the states
USERS = 128  # users in a step that teaches user states


def fewer_blocks(tower: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """
    A tower with some of the blocks of another tower, and all its other weights.

    Args:
        tower (`PreTrainedModel`): A tower whose blocks have equal shapes, such as a Transformer.
        kept (`Sequence[int]`): Numbers of the blocks to keep, from 0.

    Raises:
        `ValueError`: If blocks of the tower cannot be left out.
    """
    blocks = tower_blocks(tower)
    config = copy.deepcopy(tower.config)
    if not hasattr(config, "num_hidden_layers") or config.num_hidden_layers != len(blocks):
        raise ValueError(f"{type(tower).__name__} needs all of its blocks: give a smaller tower")
    config.num_hidden_layers = len(kept)
    name = next(name for name, module in tower.named_modules() if module is blocks)
    place = {old: new for new, old in enumerate(kept)}
    weights = {}
    for key, value in tower.state_dict().items():
        found = re.fullmatch(rf"{re.escape(name)}\.(\d+)\.(.+)", key)
        if found is None:
            weights[key] = value
        elif int(found[1]) in place:
            weights[f"{name}.{place[int(found[1])]}.{found[2]}"] = value
    smaller = build_tower(config)
    try:
        smaller.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{type(tower).__name__} cannot do without some of its blocks: give a smaller tower"
        ) from error
    return smaller.to(tower.dtype)


def evenly(total: int, number: int) -> list[int]:
    """`number` of `total` blocks, evenly spaced, with the first and the last one; a single one is the first."""
    return [round(i * (total - 1) / max(1, number - 1)) for i in range(number)]


def make_student(teacher: TransRecModel, num_blocks: int | None = None, **towers: PreTrainedModel) -> TransRecModel:
    """
    A smaller model that starts from the weights of its teacher, as far as they fit.

    Args:
        teacher ([`TransRecModel`]): The model to learn from. User encoder, priors and scales are copied.
        num_blocks (`int`, *optional*): Number of blocks to keep of each Transformer tower, evenly spaced.
        towers (`PreTrainedModel`): Other towers, by their names in the model, e.g. `text_model`.

    Raises:
        `ValueError`: If nothing becomes smaller, a tower is for a modality that the teacher does not read, or the
            teacher has ID vectors.
    """
    if teacher.config.num_items is not None:
        raise ValueError(
            "a model with ID vectors cannot be distilled into a model of content: train a teacher without ID vectors"
        )
    of_teacher = {str(MODALITIES[name].tower): tower for name, tower in teacher.item_encoder.towers.items()}
    unknown = towers.keys() - of_teacher.keys()
    if unknown:
        raise ValueError(
            f"the teacher has no {sorted(unknown)[0]}, but {', '.join(of_teacher) or 'no tower'}: leave it out"
        )
    made = dict(towers)
    for name, tower in of_teacher.items():
        if name not in made and num_blocks is not None and len(tower_blocks(tower)) > num_blocks:
            with suppress(ValueError):  # a tower of convolutions, whose blocks differ, stays whole
                made[name] = fewer_blocks(tower, evenly(len(tower_blocks(tower)), num_blocks))
    if not made:
        raise ValueError("the student would be as large as its teacher: give fewer blocks, or a smaller tower")
    config = copy.deepcopy(teacher.config)
    for modality in MODALITIES.values():
        if modality.tower in made:
            setattr(config, modality.config, made[modality.tower].config)
    kept = {name: copy.deepcopy(tower) for name, tower in of_teacher.items() if name not in made}
    student = TransRecModel(config, **made, **kept)
    own = student.state_dict()
    shared = {
        name: value
        for name, value in teacher.state_dict().items()
        if name in own
        and own[name].shape == value.shape
        and not name.startswith(tuple(f"item_encoder.{tower}." for tower in made))
    }
    student.load_state_dict(shared, strict=False)
    return student.to(teacher.device)


def content_vectors_of(model: TransRecModel, source: ItemSource, name: str, rows: np.ndarray) -> Tensor:
    """Vectors of the contents of one modality of catalogue rows, in that order: `(n, hidden_size)`."""
    found = []
    loader = item_loader(source, rows, 128, device=model.device)
    with torch.no_grad(), packed_linears(model):
        for batch in logging.tqdm(loader, desc=f"Vectors of {name}", disable=len(loader) < 5, leave=False):
            part = batch.to(model.device).parts[name]
            found.append(model.get_content_features(name, part).float()[part.rows.argsort()])
    return torch.cat(found).cpu()


def _steps(optimizer: torch.optim.Optimizer, total: int, description: str) -> Iterator[None]:
    """Steps with a learning rate that rises for a twentieth of them and then falls to zero as a cosine; with a bar."""

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (0.05 * total + 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in logging.tqdm(range(total), desc=description, disable=total < 5, leave=False):
        optimizer.zero_grad()
        yield
        optimizer.step()
        schedule.step()


@torch.no_grad()
def align(projection: nn.Module, states: Tensor, targets: Tensor) -> None:
    """
    Set an item map to the linear map that brings the student's states `(n, width)` nearest to the teacher's vectors
    `(n, hidden_size)`. In a whitened item map it replaces the axes. A map with a hidden layer stays as it is.
    """
    states, targets = states.double(), targets.double()
    mean, centre = states.mean(dim=0), targets.mean(dim=0)
    gram = (states - mean).T @ (states - mean)
    gram += torch.eye(len(gram), dtype=gram.dtype) * RIDGE * gram.diagonal().mean()
    found = torch.linalg.solve(gram, (states - mean).T @ (targets - centre))
    if isinstance(projection, WhitenedProjection):
        projection.mean.copy_(mean)
        projection.axes.copy_(found)
        projection.whitening.copy_(torch.eye(len(projection.whitening)))
        projection.num_fitted.fill_(len(states))
    elif isinstance(projection, nn.Linear):
        projection.weight.copy_(found.T)
        projection.bias.copy_(centre - mean @ found)


def vector_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """
    The distance of vectors `(n, d)` from those of a teacher, `(n, d)`: one minus the cosine, plus the divergence
    between their rankings of the teacher's other vectors.
    """
    found, wanted = F.normalize(found.float(), dim=-1), F.normalize(wanted.float(), dim=-1)
    alone = torch.eye(len(wanted), dtype=torch.bool, device=wanted.device)
    student, teacher = (
        (SHARPNESS * each @ wanted.T).masked_fill(alone, -1e4).log_softmax(dim=-1) for each in (found, wanted)
    )
    ranking = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - (found * wanted).sum(dim=-1)).mean() + RANKING * ranking


def distill_items(
    student: TransRecModel,
    teacher: TransRecModel,
    source: ItemSource,
    own: ItemSource | None = None,
    *,
    epochs: int = 3,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    tower_learning_rate: float = 1e-4,
    seed: int = 0,
) -> dict[str, float]:
    """
    Teach a student the item vectors of its teacher, modality by modality; no interactions are needed.

    Args:
        student ([`TransRecModel`]): See [`make_student`]; changed in place.
        teacher ([`TransRecModel`]): The model to learn from.
        source ([`ItemSource`]): Items of any catalogue that is similar to the one to serve.
        own ([`ItemSource`], *optional*): The same items with the student's processor, if it differs from the
        teacher's.
        epochs (`int`, *optional*, defaults to 3): Epochs over the items. With 0, only item maps are fitted.
        batch_size (`int`, *optional*, defaults to 128): Items in a step.
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak learning rate of the projections.
        tower_learning_rate (`float`, *optional*, defaults to 1e-4): Peak learning rate of the towers.
        seed (`int`, *optional*, defaults to 0): Seed of the held-out items and the batches.

    Returns:
        `dict[str, float]`: For each modality, the mean cosine between the vectors of student and teacher on held-out
            items.

    Raises:
        `ValueError`: If the vectors of student and teacher have different widths.
    """
    if student.config.hidden_size != teacher.config.hidden_size:
        raise ValueError(
            f"the teacher's vectors have {teacher.config.hidden_size} numbers and the student's "
            f"{student.config.hidden_size}: make the student with make_student(teacher)"
        )
    own = own or source
    fit_texts(teacher, source)
    fit_texts(student, own)
    rng = np.random.default_rng(seed)
    teacher.eval()
    student.eval()  # without dropout: the targets are exact
    cosines = {}
    for name in student.item_encoder.towers:
        rows = np.flatnonzero(source.present[:, COLUMNS[name]].numpy())
        if len(rows) < 2:
            continue
        shuffled = rng.permutation(rows)
        held = max(1, int(HELD_OUT * len(rows)))
        kept_out, trained = np.sort(shuffled[:held]), np.sort(shuffled[held:])
        found, known = (
            content_vectors_of(model, items, name, kept_out) for model, items in ((student, own), (teacher, source))
        )
        if torch.allclose(found, known, atol=1e-5):
            cosines[name] = 1.0  # the tower stays as it is
            continue
        wanted = torch.zeros(len(source), teacher.config.hidden_size)
        wanted[rows] = content_vectors_of(teacher, source, name, rows)
        fitted = np.sort(rng.permutation(trained)[:MAX_FITTED])
        states = item_states(student, own.select(fitted), name).cpu()
        align(student.item_encoder.projection(name), states, wanted[fitted])
        if epochs:
            rates = {"tower": tower_learning_rate, "projection": learning_rate}
            _teach(student, own, name, trained, wanted, epochs, batch_size, rates, rng)
        found = content_vectors_of(student, own, name, kept_out)
        cosines[name] = float(F.cosine_similarity(found, wanted[kept_out]).mean())
        logger.info("Vectors of %s have a cosine of %.3f with the teacher's", name, cosines[name])
    return cosines


def _teach(
    student: TransRecModel,
    source: ItemSource,
    name: str,
    rows: np.ndarray,
    wanted: Tensor,
    epochs: int,
    batch_size: int,
    rates: dict[str, float],
    rng: np.random.Generator,
) -> None:
    """Train the parts that the contents of one modality pass, except the embeddings of tokens or pixels."""
    student.requires_grad_(False)
    for module in student.item_encoder.parts_of(name):
        module.requires_grad_(True)
    embeddings = student.item_encoder.towers[name].get_input_embeddings()
    if embeddings is not None:
        embeddings.requires_grad_(False)
    groups: dict[str, list[nn.Parameter]] = {}
    for key, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(key), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rates[part]} for part, group in groups.items()], weight_decay=0.01
    )
    orders = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    loader = item_loader(source, orders[: len(orders) // batch_size * batch_size or None], batch_size)
    for batch, _ in zip(loader, _steps(optimizer, len(loader), f"Teaching {name}"), strict=True):
        part = batch.to(student.device).parts[name]
        found = student.get_content_features(name, part)
        vector_loss(found, wanted[batch.item_rows[part.rows.cpu()]].to(found.device)).backward()
    student.requires_grad_(True)


def distill_users(
    student: TransRecModel,
    teacher: TransRecModel,
    source: ItemSource,
    train: Sequences,
    own: ItemSource | None = None,
    *,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> float:
    """
    Teach a student the user states of its teacher. Each reads its own item vectors, and the towers stay as they are.

    Args:
        student ([`TransRecModel`]): A student of [`distill_items`]; changed in place.
        teacher ([`TransRecModel`]): The model to learn from.
        source ([`ItemSource`]): The items.
        train ([`Sequences`]): Training sequences.
        own ([`ItemSource`], *optional*): The same items with the student's processor, if it differs from the
        teacher's.
        epochs (`int`, *optional*, defaults to 1): Epochs over the sequences.
        learning_rate (`float`, *optional*, defaults to 1e-4): Peak learning rate.
        seed (`int`, *optional*, defaults to 0): Seed of the batches.

    Returns:
        `float`: The mean cosine between the states of student and teacher in the last tenth of the steps.
    """
    rng, length = np.random.default_rng(seed), student.config.max_position_embeddings
    teacher.eval()
    student.eval()
    of_teacher, of_student = encode_catalogue(teacher, source), encode_catalogue(student, own or source)
    present = source.present.to(of_teacher.device)
    student.requires_grad_(True)
    student.item_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], learning_rate)
    users = np.concatenate([rng.permutation(len(train)) for _ in range(epochs)])
    batches = [users[start : start + USERS] for start in range(0, len(users), USERS)]
    cosines = []
    for batch, _ in zip(batches, _steps(optimizer, len(batches), "Teaching user states"), strict=True):
        some = train.select(batch).truncate(length)
        views = [some[place] for place in range(len(some))]
        history = torch.from_numpy(pad_right([view["items"] for view in views])).to(of_teacher.device)
        times = torch.from_numpy(pad_right([view["timestamps"] for view in views])).to(of_teacher.device)
        with torch.no_grad():
            wanted = teacher.get_user_features(of_teacher, history, present, times)
        found = student.get_user_features(of_student, history, present, times)
        cosine = F.cosine_similarity(found.float(), wanted.float(), dim=-1)[history >= 0].mean()
        (1 - cosine).backward()
        cosines.append(cosine.item())
    student.requires_grad_(True)
    return float(np.mean(cosines[-max(1, len(cosines) // 10) :]))


__all__ = ["distill_items", "distill_users", "make_student"]
