"""Raw items, which no catalogue has: checking the contents that a caller gives, and turning them into vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from ..data.clips import decode_clip, evenly
from ..data.images import decode_image
from ..data.sounds import decode_sound
from ..errors import BadContent, DataError, one_line, shortened
from ..items.encoding import packed_linears
from ..model.modalities_transrec import COLUMNS, MODALITIES, ItemBatch
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor, to_rgb


BATCH = 64  # items that are encoded at a time
HOW = "a raw item is a dictionary such as {'text': 'a red hat', 'image': PIL.Image}, an image, or an array of numbers"


def is_id(item: Any) -> bool:
    """Whether an item of a history is an id: a string always is, and never a text."""
    return isinstance(item, (str, int, np.integer)) and not isinstance(item, bool)


def read_raw(item: Any, modalities: Sequence[str]) -> dict[str, Any]:
    """
    The contents of a raw item, by modality: a text, an RGB image, a float32 vector, the bytes or samples of a sound,
    the bytes or frames of a video.

    Args:
        item (`dict`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): A dictionary of contents by modality, or an
            image or a vector alone. An image is a PIL image or the bytes of a file; a sound is the bytes of a file, or
            samples at the rate of the processor.
        modalities (`Sequence[str]`): The modalities that the model reads.

    Raises:
        [`DataError`]: If the item has no content that the model can read.
    """
    if isinstance(item, PIL.Image.Image):
        item = {"image": item}
    elif isinstance(item, (np.ndarray, Tensor)):
        item = {"features": item}
    if not isinstance(item, Mapping):
        raise DataError(f"an item of a history must be an id or a raw item, got {type(item).__name__}; {HOW}")
    unknown = [name for name in item if name not in MODALITIES]
    if unknown:
        raise DataError(f"a raw item cannot have {shortened(unknown[0])!r}: give some of {', '.join(MODALITIES)}")
    readers: dict[str, Callable[[Any], Any]] = {
        "text": _text,
        "image": _image,
        "features": _vector,
        "audio": _sound,
        "video": _video,
        "codes": _codes,
    }
    shown = {name: readers[name](item[name]) for name in modalities if item.get(name) is not None}
    if not shown:
        given = ", ".join(name for name in item if item[name] is not None) or "nothing"
        reads = ", ".join(modalities) or "no content: it knows items by their ids only"
        raise DataError(f"a raw item has {given}, but this model reads {reads}")
    return shown


def _text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"the text of a raw item is {shortened(repr(text))}: give a string that is not blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text of a raw item holds a broken character ({shortened(error)}): remove it") from error
    return text


def _image(image: Any) -> PIL.Image.Image:
    if not isinstance(image, (bytes, bytearray, memoryview, PIL.Image.Image)):
        raise DataError(f"the image of a raw item is {type(image).__name__}: give a PIL image or its bytes")
    try:
        decoded = to_rgb(image) if isinstance(image, PIL.Image.Image) else decode_image(pa.py_buffer(image))
        assert decoded is not None
        return decoded
    except Exception as error:  # whatever decoders raise
        raise DataError(f"the image of a raw item cannot be read ({shortened(one_line(error), 200)})") from error


def _numbers(values: Any) -> np.ndarray:
    """Values as float32; an empty array if they are not numbers."""
    try:
        with np.errstate(over="ignore"):
            return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return np.empty(0, dtype=np.float32)


def _vector(vector: Any) -> np.ndarray:
    numbers = _numbers(vector)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all() or not numbers.any():
        raise DataError("the features of a raw item must be a list of finite numbers that are not all zero")
    return numbers


def _codes(codes: Any) -> np.ndarray:
    numbers = _numbers(codes)
    if numbers.ndim != 1 or not len(numbers) or not (numbers >= 0).all() or (numbers % 1).any():
        raise DataError("the codes of a raw item must be a list of whole numbers from 0")
    return numbers.astype(np.int64)


def _sound(sound: Any) -> Any:
    if isinstance(sound, (bytes, bytearray, memoryview)):
        return bytes(sound)
    samples = _numbers(sound)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise DataError("the audio of a raw item must be the bytes of a file, or finite samples of one channel")
    return samples


def _video(video: Any) -> Any:
    if isinstance(video, (bytes, bytearray, memoryview)):
        return bytes(video)
    if not isinstance(video, Sequence) or not video:
        raise DataError("the video of a raw item must be the bytes of a file, or a list of images")
    return list(video)  # decoded later, since a model reads few of them


def without_ids(model: TransRecModel) -> TransRecModel:
    """The same model with the same weights, for items without ID vectors: they count as zero."""
    if model.config.num_items is None or not model.config.modalities:
        return model
    other = copy.copy(model)
    other.config = copy.copy(model.config)
    other.config.num_items = None
    return other


def _decoded(processor: TransRecProcessor, name: str, content: Any) -> Any:
    """The samples or frames of a content, which may be the bytes of a file. Raises [`DataError`]."""
    if isinstance(content, list):
        return [_image(content[place]) for place in evenly(len(content), processor.num_frames)]
    if not isinstance(content, bytes):
        return content
    decode: Any = {"audio": decode_sound, "video": decode_clip}[name]
    try:
        return decode(pa.py_buffer(content), **processor.form(name))
    except BadContent as error:
        raise DataError(f"the {name} of a raw item cannot be read ({error})") from error


def raw_batch(processor: TransRecProcessor, contents: Sequence[Mapping[str, Any]]) -> ItemBatch:
    """The results of [`read_raw`] as a batch for the model. Raises [`DataError`]."""
    columns: dict[str, Any] = {name: [shown.get(name) for shown in contents] for name in processor.modalities}
    if "image" in columns:
        columns["images"] = columns.pop("image")
    for name in {"audio", "video"} & columns.keys():
        columns[name] = [_decoded(processor, name, content) for content in columns[name]]
    given = {name: column for name, column in columns.items() if any(value is not None for value in column)}
    try:
        return ItemBatch.from_inputs(**processor(**given))
    except ValueError as error:
        raise DataError(f"raw items: {one_line(error)}") from error


@torch.no_grad()
def encode_raw(
    model: TransRecModel, processor: TransRecProcessor, contents: Sequence[Mapping[str, Any]], unknown: float = 0.0
) -> tuple[Tensor, Tensor]:
    """
    The vectors of raw items, `(n, width)`, fp32, and the modalities that they have.

    Args:
        model ([`TransRecModel`]): The model.
        processor ([`TransRecProcessor`]): The processor of the model.
        contents (`Sequence[dict]`): See [`read_raw`].
        unknown (`float`, *optional*): The log popularity of an item that nobody has chosen yet.
    """
    model = without_ids(model)
    vectors, present = [], []
    with packed_linears(model):
        for start in range(0, len(contents), BATCH):
            batch = raw_batch(processor, contents[start : start + BATCH])
            vectors.append(model.get_item_features(batch.to(model.device)).float())
            present.append(batch.present)
    embeds = torch.cat(vectors)
    return model.with_popularity(embeds, embeds.new_full((len(embeds),), unknown)), torch.cat(present)


def masked(batch: ItemBatch, name: str) -> ItemBatch | None:
    """The items with one modality hidden, if they have another one; `None` if no item has."""
    column = COLUMNS[name]
    hides = batch.present[:, column] & (batch.present.sum(dim=1) > 1)
    if not hides.any():
        return None
    present = batch.present.clone()
    present[hides, column] = False
    parts = dict(batch.parts)
    if (kept := parts.pop(name).select(~hides)) is not None:
        parts[name] = kept
    return ItemBatch(present, parts, batch.item_rows)
