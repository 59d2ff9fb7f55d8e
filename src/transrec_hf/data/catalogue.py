"""The items of one platform: ids, contents, and policies that hide contents."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import MAX_EXAMPLES, BadContent, DataError, describe, raise_defects, shortened
from ..model.modalities_transrec import MODALITIES
from .columns import encode_ids, missing_words, warn_of_near_misses
from .contents import READERS, Content, whole_codes
from .media import FEATURES, typed_files
from .places import bad_table, open_source
from .reading import check_item_columns, read_items


if TYPE_CHECKING:
    import datasets
    import PIL.Image


MODALITY_POLICIES = ("both", *MODALITIES, "one_per_item")
ALWAYS_HASHED = ("text", "image")  # the modalities of the first version, whose hashes stay the same
EMPTY_ID = "Give these rows an id or delete them."


class Catalogue:
    """Items of one platform, in catalogue order; an item is addressed by its row 0..N-1.

    The constructor checks ids, texts, vectors, modalities and the headers of files;
    [`Catalogue.check_contents`] decodes every file.

    Args:
        items (`datasets.Dataset`):
            Columns `item_id` (string or integer) and at least one of `text` (string or null), `image` (`Image`
            feature, bytes, path, or null), `features` (list of numbers of one length, or null), and `audio` and
            `video` (like `image`). Further columns are kept.
        source (`str`, *optional*, defaults to `"catalogue"`):
            File, folder or Hub id, for messages.
        image_folder (`str`, *optional*):
            Folder to which the paths of files are relative. The files must be in this folder, with links resolved.
            Without it, paths may name any file.

    Attributes:
        item_ids (`np.ndarray` of shape `(N,)`, str): The id of every item.
        contents (`dict[str, Content]`): A reader for each modality that has a column, in the order of `MODALITIES`.

    Raises:
        [`DataError`]: For an empty catalogue, an empty or duplicate id, an item without any modality, or a content
            that cannot be used.
    """

    def __init__(
        self,
        items: datasets.Dataset,
        source: str = "catalogue",
        *,
        image_folder: str | os.PathLike | None = None,
    ) -> None:
        check_item_columns(items.column_names, source)
        if len(items) == 0:
            raise DataError(f"{source}: the catalogue is empty. Add at least one item.")
        self.source = source
        self._checked: set[str] = set()
        self._file_rows = np.arange(len(items))
        if "file_name" in items.column_names and "image" not in items.column_names:
            items = items.rename_column("file_name", "image")
        warn_of_near_misses(items.features.arrow_schema, source)
        items, item_ids, defects = _with_string_ids(items.with_format(None), source)
        self._bind(_with_typed_contents(items, source), item_ids)
        self.contents: dict[str, Content] = {}
        folder = None if image_folder is None else os.path.abspath(image_folder)
        rows_as_arrow = self.items.with_format("arrow")
        for name in MODALITIES:
            if name in self.items.column_names:
                try:
                    self.contents[name] = READERS[name](rows_as_arrow, folder)
                except BadContent as error:
                    defects.append(f"column {name!r} {error}")
        raise_defects(source, defects + self._defects())

    def _defects(self) -> list[str]:
        """The defects of the contents that can be found without decoding them."""
        empty = np.flatnonzero(~self.has_any())
        mend = f"Give them {_or(MODALITIES)}, or delete them and their interactions."
        lines = self._describe("items with no content", empty, mend)
        return lines + [line for name in self.contents for line in self._content_defects(name, full=False)]

    def _bind(self, items: datasets.Dataset, item_ids: np.ndarray) -> None:
        """Keep `items` and their ids."""
        self.items, self.item_ids = items, item_ids
        self._row_of = {item_id: row for row, item_id in enumerate(item_ids)}

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        counts = "".join(f", with_{name}={int(content.present.sum())}" for name, content in self.contents.items())
        return f"Catalogue({self.source!r}, items={len(self)}{counts})"

    def rows(self, item_ids: Iterable[str | int]) -> np.ndarray:
        """Catalogue rows, int64, of the given ids. Raises [`DataError`] for ids that are not in the catalogue."""
        wanted = [item_ids] if isinstance(item_ids, str) else [str(item_id) for item_id in item_ids]
        rows = self.find(wanted)
        unknown = [item_id for item_id, row in zip(wanted, rows, strict=True) if row < 0]
        if unknown:
            shown = [shortened(item_id) for item_id in unknown[:MAX_EXAMPLES]]
            raise DataError(
                f"{self.source}: {len(unknown)} unknown item ids: {shown}. "
                "Add them to the catalogue or leave them out."
            )
        return rows

    def find(self, item_ids: list[str]) -> np.ndarray:
        """Catalogue rows, int64, -1 for unknown ids."""
        return np.array([self._row_of.get(item_id, -1) for item_id in item_ids], dtype=np.int64)

    def has(self, name: str) -> np.ndarray:
        """Which items have the modality `name` (and no policy hides it), `(N,)` bool."""
        return self.contents[name].present if name in self.contents else np.zeros(len(self), dtype=bool)

    def has_any(self, names: Iterable[str] = tuple(MODALITIES)) -> np.ndarray:
        """Which items have at least one of the modalities, `(N,)` bool."""
        return np.logical_or.reduce([self.has(name) for name in names])

    @property
    def has_text(self) -> np.ndarray:
        """Which items have a text, `(N,)` bool."""
        return self.has("text")

    @property
    def has_image(self) -> np.ndarray:
        """Which items have an image, `(N,)` bool."""
        return self.has("image")

    def read(self, row: int, names: Iterable[str] = tuple(MODALITIES), **form: Any) -> dict[str, Any]:
        """The contents of an item, by modality, in the form that a processor needs (see [`TransRecProcessor.form`]).

        Raises [`DataError`] with source, row and item id when a content cannot be decoded.
        """
        return {name: self._content(name, row, **form) for name in names if self._shows(name, row)}

    def _shows(self, name: str, row: int) -> bool:
        return name in self.contents and self.contents[name].present[row]

    def _content(self, name: str, row: int, encoded: bool = False, **form: Any) -> Any:
        """One content of an item, or its bytes."""
        content = self.contents[name]
        try:
            return content.encoded(row) if encoded else content.read(row, **form)
        except BadContent as error:
            defects = self._describe(f"unusable {name}", [row], content.mend, {row: str(error)})
            raise DataError(f"{self.source}: {defects[0]}") from error

    def text(self, row: int) -> str | None:
        """The text of an item, `None` if it has none or the policy hides it."""
        return self._content("text", row) if self._shows("text", row) else None

    def image(self, row: int) -> PIL.Image.Image | None:
        """The image of an item, RGB and upright (EXIF), `None` if it has none or the policy hides it."""
        return self._content("image", row) if self._shows("image", row) else None

    def encoded(self, name: str, row: int) -> bytes | None:
        """The bytes of a content, as they are hashed and published; `None` if the item does not have this modality."""
        return self._content(name, row, encoded=True) if self._shows(name, row) else None

    def encoded_image(self, row: int) -> bytes:
        """The bytes of the image file of an item, not decoded."""
        return self.contents["image"].encoded(row)

    def check_contents(self, modalities: Collection[str] = tuple(MODALITIES)) -> None:
        """
        Decode every file once, in threads. A second call does nothing.

        Args:
            modalities (`Collection[str]`, *optional*): The modalities to decode; all by default.

        Raises:
            [`DataError`]: If files cannot be decoded; the message names the first ones.
        """
        files = FEATURES.keys() & set(modalities) - self._checked
        left = [name for name in self.contents if name in files]
        raise_defects(self.source, [line for name in left for line in self._content_defects(name, full=True)])
        self._checked = self._checked.union(left)

    def _content_defects(self, name: str, full: bool) -> list[str]:
        content = self.contents[name]
        bad = content.defects(full)
        return self._describe(f"unusable {name}", sorted(bad), content.mend, bad)

    def check_codes(self, num_codebooks: int, codebook_size: int) -> None:
        """Check that a model can read the codes: `num_codebooks` for each item, from 0 to below `codebook_size`."""
        codes: Any = self.contents["codes"]
        if codes.size != num_codebooks:
            raise DataError(
                f"{self.source}: items have {codes.size} codes, but this model reads {num_codebooks}. Make them with "
                "the quantizer of its training: transrec codes --quantizer."
            )
        large = np.flatnonzero(codes.largest >= codebook_size)
        reasons = {row: f"code {codes.largest[row]}, of 0 to {codebook_size - 1}" for row in large.tolist()}
        raise_defects(self.source, self._describe("codes out of range", large.tolist(), codes.mend, reasons))

    def _describe(self, what: str, rows: Any, mend: str, reasons: Mapping[int, str] | None = None) -> list[str]:
        """The lines of a message for defects of catalogue rows, with the row numbers of the file."""
        labels = {}
        for row in rows[:MAX_EXAMPLES]:
            reason = f": {reasons[row]}" if reasons else ""
            labels[int(self._file_rows[row])] = f"item_id {shortened(self.item_ids[row])!r}{reason}"
        return describe(what, self._file_rows[rows], mend, labels.__getitem__)

    def require(self, modalities: Collection[str]) -> None:
        """Check that a model which reads `modalities` can represent every item: each must have one of them.

        A tower without any input is not an error: a model of texts and images may serve a catalogue of texts. A model
        that reads no content (the ID baseline) is not an error either. Raises [`DataError`].
        """
        wanted = [modality for modality in MODALITIES if modality in modalities]
        if not wanted:
            return
        lost = np.flatnonzero(~self.has_any(wanted))
        words = _or(wanted)
        if len(lost) == len(self):
            raise DataError(
                f"{self.source}: no item has {words}. Use a model or policy for the modalities that the items have."
            )
        how = f"--modality {words}; in Python `keep_items`" if len(wanted) == 1 else "`keep_items`"
        mend = f"Leave them out ({how}), or use another modality too."
        raise_defects(self.source, self._describe(f"{len(lost)} of {len(self)} items have no {words}", lost, mend))

    def with_policy(self, modality_policy: str, seed: int = 0) -> Catalogue:
        """The same items, with modalities hidden as the policy says.

        Args:
            modality_policy (`str`):
                `"both"` hides nothing, the name of a modality hides all others, `"one_per_item"` keeps one modality of
                every item, drawn evenly from those it has.
            seed (`int`, *optional*, defaults to 0):
                Seed of the draw for `"one_per_item"`.

        Raises:
            [`DataError`]: For an unknown policy, or when an item would be left with no modality.
        """
        if modality_policy not in MODALITY_POLICIES:
            raise DataError(f"unknown modality_policy {modality_policy!r}. Use one of {', '.join(MODALITY_POLICIES)}.")
        if modality_policy == "both":
            return self
        present = np.stack([self.has(name) for name in MODALITIES])
        if modality_policy in MODALITIES:
            self.require([modality_policy])
            kept = list(MODALITIES).index(modality_policy)
        else:
            draw = np.random.default_rng(seed).random(len(self)) * present.sum(axis=0)
            kept = (present.cumsum(axis=0) > draw).argmax(axis=0)
        other = copy.copy(self)
        other.contents = {name: copy.copy(content) for name, content in self.contents.items()}
        for index, name in enumerate(MODALITIES):
            if name in other.contents:
                other.contents[name].present = present[index] & (kept == index)
        return other

    def with_codes(self, codes: np.ndarray) -> Catalogue:
        """
        The same items with these codes, `(N, num_codebooks)`, instead of any they have. Raises [`DataError`] if they
        are not whole numbers from 0 to 65,535 for each item.
        """
        codes = whole_codes(codes)
        if len(codes) != len(self):
            raise DataError(f"{len(codes)} rows of codes for {len(self)} items: give one for each item")
        column = pa.array(codes.tolist(), pa.list_(pa.int32()))
        items = self.items.remove_columns([name for name in ("codes",) if name in self.items.column_names])
        other = copy.copy(self)
        other.items = items.add_column("codes", column)
        other.contents = {**self.contents, "codes": READERS["codes"](other.items.with_format("arrow"), None)}
        return other

    def select(self, rows: np.ndarray) -> Catalogue:
        """The items at `rows` (indices or a boolean mask), in that order."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        if len(rows) == 0:
            raise DataError(f"{self.source}: no item is left. Select at least one.")
        other = copy.copy(self)
        other._bind(self.items.select(rows), self.item_ids[rows])
        other.contents = {name: content.select(rows) for name, content in self.contents.items()}
        other._file_rows = self._file_rows[rows]
        return other

    def item_hashes(self) -> np.ndarray:
        """The hash of the contents of each item, `(N, 16)` uint8; it depends on neither file format nor order."""
        hashes = np.empty((len(self), 16), dtype=np.uint8)
        shown = [(name.encode(), name, self.has(name)) for name in self.contents]
        for row in range(len(self)):
            digest = hashlib.blake2b(digest_size=16)
            for key, name, has in shown:
                if has[row]:
                    part = self._content(name, row, encoded=True)
                    digest.update(b"%s %d:" % (key, len(part)))
                    digest.update(part)
            hashes[row] = np.frombuffer(digest.digest(), dtype=np.uint8)
        return hashes

    def content_hash(self) -> str:
        """SHA-256 over ids and visible contents, in catalogue order; it does not depend on the file format."""
        digest = hashlib.sha256()

        def add(part: bytes | None) -> None:
            digest.update(b"-" if part is None else b"%d:" % len(part))
            digest.update(part or b"")

        hashed = [name for name in MODALITIES if name in self.contents or name in ALWAYS_HASHED]
        shown = [(name, self.has(name)) for name in hashed]
        for row, item_id in enumerate(self.item_ids):
            add(item_id.encode())
            for name, has in shown:
                add(self._content(name, row, encoded=True) if has[row] else None)
        return digest.hexdigest()


