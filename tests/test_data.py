"""Readers, catalogue, sequences, splits and statistics."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import LocalHub

from transrec_hf.data import interactions, reading
from transrec_hf.data.catalogue import Catalogue, load_catalogue
from transrec_hf.data.interactions import (
    Sequences,
    Split,
    drop_unused,
    k_core,
    keep_items,
    leave_one_out,
    load_domain,
    load_interactions,
    temporal_split,
)
from transrec_hf.data.places import Place
from transrec_hf.data.statistics import data_statistics, load_statistics, log_popularity, save_statistics
from transrec_hf.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded(seed: int = 0, size: tuple[int, int] = (6, 4), format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


ITEM_IDS = ["07", "1", "x"]
TEXTS = ['a red, large\n"hat"', None, "blau — 蓝"]
IMAGES = [encoded(0), encoded(1), None]
EVENTS = [("u", "1", 5), ("v", "x", 1), ("u", "07", 3), ("u", "x", 5), ("v", "1", -2), ("v", "07", 9), ("u", "1", 7)]
EVENT_NAMES = ("user_id", "item_id", "timestamp")


def events_table() -> pa.Table:
    return pa.table(dict(zip(EVENT_NAMES, map(list, zip(*EVENTS, strict=True)), strict=True)))


def parquet_domain(folder: Path) -> Path:
    images = [None if image is None else {"bytes": image, "path": None} for image in IMAGES]
    pq.write_table(pa.table({"item_id": ITEM_IDS, "text": TEXTS, "image": images}), folder / "items.parquet")
    pq.write_table(events_table(), folder / "interactions.parquet")
    return folder


def write_images(folder: Path) -> list[str | None]:
    folder.mkdir()
    for index, image in enumerate(IMAGES):
        if image is not None:
            (folder / f"{index}.png").write_bytes(image)
    return [None if image is None else f"{folder.name}/{index}.png" for index, image in enumerate(IMAGES)]


def csv_domain(folder: Path) -> Path:
    items = {"item_id": ITEM_IDS, "text": TEXTS, "image": write_images(folder / "photos")}
    pa.csv.write_csv(pa.table(items), folder / "items.csv")
    pa.csv.write_csv(events_table(), folder / "interactions.csv")
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({key: value for key, value in row.items() if value is not None}) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def jsonl_domain(folder: Path, items: str = "items.jsonl", image: str = "image") -> Path:
    paths = write_images((folder / items).parent / "photos")
    rows = zip(ITEM_IDS, TEXTS, paths, strict=True)
    write_jsonl(folder / items, [{"item_id": id, "text": text, image: path} for id, text, path in rows])
    write_jsonl(folder / "interactions.jsonl", [dict(zip(EVENT_NAMES, event, strict=True)) for event in EVENTS])
    return folder


def image_folder_domain(folder: Path) -> Path:
    return jsonl_domain(folder, "metadata.jsonl", "file_name")


def image_subfolder_domain(folder: Path) -> Path:
    (folder / "items").mkdir()
    return jsonl_domain(folder, "items/metadata.jsonl", "file_name")


DOMAINS = [parquet_domain, csv_domain, jsonl_domain, image_folder_domain, image_subfolder_domain]


def make_sequences(*users: list[int], timestamps: list[int] | None = None) -> Sequences:
    lengths = np.array([len(user) for user in users])
    items = np.array([item for user in users for item in user], dtype=np.int32)
    times = np.concatenate([np.arange(length) for length in lengths]) if timestamps is None else np.array(timestamps)
    ends = np.cumsum(lengths)
    names = np.array([f"user {index}" for index in range(len(users))], dtype=object)
    return Sequences(items, times, ends - lengths, ends, names)


def as_lists(sequences: Sequences) -> list[list[int]]:
    return [example["items"].tolist() for example in sequences]


def text_catalogue(size: int) -> Catalogue:
    ids = [f"i{index}" for index in range(size)]
    return Catalogue(datasets.Dataset.from_dict({"item_id": ids, "text": ids}))


def mixed_catalogue(size: int = 12) -> Catalogue:
    """Items with both modalities, text only and image only, in turn."""
    images = [None if row % 3 == 1 else {"bytes": encoded(row), "path": None} for row in range(size)]
    texts = [None if row % 3 == 2 else f"item {row}" for row in range(size)]
    ids = [str(row) for row in range(size)]
    return Catalogue(datasets.Dataset.from_dict({"item_id": ids, "text": texts, "image": images}))


# --------------------------------------------------------------------------------------------------------------------
# Readers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_format_gives_the_same_domain(domain: Any, tmp_path: Path) -> None:
    catalogue, sequences = load_domain(domain(tmp_path))
    assert catalogue.item_ids.tolist() == ITEM_IDS
    assert [catalogue.text(row) for row in range(3)] == TEXTS
    assert catalogue.image(2) is None
    for row in (0, 1):
        expected = PIL.Image.open(io.BytesIO(IMAGES[row]))
        assert np.array_equal(catalogue.image(row), expected)
    catalogue.check_contents()
    assert sequences.user_ids.tolist() == ["u", "v"]
    assert as_lists(sequences) == [[0, 1, 2, 1], [1, 2, 0]]  # by time; equal times as in the file
    assert sequences.timestamps.tolist() == [3, 5, 5, 7, -2, 1, 9]
    assert (sequences.items.dtype, sequences.timestamps.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("domain", DOMAINS)
def test_content_hash_depends_on_content_only(domain: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = load_catalogue(parquet_domain(tmp_path / "a")).content_hash()
    catalogue = load_catalogue(domain(tmp_path / "b"))
    assert catalogue.content_hash() == expected
    assert catalogue.select([0, 2, 1]).content_hash() != expected
    assert catalogue.with_policy("one_per_item").content_hash() != expected


def test_datasets_objects(tmp_path: Path) -> None:
    images = [None if image is None else {"bytes": image, "path": None} for image in IMAGES]
    features = datasets.Features(
        item_id=datasets.Value("string"), text=datasets.Value("string"), image=datasets.Image()
    )
    items = datasets.Dataset.from_dict({"item_id": ITEM_IDS, "text": TEXTS, "image": images}, features=features)
    shuffled = datasets.DatasetDict(train=items.select([2, 0, 1]).with_format("numpy"))
    events = datasets.Dataset(events_table()).select(range(len(EVENTS)))
    catalogue = load_catalogue(shuffled)
    assert catalogue.item_ids.tolist() == [ITEM_IDS[row] for row in (2, 0, 1)]
    assert [catalogue.text(row) for row in range(3)] == [TEXTS[row] for row in (2, 0, 1)]
    assert catalogue.has_image.tolist() == [False, True, True]
    assert as_lists(load_interactions(events, catalogue)) == [[1, 2, 0, 2], [2, 0, 1]]


def test_hub_data_set(tmp_path: Path, hub: LocalHub) -> None:
    domain = parquet_domain(tmp_path)
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {table}\n  data_files: {table}.parquet\n" for table in ("items", "interactions")
    )
    files = {f"{table}.parquet": (domain / f"{table}.parquet").read_bytes() for table in ("items", "interactions")}
    hub.create("someone/shop", "datasets").commit({"README.md": (card + "---\n").encode(), **files})
    catalogue, sequences = load_domain("someone/shop", revision="main")
    assert catalogue.source == "someone/shop (items)"
    assert as_lists(sequences) == [[0, 1, 2, 1], [1, 2, 0]]
    with pytest.raises(DataError, match="no such revision"):
        load_domain("someone/shop", revision="v9")


@pytest.mark.parametrize("items", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("interactions", ["parquet", "csv", "jsonl"])
def test_integer_ids_join_with_string_ids(items: str, interactions: str, tmp_path: Path) -> None:
    def write(table: dict[str, list[Any]], path: Path) -> None:
        if path.suffix == ".parquet":
            pq.write_table(pa.table(table), path)
        elif path.suffix == ".csv":
            pa.csv.write_csv(pa.table(table), path)
        else:
            write_jsonl(path, [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])

    write({"item_id": [10, 9, 8], "text": ["a", "b", "c"]}, tmp_path / f"items.{items}")
    events = {"user_id": [3, 3, 3], "item_id": ["8", "10", "9"], "timestamp": [1, 2, 3]}
    write(events, tmp_path / f"interactions.{interactions}")
    catalogue, sequences = load_domain(tmp_path)
    assert catalogue.item_ids.tolist() == ["10", "9", "8"]
    assert catalogue.items["item_id"][:] == ["10", "9", "8"]
    assert sequences.user_ids.tolist() == ["3"]
    assert as_lists(sequences) == [[2, 0, 1]]


def test_titles_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "items.jsonl", [{"item_id": "2020-01-01", "text": "1984-06-08"}])
    catalogue = load_catalogue(tmp_path)
    assert (catalogue.item_ids[0], catalogue.text(0)) == ("2020-01-01", "1984-06-08")


def test_integer_valued_floats_are_timestamps(tmp_path: Path) -> None:
    columns = {"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "timestamp": [3.0, 1e9, -4.0]}
    sequences = load_interactions(datasets.Dataset.from_dict(columns), text_catalogue(3))
    assert sequences.timestamps.tolist() == [-4, 3, 10**9]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.uint64(), pa.int64()])
def test_integer_types_of_timestamps(kind: pa.DataType) -> None:
    table = pa.table({"user_id": ["u"] * 2, "item_id": ["i0", "i1"], "timestamp": pa.array([7, 3], kind)})
    assert load_interactions(datasets.Dataset(table), text_catalogue(2)).timestamps.tolist() == [3, 7]


def test_timestamps_keep_all_their_bits() -> None:
    columns = {"user_id": ["u"] * 2, "item_id": ["i0", "i1"], "timestamp": [2**62 + 1, 2**62]}
    sequences = load_interactions(datasets.Dataset.from_dict(columns), text_catalogue(2))
    assert sequences.timestamps.tolist() == [2**62, 2**62 + 1]


def test_repeated_rows_are_repeats() -> None:
    columns = {"user_id": ["u"] * 3, "item_id": ["i0"] * 3, "timestamp": [1] * 3}
    assert as_lists(load_interactions(datasets.Dataset.from_dict(columns), text_catalogue(1))) == [[0, 0, 0]]


def test_path_with_characters_of_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "shop [new]*"
    folder.mkdir()
    assert len(load_catalogue(parquet_domain(folder))) == 3


# --------------------------------------------------------------------------------------------------------------------
# Images and memory
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_image_formats(format: str) -> None:
    items = datasets.Dataset.from_dict({"item_id": ["a"], "image": [{"bytes": encoded(format=format), "path": None}]})
    image = Catalogue(items).image(0)
    assert (image.mode, image.size) == ("RGB", (6, 4))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_come_as_rgb(mode: str) -> None:
    file = io.BytesIO()
    PIL.Image.new(mode, (6, 4)).save(file, "TIFF" if mode == "CMYK" else "PNG")
    items = datasets.Dataset.from_dict({"item_id": ["a"], "image": [{"bytes": file.getvalue(), "path": None}]})
    assert Catalogue(items).image(0).mode == "RGB"


def test_images_come_upright() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    content = encoded(size=(6, 4), format="JPEG", exif=exif)
    items = datasets.Dataset.from_dict({"item_id": ["a"], "image": [{"bytes": content, "path": None}]})
    assert Catalogue(items).image(0).size == (4, 6)


def big_items(folder: Path, count: int, size: int) -> Path:
    """Items whose images weigh `count * size` bytes: a tiny picture and bytes after its end, which decoders skip."""
    rng, picture = np.random.default_rng(0), encoded()
    images = [{"bytes": picture + rng.bytes(size), "path": None} for _ in range(count)]
    table = pa.table({"item_id": [str(row) for row in range(count)], "image": images})
    pq.write_table(table, folder / "items.parquet", row_group_size=16, compression="none")
    return folder


@pytest.mark.skipif(not psutil.LINUX, reason="reads what Linux tells of a process")
def test_memory_does_not_grow_with_images(tmp_path: Path) -> None:
    def private_bytes() -> int:
        """Memory of this process that is not backed by a file."""
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    load_catalogue(big_items(tmp_path / "small", 32, 500_000)).check_contents()  # imports and pools are paid for here
    big_items(tmp_path / "large", 256, 500_000)
    pa.default_memory_pool().release_unused()
    allocated, before = pa.total_allocated_bytes(), private_bytes()
    catalogue = load_catalogue(tmp_path / "large", modality_policy="one_per_item")
    selected = catalogue.select(np.arange(0, len(catalogue), 2)[::-1])
    selected.check_contents()
    assert len(catalogue.content_hash()) == 64
    pa.default_memory_pool().release_unused()
    assert pa.total_allocated_bytes() - allocated < 2_000_000
    assert private_bytes() - before < 24_000_000  # the images weigh 128 MB
    cached = Path(catalogue.items.cache_files[0]["filename"])
    assert cached.is_relative_to(datasets.config.HF_DATASETS_CACHE)  # memory-mapped from there


def test_interactions_of_a_parquet_file_are_not_held(tmp_path: Path) -> None:
    size = 1_000_000
    users = np.random.default_rng(0).permutation(size)
    events = pa.table([users, pa.repeat("0", size), np.arange(size)], EVENT_NAMES)
    pq.write_table(events, tmp_path / "interactions.parquet", row_group_size=10_000)
    before = pa.total_allocated_bytes()
    found, blocks = reading.read_interactions(Place(tmp_path / "interactions.parquet", "events"))
    held = [pa.total_allocated_bytes() - before for _ in blocks]
    assert max(held) < 2_000_000  # the file weighs 10 MB
    assert (found, len(held)) == (size, 100)


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Work on interactions in blocks of `size`, and keep their columns in files."""
    monkeypatch.setattr(interactions, "BLOCK", size)
    monkeypatch.setattr(reading, "BLOCK", size)
    monkeypatch.setattr(interactions, "MAX_IN_MEMORY", 0)


