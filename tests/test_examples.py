"""The scripts in `examples/`, each run on a tiny demo world, and what they say about bad input."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from transformers import AutoModel

from transrec_hf import TransRecConfig, TransRecModel, TransRecTrainer, load_catalogue
from transrec_hf.data import demo
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.items.encoding import content_vectors
from transrec_hf.publishing.checkpoint import load_checkpoint


EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ("--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--logging_steps", "1")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


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


def launch(name: str, folder: Path, *arguments: Any) -> Any:
    """What the `main` of a script returns when it runs in two processes."""
    driver, returned = folder / "driver.py", folder / "returned.json"
    driver.write_text(
        "import importlib, json, os, pathlib, sys\n"
        "value = importlib.import_module(sys.argv[1]).main(sys.argv[3:])\n"
        "if os.environ['RANK'] == '0':\n"
        "    pathlib.Path(sys.argv[2]).write_text(json.dumps(value))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", driver]
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES.parent / 'src'}:{EXAMPLES}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, name, returned, *arguments], check=True, env=environment)
    return json.loads(returned.read_text())


def run(name: str, *arguments: Any) -> Any:
    return load_script(name).main([str(argument) for argument in arguments])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


# What the scripts do


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
    assert "co occurrence" in capsys.readouterr().out
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
        (("--id_baseline", "--k_core", "2", "--hidden_size", "16"), ()),
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
    if "--preset=paper" in arguments:
        assert (model.config.objective, model.config.is_causal) == ("cpc", False)


def test_recommend(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = ("--checkpoint", workplace / "source", "--data", workplace / "target")
    assert len(run("recommend", "--checkpoint", workplace / "source", "--top_k", "2")) == 3
    everyone = run("recommend", *place, "--all_users", "--batch_size", "7", "--output_file", tmp_path / "all.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert lines == everyone and len(lines) == 30
    capsys.readouterr()
    user = everyone[4]["user_id"]
    assert run("recommend", *place, "--users", user)[0]["user_id"] == user
    assert user in capsys.readouterr().out
    history = ("target-item-0003", "target-item-0001")
    found = run("recommend", *place[:2], "--items", workplace / "target", "--history", *history, "--top_k", "3")
    ids = [item["item_id"] for item in found[0]["recommendations"]]
    assert len(ids) == 3 and not set(ids) & set(history)


def test_content_vectors_are_the_towers_own_words(workplace: Path) -> None:
    catalogue = load_catalogue(workplace / "target")
    vectors = content_vectors(str(workplace / "bert"), str(workplace / "vit"), catalogue)
    text, image = vectors.split(64, dim=1)
    for part, has in ((text, catalogue.has_text), (image, catalogue.has_image)):
        assert torch.allclose(part.norm(dim=1), torch.from_numpy(has).float(), atol=1e-5)
    row = int(catalogue.has_text.argmax())
    tokens = demo_processor().tokenizer(catalogue.text(row), return_tensors="pt")
    states = AutoModel.from_pretrained(workplace / "bert", add_pooling_layer=False)(**tokens).last_hidden_state
    expected = torch.nn.functional.normalize(states.mean(dim=1), dim=1)[0]
    assert torch.allclose(text[row], expected, atol=1e-5)


# Ten steps and more over several epochs: same batches, dropout, negatives, rates, decay and clipping.
SAME_TRAINING = (
    *("--seed", "3", "--num_train_epochs", "4", "--warmup_steps", "3", "--trainable_blocks", "1"),
    *("--learning_rate", "5e-3", "--tower_learning_rate", "1e-3"),
    *("--weight_decay", "0.1", "--tower_weight_decay", "0.05"),
)


def logged_losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    ("start", "objective"),
    [
        ("--from_checkpoint={source}", "in_batch"),
        ("--from_checkpoint={source}", "bce"),
        ("--text_model={bert} --vision_model={vit}", "cpc"),
    ],
    ids=["in_batch", "bce", "cpc, new model"],
)
def test_loop_and_trainer_have_the_same_losses(start: str, objective: str, workplace: Path, tmp_path: Path) -> None:
    origin = [part.format(**{name: workplace / name for name in ("source", "bert", "vit")}) for part in start.split()]
    shared = ("--data", workplace / "target", "--objective", objective, *SAME_TRAINING, *origin)
    loop, trainer = tmp_path / "loop", tmp_path / "trainer"
    losses = run(
        "finetune_no_trainer", "--from_checkpoint=", *shared, "--train_batch_size", "10", "--output_dir", loop
    )
    same = ("--per_device_train_batch_size=10", "--optim=adamw_torch_fused")  # the default, but for an older torch
    run("pretrain", *shared, *same, "--logging_steps=1", "--output_dir", trainer)
    assert len(losses) >= 10 and len(set(losses)) == len(losses)
    assert losses == logged_losses(trainer)
    model, processor = load_checkpoint(str(loop))
    assert model.config.objective == objective and processor is not None


@pytest.mark.slow
def test_two_processes_have_the_same_losses_and_report(workplace: Path, tmp_path: Path) -> None:
    same = ("--from_checkpoint", workplace / "source", "--data", workplace / "target", "--objective", "bce")
    same = (*same, *SAME_TRAINING)
    loop, trainer = tmp_path / "loop", tmp_path / "trainer"
    losses = launch("finetune_no_trainer", tmp_path, *same, "--train_batch_size", "5", "--output_dir", loop)
    batches = ("--per_device_train_batch_size", "5", "--logging_steps", "1")
    report = launch("finetune", tmp_path, *same, *batches, "--output_dir", trainer)
    assert len(losses) >= 10
    assert losses == pytest.approx(logged_losses(trainer), abs=1e-6)
    place = ("--checkpoint", trainer, "--data", workplace / "target", "--output_file", tmp_path / "report.json")
    for again in (run("evaluate", *place), launch("evaluate", tmp_path, *place)):
        assert again["metrics"] == pytest.approx(report["metrics"], abs=1e-6)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_understood(path: Path, tmp_path: Path) -> None:
    name = "finetune" if "finetune" in path.stem else "pretrain"
    captured: list[Any] = []
    module = load_script(name)
    module.run_training = lambda *arguments: captured.extend(arguments)
    module.main([str(path), "--output_dir", str(tmp_path)])
    _, data_args, _, args = captured
    assert args.output_dir == str(tmp_path)
    assert data_args.data == yaml.safe_load(path.read_text()).get("data")


def test_scripts_run_without_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then they use the demo world, and each takes what the one before has left."""
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain", "finetune"):
        run(name, *QUICK)
    run("finetune_no_trainer", "--num_train_epochs", "1")
    run("evaluate")
    run("recommend")
    assert {"pretrain", "finetune", "finetune_no_trainer", "report.json"} <= files(tmp_path / "runs")


