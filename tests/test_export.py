"""Exported graphs: they compute what the model does, for another batch and another length too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing_utils import make_catalogue, make_config, make_model, make_processor
from transformers import MobileNetV1ImageProcessorPil

import transrec_hf.serving.export
from transrec_hf import DataError, ItemSource, Recommender, TransRecModel
from transrec_hf.commands.export import export
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.serving.export import export_model, graphs_of, program_of


ROOT = Path(__file__).parents[1]
EVERYTHING: dict[str, Any] = {
    "modalities": ("text", "image"),
    "item_map": "whitened",
    "content_prior": True,
    "similarity": "cosine",
    "popularity_prior": True,
    "num_items": 12,
}


class Session:
    """The graphs of a folder, run by their names."""

    def __init__(self, folder: Path):
        self.about = json.loads((folder / "export.json").read_text())
        self.loaded: dict[str, Any] = {}
        for name, graph in self.about["graphs"].items():
            if graph["file"].endswith(".pt2"):
                self.loaded[name] = torch.export.load(folder / graph["file"]).module()
            else:
                self.loaded[name] = pytest.importorskip("onnxruntime").InferenceSession(folder / graph["file"])

    def __call__(self, name: str, *inputs: torch.Tensor) -> torch.Tensor:
        graph, session = self.about["graphs"][name], self.loaded[name]
        if graph["file"].endswith(".pt2"):
            return session(*inputs)
        assert [given.name for given in session.get_inputs()] == list(graph["inputs"])
        assert [given.name for given in session.get_outputs()] == [graph["output"]]
        numbers = (tensor.numpy() for tensor in inputs)
        return torch.from_numpy(session.run(None, dict(zip(graph["inputs"], numbers, strict=True)))[0])


@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_graphs_compute_what_the_model_does(file_format: str, tmp_path: Path) -> None:
    """Items of all kinds one by one and together, histories of other lengths: as a service would run the graphs."""
    if file_format == "onnx":
        pytest.importorskip("onnxscript")
    model, processor, source = make_model(make_config(**EVERYTHING)), make_processor(), make_catalogue()
    differences = export_model(model, processor, tmp_path / "out", file_format)
    assert set(differences) == {"text", "image", "items", "users"} and max(differences.values()) < 1e-4
    run = Session(tmp_path / "out")
    assert run.about["popularity_prior"] and run.about["max_text_length"] == 16
    with torch.no_grad():
        for rows in ([0, 1, 2, 3, 4, 5, 6], [8], [9, 10, 11, 0, 2]):
            items = [source.read(row, ["text", "image"]) for row in rows]
            inputs = processor([item.get("text") for item in items], [item.get("image") for item in items])
            popularity = -torch.rand(len(rows))
            expected = model.get_item_features(**inputs, item_rows=torch.tensor(rows))
            expected = model.with_popularity(expected, popularity)
            vectors = {name: torch.zeros(len(rows), 16) for name in ("text", "image")}
            if "input_ids" in inputs:
                vectors["text"][inputs["text_index"]] = run("text", inputs["input_ids"], inputs["attention_mask"])
            if "pixel_values" in inputs:
                vectors["image"][inputs["image_index"]] = run("image", inputs["pixel_values"])
            present = inputs["item_modalities"][:, :2]
            got = run("items", vectors["text"], vectors["image"], present, torch.tensor(rows), popularity)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for lengths in ([6, 3, 1, 5], [2], [1]):
            histories = torch.full((len(lengths), max(lengths)), -1)
            for user, length in enumerate(lengths):
                histories[user, :length] = torch.randint(12, (length,))
            table = torch.randn(12, 17)
            expected = model.get_user_features(table[:, :16], histories, torch.ones(12, 3, dtype=torch.bool))
            last = expected[torch.arange(len(lengths)), torch.tensor(lengths) - 1]
            present = torch.ones(*histories.shape, 2, dtype=torch.bool)
            got = run("users", table[histories.clamp(min=0)], histories >= 0, present)
            torch.testing.assert_close(got, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"modalities": "", "num_items": 5, "max_position_embeddings": 1},
        {"modalities": "", "features_size": 7, "max_position_embeddings": 2},
        {"modalities": "text", "user_encoder": "hstu", "time_buckets": 8},
        {"modalities": "text", "text_pooling": "attention", "user_encoder": "gru"},
        {"modalities": "text", "text_depths": 3},
        {"modalities": "text", "side": {"size": 4, "depths": {"text": [[1, 16]]}}},
    ],
    ids=["ids", "vectors", "hstu with time", "gru with attention", "states of several depths", "side network"],
)
def test_programs_of_other_models_are_theirs(config: dict[str, Any]) -> None:
    """Batch and length are free: where the code pins one, `torch.export` fails."""
    model = make_model(make_config(**config))
    processor = make_processor("text") if "text" in config["modalities"] else None
    names = []
    with torch.no_grad():
        for graph in graphs_of(model, processor):
            program = program_of(graph).module()
            names.append(graph.name)
            for inputs in (graph.inputs, graph.others):
                given = list(inputs.values())
                torch.testing.assert_close(program(*given), graph.module(*given), rtol=1e-4, atol=1e-5)
    assert names == [*model.config.modalities, "items", "users"]


def test_a_graph_holds_no_weights_of_the_others() -> None:
    model = make_model(make_config())
    for graph in graphs_of(model, make_processor()):
        of_text = any("text_model" in name for name in graph.module.state_dict())
        of_users = any("user_encoder" in name for name in graph.module.state_dict())
        assert (of_text, of_users) == (graph.name == "text", graph.name == "users")
    assert hasattr(model.item_encoder, "text_model") and model.item_encoder.modalities == ("text", "image")


def test_a_graph_that_is_wrong_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transrec_hf.serving.export, "difference", lambda graph, file: float("nan"))
    with pytest.raises(DataError, match=r"items\.pt2: the graph differs from the model by nan"):
        export_model(make_model(make_config("", num_items=3)), None, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transrec_hf.serving.export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"onnx is not installed: pip install 'transrec-hf\[export\]'"):
        export_model(make_model(make_config("", num_items=3)), None, tmp_path / "out")
    with pytest.raises(DataError, match="no file format 'tflite': choose one of onnx, torch"):
        export_model(make_model(make_config("", num_items=3)), None, tmp_path / "out", "tflite")


HYBRID = {"similarity": "cosine", "content_prior": True, "popularity_prior": True, "num_items": 200}
CUT = MobileNetV1ImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})


@pytest.mark.slow
@pytest.mark.parametrize(("config", "images"), [({}, None), (HYBRID, CUT)], ids=["content", "hybrid, images cut"])
def test_the_example_recommends_without_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture, config: dict[str, Any], images: Any
) -> None:
    """Also items that the checkpoint has no ID vector of."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, processor, target = TransRecModel(demo_config(**config)).eval(), demo_processor(), demo_world().target
    processor.image_processor = images or processor.image_processor
    statistics = None
    if config:
        torch.nn.init.normal_(model.item_encoder.item_embedding.weight, std=0.5)
        ids, counts = target.catalogue.item_ids, target.sequences.item_counts(len(target.catalogue))
        statistics = ItemStatistics(ids[:200][::-1], counts[:200][::-1])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    if statistics is not None:
        statistics.save(tmp_path / "model")
    target.save(tmp_path)
    assert max(export([str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx")]).values()) < 1e-4
    assert capsys.readouterr().out.count("differs from the model by") == 4
    with pytest.raises(DataError, match="holds an export already"):
        export([str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx")])
    history = target.catalogue.item_ids[[0, 1, 250]].tolist()
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'transrec_hf'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(ROOT / "examples" / "onnx_only.py"), str(tmp_path / "onnx")]
    done = subprocess.run(
        [*command, str(tmp_path / "items.parquet"), *history],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    expected = Recommender(model, ItemSource(target.catalogue, processor), statistics=statistics).recommend(history, 5)
    assert [item for item, _ in found] == [item.item_id for item in expected]
    np.testing.assert_allclose([float(score) for _, score in found], [item.score for item in expected], atol=2e-3)
