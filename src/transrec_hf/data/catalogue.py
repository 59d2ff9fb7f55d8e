"""The items of one platform: their ids, contents and policies."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
from transformers.utils import logging

from ..errors import MAX_EXAMPLES, DataError, describe, raise_defects
from .contents import IMAGE_FORMATS, MAX_IMAGE_PIXELS, _BadImage, _image_mask, _text_mask, _with_typed_content
from .reading import MODALITIES, check_columns, encode_ids, open_source, read_items
from .tokens import CatalogueTokens


if TYPE_CHECKING:
    import datasets


MODALITY_POLICIES = ("both", "text", "image", "one_per_item")
_EMPTY_ID = "Give these rows an id or delete them."


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
