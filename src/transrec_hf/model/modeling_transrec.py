"""The TransRec model: items from raw text and images, users from item vectors, scores from their dot product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_transrec import TransRecConfig
from .item_encoder_transrec import (
    ItemEncoder,
    evaluate_frozen,
    keep_running_statistics,
    load_tower,
    select_items,
    tower_blocks,
    training_batch_norms,
)
from .loss_transrec import (
    batch_slots,
    bce,
    bpr,
    count_slots,
    cpc,
    full_softmax,
    in_batch_softmax,
    masked_mean,
    sampled_softmax,
)
from .sharing_transrec import SharedItems, gather_counts, gather_items, masked_mean_across_ranks, share_items
from .user_encoder_transrec import USER_ENCODERS, last_state


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


class TransRecPreTrainedModel(PreTrainedModel):
    config_class = TransRecConfig
    base_model_prefix = "transrec"
    main_input_name = "input_ids"
    input_modalities = ("text", "image")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UserEncoderLayer", "GRULayer", "HSTULayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ItemEncoder) and hasattr(module, "missing_embeds"):
            init.zeros_(module.missing_embeds)
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
        self.user_encoder = USER_ENCODERS[config.user_encoder](config)
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
        combination = None
        if item_modalities is not None:
            bits = 2 ** torch.arange(item_modalities.shape[1], device=item_modalities.device)
            combination = (item_modalities * bits).sum(dim=1)[rows] - 1
        item_embeds = item_embeds.to(self.dtype)  # of an index, say, which is fp32 whatever the model is
        return self.user_encoder(item_embeds[rows], history_index >= 0, combination)

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


__all__ = ["TransRecModel", "TransRecOutput", "TransRecPreTrainedModel"]
