"""Images of items, decoded by Pillow."""

from __future__ import annotations

import PIL.Image
import pyarrow as pa

from ..errors import BadContent, shortened
from ..model.processing_transrec import MAX_IMAGE_PIXELS, UnusableImage, check_image_size, to_rgb
from .media import Files


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(source: pa.Buffer | str, full: bool = True) -> PIL.Image.Image | None:
    """
    Open an image, check its size from the header and, if `full`, decode it: RGB and upright. Raises [`BadContent`].
    """
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


class Images(Files):
    """Images; see [`Files`]."""

    name = "image"

    def read(self, row: int) -> PIL.Image.Image:
        """The image, RGB and upright (EXIF), on white where it is transparent."""
        image = decode_image(self._source(row))
        assert image is not None
        return image

    def _check(self, row: int, full: bool) -> None:
        decode_image(self._source(row), full)
