"""Tuning modes: what each trains, that it starts as nothing, leaves its base alone, and is saved and found again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file
from testing_utils import (
    DROPOUT,
    TEXT_TOWERS,
    VISION_TOWERS,
    assert_same_weights,
    make_batch,
    make_catalogue,
    make_config,
    make_model,
    make_processor,
    make_split,
)

from transrec_hf import TransRecModel, TransRecTrainer, TransRecTrainingArguments
from transrec_hf.commands.runs import FinetuneArguments
from transrec_hf.items.meeting import set_item_vectors
from transrec_hf.model.tuning_transrec import sub_layers
from transrec_hf.training.tuning import PEFT_TUNINGS, TUNINGS, adapter_config, resolve_tuning, target_modules, tune


BASE, ADAPTER = "me/base", "me/adapter"
DESIGN = {
    "item_map": "whitened",
    "similarity": "cosine",
    "content_prior": True,
    "popularity_prior": True,
    "user_hidden_size": 8,
    "num_items": 12,
}
ADAPTERS = (*PEFT_TUNINGS, "bottleneck")
LEARNED = {"learning_rate": 0.01, "tower_learning_rate": 0.01}
KEPT = {"load_best_model_at_end": False, "save_total_limit": None}


def design(text: str = "bert", image: str = "vit", **fields: Any) -> TransRecModel:
    towers = {"text_config": TEXT_TOWERS[text](), "vision_config": VISION_TOWERS[image]()}
    return make_model(make_config(**{**towers, **DESIGN, **fields}))


def arguments(folder: Path, **options: Any) -> TransRecTrainingArguments:
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 5, "use_cpu": True, "report_to": "none"}
    return TransRecTrainingArguments(str(folder), **{**defaults, **options})


def trainer_of(model: TransRecModel, folder: Path, **options: Any) -> TransRecTrainer:
    data = {"catalogue": make_catalogue(), "split": make_split(), "processing_class": make_processor()}
    return TransRecTrainer(model, arguments(folder, **LEARNED, **options), **data)


def outputs(model: TransRecModel) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        result = model.eval()(**make_batch(model.config))
    return result.item_embeds, result.last_hidden_state


def shaken(model: TransRecModel) -> TransRecModel:
    """Weights that are trained, as after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tuned(model: TransRecModel, tuning: str, folder: Path, **options: Any) -> TransRecModel:
    tune(model, arguments(folder, tuning=tuning, **options))
    return model


@pytest.fixture
def base(tmp_path: Path) -> TransRecModel:
    design().save_pretrained(tmp_path / "base")
    return TransRecModel.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("tuning", ADAPTERS)
@pytest.mark.parametrize(
    "text, image",
    [
        *[(text, "vit") for text in TEXT_TOWERS],
        *[("bert", image) for image in VISION_TOWERS if image != "vit"],
    ],
)
def test_adapters_start_as_nothing_on_every_tower(tmp_path, tuning, text, image):
    model = design(text, image)
    before = outputs(model)
    tuned(model, tuning, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(before, outputs(model), strict=True))
    changed = outputs(shaken(model))
    assert not any(torch.allclose(*pair) for pair in zip(before, changed, strict=True))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("places", ["houlsby", "pfeiffer"])
def test_bottlenecks_are_where_they_were_published(base, places, parallel):
    before = outputs(base)
    base.add_bottlenecks(4, places, parallel)
    assert all(torch.equal(*pair) for pair in zip(before, outputs(base), strict=True))
    found = {name.split(".bottleneck")[0] for name, _ in base.named_parameters() if ".bottleneck." in name}
    layers = [*(f"item_encoder.text_model.encoder.layer.{row}" for row in range(2))]
    assert {name for name in found if "text_model" in name} == {
        *(f"{layer}.output.dense" for layer in layers),
        *(f"{layer}.attention.output.dense" for layer in layers if places == "houlsby"),
    }
    users = {f"user_encoder.layers.{row}" for row in range(2)}
    assert {name for name in found if "user_encoder" in name} == {
        *(f"{layer}.output" for layer in users),
        *(f"{layer}.attention.o_proj" for layer in users if places == "houlsby"),
    }
    shaken(base)
    twin = copy.deepcopy(base)
    assert all(torch.equal(*pair) for pair in zip(outputs(base), outputs(twin), strict=True))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".bottleneck." in name:
                parameter.zero_()
    assert not torch.allclose(outputs(twin)[0], outputs(base)[0]), "a copy has adapters of its own"


def test_a_parallel_adapter_reads_what_the_sub_layer_reads():
    model = design()
    model.add_bottlenecks(4, parallel=True)
    shaken(model)
    layer = model.item_encoder.text_model.encoder.layer[0]
    states = torch.randn(3, 5, 16)
    with torch.no_grad():
        hidden = layer.intermediate(states)  # which is where it is remembered
        last = layer.output.dense
        expected = torch.nn.functional.linear(hidden, last.weight, last.bias) + last.bottleneck(states)
        torch.testing.assert_close(last(hidden), expected)


