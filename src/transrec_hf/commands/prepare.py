"""`transrec prepare`: the exports of a shop, as they are, to a checked domain."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from ..data.interactions import load_domain
from ..errors import DataError, describe, raise_defects
from ..files import written_whole
from .options import option
from .parsing import parse_arguments
from .tables import as_ids, as_times, read_table


ROW_GROUP = 1000  # items written at a time, with their images
DROPS = {
    "guests": "interactions without a user",
    "undated": "interactions without a timestamp",
    "unknown_items": "interactions with an item that the items lack",
    "double_interactions": "interactions that repeat user, item and timestamp",
    "double_items": "items that repeat an item_id",
    "nameless_items": "rows without an item_id",
    "empty_items": "items with neither text nor image",
    "missing_images": "images whose file is not there",
}


@dataclass
class PreparationArguments:
    """Where the exports are, which columns count, and what may be dropped."""

    _argument_group_name = "preparation"
    items: str | None = option(None, "Parquet, CSV or JSONL file of items.")
    interactions: str | None = option(None, "Parquet, CSV or JSONL file of interactions.")
    output_dir: str | None = option(None, "Folder for items.parquet and interactions.parquet.")
    item_id: str = option("item_id", "Column of items with their ids.")
    text: list[str] | None = field(default=None, metadata={"help": "Columns that are joined to the text [text]."})
    text_separator: str = option(". ", "What is put between them.")
    image: str | None = option(None, "Column of paths of images, or of their bytes [image or file_name].")
    image_folder: str | None = option(None, "Folder that the paths are relative to [that of items].")
    keep: list[str] | None = field(default=None, metadata={"help": "Further columns of items to keep [none]."})
    user_id: str = option("user_id", "Column of interactions with the users.")
    interaction_item_id: str | None = option(None, "Column of interactions with the items [as in items, or item_id].")
    timestamp: str = option("timestamp", "Column of interactions with the times: integers, or dates.")
    timestamp_format: str | None = option(None, "How dates are written, as for strptime, e.g. %%d.%%m.%%Y [ISO 8601].")
    separator: str = option(",", "What is between the cells of CSV files.")
    encoding: str = option("utf-8", "Encoding of CSV files.")
    drop: list[str] | None = field(
        default=None, metadata={"help": "What to leave out, where else it is an error.", "choices": tuple(DROPS)}
    )
    json: bool = option(False, "Print what was done as JSON.")


class Sieve:
    """
    Rows of one file that are kept, and what was done to the others.

    Args:
        source (`str`): The file, for messages.
        num_rows (`int`): Its rows.
        drop (`Sequence[str]`): Which of `DROPS` may be left out.
    """

    def __init__(self, source: str, num_rows: int, drop: Sequence[str]):
        self.source, self.drop = source, drop
        self.keep = np.ones(num_rows, dtype=bool)
        self.dropped: dict[str, int] = {}
        self.defects: list[str] = []

    def sift(self, name: str, wrong: np.ndarray, label: Any = None) -> None:
        """Leave out the kept rows where `wrong`, `(rows,)`, is true, or note them as a defect."""
        rows = np.flatnonzero(wrong & self.keep)
        if name in self.drop:
            self.keep[rows] = False
            self.dropped[name] = len(rows)
        else:
            mend = f"Mend the file, or leave them out: --drop {name}"
            self.defects += describe(f"{len(rows)} {DROPS[name]}", rows, mend, label)

    def check(self) -> None:
        """Raise one [`DataError`] for all defects."""
        raise_defects(self.source, self.defects)
        if not self.keep.any():
            raise DataError(f"{self.source}: no row is left. Check the columns that you have named.")


def prepare(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Turn the exports of a shop into a domain that all other commands read.

        transrec prepare --items products.csv --interactions orders.csv --output_dir my_shop \\
            --item_id id --text title description --image image --keep price \\
            --user_id customer --interaction_item_id product --timestamp ordered_at --drop guests unknown_items

    It names columns, joins texts, takes images in, reads dates as seconds since 1970 (UTC) and ids that were written
    as 8881.0 as 8881. What is wrong with rows is an error with their numbers, unless --drop says to leave it out:

        guests undated unknown_items double_interactions double_items nameless_items empty_items missing_images

    Double interactions are kept and counted, unless dropped: repeats are real. The folder is written as a whole, after
    it was read once and all images were decoded.
    """
    (args,) = parse_arguments((PreparationArguments,), argv, prepare)
    missing = [name for name in ("items", "interactions", "output_dir") if getattr(args, name) is None]
    if missing:
        raise DataError(f"give {' and '.join(f'--{name}' for name in missing)}")
    folder = Path(args.output_dir)
    there = (
        [name for name in os.listdir(folder) if name.startswith(("items.", "interactions."))]
        if folder.is_dir()
        else []
    )
    if there:
        raise DataError(f"{folder}: holds {there[0]} already. Choose another --output_dir, or delete it.")

    done: dict[str, Any] = {"output_dir": args.output_dir, "dropped": {}, "float_ids": []}
    items = _items(args, done)
    interactions = _interactions(args, items["item_id"], done)
    with written_whole(folder) as partial:
        images = items.pop("image", None)
        _write_items(partial / "items.parquet", items, images)
        pa.parquet.write_table(interactions, partial / "interactions.parquet")
        catalogue, sequences = load_domain(partial)
        catalogue.check_contents()
    done |= {
        "items": len(catalogue),
        "items_with_text": int(catalogue.has_text.sum()),
        "items_with_image": int(catalogue.has_image.sum()),
        "interactions": len(interactions),
        "users": len(sequences),
        "users_with_three_or_more": int((sequences.lengths >= 3).sum()),
    }
    print(json.dumps(done, indent=2) if args.json else _describe(done))
    return done


