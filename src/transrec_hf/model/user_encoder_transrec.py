"""From histories of item vectors to user states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchdynamo_exporting

from .configuration_transrec import TransRecConfig


def last_state(states: Tensor, history_index: Tensor) -> Tensor:
    """
    The state of each user at the last real position, `(n_users, hidden_size)`, of `(n_users, length, hidden_size)`.
    """
    last = (history_index >= 0).sum(dim=1).clamp(min=1) - 1
    return states[
        torch.arange(states.shape[0], device=states.device), last
    ]  # `len` would become a constant of a graph


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
    """Attention written out, the reference for tests of the other implementations."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Packing:
    """
    The real positions of padded sequences, so that everything except attention runs only on these. During an export
    all positions are kept, because the number of real ones would become a constant of the graph.
    """

    def __init__(self, sequence_mask: Tensor):
        self.sequence_mask = sequence_mask
        self.rows = None if is_torchdynamo_exporting() else sequence_mask.flatten().nonzero().squeeze(1)

    def pack(self, padded: Tensor) -> Tensor:
        """`(n_users, length, width)` to `(n_real, width)`."""
        return padded if self.rows is None else padded.flatten(0, 1).index_select(0, self.rows)

    def unpack(self, packed: Tensor) -> Tensor:
        """`(n_real, width)` to `(n_users, length, width)`, zero in the padding."""
        if self.rows is None:
            return packed * self.sequence_mask.unsqueeze(-1)
        padded = packed.new_zeros(self.sequence_mask.numel(), packed.shape[1]).index_copy_(0, self.rows, packed)
        return padded.view(*self.sequence_mask.shape, packed.shape[1])


