"""The built-in demo world: two small platforms on which content transfers and ids cannot.

An item is a drawn thing with four attributes: colour, shape, pattern and size. Some items show them in a short title
("crimson striped star , large"), some in an image, some in both. On request some show them in a sound (its pitch,
timbre, rhythm and loudness stand for colour, shape, pattern and size) or in a video. A user likes one colour, one
shape and one pattern. Each of these tastes moves along a cycle that is the same on both platforms: a user who liked
orange stars then likes gold ones. The platforms share no user, no item and no combination of attributes. Their titles
have different wordings, their images different papers, and their sounds different noise. So all that a model can
transfer from the source to the target is how content looks and sounds, and how tastes move.

Everything is computed from a seed with NumPy and Pillow, in about a second; nothing is downloaded or licensed.
"""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..model.configuration_transrec import FORMAT_1, TransRecConfig
from ..model.modalities_transrec import MODALITIES
from ..model.processing_transrec import TransRecProcessor
from ..model.windows_transrec import LogMelFeatureExtractor
from .catalogue import Catalogue, load_catalogue
from .interactions import Sequences, load_interactions


COLOURS = {
    "crimson": (195, 20, 50),
    "orange": (245, 125, 20),
    "gold": (240, 200, 30),
    "lime": (160, 220, 40),
    "green": (25, 135, 50),
    "teal": (15, 155, 145),
    "sky": (95, 195, 245),
    "navy": (20, 40, 140),
    "violet": (120, 60, 205),
    "magenta": (220, 40, 190),
    "rose": (250, 150, 175),
    "brown": (120, 70, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PATTERNS = ("plain", "striped", "dotted", "checked", "split")
SIZES = ("small", "medium", "large")
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "pattern": PATTERNS, "size": SIZES}
IMAGE_SIZE = 32  # pixels, both sides
TASTE_WEIGHTS = (6.0, 5.0, 4.0)  # what a match of colour, shape, pattern adds to the utility of an item
TASTE_DRIFT = (0.3, 0.2, 0.1)  # chance per step that the liked colour, shape, pattern moves on by one in its cycle
POPULARITY_SPREAD = 0.3  # standard deviation of the utility which all users share
SHOWN = ("text", "image")
"""The modalities of the demo world by default."""
SHARE_OF_ALL = 0.3  # share of the items that show all modalities; the others show one each
FRAMES = 3  # frames of a video
RATE = 8000  # samples of a sound per second
PITCHES = 220 * 2 ** (np.arange(len(COLOURS)) / 5)  # Hz
TIMBRES = np.array(  # of the overtones, by shape
    [
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0.9, 0, 0.8, 0],
        [1, 0.9, 0.8, 0.7, 0.6, 0.5],
        [0.3, 1, 0, 0, 0, 0],
        [0.3, 0, 0, 1, 0, 0.5],
        [0.5, 0.2, 0, 0, 0, 1],
    ]
)
RHYTHMS = ("########", "#.#.#.#.", "#...#...", "##..##..", "####....")  # loud and silent eighths, by pattern
LOUDNESS = (0.1, 0.25, 0.6)  # by size
EIGHTH = RATE // 20  # samples


@dataclass(frozen=True)
class PlatformStyle:
    """How one platform looks, and how many items and users it has.

    Args:
        name (`str`): Prefix of the platform's item and user ids.
        num_items (`int`): Items in the catalogue.
        num_users (`int`): Users, each with one sequence.
        lengths (`tuple[int, int]`): Shortest and longest sequence, in interactions.
        title (`str`): Template of the titles; its fields are the names of the attributes.
        paper (`tuple[int, int, int]`): RGB colour that the images are drawn on.
        hiss (`float`): Loudness of the noise that is in the sounds.
    """

    name: str
    num_items: int
    num_users: int
    lengths: tuple[int, int]
    title: str
    paper: tuple[int, int, int]
    hiss: float


SOURCE = PlatformStyle("source", 600, 3000, (8, 14), "{colour} {pattern} {shape} , {size}", (255, 255, 250), 0.01)
TARGET = PlatformStyle("target", 400, 300, (4, 7), "{size} {pattern} {shape} in {colour}", (240, 243, 252), 0.02)


