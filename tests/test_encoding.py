"""A whole catalogue to vectors."""

from __future__ import annotations

import warnings

import datasets
import pytest
import torch
from testing_utils import DROPOUT, TEXT_TOWERS, make_batch, make_catalogue, make_config, make_model, make_processor

from transrec_hf import ItemSource, Recommender
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.errors import DataError
from transrec_hf.items import encoding
from transrec_hf.items.encoding import (
    encode_catalogue,
    has_packed_linears,
    packed_linears,
    sort_by_length,
)
from transrec_hf.items.store import prefix_key


def one_by_one(model, catalogue, processor):
    vectors = []
    with torch.no_grad():
        for row in range(len(catalogue)):
            texts, images = [catalogue.text(row)], [catalogue.image(row)]
            vectors.append(model.get_item_features(**processor(text=texts, images=images)))
    return torch.cat(vectors)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_vectors_come_in_catalogue_order(catalogue, processor, batch_size):
    model = make_model()
    found = encode_catalogue(model, ItemSource(catalogue, processor), batch_size=batch_size)
    torch.testing.assert_close(found, one_by_one(model, catalogue, processor))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_model_of_one_modality_encodes_its_part_of_mixed_items(modality):
    model, processor = make_model(make_config(modality)), make_processor(modality)
    found = encode_catalogue(model, ItemSource(make_catalogue(kinds=(modality, "text image")), processor))
    torch.testing.assert_close(
        found, encode_catalogue(model, ItemSource(make_catalogue(kinds=(modality,)), processor))
    )


def test_a_model_of_both_encodes_a_catalogue_of_one(processor):
    assert encode_catalogue(make_model(), ItemSource(make_catalogue(kinds=("text",)), processor)).isfinite().all()


