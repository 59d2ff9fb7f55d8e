"""Sounds of items, decoded by PyAV, and only the parts that are needed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import BadContent, DataError, shortened
from ..model.windows_transrec import window_starts
from .media import Files


if TYPE_CHECKING:
    import datasets
    from av import AudioFrame
    from av.container import InputContainer


AUDIO_FORMATS = ("WAV", "FLAC", "OGG", "MP3", "AAC", "M4A")
MIN_RATE, MAX_RATE, MAX_CHANNELS = 1000, 768_000, 64
MAX_LEVEL = 100.0
"""Largest allowed sample; in files of whole numbers, the loudest sample is 1."""
MAX_JUMPS = 100_000
"""Most jumps within one file."""
MAX_BROKEN = 100
"""Most damaged packets of a stream; they are left out, as players do."""
PIECE = 2**16
"""Samples of all channels that are mixed and resampled at a time."""
CHECKED_SECONDS = 30.0
"""Seconds that are decoded to check a sound."""


def format_of(head: bytes) -> str | None:
    """
    The demuxer for a file that begins with `head` (16 bytes). No other demuxer is tried, because some of them, such as
    those of playlists, open other files and network addresses.
    """
    if head[:4] in (b"RIFF", b"RF64", b"BW64"):
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0:
        return "aac"
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE0 == 0xE0):
        return "mp3"
    starts = {b"fLaC": "flac", b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "matroska", b"GIF8": "gif"}
    return starts.get(head[:4])


class _Bounded:
    """
    A file for a demuxer, which then opens nothing itself. Reading ends at the end of the file, whatever its header
    says, and a file with millions of empty parts is refused.
    """

    def __init__(self, source: pa.Buffer | str):
        self._file: Any = pa.BufferReader(source) if isinstance(source, pa.Buffer) else open(source, "rb")
        self._size, self._jumps = self._file.seek(0, io.SEEK_END), 0
        self._file.seek(0)
        self.close = self._file.close

    def read(self, size: int) -> bytes:
        return self._file.read(size) if self._jumps < MAX_JUMPS else b""

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self._jumps += 1
        if self._jumps == MAX_JUMPS:
            raise BadContent(f"damaged: it cannot be read without {MAX_JUMPS:,} jumps. Save it again")
        place += (0, self.tell(), self._size)[whence]
        return self._file.seek(min(max(0, place), self._size)) if self._jumps < MAX_JUMPS else -1

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def opened(source: pa.Buffer | str, formats: tuple[str, ...]) -> Iterator[InputContainer]:
    """
    A sound or video file, open for decoding.

    Args:
        source (`pa.Buffer` or `str`): The encoded file, or its path.
        formats (`tuple[str]`): The formats that can be read, for messages.

    Raises:
        [`BadContent`]: If the file has another format, or is damaged.
        [`DataError`]: If PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError("sounds and videos need PyAV: pip install 'transrec-hf[media]'") from error
    try:
        with closing(_Bounded(source)) as file:
            demuxer = format_of(file.read(16))
            if demuxer is None:
                raise BadContent(f"not a file of a known format ({', '.join(formats)})")
            file.seek(0)
            # the header of a WAV file tells what it holds, so the stream need not be analysed
            options = {"probesize": "32"} if demuxer == "wav" else {}
            readable: Any = file
            with av.open(readable, format=demuxer, options=options, metadata_errors="replace") as container:
                yield container
    except BadContent:
        raise
    except MemoryError as error:
        raise BadContent("there is not enough memory to decode it") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise BadContent(f"truncated or damaged file ({type(error).__name__}: {shortened(reason, 200)})") from error


