"""`transrec prepare`: turns the exports of a shop, or a published data set, into a checked data set."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from transformers.utils import logging

from ..data.interactions import load_domain
from ..data.layouts import LAYOUTS, open_published
from ..data.media import KINDS, typed_files
from ..data.published import LeftOut, media_of
from ..data.writing import BYTES_AT_A_TIME, ITEMS_AT_A_TIME, blocks, damaged, items_writer, write_published
from ..errors import DataError, describe, printable, raise_defects
from ..files import written_whole
from .options import option
from .parsing import parse_arguments
from .tables import as_ids, as_times, read_table


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
    **{f"damaged_{kind}": f"{kind} that cannot be decoded" for kind in KINDS.values()},
}
FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@dataclass
class PreparationArguments:
    """Where the exports are, which columns count, and what may be dropped."""

    _argument_group_name = "preparation"
    items: str | None = option(None, "Parquet, CSV or JSONL file of items.")
    interactions: str | None = option(None, "Parquet, CSV or JSONL file of interactions.")
    output_dir: str | None = option(None, "Folder for items.parquet and interactions.parquet.")
    item_id: str = option("item_id", "Column of the items with their ids.")
    text: list[str] | None = field(default=None, metadata={"help": "Columns that are joined to make the text [text]."})
    text_separator: str = option(". ", "Separator between the joined columns.")
    image: str | None = option(None, "Column with the paths or the bytes of images [image or file_name].")
    image_folder: str | None = option(
        None,
        "Folder to which the paths are relative [that of items]; or, without --image, folder of files named by "
        "item_id.",
    )
    audio: str | None = option(None, "Column with the paths or the bytes of sounds [audio].")
    audio_folder: str | None = option(None, "Like image_folder, for sounds.")
    video: str | None = option(None, "Column with the paths or the bytes of videos [video].")
    video_folder: str | None = option(None, "Like image_folder, for videos.")
    keep: list[str] | None = field(default=None, metadata={"help": "Further columns of items to keep [none]."})
    user_id: str = option("user_id", "Column of the interactions with the user ids.")
    interaction_item_id: str | None = option(
        None, "Column of the interactions with the item ids [as in items, or item_id]."
    )
    timestamp: str = option("timestamp", "Column of the interactions with the times: integers or dates.")
    timestamp_format: str | None = option(None, "Format of dates for strptime, e.g. %%d.%%m.%%Y [ISO 8601].")
    separator: str | None = option(
        None, "Character between the cells of CSV files [the most frequent one of the header]."
    )
    encoding: str = option("utf-8", "Encoding of CSV files.")
    drop: list[str] | None = field(
        default=None,
        metadata={"help": "Which wrong rows to leave out; otherwise they are an error.", "choices": tuple(DROPS)},
    )
    layout: str | None = option(
        None,
        "Read a published data set in this layout, instead of --items and --interactions.",
        choices=tuple(LAYOUTS),
    )
    folder: str | None = option(None, "Folder with the files of the published data set, as they were downloaded.")
    domain: str | None = option(None, "Which of several data sets in --folder, e.g. TN of NineRec.")
    language: Literal["en", "zh"] = option("en", "Language of the titles, if the data set has both.")
    modalities: list[str] | None = field(
        default=None,
        metadata={"help": "Which contents to read [all].", "choices": ("text", *KINDS)},
    )
    min_value: float | None = option(None, "Leave out interactions with a lower rating, or a lower watched share.")
    k_core: int = option(1, "Leave out users and items with fewer interactions, until all have this many.")
    json: bool = option(False, "Print what was done as JSON.")


class Sieve:
    """
    Which rows of one file are kept, how many were left out for which reason, and the list of files left out.

    Args:
        source (`str`): The file, for messages.
        num_rows (`int`): Number of rows of the file.
        drop (`Sequence[str]`): Which kinds of `DROPS` are left out rather than refused.
    """

    def __init__(self, source: str, num_rows: int, drop: Sequence[str]):
        self.source, self.drop = source, drop
        self.keep = np.ones(num_rows, dtype=bool)
        self.dropped: Counter[str] = Counter()
        self.defects: list[str] = []
        self.left_out = LeftOut()

    def sift(self, name: str, wrong: np.ndarray, label: Any = None) -> None:
        """Leave out the kept rows for which `wrong`, of shape `(rows,)`, is true, or note them as a defect."""
        rows = np.flatnonzero(wrong & self.keep)
        if name in self.drop:
            self.keep[rows] = False
            self.dropped[name] += len(rows)
        else:
            mend = f"Correct the file, or leave them out with --drop {name}"
            self.defects += describe(f"{len(rows)} {DROPS[name]}", rows, mend, label)

    def sift_files(self, name: str, kind: str, files: list[Any], bad: Mapping[int, str], ids: np.ndarray) -> None:
        """Leave out the files of the rows in `bad`, which gives the reasons, but not the rows; or note a defect."""
        if name in self.drop:
            self.dropped[name] += len(bad)
            for row, reason in bad.items():
                files[row] = None
                self.left_out.add(kind, str(ids[row]), reason)
        else:
            self.sift(name, np.isin(np.arange(len(files)), list(bad)), lambda row: f"item {ids[row]!r}: {bad[row]}")

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

    It renames columns, joins texts, adds images, turns dates into seconds since 1970 (UTC), and reads ids such as
    8881.0 as 8881. Wrong rows are an error that gives their numbers, unless --drop says to leave them out:

        guests undated unknown_items double_interactions double_items nameless_items empty_items missing_images
        damaged_images

    Double interactions are kept and counted, unless you drop them: users do buy things twice. All images, sounds and
    videos are decoded once. Those that are missing or damaged can be left out too; left_out.csv then lists them with
    the reason. The output folder is written as a whole.

    Published data sets are read in their own layout. Rows without the needed contents are left out, counted, and
    listed in a file:

        transrec prepare --layout ninerec --folder NineRec --domain TN --language en --output_dir tn

    docs/datasets.md lists the layouts.
    """
    (args,) = parse_arguments((PreparationArguments,), argv, prepare)
    needed = ("folder", "output_dir") if args.layout else ("items", "interactions", "output_dir")
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        raise DataError(f"give {' and '.join(f'--{name}' for name in missing)}")
    if args.layout and (args.items or args.interactions):
        raise DataError("--layout reads items and interactions from --folder: leave out --items and --interactions")
    folder = Path(args.output_dir)
    there = (
        [name for name in os.listdir(folder) if name.startswith(("items.", "interactions."))]
        if folder.is_dir()
        else []
    )
    if there:
        raise DataError(f"{folder}: already holds {there[0]}. Choose another --output_dir, or delete it.")

    done: dict[str, Any] = {"output_dir": args.output_dir, "dropped": {}, "float_ids": []}
    if args.layout:
        published = open_published(args.layout, args.folder, args.domain, args.language)
        options = {name: getattr(args, name) for name in ("text", "modalities", "min_value", "k_core")}
        with written_whole(folder) as partial:
            done |= write_published(published, partial, separator=args.text_separator, **options)
            catalogue, sequences = load_domain(partial)
    else:
        sieve, items = _items(args, done)
        known = items["item_id"][sieve.keep]
        interactions = _interactions(args, known, done)
        _sift_damaged(sieve, items)  # last, since it takes long
        done["dropped"] |= sieve.dropped
        if sieve.keep.sum() < len(known):
            interactions = _interactions(args, items["item_id"][sieve.keep], done)
        with written_whole(folder) as partial, _as_given(partial, args):
            _write_items(partial / "items.parquet", items, np.flatnonzero(sieve.keep).tolist())
            pa.parquet.write_table(interactions, partial / "interactions.parquet")
            sieve.left_out.write(partial)
            catalogue, sequences = load_domain(partial)
    done |= {
        "items": len(catalogue),
        **{f"items_with_{name}": int(catalogue.has(name).sum()) for name in ("text", *KINDS)},
        "interactions": len(sequences.items),
        "users": len(sequences),
        "users_with_three_or_more": int((sequences.lengths >= 3).sum()),
    }
    print(json.dumps(done, indent=2) if args.json else _describe(done))
    return done


