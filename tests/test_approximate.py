"""The approximate index: found is nearly what is best, by as many cells as a measured recall asks for."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search import make_matrix, make_queries
from testing_utils import make_model

from transrec_hf import DataError, ItemIndex, Recommender
from transrec_hf.serving import live
from transrec_hf.serving.approximate import ApproximateIndex
from transrec_hf.serving.index import encoder_hash
from transrec_hf.serving.search import search


pytest.importorskip("faiss")
N = 6000


def share_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found[:, :, None] == exact[:, None, :]).any(dim=1).float().mean())


@pytest.mark.parametrize("popularity", [False, True])
def test_as_many_cells_as_the_recall_asks_for(popularity: bool) -> None:
    matrix = make_matrix(N, popularity=popularity)
    queries = make_queries(50, matrix)
    low, high = (ApproximateIndex.build(matrix, recall, queries) for recall in (0.5, 0.99))
    assert low.recall >= 0.5 and high.recall >= 0.99 and low.nprobe < high.nprobe
    scores, rows = high.search(queries, 10)
    assert share_of(rows, search(matrix, queries, 10)[1]) == pytest.approx(high.recall)
    expected = (queries.double()[:, None] * matrix.exact.double()[rows]).sum(dim=2).float()
    torch.testing.assert_close(scores, expected, msg="scores are those of full precision")
    assert (scores.diff(dim=1) <= 0).all()


def test_without_queries_it_is_measured_by_means_of_neighbours() -> None:
    assert ApproximateIndex.build(make_matrix(N), 0.95).recall >= 0.95


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_filters(share: float) -> None:
    matrix = make_matrix(N)
    queries = make_queries(20, matrix)
    allowed = torch.rand(N, generator=torch.Generator().manual_seed(0)) < share
    found = ApproximateIndex.build(matrix, 1.0, queries)
    _, rows = found.search(queries, 10, allowed)
    assert allowed[rows].all()
    assert share_of(rows, search(matrix, queries, 10, allowed)[1]) > (0.95 if share > 0.1 else 0.999)


def test_what_users_had_is_left_out() -> None:
    matrix = make_matrix(N)
    queries = make_queries(6, matrix)
    best = search(matrix, queries, 30)[1]
    users = torch.tensor([2, 0, 2, 2, 5])
    excluded = (users, torch.stack([best[2, 0], best[0, 3], best[2, 1], best[2, 4], best[5, 0]]))
    found = ApproximateIndex.build(matrix, 1.0, queries)
    assert (
        share_of(found.search(queries, 10, None, excluded)[1], search(matrix, queries, 10, None, excluded)[1]) > 0.95
    )
    rows = found.search(queries, 10, None, excluded)[1]
    assert not any(row in rows[user] for user, row in zip(*excluded, strict=True))


def test_a_recommender_that_does_not_look_at_all_items() -> None:
    served = Recommender(make_model(modalities=("text",)), index=make_items(2000))
    expected = served.recommend(["item-3", "item-1"], 10)
    assert served.approximate(recall=1.0) == 1.0
    assert served.items.cells is not None
    found = served.recommend(["item-3", "item-1"], 10)
    same = {item.item_id for item in found} & {item.item_id for item in expected}
    assert len(same) >= 9 and not {"item-3", "item-1"} & {item.item_id for item in found}
    with pytest.raises(DataError, match="above 0 and at most 1"):
        served.approximate(recall=99)
    served.remove_items([found[0].item_id])
    assert found[0].item_id not in [item.item_id for item in served.recommend(["item-3", "item-1"], 10)]


def test_cells_are_found_anew_when_the_index_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that writes it, and by one that reads the folder."""
    monkeypatch.setattr(live, "MIN_COMPACTED", 50)
    monkeypatch.setattr(live, "COMPACTED_SHARE", 0.0)
    model, items = make_model(modalities=("text",)), make_items(2000)
    served = Recommender(model, index=items, folder=tmp_path)
    reader = Recommender(model, index=live.LiveItems.open(tmp_path, model.config.hidden_size))
    before = [of.approximate(recall=1.0) and of.items.cells for of in (served, reader)]
    gone = [f"item-{row}" for row in range(60)]
    served.remove_items(gone)
    for of, old in zip((served, reader), before, strict=True):
        assert len(of) == 1940
        wait()
        cells = of.items.cells
        assert cells is not None and cells is not old and len(cells.matrix) == 1940
        found = [item.item_id for item in of.recommend(["item-70", "item-80"], 10)]
        exact = Recommender(model, index=of.index).recommend(["item-70", "item-80"], 10)
        assert len({item.item_id for item in exact} & set(found)) >= 9
    served.remove_items([f"item-{row}" for row in range(60, 1500)])  # too few are left
    wait()
    assert served.items.cells is None and len(served.recommend(["item-1600"], 10)) == 10


def test_processes_share_the_cells_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one writes them, the next ones read them, and one that sees another index finds its own."""
    model, file = make_model(modalities=("text",)), tmp_path / "cells.faiss"

    def served() -> Recommender:
        return Recommender(model, index=live.LiveItems.open(tmp_path, model.config.hidden_size))

    first = Recommender(model, index=make_items(2000), folder=tmp_path)
    recall = first.approximate(0.9, file=file)
    with monkeypatch.context() as patched:
        patched.setattr(ApproximateIndex, "build", None)
        second = served()
        assert second.approximate(0.9, file=file) == recall
    histories = [["item-3", "item-1"], ["item-40"]]
    assert first.recommend(histories, 10).to_arrow() == second.recommend(histories, 10).to_arrow()
    written = file.read_bytes()
    first.remove_items(["item-7"])
    first.live.compact()
    wait()
    third = served()
    third.approximate(0.9, file=file)
    assert third.items.cells is not None and len(third.items.cells.matrix) == 1999
    assert file.read_bytes() == written


def wait() -> None:
    """Until all cells have been found."""
    for thread in threading.enumerate():
        if thread.name == "transrec-cells":
            thread.join()


def make_items(n: int) -> ItemIndex:
    model = make_model(modalities=("text",))
    ids = np.array([f"item-{row}" for row in range(n)])
    return ItemIndex(ids, make_matrix(n).exact, None, "", encoder_hash(model, None))


def test_few_items_are_searched_exactly() -> None:
    with pytest.raises(DataError, match="too few"):
        ApproximateIndex.build(make_matrix(100))
