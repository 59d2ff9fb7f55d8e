"""From raw contents of items to model inputs, for any non-empty subset of the modalities."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.processing_utils import ProcessorMixin

from .modalities_transrec import COLUMNS, MODALITIES
from .tuning_transrec import WholeFolders
from .windows_transrec import LogMelFeatureExtractor, window_starts


MAX_IMAGE_PIXELS = 64_000_000
"""Largest width x height that is decoded; a header with more pixels is refused before any pixel is read."""
MAX_ASPECT = 100
"""Largest ratio of the sides: a processor that resizes the shorter one would make a thin image enormous."""
LARGE = 4_000_000  # pixels; much larger images are shrunk, so that a batch of them does not fill the memory
MAX_CHARACTERS = 2**16
"""Characters of a text that are always read."""
CHARACTERS_AT_A_TIME = 2**22
LEAST_SAMPLES = 800
"""Least length of a sound; a shorter one is padded with silence, since it would not fill a frame of a spectrogram."""


class UnusableImage(ValueError):
    """Why an image cannot be used."""


def check_image_size(width: int, height: int) -> None:
    """Raise [`UnusableImage`] for an image that would need too much memory, or has no pixels."""
    if min(width, height) < 1:
        raise UnusableImage(f"{width} x {height} pixels: the image is empty")
    if width * height > MAX_IMAGE_PIXELS:
        raise UnusableImage(f"{width} x {height} pixels, more than {MAX_IMAGE_PIXELS} (decompression bomb?)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnusableImage(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def to_rgb(image: Image.Image) -> Image.Image:
    """
    An image as people see it: upright (EXIF), with 8 bits per channel, on white if it is transparent, and shrunk by a
    whole factor if it is very large. Raises [`UnusableImage`].
    """
    check_image_size(*image.size)
    is_png = image.format == "PNG"
    if image.format is not None or image.getexif():  # otherwise it was already converted
        image = ImageOps.exif_transpose(image)  # a copy
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _with_8_bits(image, is_png or image.mode.startswith("I;"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    factor = math.isqrt(image.width * image.height // LARGE)
    return image.reduce(factor) if factor > 1 else image


def _with_8_bits(image: Image.Image, has_16_bits: bool) -> Image.Image:
    """
    Convert a gray image of integers or floats to bytes. White is the largest number of 1, 8 or 16 bits, depending on
    the range of the image, or its brightest pixel if that is larger.
    """
    image = image.convert("I") if image.mode.startswith("I;") else image
    if image.mode == "F" and not torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).isfinite().all():
        raise UnusableImage("some pixels are NaN or infinite")
    extremes: Any = image.getextrema()
    low, high = extremes
    if has_16_bits or (low >= 0 and 255 < high <= 65535):
        low, high = 0, 65535
    elif low >= 0 and high <= 255:
        low, high = 0, 1 if image.mode == "F" and high <= 1 else 255
    scale = 255 / ((high - low) or 1)
    return image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


def image_processor_of(settings: dict[str, Any]) -> Any:
    """The image processor with some settings. Raises `ValueError` if transformers does not know its class."""
    name = str(settings.get("image_processor_type"))
    for known in (f"{name.removesuffix('Fast')}Pil", name):  # prefer the class that needs only Pillow
        found: Any = get_image_processor_class_from_name(known)
        if inspect.isclass(found) and issubclass(found, ImageProcessingMixin):
            return found.from_dict(settings)  # type: ignore[attr-defined]
    raise ValueError(f"there is no image processor {name!r}")


def feature_extractor_of(audio_model: str) -> Any:
    """The feature extractor of an audio tower; for a tower that reads images of one channel, it makes spectrograms."""
    config = AutoConfig.from_pretrained(audio_model, trust_remote_code=False)
    if getattr(config, "num_channels", None) == 1:
        return LogMelFeatureExtractor()
    return AutoFeatureExtractor.from_pretrained(audio_model, trust_remote_code=False)


class TransRecProcessor(WholeFolders, ProcessorMixin):
    r"""
    Prepares items for [`TransRecModel`]. It has a part for each modality that the model reads: a tokenizer for texts,
    an image processor for images, a feature extractor for sounds, an image processor for the frames of videos, and the
    sizes of ready vectors and codes.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the text tower, if there is one.
        image_processor (`BaseImageProcessor`, *optional*): Image processor of the vision tower, if there is one.
        max_text_length (`int`, *optional*, defaults to 64): Most tokens that are read of a text.
        features_size (`int`, *optional*): Length of ready vectors; `None` if the model reads none.
        feature_extractor (`FeatureExtractionMixin`, *optional*): Feature extractor of the audio tower, if there is
            one.
        audio_seconds (`float`, *optional*, defaults to 10): Seconds of a window of sound, for towers that read any
            length.
        max_audio_windows (`int`, *optional*, defaults to 3): Most windows that are read of a sound.
        frame_image_processor (`BaseImageProcessor`, *optional*): Image processor of the video tower, if there is one.
        num_frames (`int`, *optional*, defaults to 8): Most frames that are read of a video, evenly spaced.
        num_codebooks (`int`, *optional*): Number of codes of an item; `None` if the model reads none.
        codebook_size (`int`, *optional*, defaults to 256): Number of values of a code.
        modalities (`list[str]`, *optional*): Written to and read from `processor_config.json`; leave it out.

    Raises:
        `ValueError`: If there is nothing to prepare.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_processor: Any = None,
        max_text_length: int = 64,
        features_size: int | None = None,
        modalities: Sequence[str] | None = None,
        feature_extractor: Any = None,
        audio_seconds: float = 10.0,
        max_audio_windows: int = 3,
        frame_image_processor: Any = None,
        num_frames: int = 8,
        num_codebooks: int | None = None,
        codebook_size: int = 256,
    ):
        parts = {
            "tokenizer": tokenizer,
            "image_processor": image_processor,
            "feature_extractor": feature_extractor,
            "frame_image_processor": frame_image_processor,
        }
        parts = {name: part for name, part in parts.items() if part is not None}
        if not parts and features_size is None and num_codebooks is None:
            raise ValueError(
                "a processor needs a tokenizer, an image_processor, a feature_extractor, a frame_image_processor, "
                "features_size, num_codebooks, or several of them"
            )
        # the mixin takes the parts from its class; here each instance has its own, since it may lack a modality
        self.get_attributes: Any = partial(list, parts)
        super().__init__(**parts)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_text_length = max_text_length
        self.features_size = features_size
        self.feature_extractor = feature_extractor
        self.audio_seconds, self.max_audio_windows = audio_seconds, max_audio_windows
        self.frame_image_processor, self.num_frames = frame_image_processor, num_frames
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        given = {"text": tokenizer, "image": image_processor, "features": features_size, "audio": feature_extractor}
        given |= {"video": frame_image_processor, "codes": num_codebooks}
        self.modalities = [name for name in MODALITIES if given[name] is not None]

    @classmethod
    def from_towers(
        cls,
        text_model: str | None = None,
        vision_model: str | None = None,
        max_text_length: int = 64,
        features_size: int | None = None,
        audio_model: str | None = None,
        video_model: str | None = None,
        **kwargs: Any,
    ) -> TransRecProcessor:
        """
        Make the processor for a model of [`TransRecModel.from_text_vision_pretrained`] with the same towers; `kwargs`
        are further arguments of this class.
        """

        def read(place: str | None, part: str, load: Callable[..., Any], **options: Any) -> Any:
            """A part for a tower; from a checkpoint with several towers, the part of its processor."""
            if place is None:
                return None
            if PreTrainedConfig.get_config_dict(place)[0].get("model_type") == "transrec":
                return getattr(cls.from_pretrained(place), part)
            return load(place, **options)

        frames = read(video_model, "num_frames", AutoConfig.from_pretrained, trust_remote_code=False)
        return cls(
            read(text_model, "tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=False),
            read(vision_model, "image_processor", AutoImageProcessor.from_pretrained, trust_remote_code=False),
            max_text_length,
            features_size,
            feature_extractor=read(audio_model, "feature_extractor", feature_extractor_of),
            frame_image_processor=read(video_model, "frame_image_processor", AutoImageProcessor.from_pretrained),
            **{"num_frames": frames if isinstance(frames, int) else getattr(frames, "num_frames", 8), **kwargs},
        )

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        processor_dict = processor_dict or {}
        modalities = processor_dict.get("modalities", ["text", "image"])
        loaders: dict[str, Any] = {"text": AutoTokenizer, "image": AutoImageProcessor, "audio": AutoFeatureExtractor}
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # otherwise the user would be asked
        settings = processor_dict.get("feature_extractor") or {}
        if settings.get("feature_extractor_type") == LogMelFeatureExtractor.__name__:
            loaders["audio"] = LogMelFeatureExtractor
        tokenizer, image_processor, feature_extractor = (
            loader.from_pretrained(pretrained_model_name_or_path, **kwargs) if modality in modalities else None
            for modality, loader in loaders.items()
        )
        frames = processor_dict.get("frame_image_processor")
        frame_image_processor = None if frames is None else image_processor_of(frames)
        # in the order of `__init__`; the arguments between are read from the file
        return [tokenizer, image_processor, 64, None, None, feature_extractor, 10.0, 3, frame_image_processor]

    def __call__(
        self,
        text: Sequence[str | None] | str | None = None,
        images: Sequence[Image.Image | None] | Image.Image | None = None,
        features: Any = None,
        audio: Any = None,
        video: Any = None,
        codes: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepare `n_items` items; use `None` for an item without a modality.

        Args:
            text (`list[str | None]` or `str`, *optional*): Text of each item.
            images (`list[Image | None]` or `Image`, *optional*): Image of each item.
            features (`list` of `(features_size,)` vectors or `None`, *optional*): Ready vector of each item.
            audio (`list` of `(samples,)` arrays or `None`, *optional*): Sound of each item, mono, at the sampling rate
                of the feature extractor.
            video (`list` of `list[Image]` or `None`, *optional*): Frames of the video of each item.
            codes (`list` of `(num_codebooks,)` integers or `None`, *optional*): Codes of each item.

        Returns:
            `BatchFeature` with `item_modalities` `(n_items, len(MODALITIES))` and, for the modalities that are
            present, `input_ids` and `attention_mask` `(n_text, tokens)`, `text_index` `(n_text,)`; `pixel_values`
            `(n_image, channels, height, width)`, `image_index` `(n_image,)`; `features` `(n_vectors, features_size)`,
            `features_index` `(n_vectors,)`; `audio_values` `(n_sounds, windows, ...)`, `audio_mask` `(n_sounds,
            windows)`, `audio_index` `(n_sounds,)`; `video_values` `(n_videos, frames, channels, height, width)`,
            `video_mask`, `video_index`; `codes` `(n_codes, num_codebooks)`, `codes_index` `(n_codes,)`. An index holds
            the item row of each content.

        Raises:
            `ValueError`: If the lists differ in length, or an item has none of the modalities of this processor.
        """
        given: dict[str, list[Any]] = {
            "text": [text] if isinstance(text, str) else [] if text is None else list(text),
            "image": [images] if isinstance(images, Image.Image) else [] if images is None else list(images),
            "features": [] if features is None else list(features),
            "audio": [] if audio is None else list(audio),
            "video": [] if video is None else list(video),
            "codes": [] if codes is None else list(codes),
        }
        counts = {name: len(contents) for name, contents in given.items() if contents}
        n_items = max(counts.values(), default=0)
        if len(set(counts.values())) > 1:
            listed = " and ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"{listed}: give one of each per item, or None")
        present = torch.zeros(n_items, len(MODALITIES), dtype=torch.bool)
        for name in self.modalities:
            present[:, COLUMNS[name]] = torch.tensor([value is not None for value in given[name] or [None] * n_items])
        if not present.any(dim=1).all():
            row = int((~present.any(dim=1)).nonzero()[0])
            raise ValueError(f"item {row} of this batch has none of the processor's modalities: {self.modalities}")

        batch: dict[str, Any] = {"item_modalities": present}
        for name in self.modalities:
            rows = present[:, COLUMNS[name]].nonzero().squeeze(1)
            if len(rows):
                contents = [given[name][row] for row in rows]
                batch |= {**self.prepare(name, contents, **kwargs), MODALITIES[name].index: rows}
        return BatchFeature(batch)

    def prepare(self, name: str, contents: Sequence[Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        """
        Turn contents of one modality into the inputs of its tower.

        Args:
            name (`str`): The modality.
            contents (`list`): Texts, images, vectors, sounds, videos or codes; at least one.
            kwargs: Arguments of the tokenizer.

        Returns:
            `dict` of `Tensor`, under the names in `MODALITIES`.
        """
        if name == "text":
            return self.pad(self.tokenize(contents, **kwargs))
        if name == "image":
            images = [to_rgb(image) for image in contents]
            return {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
        if name == "audio":
            return self._prepare_sounds(contents)
        if name == "video":
            return self._prepare_videos(contents)
        if name == "codes":
            return {"codes": self._checked_codes(torch.stack([torch.as_tensor(codes) for codes in contents]))}
        vectors = torch.stack([torch.as_tensor(vector, dtype=torch.float32) for vector in contents])
        if vectors.shape[1:] != (self.features_size,):
            raise ValueError(f"features have the shape {tuple(vectors.shape[1:])}, not ({self.features_size},)")
        return {"features": vectors}

    def _checked_codes(self, codes: torch.Tensor) -> torch.Tensor:
        if codes.shape[1:] != (self.num_codebooks,) or codes.is_floating_point():
            raise ValueError(f"codes have the shape {tuple(codes.shape[1:])}, not ({self.num_codebooks},) integers")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(f"codes go from {codes.min()} to {codes.max()}, not from 0 to {self.codebook_size - 1}")
        return codes.long()

    @property
    def window_samples(self) -> int:
        """The number of samples of one window of sound."""
        extractor: Any = self.feature_extractor
        for name in ("window_samples", "n_samples", "nb_max_samples"):  # of ours, Whisper, CLAP
            if hasattr(extractor, name):
                return int(getattr(extractor, name))
        if hasattr(extractor, "num_mel_bins"):  # of AST, whose frames are 10 ms
            return extractor.max_length * extractor.sampling_rate // 100
        return int(self.audio_seconds * extractor.sampling_rate)

    def windows(self, name: str, lengths: Any) -> Any:
        """
        The number of windows of contents with these lengths, in seconds of sound or in frames (numbers or arrays).
        """
        if name == "video":
            return lengths.clip(1, self.num_frames)
        windows = (lengths * self.feature_extractor.sampling_rate / self.window_samples + 0.5) // 1
        return windows.clip(1, self.max_audio_windows)

    def form(self, name: str) -> dict[str, Any]:
        """The arguments with which the reader of a modality reads a content in the form that this processor needs."""
        if name == "video":
            return {"num_frames": self.num_frames}
        if name != "audio":
            return {}
        rate, windows = self.feature_extractor.sampling_rate, self.max_audio_windows
        return {"sampling_rate": rate, "seconds": self.window_samples * windows / rate, "windows": windows}

    def _prepare_sounds(self, sounds: Sequence[Any]) -> dict[str, torch.Tensor]:
        """
        Divide sounds `(samples,)` into windows. The last window may be real only in part; if it is less than half, it
        is left out, unless it is the only one. Of a sound with more windows than are read, evenly spread ones are
        read.
        """
        size, pieces, counts = self.window_samples, [], []
        for sound in sounds:
            samples = torch.as_tensor(sound, dtype=torch.float32)
            if samples.dim() != 1 or not len(samples):
                raise ValueError(
                    f"a sound has the shape {tuple(samples.shape)} instead of (samples,): give one channel"
                )
            if len(samples) > size * self.max_audio_windows:
                starts = map(int, window_starts(len(samples), size, self.max_audio_windows))
                samples = torch.cat([samples[start : start + size] for start in starts])
            windows = samples.split(size)
            windows = windows[:-1] if len(windows) > 1 and 2 * len(windows[-1]) < size else windows
            pieces += windows
            counts.append(len(windows))
        extractor: Any = self.feature_extractor
        options: dict[str, Any] = {"sampling_rate": extractor.sampling_rate, "return_tensors": "np"}
        if not any(hasattr(extractor, name) for name in ("num_mel_bins", "hop_length")):
            options |= {"padding": "max_length", "max_length": size, "truncation": True}
        least = [torch.nn.functional.pad(piece, (0, max(0, LEAST_SAMPLES - len(piece)))) for piece in pieces]
        prepared = extractor([piece.numpy() for piece in least], **options)[extractor.model_input_names[0]]
        mask = torch.zeros(len(sounds), max(counts))
        real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        mask[real] = torch.tensor([len(piece) / size for piece in pieces])
        values = torch.as_tensor(prepared, dtype=torch.float32)
        if getattr(extractor, "truncation", None) == "fusion":  # of CLAP, four times the same for one window
            values = values[:, :1]
        padded = values.new_zeros(*mask.shape, *values.shape[1:])
        padded[real] = values
        return {"audio_values": padded, "audio_mask": mask}

    def _prepare_videos(self, videos: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Prepare videos, which are lists of frames; at most `num_frames`, evenly spaced, are read of each."""
        counts = torch.tensor([min(len(video), self.num_frames) for video in videos])
        if not counts.min():
            raise ValueError("a video has no frames: give a list of images")
        frames = [
            to_rgb(video[place * len(video) // count])
            for video, count in zip(videos, counts.tolist(), strict=True)
            for place in range(count)
        ]
        values = torch.as_tensor(self.frame_image_processor(frames, return_tensors="pt")["pixel_values"])
        values = values.flatten(0, -4)  # for processors of clips, which join all frames
        real = torch.arange(int(counts.max())) < counts[:, None]
        padded = values.new_zeros(*real.shape, *values.shape[1:])
        padded[real] = values
        return {"video_values": padded, "video_mask": real.float()}

    def tokenize(self, texts: Sequence[str], **kwargs: Any) -> list[list[int]]:
        """
        Token ids of each text, cut after `max_text_length` tokens. Since a tokenizer reads the whole text before it
        cuts, a very long text is shortened first, to far more characters than the tokens need.

        Raises:
            `ValueError`: If `max_text_length` leaves no room for a token of the text.
        """
        special = self.tokenizer.num_special_tokens_to_add()
        if self.max_text_length <= special:
            raise ValueError(
                f"max_text_length is {self.max_text_length}, but each text has {special} special tokens: set it to "
                f"{special + 1} or more"
            )
        limit = max(MAX_CHARACTERS, 256 * self.max_text_length)
        keeps_end = getattr(self.tokenizer, "truncation_side", "right") == "left"
        texts = [text[-limit:] if keeps_end else text[:limit] for text in texts]
        if len(texts) > 1 and sum(map(len, texts)) > CHARACTERS_AT_A_TIME:
            half = len(texts) // 2
            return self.tokenize(texts[:half], **kwargs) + self.tokenize(texts[half:], **kwargs)
        return self.tokenizer(texts, truncation=True, max_length=self.max_text_length, **kwargs)["input_ids"]

    def pad(self, token_ids: Sequence[Any]) -> dict[str, torch.Tensor]:
        """
        Turn token ids of several texts into `input_ids` and `attention_mask`, both `(n_text, longest)`. They are
        padded on the right, as in training, whichever side the tokenizer pads.
        """
        rows = [torch.as_tensor(ids) for ids in token_ids]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.full(mask.shape, self.tokenizer.pad_token_id or 0)
        input_ids[mask] = torch.cat(rows).long()
        return {"input_ids": input_ids, "attention_mask": mask.long()}

    def fingerprint(self, modality: str) -> str:
        """A text that changes whenever this processor would prepare a modality differently."""
        if modality == "features":
            return json.dumps(self.features_size)
        if modality == "codes":
            return json.dumps([self.num_codebooks, self.codebook_size])
        if modality == "audio":
            rules = json.loads(self.feature_extractor.to_json_string())
            return json.dumps([self.audio_seconds, self.max_audio_windows, "spread", rules], sort_keys=True)
        if modality in ("image", "video"):
            processor = self.image_processor if modality == "image" else self.frame_image_processor
            rules = json.loads(processor.to_json_string())
            rules = {name: rules[name] for name in rules if name != "auto_map"}
            return json.dumps(rules if modality == "image" else [self.num_frames, rules], sort_keys=True)
        if hasattr(self.tokenizer, "backend_tokenizer"):
            rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
            rules |= {"truncation": None, "padding": None}  # they are settings of the last call
        else:
            rules = self.tokenizer.get_vocab()
        return json.dumps([self.max_text_length, rules], sort_keys=True)

    @property
    def model_input_names(self) -> list[str]:
        modalities = (MODALITIES[name] for name in self.modalities)
        names = [name for modality in modalities for name in (modality.values, modality.mask, modality.index) if name]
        return [*names, "item_modalities"]


__all__ = ["TransRecProcessor"]