@contextmanager
def _as_given(partial: Path, args: PreparationArguments) -> Iterator[None]:
    """Lets errors name the files that were given, because those in `partial` are deleted after an error."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for name in ("items", "interactions"):
            message = message.replace(printable(partial / f"{name}.parquet"), f"{getattr(args, name)}, as prepared")
        raise DataError(message) from error


def _column(table: pa.Table, name: str, option_name: str, source: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise DataError(
            f"{source}: there is no column {name!r} for --{option_name}. The columns are {table.column_names}."
        )
    return table[name]


def _repeated(values: Iterable[Any]) -> np.ndarray:
    """Whether each value occurred before, of shape `(n,)`."""
    seen: set[Any] = set()
    repeated = []
    for value in values:
        repeated.append(value in seen)
        seen.add(value)
    return np.array(repeated, dtype=bool)


def _items(args: PreparationArguments, done: dict[str, Any]) -> tuple[Sieve, dict[str, Any]]:
    """Which rows of the items are kept, and of all rows `item_id`, `text`, other contents and the columns to keep."""
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

    items: dict[str, Any] = {"item_id": ids, "text": texts}
    for name, kind in KINDS.items():
        items[name] = files = _files(args, table, name, ids)
        absent = {row: gone for row in np.flatnonzero(sieve.keep).tolist() if (gone := _absent(files[row]))}
        sieve.sift_files(f"missing_{kind}", kind, files, absent, ids)
    _sift_empty(sieve, items)
    return sieve, items | {name: _column(table, name, "keep", source).to_pylist() for name in args.keep or ()}


def _sift_empty(sieve: Sieve, items: Mapping[str, Any]) -> None:
    empty = [all(content is None for content in row) for row in zip(*(items[name] for name in CONTENTS), strict=True)]
    sieve.sift("empty_items", np.array(empty, dtype=bool), lambda row: repr(items["item_id"][row]))
    sieve.check()


def _sift_damaged(sieve: Sieve, items: Mapping[str, Any]) -> None:
    """Decode all files once."""
    for name, kind in KINDS.items():
        rows = [row for row in np.flatnonzero(sieve.keep).tolist() if items[name][row] is not None]
        bad: dict[int, str] = {}
        column = _of_files(items[name], FILE)
        for block in blocks(
            ({"row": row, "file": items[name][row]} for row in rows), ITEMS_AT_A_TIME, BYTES_AT_A_TIME
        ):
            files = pa.array([_each(row["file"], _as_struct) for row in block], column)
            bad |= {block[place]["row"]: reason for place, reason in damaged(name, files).items()}
        sieve.sift_files(f"damaged_{kind}", kind, items[name], bad, items["item_id"])
    _sift_empty(sieve, items)


def _files(args: PreparationArguments, table: pa.Table, name: str, ids: np.ndarray) -> list[Any]:
    """
    The files of a modality (a path, bytes, a list of them, or `None`), from a column or, without one, from a folder of
    files that are named by item id.
    """
    import datasets

    source, folder = str(args.items), getattr(args, f"{name}_folder")
    usual = (name, "file_name") if name == "image" else (name,)
    column = getattr(args, name) or next((other for other in usual if other in table.column_names), None)
    if column is None:
        named = media_of(Path(folder)) if folder else {}
        return [Path(named[item]) if item in named else None for item in ids]
    cells = _column(table, column, name, source)
    typed_files(datasets.Dataset(pa.table({name: cells})), name, f"{source} ({column!r})")
    place = Path(folder or Path(source).parent)

    def placed(file: Any) -> Any:
        file = file.get("bytes") or file.get("path") if isinstance(file, dict) else file
        return place / file if isinstance(file, str) and file else file or None

    return [
        [placed(part) for part in file] or None if isinstance(file, list) else placed(file)
        for file in cells.to_pylist()
    ]


def _interactions(args: PreparationArguments, item_ids: Sequence[str], done: dict[str, Any]) -> pa.Table:
    """The table of interactions whose items are known."""
    source = str(args.interactions)
    table = read_table(Path(source), args.separator, args.encoding)
    sieve = Sieve(source, len(table), args.drop or ())
    item_column = args.interaction_item_id or (args.item_id if args.item_id in table.column_names else "item_id")
    users, user_is_float = as_ids(_column(table, args.user_id, "user_id", source))
    items, item_is_float = as_ids(_column(table, item_column, "interaction_item_id", source))
    if (user_is_float or item_is_float) and source not in done["float_ids"]:
        done["float_ids"].append(source)
    column = _column(table, args.timestamp, "timestamp", source)
    times, undated, wrong = as_times(column, args.timestamp_format)
    sieve.sift("guests", pd.isna(users))
    sieve.sift("undated", undated)
    known = set(item_ids)
    unknown = np.array([item not in known for item in items.tolist()], dtype=bool)
    sieve.sift("unknown_items", unknown, lambda row: f"item {items[row]!r}")
    mend = "Give their format, e.g. --timestamp_format %d.%m.%Y"
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


def _absent(file: Any) -> str | None:
    """Why a cell cannot be read, if one of its files is not there."""
    parts = file if isinstance(file, list) else [file]
    return next((f"no file {part}" for part in parts if isinstance(part, Path) and not part.is_file()), None)


def _of_files(files: Sequence[Any], kind: pa.DataType) -> pa.DataType:
    """The type of a column of files: `kind`, or lists of it."""
    return pa.list_(kind) if any(isinstance(file, list) for file in files) else kind


def _each(file: Any, convert: Callable[[Any], Any]) -> Any:
    """A cell whose files are converted."""
    return [convert(part) for part in file] if isinstance(file, list) else convert(file)


def _as_struct(file: Path | bytes | None) -> dict[str, Any] | None:
    return {"path": str(file)} if isinstance(file, Path) else {"bytes": file} if file else None


def _as_bytes(file: Path | bytes | None) -> bytes | None:
    return file.read_bytes() if isinstance(file, Path) else file


def _write_items(path: Path, items: Mapping[str, Any], rows: Sequence[int]) -> None:
    """Write the items at `rows` part by part; the files of a part are read when it is written."""
    columns = {name: [values[row] for row in rows] for name, values in items.items()}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    kinds = {
        name: _of_files(values, pa.binary()) if name in KINDS else pa.array(values).type
        for name, values in columns.items()
    }
    schema = pa.schema(list(kinds.items()))
    bar = logging.tqdm(zip(*columns.values(), strict=True), desc="Writing items", total=len(rows), delay=2)

    def read(values: Iterable[Any]) -> dict[str, Any]:
        return {name: _each(value, _as_bytes) for name, value in zip(columns, values, strict=True)}

    with items_writer(path, schema) as writer:
        for block in blocks(map(read, bar), ITEMS_AT_A_TIME, BYTES_AT_A_TIME):
            writer.write_table(pa.Table.from_pylist(block, schema))


def _describe(done: dict[str, Any]) -> str:
    """What was done, as lines of text."""
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
    lines.append(f"  {done['users_with_three_or_more']:,} users have the three interactions that a split needs")
    return "\n".join(lines)
