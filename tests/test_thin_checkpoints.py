"""Thin checkpoints: without the weights that others have, named by id, commit and hash, put together again offline."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file
from testing_utils import (
    TEXT_TOWERS,
    VISION_TOWERS,
    assert_same_weights,
    make_catalogue,
    make_model,
    make_processor,
)
from transformers import AutoModel

from transrec_cli import format_facts
from transrec_hf import DataError, Recommender, TransRecConfig, TransRecModel
from transrec_hf.model.tuning_transrec import as_expression, names_as_patterns, weights_hash
from transrec_hf.publishing.card import describe_checkpoint, model_card
from transrec_hf.publishing.checkpoint import load_checkpoint
from transrec_hf.publishing.hub import upload_checkpoint


TEXT, IMAGE, SOURCE, TARGET = "me/text-tower", "me/image-tower", "me/source", "me/target"


def save_towers(folder: Path, text: str = "bert", image: str = "vit") -> dict[str, str]:
    torch.manual_seed(1)
    towers = {"text_model": TEXT_TOWERS[text](), "vision_model": VISION_TOWERS[image]()}
    for name, config in towers.items():
        AutoModel.from_config(config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in towers}


def from_towers(towers: dict[str, str], **fields) -> TransRecModel:
    torch.manual_seed(2)
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 6}
    return TransRecModel.from_text_vision_pretrained(**towers, **{**settings, **fields}).eval()


def push_towers(folder: Path) -> dict[str, str]:
    names = {"text_model": TEXT, "vision_model": IMAGE}
    for name, place in save_towers(folder).items():
        AutoModel.from_pretrained(place).push_to_hub(names[name])
    return names


def stored(folder: Path) -> set[str]:
    return set(load_file(Path(folder) / "model.safetensors"))


@pytest.mark.parametrize("text, image", [("bert", "vit"), ("modernbert", "mobilenet_v2"), ("distilbert", "clip")])
def test_a_thin_checkpoint_holds_no_weight_of_a_tower_and_is_put_together_again(tmp_path, text, image):
    model = from_towers(save_towers(tmp_path, text, image), item_map="whitened", content_prior=True)
    model.save_pretrained(tmp_path / "thin", thin=True)
    model.save_pretrained(tmp_path / "whole")
    assert stored(tmp_path / "thin") and not [name for name in stored(tmp_path / "thin") if "_model." in name]
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert config["format_version"] == 2, "older code refuses it"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["weights_from"] is None
    thin, found = TransRecModel.from_pretrained(tmp_path / "thin", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert_same_weights(thin, model)
    assert_same_weights(TransRecModel.from_pretrained(tmp_path / "whole"), model)


def test_loading_is_silent(tmp_path, capfd):
    from_towers(save_towers(tmp_path)).save_pretrained(tmp_path / "thin", thin=True)
    capfd.readouterr()
    TransRecModel.from_pretrained(tmp_path / "thin")
    shown = capfd.readouterr()
    assert "MISSING" not in shown.out + shown.err


def test_a_thin_checkpoint_saved_again(tmp_path):
    model = from_towers(save_towers(tmp_path))
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = TransRecModel.from_pretrained(tmp_path / "thin")
    again.save_pretrained(tmp_path / "again", thin=True)
    again.save_pretrained(tmp_path / "whole")
    assert stored(tmp_path / "again") == stored(tmp_path / "thin")
    shutil.rmtree(tmp_path / "thin")
    for name in ("again", "whole"):
        assert_same_weights(TransRecModel.from_pretrained(tmp_path / name), model)


def test_of_a_tower_that_was_trained_only_the_frozen_blocks_are_left_out(tmp_path):
    model = from_towers(save_towers(tmp_path))
    model.freeze_towers(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "thin", thin=True)
    kept = stored(tmp_path / "thin")
    assert any("text_model.encoder.layer.1." in name for name in kept)
    assert not any("text_model.encoder.layer.0." in name or "text_model.embeddings" in name for name in kept)
    assert_same_weights(TransRecModel.from_pretrained(tmp_path / "thin"), model)


def test_towers_that_were_trained_before_are_those_of_the_source_model(tmp_path):
    source = make_model()
    source.save_pretrained(tmp_path / "source")
    model = TransRecModel.from_pretrained(tmp_path / "source")
    model.freeze_towers(0)
    with torch.no_grad():
        model.user_encoder.final_norm.weight.add_(1)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert not [name for name in stored(tmp_path / "thin") if "_model." in name]
    thin = TransRecModel.from_pretrained(tmp_path / "thin")
    assert_same_weights(thin, model)
    assert [entry["prefix"] for entry in thin.config.weights_from] == [""]


def test_what_is_not_as_it_was_is_refused(tmp_path):
    towers = save_towers(tmp_path)
    model = from_towers(towers)
    model.save_pretrained(tmp_path / "thin", thin=True)
    other = AutoModel.from_pretrained(towers["text_model"])
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(towers["text_model"])
    with pytest.raises(ValueError, match=r"is thin, and .*text_model has changed since it was saved"):
        TransRecModel.from_pretrained(tmp_path / "thin")
    shutil.rmtree(towers["text_model"])
    with pytest.raises(ValueError, match=r"the folder .*text_model with its other weights does not exist"):
        load_checkpoint(str(tmp_path / "thin"))
    with pytest.raises(ValueError, match="a thin checkpoint would hold all weights"):
        make_model().save_pretrained(tmp_path / "no", thin=True)


def test_config_of_a_stranger(tmp_path):
    good: dict[str, object] = {"name": "a", "revision": None, "sha256": "0" * 64, "prefix": "", "weights": []}
    TransRecConfig(num_items=3, weights_from=[good])
    for key, value in {"revision": "main", "sha256": "0", "name": 3, "weights": "a", "prefix": "(a+)+"}.items():
        with pytest.raises(Exception, match=f"weights_from: {key} must"):
            TransRecConfig(num_items=3, weights_from=[{**good, key: value}])


def test_patterns_name_these_weights_and_no_other():
    names, others = ["a.0.b", "a.12.b", "a.0.c", "a.1.c"], ["a.2.c", "a.0.b.down", "x.a.0.b"]
    patterns = names_as_patterns(names, others)
    assert patterns == ["a.*.b", "a.0.c", "a.1.c"]
    is_named = re.compile(as_expression(patterns)).match
    assert all(map(is_named, names)) and not any(map(is_named, others))


def test_hash_is_that_of_the_hub(hub: LocalHub, tmp_path):
    push_towers(tmp_path)
    sha256, commit = weights_hash(TEXT)
    assert sha256 == hashlib.sha256(hub.files(TEXT)["model.safetensors"]).hexdigest()
    assert commit == hub.repos[f"models/{TEXT}"].branches["main"]
    AutoModel.from_pretrained(TEXT).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_hash(str(tmp_path / "shards")) == weights_hash(str(tmp_path / "shards"))
    assert weights_hash(str(tmp_path / "shards"))[0] != sha256


def test_pushed_and_loaded_by_id(hub: LocalHub, tmp_path):
    model = from_towers(push_towers(tmp_path))
    model.push_to_hub(TARGET, thin=True)
    assert not model.saves_thin
    files = hub.files(TARGET)
    entries = json.loads(files["config.json"])["weights_from"]
    commits = [hub.repos[f"models/{name}"].branches["main"] for name in (TEXT, IMAGE)]
    assert [entry["revision"] for entry in entries] == commits
    # the towers move on: a thin checkpoint stays with the commit that it names
    other = AutoModel.from_pretrained(TEXT)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.push_to_hub(TEXT)
    assert_same_weights(TransRecModel.from_pretrained(TARGET), model)
    make_processor().push_to_hub(TARGET)
    load_checkpoint(TARGET)
    requests = len(hub.log)
    recommender = Recommender.from_pretrained(TARGET, make_catalogue(), local_files_only=True)
    assert len(hub.log) == requests, "the cache is enough"
    for name, tower in model.item_encoder.towers.items():
        assert_same_weights(recommender.model.item_encoder.towers[name], tower)
    assert_same_weights(TransRecModel.from_pretrained(TARGET, local_files_only=True), model)


def test_a_folder_is_refused_at_push(hub: LocalHub, tmp_path):
    model = from_towers(save_towers(tmp_path))
    with pytest.raises(ValueError, match="works only on this machine: push it with thin=False"):
        model.push_to_hub(TARGET, thin=True)
    assert not hub.repos or "model.safetensors" not in hub.files(TARGET)
    model.push_to_hub(TARGET)
    assert_same_weights(TransRecModel.from_pretrained(TARGET), model)


def test_card_info_and_upload_say_where_the_weights_are(hub: LocalHub, tmp_path):
    model = from_towers(push_towers(tmp_path))
    model.save_pretrained(tmp_path / "thin", thin=True)
    card = str(model_card(tmp_path / "thin"))
    commit = hub.repos[f"models/{TEXT}"].branches["main"]
    assert "It is a thin checkpoint: weights that did not change in training are not in it." in card
    assert f"They are read from\n`{TEXT}`" in card
    assert f"(commit `{commit[:7]}`)" in card
    facts = describe_checkpoint(tmp_path / "thin")
    assert [part["name"] for part in facts["elsewhere"]] == [TEXT, IMAGE]
    assert f"all other weights are read from {TEXT} ({commit[:8]}), {IMAGE} (" in format_facts("x", facts)
    hub.create(TARGET)
    upload_checkpoint(tmp_path / "thin", TARGET)
    assert_same_weights(TransRecModel.from_pretrained(TARGET), model)

    local = from_towers(save_towers(tmp_path / "local"))
    local.save_pretrained(tmp_path / "of-folders", thin=True)
    assert str(tmp_path) not in str(model_card(tmp_path / "of-folders"))
    with pytest.raises(DataError, match="works only on this machine"):
        upload_checkpoint(tmp_path / "of-folders", TARGET)
