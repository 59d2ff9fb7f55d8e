"""Tuning modes: what each trains, that it starts as nothing, leaves its base alone, and is saved and found again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from local_hub import LocalHub
from safetensors.torch import load_file
from testing_utils import (
    BERT,
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
from transformers import BertConfig

from transrec_hf import ItemSource, TransRecModel, TransRecTrainer, TransRecTrainingArguments, encode_catalogue
from transrec_hf.commands.runs import FinetuneArguments
from transrec_hf.items.encoding import item_states
from transrec_hf.items.meeting import set_item_vectors
from transrec_hf.items.store import ActivationStore
from transrec_hf.model.towers_transrec import tower_blocks
from transrec_hf.model.tuning_transrec import sub_layers
from transrec_hf.serving.index import encoder_hash
from transrec_hf.training.adapters import has_adapter, merge_adapter
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
ADAPTERS = (*PEFT_TUNINGS, "bottleneck")  # that leave the user encoder alone as well
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


@pytest.mark.parametrize("tuning", (*ADAPTERS, "side"))
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


@pytest.mark.parametrize("tuning", PEFT_TUNINGS)
@pytest.mark.parametrize("image", ["vit", "resnet", "mobilenet_v1"])
def test_a_model_with_its_adapter_in_its_weights_computes_the_same(tmp_path, tuning, image):
    plain = design(image=image)
    names = set(plain.state_dict())
    model = shaken(tuned(design(image=image), tuning, tmp_path))
    before = outputs(model)
    merge_adapter(model)
    assert set(model.state_dict()) == names and not has_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for old, new in zip(before, outputs(model), strict=True):
        torch.testing.assert_close(old, new, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "whole")
    assert_same_weights(TransRecModel.from_pretrained(tmp_path / "whole"), model)


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
    elif tuning in ("frozen", "side"):
        assert not in_tower
        assert ("item_encoder.image_side.gates.value" in trained) == (tuning == "side")
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
    assert resolve_tuning("side", None, 4) == resolve_tuning("side", 0, None) == 0
    assert resolve_tuning("full", None, None) is None
    for options, message in {
        ("lora", 1, None): "trainable_blocks=1 means tuning='top_k_blocks', and tuning is 'lora': leave one out",
        ("full", 0, None): "trainable_blocks=0 means",
        ("top_k_blocks", 0, None): "trains at least one block",
        ("frozen", None, 4): "adapter_size is only for tuning",
        ("side", 2, None): "trainable_blocks=2 means",
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
    with pytest.raises(
        ValueError, match=r"tuning='lora' puts an adapter on the unchanged checkpoint, and init='none'"
    ):
        FinetuneArguments(str(tmp_path), tuning="lora", init="none", use_cpu=True)
    assert FinetuneArguments(str(tmp_path), tuning="lora", use_cpu=True).init == "all"
    set_item_vectors(base, torch.zeros(5, 16))
    with pytest.raises(ValueError, match=r"ID vectors of 12 items, not of the 5 items here: use tuning='bottleneck'"):
        tuned(base, "lora", tmp_path)
    tuned(base, "bottleneck", tmp_path)


def block_calls(model: TransRecModel) -> list[str]:
    """Which towers run a block from now on, a name for each time."""
    calls: list[str] = []
    for name, tower in model.item_encoder.towers.items():
        for block in tower_blocks(tower):
            block.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("image", ["vit", "mobilenet_v1"])
def test_a_side_network_learns_without_its_tower_and_is_found_again(tmp_path, image):
    design(image=image).save_pretrained(tmp_path / "base")
    model = TransRecModel.from_pretrained(tmp_path / "base")
    store = {"activation_store": str(tmp_path / "store"), "thin_checkpoints": True, **KEPT}
    trainer = trainer_of(model, tmp_path / "run", tuning="side", **store)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fill_store()
    calls = block_calls(model)
    trainer.train()
    assert not calls, "neither training nor validation runs a block"
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("_model." in name) or "projection" in name, name
    trainer.save_model()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not [name for name in weights if "_model." in name] and "item_encoder.text_side.output.weight" in weights
    found = TransRecModel.from_pretrained(tmp_path / "run")
    assert_same_weights(found, model)
    torch.testing.assert_close(outputs(model), outputs(found))
    assert encoder_hash(found, None) == encoder_hash(model, None), "an index of the one is that of the other"


def test_several_side_networks_are_pushed_alone_on_one_base(hub, tmp_path):
    design().push_to_hub(BASE)
    plain, sides = outputs(TransRecModel.from_pretrained(BASE)), []
    for seed in (0, 1):
        model = shaken(tuned(TransRecModel.from_pretrained(BASE), "side", tmp_path, seed=seed, adapter_size=4))
        model.push_to_hub(f"{ADAPTER}-{seed}", thin=True)
        sides.append(outputs(model)[0])
        files = hub.files(f"{ADAPTER}-{seed}")
        config = json.loads(files["config.json"])
        assert config["side"] == {"size": 4, "depths": {"text": [[0, 16]], "image": [[0, 16]]}}
        assert [entry["name"] for entry in config["weights_from"]] == [BASE]
        assert len(files["model.safetensors"]) < len(hub.files(BASE)["model.safetensors"])
    for seed, expected in enumerate(sides):
        assert torch.equal(outputs(TransRecModel.from_pretrained(f"{ADAPTER}-{seed}"))[0], expected)
    assert not torch.allclose(*sides) and not torch.allclose(plain[0], sides[0])
    assert all(torch.equal(*pair) for pair in zip(plain, outputs(TransRecModel.from_pretrained(BASE)), strict=True))


@pytest.mark.parametrize("fields", [{}, {"text_depths": 3}, {"text_pooling": "attention"}, {"item_map": "linear"}])
def test_a_side_network_reads_the_store_as_it_reads_the_towers(tmp_path, fields):
    model = design("minilm", "resnet", num_items=None, **fields)
    source = ItemSource(make_catalogue(), make_processor())
    plain = item_states(model, source, "text")
    shaken(tuned(model, "side", tmp_path))
    if "text_pooling" not in fields:
        assert torch.equal(item_states(model, source, "text"), plain), "the projection reads what it read"
    store = ActivationStore(tmp_path, model, source)
    store.fill()
    torch.testing.assert_close(encode_catalogue(model, store.source), encode_catalogue(model, source))
    before = encode_catalogue(model, store.source)
    with torch.no_grad():
        model.item_encoder.image_side.output.weight.zero_()
    assert not torch.allclose(encode_catalogue(model, store.source), before)


def test_a_side_network_is_the_chain_of_its_paper():
    tower = BertConfig(**{**BERT, "num_hidden_layers": 4})
    model = make_model(make_config("text", text_config=tower, hidden_size=8, item_map="linear"))
    model.add_side(3)
    assert model.config.side["depths"] == {"text": [[0, 16], [2, 16]]}
    side = shaken(model).item_encoder.text_side
    ids, mask = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        found = model.get_text_features(ids, mask).pooler_output
        states = model.item_encoder.text_model(ids, mask, output_hidden_states=True).hidden_states
        pooled = [(state * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True) for state in states]
        chain = torch.zeros(2, 16)
        for i, depth in enumerate((0, 2, 4)):
            gate = 1 / (1 + torch.exp(-10 * side.gates.value[i]))
            normal = (pooled[depth] - pooled[depth].mean(dim=1, keepdim=True)) / pooled[depth].std(
                dim=1, keepdim=True, correction=0
            )
            chain = gate * normal + (1 - gate) * chain
            chain = chain + side.up[i](torch.nn.functional.gelu(side.down[i](chain)))
        expected = model.item_encoder.text_projection(pooled[4]) + side.output(chain) / 8**0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_side_networks_that_there_are_not(tmp_path):
    model = tuned(design(), "side", tmp_path, adapter_size=4)
    side = model.item_encoder.text_side
    model.add_side(4)
    assert model.item_encoder.text_side is side
    with pytest.raises(ValueError, match="already has side networks of size 4, not 8"):
        model.add_side(8)
    with pytest.raises(ValueError, match="a tower of texts or images, and this model has none"):
        make_model(make_config((), num_items=3)).add_side()
    model.freeze_towers(1)
    with pytest.raises(ValueError, match="the side network of the image tower reads blocks of several shapes"):
        ActivationStore(tmp_path, model, ItemSource(make_catalogue(), make_processor()))
    for wrong in (
        {"size": 0, "depths": {"text": [[0, 16]]}},
        {"size": 4},
        {"size": 4, "depths": {}},
        {"size": 4, "depths": {"audio": [[0, 16]]}},
        {"size": 4, "depths": {"text": [[0, 2**30]]}},
        {"size": 4, "depths": {"text": [0, 2]}},
    ):
        with pytest.raises(StrictDataclassClassValidationError, match="side must have a size of 1 or more and depths"):
            make_config(side=wrong)