@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_sub_layers_of_every_tower(text):
    model = design(text)
    places = list(sub_layers(model.item_encoder.text_model))
    depth = 3 if text == "minilm" else 2
    assert [kind for kind, _, _ in places] == ["attention", "feed_forward"] * depth
    assert all(first.in_features == last.out_features == 16 for _, first, last in places)


@pytest.mark.parametrize("tuning", PEFT_TUNINGS)
@pytest.mark.parametrize("image", ["vit", "resnet", "mobilenet_v1"])
def test_merged_equals_unmerged(tmp_path, tuning, image):
    from peft import get_peft_model

    plain = design(image=image)
    model = get_peft_model(plain, adapter_config(plain, tuning))
    shaken(model)
    before = outputs(model)
    model.merge_adapter()  # PEFT cannot unload IA3 where modules without a weight of their own were trained whole
    after = outputs(model)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tuning", ADAPTERS)
def test_trained_on_a_frozen_base_and_found_again(base, tmp_path, tuning):
    frozen_before = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = trainer_of(base, tmp_path / "run", tuning=tuning, thin_checkpoints=True)
    start = {name: p.detach().clone() for name, p in base.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [name for name, p in base.named_parameters() if name in start and not torch.equal(p, start[name])]
    assert {name.split(".")[0] for name in moved} == {
        *("content_prior", "item_encoder", "logit_scale", "popularity_weight"),
        "user_encoder",
    }
    assert any("item_embedding" in name for name in moved) and any("modality_scale" in name for name in moved)
    of_base = {name: ".".join(part for part in name.split(".") if part != "base_layer") for name in base.state_dict()}
    for name, value in base.state_dict().items():
        original = of_base[name].replace("original_module.", "")
        is_tower = "_model." in name or name.startswith("user_encoder.")
        if original in frozen_before and is_tower:
            assert torch.equal(value, frozen_before[original]), name

    trainer.save_model()
    name = "model" if tuning == "bottleneck" else "adapter_model"
    weights = load_file(tmp_path / "run" / f"{name}.safetensors")
    marks = ("lora_", "ia3_", "ln_tuning", "bottleneck", "LayerNorm", "norm")
    inside = [key for key in weights if "_model." in key.removeprefix("base_model.model.") or "user_encoder" in key]
    assert inside and all(any(mark in key for mark in marks) for key in inside), "no weight of the base"
    found = TransRecModel.from_pretrained(tmp_path / "run")
    for name, value in found.state_dict().items():
        assert torch.equal(value, base.state_dict()[name]), name
    for pair in zip(outputs(base), outputs(found), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("tuning", ["lora", "bottleneck"])
def test_resumed(tmp_path, tuning, base):
    whole = trainer_of(base, tmp_path / "whole", tuning=tuning, num_train_epochs=3, **KEPT)
    whole.train()
    again = TransRecModel.from_pretrained(tmp_path / "base")
    part = trainer_of(again, tmp_path / "part", tuning=tuning, num_train_epochs=3, **KEPT)
    part.train()
    later = TransRecModel.from_pretrained(tmp_path / "base")
    resumed = trainer_of(later, tmp_path / "part", tuning=tuning, num_train_epochs=3, **KEPT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-6"))
    assert_same_weights(resumed.model, whole.model)


def test_a_frozen_run_keeps_its_towers_out_of_its_checkpoints(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "run", tuning="frozen", num_train_epochs=3)
    trainer.train()
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    for checkpoint in checkpoints:
        assert not [name for name in load_file(checkpoint / "model.safetensors") if "_model." in name]
    trainer.save_model()
    assert [name for name in load_file(tmp_path / "run" / "model.safetensors") if "_model." in name]
    again = TransRecModel.from_pretrained(tmp_path / "base")
    resumed = trainer_of(again, tmp_path / "run", tuning="frozen", num_train_epochs=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == 4
    whole = trainer_of(base, tmp_path / "whole", tuning="frozen", num_train_epochs=1, thin_checkpoints=False)
    whole.train()
    first = next((tmp_path / "whole").glob("checkpoint-*"))
    assert [name for name in load_file(first / "model.safetensors") if "_model." in name]


def test_several_adapters_on_one_base(base, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    expected = []
    for seed, folder in enumerate(folders):
        model = TransRecModel.from_pretrained(tmp_path / "base")
        tuned(model, "lora", folder, seed=seed)
        shaken(model)
        with torch.no_grad():
            model.logit_scale.value.add_(seed)
        model.save_pretrained(folder)
        expected.append(outputs(model))
    plain = outputs(base)
    for folder in folders:
        base.load_adapter(str(folder), adapter_name=folder.name)
    for folder, wanted in zip(folders, expected, strict=True):
        base.set_adapter(folder.name)
        for pair in zip(wanted, outputs(base), strict=True):
            torch.testing.assert_close(*pair)
    base.disable_adapters()
    assert all(torch.equal(*pair) for pair in zip(plain, outputs(base), strict=True))


def test_a_bottleneck_adapter_is_pushed_alone(hub: LocalHub, tmp_path):
    design().push_to_hub(BASE)
    model = TransRecModel.from_pretrained(BASE)
    tuned(model, "bottleneck", tmp_path, adapter_size=2)
    shaken(model)
    model.push_to_hub(ADAPTER, thin=True)
    config = json.loads(hub.files(ADAPTER)["config.json"])
    assert config["bottleneck"] == {"size": 2, "places": "houlsby", "parallel": False}
    assert [entry["name"] for entry in config["weights_from"]] == [BASE]
    assert len(hub.files(ADAPTER)["model.safetensors"]) < len(hub.files(BASE)["model.safetensors"]) / 2
    assert_same_weights(TransRecModel.from_pretrained(ADAPTER), model)


@pytest.mark.parametrize("tuning", TUNINGS[:-1])  # but for codes, which these models do not read
def test_modes_train_what_they_say(tmp_path, tuning, caplog):
    model = design(**DROPOUT)
    tuned(model, tuning, tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_tower = [name for name in trained if "_model." in name]
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / model.num_parameters()
    if tuning == "full":
        assert share == 1
    elif tuning == "frozen":
        assert not in_tower
    elif tuning == "top_k_blocks":
        assert in_tower and not any("embeddings" in name for name in in_tower)
    else:
        assert in_tower and all(
            any(mark in name for mark in ("lora_", "ia3_", "ln_tuning", "bottleneck")) for name in in_tower
        )
    for name in ("logit_scale", "popularity_weight", "content_prior", "text_projection", "item_embedding"):
        assert any(name in parameter for parameter in trained), name


def test_cost_is_told(base, tmp_path):
    trainer = trainer_of(base, tmp_path, tuning="frozen", num_train_epochs=1)
    trainer.train()
    cost = trainer.cost.cost
    assert cost.trainable_parameters < cost.parameters and cost.seconds_per_1000_users > 0
    assert "parameters (" in str(cost) and "seconds for 1,000 users" in str(cost)


def test_options_that_contradict_each_other():
    assert resolve_tuning("top_k_blocks", None, None) == 2
    assert resolve_tuning("top_k_blocks", 1, None) == 1
    assert resolve_tuning(None, 1, None) == 1
    assert resolve_tuning("frozen", None, None) == resolve_tuning("frozen", 0, None) == 0
    assert resolve_tuning("full", None, None) is None
    for options, message in {
        ("lora", 1, None): "trainable_blocks=1 means tuning='top_k_blocks', and tuning is 'lora': leave one out",
        ("full", 0, None): "trainable_blocks=0 means",
        ("top_k_blocks", 0, None): "trains at least one block",
        ("frozen", None, 4): "adapter_size is the rank or width",
        ("loar", None, None): "tuning must be one of",
    }.items():
        with pytest.raises(ValueError, match=message):
            resolve_tuning(*options)


def test_places_for_peft():
    import re

    model = design(image="mobilenet_v1")
    found = [name for name, _ in model.named_modules() if re.fullmatch(target_modules(model, "lora"), name)]
    convolutions = [model.get_submodule(name) for name in found if "vision_model" in name]
    assert convolutions and all(layer.kernel_size == (1, 1) and layer.groups == 1 for layer in convolutions)
    assert len([name for name in found if "text_model" in name]) == 2 * 6
    assert len([name for name in found if "user_encoder" in name]) == 2 * 6
    empty = make_model(make_config((), num_items=3, user_encoder="mean", objective="in_batch"))
    with pytest.raises(ValueError, match="finds no layer to adapt"):
        target_modules(empty, "lora")
    with pytest.raises(ValueError, match="neither a tower nor the user encoder has Transformer blocks"):
        empty.add_bottlenecks()


def test_an_adapter_of_peft_goes_on_the_base_as_it_is_saved(base, tmp_path):
    with pytest.raises(ValueError, match=r"tuning='lora' puts an adapter on the checkpoint as it is, and init='none'"):
        FinetuneArguments(str(tmp_path), tuning="lora", init="none", use_cpu=True)
    assert FinetuneArguments(str(tmp_path), tuning="lora", use_cpu=True).init == "all"
    set_item_vectors(base, torch.zeros(5, 16))
    with pytest.raises(ValueError, match=r"ID vectors of 12 items and not of the 5 here: take tuning='bottleneck'"):
        tuned(base, "lora", tmp_path)
    tuned(base, "bottleneck", tmp_path)
