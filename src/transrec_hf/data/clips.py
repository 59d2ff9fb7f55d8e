"""Videos of items: a few frames of each, decoded by PyAV, or by Pillow if the file is an animated image."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
"""Most pixels of a frame; larger frames are shrunk, so that a batch does not fill the memory."""
MAX_DECODED = 600
"""Most frames that are decoded to reach one. If it is further from the last key frame, a nearer frame is taken."""
MAX_ANIMATED = 500_000_000
"""Most pixels that are decoded of an animated image, in which each frame needs all frames before it."""
MAX_KEPT = 64
"""Frames at the beginning of a video of unknown length, from which frames are chosen."""
CHECKED_FRAMES = 2
"""Frames that are decoded to check a video, the last one near its end."""


def evenly(count: int, wanted: int, at: float = 0.5) -> list[int]:
    """At most `wanted` of `count` positions: one in each of as many equal parts, at the share `at` of the part."""
    wanted = min(count, wanted)
    return [min(count - 1, int((part + at) * count / wanted)) for part in range(wanted)]


def decode_clip(
    source: pa.Buffer | str, num_frames: int = 8, at: float = 0.5, is_check: bool = False
) -> list[PIL.Image.Image]:
    """
    Frames of a video, evenly spaced in time; fewer if the video has fewer, or if some are damaged. No more of the file
    is decoded than is needed to reach them.

    Args:
        source (`pa.Buffer` or `str`): The encoded file, or its path.
        num_frames (`int`, *optional*, defaults to 8): Number of frames.
        at (`float`, *optional*, defaults to 0.5): The video is divided into `num_frames` equal parts; position of the
            frame in its part, from 0 to 1.
        is_check (`bool`, *optional*, defaults to `False`): Whether a damaged frame is an error.

    Raises:
        [`BadContent`]: If the video cannot be used.
    """
    if (frames := _animated(source, num_frames, at, is_check)) is not None:
        return frames
    with opened(source, VIDEO_FORMATS) as container:
        stream, chosen = _stream(container), []
        length = seconds_of(container, stream)
        if length and not 0 < stream.frames <= num_frames:
            chosen = _at_times(container, stream, length, num_frames, at, is_check)
        if not chosen:  # its length is unknown or wrong
            with suppress(OSError):
                container.seek(0)
            found = list(islice(frames_of(container, stream), MAX_KEPT))
            chosen = [found[place] for place in evenly(len(found), num_frames, at)]
        if not chosen:
            raise BadContent("none of its frames can be decoded")
        return [_image(frame) for frame in chosen]


def _at_times(
    container: InputContainer, stream: Any, length: float, num_frames: int, at: float, is_check: bool
) -> list[VideoFrame]:
    """
    Frames of a video of `length` seconds, one at a time in each of `num_frames` equal parts; no frame comes twice.
    """
    first = float((stream.start_time or 0) * stream.time_base)
    chosen: dict[int | None, VideoFrame] = {}
    frames: Iterator[VideoFrame] | None = None
    seen = later = None
    for part in range(num_frames):
        time, has_ended = first + length * (part + at) / num_frames, False
        try:
            if frames is None or not _is_next(stream, seen, time):
                frames, seen, later = frames_of(container, stream), None, None
                container.seek(int(time / stream.time_base), stream=stream)  # to the key frame before
            for _ in range(MAX_DECODED):
                later = later or next(frames, None)
                has_ended = later is None
                if later is None or (seen is not None and later.time is not None and later.time > time):
                    break
                seen, later = later, None
        except (BadContent, OSError):
            if is_check:
                raise
            frames = None
        if seen is not None:
            chosen[seen.pts] = seen
    if is_check and has_ended and (stream.duration or len(container.streams) == 1):
        end = max((frame.time or 0.0) + float(frame.duration * stream.time_base) for frame in chosen.values()) - first
        if 2 * end < length:
            raise BadContent(f"truncated: {end:.1f} of {length:.1f} seconds can be decoded. Get the file again")
    return list(chosen.values())


def _is_next(stream: Any, seen: VideoFrame | None, time: float) -> bool:
    """Whether decoding reaches a time sooner from the frame `seen` on than from the key frame before the time."""
    if seen is None or seen.pts is None or (time - float(seen.pts * stream.time_base)) * _rate(stream) > MAX_DECODED:
        return False
    key = stream.index_entries.search_timestamp(int(time / stream.time_base))
    return key >= 0 and stream.index_entries[key].timestamp <= seen.pts


def _rate(stream: Any) -> float:
    """Frames per second, about."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def _stream(container: InputContainer) -> Any:
    """The first video stream. Raises [`BadContent`] if there is none, or its header is absurd."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise BadContent("the file has no video stream")  # the picture of an album is none
    context = streams[0].codec_context
    if context is None:
        raise BadContent("its codec is not known: save it as MP4")
    try:
        check_image_size(context.width, context.height)
    except UnusableImage as error:
        raise BadContent(str(error)) from error
    context.options = {"max_pixels": str(MAX_IMAGE_PIXELS)}  # some videos change their size
    return streams[0]


def _image(frame: VideoFrame) -> PIL.Image.Image:
    """A frame as people see it, upright and not too large."""
    factor = max(1.0, math.sqrt(frame.width * frame.height / FRAME_PIXELS))
    image = frame.to_image(width=max(1, int(frame.width / factor)), height=max(1, int(frame.height / factor)))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _animated(
    source: pa.Buffer | str, num_frames: int, at: float = 0.5, is_check: bool = True
) -> list[PIL.Image.Image] | None:
    """Frames of an image, animated or not; `None` if the file is not an image."""
    file: Any = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source
    try:
        image = PIL.Image.open(file, formats=ANIMATED)
    except PIL.Image.DecompressionBombError as error:
        raise BadContent(f"more than {MAX_IMAGE_PIXELS} pixels (decompression bomb? {error})") from error
    except Exception:  # any error of a decoder: the next decoder will say what is wrong
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
    """Videos, as files or as lists of images, which are read as lists of frames; see [`Files`]."""

    name = "video"

    def lengths(self) -> np.ndarray:
        """The number of frames of each item, `(N,)`; a large number if it is not known without decoding."""
        return np.full(len(self.present), 2**31)

    def read(self, row: int, num_frames: int = 8, at: float = 0.5) -> list[PIL.Image.Image]:
        """Frames, RGB and upright; see [`decode_clip`]."""
        if not self.is_listed:
            return decode_clip(self._source(row), num_frames, at)
        frames = self._content(row).values
        return [self._frame(frames[place]) for place in evenly(len(frames), num_frames, at)]

    def encoded(self, row: int) -> bytes:
        """The bytes of the file; for a list of images, the bytes of all images, each after its length."""
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
    """An image, made smaller if it has too many pixels."""
    factor = math.isqrt(image.width * image.height // FRAME_PIXELS)
    return image.reduce(factor) if factor > 1 else image
