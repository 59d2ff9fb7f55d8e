"""Exact nearest items: a scan of small vectors finds candidates, and full precision decides among them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


CHUNK = 2**13  # least number of items that are scored at a time
CACHED = 2**21  # scores that stay in the cache
SCORES = 2**25  # held at a time: 128 MiB
GATHERED = 2**20  # numbers of candidates' vectors that are held at a time
BLOCK = 64  # items of a block, of which the best one is looked at first
FEW = 2**14  # up to so many scores, blocks are not faster
SMALL = 2**12  # up to so many rows, a scan is not faster
NOT_FINITE = "scores are not finite: there is a NaN or an infinity in the weights or the item vectors"
SHARE = 16  # if at most one row in so many is allowed, only the allowed rows are scored


@functools.cache
def scans_in_int8(device_type: str = "cpu") -> bool:
    """Whether the processor multiplies 8-bit numbers in hardware, without rounding the results."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_vnni_supported())  # type: ignore[attr-defined]


class Scan(NamedTuple):
    """
    A smaller copy of vectors, for fast scans.

    Args:
        values (`Tensor` of shape `(n, size)`): Whole numbers of 8 bits.
        scales (`Tensor` of shape `(n,)`): Factor of each row.
        bounds (`Tensor` of shape `(3,)`): The largest length of a vector with the popularity, of one without it, and
            of the difference between a vector and its copy.
    """

    values: Tensor
    scales: Tensor
    bounds: Tensor

    def __len__(self) -> int:
        return len(self.values)


