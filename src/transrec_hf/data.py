"""Catalogue and interactions: reading, validation, splits and statistics.

A domain is two tables. `items` holds `item_id` and at least one of `text` and `image`; `interactions` holds `user_id`,
`item_id` and an integer `timestamp`. Both come from Parquet, CSV, JSONL, a folder of images with `metadata.jsonl`, a
`datasets.Dataset` or a data set of the Hub (configurations `items` and `interactions`).

Images stay encoded, in memory-mapped Arrow or in their files, until [`Catalogue.image`] decodes one. Interactions are
flat NumPy columns, memory-mapped where they are long; users are views on them. Every defect is a [`DataError`] that
names the source, the rows (data rows counted from 1, a CSV header is not counted) or ids, and the mend.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.compute as pc
import torch.utils.data
from transformers.utils import cached_file, logging

from .data_reading import (
    BLOCK,
    MAX_EXAMPLES,
    MODALITIES,
    DataError,
    Defects,
    check_columns,
    describe,
    encode_ids,
    open_source,
    raise_defects,
    read_interactions,
    read_items,
    read_timestamps,
)
from .hub import hub_errors, pinned
from .tokens import CatalogueTokens


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

MODALITY_POLICIES = ("both", "text", "image", "one_per_item")
MAX_IMAGE_PIXELS = 64_000_000
"""Largest width x height that is decoded; a header that claims more is refused before any pixel is read."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IN_MEMORY = 2**22
"""Interactions up to which their columns are held in memory; longer ones are in temporary files."""
STATISTICS_NAME = "data_statistics.json"
_EMPTY_ID = "Give these rows an id or delete them."


class _BadImage(Exception):
    """Why one image cannot be used."""


# --------------------------------------------------------------------------------------------------------------------
# Catalogue
# --------------------------------------------------------------------------------------------------------------------


