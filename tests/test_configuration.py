"""Configuration: round trips, presets, and values that contradict each other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from huggingface_hub.errors import StrictDataclassError
from testing_utils import TEXT_TOWERS, VISION_TOWERS, make_config, make_paper_config
from transformers import AutoConfig

import transrec_hf
from transrec_hf import TransRecConfig


CONFIGS = {
    "text": lambda: make_config("text"),
    "image": lambda: make_config("image"),
    "text image": lambda: make_config(),
    "ids": lambda: make_config("", num_items=12),
    "paper": make_paper_config,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_a_round_trip(name, tmp_path):
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TransRecConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.modalities == config.modalities


def test_every_tower_family_survives_a_round_trip(text_config, vision_config, tmp_path):
    make_config(text_config=text_config, vision_config=vision_config).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded.text_config) is type(text_config)
    assert type(loaded.vision_config) is type(vision_config)
    assert loaded.text_config.to_diff_dict() == text_config.to_diff_dict()
    assert loaded.vision_config.to_diff_dict() == vision_config.to_diff_dict()


def test_towers_may_be_given_as_dictionaries():
    towers = {"text_config": TEXT_TOWERS["roberta"]().to_dict(), "vision_config": VISION_TOWERS["dinov2"]().to_dict()}
    config = make_config(**towers)
    assert config.text_config.model_type == "roberta"
    assert config.vision_config.model_type == "dinov2"


@pytest.mark.parametrize("modalities", [(), ("text",), ("image",), ("text", "image")])
def test_modalities_are_those_with_a_tower(modalities):
    assert make_config(modalities).modalities == modalities


def test_paper_preset_is_that_of_the_released_code():
    config = TransRecConfig.paper(text_config=TEXT_TOWERS["bert"]())
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (256, 4, 4)
    assert (config.intermediate_size, config.max_position_embeddings) == (128, 25)
    assert (config.objective, config.num_positives, config.num_negatives) == ("cpc", 5, 5)
    assert not (config.is_causal or config.norm_first or config.input_layer_norm or config.use_modality_embedding)
    assert config.text_pooling == "attention"
    assert config.num_attention_heads * config.pooling_head_size == 80
    assert TransRecConfig.paper(hidden_size=64).hidden_size == 64


def test_the_baseline_of_ids_reads_no_content():
    config = TransRecConfig.esasrec(7, hidden_dropout_prob=0.5)
    assert config.modalities == () and not config.is_hybrid and config.num_items == 7
    assert (config.hidden_size, config.num_hidden_layers, config.hidden_dropout_prob) == (256, 1, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "multiple of num_attention_heads"),
        ({"num_items": 5, "objective": "bce"}, "a hybrid .* needs objective"),
        ({"text_pooling": "max"}, "text_pooling must be one of"),
        ({"objective": "mse"}, "objective must be one of"),
        ({"is_causal": False}, "set is_causal=True, or objective='cpc'"),
        ({"hidden_size": "64"}, "field 'hidden_size'"),
        ({"is_causal": "no"}, "field 'is_causal'"),
        ({"hidden_dropout_prob": "0.1"}, "field 'hidden_dropout_prob'"),
        ({"text_config": "bert-base-uncased"}, "field 'text_config'"),
    ],
)
def test_contradictions_and_wrong_types_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_config(**fields)


def test_attention_implementation_may_differ_between_towers():
    config = make_config(attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"


# The package


def test_import_is_lazy():
    """Reading a checkpoint must not pay for data sets, metrics, adapters or the trainer."""
    heavy = ("datasets", "evaluate", "peft", "pyarrow", "pandas", "transformers.trainer", "transrec_hf.data")
    code = f"import sys, transrec_hf; print([name for name in {heavy!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert output.stdout.strip() == "[]"
    assert output.stderr == ""


@pytest.mark.parametrize("name", transrec_hf.__all__)
def test_public_names_can_be_imported(name):
    assert getattr(transrec_hf, name) is not None
    assert name in dir(transrec_hf)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'TransRecModle'"):
        transrec_hf.TransRecModle  # noqa: B018


def test_a_file_may_hold_settings_of_others_but_no_slip_of_a_letter():
    written = {**make_config("text").to_dict(), "layer_norm_epsilon": 1.0, "of_a_later_version": 1}
    assert not hasattr(TransRecConfig.from_dict(written), "layer_norm_epsilon")
    with pytest.raises(ValueError, match="no setting 'hiden_size': did you mean 'hidden_size'"):
        TransRecConfig.from_dict({**written, "hiden_size": 32})
