"""An index in fewer bytes: its vectors in half precision, in 8 bits, as codes, or cut short."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..errors import DataError, one_line
from ..files import whole_file
from ..items.codes import ItemQuantizer, hash_of_vectors
from .index import ItemIndex


PACKED_NAME = "item_index.packed.safetensors"
FORMS = ("fp16", "int8", "codes", "prefix")
FORMAT = 1
OF_VECTORS = ("item_embeds", "scan", "bounds")  # tensors of an index that are not packed but computed again


def packed(vectors: Tensor, form: str, size: int | None = None, quantizer: ItemQuantizer | None = None) -> dict:
    """
    Vectors `(n, d)` in fewer bytes.

    Args:
        vectors (`Tensor` of shape `(n, d)`): The vectors.
        form (`str`): `"fp16"`; `"int8"`, with a scale for each vector; `"codes"` of a quantizer; or `"prefix"`, the
            first numbers of each, for models with `matryoshka_dims`.
        size (`int`, *optional*): Number of values that `"prefix"` keeps.
        quantizer ([`ItemQuantizer`], *optional*): The quantizer for `"codes"`, fitted on these vectors.

    Raises:
        [`DataError`]: If the quantizer was fitted on other vectors, or the size is wrong.
    """
    if form == "fp16":
        return {"half": vectors.half()}
    if form == "int8":
        scale = (vectors.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
        return {"bytes": (vectors / scale).round().to(torch.int8), "scale": scale}
    if form == "prefix":
        if size is None or not 1 <= size < vectors.shape[1]:
            raise DataError(f"a prefix must have 1 to {vectors.shape[1] - 1} numbers, got {size}")
        return {"prefix": vectors[:, :size].contiguous(), "width": torch.tensor(vectors.shape[1])}
    if form != "codes" or quantizer is None:
        raise DataError(f"form must be one of {', '.join(FORMS)}, with a quantizer for codes; got {form!r}")
    if quantizer.vectors_hash != hash_of_vectors(vectors):
        raise DataError(
            "this quantizer was fitted on other vectors than those of the index, so its codes would be wrong: fit one "
            "on the vectors of the index"
        )
    small = torch.uint8 if quantizer.codebooks.shape[1] <= 256 else torch.uint16
    return {
        "codes": quantizer.encode(vectors).to(small),
        **{f"quantizer.{k}": v for k, v in quantizer.tensors().items()},
    }


def unpacked(parts: Mapping[str, Tensor], method: str, is_unit: bool) -> Tensor:
    """The fp32 vectors that [`packed`] vectors stand for; of length 1 if `is_unit`."""
    if "half" in parts:
        vectors = parts["half"].float()
    elif "bytes" in parts:
        vectors = parts["bytes"].float() * parts["scale"]
    elif "prefix" in parts:
        vectors = pad(parts["prefix"], (0, int(parts["width"]) - parts["prefix"].shape[1]))
    else:
        own = {name.removeprefix("quantizer."): part for name, part in parts.items() if name.startswith("quantizer.")}
        vectors = ItemQuantizer(method=method, **own).decode(parts["codes"].long())  # type: ignore[arg-type]
    return normalize(vectors, dim=-1) if is_unit else vectors


def pack_index(
    index: ItemIndex,
    folder: str | os.PathLike,
    hidden_size: int,
    form: str,
    size: int | None = None,
    quantizer: ItemQuantizer | None = None,
) -> int:
    """
    Write an index with packed vectors, `item_index.packed.safetensors`. The popularity at the end of the vectors is
    not packed.

    Args:
        index ([`ItemIndex`]): The index.
        folder (`str`): Output folder.
        hidden_size (`int`): Length of a vector, without the popularity.
        form, size, quantizer: See [`packed`].

    Returns:
        `int`: Bytes that the vector of an item takes, without codebooks.
    """
    vectors, rest = index.item_embeds[:, :hidden_size].float(), index.item_embeds[:, hidden_size:]
    parts = packed(vectors, form, size, quantizer)
    is_unit = bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all())
    tensors = {name: value for name, value in index._tensors().items() if name not in OF_VECTORS}
    tensors |= {f"packed.{name}": value.contiguous() for name, value in parts.items()}
    tensors["packed.rest"] = rest.contiguous()
    made_from = {
        "catalogue_hash": index.catalogue_hash,
        "encoder_hash": index.encoder_hash,
        "packed_format": str(FORMAT),
        "method": quantizer.method if quantizer is not None else "",
        "is_unit": str(int(is_unit)),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with whole_file(Path(folder) / PACKED_NAME) as partial:
        save_file(tensors, partial, made_from)
    return sum(part.nbytes for part in parts.values() if part.ndim and len(part) == len(index)) // len(index)


def unpack_index(folder: str | os.PathLike) -> ItemIndex:
    """
    Read an index that [`pack_index`] has written, and unpack its vectors.

    Raises:
        [`DataError`]: If there is no packed index, or it is damaged.
    """
    file = Path(folder) / PACKED_NAME
    if not file.is_file():
        raise DataError(f"{folder}: there is no {PACKED_NAME}. Make one with transrec index pack.")
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
            made_from = content.metadata() or {}
        if int(made_from["packed_format"]) > FORMAT:
            raise ValueError(f"it has format {made_from['packed_format']}, but this version reads up to {FORMAT}")
        parts = {
            name.removeprefix("packed."): tensors.pop(name) for name in list(tensors) if name.startswith("packed.")
        }
        rest = parts.pop("rest")
        vectors = unpacked(parts, made_from["method"], made_from["is_unit"] == "1")
        tensors["item_embeds"] = torch.cat([vectors, rest.float()], dim=1)
        return ItemIndex._from_tensors(tensors, made_from["catalogue_hash"], made_from["encoder_hash"])
    except (LookupError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{file}: is damaged ({one_line(error)}). Pack the index again.") from error