def frames_of(container: InputContainer, stream: Any) -> Iterator[Any]:
    """The decoded frames of a stream, without damaged packets. Raises [`BadContent`] if too many are damaged."""
    import av

    packets, broken = container.demux(stream), 0
    while True:
        try:
            yield from next(packets).decode()
        except (StopIteration, EOFError):
            return
        except (av.InvalidDataError, av.ArgumentError) as error:  # the second if a packet changes the format
            broken += 1
            if broken > MAX_BROKEN:
                raise BadContent(f"more than {MAX_BROKEN} packets are damaged") from error


def decode_sound(
    source: pa.Buffer | str,
    sampling_rate: int = 16_000,
    seconds: float = CHECKED_SECONDS,
    windows: int = 1,
    at: float = 0.5,
) -> np.ndarray:
    """
    Decode a sound: the mean of its channels, `(samples,)`, float32. If it is longer than `seconds`, only so many
    seconds are decoded: the first ones or, with several windows, evenly spread pieces, one after the other.

    Args:
        source (`pa.Buffer` or `str`): The encoded file, or its path.
        sampling_rate (`int`, *optional*, defaults to 16000): Samples per second.
        seconds (`float`, *optional*, defaults to 30): Most seconds that are decoded.
        windows (`int`, *optional*, defaults to 1): Number of pieces.
        at (`float`, *optional*, defaults to 0.5): The sound is divided into `windows` equal parts; position of the
            piece in its part, from 0 to 1.

    Raises:
        [`BadContent`]: If the sound cannot be used.
    """
    wanted, starts = round(sampling_rate * seconds), [0.0]
    with opened(source, AUDIO_FORMATS) as container:
        stream = _stream(container)
        length = seconds_of(container, stream)
        if windows > 1 and length > seconds:
            starts = window_starts(length, seconds / windows, windows, at)
        samples = _samples(container, stream, sampling_rate, wanted, starts, seconds / len(starts))
    if len(starts) > 1 and 2 * len(samples) < wanted:  # it is shorter than its header says
        with opened(source, AUDIO_FORMATS) as container:
            samples = _samples(container, _stream(container), sampling_rate, wanted, [0.0], seconds)
    found = len(samples)
    if not found:
        raise BadContent("it has no samples")
    if 2 * found < min(wanted, length * sampling_rate):
        raise BadContent(
            f"truncated: {found / sampling_rate:.1f} of {length:.1f} seconds can be decoded. Get the file again"
        )
    if not np.isfinite(samples).all():
        raise BadContent("some samples are NaN or infinite")
    if (peak := np.abs(samples).max()) > MAX_LEVEL:
        raise BadContent(f"it has samples of up to {peak:.0e}, but 1 is the loudest: save it with 16 bits per sample")
    return samples


def _samples(
    container: InputContainer, stream: Any, sampling_rate: int, wanted: int, starts: Iterable[float], seconds: float
) -> np.ndarray:
    """At most `wanted` samples: `seconds` from each start on."""
    frames = chain.from_iterable(_piece(container, stream, start, seconds) for start in starts)
    pieces = map(_mono, _joined(frames))
    sounds = pieces if stream.rate == sampling_rate else _resampled(pieces, stream.rate, sampling_rate)
    parts, found = [np.empty(0, dtype=np.float32)], 0
    for samples in sounds:
        parts.append(samples)
        found += len(samples)
        if found >= wanted:
            break
    return np.concatenate(parts)[:wanted]


def _piece(container: InputContainer, stream: Any, start: float, seconds: float) -> Iterator[np.ndarray]:
    """`seconds` from the time `start` on, frame by frame: `(channels, samples)` at the rate of the stream."""
    import av

    first = float((stream.start_time or 0) * stream.time_base)
    left = math.ceil(seconds * stream.rate) + 1
    if start > 0:
        with suppress(av.FFmpegError):  # if seeking fails, read on
            container.seek(int((first + start) / stream.time_base), stream=stream)
    for frame in frames_of(container, stream):
        before = 0 if frame.time is None else max(0, round((first + start - frame.time) * frame.sample_rate))
        if before < frame.samples:
            samples = _channels(frame)[:, before:][:, :left]
            left -= samples.shape[1]
            yield samples
        if left <= 0:
            return


