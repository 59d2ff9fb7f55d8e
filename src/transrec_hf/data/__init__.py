"""Catalogue and interactions: reading, validation, splits and statistics.

A data set (in the code also called a domain) is two tables. `items` holds `item_id` and at least one of `text`,
`image`, `features`, `audio`, `video` and `codes`. `interactions` holds `user_id`, `item_id` and a `timestamp`, an
integer or a date. Both may be Parquet, CSV or JSONL files, a folder of images with `metadata.jsonl`, tables in memory,
or a data set of the Hub (configurations `items` and `interactions`).

Images stay encoded, in memory-mapped Arrow or in their files, until [`Catalogue.image`] decodes one. Interactions are
flat NumPy columns, which are memory-mapped if they are long; users are views on them. Every defect is a [`DataError`]
that names the source, the rows (data rows count from 1, a CSV header does not count) or ids, and says what to do.

A data set can read only its own files: those in its folder (links are resolved), or in its repository on the Hub.
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