def _or(names: Iterable[str]) -> str:
    """`a, b or c`"""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _with_string_ids(items: datasets.Dataset, source: str) -> tuple[datasets.Dataset, np.ndarray, list[str]]:
    """Items with `item_id` as strings, the ids as an array of `str`, and the defects of the ids."""
    column = items.select_columns("item_id").with_format("arrow")[:]["item_id"]
    codes, values = encode_ids(column, "item_id", source)
    defects = describe("empty item_id", np.flatnonzero(codes < 0), EMPTY_ID)
    ids = np.append(values.to_numpy(zero_copy_only=False), "")[codes]  # the appended one is for code -1

    def label(row: int) -> str:
        return repr(shortened(ids[row]))

    words = np.flatnonzero(np.append(missing_words(values), False)[codes])
    defects += describe("item_id that is a missing value written as a word", words, EMPTY_ID, label)
    rows = np.flatnonzero((np.bincount(codes + 1)[codes + 1] > 1) & (codes >= 0))
    defects += describe("duplicate item_id", rows, "Keep one row for every item.", label)
    if not pa.types.is_string(column.type):
        items = items.remove_columns("item_id").add_column("item_id", pa.array(ids, pa.string()))
    return items, ids, defects


def _with_typed_contents(items: datasets.Dataset, source: str) -> datasets.Dataset:
    """Items with files as undecoded features; a content column that holds only nulls or NaN is dropped."""
    for name in set(MODALITIES) & set(items.column_names):
        kind = items.features.arrow_schema.field(name).type
        column = items.select_columns(name).with_format("arrow")[:][name] if pa.types.is_floating(kind) else None
        if pa.types.is_null(kind) or (column is not None and pc.all(pc.is_null(column, nan_is_null=True)).as_py()):
            items = items.remove_columns(name)
        elif name in FEATURES:
            items = typed_files(items, name, source)
    return items


