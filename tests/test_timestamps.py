"""Timestamps of every notation and type, and dates as bounds of a split."""

from __future__ import annotations

import csv
import json
import logging
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transrec_hf.data.catalogue import Catalogue
from transrec_hf.data.columns import Timestamps
from transrec_hf.data.interactions import Sequences, load_interactions, temporal_split
from transrec_hf.errors import DataError


SHOP = Catalogue(datasets.Dataset.from_dict({"item_id": list("abcd"), "text": list("wxyz")}), "shop")
NOW = 1_700_000_000


def loaded(timestamps: Any, kind: pa.DataType | None = None, folder: Path | None = None, form: str = "") -> Sequences:
    """One user's interactions with these timestamps, from memory or from a file of the form."""
    columns = {"user_id": ["u"] * len(timestamps), "item_id": list("abcd")[: len(timestamps)]}
    if not form:
        return load_interactions(pa.table({**columns, "timestamp": pa.array(timestamps, kind)}), SHOP)
    file = (folder or Path()) / f"interactions.{form}"
    rows = list(zip(*columns.values(), timestamps, strict=True))
    if form == "parquet":
        pq.write_table(pa.table({**columns, "timestamp": pa.array(timestamps, kind)}), file)
    elif form == "jsonl":
        names = (*columns, "timestamp")
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        with open(file, "w", newline="") as stream:
            csv.writer(stream).writerows([(*columns, "timestamp"), *rows])
    return load_interactions(file, SHOP)


