"""From a published data set to a checked one: what cannot be used is left out, listed and counted."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from transformers.utils import logging

from ..errors import DataError, shortened
from .columns import MISSING_WORDS, missing_words
from .contents import READERS
from .media import KINDS
from .published import Published
from .reading import BLOCK


ITEMS_AT_A_TIME = 1000
BYTES_AT_A_TIME = 2**27


def write_published(
    published: Published,
    folder: Path,
    text: Sequence[str] | None = None,
    separator: str = ". ",
    modalities: Sequence[str] | None = None,
    min_value: float | None = None,
    k_core: int = 1,
) -> dict[str, Any]:
    """
    Write `items.parquet`, `interactions.parquet`, and a list of everything that was left out, `left_out.csv`.

    Files are read twice and never held in memory as a whole. Every image, sound and video is decoded before it is
    accepted; an item without any content is left out, together with its interactions.

    Args:
        published ([`Published`]): The data set.
        folder (`Path`): An empty folder.
        text (`list[str]`, *optional*): Fields that are joined to make the text; by default those of the layout.
        separator (`str`, *optional*, defaults to `". "`): Separator between the fields.
        modalities (`list[str]`, *optional*): The contents to read; all by default.
        min_value (`float`, *optional*): Interactions with a lower rating are left out.
        k_core (`int`, *optional*, defaults to 1): Users and items with fewer interactions are left out, repeatedly,
            until all have this many; this happens before items are read.

    Returns:
        `dict`: `dropped`, the number of things that were left out, by kind, and `notes`.

    Raises:
        [`DataError`]: If nothing is left, a field of the text does not exist, or `k_core` is below 1.
    """
    if k_core < 1:
        raise DataError(f"k_core must be 1 or more, got {k_core}")
    left_out, place = published.left_out, published.place
    has = (*(("text",) if published.text else ()), *published.media)
    if lacking := [name for name in modalities or () if name not in has]:
        raise DataError(
            f"{place}: there is no {' and no '.join(lacking)}. Name some of {list(has)} with --modalities."
        )
    log = _Log(published, min_value)
    users, wanted = log.core(k_core) if k_core > 1 else (None, log.items())
    if not wanted:
        rated = "" if min_value is None else f" and a rating of at least {min_value:g}"
        raise DataError(
            f"{place}: no interaction is left: none has a user, an item and a time{rated}{left_out.example()}. "
            "Check the files and options."
        )
    columns = [name for name in published.media if modalities is None or name in modalities]
    fields = list(text or published.text) if modalities is None or "text" in modalities else []
    items = _Items(published, wanted, fields, separator, columns)
    known = items.write(folder / "items.parquet")
    if not known:
        among = f" (such as {shortened(items.first)!r})" if items.first else ""
        raise DataError(
            f"{place}: no item is left: no item of the interactions (such as {shortened(min(wanted))!r}) is among the "
            f"items{among} with a title or a file that can be read{left_out.example()}. Check the files."
        )
    log.write(folder / "interactions.parquet", known, users)
    left_out.counts["items that no interaction names"] = items.unused
    left_out.write(folder)
    return {"dropped": dict(+left_out.counts), "notes": published.notes}


class _Log:
    """The interactions of a published data set, which can be read several times."""

    def __init__(self, published: Published, min_value: float | None):
        self.published, self.min_value = published, min_value
        self.counts = published.left_out.counts

    def _rows(self, what: str) -> Iterator[tuple[str, str, int | None, float | None]]:
        bar = logging.tqdm(desc=f"{what} interactions", unit=" rows", delay=2)
        least, number = self.min_value, 0
        for number, row in enumerate(self.published.interactions(), start=1):
            if number % BLOCK == 0:
                bar.update(BLOCK)
            if least is None or (row[3] is not None and row[3] >= least):
                yield row
        bar.close()

    def items(self) -> set[str]:
        """The ids of the items that occur in interactions."""
        return {item for _, item, _, _ in self._rows("Reading")}

    def core(self, k: int) -> tuple[set[str], set[str]]:
        """The `k`-core: users and items that each have at least `k` interactions among themselves."""
        names: tuple[dict[str, int], dict[str, int]] = ({}, {})
        codes = array("i"), array("i")
        for row in self._rows("Counting"):
            if row[0] and row[1] and row[2] is not None:
                for name, code, known in zip(row, codes, names, strict=False):
                    code.append(known.setdefault(str(name), len(known)))
        users, items = (np.frombuffer(code, dtype=np.int32) for code in codes)
        while len(users):
            keep = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
            if keep.all():
                break
            users, items = users[keep], items[keep]
        if not len(users):
            raise DataError(
                f"{self.published.place}: the {k}-core of the interactions is empty. Give a smaller --k_core."
            )
        kept_users, kept_items = (
            set(np.array(list(known), dtype=object)[np.unique(kept)].tolist())
            for kept, known in zip((users, items), names, strict=True)
        )
        return kept_users, kept_items

    def write(self, path: Path, known: set[str], users: set[str] | None) -> None:
        """Write the interactions of known items and users."""
        fields = (("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()))
        schema, rows = pa.schema(list(fields)), 0
        with pa.parquet.ParquetWriter(path, schema) as writer:
            for block in blocks(self._kept(known, users), BLOCK):
                columns = zip(*block, strict=True)
                arrays = [pa.array(column, kind) for column, (_, kind) in zip(columns, fields, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema))
                rows += len(block)
        if not rows:
            raise DataError(
                f"{self.published.place}: no interaction is left: none has a user, a time and an item that can be "
                f"used{self.published.left_out.example()}. Check the files."
            )

    def _kept(self, known: set[str], users: set[str] | None) -> Iterator[tuple[str, str, int]]:
        for user, item, time, _ in self._rows("Writing"):
            if item not in known:
                self.counts["interactions with an item that is not there"] += 1
            elif _is_missing(user):
                self.counts["interactions without a user"] += 1
            elif time is None:
                self.counts["interactions without a time"] += 1
            elif users is None or user in users:
                yield user, item, time


class _Items:
    """The wanted items of a published data set, with their contents."""

    def __init__(
        self, published: Published, wanted: set[str], fields: Sequence[str], separator: str, media: Sequence[str]
    ):
        self.published, self.wanted, self.fields, self.media = published, wanted, fields, media
        self.separator, self.left_out = separator, published.left_out
        self.unused, self.first = 0, ""

    def write(self, path: Path) -> set[str]:
        """Write the items part by part, and return their ids."""
        kinds = [("item_id", pa.string()), *([("text", pa.string())] if self.fields else [])]
        kinds += [(name, pa.binary()) for name in self.media]
        schema, written = pa.schema(kinds), set()
        with items_writer(path, schema) as writer:
            for block in blocks(self._read(), ITEMS_AT_A_TIME, BYTES_AT_A_TIME):
                table = pa.Table.from_pylist(block, schema=schema)
                for name in self.media:
                    table = table.set_column(table.schema.get_field_index(name), name, self._sound(table, name))
                shown = np.array([column.is_valid().to_numpy() for column in table.columns[1:]]).any(axis=0)
                for row in np.flatnonzero(~shown).tolist():
                    self.left_out.add("items", block[row]["item_id"], "neither a text nor a file that can be read")
                table = table.filter(pa.array(shown))
                writer.write_table(table)
                written |= set(table["item_id"].to_pylist())
        return written

    def _read(self) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        bar = logging.tqdm(desc="Reading items", total=len(self.wanted), delay=2)
        for item in self.published.items():
            name = item["item_id"]
            self.first = self.first or name
            if unknown := [field for field in self.fields if field not in item]:
                have = [field for field in item if field not in (*READERS, "item_id")]
                raise DataError(f"items have no field {unknown[0]!r}. Name some of {have} with --text.")
            if name not in self.wanted or _is_missing(name):
                self.unused += 1
                continue
            if name in seen:
                self.left_out.add("double items", name, "its first row is kept")
                continue
            seen.add(name)
            bar.update()
            yield {"item_id": name, "text": self._text(item), **{name: self._file(item, name) for name in self.media}}
        bar.close()
        self.left_out.counts["items that interactions name and that are not there"] = len(self.wanted - seen)

    def _text(self, item: dict[str, Any]) -> str | None:
        parts = [" ".join(item[field].split()) for field in self.fields if item[field]]
        words = missing_words(pa.array(parts, pa.string())) if parts else ()
        return (
            self.separator.join(part for part, is_word in zip(parts, words, strict=True) if part and not is_word)
            or None
        )

    def _file(self, item: dict[str, Any], name: str) -> bytes | None:
        if item[name] is None:
            return None
        try:
            return Path(item[name]).read_bytes()
        except OSError as error:
            self.left_out.add(KINDS[name], item["item_id"], f"cannot be read ({error.strerror})")
            return None

    def _sound(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        """A column of files, without the files that cannot be decoded."""
        column = table[name]
        files = [column.combine_chunks(), pa.nulls(len(table), pa.string())]
        bad = damaged(name, pa.StructArray.from_arrays(files, ["bytes", "path"]))
        for row, reason in bad.items():
            self.left_out.add(KINDS[name], table["item_id"][row].as_py(), reason)
        keep = np.ones(len(table), dtype=bool)
        keep[list(bad)] = False
        return pc.if_else(pa.array(keep), column, None)


def items_writer(file: str | os.PathLike, schema: pa.Schema) -> pa.parquet.ParquetWriter:
    """A Parquet writer without dictionaries and statistics of files, for which it would copy them several times."""
    plain = [name for name in schema.names if name not in KINDS]
    return pa.parquet.ParquetWriter(file, schema, use_dictionary=plain, write_statistics=plain)


def damaged(name: str, files: pa.Array) -> dict[int, str]:
    """
    Which files of a modality cannot be decoded, and why. `files` are structs of `bytes` and `path`, or lists of them.
    """
    import datasets

    return READERS[name](datasets.Dataset(pa.table({name: files})).with_format("arrow"), None).defects(full=True)


def _is_missing(name: str) -> bool:
    """Whether an id is a missing value."""
    return not name or name == "NA" or name.lower() in MISSING_WORDS


def blocks(rows: Iterable[Any], most: int, most_bytes: int | None = None) -> Iterator[list[Any]]:
    """Rows in lists of at most `most` rows, or of files of about `most_bytes` in total."""
    block: list[Any] = []
    size = 0
    for row in rows:
        block.append(row)
        if most_bytes is not None:
            size += _bytes_in(row)
        if len(block) == most or (most_bytes is not None and size >= most_bytes):
            yield block
            block, size = [], 0
    if block:
        yield block


def _bytes_in(value: Any) -> int:
    """The size of all files in a row."""
    if isinstance(value, (dict, list)):
        return sum(map(_bytes_in, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, bytes) else 0
