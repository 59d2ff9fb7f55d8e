"""The TransRec model: items from raw text and images, users from item vectors, scores from their dot product."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_transrec import TransRecConfig
from .loss_transrec import (
    SharedItems,
    batch_slots,
    bce,
    bpr,
    count_slots,
    cpc,
    full_softmax,
    gather_counts,
    gather_items,
    in_batch_softmax,
    masked_mean,
    masked_mean_across_ranks,
    sampled_softmax,
    share_items,
)


@dataclass
class TransRecOutput(ModelOutput):
    """
    Output of [`TransRecModel`].

    Args:
        loss (`Tensor` of shape `(1,)`, *optional*): the objective, when targets were given.
        item_embeds (`Tensor` of shape `(n_items, hidden_size)`): vectors of the batch's distinct items.
        last_hidden_state (`Tensor` of shape `(n_users, length, hidden_size)`, *optional*): user states.
    """

    loss: Tensor | None = None
    item_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None


def last_state(states: Tensor, history_index: Tensor) -> Tensor:
    """States `(n_users, length, hidden_size)` at each user's last real position: `(n_users, hidden_size)`."""
    last = (history_index >= 0).sum(dim=1).clamp(min=1) - 1
    return states[torch.arange(len(states), device=states.device), last]


# Towers -------------------------------------------------------------------------------------------------------------


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


# User encoder -------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; the reference that the other implementations are tested against."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Packing:
    """Real positions of padded sequences, so that all but attention runs on those alone."""

    def __init__(self, sequence_mask: Tensor):
        self.shape = sequence_mask.shape
        self.rows = sequence_mask.flatten().nonzero().squeeze(1)

    def pack(self, padded: Tensor) -> Tensor:
        """`(n_users, length, width)` to `(n_real, width)`."""
        return padded.flatten(0, 1)[self.rows]

    def unpack(self, packed: Tensor) -> Tensor:
        """`(n_real, width)` to `(n_users, length, width)`, zero in the padding."""
        padded = packed.new_zeros(self.shape.numel(), packed.shape[1]).index_copy(0, self.rows, packed)
        return padded.view(*self.shape, packed.shape[1])


class UserAttention(nn.Module):
    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = config.is_causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # a key bias adds the same number to all of a query's scores: the softmax cancels it, it would never learn
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, packing: Packing, attention_mask: Tensor | None) -> Tensor:
        heads = (*packing.shape, -1, self.head_size)
        query, key, value = (
            packing.unpack(linear(hidden_states)).view(heads).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attended, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.o_proj(packing.pack(attended.flatten(2)))


class UserEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = UserAttention(config)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        return self.output(self.activation(self.intermediate(hidden_states)))

    def forward(self, hidden_states: Tensor, packing: Packing, attention_mask: Tensor | None) -> Tensor:
        if self.norm_first:
            attended = self.attention(self.attention_norm(hidden_states), packing, attention_mask)
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.feed_forward(self.output_norm(hidden_states)))
        attended = self.attention(hidden_states, packing, attention_mask)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        return self.output_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))


class UserEncoder(nn.Module):
    """A Transformer over the item vectors of a history, padded on the right."""

    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.config = config
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.use_modality_embedding and len(config.modalities) > 1:
            self.modality_embedding = nn.Embedding(3, config.hidden_size)
        if config.input_layer_norm:
            self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(UserEncoderLayer(config) for _ in range(config.num_hidden_layers))
        if config.norm_first:
            self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, inputs_embeds: Tensor, sequence_mask: Tensor, item_modalities: Tensor | None = None) -> Tensor:
        """
        Args:
            inputs_embeds (`Tensor` of shape `(n_users, length, hidden_size)`): item vectors, oldest first.
            sequence_mask (`Tensor` of shape `(n_users, length)`): true for items, false for the padding on the right.
            item_modalities (`Tensor` of shape `(n_users, length, 2)`, *optional*): which of text and image each has.

        Returns:
            `Tensor` of shape `(n_users, length, hidden_size)`: the states, zero in the padding.
        """
        packing = Packing(sequence_mask)
        hidden_states = inputs_embeds + self.position_embedding.weight[: inputs_embeds.shape[1]]
        if hasattr(self, "modality_embedding"):
            if item_modalities is None:
                raise ValueError("a model with a modality embedding needs item_modalities to read a history")
            text, image = item_modalities.long().unbind(-1)
            hidden_states = hidden_states + self.modality_embedding((text + 2 * image - 1).clamp(min=0))
        if self.config.is_causal:  # padding is on the right, so the causal mask alone hides it
            mask = create_causal_mask(self.config, hidden_states, attention_mask=None, past_key_values=None)
        else:
            mask = create_bidirectional_mask(self.config, hidden_states, attention_mask=sequence_mask)
        hidden_states = packing.pack(hidden_states)
        if hasattr(self, "input_norm"):
            hidden_states = self.input_norm(hidden_states)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, packing, mask)
        if hasattr(self, "final_norm"):
            hidden_states = self.final_norm(hidden_states)
        return packing.unpack(hidden_states)


