"""PEFT adapters: trained by the trainer on a frozen base, pushed alone, loaded on the base again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import LocalHub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from testing_utils import assert_same_weights, make_batch, make_catalogue, make_model, make_processor, make_split
from torch import nn

from transrec_hf import ItemSource, Recommender, TransRecModel, TransRecTrainer, TransRecTrainingArguments
from transrec_hf.publishing.hub import PICKLES
from transrec_hf.training.parameters import parameter_groups


BASE, ADAPTER = "me/base", "me/adapter"
HISTORY = ["item-3", "item-7"]
WAYS = ("get_peft_model", "add_adapter")


def lora(**options: Any) -> LoraConfig:
    """On the attention of both towers and of the user encoder; the text projection is trained whole."""
    targets = ["query", "value", "q_proj", "v_proj"]
    return LoraConfig(**{"r": 4, "target_modules": targets, "modules_to_save": ["text_projection"], **options})


def with_adapter(model: TransRecModel, way: str, **options: Any) -> nn.Module:
    if way == "get_peft_model":
        return get_peft_model(model, lora(**options))
    model.add_adapter(lora(**options))
    return model


def trainer_of(model: nn.Module, output_dir: Path, **options: Any) -> TransRecTrainer:
    args = TransRecTrainingArguments(
        str(output_dir),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 5,
            "use_cpu": True,
            "eval_on_start": False,
            **options,
        },
    )
    data = {"catalogue": make_catalogue(), "split": make_split(), "processing_class": make_processor()}
    return TransRecTrainer(model, args, **data)  # type: ignore[arg-type]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    model(**make_batch(model.config)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def base(hub: LocalHub) -> TransRecModel:
    model = make_model()
    model.push_to_hub(BASE)
    return TransRecModel.from_pretrained(BASE)


@pytest.mark.parametrize("way", WAYS)
def test_a_new_adapter_changes_nothing(base: TransRecModel, way: str) -> None:
    batch = make_batch(base.config)
    with torch.no_grad():
        before = base(**batch)
        after = with_adapter(base, way).eval()(**batch)
    assert torch.equal(before.item_embeds, after.item_embeds)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_the_adapter_and_no_other(base: TransRecModel, way: str) -> None:
    model = with_adapter(base, way, init_lora_weights=False)
    plain = gradients(model)
    assert plain.keys() == trained(model).keys()
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    assert all("lora_" in name or "text_projection" in name for name in plain)

    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


def test_every_part_has_its_rate(base: TransRecModel, tmp_path: Path) -> None:
    model = with_adapter(base, "get_peft_model")
    rates = {"tower_learning_rate": 1e-4, "projection_learning_rate": 2e-4, "learning_rate": 3e-4}
    args = TransRecTrainingArguments(str(tmp_path), use_cpu=True, **rates)  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: group["lr"]
        for group in parameter_groups(model, args, set())
        for parameter in group["params"]
    }
    assert found.keys() == trained(model).keys()
    for name, rate in found.items():
        part = "tower" if "_model." in name.removeprefix("base_model.model.") else "projection"
        part = "" if "user_encoder" in name else f"{part}_"
        assert rate == rates[f"{part}learning_rate"], name


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["", "gradient_checkpointing"])
@pytest.mark.parametrize("way", WAYS)
def test_trained_and_pushed_alone(
    hub: LocalHub, base: TransRecModel, tmp_path: Path, way: str, options: dict[str, bool]
) -> None:
    model = with_adapter(base, way)
    before, base_before = trained(model), frozen(model)
    trainer = trainer_of(model, tmp_path, push_to_hub=True, hub_model_id=ADAPTER, learning_rate=0.01, **options)
    trainer.train()
    trainer.push_to_hub()
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())
    base_after = frozen(model)
    assert all(torch.equal(value, base_after[name]) for name, value in base_before.items()), "the base is as it was"

    files = hub.files(ADAPTER)
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= files.keys()
    assert not [name for name in files if name.endswith(tuple(pattern[1:] for pattern in PICKLES))]
    assert "config.json" not in files and "model.safetensors" not in files, "the adapter goes alone"
    assert sum(tensor.numel() for tensor in load(files["adapter_model.safetensors"]).values()) == sum(
        value.numel() for value in trained(model).values()
    )

    mine = Recommender(model, ItemSource(make_catalogue(), make_processor()))  # type: ignore[arg-type]
    theirs = Recommender.from_pretrained(ADAPTER, make_catalogue())
    by_peft = PeftModel.from_pretrained(TransRecModel.from_pretrained(BASE), ADAPTER)
    for loaded in (theirs, Recommender(by_peft, ItemSource(make_catalogue(), make_processor()))):
        assert torch.equal(loaded.item_embeds, mine.item_embeds)
        assert [item.item_id for item in loaded.recommend(HISTORY)] == [
            item.item_id for item in mine.recommend(HISTORY)
        ]
    untouched = Recommender(TransRecModel.from_pretrained(BASE), ItemSource(make_catalogue(), make_processor()))
    assert not torch.allclose(untouched.item_embeds, mine.item_embeds)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_and_best_adapters_are_loaded(base: TransRecModel, tmp_path: Path, way: str) -> None:
    trainer = trainer_of(with_adapter(base, way), tmp_path, learning_rate=0.01, num_train_epochs=3)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    expected = trained(trainer.model)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    trainer._load_from_checkpoint(best)
    found = trained(trainer.model)
    assert all(torch.equal(value, found[name]) for name, value in expected.items()), (
        "the best one was loaded at the end"
    )

    resumed = trainer_of(
        with_adapter(TransRecModel.from_pretrained(BASE), way), tmp_path, learning_rate=0.01, num_train_epochs=4
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == 4


def test_an_adapter_says_what_is_trained(base: TransRecModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has an adapter, which decides what is trained: leave out trainable_blocks"):
        trainer_of(with_adapter(base, "add_adapter"), tmp_path, trainable_blocks=1)


def test_index_with_an_adapter(hub: LocalHub, base: TransRecModel) -> None:
    recommender = Recommender(with_adapter(base, "add_adapter"), ItemSource(make_catalogue(), make_processor()))  # type: ignore
    recommender.push_to_hub(ADAPTER)
    assert "config.json" not in hub.files(ADAPTER)
    found = Recommender.from_pretrained(ADAPTER)
    assert [item.item_id for item in found.recommend(HISTORY)] == [
        item.item_id for item in recommender.recommend(HISTORY)
    ]
    assert_same_weights(found.model.item_encoder, recommender.model.item_encoder)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_may_have_any_name(hub: LocalHub, base: TransRecModel, tmp_path: Path, way: str) -> None:
    model: Any = base
    if way == "get_peft_model":
        model = get_peft_model(base, lora(), adapter_name="fashion")
    else:
        model.add_adapter(lora(), adapter_name="fashion")
    trainer = trainer_of(model, tmp_path, learning_rate=0.01)
    trainer.train()
    trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "fashion").exists()
    items = ItemSource(make_catalogue(), make_processor())
    mine, theirs = Recommender(model, items), Recommender.from_pretrained(str(tmp_path), make_catalogue())
    assert torch.equal(theirs.item_embeds, mine.item_embeds)


def test_of_several_adapters_the_active_one_is_trained_and_saved(base: TransRecModel, tmp_path: Path) -> None:
    model = get_peft_model(base, lora(), adapter_name="one")
    model.add_adapter("two", lora())
    model.set_adapter("two")
    before = {name: value.clone() for name, value in model.state_dict().items() if ".one." in name}
    trainer = trainer_of(model, tmp_path, learning_rate=0.01, num_train_epochs=1)
    trainer.train()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    saved = load(next(tmp_path.glob("checkpoint-*/adapter_model.safetensors")).read_bytes())
    name = next(name for name in saved if "lora_B" in name)
    assert torch.equal(saved[name], model.state_dict()[name.replace(".weight", ".two.weight")])


def test_several_adapters_at_a_time_are_refused(base: TransRecModel, tmp_path: Path) -> None:
    options = {"modules_to_save": None}
    model = get_peft_model(base, lora(**options), adapter_name="one")
    model.add_adapter("two", lora(**options))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="only one adapter can be trained at a time"):
        trainer_of(model, tmp_path)


def test_an_adapter_of_the_task_of_encoders_is_trained(base: TransRecModel, tmp_path: Path) -> None:
    model = get_peft_model(base, lora(task_type="FEATURE_EXTRACTION"))
    trainer = trainer_of(model, tmp_path, learning_rate=0.01)
    before = trained(model)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_on_a_base_that_was_never_saved_is_refused(tmp_path: Path, way: str) -> None:
    model = with_adapter(make_model(), way)
    with pytest.raises(ValueError, match=r"the model under the adapter was never saved.*save_pretrained"):
        trainer_of(model, tmp_path)
    options = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "num_train_epochs": 1}
    trainer = trainer_of(model, tmp_path, **options)
    trainer.train()  # and then merged, say
    with pytest.raises(ValueError, match="the model under the adapter was never saved"):
        trainer.save_model()


def test_tuning_that_would_add_such_an_adapter_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was never saved, .* as `transrec finetune` does"):
        trainer_of(make_model(), tmp_path, tuning="lora")


def test_a_run_that_would_push_an_adapter_of_a_folder_is_refused_before_training(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    model = TransRecModel.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"without the model under it, which is the folder .*base: push that folder"):
        trainer_of(model, tmp_path / "run", tuning="lora", push_to_hub=True, hub_model_id=ADAPTER)


def test_an_adapter_of_one_tower_alone_is_refused(base: TransRecModel, tmp_path: Path) -> None:
    base.item_encoder.text_model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"an adapter of text_model alone.*text_model\.\*query"):
        trainer_of(base, tmp_path)


def test_an_adapter_of_the_whole_model_may_be_in_one_tower(base: TransRecModel, tmp_path: Path) -> None:
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r".*text_model.*query"))
    trainer_of(model, tmp_path, num_train_epochs=1).train()
    assert all("text_model" in name for name in trained(model))


def test_a_merged_model_is_trained_again_when_told_so(base: TransRecModel, tmp_path: Path) -> None:
    model = get_peft_model(base, lora(modules_to_save=None)).merge_and_unload()
    with pytest.raises(ValueError, match=r"every parameter of the model is frozen.*requires_grad_\(True\)"):
        trainer_of(model, tmp_path)
    model.requires_grad_(True)
    trainer_of(model, tmp_path, num_train_epochs=1).train()


def test_an_adapter_of_another_shape_is_not_loaded(base: TransRecModel, tmp_path: Path) -> None:
    trainer = trainer_of(get_peft_model(base, lora()), tmp_path, num_train_epochs=1)
    trainer.train()
    for other in (lora(r=2), lora(target_modules=["query"])):
        again = trainer_of(get_peft_model(TransRecModel.from_pretrained(BASE), other), tmp_path, num_train_epochs=2)
        with pytest.raises(ValueError, match="holds an"):
            again.train(resume_from_checkpoint=True)
