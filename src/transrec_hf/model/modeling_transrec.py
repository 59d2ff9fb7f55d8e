"""The TransRec model: items from raw text and images, users from item vectors, scores from their dot product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_transrec import AMONG_ALL, WITH_NEGATIVES, TransRecConfig
from .item_encoder_transrec import ItemEncoder, Scale, SideNetwork, WhitenedProjection, default_width
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
    nested,
    sampled_softmax,
    share_items,
)
from .modalities_transrec import MODALITIES, ItemBatch, ItemPart, combinations, with_all_columns
from .towers_transrec import (
    compile_each,
    evaluate_frozen,
    tower_blocks,
)
from .tuning_transrec import TunableModel
from .user_encoder_transrec import (
    USER_ENCODERS,
    ContentPrior,
    HSTUAttention,
    UserAttention,
    UserEncoder,
    UserLayer,
    hide_next,
    last_state,
)


LOGIT_SCALE = 12.0  # factor of cosines at the start
MAX_LOGIT_SCALE = math.log(100.0)  # as in CLIP
POPULARITY_WEIGHT, IN_HYBRIDS = 1.0, 0.5  # at the start; less in hybrids, since popular items have many neighbours
DECAY, ENCODER_WEIGHT = 0.85, -1.2  # of the content prior at the start: the logit of 0.7, the logarithm of 0.3


@dataclass
class TransRecOutput(ModelOutput):
    """
    Output of [`TransRecModel`].

    Args:
        loss (`Tensor` of shape `(1,)`, *optional*): The loss, if targets were given.
        item_embeds (`Tensor` of shape `(n_items, hidden_size)`): Vectors of the distinct items of the batch.
        last_hidden_state (`Tensor` of shape `(n_users, length, hidden_size)`, *optional*): User states.
        hidden_states (`tuple[Tensor]`, *optional*): With `output_hidden_states`, the input of the user encoder's first
            layer and the output of each layer; the last one is `last_hidden_state`.
        attentions (`tuple[Tensor]`, *optional*): With `output_attentions` and eager attention, the attention weights
            of each layer, `(n_users, num_attention_heads, length, length)`.
    """

    loss: Tensor | None = None
    item_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class TransRecPreTrainedModel(TunableModel):
    """Base class of the models: configuration, new weights, and the choice of trained parts of the towers."""

    config_class = TransRecConfig
    base_model_prefix = "transrec"
    main_input_name = "history_index"
    input_modalities = tuple(MODALITIES)
    supports_gradient_checkpointing = True
    _no_split_modules = ["UserEncoderLayer", "GRULayer", "HSTULayer"]
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UserLayer, "attentions": [UserAttention, HSTUAttention]}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ItemEncoder) and hasattr(module, "missing_embeds"):
            init.zeros_(module.missing_embeds)
        if isinstance(module, Scale):
            init.copy_(module.value, torch.tensor(module.start))
        if self.config.is_hybrid and module is self.item_encoder.item_embedding:
            init.zeros_(module.weight)
        if isinstance(module, (WhitenedProjection, ContentPrior, SideNetwork)):
            init.zeros_(module.output.weight)  # the learned part starts at zero
            init.zeros_(module.output.bias)
        if isinstance(module, ContentPrior):
            init.constant_(module.decay, DECAY)
            init.constant_(module.weight, ENCODER_WEIGHT)
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                if "weight" in name:
                    init.xavier_uniform_(parameter)
                else:
                    init.zeros_(parameter)


class TransRecModel(TransRecPreTrainedModel):
    r"""
    A transferable sequential recommender (arXiv 2206.06190).

    Args:
        config ([`TransRecConfig`]): The configuration, with at least one modality, or `num_items` for the ID baseline.
        towers (`PreTrainedModel`): Loaded towers to use instead of new weights, e.g. `text_model`, `vision_model`.

    Raises:
        `ValueError`: If the configuration has neither a modality nor `num_items`.
    """

    user_encoder_class: type[UserEncoder] | None = None
    """The user encoder of a subclass, see [`UserEncoder`]; `None` for the one that the configuration names."""

    def __init__(self, config: TransRecConfig, **towers: PreTrainedModel | None):
        super().__init__(config)
        if not config.modalities and config.num_items is None:
            *fields, last = [modality.config for modality in MODALITIES.values()] + ["num_items"]
            raise ValueError(f"the configuration has no content to read: set {', '.join(fields)} or {last}")
        self.item_encoder = ItemEncoder(config, **towers)
        self.user_encoder = (self.user_encoder_class or USER_ENCODERS[config.user_encoder])(config)
        if config.content_prior:
            self.content_prior = ContentPrior(config)
        if config.similarity == "cosine":
            self.logit_scale = Scale(math.log(LOGIT_SCALE))
        if config.popularity_prior:
            self.popularity_weight = Scale(IN_HYBRIDS if config.is_hybrid else POPULARITY_WEIGHT)
        self.item_chunk_size: int | None = None
        self.images_per_pass: int | None = None
        self.post_init()

    @classmethod
    def from_text_vision_pretrained(
        cls, text_model: str | None = None, vision_model: str | None = None, **kwargs: Any
    ) -> TransRecModel:
        """
        Make a model with pre-trained towers and a new user encoder.

        Args:
            text_model (`str`, *optional*): Hub id or folder of a text encoder, or of a model of this class, whose text
                tower is taken; `None` for no text tower.
            vision_model (`str`, *optional*): The same for an image encoder.
            kwargs: `audio_model` and `video_model`, and fields of [`TransRecConfig`], e.g. `features_size=512`.
                Without `hidden_size`, whitened item vectors are as wide as the outputs of the towers, up to 1024.
        """
        fields = {modality.tower: modality.config for modality in MODALITIES.values() if modality.tower}
        names = {"text_model": text_model, "vision_model": vision_model}
        names |= {name: kwargs.pop(name) for name in fields if name in kwargs}
        towers = {tower: cls._read_tower(name, tower, fields[tower]) for tower, name in names.items() if name}
        configs = {fields[name]: tower.config for name, tower in towers.items()}
        # otherwise the composite configuration would reset the choice that each tower made when it was loaded
        kwargs.setdefault("attn_implementation", {name: part._attn_implementation for name, part in configs.items()})
        if towers and "hidden_size" not in kwargs:
            free = cls.config_class(**configs, **{**kwargs, "matryoshka_dims": None})  # the width is their limit
            kwargs["hidden_size"] = default_width(free, towers)
        return cls(cls.config_class(**configs, **kwargs), **towers)

    def train(self, mode: bool = True) -> TransRecModel:
        """Like in torch, but frozen parts stay in evaluation mode, and batch norms keep their averages."""
        super().train(mode)
        if mode:
            evaluate_frozen(self.item_encoder)
        return self

    @property
    def _first_tower(self) -> PreTrainedModel | None:
        return next(iter(self.item_encoder.towers.values()), None)

    def get_input_embeddings(self) -> nn.Module | None:
        """The embeddings of tokens or, without a text tower, of patches; those of an ID baseline; or `None`."""
        if self._first_tower is None:
            return getattr(self.item_encoder, "item_embedding", None)
        try:
            return self._first_tower.get_input_embeddings()
        except NotImplementedError:  # a convolutional tower
            return None

    def set_input_embeddings(self, value: Any) -> None:
        if self._first_tower is None:
            self.item_encoder.item_embedding = value
        else:
            self._first_tower.set_input_embeddings(value)

    def compile_blocks(self, **kwargs: Any) -> None:
        """
        Compile the blocks of the towers and the layers of the user encoder, in place. Single blocks have no graph
        breaks, and equal blocks share their code. Shapes are dynamic, so there is one more compilation, not one for
        every shape. The first batches take tens of seconds more.

        Args:
            kwargs: Arguments of `torch.compile`, e.g. `mode="max-autotune-no-cudagraphs"`.
        """
        for blocks in (*map(tower_blocks, self.item_encoder.towers.values()), self.user_encoder.layers):
            compile_each(blocks, **kwargs)

    def _in_chunks(self, encode: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """
        Encode `item_chunk_size` items at a time and keep only their vectors. Activations of a chunk are computed again
        for its gradients (GradCache; Gao et al., 2021). Without a chunk size or gradients, all items at once.
        """
        size = self.item_chunk_size
        if size is None or not torch.is_grad_enabled():
            return encode(*inputs)
        num_items = next(len(values) for values in inputs if values is not None)
        chunks = (
            [None if values is None else values[start : start + size] for values in inputs]
            for start in range(0, num_items, size)
        )
        return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks])

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """
        The output of the text tower for tokens `(n, tokens)`; `pooler_output` holds the vectors `(n, hidden_size)`.

        Args:
            kwargs: Arguments of the tower, e.g. `output_hidden_states=True`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._tower_output("text", input_ids, mask, **kwargs)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        The output of the vision tower for pixels `(n, channels, height, width)`; `pooler_output` holds the vectors
        `(n, hidden_size)`.

        Args:
            kwargs: Arguments of the tower, e.g. `output_hidden_states=True`.
        """
        return self._tower_output("image", pixel_values, None, **kwargs)

    def _tower_output(
        self, name: str, values: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        encoder = self.item_encoder
        if name not in encoder.towers:
            raise ValueError(f"this model has no {name} tower: it reads {self.config.modalities or 'item_rows'}")
        output, state = encoder.read(name, values, mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=encoder.vectors(name, state),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def get_content_features(self, name: str, part: ItemPart) -> Tensor:
        """Vectors of the contents of one modality, in the order of `part.rows`: `(n, hidden_size)`."""
        encode = partial(self._in_chunks, partial(self.item_encoder.encode, name, stored=part.stored))
        return torch.cat([encode(*contents) for contents in part.passes(self.pass_size(name))])

    def pass_size(self, name: str) -> int:
        """
        The number of images or windows that are encoded at a time: `images_per_pass` or, without it, on a CPU as many
        as fit into its cache, elsewhere all.
        """
        if name not in self.item_encoder.towers or MODALITIES[name].has_tokens:
            return 2**31  # texts already come in buckets of the right size
        if self.images_per_pass is not None:
            return self.images_per_pass
        return 32 if self.device.type == "cpu" else 2**31

    def get_item_features(self, items: ItemBatch | None = None, **inputs: Any) -> Tensor:
        """
        Vectors of items: `(n_items, hidden_size)`.

        Args:
            items ([`ItemBatch`]): The items.
            inputs: Instead of `items`, the output of [`TransRecProcessor`], see [`ItemBatch.from_inputs`].

        Raises:
            `ValueError`: If the items have none of the modalities that the model reads.
        """
        items = ItemBatch.from_inputs(**inputs) if items is None else items
        if self.config.num_items is not None and items.item_rows is None:
            raise ValueError("an ID baseline reads item_rows, the rows of the items in their catalogue: give them")
        if not self.config.modalities:
            return self._finished(self.item_encoder.item_embedding(items.item_rows))
        vectors = {
            name: (self.get_content_features(name, items.parts[name]), items.parts[name].rows)
            for name in self.config.modalities
            if name in items.parts
        }
        if not vectors:
            raise ValueError(f"the items have none of the modalities that this model reads: {self.config.modalities}")
        embeds = self.item_encoder.fuse(vectors, items.present)
        if self.config.num_items is not None:
            embeds = embeds + self.item_encoder.item_embedding(items.item_rows).to(embeds.dtype)
        return self._finished(embeds)

    def _finished(self, item_embeds: Tensor) -> Tensor:
        """Item vectors, scaled to length 1 if scores are cosines."""
        if self.config.similarity == "dot":
            return item_embeds
        return nn.functional.normalize(item_embeds.float(), dim=-1)

    def with_popularity(self, item_embeds: Tensor, log_popularity: Tensor | None) -> Tensor:
        """
        Item vectors with the popularity of the items as one more column, if the model has a `popularity_prior`. The
        dot product of states and these vectors is the score.

        Args:
            item_embeds (`Tensor` of shape `(n_items, hidden_size)`): Item vectors.
            log_popularity (`Tensor` of shape `(n_items,)`, *optional*): Log of each item's share of the training data;
                `None` if it is not known.
        """
        if not self.config.popularity_prior:
            return item_embeds
        known = item_embeds.new_zeros(len(item_embeds)) if log_popularity is None else log_popularity
        return torch.cat([item_embeds, known.to(item_embeds).unsqueeze(-1)], dim=-1)

    def get_user_features(
        self,
        item_embeds: Tensor,
        history_index: Tensor,
        present: Tensor | None = None,
        timestamps: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """
        User states after each item of a history: `(n_users, length, hidden_size)`; see [`last_state`]. With the
        objective `"masked"`, only the state after the last item: that of a hidden next item.

        Args:
            item_embeds (`Tensor` of shape `(n_items, hidden_size)`): Item vectors.
            history_index (`Tensor` of shape `(n_users, length)`): Rows of `item_embeds`, oldest first, `-1` for the
                padding on the right. `length` is at most `max_position_embeddings`.
            present (`Tensor` of shape `(n_items, len(MODALITIES))`, *optional*): Which modalities each item has.
            timestamps (`Tensor` of shape `(n_users, length)`, *optional*): When each item was chosen, in the unit of
                the data; only models with `time_buckets` read them.
            hidden (`Tensor` of shape `(n_users, length)`, *optional*): Boolean, items that are hidden; then the states
                are those at each position.
        """
        if history_index.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"a history of {history_index.shape[1]} items is longer than max_position_embeddings="
                f"{self.config.max_position_embeddings}: keep the last {self.config.max_position_embeddings}"
            )
        mask = history_index >= 0
        if self.config.objective == "masked":
            if hidden is None:
                index, hidden = hide_next(history_index, self.config.max_position_embeddings)
                found = self.get_user_features(item_embeds, index, present, timestamps, hidden)[hidden]
                is_last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
                return found.unsqueeze(1) * is_last.unsqueeze(-1)
            mask = mask | hidden
            history_index = history_index.masked_fill(hidden, -1)
        rows = history_index.clamp(min=0)
        combination = None
        if present is not None and len(self.config.modalities) > 1:
            combination = combinations(with_all_columns(present), self.config.modalities)[rows]
        # vectors of an index are fp32, whatever the model is, and may end with the popularity of the items
        inputs = item_embeds[:, : self.config.hidden_size].to(self.dtype)[rows]
        if hidden is not None:
            inputs = inputs * ~hidden.unsqueeze(-1)
        encode = partial(self.user_encoder, sequence_mask=mask, combination=combination, timestamps=timestamps)
        states = self.content_prior(inputs, mask, encode) if self.config.content_prior else encode(inputs)
        if self.config.similarity == "cosine":
            states = (
                nn.functional.normalize(states.float(), dim=-1)
                * self.logit_scale.value.clamp(max=MAX_LOGIT_SCALE).exp()
            )
        if self.config.popularity_prior:
            weight = self.popularity_weight.value * mask.to(states.dtype)
            states = torch.cat([states, weight.unsqueeze(-1)], dim=-1)
        return states

    @capture_outputs
    def forward(
        self,
        history_index: Tensor | None = None,
        items: ItemBatch | None = None,
        target_index: Tensor | None = None,
        negative_index: Tensor | None = None,
        log_popularity: Tensor | None = None,
        item_embeds: Tensor | None = None,
        timestamps: Tensor | None = None,
        return_loss: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **inputs: Any,
    ) -> TransRecOutput:
        """
        Encode the distinct items of the batch, read the histories and, with targets, compute the loss.

        Args:
            history_index (`Tensor` of shape `(n_users, length)`, *optional*):
                Rows of the distinct items, oldest first, `-1` for the padding on the right.
            items ([`ItemBatch`], *optional*): The distinct items of the batch.
            target_index (`Tensor` of shape `(n_users, length)`, *optional*):
                Row of the next item at each position, `-1` for none; `(n_users, num_positives)` for `"cpc"`.
            negative_index (`Tensor`, *optional*): Rows of sampled negatives, in the shape that the objective needs.
            log_popularity (`Tensor` of shape `(n_items,)`, *optional*): Log of each item's share of training data.
            item_embeds (`Tensor` of shape `(n_items, hidden_size)`, *optional*): Known vectors, for items whose
                contents are not in `items`.
            timestamps (`Tensor` of shape `(n_users, length)`, *optional*): See [`~TransRecModel.get_user_features`].
            return_loss (`bool`, *optional*, defaults to `True`): Whether to compute the loss if there are targets.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to record those of the user encoder.
            inputs: Instead of `items`, the output of [`TransRecProcessor`], see [`ItemBatch.from_inputs`].
        """
        items = ItemBatch.from_inputs(**inputs) if items is None else items
        has_loss = return_loss and target_index is not None
        shared = None
        if has_loss and self._across_ranks() and self.config.objective in AMONG_ALL:
            # users of all ranks score the items of each rank, so all ranks need all vectors
            shared = share_items(items.item_rows)  # type: ignore[arg-type]
            items = items.select(shared.encoded)
        if item_embeds is None:
            item_embeds = self.get_item_features(items)
        elif items.parts:
            rows = torch.cat([part.rows for part in items.parts.values()]).unique()
            encoded = self.get_item_features(items)[rows].to(item_embeds.dtype)
            item_embeds = item_embeds.index_copy(0, rows, encoded)
        item_embeds = self.with_popularity(item_embeds, log_popularity)
        candidates = item_embeds
        if shared is not None:
            candidates = gather_items(item_embeds, shared)
            item_embeds = candidates[shared.rows]
        vectors = item_embeds[:, : self.config.hidden_size]
        if history_index is None:
            return TransRecOutput(item_embeds=vectors)
        hidden = None
        if target_index is not None and return_loss and self.config.objective == "masked":
            hidden = target_index >= 0
        states = self.get_user_features(item_embeds, history_index, items.present, timestamps, hidden)
        loss = None
        if has_loss:
            more = {"negative_index": negative_index, "log_popularity": log_popularity, "shared": shared}
            given = (states, item_embeds, candidates)
            loss = nested(self.compute_loss, self.config, given, history_index, target_index, **more)
            if self.training:
                loss = loss + self.item_encoder.zero_of_unused(self.config.modalities, items.parts)
        return TransRecOutput(loss=loss, item_embeds=vectors, last_hidden_state=states)

    def _across_ranks(self) -> bool:
        """Whether several processes train on one batch."""
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def compute_loss(
        self,
        states: Tensor,
        item_embeds: Tensor,
        history_index: Tensor,
        target_index: Any,
        negative_index: Any = None,
        log_popularity: Any = None,
        shared: SharedItems | None = None,
        candidates: Any = None,
    ) -> Tensor:
        """
        The loss of the configured objective; with several processes, that of their concatenated batch. Override this
        method in a subclass for another objective.

        Args:
            states (`Tensor` of shape `(n_users, length, width)`): User states after each item of the histories.
            item_embeds (`Tensor` of shape `(n_items, width)`): Vectors of the distinct items; scores are dot products.
            history_index, target_index, negative_index, log_popularity: See [`~TransRecModel.forward`].
            candidates, shared (*optional*): The vectors of the items of all processes, and which belong to this one.
        """
        candidates = item_embeds if candidates is None else candidates
        mean = masked_mean_across_ranks if self._across_ranks() else masked_mean
        objective = self.config.objective
        if objective in ("in_batch", "masked", "sampled_softmax") and log_popularity is None:
            raise ValueError(f"objective {objective!r} needs log_popularity, which DataCollatorForNextItem gives")
        if objective in WITH_NEGATIVES and negative_index is None:
            raise ValueError(f"objective {objective!r} needs negative_index, which DataCollatorForNextItem gives")
        if objective in ("in_batch", "masked"):
            slots = history_index if objective == "masked" else batch_slots(history_index, target_index)
            counts = count_slots(slots, len(item_embeds))
            if shared is not None:
                counts, log_popularity = gather_counts(counts, log_popularity, shared)
                # the padding of -1 stays
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


__all__ = ["TransRecModel", "TransRecOutput", "TransRecPreTrainedModel", "last_state"]
