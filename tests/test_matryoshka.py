"""Nested prefixes of item vectors: the objective is that of each, and whitened axes are in order of variance."""

from __future__ import annotations

import pytest
import torch
from testing_utils import USER_ENCODER, make_batch, make_catalogue, make_model, make_processor
from transformers import BertConfig, BertModel

from transrec_hf import ItemSource, TransRecConfig, TransRecModel
from transrec_hf.commands.options import ModelArguments
from transrec_hf.commands.parsing import parse_arguments
from transrec_hf.items.encoding import item_states, standardize_projections
from transrec_hf.model.loss_transrec import prefix_of


DESIGN = {"item_map": "whitened", "similarity": "cosine", "content_prior": True, "popularity_prior": True}


@pytest.mark.parametrize("objective", ["in_batch", "full_softmax"])
def test_the_objective_is_the_mean_over_the_prefixes(objective, monkeypatch):
    seen = []
    model = make_model(**DESIGN, objective=objective, matryoshka_dims=[4, 8]).eval()
    compute = model.compute_loss

    def spied(states, item_embeds, *args, **kwargs):
        loss = compute(states, item_embeds, *args, **kwargs)
        seen.append((states, item_embeds, float(loss)))
        return loss

    monkeypatch.setattr(model, "compute_loss", spied)
    with torch.no_grad():
        loss = model(**make_batch(model.config)).loss
    assert [items.shape[1] for _, items, _ in seen] == [17, 5, 9]  # with a column for popularity
    assert float(loss) == pytest.approx(sum(each for _, _, each in seen) / 3)
    whole, items, _ = seen[0]
    for states, vectors, _ in seen[1:]:
        size = vectors.shape[1] - 1
        torch.testing.assert_close(vectors[:, :-1].norm(dim=1), torch.ones(len(vectors)))
        torch.testing.assert_close(vectors[:, -1], items[:, -1])
        real = whole[..., :-1].norm(dim=-1) > 0
        cosine = torch.nn.functional.cosine_similarity(states[..., :-1], whole[..., :size], dim=-1)
        torch.testing.assert_close(cosine[real], torch.ones_like(cosine[real]))
        torch.testing.assert_close(states[..., :-1].norm(dim=-1), whole[..., :-1].norm(dim=-1))


def test_a_prefix_of_dot_products_is_cut_only():
    config = TransRecConfig(**{**USER_ENCODER, "features_size": 4})
    assert torch.equal(prefix_of(torch.arange(16.0), 3, config), torch.arange(3.0))


def test_whitened_axes_are_in_the_order_of_their_variance():
    source = ItemSource(make_catalogue(60, kinds=("text",)), make_processor(("text",)))
    width = make_model(modalities="text", **DESIGN).item_encoder.text_projection.axes.shape[0]
    nested = make_model(modalities="text", **DESIGN, matryoshka_dims=[4], hidden_size=width, user_hidden_size=16)
    standardize_projections(nested, source)
    projection = nested.item_encoder.text_projection
    variances = (item_states(nested, source, "text") @ projection.axes).var(dim=0)
    assert (variances[:-1] + 1e-6 >= variances[1:]).all() and variances[0] > 2 * variances[-1]


@pytest.mark.parametrize("dims", [[0], [16], [8, 99], ["4"], [True]])
def test_prefixes_that_are_none_are_refused(dims):
    with pytest.raises(Exception, match="matryoshka_dims must be whole numbers below 16"):
        TransRecConfig(**{**USER_ENCODER, "features_size": 4, "matryoshka_dims": dims})


def test_a_prefix_that_stands_twice_is_refused():
    with pytest.raises(Exception, match=r"matryoshka_dims must differ from each other, got \[4, 8, 4\]"):
        TransRecConfig(**{**USER_ENCODER, "features_size": 4, "matryoshka_dims": [4, 8, 4]})


def test_they_are_below_the_width_that_the_towers_give(tmp_path):
    sizes = {"hidden_size": 400, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    model = TransRecModel.from_text_vision_pretrained(tmp_path, matryoshka_dims=[399])
    assert model.config.hidden_size >= 400 and model.config.matryoshka_dims == [399]
    with pytest.raises(Exception, match=f"below {model.config.hidden_size}, got 2000"):
        TransRecModel.from_text_vision_pretrained(tmp_path, matryoshka_dims=[2000])


def test_they_are_an_option_of_the_command_line():
    (args,) = parse_arguments((ModelArguments,), ["--matryoshka_dims", "4", "8"], None)
    assert args.matryoshka_dims == [4, 8]
