"""Tables from other systems: reading them as they are, understanding ids and times, writing by suffix."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..errors import DataError, describe, raise_defects


SUFFIXES = (".parquet", ".csv", ".jsonl")
SEPARATORS = ",;\t|"


def read_table(path: Path, separator: str | None = None, encoding: str = "utf-8") -> pa.Table:
    """
    Read a Parquet, CSV or JSON Lines file. The cells of a CSV file stay strings, so that `007` keeps its zeros; empty
    cells are null. Without `separator`, the most frequent one in the header is taken.

    Raises:
        [`DataError`]: If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file (now in {Path.cwd()}). Check the path.")
    try:
        if path.suffix == ".parquet":
            return pa.parquet.read_table(path)
        if path.suffix == ".jsonl":
            return pa.json.read_json(path, pa.json.ReadOptions(block_size=1 << 24))
        if path.suffix in (".csv", ".tsv", ".txt"):
            return _read_csv(path, separator, encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not encoded as {encoding} ({error.reason}). Save it in {encoding}, or give `transrec "
            "prepare` its --encoding, e.g. latin-1."
        ) from None
    except (pa.ArrowException, OSError, LookupError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Write the file again.") from error
    raise DataError(f"{path}: unsupported extension {path.suffix!r}. Save it as one of {', '.join(SUFFIXES)}.")


def _read_csv(path: Path, separator: str | None, encoding: str) -> pa.Table:
    with open(path, encoding=encoding, newline="") as file:
        found = max(SEPARATORS, key=file.readline().count)
        separator = separator or found
        if len(separator) != 1:
            raise DataError(f"{path}: --separator {separator!r} is not one character. Leave it out: it is {found!r}.")
        file.seek(0)
        names = [name.removeprefix("\ufeff") for name in next(csv.reader(file, delimiter=separator), [])]
        for _ in file:  # an error of Arrow would name neither the file nor what to do
            pass
    if len(names) == 1 and found in names[0]:
        raise DataError(
            f"{path}: has only one column, {names[0]!r}. Its separator seems to be {found!r}: leave out --separator."
        )
    ragged: dict[int, str] = {}

    def note(row: pa.csv.InvalidRow) -> str:
        ragged[row.number - 2] = f"{row.actual_columns} cells"
        return "skip"

    table = pa.csv.read_csv(
        path,
        pa.csv.ReadOptions(use_threads=False, encoding=encoding),
        pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=note),
        pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        ),
    )
    what = f"number of cells differs from the {len(names)} of the header"
    raise_defects(
        str(path), describe(what, list(ragged), "Put text that holds the separator in quotes.", ragged.__getitem__)
    )
    return table


def as_ids(column: pa.ChunkedArray) -> tuple[np.ndarray, bool]:
    """
    Ids as strings (`None` where empty) of shape `(rows,)`, and whether they were written as floats. Some programs turn
    a column of integers into floats if one is missing, so `8881.0` means `8881`.
    """
    ids = column.cast(pa.string())
    written = pc.drop_null(ids)
    is_float = len(written) > 0 and pc.all(pc.match_substring_regex(written, r"^-?\d+(\.0+)?$")).as_py()
    is_float = is_float and pc.any(pc.match_substring(written, ".")).as_py()
    if is_float:
        ids = pc.replace_substring_regex(ids, r"\.0+$", "")
    values = np.array(ids.to_pylist(), dtype=object)
    values[values == ""] = None
    return values, bool(is_float)


def as_times(column: pa.ChunkedArray, form: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Times as integers, where they are missing, and where they cannot be read; all of shape `(rows,)`. Numbers stay as
    they are; dates (ISO 8601, or in the `strptime` format `form`) become seconds since 1970 in UTC.
    """
    missing = pc.is_null(column, nan_is_null=True).to_numpy()
    values = column.to_pandas()
    numbers = pd.to_numeric(values, errors="coerce") if pa.types.is_string(column.type) and form is None else values
    if not pa.types.is_string(column.type) and not pd.api.types.is_numeric_dtype(values.dtype):
        numbers = _seconds(pd.to_datetime(values, errors="coerce", utc=True))
    elif form is not None or numbers.isna().to_numpy()[~missing].all():
        numbers = _seconds(pd.to_datetime(values.astype(str), format=form or "ISO8601", errors="coerce", utc=True))
    wrong = ~missing & (numbers.isna() | (numbers % 1 != 0)).to_numpy()
    times = numbers.where(~(missing | wrong), 0)
    return times.to_numpy().astype(np.int64), missing, wrong


def _seconds(times: pd.Series) -> pd.Series:
    return (times - pd.Timestamp(0, tz="UTC")) // pd.Timedelta(seconds=1)


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A function that writes a table part by part into a Parquet, CSV or JSON Lines file."""
    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            yield lambda part: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part.to_pylist())
        return
    kind = pa.csv.CSVWriter if path.suffix == ".csv" else pa.parquet.ParquetWriter
    with kind(str(path), schema) as writer:
        yield writer.write_table
