"""Items to vectors: towers for their contents, pooling, projections and fusion."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_transrec import TransRecConfig


def without_dormant_parts(config: Any) -> dict[str, bool]:
    """
    Leave out what nothing here reads and so would never get a gradient: the mask token, in the configuration, and a
    learned pooler, by the keyword that is returned where the class of the model has one.
    """
    if getattr(config, "use_mask_token", False):
        config.use_mask_token = False
    accepts = "add_pooling_layer" in inspect.signature(AutoModel._model_mapping[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if accepts else {}


def build_tower(config: Any) -> PreTrainedModel:
    """A tower with fresh weights for any configuration that [`AutoModel`] knows."""
    if not AutoModel._model_mapping[type(config)]._supports_sdpa:
        # a convolutional tower refuses an attention implementation that was chosen for the whole model
        config._attn_implementation = "eager"
    return AutoModel.from_config(config, **without_dormant_parts(config))


def load_tower(name_or_path: str, part: str, **kwargs: Any) -> PreTrainedModel:
    """A pre-trained tower; of a two-tower checkpoint such as CLIP its `part`: `"text_config"` or `"vision_config"`."""
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    config = getattr(config, part, None) or config
    return AutoModel.from_pretrained(name_or_path, config=config, **without_dormant_parts(config), **kwargs)


def tower_width(tower: PreTrainedModel) -> int:
    """Number of channels at the output of a tower; convolutional configurations do not always name it."""
    config = tower.config
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    return [module for module in tower.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def tower_blocks(tower: nn.Module) -> nn.ModuleList:
    """The outermost list of blocks of a tower: Transformer layers, ResNet stages, MobileNet convolutions."""
    level = [tower]
    while level:
        for module in level:
            if isinstance(module, nn.ModuleList):
                return module
        level = [child for module in level for child in module.children()]
    raise ValueError(f"{type(tower).__name__} has no list of blocks, so its top blocks cannot be told from the rest")


def frozen_depth(tower: nn.Module) -> int:
    """How many of the lower blocks of a tower are frozen, together with everything before them."""
    blocks = tower_blocks(tower)
    block_of = {parameter: depth for depth, block in enumerate(blocks) for parameter in block.parameters()}
    in_blocks = False
    for parameter in tower.parameters():  # in order of registration, which is that of execution
        in_blocks = in_blocks or parameter in block_of
        if parameter.requires_grad:
            return block_of.get(parameter, len(blocks) if in_blocks else 0)
    return len(blocks)


class _Reached(Exception):
    """Carries the states out of a tower that need not run further."""


def lower_states(tower: PreTrainedModel, depth: int, **inputs: Tensor) -> Tensor:
    """States after the first `depth` blocks of a tower; what lies above them does not run."""

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output)

    hook = tower_blocks(tower)[depth - 1].register_forward_hook(stop)
    try:
        tower(**inputs)
    except _Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise RuntimeError(f"{type(tower).__name__} did not run its block {depth - 1}")


@contextmanager
def resumed_from(tower: PreTrainedModel, depth: int, states: Tensor) -> Iterator[None]:
    """Inside, the first `depth` blocks of a tower do nothing but hand `states` on to the next one."""
    lower = tower_blocks(tower)[:depth]
    compiled = [block._compiled_call_impl for block in lower]
    for block in lower:
        block.forward, block._compiled_call_impl = lambda *args, **kwargs: states, None
    try:
        yield
    finally:
        for block, call in zip(lower, compiled, strict=True):
            del block.forward
            block._compiled_call_impl = call


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has no trainable parameter."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def training_batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms inside that are in training mode: their output depends on the batch, and they count it."""
    norms = (part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.training]


