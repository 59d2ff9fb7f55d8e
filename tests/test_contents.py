"""Contents: what a reader of a modality says of the items, vectors before all, and the policies over any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transrec_hf.data.catalogue import Catalogue, load_catalogue
from transrec_hf.data.contents import READERS, Vectors
from transrec_hf.data.statistics import data_statistics
from transrec_hf.errors import BadContent, DataError, InputError
from transrec_hf.model.modalities_transrec import MODALITIES


VECTORS = [[1.0, -2.0, 0.5], None, [0.0, 0.0, 3.0], [4.0, 5.0, 6.0]]
IDS = ["a", "b", "c", "d"]
TEXTS = ["red", "green", None, "blue"]


def shop(features: Any = VECTORS, kind: pa.DataType | None = None, **columns: Any) -> Catalogue:
    table = pa.table({"item_id": IDS, "text": TEXTS, "features": pa.array(features, kind), **columns})
    return Catalogue(datasets.Dataset(table), "shop")


def test_every_modality_has_a_reader() -> None:
    assert list(READERS) == list(MODALITIES)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.float64(), 3),
    ],
    ids=str,
)
def test_vectors_of_every_type_are_the_same(kind: pa.DataType) -> None:
    catalogue = shop(kind=kind)
    assert catalogue.has("features").tolist() == [True, False, True, True]
    assert list(catalogue.contents) == ["text", "features"]
    vectors = catalogue.contents["features"]
    assert isinstance(vectors, Vectors) and vectors.size == 3
    read = catalogue.read(0)
    assert list(read) == ["text", "features"] and read["features"].dtype == np.float32
    assert read["features"].tolist() == VECTORS[0] and list(catalogue.read(1)) == ["text"]
    assert np.frombuffer(catalogue.encoded("features", 3), "<f4").tolist() == VECTORS[3]
    assert catalogue.content_hash() == shop().content_hash()


def test_integers_and_an_array_are_vectors_too() -> None:
    array = np.arange(1, 13).reshape(4, 3)
    for features in (array.tolist(), array, array.astype("float32")):
        items = datasets.Dataset.from_dict({"item_id": IDS, "features": features})
        assert Catalogue(items).read(2)["features"].tolist() == [7, 8, 9]


@pytest.mark.parametrize("file", ["items.parquet", "items.jsonl"])
def test_vectors_come_from_files(file: str, tmp_path: Path) -> None:
    items = datasets.Dataset.from_dict({"item_id": IDS, "features": VECTORS, "text": TEXTS})
    items.to_parquet(tmp_path / file) if file.endswith("parquet") else items.to_json(tmp_path / file)
    catalogue = load_catalogue(tmp_path)
    assert catalogue.content_hash() == shop().content_hash()
    assert catalogue.with_policy("one_per_item").contents["features"].present.sum() >= 1


DEFECTS: dict[str, tuple[Any, str]] = {
    "NaN": ([1.0, float("nan"), 2.0], "missing, NaN, infinite"),
    "Inf": ([1.0, 2.0, float("-inf")], "missing, NaN, infinite"),
    "null": ([1.0, None, 2.0], "missing, NaN, infinite"),
    "too large": ([1.0, 1e39, 2.0], "too large for float32"),
    "too small": ([0.0, 1e-60, 0.0], "all numbers are zero"),
    "zero": ([0.0, -0.0, 0.0], "all numbers are zero"),
    "short": ([1.0], "1 numbers, but most items have 3"),
    "long": ([1.0] * 4, "4 numbers, but most items have 3"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("selected", [False, True])
def test_vectors_that_say_nothing_are_named(name: str, selected: bool, tmp_path: Path) -> None:
    vector, reason = DEFECTS[name]
    table = pa.table({"item_id": [*IDS, "e"], "features": [VECTORS[0], vector, VECTORS[2], vector, VECTORS[3]]})
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=3 if selected else 100)
    with pytest.raises(InputError) as caught:
        load_catalogue(tmp_path)
    message = str(caught.value)
    for part in (
        "items.parquet: ",
        "unusable features: row 2 (item_id 'b': ",
        "row 4 (item_id 'd': ",
        reason,
        "Write",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("features", "kind"),
    [
        (["x"] * 4, None),
        ([["x"]] * 4, None),
        ([1.0] * 4, None),
        ([[[1.0]]] * 4, None),
        ([[True]] * 4, None),
        ([{"v": 1.0}] * 4, None),
    ],
)
def test_columns_that_hold_no_vectors_are_refused(features: Any, kind: Any) -> None:
    with pytest.raises(InputError, match=r"shop: column 'features' holds .*\. Write a list of numbers"):
        shop(features, kind)


def test_a_column_without_any_vector_is_left_out() -> None:
    for features in ([None] * 4, [float("nan")] * 4):
        items = datasets.Dataset.from_dict({"item_id": IDS, "text": IDS, "features": features})
        assert list(Catalogue(items).contents) == ["text"]
    empty = Catalogue(datasets.Dataset(pa.table({"item_id": IDS, "text": IDS, "features": [[], [1.0], None, []]})))
    assert empty.has("features").tolist() == [False, True, False, False]


def many(size: int = 400) -> Catalogue:
    """Items with every combination of modalities in turn."""
    columns = {
        "item_id": [f"i{row}" for row in range(size)],
        "text": [f"word {row}" if row % 7 in (0, 1, 2, 3) else None for row in range(size)],
        "features": [[float(row + 1), 1.0] if row % 7 in (2, 3, 4, 5, 6) else None for row in range(size)],
    }
    return Catalogue(datasets.Dataset.from_dict(columns))


def test_a_policy_of_one_modality_hides_the_others() -> None:
    catalogue = many()
    chosen = catalogue.select(catalogue.has("text"))
    assert list(chosen.with_policy("text").read(2)) == ["text"]
    with pytest.raises(DataError, match="have no features"):
        catalogue.with_policy("features")
    assert chosen.has("features").any() and not chosen.with_policy("text").has("features").any()


def test_one_per_item_draws_evenly_and_as_before() -> None:
    catalogue = many(7000)
    drawn = catalogue.with_policy("one_per_item", seed=5)
    present = np.stack([drawn.has(name) for name in MODALITIES])
    assert (present.sum(axis=0) == 1).all()
    both = catalogue.has("text") & catalogue.has("features")
    show_first = np.random.default_rng(5).random(7000) < 0.5  # what seeds of published runs mean
    assert (drawn.has("text") == (catalogue.has("text") & (show_first | ~catalogue.has("features")))).all()
    assert 0.4 < drawn.has("text")[both].mean() < 0.6
    assert (catalogue.has("text") & catalogue.has("features")).any()  # the catalogue itself hides nothing


def test_all_modalities_are_drawn_evenly() -> None:
    catalogue = many(3000)
    content = catalogue.contents["features"]
    catalogue.contents = dict.fromkeys(MODALITIES, content)  # any reader will do for the draw
    present = np.stack([catalogue.with_policy("one_per_item", seed=1).has(name) for name in MODALITIES])
    assert (present.sum(axis=0) == content.present).all()
    assert np.allclose(present.sum(axis=1) / content.present.sum(), 1 / len(MODALITIES), atol=0.04)


def test_what_an_item_lacks_is_not_read() -> None:
    catalogue = many(14)
    assert catalogue.read(0) == {"text": "word 0"} and catalogue.image(0) is None
    assert catalogue.encoded("features", 0) is None and catalogue.encoded("image", 0) is None
    assert not catalogue.has("image").any() and catalogue.has("image").shape == (14,)
    assert catalogue.select([6, 0]).read(0)["features"].tolist() == [7.0, 1.0]


def test_statistics_name_the_modalities_that_occur() -> None:
    from test_data import make_sequences

    from transrec_hf.data.interactions import leave_one_out

    split = leave_one_out(make_sequences([0, 1, 2], [3, 4, 5]))
    shares = data_statistics(many(7), split)["items_with"]
    assert shares == {"text_only": 2 / 7, "image_only": 0.0, "features_only": 3 / 7, "both": 2 / 7}
    texts = Catalogue(datasets.Dataset.from_dict({"item_id": list("abcdef"), "text": list("abcdef")}))
    assert data_statistics(texts, split)["items_with"] == {"text_only": 1.0, "image_only": 0.0, "both": 0.0}


def test_a_content_that_cannot_be_used_is_bad_input() -> None:
    assert (
        issubclass(BadContent, InputError) and issubclass(InputError, DataError) and issubclass(DataError, ValueError)
    )
