"""Readers: from a place to the items as a data set, or to blocks of interactions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ..errors import DataError, printable
from ..model.modalities_transrec import MODALITIES
from .columns import INTERACTION_COLUMNS, check_columns
from .parquet_tables import read_blocks, read_cached, read_shape
from .places import SUFFIXES, Place
from .text_tables import read_text_table


if TYPE_CHECKING:
    import datasets


BLOCK = 2**18
"""Number of interactions that are read, sorted or counted at a time."""


def _check_file(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{printable(path)}: unsupported extension {path.suffix!r}. Save it as one of {', '.join(SUFFIXES)} "
            "(comma-separated, or one JSON object on each line)."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{printable(path)}: the file is empty. Write it again.")


def read_items(place: Place) -> datasets.Dataset:
    """The items. Items of a Parquet file, images included, are memory-mapped from the cache of `datasets`."""
    import datasets

    table = place.table
    if isinstance(table, Path):
        _check_file(table)
        if table.suffix == ".parquet":
            columns, rows = read_shape(table)
            check_item_columns(columns, place.name)
            if rows == 0:
                raise DataError(f"{place.name}: the catalogue is empty. Add at least one item.")
            return read_cached(table, rows)
        table = read_text_table(table)
    if isinstance(table, pa.Table):
        check_item_columns(table.column_names, place.name)
        return datasets.Dataset(table)
    return table


def check_item_columns(columns: list[str], name: str) -> None:
    """Check that a table of items has a column of ids and at least one column of contents."""
    named = ["image" if column == "file_name" and "image" not in columns else column for column in columns]
    check_columns(named, name, ("item_id",), tuple(MODALITIES))


def read_interactions(place: Place) -> tuple[int, Iterator[pa.Table]]:
    """The number of interactions, and their columns in blocks. Parquet and data sets are never read as a whole."""
    table, columns = place.table, list(INTERACTION_COLUMNS)
    if isinstance(table, Path):
        _check_file(table)
        if table.suffix == ".parquet":
            found, rows = read_shape(table)
            check_columns(found, place.name, columns)
            return rows, read_blocks(table, rows, columns, BLOCK)
        table = read_text_table(table)
    check_columns(table.column_names, place.name, columns)
    if isinstance(table, pa.Table):
        starts = range(0, len(table), BLOCK)
        return len(table), (table.slice(start, BLOCK).select(columns) for start in starts)
    return len(table), table.select_columns(columns).with_format("arrow").iter(BLOCK)
