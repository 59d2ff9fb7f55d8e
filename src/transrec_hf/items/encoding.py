"""A whole catalogue to vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.catalogue import Catalogue
from ..model.item_encoder_transrec import tower_width
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .preparing import prepare_items, token_budget


if TYPE_CHECKING:
    from accelerate import Accelerator

    from .store import ActivationStore

# not of the public interface of PyTorch, whose compiler uses them
PACKED_OPERATORS = ("_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight")


def item_modalities(catalogue: Catalogue, model: TransRecModel) -> torch.Tensor | None:
    """Which of text and image the model reads of each item: `(n_items, 2)`, `None` for the ID baseline."""
    if not model.config.modalities:
        return None
    present = {"text": catalogue.has_text, "image": catalogue.has_image}
    columns = [values & (modality in model.config.modalities) for modality, values in present.items()]
    return torch.from_numpy(np.stack(columns, axis=1))


def sort_by_length(catalogue: Catalogue, processor: TransRecProcessor) -> np.ndarray:
    """Catalogue rows by the tokens of their texts, the longest first, so that it shows at once if memory suffices."""
    if "text" not in processor.modalities:
        return np.arange(len(catalogue))
    lengths = catalogue.tokens(processor.tokenizer, processor.max_text_length).lengths
    return np.argsort(-lengths, kind="stable")


def item_loader(
    catalogue: Catalogue,
    processor: TransRecProcessor,
    rows: np.ndarray,
    batch_size: int,
    *,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    store: ActivationStore | None = None,
) -> DataLoader:
    """Batches of model inputs of the given catalogue rows, in that order; see [`prepare_items`]."""
    device = torch.device(device)
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, catalogue, processor, store, token_budget(device)),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the numbers of training
    )


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on another device."""
    return {
        name: [part.to(device, non_blocking=True) for part in value]
        if isinstance(value, list)
        else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }


def _collate(
    catalogue: Catalogue, processor: TransRecProcessor, store: ActivationStore | None, max_tokens: int, rows: list[int]
) -> dict[str, Any]:
    return prepare_items(catalogue, np.asarray(rows), processor, store, max_tokens)


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
    catalogue: Catalogue,
    processor: TransRecProcessor | None = None,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    store: ActivationStore | None = None,
) -> torch.Tensor:
    """
    Vectors of all items, in catalogue order: `(len(catalogue), hidden_size)`, fp32, on the model's device.

    Args:
        model ([`TransRecModel`]): in whichever mode; encoding is done in evaluation mode.
        catalogue ([`Catalogue`]): the items.
        processor ([`TransRecProcessor`], *optional*): of the model; the ID baseline needs none.
        batch_size (`int`, *optional*, defaults to 128): items per forward pass.
        num_workers (`int`, *optional*, defaults to 0): processes that read, decode and tokenise.
        accelerator (`Accelerator`, *optional*): its processes share the work, and each one gets all vectors.
        store ([`ActivationStore`], *optional*): of the frozen blocks' states, filled.

    Raises:
        `DataError`: if an item has none of the model's modalities.
        `ValueError`: if a content model comes without a processor, or an ID baseline meets another catalogue.
    """
    device = model.device
    if model.config.num_items is not None:
        if model.config.num_items != len(catalogue):
            raise ValueError(
                f"this ID baseline knows {model.config.num_items} items and the catalogue has {len(catalogue)}: "
                "it cannot leave the catalogue it was trained on"
            )
        return model.item_encoder.item_embedding.weight.detach().float()
    if processor is None:
        raise ValueError("encoding items needs the model's processor")
    catalogue.require(model.config.modalities)

    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    rows = sort_by_length(catalogue, processor) if store is None else np.arange(len(catalogue))
    loader = item_loader(
        catalogue,
        processor,
        rows[rank::world_size],
        batch_size,
        num_workers=num_workers,
        device=device,
        store=store,
    )
    embeds = torch.zeros(len(catalogue), model.config.hidden_size, device=device)
    was_training = model.training
    model.eval()
    try:
        with packed_linears(model):
            for batch in tqdm(loader, desc="Encoding items", disable=rank > 0 or len(loader) < 5, leave=False):
                rows = batch["item_ids"]
                embeds[rows.to(device)] = model.get_item_features(**move(batch, device)).float()
    finally:
        model.train(was_training)
    return accelerator.reduce(embeds, "sum") if world_size > 1 else embeds  # type: ignore[union-attr]


