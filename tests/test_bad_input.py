"""Every kind of bad input gets a `DataError` that names the file, the row or the id, and the mend."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transrec_hf.data.catalogue import Catalogue, load_catalogue
from transrec_hf.data.interactions import (
    Sequences,
    k_core,
    leave_one_out,
    load_domain,
    load_interactions,
    temporal_split,
)
from transrec_hf.data.statistics import load_statistics
from transrec_hf.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(size: tuple[int, int] = (8, 8), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


ITEMS = {"item_id": ["a", "b", "c"], "text": ["red", "green", "blue"]}
INTERACTIONS = {"user_id": ["u"] * 3 + ["v"] * 3, "item_id": list("abcabc"), "timestamp": [1, 2, 3, 1, 2, 3]}


def parquet(folder: Path, table: str, columns: dict[str, Any] | pa.Table) -> Path:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), folder / f"{table}.parquet")
    return folder


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def items_with(**columns: Any) -> Callable[[Path], Any]:
    """A case: a catalogue in Parquet with some columns changed (`None` takes one away)."""
    table = {name: column for name, column in {**ITEMS, **columns}.items() if column is not None}
    return lambda folder: load_catalogue(parquet(folder, "items", table))


def interactions_with(**columns: Any) -> Callable[[Path], Any]:
    table = {name: column for name, column in {**INTERACTIONS, **columns}.items() if column is not None}

    def run(folder: Path) -> Any:
        return load_domain(parquet(parquet(folder, "items", ITEMS), "interactions", table))

    return run


def items_file(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: load_catalogue(written(folder, name, content))


def interactions_file(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: load_interactions(written(folder, name, content), catalogue())


def image_item(content: bytes | None, path: str | None = None, full: bool = False) -> Callable[[Path], Any]:
    """A case: the second of two images is bad."""
    images = [{"bytes": png(), "path": None}, {"bytes": content, "path": path}]

    def run(folder: Path) -> Any:
        items = load_catalogue(parquet(folder, "items", {"item_id": ["a", "b"], "image": images}))
        assert full, "only a full decode should find it"
        items.check_contents()

    return run


def image_path(path: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        written(folder, "secret.png", png())
        written(folder, "shop/images/a.png", png())
        return load_catalogue(written(folder, "shop/items.csv", f"item_id,image\na,images/a.png\nb,{path}\n"))

    return run


def catalogue(**columns: Any) -> Catalogue:
    return Catalogue(datasets.Dataset.from_dict({**ITEMS, **columns}), "shop")


def image_catalogue() -> Catalogue:
    images = [{"bytes": png(seed=seed), "path": None} for seed in range(3)]
    items = datasets.Dataset.from_dict({"item_id": ["a", "b", "c"], "text": ["red", None, ""], "image": images})
    return Catalogue(items, "shop")


def sequences(*lengths: int) -> Sequences:
    ends = np.cumsum(lengths)
    items = np.arange(ends[-1]) % 3
    users = np.array([f"u{index}" for index in range(len(lengths))], dtype=object)
    return Sequences(items.astype(np.int32), np.arange(ends[-1]), ends - lengths, ends, users)


def latin1_parquet(folder: Path) -> Any:
    texts = pa.array([b"red", b"caf\xe9", b"blue"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    return load_catalogue(parquet(folder, "items", pa.table({"item_id": ["a", "b", "c"], "text": texts})))


def damaged_pages(folder: Path) -> Any:
    rows = np.random.default_rng(0).integers(0, 1 << 40, 5000).astype(str)
    path = parquet(folder, "items", {"item_id": rows, "text": rows}) / "items.parquet"
    content = bytearray(path.read_bytes())
    content[100:-2000] = bytes(len(content) - 2100)
    path.write_bytes(content)
    return load_catalogue(folder)


def both_formats(folder: Path) -> Any:
    written(folder, "items.csv", "item_id,text\na,red\n")
    return load_catalogue(parquet(folder, "items", ITEMS))


def in_memory(**columns: Any) -> Callable[[Path], Any]:
    return lambda folder: load_interactions(datasets.Dataset.from_dict({**INTERACTIONS, **columns}), catalogue())


HEADER = "user_id,item_id,timestamp\n"
LINE = '{"item_id": "a", "text": "red"}\n'

CASES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    # ids
    "unknown item": (
        interactions_with(item_id=["a", "b", "zzz", "a", "b", "c"]),
        ("interactions.parquet", "unknown item_id", "row 3", "'zzz'", "Add these items to", "items.parquet"),
    ),
    "more than five unknown items": (
        interactions_with(item_id=list("uvwxyz")),
        (
            "row 1 (item_id 'u')",
            "row 5 (item_id 'y') and 1 more",
        ),
    ),
    "duplicate item": (
        items_with(item_id=["a", "b", "a"]),
        ("items.parquet", "duplicate item_id: row 1 ('a'), row 3"),
    ),
    "duplicate item after conversion": (
        items_file("items.jsonl", '{"item_id": 7, "text": "x"}\n{"item_id": 7, "text": "y"}\n'),
        ("duplicate item_id", "row 2 ('7')"),
    ),
    "null item id": (items_with(item_id=["a", None, "c"]), ("empty item_id: row 2", "Give these rows an id")),
    "empty item id": (items_file("items.csv", "item_id,text\na,red\n,blue\n"), ("items.csv", "empty item_id: row 2")),
    "only null item ids": (items_with(item_id=[None] * 3), ("empty item_id: row 1",)),
    "null item id in interactions": (interactions_with(item_id=["a", "b", None, "a", "b", "c"]), ("row 3",)),
    "null user id": (interactions_with(user_id=["u", None] + ["v"] * 4), ("empty user_id: row 2",)),
    "float item ids": (items_with(item_id=[1.0, 2.0, 3.5]), ("'item_id' holds double", "strings or integers")),
    "item ids of two types": (
        items_file("items.jsonl", '{"item_id": 1, "text": "x"}\n{"item_id": "b", "text": "y"}\n'),
        ("items.jsonl", "changes its type", "one type"),
    ),
    # modalities
    "item without any modality": (
        items_with(text=["red", None, "blue"]),
        ("items.parquet", "no content: row 2 (item_id 'b')", "Give them text, image, features"),
    ),
    "blank text and no image": (items_with(text=["red", "  \n", ""]), ("row 2 (item_id 'b'), row 3 (item_id 'c')",)),
    "all content null": (items_with(text=[None] * 3), ("no content: row 1",)),
    "text of numbers": (items_with(text=[1, 2, 3]), ("column 'text' holds int64", "Write it as text")),
    "text of NaN": (items_with(text=[float("nan")] * 3), ("no content: row 1",)),
    "text with NaN and numbers": (items_with(text=[float("nan"), 1.0, 2.0]), ("column 'text' holds double",)),
    "text 'nan'": (items_file("items.csv", "item_id,text\na,red\nb,nan\n"), ("text 'nan'", "row 2", "empty")),
    "text in Latin-1 (CSV)": (
        items_file("items.csv", "item_id,text\na,red\nb,café\n".encode("latin-1")),
        ("items.csv", "line 3 of the file is not UTF-8 (byte 0xe9)", "iconv"),
    ),
    "text in Latin-1 (JSONL)": (
        items_file("items.jsonl", (LINE + '{"item_id": "b", "text": "café"}\n').encode("latin-1")),
        ("items.jsonl", "line 2 of the file is not UTF-8", "iconv"),
    ),
    "text in UTF-16": (items_file("items.csv", "item_id,text\na,red\n".encode("utf-16")), ("line 1", "not UTF-8")),
    "text in Latin-1 (Parquet)": (latin1_parquet, ("unusable text: row 2", "not UTF-8")),
    "text column of lists": (items_with(text=[["red"], ["green"], []]), ("column 'text' holds list",)),
    "image column of numbers": (items_with(image=[1, 2, 3]), ("column 'image' holds int64", "bytes or file paths")),
    "text tower on an image-only catalogue": (
        lambda folder: image_catalogue().select([1, 2]).require(["text"]),
        ("shop", "no item has text", "Use a model or policy for the modalities"),
    ),
    "text tower, some items have only an image": (
        lambda folder: image_catalogue().require(["text"]),
        ("2 of 3 items have no text: row 2 (item_id 'b'), row 3", "keep_items"),
    ),
    "policy text, some items have only an image": (
        lambda folder: image_catalogue().with_policy("text"),
        ("2 of 3 items have no text: row 2 (item_id 'b')",),
    ),
    "policy image on a text-only catalogue": (
        lambda folder: catalogue().with_policy("image"),
        ("shop", "no item has image"),
    ),
    "unknown policy": (
        lambda folder: load_catalogue(parquet(folder, "items", ITEMS), modality_policy="txt"),
        ("modality_policy 'txt'", "one_per_item"),
    ),
    # images
    "non-image bytes": (image_item(b"no image"), ("items.parquet", "row 2 (item_id 'b': not an image", "PNG")),
    "empty image bytes": (image_item(b""), ("row 2 (item_id 'b'",)),
    "truncated image": (image_item(png((64, 64))[:2000], full=True), ("row 2 (item_id 'b': truncated or damaged",)),
    "image header cut": (image_item(png()[:20]), ("row 2 (item_id 'b'",)),
    "decompression bomb": (image_item(bomb(60_000, 60_000)), ("row 2 (item_id 'b': more than 64000000 pixels",)),
    "large image": (image_item(bomb(8_001, 8_000)), ("row 2 (item_id 'b': 8001 x 8000 pixels, more than 64000000",)),
    "page description as image": (image_item(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("not an image",)),
    "missing image file": (image_path("images/b.png"), ("row 2 (item_id 'b': image file not found", "images/b.png")),
    "image path leaves the folder": (image_path("../secret.png"), ("items.csv", "row 2", "leaves the folder")),
    "absolute image path": (image_path("/etc/passwd"), ("row 2", "leaves the folder", "/etc/passwd")),
    "path in Parquet leaves the folder": (image_item(None, "../../etc/passwd"), ("row 2", "leaves the folder")),
    "image path is a folder": (image_path("images"), ("row 2", "image file not found")),
    # time
    "fractional timestamp": (
        interactions_with(timestamp=[1.0, 1.5, 3.0, 1.0, 2.0, 3.0]),
        ("interactions.parquet", "not an integer", "row 2 (1.5)", "seconds since 1970"),
    ),
    "one word among timestamps": (
        interactions_file("interactions.csv", HEADER + "u,a,1\nu,b,yesterday\nu,c,3\n"),
        (
            "not an integer",
            "row 2 (yesterday). Write",
        ),
    ),
    "NaN timestamp": (interactions_with(timestamp=[1, float("nan"), 3, 1, 2, 3]), ("missing timestamp: row 2",)),
    "infinite timestamp": (in_memory(timestamp=[1, float("inf"), 3, 1, 2, 3]), ("row 2 (inf)",)),
    "null timestamp": (interactions_with(timestamp=[1, None, 3, 1, 2, 3]), ("missing timestamp: row 2",)),
    "empty timestamp cell": (
        interactions_file("interactions.csv", HEADER + "u,a,1\nu,b,\n"),
        ("missing timestamp: row 2",),
    ),
    "boolean timestamp": (interactions_with(timestamp=[True] * 6), ("column of bool",)),
    # tables
    "empty catalogue": (items_with(item_id=pa.array([], pa.string()), text=pa.array([], pa.string())), ("is empty",)),
    "empty catalogue (CSV)": (items_file("items.csv", "item_id,text\n"), ("items.csv", "catalogue is empty")),
    "empty interactions": (interactions_file("interactions.csv", HEADER), ("no interactions", "Add rows")),
    "empty file": (items_file("items.jsonl", ""), ("items.jsonl", "empty")),
    "file of blank lines": (items_file("items.jsonl", "\n\n"), ("items.jsonl", "empty")),
    "missing column": (items_with(item_id=None), ("items.parquet", "missing column item_id", "found ['text']")),
    "misspelt column": (
        lambda folder: load_catalogue(parquet(folder, "items", {"itemID": ["a"], "text": ["red"]})),
        ("missing column item_id", "rename 'itemID' to 'item_id'"),
    ),
    "no content column": (
        lambda folder: load_catalogue(parquet(folder, "items", {"item_id": ["a"], "texts": ["red"]})),
        ("missing column text or image", "rename 'texts' to 'text'"),
    ),
    "missing interaction columns": (
        interactions_file("interactions.csv", "user,item,time\nu,a,1\n"),
        ("missing column user_id, item_id, timestamp", "found ['user', 'item', 'time']", "'user' to 'user_id'"),
    ),
    "column twice": (
        items_file("items.csv", "item_id,text,text\na,b,c\n"),
        ("items.csv", "'text' occurs twice", "Keep one"),
    ),
    "ragged CSV row": (
        items_file("items.csv", "item_id,text\na,red\nb,green, light\nc\n"),
        ("items.csv", "row 2 (3 cells), row 3 (1 cells)", "in quotes"),
    ),
    "malformed JSONL line": (
        items_file("items.jsonl", LINE + '{"item_id": "b", "text": "gre\n' + LINE),
        ("items.jsonl", "malformed JSON: row 2", "one object on each line"),
    ),
    "JSONL line that is no object": (items_file("items.jsonl", LINE + "[1]\n"), ("row 2 (not an object)",)),
    "JSON array for JSONL": (items_file("items.jsonl", json.dumps([{"item_id": "a"}])), ("row 1 (not an object)",)),
    "unreadable Parquet": (items_file("items.parquet", "item_id,text\n"), ("items.parquet", "is not a Parquet")),
    "unreadable Parquet interactions": (interactions_file("interactions.parquet", b"PAR1"), ("interactions.parquet",)),
    "damaged Parquet pages": (damaged_pages, ("items.parquet", "cannot be read", "Write it again")),
    "file not found": (lambda folder: load_catalogue(folder / "items.csv"), ("items.csv", "no such file")),
    "unsupported extension": (items_file("items.xlsx", b"PK"), ("'.xlsx'", ".parquet, .csv, .tsv, .jsonl")),
    "folder without items": (
        lambda folder: load_domain(written(folder, "itmes.csv", "x").parent),
        ("no items file", "itmes.csv", "Add items.parquet"),
    ),
    "folder without interactions": (
        lambda folder: load_domain(parquet(folder, "items", ITEMS)),
        ("no interactions file", "items.parquet"),
    ),
    "folder with two items files": (both_formats, ("several items files", "items.parquet", "items.csv", "Keep one")),
    "unreachable Hub data set": (
        lambda folder: load_catalogue("nobody/no-such-data"),
        ("nobody/no-such-data", "neither a folder here nor a data set of the Hub", "HF_HUB_OFFLINE"),
    ),
    "several splits": (
        lambda folder: load_catalogue(
            datasets.DatasetDict({name: datasets.Dataset.from_dict(ITEMS) for name in ("a", "b")})
        ),
        ("has several splits, ['a', 'b']",),
    ),
    "streamed data set": (
        lambda folder: load_catalogue(datasets.Dataset.from_dict(ITEMS).to_iterable_dataset()),
        ("streamed", "without streaming"),
    ),
    # use
    "rows of unknown items": (lambda folder: catalogue().rows(["a", "x"]), ("shop", "1 unknown item ids: ['x']")),
    "select nothing": (lambda folder: catalogue().select([]), ("shop", "no item is left")),
    "one interaction per user": (
        lambda folder: leave_one_out(sequences(1, 1, 1)),
        ("no user has 3 interactions", "the longest history has 1", "Add interactions"),
    ),
    "core that empties the data": (
        lambda folder: k_core(catalogue(), sequences(3, 3), 4),
        ("4-core is empty", "smaller k"),
    ),
    "temporal split, nothing to train on": (
        lambda folder: temporal_split(sequences(4, 4), -5, 3),
        ("no user for training", "from 0 to 7"),
    ),
    "temporal split, empty validation": (lambda folder: temporal_split(sequences(4, 4), 2, 2), ("for validation",)),
    "temporal split, empty test": (
        lambda folder: temporal_split(sequences(4, 4), 2, 99),
        ("for test", "Move the bounds"),
    ),
    "damaged statistics": (
        lambda folder: load_statistics(written(folder, "data_statistics.json", "{")),
        ("data_statistics.json", "Compute it again"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_names_the_place_and_the_mend(name: str, tmp_path: Path) -> None:
    run, expected = CASES[name]
    with pytest.raises(DataError) as caught:
        run(tmp_path)
    message = str(caught.value)
    assert [part for part in expected if part not in message] == [], message
    assert message.rstrip().endswith((".", "csv", "jsonl")) or "Convert it" in message, message


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 30


def test_all_kinds_of_defect_are_told_at_once(tmp_path: Path) -> None:
    table = {"user_id": ["u", None], "item_id": ["x", "a"], "timestamp": [1.5, None]}
    with pytest.raises(DataError) as caught:
        interactions_with(**table)(tmp_path)
    assert len(str(caught.value).splitlines()) == 4


def test_selected_items_keep_the_row_numbers_of_their_file(tmp_path: Path) -> None:
    images = [{"bytes": content, "path": None} for content in (png(), png(), png((64, 64))[:2000])]
    items = load_catalogue(parquet(tmp_path, "items", {"item_id": ["a", "b", "c"], "image": images})).select([2, 0])
    with pytest.raises(DataError, match=r"row 3 \(item_id 'c': truncated"):
        items.image(0)
    with pytest.raises(DataError, match=r"row 3 \(item_id 'c': truncated"):
        items.check_contents()
