"""
Compare encoding the sounds and videos of a catalogue with the tower's own forward pass, for which all contents are
decoded and prepared already.

    python benchmarks/run.py media --audio_model yamnet --video_model mobilenet_v1

A share of 1 means that reading and decoding cost nothing. The files are made here: tones of 30 seconds at 44.1 kHz in
stereo, of which a model reads windows, and moving bars of 10 seconds at 320 x 240 pixels and 25 frames per second, of
which it reads 8 frames. All of it runs in one thread. Time is that of the processor in the fastest round.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import av
import numpy as np
import torch
from common import Results, interleaved

from transrec_hf import Catalogue, TransRecModel, TransRecProcessor, encode_catalogue, load_catalogue
from transrec_hf.items.encoding import packed_linears
from transrec_hf.items.preparing import ItemSource


RATE, SECONDS = 44_100, 30
SOUNDS = {"WAV": ("wav", "pcm_s16le"), "FLAC": ("flac", "flac"), "MP3": ("mp3", "libmp3lame"), "AAC": ("mp4", "aac")}
SIZE, FRAMES, FRAME_RATE = (320, 240), 250, 25
VIDEOS = {"MP4": ("mp4", "libx264"), "WEBM": ("webm", "libvpx-vp9")}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--audio_model", help="folder or Hub id of an encoder of sounds")
    parser.add_argument("--video_model", help="folder or Hub id of an encoder of images or clips")
    parser.add_argument("--num_items", type=int, default=16, help="sounds and videos of each format")
    parser.add_argument("--formats", nargs="+", default=[*SOUNDS, *VIDEOS], help="formats of the files")


def sound(rng: np.random.Generator, container: str, codec: str) -> bytes:
    """A chord in noise."""
    times = np.arange(RATE * SECONDS) / RATE
    chord = np.sin(2 * np.pi * rng.uniform(100, 4000, (4, 1)) * times).sum(axis=0)
    mono = chord + rng.normal(scale=0.3, size=len(times))
    samples = (np.stack([mono, 0.8 * mono], axis=1) * 3000).astype(np.int16).reshape(1, -1)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = RATE
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def video(rng: np.random.Generator, container: str, codec: str) -> bytes:
    """Bars that move over a picture."""
    width, height = SIZE
    picture = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for place in range(FRAMES):
            moved = np.roll(picture, (place, 2 * place), axis=(0, 1))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def compare(
    name: str, model: TransRecModel, processor: TransRecProcessor, catalogue: Catalogue, variant: str,
    options: argparse.Namespace, results: Results,
) -> None:  # fmt: skip
    source = ItemSource(catalogue, processor)
    part = source.batch(np.arange(len(source))).parts[name]
    passes = list(part.passes(model.pass_size(name)))

    @torch.no_grad()
    def forward() -> None:
        with packed_linears(model):
            for values, mask in passes:
                model.item_encoder.state(name, values, mask)

    def encode() -> None:
        encode_catalogue(model, source)

    seconds = interleaved({"tower": forward, "encoding": encode}, options.repeats, clock=time.process_time)
    windows = sum(int((mask > 0).sum()) for _, mask in passes if mask is not None)
    unit = "windows/s" if name == "audio" else "frames/s"
    fastest = {way: min(times) for way, times in seconds.items()}
    results.add(variant, "speed", windows / fastest["encoding"], unit)
    share = fastest["tower"] / fastest["encoding"]
    results.add(variant, "share", share, "x", reference="the tower's own pass")


def run(options: argparse.Namespace, results: Results) -> None:
    torch.set_num_threads(1)
    for name, make, formats in (("audio", sound, SOUNDS), ("video", video, VIDEOS)):
        if not (tower := getattr(options, f"{name}_model")):
            continue
        model = TransRecModel.from_text_vision_pretrained(**{f"{name}_model": tower}).float().eval()
        processor = TransRecProcessor.from_towers(**{f"{name}_model": tower})
        kind = Path(tower).name
        for label, form in ((label, form) for label, form in formats.items() if label in options.formats):
            rng = np.random.default_rng(options.seed)
            ids = [str(place) for place in range(options.num_items)]
            catalogue = load_catalogue({"item_id": ids, name: [make(rng, *form) for _ in ids]})
            compare(name, model, processor, catalogue, f"{kind}, {label}", options, results)
