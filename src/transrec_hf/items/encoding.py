"""A whole catalogue to vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..model.configuration_transrec import FORMAT_1
from ..model.modalities_transrec import COLUMNS, MODALITIES, ItemBatch
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.towers_transrec import in_evaluation, tower_width
from .codes import start_code_table
from .preparing import ItemSource


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.get_logger(__name__)

MAX_FITTED = 20_000  # items from which the statistics of a catalogue are taken
# not of the public interface of PyTorch, whose compiler uses them
PACKED_OPERATORS = ("_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight")


def sort_by_length(source: ItemSource) -> np.ndarray:
    """Catalogue rows by the tokens of their texts, the longest first, so that it shows at once if memory suffices."""
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
    source.units()  # texts are tokenised now, not in each worker
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, source),
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # or it would draw from the numbers of training
    )


def _collate(source: ItemSource, rows: list[int]) -> ItemBatch:
    return source.batch(np.asarray(rows))


def fit_texts(model: TransRecModel, source: ItemSource) -> None:
    """
    Cut texts where the model's text tower has no more positions, from now on: `max_text_length` of the processor is
    lowered to their number, with a warning if texts are as long.
    """
    processor, limit = source.processor, model.item_encoder.positions
    if processor is None or limit is None or processor.max_text_length <= limit:
        return
    is_long = [int((units > limit).sum()) for name, units in source.units().items() if MODALITIES[name].has_tokens]
    if any(is_long):
        logger.warning(
            f"{is_long[0]} texts have more than {limit} tokens, which is all that the text tower has positions for: "
            f"they are cut. Set max_text_length={limit} to do so without this warning."
        )
        source.forget("text")
    processor.max_text_length = limit


def linear_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype in which a layer on a CPU computes."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def has_packed_linears(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix products of packed weights for this CPU and dtype, and this PyTorch hands them out."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in PACKED_OPERATORS):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def packed_linears(model: TransRecModel) -> Iterator[None]:
    """
    Inside, on a CPU, the linear layers of the item encoder multiply in oneDNN by weights that were cast and laid out
    for it once; they have no gradients. PyTorch itself takes MKL in fp32, which leaves half the speed of a CPU of AMD
    unused; in bf16 it lays the weights out anew at each call and, under autocast, casts frozen ones anew. Compiled
    models, layers whose `forward` was replaced already, other devices and dtypes stay as they are.
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
        model ([`TransRecModel`]): In whichever mode; encoding is done in evaluation mode.
        source ([`ItemSource`]): The items.
        batch_size (`int`, *optional*, defaults to 128): Items per forward pass.
        num_workers (`int`, *optional*, defaults to 0): Processes that read, decode and tokenise.
        accelerator (`Accelerator`, *optional*): Its processes share the work, and each one gets all vectors.

    Raises:
        `DataError`: If an item has none of the model's modalities.
        `ValueError`: If the items of a content model come without a processor, or an ID baseline meets another
            catalogue.
    """
    device = model.device
    if model.config.num_items is not None:
        if model.config.num_items != len(source):
            raise ValueError(
                f"this ID baseline knows {model.config.num_items} items and the catalogue has {len(source)}: "
                "it cannot leave the catalogue it was trained on"
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
    Data-dependent initialisation (Krähenbühl et al., ICLR 2016) of projections that were never trained, told by their
    bias of zero: the item vectors of each modality get mean zero and, on average, length one over a sample of items.

    What a pre-trained tower says of all items alike is large beside what tells them apart. Without this step the first
    epochs go into unlearning it, with it an untrained model already ranks by content.

    A whitened item map takes the statistics of this catalogue, trained or not: see [`WhitenedProjection`].

    Args:
        model ([`TransRecModel`]): Changed in place.
        source ([`ItemSource`]): The items to sample from.
        num_items (`int`, *optional*, defaults to 256): Size of the sample for each modality.
        seed (`int`, *optional*, defaults to 0): Of the sample.
    """
    rng = np.random.default_rng(seed)
    for name in model.config.modalities:
        if name == "codes":
            start_code_table(model, source.catalogue)
        if model.config.item_map == "whitened":
            states = item_states(model, source, name, seed=seed)
            generator = torch.Generator().manual_seed(COLUMNS[name]) if name != model.config.modalities[0] else None
            if len(states):
                model.item_encoder.projection(name).fit(states, generator)  # type: ignore[operator]
            continue
        last: Any = list(model.item_encoder.projection(name).modules())[-1]  # of those with a hidden layer
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
    What the tower of a modality says of the items that have it, or of a sample of `num_items`, drawn by `seed`:
    `(n, width)`, what its projection reads, in catalogue order.
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


def content_vectors(
    towers: Mapping[str, str | None],
    catalogue: Catalogue,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """
    What pre-trained towers alone say of the items, for the zero-shot baseline: `(len(catalogue), sum of widths)`, the
    part of each tower scaled to length 1, and zero where an item lacks its modality.

    Args:
        towers (`dict[str, str]`): Folders or Hub ids, by the names of the table, e.g. `"text_model"`; at least one.
        catalogue ([`Catalogue`]): The items.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where to compute them.
        kwargs: further arguments of [`encode_catalogue`].
    """
    named: dict[str, Any] = {name: tower for name, tower in towers.items() if tower}
    model = TransRecModel.from_text_vision_pretrained(**{**named, **FORMAT_1})
    source = ItemSource(catalogue, TransRecProcessor.from_towers(**named))
    encoder = model.item_encoder
    widths = [tower_width(tower) for tower in encoder.towers.values()]
    for name, columns in zip(encoder.towers, torch.eye(sum(widths)).split(widths, dim=1), strict=True):
        # each tower's output into columns of its own, untouched
        projection = torch.nn.Linear(columns.shape[1], columns.shape[0], bias=False)
        projection.weight = torch.nn.Parameter(columns.contiguous())
        setattr(encoder, MODALITIES[name].projection, projection)
    if len(widths) > 1:
        encoder.missing_embeds = torch.nn.Parameter(torch.zeros(len(widths), sum(widths)))
    model.config.hidden_size = sum(widths)
    vectors = encode_catalogue(model.to(device), source, **kwargs).cpu()
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in vectors.split(widths, dim=1)], dim=1)
