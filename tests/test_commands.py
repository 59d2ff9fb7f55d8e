"""The verbs of `transrec` that do the work, each run on a tiny demo world, and what they say about bad input."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

import transrec_cli
from transrec_cli import VERBS
from transrec_hf import (
    DataError,
    Recommender,
    TransRecConfig,
    TransRecModel,
    TransRecTrainer,
    load_catalogue,
    load_domain,
)
from transrec_hf.commands.index import line_of
from transrec_hf.commands.options import SplitArguments, as_time
from transrec_hf.commands.recommend import read_histories
from transrec_hf.commands.tables import read_table
from transrec_hf.data import demo
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.data.interactions import of_modality
from transrec_hf.items.store import content_vectors
from transrec_hf.publishing.checkpoint import load_checkpoint


ROOT = Path(__file__).parent.parent
QUICK = ("--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--logging_steps", "1")


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    """A demo world of a few dozen items and users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
        patch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=30))
        yield


@pytest.fixture(autouse=True)
def fresh_start(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each run is in an empty folder, not where somebody may have run the examples, and decides anew on the device."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo target as files, tiny towers, and a pre-trained model, which no test changes."""
    folder = tmp_path_factory.mktemp("examples")
    demo_world().target.save(folder / "target")
    config, processor = demo_config(), demo_processor()
    AutoModel.from_config(config.text_config).save_pretrained(folder / "bert")
    processor.tokenizer.save_pretrained(folder / "bert")
    AutoModel.from_config(config.vision_config).save_pretrained(folder / "vit")
    processor.image_processor.save_pretrained(folder / "vit")
    run("pretrain", "--data", "demo:source", "--output_dir", folder / "source", *QUICK)
    return folder


def launch(verb: str, folder: Path, *arguments: Any) -> Any:
    """What a verb returns when it runs in two processes."""
    driver, returned = folder / "driver.py", folder / "returned.json"
    driver.write_text(
        "import importlib, json, os, pathlib, sys\n"
        "room, verb, returned, *arguments = sys.argv[1:]\n"
        "value = getattr(importlib.import_module(f'transrec_hf.commands.{room}'), verb)(arguments)\n"
        "if os.environ['RANK'] == '0':\n"
        "    pathlib.Path(returned).write_text(json.dumps(value))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(driver)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, VERBS[verb][0], verb, returned, *arguments], check=True, env=environment)
    return json.loads(returned.read_text())


def run(verb: str, *arguments: Any) -> Any:
    """What a verb returns."""
    room = importlib.import_module(f"transrec_hf.commands.{VERBS[verb][0]}")
    return getattr(room, verb)([str(argument) for argument in arguments])


def command(*arguments: Any) -> int:
    """The exit code of `transrec` with these arguments."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["transrec", *map(str, arguments)])
        transrec_cli.main()
    return int(end.value.code or 0)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


# What they do


def test_pretrain_leaves_a_model_with_all_that_belongs_to_it(workplace: Path) -> None:
    folder = workplace / "source"
    model, processor = load_checkpoint(str(folder))
    assert model.config.modalities == ("text", "image") and processor is not None
    assert json.loads((folder / "data_statistics.json").read_text())["num_items"] == 48
    report = json.loads((folder / "report.json").read_text())
    assert set(report["baselines"]) == {"popularity", "repeat_last", "co_occurrence"}
    assert report["protocol"]["num_users"] == 40
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("**/.partial")) and not list(folder.glob("**/*.bin"))


def test_the_reported_model_is_the_saved_one(workplace: Path, tmp_path: Path) -> None:
    report = run(
        "evaluate", "--checkpoint", workplace / "source", "--data", "demo:source", "--output_file", tmp_path / "r.json"
    )
    trained = json.loads((workplace / "source" / "report.json").read_text())
    assert report["metrics"] == pytest.approx(trained["metrics"], abs=1e-6)
    assert report["slices"].keys() == trained["slices"].keys()
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report))


def test_finetune_reads_yaml_and_the_command_line_wins(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {
        "from_checkpoint": str(workplace / "source"),
        "items": str(workplace / "target" / "items.parquet"),
        "interactions": str(workplace / "target" / "interactions.parquet"),
        "output_dir": str(tmp_path / "run"),
        "objective": "cpc",
        "num_train_epochs": 7,
        "learning_rate": "1e-3",
        "trainable_blocks": 1,
        "max_text_length": 8,
        "bf16": True,
        "use_cpu": True,
        "save_total_limit": None,
        "save_strategy": "epoch",
        "protocol": "pmmrec",
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    report = run("finetune", tmp_path / "options.yaml", "--num_train_epochs", "1", "--objective=bpr")
    assert report["protocol"]["mask_history"] == "window"
    assert "co-occurrence" in capsys.readouterr().out
    arguments = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert (arguments["num_train_epochs"], arguments["learning_rate"]) == (1, 1e-3)
    assert arguments["save_total_limit"] is None
    model, processor = load_checkpoint(str(tmp_path / "run"))
    assert model.config.objective == "bpr" and processor is not None and processor.max_text_length == 8


def test_a_run_resumes(workplace: Path, tmp_path: Path) -> None:
    arguments = (
        "--from_checkpoint",
        workplace / "source",
        "--data",
        workplace / "target",
        "--output_dir",
        tmp_path,
        *QUICK,
    )
    run("finetune", *arguments, "--resume")  # nothing to go on from
    assert (tmp_path / "checkpoint-2").is_dir()
    run("finetune", *arguments, "--resume", "--num_train_epochs", "2")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "modalities"),
    [
        (("--text_model", "bert", "--vision_model", "vit", "--modality_policy", "one_per_item"), ("text", "image")),
        (("--id_baseline", "--preset", "esasrec", "--k_core", "2", "--hidden_size", "16"), ()),
        (
            ("--preset", "paper", "--split", "temporal", "--validation_from", "3", "--test_from", "4"),
            ("text", "image"),
        ),
    ],
    ids=["named towers", "ID baseline", "paper preset, temporal split"],
)
def test_models_from_scratch(
    arguments: tuple[str, ...], modalities: tuple[str, ...], workplace: Path, tmp_path: Path
) -> None:
    towers = {"bert": str(workplace / "bert"), "vit": str(workplace / "vit")}
    named = [towers.get(argument, argument) for argument in arguments]
    report = run("pretrain", *named, "--data", "demo:target", "--output_dir", tmp_path, *QUICK)
    model, _ = load_checkpoint(str(tmp_path))
    assert model.config.modalities == modalities
    assert ("content_neighbours" in report["baselines"]) == ("bert" in arguments)
    if "paper" in arguments:
        assert (model.config.objective, model.config.is_causal) == ("cpc", False)
    if "esasrec" in arguments:
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 16)


def test_a_model_of_vectors_that_items_come_with(tmp_path: Path) -> None:
    vectors = torch.eye(4).tolist()
    rows = {"item_id": list("abcd"), "text": ["gold star", "navy ring", None, "teal cross"], "features": vectors}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / "items.parquet")
    visits = {"user_id": list("uuuuvvvv"), "item_id": list("abcddcba"), "timestamp": list(range(8))}
    pq.write_table(pa.table(visits), tmp_path / "data" / "interactions.parquet")
    place = (tmp_path / "data", "--hidden_size", "8", "--output_dir", tmp_path / "run")
    run("pretrain", *place, "--features_size", "4", *QUICK)
    model, processor = load_checkpoint(str(tmp_path / "run"))
    assert tuple(model.config.modalities) == tuple(processor.modalities) == ("features",)
    out = ("--include_history", "--all_users", "--output_file", tmp_path / "out.csv")
    assert run("recommend", tmp_path / "run", "--data", tmp_path / "data", *out) == 2
    assert len(rows_of(tmp_path / "out.csv")) == 8
    assert command("pretrain", *place[:-1], tmp_path / "other", "--features_size", "5") == 2
    assert not (tmp_path / "other").exists()


def test_evaluate_reads_the_store_of_a_run_and_prints_json(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = (workplace / "source", "--data", "demo:source", "--activation_store", tmp_path / "store")
    plain = run("evaluate", *place[:3], "--max_users", "10")
    capsys.readouterr()
    filled = run("evaluate", *place, "--max_users", "10", "--json")
    assert json.loads(capsys.readouterr().out)["metrics"] == filled["metrics"]
    assert filled["metrics"] == pytest.approx(plain["metrics"], abs=1e-6)
    assert filled["protocol"]["num_users"] == 10
    states = sorted((tmp_path / "store").rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in states]
    run("evaluate", *place, "--bf16", "--part", "validation", "--json")
    assert states and [path.stat().st_mtime_ns for path in states] == before
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) > len(states)  # those of bf16 are others


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_recommend_to_all_users(suffix: str, workplace: Path, tmp_path: Path) -> None:
    place = (workplace / "source", "--data", workplace / "target", "--all_users", "--top_k", "3")
    file = tmp_path / f"all{suffix}"
    assert run("recommend", *place, "--batch_size", "7", "--output_file", file) == 30
    rows = rows_of(file)
    assert list(rows[0]) == ["user_id", "item_id", "rank", "score"] and len(rows) == 90
    assert [int(row["rank"]) for row in rows] == [1, 2, 3] * 30
    catalogue, sequences = load_domain(workplace / "target")
    recommender = Recommender.from_pretrained(workplace / "source", catalogue)
    for user in (0, 29):
        found = recommender.recommend(catalogue.item_ids[sequences[user]["items"]].tolist(), k=3)
        mine = [row for row in rows if row["user_id"] == sequences.user_ids[user]]
        assert [row["item_id"] for row in mine] == [item.item_id for item in found]
        assert [float(row["score"]) for row in mine] == pytest.approx([item.score for item in found], abs=1e-4)


def test_texts_of_several_lines_are_shown_on_one() -> None:
    assert line_of("red hat,\n  of wool\t") == "red hat, of wool" and line_of(None) == ""
    assert len(line_of("x" * 99)) < 70


def test_recommend_in_print(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    place = (workplace / "source", "--data", workplace / "target")
    assert run("recommend", *place, "--top_k", "2") == 3
    printed = capsys.readouterr().out
    assert printed.count("\n1. ") == 3 and "chosen" in printed and "target-user-0002" in printed
    history = ("target-item-0003", "target-item-0001")
    assert run("recommend", workplace / "source", "--items", workplace / "target", "--history", *history) == 1
    assert capsys.readouterr().out.count("target-item-0003") == 1  # chosen, and not recommended again
    assert run("recommend", *place, "--top_k", "2", "--json") == 3
    rows = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in rows] == [1, 2] * 3 and len({row["user_id"] for row in rows}) == 3


HISTORIES = {
    "lists.jsonl": '{"user_id": "u", "items": ["target-item-0003", "gone"]}\n{"user_id": 7, "items": ["gone"]}\n',
    "rows.csv": "user_id,item_id\nu,target-item-0003\n7,gone\nu,gone\n",
    "times.csv": "user_id,item_id,timestamp\nu,gone,2024-02-01\n7,gone,2024-01-01\nu,target-item-0003,2023-01-01\n",
}


@pytest.mark.parametrize("name", HISTORIES)
def test_recommend_from_a_file_and_an_index(name: str, workplace: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(HISTORIES[name].replace('"user_id": 7', '"user_id": "7"'))
    place = ("--histories", tmp_path / name, "--on_unknown", "skip", "--index", tmp_path / "index")
    out = tmp_path / "out.csv"
    assert run("recommend", workplace / "source", "--data", workplace / "target", *place, "--output_file", out) == 1
    first = rows_of(out)
    assert {row["user_id"] for row in first} == {"u"} and len(first) == 10
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"item_index.safetensors"}
    again = tmp_path / "again.csv"
    with pytest.MonkeyPatch.context() as patch:  # nothing is encoded, and no items are read
        patch.setattr(Recommender, "_encode", None)
        assert run("recommend", workplace / "source", *place, "--output_file", again) == 1
    assert [row["item_id"] for row in rows_of(again)] == [row["item_id"] for row in first]


def test_histories_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("user_id,item_id,timestamp\nb,y,5\na,x,3\nb,z,1\nb,w,5\n")
    assert read_histories(tmp_path / "h.csv") == [("b", ["z", "y", "w"], [1, 5, 5]), ("a", ["x"], [3])]


def test_a_model_that_reads_times_is_given_them(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, out = tmp_path / "model", tmp_path / "out.csv"
    TransRecModel(TransRecConfig(num_items=40, hidden_size=16, user_encoder="hstu", time_buckets=8)).save_pretrained(
        model
    )
    place = (model, "--data", workplace / "target", "--output_file", out)
    assert run("recommend", *place, "--all_users") == 30
    (tmp_path / "h.csv").write_text(HISTORIES["times.csv"])
    assert run("recommend", *place, "--histories", tmp_path / "h.csv", "--on_unknown", "skip") == 1
    before = out.read_bytes()
    assert command("recommend", *place, "--history", "target-item-0003") == 2
    assert (
        "needs the times of the interactions: give --data, or --histories with a timestamp" in capsys.readouterr().err
    )
    assert out.read_bytes() == before


def test_towers_load_without_a_word_unless_weights_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForMaskedLM.from_config(demo_config().text_config).save_pretrained(tmp_path)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        TransRecModel.from_text_vision_pretrained(str(tmp_path))  # the head for masked words is left behind
        assert not caplog.records
        weights = load_file(tmp_path / "model.safetensors")
        del weights["bert.embeddings.word_embeddings.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with caplog.at_level("WARNING", "transrec_hf"):
            TransRecModel.from_text_vision_pretrained(str(tmp_path))
        (record,) = caplog.records
        assert re.search(r"1 weights are missing .*word_embeddings.weight", record.getMessage())
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(verbosity)


# Preparing data


PRODUCTS = (
    "id;title;description;price;photo\n007;Red shoe; leather;9;red.png\n008;;;5;\n009;Blue shoe;;7;blue.png\n"
    "009;Blue again;;7;\n;nameless;;1;\n010;Green hat;wool;3;gone.png\n"
)
ORDERS = (
    "customer;product;day\n5.0;007;2024-01-02T00:00:00\n;009;2024-01-03T00:00:00\n5.0;099;2024-01-04T00:00:00\n"
    "5.0;009;2024-01-05 10:00:00+00:00\n5.0;009;2024-01-05 10:00:00+00:00\n6.0;010;\n6.0;010;1970-01-01\n"
)
DROP = ("guests", "undated", "unknown_items", "double_items", "nameless_items", "empty_items", "missing_images")


@pytest.fixture
def exports(tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "products.csv").write_text(PRODUCTS)
    (tmp_path / "orders.csv").write_text(ORDERS)
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(png())
    files = ("--items", tmp_path / "products.csv", "--interactions", tmp_path / "orders.csv")
    columns = ("--item_id", "id", "--text", "title", "description", "--image", "photo", "--keep", "price")
    others = ("--user_id", "customer", "--interaction_item_id", "product", "--timestamp", "day", "--separator", ";")
    return (*files, *columns, *others, "--output_dir", tmp_path / "shop")


def test_prepare(exports: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    done = run("prepare", *exports, "--drop", *DROP, "--json")
    assert json.loads(capsys.readouterr().out) == done
    assert done["dropped"] == dict.fromkeys(DROP, 1)
    assert done["double_interactions"] == 1 and done["float_ids"] == [str(tmp_path / "orders.csv")]
    catalogue, sequences = load_domain(tmp_path / "shop")
    assert catalogue.item_ids.tolist() == ["007", "009", "010"]
    assert [catalogue.text(row) for row in range(3)] == ["Red shoe. leather", "Blue shoe", "Green hat. wool"]
    assert catalogue.has_image.tolist() == [True, True, False] and catalogue.image(0).size == (32, 32)
    assert catalogue.items["price"] == ["9", "7", "3"]
    assert sequences.user_ids.tolist() == ["5", "6"]
    assert sequences[0]["items"].tolist() == [0, 1, 1]
    assert sequences.timestamps.tolist() == [1704153600, 1704448800, 1704448800, 0]
    assert files(tmp_path / "shop") == {"items.parquet", "interactions.parquet", "left_out.csv"}


def test_prepare_leaves_out_damaged_files_if_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Item c has nothing else: it is left out only if empty items are, and its interaction if unknown items are."""
    (tmp_path / "bad.png").write_bytes(png()[:60])
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "i.csv").write_text(
        "item_id,text,image\nb,hat,bad.png\na,shoe,good.png\nc,,bad.png\nd,sock,gone.png\n"
    )
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\nu,a,1\nu,c,2\nv,b,3\n")
    place = ("--items", tmp_path / "i.csv", "--interactions", tmp_path / "x.csv", "--output_dir", tmp_path / "shop")
    needed = {
        "missing_images": r"i.csv: 1 images whose file is not there: row 4 \(item 'd': .*gone.png\)",
        "damaged_images": r"i.csv: 2 images that cannot be decoded: row 1 \(item 'b': .*row 3 .*--drop damaged_images",
        "empty_items": r"i.csv: 1 items with no content: row 3 \('c'\)",
        "unknown_items": r"x.csv: 1 .*the items lack: row 2 \(item 'c'\)",
    }
    drop: list[str] = []
    for name, message in needed.items():
        assert command("prepare", *place, "--drop", "guests", *drop) == 2
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "shop").exists()
        drop.append(name)
    done = run("prepare", *place, "--drop", *drop)
    assert done["dropped"] == {**dict.fromkeys(drop, 1), "damaged_images": 2}
    assert "dropped 2 images that cannot be decoded" in capsys.readouterr().out
    catalogue, sequences = load_domain(tmp_path / "shop")
    assert catalogue.item_ids.tolist() == ["b", "a", "d"] and catalogue.has_image.tolist() == [False, True, False]
    assert len(sequences.items) == 2
    listed = (tmp_path / "shop" / "left_out.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in listed[1:]] == [["images", "d"], ["images", "b"], ["images", "c"]]
    assert "no file" in listed[1] and "gone.png" in listed[1] and "damaged" in listed[2]


def test_prepare_reads_frames_of_videos_and_refuses_columns_without_files(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    frames = [["a.png", "a.png"], [], ["a.png", "gone.png"]]
    items = {"item_id": ["x", "y", "z"], "text": ["x", "y", "z"], "video": frames, "price": [1, 2, 3]}
    pq.write_table(pa.table(items), tmp_path / "i.parquet")
    (tmp_path / "d.csv").write_text("user_id,item_id,timestamp\nu,x,1\n")
    files = ("--items", tmp_path / "i.parquet", "--interactions", tmp_path / "d.csv", "--output_dir", tmp_path / "a")
    assert command("prepare", *files) == 2 and "no file" in capsys.readouterr().err
    assert command("prepare", *files, "--image", "price") == 2
    assert "('price'): column 'image' holds int64. Write image bytes" in capsys.readouterr().err
    monkeypatch.setattr("transrec_hf.commands.prepare.BYTES_AT_A_TIME", 2 * len(png()))
    run("prepare", *files, "--drop", "missing_videos")
    assert pq.ParquetFile(tmp_path / "a" / "items.parquet").num_row_groups == 2  # the first item has two files
    catalogue = load_domain(tmp_path / "a")[0]
    assert catalogue.has("video").tolist() == [True, False, False] and len(catalogue.read(0, ["video"])["video"]) == 2


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_separator_of_a_table_is_what_its_header_has_most_of(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(f'\ufeffcustomer{mark}"day, or hour"{mark}price\n1{mark}"a, b; c"{mark}9\n', encoding="utf-8")
    for separator in (None, mark):
        table = read_table(path, separator)
        assert table.to_pylist() == [{"customer": "1", "day, or hour": "a, b; c", "price": "9"}]
    other = ";" if mark == "," else ","
    if mark != ",":
        path.write_text(path.read_text(encoding="utf-8").replace(",", ""), encoding="utf-8")
    with pytest.raises(DataError, match=r"only one column, 'customer.* leave out --separator"):
        read_table(path, other)
    with pytest.raises(DataError, match=r"not one character. Leave it out"):
        read_table(path, "\\t")


def test_a_table_of_one_column_has_no_separator(tmp_path: Path) -> None:
    (tmp_path / "gone.csv").write_text("item_id\n007\n")
    assert read_table(tmp_path / "gone.csv").to_pylist() == [{"item_id": "007"}]


def test_prepare_says_what_it_did(exports: tuple[Any, ...], capsys: pytest.CaptureFixture) -> None:
    run("prepare", *exports, "--drop", *DROP, "double_interactions")
    printed = capsys.readouterr().out
    assert "3 items (3 with text, 2 with an image), 3 interactions of 2 users" in printed
    assert "dropped 1 interactions that repeat" in printed and "written as 8881.0" in printed


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("guests", r"orders.csv: 1 interactions without a user: row 2. .*--drop guests"),
        ("undated", r"orders.csv: 1 interactions without a timestamp: row 6"),
        ("unknown_items", r"orders.csv: 1 .*the items lack: row 3 \(item '099'\)"),
        ("double_items", r"products.csv: 1 items that repeat an item_id: row 4 \('009'\)"),
        ("nameless_items", r"products.csv: 1 rows without an item_id: row 5"),
        ("empty_items", r"products.csv: 1 items with no content: row 2 \('008'\)"),
        ("missing_images", r"products.csv: 1 images whose file is not there: row 6 \(.*gone.png\)"),
    ],
)
def test_prepare_drops_only_what_it_is_told(
    kept: str, message: str, exports: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("prepare", *exports, "--drop", *(name for name in DROP if name != kept)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "shop").exists()


def test_prepare_reads_what_other_programs_write(tmp_path: Path) -> None:
    """Datetimes and floats of a data frame, bytes of images, dates in the way of a country."""
    frame = {"item_id": pa.array([1.0, 2.0]), "text": ["a", None], "image": [None, png()]}
    pq.write_table(pa.table(frame), tmp_path / "i.parquet")
    days = pa.array([1_000_000, 2_000_000], pa.timestamp("us"))
    pq.write_table(pa.table({"user_id": [1, 1], "item_id": [1.0, 2.0], "timestamp": days}), tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text("user_id,item_id,timestamp\nu,1,31.12.1970\n")
    place = ("--items", tmp_path / "i.parquet", "--output_dir")
    run("prepare", *place, tmp_path / "a", "--interactions", tmp_path / "d.parquet")
    catalogue, sequences = load_domain(tmp_path / "a")
    assert catalogue.item_ids.tolist() == ["1", "2"] and sequences.timestamps.tolist() == [1, 2]
    run("prepare", *place, tmp_path / "b", "--interactions", tmp_path / "d.csv", "--timestamp_format", "%d.%m.%Y")
    assert load_domain(tmp_path / "b")[1].timestamps.tolist() == [364 * 86400]


def test_stats(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = run("stats", workplace / "target", "--plot", tmp_path / "stats.png")
    printed = capsys.readouterr().out
    assert "40 items" in printed and "30 users" in printed and re.search(r"test +30 ", printed)
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    run("stats", workplace / "target", "--json")
    assert json.loads(capsys.readouterr().out) == found


def test_stats_without_matplotlib_says_so(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    monkeypatch.setattr("transrec_hf.commands.stats.logger.warning", said.append)
    run("stats", workplace / "target", "--plot", tmp_path / "stats.png")
    assert "transrec-hf[plot]" in said[0] and not (tmp_path / "stats.png").exists()


def test_env(capsys: pytest.CaptureFixture) -> None:
    facts = run("env", "--json")
    assert json.loads(capsys.readouterr().out) == facts
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    run("env")
    assert f"Python: {facts['Python']}\n" in capsys.readouterr().out


def test_a_sample_of_users_is_trained_on(workplace: Path) -> None:
    _, sequences = load_domain(workplace / "target")

    def users(**options: Any) -> list[str]:
        split = SplitArguments(**options).apply(sequences, 50)
        assert len(split.validation) == len(split.test) == 30
        return split.train.user_ids.tolist()

    half, tenth = users(user_fraction=0.5), users(user_fraction=0.1)
    assert (len(half), len(tenth), len(users(max_train_users=4)), len(users())) == (15, 3, 4, 30)
    assert set(tenth) < set(half) and users(user_fraction=0.5) == half
    assert users(user_fraction=0.5, sample_seed=1) != half


def test_planning_on_a_busy_machine_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for load, said in ((0.5 * (os.cpu_count() or 1), False), (10.0 * (os.cpu_count() or 1), True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        caplog.clear()
        with pytest.raises(DataError, match="no data"):
            run("plan")
        assert ("This machine is busy" in caplog.text) == said


def test_times_are_integers_or_dates() -> None:
    assert [as_time(value) for value in (7, "-7", "1970-01-02", "1970-01-01T01:00:00+01:00")] == [7, -7, 86400, 0]


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_our_options_first(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert command(verb, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: transrec {verb} ") and f"\n    transrec {verb}" in text
    for file in re.findall(r"\b(?:examples|docs)/\S+\.\w+", text):
        assert (ROOT / file).exists(), file
    assert not re.search(r"^  --no_", text, re.MULTILINE)
    if verb in ("pretrain", "finetune", "plan"):
        own, stock = text.split("all other options of transformers.TrainingArguments")
        for name in ("data", "from_checkpoint", "output_dir", "trainable_blocks", "learning_rate", "hidden_size"):
            assert f"\n  --{name} " in own and f"\n  --{name} " not in stock
        assert re.search(
            r"--learning_rate FLOAT\s+Peak learning rate of the user\s+encoder. \(default:\s+0.001\)", own
        )
        assert "\n  --adam_beta1 " in stock and "\n  --adam_beta1 " not in own
        assert own.count("\n  --") < 110


def test_configurations_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captured: list[Any] = []
    monkeypatch.setattr("transrec_hf.commands.runs.run_training", lambda *arguments: captured.append(arguments))
    paths = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
    for path in paths:
        run("finetune" if "finetune" in path.stem else "pretrain", path, "--output_dir", tmp_path)
        _, data_args, _, args = captured[-1]
        assert args.output_dir == str(tmp_path)
        assert data_args.data == yaml.safe_load(path.read_text()).get("data")
    assert len(captured) == len(paths) > 3


def test_content_vectors_are_the_towers_own_words(workplace: Path) -> None:
    catalogue = load_catalogue(workplace / "target")
    towers = {"text_model": str(workplace / "bert"), "vision_model": str(workplace / "vit")}
    vectors = content_vectors(towers, catalogue, text_depths=1)
    text, image = vectors.split(64, dim=1)
    for part, has in ((text, catalogue.has_text), (image, catalogue.has_image)):
        assert torch.allclose(part.norm(dim=1), torch.from_numpy(has).float(), atol=1e-5)
    row = int(catalogue.has_text.argmax())
    tokens = demo_processor().tokenizer(catalogue.text(row), return_tensors="pt")
    states = AutoModel.from_pretrained(workplace / "bert", add_pooling_layer=False)(**tokens).last_hidden_state
    expected = torch.nn.functional.normalize(states.mean(dim=1), dim=1)[0]
    assert torch.allclose(text[row], expected, atol=1e-5)


def test_content_neighbours_read_the_store_of_the_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = [
        (f"--{name}", str(workplace / tower)) for name, tower in (("text_model", "bert"), ("vision_model", "vit"))
    ]
    data = ("--data", workplace / "target", *itertools.chain(*towers))
    store = ("--activation_store", tmp_path / "store")
    trained = run("pretrain", *data, *store, "--tuning", "frozen", "--output_dir", tmp_path / "run", *QUICK)
    files = sorted((tmp_path / "store").rglob("*.safetensors"))
    without = run("evaluate", tmp_path / "run", *data)
    monkeypatch.setattr("transrec_hf.model.item_encoder_transrec.run_tower", None)  # it must not run
    again = run("evaluate", tmp_path / "run", *data, *store)
    assert files and sorted((tmp_path / "store").rglob("*.safetensors")) == files
    expected = pytest.approx(without["baselines"]["content_neighbours"]["metrics"])
    for report in (trained, again):
        assert report["baselines"]["content_neighbours"]["metrics"] == expected


def test_towers_of_other_models_become_those_of_a_new_one(workplace: Path, tmp_path: Path) -> None:
    source = ("--text_model", workplace / "source", "--vision_model", workplace / "vit")
    run("pretrain", "--data", workplace / "target", *source, "--output_dir", tmp_path / "new", *QUICK)
    _, processor = load_checkpoint(str(tmp_path / "new"))
    _, known = load_checkpoint(str(workplace / "source"))
    assert processor is not None and known is not None
    assert processor.tokenizer.get_vocab() == known.tokenizer.get_vocab()
    tuned = ("--tuning", "bottleneck", "--output_dir", tmp_path / "tuned", *QUICK)
    run("finetune", workplace / "source", "--data", workplace / "target", "--init", "all", *tuned)
    with pytest.raises(DataError, match="adapters in its towers"):
        run("pretrain", "--data", workplace / "target", "--text_model", tmp_path / "tuned", *QUICK)


def test_one_modality_of_mixed_data(workplace: Path, tmp_path: Path) -> None:
    data = ("--data", workplace / "target")
    catalogue, sequences = load_domain(workplace / "target")
    images, _ = of_modality(catalogue, sequences, "image")
    options = (*data, "--vision_model", workplace / "vit", "--output_dir", tmp_path / "images", *QUICK)
    with pytest.raises(DataError, match=r"Leave them out \(--modality image;"):
        run("pretrain", *options)
    report = run("pretrain", *options, "--modality", "image")
    assert report["protocol"]["num_items"] == len(images) < len(catalogue)
    again = run("evaluate", tmp_path / "images", *data, "--modality", "image")
    assert again["metrics"] == pytest.approx(report["metrics"], abs=1e-6)
    with pytest.raises(DataError, match="no item has content for text_model"):
        run("evaluate", tmp_path / "images", *data, "--modality", "image", "--text_model", workplace / "bert")
    history = next(str(row) for row in catalogue.item_ids[catalogue.has_image])
    items = ("--items", workplace / "target", "--modality", "image", "--history", history)
    assert run("recommend", tmp_path / "images", *items, "--top_k", str(len(catalogue))) == 1


def test_two_models_are_compared_on_the_same_users(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", workplace / "target")
    run("pretrain", *data, "--id_baseline", "--output_dir", tmp_path / "ids", *QUICK)
    file = tmp_path / "report.json"
    capsys.readouterr()
    others = ("--against", workplace / "source", tmp_path / "ids")
    report = run("evaluate", workplace / "source", *data, *others, "--output_file", file, "--max_users", 20)
    itself, ids = report["against"].values()
    assert set(itself["differences"]) == set(report["intervals"])
    assert all(value == 0 for row in itself["differences"].values() for value in row.values())
    found = ids["differences"]["ndcg@10"]
    assert found["difference"] == pytest.approx(report["metrics"]["ndcg@10"] - ids["metrics"]["ndcg@10"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert json.loads(file.read_text())["against"] == report["against"]
    printed = capsys.readouterr().out
    assert f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]" in printed
    with pytest.raises(DataError, match="no-such-model"):
        run("evaluate", workplace / "source", *data, "--against", tmp_path / "no-such-model")


@pytest.mark.slow
def test_two_processes_have_the_same_report(workplace: Path, tmp_path: Path) -> None:
    trainer = tmp_path / "trainer"
    place = ("--from_checkpoint", workplace / "source", "--data", workplace / "target", "--output_dir", trainer)
    report = launch("finetune", tmp_path, *place, *QUICK)
    held_out = ("--checkpoint", trainer, "--data", workplace / "target")
    for again in (run("evaluate", *held_out), launch("evaluate", tmp_path, *held_out)):
        assert again["metrics"] == pytest.approx(report["metrics"], abs=1e-6)


# What they say about bad input


Case = Callable[[Path, Path], tuple[str, list[Any], str]]
"""The pristine workplace and a folder of one's own, to a verb, arguments and what the error must say."""


def with_yaml(text: str, message: str) -> Case:
    def case(workplace: Path, folder: Path) -> tuple[str, list[Any], str]:
        (folder / "options.yaml").write_text(text)
        return "pretrain", [folder / "options.yaml", "--output_dir", folder / "run"], message

    return case


def with_data(message: str, *arguments: Any, **tables: Any) -> Case:
    """The columns of `items` and `interactions`, and arguments of `pretrain` with towers by their name."""
    items = {"item_id": ["a", "b", "c"], "text": ["gold star", "navy ring", "teal cross"]}
    interactions = {"user_id": ["u"] * 3 + ["v"] * 3, "item_id": list("abccba"), "timestamp": [1, 2, 3] * 2}

    def case(workplace: Path, folder: Path) -> tuple[str, list[Any], str]:
        (folder / "data").mkdir()
        for name, table in {"items": items, "interactions": interactions, **tables}.items():
            pq.write_table(pa.table(table), folder / "data" / f"{name}.parquet")
        towers = {name: workplace / name for name in ("bert", "vit")}
        given = [towers.get(argument, argument) for argument in arguments]
        return "pretrain", [*given, "--data", folder / "data", "--output_dir", folder / "run"], message

    return case


def with_checkpoint(message: str, name: str = "source", **changes: bytes | None) -> Case:
    """A copy of a folder of the workplace, with some files changed or taken away."""

    def case(workplace: Path, folder: Path) -> tuple[str, list[Any], str]:
        copy = folder / "checkpoint"
        shutil.copytree(workplace / name, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
        for file, content in changes.items():
            path = copy / file.replace("__", ".")
            path.unlink() if content is None else path.write_bytes(content)
        data = ["--data", workplace / "target", "--output_dir", folder / "run"]
        return "finetune", ["--from_checkpoint", copy, *data], message

    return case


def with_arguments(verb: str, message: str, *arguments: str) -> Case:
    """`{source}`, `{target}`, `{bert}` and `{folder}` stand for paths."""

    def case(workplace: Path, folder: Path) -> tuple[str, list[Any], str]:
        names = {name: str(workplace / name) for name in ("source", "target", "bert", "vit")}
        return verb, [argument.format(folder=folder, **names) for argument in arguments], message

    return case


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "PNG")
    return file.getvalue()


IMAGE_ONLY = {"item_id": ["a", "b", "c"], "image": [png(), png(), png()]}
BROKEN_IMAGE = {"item_id": ["a", "b", "c"], "image": [png(), png()[:400], png()]}
ONE_EACH = {"user_id": ["u", "v", "w"], "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]}
UNKNOWN_ITEM = {"user_id": ["u"] * 3, "item_id": ["a", "b", "nowhere"], "timestamp": [1, 2, 3]}

BAD_INPUT: dict[str, Case] = {
    "unknown item id": with_data(r"interactions\.parquet.*row 3.*'nowhere'", interactions=UNKNOWN_ITEM),
    "one interaction per user": with_data("no user has 3 interactions", "--text_model", "bert", interactions=ONE_EACH),
    "no data": with_arguments("pretrain", r"x: no such file or folder", "--data", "{folder}/x"),
    "unknown demo platform": with_arguments("pretrain", "demo:source and demo:target", "--data", "demo:both"),
    "items without interactions": with_arguments("pretrain", "give both", "--items", "{target}"),
    "text tower for images": with_data("no item has text", "--text_model", "bert", items=IMAGE_ONLY),
    "image tower for texts": with_data("no item has image", "--vision_model", "vit"),
    "policy without items": with_data("no item has image", "--modality_policy", "image", "--text_model", "bert"),
    "broken image": with_data(r"row 2 \(item_id 'b'.*truncated", "--vision_model", "vit", items=BROKEN_IMAGE),
    "k-core without items": with_data("9-core is empty", "--k_core", "9", "--text_model", "bert"),
    "k-core of nothing": with_data("k_core must be 1 or more, got 0", "--k_core", "0", "--text_model", "bert"),
    "temporal split without bounds": with_data("needs validation_from and test_from", "--split", "temporal"),
    "temporal split out of range": with_data(
        "data run from 1 to 3",
        *("--text_model", "bert", "--split", "temporal", "--validation_from", "8", "--test_from", "9"),
    ),
    "temporal split from no date": with_data(
        "'spring' is neither an integer nor a date such as 2024-01-31",
        *("--text_model", "bert", "--split", "temporal", "--validation_from", "spring", "--test_from", "9"),
    ),
    "no model": with_data("give --text_model, --vision_model, .*--features_size"),
    "missing tower": with_data("/no/tower: no such folder", "--text_model", "/no/tower"),
    "unknown tower on the Hub": with_data("text_model nobody/nothing", "--text_model", "nobody/nothing"),
    "two origins of the model": with_data("exclude each other", "--text_model", "bert", "--id_baseline"),
    "preset of a checkpoint": with_data("leave one of them out", "--preset", "paper", "--from_checkpoint", "bert"),
    "preset of IDs for content": with_data("add id_baseline", "--preset", "esasrec", "--text_model", "bert"),
    "missing checkpoint": with_arguments(
        "finetune", "/no/model: no such folder", "--from_checkpoint", "/no/model", "--data", "{target}"
    ),
    "no checkpoint named": with_arguments("finetune", "no model to fine-tune: give the folder", "--data", "{target}"),
    "no checkpoint to evaluate": with_arguments("evaluate", "no model: give the folder"),
    "no checkpoint to recommend": with_arguments("recommend", "no model: give the folder"),
    "no data at all": with_arguments("pretrain", "no data: give --data"),
    "data given twice": with_arguments("pretrain", "data is given twice", "{target}", "--data", "{source}"),
    "a short name": with_data("--lr: did you mean --learning_rate", "--lr", "0.1"),
    "another short name": with_data("--epochs=3: did you mean --num_train_epochs", "--epochs=3"),
    "too large a share": with_data("user_fraction must be above 0", "--user_fraction", "2"),
    "nothing to store": with_data(
        "bad options: .*nothing to store: lower trainable_blocks",
        *("--text_model", "bert", "--activation_store", "store"),
        interactions={"user_id": list("uuuuvvvv"), "item_id": list("abcaabca"), "timestamp": [1, 2, 3, 4] * 2},
    ),
    "no users": with_data("max_train_users must be 1 or more", "--max_train_users", "0"),
    "checkpoint of another architecture": with_checkpoint("architecture 'bert', not 'transrec'", name="bert"),
    "folder without a model": with_checkpoint(r"no config\.json", name="target"),
    "config that is no JSON": with_checkpoint("checkpoint: not a checkpoint that can be read", config__json=b"{"),
    "empty weights": with_checkpoint("checkpoint: not a checkpoint.*header", model__safetensors=b""),
    "missing weights": with_checkpoint("model.safetensors", model__safetensors=None),
    "missing processor": with_checkpoint("checkpoint: not a checkpoint", processor_config__json=None),
    "weights that do not fit": with_arguments(
        "finetune",
        r"as changed by hidden_size.*\(\d+ in all\) is of another shape",
        *("--from_checkpoint", "{source}", "--data", "{target}", "--hidden_size", "32"),
    ),
    "missing layers": with_arguments(
        "finetune",
        r"as changed by num_hidden_layers: user_encoder\.layers\.2.* is missing",
        *("--from_checkpoint", "{source}", "--data", "{target}", "--num_hidden_layers", "3"),
    ),
    "contradiction in the configuration": with_data(
        "user_hidden_size .30. must be a multiple", "--text_model", "bert", "--user_hidden_size", "30"
    ),
    "unknown objective": with_data("objective must be one of", "--text_model", "bert", "--objective", "hinge"),
    "negative trainable_blocks": with_data("trainable_blocks must be 0 or more", "--trainable_blocks", "-1"),
    "unknown training option": with_data("bad options: sometimes is not a valid", "--eval_strategy", "sometimes"),
    "unknown option": with_data("--learning_rte: did you mean --learning_rate", "--learning_rte", "1"),
    "unknown protocol": with_data("protocol: invalid choice: 'nine'", "--protocol", "nine"),
    "unknown YAML key": with_yaml(
        "data: demo:source\nlerning_rate: 1", "unknown option lerning_rate: .* learning_rate"
    ),
    "unknown model key": with_yaml("hiden_size: 64", r"options\.yaml: unknown option hiden_size: .* hidden_size\?"),
    "malformed YAML": with_yaml("data: [demo:source\nseed: 1", r"options\.yaml: is not YAML .*line 2"),
    "YAML that is a list": with_yaml("- data", "one 'option: value' on each line"),
    "wrong type in YAML": with_yaml("hidden_size: wide", "hidden_size.* invalid int value: 'wide'"),
    "wrong number in YAML": with_yaml("num_negatives: 2.5", "num_negatives.* invalid int value: '2.5'"),
    "several seeds": with_arguments(
        "pretrain",
        r"A run has one seed.*for seed in 0 1 2; do transrec pretrain .* --seed \$seed .* transfer-report .*--seeds",
        *("demo:source", "--seed", "0,1,2"),
    ),
    "several seeds in YAML": with_yaml("seed: 0, 1, 2", r"options\.yaml: .*A run has one seed"),
    "a seed that is no number": with_arguments("pretrain", "invalid int value: 'one'$", "--seed", "one"),
    "list in YAML": with_yaml("hidden_size: [1, 2]", "hidden_size: one value expected"),
    "nothing in YAML": with_yaml("learning_rate:", "learning_rate.* invalid float value"),
    "wrong choice in YAML": with_yaml("modality_policy: sound", "invalid choice: 'sound'"),
    "two YAML": with_arguments("pretrain", "{target}: cannot be read", "demo:source", "{target}"),
    "no option": with_arguments("pretrain", "'hat' stands without the name of its option", "demo:source", "hat"),
    "missing YAML": with_arguments("pretrain", r"gone\.yaml: cannot be read", "{folder}/gone.yaml"),
    "output folder that is a file": with_arguments(
        "pretrain", "model.safetensors is a file", "--output_dir", "{source}/model.safetensors/run"
    ),
    "output folder of another run": with_arguments("pretrain", "Add --resume", "--output_dir", "{source}"),
    "evaluate without checkpoint": with_arguments("evaluate", "no such folder", "--checkpoint", "/no/model"),
    "recommend to an unknown user": with_arguments(
        "recommend", r"unknown user ids: \['nobody'\]", "{source}", "--data", "{target}", "--users", "nobody"
    ),
    "recommend from an unknown item": with_arguments(
        "recommend", r"unknown item ids: \['nothing'\]", "{source}", "--data", "{target}", "--history", "nothing"
    ),
    "recommend to users and a history": with_arguments(
        "recommend", "exclude each other", "{source}", "--history", "a", "--all_users"
    ),
    "recommend without items": with_arguments("recommend", "no items: give --data", "{source}", "--history", "a"),
    "recommend to nobody": with_arguments(
        "recommend", "belong together: give both", "{source}", "--items", "{target}"
    ),
    "recommend to another format": with_arguments(
        "recommend", "must end in .parquet", "{source}", "--data", "{target}", "--output_file", "all.xlsx"
    ),
    "recommend from a missing file": with_arguments(
        "recommend", r"gone.csv: no such file", "{source}", "--data", "{target}", "--histories", "{folder}/gone.csv"
    ),
    "recommend from a file of something else": with_arguments(
        "recommend",
        "needs the columns user_id and item_id",
        *("{source}", "--data", "{target}", "--histories", "{target}/items.parquet"),
    ),
    "prepare without files": with_arguments("prepare", "give --items and --interactions and --output_dir"),
    "prepare what is there": with_arguments(
        "prepare",
        "already holds (items|interactions).parquet",
        *("--items", "x", "--interactions", "x", "--output_dir", "{target}"),
    ),
    "prepare without the column": with_arguments(
        "prepare",
        "items.parquet: there is no column 'sku' for --item_id. The columns are",
        *("--items", "{target}/items.parquet", "--interactions", "x", "--output_dir", "{folder}/x"),
        *("--item_id", "sku"),
    ),
    "stats of nothing": with_arguments("stats", "/no/data: no such file", "/no/data"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line_and_leaves_nothing(
    name: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    verb, arguments, message = BAD_INPUT[name](workplace, tmp_path)
    before, pristine = files(tmp_path), files(workplace)
    assert command(verb, *arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and re.search(message.replace("{target}", str(workplace / "target")), last), last
    assert files(tmp_path) == before and files(workplace) == pristine


def test_an_id_baseline_cannot_leave_its_catalogue(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    TransRecModel(TransRecConfig(num_items=7, hidden_size=8)).save_pretrained(tmp_path)
    output = ("--output_file", tmp_path / "report")
    assert command("evaluate", tmp_path, "--data", workplace / "target", *output) == 2
    assert "40 items, but this ID baseline knows 7" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 kB, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, small_files: None
) -> None:
    assert command("pretrain", "demo:target", "--output_dir", tmp_path / "run", *QUICK) == 1
    assert re.search(r"error: .*checkpoint-2.* was removed", capsys.readouterr().err)
    assert not files(tmp_path / "run")


def test_a_full_disk_at_the_last_save_keeps_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    describe = TransRecTrainer.describe

    def full(self: TransRecTrainer, folder: Path) -> None:
        describe(self, folder)
        if "checkpoint" not in str(folder.relative_to(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TransRecTrainer, "describe", full)
    assert command("pretrain", "demo:target", "--output_dir", tmp_path, *QUICK) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_the_process_ends_with_code_2_and_without_traceback(tmp_path: Path) -> None:
    started = [sys.executable, "-m", "transrec_cli", "pretrain", str(tmp_path / "gone")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(started, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {tmp_path}/gone: no such file")
    assert not files(tmp_path)
