"""From items to vectors: pooling, projection and fusion of the outputs of the towers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_transrec import TransRecConfig
from .modalities_transrec import COLUMNS, MODALITIES
from .towers_transrec import (
    build_tower,
    check_tower,
    frozen_depth,
    is_frozen,
    lower_depths,
    lower_states,
    pooled_depth,
    pooled_state,
    reads_clips,
    recorded,
    resume_tower,
    run_tower,
    text_positions,
    tower_width,
)
from .windows_transrec import as_clips, masked_mean, run_windows


CONTENT_RMS = 0.1
"""
Size of the numbers of a whitened item vector. It decides how much the ID vector of a hybrid, which moves by the
learning rate in each step, matters beside the content.
"""

MAX_DEFAULT_WIDTH = 1024
"""Largest width of item vectors, if `hidden_size` is not given."""

MODALITY_SCALE = {"image": 0.4}
"""Weights of whitened vectors at the start that are not 1."""


class Scale(nn.Module):
    """Learned numbers, as a module, so that an adapter can have its own."""

    def __init__(self, start: float | list[float]):
        super().__init__()
        self.start = start
        self.value = nn.Parameter(torch.tensor(start))


class AttentionPooling(nn.Module):
    """
    The paper's pooling of token states (from NRMS): multi-head self-attention without an output projection, then
    additive attention. Unlike in the released code, both attend only to real tokens.
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
        """Turn token states `(n, tokens, width)` and their mask `(n, tokens)` into vectors `(n, output_size)`."""
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


class CodeTable(nn.Module):
    """
    A vector for each value of each code, as in VQ-Rec (arXiv 2210.12316). The vector of an item is the mean of its
    codes'.

    Args:
        config ([`TransRecConfig`]): The configuration of the model.
    """

    is_new: Tensor  # true until its vectors are initialised from data

    def __init__(self, config: TransRecConfig):
        super().__init__()
        self.codebook_size = config.codebook_size
        self.vectors = nn.Embedding(int(config.num_codebooks or 0) * config.codebook_size, config.hidden_size)
        self.register_buffer("is_new", torch.ones((), dtype=torch.bool))

    def forward(self, codes: Tensor) -> Tensor:
        """Turn codes `(n, num_codebooks)` into vectors `(n, hidden_size)`."""
        rows = codes + torch.arange(codes.shape[1], device=codes.device) * self.codebook_size
        return nn.functional.embedding_bag(rows, self.vectors.weight, mode="mean")


def default_width(config: TransRecConfig, towers: dict[str, PreTrainedModel]) -> int:
    """
    The default width of item vectors. Whitened ones are as wide as the widest tower output, so that no axis is lost.
    """
    if config.item_map != "whitened":
        return config.hidden_size
    texts = {modality.tower for modality in MODALITIES.values() if modality.has_tokens}
    depths = {name: lower_depths(tower, config.text_depths) for name, tower in towers.items() if name in texts}
    widths = [tower_width(tower) * (1 + len(depths.get(name, ()))) for name, tower in towers.items()]
    return min(MAX_DEFAULT_WIDTH, max(widths))


def build_projection(config: TransRecConfig, width: int) -> nn.Module:
    """The module that turns the output of a tower into an item vector: whitened, linear, or with one hidden layer."""
    hidden = config.projection_hidden_size
    if config.item_map == "whitened":
        return WhitenedProjection(config, width)
    if hidden is None:
        return nn.Linear(width, config.hidden_size)
    return nn.Sequential(nn.Linear(width, hidden), ACT2FN[config.hidden_act], nn.Linear(hidden, config.hidden_size))