def _in_int8(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors in 8 bits, the scale of each, and the length of the difference to the exact vector."""
    scales = np.maximum(np.abs(vectors).max(axis=1), 1e-30) / 127
    values = np.rint(vectors / scales[:, None])
    return values.astype(np.int8), scales, _lengths(vectors - values * scales[:, None])


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


@dataclass(frozen=True)
class Matrix:
    """
    Item vectors, prepared for search.

    Args:
        exact (`Tensor` of shape `(n, width)`): The vectors in fp32, with the popularity of the items as the last
            column if the model adds it.
        size (`int`): Length of a vector without the popularity.
        whole (`float`): Largest length of a row.
        scan ([`Scan`], *optional*): A smaller copy, without the popularity.
    """

    exact: Tensor
    size: int
    whole: float
    scan: Scan | None = None

    @classmethod
    def of(cls, exact: Tensor, size: int, scan: Scan | None = None) -> Matrix:
        """
        A matrix of exact vectors. If a smaller copy makes the search faster, it is made unless `scan` is given. With a
        `size` of 0 nothing is searched, and no copy is made.
        """
        is_scanned = size > 0 and len(exact) > SMALL and scans_in_int8(exact.device.type)
        if is_scanned and scan is not None:
            return cls(exact, size, float(scan.bounds[0]), scan)
        if not is_scanned:
            lengths = [chunk.norm(dim=1).max() for chunk in exact.split(CHUNK)]
            return cls(exact, size, float(torch.stack(lengths).max()))
        values, scales = np.empty((len(exact), size), dtype=np.int8), np.empty(len(exact), dtype=np.float32)
        bounds = np.zeros(3)
        for start in range(0, len(exact), CHUNK):
            chunk = slice(start, start + CHUNK)
            rows = exact[chunk].numpy()
            with np.errstate(invalid="ignore"):  # NaN is reported when the scores are used
                values[chunk], scales[chunk], lacks = _in_int8(rows[:, :size])
            bounds = np.maximum(bounds, [part.max() for part in (_lengths(rows), _lengths(rows[:, :size]), lacks)])
        return cls(exact, size, bounds[0], Scan(*map(torch.from_numpy, (values, scales, bounds))))

    def __len__(self) -> int:
        return len(self.exact)


def top(scores: Tensor, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """
    Like `scores.topk(k)`, but several times as fast for many columns: the best blocks of columns are found first.

    Args:
        scores (`Tensor` of shape `(n_users, n)`): `n` must be a multiple of `block`; fill up with minus infinity.
        k (`int`): Number of values.
        block (`int`, *optional*): Number of columns of a block.

    Returns:
        `tuple[Tensor, Tensor]`: Values and columns, both `(n_users, k)`.
    """
    blocks = scores.shape[1] // block
    if k >= blocks or scores.numel() <= FEW:
        return scores.topk(min(k, scores.shape[1]), dim=1)
    view = scores.view(len(scores), blocks, block)
    best = view.amax(dim=2).topk(k, dim=1).indices
    values, places = view.gather(1, best[..., None].expand(-1, -1, block)).flatten(1).topk(k, dim=1)
    return values, best.gather(1, places // block) * block + places % block


def search(
    matrix: Matrix,
    queries: Tensor,
    k: int,
    allowed: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The rows with the largest dot products, exactly as if all were computed in full precision. Rows with equal scores
    keep their order.

    Args:
        matrix ([`Matrix`]): The vectors.
        queries (`Tensor` of shape `(n_users, width)`): User vectors in fp32.
        k (`int`): Number of rows for each user.
        allowed (`Tensor` of shape `(n,)`, *optional*): Boolean; all other rows are left out.
        excluded (`tuple[Tensor, Tensor]`, *optional*): Pairs of users and rows that are left out, as two tensors of
            the same length.

    Returns:
        `tuple[Tensor, Tensor]`: Scores in fp32 and rows, both `(n_users, at most k)`; the score is minus infinity
            where a user has fewer rows.

    Raises:
        [`DataError`]: If a score is not finite.
    """
    rows = None
    if allowed is not None:
        if int(allowed.count_nonzero()) * SHARE <= len(allowed):
            rows = allowed.nonzero().squeeze(1)
            matrix, excluded = _subset(matrix, rows, excluded)
            allowed = None
    k = min(k, len(matrix))
    if not k or not len(queries):
        return queries.new_empty(len(queries), 0), torch.empty(
            len(queries), 0, dtype=torch.long, device=queries.device
        )
    size = max(1, SCORES // len(matrix))  # users whose scores are in memory at a time
    parts = []
    for start in range(0, len(queries), size):
        of_part = excluded
        if excluded is not None:
            users, columns = excluded
            chosen = (users >= start) & (users < start + size)
            of_part = (users[chosen] - start, columns[chosen])
        parts.append(_search(matrix, queries[start : start + size], k, allowed, of_part))
    scores, found = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, found if rows is None else rows[found]


def merged(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The best of the results of several matrices, whose rows follow each other."""
    scores, rows = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


def _subset(
    matrix: Matrix, rows: Tensor, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Matrix, tuple[Tensor, Tensor] | None]:
    """Some rows only, and the exclusions among them, by their positions among these rows."""
    if excluded is not None and len(rows):
        places = torch.searchsorted(rows, excluded[1]).clamp(max=len(rows) - 1)
        among = rows[places] == excluded[1]
        excluded = (excluded[0][among], places[among])
    elif excluded is not None:
        excluded = None
    return Matrix(matrix.exact[rows], matrix.size, matrix.whole), excluded


def _search(
    matrix: Matrix, queries: Tensor, k: int, allowed: Tensor | None, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    n, users = len(matrix), queries.cpu().numpy()
    most = largest(matrix, users)
    with _room(len(queries), -(-n // BLOCK) * BLOCK, queries.device) as estimates:
        errors = most * (users.shape[1] * 2.0**-23)  # of sums in fp32
        errors = _estimate(matrix, queries, users, errors, estimates[:, :n], allowed)
        estimates[:, n:] = -torch.inf
        if excluded is not None:
            estimates[excluded] = -torch.inf
        highest = top(estimates, k)[0].cpu().numpy()
        if np.isnan(highest[:, 0]).any():  # which `topk` puts first
            raise DataError(NOT_FINITE)
        least = np.maximum(
            highest[:, -1] - 2 * errors, np.finfo(np.float32).min
        )  # least estimate of a row that can be among the best
        scores, rows = best_of(matrix, users, _possible(estimates, least), k)
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)


def largest(matrix: Matrix, users: np.ndarray) -> np.ndarray:
    """An upper bound on the scores of each user, `(n_users,)`. Raises [`DataError`] if it is not finite."""
    most = _lengths(users) * matrix.whole
    if not np.isfinite(most).all():
        raise DataError(NOT_FINITE)
    return most


def _estimate(
    matrix: Matrix, queries: Tensor, users: np.ndarray, errors: np.ndarray, estimates: Tensor, allowed: Tensor | None
) -> np.ndarray:
    """
    Fill in estimates of the scores of all rows, each user's in a unit of its own, and return how far they can be from
    the scores, `(n_users,)`: `errors` plus the error of the smaller copies. `users` are `queries` as a NumPy array,
    because NumPy is faster than PyTorch for few numbers.
    """
    if matrix.scan is not None:
        _, longest, lack = matrix.scan.bounds.tolist()
        short = users[:, : matrix.size]
        left, units, lacks = _in_int8(short)
        errors = (errors + lacks * (longest + lack) + _lengths(short) * lack) / units
    size = max(CHUNK, CACHED // len(users))
    for start in range(0, len(matrix), size):
        chunk = slice(start, min(start + size, len(matrix)))
        of_chunk = estimates[:, chunk]
        if matrix.scan is None:
            of_chunk.copy_(queries @ matrix.exact[chunk].T)
        else:
            values, scales = matrix.scan.values[chunk], matrix.scan.scales[chunk]
            torch.mul(torch._int_mm(torch.from_numpy(left), values.T), scales, out=of_chunk)
            if users.shape[1] > matrix.size:
                of_chunk.addr_(torch.from_numpy(users[:, -1] / units), matrix.exact[chunk, -1])
        if allowed is not None:
            of_chunk.masked_fill_(~allowed[chunk], -torch.inf)
    return errors


def _possible(estimates: Tensor, least: np.ndarray) -> Iterator[np.ndarray]:
    """For each user, the rows whose estimates are `least` or more."""
    for of_user, bound in zip(estimates, least, strict=True):
        if of_user.device.type == "cpu":
            yield np.flatnonzero(of_user.numpy() >= bound)
        else:
            yield (of_user >= bound).nonzero().squeeze(1).cpu().numpy()


def best_of(
    matrix: Matrix, users: np.ndarray, candidates: Iterable[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    The `k` best of a few rows for each user, by their scores in full precision. Rows with equal scores keep their
    order.

    Args:
        matrix ([`Matrix`]): The vectors.
        users (`np.ndarray` of shape `(n_users, width)`): The user vectors.
        candidates (`Iterable[np.ndarray]`): The rows for each user.
        k (`int`): Number of rows for each user.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Scores (minus infinity where there are fewer rows) and rows, both
            `(n_users, k)`.
    """
    on_cpu = matrix.exact.device.type == "cpu"
    vectors = matrix.exact.numpy() if on_cpu else np.empty(0)
    size = max(1, GATHERED // users.shape[1])
    scores = np.full((len(users), k), -np.inf, dtype=np.float32)
    rows = np.zeros((len(users), k), dtype=np.int64)
    for number, (user, possible) in enumerate(zip(users.astype(np.float64), candidates, strict=True)):
        exact = np.empty(len(possible), dtype=np.float32)
        for start in range(0, len(possible), size):
            some = slice(start, start + size)
            if on_cpu:
                exact[some] = vectors.take(possible[some], axis=0) @ user
            else:
                exact[some] = matrix.exact[possible[some]].cpu().numpy() @ user
        best = np.argsort(-exact, kind="stable")[:k]
        scores[number, : len(best)], rows[number, : len(best)] = exact[best], possible[best]
    return scores, rows


_kept: list[Tensor] = []  # memory for scores, kept because allocating it takes as long as computing them


@contextmanager
def _room(n_users: int, n_items: int, device: torch.device) -> Iterator[Tensor]:
    """A tensor `(n_users, n_items)` for scores; do not use it after the block."""
    size = n_users * n_items
    if device.type != "cpu" or size > SCORES + n_items or size < SCORES // 64:
        yield torch.empty(n_users, n_items, device=device)
        return
    try:
        memory = _kept.pop()
    except IndexError:
        memory = torch.empty(0)
    if len(memory) < size:
        memory = torch.empty(size)
    yield memory[:size].view(n_users, n_items)
    if len(_kept) < 2:
        _kept.append(memory)