SAME = [NOW + 20, NOW + 10, NOW]
NOTATIONS: dict[str, tuple[Any, pa.DataType | None]] = {
    "integers": (SAME, None),
    "unsigned": (SAME, pa.uint64()),
    "double": ([float(value) for value in SAME], None),
    "decimal": ([Decimal(value) for value in SAME], pa.decimal128(20, 0)),
    "decimal with places": ([Decimal(value) for value in SAME], pa.decimal128(20, 2)),
    "strings": ([str(value) for value in SAME], None),
    "strings of floats": ([f"{value}.0" for value in SAME], None),
    "signed strings": ([f" +{value}" for value in SAME], None),
    "strings, large": ([str(value) for value in SAME], pa.large_string()),
    "strings, dictionary": ([str(value) for value in SAME], pa.dictionary(pa.uint8(), pa.string())),
    "strings, view": ([str(value) for value in SAME], pa.string_view()),
    "seconds": (SAME, pa.timestamp("s")),
    "milliseconds": ([value * 1000 for value in SAME], pa.timestamp("ms")),
    "microseconds": ([value * 10**6 for value in SAME], pa.timestamp("us", "UTC")),
    "nanoseconds": ([value * 10**9 for value in SAME], pa.timestamp("ns", "Europe/Berlin")),
    "iso": ([datetime.fromtimestamp(value, timezone.utc).strftime("%Y-%m-%d %H:%M:%S") for value in SAME], None),
    "iso, T": ([datetime.fromtimestamp(value, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") for value in SAME], None),
    "iso, zone": ([datetime.fromtimestamp(v, timezone(timedelta(hours=-3.5))).isoformat() for v in SAME], None),
    "iso, fraction": ([datetime.fromtimestamp(v, timezone.utc).strftime("%Y-%m-%d %H:%M:%S.000") for v in SAME], None),
}


@pytest.mark.parametrize("name", NOTATIONS)
def test_every_notation_gives_the_same_order_and_seconds(name: str, tmp_path: Path) -> None:
    values, kind = NOTATIONS[name]
    for form in ("", "parquet") + (("csv", "jsonl") if isinstance(values[0], (str, int)) and kind is None else ()):
        sequences = loaded(values, kind, tmp_path, form)
        assert sequences.items.tolist() == [2, 1, 0] and sequences.timestamps.tolist() == SAME[::-1], form


def test_days_are_seconds_at_midnight() -> None:
    assert loaded([date(1970, 1, 3), date(1970, 1, 2)]).timestamps.tolist() == [86400, 172800]
    assert loaded(["1970-01-03", "1970-01-02"]).timestamps.tolist() == [86400, 172800]


def test_fractions_of_a_second_order_and_are_then_dropped() -> None:
    sequences = loaded(["1970-01-01 00:00:05.7", "1970-01-01 00:00:05.25", "1969-12-31 23:59:59.5"])
    assert sequences.items.tolist() == [2, 1, 0] and sequences.timestamps.tolist() == [-1, 5, 5]
    assert loaded([5_700, 5_250], pa.timestamp("ms")).items.tolist() == [1, 0]
    assert loaded([5_000_000_700, 5_000_000_000], pa.timestamp("ns")).timestamps.tolist() == [5, 5]


@settings(max_examples=100, deadline=None)
@given(
    st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1)),
    st.sampled_from([None, timezone.utc, timezone(timedelta(hours=5, minutes=45)), timezone(-timedelta(hours=9))]),
    st.sampled_from(["T", " "]),
    st.sampled_from(["auto", "seconds", "milliseconds", "microseconds", "minutes"]),
)
def test_dates_are_read_as_python_reads_them(moment, zone, separator, precision) -> None:
    text = moment.replace(tzinfo=zone).isoformat(separator, precision)
    read = datetime.fromisoformat(text)
    expected = read.replace(tzinfo=read.tzinfo or timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    times = Timestamps(pa.chunked_array([[text, None]]))
    assert times.are_dates and not times.wrong.any() and times.missing.tolist() == [False, True]
    assert times.numbers[0] == expected // timedelta(microseconds=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_integers_keep_all_their_bits(values) -> None:
    for column in (values, [str(value) for value in values], [f"{value:+d}" for value in values]):
        times = Timestamps(pa.chunked_array([[*column, None]]))
        assert times.numbers[:-1].tolist() == values and times.missing.tolist() == [False] * len(values) + [True]
        assert not (times.wrong | times.inexact).any() and not times.are_dates


@pytest.mark.parametrize(
    ("kind", "limit"), [(np.float16, 2**11), (np.float32, 2**24), (np.float64, 2**53)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("form", ["", "parquet"])
def test_floats_that_have_rounded_are_refused(kind: Any, limit: int, form: str, tmp_path: Path) -> None:
    exact = np.array([limit - 1, -(limit - 1), 3], dtype=kind)
    arrow = pa.from_numpy_dtype(np.dtype(kind))
    assert loaded(exact, arrow, tmp_path, form).timestamps.tolist() == [-(limit - 1), 3, limit - 1]
    with pytest.raises(DataError, match=r"has rounded, since it cannot hold all integers .*: row 2 .*as int64"):
        loaded(np.array([1, limit, 2], dtype=kind), arrow, tmp_path, form)


def test_rounded_floats_are_refused_from_a_dataset_and_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    columns = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": np.array(SAME[:2], dtype="float32")}
    for source in (datasets.Dataset.from_dict(columns), pandas.DataFrame(columns), columns):
        with pytest.raises(DataError, match="rounded"):
            load_interactions(source, SHOP)


@pytest.mark.parametrize("text", ["1.7E+09", "1.70000001e9", "2e1"])
def test_a_notation_without_the_last_digits_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rounded"):
        loaded([text, "7"], None, tmp_path, "csv")


def test_json_numbers_that_are_too_large_for_doubles(tmp_path: Path) -> None:
    assert loaded([2**62 + 1, 2**62], None, tmp_path, "jsonl").timestamps.tolist() == [2**62, 2**62 + 1]
    with pytest.raises(DataError, match="rounded"):
        loaded([2**62 + 1, 1.5e18], None, tmp_path, "jsonl")


WRONG: dict[str, Any] = {
    "a word": ["7", "soon"],
    "another order": ["2020-01-31", "31/01/2020"],
    "no such day": ["2021-02-28", "2021-02-29"],
    "no such hour": ["2021-02-28 23:00", "2021-02-28 24:01"],
    "too large": ["7", str(2**63)],
    "a fraction": [1.0, 1.5],
    "a fraction in words": ["1.0", "1.5"],
    "infinite": [1.0, float("inf")],
    "truth": [True, False],
    "duration": pa.array([1, 2], pa.duration("s")),
    "time of day": pa.array([1, 2], pa.time32("s")),
    "beyond all years": pa.array([0, 2**60], pa.timestamp("s")),
    "lists": [[1], [2]],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_timestamp_is_named(name: str) -> None:
    with pytest.raises(DataError, match=r"not an integer .*: row [12].* or a date such as 20"):
        loaded(WRONG[name])


@pytest.mark.parametrize("missing", [None, "", " ", "nan", "NaT", "None", "NULL", "<NA>", r"\N"])
def test_missing_timestamps_are_named(missing: str | None) -> None:
    with pytest.raises(DataError, match="missing timestamp: row 2"):
        loaded(["2020-01-01", missing, "2020-01-02"])
    with pytest.raises(DataError, match="missing timestamp: row 1"):
        loaded([missing, "5"])


def test_numbers_and_dates_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="not an integer"):
        loaded(["2020-01-01", "5"])
    from transrec_hf.data import interactions, reading

    for module in (interactions, reading):
        monkeypatch.setattr(module, "BLOCK", 1)
    with pytest.raises(DataError, match="some timestamps are numbers and some are dates"):
        loaded(["2020-01-01", "5"])


def test_no_column_of_times(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing column timestamp; .*rename 'date' to 'timestamp'"):
        load_interactions({"user_id": ["u"], "item_id": ["a"], "date": [1]}, SHOP)


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_dates_bound_a_temporal_split(unit: int) -> None:
    day = 86400 * unit
    start = 19_000 * day
    lengths = np.array([4, 4])
    times = np.array([0, 1, 2, 3] * 2) * day + start
    ends = np.cumsum(lengths)
    users = np.array(["u", "v"], dtype=object)
    sequences = Sequences(np.array([0, 1, 2, 3] * 2, dtype=np.int32), times, ends - lengths, ends, users)
    bounds = [(datetime(1970, 1, 1) + timedelta(days=19_000 + shift)).date().isoformat() for shift in (2, 3)]
    split = temporal_split(sequences, *bounds)
    expected = temporal_split(sequences, start + 2 * day, start + 3 * day)
    for part in ("train", "validation", "test"):
        assert getattr(split, part).ends.tolist() == getattr(expected, part).ends.tolist()
    assert temporal_split(sequences, str(start + 2 * day), str(start + 3 * day)).test.ends.tolist() == [4, 8]
    for kind in (datetime.fromisoformat, np.datetime64):
        assert temporal_split(sequences, *map(kind, bounds)).validation.ends.tolist() == split.validation.ends.tolist()
    with pytest.raises(DataError, match="Move the bounds: the validation comes before the test"):
        temporal_split(sequences, *reversed(bounds))
    with pytest.raises(DataError, match="'spring' is not a date"):
        temporal_split(sequences, "spring", bounds[1])


SECONDS = NOW + 977 * np.arange(200)
ROUNDED_BEFORE: dict[str, tuple[np.ndarray, bool]] = {
    "float32": (SECONDS.astype(np.float32), True),
    "float32 of milliseconds": ((1000 * SECONDS).astype(np.float32), True),
    "seconds": (SECONDS, False),
    "milliseconds": (1000 * SECONDS, False),
    "minutes": (SECONDS // 60 * 60, False),
    "hours": (NOW // 3600 * 3600 + 3600 * np.arange(200), False),
    "days": (NOW // 86_400 * 86_400 + 86_400 * np.arange(200), False),
    "days in milliseconds": (1000 * (NOW // 86_400 * 86_400 + 86_400 * np.arange(200)), False),
    "small numbers": (np.arange(200), False),
}


@pytest.mark.parametrize("kind", ["int64", "float64"])
@pytest.mark.parametrize("name", ROUNDED_BEFORE)
def test_what_was_float32_before_is_warned_of(name: str, kind: str, monkeypatch, caplog) -> None:
    values, is_rounded = ROUNDED_BEFORE[name]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load_interactions({"user_id": ["u"] * 200, "item_id": ["a"] * 200, "timestamp": values.astype(kind)}, SHOP)
    assert ("float32" in caplog.text) == is_rounded
