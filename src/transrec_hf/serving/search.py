"""Exact nearest items: a scan of small vectors finds candidates, full precision decides, and a bound proves it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from ..evaluation.ranking import precise


CHUNK = 2**13  # items that are scored at a time, so that their scores stay in the cache
SCORES = 2**25  # held at a time: 128 MiB
GATHERED = 2**20  # numbers of candidates' vectors that are held at a time
BLOCK = 64  # items of which the best one is looked at first
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
        whole (`float`): Largest length of a row.
        scan (`Tensor` of shape `(n, size)`, *optional*): The same in bfloat16, without the popularity.
        length (`float`): Largest length of a row without the popularity.
        error (`float`): Largest length of what a row of `scan` lacks.
    """

    exact: Tensor
    size: int
    whole: float
    scan: Tensor | None = None
    length: float = 0.0
    error: float = 0.0

    @classmethod
    def of(cls, exact: Tensor, size: int, scan: Tensor | None = None, bounds: Tensor | None = None) -> Matrix:
        """With the smaller copy where it is of use, unless it is given with its `bounds`."""
        whole = length = error = 0.0
        if scan is not None and bounds is not None and scan_dtype(exact.device.type) == scan.dtype:
            whole, length, error = bounds.tolist()
            return cls(exact, size, whole, scan, length, error)
        if len(exact) <= SMALL or scan_dtype(exact.device.type) == torch.float32:
            scan = None
        elif scan is None:
            scan = exact[:, :size].bfloat16()
        for start in range(0, len(exact), CHUNK):
            rows = exact[start : start + CHUNK]
            whole = max(whole, float(rows.norm(dim=1).max()))
            if scan is not None:
                short = rows[:, :size]
                length = max(length, float(short.norm(dim=1).max()))
                error = max(error, float((short - scan[start : start + CHUNK]).norm(dim=1).max()))
        return cls(exact, size, whole, scan, length, error)

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def bounds(self) -> Tensor:
        """What is known of the lengths, to be kept with `scan`."""
        return torch.tensor([self.whole, self.length, self.error], dtype=torch.float64)

    def bound(self, queries: Tensor, is_short: bool) -> Tensor:
        """How far the estimates of [`_scan`] can be from the scores of users, `(n_users,)`."""
        bound = queries.norm(dim=1) * self.whole * queries.shape[1] * 2.0**-23  # of sums in fp32
        if not is_short:
            return bound
        short = queries[:, : self.size]
        lengths, lacks = short.norm(dim=1), (short - short.bfloat16()).norm(dim=1)
        return bound + lacks * self.length + lengths * self.error * (1 + ROUNDING) + ROUNDING * lengths * self.length


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
    return Matrix(matrix.exact[rows], matrix.size, matrix.whole), excluded


def _search(
    matrix: Matrix, queries: Tensor, k: int, allowed: Tensor | None, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    wanted = max(4 * k, 32)
    vectors = matrix.exact if matrix.scan is None or 4 * wanted > len(matrix) else matrix.scan
    estimates, candidates = _scan(matrix, queries, vectors, wanted, allowed, excluded)
    scores, rows = _decide(matrix, queries, estimates, candidates, k)
    if wanted >= len(matrix):
        return scores, rows
    # an item that is no candidate has at most the last estimate plus the bound
    last = estimates[:, -1]
    unsure = (scores[:, -1] <= last + matrix.bound(queries, vectors is matrix.scan)) & (last > -torch.inf)
    if unsure.any():
        users = unsure.nonzero().squeeze(1)
        if excluded is not None:
            chosen = unsure[excluded[0]]
            excluded = (unsure.cumsum(0)[excluded[0][chosen]] - 1, excluded[1][chosen])
        scores[users], rows[users] = _compute(matrix, queries[users], k, allowed, excluded)
    return scores, rows


def _compute(
    matrix: Matrix, queries: Tensor, k: int, allowed: Tensor | None, excluded: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The `k` best rows by all scores, in full precision: for those whom a scan leaves in doubt."""
    scores = torch.empty(len(queries), len(matrix), device=queries.device)
    for start in range(0, len(matrix), CHUNK):
        scores[:, start : start + CHUNK] = precise(queries) @ precise(matrix.exact[start : start + CHUNK]).T
    if allowed is not None:
        scores.masked_fill_(~allowed, -torch.inf)
    if excluded is not None:
        scores[excluded] = -torch.inf
    least = scores.topk(k, dim=1).values[:, -1:]
    better, equal = scores > least, scores == least
    left = k - better.sum(dim=1, keepdim=True)
    rows = (better | (equal & (equal.cumsum(dim=1) <= left))).nonzero()[:, 1].view(len(queries), k)
    found = scores.gather(1, rows)
    order = found.sort(dim=1, descending=True, stable=True).indices
    return found.gather(1, order), rows.gather(1, order)


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
    with _room(len(queries), -(-n // BLOCK) * BLOCK, queries.device) as scores:
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


_kept: list[Tensor] = []  # memory for scores: the system takes as long to give it as it takes to compute them


@contextmanager
def _room(n_users: int, n_items: int, device: torch.device) -> Iterator[Tensor]:
    """A tensor `(n_users, n_items)` to write scores to, and no longer used afterwards."""
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
