"""
The table of modalities, and batches of items that have some of them. Torch is imported only where it is used, because
commands that only look at a folder need the table but not torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Modality:
    """
    One kind of content that an item may have.

    Args:
        name (`str`): Column of a catalogue, and name in messages, options and reports.
        config (`str`): Field of [`TransRecConfig`] that is set if a model reads the modality.
        projection (`str`): Name of the projection in the item encoder.
        index (`str`): Name of the item rows of the contents in a processor's output.
        values (`str`): Name of the contents in a processor's output.
        tower (`str`, *optional*): Name of the tower in the item encoder; without a tower, contents are vectors
            already.
        mask (`str`, *optional*): Name of the mask in a processor's output, for contents of different lengths.
        part (`str`, *optional*): Part of the processor that prepares the contents.
        is_windowed (`bool`, *optional*, defaults to `False`): Whether a content is several windows, `(windows, ...)`,
            for each of which a tower makes one state; the mask, `(windows,)`, is the real share of each window.
    """

    name: str
    config: str
    projection: str
    index: str
    values: str
    tower: str | None = None
    mask: str | None = None
    part: str | None = None
    is_windowed: bool = False

    @property
    def has_tokens(self) -> bool:
        """Whether the mask marks the real positions of a sequence that the tower reads in one pass."""
        return self.mask is not None and not self.is_windowed


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
AUDIO = Modality(
    "audio",
    config="audio_config",
    projection="audio_projection",
    index="audio_index",
    values="audio_values",
    tower="audio_model",
    mask="audio_mask",
    part="feature_extractor",
    is_windowed=True,
)
VIDEO = Modality(
    "video",
    config="video_config",
    projection="video_projection",
    index="video_index",
    values="video_values",
    tower="video_model",
    mask="video_mask",
    part="frame_image_processor",
    is_windowed=True,
)
CODES = Modality(
    "codes",
    config="num_codebooks",
    projection="codes_projection",
    index="codes_index",
    values="codes",
)
MODALITIES = {modality.name: modality for modality in (TEXT, IMAGE, FEATURES, AUDIO, VIDEO, CODES)}
"""Only append to this table: its order is that of the columns of `present`, and of the bits of combinations."""
COLUMNS = {name: column for column, name in enumerate(MODALITIES)}


@dataclass
class ItemPart:
    """
    The contents of one modality in a batch of items, in buckets of contents of one shape.

    Args:
        rows (`Tensor` of shape `(n,)`): The item of each content, as a row of the batch, in the order of the buckets.
        values (`list[Tensor]`): Buckets of inputs of the modality's tower, `(n_i, ...)`.
        masks (`list[Tensor]`, *optional*): For each bucket `(n_i, length)`, the real positions, or the real shares of
            windows.
        stored (`int`, *optional*, defaults to 0): If the values are states of an [`ActivationStore`], the number of
            blocks after which they were taken; 0 for contents.
    """

    rows: Tensor
    values: list[Tensor]
    masks: list[Tensor] | None = None
    stored: int = 0

    def select(self, keep: Tensor) -> ItemPart | None:
        """The contents of the items for which `keep` `(n_items,)` is true; `None` if there are none."""
        chosen = keep[self.rows]
        parts = chosen.split([len(values) for values in self.values])
        some = [i for i, part in enumerate(parts) if part.any()]
        if not some:
            return None
        values = [self.values[i][parts[i]] for i in some]
        masks = None if self.masks is None else [self.masks[i][parts[i]] for i in some]
        return replace(self, rows=self.rows[chosen], values=values, masks=masks)

    def passes(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """
        Values and masks in parts of at most `size` tokens, windows or contents (but at least one content), in order.
        Ready vectors come in one part.
        """
        masks: list[Any] = self.masks or [None] * len(self.values)
        for values, mask in zip(self.values, masks, strict=True):
            are_vectors = mask is None and values.dim() == 2
            few = max(1, len(values) if are_vectors else size // (1 if mask is None else mask.shape[1]))
            chunks = values.split(few)
            yield from zip(chunks, [None] * len(chunks) if mask is None else mask.split(few), strict=True)

    def map(self, function: Callable[[Tensor], Tensor]) -> ItemPart:
        """The same with a function applied to each tensor."""
        masks = None if self.masks is None else [function(mask) for mask in self.masks]
        return replace(
            self, rows=function(self.rows), values=[function(bucket) for bucket in self.values], masks=masks
        )


@dataclass
class ItemBatch:
    """
    A batch of distinct items, ready for a model.

    Args:
        present (`Tensor` of shape `(n_items, len(MODALITIES))`): Boolean, the modalities that each item has.
        parts (`dict[str, ItemPart]`): The contents of each modality, by its name.
        item_rows (`Tensor` of shape `(n_items,)`, *optional*): Rows of the items in their catalogue. Models with ID
            vectors read them, and several processes use them to find equal items.
    """

    present: Tensor
    parts: dict[str, ItemPart] = field(default_factory=dict)
    item_rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.present)

    @classmethod
    def from_inputs(
        cls, item_modalities: Tensor | None = None, item_rows: Tensor | None = None, **inputs: Any
    ) -> ItemBatch:
        """
        Make a batch from the output of [`TransRecProcessor`], whose tensors have the names in `MODALITIES`.

        Args:
            item_modalities (`Tensor` of shape `(n_items, any)`): The first columns of `present`.
            item_rows (`Tensor` of shape `(n_items,)`, *optional*): See [`ItemBatch`].
            inputs: Contents, masks and the item rows of the contents, e.g. `input_ids`, `attention_mask` and
                `text_index`. Without an index, every item has the modality.

        Raises:
            `ValueError`: If a name is unknown, or the number of items is not clear.
        """
        import torch

        parts = {}
        for modality in MODALITIES.values():
            values, rows = inputs.pop(modality.values, None), inputs.pop(modality.index, None)
            mask = inputs.pop(modality.mask, None) if modality.mask is not None else None
            if values is None:
                continue
            if rows is None:
                rows = torch.arange(len(values), device=values.device)
            if modality.mask is not None and mask is None:
                mask = torch.ones(values.shape[:2], device=values.device)
                mask = mask if modality.is_windowed else mask.long()
            parts[modality.name] = ItemPart(rows, [values], None if mask is None else [mask])
        unknown = [name for name, value in inputs.items() if value is not None and name != "token_type_ids"]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not an input of a TransRec model: prepare items with TransRecProcessor"
            )
        if item_modalities is None:
            known = [part.rows for part in parts.values()] + ([] if item_rows is None else [item_rows])
            if not known:
                raise ValueError("item_modalities is missing: prepare items with TransRecProcessor")
            n_items = len(item_rows) if item_rows is not None else int(max(int(rows.max()) for rows in known)) + 1
            item_modalities = torch.zeros(n_items, len(MODALITIES), dtype=torch.bool, device=known[0].device)
            for name, part in parts.items():
                item_modalities[part.rows, COLUMNS[name]] = True
        return cls(with_all_columns(item_modalities), parts, item_rows)

    def select(self, keep: Tensor) -> ItemBatch:
        """The same items, without the contents of those for which `keep` `(n_items,)` is false. Rows do not change."""
        parts = {name: part.select(keep) for name, part in self.parts.items()}
        return replace(self, parts={name: part for name, part in parts.items() if part is not None})

    def map(self, function: Callable[[Tensor], Tensor]) -> ItemBatch:
        """The same with a function applied to each tensor."""
        parts = {name: part.map(function) for name, part in self.parts.items()}
        return ItemBatch(function(self.present), parts, None if self.item_rows is None else function(self.item_rows))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ItemBatch:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ItemBatch:
        """The same in pinned memory, for a `DataLoader`."""
        return self.map(lambda tensor: tensor.pin_memory())


def with_all_columns(present: Tensor) -> Tensor:
    """The modalities of each item, `(n_items, any)`, with added columns for modalities that were added later."""
    from torch.nn.functional import pad

    return pad(present.bool(), (0, len(MODALITIES) - present.shape[1]))


def showing(present: Tensor, modalities: Collection[str]) -> Tensor:
    """
    The modalities of items if all but the given `modalities` are hidden. An item that has none of the given ones keeps
    its contents.

    Args:
        present (`Tensor` of shape `(..., len(MODALITIES))`): Boolean, see [`ItemBatch`].
        modalities (`Collection[str]`): Names of the modalities that are not hidden.
    """
    shown = present & present.new_tensor([name in modalities for name in MODALITIES])
    return shown.where(shown.any(dim=-1, keepdim=True), present)


def combinations(present: Tensor, modalities: tuple[str, ...]) -> Tensor:
    """
    The combination of modalities of each item for a model that reads `modalities`, as a number: their bits minus 1.
    For text and image, 0, 1 and 2 are text, image and both. Items without a modality get 0.

    Args:
        present (`Tensor` of shape `(..., len(MODALITIES))`): Boolean, see [`ItemBatch`].
        modalities (`tuple[str]`): The modalities that the model reads.
    """
    import torch

    columns = present[..., [COLUMNS[name] for name in modalities]].long()
    bits = 2 ** torch.arange(len(modalities), device=present.device)
    return ((columns * bits).sum(dim=-1) - 1).clamp(min=0)


__all__ = ["MODALITIES", "ItemBatch", "ItemPart", "Modality"]