def _channels(frame: AudioFrame) -> np.ndarray:
    """The samples of a frame: `(channels, samples)`."""
    samples = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels).T


def _joined(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames of `(channels, samples)`, joined to larger ones if they are of one kind."""
    parts: list[np.ndarray] = []
    found = 0
    for samples in frames:
        if parts and (found >= PIECE or (samples.dtype, len(samples)) != (parts[0].dtype, len(parts[0]))):
            yield np.concatenate(parts, axis=1)
            parts, found = [], 0
        parts.append(samples)
        found += samples.size
    if parts:
        yield np.concatenate(parts, axis=1)


def _stream(container: InputContainer) -> Any:
    """The first audio stream. Raises [`BadContent`] if there is none, or its header is absurd."""
    if not container.streams.audio:
        raise BadContent("the file has no audio stream")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise BadContent("its codec is not known: save it as WAV or FLAC")
    rate, channels = stream.rate or 0, stream.codec_context.channels
    if not (rate > 0 and channels > 0):
        raise BadContent("truncated or damaged file (no frame of sound can be found in it)")
    if not MIN_RATE <= rate <= MAX_RATE or channels > MAX_CHANNELS:
        raise BadContent(
            f"it has {rate:,} samples per second in {channels} channels; {MIN_RATE:,} to {MAX_RATE:,} in at most "
            f"{MAX_CHANNELS} channels can be read"
        )
    return stream


def seconds_of(container: InputContainer, stream: Any) -> float:
    """The length of a stream in seconds by its header; 0 if the header does not tell."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    first = float((stream.start_time or 0) * stream.time_base)
    return max(0.0, (container.duration or 0) / 1_000_000 - max(0.0, first))  # in Matroska, whose clock starts at 0


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of all channels, however many there are: `(samples,)`, float32."""
    scale, middle = 1 / len(samples), np.float32(0)
    if samples.dtype.kind in "iu":
        scale /= 2.0 ** (8 * samples.dtype.itemsize - 1)
        middle = np.float32(samples.dtype == np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite samples are refused later
        return np.full(len(samples), scale, np.float32) @ samples.astype(np.float32) - middle


def _resampled(sounds: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """The pieces of a sound at another rate."""
    import av

    resampler, given, made = av.AudioResampler(format="flt", layout="mono", rate=wanted), np.empty(0), 0
    for samples in sounds:
        given = samples
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="flt", layout="mono")
        frame.sample_rate = rate
        for part in resampler.resample(frame):
            made += part.samples
            yield part.to_ndarray()[0]
    for part in resampler.resample(None):
        made += part.samples
        yield part.to_ndarray()[0]
    if len(given) and not made:  # it is shorter than the filter
        places = np.arange(max(1, len(given) * wanted // rate)) * (rate / wanted)
        yield np.interp(places, np.arange(len(given)), given).astype(np.float32)


class Sounds(Files):
    """Sounds, which are read as mono at a given rate; see [`Files`]."""

    name = "audio"

    def __init__(self, rows: datasets.Dataset, folder: str | None = None) -> None:
        super().__init__(rows, folder)
        self._lengths = np.zeros(len(rows))

    def lengths(self) -> np.ndarray:
        """Seconds of each sound by its header, `(N,)`; 0 if the header does not tell, or was not read yet."""
        return self._lengths[self._places]

    def read(self, row: int, **form: Any) -> np.ndarray:
        """A sound or pieces of it, `(samples,)`, float32; `form` holds arguments of [`decode_sound`]."""
        return decode_sound(self._source(row), **form)

    def _check(self, row: int, full: bool) -> None:
        if full:
            self.read(row)
            return
        with opened(self._source(row), AUDIO_FORMATS) as container:
            self._lengths[self._places[row]] = seconds_of(container, _stream(container))
