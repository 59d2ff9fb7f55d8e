"""Nearest items of a very large catalogue, found by faiss (the extra `faiss`) without a look at every item."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .search import SHARE, Matrix, best_of, largest, search


SAMPLE = 256  # queries that measure the recall
TRAINED = 40  # vectors for each cell that the cells are fitted on; faiss warns of fewer than 39
ROUNDS = 10  # of k-means
CANDIDATES = 4  # items that are scored in full precision, for each item that is wanted


@dataclass
class ApproximateIndex:
    """
    An inverted file of cells with 8 bits for each number of a vector (`IVF,SQ8` in an id map). It searches as many
    cells as the measured recall needs. If a filter leaves few items, these are searched exactly.

    Args:
        matrix ([`Matrix`]): The vectors.
        cells (`faiss.IndexIDMap2`): The index that faiss has made of them.
        nprobe (`int`): Number of cells that are searched.
        recall (`float`): Share of the exact ten best items that this search found for a sample of queries.
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
            recall (`float`, *optional*, defaults to 0.99): Share of the exact ten best items that must be found.
            queries (`Tensor` of shape `(n, width)`, *optional*): User vectors for the measurement of the recall; by
                default, means of items that are near each other.
            seed (`int`, *optional*, defaults to 0): Seed of the samples.

        Raises:
            [`DataError`]: If faiss is not installed, or there are too few items.
        """
        if not 0 < recall <= 1:
            raise DataError(f"the recall must be above 0 and at most 1, got {recall!r}")
        n = len(matrix)
        if n < 39 * 16:
            raise DataError(f"{n} items are too few for an approximate index: leave it out, and the search is exact")
        try:
            import faiss
        except ImportError as error:
            raise DataError("an approximate index needs faiss: pip install 'transrec-hf[faiss]'") from error
        num_cells = int(4 * n**0.5)
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

    def save(self, file: str | os.PathLike, state: str) -> None:
        """Save the cells for other processes, with the state of the index that they belong to."""
        import faiss

        faiss.write_index(self.cells, os.fspath(file))
        about = {"state": state, "nprobe": self.nprobe, "recall": self.recall}
        Path(f"{file}.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, file: str | os.PathLike, state: str, matrix: Matrix) -> ApproximateIndex | None:
        """
        Map the cells that another process has saved into memory; `None` if they belong to another state of the index.
        Read only your own files: faiss does not check what it reads.
        """
        about = json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))
        if about.pop("state") != state:
            return None
        import faiss

        return cls(matrix, faiss.read_index(os.fspath(file), faiss.IO_FLAG_MMAP), **about)

    def sample(self, rng: np.random.Generator) -> Tensor:
        """Vectors like those of users: means of an item and some items near it."""
        rows = torch.from_numpy(rng.permutation(len(self.matrix))[:SAMPLE])
        near = search(self.matrix, self.matrix.exact[rows], 5)[1]
        means = self.matrix.exact[near].mean(dim=1)
        return torch.nn.functional.normalize(means, dim=1) * self.matrix.whole

    def tune(self, recall: float, queries: Tensor) -> None:
        """Double the number of searched cells until the recall is reached."""
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
        """The number of cells."""
        import faiss

        return faiss.extract_index_ivf(self.cells.index).nlist

    def search(
        self,
        queries: Tensor,
        k: int,
        allowed: Tensor | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like [`search`], among the cells that are searched; exact if few rows are allowed."""
        import faiss

        if allowed is not None and int(allowed.count_nonzero()) * SHARE <= len(allowed):
            return search(self.matrix, queries, k, allowed, excluded)
        parameters = faiss.SearchParametersIVF(nprobe=self.nprobe)
        if allowed is not None:
            bits = np.packbits(allowed.cpu().numpy(), bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)
        users = queries.cpu().numpy()
        largest(self.matrix, users)  # refuses users whose scores would not be finite
        seen = [np.empty(0, dtype=np.int64)] * len(users)
        if excluded is not None:
            of, rows = (part.cpu().numpy() for part in excluded)
            order = of.argsort(kind="stable")
            seen = np.split(rows[order], np.bincount(of, minlength=len(users)).cumsum()[:-1])
        wanted = min(CANDIDATES * k + max(map(len, seen), default=0), len(self.matrix))
        _, found = self.cells.search(np.ascontiguousarray(users), wanted, params=parameters)
        candidates = (np.setdiff1d(mine[mine >= 0], had) for mine, had in zip(found, seen, strict=True))
        scores, rows = best_of(self.matrix, users, candidates, min(k, wanted))
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)
