"""
Published data sets as they are downloaded: finding their files, and reading them row by row, whatever their size.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, one_line, printable, shortened
from .media import KINDS


OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open}
DEEPEST = 3
"""Depth of the folders that are searched for files."""
MEDIA_FOLDER = re.compile("cover|image|poster|video|audio|preview|frame", re.IGNORECASE)
"""Names of folders with one file for each item, which are not searched for other files."""
SAMPLE = 10_000
"""Rows of a file without a header that are used to recognise its columns."""
LEFT_OUT_NAME = "left_out.csv"
MOST_LISTED = 100_000
SECONDS = range(946_684_800, 4_102_444_800)  # of the years 2000 to 2099


class LeftOut:
    """What was left out of a data set, and why; each once, and counted."""

    def __init__(self) -> None:
        self.listed: dict[tuple[str, str], str] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, name: str, reason: str) -> None:
        """Note one thing that is left out. `kind` is a plural such as `images`; `name` is the id or the row."""
        if (kind, name) not in self.listed:
            self.counts[kind] += 1
            if len(self.listed) < MOST_LISTED:
                self.listed[kind, name] = reason

    def write(self, folder: Path) -> None:
        """Write the list as `left_out.csv`, unless it is empty."""
        if self.listed:
            with open(folder / LEFT_OUT_NAME, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("kind", "name", "reason"))
                writer.writerows((kind, name, reason) for (kind, name), reason in self.listed.items())

    def example(self) -> str:
        """The first thing that was left out, to go on with a sentence; nothing if there is none."""
        (_, name), reason = next(iter(self.listed.items()), (("", ""), ""))
        return f" ({shortened(name, 100)}: {shortened(reason, 100)})" if name else ""


@dataclass
class Published:
    """
    A published data set that was not read yet. Its items and interactions can be read several times, each time from
    the beginning.

    Args:
        items (`Callable`): Returns an iterator over items: dictionaries of `item_id`, text fields, and paths of media.
        interactions (`Callable`): Returns an iterator over interactions: user, item, time and rating (time and rating
            are `None` if unknown).
        text (`tuple[str, ...]`): The default fields for the text of an item.
        media (`tuple[str, ...]`): The modalities that have files.
        notes (`list[str]`): Facts that were found out about the files.
        left_out ([`LeftOut`]): Rows that cannot be read.
        place (`str`): The folder of the files, for messages.
    """

    items: Callable[[], Iterator[dict[str, Any]]]
    interactions: Callable[[], Iterator[tuple[str, str, int | None, float | None]]]
    text: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    place: str = ""


class Parts:
    """
    The files of a published data set, found by patterns of their names.

    Args:
        folder (`str`): The folder; files may be in its subfolders.
        layout (`str`): Name of the layout, for messages.

    Raises:
        [`DataError`]: If the folder does not exist.
    """

    def __init__(self, folder: str | os.PathLike, layout: str):
        self.root, self.layout = Path(folder), layout
        if not self.root.is_dir():
            raise DataError(f"{printable(folder)}: no such folder (now in {os.getcwd()}). Check the path.")
        self.notes: list[str] = []
        self.left_out = LeftOut()
        self._missing: list[str] = []
        self._files: list[Path] = []
        self._folders: list[Path] = []
        self._walk(self.root, 0)

    def _walk(self, folder: Path, depth: int) -> None:
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                self._files.append(entry)
            elif entry.is_dir() and depth < DEEPEST:
                self._folders.append(entry)
                if not MEDIA_FOLDER.search(entry.name):
                    self._walk(entry, depth + 1)

    def files(self, *patterns: str) -> list[Path]:
        """Files whose names match, compressed or not, those of the first pattern first."""
        return [
            file for pattern in patterns for file in self._files if fnmatch(name_of(file).lower(), pattern.lower())
        ]

    def folder(self, *patterns: str) -> Path | None:
        """The first folder whose name matches."""
        found = [place for pattern in patterns for place in self._folders if fnmatch(place.name.lower(), pattern)]
        return found[0] if found else None

    def need(self, what: str, *patterns: str) -> Path:
        """The first file that matches; if there is none, this is noted for [`Parts.check`]."""
        found = self.files(*patterns)
        if not found:
            self.miss(f"{what} ({' or '.join(patterns)})")
        return found[0] if found else self.root

    def miss(self, what: str) -> None:
        """Note a missing file."""
        self._missing.append(what)

    def check(self) -> None:
        """Raise one [`DataError`] for all missing files."""
        if self._missing:
            there = [printable(path.relative_to(self.root)) for path in (*self._folders, *self._files)[:8]]
            raise DataError(
                f"{printable(self.root)}: files of {self.layout} are missing: {'; '.join(self._missing)}. "
                f"Found {there}. Download the missing files to this folder, or name another folder."
            )

    def choose(self, names: Iterable[str], chosen: str | None) -> str:
        """One of several data sets in the folder. Raises [`DataError`] if `chosen` does not name one."""
        found = sorted(set(names))
        if chosen is None and len(found) == 1:
            return found[0]
        if chosen in found:
            return str(chosen)
        if not found:
            self.check()
            raise DataError(f"{printable(self.root)}: there are no files of {self.layout}. Name another folder.")
        raise DataError(f"{printable(self.root)}: holds {', '.join(found)}. Name one with --domain, not {chosen}.")

    def published(self, items: Callable, interactions: Callable, text: Sequence[str], **media: Any) -> Published:
        """The data set; `media` holds the files that [`media_of`] found for each modality."""
        found = tuple(name for name, files in media.items() if files)
        for name in media.keys() - {*found}:
            self.notes.append(f"no {KINDS[name]}: there is no folder of files named by item (unpack archives)")

        def with_media() -> Iterator[dict[str, Any]]:
            for item in items():
                yield {**item, **{name: media[name].get(item["item_id"]) for name in found}}

        place = printable(self.root)
        return Published(with_media, interactions, tuple(text), found, self.notes, self.left_out, place)


def name_of(path: Path) -> str:
    """The name of a file without the suffix of its compression."""
    return re.sub(r"\.(gz|bz2)$", "", path.name)


def no_rows(path: Path) -> DataError:
    """The error for a file in which nothing is written."""
    return DataError(f"{printable(path)}: has no rows. Download it again.")


def media_of(folder: Path | None) -> dict[str, str]:
    """The paths of the files in a folder and its subfolders, by name without suffix, which is the id of an item."""
    found: dict[str, str] = {}
    for entry in os.scandir(folder) if folder else ():
        inside = os.scandir(entry.path) if entry.is_dir() else (entry,)
        found |= {Path(file.name).stem: file.path for file in inside if not file.name.startswith(".")}
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{printable(path)}: is not UTF-8 ({error.reason}). Convert it, for example with iconv."
        ) from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read ({one_line(error)}). Download it again.") from error


def lines_of(path: Path, encoding: str = "utf-8-sig") -> Iterator[str]:
    """The lines of a text file, compressed or not."""
    with _readable(path), OPENERS.get(path.suffix, open)(path, "rt", encoding=encoding, newline="") as file:
        yield from file


def encoding_of(path: Path) -> str:
    """The encoding of a file: UTF-8, or Latin-1 if it is not UTF-8."""
    try:
        for _ in lines_of(path):
            pass
    except DataError:
        return "latin-1"
    return "utf-8-sig"


def cells_of(path: Path, delimiter: str = ",", encoding: str = "utf-8-sig") -> Iterator[list[str]]:
    """The cells of each row that is not blank; cells may be quoted only in comma-separated files."""
    lines = lines_of(path, encoding)
    if delimiter == ",":
        with _readable(path):
            yield from (row for row in csv.reader(lines) if row)
    else:
        for line in lines:
            if line := line.rstrip("\r\n"):
                yield line.split(delimiter)


@dataclass
class Table:
    """A file of rows with known columns."""

    path: Path
    delimiter: str
    columns: dict[str, int]
    has_header: bool
    left_out: LeftOut
    encoding: str = "utf-8-sig"

    def __iter__(self) -> Iterator[dict[str, str]]:
        """
        The cells of each row by column name; rows that lack a cell are left out. Raises [`DataError`] if there is no
        row.
        """
        number, width, columns = 0, max(self.columns.values()) + 1, self.columns.items()
        rows = cells_of(self.path, self.delimiter, self.encoding)
        for number, row in enumerate(islice(rows, int(self.has_header), None), start=1):
            if len(row) < width:
                reason = f"{len(row)} cells instead of {width}"
                self.left_out.add("rows", f"{self.path.name}, row {number}", reason)
                continue
            yield {name: row[place] for name, place in columns}
        if not number:
            raise no_rows(self.path)


def open_table(
    parts: Parts,
    path: Path,
    names: Mapping[str, Sequence[str]],
    order: Sequence[str] = (),
    delimiter: str | None = None,
    known: Container[str] = (),
    encoding: str = "utf-8-sig",
) -> Table:
    """
    Open a file with or without a header.

    Args:
        parts ([`Parts`]): The files of the data set, which get notes on this file.
        path (`Path`): The file.
        names (`dict[str, list[str]]`): The names that each column may have in a header.
        order (`list[str]`, *optional*): The published order of the columns of a file without a header.
        delimiter (`str`, *optional*): Character between cells; by default a tab if the first line has one, otherwise a
            comma.
        known (`Container[str]`, *optional*): Ids of items, which help to recognise the columns of a file without a
            header.

    Raises:
        [`DataError`]: If the file is empty, or has no header and the order of its columns cannot be recognised.
    """
    if delimiter is None:
        delimiter = "\t" if "\t" in next(lines_of(path, encoding), "") else ","
    first = [cell.strip().lower() for cell in next(cells_of(path, delimiter, encoding), [])]
    if not first:
        raise no_rows(path)
    columns = {
        name: first.index(alias) for name, aliases in names.items() for alias in aliases[::-1] if alias in first
    }
    table = functools.partial(Table, path, delimiter, left_out=parts.left_out, encoding=encoding)
    if columns.keys() >= set(order or names):
        return table(columns=columns, has_header=True)
    if not order:
        missing = [f"{name} ({' or '.join(aliases)})" for name, aliases in names.items() if name not in columns]
        raise DataError(
            f"{printable(path)}: has no column {', '.join(missing)}; found {shortened(first, 300)}. Download it again."
        )
    sample = [
        [cell.strip() for cell in row]
        for row in islice(cells_of(path, delimiter, encoding), SAMPLE)
        if len(row) == len(order)
    ]
    if not sample or (known and not any(cell in known for row in sample for cell in row)):
        line = shortened(next(lines_of(path, encoding), "").strip(), 100)
        raise DataError(
            f"{printable(path)}: none of its first rows has {len(order)} cells ({', '.join(order)}) of which one is "
            f"the id of an item; the first one is {line!r}. Download it again, or write the names of its columns in "
            "the first line."
        )
    if known:
        found = _told_apart(path, sample, order, known)
    else:
        found = dict(zip(order, range(len(order)), strict=True))
    in_order = ", ".join(sorted(found, key=found.__getitem__))
    how = "recognised by their cells" if known else "in the published order"
    parts.notes.append(f"{path.name}: no header; its columns are {in_order}, {how}")
    return table(columns=found, has_header=False)


def _told_apart(
    path: Path, sample: Sequence[Sequence[str]], order: Sequence[str], known: Container[str]
) -> dict[str, int]:
    """
    The columns, recognised by their cells: items are known, times are of this century, ratings are small. Where users
    have ids like those of items, items are the column with more of them, because such users are fewer than items.
    """
    left, cells = list(range(len(order))), list(zip(*sample, strict=True))
    share = [sum(cell in known for cell in column) / len(sample) for column in cells]
    found = {}
    for name, fits in (("timestamp", _is_time), ("value", _is_rating)):
        if name in order:
            fitting = [column for column in left if 2 * sum(map(fits, cells[column])) > len(sample)]
            if not fitting:
                raise DataError(
                    f"{printable(path)}: none of its columns is a {name}; the first row is "
                    f"{shortened(','.join(sample[0]), 100)!r}. Download it again, or write the names of its columns "
                    "in the first line."
                )
            published = order.index(name)
            found[name] = published if published in fitting else min(fitting, key=share.__getitem__)
            left.remove(found[name])
    published = order.index("item")
    found["item"] = max(left, key=lambda n: (round(share[n], 2), len({*cells[n]}), n == published))
    left.remove(found["item"])
    return {**found, "user": left[0]}


def _is_time(cell: str) -> bool:
    time = time_of(cell)
    return time is not None and (time in SECONDS or time // 1000 in SECONDS)


def _is_rating(cell: str) -> bool:
    return re.fullmatch(r"\d(\.\d+)?", cell) is not None


def json_lines(path: Path, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object on each line. Raises [`DataError`] if it has none."""
    found = False
    for number, line in enumerate(lines_of(path), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            if not found and number > 100:
                break
            left_out.add("rows", f"{path.name}, line {number}", f"not JSON ({one_line(error)})")
            continue
        found = True
        yield row
    if not found:
        raise DataError(
            f"{printable(path)}: does not hold one JSON object on each line. Download the file of another year or "
            "format."
        )


@functools.lru_cache(maxsize=2**16)
def seconds_of(text: str, form: str | None = None) -> int | None:
    """Seconds since 1970 of a time (in UTC, unless it names a time zone); `None` if the text is not a time."""
    try:
        time = datetime.strptime(text, form) if form else datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return int((time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp())


def number_of(text: Any) -> float | None:
    """A number, or `None` if the value is not a number."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < 2**53 else None


def time_of(text: str) -> int | None:
    """A time that is written as a number or as a date; `None` if the text is neither."""
    number = number_of(text)
    return seconds_of(text) if number is None else int(number)