def test_workers_change_nothing(catalogue, processor):
    model = make_model()
    expected = encode_catalogue(model, ItemSource(catalogue, processor), batch_size=4)
    found = encode_catalogue(model, ItemSource(catalogue, processor), batch_size=4, num_workers=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_encoding_is_done_in_evaluation_mode_and_leaves_the_mode_as_it_was(catalogue, processor):
    model = make_model(make_config(text_config=TEXT_TOWERS["bert"](**DROPOUT)))
    expected = encode_catalogue(model, ItemSource(catalogue, processor))
    model.freeze_towers(1)
    model.train()
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(encode_catalogue(model, ItemSource(catalogue, processor)), expected, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes


def test_a_failure_leaves_the_mode_as_it_was(catalogue):
    model = make_model().train()
    model.config.max_position_embeddings = 3
    with pytest.raises(Exception):
        encode_catalogue(model, ItemSource(catalogue, lambda **kwargs: 1 / 0))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_are_fp32_and_need_no_gradient(catalogue, processor, dtype):
    found = encode_catalogue(make_model().to(dtype), ItemSource(catalogue, processor))
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.shape == (12, 16)


needs_packed_linears = pytest.mark.skipif(not has_packed_linears(torch.float32), reason="no oneDNN for this CPU")


@needs_packed_linears
def test_towers_multiply_by_packed_weights(catalogue, processor, monkeypatch):
    model = make_model()
    expected = one_by_one(model, catalogue, processor)
    monkeypatch.delattr(torch.nn.Linear, "forward")
    torch.testing.assert_close(encode_catalogue(model, ItemSource(catalogue, processor)), expected)


@needs_packed_linears
@pytest.mark.parametrize("bf16", [False, True])
def test_packed_weights_compute_in_the_dtype_of_the_layer_or_of_autocast(bf16):
    batch = make_batch(make_config())
    texts = batch["items"].parts["text"]
    model = make_model().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = model.get_content_features("text", texts)
        with packed_linears(model):
            found = model.get_content_features("text", texts)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_packed_weights_are_gone_afterwards(error):
    model = make_model()
    try:
        with packed_linears(model):
            if error:
                raise error
    except RuntimeError:
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_forward_that_was_replaced_already_stays():
    model = make_model()
    layer = model.item_encoder.text_projection
    layer.forward = forward = lambda states: states
    with packed_linears(model):
        assert layer.forward is forward
    assert layer.forward is forward


def test_a_torch_without_packed_products_does_without(monkeypatch):
    monkeypatch.setattr(encoding, "PACKED_OPERATORS", ("_an_operator_that_is_gone",))
    model = make_model()
    with packed_linears(model):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_compiled_blocks_keep_their_weights():
    model = make_model()
    model.compile_blocks(backend="aot_eager")
    with packed_linears(model):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_id_baseline_is_its_table(catalogue):
    model = make_model(make_config("", num_items=12))
    found = encode_catalogue(model, ItemSource(catalogue))
    assert torch.equal(found, model.item_encoder.item_embedding.weight)
    assert not found.requires_grad


def test_vectors_are_those_that_training_sees(catalogue, processor):
    model = make_model()
    batch = make_batch(model.config)
    expected = encode_catalogue(model, ItemSource(catalogue, processor))[batch["items"].item_rows]
    torch.testing.assert_close(model(**batch).item_embeds, expected)


def test_modalities_are_those_that_the_model_reads(catalogue):
    assert ItemSource(catalogue, make_processor()).present[:3, :2].tolist() == [
        [True, False],
        [False, True],
        [True, True],
    ]
    both = make_catalogue(kinds=("text image",))
    assert ItemSource(both, make_processor("text")).present[0, :3].tolist() == [True, False, False]
    assert not ItemSource(both).present.any()


def test_items_are_encoded_longest_first():
    catalogue, processor = make_catalogue(), make_processor()
    rows = sort_by_length(ItemSource(catalogue, processor))
    lengths = [len((catalogue.text(row) or "").split()) for row in rows]
    assert lengths == sorted(lengths, reverse=True) and sorted(rows) == list(range(12))
    images = make_catalogue(kinds=("image",))
    assert sort_by_length(ItemSource(images, make_processor("image"))).tolist() == list(range(12))


def test_items_that_the_model_cannot_read_are_refused(catalogue):
    with pytest.raises(DataError, match="4 of 12 items have no text"):
        encode_catalogue(make_model(make_config("text")), ItemSource(catalogue, make_processor("text")))


def test_a_content_model_needs_a_processor(catalogue):
    with pytest.raises(ValueError, match="needs the model's processor"):
        encode_catalogue(make_model(), ItemSource(catalogue))


def test_an_id_baseline_cannot_leave_its_catalogue(catalogue):
    with pytest.raises(ValueError, match="knows 5 items, but the catalogue has 12"):
        encode_catalogue(make_model(make_config("", num_items=5)), catalogue)


LONG = "red green blue " * 20


def long_catalogue() -> Catalogue:
    return Catalogue(datasets.Dataset.from_dict({"item_id": ["a", "b"], "text": [LONG, "red hat"]}))


@pytest.mark.parametrize("tower", ["bert", "roberta"])
def test_texts_are_cut_where_the_tower_has_no_more_positions(tower, caplog):
    config = TEXT_TOWERS[tower]()  # 24 positions, of which RoBERTa leaves out one
    limit = 24 if tower == "bert" else 23
    model, processor = make_model(make_config("text", text_config=config)), make_processor("text")
    processor.max_text_length = 64
    vectors = encode_catalogue(model, ItemSource(long_catalogue(), processor))
    assert processor.max_text_length == limit
    assert f"1 texts have more than {limit} tokens" in caplog.text
    cut = make_processor("text")
    cut.max_text_length = limit
    torch.testing.assert_close(encode_catalogue(model, ItemSource(long_catalogue(), cut)), vectors)


def test_short_texts_are_no_reason_for_a_warning(catalogue, caplog):
    processor = make_processor()
    processor.max_text_length = 64
    encode_catalogue(make_model(), ItemSource(catalogue, processor))
    assert processor.max_text_length == 24 and not caplog.text


def test_a_text_beyond_the_positions_is_a_sentence():
    processor = make_processor("text")
    processor.max_text_length = 64
    with pytest.raises(ValueError, match="a text has 62 tokens, but the text tower has positions for 24: set"):
        make_model(make_config("text")).get_item_features(**processor(text=[LONG]))


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_length_that_leaves_nothing_of_a_text_is_refused(length):
    processor = make_processor("text")
    processor.max_text_length = length
    with pytest.raises(ValueError, match=f"max_text_length is {length}, but each text has 2 special tokens"):
        processor(text=["red hat"])


@pytest.mark.parametrize("design", [{}, {"item_map": "whitened", "content_prior": True, "similarity": "cosine"}])
def test_a_quantised_model_recommends_and_is_told_from_others(catalogue, processor, design, tmp_path):
    model = make_model(**design)
    model.freeze_towers(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        recommender = Recommender(quantised, catalogue, processor)
        assert recommender.recommend(list(catalogue.item_ids[:2])) and recommender.item_embeds.isfinite().all()
        with pytest.raises(DataError, match="quantised cannot be saved"):
            recommender.save_pretrained(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        keys = {
            prefix_key(which.item_encoder.text_model, 2, "mean", "", torch.float32) for which in (model, quantised)
        }
    assert len(keys) == 2
