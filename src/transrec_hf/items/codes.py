"""Item vectors as a few codes: fitted on any vectors, decoded to vectors again, written as semantic ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import trange
from transformers.utils import cached_file

from ..errors import DataError, one_line
from ..files import whole_file, write_json


QUANTIZER_NAME = "item_quantizer.safetensors"
CODES_NAME = "semantic_ids.json"
FORMAT = 1
METHODS = ("residual", "product")
BLOCK = 2**24  # distances computed at a time
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid `(size, d)` nearest to each vector `(n, d)`: `(n,)`."""
    lengths = (centroids**2).sum(dim=1)
    blocks = vectors.split(max(1, BLOCK // len(centroids)))
    return torch.cat([(lengths - 2 * block @ centroids.T).argmin(dim=1) for block in blocks])


def k_means(vectors: Tensor, size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """
    Centroids of vectors by Lloyd's algorithm. One that no vector is nearest to starts again at a vector that is far
    from its own.

    Args:
        vectors (`Tensor` of shape `(n, d)`): `n` is at least `size`.

    Returns:
        `Tensor` of shape `(size, d)`.
    """
    centroids = vectors[torch.randperm(len(vectors), generator=generator)[:size]].clone()
    for _ in range(iterations):
        codes = nearest(vectors, centroids)
        counts = torch.bincount(codes, minlength=size)
        means = torch.zeros_like(centroids).index_add_(0, codes, vectors) / counts.clamp(min=1).unsqueeze(1)
        unused = (counts == 0).nonzero().squeeze(1)
        if len(unused):
            distances = ((vectors - means[codes]) ** 2).sum(dim=1)
            means[unused] = vectors[distances.topk(len(unused)).indices]
        centroids = means
    return centroids


def balanced_rotation(centred: Tensor, num_parts: int) -> Tensor:
    """
    The principal axes `(d, d)` of centred vectors `(n, d)`, in rows, ordered so that equal parts of them hold equally
    much (Ge et al., 2013, section 3.2): the next one goes to the part whose eigenvalues have the smallest product.
    """
    values, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    weights = values.clamp(min=values.max() * 1e-6 + 1e-30).log()
    weights = weights - weights.min()
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for axis in weights.argsort(descending=True).tolist():
        free = [part for part in parts if len(part) < len(weights) // num_parts]
        min(free, key=lambda part: float(weights[part].sum())).append(axis)
    return axes.T[torch.tensor([axis for part in parts for axis in part])]


@dataclass
class ItemQuantizer:
    """
    Codebooks by which an item vector becomes a few whole numbers, and these a vector again.

    Args:
        codebooks (`Tensor` of shape `(num_codebooks, codebook_size, width)`): The centroids; `width` is that of the
            vectors, or of a part of them for `"product"`.
        method (`str`): `"residual"`, each codebook for what the ones before it have left, so that codes go from coarse
            to fine (semantic ids, arXiv 2305.05065); or `"product"`, each for a part of the rotated vector, so that
            they have no order (OPQ, Ge et al., 2013; VQ-Rec, arXiv 2210.12316).
        mean (`Tensor` of shape `(d,)`): Subtracted from vectors first.
        rotation (`Tensor` of shape `(d, d)`, *optional*): Of `"product"`, applied next.
        vectors_hash (`str`, *optional*): Of the vectors that it was fitted on, see [`hash_of_vectors`].

    Example:

    ```python
    >>> quantizer = ItemQuantizer.fit(index.item_embeds, num_codebooks=4)
    >>> codes = quantizer.encode(index.item_embeds)
    >>> quantizer.report(index.item_embeds)["collision_rate"]
    >>> save_semantic_ids("semantic_ids.json", index.item_ids, resolve_collisions(codes))
    ```
    """

    codebooks: Tensor
    method: Literal["residual", "product"]
    mean: Tensor
    rotation: Tensor | None = None
    vectors_hash: str | None = None

    def __post_init__(self) -> None:
        parts = 1 if self.method == "residual" else len(self.codebooks)
        wrong = None
        if self.method not in METHODS:
            wrong = f"method must be one of {METHODS}, got {self.method!r}"
        elif self.codebooks.ndim != 3 or not self.codebooks.numel():
            wrong = "codebooks must have the shape (num_codebooks, codebook_size, width)"
        elif self.mean.ndim != 1 or len(self.mean) != parts * self.codebooks.shape[2]:
            wrong = f"codebooks of {parts * self.codebooks.shape[2]} dimensions and a mean of {self.mean.numel()}"
        elif self.rotation is not None and self.rotation.shape != (len(self.mean), len(self.mean)):
            wrong = "the rotation has another width than the mean"
        elif not all(part is None or part.isfinite().all() for part in (self.codebooks, self.mean, self.rotation)):
            wrong = "there is a NaN or an infinity in it"
        if wrong:
            raise DataError(f"item quantizer: {wrong}. Fit it again.")

    @property
    def size(self) -> int:
        """Width of the vectors."""
        return len(self.mean)

    @property
    def bytes_per_item(self) -> float:
        """Bytes that the codes of an item take."""
        return len(self.codebooks) * np.log2(self.codebooks.shape[1]) / 8

    @classmethod
    def fit(
        cls,
        vectors: Tensor,
        num_codebooks: int = 4,
        codebook_size: int = 256,
        method: Literal["residual", "product"] = "residual",
        *,
        iterations: int = 20,
        rotations: int = 5,
        seed: int = 0,
    ) -> ItemQuantizer:
        """
        Codebooks for item vectors, by k-means.

        Args:
            vectors (`Tensor` of shape `(n_items, d)`): Of any origin, see [`encode_catalogue`].
            num_codebooks (`int`, *optional*, defaults to 4): Codes an item.
            codebook_size (`int`, *optional*, defaults to 256): Values a code can have.
            method (`str`, *optional*, defaults to `"residual"`): See [`ItemQuantizer`].
            iterations (`int`, *optional*, defaults to 20): Of k-means, for each codebook.
            rotations (`int`, *optional*, defaults to 5): How often `"product"` fits the rotation and the codebooks in
                turn; 0 for none.
            seed (`int`, *optional*, defaults to 0): Of the first centroids.

        Raises:
            [`DataError`]: If there are fewer items than values of a code, vectors are not finite, or their width is
                not a multiple of `num_codebooks` (`"product"`).
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        check_vectors(vectors)
        if num_codebooks < 1 or not 2 <= codebook_size <= 2**16:
            raise ValueError(
                f"num_codebooks must be 1 or more and codebook_size from 2 to 65,536, got {num_codebooks} and "
                f"{codebook_size}"
            )
        if len(vectors) < codebook_size:
            raise DataError(f"{len(vectors)} items for codebooks of {codebook_size}: take a smaller codebook_size")
        if method == "product" and vectors.shape[1] % num_codebooks:
            raise DataError(f"vectors of {vectors.shape[1]} numbers do not fall into {num_codebooks} equal parts")
        generator = torch.Generator().manual_seed(seed)
        vectors = vectors.detach().float().cpu()
        mean = vectors.mean(dim=0)
        centred, rotation, codebooks = vectors - mean, None, []
        if method == "residual":
            left = centred
            for _ in trange(num_codebooks, desc="Fitting codebooks", leave=False):
                centroids = k_means(left, codebook_size, iterations, generator)
                codebooks.append(centroids)
                left = left - centroids[nearest(left, centroids)]
        else:
            rotation = balanced_rotation(centred, num_codebooks) if rotations else torch.eye(vectors.shape[1])
            for turn in trange(rotations + 1, desc="Fitting codebooks", leave=False):
                parts = (centred @ rotation.T).chunk(num_codebooks, dim=1)
                codebooks = [k_means(part, codebook_size, iterations, generator) for part in parts]
                if turn < rotations:  # the rotation that takes the vectors nearest to what was decoded (Procrustes)
                    pairs = zip(parts, codebooks, strict=True)
                    decoded = torch.cat([book[nearest(part, book)] for part, book in pairs], dim=1)
                    left_vectors, _, right_vectors = torch.linalg.svd(decoded.T @ centred)
                    rotation = left_vectors @ right_vectors
        return cls(torch.stack(codebooks), method, mean, rotation, hash_of_vectors(vectors))

    def encode(self, vectors: Tensor) -> Tensor:
        """
        Codes of item vectors `(n, d)`: `(n, num_codebooks)`, integers.

        Raises:
            [`DataError`]: If the vectors have another width, or are not finite.
        """
        check_vectors(vectors, self.size)
        left = vectors.detach().float().cpu() - self.mean
        if self.method == "product":
            rotated = left if self.rotation is None else left @ self.rotation.T
            parts = rotated.chunk(len(self.codebooks), dim=1)
            return torch.stack([nearest(part, book) for part, book in zip(parts, self.codebooks, strict=True)], dim=1)
        codes = []
        for book in self.codebooks:
            codes.append(nearest(left, book))
            left = left - book[codes[-1]]
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """
        Vectors `(n, d)` that codes `(n, num_codebooks)` stand for.

        Raises:
            [`DataError`]: If there are other numbers of codes, or a code is out of range.
        """
        if codes.ndim != 2 or codes.shape[1] != len(self.codebooks):
            raise DataError(
                f"codes of shape {tuple(codes.shape)}, and the quantizer has {len(self.codebooks)} an item"
            )
        wrong = ((codes < 0) | (codes >= self.codebooks.shape[1])).any(dim=1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"codes: {codes[row].tolist()} of row {row + 1} is out of range, from 0 to "
                f"{self.codebooks.shape[1] - 1}"
            )
        parts = [book[code] for book, code in zip(self.codebooks, codes.T, strict=True)]
        if self.method == "residual":
            return torch.stack(parts).sum(dim=0) + self.mean
        rotated = torch.cat(parts, dim=1)
        return (rotated if self.rotation is None else rotated @ self.rotation) + self.mean

    def report(self, vectors: Tensor) -> dict[str, float]:
        """
        How well codes stand for vectors `(n, d)`: `relative_error`, the squared error as a share of the variance;
        `usage_entropy`, that of the codes as a share of the largest there could be, in the codebook where it is least;
        `unused_codes`, a share; `collision_rate`, the share of items that have the codes of another one;
        `bytes_per_item`.
        """
        codes = self.encode(vectors)
        values = vectors.detach().float().cpu()
        variance = ((values - values.mean(dim=0)) ** 2).sum()
        counts = torch.stack([torch.bincount(code, minlength=self.codebooks.shape[1]) for code in codes.T]).double()
        shares = counts / len(codes)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=1) / np.log(self.codebooks.shape[1])
        _, inverse, sizes = np.unique(codes.numpy(), axis=0, return_inverse=True, return_counts=True)
        return {
            "relative_error": float(((values - self.decode(codes)) ** 2).sum() / variance.clamp(min=1e-12)),
            "usage_entropy": float(entropy.min()),
            "unused_codes": float((counts == 0).double().mean()),
            "collision_rate": float((sizes[inverse.reshape(-1)] > 1).mean()),
            "bytes_per_item": float(self.bytes_per_item),
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_quantizer.safetensors`."""
        tensors = {"codebooks": self.codebooks, "mean": self.mean}
        if self.rotation is not None:
            tensors["rotation"] = self.rotation
        made = {"method": self.method, "vectors_hash": self.vectors_hash or "", "format": str(FORMAT)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        with whole_file(Path(folder) / QUANTIZER_NAME) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, made)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ItemQuantizer:
        """
        The quantizer in a folder or a repository of the Hub.

        Raises:
            [`DataError`]: If there is none, or it is damaged.
        """
        name = os.fspath(pretrained_model_name_or_path)
        file = cached_file(name, QUANTIZER_NAME, _raise_exceptions_for_missing_entries=False, **kwargs)
        if file is None:
            raise DataError(f"{name}: no {QUANTIZER_NAME}. Fit one: `ItemQuantizer.fit(vectors)`.")
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {key: content.get_tensor(key) for key in content.keys()}
                made = content.metadata() or {}
            if int(made.get("format", FORMAT)) > FORMAT:
                raise ValueError(f"format {made['format']}, and this version of transrec-hf reads up to {FORMAT}")
            method: Any = made["method"]
            return cls(
                tensors["codebooks"],
                method,
                tensors["mean"],
                tensors.get("rotation"),
                made.get("vectors_hash") or None,
            )
        except (LookupError, SafetensorError, ValueError) as error:
            raise DataError(f"{file}: damaged ({one_line(error)}). Fit it again.") from error


def check_vectors(vectors: Tensor, size: int | None = None) -> None:
    """Raises [`DataError`] for vectors that are not `(n, size)` finite numbers."""
    if vectors.ndim != 2 or not len(vectors):
        raise DataError(f"item vectors must have the shape (n_items, d), got {tuple(vectors.shape)}")
    if size is not None and vectors.shape[1] != size:
        raise DataError(f"the quantizer was fitted on vectors of {size} numbers, these have {vectors.shape[1]}")
    finite = vectors.isfinite().all(dim=1)
    if not finite.all():
        raise DataError(f"the vector of row {int((~finite).nonzero()[0]) + 1} is not finite")


def hash_of_vectors(vectors: Tensor) -> str:
    """SHA-256 of vectors in fp32, by which a quantizer knows those that it was fitted on."""
    return hashlib.sha256(vectors.detach().float().cpu().contiguous().numpy().data).hexdigest()


def resolve_collisions(codes: Tensor) -> Tensor:
    """
    Codes `(n, num_codebooks)` that are all different: one more code counts the items that share the others, so that
    the result is `(n, num_codebooks + 1)` (TIGER, arXiv 2305.05065).
    """
    _, inverse = np.unique(codes.numpy(), axis=0, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    groups = inverse.reshape(-1)[order]
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    ordinal = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    last = np.empty(len(order), dtype=np.int64)
    last[order] = ordinal
    return torch.cat([codes, torch.from_numpy(last).unsqueeze(1)], dim=1)


def save_semantic_ids(file: str | os.PathLike, item_ids: Sequence[str] | np.ndarray, codes: Tensor) -> None:
    """
    Write codes as one token a codebook for each item, the layout of LC-Rec and of what was built upon it:
    `{"item id": ["<a_17>", "<b_3>", "<c_201>"], ...}`.

    Raises:
        [`DataError`]: If there are not as many ids as codes, or over 26 codes an item.
    """
    if len(item_ids) != len(codes) or codes.shape[1] > len(LETTERS):
        raise DataError(
            f"{len(item_ids)} ids for {len(codes)} items of {codes.shape[1]} codes: give one id for each item, and at "
            f"most {len(LETTERS)} codes"
        )
    rows = ([f"<{letter}_{code}>" for letter, code in zip(LETTERS, row, strict=False)] for row in codes.tolist())
    write_json(file, dict(zip(map(str, item_ids), rows, strict=True)))


def load_semantic_ids(file: str | os.PathLike) -> tuple[np.ndarray, Tensor]:
    """
    Item ids and codes `(n, num_codebooks)` of a file as [`save_semantic_ids`] writes it.

    Raises:
        [`DataError`]: If the file is none such; it names the item.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(rows, dict) or not rows:
        raise DataError(f'{file}: holds no {{"item id": ["<a_1>", "<b_2>"]}}')
    codes, length = [], None
    for item_id, tokens in rows.items():
        tokens = tokens if isinstance(tokens, list) else []
        found = [re.fullmatch(r"<([a-z])_(\d{1,9})>", str(token)) for token in tokens]
        letters = "".join(match.group(1) for match in found if match)
        if not letters or len(letters) != len(tokens) or letters != LETTERS[: len(letters)]:
            raise DataError(f'{file}: item {item_id!r} has no codes like ["<a_1>", "<b_2>"]')
        length = length or len(tokens)
        if len(tokens) != length:
            raise DataError(f"{file}: item {item_id!r} has {len(tokens)} codes, the first one {length}")
        codes.append([int(match.group(2)) for match in found if match])
    return np.array(list(rows)), torch.tensor(codes)
