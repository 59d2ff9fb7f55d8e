"""The contents of items, one reader a modality: which items have it, its defects, its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError, describe
from .reading import MODALITIES


if TYPE_CHECKING:
    import datasets


MAX_IMAGE_PIXELS = 64_000_000
"""Largest width x height that is decoded; a header that claims more is refused before any pixel is read."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class _BadImage(Exception):
    """Why one image cannot be used."""


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