@dataclass(frozen=True)
class DemoPlatform:
    """One platform of the demo world.

    Args:
        catalogue ([`Catalogue`]):
            Its items, each with a title, an image or both, or with other modalities on request. The column
            `attributes` is for people; no model reads it.
        sequences ([`Sequences`]): Its users' interactions, in time order.
        attributes (`np.ndarray` of shape `(num_items, 4)`):
            The true attributes: indices into the values of `ATTRIBUTES`, in its order. No model may see them.
        tastes (`np.ndarray` of shape `(num_interactions, 3)`):
            The colour, shape and pattern that the user liked best at each interaction of `sequences`. No model may see
            them.
    """

    catalogue: Catalogue
    sequences: Sequences
    attributes: np.ndarray
    tastes: np.ndarray

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `items.parquet` and `interactions.parquet`, as [`load_domain`] reads them."""
        from datasets import Dataset

        Path(folder).mkdir(parents=True, exist_ok=True)
        user, place = self.sequences.expand()
        interactions = {
            "user_id": self.sequences.user_ids[user],
            "item_id": self.catalogue.item_ids[self.sequences.items[place]],
            "timestamp": self.sequences.timestamps[place],
        }
        self.catalogue.items.to_parquet(Path(folder) / "items.parquet")
        Dataset.from_dict(interactions).to_parquet(Path(folder) / "interactions.parquet")


@dataclass(frozen=True)
class DemoWorld:
    """The two platforms of the demo, without a common user, item or combination of attributes."""

    source: DemoPlatform
    target: DemoPlatform


def demo_world(seed: int = 0, modalities: Collection[str] = SHOWN) -> DemoWorld:
    """Draws the demo world.

    Args:
        seed (`int`, *optional*, defaults to 0): The same seed gives the same world, byte for byte.
        modalities (`Collection[str]`, *optional*, defaults to text and image): The modalities of the items, some of
            `"text"`, `"image"`, `"audio"` and `"video"`. Three in ten items have all of them, the others one each.

    Returns:
        [`DemoWorld`]: A source of 600 items and 3 000 users, and a target of 400 items and 300 users with shorter
            histories.
    """
    rng = np.random.default_rng(seed)
    combinations = np.array(list(product(*(range(len(values)) for values in ATTRIBUTES.values()))))
    rng.shuffle(combinations)
    source, target, _ = np.split(combinations, [SOURCE.num_items, SOURCE.num_items + TARGET.num_items])
    shown = tuple(modalities)
    return DemoWorld(_draw_platform(SOURCE, source, rng, shown), _draw_platform(TARGET, target, rng, shown))


def demo_processor(modalities: Collection[str] = SHOWN) -> TransRecProcessor:
    """A processor for the demo world, made in memory: each word is a token, and images keep their size."""
    from transformers import BertTokenizer, ViTImageProcessorPil

    vocabulary = {word: index for index, word in enumerate(_vocabulary())}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    spectrogram = LogMelFeatureExtractor(
        RATE, IMAGE_SIZE, IMAGE_SIZE, 256, EIGHTH // 4, 256, (150.0, 4000.0), offset=0.1, is_image=False
    )
    return TransRecProcessor(
        BertTokenizer(vocab=vocabulary) if "text" in modalities else None,
        ViTImageProcessorPil(size=size) if "image" in modalities else None,
        feature_extractor=spectrogram if "audio" in modalities else None,
        max_audio_windows=1,
        frame_image_processor=ViTImageProcessorPil(size=size) if "video" in modalities else None,
        num_frames=FRAMES,
    )


def demo_config(modalities: Collection[str] = SHOWN, **overrides: Any) -> TransRecConfig:
    """
    A configuration that learns the demo world on a CPU in a minute, with towers of two blocks (BERT, ViT, AST) for the
    given modalities.

    Args:
        modalities (`Collection[str]`, *optional*, defaults to text and image): The modalities that the model reads.
        overrides: Fields of [`TransRecConfig`] that replace those of the demo.
    """
    from transformers import ASTConfig, BertConfig, ViTConfig

    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    towers = {
        "text": BertConfig(vocab_size=len(_vocabulary()), max_position_embeddings=16, **tower),
        "image": ViTConfig(image_size=IMAGE_SIZE, patch_size=8, **tower),
        "video": ViTConfig(image_size=IMAGE_SIZE, patch_size=8, **tower),
        "audio": ASTConfig(max_length=IMAGE_SIZE, num_mel_bins=IMAGE_SIZE, **patches, **tower),
    }
    # its towers are random, so content says nothing at the start; a linear map and dot products can learn everything
    fields = {**FORMAT_1, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"intermediate_size": 128, "hidden_dropout_prob": 0.1}
    fields |= {"max_position_embeddings": 16}
    fields |= {MODALITIES[name].config: towers[name] for name in modalities}
    return TransRecConfig(**(fields | overrides))


def attribute_words(attributes: np.ndarray) -> dict[str, str]:
    """The names of the four attributes of an item, for example `{"colour": "gold", "shape": "star", ...}`."""
    return {name: values[index] for (name, values), index in zip(ATTRIBUTES.items(), attributes, strict=True)}


def _draw_platform(
    style: PlatformStyle, attributes: np.ndarray, rng: np.random.Generator, modalities: tuple[str, ...]
) -> DemoPlatform:
    from datasets import Dataset

    item_ids = [f"{style.name}-item-{row:04d}" for row in range(len(attributes))]
    shares = [(1 - SHARE_OF_ALL) / len(modalities)] * len(modalities)
    kinds = rng.choice([*modalities, "all"], size=len(attributes), p=[*shares, SHARE_OF_ALL])
    titles = [style.title.format(**attribute_words(row)) for row in attributes]
    contents: dict[str, list[Any]] = {"text": titles}
    images = _draw_images(attributes, style.paper, rng)
    contents["image"] = [{"bytes": image} for image in _encode_png(images)]
    if "video" in modalities:
        contents["video"] = [{"bytes": clip} for clip in _encode_gif(images)]
    if "audio" in modalities:
        contents["audio"] = [{"bytes": sound} for sound in _play_sounds(attributes, style.hiss, rng.spawn(1)[0])]
    columns = {
        name: [content if kind in (name, "all") else None for content, kind in zip(contents[name], kinds, strict=True)]
        for name in modalities
    }
    catalogue = load_catalogue(Dataset.from_dict({"item_id": item_ids, **columns, "attributes": titles}))

    users, steps, rows, tastes = _draw_interactions(style, attributes, rng)
    interactions = {
        "user_id": [f"{style.name}-user-{user:04d}" for user in users],
        "item_id": [item_ids[row] for row in rows],
        "timestamp": steps,
    }
    return DemoPlatform(catalogue, load_interactions(Dataset.from_dict(interactions), catalogue), attributes, tastes)


def _draw_interactions(
    style: PlatformStyle, attributes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lets every user choose, step by step, one of the items not yet chosen, with probability softmax(utility).

    Returns:
        users, steps and catalogue rows, `(num_interactions,)` each, and tastes, `(num_interactions, 3)`; by user, then
        step.
    """
    users, longest = np.arange(style.num_users), style.lengths[1]
    cycles = np.array([len(values) for values in ATTRIBUTES.values()][: len(TASTE_WEIGHTS)])
    taste = rng.integers(0, cycles, size=(style.num_users, len(cycles)))
    lengths = rng.integers(style.lengths[0], longest, size=style.num_users, endpoint=True)
    shared = rng.normal(scale=POPULARITY_SPREAD, size=style.num_items)
    seen = np.zeros((style.num_users, style.num_items), dtype=bool)
    rows = np.empty((style.num_users, longest), dtype=np.int64)
    tastes = np.empty((style.num_users, longest, len(cycles)), dtype=np.int64)
    for step in range(longest):
        utility = shared + rng.gumbel(size=seen.shape)  # with Gumbel noise, the argmax is a draw from the softmax
        for column, weight in enumerate(TASTE_WEIGHTS):
            utility += weight * (taste[:, column, None] == attributes[:, column])
        rows[:, step] = np.where(seen, -np.inf, utility).argmax(axis=1)
        tastes[:, step] = taste
        seen[users, rows[:, step]] = True
        taste = (taste + (rng.random(taste.shape) < TASTE_DRIFT)) % cycles
    kept = np.arange(longest) < lengths[:, None]
    user_of, step_of = np.nonzero(kept)
    return user_of, step_of, rows[kept], tastes[kept]


