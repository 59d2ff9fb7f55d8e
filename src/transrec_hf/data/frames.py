"""Tables in memory: Arrow tables, DataFrames of pandas and Polars, dictionaries of columns, lists of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import pyarrow as pa
from transformers.utils import logging

from ..errors import DataError, one_line, shortened
from .columns import NEEDED, check_names, plain


logger = logging.get_logger(__name__)

DEEPEST = 32  # levels of nested types: the limits of Arrow and `datasets` cannot be foreseen
MENDS = {
    "image": "Write image bytes or file paths, or give a datasets.Dataset, which takes PIL images.",
    "features": "Write a list of numbers for every item, or leave the cell empty.",
}


def as_table(source: Any, name: str) -> pa.Table:
    """The Arrow table of a table, a DataFrame, a dictionary of columns or a list of rows."""
    columns: dict[str, Any]
    if isinstance(source, (str, bytes)) or source is None:
        columns = {}
    elif isinstance(source, pa.Table):
        return plain_table(source, name)
    elif hasattr(source, "iloc") and hasattr(source, "columns"):  # pandas: column by column, for some may be mixed
        check_names(names := [str(column) for column in source.columns], name)
        columns = {column: source.iloc[:, place] for place, column in enumerate(names)}
    elif hasattr(source, "__arrow_c_stream__"):  # Polars, DuckDB, ...
        return plain_table(pa.table(source), name)
    elif isinstance(source, Mapping):
        columns = dict(source)
    elif isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        names = list(dict.fromkeys(str(key) for row in source for key in row))
        columns = {key: [row.get(key) for row in source] for key in names}
    else:
        columns = {}
    if not columns:
        if isinstance(source, Sized) and not isinstance(source, (str, bytes)) and not len(source):
            raise DataError(f"{name}: there is nothing in it. Give one row at least.")
        raise DataError(
            f"{name}: cannot read a {type(source).__name__}. Pass a file, a folder, an id of the Hub, a "
            "datasets.Dataset, a DataFrame, an Arrow table, a dictionary of columns or a list of dictionaries."
        )
    lengths = {key: len(column) for key, column in columns.items() if hasattr(column, "__len__")}
    if len(set(lengths.values())) > 1 or len(lengths) < len(columns):
        raise DataError(f"{name}: columns of different lengths: {lengths}. Give every column one cell for every row.")
    return plain_table_of(columns, name)


def plain_table_of(columns: Mapping[str, Any], name: str) -> pa.Table:
    """The Arrow table of columns of Python or NumPy values. Further columns that Arrow cannot hold are left out."""
    arrays = {}
    for column, values in columns.items():
        try:
            array = pa.array(values, from_pandas=True)
            arrays[column] = array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])
        except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError) as error:
            why = shortened(one_line(error), 200)
            if column not in NEEDED:
                _tell_left_out(name, column, why)
            else:
                if (row := _first_odd(values)) is not None:
                    ids = columns.get("item_id")
                    item = "" if ids is None or column == "item_id" else f"item_id {shortened(list(ids)[row])!r}: "
                    why = f"row {row + 1}: {item}{why}"
                mend = MENDS.get(column, "Give all its cells one type, for example all ids as strings.")
                raise DataError(f"{name}: column {column!r} is not of one type ({why}). {mend}") from error
    return plain_table(pa.table(arrays), name)


def _tell_left_out(name: str, column: str, why: str) -> None:
    """Warn that a column is left out, once for a table that is read in parts."""
    logger.warning_once(
        f"{name}: the further column {shortened(repr(column))} is left out ({why}). Give all its cells one plain type."
    )


def _first_odd(values: Iterable[Any]) -> int | None:
    """The first cell whose type differs from that of the first cell that is not empty, or that Arrow cannot hold."""
    first = None
    for row, value in enumerate(values):
        try:
            pa.array([first, value], from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError):
            return row
        first = value if first is None else first
    return None


def plain_table(table: pa.Table, name: str) -> pa.Table:
    """
    A table of columns that `datasets` can hold: dictionaries and views become plain arrays, and further columns of
    other types, such as maps, are left out with a warning.
    """
    kept = []  # pairs, since a table may have two columns of one name
    for place, label in enumerate(table.column_names):
        column = plain(table.column(place))
        if label in NEEDED or can_be_held(column.type):
            kept.append((label, column))
        else:
            _tell_left_out(name, label, f"of the type {shortened(column.type, 60)}")
    return pa.Table.from_arrays([column for _, column in kept], names=[label for label, _ in kept])


def can_be_held(kind: pa.DataType) -> bool:
    """Whether `datasets` knows a type of Arrow."""
    import datasets

    if str(kind).count("<") > DEEPEST:
        return False
    try:
        datasets.Features.from_arrow_schema(pa.schema([("column", kind)]))
    except ValueError:
        return False
    return True