def _column(table: pa.Table, name: str, option_name: str, source: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise DataError(f"{source}: no column {name!r} for --{option_name}; found {table.column_names}.")
    return table[name]


def _repeated(values: Iterable[Any]) -> np.ndarray:
    """Which values occurred before, `(n,)`."""
    seen: set[Any] = set()
    repeated = []
    for value in values:
        repeated.append(value in seen)
        seen.add(value)
    return np.array(repeated, dtype=bool)


def _items(args: PreparationArguments, done: dict[str, Any]) -> dict[str, Any]:
    """The columns of items, each of them a list: `item_id`, `text`, `image` if there are any, and those to keep."""
    source = str(args.items)
    table = read_table(Path(source), args.separator, args.encoding)
    sieve = Sieve(source, len(table), args.drop or ())
    ids, is_float = as_ids(_column(table, args.item_id, "item_id", source))
    if is_float:
        done["float_ids"].append(source)
    sieve.sift("nameless_items", pd.isna(ids))
    sieve.sift("double_items", _repeated(ids.tolist()), lambda row: repr(ids[row]))

    columns = args.text or [name for name in ("text",) if name in table.column_names]
    parts = [_column(table, name, "text", source).cast(pa.string()).to_pylist() for name in columns]
    rows = zip(*parts, strict=True) if parts else [()] * len(table)
    texts = [args.text_separator.join(part.strip() for part in row if part and part.strip()) or None for row in rows]

    name = args.image or next((name for name in ("image", "file_name") if name in table.column_names), None)
    images = [None] * len(table) if name is None else _column(table, name, "image", source).to_pylist()
    images = [image.get("bytes") or image.get("path") if isinstance(image, dict) else image for image in images]
    place = Path(args.image_folder or Path(source).parent)
    images = [place / image if isinstance(image, str) and image else image or None for image in images]
    absent = np.array([isinstance(image, Path) and not image.is_file() for image in images], dtype=bool)
    if "missing_images" in sieve.drop:
        done["dropped"]["missing_images"] = int(absent.sum())
        images = [None if gone else image for image, gone in zip(images, absent, strict=True)]
    else:
        sieve.sift("missing_images", absent, lambda row: str(images[row]))
    empty = [text is None and image is None for text, image in zip(texts, images, strict=True)]
    sieve.sift("empty_items", np.array(empty, dtype=bool), lambda row: repr(ids[row]))
    sieve.check()
    done["dropped"] |= sieve.dropped

    result: dict[str, Any] = {"item_id": ids, "text": texts, "image": images}
    result |= {name: _column(table, name, "keep", source).to_pylist() for name in args.keep or ()}
    kept = np.flatnonzero(sieve.keep).tolist()
    result = {name: [values[row] for row in kept] for name, values in result.items()}
    return {name: values for name, values in result.items() if any(value is not None for value in values)}


def _interactions(args: PreparationArguments, item_ids: Sequence[str], done: dict[str, Any]) -> pa.Table:
    """The table of interactions with the known items."""
    source = str(args.interactions)
    table = read_table(Path(source), args.separator, args.encoding)
    sieve = Sieve(source, len(table), args.drop or ())
    item_column = args.interaction_item_id or (args.item_id if args.item_id in table.column_names else "item_id")
    users, user_is_float = as_ids(_column(table, args.user_id, "user_id", source))
    items, item_is_float = as_ids(_column(table, item_column, "interaction_item_id", source))
    if user_is_float or item_is_float:
        done["float_ids"].append(source)
    column = _column(table, args.timestamp, "timestamp", source)
    times, undated, wrong = as_times(column, args.timestamp_format)
    sieve.sift("guests", pd.isna(users))
    sieve.sift("undated", undated)
    known = set(item_ids)
    unknown = np.array([item not in known for item in items.tolist()], dtype=bool)
    sieve.sift("unknown_items", unknown, lambda row: f"item {items[row]!r}")
    mend = "Say how they are written, e.g. --timestamp_format %d.%m.%Y"
    sieve.defects += describe("timestamps that cannot be read", np.flatnonzero(wrong), mend, lambda r: str(column[r]))
    sieve.check()
    rows = zip(users.tolist(), items.tolist(), times.tolist(), sieve.keep.tolist(), strict=True)
    double = _repeated(rows)
    if "double_interactions" in sieve.drop:
        sieve.sift("double_interactions", double)
    else:
        done["double_interactions"] = int((double & sieve.keep).sum())
    done["dropped"] |= sieve.dropped
    columns = {"user_id": pa.array(users, pa.string()), "item_id": pa.array(items, pa.string()), "timestamp": times}
    return pa.table(columns).filter(pa.array(sieve.keep))


def _write_items(path: Path, items: dict[str, Any], images: list[Path | bytes | None] | None) -> None:
    """Items in row groups, images read when their turn comes."""
    table = pa.table({name: pa.array(values) for name, values in items.items()})
    schema = table.schema if images is None else table.schema.append(pa.field("image", pa.binary()))
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(table), ROW_GROUP):
            part = table.slice(start, ROW_GROUP)
            if images is not None:
                contents = (
                    image.read_bytes() if isinstance(image, Path) else image
                    for image in images[start : start + ROW_GROUP]
                )
                part = part.append_column("image", pa.array(contents, pa.binary()))
            writer.write_table(part)


def _describe(done: dict[str, Any]) -> str:
    """What was done, a line for each."""
    with_text, with_image = done["items_with_text"], done["items_with_image"]
    lines = [
        f"{done['output_dir']}: {done['items']:,} items ({with_text:,} with text, {with_image:,} with an image), "
        f"{done['interactions']:,} interactions of {done['users']:,} users"
    ]
    lines += [f"  dropped {count:,} {DROPS[name]}" for name, count in done["dropped"].items() if count]
    lines += [f"  ids of {source} were written as 8881.0 and are read as 8881" for source in done["float_ids"]]
    if done.get("double_interactions"):
        lines.append(f"  kept {done['double_interactions']:,} {DROPS['double_interactions']}")
    lines.append(f"  {done['users_with_three_or_more']:,} users have the three interactions that a split takes")
    return "\n".join(lines)