@torch.no_grad()
def standardize_projections(
    model: TransRecModel,
    catalogue: Catalogue,
    processor: TransRecProcessor,
    *,
    num_items: int = 256,
    seed: int = 0,
    store: ActivationStore | None = None,
) -> None:
    """
    Data-dependent initialisation (Krähenbühl et al., ICLR 2016) of projections that were never trained, told by their
    bias of zero: the item vectors of each tower get mean zero and, on average, length one over a sample of items.

    What a pre-trained tower says of all items alike is large beside what tells them apart. Without this step the first
    epochs go into unlearning it, with it an untrained model already ranks by content.

    Args:
        model ([`TransRecModel`]): changed in place.
        catalogue ([`Catalogue`]): the items to sample from.
        processor ([`TransRecProcessor`]): of the model.
        num_items (`int`, *optional*, defaults to 256): size of the sample for each modality.
        seed (`int`, *optional*, defaults to 0): of the sample.
        store ([`ActivationStore`], *optional*): of the frozen blocks' states, filled.
    """
    encoder, rng, was_training = model.item_encoder, np.random.default_rng(seed), model.training
    model.eval()
    for modality in model.config.modalities:
        text = modality == "text"
        projection = encoder.text_projection if text else encoder.visual_projection
        last: Any = list(projection.modules())[-1]  # of those with a hidden layer
        rows = np.flatnonzero(catalogue.has_text if text else catalogue.has_image)
        if last.bias.any() or len(rows) < 2:
            continue
        sample = np.sort(rng.permutation(rows)[:num_items])
        batch = move(prepare_items(catalogue, sample, processor, store), model.device)
        if text:
            vectors = model.get_text_features(
                batch.get("input_ids"), batch["attention_mask"], batch.get("text_states")
            )
        else:
            vectors = model.get_image_features(batch.get("pixel_values"), batch.get("image_states"))
        variance, mean = torch.var_mean(vectors.float(), dim=0)
        scale = variance.sum().clamp(min=1e-12).rsqrt()
        last.weight.mul_(scale)
        last.bias.copy_(-mean * scale)
    model.train(was_training)


def content_vectors(
    text_model: str | None,
    vision_model: str | None,
    catalogue: Catalogue,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """
    What pre-trained towers alone say of the items, for the zero-shot baseline: `(len(catalogue), sum of widths)`, the
    part of each tower scaled to length 1, and zero where an item lacks its modality.

    Args:
        text_model, vision_model (`str`, *optional*): folders or Hub ids of the towers, at least one.
        catalogue ([`Catalogue`]): the items.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where to compute them.
        kwargs: further arguments of [`encode_catalogue`].
    """
    model = TransRecModel.from_text_vision_pretrained(text_model, vision_model)
    processor = TransRecProcessor.from_towers(text_model, vision_model)
    encoder = model.item_encoder
    widths = [tower_width(tower) for tower in encoder.towers.values()]
    projections = {"text": "text_projection", "image": "visual_projection"}
    for modality, columns in zip(encoder.towers, torch.eye(sum(widths)).split(widths, dim=1), strict=True):
        # each tower's output into columns of its own, untouched
        projection = torch.nn.Linear(columns.shape[1], columns.shape[0], bias=False)
        projection.weight = torch.nn.Parameter(columns.contiguous())
        setattr(encoder, projections[modality], projection)
    if len(widths) > 1:
        encoder.missing_embeds = torch.nn.Parameter(torch.zeros(len(widths), sum(widths)))
    model.config.hidden_size = sum(widths)
    vectors = encode_catalogue(model.to(device), catalogue, processor, **kwargs).cpu()
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in vectors.split(widths, dim=1)], dim=1)