# What they say about bad input


Case = Callable[[Path, Path], tuple[str, list[Any], str]]
"""The pristine workplace and a folder of one's own, to script, arguments and what the error must say."""


def with_yaml(text: str, message: str) -> Case:
    def case(workplace: Path, folder: Path) -> tuple[str, list[Any], str]:
        (folder / "options.yaml").write_text(text)
        return "pretrain", [folder / "options.yaml", "--output_dir", folder / "run"], message

    return case


def with_data(message: str, *arguments: Any, **tables: Any) -> Case:
    """The columns of `items` and `interactions`, and arguments of `pretrain.py` with towers by their name."""
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


def with_arguments(script: str, message: str, *arguments: str) -> Case:
    """`{source}`, `{target}`, `{bert}` and `{folder}` stand for paths."""

    def case(workplace: Path, folder: Path) -> tuple[str, list[Any], str]:
        names = {name: str(workplace / name) for name in ("source", "target", "bert", "vit")}
        return script, [argument.format(folder=folder, **names) for argument in arguments], message

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
    "temporal split without bounds": with_data("needs validation_from and test_from", "--split", "temporal"),
    "temporal split out of range": with_data(
        "data run from 1 to 3",
        *("--text_model", "bert", "--split", "temporal", "--validation_from", "8", "--test_from", "9"),
    ),
    "no model": with_data("give --text_model, --vision_model or both"),
    "missing tower": with_data("/no/tower: no such folder", "--text_model", "/no/tower"),
    "unknown tower on the Hub": with_data("text_model nobody/nothing", "--text_model", "nobody/nothing"),
    "two origins of the model": with_data("exclude each other", "--text_model", "bert", "--id_baseline"),
    "preset of a checkpoint": with_data("leave one out", "--preset", "paper", "--from_checkpoint", "bert"),
    "missing checkpoint": with_arguments(
        "finetune", "/no/model: no such folder", "--from_checkpoint", "/no/model", "--data", "{target}"
    ),
    "no checkpoint named": with_arguments("finetune", "give --from_checkpoint", "--data", "{target}"),
    "checkpoint of another architecture": with_checkpoint("architecture 'bert', not 'transrec'", name="bert"),
    "folder without a model": with_checkpoint(r"no config\.json", name="target"),
    "config that is no JSON": with_checkpoint("checkpoint: not a checkpoint that can be read", config__json=b"{"),
    "empty weights": with_checkpoint("checkpoint: not a checkpoint.*header", model__safetensors=b""),
    "missing weights": with_checkpoint("model.safetensors", model__safetensors=None),
    "missing processor": with_checkpoint("checkpoint: not a checkpoint", processor_config__json=None),
    "weights that do not fit": with_arguments(
        "finetune",
        r"as changed by hidden_size.*of another shape: .*\(\d+ in all\)",
        *("--from_checkpoint", "{source}", "--data", "{target}", "--hidden_size", "32"),
    ),
    "missing layers": with_arguments(
        "finetune",
        r"missing: user_encoder\.layers\.2",
        *("--from_checkpoint", "{source}", "--data", "{target}", "--num_hidden_layers", "3"),
    ),
    "contradiction in the configuration": with_data(
        "hidden_size .30. must be a multiple", "--text_model", "bert", "--hidden_size", "30"
    ),
    "unknown objective": with_data("objective must be one of", "--text_model", "bert", "--objective", "hinge"),
    "negative trainable_blocks": with_data("trainable_blocks must be 0 or more", "--trainable_blocks", "-1"),
    "unknown training option": with_data("bad options: sometimes is not a valid", "--eval_strategy", "sometimes"),
    "unknown option": with_data("--learning_rte: did you mean learning_rate", "--learning_rte", "1"),
    "unknown protocol": with_data("protocol: invalid choice: 'nine'", "--protocol", "nine"),
    "unknown YAML key": with_yaml(
        "data: demo:source\nlerning_rate: 1", "unknown option lerning_rate: .* learning_rate"
    ),
    "unknown model key": with_yaml("hiden_size: 64", r"options\.yaml: unknown option hiden_size: .* hidden_size\?"),
    "malformed YAML": with_yaml("data: [demo:source\nseed: 1", r"options\.yaml: not YAML .*line 2"),
    "YAML that is a list": with_yaml("- data", "one 'option: value' a line"),
    "wrong type in YAML": with_yaml("hidden_size: wide", "hidden_size.* invalid int value: 'wide'"),
    "wrong number in YAML": with_yaml("num_negatives: 2.5", "num_negatives.* invalid int value: '2.5'"),
    "list in YAML": with_yaml("hidden_size: [1, 2]", "hidden_size: one value expected"),
    "nothing in YAML": with_yaml("learning_rate:", "learning_rate.* invalid float value"),
    "wrong choice in YAML": with_yaml("modality_policy: sound", "invalid choice: 'sound'"),
    "missing YAML": with_arguments("pretrain", r"gone\.yaml: cannot be read", "{folder}/gone.yaml"),
    "output folder that is a file": with_arguments(
        "pretrain", "model.safetensors is a file", "--output_dir", "{source}/model.safetensors/run"
    ),
    "output folder of another run": with_arguments("pretrain", "Add --resume", "--output_dir", "{source}"),
    "evaluate without checkpoint": with_arguments("evaluate", "no such folder", "--checkpoint", "/no/model"),
    "recommend to an unknown user": with_arguments(
        "recommend", r"unknown user ids: \['nobody'\]", "--checkpoint", "{source}", "--users", "nobody"
    ),
    "recommend from an unknown item": with_arguments(
        "recommend", r"unknown item ids: \['nothing'\]", "--checkpoint", "{source}", "--history", "nothing"
    ),
    "recommend to users and a history": with_arguments(
        "recommend", "exclude each other", "--checkpoint", "{source}", "--history", "a", "--all_users"
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line_and_leaves_nothing(
    name: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script, arguments, message = BAD_INPUT[name](workplace, tmp_path)
    before, pristine = files(tmp_path), files(workplace)
    with pytest.raises(SystemExit) as caught:
        run(script, *arguments)
    assert caught.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and re.search(message, last), last
    assert files(tmp_path) == before and files(workplace) == pristine


def test_an_id_baseline_cannot_leave_its_catalogue(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    TransRecModel(TransRecConfig(num_items=7, hidden_size=8)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run("evaluate", "--checkpoint", tmp_path, "--data", workplace / "target", "--output_file", tmp_path / "report")
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
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture, small_files: None
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("pretrain", "--data", "demo:target", "--output_dir", tmp_path / "run", *QUICK)
    assert caught.value.code == 2
    assert re.search(r"error: .*checkpoint-2.* was removed", capsys.readouterr().err)
    assert not files(tmp_path / "run")
    with pytest.raises(SystemExit):
        run("finetune_no_trainer", "--from_checkpoint", workplace / "source", "--output_dir", tmp_path / "loop")
    assert re.search(r"error: .*loop: could not be written, nothing of it was kept", capsys.readouterr().err)
    assert not (tmp_path / "loop").exists()


def test_a_full_disk_at_the_last_save_keeps_the_checkpoints(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save = TransRecTrainer.save_model

    def full(self: TransRecTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save(self, output_dir, _internal_call)
        if not _internal_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TransRecTrainer, "save_model", full)
    with pytest.raises(SystemExit):
        run("pretrain", "--data", "demo:target", "--output_dir", tmp_path, *QUICK)
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_the_process_ends_with_code_2_and_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), "--data", str(tmp_path / "gone")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {tmp_path}/gone: no such file")
    assert not files(tmp_path)
