"""Images of items: encoded in the table or in files beside it, decoded one at a time."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..errors import BadContent, DataError, shortened
from ..model.processing_transrec import MAX_IMAGE_PIXELS, UnusableImage, check_image_size, to_rgb
from .columns import is_text
from .places import lies_in


if TYPE_CHECKING:
    import datasets
    from typing_extensions import Self


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkq|TU0A|Qk)[A-Za-z0-9+/\s]{40}|[\w+/\s-]{200,}=*$")
"""How the bytes of an image begin in base64, and what no path looks like."""


CHECKS: dict[str, Callable[[pa.DataType], bool]] = {
    "bytes": lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
    "path": is_text,
}
"""What the fields of an image may hold."""


def typed_images(items: datasets.Dataset, source: str) -> datasets.Dataset:
    """Items with `image` as an undecoded `Image` feature."""
    import datasets

    kind = items.features.arrow_schema.field("image").type
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {"bytes": kind, "path": kind}
    given = {"bytes", "path"} & fields.keys()
    sound = {name for name in given if CHECKS[name](fields[name]) or pa.types.is_null(fields[name])}
    if not (given and given <= sound if pa.types.is_struct(kind) else sound):
        raise DataError(
            f"{source}: column 'image' holds {shortened(kind, 200)}. Write image bytes or file paths, or both in "
            "fields named 'bytes' and 'path'."
        )
    return items.cast_column("image", datasets.Image(decode=False))


class Images:
    """Images, as bytes or as paths relative to a folder; see [`Content`]."""

    mend = "Replace or delete them."

    def __init__(self, rows: datasets.Dataset, folder: str | None = None) -> None:
        self._rows, self._folder = rows, folder
        self._places = np.arange(len(rows))
        masks = []
        for batch in rows.select_columns("image").iter(1000):  # no image is copied as a whole column
            has_bytes = pc.is_valid(pc.struct_field(batch["image"], "bytes"))
            has_path = pc.fill_null(pc.not_equal(pc.struct_field(batch["image"], "path"), ""), False)
            masks.append(pc.or_(has_bytes, has_path).to_numpy(zero_copy_only=False))
        self.present = np.concatenate(masks)

    def select(self, rows: np.ndarray) -> Self:
        other = copy.copy(self)
        other._places, other.present = self._places[rows], self.present[rows]
        return other

    def read(self, row: int) -> PIL.Image.Image:
        """The image, RGB and upright (EXIF), on white where it is transparent."""
        image = self._decode(row)
        assert image is not None
        return image

    def encoded(self, row: int) -> bytes:
        """The bytes of the image as they are in the file, not decoded."""
        source = self._source(row)
        if isinstance(source, pa.Buffer):
            return source.to_pybytes()
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise BadContent(f"image file cannot be read ({error.strerror})") from error

    def defects(self, full: bool = False) -> dict[int, str]:
        """Reads the header of every image, or decodes it if `full`, in threads."""
        rows = np.flatnonzero(self.present)
        chunks = np.array_split(rows, max(1, len(rows) // 64))
        bad: dict[int, str] = {}
        bar = logging.tqdm(total=len(rows), desc="Decoding images" if full else "Reading image headers", delay=2)
        with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for size, reasons in pool.map(lambda chunk: (len(chunk), self._bad(chunk, full)), chunks):
                bad.update(reasons)
                bar.update(size)
        return bad

    def _bad(self, rows: np.ndarray, full: bool) -> dict[int, str]:
        bad = {}
        for row in rows.tolist():
            try:
                self._decode(row, full)
            except BadContent as error:
                bad[row] = str(error)
        return bad

    def _source(self, row: int) -> pa.Buffer | str:
        """The encoded image, not copied, or the path of its file."""
        image = self._rows[int(self._places[row])]["image"][0]
        if image["bytes"].is_valid:
            return image["bytes"].as_buffer()
        path = image["path"].as_py()
        if (problem := _no_path(path)) is not None:
            raise BadContent(problem)
        if self._folder is not None:
            path = os.path.join(self._folder, path)
            if not lies_in(path, self._folder):
                raise BadContent(f"the image path leaves the folder of the data: {shortened(image['path'])!r}")
        if not os.path.isfile(path):
            raise BadContent(f"image file not found: {shortened(path, 300)!r}")
        return path

    def _decode(self, row: int, full: bool = True) -> PIL.Image.Image | None:
        """Open an image, check its size from the header and, if `full`, decode it."""
        source = self._source(row)
        try:
            file = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source
            with PIL.Image.open(file, formats=IMAGE_FORMATS) as image:
                check_image_size(*image.size)
                return to_rgb(image) if full else None
        except UnusableImage as error:
            raise BadContent(str(error)) from error
        except PIL.UnidentifiedImageError as error:
            raise BadContent(f"not an image of a known format ({', '.join(IMAGE_FORMATS)})") from error
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            raise BadContent(f"more than {MAX_IMAGE_PIXELS} pixels (decompression bomb? {error})") from error
        except MemoryError as error:
            raise BadContent("there is not enough memory to decode it") from error
        except Exception as error:
            reason = shortened(error, 200)
            if "PngImagePlugin.MAX_TEXT" in reason or "Decompressed data too large" in reason:
                raise BadContent("more than 1 MB of metadata; save it without (exiftool -all= FILE)") from error
            raise BadContent(f"truncated or damaged image ({type(error).__name__}: {reason})") from error


def _no_path(text: str) -> str | None:
    """What a text is that is no path, if it is none."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(//|/[^/])|//|www\.", text):
        return f"a URL, which is not read: download the image and write its path ({shortened(text, 60)!r})"
    if text[:5].lower() == "data:":
        return "a data URI, which is not read: write the image to a file, or its bytes into the column"
    if BASE64.match(text):
        return "base64 and no path: write the decoded bytes, or a file and its path"
    return None
