"""The processor: every subset of modalities, mixed items, and round trips through AutoProcessor."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from testing_utils import IMAGE_SIZE, make_config, make_image_processor, make_model, make_processor, make_tokenizer
from transformers import AutoModel, AutoProcessor

from transrec_hf import TransRecModel, TransRecProcessor


SUBSETS = (("text",), ("image",), ("text", "image"))
RED, BLUE = (Image.new("RGB", (20, 30), colour) for colour in ("red", "blue"))


@pytest.fixture(params=SUBSETS, ids=" ".join)
def modalities(request):
    return request.param


def test_processor_survives_a_round_trip(modalities, tmp_path):
    processor = make_processor(modalities)
    processor.save_pretrained(tmp_path)
    make_config(modalities).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TransRecProcessor
    assert loaded.modalities == list(modalities)
    assert loaded.max_text_length == 16
    assert (loaded.tokenizer is None) == ("text" not in modalities)
    assert (loaded.image_processor is None) == ("image" not in modalities)
    inputs = {"text": ["red hat", "old blue shoe"], "images": [RED, BLUE]}
    expected, found = processor(**inputs), loaded(**inputs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_any_subset_works_through_the_same_three_classes(modalities, tmp_path):
    make_model(make_config(modalities)).save_pretrained(tmp_path)
    make_processor(modalities).save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        items = model(**processor(text=["red hat", "sock"], images=[RED, BLUE])).item_embeds
    assert items.shape == (2, 16)
    assert torch.dist(*items) > 1e-3


def test_mixed_items_know_their_rows(processor):
    batch = processor(text=["red hat", None, "sock"], images=[None, RED, BLUE])
    assert batch["item_modalities"][:, :3].tolist() == [
        [True, False, False],
        [False, True, False],
        [True, True, False],
    ]
    assert batch["text_index"].tolist() == [0, 2]
    assert batch["image_index"].tolist() == [1, 2]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 4)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 3]
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_one_item_needs_no_list(processor):
    batch = processor(text="red hat", images=RED)
    assert batch["item_modalities"][:, :3].tolist() == [[True, True, False]]


def test_items_of_one_modality_bring_no_inputs_of_the_other(processor):
    assert "pixel_values" not in processor(text=["red hat"])
    assert "input_ids" not in processor(images=[RED, BLUE])
    assert "input_ids" not in processor(text=[None], images=[RED])


def test_a_processor_ignores_what_its_model_does_not_read():
    texts, images = make_processor("text"), make_processor("image")
    assert texts(text=["hat"], images=[RED])["item_modalities"][:, :3].tolist() == [[True, False, False]]
    assert images(text=["hat"], images=[RED])["item_modalities"][:, :3].tolist() == [[False, True, False]]


def test_long_texts_are_cut(processor):
    assert processor(text=["red " * 100])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(processor, mode):
    assert processor(images=[RED.convert(mode)])["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_input_names_are_those_of_the_model(processor):
    batch = processor(text=["red hat"], images=[RED])
    assert set(batch) == set(processor.model_input_names)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": ["hat", "sock"], "images": [RED]}, "2 of text and 1 of image"),
        ({"text": ["hat", None], "images": [RED, None]}, "item 1 of this batch has none"),
        ({"text": [None]}, "item 0 of this batch has none"),
    ],
)
def test_items_without_content_are_refused(processor, inputs, message):
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_an_image_for_a_text_processor_is_refused():
    with pytest.raises(ValueError, match=r"none of the processor's modalities: \['text'\]"):
        make_processor("text")(images=[RED])


def test_a_processor_needs_a_part():
    with pytest.raises(ValueError, match=r"needs a tokenizer, an image_processor, .*features_size"):
        TransRecProcessor()


def test_processor_comes_with_the_towers(tmp_path, modalities):
    model = make_model()
    folders = {"text_model": tmp_path / "text", "vision_model": tmp_path / "vision"}
    model.item_encoder.text_model.save_pretrained(folders["text_model"])
    model.item_encoder.vision_model.save_pretrained(folders["vision_model"])
    make_tokenizer().save_pretrained(folders["text_model"])
    make_image_processor().save_pretrained(folders["vision_model"])
    names = {"text": "text_model", "image": "vision_model"}
    towers = {names[modality]: str(folders[names[modality]]) for modality in modalities}
    processor = TransRecProcessor.from_towers(**towers, max_text_length=8)
    loaded = TransRecModel.from_text_vision_pretrained(**towers, hidden_size=16)
    batch = processor(text=["red hat"], images=[RED])
    assert loaded(**batch).item_embeds.shape == (1, 16)
    assert processor.modalities == list(loaded.config.modalities)
