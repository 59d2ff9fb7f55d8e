"""Moving pictures of items: a few frames of each, decoded by PyAV, or by Pillow where it is an animated image."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow as pa

from ..errors import BadContent, shortened
from ..model.processing_transrec import MAX_IMAGE_PIXELS, UnusableImage, check_image_size, to_rgb
from .images import decode_image
from .media import Files
from .sounds import frames_of, opened, seconds_of


if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer


VIDEO_FORMATS = ("MP4", "MOV", "WEBM", "MKV", "AVI", "animated GIF, WEBP and PNG")
ANIMATED = ("GIF", "WEBP", "PNG")
FRAME_PIXELS = 500_000
"""Of a frame; larger ones are shrunk, lest those of a batch fill the memory."""
MAX_DECODED = 600
"""Frames that are decoded to reach one: further from the last key frame, a nearer one is taken."""
MAX_ANIMATED = 500_000_000
"""Pixels of the frames of an animated image, each of which needs those before it, that are decoded."""
MAX_KEPT = 64
"""Frames at the beginning of a video that does not say how long it is, of which some are taken."""
CHECKED_FRAMES = 2
"""Of a video that are decoded when it is checked, the last one near its end."""


def evenly(count: int, wanted: int, at: float = 0.5) -> list[int]:
    """At most `wanted` of `count` places, each in a part of one length, `at` this share of it, from 0 to 1."""
    wanted = min(count, wanted)
    return [min(count - 1, int((part + at) * count / wanted)) for part in range(wanted)]


def decode_clip(
    source: pa.Buffer | str, num_frames: int = 8, at: float = 0.5, is_check: bool = False
) -> list[PIL.Image.Image]:
    """
    Frames of a moving picture, evenly spaced in time; fewer if it has fewer, or some are damaged. No more of the file
    is decoded than is needed to reach them.

    Args:
        source (`pa.Buffer` or `str`): The encoded file, or its path.
        num_frames (`int`, *optional*, defaults to 8): Frames.
        at (`float`, *optional*, defaults to 0.5): Where in its part of the time each frame is, from 0 to 1.
        is_check (`bool`, *optional*, defaults to `False`): None of them may be damaged.

    Raises:
        [`BadContent`]: If it cannot be used.
    """
    if (frames := _animated(source, num_frames, at, is_check)) is not None:
        return frames
    with opened(source, VIDEO_FORMATS) as container:
        stream, chosen = _stream(container), []
        length = seconds_of(container, stream)
        if length and not 0 < stream.frames <= num_frames:
            chosen = _at_times(container, stream, length, num_frames, at, is_check)
        if not chosen:  # it does not say how long it is, or not the truth
            with suppress(OSError):
                container.seek(0)
            found = list(islice(frames_of(container, stream), MAX_KEPT))
            chosen = [found[place] for place in evenly(len(found), num_frames, at)]
        if not chosen:
            raise BadContent("no frame in it can be decoded")
        return [_image(frame) for frame in chosen]


def _at_times(
    container: InputContainer, stream: Any, length: float, num_frames: int, at: float, is_check: bool
) -> list[VideoFrame]:
    """The frames that are seen at one time in each of so many parts of a video, `length` seconds long; each once."""
    first = float((stream.start_time or 0) * stream.time_base)
    chosen: dict[int | None, VideoFrame] = {}
    for part in range(num_frames):
        time, seen = first + length * (part + at) / num_frames, None
        try:
            container.seek(int(time / stream.time_base), stream=stream)  # to the key frame before
            for frame in islice(frames_of(container, stream), MAX_DECODED):
                if seen is not None and frame.time is not None and frame.time > time:
                    break
                seen = frame
        except (BadContent, OSError):
            if is_check:
                raise
        if seen is not None:
            chosen[seen.pts] = seen
    return list(chosen.values())


def _stream(container: InputContainer) -> Any:
    """The first stream of pictures. Raises [`BadContent`] if there is none, or they are absurd."""
    if not container.streams.video:
        raise BadContent("no picture in it: the file has no video stream")
    stream = container.streams.video[0]
    try:
        check_image_size(stream.codec_context.width, stream.codec_context.height)
    except UnusableImage as error:
        raise BadContent(str(error)) from error
    return stream


def _image(frame: VideoFrame) -> PIL.Image.Image:
    """A frame as people see it, upright and not too large."""
    factor = max(1.0, math.sqrt(frame.width * frame.height / FRAME_PIXELS))
    image = frame.to_image(width=max(1, int(frame.width / factor)), height=max(1, int(frame.height / factor)))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _animated(
    source: pa.Buffer | str, num_frames: int, at: float = 0.5, is_check: bool = True
) -> list[PIL.Image.Image] | None:
    """As many frames of an image, animated or not; `None` if it is none."""
    file: Any = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source
    try:
        image = PIL.Image.open(file, formats=ANIMATED)
    except PIL.Image.DecompressionBombError as error:
        raise BadContent(f"more than {MAX_IMAGE_PIXELS} pixels (decompression bomb? {error})") from error
    except Exception:  # whatever decoders raise: another one will say what is wrong
        return None
    frames = []
    try:
        with image:
            check_image_size(*image.size)
            reached = min(MAX_DECODED, max(1, MAX_ANIMATED // (image.width * image.height)))
            for place in evenly(min(getattr(image, "n_frames", 1), reached), num_frames, at):
                image.seek(place)
                frames.append(shrunk(to_rgb(image)))
    except UnusableImage as error:
        raise BadContent(str(error)) from error
    except Exception as error:
        if is_check or not frames:
            reason = f"{type(error).__name__}: {shortened(error, 200)}"
            raise BadContent(f"truncated or damaged image ({reason})") from error
    return frames


class Clips(Files):
    """Moving pictures, as files or as lists of images, to a list of frames; see [`Files`]."""

    name = "video"

    def lengths(self) -> np.ndarray:
        """As far as is known without decoding them, more frames than are read: `(N,)`."""
        return np.full(len(self.present), 2**31)

    def read(self, row: int, num_frames: int = 8, at: float = 0.5) -> list[PIL.Image.Image]:
        """Frames, RGB and upright; see [`decode_clip`]."""
        if not self.is_listed:
            return decode_clip(self._source(row), num_frames, at)
        frames = self._content(row).values
        return [self._frame(frames[place]) for place in evenly(len(frames), num_frames, at)]

    def encoded(self, row: int) -> bytes:
        """The bytes of the file or, of a list of images, those of all, each after its length."""
        return (
            b"".join(b"%d:" % len(part) + part for part in self.parts(row)) if self.is_listed else super().encoded(row)
        )

    def parts(self, row: int) -> list[bytes]:
        """The bytes of each image of a list."""
        return [self._bytes(self._place(frame)) for frame in self._content(row).values]

    def _frame(self, frame: pa.StructScalar) -> PIL.Image.Image:
        image = decode_image(self._place(frame))
        assert image is not None
        return shrunk(image)

    def _check(self, row: int, full: bool) -> None:
        if self.is_listed:
            for frame in self._content(row).values:
                decode_image(self._place(frame), full)
            return
        source = self._source(row)
        if full:
            decode_clip(source, CHECKED_FRAMES, 0.98, is_check=True)
        elif _animated(source, 0) is None:
            with opened(source, VIDEO_FORMATS) as container:
                _stream(container)


def shrunk(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of not too many pixels."""
    factor = math.isqrt(image.width * image.height // FRAME_PIXELS)
    return image.reduce(factor) if factor > 1 else image
