"""JSONL, Parquet and tables in memory, as other programs make them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transrec_hf.data import parquet_tables, text_tables
from transrec_hf.data.catalogue import Catalogue, load_catalogue
from transrec_hf.data.interactions import load_domain, load_interactions
from transrec_hf.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


ITEMS: dict[str, Any] = {"item_id": ["a", "b", "c"], "text": ["red", "green", "blue"]}
EVENTS: dict[str, Any] = {"user_id": ["u", "v", "u"], "item_id": ["a", "b", "c"], "timestamp": [2, 1, 1]}
SHOP = Catalogue(datasets.Dataset.from_dict(ITEMS), "shop")


def jsonl(folder: Path, *rows: Any, name: str = "items.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return folder / name


def parquet(folder: Path, columns: Any, name: str = "items.parquet", **options: Any) -> Path:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), folder / name, **options)
    return folder / name


# JSONL

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
values = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), texts, st.lists(st.integers(), max_size=2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, values), min_size=1, max_size=6), st.booleans(), st.sampled_from(["", " ", "\r"]))
def test_json_is_read_as_python_reads_it(tmp_path, rows, ascii_only, end) -> None:
    cells = [{"item_id": str(row), "text": f"_{text}", "more": more} for row, (text, more) in enumerate(rows)]
    path = jsonl(tmp_path, *(json.dumps(cell, ensure_ascii=ascii_only) + end for cell in cells))
    catalogue = load_catalogue(path)
    assert [catalogue.text(row) for row in range(len(rows))] == [cell["text"] for cell in cells]


@pytest.mark.parametrize(
    "lines",
    [
        ['{"item_id": 1, "text": "1984-06-08"}', '{"item_id": 2, "text": "12:30:00"}'],
        ['{"text": "1984-06-08", "item_id": 1}', "", '{"item_id": 2, "text": "12:30:00", "price": 3}'],
        ['{"item_id": "1", "text": "1984-06-08", "x": 1}', '{"item_id": "2", "text": "12:30:00", "x": "one"}'],
        ['{"item_id": "1", "text": "1984-06-08", "x": {"y": 1}}', '{"item_id": "2", "text": "12:30:00", "x": [1]}'],
        ['  {"item_id": "1", "text": "1984-06-08"}', '{"item_id": "2", "text": "12:30:00", "x": NaN}'],
        ['{"item_id": 1, "text": "1984-06-08", "x": 1' + "0" * 30 + "}", '{"item_id": 2, "text": "12:30:00"}'],
    ],
)
def test_ids_and_texts_of_json(lines: list[str], tmp_path: Path) -> None:
    catalogue = load_catalogue(jsonl(tmp_path, *lines))
    assert catalogue.item_ids.tolist() == ["1", "2"] and catalogue.text(0) == "1984-06-08"
    assert catalogue.text(1) == "12:30:00"


@pytest.mark.parametrize("depth", [40, 100, 1_000, 100_000])
@pytest.mark.parametrize("form", ['{"item_id": "a", "text": "x", "z": %s}', '{"item_id": "a", "text": %s}'])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"k":', "}"), ('["]",', "]")])
def test_deep_nesting_ends_in_a_sentence_at_most(depth, form, brackets, tmp_path) -> None:
    opened, closed = brackets
    path = jsonl(tmp_path, form % (opened * depth + "1" + closed * depth))
    try:
        assert len(load_catalogue(path)) == 1 and "z" in form
    except DataError as error:
        assert len(str(error)) < 1000


def test_nesting_over_lines_does_not_reach_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("Arrow was asked")

    monkeypatch.setattr(text_tables, "_read_simple_jsonl", never)
    for text in ('{"item_id": "a", "z": [\n' * 100, "[\n" * 100, '{"item_id": "a",\n"text": "x"}', "}\n{" * 100):
        with pytest.raises(DataError, match="malformed JSON: row 1"):
            load_catalogue(jsonl(tmp_path, text))


def test_lines_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"item_id": f"i{row}", "text": "x" * (row % 50) + "!"} for row in range(300)]
    path = jsonl(tmp_path, *rows)
    monkeypatch.setattr(text_tables, "BYTES", 1000)
    monkeypatch.setattr(text_tables, "_read_odd_jsonl", lambda path: pytest.fail("these lines are simple"))
    assert [load_catalogue(path).text(row) for row in range(300)] == [row["text"] for row in rows]


BAD_JSON: dict[str, tuple[list[str], str]] = {
    "half a character": (['{"item_id": "a", "text": "x"}', r'{"item_id": "b", "text": "\ud83d"}'], "surrogate.*row 2"),
    "half a character in an id": ([r'{"item_id": "\udc00", "text": "x"}'], "surrogate.*'item_id': row 1"),
    "text of numbers": (['{"item_id": "a", "text": "x"}', '{"item_id": "b", "text": 5}'], r"no string.*row 2 \(5\)"),
    "float ids": (['{"item_id": 1.0, "text": "x"}', '{"item_id": 2.0, "text": "y"}'], "float.*row 1.*Int64"),
    "truth as id": (['{"item_id": true, "text": "x"}'], "changes its type.*row 1"),
    "ids of two types": (['{"item_id": 1, "text": "x"}', '{"item_id": "b", "text": "y"}'], "changes its type.*row 2"),
    "words in vectors": (['{"item_id": "a", "features": [1, "x"]}'], "no list of numbers.*row 1"),
    "a vector of a number": (['{"item_id": "a", "features": [1]}', '{"item_id": "b", "features": 7}'], "row 2"),
    "cut line": (['{"item_id": "a", "text": "x"}', '{"item_id": "b", "te'], "malformed JSON: row 2"),
    "two on a line": (['{"item_id": "a", "text": "x"} {"item_id": "b", "text": "y"}'], "malformed JSON: row 1"),
    "a list": (['[{"item_id": "a", "text": "x"}]'], r"row 1 \(not an object\)"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_named(name: str, tmp_path: Path) -> None:
    lines, expected = BAD_JSON[name]
    with pytest.raises(DataError, match=expected):
        load_catalogue(jsonl(tmp_path, *lines))


# Parquet and Arrow


IDS: dict[str, Callable[[], Any]] = {
    "string view": lambda: pa.array(["a", "b", "c"], pa.string_view()),
    "large": lambda: pa.array(["a", "b", "c"], pa.large_string()),
    "unsigned dictionary": lambda: (
        pa.array(["a", "b", "c"]).dictionary_encode().cast(pa.dictionary(pa.uint32(), pa.string()))
    ),
    "dictionary of views": lambda: pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 2], pa.uint8()), pa.array(["a", "b", "c"], pa.large_string())
    ),
    "runs": lambda: pa.RunEndEncodedArray.from_arrays([1, 2, 3], pa.array(["a", "b", "c"])),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("in_file", [False, True])
def test_strings_of_every_kind(name: str, in_file: bool, tmp_path: Path) -> None:
    if in_file and name == "runs":
        pytest.skip("Parquet has none")
    column = IDS[name]()
    items = pa.table({"item_id": column, "text": column})
    events = pa.table({"user_id": column, "item_id": column, "timestamp": [1, 2, 3]})
    catalogue = load_catalogue(parquet(tmp_path, items) if in_file else items)
    assert catalogue.item_ids.tolist() == ["a", "b", "c"] and catalogue.text(2) == "c"
    sequences = load_interactions(parquet(tmp_path, events, "i.parquet") if in_file else events, catalogue)
    assert sequences.user_ids.tolist() == ["a", "b", "c"] and sequences.items.tolist() == [0, 1, 2]


def nested(depth: int) -> pa.Array:
    array = pa.array([1, 2, 3])
    for _ in range(depth):
        array = pa.StructArray.from_arrays([array], ["x"])
    return array


UNUSED: dict[str, Callable[[], Any]] = {
    "map": lambda: pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
    "uuid": lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 3, pa.binary(16))),
    "map in a struct": lambda: pa.array([{"m": [("k", 1)]}] * 3, pa.struct([("m", pa.map_(pa.string(), pa.int64()))])),
    "deep": lambda: nested(90),
    "decimal": lambda: pa.array([1, 2, 3], pa.int64()).cast(pa.decimal128(30, 4)),
    "empty structs": lambda: pa.array([{}, {}, {}], pa.struct([])),
    "time": lambda: pa.array([1, 2, 3], pa.time64("us")),
    "nulls": lambda: pa.nulls(3),
}


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize("in_file", [False, True])
def test_columns_that_nobody_reads_do_no_harm(name: str, in_file: bool, tmp_path: Path) -> None:
    if in_file and name == "empty structs":
        pytest.skip("Parquet has none")
    items, events = (pa.table({**columns, "extra": UNUSED[name]()}) for columns in (ITEMS, EVENTS))
    catalogue = load_catalogue(parquet(tmp_path, items) if in_file else items)
    assert len(catalogue) == 3 and catalogue.text(1) == "green"
    loaded = load_interactions(parquet(tmp_path, events, "i.parquet") if in_file else events, catalogue)
    assert loaded.items.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "note", [b"{", b"[]", b'{"info": 5}', b'{"info": {"features": {"text": {"_type": "Nope"}}}}', b"\xff"]
)
def test_notes_of_datasets_that_are_damaged(note: bytes, tmp_path: Path) -> None:
    assert (
        load_catalogue(parquet(tmp_path, pa.table(ITEMS).replace_schema_metadata({"huggingface": note}))).text(0)
        == "red"
    )


def test_notes_of_datasets_that_are_sound_are_kept(tmp_path: Path) -> None:
    features = datasets.Features(
        item_id=datasets.Value("string"), text=datasets.Value("string"), kind=datasets.ClassLabel(names=["x", "y"])
    )
    datasets.Dataset.from_dict({**ITEMS, "kind": [0, 1, 0]}, features=features).to_parquet(tmp_path / "items.parquet")
    assert load_catalogue(tmp_path).items.features["kind"].names == ["x", "y"]


def replaced(path: Path, content: bytes, keeps: str) -> None:
    """Write a file anew with the same time of modification, in one of the ways that programs do."""
    before = path.stat()
    if keeps == "inode":
        path.write_bytes(content)
    else:
        path.with_suffix(".new").write_bytes(content)
        os.replace(path.with_suffix(".new"), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keeps", ["inode", "name"])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_that_was_replaced_is_read_again(keeps: str, same_size: bool, tmp_path: Path) -> None:
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    path = parquet(tmp_path, ITEMS, **plain)
    assert load_catalogue(path).text(1) == "green"
    other = parquet(tmp_path, {**ITEMS, "text": ["red", "brown" if same_size else "dark brown", "blue"]}, "o", **plain)
    assert (other.stat().st_size == path.stat().st_size) == same_size
    replaced(path, other.read_bytes(), keeps)
    assert load_catalogue(path).text(1) in ("brown", "dark brown")


def test_an_unchanged_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, ITEMS)
    first = load_catalogue(path).items.cache_files
    monkeypatch.setattr(parquet_tables, "_convert", lambda *args: pytest.fail("converted again"))
    assert load_catalogue(path).items.cache_files == first


def test_a_damaged_copy_in_the_cache_is_made_again(tmp_path: Path) -> None:
    path = parquet(tmp_path, ITEMS)
    cached = Path(load_catalogue(path).items.cache_files[0]["filename"])
    cached.write_bytes(cached.read_bytes()[:100])
    assert load_catalogue(path).text(2) == "blue"


@pytest.mark.parametrize(
    "name", ["my::shop", "a$HOME", "line\nbreak", "q'uo\"te", "*[x]?", "%20 #1", b"caf\xe9", "~", "-"]
)
def test_folders_of_any_name(name: str | bytes, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name))))
    folder.mkdir()
    for suffix in ("parquet", "csv", "jsonl"):
        for table, columns in (("items", ITEMS), ("interactions", EVENTS)):
            file = folder / f"{table}.{suffix}"
            frame = pd.DataFrame(columns)
            with open(file, "wb") as stream:
                if suffix == "parquet":
                    frame.to_parquet(stream)
                elif suffix == "csv":
                    frame.to_csv(stream, index=False)
                else:
                    frame.to_json(stream, orient="records", lines=True)
        catalogue, sequences = load_domain(folder)
        assert (len(catalogue), len(sequences)) == (3, 2) and catalogue.source.encode("utf-8").decode().isprintable()
        (folder / f"interactions.{suffix}").write_bytes(b"")
        with pytest.raises(DataError, match="is empty") as caught:
            load_domain(folder)
        assert "\n" not in str(caught.value)
        for table in ("items", "interactions"):
            (folder / f"{table}.{suffix}").unlink()


def lying(path: Path, old: int, new: int) -> Path:
    """A Parquet file whose footer counts other rows: the numbers are variable-length integers there."""
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - footer

    def varint(value: int) -> bytes:
        value *= 2
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    head, tail = bytes(content[:start]), bytes(content[start:-8])
    tail = tail.replace(varint(old), varint(new))
    path.write_bytes(head + tail + len(tail).to_bytes(4, "little") + b"PAR1")
    return path


@pytest.mark.parametrize("rows", [40_000, 10**9, 10**13])
@pytest.mark.parametrize("table", ["items", "interactions"])
def test_footers_that_lie_are_not_believed(rows: int, table: str, tmp_path: Path) -> None:
    size = 30_011
    ids = [f"i{row}" for row in range(size)]
    columns = (
        {"item_id": ids, "text": ids}
        if table == "items"
        else {"user_id": ids, "item_id": ids, "timestamp": [1] * size}
    )
    path = lying(parquet(tmp_path, columns, f"{table}.parquet", write_statistics=False), size, rows)
    with pytest.raises(DataError, match=rf"{table}\.parquet"):
        load_catalogue(path) if table == "items" else load_interactions(path, SHOP)


def test_many_rows_in_few_bytes_are_no_lie(tmp_path: Path) -> None:
    size = 200_000
    path = parquet(tmp_path, {"user_id": ["u"] * size, "item_id": ["a"] * size, "timestamp": [1] * size}, "i.parquet")
    assert path.stat().st_size < size
    assert load_interactions(path, SHOP).lengths.tolist() == [size]


# In memory

FRAMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pandas": pd.DataFrame,
    "pandas with an index": lambda columns: pd.DataFrame(columns, index=[7, 8, 9]),
    "pandas of objects": lambda columns: pd.DataFrame(columns).astype(object),
    "pandas of categories": lambda columns: pd.DataFrame(columns).astype({"item_id": "category"}),
    "arrow": pa.table,
    "columns": dict,
    "arrays": lambda columns: {name: np.array(values) for name, values in columns.items()},
    "rows": lambda columns: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    "dataset": datasets.Dataset.from_dict,
    "dictionary of splits": lambda columns: {"all": datasets.Dataset.from_dict(columns)},
}


@pytest.mark.parametrize("name", FRAMES)
def test_tables_in_memory(name: str) -> None:
    catalogue = load_catalogue(FRAMES[name](ITEMS))
    sequences = load_interactions(FRAMES[name](EVENTS), catalogue)
    assert catalogue.content_hash() == SHOP.content_hash() and sequences.items.tolist() == [2, 0, 1]
    assert Catalogue(catalogue.items).text(0) == "red"


def test_rows_need_not_have_all_keys() -> None:
    rows = [{"item_id": "a"}, {"item_id": "b", "text": "blue"}, {"item_id": "c", "features": [1.0]}]
    with pytest.raises(DataError, match=r"no content: row 1 \(item_id 'a'\)"):
        load_catalogue(rows)
    assert load_catalogue(rows[1:]).read(1)["features"].tolist() == [1.0]


def test_missing_cells_of_frames() -> None:
    frame = pd.DataFrame(
        {"item_id": ["a", "b"], "text": ["x", float("nan")], "image": [None, None], "price": [1, "two"]}
    )
    with pytest.raises(DataError, match=r"no content: row 2 \(item_id 'b'\)"):
        load_catalogue(frame)


@pytest.mark.parametrize("source", [5, None, b"x", object(), [1], {}, [], np.zeros(3), {"item_id": 5}, pd.Series([1])])
def test_what_is_no_table(source: Any) -> None:
    with pytest.raises(DataError, match=r"cannot (read a|be read)|columns of different|there is nothing in it"):
        load_catalogue(source)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "a/b/c", "https://example.org/items.csv", "no-such-folder"])
def test_places_that_are_not_there(path: str) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        load_catalogue(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("quote", ["", '"'])
def test_two_columns_of_one_name(quote: str, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(f"item_id,text,x,x\na,{quote}b{quote},1,2\n")
    frame = pd.DataFrame([["a", "b", 1, 2]], columns=["item_id", "text", "x", "x"])
    for source in (tmp_path, frame, pa.table([["a"], ["b"], [1], [2]], ["item_id", "text", "x", "x"])):
        with pytest.raises(DataError, match="column 'x' occurs twice"):
            load_catalogue(source)


@pytest.mark.parametrize("odd", [["a", "b"], "some", 3, object()])
def test_a_cell_of_another_type_is_named(odd: Any) -> None:
    rows = [{"item_id": f"i{row}", "features": [0.5, 1.0]} for row in range(4)]
    rows[2]["features"] = odd
    with pytest.raises(DataError, match=r"^items: column 'features' .*row 3: item_id 'i2': .*Write a list of numbers"):
        load_catalogue(rows)


def test_columns_of_different_lengths_and_types() -> None:
    with pytest.raises(DataError, match="different lengths"):
        load_catalogue({"item_id": ["a"], "text": ["x", "y"]})
    with pytest.raises(DataError, match=r"column 'item_id' is not of one type.*ids as strings"):
        load_catalogue({"item_id": ["a", 1], "text": ["x", "y"]})


# Splits


def of_splits(**rows: list[int]) -> datasets.DatasetDict:
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(EVENTS).select(some) for name, some in rows.items()})


def test_several_splits_are_not_dropped() -> None:
    splits = of_splits(train=[0, 1], test=[2])
    with pytest.raises(DataError, match=r"has several splits, \['train', 'test'\].*split='train\+test'"):
        load_interactions(splits, SHOP)
    assert load_interactions(splits, SHOP, split="train").items.tolist() == [0, 1]
    assert load_interactions(splits, SHOP, split="train+test").items.tolist() == [2, 0, 1]
    with pytest.raises(DataError, match="no split 'dev'"):
        load_interactions(splits, SHOP, split="train+dev")
    assert load_interactions(of_splits(whatever=[0]), SHOP).items.tolist() == [0]
    with pytest.raises(DataError, match="no split 'test'"):
        load_interactions(of_splits(train=[0]), SHOP, split="test")


# Names of columns

MAPS = pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64()))


@pytest.mark.parametrize(
    ("column", "wanted"),
    [("Image", "image"), ("image_path", "image"), ("IMG", "image"), ("photo", "image"), ("imgae", "image")]
    + [("product_image", "image"), ("coverImage", "image"), ("Poster", "image"), ("thumbnail_url", "image")]
    + [("embedding", "features"), ("Features", "features"), ("feature_vector", "features"), ("clip_emb", "features")],
)
def test_near_misses_beside_other_contents_are_warned_of(column, wanted, warnings) -> None:
    load_catalogue({**ITEMS, column: ["x", "y", "z"]})
    assert f"rename {column!r} to {wanted!r}" in warnings.text and warnings.text.count("rename") == 1


def test_images_under_whatever_name_are_warned_of(warnings) -> None:
    load_catalogue({**ITEMS, "front": [{"bytes": b"x", "path": None}, None, None]})
    assert "rename 'front' to 'image'" in warnings.text


@pytest.mark.parametrize("column", ["Title", "texts", "description", "name", "product_title", "titleEn"])
def test_texts_under_another_name_are_warned_of(column, warnings) -> None:
    load_catalogue({"item_id": ["a"], "features": [[1.0]], column: ["x"]})
    assert f"rename {column!r} to 'text'" in warnings.text


def test_columns_that_mean_something_else_are_not(warnings) -> None:
    load_catalogue({**ITEMS, "price": [1, 2, 3], "category": list("xyz"), "brand": list("xyz"), "year": [1, 2, 3]})
    load_catalogue({**ITEMS, "title": list("xyz"), "description": list("xyz")})  # beside text
    load_catalogue({**ITEMS, "image_count": [1, 2, 3], "cover_type": list("xyz"), "poster_id": list("xyz")})
    assert not warnings.text


@pytest.mark.parametrize("form", [dict, pd.DataFrame, lambda columns: pa.table({**columns, "arrow": MAPS})])
def test_further_columns_that_cannot_be_kept_are_told(form, warnings) -> None:
    odd = {dict: "dict", pd.DataFrame: "frame"}.get(form, "arrow")  # a warning is given once
    catalogue = load_catalogue(form({**ITEMS, "price": [1, 2, 3], odd: [1, "x", [2]]}))
    assert set(catalogue.items.column_names) == {*ITEMS, "price"}
    assert warnings.text.count(f"the further column {odd!r} is left out") == 1


def test_further_columns_of_a_file_are_told_once(tmp_path, warnings) -> None:
    pq.write_table(pa.table({**ITEMS, "odd": MAPS}), tmp_path / "items.parquet", row_group_size=1)
    load_catalogue(tmp_path / "items.parquet")
    assert warnings.text.count("the further column 'odd' is left out (of the type map<") == 1


def test_long_lists_of_columns_are_cut() -> None:
    with pytest.raises(DataError) as caught:
        load_catalogue({f"column {'x' * 500} {place}": ["x"] for place in range(300)})
    assert len(str(caught.value)) < 2000 and "280 more" in str(caught.value)


# Ids


WORDS = ["nan", "NaN", "None", "NULL", "null", r"\N", "<NA>", "NA", "N/A", "#N/A", " nan "]
WORDS += ["NAN", "none", "Null", "n/a", "#N/A N/A", "-nan", "-1.#IND", "(null)", "NaT", "undefined"]
WORDS += ["\u200bnan", "\ufeffNULL\u00a0", "None\n"]
BLANKS = ["", " ", "\t\n", "\u00a0", "\u200b", "\ufeff", "\u2060\u200d", "\u3164", "\u2800", "\u00ad", "\x00"]


@pytest.mark.parametrize("word", WORDS)
def test_words_for_missing_values_are_no_ids_and_no_titles(word: str) -> None:
    with pytest.raises(DataError, match=r"user_id that is a missing value written as a word: row 2 .*each visit"):
        load_interactions({**EVENTS, "user_id": ["u", word, "v"]}, SHOP)
    with pytest.raises(DataError, match="item_id that is a missing value written as a word: row 3"):
        load_catalogue({**ITEMS, "item_id": ["a", "b", word]})
    with pytest.raises(DataError, match=r"unusable text: row 1 \(item_id 'a': text .*written as a word"):
        load_catalogue({**ITEMS, "text": [word, "x", "y"]})


@pytest.mark.parametrize("blank", BLANKS)
def test_what_nobody_can_see_is_missing(blank: str) -> None:
    with pytest.raises(DataError, match=r"empty user_id: row 2\."):
        load_interactions({**EVENTS, "user_id": ["u", blank, "v"]}, SHOP)
    with pytest.raises(DataError, match=r"empty item_id: row 3\."):
        load_catalogue({**ITEMS, "item_id": ["a", "b", blank]})
    with pytest.raises(DataError, match="no content: row 1"):
        load_catalogue({**ITEMS, "text": [blank, "x", "y"]})


@pytest.mark.parametrize(
    "text",
    ["Nancy", "Nullsechs", "nan bread", "None of the above", "\u84dd", "\U0001f600", "é"]
    + [".", "na", "Na", "inf", "-", "?"],
)
def test_other_words_are_titles_and_ids(text: str) -> None:
    catalogue = load_catalogue({**ITEMS, "text": [text, "x", "y"], "item_id": ["a", text, "c"]})
    assert catalogue.text(0) == text
    assert load_interactions({"user_id": [text], "item_id": [text], "timestamp": [1]}, catalogue).user_ids[0] == text


@pytest.mark.parametrize("form", ["memory", "csv", "parquet"])
@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_ids_that_became_floats(form: str, column: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({**EVENTS, column: [8881.0, 8882.0, 8881.0]})
    source: Any = frame
    if form != "memory":
        source = tmp_path / f"interactions.{form}"
        frame.to_csv(source, index=False) if form == "csv" else frame.to_parquet(source)
    with pytest.raises(DataError, match=rf"'{column}' holds .*\.astype\('Int64'\)") as caught:
        load_interactions(source, SHOP)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "mend"),
    [
        (["7.0", "a"], "Int64"),
        ([" 7", "a"], "blanks around"),
        (["007", "a"], "leading zeros"),
        (["8", "a"], "delete the rows"),
    ],
)
def test_unknown_ids_that_are_nearly_known(ids: list[str], mend: str) -> None:
    shop = Catalogue(datasets.Dataset.from_dict({"item_id": ["7", "a"], "text": ["x", "y"]}), "shop")
    with pytest.raises(DataError, match=f"unknown item_id: row 1 .*{mend}"):
        load_interactions({"user_id": ["u", "u"], "item_id": ids, "timestamp": [1, 2]}, shop)


def test_messages_are_short_whatever_the_cells_are(tmp_path: Path) -> None:
    long = "z" * 900_000
    for run in (
        lambda: load_interactions({**EVENTS, "item_id": [long] * 3}, SHOP),
        lambda: load_interactions({**EVENTS, "timestamp": [long] * 3}, SHOP),
        lambda: load_catalogue({**ITEMS, "item_id": [long] * 3}),
        lambda: load_catalogue({**ITEMS, "text": [None] * 3, "item_id": [long, "b", "c"]}),
        lambda: load_catalogue({**ITEMS, "image": [long, "b", "c"]}),
        lambda: load_catalogue({long: ["x"]}),
        lambda: SHOP.rows([long]),
        lambda: load_catalogue(jsonl(tmp_path, {"item_id": "a", "text": [long]})),
        lambda: load_catalogue(jsonl(tmp_path, '{"item_id": "' + long)),
    ):
        with pytest.raises(DataError) as caught:
            run()
        assert len(str(caught.value)) < 2000


def test_messages_have_no_line_breaks_of_the_data() -> None:
    with pytest.raises(DataError) as caught:
        load_interactions({**EVENTS, "item_id": ["x\ny\x1b[31m"] * 3}, SHOP)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_defects_of_both_tables_are_told_at_once(tmp_path: Path) -> None:
    jsonl(tmp_path, {"item_id": "a", "text": ""}, {"item_id": "", "text": "x"})
    jsonl(tmp_path, {"user_id": "nan", "item_id": "a", "timestamp": "soon"}, name="interactions.jsonl")
    with pytest.raises(DataError) as caught:
        load_domain(tmp_path)
    assert len(str(caught.value).splitlines()) == 4


def test_interactions_without_a_catalogue_that_can_be_read_are_checked_too(tmp_path: Path) -> None:
    jsonl(tmp_path, {"item_id": "a", "text": "x"})
    (tmp_path / "interactions.csv").write_text("user;item\n1;2\n")
    with pytest.raises(DataError, match=r"missing column user_id, item_id, timestamp; found \['user', 'item'\]"):
        load_domain(tmp_path)