class WhitenedProjection(nn.Module):
    """
    A whitened item map: the output of a tower, whitened by the statistics of the catalogue at hand, plus a learned
    correction `f` that starts at zero. So an untrained model ranks by content, and weights that were learned on one
    catalogue get vectors with the same mean and covariance on the next one. With the state `x`, and the mean `m` and
    covariance `C` of the catalogue's states on the axes `A`, which stay those of the first catalogue:

        z = unit((x - m) A C^(-1/2)),    item vector = z + f(z)

    Args:
        config ([`TransRecConfig`]): The configuration of the model.
        width (`int`): Width of the tower's states.
    """

    statistics = ("mean", "whitening", "num_fitted")  # renewed on each catalogue; the axes stay
    mean: Tensor
    axes: Tensor
    whitening: Tensor
    num_fitted: Tensor

    def __init__(self, config: TransRecConfig, width: int):
        super().__init__()
        size, hidden = config.hidden_size, config.projection_hidden_size or 256
        self.scale = size**0.5
        self.sorts_axes = bool(config.matryoshka_dims)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("axes", torch.eye(width, size))
        self.register_buffer("whitening", torch.eye(size))
        self.register_buffer("num_fitted", torch.zeros((), dtype=torch.long))
        self.input = nn.Linear(size, hidden)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output = nn.Linear(hidden, size)

    def whiten(self, states: Tensor) -> Tensor:
        """Whiten states `(n, width)`: `(n, hidden_size)`, fp32."""
        with torch.autocast(states.device.type, enabled=False):
            centred, axes, whitening = states.float() - self.mean.float(), self.axes.float(), self.whitening.float()
            if torch.compiler.is_exporting() or len(states) > len(axes):  # a graph takes any number of states
                return centred @ (axes @ whitening)
            return centred @ axes @ whitening  # cheaper for few states than the product of both matrices

    def forward(self, states: Tensor) -> Tensor:
        """Turn states `(n, width)` into item vectors `(n, hidden_size)`, which have length 1 before the correction."""
        anchor = nn.functional.normalize(self.whiten(states), dim=-1)
        hidden = self.activation(self.input((anchor * self.scale).to(self.axes.dtype)))
        return anchor + self.output(self.dropout(hidden)) / self.scale

    @torch.no_grad()
    def fit(self, states: Tensor, generator: torch.Generator | None = None, epsilon: float = 0.05) -> None:
        """
        Compute mean and covariance from the states of a catalogue `(n, width)`, and the axes too if there are none
        yet: the principal axes, or random orthogonal ones if the item vector is wider than the states.

        Args:
            states (`Tensor` of shape `(n, width)`): States of the catalogue, or of a sample of it.
            generator (`torch.Generator`, *optional*): Generator of the random axes; without it the first axes are
                taken.
            epsilon (`float`, *optional*, defaults to 0.05): This share of the mean variance is added to the variance
                of each axis, so that axes without content are not enlarged.
        """
        states = states.double()
        width, size = self.axes.shape
        self.mean.copy_(states.mean(dim=0))
        centred = states - states.mean(dim=0)
        if not self.num_fitted:
            axes = torch.eye(width, size, dtype=torch.float64)
            if width > size or (width == size and self.sorts_axes):
                axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :size]
            elif generator is not None:
                axes = torch.linalg.qr(torch.randn(size, width, generator=generator, dtype=torch.float64))[0].T
            self.axes.copy_(axes)
        projected = centred @ self.axes.double()
        variances, directions = torch.linalg.eigh(projected.T @ projected / len(states))
        variances = variances.clamp(min=0)
        variances = (variances + epsilon * variances.sum() / min(width, size)).clamp(min=1e-20)  # items all alike
        self.whitening.copy_((directions * variances.rsqrt()) @ directions.T)
        self.num_fitted.fill_(len(states))


