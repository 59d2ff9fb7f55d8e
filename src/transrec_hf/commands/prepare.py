"""`transrec prepare`: the exports of a shop, or a published data set, as they are, to a checked domain."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from ..data.interactions import load_domain
from ..data.layouts import LAYOUTS, open_published
from ..data.media import KINDS
from ..data.published import media_of
from ..data.writing import write_published
from ..errors import DataError, describe, raise_defects
from ..files import written_whole
from .options import option
from .parsing import parse_arguments
from .tables import as_ids, as_times, read_table


ROW_GROUP = 1000  # items written at a time, with their files
CONTENTS = {"text": "text", "image": "an image", "audio": "a sound", "video": "a video"}
DROPS = {
    "guests": "interactions without a user",
    "undated": "interactions without a timestamp",
    "unknown_items": "interactions with an item that the items lack",
    "double_interactions": "interactions that repeat user, item and timestamp",
    "double_items": "items that repeat an item_id",
    "nameless_items": "rows without an item_id",
    "empty_items": "items with no content",
    **{f"missing_{kind}": f"{kind} whose file is not there" for kind in KINDS.values()},
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
    image_folder: str | None = option(
        None, "Folder that the paths are relative to [that of items]; without a column, of files named by item_id."
    )
    audio: str | None = option(None, "Column of paths of sounds, or of their bytes [audio].")
    audio_folder: str | None = option(None, "As image_folder, of sounds.")
    video: str | None = option(None, "Column of paths of moving pictures, or of their bytes [video].")
    video_folder: str | None = option(None, "As image_folder, of moving pictures.")
    keep: list[str] | None = field(default=None, metadata={"help": "Further columns of items to keep [none]."})
    user_id: str = option("user_id", "Column of interactions with the users.")
    interaction_item_id: str | None = option(None, "Column of interactions with the items [as in items, or item_id].")
    timestamp: str = option("timestamp", "Column of interactions with the times: integers, or dates.")
    timestamp_format: str | None = option(None, "How dates are written, as for strptime, e.g. %%d.%%m.%%Y [ISO 8601].")
    separator: str | None = option(None, "What is between the cells of CSV files [what the header has most of].")
    encoding: str = option("utf-8", "Encoding of CSV files.")
    drop: list[str] | None = field(
        default=None, metadata={"help": "What to leave out, where else it is an error.", "choices": tuple(DROPS)}
    )
    layout: str | None = option(
        None, "Instead of items and interactions, read a published data set.", choices=tuple(LAYOUTS)
    )
    folder: str | None = option(None, "Where its files are, as they were downloaded.")
    domain: str | None = option(None, "Which of several data sets in that folder, e.g. TN of NineRec.")
    language: Literal["en", "zh"] = option("en", "Of its titles, where it has them in both.")
    modalities: list[str] | None = field(
        default=None,
        metadata={"help": "Which of its contents are taken in [all].", "choices": ("text", *KINDS)},
    )
    min_value: float | None = option(None, "Its interactions of a lower rating, or share watched, are left out.")
    k_core: int = option(1, "Its users and items with fewer interactions are left out, until all have as many.")
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
    it was read once and all images, sounds and moving pictures were decoded.

    Published data sets are read in their own layout, whatever they lack is left out, counted and listed in a file:

        transrec prepare --layout ninerec --folder NineRec --domain TN --language en --output_dir tn

    docs/datasets.md has the layouts.
    """
    (args,) = parse_arguments((PreparationArguments,), argv, prepare)
    needed = ("folder", "output_dir") if args.layout else ("items", "interactions", "output_dir")
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        raise DataError(f"give {' and '.join(f'--{name}' for name in missing)}")
    if args.layout and (args.items or args.interactions):
        raise DataError("--layout reads the items and interactions of --folder: leave out --items and --interactions")
    folder = Path(args.output_dir)
    there = (
        [name for name in os.listdir(folder) if name.startswith(("items.", "interactions."))]
        if folder.is_dir()
        else []
    )
    if there:
        raise DataError(f"{folder}: holds {there[0]} already. Choose another --output_dir, or delete it.")

    done: dict[str, Any] = {"output_dir": args.output_dir, "dropped": {}, "float_ids": []}
    if args.layout:
        published = open_published(args.layout, args.folder, args.domain, args.language)
        options = {name: getattr(args, name) for name in ("text", "modalities", "min_value", "k_core")}
        with written_whole(folder) as partial:
            done |= write_published(published, partial, separator=args.text_separator, **options)
            catalogue, sequences = load_domain(partial)
    else:
        items = _items(args, done)
        interactions = _interactions(args, items["item_id"], done)
        with written_whole(folder) as partial:
            _write_items(partial / "items.parquet", items)
            pa.parquet.write_table(interactions, partial / "interactions.parquet")
            catalogue, sequences = load_domain(partial)
            catalogue.check_contents()
    done |= {
        "items": len(catalogue),
        **{f"items_with_{name}": int(catalogue.has(name).sum()) for name in ("text", *KINDS)},
        "interactions": len(sequences.items),
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

    contents: dict[str, list[Any]] = {"text": texts}
    for name, kind in KINDS.items():
        files = _files(args, table, name, ids)
        absent = np.array([isinstance(file, Path) and not file.is_file() for file in files], dtype=bool)
        if f"missing_{kind}" in sieve.drop:
            done["dropped"][f"missing_{kind}"] = int(absent.sum())
            files = [None if gone else file for file, gone in zip(files, absent, strict=True)]
        else:
            sieve.sift(f"missing_{kind}", absent, lambda row, files=files: str(files[row]))
        contents[name] = files
    empty = [all(content is None for content in row) for row in zip(*contents.values(), strict=True)]
    sieve.sift("empty_items", np.array(empty, dtype=bool), lambda row: repr(ids[row]))
    sieve.check()
    done["dropped"] |= sieve.dropped

    result: dict[str, Any] = {"item_id": ids, **contents}
    result |= {name: _column(table, name, "keep", source).to_pylist() for name in args.keep or ()}
    kept = np.flatnonzero(sieve.keep).tolist()
    result = {name: [values[row] for row in kept] for name, values in result.items()}
    return {name: values for name, values in result.items() if any(value is not None for value in values)}


def _files(args: PreparationArguments, table: pa.Table, name: str, ids: np.ndarray) -> list[Path | bytes | None]:
    """The files of a modality, of a column or, without one, of a folder where they are named by item."""
    source, folder = str(args.items), getattr(args, f"{name}_folder")
    usual = (name, "file_name") if name == "image" else (name,)
    column = getattr(args, name) or next((other for other in usual if other in table.column_names), None)
    if column is None:
        named = media_of(Path(folder)) if folder else {}
        return [Path(named[item]) if item in named else None for item in ids]
    files = _column(table, column, name, source).to_pylist()
    files = [file.get("bytes") or file.get("path") if isinstance(file, dict) else file for file in files]
    place = Path(folder or Path(source).parent)
    return [place / file if isinstance(file, str) and file else file or None for file in files]


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


def _write_items(path: Path, items: dict[str, Any]) -> None:
    """Items in row groups, files read when their turn comes."""
    media = {name: items.pop(name) for name in KINDS if name in items}
    table = pa.table({name: pa.array(values) for name, values in items.items()})
    schema = pa.schema([*table.schema, *(pa.field(name, pa.binary()) for name in media)])
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(table), ROW_GROUP):
            part = table.slice(start, ROW_GROUP)
            for name, files in media.items():
                contents = [
                    file.read_bytes() if isinstance(file, Path) else file for file in files[start : start + ROW_GROUP]
                ]
                part = part.append_column(name, pa.array(contents, pa.binary()))
            writer.write_table(part)


def _describe(done: dict[str, Any]) -> str:
    """What was done, a line for each."""
    with_content = {name: done[f"items_with_{name}"] for name in CONTENTS}
    shown = ", ".join(f"{with_content[name]:,} with {word}" for name, word in CONTENTS.items() if with_content[name])
    lines = [
        f"{done['output_dir']}: {done['items']:,} items ({shown}), {done['interactions']:,} interactions of "
        f"{done['users']:,} users"
    ]
    lines += [f"  {note}" for note in done.get("notes", ())]
    lines += [f"  dropped {count:,} {DROPS.get(name, name)}" for name, count in done["dropped"].items() if count]
    lines += [f"  ids of {source} were written as 8881.0 and are read as 8881" for source in done["float_ids"]]
    if done.get("double_interactions"):
        lines.append(f"  kept {done['double_interactions']:,} {DROPS['double_interactions']}")
    lines.append(f"  {done['users_with_three_or_more']:,} users have the three interactions that a split takes")
    return "\n".join(lines)