class Catalogue:
    """Items of one platform, in catalogue order; an item is addressed by its row 0..N-1.

    The constructor checks ids, text, modalities and image headers; [`Catalogue.check_images`] decodes every image.

    Args:
        items (`datasets.Dataset`):
            Columns `item_id` (string or integer), `text` (string or null) and `image` (`Image` feature, bytes, path,
            or null). One of the last two may be missing; further columns are kept.
        source (`str`, *optional*, defaults to `"catalogue"`):
            File, folder or Hub id, for messages.
        has_text, has_image (`np.ndarray` of shape `(N,)` and type bool, *optional*):
            Masks that hide a modality of an item.
        image_folder (`str`, *optional*):
            Folder that image paths are relative to, and which they must not leave.

    Raises:
        [`DataError`]: on an empty catalogue, an empty or duplicate id, an item without any modality, or an image whose
        header cannot be read or claims more than `MAX_IMAGE_PIXELS`.
    """

    def __init__(
        self,
        items: datasets.Dataset,
        source: str = "catalogue",
        *,
        has_text: np.ndarray | None = None,
        has_image: np.ndarray | None = None,
        image_folder: str | os.PathLike | None = None,
    ) -> None:
        check_columns(items.column_names, source, ("item_id",), MODALITIES)
        if len(items) == 0:
            raise DataError(f"{source}: the catalogue is empty. Add at least one item.")
        self.source = source
        self.image_folder = None if image_folder is None else os.path.abspath(image_folder)
        self._file_rows = np.arange(len(items))
        items, item_ids, defects = _with_string_ids(items.with_format(None), source)
        self._bind(_with_typed_content(items, source), item_ids)
        text, text_defects = _text_mask(self._texts, len(items))
        image = _image_mask(self._rows_as_arrow, len(items))
        self.has_text = text if has_text is None else text & has_text
        self.has_image = image if has_image is None else image & has_image
        empty = np.flatnonzero(~(self.has_text | self.has_image))
        mend = "Give them text or an image, or delete them and their interactions."
        defects += text_defects + self._describe("items with neither text nor image", empty, mend)
        raise_defects(source, defects + self._image_defects(full=False))

    def _bind(self, items: datasets.Dataset, item_ids: np.ndarray) -> None:
        """Hold `items` and the ways into it; none copies an image."""
        self.items, self.item_ids = items, item_ids
        self._row_of = {item_id: row for row, item_id in enumerate(item_ids)}
        self._rows_as_arrow = items.with_format("arrow")
        self._tokens: CatalogueTokens | None = None
        self._texts = None
        if "text" in items.column_names:
            texts = items.select_columns("text").with_format("arrow")[:]
            slivers = texts["text"].num_chunks > 1 + len(items) // 100  # a selection comes as one per row
            self._texts = (texts.combine_chunks() if slivers else texts)["text"]

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        text, image = int(self.has_text.sum()), int(self.has_image.sum())
        return f"Catalogue({self.source!r}, items={len(self)}, with_text={text}, with_image={image})"

    def rows(self, item_ids: Iterable[str | int]) -> np.ndarray:
        """Catalogue rows, int64, of the given ids. Raises [`DataError`] for ids that are not in the catalogue."""
        wanted = [item_ids] if isinstance(item_ids, str) else [str(item_id) for item_id in item_ids]
        rows = self._find(wanted)
        unknown = [item_id for item_id, row in zip(wanted, rows, strict=True) if row < 0]
        if unknown:
            raise DataError(
                f"{self.source}: {len(unknown)} unknown item ids: {unknown[:MAX_EXAMPLES]}. "
                "Add them to the catalogue or leave them out."
            )
        return rows

    def _find(self, item_ids: list[str]) -> np.ndarray:
        """Catalogue rows, int64, -1 for unknown ids."""
        return np.array([self._row_of.get(item_id, -1) for item_id in item_ids], dtype=np.int64)

    def text(self, row: int) -> str | None:
        """Text of an item, `None` where it has none or the policy hides it."""
        return self._texts[int(row)].as_py() if self.has_text[row] and self._texts is not None else None

    def tokens(self, tokenizer: Any, max_length: int) -> CatalogueTokens:
        """Token ids of all texts, each cut after `max_length` tokens. They are kept until another tokenizer asks."""
        if self._tokens is None or not self._tokens.are_of(tokenizer, max_length):
            self._tokens = CatalogueTokens(self, tokenizer, max_length)
        return self._tokens

    def image(self, row: int) -> PIL.Image.Image | None:
        """Image of an item, RGB and upright (EXIF), `None` where it has none or the policy hides it.

        Raises [`DataError`] with source, row and item id when the image cannot be decoded.
        """
        if not self.has_image[row]:
            return None
        try:
            return self._decode(row)
        except _BadImage as error:
            defects = self._describe("unusable image", [row], "Replace or delete it.", {row: str(error)})
            raise DataError(f"{self.source}: {defects[0]}") from error

    def encoded_image(self, row: int) -> bytes:
        """The bytes of an item's image as they are in the file, not decoded."""
        encoded = self._encoded(row)
        return Path(encoded).read_bytes() if isinstance(encoded, str) else encoded.to_pybytes()

    def _encoded(self, row: int) -> pa.Buffer | str:
        """The encoded image, not copied, or the path of its file."""
        image = self._rows_as_arrow[int(row)]["image"][0]
        if image["bytes"].is_valid:
            return image["bytes"].as_buffer()
        path = os.path.join(self.image_folder or "", image["path"].as_py())
        if self.image_folder is not None:
            path = os.path.normpath(path)
            if not Path(path).is_relative_to(self.image_folder):
                raise _BadImage(f"the image path leaves the folder {self.image_folder}: {image['path']}")
        if not os.path.isfile(path):
            raise _BadImage(f"image file not found: {path}")
        return path

    def _decode(self, row: int, full: bool = True) -> PIL.Image.Image | None:
        """Open an image, check its size from the header and, if `full`, decode it."""
        encoded = self._encoded(row)
        try:
            file = pa.BufferReader(encoded) if isinstance(encoded, pa.Buffer) else encoded
            with PIL.Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise _BadImage(f"{width} x {height} pixels, more than {MAX_IMAGE_PIXELS} (decompression bomb?)")
                return PIL.ImageOps.exif_transpose(image).convert("RGB") if full else None
        except _BadImage:
            raise
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            raise _BadImage(f"more than {MAX_IMAGE_PIXELS} pixels (decompression bomb? {error})") from error
        except PIL.UnidentifiedImageError as error:
            raise _BadImage(f"not an image of a known format ({', '.join(IMAGE_FORMATS)})") from error
        except Exception as error:
            raise _BadImage(f"truncated or damaged image ({type(error).__name__}: {error})") from error

    def check_images(self) -> None:
        """Decode every image once, in threads. Raises [`DataError`] that names the first bad ones."""
        raise_defects(self.source, self._image_defects(full=True))

    def _image_defects(self, full: bool) -> list[str]:
        rows = np.flatnonzero(self.has_image)
        chunks = np.array_split(rows, max(1, len(rows) // 64))
        bad: dict[int, str] = {}
        bar = logging.tqdm(total=len(rows), desc="Decoding images" if full else "Reading image headers", delay=2)
        with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = pool.map(lambda chunk: (len(chunk), self._bad_images(chunk, full)), chunks)
            for size, reasons in results:
                bad.update(reasons)
                bar.update(size)
        return self._describe("unusable images", list(bad), "Replace or delete them.", bad)

    def _describe(self, what: str, rows: Any, mend: str, reasons: Mapping[int, str] | None = None) -> list[str]:
        """Defects of catalogue rows, under the row numbers of the file they came from."""
        labels = {}
        for row in rows[:MAX_EXAMPLES]:
            reason = f": {reasons[row]}" if reasons else ""
            labels[int(self._file_rows[row])] = f"item_id {self.item_ids[row]!r}{reason}"
        return describe(what, self._file_rows[rows], mend, labels.__getitem__)

    def _bad_images(self, rows: np.ndarray, full: bool) -> dict[int, str]:
        bad = {}
        for row in rows.tolist():
            try:
                self._decode(row, full)
            except _BadImage as error:
                bad[row] = str(error)
        return bad

    def require(self, modalities: Collection[str]) -> None:
        """Check that a model which reads `modalities` can represent every item: each must have one of them.

        A tower that finds no input is no error: a model of text and images may serve a catalogue of text. Nor is a
        model that reads neither (the ID baseline). Raises [`DataError`].
        """
        masks = {"text": self.has_text, "image": self.has_image}
        wanted = [modality for modality in MODALITIES if modality in modalities]
        if not wanted:
            return
        lost = np.flatnonzero(~np.logical_or.reduce([masks[modality] for modality in wanted]))
        words = " or ".join(wanted)
        if len(lost) == len(self):
            raise DataError(f"{self.source}: no item has {words}. Use a model or policy for the modality it has.")
        mend = "Drop them and their interactions first (`keep_items`), or use the other modality too."
        raise_defects(self.source, self._describe(f"{len(lost)} of {len(self)} items have no {words}", lost, mend))

    def with_policy(self, modality_policy: str, seed: int = 0) -> Catalogue:
        """The same items with one modality hidden where the policy says so.

        Args:
            modality_policy (`str`):
                `"both"` hides nothing, `"text"` hides images, `"image"` hides text, `"one_per_item"` keeps one
                modality of every item, drawn at random where it has both.
            seed (`int`, *optional*, defaults to 0):
                Seed of that draw.

        Raises:
            [`DataError`]: for an unknown policy, or when an item would be left with no modality.
        """
        if modality_policy not in MODALITY_POLICIES:
            raise DataError(f"unknown modality_policy {modality_policy!r}. Use one of {', '.join(MODALITY_POLICIES)}.")
        other = copy.copy(self)
        other._tokens = None
        if modality_policy in MODALITIES:
            self.require([modality_policy])
            other.has_text = self.has_text & (modality_policy == "text")
            other.has_image = self.has_image & (modality_policy == "image")
        elif modality_policy == "one_per_item":
            show_text = np.random.default_rng(seed).random(len(self)) < 0.5
            other.has_text = self.has_text & (show_text | ~self.has_image)
            other.has_image = self.has_image & ~other.has_text
        return other

    def select(self, rows: np.ndarray) -> Catalogue:
        """The items at `rows` (indices or a boolean mask), in that order."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        if len(rows) == 0:
            raise DataError(f"{self.source}: no item is left. Select at least one.")
        other = copy.copy(self)
        other._bind(self.items.select(rows), self.item_ids[rows])
        for name in ("has_text", "has_image", "_file_rows"):
            setattr(other, name, getattr(self, name)[rows])
        return other

    def content_hash(self) -> str:
        """SHA-256 over the ids and the visible content, in catalogue order; the same from any file format."""
        digest = hashlib.sha256()

        def add(part: bytes | memoryview | None) -> None:
            digest.update(b"-" if part is None else b"%d:" % len(part))
            digest.update(part or b"")

        for row, item_id in enumerate(self.item_ids):
            text = self.text(row)
            add(item_id.encode())
            add(None if text is None else text.encode())
            if not self.has_image[row]:
                add(None)
            else:
                encoded = self._encoded(row)
                add(Path(encoded).read_bytes() if isinstance(encoded, str) else memoryview(encoded))
        return digest.hexdigest()


def _with_string_ids(items: datasets.Dataset, source: str) -> tuple[datasets.Dataset, np.ndarray, list[str]]:
    """Items with `item_id` as strings, the ids as an array of `str`, and the defects of the ids."""
    column = items.select_columns("item_id").with_format("arrow")[:]["item_id"]
    codes, values = encode_ids(column, "item_id", source)
    defects = describe("empty item_id", np.flatnonzero(codes < 0), _EMPTY_ID)
    ids = np.append(values.to_numpy(zero_copy_only=False), "")[codes]  # the appended one is for code -1
    rows = np.flatnonzero((np.bincount(codes + 1)[codes + 1] > 1) & (codes >= 0))
    defects += describe("duplicate item_id", rows, "Keep one row for every item.", lambda row: repr(ids[row]))
    if not pa.types.is_string(column.type):
        items = items.remove_columns("item_id").add_column("item_id", pa.array(ids, pa.string()))
    return items, ids, defects


def _with_typed_content(items: datasets.Dataset, source: str) -> datasets.Dataset:
    """Items with `image` as an undecoded `Image` feature; an all-null content column is dropped."""
    import datasets

    for name in set(MODALITIES) & set(items.column_names):
        kind = items.features.arrow_schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_image = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)
        column = items.select_columns(name).with_format("arrow")[:][name] if pa.types.is_floating(kind) else None
        if pa.types.is_null(kind) or (column is not None and pc.all(pc.is_null(column, nan_is_null=True)).as_py()):
            items = items.remove_columns(name)
        elif name == "text" and not is_text:
            raise DataError(f"{source}: column 'text' holds {kind}, not strings. Write it as text.")
        elif name == "image" and not (is_text or is_image):
            raise DataError(f"{source}: column 'image' holds {kind}. Write image bytes or file paths.")
        elif name == "image":
            items = items.cast_column("image", datasets.Image(decode=False))
    return items


def _text_mask(texts: pa.ChunkedArray | None, length: int) -> tuple[np.ndarray, list[str]]:
    """Which items have text that is more than blanks, (N,) bool, and the defects of the text."""
    if texts is None:
        return np.zeros(length, dtype=bool), []
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        rows = [row for row, text in enumerate(texts) if not _is_utf8(text)]
        return np.ones(length, dtype=bool), describe("text that is not UTF-8", rows, "Write it again in UTF-8.")
    texts = texts.cast(pa.large_string())
    mask = pc.fill_null(pc.match_substring_regex(texts, r"\S"), False).to_numpy()
    words = np.flatnonzero(pc.fill_null(pc.equal(texts, "nan"), False).to_numpy())
    mend = "Leave the cell empty (or write 'NaN' if that is the title)."
    return mask, describe("text 'nan', a missing value written as a word", words, mend)


def _is_utf8(text: pa.Scalar) -> bool:
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _image_mask(rows_as_arrow: datasets.Dataset, length: int) -> np.ndarray:
    """Which items have image bytes or an image path, (N,) bool; no image is copied as a whole column."""
    if "image" not in rows_as_arrow.column_names:
        return np.zeros(length, dtype=bool)
    masks = []
    for batch in rows_as_arrow.select_columns("image").iter(1000):
        has_bytes = pc.is_valid(pc.struct_field(batch["image"], "bytes"))
        has_path = pc.fill_null(pc.not_equal(pc.struct_field(batch["image"], "path"), ""), False)
        masks.append(pc.or_(has_bytes, has_path).to_numpy(zero_copy_only=False))
    return np.concatenate(masks)


# --------------------------------------------------------------------------------------------------------------------
# Sequences
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Sequences(torch.utils.data.Dataset):
    """Users' item sequences in time order, as views on flat columns.

    View `i` is `items[starts[i]:ends[i]]`. Views share the columns, so splits and windows copy no interaction.

    Attributes:
        items (`np.ndarray` of shape `(n,)`, int32): catalogue rows.
        timestamps (`np.ndarray` of shape `(n,)`, int64): in the unit of the data.
        starts, ends (`np.ndarray` of shape `(views,)`, int64): bounds of the views.
        user_ids (`np.ndarray` of shape `(views,)`, str): the user of every view.
    """

    items: np.ndarray
    timestamps: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    user_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self.starts[index], self.ends[index]
        return {"user": int(index), "items": self.items[start:end].astype(np.int64)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Sequences(users={len(self)}, interactions={int(self.lengths.sum())})"

    @property
    def lengths(self) -> np.ndarray:
        """Items in every view, (views,) int64."""
        return self.ends - self.starts

    def select(self, rows: np.ndarray | slice) -> Sequences:
        """The views at `rows` (indices, a boolean mask or a slice)."""
        return self._with_views(self.starts[rows], self.ends[rows], self.user_ids[rows])

    def truncate(self, keep_last: int) -> Sequences:
        """Every view cut to its last `keep_last` items."""
        return self._with_views(np.maximum(self.starts, self.ends - keep_last), self.ends, self.user_ids)

    def windows(self, length: int) -> Sequences:
        """Every view cut, from its end, into windows of at most `length` items that overlap by one.

        Every (previous, next) pair is in exactly one window, and the last window of a user is full when the view is
        long enough. Views of one item hold no pair and give no window.
        """
        if length < 2:
            raise ValueError(f"a window needs at least 2 items, got length={length}")
        step = length - 1
        counts = -(-np.maximum(self.lengths - 1, 0) // step)
        view = np.repeat(np.arange(len(self)), counts)
        back = np.arange(len(view)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = self.ends[view] - back * step
        return self._with_views(np.maximum(self.starts[view], ends - length), ends, self.user_ids[view])

    def expand(self) -> tuple[np.ndarray, np.ndarray]:
        """View and flat position of everything that the views show, in order; both (sum of lengths,) int64."""
        view = np.repeat(np.arange(len(self)), self.lengths)
        return view, np.arange(len(view)) + np.repeat(self.ends - np.cumsum(self.lengths), self.lengths)

    def item_counts(self, num_items: int) -> np.ndarray:
        """Interactions of every item, (num_items,) int64; one that several views show counts once."""
        counts = np.zeros(num_items, dtype=np.int64)
        for block in self._disjoint().blocks():
            counts += np.bincount(self.items[block.expand()[1]], minlength=num_items)
        return counts

    def blocks(self) -> Iterator[Sequences]:
        """The views in parts that show about `BLOCK` items each, for work that needs memory for every item shown."""
        parts = np.cumsum(self.lengths) // BLOCK
        bounds = [0, *(np.flatnonzero(np.diff(parts)) + 1), len(self)]
        return (self.select(slice(start, end)) for start, end in pairwise(bounds))

    def _disjoint(self) -> Sequences:
        """Views that show the same interactions, each once."""
        order = np.argsort(self.starts, kind="stable")
        starts, ends = self.starts[order], self.ends[order]
        starts[1:] = np.maximum(starts[1:], np.maximum.accumulate(ends)[:-1])
        shown = starts < ends
        return self._with_views(starts[shown], ends[shown], self.user_ids[order][shown])

    def _with_views(self, starts: np.ndarray, ends: np.ndarray, user_ids: np.ndarray) -> Sequences:
        return Sequences(self.items, self.timestamps, starts, ends, user_ids)


def flat_column(length: int, dtype: type) -> np.ndarray:
    """A column to be filled, in memory or, if it is long, in a temporary file that vanishes with it."""
    import datasets

    if length <= MAX_IN_MEMORY:
        return np.empty(length, dtype)
    folder = Path(datasets.config.HF_DATASETS_CACHE)  # `/tmp` may be memory
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.asarray(np.memmap(file, dtype, shape=length))


def _group_by_user(items: np.ndarray, timestamps: np.ndarray, users: np.ndarray, names: np.ndarray) -> Sequences:
    """Sequences of interactions sorted by user, then time; equal times keep their order.

    Users one after the other form parts of about `BLOCK` interactions. All interactions go to the part of their user,
    and then each part is sorted.
    """
    size = len(users)
    counts = np.zeros(len(names), dtype=np.int64)
    for start in range(0, size, BLOCK):
        counts += np.bincount(users[start : start + BLOCK], minlength=len(names))
    ends = np.cumsum(counts)
    starts = ends - counts
    is_first = np.diff(np.maximum(ends - 1, 0) // BLOCK, prepend=-1) > 0
    part_of, bounds = np.cumsum(is_first) - 1, np.append(starts[is_first], size)

    columns = flat_column(size, np.int32), flat_column(size, np.int64), flat_column(size, np.int32)
    free = bounds[:-1].copy()
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        parts = part_of[users[block]]
        order = np.argsort(parts, kind="stable")
        cuts = np.searchsorted(parts[order], np.arange(len(bounds)))
        for part, rows in enumerate(np.split(order, cuts[1:-1])):
            for column, values in zip(columns, (items, timestamps, users), strict=True):
                column[free[part] : free[part] + len(rows)] = values[block][rows]
            free[part] += len(rows)
    for low, high in pairwise(bounds):
        parted = [column[low:high] for column in columns]
        order = np.lexsort((parted[1], parted[2]))
        for column in parted[:2]:
            column[:] = column[order]
    present = counts > 0
    return Sequences(*columns[:2], starts[present], ends[present], names[present])


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------


def load_catalogue(
    source: Any, *, revision: str | None = None, modality_policy: str = "both", seed: int = 0
) -> Catalogue:
    """Read and validate a catalogue.

    Args:
        source (`str`, `os.PathLike` or `datasets.Dataset`):
            A `.parquet`, `.csv` or `.jsonl` file (CSV and JSONL: `image` or `file_name` is a path relative to the
            file), a folder with `items.*` or `metadata.jsonl`, a data set object, or the id of a Hub data set with a
            configuration `items`.
        revision (`str`, *optional*):
            Revision of the Hub data set.
        modality_policy (`str`, *optional*, defaults to `"both"`), seed (`int`, *optional*, defaults to 0):
            See [`Catalogue.with_policy`].

    Raises:
        [`DataError`]: for every defect.
    """
    opened, name = open_source(source, "items", revision)
    if isinstance(opened, Path):
        catalogue = Catalogue(read_items(opened), name, image_folder=opened.parent)
    else:
        catalogue = Catalogue(opened, name)
    return catalogue.with_policy(modality_policy, seed)


def load_interactions(source: Any, catalogue: Catalogue, *, revision: str | None = None) -> Sequences:
    """Read and validate interactions as users' sequences in time order.

    Rows may come in any order; equal timestamps of a user keep the order of the file. A row that occurs twice is two
    interactions: repeats are real. Timestamps are integers of any unit and sign.

    Args:
        source (`str`, `os.PathLike` or `datasets.Dataset`):
            As in [`load_catalogue`], with `interactions` for `items`.
        catalogue ([`Catalogue`]):
            The items that interactions refer to.
        revision (`str`, *optional*):
            Revision of the Hub data set.

    Raises:
        [`DataError`]: for every defect.
    """
    opened, name = open_source(source, "interactions", revision)
    size, blocks = read_interactions(opened, name)
    if size == 0:
        raise DataError(f"{name}: there are no interactions. Add rows of user_id, item_id, timestamp.")
    users, items, timestamps = (flat_column(size, dtype) for dtype in (np.int32, np.int32, np.int64))
    code_of: dict[str, int] = {}
    defects, first = Defects(), 0
    for block in blocks:
        place = slice(first, first + len(block))
        codes, ids = encode_ids(block["user_id"], "user_id", name)
        defects.add("empty user_id", codes < 0, _EMPTY_ID, first)
        known = [code_of.setdefault(user, len(code_of)) for user in ids.to_pylist()]
        users[place] = np.array([*known, -1])[codes]

        codes, ids = encode_ids(block["item_id"], "item_id", name)
        defects.add("empty item_id", codes < 0, _EMPTY_ID, first)
        items[place] = np.append(catalogue._find(ids.to_pylist()), 0)[codes]  # 0 for code -1, which has its own defect
        mend = f"Add these items to {catalogue.source} or delete the rows."
        defects.add("unknown item_id", items[place] < 0, mend, first, partial(_cell, block["item_id"], "item_id {!r}"))

        timestamps[place], missing, wrong = read_timestamps(block["timestamp"])
        mend = "Write an integer, for example seconds since 1970."
        defects.add("missing timestamp", missing, mend, first)
        what = f"timestamp that is not an integer (column of {block['timestamp'].type})"
        defects.add(what, wrong, mend, first, partial(_cell, block["timestamp"], "{:.40}"))
        first += len(block)
    raise_defects(name, defects.describe())
    return _group_by_user(items, timestamps, users, np.array(list(code_of), dtype=object))


def _cell(column: pa.ChunkedArray, form: str, row: int) -> str:
    return form.format(str(column[row]))


def load_domain(
    path: Any, *, revision: str | None = None, modality_policy: str = "both", seed: int = 0
) -> tuple[Catalogue, Sequences]:
    """Catalogue and sequences of one folder or one Hub data set; see [`load_catalogue`], [`load_interactions`]."""
    catalogue = load_catalogue(path, revision=revision, modality_policy=modality_policy, seed=seed)
    return catalogue, load_interactions(path, catalogue, revision=revision)


# --------------------------------------------------------------------------------------------------------------------
# Filters and splits
# --------------------------------------------------------------------------------------------------------------------


def keep_items(catalogue: Catalogue, sequences: Sequences, keep: np.ndarray) -> tuple[Catalogue, Sequences]:
    """The items where the mask `keep`, (N,) bool, is true, and the interactions with them."""
    view, place = sequences.expand()
    kept = keep[sequences.items[place]]
    view, place = view[kept], place[kept]
    rows = np.cumsum(keep) - 1
    items = rows[sequences.items[place]]
    return catalogue.select(keep), _group_by_user(items, sequences.timestamps[place], view, sequences.user_ids)


def drop_unused(catalogue: Catalogue, sequences: Sequences) -> tuple[Catalogue, Sequences]:
    """The catalogue without items that occur in no view, and the sequences with the new rows."""
    return keep_items(catalogue, sequences, sequences.item_counts(len(catalogue)) > 0)


def k_core(catalogue: Catalogue, sequences: Sequences, k: int) -> tuple[Catalogue, Sequences]:
    """Keep users and items with at least `k` interactions each, again and again until nothing changes.

    Repeats count as interactions. Raises [`DataError`] when nothing is left.
    """
    view, place = sequences.expand()
    while len(place):
        items = sequences.items[place]
        keep = (np.bincount(view)[view] >= k) & (np.bincount(items)[items] >= k)
        if keep.all():
            break
        view, place = view[keep], place[keep]
    if len(place) == 0:
        raise DataError(f"{catalogue.source}: the {k}-core is empty. Use a smaller k.")
    core = _group_by_user(sequences.items[place], sequences.timestamps[place], view, sequences.user_ids)
    return drop_unused(catalogue, core)


@dataclass
class Split:
    """Views for training, validation and test. In the last two, the last item of each view is the target."""

    train: Sequences
    validation: Sequences
    test: Sequences
    users_left_out: int = 0


def leave_one_out(sequences: Sequences, min_interactions: int = 3, keep_last: int | None = None) -> Split:
    """Train on all but a user's last two items, validate on the one before the last, test on the last.

    Args:
        sequences ([`Sequences`]):
            One view per user.
        min_interactions (`int`, *optional*, defaults to 3):
            Users with fewer interactions are left out, and counted.
        keep_last (`int`, *optional*):
            Forget all but the last `keep_last` items of every user (history length + 3 in the NineRec protocol).

    Raises:
        [`DataError`]: when no user is left.
    """
    if min_interactions < 3 or (keep_last is not None and keep_last < 3):
        raise ValueError("leave-one-out needs at least 3 interactions per user: train, validation, test")
    long_enough = sequences.lengths >= min_interactions
    left_out = int((~long_enough).sum())
    if not long_enough.any():
        longest = int(sequences.lengths.max(initial=0))
        raise DataError(
            f"no user has {min_interactions} interactions (the longest history has {longest}), so none can be split. "
            "Add interactions, or lower min_interactions (3 is the least)."
        )
    if left_out:
        logger.warning(f"{left_out} of {len(sequences)} users have fewer than {min_interactions} interactions.")
    lines = sequences.select(long_enough)
    lines = lines if keep_last is None else lines.truncate(keep_last)
    train, validation = (lines._with_views(lines.starts, lines.ends - cut, lines.user_ids) for cut in (2, 1))
    return Split(train, validation, lines, left_out)


def temporal_split(sequences: Sequences, validation_from: int, test_from: int) -> Split:
    """Split by time: train before `validation_from`; the target is a user's first event of a period.

    A target's history is everything before it. Users without an event before the period have no history and are not
    evaluated there.

    Args:
        sequences ([`Sequences`]):
            One view per user.
        validation_from, test_from (`int`):
            First timestamp of the validation period `[validation_from, test_from)` and of the test period.

    Raises:
        [`DataError`]: when a period has no event, or no user has a history before it.
    """
    starts = sequences.starts
    validation, test = _first_from(sequences, validation_from), _first_from(sequences, test_from)

    def views(chosen: np.ndarray, ends: np.ndarray) -> Sequences:
        return sequences._with_views(starts[chosen], ends[chosen], sequences.user_ids[chosen])

    parts = {
        "training": views(validation > starts, validation),
        "validation": views((validation > starts) & (validation < test), validation + 1),
        "test": views((test > starts) & (test < sequences.ends), test + 1),
    }
    for name, part in parts.items():
        if len(part) == 0:
            times = sequences.timestamps[sequences.expand()[1]]
            raise DataError(
                f"temporal split: no user for {name} (validation_from={validation_from}, test_from={test_from}; the "
                f"data run from {times.min()} to {times.max()}). Move the bounds."
            )
    left_out = len(sequences) - len(parts["training"])
    return Split(parts["training"], parts["validation"], parts["test"], left_out)


def _first_from(sequences: Sequences, time: int) -> np.ndarray:
    """Flat position of every view's first event at `time` or later, its end if there is none, (views,) int64."""
    earlier = []
    for block in sequences.blocks():
        view, place = block.expand()
        earlier.append(np.bincount(view[sequences.timestamps[place] < time], minlength=len(block)))
    return sequences.starts + np.concatenate(earlier)


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def log_popularity(counts: np.ndarray) -> np.ndarray:
    """log of every item's share of the interactions, (N,) float32; an item without any counts as one.

    The `log p` of the debiased cross-entropy (Yi et al., RecSys 2019), from training counts.
    """
    counts = np.asarray(counts, dtype=np.float64)
    return np.log(np.maximum(counts, 1) / max(counts.sum(), 1)).astype(np.float32)


def data_statistics(catalogue: Catalogue, split: Split) -> dict[str, Any]:
    """What a reader of the results must know of the data, as a small JSON-able dictionary.

    Counts, lengths, modality mix, repeats (targets that the user chose before cannot be hit when the history is
    masked), cold share (items without training interactions) and popularity. Shares are between 0 and 1.
    """
    counts = split.train.item_counts(len(catalogue))
    parts = split.train, split.validation, split.test
    bounds = ([getattr(part, name) for part in parts] for name in ("starts", "ends", "user_ids"))
    shown = split.train._with_views(*map(np.concatenate, bounds))
    both = catalogue.has_text & catalogue.has_image
    return {
        "source": catalogue.source,
        "num_items": len(catalogue),
        "num_users": len(set(split.train.user_ids) | set(split.test.user_ids)),
        "num_interactions": int(shown._disjoint().lengths.sum()),
        "users_left_out": split.users_left_out,
        "items_with": {
            "text_only": float((catalogue.has_text & ~both).mean()),
            "image_only": float((catalogue.has_image & ~both).mean()),
            "both": float(both.mean()),
        },
        "train": {
            "sequences": len(split.train),
            "interactions": int(counts.sum()),
            "length": length_statistics(split.train.lengths),
        },
        "validation": _target_statistics(split.validation, counts),
        "test": _target_statistics(split.test, counts),
        "cold_catalogue_share": float((counts == 0).mean()),
        "popularity": popularity_statistics(counts),
    }


def length_statistics(lengths: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1])
    names = ("min", "p10", "median", "p90", "max")
    return {"mean": float(lengths.mean()), **{name: float(q) for name, q in zip(names, quantiles, strict=True)}}


def _target_statistics(sequences: Sequences, train_counts: np.ndarray) -> dict[str, Any]:
    """Statistics of views whose last item is the target."""
    targets = sequences.items[sequences.ends - 1]
    repeated = 0
    for block in sequences.blocks():
        view, place = block.expand()
        same = block.items[place] == block.items[block.ends - 1][view]  # the target itself is one of them
        repeated += int((np.bincount(view[same]) > 1).sum())
    return {
        "sequences": len(sequences),
        "length": length_statistics(sequences.lengths),
        "repeat_target_share": repeated / len(sequences),
        "cold_target_share": float((train_counts[targets] == 0).mean()),
    }


def popularity_statistics(counts: np.ndarray) -> dict[str, Any]:
    """Gini coefficient of the training counts, and the share of interactions of every tenth of the catalogue."""
    ascending = np.sort(counts).astype(np.float64)
    total, size = max(ascending.sum(), 1.0), len(ascending)
    gini = 2 * (np.arange(1, size + 1) * ascending).sum() / (size * total) - (size + 1) / size
    deciles = [float(part.sum() / total) for part in np.array_split(ascending[::-1], 10)]
    return {"gini": float(gini), "top_decile_share": deciles[0], "decile_shares": deciles}


def save_statistics(statistics: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write statistics as `data_statistics.json` in the folder `path` (or to the file, if it ends in `.json`)."""
    file = _statistics_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def load_statistics(path: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
    """
    Read what [`save_statistics`] wrote, from a file, a folder, or a repository of the Hub (with `kwargs` as in
    `PreTrainedModel.from_pretrained`: `revision`, `token`, `cache_dir`, ...).
    """
    file = _statistics_file(path)
    if not file.parent.exists():
        with hub_errors(path):
            file = Path(cached_file(path, STATISTICS_NAME, **pinned(path, kwargs)))
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Compute it again with `data_statistics`.") from error


def _statistics_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / STATISTICS_NAME
