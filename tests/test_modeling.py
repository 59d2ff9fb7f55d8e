"""The model: every tower family, gradients, masks, invariances, checkpoints and freezing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from testing_utils import (
    BERT,
    DROPOUT,
    IMAGE_SIZE,
    LINES,
    PATCHES,
    TEXT_TOWERS,
    VISION_TOWERS,
    VOCABULARY,
    assert_same_weights,
    gradients,
    make_batch,
    make_catalogue,
    make_config,
    make_image_processor,
    make_model,
    make_paper_config,
    make_processor,
    make_tokenizer,
)
from transformers import AutoModel, BertConfig, CLIPConfig, CLIPModel, DINOv3ViTConfig, set_seed

from transrec_hf import TransRecConfig, TransRecModel, TransRecProcessor
from transrec_hf.items.preparing import ItemSource
from transrec_hf.model.configuration_transrec import TEXT_POOLINGS
from transrec_hf.model.towers_transrec import tower_blocks
from transrec_hf.model.user_encoder_transrec import last_state


ALL_TOWERS = [*(("text", name) for name in TEXT_TOWERS), *(("image", name) for name in VISION_TOWERS)]


def tower_config(modality: str, name: str, **fields) -> TransRecConfig:
    """A model with the named family as its only tower."""
    towers = {"text_config": TEXT_TOWERS[name]()} if modality == "text" else {"vision_config": VISION_TOWERS[name]()}
    return make_config("", **towers, **fields)


@pytest.fixture(params=ALL_TOWERS, ids="-".join)
def any_tower(request) -> TransRecConfig:
    """A model with one tower, of every supported family in turn."""
    return tower_config(*request.param)


SUBSETS = {
    "text": lambda **fields: make_config("text", **fields),
    "image": lambda **fields: make_config("image", **fields),
    "text image": lambda **fields: make_config(**fields),
    "ids": lambda **fields: make_config("", num_items=12, **fields),
    "paper": make_paper_config,
    "hidden projections": lambda **fields: make_config(projection_hidden_size=12, **fields),
}


@pytest.fixture(params=SUBSETS)
def any_subset(request) -> TransRecConfig:
    """A model of text, of images, of both, of neither, and the paper's."""
    return SUBSETS[request.param]()


def kinds_of(config: TransRecConfig) -> tuple[str, ...]:
    """Kinds of items that a model can read: a mixture, or those of its only tower."""
    return config.modalities if len(config.modalities) == 1 else ("text", "image", "text image")


def batch_for(config: TransRecConfig, **options) -> dict:
    """A training batch of items that this model can read."""
    return make_batch(config, catalogue=make_catalogue(kinds=kinds_of(config)), **options)


def items_for(config: TransRecConfig) -> dict:
    return {
        name: value for name, value in batch_for(config).items() if not name.startswith(("history", "target", "log"))
    }


# Gradients


def has_no_use(name: str, gradient: torch.Tensor | None) -> bool:
    # what a key's bias adds to all scores of a query is cancelled by the softmax; the towers have one nevertheless
    if name.endswith(("key.bias", "k_proj.bias", "k_lin.bias")) and "_model." in name:
        return gradient is None
    return gradient is None or bool(gradient.abs().max() < 1e-8)


def assert_every_parameter_learns(config: TransRecConfig, batch: dict) -> None:
    model = make_model(config).train()
    model(**batch).loss.backward()
    assert [name for name, gradient in gradients(model).items() if has_no_use(name, gradient)] == []


@pytest.mark.parametrize("pooling", TEXT_POOLINGS)
@pytest.mark.parametrize("tower", TEXT_TOWERS)
def test_every_parameter_gets_a_gradient_from_text(tower, pooling):
    config = tower_config("text", tower, text_pooling=pooling)
    assert_every_parameter_learns(config, batch_for(config))


@pytest.mark.parametrize("tower", VISION_TOWERS)
def test_every_parameter_gets_a_gradient_from_images(tower):
    config = tower_config("image", tower)
    assert_every_parameter_learns(config, batch_for(config))


