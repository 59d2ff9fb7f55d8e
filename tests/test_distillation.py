"""Distillation: students are smaller, say nearly what their teacher says, and are checkpoints like any other."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from testing_utils import (
    TEXT_TOWERS,
    USER_ENCODER,
    VISION_TOWERS,
    make_catalogue,
    make_processor,
    make_split,
    make_title,
)

from transrec_hf import DataError, ItemSource, TransRecConfig, TransRecModel, encode_catalogue
from transrec_hf.commands.distill import distill
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.model.towers_transrec import tower_blocks
from transrec_hf.publishing.checkpoint import load_checkpoint, save_checkpoint
from transrec_hf.training.distilling import (
    distill_items,
    distill_users,
    evenly,
    fewer_blocks,
    make_student,
    vector_loss,
)


DESIGN = {"item_map": "whitened", "similarity": "cosine", "content_prior": True}


def make_teacher(**fields) -> TransRecModel:
    torch.manual_seed(0)
    text = TEXT_TOWERS["bert"](num_hidden_layers=4)
    return TransRecModel(TransRecConfig(**{**USER_ENCODER, **DESIGN, "text_config": text, **fields})).eval()


@pytest.fixture(scope="module")
def source() -> ItemSource:
    return ItemSource(make_catalogue(60, kinds=("text",)), make_processor(("text",)))


@pytest.fixture
def teacher(source) -> TransRecModel:
    model = make_teacher()
    standardize_projections(model, source)
    return model


def cosine(model: TransRecModel, other: TransRecModel, source: ItemSource) -> float:
    found, wanted = (encode_catalogue(each, source) for each in (model, other))
    return float(torch.nn.functional.cosine_similarity(found, wanted).mean())


def test_blocks_are_left_out_evenly_and_the_others_stay():
    assert [evenly(6, number) for number in (1, 2, 3, 6)] == [[0], [0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]]
    tower = make_teacher().item_encoder.text_model
    smaller = fewer_blocks(tower, [0, 3])
    assert smaller.config.num_hidden_layers == 2 and len(tower_blocks(smaller)) == 2
    for old, new in ((0, 0), (3, 1)):
        before, after = (tower_blocks(each)[place].state_dict() for each, place in ((tower, old), (smaller, new)))
        assert all(torch.equal(before[name], after[name]) for name in before)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    whole = fewer_blocks(tower, range(4)).eval()
    torch.testing.assert_close(whole(**batch).last_hidden_state, tower(**batch).last_hidden_state)


def test_a_tower_of_blocks_that_are_not_alike_stays_whole():
    resnet = VISION_TOWERS["resnet"]()
    with pytest.raises(ValueError, match="or a smaller tower"):
        make_student(TransRecModel(TransRecConfig(**{**USER_ENCODER, "vision_config": resnet})), num_blocks=1)
    teacher = make_teacher(vision_config=resnet)
    source = ItemSource(make_catalogue(20), make_processor())
    standardize_projections(teacher, source)
    student = make_student(teacher, num_blocks=1)
    images = student.item_encoder.vision_model.state_dict()
    told = distill_items(student, teacher, source, epochs=1)
    assert told["image"] == 1.0 > told["text"]
    after = teacher.item_encoder.vision_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in images.items())


def test_a_student_with_all_blocks_would_be_no_student(teacher):
    with pytest.raises(ValueError, match="as large as its teacher"):
        make_student(teacher, num_blocks=4)
    with pytest.raises(ValueError, match="no vision_model, but text_model"):
        make_student(teacher, vision_model=teacher.item_encoder.text_model)
    with pytest.raises(ValueError, match="ID vectors"):
        make_student(make_teacher(num_items=60), num_blocks=1)


@pytest.mark.parametrize("item_map", ["whitened", "linear"])
def test_a_student_learns_the_vectors_of_its_teacher(item_map, source):
    teacher = make_teacher(item_map=item_map)
    standardize_projections(teacher, source)
    with torch.no_grad():  # a teacher that has learned something
        for parameter in teacher.item_encoder.text_projection.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = make_student(teacher, num_blocks=1)
    assert student.num_parameters() < teacher.num_parameters()
    start = cosine(student, teacher, source)
    told = distill_items(student, teacher, source, epochs=30, batch_size=19, tower_learning_rate=1e-3)
    assert cosine(student, teacher, source) > max(start + 0.3, 0.7)
    assert 0.5 < told["text"] <= 1
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    own = student.user_encoder.state_dict()
    assert all(torch.equal(value, before[f"user_encoder.{name}"]) for name, value in own.items())


def test_without_epochs_the_axes_alone_are_fitted(teacher, source):
    student = make_student(teacher, num_blocks=2)
    tower = {name: value.clone() for name, value in student.item_encoder.text_model.state_dict().items()}
    start = cosine(student, teacher, source)
    distill_items(student, teacher, source, epochs=0)
    assert cosine(student, teacher, source) > start
    after = student.item_encoder.text_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in tower.items())


def test_the_loss_is_least_at_the_vectors_of_the_teacher():
    wanted = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    other = wanted + 0.5 * torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    assert vector_loss(3 * wanted, wanted) < 1e-5 < vector_loss(other, wanted)


def test_vectors_of_another_width_are_refused(teacher, source):
    with pytest.raises(ValueError, match="16 numbers and the student's 8"):
        distill_items(make_teacher(hidden_size=8, user_hidden_size=16), teacher, source)


def test_user_states_are_learned_too(teacher, source):
    student = make_student(teacher, num_blocks=1)
    distill_items(student, teacher, source, epochs=0)
    with torch.no_grad():
        student.content_prior.weight.add_(3)
    train = make_split(40, 60).train
    first = distill_users(student, teacher, source, train, epochs=1, learning_rate=1e-9)
    items = {name: value.clone() for name, value in student.item_encoder.state_dict().items()}
    assert distill_users(student, teacher, source, train, epochs=30, learning_rate=1e-2) > first
    after = student.item_encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in items.items())


def test_the_command_leaves_a_checkpoint(tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids = [f"item-{row}" for row in range(30)]
    (tmp_path / "data").mkdir()
    table = pa.table({"item_id": ids, "text": [make_title(rng) for _ in ids]})
    pq.write_table(table, tmp_path / "data" / "items.parquet")
    visits = {"user_id": [str(row // 5) for row in range(40)], "item_id": rng.choice(ids, 40), "timestamp": range(40)}
    pq.write_table(pa.table(visits), tmp_path / "data" / "interactions.parquet")
    teacher, processor = make_teacher(popularity_prior=True), make_processor(("text",))
    save_checkpoint(tmp_path / "teacher", teacher, processor)
    ItemStatistics(np.array(ids), np.arange(30)).save(tmp_path / "teacher")
    place = [str(tmp_path / "teacher"), "--data", str(tmp_path / "data"), "--use_cpu"]
    out = ["--output_dir", str(tmp_path / "student"), "--max_text_length", "9"]
    report = distill([*place, *out, "--num_blocks", "2", "--epochs", "1", "--user_epochs", "1"])
    assert report == json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert report["parameters"]["student"] < report["parameters"]["teacher"] and "cosine_of_states" in report
    student, own = load_checkpoint(str(tmp_path / "student"))
    assert len(tower_blocks(student.item_encoder.text_model)) == 2 and own.max_text_length == 9
    assert ItemStatistics.from_pretrained(tmp_path / "student").train_counts.tolist() == list(range(30))
    with pytest.raises(DataError, match="already holds a model"):
        distill([*place, *out, "--num_blocks", "2"])
    with pytest.raises(DataError, match="as large as its teacher"):
        distill([*place, "--output_dir", str(tmp_path / "no"), "--num_blocks", "4"])
    for rate in ("nan", "-1", "inf"):
        with pytest.raises(DataError, match="tower_learning_rate must be a number from 0"):
            distill([*place, "--output_dir", str(tmp_path / "no"), "--num_blocks", "1", "--tower_learning_rate", rate])
    with pytest.raises(DataError, match=r"not finite. Lower learning_rate"):
        distill([*place, "--output_dir", str(tmp_path / "no"), "--num_blocks", "1", "--learning_rate", "1e30"])
    with pytest.raises(DataError, match="give num_blocks"):
        distill([*place, "--output_dir", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