@contextmanager
def keep_running_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode do not update their running statistics: a second pass must not count."""
    norms = training_batch_norms(module)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def select_items(items: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """
    Item inputs without the texts and images of some items; the rows of the items stay what they are.

    Args:
        items (`dict`): arguments of [`~TransRecModel.get_item_features`], with lists for the texts.
        keep (`Tensor` of shape `(n_items,)`): boolean, the items that stay.
    """
    kept = dict(items)
    if items.get("text_index") is not None:
        chosen = keep[items["text_index"]]
        parts = chosen.split([len(mask) for mask in items["attention_mask"]])
        some = [i for i, part in enumerate(parts) if part.any()]
        kept["text_index"] = items["text_index"][chosen] if some else None
        for name in ("input_ids", "attention_mask", "text_states"):
            if items.get(name) is not None:
                kept[name] = [items[name][i][parts[i]] for i in some] or None
    if items.get("image_index") is not None:
        chosen = keep[items["image_index"]]
        for name in ("image_index", "pixel_values", "image_states"):
            if items.get(name) is not None:
                kept[name] = items[name][chosen] if chosen.any() else None
    return kept


def evaluate_frozen(module: nn.Module) -> None:
    """Put every sub-module without a trainable parameter in evaluation mode: no dropout, no batch-norm updates."""
    if is_frozen(module) and next(module.parameters(), None) is not None:
        module.eval()
        return
    for child in module.children():
        evaluate_frozen(child)


class AttentionPooling(nn.Module):
    """
    The paper's pooling of token states (from NRMS): multi-head self-attention without output projection, then additive
    attention. Unlike the released code, both attend to real tokens only.
    """

    def __init__(self, config: TransRecConfig, width: int):
        super().__init__()
        self.head_size = config.pooling_head_size
        self.output_size = config.num_attention_heads * config.pooling_head_size
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.query = nn.Linear(width, self.output_size)
        # no bias here and in the additive query: the softmax over tokens cancels it, so it would never get a gradient
        self.key = nn.Linear(width, self.output_size, bias=False)
        self.value = nn.Linear(width, self.output_size)
        self.additive = nn.Linear(self.output_size, config.pooling_query_size)
        self.additive_query = nn.Linear(config.pooling_query_size, 1, bias=False)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states `(n, tokens, width)` and their mask `(n, tokens)` to `(n, output_size)`."""
        states = self.dropout(states)
        heads = (*states.shape[:2], -1, self.head_size)
        query, key, value = (
            linear(states).view(heads).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        mask = attention_mask.bool()
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        attended = attended.transpose(1, 2).flatten(2)
        logits = self.additive_query(torch.tanh(self.additive(attended))).squeeze(-1)
        weights = logits.float().masked_fill(~mask, -torch.inf).softmax(dim=-1).to(attended.dtype)
        return (weights.unsqueeze(-1) * attended).sum(dim=1)


def build_projection(config: TransRecConfig, width: int) -> nn.Module:
    """What turns the output of a tower into an item vector: linear, or with one hidden layer."""
    hidden = config.projection_hidden_size
    if hidden is None:
        return nn.Linear(width, config.hidden_size)
    return nn.Sequential(nn.Linear(width, hidden), ACT2FN[config.hidden_act], nn.Linear(hidden, config.hidden_size))


class ItemEncoder(nn.Module):
    """Items to vectors: one tower and projection per modality, fused by a masked mean; or the ID baseline's table."""

    def __init__(
        self,
        config: TransRecConfig,
        text_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
    ):
        super().__init__()
        self.modalities = config.modalities
        self.pooling_strategy = config.text_pooling
        if config.num_items is not None:
            self.item_embedding = nn.Embedding(config.num_items, config.hidden_size)
        if "text" in self.modalities:
            self.text_model = text_model or build_tower(config.text_config)
            width = tower_width(self.text_model)
            if config.text_pooling == "attention":
                self.text_pooling = AttentionPooling(config, width)
                width = self.text_pooling.output_size
            self.text_projection = build_projection(config, width)
        if "image" in self.modalities:
            self.vision_model = vision_model or build_tower(config.vision_config)
            self.visual_projection = build_projection(config, tower_width(self.vision_model))
        if len(self.modalities) > 1:
            self.missing_embeds = nn.Parameter(torch.zeros(len(self.modalities), config.hidden_size))

    @property
    def towers(self) -> dict[str, PreTrainedModel]:
        """The content towers by modality."""
        names = {"text": "text_model", "image": "vision_model"}
        return {modality: getattr(self, names[modality]) for modality in self.modalities}

    def is_stored_pooled(self, modality: str) -> bool:
        """Whether an [`ActivationStore`] has pooled states: nothing below the modality's projection is trained."""
        return is_frozen(self.towers[modality]) and not (modality == "text" and self.pooling_strategy == "attention")

    def encode_text(self, input_ids: Tensor | None, attention_mask: Tensor, states: Tensor | None = None) -> Tensor:
        """
        Tokens `(n_text, tokens)` to vectors `(n_text, hidden_size)`; or, without `input_ids`, the `states` of an
        [`ActivationStore`]: `(n_text, tokens, width)`, or pooled `(n_text, width)`.
        """
        if states is None:
            states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        elif states.dim() == 2:
            return self.text_projection(states.to(self.text_model.dtype))
        else:
            with resumed_from(self.text_model, frozen_depth(self.text_model), states.to(self.text_model.dtype)):
                tokens = torch.zeros_like(attention_mask)
                states = self.text_model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state
        return self.text_projection(self.pool_text(states, attention_mask))

    def pool_text(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states `(n_text, tokens, width)` to one per text: `(n_text, width)`."""
        if self.pooling_strategy == "attention":
            return self.text_pooling(states, attention_mask)
        if self.pooling_strategy == "cls":
            return states[:, 0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def encode_images(self, pixel_values: Tensor | None, states: Tensor | None = None) -> Tensor:
        """
        Pixels `(n_image, channels, height, width)` to vectors `(n_image, hidden_size)`; or, without `pixel_values`,
        the `states` of an [`ActivationStore`]: `(n_image, ...)`, or pooled `(n_image, width)`.
        """
        dtype, config = self.vision_model.dtype, self.vision_model.config
        if pixel_values is not None:
            output = self.vision_model(pixel_values=pixel_values.to(dtype, memory_format=torch.channels_last))
        elif states.dim() == 2:  # type: ignore[union-attr]
            return self.visual_projection(states.to(dtype))  # type: ignore[union-attr]
        else:
            # one blank image for the layers below the blocks, which do not look at the number of images
            size = getattr(config, "image_size", 32)
            blank = torch.zeros(1, config.num_channels, size, size, dtype=dtype, device=states.device)  # type: ignore
            with resumed_from(self.vision_model, frozen_depth(self.vision_model), states.to(dtype)):  # type: ignore
                output = self.vision_model(pixel_values=blank)
        return self.visual_projection(self.pool_image(output))

    def pool_image(self, output: Any) -> Tensor:
        """Output of the vision tower to one state per image: `(n_image, width)`."""
        pooled = output.get("pooler_output")
        if pooled is None:
            states = output.last_hidden_state
            pooled = states[:, 0] if states.dim() == 3 else states.mean(dim=(2, 3))
        return pooled.flatten(1)

    def fuse(self, parts: dict[str, tuple[Tensor, Tensor]], item_modalities: Tensor) -> Tensor:
        """
        One vector per item: the mean over its modalities, plus a learned vector for each one it misses. Those start at
        zero, so an item with a single modality starts as the paper's item vector.

        Args:
            parts (`dict`): by modality, the vectors `(n, hidden_size)` and the item row `(n,)` of each.
            item_modalities (`Tensor` of shape `(n_items, 2)`): which of text and image each item has.
        """
        n_items = len(item_modalities)
        rows = [
            vectors.new_zeros(n_items, vectors.shape[1]).index_copy(0, index, vectors)
            for vectors, index in parts.values()
        ]
        if len(self.modalities) == 1:
            return rows[0]
        present = item_modalities.to(rows[0].dtype)
        missing = (1 - present) @ self.missing_embeds.to(rows[0].dtype)
        return sum(rows) / present.sum(dim=1, keepdim=True) + missing  # type: ignore[operator]