# Model --------------------------------------------------------------------------------------------------------------


class TransRecPreTrainedModel(PreTrainedModel):
    config_class = TransRecConfig
    base_model_prefix = "transrec"
    main_input_name = "input_ids"
    input_modalities = ("text", "image")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UserEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ItemEncoder) and hasattr(module, "missing_embeds"):
            init.zeros_(module.missing_embeds)


class TransRecModel(TransRecPreTrainedModel):
    r"""
    A transferable sequential recommender (arXiv 2206.06190).

    Args:
        config ([`TransRecConfig`]): with a text tower, a vision tower or both; or `num_items` for the ID baseline.
        text_model (`PreTrainedModel`, *optional*): a loaded text tower to use instead of fresh weights.
        vision_model (`PreTrainedModel`, *optional*): a loaded vision tower to use instead of fresh weights.

    Raises:
        `ValueError`: if the configuration names no tower and no `num_items`.
    """

    def __init__(
        self,
        config: TransRecConfig,
        text_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if not config.modalities and config.num_items is None:
            raise ValueError("the configuration has no tower: set text_config, vision_config or both, or num_items")
        self.item_encoder = ItemEncoder(config, text_model, vision_model)
        self.user_encoder = UserEncoder(config)
        self.item_chunk_size: int | None = None
        self.images_per_pass: int | None = None
        self.post_init()

    @classmethod
    def from_text_vision_pretrained(
        cls, text_model: str | None = None, vision_model: str | None = None, **kwargs: Any
    ) -> TransRecModel:
        """
        A model with pre-trained towers and a fresh user encoder.

        Args:
            text_model (`str`, *optional*): Hub id or folder of a text encoder; `None` for no text tower.
            vision_model (`str`, *optional*): Hub id or folder of an image encoder; `None` for no vision tower.
            kwargs: fields of [`TransRecConfig`], e.g. `hidden_size=256`, or `objective="cpc"`.
        """
        text = load_tower(text_model, "text_config") if text_model else None
        vision = load_tower(vision_model, "vision_config") if vision_model else None
        loaded = {"text_config": text, "vision_config": vision}
        configs = {name: tower.config for name, tower in loaded.items() if tower is not None}
        # without it the composite configuration would reset the choice that each tower made when it was loaded
        kwargs.setdefault("attn_implementation", {name: part._attn_implementation for name, part in configs.items()})
        return cls(cls.config_class(**configs, **kwargs), text, vision)

    def train(self, mode: bool = True) -> TransRecModel:
        """As in torch, but what is frozen stays in evaluation mode: no dropout and no batch-norm updates in it."""
        super().train(mode)
        if mode:
            evaluate_frozen(self.item_encoder)
        return self

    def get_input_embeddings(self) -> None:
        """None: tokens are read by the towers, not by the model. FSDP asks for it."""
        return None

    def freeze_towers(self, trainable_blocks: int | None) -> None:
        """
        Train only the top blocks of each tower, as the paper does with two.

        Args:
            trainable_blocks (`int`, *optional*):
                Blocks at the top of each tower that are trained, with whatever follows them; 0 freezes the towers,
                `None` trains them whole. Projections, pooling and the user encoder are always trained.
        """
        for tower in self.item_encoder.towers.values():
            tower.requires_grad_(trainable_blocks is None)
            if trainable_blocks:
                blocks = tower_blocks(tower)
                first = next(blocks[max(0, len(blocks) - trainable_blocks)].parameters())
                reached = False
                for parameter in tower.parameters():  # in order of registration, which is that of execution
                    reached = reached or parameter is first
                    parameter.requires_grad_(reached)
        self.train(self.training)

    def compile_blocks(self, **kwargs: Any) -> None:
        """
        Compile the blocks of the towers and the layers of the user encoder, in place. Block by block there are no
        graph breaks, like blocks share their code, and shapes are dynamic: there is one more compilation, not one for
        every shape. It costs tens of seconds at the first batches.

        Args:
            kwargs: of `torch.compile`, e.g. `mode="max-autotune-no-cudagraphs"`.
        """
        lists = [tower_blocks(tower) for tower in self.item_encoder.towers.values()]
        for block in [block for blocks in (*lists, self.user_encoder.layers) for block in blocks]:
            block.compile(fullgraph=True, dynamic=True, **kwargs)

    def _in_chunks(self, encode: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """
        Encode `item_chunk_size` items at a time and keep their vectors only; a chunk's activations are computed again
        when its gradients are (GradCache; Gao et al., 2021). Without a chunk size, or without gradients, all at once.
        """
        size = self.item_chunk_size
        if size is None or not torch.is_grad_enabled():
            return encode(*inputs)
        num_items = next(len(values) for values in inputs if values is not None)
        chunks = (
            [None if values is None else values[start : start + size] for values in inputs]
            for start in range(0, num_items, size)
        )
        again = partial(keep_running_statistics, self.item_encoder)
        return torch.cat(
            [
                checkpoint(encode, *chunk, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
                for chunk in chunks
            ]
        )

    def get_text_features(
        self,
        input_ids: Tensor | Sequence[Tensor] | None,
        attention_mask: Tensor | Sequence[Tensor],
        text_states: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """
        Vectors of texts: `(n_text, hidden_size)`.

        Args:
            input_ids (`Tensor` of shape `(n_text, tokens)`): or a list of such tensors, one per bucket of like length.
            attention_mask (`Tensor` of shape `(n_text, tokens)`): or a list, as `input_ids`.
            text_states (`list[Tensor]`, *optional*): per bucket, what an [`ActivationStore`] has for `input_ids`.
        """
        if input_ids is None and text_states is None:
            raise ValueError("input_ids are missing: prepare items with TransRecProcessor")
        if isinstance(input_ids, Tensor):
            input_ids, attention_mask = [input_ids], [attention_mask]  # type: ignore[list-item]
        nothing = [None] * len(attention_mask)
        buckets = zip(
            nothing if text_states is not None else input_ids,  # type: ignore[arg-type]
            attention_mask,
            nothing if text_states is None else text_states,
            strict=True,
        )
        return torch.cat([self._in_chunks(self.item_encoder.encode_text, *bucket) for bucket in buckets])

    def get_image_features(self, pixel_values: Tensor | None, image_states: Tensor | None = None) -> Tensor:
        """
        Vectors of images: `(n_image, channels, height, width)` to `(n_image, hidden_size)`; `image_states` are what an
        [`ActivationStore`] has in place of the pixels.
        """
        size = self.image_pass_size()
        if pixel_values is None:
            passes = [(None, states) for states in image_states.split(size)]  # type: ignore[union-attr]
        else:
            passes = [(pixels, None) for pixels in pixel_values.split(size)]  # type: ignore[misc]
        return torch.cat([self._in_chunks(self.item_encoder.encode_images, *images) for images in passes])

    def image_pass_size(self) -> int:
        """
        Images that are encoded at a time: `images_per_pass` or, without it, on a CPU as many as leave their maps in
        its cache, elsewhere all. Batch norms in training see all images of the batch.
        """
        if self.images_per_pass is not None:
            return self.images_per_pass
        all_at_once = self.device.type != "cpu" or training_batch_norms(self.item_encoder.vision_model)
        return 2**31 if all_at_once else 32

    def get_item_features(
        self,
        input_ids: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | Sequence[Tensor] | None = None,
        text_index: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_index: Tensor | None = None,
        item_modalities: Tensor | None = None,
        item_ids: Tensor | None = None,
        text_states: Sequence[Tensor] | None = None,
        image_states: Tensor | None = None,
    ) -> Tensor:
        """
        Vectors of items, as [`TransRecProcessor`] prepares them: `(n_items, hidden_size)`.

        Args:
            input_ids, attention_mask: tokens of the items that have text, see [`~TransRecModel.get_text_features`].
            text_index (`Tensor` of shape `(n_text,)`): the item row of each text.
            pixel_values (`Tensor` of shape `(n_image, channels, height, width)`): pixels of the items with an image.
            image_index (`Tensor` of shape `(n_image,)`): the item row of each image.
            item_modalities (`Tensor` of shape `(n_items, 2)`): which of text and image each item has.
            item_ids (`Tensor` of shape `(n_items,)`): catalogue rows, read by the ID baseline only.
            text_states, image_states: stored states for `input_ids` and `pixel_values`, see [`ActivationStore`].
        """
        if self.config.num_items is not None:
            return self.item_encoder.item_embedding(item_ids)
        if item_modalities is None:
            raise ValueError("item_modalities is missing: prepare items with TransRecProcessor")
        parts = {}
        if "text" in self.config.modalities and attention_mask is not None:
            parts["text"] = (self.get_text_features(input_ids, attention_mask, text_states), text_index)
        if "image" in self.config.modalities and image_index is not None:
            parts["image"] = (self.get_image_features(pixel_values, image_states), image_index)
        if not parts:
            raise ValueError(f"the items have none of the modalities that this model reads: {self.config.modalities}")
        return self.item_encoder.fuse(parts, item_modalities)  # type: ignore[arg-type]

    def get_user_features(
        self, item_embeds: Tensor, history_index: Tensor, item_modalities: Tensor | None = None
    ) -> Tensor:
        """
        User states after each item of a history: `(n_users, length, hidden_size)`; see [`last_state`].

        Args:
            item_embeds (`Tensor` of shape `(n_items, hidden_size)`): item vectors.
            history_index (`Tensor` of shape `(n_users, length)`): rows of `item_embeds`, oldest first, `-1` for the
                padding on the right. `length` is at most `max_position_embeddings`.
            item_modalities (`Tensor` of shape `(n_items, 2)`, *optional*): which of text and image each item has.
        """
        if history_index.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"a history of {history_index.shape[1]} items is longer than max_position_embeddings="
                f"{self.config.max_position_embeddings}: keep the last {self.config.max_position_embeddings}"
            )
        rows = history_index.clamp(min=0)
        modalities = item_modalities[rows] if item_modalities is not None else None
        item_embeds = item_embeds.to(self.dtype)  # of an index, say, which is fp32 whatever the model is
        return self.user_encoder(item_embeds[rows], history_index >= 0, modalities)

    def forward(
        self,
        input_ids: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | Sequence[Tensor] | None = None,
        text_index: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_index: Tensor | None = None,
        item_modalities: Tensor | None = None,
        item_ids: Any = None,
        text_states: Sequence[Tensor] | None = None,
        image_states: Tensor | None = None,
        history_index: Tensor | None = None,
        target_index: Tensor | None = None,
        negative_index: Tensor | None = None,
        log_popularity: Tensor | None = None,
        cached_embeds: Any = None,
        cached_index: Tensor | None = None,
        return_loss: bool = True,
    ) -> TransRecOutput:
        """
        Encode the batch's distinct items, read the histories and, with targets, compute the objective.

        Args:
            history_index (`Tensor` of shape `(n_users, length)`, *optional*):
                Rows of the distinct items, oldest first, `-1` for the padding on the right.
            target_index (`Tensor` of shape `(n_users, length)`, *optional*):
                Row of the next item at each position, `-1` for none; `(n_users, num_positives)` for `"cpc"`.
            negative_index (`Tensor`, *optional*): rows of drawn negatives, in the shape the objective asks for.
            log_popularity (`Tensor` of shape `(n_items,)`, *optional*): log of each item's share of training data.
            cached_embeds (`Tensor` of shape `(n_cached, hidden_size)`, *optional*): vectors not to be computed.
            cached_index (`Tensor` of shape `(n_cached,)`, *optional*): the item row of each of those.
            return_loss (`bool`, *optional*, defaults to `True`): compute the loss if there are targets.

        The other arguments are those of [`~TransRecModel.get_item_features`].
        """
        items: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "text_index": text_index,
            "pixel_values": pixel_values,
            "image_index": image_index,
            "text_states": text_states,
            "image_states": image_states,
        }
        has_loss = return_loss and target_index is not None
        shared = None
        if has_loss and self._across_ranks() and self.config.objective in ("in_batch", "full_softmax"):
            # each item of a rank is scored by all users of all ranks, so its vector has to be everywhere
            shared = share_items(item_ids)
            items = select_items(items, shared.encoded)
        item_embeds = self.get_item_features(**items, item_modalities=item_modalities, item_ids=item_ids)
        candidates = item_embeds
        if shared is not None:
            candidates = gather_items(item_embeds, shared)
            item_embeds = candidates[shared.rows]
        if cached_index is not None:
            item_embeds = item_embeds.index_copy(0, cached_index, cached_embeds.to(item_embeds.dtype))
        if history_index is None:
            return TransRecOutput(item_embeds=item_embeds)
        states = self.get_user_features(item_embeds, history_index, item_modalities)
        loss = None
        if has_loss:
            loss = self.compute_loss(
                states,
                item_embeds,
                history_index,
                target_index,
                negative_index,
                log_popularity,
                shared,
                candidates,
            )
            if self.training:
                loss = loss + self.zero_of_unused_towers(
                    text=items["text_index"] is None, image=items["image_index"] is None
                )
        return TransRecOutput(loss=loss, item_embeds=item_embeds, last_hidden_state=states)

    def _across_ranks(self) -> bool:
        """Whether several processes train on one batch."""
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def compute_loss(
        self,
        states: Tensor,
        item_embeds: Tensor,
        history_index: Tensor,
        target_index: Any,
        negative_index: Any,
        log_popularity: Any,
        shared: SharedItems | None,
        candidates: Tensor,
    ) -> Tensor:
        """
        The configured objective; in training over several processes, that of their concatenated batch. `candidates`
        are the vectors of all ranks' items then, and `shared` says which of them this rank's are.
        """
        mean = masked_mean_across_ranks if self._across_ranks() else masked_mean
        objective = self.config.objective
        if objective in ("in_batch", "sampled_softmax") and log_popularity is None:
            raise ValueError(f"objective {objective!r} needs log_popularity, which DataCollatorForNextItem gives")
        if objective not in ("in_batch", "full_softmax") and negative_index is None:
            raise ValueError(f"objective {objective!r} needs negative_index, which DataCollatorForNextItem gives")
        if objective == "in_batch":
            slots = batch_slots(history_index, target_index)
            counts = count_slots(slots, len(item_embeds))
            if shared is not None:
                counts, log_popularity = gather_counts(counts, log_popularity, shared)
                # -1, the padding, stays what it is
                rows = torch.cat([shared.rows, shared.rows.new_tensor([-1])])
                slots, target_index = rows[slots], rows[target_index]
            return in_batch_softmax(states, candidates, target_index, slots, counts, log_popularity, mean)
        if objective == "full_softmax":
            return full_softmax(states, item_embeds, target_index, mean)
        if objective == "sampled_softmax":
            return sampled_softmax(states, item_embeds, target_index, negative_index, log_popularity, mean)
        if objective == "cpc":
            return cpc(last_state(states, history_index), item_embeds, target_index, negative_index, mean)
        return {"bce": bce, "bpr": bpr}[objective](states, item_embeds, target_index, negative_index, mean)

    def zero_of_unused_towers(self, text: bool, image: bool) -> Tensor | float:
        """
        A zero that depends on every trainable parameter of the towers this batch left out, so that each one gets a
        (zero) gradient in every step and data parallel training need not search for unused ones.
        """
        encoder, unused = self.item_encoder, []
        if text and "text" in self.config.modalities:
            unused += [encoder.text_model, encoder.text_projection, getattr(encoder, "text_pooling", None)]
        if image and "image" in self.config.modalities:
            unused += [encoder.vision_model, encoder.visual_projection]
        parameters = [p for module in unused if module is not None for p in module.parameters() if p.requires_grad]
        return sum((parameter.sum() * 0.0 for parameter in parameters), start=0.0)


__all__ = ["TransRecModel", "TransRecOutput", "TransRecPreTrainedModel", "last_state"]
