"""Codes as what a model reads of an item: the reader, the table of their vectors, its start, transfer, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from testing_utils import (
    TEXT_TOWERS,
    USER_ENCODER,
    make_catalogue,
    make_processor,
    make_split,
    make_title,
    make_tokenizer,
)

from transrec_hf import (
    Catalogue,
    DataError,
    ItemSource,
    Recommender,
    TransRecConfig,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    encode_catalogue,
    load_catalogue,
)
from transrec_hf.commands.codes import codes as codes_command
from transrec_hf.commands.runs import finetune, pretrain
from transrec_hf.items.codes import ItemQuantizer
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.items.semantic_ids import load_semantic_ids
from transrec_hf.publishing.checkpoint import check_fits, load_checkpoint
from transrec_hf.training.transfer import start_from


NUM, SIZE = 3, 8
WIDTH = 16  # of item vectors in USER_ENCODER


def vectors_of(num_items: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_items, WIDTH, generator=torch.Generator().manual_seed(seed))


def write_domain(folder: Path, codes: torch.Tensor, quantizer: ItemQuantizer | None = None) -> Catalogue:
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"item-{row}" for row in range(len(codes))]
    pq.write_table(pa.table({"item_id": ids, "codes": codes.tolist()}), folder / "items.parquet")
    if quantizer is not None:
        quantizer.save(folder)
    return load_catalogue(folder)


def make_model(seed: int = 0, **fields) -> TransRecModel:
    torch.manual_seed(seed)
    design = {"item_map": "whitened", "similarity": "cosine", "content_prior": True, "popularity_prior": False}
    settings = {**USER_ENCODER, **design, "num_codebooks": NUM, "codebook_size": SIZE, **fields}
    return TransRecModel(TransRecConfig(**settings)).eval()


def make_source(catalogue: Catalogue) -> ItemSource:
    return ItemSource(catalogue, TransRecProcessor(num_codebooks=NUM, codebook_size=SIZE))


@pytest.fixture(scope="module")
def quantizer() -> ItemQuantizer:
    return ItemQuantizer.fit(vectors_of(), NUM, SIZE)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[0, 1], [2, -1], None], r"row 2.*'item-1'.*below 0"),
        ([[0, 1], [2, 70_000], None], r"row 2.*'item-1'.*above 65535"),
        ([[0, 1], [2, 3], [1]], r"row 3.*'item-2'.*1 numbers, but most items have 2"),
        ([[0, 1], [2, None], [1, 1]], r"row 2.*'item-1'.*missing"),
        (["1 2", "3 4", "5 6"], "Write a list of whole numbers"),
        ([[0.5, 1.0], [2.0, 3.0], [1.0, 1.0]], "Write a list of whole numbers"),
    ],
)
def test_bad_codes_are_named_by_row_and_item(column, message, tmp_path):
    table = pa.table({"item_id": ["item-0", "item-1", "item-2"], "text": ["a b"] * 3, "codes": column})
    pq.write_table(table, tmp_path / "items.parquet")
    with pytest.raises(DataError, match=message):
        load_catalogue(tmp_path)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 2), dtype=int), "2 rows of codes for 3 items"),
        (np.zeros((3, 2)), "must be whole numbers"),
        (np.zeros(3, dtype=int), "must be whole numbers of the shape"),
        (np.full((3, 2), -1), "row 1 is out of range"),
        (np.full((3, 2), 65_536), "row 1 is out of range, from 0 to 65535"),
    ],
)
def test_items_take_only_codes_that_they_could_be_read_with(codes, message, tmp_path):
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], "text": ["x"] * 3}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=message):
        load_catalogue(tmp_path).with_codes(codes)


def test_they_come_from_json_lines_and_a_selection_keeps_its_own(tmp_path):
    lines = [{"item_id": f"i{row}", "codes": [row, 7 - row]} for row in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    catalogue = load_catalogue(tmp_path / "items.jsonl")
    assert catalogue.read(1)["codes"].tolist() == [1, 6]
    chosen = catalogue.select(np.array([2, 0]))
    codes: Any = chosen.contents["codes"]
    assert codes.largest.tolist() == [5, 7] and chosen.read(0)["codes"].tolist() == [2, 5]
    (tmp_path / "items.jsonl").write_text('{"item_id": "x", "codes": [1, "2"]}')
    with pytest.raises(DataError, match="no list of whole numbers"):
        load_catalogue(tmp_path / "items.jsonl")


def test_what_an_item_says_is_the_mean_of_the_vectors_of_its_codes(tmp_path, quantizer):
    catalogue = write_domain(tmp_path, quantizer.encode(vectors_of()))
    model = make_model(item_map="linear", similarity="dot", content_prior=False)
    table = model.item_encoder.codes_table.vectors.weight.view(NUM, SIZE, WIDTH)
    first = catalogue.read(4)["codes"]
    expected = torch.stack([table[i, code] for i, code in enumerate(first)]).mean(dim=0)
    batch = make_source(catalogue).batch(np.array([4, 5]))
    found = model.get_item_features(batch)[0]
    torch.testing.assert_close(found, model.item_encoder.codes_projection(expected))
    flat = TransRecProcessor(num_codebooks=NUM, codebook_size=SIZE)(
        codes=[catalogue.read(row)["codes"] for row in (4, 5)]
    )
    torch.testing.assert_close(model.get_item_features(**flat), model.get_item_features(batch))


@pytest.mark.parametrize("method", ["residual", "product", "learned"])
def test_a_new_table_begins_as_what_the_codes_stand_for(method, tmp_path):
    vectors = vectors_of(40)
    quantizer = ItemQuantizer.fit(vectors, 4, SIZE, method, iterations=3)
    codes = quantizer.encode(vectors)
    catalogue = write_domain(tmp_path, codes, quantizer)
    model = make_model(num_codebooks=4)
    source = ItemSource(catalogue, TransRecProcessor(num_codebooks=4, codebook_size=SIZE))
    standardize_projections(model, source)
    torch.testing.assert_close(model.item_encoder.codes_table(codes), quantizer.decode(codes), atol=1e-4, rtol=1e-4)
    assert model.config.quantizer_hash == quantizer.hash
    with torch.no_grad():
        model.item_encoder.codes_table.vectors.weight.zero_()
    standardize_projections(model, source)
    assert not model.item_encoder.codes_table.vectors.weight.any(), "what was trained must stay"


def test_a_table_of_another_width_is_refused_with_the_mend(tmp_path, quantizer):
    source = make_source(write_domain(tmp_path, quantizer.encode(vectors_of()), quantizer))
    wrong = make_model(hidden_size=32, user_hidden_size=16)
    for refuse in (lambda: standardize_projections(wrong, source), lambda: check_fits(wrong, source.catalogue)):
        with pytest.raises(DataError, match="--hidden_size 16 --num_codebooks 3 --codebook_size 8"):
            refuse()


def test_codes_that_mean_something_else_are_refused(tmp_path, quantizer):
    codes = quantizer.encode(vectors_of())
    model = make_model()
    catalogue = write_domain(tmp_path / "own", codes, quantizer)
    standardize_projections(model, make_source(catalogue))
    check_fits(model, catalogue)
    other = ItemQuantizer.fit(vectors_of(seed=1), NUM, SIZE)
    with pytest.raises(DataError, match=r"another quantizer .*--quantizer"):
        check_fits(model, write_domain(tmp_path / "other", codes, other))
    check_fits(model, write_domain(tmp_path / "unknown", codes))  # of which nothing is known
    with pytest.raises(DataError, match="items have 2 codes, but this model reads 3"):
        check_fits(model, write_domain(tmp_path / "short", codes[:, :2]))
    codes[5, 1] = SIZE
    with pytest.raises(DataError, match=r"row 6.*'item-5': code 8, of 0 to 7"):
        check_fits(model, write_domain(tmp_path / "large", codes))


def test_the_processor_refuses_what_the_table_lacks():
    processor = TransRecProcessor(num_codebooks=NUM, codebook_size=SIZE)
    for codes, message in (([[0, 1]], r"\(3,\) integers"), ([[0, 1, 8]], "to 8"), ([[0.0, 1.0, 2.0]], "integers")):
        with pytest.raises(ValueError, match=message):
            processor(codes=codes)


def train(model: TransRecModel, catalogue: Catalogue, folder: Path, **kwargs) -> TransRecTrainer:
    arguments = TransRecTrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **kwargs,
    )
    processor = make_source(catalogue).processor
    trainer = TransRecTrainer(model, arguments, catalogue=catalogue, split=make_split(), processing_class=processor)
    trainer.train()
    return trainer


def test_it_trains_is_saved_and_serves(tmp_path, quantizer):
    catalogue = write_domain(tmp_path / "data", quantizer.encode(vectors_of()), quantizer)
    trainer = train(make_model(), catalogue, tmp_path / "run")
    start = quantizer.code_vectors()
    moved = (trainer.model.item_encoder.codes_table.vectors.weight - start).abs().amax(dim=1)
    used = (quantizer.encode(vectors_of()) + torch.arange(NUM) * SIZE).unique()
    assert (moved[used] > 0).all()
    trainer.save_model()
    model, processor = load_checkpoint(str(tmp_path / "run"))
    assert model.config.quantizer_hash == quantizer.hash and not model.item_encoder.codes_table.is_new
    assert model.config.to_dict()["format_version"] == 2
    assert (processor.num_codebooks, processor.codebook_size) == (NUM, SIZE)
    served = Recommender.from_pretrained(tmp_path / "run", catalogue)
    assert len(served.recommend(["item-2", "item-0"], k=3)) == 3
    raw = {"codes": catalogue.read(2)["codes"].tolist()}
    assert served.similar_items(raw, k=2)[0].item_id == "item-2"
    with pytest.raises(DataError, match="whole numbers"):
        served.similar_items({"codes": [0, 1, -2]})


def test_only_the_table_is_learned_again_on_a_target(tmp_path, quantizer):
    source = write_domain(tmp_path / "source", quantizer.encode(vectors_of()), quantizer)
    target = write_domain(tmp_path / "target", quantizer.encode(vectors_of(seed=1)), quantizer)
    model = train(make_model(), source, tmp_path / "run").model
    kept = {name: value.clone() for name, value in model.named_parameters()}
    start = start_from(model, "user_encoder")
    assert "item_encoder.codes_table" in start.new
    standardize_projections(model, make_source(target))
    torch.testing.assert_close(model.item_encoder.codes_table.vectors.weight.data, quantizer.code_vectors())
    model = train(model, target, tmp_path / "again", tuning="codes").model
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, kept[name])}
    own = {name for name in kept if name.startswith("item_encoder.")}
    assert "item_encoder.codes_table.vectors.weight" in changed and changed <= own
    with pytest.raises(ValueError, match="reads no codes"):
        _tune_without_codes(tmp_path)


def _tune_without_codes(folder: Path) -> None:
    catalogue = make_catalogue(kinds=("text",))
    model = TransRecModel(TransRecConfig(**{**USER_ENCODER, "text_config": TEXT_TOWERS["bert"]()}))
    arguments = TransRecTrainingArguments(str(folder / "none"), tuning="codes", use_cpu=True, report_to="none")
    TransRecTrainer(
        model, arguments, catalogue=catalogue, split=make_split(), processing_class=make_processor(("text",))
    )


def write_texts(folder: Path, num_items: int = 24, seed: int = 0) -> Path:
    """A domain of texts with some interactions."""
    folder.mkdir()
    rng = np.random.default_rng(seed)

    texts = [make_title(rng) for _ in range(num_items)]
    ids = [f"item-{row}" for row in range(num_items)]
    pq.write_table(pa.table({"item_id": ids, "text": texts}), folder / "items.parquet")
    users, times = np.repeat(np.arange(8), 5), np.tile(np.arange(5), 8)
    visits = {"user_id": users.astype(str), "item_id": rng.choice(ids, len(users)), "timestamp": times}
    pq.write_table(pa.table(visits), folder / "interactions.parquet")
    return folder


def test_the_command_shares_codes_between_platforms(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tower = TransRecModel(TransRecConfig(**{**USER_ENCODER, "text_config": TEXT_TOWERS["bert"]()}))
    tower.item_encoder.text_model.save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    options = ["--text_model", str(tmp_path / "bert"), "--use_cpu"]
    source, target = write_texts(tmp_path / "source"), write_texts(tmp_path / "target", seed=1)
    sizes = ["--num_codebooks", "2", "--codebook_size", "8"]
    with monkeypatch.context() as patch:
        patch.delattr("transrec_hf.commands.codes.encode_catalogue")  # said before anything is encoded
        for wrong in (
            ["--codebook_size", "500"],
            ["--method", "product", "--num_codebooks", "7"],
            ["--num_codebooks", "0"],
        ):
            with pytest.raises(DataError, match=r"smaller codebook_size|equal parts|must be 1 or more"):
                codes_command([str(source), "--output_dir", str(tmp_path / "s"), *options, *sizes[2:], *wrong])
    report = codes_command([str(source), "--output_dir", str(tmp_path / "s"), *options, *sizes])
    assert 0 < report["usage_entropy"] <= 1 and report == json.loads((tmp_path / "s/item_quantizer.json").read_text())
    quantizer = ItemQuantizer.from_pretrained(tmp_path / "s")
    ids, found = load_semantic_ids(tmp_path / "s" / "semantic_ids.json")
    assert len(ids) == 24 and found.shape == (24, 3) and len(found.unique(dim=0)) == 24
    shared = ["--quantizer", str(tmp_path / "s")]
    codes_command([str(target), "--output_dir", str(tmp_path / "t"), *options, *shared])
    assert ItemQuantizer.from_pretrained(tmp_path / "t").hash == quantizer.hash
    catalogue = load_catalogue(tmp_path / "t")
    assert catalogue.has("codes").all() and catalogue.has("text").all()
    given = ["--semantic_ids", str(tmp_path / "s" / "semantic_ids.json")]
    report = codes_command([str(source), "--output_dir", str(tmp_path / "given"), *given])
    assert (report["num_codebooks"], report["collision_rate"]) == (3, 0)
    assert load_catalogue(tmp_path / "given").read(5)["codes"].tolist() == found[5].tolist()
    with pytest.raises(DataError, match="leave out the quantizer and the model"):
        codes_command([str(source), "--output_dir", str(tmp_path / "g"), *given, *options])

    quick = ["--num_train_epochs", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True"]
    width = ["--num_attention_heads", "2", "--user_hidden_size", "8"]
    pretrain([str(tmp_path / "s"), "--output_dir", str(tmp_path / "run"), *sizes, *width, *quick])
    model, processor = load_checkpoint(str(tmp_path / "run"))
    assert model.config.hidden_size == quantizer.size and model.config.modalities == ("codes",)
    assert model.config.quantizer_hash == quantizer.hash
    vectors = encode_catalogue(model, ItemSource(catalogue, processor))
    assert vectors.isfinite().all()
    again = ["--init", "user_encoder", "--tuning", "codes"]
    finetune(
        [str(tmp_path / "run"), "--data", str(tmp_path / "t"), "--output_dir", str(tmp_path / "tuned"), *again, *quick]
    )

    codes_command([str(target), "--output_dir", str(tmp_path / "u"), *options, *sizes])
    with pytest.raises(DataError, match="another quantizer"):
        finetune([str(tmp_path / "run"), "--data", str(tmp_path / "u"), "--output_dir", str(tmp_path / "no"), *quick])
    torch.manual_seed(1)
    other = TransRecModel(TransRecConfig(**{**USER_ENCODER, "text_config": TEXT_TOWERS["bert"]()}))
    other.item_encoder.text_model.save_pretrained(tmp_path / "bert")
    with pytest.raises(DataError, match="fitted on the vectors of another model"):
        codes_command([str(target), "--output_dir", str(tmp_path / "v"), *options, *shared])
    assert not (tmp_path / "v").exists()
