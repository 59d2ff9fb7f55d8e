"""
A full citizen of transformers: what its own common tests ask of a model (`common/`), in seconds, and what they cannot
ask of this one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testing_utils import TEXT_TOWERS, VISION_TOWERS, make_batch, make_config, make_model
from torch import nn

from transrec_hf import TransRecModel
from transrec_hf.model.modalities_transrec import ItemBatch


USERS = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [2, -1, -1, -1]])
ENCODERS = ("transformer", "gru", "hstu", "mean")


def id_model(user_encoder: str = "transformer", **fields: Any) -> TransRecModel:
    fields = {"attn_implementation": "eager", **fields}
    return make_model(make_config("", num_items=6, user_encoder=user_encoder, **fields))


ITEMS = torch.arange(6)


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_are_recorded_in_the_shape_of_the_states(name):
    model = id_model(name)
    output = model(USERS, item_rows=ITEMS, output_hidden_states=True)
    assert model(USERS, item_rows=ITEMS).hidden_states is None
    if name == "mean":
        return  # it has no layers
    assert [states.shape for states in output.hidden_states] == [output.last_hidden_state.shape] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("name", ["transformer", "hstu"])
def test_attentions_are_recorded_and_see_what_they_may(name):
    model = id_model(name)
    output = model(USERS, item_rows=ITEMS, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(3, 2, 4, 4)] * 2
    for weights in output.attentions:
        assert weights.triu(1).eq(0).all() and weights.tril().ne(0).any()
    assert torch.equal(output.last_hidden_state, model(USERS, item_rows=ITEMS).last_hidden_state)
    model.config.output_attentions = True
    assert len(model(USERS, item_rows=ITEMS).attentions) == 2


def test_what_is_recorded_has_gradients_and_survives_checkpointing():
    model = id_model().train()
    model.gradient_checkpointing_enable()
    output = model(USERS, item_rows=ITEMS, output_hidden_states=True)
    output.hidden_states[0].retain_grad()
    output.last_hidden_state.sum().backward()
    assert output.hidden_states[0].grad.abs().sum() > 0


def test_a_tuple_has_the_same_in_the_same_order():
    model, batch = make_model(), make_batch(make_config())
    batch["output_hidden_states"] = True
    output, fields = model(**batch), model(**batch, return_dict=False)
    assert list(output) == ["loss", "item_embeds", "last_hidden_state", "hidden_states"]
    torch.testing.assert_close(output.to_tuple(), fields, rtol=0, atol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_users_split_in_two_have_the_same_states(name):
    """In place of the common `test_batching_equivalence`, which splits all inputs, indices of items included."""
    model = id_model(name)
    whole = model(USERS, item_rows=ITEMS).last_hidden_state
    parts = [model(users, item_rows=ITEMS).last_hidden_state for users in USERS.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_an_unknown_input_is_refused():
    with pytest.raises(ValueError, match="'output_hiden_states' is not an input of a TransRec model"):
        id_model()(USERS, item_rows=ITEMS, output_hiden_states=True)


# Features of one modality


def test_text_features_are_those_of_the_tower_with_vectors_as_the_pooled_output():
    model = make_model(make_config(attn_implementation="eager"))
    tokens = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = (tokens > 0).long()
    output = model.get_text_features(tokens, mask, output_hidden_states=True, output_attentions=True)
    tower = model.item_encoder.text_model(tokens, mask)
    assert torch.equal(output.last_hidden_state, tower.last_hidden_state)
    assert torch.equal(output.pooler_output, model.item_encoder.encode("text", tokens, mask))
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert isinstance(model.get_text_features(tokens, mask, return_dict=False), tuple)
    unmasked = model.get_text_features(tokens[:1])
    torch.testing.assert_close(unmasked.pooler_output, output.pooler_output[:1])


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_image_features_are_those_of_the_tower_with_vectors_as_the_pooled_output(tower):
    model = make_model(make_config("image", vision_config=VISION_TOWERS[tower]()))
    pixels = torch.randn(2, 3, 32, 32)
    output = model.get_image_features(pixels, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, model.item_encoder.vision_model(pixels).last_hidden_state)
    assert torch.equal(output.pooler_output, model.get_item_features(ItemBatch.from_inputs(pixel_values=pixels)))
    assert len(output.hidden_states) == 3


def test_features_of_what_a_model_does_not_read_are_refused():
    with pytest.raises(ValueError, match="no text tower: it reads"):
        make_model(make_config("image")).get_text_features(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="no image tower: it reads item_rows"):
        id_model().get_image_features(torch.zeros(1, 3, 32, 32))


# Export


class Method(nn.Module):
    """A method of a model as what `torch.export` takes."""

    def __init__(self, model: TransRecModel, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output = getattr(self.model, self.name)(*inputs)
        return output if isinstance(output, torch.Tensor) else output.pooler_output


def inputs_of(name: str, count: int, length: int) -> tuple[torch.Tensor, ...]:
    if name == "get_image_features":
        return (torch.randn(count, 3, 32, 32),)
    ends = torch.randint(1, length + 1, (count, 1))
    real = torch.arange(length) < ends
    if name == "get_text_features":
        return torch.randint(5, 13, (count, length)), real.long()
    history = torch.randint(9, (count, length)).where(real, -1)
    return (
        torch.randn(9, 16),
        history,
        torch.tensor([[True, False, False], [True, True, False], [False, True, False]] * 3),
    )


@pytest.mark.parametrize("name", ["get_text_features", "get_image_features", "get_user_features"])
def test_torch_export_takes_any_number_and_any_length(name):
    method = Method(make_model(), name)
    count, length = torch.export.Dim("count", min=2, max=4096), torch.export.Dim("length", min=2, max=6)
    dims = {
        "get_text_features": ({0: count, 1: length}, {0: count, 1: length}),
        "get_image_features": ({0: count},),
        "get_user_features": (None, {0: count, 1: length}, None),
    }
    exported = torch.export.export(method, inputs_of(name, 3, 5), dynamic_shapes={"inputs": dims[name]}).module()
    for size in ((50, 4), (2, 6)):
        inputs = inputs_of(name, *size)
        torch.testing.assert_close(exported(*inputs), method(*inputs), rtol=1e-4, atol=1e-5)


# Embeddings


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_input_embeddings_are_those_of_the_text_tower(name):
    model = make_model(make_config(text_config=TEXT_TOWERS[name]()))
    assert model.get_input_embeddings() is model.item_encoder.text_model.get_input_embeddings()
    table = nn.Embedding(9, 16)
    model.set_input_embeddings(table)
    assert model.item_encoder.text_model.get_input_embeddings() is table


def test_new_tokens_find_a_place():
    model = make_model(make_config("text"))
    size = model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 2)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == size + 2
    assert model.get_text_features(torch.tensor([[size + 1]])).pooler_output.isfinite().all()


def test_input_embeddings_of_an_id_baseline_are_its_table():
    model = id_model()
    assert model.get_input_embeddings() is model.item_encoder.item_embedding
    table = nn.Embedding(7, 16)
    model.set_input_embeddings(table)
    assert model.item_encoder.item_embedding is table


@pytest.mark.parametrize("name", VISION_TOWERS)
def test_a_model_of_images_has_those_of_its_tower_or_none(name):
    embeddings = make_model(make_config("image", vision_config=VISION_TOWERS[name]())).get_input_embeddings()
    assert (embeddings is None) == (name in ("resnet", "mobilenet_v1", "mobilenet_v2"))
