"""Exact search: the same rows as if all scores were computed, whatever the vectors, filters and exclusions are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transrec_hf import DataError
from transrec_hf.serving import search as module
from transrec_hf.serving.search import Matrix, scans_in_int8, search, top


needs_int8 = pytest.mark.skipif(not scans_in_int8(), reason="this processor does not multiply 8 bits")


def make_matrix(n: int, size: int = 16, popularity: bool = False, seed: int = 0, clusters: int = 20) -> Matrix:
    """Vectors in clusters, as those of items are, of length 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, size, generator=generator)
    rows = centres[torch.randint(clusters, (n,), generator=generator)]
    rows = rows + 0.3 * torch.randn(n, size, generator=generator)
    exact = torch.nn.functional.normalize(rows, dim=1)
    if popularity:
        exact = torch.cat([exact, -8 * torch.rand(n, 1, generator=generator)], dim=1)
    return Matrix.of(exact, size)


def make_queries(n: int, matrix: Matrix, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    queries = 12 * torch.nn.functional.normalize(torch.randn(n, matrix.size, generator=generator), dim=1)
    more = matrix.exact.shape[1] - matrix.size
    return torch.cat([queries, torch.ones(n, more)], dim=1)


def by_hand(matrix: Matrix, queries: torch.Tensor, k: int, allowed=None, excluded=None) -> tuple:
    scores = (queries.double() @ matrix.exact.double().T).float()
    if allowed is not None:
        scores[:, ~allowed] = -torch.inf
    if excluded is not None:
        scores[excluded] = -torch.inf
    order = scores.sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_top_is_topk(columns: int, k: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, columns * block, generator=generator)
    scores[0, : columns * block // 2] = -torch.inf
    values, places = top(scores, k, block)
    expected = scores.topk(min(k, scores.shape[1]), dim=1).values
    assert torch.equal(values, expected) and torch.equal(scores.gather(1, places), values)


@pytest.mark.parametrize("popularity", [False, True])
@pytest.mark.parametrize("n", [1, 40, 6000])
@pytest.mark.parametrize("share", [None, 0.5, 0.01])
def test_found_is_what_full_precision_finds(n: int, popularity: bool, share: float | None) -> None:
    matrix = make_matrix(n, popularity=popularity)
    queries = make_queries(9, matrix)
    allowed = None if share is None else torch.rand(n, generator=torch.Generator().manual_seed(3)) < share
    excluded = (torch.tensor([0, 0, 4]), torch.tensor([0, n // 2, n - 1]))
    for k in (1, 10, 2 * n):
        scores, rows = search(matrix, queries, k, allowed, excluded)
        expected, expected_rows = by_hand(matrix, queries, k, allowed, excluded)
        real = expected > -torch.inf
        width = int(real.sum(dim=1).max())
        assert (scores[:, width:] == -torch.inf).all()
        assert torch.equal(scores[:, :width], expected[:, :width])
        assert torch.equal(rows[:, :width][real[:, :width]], expected_rows[:, :width][real[:, :width]])


@needs_int8
def test_what_the_scan_cannot_tell_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of items within the error of the scan: without the bound some of the best would be missed."""
    generator = torch.Generator().manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=1)
    exact = torch.nn.functional.normalize(one + 1e-4 * torch.randn(20_000, 64, generator=generator), dim=1)
    matrix = Matrix.of(exact, 64)
    queries = 12 * torch.cat([one, -one, torch.nn.functional.normalize(torch.randn(3, 64, generator=generator))])
    scores, rows = search(matrix, queries, 10)
    expected, expected_rows = by_hand(matrix, queries, 10)
    assert torch.equal(rows, expected_rows) and torch.equal(scores, expected)
    estimate = module._estimate
    monkeypatch.setattr(module, "_estimate", lambda *arguments: 0 * estimate(*arguments))
    assert not torch.equal(search(matrix, queries, 10)[1], expected_rows), "the test would not notice a missing bound"


def test_equal_items_come_in_the_order_of_their_rows() -> None:
    exact = make_matrix(1).exact.repeat(5000, 1)
    assert search(Matrix.of(exact, 16), exact[:2], 7)[1].tolist() == [list(range(7))] * 2


def test_users_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = make_matrix(5000)
    queries = make_queries(20, matrix)
    excluded = (torch.arange(20), torch.arange(20))
    whole = search(matrix, queries, 5, None, excluded)
    monkeypatch.setattr(module, "SCORES", 3 * 5000)
    monkeypatch.setattr(module, "GATHERED", 1000)
    parts = search(matrix, queries, 5, None, excluded)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("n", [50, 5000])
def test_numbers_that_are_none_are_told(n: int) -> None:
    matrix = make_matrix(n)
    queries = make_queries(2, matrix)
    queries[1, 3] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        search(matrix, queries, 3)
    matrix.exact[n // 2, 5] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        search(Matrix.of(matrix.exact, matrix.size), queries[:1], 3)


def test_nothing_allowed_and_nobody_asking() -> None:
    matrix = make_matrix(30)
    nothing = torch.zeros(30, dtype=torch.bool)
    assert search(matrix, make_queries(2, matrix), 3, nothing)[0].numel() == 0
    assert search(matrix, make_queries(2, matrix)[:0], 3)[0].shape[0] == 0
    for n, share in itertools.product((30, 6000), (1, 2)):
        some = torch.arange(n) < share
        scores, rows = search(make_matrix(n), make_queries(1, matrix), 5, some)
        assert rows[scores > -torch.inf].tolist() == sorted(
            rows[scores > -torch.inf].tolist(), key=rows[0].tolist().index
        )
        assert int((scores > -torch.inf).sum()) == share
