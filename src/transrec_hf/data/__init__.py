"""Catalogue and interactions: reading, validation, splits and statistics.

A domain is two tables. `items` holds `item_id` and at least one of `text`, `image`, `features`, `audio`, `video` and
`codes`; `interactions` holds `user_id`, `item_id` and a `timestamp`, an integer or a date. Both come from Parquet, CSV
or JSONL, a folder of images with `metadata.jsonl`, a table in memory or a data set of the Hub (configurations `items`
and `interactions`).

Images stay encoded, in memory-mapped Arrow or in their files, until [`Catalogue.image`] decodes one. Interactions are
flat NumPy columns, memory-mapped where they are long; users are views on them. Every defect is a [`DataError`] that
names the source, the rows (data rows counted from 1, a CSV header is not counted) or ids, and the mend.

A data set reads no files but its own: those of its folder, links resolved, or of its repository on the Hub.
"""

from __future__ import annotations

from ..errors import DataError
from .catalogue import Catalogue, load_catalogue
from .interactions import (
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
from .statistics import data_statistics, load_statistics, log_popularity, save_statistics


__all__ = [
    "Catalogue",
    "DataError",
    "Sequences",
    "Split",
    "data_statistics",
    "drop_unused",
    "k_core",
    "keep_items",
    "leave_one_out",
    "load_catalogue",
    "load_domain",
    "load_interactions",
    "load_statistics",
    "log_popularity",
    "save_statistics",
    "temporal_split",
]
