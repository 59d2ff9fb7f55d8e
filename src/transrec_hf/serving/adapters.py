"""An item index for other programs: an Arrow table of ids, vectors and columns, and a table of LanceDB."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import DataError
from .index import ItemIndex


VECTOR = "vector"


def to_arrow(index: ItemIndex) -> pa.Table:
    """
    A table with one row for each item that may be recommended: `item_id`, `vector` (fp32, all of one length), and the
    columns of the items. A score is the dot product of an item's vector with the vector of a user.
    """
    table = pa.table({"item_id": pa.array(index.item_ids, pa.string()), VECTOR: _as_lists(index)})
    for name in [] if index.columns is None else index.columns.column_names:
        if name in table.column_names:
            raise DataError(
                f"the items have a column {name!r}, a name that ids or vectors have in this table: rename it"
            )
        table = table.append_column(name, index.columns[name])  # type: ignore[index]
    return table if index.hidden is None else table.filter(pa.array(~index.hidden.numpy()))


def _as_lists(index: ItemIndex) -> pa.Array:
    vectors = np.ascontiguousarray(index.item_embeds.numpy(), dtype=np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def to_lancedb(index: ItemIndex, uri: str | os.PathLike, name: str = "items") -> Any:
    """
    Write an index as a table of LanceDB, or update an existing table: items are updated and added by their ids, and
    items that are not in the index are deleted.

    Args:
        index ([`ItemIndex`]): The index, for example `recommender.index`.
        uri (`str`): Folder of the database.
        name (`str`, *optional*, defaults to `"items"`): Name of the table.

    Returns:
        The table. Search it by `distance_type("dot")` with the vectors of users; call `optimize()` on a schedule.

    Raises:
        [`DataError`]: If LanceDB is not installed.
    """
    try:
        import lancedb
    except ImportError as error:
        raise DataError("LanceDB is not installed: pip install lancedb") from error
    rows, database = to_arrow(index), lancedb.connect(os.fspath(uri))
    try:
        table = database.open_table(name)
    except (ValueError, FileNotFoundError):
        return database.create_table(name, rows)
    table.checkout_latest()  # an outdated handle would add rows twice
    merge = table.merge_insert("item_id").when_matched_update_all().when_not_matched_insert_all()
    merge.when_not_matched_by_source_delete().execute(rows)
    return table