class SideNetwork(nn.Module):
    r"""
    A small network beside a frozen tower. It reads states of the tower and adds to the item vector, so no gradient
    passes the tower, and with stored states the tower does not run at all. With the pooled and normalised states `h_i`
    after some blocks, from the lowest to the last, and `s` zero below the first:

        m_i = g_i h_i + (1 - g_i) s_(i-1),    s_i = m_i + U_i gelu(D_i m_i),    addition = W s_last

    From IISAN (arXiv 2404.02059) come the pooled states after every second block, the gates `g` (sigmoids of learned
    numbers divided by .1, which start at one half), the chain of bottleneck blocks `U`, `D` with a residual, and the
    linear layer `W`. Ours is that the output is added to the item vector instead of replacing it, with `W` zero at the
    start; that states are normalised, without parameters; that depths of other widths, as in convolutional towers,
    pass a linear layer; and that no network combines modalities, since the item encoder does that.

    Args:
        config ([`TransRecConfig`]): The configuration of the model.
        widths (`Sequence[int]`): Widths of the states, from the lowest depth to the last.
        own (`Sequence[int]`): The states that the projection reads too, besides the last one.
    """

    def __init__(self, config: TransRecConfig, widths: Sequence[int], own: Sequence[int]):
        super().__init__()
        assert config.side is not None
        size, width = config.side["size"], widths[-1]
        self.widths, self.own, self.scale = list(widths), [*own, len(widths) - 1], config.hidden_size**0.5
        self.align = nn.ModuleList(nn.Identity() if n == width else nn.Linear(n, width) for n in widths)
        self.gates = Scale([0.0] * len(widths))
        self.down = nn.ModuleList(nn.Linear(width, size) for _ in widths)
        self.up = nn.ModuleList(nn.Linear(size, width) for _ in widths)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output = nn.Linear(width, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Turn the concatenated states of all depths, `(n, sum of widths)`, into the addition, `(n, hidden_size)`."""
        found = states.new_zeros(states.shape[0], self.widths[-1])
        layers = zip(self.align, (self.gates.value / 0.1).sigmoid(), self.down, self.up, strict=True)
        for state, (align, gate, down, up) in zip(states.split(self.widths, dim=-1), layers, strict=True):
            state = align(nn.functional.layer_norm(state, state.shape[-1:]))
            found = gate * state + (1 - gate) * found
            found = found + up(nn.functional.gelu(down(found)))
        return self.output(self.dropout(found)) / self.scale


class ItemEncoder(nn.Module):
    """
    Turns items into vectors: each modality has a tower (if it needs one) and a projection, whose vectors are fused
    into one. Hybrids and ID baselines also have a table of ID vectors.

    Args:
        config ([`TransRecConfig`]): The configuration of the model.
        towers (`PreTrainedModel`): Loaded towers, by their names in `MODALITIES`, to use instead of new weights.
    """

    text_pooling: AttentionPooling
    codes_table: CodeTable

    def __init__(self, config: TransRecConfig, **towers: PreTrainedModel | None):
        super().__init__()
        self.modalities = config.modalities
        self.pooling_strategy = config.text_pooling
        self.positions: int | None = None  # positions of the text tower
        self.depths: dict[str, list[int]] = {}  # depths of towers that are pooled besides the last
        if config.num_items is not None:
            self.item_embedding = nn.Embedding(config.num_items, config.hidden_size)
        for modality in (MODALITIES[name] for name in self.modalities):
            if modality.name == "codes":
                self.codes_table, width = CodeTable(config), config.hidden_size
            elif modality.tower is None:
                width = getattr(config, modality.config)
            else:
                tower = towers.get(modality.tower) or build_tower(getattr(config, modality.config))
                depths = lower_depths(tower, config.text_depths) if modality.has_tokens else []
                check_tower(tower, modality.name, modality.has_tokens, depths)
                setattr(self, modality.tower, tower)
                self.depths[modality.name] = depths
                width = tower_width(tower)
                self.positions = text_positions(tower) if modality.has_tokens else self.positions
            strategy = config.text_pooling if modality.has_tokens else config.window_pooling
            if modality.mask is not None and strategy == "attention" and not reads_clips(tower):
                pooling = AttentionPooling(config, width)
                setattr(self, f"{modality.name}_pooling", pooling)
                width = pooling.output_size
            if modality.tower is not None:
                width += len(depths) * tower_width(tower)
            setattr(self, modality.projection, build_projection(config, width))
            if config.side and modality.name in config.side["depths"]:
                self.add_side(config, modality.name)
        self.is_whitened = config.item_map == "whitened"
        self.length = CONTENT_RMS * config.hidden_size**0.5
        if len(self.modalities) > 1 and self.is_whitened:
            self.modality_scale = Scale([math.log(MODALITY_SCALE.get(name, 1.0)) for name in self.modalities])
        elif len(self.modalities) > 1:
            self.missing_embeds = nn.Parameter(torch.zeros(len(self.modalities), config.hidden_size))

    @property
    def towers(self) -> dict[str, PreTrainedModel]:
        """The towers by modality, for modalities that have one."""
        modalities = (MODALITIES[name] for name in self.modalities)
        return {modality.name: getattr(self, modality.tower) for modality in modalities if modality.tower}

    def projection(self, name: str) -> nn.Module:
        """The projection of a modality."""
        return getattr(self, MODALITIES[name].projection)

    def add_side(self, config: TransRecConfig, name: str) -> None:
        """Add the side network of a modality as `config.side` says. It also reads the depths of the projection."""
        assert config.side is not None
        modality, own, pooling = MODALITIES[name], self.depths[name], getattr(self, f"{name}_pooling", None)
        assert modality.tower is not None
        tower = getattr(self, modality.tower)
        width_of = dict.fromkeys(own, tower_width(tower)) | dict(config.side["depths"][name])
        self.depths[name] = depths = sorted(width_of)
        check_tower(tower, name, modality.has_tokens, depths)
        last = tower_width(tower) if pooling is None else pooling.output_size
        widths = [*(width_of[depth] for depth in depths), last]
        setattr(self, f"{name}_side", SideNetwork(config, widths, [depths.index(depth) for depth in own]))

    def side(self, name: str) -> SideNetwork | None:
        """The side network of a modality, if it has one."""
        return getattr(self, f"{name}_side", None)

    def parts_of(self, name: str) -> list[nn.Module]:
        """All modules that only the contents of one modality pass."""
        parts = [getattr(self, f"{name}_{part}", None) for part in ("table", "pooling", "side")]
        modules = [self.towers.get(name), *parts, self.projection(name)]
        return [module for module in modules if module is not None]

    def zero_of_unused(self, modalities: Collection[str], present: Collection[str]) -> Tensor | float:
        """
        A zero that depends on every trainable parameter of the `modalities` that are not `present` in a batch. So each
        parameter gets a (zero) gradient in every step, and data-parallel training need not search for unused ones.
        """
        modules = [module for name in modalities if name not in present for module in self.parts_of(name)]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        return sum((parameter.sum() * 0.0 for parameter in parameters), start=0.0)

    def is_stored_pooled(self, name: str) -> bool:
        """Whether an [`ActivationStore`] keeps pooled states, because nothing below the projection is trained."""
        return is_frozen(self.towers[name]) and not hasattr(self, f"{name}_pooling")

    def encode(self, name: str, values: Tensor, mask: Tensor | None = None, stored: int = 0) -> Tensor:
        """
        Turn contents of one modality into vectors `(n, hidden_size)`.

        Args:
            name (`str`): The modality.
            values (`Tensor` of shape `(n, ...)`): The inputs of the tower, or ready vectors if there is no tower. If
                `stored`, the states after this many blocks from an [`ActivationStore`], see
                [`~ItemEncoder.states_to_store`].
            mask (`Tensor` of shape `(n, length)`, *optional*): The real positions, or the real shares of windows.
            stored (`int`, *optional*, defaults to 0): See `values`.

        Raises:
            `RuntimeError`: If blocks are trained whose states were stored when they were frozen.
            `ValueError`: If a text has more tokens than the tower has positions.
        """
        return self.vectors(name, self.state(name, values, mask, stored))

    def vectors(self, name: str, state: Tensor) -> Tensor:
        """Turn pooled states of a modality, see [`~ItemEncoder.state`], into vectors `(n, hidden_size)`."""
        vectors, side = self.projection(name)(self.projected(name, state)), self.side(name)
        return vectors if side is None else vectors + side(state)

    def projected(self, name: str, state: Tensor) -> Tensor:
        """
        The part of the pooled states of a modality that its projection reads, without further depths of a side
        network.
        """
        side = self.side(name)
        if side is None:
            return state
        parts = state.split(side.widths, dim=-1)
        return torch.cat([parts[i] for i in side.own], dim=-1)

    def state(self, name: str, values: Tensor, mask: Tensor | None = None, stored: int = 0) -> Tensor:
        """Pooled states of all depths that are read for a modality, `(n, width)`; see [`~ItemEncoder.encode`]."""
        if name == "codes":
            return self.codes_table(values)
        if name not in self.towers:
            return values.to(next(self.projection(name).parameters()).dtype)
        tower = self.towers[name]
        is_pooled = stored > 0 and values.dim() == 2
        if stored and (not is_frozen(tower) if is_pooled else stored > frozen_depth(tower)):
            raise RuntimeError(
                f"the stored states of the {name} tower are those after {stored} frozen blocks, but some of these "
                "blocks are trained now: make a new ActivationStore after unfreezing towers"
            )
        if is_pooled:
            return values.to(tower.dtype)
        if MODALITIES[name].is_windowed:
            assert mask is not None
            return self._windows_state(name, values, mask, stored)
        if mask is not None and self.positions is not None and mask.shape[1] > self.positions:
            raise ValueError(
                f"a text has {mask.shape[1]} tokens, but the {name} tower has positions for {self.positions}: set "
                f"max_text_length={self.positions} of the processor"
            )
        return self.read(name, values, mask, stored)[1]

    def read(
        self, name: str, values: Tensor, mask: Tensor | None = None, stored: int = 0, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """The output of the tower of a modality, and the pooled states of all depths, concatenated."""
        tower, depths = self.towers[name], self.depths[name]
        known: dict[int, Tensor] = {}
        if stored:
            below = [stored, *(depth for depth in depths if depth < stored)]
            known = dict(zip(below, values.to(tower.dtype).chunk(len(below), dim=-1), strict=True))
            values = known[stored]
        with recorded(tower, [depth for depth in depths if depth not in known]) as found:
            output = resume_tower(tower, stored, values, mask) if stored else run_tower(tower, values, mask, **kwargs)
        states = found | known
        pooled = [
            pooled_depth(states[depth]) if mask is None else masked_mean(states[depth], mask) for depth in depths
        ]
        return output, torch.cat([*pooled, self.pool(output, mask)], dim=-1)

    def states_to_store(self, name: str, values: Tensor, mask: Tensor | None, stored: int) -> Tensor:
        """
        The states that an [`ActivationStore`] keeps: those after `stored` frozen blocks, with the pooled states of
        lower depths. For a tower that is frozen as a whole, the states that the projection reads.
        """
        lower = [depth for depth in self.depths[name] if depth < stored]
        with recorded(self.towers[name], lower) as below:
            states = lower_states(self.towers[name], stored, values, mask)
        return torch.cat([states, *(below[depth] for depth in lower)], dim=-1)

    def _windows_state(self, name: str, values: Tensor, mask: Tensor, stored: int) -> Tensor:
        """
        One state for several windows: the mean of their states, or a pooling by attention.

        Args:
            values (`Tensor` of shape `(n, windows, ...)`): The windows, or their states after `stored` blocks.
            mask (`Tensor` of shape `(n, windows)`): The real share of each window; 0 if there is no window.
        """
        tower, real = self.towers[name], mask > 0
        if reads_clips(tower):
            output = run_tower(tower, as_clips(values, real, tower.config.num_frames))
            states = output.last_hidden_state  # VideoMAE, which has no token of the whole, is averaged
            return states.mean(dim=1) if tower.config.model_type == "videomae" else self.pool(output, None)
        reads_all = torch.compiler.is_exporting()  # otherwise shapes would depend on the mask
        windows, shares = (values.flatten(0, 1), mask.flatten()) if reads_all else (values[real], mask[real])
        if stored:
            output, moments = resume_tower(tower, stored, windows.to(tower.dtype)), None
        else:
            output, moments = run_windows(tower, windows, shares)
        found = self.pool(output, None) if moments is None else masked_mean(output.last_hidden_state, moments)
        if reads_all:
            states = found.view(*mask.shape, -1)
        else:
            states = found.new_zeros(*mask.shape, found.shape[-1])
            states[real] = found
        pooling = getattr(self, f"{name}_pooling", None)
        return masked_mean(states, real) if pooling is None else pooling(states, real)

    def pool(self, output: Any, mask: Tensor | None) -> Tensor:
        """
        Pool the output of a tower to one state per content, `(n, width)`: token states under their mask, other states
        as the tower does it itself.
        """
        states = output.last_hidden_state
        if mask is not None:
            if self.pooling_strategy == "attention":
                return self.text_pooling(states, mask)
            return states[:, 0] if self.pooling_strategy == "cls" else masked_mean(states, mask)
        return pooled_state(output)

    def fuse(self, vectors: dict[str, tuple[Tensor, Tensor]], present: Tensor) -> Tensor:
        """
        One vector per item: the mean over its modalities, plus a learned vector for each missing one. These start at
        zero, so an item with a single modality starts as the paper's item vector. Whitened vectors are summed with a
        learned weight for each modality, and scaled to one length.

        Args:
            vectors (`dict`): For each modality, vectors `(n, hidden_size)` and their item rows `(n,)`.
            present (`Tensor` of shape `(n_items, len(MODALITIES))`): Which modalities each item has.
        """
        n_items = present.shape[0]
        rows = [part.new_zeros(n_items, part.shape[1]).index_copy(0, index, part) for part, index in vectors.values()]
        if self.is_whitened:
            if len(self.modalities) > 1:
                weights = {name: self.modality_scale.value[i].exp() for i, name in enumerate(self.modalities)}
                rows = [weights[name] * part for name, part in zip(vectors, rows, strict=True)]
            total = torch.stack(rows).sum(dim=0)
            return (nn.functional.normalize(total.float(), dim=-1) * self.length).to(total.dtype)
        if len(self.modalities) == 1:
            return rows[0]
        has = present[:, [COLUMNS[name] for name in self.modalities]].to(rows[0].dtype)
        missing = (1 - has) @ self.missing_embeds.to(rows[0].dtype)
        return sum(rows) / has.sum(dim=1, keepdim=True) + missing  # type: ignore[operator]


__all__ = ["ItemEncoder", "SideNetwork", "WhitenedProjection"]