def random_events(folder: Path, size: int, num_users: int, num_items: int) -> pa.Table:
    """Writes `interactions.parquet`, many of them at the same time."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(limit, size=size) for limit in (num_users, num_items, size // 10)]
    events = pa.table([columns[0], pa.array([f"i{item}" for item in columns[1].tolist()]), columns[2]], EVENT_NAMES)
    pq.write_table(events, folder / "interactions.parquet")
    return events


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
@pytest.mark.parametrize("from_file", [True, False])
def test_interactions_are_read_and_sorted_in_blocks(
    block: int, from_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, block)
    catalogue, events = text_catalogue(9), random_events(tmp_path, 300, num_users=20, num_items=9)
    sequences = load_interactions(tmp_path if from_file else datasets.Dataset(events), catalogue)
    lines: dict[str, list[tuple[int, int]]] = {}
    for user, item, time in zip(*events.to_pydict().values(), strict=True):
        lines.setdefault(str(user), []).append((time, int(item[1:])))
    lines = {user: sorted(line, key=lambda event: event[0]) for user, line in lines.items()}
    assert sequences.user_ids.tolist() == list(lines)
    assert as_lists(sequences) == [[item for _, item in line] for line in lines.values()]
    times = np.split(sequences.timestamps, sequences.starts[1:])
    assert [part.tolist() for part in times] == [[time for time, _ in line] for line in lines.values()]


def test_blocks_do_not_change_splits_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lines = [rng.integers(12, size=rng.integers(1, 9)).tolist() for _ in range(40)]
    catalogue, sequences = mixed_catalogue(), make_sequences(*lines)

    def results() -> list[Any]:
        splits = leave_one_out(sequences), leave_one_out(sequences, keep_last=4), temporal_split(sequences, 2, 4)
        windows = splits[0].train.windows(3)
        counts = [part.item_counts(12).tolist() for part in (sequences, windows, windows.select(rng.permutation(20)))]
        return [counts[:2], sum(counts[2]) > 20, *(data_statistics(catalogue, split) for split in splits)]

    whole = results()
    assert whole[0][0] == np.bincount(np.concatenate(lines), minlength=12).tolist()
    small_blocks(monkeypatch, 5)
    assert results() == whole


def test_rows_of_defects_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items: list[str | None] = [f"i{row % 4}" for row in range(60)]
    items[33], items[58], times = "gone", None, [float(row) for row in range(60)]
    times[41] = 0.5
    events = pa.table([["u"] * 60, items, times], EVENT_NAMES)
    messages = []
    for block in (1000, 8):
        small_blocks(monkeypatch, block)
        with pytest.raises(DataError) as caught:
            load_interactions(datasets.Dataset(events), text_catalogue(3))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "empty item_id: row 59" in messages[1]
    assert "row 4 (item_id 'i3'), row 8 (item_id 'i3')" in messages[1]
    assert "and 11 more" in messages[1]
    assert "row 42 (0.5)" in messages[1]


def test_memory_does_not_grow_with_interactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 2**11)
    random_events(tmp_path, 400_000, num_users=100, num_items=50)
    catalogue = text_catalogue(50)
    tracemalloc.start()
    try:
        sequences = load_interactions(tmp_path, catalogue)
        split = leave_one_out(sequences)
        data_statistics(catalogue, split)
        temporal_split(sequences, 10_000, 30_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(sequences.items) == 400_000
    assert peak < 1_000_000  # the columns weigh 4.8 MB


def test_images_of_files_are_read_on_demand(tmp_path: Path) -> None:
    catalogue = load_catalogue(image_folder_domain(tmp_path))
    assert catalogue.items[0]["image"] == {"bytes": None, "path": "photos/0.png"}


# --------------------------------------------------------------------------------------------------------------------
# Catalogue
# --------------------------------------------------------------------------------------------------------------------


def test_what_a_worker_is_sent_is_small(tmp_path: Path) -> None:
    """Spawned workers get the catalogue pickled: images by the name of their file, and only the selected texts."""
    catalogue = load_catalogue(big_items(tmp_path, 16, 100_000))
    assert len(pickle.dumps(catalogue)) < 50_000
    ids = [f"i{row}" for row in range(1000)]
    texts = Catalogue(datasets.Dataset.from_dict({"item_id": ids, "text": ["word " * 20] * 1000}))
    chosen = texts.select(np.arange(1000)[::-3])
    assert len(pickle.dumps(chosen.contents["text"])) < 50_000
    assert pickle.loads(pickle.dumps(chosen)).content_hash() == chosen.content_hash()


def test_rows_and_select() -> None:
    catalogue = mixed_catalogue()
    assert catalogue.rows(["3", "0", 3]).tolist() == [3, 0, 3]
    assert catalogue.rows("11").tolist() == [11]
    mask = np.isin(np.arange(12), [2, 5, 7])
    for chosen in (catalogue.select(mask), catalogue.select([2, 5, 7])):
        assert chosen.item_ids.tolist() == ["2", "5", "7"]
        assert chosen.rows(["7"]).tolist() == [2]
        assert [chosen.text(row) for row in range(3)] == [None, None, "item 7"]
        assert np.array_equal(chosen.image(1), catalogue.image(5))
    assert chosen.select([2, 0]).item_ids.tolist() == ["7", "2"]


@pytest.mark.parametrize("policy", ["text", "image"])
def test_policy_of_one_modality(policy: str) -> None:
    catalogue = mixed_catalogue()
    catalogue = catalogue.select(catalogue.has_text & catalogue.has_image).with_policy(policy)
    assert (catalogue.has_text == (policy == "text")).all()
    assert (catalogue.has_image == (policy == "image")).all()
    assert (catalogue.text(0) is None, catalogue.image(0) is None) == (policy == "image", policy == "text")


def test_policy_one_per_item() -> None:
    catalogue = mixed_catalogue(300)
    one, again, other = (catalogue.with_policy("one_per_item", seed) for seed in (0, 0, 1))
    assert (one.has_text ^ one.has_image).all()
    assert (one.has_text <= catalogue.has_text).all()
    assert (one.has_image <= catalogue.has_image).all()
    assert np.array_equal(one.has_text, again.has_text)
    assert not np.array_equal(one.has_text, other.has_text)
    both = catalogue.has_text & catalogue.has_image
    assert 0.3 < one.has_text[both].mean() < 0.7
    assert catalogue.has_text.sum() == 200  # the original is untouched


def test_require() -> None:
    catalogue = mixed_catalogue()
    catalogue.require(["text", "image"])
    catalogue.require([])
    text_catalogue(3).require(["text", "image"])
    with pytest.raises(DataError, match="4 of 12 items have no text"):
        catalogue.require(["text"])


# --------------------------------------------------------------------------------------------------------------------
# Sequences and splits
# --------------------------------------------------------------------------------------------------------------------

users = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=8)


@settings(deadline=None)
@given(users, st.integers(2, 7))
def test_windows_hold_every_pair_once(users: list[list[int]], length: int) -> None:
    sequences = make_sequences(*users)
    windows = sequences.windows(length)
    assert windows.items is sequences.items
    shown = [place for start, end in zip(windows.starts, windows.ends, strict=True) for place in range(start, end - 1)]
    starts, ends = sequences.starts, sequences.ends
    wanted = [place for start, end in zip(starts, ends, strict=True) for place in range(start, end - 1)]
    assert sorted(shown) == wanted  # a pair is named by the place of its first item
    assert (windows.lengths <= length).all()
    assert (windows.lengths >= 2).all()
    for end, size in zip(ends, sequences.lengths, strict=True):
        last = windows.lengths[windows.ends == end]
        assert last.tolist() == ([min(size, length)] if size > 1 else [])
    if sequences.lengths.min() > 1:
        assert np.array_equal(windows.item_counts(10), sequences.item_counts(10))


def test_windows_by_hand() -> None:
    assert as_lists(make_sequences([0, 1, 2, 3, 4, 5], [6], [7, 8]).windows(3)) == [
        [3, 4, 5],
        [1, 2, 3],
        [0, 1],
        [7, 8],
    ]
    with pytest.raises(ValueError, match="at least 2"):
        make_sequences([0]).windows(1)


@settings(deadline=None)
@given(users, st.integers(3, 6), st.none() | st.integers(3, 8))
def test_leave_one_out(users: list[list[int]], min_interactions: int, keep_last: int | None) -> None:
    sequences = make_sequences(*users)
    lines = [user if keep_last is None else user[-keep_last:] for user in users if len(user) >= min_interactions]
    if not lines:
        with pytest.raises(DataError, match="no user has"):
            leave_one_out(sequences, min_interactions, keep_last)
        return
    split = leave_one_out(sequences, min_interactions, keep_last)
    assert as_lists(split.train) == [line[:-2] for line in lines]
    assert as_lists(split.validation) == [line[:-1] for line in lines]
    assert as_lists(split.test) == lines
    assert split.users_left_out == len(users) - len(lines)
    assert split.test.items is sequences.items
    counts = np.bincount([item for line in lines for item in line[:-2]], minlength=10)
    assert np.array_equal(split.train.item_counts(10), counts)


@pytest.mark.parametrize("options", [{"min_interactions": 2}, {"keep_last": 2}])
def test_leave_one_out_needs_three(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        leave_one_out(make_sequences([0, 1, 2]), **options)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9).map(sorted), min_size=1, max_size=6), st.data())
def test_temporal_split_never_looks_ahead(times: list[list[int]], draw: st.DataObject) -> None:
    validation_from, test_from = draw.draw(st.integers(1, 9)), draw.draw(st.integers(1, 9))
    flat = [time for user in times for time in user]
    sequences = make_sequences(*([0] * len(user) for user in times), timestamps=flat)

    def first_of(user: list[int], start: int, stop: int) -> list[int] | None:
        """The times a user's view must show: everything before the first event of the period, and that event."""
        history, period = [time for time in user if time < start], [time for time in user if start <= time < stop]
        return history + period[:1] if history and period else None

    expected = [
        [early for user in times if (early := [time for time in user if time < validation_from])],
        [view for user in times if (view := first_of(user, validation_from, test_from))],
        [view for user in times if (view := first_of(user, test_from, 10))],
    ]
    if not all(expected):
        with pytest.raises(DataError, match="Move the bounds"):
            temporal_split(sequences, validation_from, test_from)
        return
    split = temporal_split(sequences, validation_from, test_from)
    for part, views in zip((split.train, split.validation, split.test), expected, strict=True):
        shown = [part.timestamps[start:end].tolist() for start, end in zip(part.starts, part.ends, strict=True)]
        assert shown == views


