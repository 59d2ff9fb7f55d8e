"""Images of items: encoded in the table or in files beside it, decoded one at a time."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..errors import BadContent


if TYPE_CHECKING:
    import datasets
    from typing_extensions import Self


MAX_IMAGE_PIXELS = 64_000_000
"""Largest width x height that is decoded; a header that claims more is refused before any pixel is read."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


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
        """The image, RGB and upright (EXIF)."""
        image = self._decode(row)
        assert image is not None
        return image

    def encoded(self, row: int) -> bytes:
        """The bytes of the image as they are in the file, not decoded."""
        source = self._source(row)
        return Path(source).read_bytes() if isinstance(source, str) else source.to_pybytes()

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
        path = os.path.join(self._folder or "", image["path"].as_py())
        if self._folder is not None:
            path = os.path.normpath(path)
            if not Path(path).is_relative_to(self._folder):
                raise BadContent(f"the image path leaves the folder {self._folder}: {image['path']}")
        if not os.path.isfile(path):
            raise BadContent(f"image file not found: {path}")
        return path

    def _decode(self, row: int, full: bool = True) -> PIL.Image.Image | None:
        """Open an image, check its size from the header and, if `full`, decode it."""
        source = self._source(row)
        try:
            file = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source
            with PIL.Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise BadContent(f"{width} x {height} pixels, more than {MAX_IMAGE_PIXELS} (decompression bomb?)")
                return PIL.ImageOps.exif_transpose(image).convert("RGB") if full else None
        except BadContent:
            raise
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            raise BadContent(f"more than {MAX_IMAGE_PIXELS} pixels (decompression bomb? {error})") from error
        except PIL.UnidentifiedImageError as error:
            raise BadContent(f"not an image of a known format ({', '.join(IMAGE_FORMATS)})") from error
        except Exception as error:
            raise BadContent(f"truncated or damaged image ({type(error).__name__}: {error})") from error