@pytest.mark.parametrize("name", ["text image", "ids", "paper"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_every_parameter_gets_a_gradient_from_mixed_items(name, norm_first):
    config = SUBSETS[name](norm_first=norm_first)
    lines = [*LINES, tuple(range(7))]  # as long as the model reads: all positions are used
    assert_every_parameter_learns(config, make_batch(config, lines=lines))


@pytest.mark.parametrize("pooling", TEXT_POOLINGS)
@pytest.mark.parametrize(("present", "absent"), [("text", "vision"), ("image", "text")])
def test_a_batch_without_one_modality_gives_its_tower_zero_gradients(present, absent, pooling):
    """Data parallel training needs a gradient of every trainable parameter in every step."""
    config = make_config(text_pooling=pooling)
    model = make_model(config).train()
    model(**make_batch(config, catalogue=make_catalogue(kinds=(present,)))).loss.backward()
    grads = gradients(model)
    assert all(gradient is not None for gradient in grads.values())
    parts = ("text_model", "text_projection", "text_pooling") if absent == "text" else ("vision_model", "visual_")
    unused = [
        gradient for name, gradient in grads.items() if name.startswith(tuple(f"item_encoder.{p}" for p in parts))
    ]
    assert unused
    assert all(gradient.eq(0).all() for gradient in unused)


def test_a_batch_without_one_modality_leaves_frozen_parts_without_gradients():
    config = make_config()
    model = make_model(config).train()
    model.freeze_towers(1)
    model(**make_batch(config, catalogue=make_catalogue(kinds=("text",)))).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_gradient_checkpointing_changes_nothing(any_tower):
    plain, checkpointed = make_model(any_tower).train(), make_model(any_tower).train()
    checkpointed.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    batch = batch_for(any_tower)
    losses = []
    for model in (plain, checkpointed):
        set_seed(0)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


def test_gradient_checkpointing_repeats_dropout():
    config = make_config(text_config=TEXT_TOWERS["bert"](**DROPOUT), vision_config=VISION_TOWERS["vit"](**DROPOUT))
    plain, checkpointed = make_model(config).train(), make_model(config).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        set_seed(0)
        model(**make_batch(config)).loss.backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


def saved_bytes(compute, model: TransRecModel) -> int:
    """What autograd keeps until the backward pass, weights aside."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(kept)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "with gradient checkpointing"])
def test_encoding_in_chunks_gives_the_same_gradients(any_tower, checkpointed):
    whole, chunked = make_model(any_tower), make_model(any_tower)
    if checkpointed and any_tower.modalities == ["text"]:
        chunked.gradient_checkpointing_enable()
    chunked.item_chunk_size = 2
    batch = make_batch(any_tower, catalogue=make_catalogue(kinds=any_tower.modalities))
    for model in (whole, chunked):
        model(**batch).loss.backward()
    torch.testing.assert_close(gradients(chunked), gradients(whole), rtol=1e-3, atol=5e-5)


def test_a_chunk_draws_the_same_dropout_again():
    config = make_config("text", text_config=TEXT_TOWERS["bert"](**DROPOUT))
    model = make_model(config).train()
    model.item_chunk_size = 3
    batch = make_batch(config, catalogue=make_catalogue(kinds=("text",)))
    model.double()
    weight = model.item_encoder.text_model.encoder.layer[0].output.dense.weight
    direction, step = torch.randn_like(weight), 1e-3

    def loss() -> torch.Tensor:
        set_seed(0)
        return model(**batch).loss

    loss().backward()
    slope = (weight.grad * direction).sum()
    weight.data += step * direction
    up = loss()
    weight.data -= 2 * step * direction
    down = loss()
    assert slope.item() == pytest.approx((up - down).item() / (2 * step), rel=0.05)


@pytest.mark.parametrize("tower", VISION_TOWERS)
def test_passes_of_images_change_nothing(tower):
    config = tower_config("image", tower)
    whole, parts = make_model(config), make_model(config)
    parts.images_per_pass = 2
    batch = make_batch(config, catalogue=make_catalogue(kinds=("image",)))
    for model in (whole, parts):
        model(**batch).loss.backward()
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-3, atol=5e-5)


def test_of_chunks_only_the_vectors_are_kept():
    catalogue = make_catalogue(64, kinds=("text",))
    model = make_model(make_config("text")).train()
    kept = {}
    for chunk in (None, 4):
        model.item_chunk_size = chunk
        for num_items in (16, 64):
            batch = ItemSource(catalogue, make_processor("text")).batch(torch.arange(num_items).numpy())
            kept[chunk, num_items] = saved_bytes(lambda batch=batch: model.get_item_features(batch), model)
    assert kept[None, 64] > 3 * kept[None, 16] > 10_000
    assert kept[4, 64] < kept[None, 64] / 10


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
@pytest.mark.parametrize("family", TEXT_TOWERS)
def test_states_of_several_depths_are_pooled_beside_each_other(family, pooling):
    """They are those that the tower itself tells of; below the last all real tokens are averaged."""
    config = make_config("text", text_config=TEXT_TOWERS[family](), text_depths=3, text_pooling=pooling)
    model = make_model(config).eval()
    encoder, depths = model.item_encoder, {"minilm": [0, 2]}.get(family, [0, 1])
    ids, mask = torch.randint(5, 13, (3, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    states = encoder.state("text", ids, mask)
    told = encoder.text_model(ids, attention_mask=mask, output_hidden_states=True)
    lower = [[told.hidden_states[depth][i, : n.sum()].mean(dim=0) for i, n in enumerate(mask)] for depth in depths]
    expected = [*(torch.stack(part) for part in lower), encoder.pool(told, mask)]
    torch.testing.assert_close(states, torch.cat(expected, dim=1))
    assert encoder.text_projection.in_features == states.shape[1]
    states.sum().backward()
    assert encoder.text_model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_threads_read_the_depths_of_their_own_texts():
    model = make_model(make_config("text", text_depths=3)).eval()
    ids = [torch.randint(5, 13, (2, 5)) for _ in range(40)]

    @torch.no_grad()
    def read(tokens):
        return model.item_encoder.state("text", tokens, torch.ones_like(tokens))

    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(read, ids), map(read, ids), strict=True):
            torch.testing.assert_close(found, expected)
    assert not any(block._compiled_call_impl for block in tower_blocks(model.item_encoder.text_model))


def test_towers_of_few_blocks_have_fewer_depths():
    config = make_config("text", text_config=BertConfig(**{**BERT, "num_hidden_layers": 1}), text_depths=5)
    assert make_model(config).item_encoder.depths == {"text": [0]}


def test_item_vectors_are_as_wide_as_the_widest_tower_says(tmp_path):
    for name, tower in (("text", TEXT_TOWERS["bert"]()), ("vision", VISION_TOWERS["vit"]())):
        AutoModel.from_config(tower).save_pretrained(tmp_path / name)
    for number, width in ((1, 16), (2, 32), (3, 48)):
        towers = tmp_path / "text", tmp_path / "vision"
        model = TransRecModel.from_text_vision_pretrained(*towers, text_depths=number, user_hidden_size=8)
        assert model.config.hidden_size == model.item_encoder.text_projection.mean.shape[0] == width
    chosen = TransRecModel.from_text_vision_pretrained(*towers, hidden_size=8, user_hidden_size=8)
    assert chosen.config.hidden_size == 8


@pytest.mark.parametrize(("modality", "depths"), [("text", 1), ("text", 3), ("image", 1)])
def test_compiled_blocks_have_no_graph_breaks_and_take_any_shape(modality, depths):
    """`fullgraph` raises for a break, the stance for another compilation."""
    config = make_config(modality, max_position_embeddings=12, text_depths=depths)
    catalogue = make_catalogue(50, kinds=(modality,))
    plain, compiled = make_model(config), make_model(config)
    compiled.compile_blocks(backend="aot_eager")
    sizes = [(4, 3, 2), (11, 5), (12, 2, 7, 3), (3, 3), (2, 8, 9)]
    users = [[list(range(3 * size, 4 * size)) for size in lengths] for lengths in sizes]
    batches = [make_batch(config, lines, catalogue) for lines in users]
    for batch in batches[:2]:  # sizes that happen to be equal are taken for one at first
        compiled(**batch).loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches[2:]:
            for model in (plain, compiled):
                model.zero_grad()
                model(**batch).loss.backward()
            torch.testing.assert_close(gradients(compiled), gradients(plain), rtol=1e-4, atol=1e-5)


# Items


def encode(model: TransRecModel, rows, kinds=None, pad=0) -> torch.Tensor:
    """Vectors of catalogue rows, with `pad` more tokens of padding."""
    kinds = kinds or (" ".join(model.config.modalities),)
    processor = TransRecProcessor(make_tokenizer(), make_image_processor(), max_text_length=16)
    batch = ItemSource(make_catalogue(kinds=kinds), processor).batch(torch.tensor(rows).numpy())
    for buckets in (part for name, part in batch.parts.items() if name == "text"):
        for tensors in (buckets.values, buckets.masks):
            tensors[:] = [torch.nn.functional.pad(bucket, (0, pad)) for bucket in tensors]
    with torch.no_grad():
        return model.get_item_features(batch)


@pytest.mark.parametrize("pooling", TEXT_POOLINGS)
@pytest.mark.parametrize("tower", TEXT_TOWERS)
def test_padding_of_texts_changes_nothing(tower, pooling):
    model = make_model(tower_config("text", tower, text_pooling=pooling))
    torch.testing.assert_close(encode(model, [0, 1, 2], pad=5), encode(model, [0, 1, 2]))


def test_items_do_not_depend_on_their_batch(any_tower):
    """Neither on the order of the batch, nor on the others in it, nor on their own duplicates."""
    model = make_model(any_tower)
    together = encode(model, [0, 1, 2, 3, 4])
    for rows in ([3, 0, 4, 3, 1, 3], [2]):
        torch.testing.assert_close(encode(model, rows), together[rows], rtol=1e-4, atol=1e-4)
    assert torch.pdist(together).min() > 1e-3


def test_mixed_items_do_not_depend_on_their_batch():
    model, kinds = make_model(), ("text", "image", "text image")
    together = encode(model, [0, 1, 2, 3, 4, 5], kinds)
    torch.testing.assert_close(encode(model, [5, 1, 1, 0], kinds), together[[5, 1, 1, 0]])
    torch.testing.assert_close(torch.cat([encode(model, [row], kinds) for row in range(6)]), together)


def test_an_item_is_the_mean_of_its_modalities_and_a_vector_for_the_missing_one():
    model = make_model()
    text, image, both = (encode(model, [0], (kind,)) for kind in ("text", "image", "text image"))
    missing_text, missing_image = model.item_encoder.missing_embeds
    with torch.no_grad():
        batch = ItemSource(make_catalogue(kinds=("text image",)), all_parts()).batch(torch.tensor([0]).numpy())
        text_part, image_part = batch.parts["text"], batch.parts["image"]
        from_text = model.get_text_features(text_part.values[0], text_part.masks[0]).pooler_output
        from_image = model.get_image_features(image_part.values[0]).pooler_output
    torch.testing.assert_close(both, (from_text + from_image) / 2)
    torch.testing.assert_close(text, from_text + missing_image)
    assert image.shape == from_image.shape
    assert missing_text.abs().max() > 0


def all_parts() -> TransRecProcessor:
    return TransRecProcessor(make_tokenizer(), make_image_processor(), max_text_length=16)


def test_a_fresh_model_starts_with_nothing_in_place_of_a_missing_modality():
    assert TransRecModel(make_config()).item_encoder.missing_embeds.eq(0).all()


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_model_of_one_modality_ignores_the_other(modality):
    model = make_model(make_config(modality))
    torch.testing.assert_close(
        encode(model, [0, 1], ("text image",)), encode(model, [0, 1], (modality,)), rtol=0, atol=0
    )


def test_duplicates_and_order_of_items_change_no_user_state():
    model, config = make_model(), make_config()
    items = torch.randn(5, config.hidden_size)
    modalities = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [0, 1]]).bool()
    history = torch.tensor([[0, 2, 4], [1, 1, -1]])
    row_of = torch.tensor([3, 5, 0, 1, 4, -1])  # the last one for padding; row 2 holds a duplicate of item 0
    other, other_modalities = torch.zeros(6, config.hidden_size), torch.zeros(6, 2, dtype=torch.bool)
    other[row_of[:5]], other_modalities[row_of[:5]] = items, modalities
    other[2], other_modalities[2] = items[0], modalities[0]
    duplicate = row_of[history]
    duplicate[0, 0] = 2
    expected = model.get_user_features(items, history, modalities)
    for index in (row_of[history], duplicate):
        states = model.get_user_features(other, index, other_modalities)
        torch.testing.assert_close(states[history >= 0], expected[history >= 0])


# User encoder


@pytest.fixture(params=["eager", "sdpa"])
def attention(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def user_model(request, attention) -> TransRecModel:
    objective = "in_batch" if request.param else "cpc"
    return make_model(
        make_config("", num_items=12, is_causal=request.param, objective=objective, attn_implementation=attention)
    )


def seen_positions(model: TransRecModel, history: torch.Tensor) -> torch.Tensor:
    """Of each user, which positions `s` the state at position `t` depends on: `(n_users, t, s)`."""
    embeds = torch.randn(*history.shape, model.config.hidden_size, requires_grad=True)
    states = model.user_encoder(embeds, history >= 0)
    seen = []
    for position in range(history.shape[1]):
        (gradient,) = torch.autograd.grad(states[:, position].square().sum(), embeds, retain_graph=True)
        seen.append(gradient.abs().amax(dim=-1) > 0)
    return torch.stack(seen, dim=1)


def test_a_state_sees_what_it_may_see(user_model):
    """Causal: itself and what came before. Bidirectional: all real items. Neither: padding, from a real position."""
    history = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, -1, -1], [8, -1, -1, -1, -1]])
    real = history >= 0
    allowed = real[:, None, :] & real[:, :, None]
    if user_model.config.is_causal:
        allowed &= torch.ones(5, 5).tril().bool()
    assert torch.equal(seen_positions(user_model, history) & real[:, :, None], allowed)


def test_future_items_change_nothing(attention):
    model = make_model(make_config("", num_items=12, attn_implementation=attention))
    items = torch.randn(12, 16)
    history, other = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[0, 1, 2, 9, -1]])
    states = [model.get_user_features(items, index)[:, :3] for index in (history, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_padding_of_histories_changes_nothing(user_model):
    items = torch.randn(12, 16)
    alone, padded = torch.tensor([[3, 1, 2]]), torch.tensor([[3, 1, 2, -1, -1], [0, 1, 2, 3, 4]])
    expected = user_model.get_user_features(items, alone)
    states = user_model.get_user_features(items, padded)
    torch.testing.assert_close(states[:1, :3], expected)
    torch.testing.assert_close(last_state(states, padded)[:1], expected[:, -1])


def test_order_of_users_changes_nothing(user_model):
    items, history = torch.randn(12, 16), torch.tensor([[3, 1, 2], [0, -1, -1], [4, 5, -1]])
    order = torch.tensor([2, 0, 1])
    states = user_model.get_user_features(items, history)
    torch.testing.assert_close(user_model.get_user_features(items, history[order]), states[order])


def test_order_of_history_matters(user_model):
    items = torch.randn(12, 16)
    one, other = (
        last_state(user_model.get_user_features(items, h), h) for h in torch.tensor([[[0, 1, 2]], [[1, 0, 2]]])
    )
    assert not torch.allclose(one, other)


def test_an_empty_history_gives_no_nan(user_model):
    items = torch.randn(12, 16, requires_grad=True)
    history = torch.tensor([[-1, -1, -1], [0, 1, -1]])
    states = user_model.get_user_features(items, history)
    states.sum().backward()
    assert states.isfinite().all()
    assert items.grad.isfinite().all()


def test_last_state_is_that_of_the_last_real_position():
    states = torch.arange(12.0).view(3, 4, 1)
    history = torch.tensor([[5, 5, 5, 5], [5, 5, -1, -1], [5, -1, -1, -1]])
    assert last_state(states, history).flatten().tolist() == [3, 5, 8]


def test_modality_embedding_tells_text_from_image_from_both():
    model = make_model()
    items, history = torch.randn(3, 16), torch.tensor([[0, 1, 2]])
    kinds = torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()
    states = [model.get_user_features(items, history, kinds[[kind] * 3])[0, -1] for kind in range(3)]
    assert torch.pdist(torch.stack(states)).min() > 1e-3
    with pytest.raises(ValueError, match="needs item_modalities"):
        model.get_user_features(items, history)


def test_too_long_a_history_is_refused():
    with pytest.raises(ValueError, match="keep the last 6"):
        make_model().get_user_features(torch.randn(3, 16), torch.zeros(1, 7, dtype=torch.long))


# Attention implementations


def outputs(model: TransRecModel, batch: dict) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        output = model(**batch)
    return output.loss, output.item_embeds, output.last_hidden_state


def test_sdpa_equals_eager(any_tower, tmp_path):
    assert_same_outputs_under_eager_and_sdpa(any_tower, tmp_path)


@pytest.mark.parametrize("name", ["text image", "paper"])
def test_sdpa_equals_eager_on_mixed_items(name, tmp_path):
    assert_same_outputs_under_eager_and_sdpa(SUBSETS[name](), tmp_path)


def test_weights_may_be_given_instead_of_a_checkpoint():
    model = make_model(make_config("text"))
    given = TransRecModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_weights(given, model)


def test_a_tower_keeps_the_attention_that_it_was_loaded_with(tmp_path):
    AutoModel.from_config(TEXT_TOWERS["bert"]()).save_pretrained(tmp_path)
    model = TransRecModel.from_text_vision_pretrained(str(tmp_path))
    assert model.item_encoder.text_model.config._attn_implementation == "sdpa"


def assert_same_outputs_under_eager_and_sdpa(config: TransRecConfig, folder) -> None:
    make_model(config).save_pretrained(folder)
    found = {}
    for implementation in ("eager", "sdpa"):
        model = TransRecModel.from_pretrained(folder, attn_implementation=implementation)
        parts = [model, *(tower for tower in model.item_encoder.towers.values() if tower._supports_sdpa)]
        assert {part.config._attn_implementation for part in parts} == {implementation}
        found[implementation] = outputs(model, batch_for(config))
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-5)


# Checkpoints


def assert_reloads(model: TransRecModel, folder) -> TransRecModel:
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is TransRecModel
    assert not any(info.values()), info
    assert_same_weights(loaded, model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {model.dtype}
    return loaded


def test_every_tower_reloads_bit_for_bit(any_tower, tmp_path):
    model = make_model(any_tower)
    model.save_pretrained(tmp_path)
    loaded = assert_reloads(model, tmp_path)
    torch.testing.assert_close(outputs(loaded, batch_for(any_tower)), outputs(model, batch_for(any_tower)))


@pytest.mark.parametrize("shards", ["one file", "many files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_modalities_reloads_bit_for_bit(any_subset, dtype, shards, tmp_path):
    model = make_model(any_subset).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="5KB" if shards == "many files" else "1GB")
    files = len(list(tmp_path.glob("*.safetensors")))
    assert (files == 1) == (shards == "one file")
    loaded = assert_reloads(model, tmp_path)
    assert loaded.config.modalities == any_subset.modalities
    batch = batch_for(any_subset)
    torch.testing.assert_close(outputs(loaded, batch), outputs(model, batch), rtol=0, atol=0)


def test_checkpoints_hold_no_pickle(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["TransRecModel"]


def test_a_checkpoint_of_another_architecture_is_not_taken_silently(tmp_path):
    AutoModel.from_config(TEXT_TOWERS["bert"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        TransRecModel.from_pretrained(tmp_path)


def test_no_parameter_is_left_that_nothing_reads():
    model = make_model(make_config(vision_config=VISION_TOWERS["dinov2"]()))
    dormant = [name for name, _ in model.named_parameters() if "pooler" in name or "mask_token" in name]
    assert dormant == []


# Pre-trained towers


def test_towers_start_from_their_own_weights(any_tower, tmp_path):
    config = any_tower.text_config or any_tower.vision_config
    tower = AutoModel.from_config(config)
    tower.save_pretrained(tmp_path)
    towers = {"text_model" if any_tower.text_config else "vision_model": str(tmp_path)}
    model = TransRecModel.from_text_vision_pretrained(**towers, hidden_size=16)
    (ours,) = model.item_encoder.towers.values()
    theirs = tower.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    unused = set(theirs) - set(ours.state_dict())
    assert all("pooler" in name or "mask_token" in name for name in unused), unused


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": IMAGE_SIZE, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


def test_one_tower_of_a_two_tower_checkpoint_can_be_used(clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder)
    model = TransRecModel.from_text_vision_pretrained(vision_model=str(clip_folder), hidden_size=16)
    assert model.config.vision_config.model_type == "clip_vision_model"
    ours, theirs = model.item_encoder.vision_model.state_dict(), clip.vision_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_both_towers_of_a_two_tower_checkpoint_can_be_used(clip_folder):
    model = TransRecModel.from_text_vision_pretrained(str(clip_folder), str(clip_folder), hidden_size=16)
    clip = CLIPModel.from_pretrained(clip_folder)
    for tower, source in (("text_model", clip.text_model), ("vision_model", clip.vision_model)):
        ours, theirs = getattr(model.item_encoder, tower).state_dict(), source.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_needs_a_tower():
    with pytest.raises(ValueError, match="has no content to read"):
        TransRecModel(make_config(""))


def test_items_of_no_known_modality_are_refused():
    model = make_model(make_config("text"))
    with pytest.raises(ValueError, match="item_modalities is missing"):
        model.get_item_features()
    with pytest.raises(ValueError, match="none of the modalities"):
        model.get_item_features(item_modalities=torch.tensor([[False, True]]))


# Freezing


def lower_and_upper(model: TransRecModel, trainable_blocks: int) -> tuple[list, list]:
    """The frozen and the trained blocks of the only tower."""
    (tower,) = model.item_encoder.towers.values()
    blocks = list(tower_blocks(tower))
    return blocks[:-trainable_blocks], blocks[-trainable_blocks:]


def frozen_names(model: TransRecModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.fixture
def half_frozen(any_tower) -> TransRecModel:
    """Only the top block of the tower is trained."""
    model = make_model(any_tower).train()
    model.freeze_towers(1)
    return model


def test_freezing_leaves_the_top_blocks_trainable(half_frozen):
    lower, upper = lower_and_upper(half_frozen, 1)
    assert lower
    assert not any(parameter.requires_grad for block in lower for parameter in block.parameters())
    assert all(parameter.requires_grad for block in upper for parameter in block.parameters())
    tower_names = {
        name for name, _ in half_frozen.named_parameters() if "text_model" in name or "vision_model" in name
    }
    assert frozen_names(half_frozen) < tower_names


def test_what_comes_before_the_top_blocks_is_frozen_and_what_follows_is_not():
    model = make_model(tower_config("image", "siglip"))
    model.freeze_towers(1)
    tower = model.item_encoder.vision_model
    assert not any(parameter.requires_grad for parameter in tower.embeddings.parameters())
    assert all(parameter.requires_grad for parameter in tower.post_layernorm.parameters())
    assert all(parameter.requires_grad for parameter in tower.head.parameters())


def test_frozen_blocks_build_no_graph(half_frozen):
    """Their activations need no gradient, so nothing is kept for a backward pass."""
    lower, upper = lower_and_upper(half_frozen, 1)
    needed: dict[str, list[bool]] = {}
    for name, blocks in (("lower", lower), ("upper", upper)):
        for block in blocks:
            block.register_forward_hook(
                lambda module, args, output, name=name: needed.setdefault(name, []).append(
                    (output if isinstance(output, torch.Tensor) else output[0]).requires_grad
                )
            )
    half_frozen(**batch_for(half_frozen.config)).loss.backward()
    assert needed["lower"] and not any(needed["lower"])
    assert all(needed["upper"])


def test_frozen_blocks_stay_as_they_are(half_frozen):
    """Weights and batch statistics, after steps with every parameter in the optimizer and with weight decay."""
    frozen = frozen_names(half_frozen)
    lower, _ = lower_and_upper(half_frozen, 1)
    buffers = {id(buffer) for block in lower for buffer in block.buffers()}
    before = {name: tensor.clone() for name, tensor in half_frozen.state_dict().items()}
    optimizer = torch.optim.AdamW(half_frozen.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        half_frozen(**batch_for(half_frozen.config)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = {name for name, tensor in half_frozen.state_dict().items() if torch.equal(tensor, before[name])}
    kept = {name for name, buffer in half_frozen.named_buffers() if id(buffer) in buffers} & set(before)
    assert frozen | kept <= still
    trained = {name for name, parameter in half_frozen.named_parameters() if parameter.requires_grad}
    assert not trained & still


@pytest.mark.parametrize("tower", ["resnet", "mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_batch_norms_in_training_have_the_averages_of_the_pre_training(tower, trainable_blocks):
    config = tower_config("image", tower)
    model = make_model(config).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
    before, vectors = [norm.running_mean.clone() for norm in norms], model.get_item_features(**items_for(config))
    model.freeze_towers(trainable_blocks)
    model.train()
    torch.testing.assert_close(model.get_item_features(**items_for(config)), vectors)
    model(**batch_for(config)).loss.backward()
    assert norms and all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert any(norm.weight.requires_grad for norm in norms) == bool(trainable_blocks)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_frozen_parts_have_no_dropout(modality):
    tower = TEXT_TOWERS["bert"](**DROPOUT) if modality == "text" else VISION_TOWERS["vit"](**DROPOUT)
    config = make_config("", **{"text_config" if modality == "text" else "vision_config": tower})
    model = make_model(config)

    def differs() -> bool:
        return not torch.equal(*(model.get_item_features(**items_for(config)) for _ in range(2)))

    model.train()
    assert differs()
    model.freeze_towers(0)
    assert not differs()
    model.eval().train()
    assert not differs()
    model.freeze_towers(1)
    assert differs()
    lower, upper = lower_and_upper(model, 1)
    assert not any(block.training for block in lower)
    assert all(block.training for block in upper)


@pytest.mark.parametrize("trainable_blocks", [None, 99])
def test_all_blocks_can_be_trained(any_tower, trainable_blocks):
    model = make_model(any_tower).train()
    model.freeze_towers(0)
    model.freeze_towers(trainable_blocks)
    (tower,) = model.item_encoder.towers.values()
    assert all(parameter.requires_grad for parameter in tower_blocks(tower).parameters())
    if trainable_blocks is None:
        assert not frozen_names(model)
        still = [module for module in model.modules() if not module.training]
        assert all(isinstance(module, torch.nn.BatchNorm2d) for module in still)


def test_freezing_towers_leaves_the_rest_trainable():
    model = make_model(make_paper_config()).train()
    model.freeze_towers(0)
    names = ("item_encoder.text_model.", "item_encoder.vision_model.")
    assert frozen_names(model) == {name for name, _ in model.named_parameters() if name.startswith(names)}
    model(**make_batch(model.config)).loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name


# Forward


def test_without_histories_the_model_only_encodes_items():
    config = make_config()
    output = make_model(config)(**items_for(config))
    assert output.loss is None and output.last_hidden_state is None
    assert output.item_embeds.shape == (12, 16)


def test_without_targets_there_is_no_loss():
    config = make_config()
    batch = make_batch(config)
    model = make_model(config)
    assert model(**batch, return_loss=False).loss is None
    del batch["target_index"]
    output = model(**batch)
    assert output.loss is None
    assert output.last_hidden_state.shape == (4, 6, 16)


def test_a_model_in_training_mode_repeats_itself_from_a_seed():
    config = make_config(**DROPOUT)
    model = make_model(config).train()
    losses = []
    for _ in range(2):
        set_seed(1)
        losses.append(model(**make_batch(config)).loss.item())
    assert losses[0] == losses[1]
    assert model(**make_batch(config)).loss.item() != losses[0]


def test_what_is_random_in_training_is_not_so_in_frozen_blocks():
    """The rotation of positions of DINOv3 has no parameters of its own."""
    sizes = {name: value for name, value in PATCHES.items() if "prob" not in name}
    tower = DINOv3ViTConfig(**sizes, pos_embed_rescale=2.0)
    model = make_model(make_config("image", vision_config=tower))
    images = torch.randn(3, 3, 32, 32)
    jittered = [model.train().get_image_features(images).pooler_output for _ in range(2)]
    assert not torch.equal(*jittered)
    model.freeze_towers(1)
    still = [model.train().get_image_features(images).pooler_output for _ in range(2)]
    assert torch.equal(*still)
