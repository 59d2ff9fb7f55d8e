"""The store of frozen states: the same training without the frozen blocks, and never a state of something else."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import (
    BERT,
    DROPOUT,
    TEXT_TOWERS,
    VISION_TOWERS,
    make_batch,
    make_catalogue,
    make_config,
    make_model,
    make_processor,
    make_trainer,
)
from transformers import DebertaV2Config, MPNetConfig, SwinConfig, XLNetConfig

from transrec_hf import ItemSource, Recommender, TransRecModel, encode_catalogue
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.errors import InputError
from transrec_hf.items.encoding import item_loader, standardize_projections
from transrec_hf.items.preparing import TextPreparation
from transrec_hf.items.store import ActivationStore
from transrec_hf.model.configuration_transrec import TEXT_POOLINGS


FAMILIES = [{"text_config": text} for text in TEXT_TOWERS] + [{"vision_config": image} for image in VISION_TOWERS]


def make_frozen(trainable_blocks: int = 1, **fields: object) -> TransRecModel:
    model = make_model(**fields)
    model.freeze_towers(trainable_blocks)
    return model


def make_store(folder: Path, model: TransRecModel, catalogue: Catalogue, max_text_length: int = 16) -> ActivationStore:
    processor = make_processor(model.config.modalities)
    processor.max_text_length = max_text_length
    return ActivationStore(folder, model, ItemSource(catalogue, processor))


def gradients(model: TransRecModel, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trainable_blocks", [0, 1])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: next(iter(family.values())))
def test_losses_and_gradients_are_those_without_the_store(tmp_path, catalogue, family, trainable_blocks):
    kinds = {**TEXT_TOWERS, **VISION_TOWERS}
    towers = {name: kinds[tower]() if isinstance(tower, str) else tower for name, tower in family.items()}
    model = make_frozen(trainable_blocks, config=make_config(**towers)).train()
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    without = gradients(model, make_batch(model.config, catalogue=catalogue))
    with_store = gradients(model, make_batch(model.config, catalogue=catalogue, source=store.source))
    assert without.keys() == with_store.keys()
    for name, value in without.items():
        torch.testing.assert_close(with_store[name], value, atol=1e-5, rtol=1e-4, msg=name)


TUPLES = {
    "mpnet": lambda: {"text_config": MPNetConfig(**BERT, pad_token_id=0)},
    "deberta_v2": lambda: {
        "text_config": DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    },
    "swin": lambda: {
        "vision_config": SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=2
        )
    },
}


@pytest.mark.parametrize("trainable_blocks", [0, 1])
@pytest.mark.parametrize("family", TUPLES)
def test_blocks_may_hand_on_tuples(tmp_path, catalogue, family, trainable_blocks):
    """And what such towers register after their blocks, though all of them read it, is frozen with the lower ones."""
    test_losses_and_gradients_are_those_without_the_store(tmp_path, catalogue, TUPLES[family](), trainable_blocks)


@pytest.mark.parametrize(
    ("family", "trainable_blocks"),
    [("minilm", 0), ("minilm", 1), ("minilm", 2), ("modernbert", 0), ("modernbert", 1)],
)
def test_states_of_several_depths_are_stored_too(tmp_path, catalogue, family, trainable_blocks):
    """Some of them below the frozen blocks, some above, and pooled where all are."""
    settings = {"text_config": TEXT_TOWERS[family](), "text_depths": 3}
    settings["vision_config"] = VISION_TOWERS["vit"](num_hidden_layers=3)
    test_losses_and_gradients_are_those_without_the_store(tmp_path, catalogue, settings, trainable_blocks)
    last = make_frozen(trainable_blocks, config=make_config(**{**settings, "text_depths": 1}))
    assert len(make_store(tmp_path, last, catalogue).missing_rows())  # other depths are another store


def test_a_tower_that_cannot_go_on_from_states_is_refused(tmp_path, catalogue):
    config = XLNetConfig(vocab_size=13, d_model=16, n_layer=2, n_head=2, d_inner=24)  # its states are tokens by texts
    model = make_frozen(config=make_config("text", text_config=config))
    with pytest.raises(ValueError, match=r"XLNetModel cannot continue from stored states.*leave out activation_store"):
        make_store(tmp_path, model, make_catalogue(kinds=("text",)))


@pytest.mark.parametrize("pooling", TEXT_POOLINGS)
def test_of_a_tower_that_is_frozen_whole_one_state_is_stored(tmp_path, catalogue, pooling):
    model = make_frozen(0, text_pooling=pooling)
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    parts = store.source.batch(np.arange(len(catalogue))).parts
    dims = {name: {states.dim() for states in part.values} for name, part in parts.items()}
    assert dims == {"text": {3} if pooling == "attention" else {2}, "image": {2}}
    other = make_frozen(0, text_pooling="cls" if pooling == "mean" else "mean")
    assert len(make_store(tmp_path, other, catalogue).missing_rows())  # another pooling is another store


def test_the_catalogue_is_encoded_the_same_from_the_store(tmp_path, catalogue, processor):
    model = make_frozen()
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    expected = encode_catalogue(model, ItemSource(catalogue, processor))
    torch.testing.assert_close(encode_catalogue(model, store.source), expected)


def test_a_run_its_evaluation_and_serving_share_it(tmp_path):
    trainer = make_trainer(tmp_path / "run", trainable_blocks=1, activation_store=str(tmp_path / "store"))
    trainer.train()
    trainer.save_model()
    files = set(tmp_path.glob("store/**/*.safetensors"))
    model, catalogue = TransRecModel.from_pretrained(tmp_path / "run"), trainer.catalogue
    model.freeze_towers(1)
    store = ActivationStore(tmp_path / "store", model, ItemSource(catalogue, trainer.processing_class))
    assert not len(store.missing_rows())
    served = Recommender(model, store.source)
    assert set(tmp_path.glob("store/**/*.safetensors")) == files != set()
    expected = Recommender(model, ItemSource(catalogue, trainer.processing_class))
    torch.testing.assert_close(served.item_embeds, expected.item_embeds)


def test_a_store_that_is_not_filled_says_so(tmp_path, catalogue):
    model = make_frozen()
    store = make_store(tmp_path, model, catalogue)
    with pytest.raises(InputError, match=r"states of \d+ items are not stored yet: call fill"):
        encode_catalogue(model, store.source)


def test_it_is_filled_with_new_items_only(tmp_path, processor, monkeypatch):
    tokenised, made = set(), TextPreparation.__init__

    def make(self, items, *args):
        tokenised.add(len(items))
        made(self, items, *args)

    monkeypatch.setattr(TextPreparation, "__init__", make)
    model, few, all_items = make_frozen(), make_catalogue(6), make_catalogue(12)
    make_store(tmp_path, model, few).fill()
    store = make_store(tmp_path, model, all_items)
    assert list(store.missing_rows()) == list(range(6, 12))
    before = set(tmp_path.rglob("*.safetensors"))
    store.fill()
    assert not len(store.missing_rows())
    assert before < set(tmp_path.rglob("*.safetensors"))
    again = make_store(tmp_path, model, all_items)
    assert not len(again.missing_rows())
    again.fill()
    assert tokenised == {6}  # never all twelve
    monkeypatch.undo()
    expected = encode_catalogue(model, ItemSource(all_items, processor))
    torch.testing.assert_close(encode_catalogue(model, again.source), expected)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def write_foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def write_lies(path: Path) -> None:
    shard = load_file(path)
    save_file(shard | {"lengths": shard["lengths"] + 1}, path)


def write_words(path: Path) -> None:
    path.write_text("no file of ours")


@pytest.mark.parametrize(
    "damage", [cut_off, flip_a_bit, write_foreign, write_lies, write_words], ids=lambda f: f.__name__
)
def test_a_damaged_file_is_named(tmp_path, catalogue, damage):
    model = make_frozen()
    make_store(tmp_path, model, catalogue).fill()
    path = shards(tmp_path)[0]
    damage(path)
    with pytest.raises(InputError, match=rf"{path.name}: is a damaged file of an activation store.*Delete it"):
        make_store(tmp_path, model, catalogue)
    path.unlink()
    store = make_store(tmp_path, model, catalogue)
    assert len(store.missing_rows())
    store.fill()
    assert not len(store.missing_rows())


def test_states_that_are_not_finite_are_not_stored(tmp_path, catalogue):
    model = make_frozen()
    model.item_encoder.text_model.embeddings.LayerNorm.bias.data[0] = torch.nan
    with pytest.raises(InputError, match=r"item item-\d+: the text tower returns numbers that are not finite"):
        make_store(tmp_path, model, catalogue).fill(batch_size=3)


@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_states_are_not_read_by_blocks_that_are_trained(tmp_path, catalogue, trainable_blocks):
    model = make_frozen(trainable_blocks)
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    assert store.is_current
    model.freeze_towers(None)
    assert not store.is_current
    with pytest.raises(RuntimeError, match="make a new ActivationStore after unfreezing towers"):
        encode_catalogue(model, store.source)


def test_more_blocks_may_be_frozen_than_were_stored(tmp_path, catalogue, processor):
    model = make_frozen(1, text_pooling="attention")
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    expected = encode_catalogue(model, ItemSource(catalogue, processor))
    model.freeze_towers(0)
    torch.testing.assert_close(encode_catalogue(model, store.source), expected)


def test_a_trainer_makes_a_new_store_when_towers_are_unfrozen(tmp_path):
    trainer = make_trainer(tmp_path / "run", trainable_blocks=0, activation_store=str(tmp_path / "store"))
    trainer.evaluate()
    trainer.model.freeze_towers(1)
    trainer.train()
    assert trainer.store is not None and trainer.store.depths == {"text": 1, "image": 1}


def test_it_goes_to_workers_that_are_spawned_without_its_states(tmp_path, catalogue):
    model = make_frozen()
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    sent = pickle.dumps(store.source.preparations)
    for states in store.states.values():
        assert states.files
        assert not any(bytes(file.flatten()[:32].view(torch.uint8).numpy()) in sent for file in states.files.values())
    rows = np.arange(len(catalogue))
    for name, preparation in pickle.loads(sent).items():
        own = rows[catalogue.has(name)]
        found, expected = (which.states(own) for which in (preparation, store.states[name]))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
def test_the_store_goes_to_workers_that_are_spawned(tmp_path, catalogue):
    model = make_frozen()
    store = make_store(tmp_path, model, catalogue)
    store.fill()
    loader = item_loader(store.source, np.arange(len(catalogue)), 4, num_workers=1)
    loader.multiprocessing_context = "spawn"
    assert torch.cat([batch.item_rows for batch in loader]).tolist() == list(range(len(catalogue)))


def test_what_a_killed_process_left_is_not_read(tmp_path, catalogue, monkeypatch):
    monkeypatch.setattr("transrec_hf.items.store.FILE_BYTES", 1000)
    model = make_frozen()
    store = make_store(tmp_path, model, catalogue)
    store.fill(batch_size=4)
    for path in sorted(tmp_path.rglob("*.safetensors"))[:2]:
        path.with_suffix(".writing").write_bytes(path.read_bytes()[:100])
        path.unlink()
    again = make_store(tmp_path, model, catalogue)
    assert 0 < len(again.missing_rows()) < len(catalogue)
    again.fill()
    assert not len(again.missing_rows())


def test_two_processes_may_fill_one_store(tmp_path, catalogue):
    model = make_frozen()
    first, second = make_store(tmp_path, model, catalogue), make_store(tmp_path, model, catalogue)
    first.fill()
    second.fill()  # it does not know yet that everything is there
    rows = np.arange(len(catalogue))
    parts = make_store(tmp_path, model, catalogue).source.batch(rows).parts
    for name, part in first.source.batch(rows).parts.items():
        torch.testing.assert_close(parts[name].values, part.values)


@dataclass
class Rank:
    """What the store asks of an `Accelerator`."""

    process_index: int
    num_processes: int = 2

    def wait_for_everyone(self) -> None:
        pass


def test_a_process_that_comes_late_does_its_whole_share(tmp_path, catalogue):
    model = make_frozen()
    for rank in (0, 1):  # the second one looks when the first has written
        make_store(tmp_path, model, catalogue).fill(accelerator=Rank(rank))
    assert not len(make_store(tmp_path, model, catalogue).missing_rows())


def change_frozen_weight(model: TransRecModel) -> None:
    with torch.no_grad():
        model.item_encoder.text_model.embeddings.word_embeddings.weight.add_(1)
        model.item_encoder.vision_model.embeddings.cls_token.add_(1)


def change_trained_weight(model: TransRecModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (change_frozen_weight, True),
        (lambda model: model.freeze_towers(0), True),
        (lambda model: model.to(torch.float64), True),
        (change_trained_weight, False),
    ],
    ids=["frozen weights", "depth", "dtype", "trained weights"],
)
def test_states_are_used_as_long_as_nothing_below_them_changes(tmp_path, catalogue, change, stale):
    model = make_frozen()
    make_store(tmp_path, model, catalogue).fill()
    change(model)
    assert len(make_store(tmp_path, model, catalogue).missing_rows()) == (len(catalogue) if stale else 0)


def test_another_preprocessing_makes_another_store(tmp_path, catalogue):
    model = make_frozen()
    make_store(tmp_path, model, catalogue).fill()
    missing = make_store(tmp_path, model, catalogue, max_text_length=5).missing_rows()
    assert list(missing) == list(np.flatnonzero(catalogue.has_text))


def test_a_changed_item_is_computed_again(tmp_path, catalogue):
    model = make_frozen()
    make_store(tmp_path, model, catalogue).fill()
    texts = [text and f"new {text}" for text in catalogue.items["text"]]
    items = catalogue.items.remove_columns("text").add_column("text", texts)
    assert list(make_store(tmp_path, model, Catalogue(items)).missing_rows()) == list(
        np.flatnonzero(catalogue.has_text)
    )


def test_a_tower_without_a_frozen_block_is_refused(tmp_path, catalogue):
    with pytest.raises(ValueError, match=r"none of the 2 blocks of the text tower is frozen.*lower trainable_blocks"):
        make_store(tmp_path, make_frozen(trainable_blocks=2), catalogue)


def test_a_run_with_a_store_is_a_run_without(tmp_path):
    config = make_config(**DROPOUT)  # the upper block's towers and the user encoder draw the same numbers
    options = {"trainable_blocks": 1, "learning_rate": 1e-3}  # at a higher one Adam makes much of another rounding
    logs = []
    for name, store in (("without", None), ("with", str(tmp_path / "store"))):
        trainer = make_trainer(tmp_path / name, config, activation_store=store, **options)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [trainer.evaluate()])
    assert not any(isinstance(part, TextPreparation) for part in trainer.source.preparations.values())
    metrics = [log.pop() for log in logs]
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)
    assert metrics[0]["eval_ndcg@10"] == pytest.approx(metrics[1]["eval_ndcg@10"], abs=1e-5)


@pytest.mark.parametrize("hidden", [None, 12])
def test_fresh_projections_are_standardised_and_trained_ones_left_alone(catalogue, processor, hidden):
    torch.manual_seed(0)
    model = TransRecModel(make_config(projection_hidden_size=hidden))
    standardize_projections(model, ItemSource(catalogue, processor))
    batch = processor(text=[catalogue.text(row) for row in np.flatnonzero(catalogue.has_text)])
    vectors = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(vectors.mean(dim=0), torch.zeros(vectors.shape[1]), atol=1e-5, rtol=0)
    assert vectors.var(dim=0).sum().item() == pytest.approx(1, abs=1e-4)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    standardize_projections(model, ItemSource(catalogue, processor))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
