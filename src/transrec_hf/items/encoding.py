"""Encoding a whole catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..model.modalities_transrec import COLUMNS, MODALITIES, ItemBatch
from ..model.modeling_transrec import TransRecModel
from ..model.towers_transrec import in_evaluation
from .codes import start_code_table
from .preparing import ItemSource


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.get_logger(__name__)

MAX_FITTED = 20_000  # most items that the statistics of a catalogue are computed from
# not public functions of PyTorch; its compiler uses them
PACKED_OPERATORS = ("_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight")


def sort_by_length(source: ItemSource) -> np.ndarray:
    """Catalogue rows by the length of their texts, the longest first, so that too little memory shows at once."""
    lengths = [units for name, units in source.units().items() if MODALITIES[name].mask is not None]
    return np.argsort(-sum(lengths), kind="stable") if lengths else np.arange(len(source))


def item_loader(
    source: ItemSource,
    rows: np.ndarray,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> DataLoader:
    """Batches of the given catalogue rows, in that order, as [`ItemBatch`]es for a model on `device`."""
    source.units()  # tokenise texts now, not in each worker
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, source),
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # otherwise it would use the random numbers of training
    )


def _collate(source: ItemSource, rows: list[int]) -> ItemBatch:
    return source.batch(np.asarray(rows))


def fit_texts(model: TransRecModel, source: ItemSource) -> None:
    """
    Lower `max_text_length` of the processor to the number of positions of the text tower, so that longer texts are
    cut. If there are such texts, log a warning.
    """
    processor, limit = source.processor, model.item_encoder.positions
    if processor is None or limit is None or processor.max_text_length <= limit:
        return
    is_long = [int((units > limit).sum()) for name, units in source.units().items() if MODALITIES[name].has_tokens]
    if any(is_long):
        logger.warning(
            f"{is_long[0]} texts have more than {limit} tokens, but the text tower has only positions for {limit}: "
            f"they are cut. Set max_text_length={limit} to avoid this warning."
        )
        source.forget("text")
    processor.max_text_length = limit


def linear_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype in which a layer on a CPU computes."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def has_packed_linears(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports packed weights for this CPU and dtype, and this version of PyTorch exposes them."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in PACKED_OPERATORS):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def packed_linears(model: TransRecModel) -> Iterator[None]:
    """
    A context in which, on a CPU, the linear layers of the item encoder use oneDNN with weights that were cast and
    packed once; there are no gradients. By default PyTorch uses MKL in fp32, which reaches only half the speed on AMD
    CPUs; in bf16 it packs the weights at each call and, under autocast, also casts frozen ones each time. Compiled
    models, layers whose `forward` was replaced, and other devices and dtypes stay as they are.
    """

    def pack(layer: nn.Linear) -> None:
        dtype = linear_dtype(layer)
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)

        def forward(states: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(states.to(dtype), weight, bias, "none", [], "")

        layer.forward = forward  # type: ignore[assignment]

    modules = list(model.item_encoder.modules()) if model.device.type == "cpu" else []
    if any(module._compiled_call_impl for module in modules):
        modules = []
    linears = [module for module in modules if type(module) is nn.Linear and "forward" not in vars(module)]
    linears = [layer for layer in linears if has_packed_linears(linear_dtype(layer))]
    try:
        for layer in linears:
            pack(layer)
        yield
    finally:
        for layer in linears:
            vars(layer).pop("forward", None)


@torch.no_grad()
def encode_catalogue(
    model: TransRecModel,
    source: ItemSource,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
) -> torch.Tensor:
    """
    Vectors of all items, in catalogue order: `(len(source), hidden_size)`, fp32, on the model's device; with one more
    column for the popularity of the items if the model has a `popularity_prior`.

    Args:
        model ([`TransRecModel`]): The model; it is in evaluation mode during encoding.
        source ([`ItemSource`]): The items.
        batch_size (`int`, *optional*, defaults to 128): Items per forward pass.
        num_workers (`int`, *optional*, defaults to 0): Processes that read, decode and tokenise.
        accelerator (`Accelerator`, *optional*): Its processes share the work, and each one gets all vectors.

    Raises:
        [`DataError`]: If an item has none of the model's modalities.
        `ValueError`: If a model that reads content gets no processor, or an ID baseline gets another catalogue.
    """
    device = model.device
    if model.config.num_items is not None:
        if model.config.num_items != len(source):
            raise ValueError(
                f"this ID baseline knows {model.config.num_items} items, but the catalogue has {len(source)}: give it "
                "the catalogue that it was trained on"
            )
    if not model.config.modalities:
        batch = ItemBatch(source.present, item_rows=torch.arange(len(source))).to(device)
        return model.with_popularity(model.get_item_features(batch).float(), source.log_popularity)
    if source.processor is None:
        raise ValueError("encoding items needs the model's processor: ItemSource(catalogue, processor)")
    source.catalogue.require(model.config.modalities)
    fit_texts(model, source)

    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    rows = sort_by_length(source)[rank::world_size]
    loader = item_loader(source, rows, batch_size, num_workers, device)
    embeds = torch.zeros(len(source), model.config.hidden_size, device=device)
    with in_evaluation(model), packed_linears(model):
        for batch in logging.tqdm(loader, desc="Encoding items", disable=rank > 0 or len(loader) < 5, leave=False):
            vectors = model.get_item_features(batch.to(device, non_blocking=True))
            embeds[batch.item_rows.to(device)] = vectors.float()
    if accelerator is not None and world_size > 1:
        embeds = accelerator.reduce(embeds, "sum")
    return model.with_popularity(embeds, source.log_popularity)


@torch.no_grad()
def standardize_projections(model: TransRecModel, source: ItemSource, *, num_items: int = 256, seed: int = 0) -> None:
    """
    Data-dependent initialisation (Krähenbühl et al., ICLR 2016) of untrained projections, which are recognised by
    their zero bias: the item vectors of each modality get mean zero and, on average, length one over a sample of
    items.

    In the outputs of a pre-trained tower, the part that all items share is large compared with their differences.
    Without this step the first epochs have to unlearn it; with it an untrained model already ranks by content.

    A whitened item map takes the statistics of this catalogue, trained or not: see [`WhitenedProjection`].

    Args:
        model ([`TransRecModel`]): The model; changed in place.
        source ([`ItemSource`]): The items to sample from.
        num_items (`int`, *optional*, defaults to 256): Size of the sample for each modality.
        seed (`int`, *optional*, defaults to 0): Of the sample.
    """
    rng = np.random.default_rng(seed)
    model.config.catalogue_shift = 0
    for name in model.config.modalities:
        if name == "codes":
            start_code_table(model, source.catalogue)
        if model.config.item_map == "whitened":
            states = item_states(model, source, name, seed=seed)
            generator = torch.Generator().manual_seed(COLUMNS[name]) if name != model.config.modalities[0] else None
            if len(states):
                model.item_encoder.projection(name).fit(states, generator)  # type: ignore[operator]
            continue
        last: Any = list(model.item_encoder.projection(name).modules())[
            -1
        ]  # the last layer of those with a hidden one
        rows = np.flatnonzero(source.present[:, COLUMNS[name]].numpy())
        if last.bias.any() or len(rows) < 2:
            continue
        batch = source.batch(np.sort(rng.permutation(rows)[:num_items])).to(model.device)
        with in_evaluation(model):
            vectors = model.get_content_features(name, batch.parts[name])
        variance, mean = torch.var_mean(vectors.float(), dim=0)
        scale = variance.sum().clamp(min=1e-12).rsqrt()
        last.weight.mul_(scale)
        last.bias.copy_(-mean * scale)


@torch.no_grad()
def item_states(
    model: TransRecModel, source: ItemSource, name: str, num_items: int = MAX_FITTED, seed: int = 0
) -> torch.Tensor:
    """
    The outputs of the tower of a modality that its projection reads, `(n, width)`, for all items that have the
    modality or for a sample of `num_items`, drawn by `seed`; in catalogue order.
    """
    rows = np.flatnonzero(source.present[:, COLUMNS[name]].numpy())
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:num_items])
    states, encoder = [], model.item_encoder
    with in_evaluation(model), packed_linears(model):
        loader = item_loader(source, rows, 128, device=model.device)
        for batch in logging.tqdm(loader, desc=f"Statistics of {name}", disable=len(loader) < 5, leave=False):
            part = batch.to(model.device).parts[name]
            buckets = [
                encoder.projected(name, encoder.state(name, values, mask, part.stored)).float()
                for values, mask in part.passes(model.pass_size(name))
            ]
            states.append(torch.cat(buckets)[part.rows.argsort()])
    return torch.cat(states) if states else torch.empty(0)


def content_of(model: TransRecModel, source: ItemSource) -> torch.Tensor:
    """
    The outputs of the towers for all items, side by side: `(len(source), sum of widths)`, in float32, on the CPU. The
    part of each modality has length 1, or is zero if an item lacks the modality.
    """
    parts = []
    for name in model.config.modalities:
        states = item_states(model, source, name, len(source))
        rows = source.present[:, COLUMNS[name]].nonzero().squeeze(1)
        if len(rows):
            part = torch.zeros(len(source), states.shape[1])
            parts.append(part.index_copy(0, rows, nn.functional.normalize(states.cpu(), dim=1)))
    return torch.cat(parts, dim=1)
