"""Exact nearest items: a scan of small vectors finds candidates, full precision decides, and a bound proves it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from ..evaluation.ranking import precise


CHUNK = 2**13  # items that are scored at a time, so that their scores stay in the cache
SCORES = 2**26  # held at a time: 256 MiB
GATHERED = 2**22  # numbers of candidates' vectors that are held at a time
BLOCK = 32  # items of which the best one is looked at first
SMALL = 2**12  # rows that are not worth a scan
SHARE = 16  # one row in so many, or fewer, allowed: they alone are scored
ROUNDING = 2.0**-8  # of bfloat16


@functools.cache
def scan_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    fast = device_type == "cpu" and torch.backends.mkldnn.is_available()
    return torch.bfloat16 if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@dataclass(frozen=True)
class Matrix:
    """
    Item vectors as they are searched.

    Args:
        exact (`Tensor` of shape `(n, width)`): In fp32, with the popularity of the items as the last column, if the
            model adds it.
        size (`int`): Numbers of a vector without that.
        scan (`Tensor` of shape `(n, size)`, *optional*): The same in bfloat16, without the popularity.
        error (`float`): Largest length of what a row of `scan` lacks.
        length (`float`): Largest length of a row.
    """

    exact: Tensor
    size: int
    scan: Tensor | None = None
    error: float = 0.0
    length: float = 0.0

    @classmethod
    def of(cls, exact: Tensor, size: int, scan: Tensor | None = None) -> Matrix:
        """With the smaller copy where it is of use, unless it is given."""
        if len(exact) <= SMALL or scan_dtype(exact.device.type) == torch.float32:
            return cls(exact, size)
        scan = exact[:, :size].bfloat16() if scan is None else scan
        error = length = 0.0
        for start in range(0, len(exact), CHUNK):
            rows = exact[start : start + CHUNK, :size]
            error = max(error, float((rows - scan[start : start + CHUNK]).norm(dim=1).max()))
            length = max(length, float(rows.norm(dim=1).max()))
        return cls(exact, size, scan, error, length)

    def __len__(self) -> int:
        return len(self.exact)


def top(scores: Tensor, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """
    As `scores.topk(k)`, but several times as fast for many columns: the best blocks of columns are found first.

    Args:
        scores (`Tensor` of shape `(n_users, n)`): `n` is a multiple of `block`, filled up with minus infinity.
        k (`int`): How many.
        block (`int`, *optional*): Columns of a block.

    Returns:
        `tuple[Tensor, Tensor]`: Values and columns, both `(n_users, k)`.
    """
    blocks = scores.shape[1] // block
    if k >= blocks:
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
    The rows with the largest dot products, the same as if all were computed in full precision: equal ones in the order
    of the rows.

    Args:
        matrix ([`Matrix`]): The vectors.
        queries (`Tensor` of shape `(n_users, width)`): In fp32.
        k (`int`): How many.
        allowed (`Tensor` of shape `(n,)`, *optional*): Boolean; other rows are left out.
        excluded (`tuple[Tensor, Tensor]`, *optional*): Users and rows, `(any,)` each, that do not go together.

    Returns:
        `tuple[Tensor, Tensor]`: Scores, fp32, and rows, both `(n_users, at most k)`; minus infinity where a user has
        fewer.

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
    size = max(1, SCORES // max(1, len(matrix)))  # users whose scores are there at a time
    parts = []
    for start in range(0, len(queries), size):
        of_part = excluded
        if excluded is not None:
            users, columns = excluded
            chosen = (users >= start) & (users < start + size)
            of_part = (users[chosen] - start, columns[chosen])
        parts.append(_search(matrix, queries[start : start + size], k, allowed, of_part))
    if not parts or not k:
        empty = torch.empty(len(queries), 0, device=queries.device)
        return empty, empty.long()
    scores, found = (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, found if rows is None else rows[found]


def merged(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The best of what was found in several matrices, whose rows follow each other."""
    scores, rows = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


