"""Raw text and images to model inputs, for any non-empty subset of the two modalities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class TransRecProcessor(ProcessorMixin):
    r"""
    Prepares items for [`TransRecModel`]: a tokenizer for the text, an image processor for the images, or one of them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the text tower; `None` if the model has none.
        image_processor (`BaseImageProcessor`, *optional*): of the vision tower; `None` if the model has none.
        max_text_length (`int`, *optional*, defaults to 64): tokens after which a text is cut.
        modalities (`list[str]`, *optional*): written to and read from `processor_config.json`; leave it out.

    Raises:
        `ValueError`: if neither part is given.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_processor: Any = None,
        max_text_length: int = 64,
        modalities: Sequence[str] | None = None,
    ):
        parts = {"tokenizer": tokenizer, "image_processor": image_processor}
        parts = {name: part for name, part in parts.items() if part is not None}
        if not parts:
            raise ValueError("a processor needs a tokenizer, an image_processor or both")
        # the mixin asks its class for the parts; here each instance answers, since a checkpoint may lack a modality
        self.get_attributes: Any = partial(list, parts)
        super().__init__(**parts)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_text_length = max_text_length
        self.modalities = [m for m, part in (("text", tokenizer), ("image", image_processor)) if part is not None]

    @classmethod
    def from_towers(
        cls, text_model: str | None = None, vision_model: str | None = None, max_text_length: int = 64
    ) -> TransRecProcessor:
        """The processor that belongs to [`TransRecModel.from_text_vision_pretrained`] with the same towers."""
        return cls(
            AutoTokenizer.from_pretrained(text_model) if text_model else None,
            AutoImageProcessor.from_pretrained(vision_model) if vision_model else None,
            max_text_length,
        )

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        modalities = (processor_dict or {}).get("modalities", ["text", "image"])
        loaders = {"text": AutoTokenizer, "image": AutoImageProcessor}
        return [
            loader.from_pretrained(pretrained_model_name_or_path, **kwargs) if modality in modalities else None
            for modality, loader in loaders.items()
        ]

    def __call__(
        self,
        text: Sequence[str | None] | str | None = None,
        images: Sequence[Image.Image | None] | Image.Image | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepare `n_items` items; an item without text or image has `None` in its place.

        Args:
            text (`list[str | None]` or `str`, *optional*): text of each item.
            images (`list[Image | None]` or `Image`, *optional*): image of each item.

        Returns:
            `BatchFeature` with `item_modalities` `(n_items, 2)`, and as far as present `input_ids` and
            `attention_mask` `(n_text, tokens)`, `text_index` `(n_text,)`, `pixel_values`
            `(n_image, channels, height, width)` and `image_index` `(n_image,)`, the item row of each text and image.

        Raises:
            `ValueError`: if the lists differ in length, or an item has none of the modalities of this processor.
        """
        texts: list[str | None] = [text] if isinstance(text, str) else list(text or [])
        pictures: list[Image.Image | None] = [images] if isinstance(images, Image.Image) else list(images or [])
        if texts and pictures and len(texts) != len(pictures):
            raise ValueError(f"{len(texts)} texts and {len(pictures)} images: give one of each per item, or None")
        n_items = max(len(texts), len(pictures))
        texts = texts if self.tokenizer is not None and texts else [None] * n_items
        pictures = pictures if self.image_processor is not None and pictures else [None] * n_items

        has_text = torch.tensor([value is not None for value in texts], dtype=torch.bool)
        has_image = torch.tensor([value is not None for value in pictures], dtype=torch.bool)
        modalities = torch.stack([has_text, has_image], dim=1)
        if not modalities.any(dim=1).all():
            row = int((~modalities.any(dim=1)).nonzero()[0])
            raise ValueError(f"item {row} of this batch has none of the processor's modalities: {self.modalities}")

        batch: dict[str, Any] = {"item_modalities": modalities}
        if has_text.any():
            tokens = self.tokenizer(
                [value for value in texts if value is not None],
                truncation=True,
                max_length=self.max_text_length,
                padding=True,
                return_tensors="pt",
                **kwargs,
            )
            batch |= {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
            batch["text_index"] = has_text.nonzero().squeeze(1)
        if has_image.any():
            present = [value.convert("RGB") for value in pictures if value is not None]
            batch["pixel_values"] = self.image_processor(present, return_tensors="pt")["pixel_values"]
            batch["image_index"] = has_image.nonzero().squeeze(1)
        return BatchFeature(batch)

    def fingerprint(self, modality: str) -> str:
        """A text that changes whenever this processor would prepare a `"text"` or an `"image"` in another way."""
        if modality == "image":
            rules = json.loads(self.image_processor.to_json_string())
            return json.dumps({name: rules[name] for name in rules if name != "auto_map"}, sort_keys=True)
        if hasattr(self.tokenizer, "backend_tokenizer"):
            rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
            rules |= {"truncation": None, "padding": None}  # those of the last call, not of the tokenizer
        else:
            rules = self.tokenizer.get_vocab()
        return json.dumps([self.max_text_length, rules], sort_keys=True)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "text_index", "pixel_values", "image_index", "item_modalities"]


__all__ = ["TransRecProcessor"]
