"""Histories of item vectors to user states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_transrec import TransRecConfig


def last_state(states: Tensor, history_index: Tensor) -> Tensor:
    """States `(n_users, length, hidden_size)` at each user's last real position: `(n_users, hidden_size)`."""
    last = (history_index >= 0).sum(dim=1).clamp(min=1) - 1
    return states[torch.arange(len(states), device=states.device), last]


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


__all__ = ["last_state"]
