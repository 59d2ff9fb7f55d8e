"""
Checkpoints where `transformers`, torch and Pillow are installed, but not this package: the code comes with them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import load_file
from testing_utils import make_model, make_processor

from transrec_hf import TransRecModel


MODULES = {
    "item_encoder_transrec.py": None,
    "modalities_transrec.py": None,
    "towers_transrec.py": None,
    "windows_transrec.py": None,
    "tuning_transrec.py": None,
    "user_encoder_transrec.py": None,
    "configuration_transrec.py": "config.json",
    "loss_transrec.py": None,
    "modeling_transrec.py": "config.json",
    "processing_transrec.py": "processor_config.json",
}
KINDS: dict[str, dict[str, Any]] = {"text image": {}, "text": {}, "image": {}, "": {"num_items": 3}}
STRANGER = """
import importlib.util, json, sys

for name in ("transrec_hf", "datasets", "accelerate", "evaluate", "peft", "pyarrow", "torchvision"):
    assert importlib.util.find_spec(name) is None, f"{name} is here, so this proves nothing"

from PIL import Image
from safetensors.torch import save_file
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

texts = ["red hat", None, "old blue shoe"]
images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (8, 9)), None]
trusted = {"trust_remote_code": True}

for place, modalities, rows, output in json.loads(sys.argv[1]):
    try:
        AutoModel.from_pretrained(place, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("code was run that nobody trusted")

    config = AutoConfig.from_pretrained(place, **trusted)
    model = AutoModel.from_pretrained(place, **trusted).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert config.modalities == model.config.modalities == tuple(modalities)
    items = {"item_rows": torch.arange(3), "item_modalities": None}
    if modalities:
        processor = AutoProcessor.from_pretrained(place, **trusted)
        assert processor.modalities == modalities, processor.modalities
        items = processor(text=[texts[row] for row in rows], images=[images[row] for row in rows])
    with torch.no_grad():
        item_embeds = model.get_item_features(**items)
        states = model.get_user_features(item_embeds, torch.tensor([[0, 1, -1]]), items["item_modalities"])
    save_file({"item_embeds": item_embeds, "states": states}, output)

    # it can be passed on, code included
    model.save_pretrained(output + "-saved")
    again = AutoModel.from_pretrained(output + "-saved", **trusted)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
"""


def requirements(*names: str) -> set[str]:
    """The distributions that those named need, themselves included."""
    found: set[str] = set()
    open_names = list(names)
    while open_names:
        name = re.sub(r"[-_.]+", "-", open_names.pop()).lower()
        if name in found:
            continue
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        open_names += [re.match(r"[\w.-]+", line).group() for line in needed if "extra ==" not in line]  # type: ignore
    return found


def bare_environment(folder: Path) -> Path:
    """A folder of links to `transformers`, torch, Pillow and what they need: a fresh environment in no time."""
    folder.mkdir()
    for name in requirements("transformers", "torch", "pillow"):
        distribution = importlib.metadata.distribution(name)
        root = Path(str(distribution.locate_file("")))
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(root / top)
    return folder


def rows_with(modalities: str) -> list[int]:
    """Which of the three items have one of the modalities."""
    return {"text": [0, 2], "image": [0, 1]}.get(modalities, [0, 1, 2])


def push(modalities: str) -> TransRecModel:
    """A model of this kind, in a repository of its own."""
    model = make_model(modalities=modalities.split(), **KINDS[modalities])
    model.push_to_hub(repo_id(modalities))
    if modalities:
        make_processor(modalities.split()).push_to_hub(repo_id(modalities))
    return model


def repo_id(modalities: str) -> str:
    return f"me/tiny-{modalities.replace(' ', '-') or 'ids'}"


def expected(model: TransRecModel) -> dict[str, torch.Tensor]:
    """What the stranger computes, with this package."""
    modalities = list(model.config.modalities)
    texts = ["red hat", None, "old blue shoe"]
    images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (8, 9)), None]
    rows = rows_with(" ".join(modalities))
    items: Any = {"item_rows": torch.arange(3), "item_modalities": None}
    if modalities:
        items = make_processor(modalities)(text=[texts[row] for row in rows], images=[images[row] for row in rows])
    with torch.no_grad():
        item_embeds = model.get_item_features(**items)
        states = model.get_user_features(item_embeds, torch.tensor([[0, 1, -1]]), items["item_modalities"])
    return {"item_embeds": item_embeds, "states": states}


def check_stranger(python: list[str], hub: LocalHub, folder: Path) -> None:
    """The same vectors from every kind of model, online and then from the cache."""
    models = {kind: push(kind) for kind in KINDS}
    own = {**hub.environment, "HF_HOME": str(folder / "home"), "PATH": os.environ["PATH"]}
    for state in ({}, {"HF_HUB_OFFLINE": "1"}):
        hub.log.clear()
        outputs = {kind: folder / f"{repo_id(kind)}{len(state)}.safetensors" for kind in KINDS}
        outputs[""].parent.mkdir(exist_ok=True)
        jobs = [(repo_id(kind), kind.split(), rows_with(kind), str(outputs[kind])) for kind in KINDS]
        process = subprocess.run(
            [*python, STRANGER, json.dumps(jobs)],
            env={**own, **state},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        assert bool(hub.log) != bool(state)
        for kind, model in models.items():
            found = load_file(outputs[kind])
            for name, wanted in expected(model).items():
                torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-5)


def test_a_repository_carries_its_code(hub: LocalHub) -> None:
    push("text image")
    files = hub.files(repo_id("text image"))
    for module, config in MODULES.items():
        source = Path(sys.modules[f"transrec_hf.model.{module.removesuffix('.py')}"].__file__ or "").read_bytes()
        assert files[module] == source
        if config is not None:
            assert module.removesuffix(".py") in str(json.loads(files[config])["auto_map"])
    assert {name for name in files if name.endswith(".py")} == MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_code_that_travels_imports_siblings_only(module: str) -> None:
    source = Path(sys.modules[f"transrec_hf.model.{module.removesuffix('.py')}"].__file__ or "").read_text()
    imported = re.findall(r"^\s*(?:from|import) +([\w.]+)", source, flags=re.MULTILINE)
    siblings = {name for name in imported if name.startswith(".")}
    assert siblings <= {f".{name.removesuffix('.py')}" for name in MODULES}
    others = {name.split(".")[0] for name in imported if not name.startswith(".")}
    allowed = {"torch", "transformers", "huggingface_hub", "PIL"}
    assert others - set(sys.stdlib_module_names) <= allowed


def test_without_the_package(hub: LocalHub, tmp_path: Path) -> None:
    site = str(bare_environment(tmp_path / "site"))
    only_there = f"import sys; sys.path.insert(0, {site!r}); exec(sys.argv.pop(1))"
    check_stranger([sys.executable, "-I", "-S", "-c", only_there], hub, tmp_path)


@pytest.mark.slow
def test_in_a_fresh_virtual_environment(hub: LocalHub, tmp_path: Path) -> None:
    """As above with nothing shared: an environment made by `venv` and `pip`."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    names = ("torch", "transformers", "pillow")
    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]
    for version in versions:  # torch first, so that nothing chooses another build of it
        subprocess.run([python, "-m", "pip", "install", "--quiet", version], check=True)
    check_stranger([python, "-I", "-c"], hub, tmp_path)