class UserEncoder(nn.Module):
    """
    Base class of the user encoders with parameters. It adds up item vectors, positions and modalities; a subclass
    turns this input into states in `read`, with the width of the configuration.

    Example:

    ```python
    >>> class Fading(UserEncoder):
    ...     def __init__(self, config):
    ...         super().__init__(config)
    ...         self.rate = nn.Linear(config.user_width, config.user_width)
    ...
    ...     def read(self, hidden_states, packing, timestamps):
    ...         return torch.logcumsumexp(self.rate(hidden_states), dim=1)

    >>> class FadingModel(TransRecModel):
    ...     user_encoder_class = Fading
    ```
    """

    has_positions = False
    layers: nn.ModuleList
    final_norm: nn.LayerNorm

    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        if self.has_positions:
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.user_width)
        if config.use_modality_embedding and len(config.modalities) > 1:
            self.modality_embedding = nn.Embedding(2 ** len(config.modalities) - 1, config.user_width)
        if config.input_layer_norm:
            self.input_norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        inputs_embeds: Tensor,
        sequence_mask: Tensor,
        combination: Tensor | None = None,
        timestamps: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            inputs_embeds (`Tensor` of shape `(n_users, length, hidden_size)`): Item vectors, oldest first.
            sequence_mask (`Tensor` of shape `(n_users, length)`): True for items, false for the padding on the right.
            combination (`Tensor` of shape `(n_users, length)`, *optional*):
                The modalities of each item: bit `i` for the `i`-th one that the model reads, minus 1.
            timestamps (`Tensor` of shape `(n_users, length)`, *optional*):
                When each item was chosen, in the unit of the data. Used only with `time_buckets`.

        Returns:
            `Tensor` of shape `(n_users, length, hidden_size)`: The states, zero in the padding.

        Raises:
            `ValueError`: If an input that the configuration needs is missing.
        """
        hidden_states = inputs_embeds
        if self.has_positions:
            hidden_states = hidden_states + self.position_embedding.weight[: inputs_embeds.shape[1]]
        if hasattr(self, "modality_embedding"):
            if combination is None:
                raise ValueError("a model with a modality embedding needs item_modalities to read a history")
            hidden_states = hidden_states + self.modality_embedding(combination.clamp(min=0))
        packing = Packing(sequence_mask)
        hidden_states = packing.pack(hidden_states)
        if hasattr(self, "input_norm"):
            hidden_states = self.input_norm(hidden_states)
        hidden_states = packing.unpack(self.dropout(hidden_states))
        hidden_states = packing.pack(self.read(hidden_states, packing, timestamps))
        if hasattr(self, "final_norm"):
            hidden_states = self.final_norm(hidden_states)
        return packing.unpack(hidden_states)

    def read(self, hidden_states: Tensor, packing: Packing, timestamps: Tensor | None) -> Tensor:
        """Turn inputs `(n_users, length, hidden_size)`, zero in the padding, into states; padding is cleared later."""
        raise NotImplementedError


class UserAttention(nn.Module):
    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.config = config
        self.head_size = config.user_width // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = config.is_causal
        self.q_proj = nn.Linear(config.user_width, config.user_width)
        # no key bias: it adds the same number to all scores of a query, which the softmax cancels
        self.k_proj = nn.Linear(config.user_width, config.user_width, bias=False)
        self.v_proj = nn.Linear(config.user_width, config.user_width)
        self.o_proj = nn.Linear(config.user_width, config.user_width)

    def forward(
        self, hidden_states: Tensor, packing: Packing, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            packing.unpack(linear(hidden_states)).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attended, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.o_proj(packing.pack(attended.flatten(2))), weights


class UserLayer(GradientCheckpointingLayer):
    """A layer of any user encoder, from padded states to padded states, which `output_hidden_states` records."""


class UserEncoderLayer(UserLayer):
    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = UserAttention(config)
        self.intermediate = nn.Linear(config.user_width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.user_width)
        self.attention_norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)
        self.output_norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        return self.output(self.activation(self.intermediate(hidden_states)))

    def forward(self, hidden_states: Tensor, packing: Packing, attention_mask: Tensor | None) -> Tensor:
        hidden_states = packing.pack(hidden_states)
        if self.norm_first:
            attended, _ = self.attention(self.attention_norm(hidden_states), packing, attention_mask)
            hidden_states = hidden_states + self.dropout(attended)
            hidden_states = hidden_states + self.dropout(self.feed_forward(self.output_norm(hidden_states)))
        else:
            attended, _ = self.attention(hidden_states, packing, attention_mask)
            hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
            hidden_states = self.output_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))
        return packing.unpack(hidden_states)


class TransformerUserEncoder(UserEncoder):
    """A Transformer with learned positions."""

    has_positions = True

    def __init__(self, config: TransRecConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(UserEncoderLayer(config) for _ in range(config.num_hidden_layers))
        if config.norm_first:
            self.final_norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)

    def read(self, hidden_states: Tensor, packing: Packing, timestamps: Tensor | None) -> Tensor:
        # positional arguments, since the next major version of transformers renames the keywords
        if self.config.is_causal:  # padding is on the right, so the causal mask alone hides it
            mask = create_causal_mask(self.config, hidden_states, None, None)
        else:
            mask = create_bidirectional_mask(self.config, hidden_states, packing.sequence_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, packing, mask)
        return hidden_states


class GRULayer(UserLayer):
    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.gru = nn.GRU(config.user_width, config.user_width, batch_first=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: torch cannot trace a GRU, which has its own kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.gru(hidden_states)[0])


class GRUUserEncoder(UserEncoder):
    """GRU4Rec (arXiv 1511.06939): recurrent layers, which need no positions."""

    def __init__(self, config: TransRecConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(GRULayer(config) for _ in range(config.num_hidden_layers))
        self.output = nn.Linear(config.user_width, config.user_width)  # since the states of a GRU are between -1 and 1

    def read(self, hidden_states: Tensor, packing: Packing, timestamps: Tensor | None) -> Tensor:
        length = hidden_states.shape[1]
        if is_torchdynamo_exporting():  # a graph has a node for every step of the longest history
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, self.config.max_position_embeddings - length))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.output(hidden_states[:, :length])


class HSTUAttention(nn.Module):
    """
    Attention without a softmax, so that the strength of a taste is not lost, with a gate by the item itself. Scores
    have a bias for the distance between two items, in positions and, with `time_buckets`, in time.
    """

    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.longest = config.max_position_embeddings
        self.projection = nn.Linear(config.user_width, 4 * config.user_width)
        self.position_bias = nn.Embedding(config.max_position_embeddings, config.num_attention_heads)
        if config.time_buckets:
            self.time_bias = nn.Embedding(config.time_buckets, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.user_width, config.user_width)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden_states: Tensor, packing: Packing, distances: Tensor, time_buckets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gate, *projected = nn.functional.silu(self.projection(hidden_states)).chunk(4, dim=-1)
        query, key, value = (
            packing.unpack(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for states in projected
        )
        bias = self.position_bias(distances.clamp(min=0))
        if time_buckets is not None:
            bias = bias + self.time_bias(time_buckets)
        weights = nn.functional.silu(query @ key.transpose(2, 3) + bias.movedim(-1, -3)) / self.longest
        weights = self.attention_dropout(weights.masked_fill(distances < 0, 0.0))
        attended = packing.pack((weights @ value).transpose(1, 2).flatten(2))
        return self.output(self.norm(attended) * gate), weights


class HSTULayer(UserLayer):
    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.attention = HSTUAttention(config)
        self.attention_norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, packing: Packing, distances: Tensor, time_buckets: Tensor | None
    ) -> Tensor:
        hidden_states = packing.pack(hidden_states)
        attended, _ = self.attention(self.attention_norm(hidden_states), packing, distances, time_buckets)
        return packing.unpack(hidden_states + self.dropout(attended))


class HSTUUserEncoder(UserEncoder):
    """
    Hierarchical sequential transduction units (arXiv 2402.17152), with a layer norm at the end. The bucket of a time
    between two items is `log2(1 + time)`; the last bucket holds all longer times.
    """

    def __init__(self, config: TransRecConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.user_width, eps=config.layer_norm_eps)

    def read(self, hidden_states: Tensor, packing: Packing, timestamps: Tensor | None) -> Tensor:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        distances = positions[:, None] - positions  # below 0 for later items and the padding on the right
        buckets = None
        if self.config.time_buckets:
            if timestamps is None:
                raise ValueError("a model with time_buckets needs the timestamps of a history to read it")
            times = (timestamps[:, :, None] - timestamps[:, None, :]).clamp(min=0)
            # 1.5, not 1, so that whole times are not on the edges of buckets, where logarithms are rounded
            buckets = torch.log2(times + 1.5).long().clamp(max=self.config.time_buckets - 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, packing, distances, buckets)
        return hidden_states


class MeanUserEncoder(nn.Module):
    """The mean of the items so far, a baseline without parameters."""

    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(
        self,
        inputs_embeds: Tensor,
        sequence_mask: Tensor,
        combination: Tensor | None = None,
        timestamps: Tensor | None = None,
    ) -> Tensor:
        """See [`UserEncoder.forward`]."""
        real = sequence_mask.unsqueeze(-1)
        sums = (inputs_embeds * real).float().cumsum(dim=1)
        counts = sequence_mask.cumsum(dim=1).clamp(min=1).unsqueeze(-1)
        return (sums / counts * real).to(inputs_embeds.dtype)


USER_ENCODERS: dict[str, type[UserEncoder | MeanUserEncoder]] = {
    "transformer": TransformerUserEncoder,
    "gru": GRUUserEncoder,
    "hstu": HSTUUserEncoder,
    "mean": MeanUserEncoder,
}


def hide_next(history_index: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """
    Add a hidden item, the next one, to the end of histories. A history of `longest` items loses its first one.

    Args:
        history_index (`Tensor` of shape `(n_users, length)`): Rows of items, `-1` for the padding on the right.
        longest (`int`): Most items that the user encoder reads.

    Returns:
        `Tensor`s of shape `(n_users, at most length + 1)`: The rows, `-1` for the hidden item, and its position.
    """
    full = (history_index >= 0).sum(dim=1, keepdim=True) >= longest
    padded = nn.functional.pad(history_index, (0, 1), value=-1)
    index = torch.where(full, padded.roll(-1, dims=1), padded)[:, :longest]
    ends = (index >= 0).sum(dim=1, keepdim=True)
    return index, torch.arange(index.shape[1], device=index.device) == ends


class ContentPrior(nn.Module):
    """
    User states that start from content: the mean of the history's own item vectors, with more weight for recent ones,
    plus the output of a user encoder of its own width, which starts at zero. With unit item vectors `g_s`, the decay
    `d`, a learned weight `w` and the user encoder `f`:

        state_t = unit(sum over s <= t of d^(t - s) g_s) + w f(g_1, ..., g_t)

    Args:
        config ([`TransRecConfig`]): The configuration of the model.
    """

    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.scale = config.hidden_size**0.5
        self.decay = nn.Parameter(torch.tensor(0.0))  # its logit
        self.weight = nn.Parameter(torch.tensor(0.0))  # of the user encoder, its logarithm
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.input = nn.Linear(config.hidden_size, config.user_width)
        self.output = nn.Linear(config.user_width, config.hidden_size)

    def forward(self, inputs_embeds: Tensor, sequence_mask: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """
        Args:
            inputs_embeds (`Tensor` of shape `(n_users, length, hidden_size)`): Item vectors, oldest first.
            sequence_mask (`Tensor` of shape `(n_users, length)`): True for items, false for the padding on the right.
            encode (`Callable`): The user encoder, from `(n_users, length, user_width)` to states of the same shape.

        Returns:
            `Tensor` of shape `(n_users, length, hidden_size)`: The states.
        """
        items = nn.functional.normalize(inputs_embeds.float(), dim=-1)
        steps = torch.arange(items.shape[1], device=items.device)
        ages = steps[:, None] - steps
        votes = (ages * nn.functional.logsigmoid(self.decay.float())).exp().masked_fill(ages < 0, 0.0)
        prior = nn.functional.normalize(votes @ items, dim=-1)
        added = encode(self.input((self.dropout(items) * self.scale).to(self.decay.dtype)))
        states = prior + self.weight.float().exp() / self.scale * self.output(added).float()
        return states * sequence_mask.unsqueeze(-1)


__all__ = ["USER_ENCODERS", "ContentPrior", "UserEncoder", "hide_next", "last_state"]
