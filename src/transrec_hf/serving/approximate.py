"""Nearest items of a very large catalogue without looking at all of them, by faiss (the extra `faiss`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..evaluation.ranking import precise
from .search import GATHERED, NOT_FINITE, SHARE, Matrix, search


SAMPLE = 256  # queries by which the recall is measured
TRAINED = 40  # vectors for each cell, from which the cells are found; faiss warns of fewer than 39
ROUNDS = 10  # of k-means
CANDIDATES = 4  # for each item that is wanted, which full precision orders


@dataclass
class ApproximateIndex:
    """
    The cells of an inverted file with vectors of 8 bits a number (`IVF,SQ8` in an id map), of which as many are looked
    at as a measured recall asks for. Sets that a filter leaves small are searched exactly.

    Args:
        matrix ([`Matrix`]): The vectors.
        cells (`faiss.IndexIDMap2`): What faiss has made of them.
        nprobe (`int`): Cells that are looked at.
        recall (`float`): Share of the exact ten best items that were found by it in a sample.
    """

    matrix: Matrix
    cells: Any
    nprobe: int
    recall: float

    @classmethod
    def build(
        cls, matrix: Matrix, recall: float = 0.99, queries: Tensor | None = None, seed: int = 0
    ) -> ApproximateIndex:
        """
        Args:
            matrix ([`Matrix`]): The vectors.
            recall (`float`, *optional*, defaults to 0.99): The least share of the exact ten best items to be found.
            queries (`Tensor` of shape `(n, width)`, *optional*): Vectors of users by which it is measured; if not
                given, means of items that are near each other.
            seed (`int`, *optional*, defaults to 0): Of the samples.

        Raises:
            [`DataError`]: If faiss is not there, or there are too few items for it.
        """
        try:
            import faiss
        except ImportError as error:
            raise DataError("an approximate index needs faiss: pip install 'transrec-hf[faiss]'") from error
        n = len(matrix)
        num_cells = int(4 * n**0.5)
        if n < 39 * 16:
            raise DataError(f"{n} items are too few for an approximate index: search them exactly")
        vectors = np.ascontiguousarray(matrix.exact.cpu().numpy())
        rng = np.random.default_rng(seed)
        drawn = np.sort(rng.permutation(n)[: min(n, TRAINED * num_cells)])
        num_cells = min(num_cells, len(drawn) // 39)  # fewer vectors a cell, and faiss warns
        inner = faiss.index_factory(vectors.shape[1], f"IVF{num_cells},SQ8", faiss.METRIC_INNER_PRODUCT)
        faiss.extract_index_ivf(inner).cp.niter = ROUNDS
        inner.train(vectors[drawn])
        cells = faiss.IndexIDMap2(inner)
        cells.add_with_ids(vectors, np.arange(n))
        found = cls(matrix, cells, 1, 0.0)
        found.tune(recall, found.sample(rng) if queries is None else queries)
        return found

    def sample(self, rng: np.random.Generator) -> Tensor:
        """Vectors such as users have: means of an item and some that are near it."""
        rows = torch.from_numpy(rng.permutation(len(self.matrix))[:SAMPLE])
        near = search(self.matrix, self.matrix.exact[rows], 5)[1]
        means = self.matrix.exact[near].mean(dim=1)
        return torch.nn.functional.normalize(means, dim=1) * self.matrix.whole

    def tune(self, recall: float, queries: Tensor) -> None:
        """Look at as many cells as give a recall, by doubling."""
        exact = search(self.matrix, queries, 10)[1]
        most = self.num_cells
        while True:
            rows = self.search(queries, 10)[1]
            hits = (rows[:, :, None] == exact[:, None, :]).any(dim=1)
            self.recall = float(hits.float().mean())
            if self.recall >= recall or self.nprobe >= most:
                return
            self.nprobe = min(most, 2 * self.nprobe)

    @property
    def num_cells(self) -> int:
        """How many cells there are."""
        import faiss

        return faiss.extract_index_ivf(self.cells.index).nlist

    def search(
        self,
        queries: Tensor,
        k: int,
        allowed: Tensor | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As [`search`], of the cells that are looked at; exactly if few rows are allowed."""
        import faiss

        if allowed is not None and int(allowed.count_nonzero()) * SHARE <= len(allowed):
            return search(self.matrix, queries, k, allowed, excluded)
        parameters = faiss.SearchParametersIVF(nprobe=self.nprobe)
        if allowed is not None:
            bits = np.packbits(allowed.cpu().numpy(), bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)
        most = 0 if excluded is None or not len(excluded[0]) else int(excluded[0].bincount().max())
        wanted = min(CANDIDATES * k + most, len(self.matrix))
        estimates, rows = self.cells.search(np.ascontiguousarray(queries.cpu().numpy()), wanted, params=parameters)
        missing = rows < 0
        scores = torch.from_numpy(np.where(missing, -np.inf, estimates).astype(np.float32))
        found = torch.from_numpy(np.where(missing, 0, rows))
        if most and excluded is not None:
            pairs = torch.stack(excluded).cpu()
            places = torch.cat([torch.arange(int(n)) for n in pairs[0].bincount(minlength=len(queries))])
            mine = torch.full((len(queries), most), -1)
            order = pairs[0].argsort(stable=True)
            mine[pairs[0][order], places] = pairs[1][order]
            seen = (found[:, :, None] == mine[:, None]).any(dim=2)
            scores = scores.masked_fill(seen, -torch.inf)
        device = queries.device
        return _decide(self.matrix, queries, scores.to(device), found.to(device), min(k, wanted))


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
        raise DataError(NOT_FINITE)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, best), candidates.gather(1, best)