@settings(deadline=None)
@given(users, st.integers(1, 4))
def test_k_core(users: list[list[int]], k: int) -> None:
    lines = {f"user {index}": user for index, user in enumerate(users)}
    while True:
        counts = np.bincount([item for user in lines.values() for item in user], minlength=10)
        kept = {name: [item for item in user if counts[item] >= k] for name, user in lines.items() if len(user) >= k}
        if kept == lines:
            break
        lines = kept
    lines = {name: user for name, user in lines.items() if user}
    catalogue = text_catalogue(10)
    if not lines:
        with pytest.raises(DataError, match="smaller k"):
            k_core(catalogue, make_sequences(*users), k)
        return
    catalogue, sequences = k_core(catalogue, make_sequences(*users), k)
    found = [[catalogue.item_ids[item] for item in line] for line in as_lists(sequences)]
    assert found == [[f"i{item}" for item in user] for user in lines.values()]
    assert sequences.user_ids.tolist() == list(lines)
    assert sequences.item_counts(len(catalogue)).min() >= k


def test_drop_unused_and_keep_items() -> None:
    sequences = make_sequences([4, 1, 4], [3], [1, 3, 2, 4])
    catalogue, left = drop_unused(text_catalogue(6), sequences.truncate(3))
    assert catalogue.item_ids.tolist() == ["i1", "i2", "i3", "i4"]
    assert as_lists(left) == [[3, 0, 3], [2], [2, 1, 3]]
    catalogue, left = keep_items(text_catalogue(6), sequences, np.isin(np.arange(6), [0, 1, 4]))
    assert catalogue.item_ids.tolist() == ["i0", "i1", "i4"]
    assert as_lists(left) == [[2, 1, 2], [1, 2]]
    assert left.user_ids.tolist() == ["user 0", "user 2"]


