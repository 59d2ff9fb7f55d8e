"""Item vectors as a few codes: fitting quantizers, encoding and decoding, and the start of a model's code table."""

from __future__ import annotations

import hashlib
import os
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

from ..data.catalogue import Catalogue
from ..data.contents import MAX_CODES, QUANTIZER_NAME, Codes, whole_codes
from ..errors import DataError, one_line
from ..files import whole_file
from ..model.modeling_transrec import TransRecModel
from .semantic_ids import collision_rate


FORMAT = 1
METHODS = ("residual", "product", "learned")
BLOCK = 2**22  # distances that are computed at a time
FITTED = 2**15  # most vectors that codebooks are fitted on, drawn at random
COMMITMENT = 0.25  # weight of the distance to the codes in the loss of "learned"
KEPT = 0.95  # share of the moving averages of "learned" that is kept at each step
RARE = 0.05  # a learned code with fewer uses per step, on average, starts again


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest centroid, of `(size, d)`, for each vector of `(n, d)`: `(n,)`."""
    lengths = (centroids**2).sum(dim=1)
    blocks = vectors.split(max(1, BLOCK // len(centroids)))
    return torch.cat([(lengths - 2 * block @ centroids.T).argmin(dim=1) for block in blocks])


def k_means(vectors: Tensor, size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """
    Centroids of vectors by Lloyd's algorithm. A centroid without vectors starts again at a vector that is far from its
    own centroid.

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
    The principal axes `(d, d)` of centred vectors `(n, d)`, as rows. They are ordered so that equal parts of the axes
    hold equal shares of the variance (Ge et al., 2013, section 3.2): the next axis goes to the part whose eigenvalues
    have the smallest product.
    """
    values, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    weights = values.clamp(min=values.max() * 1e-6 + 1e-30).log()
    weights = weights - weights.min()
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for axis in weights.argsort(descending=True).tolist():
        free = [part for part in parts if len(part) < len(weights) // num_parts]
        min(free, key=lambda part: float(weights[part].sum())).append(axis)
    return axes.T[torch.tensor([axis for part in parts for axis in part])]


def residual_codes(vectors: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Residual codes `(n, num_codebooks)` of vectors `(n, width)`, and the remaining residual."""
    codes = []
    for book in codebooks:
        codes.append(nearest(vectors, book))
        vectors = vectors - book[codes[-1]]
    return torch.stack(codes, dim=1), vectors