def _subset(
    matrix: Matrix, rows: Tensor, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Matrix, tuple[Tensor, Tensor] | None]:
    """Some rows alone, and what is excluded of them, by its place among them."""
    if excluded is not None and len(rows):
        places = torch.searchsorted(rows, excluded[1]).clamp(max=len(rows) - 1)
        among = rows[places] == excluded[1]
        excluded = (excluded[0][among], places[among])
    elif excluded is not None:
        excluded = None
    return Matrix(matrix.exact[rows], matrix.size), excluded


def _search(
    matrix: Matrix, queries: Tensor, k: int, allowed: Tensor | None, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    wanted = max(4 * k, 2 * BLOCK)
    if matrix.scan is None or wanted * 4 > len(matrix):
        return _decide(matrix, queries, *_scan(matrix, queries, matrix.exact, k + BLOCK, allowed, excluded), k)
    short = queries[:, : matrix.size]
    lengths = short.norm(dim=1)
    bound = (short - short.bfloat16()).norm(dim=1) * matrix.length + lengths * matrix.error
    bound += (ROUNDING + 1e-4) * lengths * matrix.length  # of the sums
    estimates, candidates = _scan(matrix, queries, matrix.scan, wanted, allowed, excluded)
    scores, rows = _decide(matrix, queries, estimates, candidates, k)
    # an item that is no candidate has at most the last estimate plus the bound
    unsure = (scores[:, -1] < estimates[:, -1] + bound) & (estimates[:, -1] > -torch.inf)
    if unsure.any():
        users = unsure.nonzero().squeeze(1)
        if excluded is not None:
            chosen = unsure[excluded[0]]
            excluded = (unsure.cumsum(0)[excluded[0][chosen]] - 1, excluded[1][chosen])
        found = _scan(matrix, queries[users], matrix.exact, k + BLOCK, allowed, excluded)
        scores[users], rows[users] = _decide(matrix, queries[users], *found, k)
    return scores, rows


def _scan(
    matrix: Matrix,
    queries: Tensor,
    vectors: Tensor,
    k: int,
    allowed: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Estimates of the scores of all rows by `vectors`, which are those of the matrix, and the `k` largest."""
    n = len(matrix)
    scores = torch.empty(len(queries), -(-n // BLOCK) * BLOCK, device=queries.device)
    scores[:, n:] = -torch.inf
    left = queries[:, : vectors.shape[1]].to(vectors.dtype)
    for start in range(0, n, CHUNK):
        chunk = slice(start, min(start + CHUNK, n))
        scores[:, chunk] = left @ vectors[chunk].T
        if vectors.shape[1] < queries.shape[1]:
            scores[:, chunk].addr_(queries[:, -1], matrix.exact[chunk, -1])
        if allowed is not None:
            scores[:, chunk].masked_fill_(~allowed[chunk], -torch.inf)
    if excluded is not None:
        scores[excluded] = -torch.inf
    estimates, rows = top(scores, min(k, n))
    return estimates, rows.clamp(max=n - 1)  # what fills up the last block has no estimate


def _decide(matrix: Matrix, queries: Tensor, estimates: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best candidates by their scores in full precision; those without an estimate stay without a score."""
    candidates, order = candidates.sort(dim=1)
    estimates = estimates.gather(1, order)
    scores = torch.empty_like(estimates)
    size = max(1, GATHERED // max(1, candidates.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), size):
        users = slice(start, start + size)
        vectors = precise(matrix.exact[candidates[users]])
        scores[users] = (vectors @ precise(queries[users]).unsqueeze(2)).squeeze(2).float()
    scores = torch.where(estimates == -torch.inf, estimates, scores)
    if scores.isnan().any() or scores.isposinf().any():
        raise DataError("scores are not finite: there is a NaN or an infinity in the weights or the item vectors")
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, best), candidates.gather(1, best)
