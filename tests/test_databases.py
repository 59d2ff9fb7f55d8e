"""An index as an Arrow table, and as a table of LanceDB that follows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from testing_utils import make_catalogue, make_model, make_processor

from transrec_hf import DataError, ItemSource, Recommender
from transrec_hf.serving.adapters import VECTOR, to_arrow, to_lancedb


HISTORY = ["item-3", "item-1"]


@pytest.fixture(params=[{}, {"similarity": "cosine", "popularity_prior": True, "item_map": "whitened"}])
def recommender(request: pytest.FixtureRequest) -> Recommender:
    counts = {f"item-{row}": 12 - row for row in range(12)}
    return Recommender(make_model(**request.param), ItemSource(make_catalogue(), make_processor()), counts=counts)


def best(ids: list[str], scores: np.ndarray, k: int = 5) -> list[str]:
    return [ids[place] for place in np.argsort(-scores, kind="stable") if ids[place] not in HISTORY][:k]


def test_a_table_has_what_a_search_elsewhere_needs(recommender: Recommender) -> None:
    recommender.remove_items(["item-5"])
    recommender.remove_items(["item-6"], readable=True)
    recommender.add_items([{"item_id": "new", "text": "red hat"}])
    table = to_arrow(recommender.index)
    ids = table["item_id"].to_pylist()
    assert set(ids) == {*(f"item-{row}" for row in range(12) if row not in (5, 6)), "new"}
    assert dict(zip(ids, table["text"].to_pylist(), strict=True))["new"] == "red hat"
    vectors = np.stack(table[VECTOR].to_numpy())
    assert vectors.dtype == np.float32
    scores = vectors @ recommender.user_vectors(HISTORY)
    assert best(ids, scores) == [item.item_id for item in recommender.recommend(HISTORY, 5)]


def test_a_column_of_the_same_name_is_refused(recommender: Recommender) -> None:
    index = recommender.index
    index.columns = pa.table({VECTOR: [1.0] * len(index)})
    with pytest.raises(DataError, match="the items have a column 'vector', a name that ids or vectors have"):
        to_arrow(index)


def test_a_table_of_lancedb_follows_the_index(recommender: Recommender, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")

    def found(table: Any) -> list[str]:
        vector = recommender.user_vectors(HISTORY)
        rows = table.search(vector).distance_type("dot").limit(7).to_list()
        return [row["item_id"] for row in rows if row["item_id"] not in HISTORY][:5]

    def expected() -> list[str]:
        return [item.item_id for item in recommender.recommend(HISTORY, 5)]

    stale = to_lancedb(recommender.index, tmp_path)
    assert stale.count_rows() == 12 and found(stale) == expected()
    recommender.remove_items([expected()[0]])
    recommender.update_items([{"item_id": "item-7", "text": "old shoe"}])
    recommender.add_items([{"item_id": "new", "text": "red hat"}])
    for _ in range(2):  # the second time nothing changes
        table = to_lancedb(recommender.index, tmp_path)
        assert sorted(table.to_arrow()["item_id"].to_pylist()) == sorted(recommender.item_ids.tolist())
        assert found(table) == expected()
    assert to_lancedb(recommender.index, tmp_path, "others").count_rows() == 12


def test_lancedb_is_asked_for(recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(DataError, match="pip install lancedb"):
        to_lancedb(recommender.index, tmp_path)