def _fit_residual(centred: Tensor, num: int, size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Codebooks `(num, size, d)`."""
    codebooks = []
    for _ in trange(num, desc="Fitting codebooks", leave=False):
        codebooks.append(k_means(centred, size, iterations, generator))
        centred = centred - codebooks[-1][nearest(centred, codebooks[-1])]
    return torch.stack(codebooks)


def _fit_product(
    centred: Tensor, num: int, size: int, iterations: int, rotations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Codebooks `(num, size, d / num)` and the rotation `(d, d)`, if one is wanted."""
    rotation = balanced_rotation(centred, num) if rotations else None
    for turn in trange(rotations + 1, desc="Fitting codebooks", leave=False):
        parts = (centred if rotation is None else centred @ rotation.T).chunk(num, dim=1)
        codebooks = [k_means(part, size, iterations, generator) for part in parts]
        if turn < rotations:  # rotate the vectors nearest to the decoded ones (Procrustes)
            pairs = zip(parts, codebooks, strict=True)
            decoded = torch.cat([book[nearest(part, book)] for part, book in pairs], dim=1)
            left_vectors, _, right_vectors = torch.linalg.svd(decoded.T @ centred)
            rotation = left_vectors @ right_vectors
    return torch.stack(codebooks), rotation


@torch.enable_grad()
def _learn(
    centred: Tensor, codebooks: Tensor, passes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Residual codebooks with a linear map before and one after them, learned together from a start by k-means: the maps
    by a straight-through gradient, the codes by moving averages (van den Oord et al., 2017). A rarely used code starts
    again at the residual of a vector.
    """
    maps = [torch.nn.Parameter(torch.eye(centred.shape[1])) for _ in range(2)]
    there, back = maps
    optimizer = torch.optim.Adam(maps, 1e-3)
    codebooks, batch = codebooks.clone(), max(1024, codebooks.shape[1])
    uses, sums = torch.ones(codebooks.shape[:2]), codebooks.clone()
    scale = (centred**2).mean().clamp(min=1e-12)
    for _ in trange(passes, desc="Learning codebooks", leave=False):
        for rows in torch.randperm(len(centred), generator=generator).split(batch):
            mapped = centred[rows] @ there.T
            left, found = mapped.detach(), torch.zeros(len(rows), codebooks.shape[2])
            for i, book in enumerate(codebooks):
                codes = nearest(left, book)
                chosen, before = book[codes], left
                counts = torch.bincount(codes, minlength=len(book))
                uses[i].lerp_(counts.float(), 1 - KEPT)
                sums[i].lerp_(torch.zeros_like(book).index_add_(0, codes, before), 1 - KEPT)
                found, left = found + chosen, before - chosen
                dead = (uses[i] < RARE).nonzero().squeeze(1)
                book.copy_(sums[i] / uses[i].clamp(min=1e-6).unsqueeze(1))
                again = before[torch.randint(len(before), (len(dead),), generator=generator)]
                book[dead], sums[i][dead], uses[i][dead] = again, again, 1.0
            through = mapped + (found - mapped).detach()
            error = ((through @ back - centred[rows]) ** 2).mean() + COMMITMENT * ((mapped - found) ** 2).mean()
            optimizer.zero_grad()
            (error / scale).backward()
            optimizer.step()
    return codebooks, there.detach(), back.detach()


@dataclass
class ItemQuantizer:
    """
    Codebooks that turn an item vector into a few whole numbers (codes), and codes into a vector.

    Args:
        codebooks (`Tensor` of shape `(num_codebooks, codebook_size, width)`): The centroids. `width` is that of the
            vectors, or of a part of them for `"product"`.
        method (`str`): `"residual"`: each code describes what the codes before it left over, from coarse to fine
            (semantic ids, arXiv 2305.05065). `"product"`: each code describes a part of the rotated vector, so codes
            have no order (OPQ, Ge et al., 2013; VQ-Rec, arXiv 2210.12316). `"learned"`: residual codes with a linear
            map before and one after them, learned together (RQ-VAE without hidden layers).
        mean (`Tensor` of shape `(d,)`): Subtracted from vectors first.
        rotation (`Tensor` of shape `(width, d)`, *optional*): For `"product"` and `"learned"`, applied next.
        back (`Tensor` of shape `(width, d)`, *optional*): For `"learned"`, the map from codes to vectors; for
            `"product"` it is the rotation itself.
        vectors_hash (`str`, *optional*): Hash of the vectors that it was fitted on, see [`hash_of_vectors`].
        encoder_hash (`str`, *optional*): Hash of the model that made these vectors, see [`encoder_hash`].

    Example:

    ```python
    >>> quantizer = ItemQuantizer.fit(index.item_embeds, num_codebooks=4)
    >>> codes = quantizer.encode(index.item_embeds)
    >>> quantizer.report(index.item_embeds)["collision_rate"]
    >>> save_semantic_ids("semantic_ids.json", index.item_ids, resolve_collisions(codes))
    ```
    """

    codebooks: Tensor
    method: Literal["residual", "product", "learned"]
    mean: Tensor
    rotation: Tensor | None = None
    back: Tensor | None = None
    vectors_hash: str | None = None
    encoder_hash: str | None = None

    def __post_init__(self) -> None:
        parts = len(self.codebooks) if self.method == "product" else 1
        maps = [part for part in (self.rotation, self.back) if part is not None]
        wrong = None
        if self.method not in METHODS:
            wrong = f"method must be one of {METHODS}, got {self.method!r}"
        elif self.codebooks.ndim != 3 or not self.codebooks.numel():
            wrong = "codebooks must have the shape (num_codebooks, codebook_size, width)"
        elif self.mean.ndim != 1 or (not maps and len(self.mean) != parts * self.codebooks.shape[2]):
            wrong = (
                f"codebooks have {parts * self.codebooks.shape[2]} dimensions, but the mean has {self.mean.numel()}"
            )
        elif any(part.shape != (parts * self.codebooks.shape[2], len(self.mean)) for part in maps):
            wrong = "the width of the rotation differs from that of codebooks and mean"
        elif not all(part.isfinite().all() for part in (self.codebooks, self.mean, *maps)):
            wrong = "there is a NaN or an infinity in it"
        if wrong:
            raise DataError(f"item quantizer: {wrong}. Fit it again.")

    @property
    def size(self) -> int:
        """Width of the vectors."""
        return len(self.mean)

    @property
    def hash(self) -> str:
        """SHA-256 of codebooks and maps. If it is equal, codes of two quantizers mean the same."""
        digest = hashlib.sha256(self.method.encode())
        for name, part in self.tensors().items():
            digest.update(name.encode() + part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def bytes_per_item(self) -> float:
        """The bytes that the codes of an item take."""
        return len(self.codebooks) * np.log2(self.codebooks.shape[1]) / 8

    @classmethod
    def fit(
        cls,
        vectors: Tensor,
        num_codebooks: int = 4,
        codebook_size: int = 256,
        method: Literal["residual", "product", "learned"] = "residual",
        *,
        iterations: int = 20,
        rotations: int = 5,
        seed: int = 0,
        encoder_hash: str | None = None,
    ) -> ItemQuantizer:
        """
        Fit codebooks to item vectors by k-means; if there are many vectors, to a sample.

        Args:
            vectors (`Tensor` of shape `(n_items, d)`): Any vectors, for example those of [`encode_catalogue`].
            num_codebooks (`int`, *optional*, defaults to 4): Number of codes of an item.
            codebook_size (`int`, *optional*, defaults to 256): Number of values of a code.
            method (`str`, *optional*, defaults to `"residual"`): See [`ItemQuantizer`].
            iterations (`int`, *optional*, defaults to 20): Iterations of k-means for each codebook; epochs of
                `"learned"`.
            rotations (`int`, *optional*, defaults to 5): For `"product"`, how often rotation and codebooks are fitted
                in turn; 0 for no rotation.
            seed (`int`, *optional*, defaults to 0): Seed of the sample and of the first centroids.
            encoder_hash (`str`, *optional*): See [`ItemQuantizer`].

        Raises:
            [`DataError`]: If there are fewer items than values of a code, vectors are not finite, or their width is
                not a multiple of `num_codebooks` (`"product"`).
        """
        vectors = as_vectors(vectors)
        if iterations < 1 or rotations < 0:
            raise ValueError(f"iterations must be 1 or more and rotations 0 or more, got {iterations} and {rotations}")
        check_codebooks(len(vectors), vectors.shape[1], num_codebooks, codebook_size, method)
        generator = torch.Generator().manual_seed(seed)
        hashes: Any = {"vectors_hash": hash_of_vectors(vectors), "encoder_hash": encoder_hash}
        if len(vectors) > max(FITTED, codebook_size):
            drawn = torch.randperm(len(vectors), generator=generator)[: max(FITTED, codebook_size)]
            vectors = vectors[drawn.sort().values]
        mean = vectors.mean(dim=0)
        centred, rotation = vectors - mean, None
        if method == "product":
            codebooks, rotation = _fit_product(centred, num_codebooks, codebook_size, iterations, rotations, generator)
            return cls(codebooks, method, mean, rotation, **hashes)
        codebooks = _fit_residual(centred, num_codebooks, codebook_size, iterations, generator)
        if method == "residual":
            return cls(codebooks, method, mean, **hashes)
        codebooks, rotation, back = _learn(centred, codebooks, iterations, generator)
        return cls(codebooks, method, mean, rotation, back, **hashes)

    def encode(self, vectors: Tensor) -> Tensor:
        """
        The codes of item vectors `(n, d)`: `(n, num_codebooks)`, integers.

        Raises:
            [`DataError`]: If the vectors have another width, or are not finite.
        """
        left = as_vectors(vectors, self.size) - self.mean
        left = left if self.rotation is None else left @ self.rotation.T
        if self.method == "product":
            parts = left.chunk(len(self.codebooks), dim=1)
            return torch.stack([nearest(part, book) for part, book in zip(parts, self.codebooks, strict=True)], dim=1)
        return residual_codes(left, self.codebooks)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """
        The vectors `(n, d)` that codes `(n, num_codebooks)` stand for.

        Raises:
            [`DataError`]: If the number of codes is wrong, or a code is out of range or no whole number.
        """
        codes = torch.from_numpy(whole_codes(codes, self.codebooks.shape[1]))
        if codes.shape[1] != len(self.codebooks):
            raise DataError(
                f"codes have the shape {tuple(codes.shape)}, but the quantizer has {len(self.codebooks)} per item"
            )
        parts = [book[code] for book, code in zip(self.codebooks, codes.T, strict=True)]
        found = torch.cat(parts, dim=1) if self.method == "product" else torch.stack(parts).sum(dim=0)
        back = self.rotation if self.back is None else self.back
        return (found if back is None else found @ back) + self.mean

    def code_vectors(self) -> Tensor:
        """
        A vector for each value of each code, `(num_codebooks * codebook_size, d)`. The mean of the vectors of an
        item's codes is the vector that the codes stand for.
        """
        num, size, width = self.codebooks.shape
        found = self.codebooks
        if self.method == "product":
            found = found.new_zeros(num, size, num * width)
            for i, book in enumerate(self.codebooks):
                found[i, :, i * width : (i + 1) * width] = book
        back = self.rotation if self.back is None else self.back
        found = found if back is None else found @ back
        return (num * found + self.mean).flatten(0, 1)

    def report(self, vectors: Tensor) -> dict[str, float]:
        """
        How well codes represent vectors `(n, d)`: `relative_error`, the squared error as a share of the variance;
        `usage_entropy`, the entropy of the codes as a share of the largest possible one, in the worst codebook;
        `unused_codes`, the share of unused codes; `collision_rate`, the share of items that share all codes with
        another one; and `bytes_per_item`.
        """
        codes, values = self.encode(vectors), as_vectors(vectors)
        variance = ((values - values.mean(dim=0)) ** 2).sum()
        counts = torch.stack([torch.bincount(code, minlength=self.codebooks.shape[1]) for code in codes.T]).double()
        shares = counts / len(codes)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=1) / np.log(self.codebooks.shape[1])
        return {
            "relative_error": float(((values - self.decode(codes)) ** 2).sum() / variance.clamp(min=1e-12)),
            "usage_entropy": float(entropy.min()),
            "unused_codes": float((counts == 0).double().mean()),
            "collision_rate": collision_rate(codes),
            "bytes_per_item": float(self.bytes_per_item),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Codebooks and maps, by name."""
        parts = {"codebooks": self.codebooks, "mean": self.mean, "rotation": self.rotation, "back": self.back}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_quantizer.safetensors`."""
        hashes = {"vectors_hash": self.vectors_hash or "", "encoder_hash": self.encoder_hash or ""}
        made = {"method": self.method, **hashes, "format": str(FORMAT)}
        tensors = self.tensors()
        Path(folder).mkdir(parents=True, exist_ok=True)
        with whole_file(Path(folder) / QUANTIZER_NAME) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, made)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ItemQuantizer:
        """
        The quantizer in a folder or a repository of the Hub.

        Raises:
            [`DataError`]: If there is no quantizer, or it is damaged.
        """
        name = os.fspath(pretrained_model_name_or_path)
        file = cached_file(name, QUANTIZER_NAME, _raise_exceptions_for_missing_entries=False, **kwargs)
        if file is None:
            raise DataError(f"{name}: there is no {QUANTIZER_NAME}. Fit one with `ItemQuantizer.fit(vectors)`.")
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {key: content.get_tensor(key) for key in content.keys()}
                made = content.metadata() or {}
            if int(made.get("format", FORMAT)) > FORMAT:
                raise ValueError(
                    f"it has format {made['format']}, but this version of transrec-hf reads up to {FORMAT}"
                )
            method: Any = made["method"]
            return cls(
                tensors["codebooks"],
                method,
                tensors["mean"],
                tensors.get("rotation"),
                tensors.get("back"),
                made.get("vectors_hash") or None,
                made.get("encoder_hash") or None,
            )
        except (LookupError, SafetensorError, ValueError) as error:
            raise DataError(f"{file}: is damaged ({one_line(error)}). Fit it again.") from error


def check_quantizer(known: str | None, file: Path | None) -> None:
    """
    Raises [`DataError`] if the quantizer in `file`, which is beside the codes, does not have the
    [`~ItemQuantizer.hash`] `known`. Without a file or a known hash nothing is checked.
    """
    if known is None or file is None:
        return
    found = ItemQuantizer.from_pretrained(file.parent).hash
    if found != known:
        raise DataError(
            f"{file}: the codes were made by another quantizer ({found[:12]}) than the one of the model's training "
            f"({known[:12]}), so they mean something else. Make them with that one: transrec codes --quantizer."
        )


@torch.no_grad()
def start_code_table(model: TransRecModel, catalogue: Catalogue) -> None:
    """
    Initialise the code table of an untrained model with the codebooks of the quantizer beside the items, if there is
    one, so that an item's vector is the one that its codes stand for. The model then keeps the hash of the quantizer.

    Args:
        model ([`TransRecModel`]): A model that reads codes; changed in place.
        catalogue ([`Catalogue`]): The items.

    Raises:
        [`DataError`]: If the quantizer does not fit the model.
    """
    table = model.item_encoder.codes_table
    if not table.is_new or not isinstance(catalogue.contents.get("codes"), Codes):
        return
    quantizer = quantizer_of_start(model, catalogue)
    table.is_new.fill_(False)
    if quantizer is not None:
        table.vectors.weight.copy_(quantizer.code_vectors())
        model.config.quantizer_hash = quantizer.hash


def quantizer_of_start(model: TransRecModel, catalogue: Catalogue) -> ItemQuantizer | None:
    """
    The quantizer beside the items if the code table of the model will start as its codebooks. Raises [`DataError`] if
    they have other sizes.
    """
    content: Any = catalogue.contents.get("codes")
    weight = model.item_encoder.codes_table.vectors.weight
    if not model.item_encoder.codes_table.is_new or content.quantizer is None:
        return None
    quantizer = ItemQuantizer.from_pretrained(content.quantizer.parent)
    num, size, _ = quantizer.codebooks.shape
    if weight.shape != (num * size, quantizer.size):
        raise DataError(
            f"{content.quantizer}: has {num * size} codes of {quantizer.size} numbers, but the model has "
            f"{weight.shape[0]} of {weight.shape[1]}. Make a model with --hidden_size {quantizer.size} "
            f"--num_codebooks {num} --codebook_size {size}."
        )
    return quantizer


def check_codebooks(num_items: int, width: int, num_codebooks: int, codebook_size: int, method: str) -> None:
    """
    Raises `ValueError` or [`DataError`] if codebooks cannot be fitted on `num_items` vectors of this width. The
    vectors themselves are not needed.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    sizes = {type(num_codebooks), type(codebook_size)}
    if sizes != {int} or num_codebooks < 1 or not 2 <= codebook_size <= MAX_CODES:
        raise ValueError(
            f"num_codebooks must be 1 or more and codebook_size from 2 to 65,536, got {num_codebooks} and "
            f"{codebook_size}"
        )
    if num_items < codebook_size:
        raise DataError(f"{num_items} items are too few for codebooks of {codebook_size}: use a smaller codebook_size")
    if method == "product" and width % num_codebooks:
        near = sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - num_codebooks))[:2]
        raise DataError(
            f"vectors of {width} numbers cannot be divided into {num_codebooks} equal parts: set num_codebooks to "
            + " or ".join(map(str, near))
        )


def as_vectors(vectors: Any, size: int | None = None) -> Tensor:
    """
    Item vectors `(n, size)` in fp32 on the CPU.

    Raises:
        [`DataError`]: If they have another shape, or are not finite numbers whose squares are finite too.
    """
    try:
        vectors = torch.as_tensor(vectors).detach().float().cpu()
    except (TypeError, ValueError) as error:
        raise DataError(f"item vectors must be a tensor or an array of numbers ({one_line(error)})") from error
    if vectors.ndim != 2 or not len(vectors):
        raise DataError(f"item vectors must have the shape (n_items, d), got {tuple(vectors.shape)}")
    if size is not None and vectors.shape[1] != size:
        raise DataError(f"the quantizer was fitted on vectors of {size} numbers, but these have {vectors.shape[1]}")
    finite = (vectors**2).sum(dim=1).isfinite()
    if not finite.all():
        raise DataError(f"the vector of row {int((~finite).nonzero()[0]) + 1} is not finite, or too large")
    return vectors


def hash_of_vectors(vectors: Tensor) -> str:
    """SHA-256 of vectors in fp32, with which a quantizer recognises the vectors that it was fitted on."""
    return hashlib.sha256(vectors.detach().float().cpu().contiguous().numpy().data).hexdigest()