def test_sequences_are_a_map_style_dataset() -> None:
    sequences = make_sequences([0, 1, 2], [3, 4])
    assert len(sequences) == 2
    assert sequences.lengths.tolist() == [3, 2]
    example = sequences[1]
    assert (example["user"], example["items"].tolist(), example["items"].dtype) == (1, [3, 4], np.int64)
    with pytest.raises(IndexError):
        sequences[2]
    assert as_lists(sequences.truncate(2)) == [[1, 2], [3, 4]]
    assert as_lists(sequences.select(np.array([1, 0, 1]))) == [[3, 4], [0, 1, 2], [3, 4]]
    assert sequences.select(np.array([1, 1])).item_counts(5).tolist() == [0, 0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def test_log_popularity() -> None:
    expected = np.log(np.array([3, 1, 1]) / 4).astype(np.float32)
    assert np.array_equal(log_popularity(np.array([3, 1, 0])), expected)
    assert log_popularity(np.zeros(2)).tolist() == [0, 0]


def test_statistics_by_hand(tmp_path: Path) -> None:
    catalogue = mixed_catalogue(6)
    split = leave_one_out(make_sequences([0, 1, 2, 0], [0, 0, 0, 0, 1, 5], [3]))
    statistics = data_statistics(catalogue, split)
    assert (statistics["num_items"], statistics["num_users"], statistics["num_interactions"]) == (6, 2, 10)
    assert statistics["users_left_out"] == 1
    assert statistics["items_with"] == pytest.approx({"text_only": 1 / 3, "image_only": 1 / 3, "both": 1 / 3})
    assert statistics["train"]["interactions"] == 6  # items 0, 1 and four times 0
    assert statistics["train"]["length"]["mean"] == 3
    assert statistics["test"]["repeat_target_share"] == 0.5  # of targets 0 and 5
    assert statistics["test"]["cold_target_share"] == 0.5
    assert statistics["validation"]["repeat_target_share"] == 0  # of targets 2 and 1
    assert statistics["validation"]["cold_target_share"] == 0.5
    assert statistics["cold_catalogue_share"] == pytest.approx(4 / 6)
    assert statistics["popularity"]["top_decile_share"] == pytest.approx(5 / 6)
    differences = np.abs(np.subtract.outer([5, 1, 0, 0, 0, 0], [5, 1, 0, 0, 0, 0]))
    assert statistics["popularity"]["gini"] == pytest.approx(differences.mean() / 2)
    path = save_statistics(statistics, tmp_path / "checkpoint")
    assert path.name == "data_statistics.json"
    assert load_statistics(tmp_path / "checkpoint") == load_statistics(path) == statistics
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_statistics_are_finite_for_the_smallest_split() -> None:
    split = leave_one_out(make_sequences([0, 1, 2]))
    json.dumps(data_statistics(text_catalogue(3), split), allow_nan=False)


def test_split_is_plain() -> None:
    part = make_sequences([0, 1])
    assert Split(part, part, part).users_left_out == 0
