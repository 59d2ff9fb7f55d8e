"""What a modality is: where its configuration, tower, projection and inputs are found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Modality:
    """
    One kind of content that an item may have.

    Args:
        name (`str`): Column of a catalogue, and name in messages, options and reports.
        config (`str`): Field of [`TransRecConfig`] that is set if a model reads the modality.
        projection (`str`): Name of the projection in the item encoder.
        index (`str`): Name, in a processor's output, of the item row of each content.
        values (`str`): Name of the contents themselves there.
        config (`str`): Field of [`TransRecConfig`] that is set if a model reads it.
        mask (`str`, *optional*): Name of their mask, for contents of different lengths.
        part (`str`, *optional*): Part of the processor that prepares the contents.
    """

    name: str
    config: str
    projection: str
    index: str
    values: str
    tower: str | None = None
    mask: str | None = None
    part: str | None = None


TEXT = Modality(
    "text",
    config="text_config",
    projection="text_projection",
    index="text_index",
    values="input_ids",
    tower="text_model",
    mask="attention_mask",
    part="tokenizer",
)
IMAGE = Modality(
    "image",
    config="vision_config",
    projection="visual_projection",
    index="image_index",
    values="pixel_values",
    tower="vision_model",
    part="image_processor",
)
FEATURES = Modality(
    "features",
    config="features_size",
    projection="features_projection",
    index="features_index",
    values="features",
)
MODALITIES = {modality.name: modality for modality in (TEXT, IMAGE, FEATURES)}
"""Append only: the order is that of the columns of `present` and of the bits of a combination of modalities."""


__all__ = ["MODALITIES", "Modality"]