def _draw_images(attributes: np.ndarray, paper: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Draws one image per row of `attributes`, jittered in place and shade: `(num_items, 32, 32, 3)`, uint8."""
    colour, shape, pattern, size = attributes.T
    ink = np.array(list(COLOURS.values()), dtype=np.float32)[colour][:, None, None]
    light = 0.25 * ink + 0.75 * 255
    paint = np.where(_patterns()[pattern][..., None], ink, light)
    cover = _stencils()[shape, size][..., None]
    shade = rng.uniform(-12, 0, size=(len(attributes), 1, 1, 1))
    images = cover * paint + (1 - cover) * (np.array(paper) + shade)
    shifts = rng.integers(-1, 1, size=(len(attributes), 2), endpoint=True)
    images = np.stack([np.roll(image, shift, axis=(0, 1)) for image, shift in zip(images, shifts, strict=True)])
    return np.clip(images + rng.normal(scale=3, size=images.shape), 0, 255).astype(np.uint8)


def _stencils(supersampling: int = 4) -> np.ndarray:
    """How much of each pixel each of `SHAPES` covers in each of `SIZES`: `(6, 3, 32, 32)`, in [0, 1]."""
    side = supersampling * IMAGE_SIZE
    y, x = (np.mgrid[:side, :side] + 0.5) * 2 / side - 1
    covers = []
    for scale in (0.6, 0.75, 0.9):
        right, down = np.abs(x) / scale, y / scale
        radius, near, far = np.hypot(right, down), np.minimum(right, np.abs(down)), np.maximum(right, np.abs(down))
        from_tip = np.abs((np.arctan2(x, -y) * 5 / (2 * np.pi) + 0.5) % 1 - 0.5)  # 0 at a star's tips, 0.5 between
        shapes = {
            "circle": radius < 1,
            "square": far < 0.85,
            "triangle": (down < 0.7) & (right < 0.6 * (down + 1)),
            "star": radius < 1.05 - 1.2 * from_tip,
            "cross": (near < 0.33) & (far < 0.95),
            "ring": (radius < 1) & (radius > 0.5),
        }
        covers.append([shapes[name] for name in SHAPES])
    blocks = np.array(covers).reshape(len(SIZES), len(SHAPES), IMAGE_SIZE, supersampling, IMAGE_SIZE, supersampling)
    return blocks.mean(axis=(3, 5)).swapaxes(0, 1)


def _patterns() -> np.ndarray:
    """Where each of `PATTERNS` puts full ink rather than light ink: `(5, 32, 32)`, bool."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    plain = np.ones_like(x, dtype=bool)
    striped = y // 3 % 2 == 0
    dotted = (x % 6 - 2.5) ** 2 + (y % 6 - 2.5) ** 2 > 4
    checked = (x // 4 + y // 4) % 2 == 0
    split = x < IMAGE_SIZE // 2
    return np.stack([plain, striped, dotted, checked, split])


def _play_sounds(attributes: np.ndarray, hiss: float, rng: np.random.Generator) -> list[bytes]:
    """Plays one sound per row of `attributes`, a little out of tune, as WAV."""
    time = np.arange(len(RHYTHMS[0]) * EIGHTH) / RATE
    overtones = np.arange(1, TIMBRES.shape[1] + 1)[:, None]
    ramp = np.minimum(1, np.arange(1, EIGHTH + 1) / 40)  # without clicks
    gates = [np.concatenate([(mark == "#") * ramp for mark in rhythm]) for rhythm in RHYTHMS]
    sounds = []
    for colour, shape, pattern, size in attributes:
        pitch = PITCHES[colour] * rng.uniform(0.98, 1.02)
        phases = 2 * np.pi * (pitch * overtones * time + rng.random(overtones.shape))
        heard = TIMBRES[shape] * (pitch * overtones[:, 0] < RATE / 2)
        tone = LOUDNESS[size] * gates[pattern] * (heard @ np.sin(phases)) / heard.sum()
        samples = np.clip(tone + rng.normal(scale=hiss, size=len(time)), -1, 1)
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, RATE, len(time), "NONE", "not compressed"))
            sound.writeframes((samples * 32767).astype("<i2").tobytes())
        sounds.append(file.getvalue())
    return sounds


def _encode_png(images: np.ndarray) -> list[bytes]:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    return encoded


def _encode_gif(images: np.ndarray) -> list[bytes]:
    """Encode images as animated GIFs, whose content rotates."""
    encoded = []
    for image in images:
        steps = np.arange(FRAMES) * IMAGE_SIZE // FRAMES
        first, *others = [Image.fromarray(np.roll(image, step, axis=1)) for step in steps]
        buffer = io.BytesIO()
        first.save(buffer, format="GIF", save_all=True, append_images=others, duration=100)
        encoded.append(buffer.getvalue())
    return encoded


def _vocabulary() -> list[str]:
    words = [word for values in ATTRIBUTES.values() for word in values]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "in", *words]