def load_catalogue(
    source: Any,
    *,
    revision: str | None = None,
    split: str | None = None,
    image_folder: str | os.PathLike | None = None,
    modality_policy: str = "both",
    seed: int = 0,
) -> Catalogue:
    """Read and validate a catalogue.

    Args:
        source (`str`, `os.PathLike`, `datasets.Dataset` or table):
            A `.parquet`, `.csv`, `.tsv` or `.jsonl` file (CSV may be separated by commas, semicolons, tabs or bars), a
            folder with `items.*` or `metadata.jsonl`, a data set object, a DataFrame, an Arrow table, a dictionary of
            columns, a list of dictionaries, or the id of a Hub data set with a configuration `items`. Column `image`
            or `file_name` is the path of an image, relative to the file.
        revision (`str`, *optional*):
            Revision of the Hub data set.
        split (`str`, *optional*):
            Which split of a data set that has several; `"train+test"` joins two.
        image_folder (`str` or `os.PathLike`, *optional*):
            Folder to which image paths are relative, and which must contain the files; by default the folder of the
            file. A data set of the Hub can name only files of its own repository.
        modality_policy (`str`, *optional*, defaults to `"both"`), seed (`int`, *optional*, defaults to 0):
            See [`Catalogue.with_policy`].

    Raises:
        [`DataError`]: If the catalogue has a defect.
    """
    place = open_source(source, "items", revision, split)
    with bad_table(place.name):
        items = read_items(place)
        catalogue = Catalogue(items, place.name, image_folder=place.folder if image_folder is None else image_folder)
    return catalogue.with_policy(modality_policy, seed)
