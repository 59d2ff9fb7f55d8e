"""A model as graphs that run without this package: ONNX, or programs of `torch.export`."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import __version__
from ..errors import DataError
from ..files import written_whole
from ..items.meeting import ItemStatistics
from ..model.modalities_transrec import COLUMNS, MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..model.user_encoder_transrec import last_state


MANIFEST_NAME = "export.json"
TOLERANCE = 1e-4
"""Largest allowed difference between the outputs of a graph and of the model, for outputs of size 1."""
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def without(module: Any, *names: str) -> Any:
    """The same module without some of its parts, so that their weights are not written into the file of a graph."""
    light = copy.copy(module)
    light._modules = {name: part for name, part in module._modules.items() if name not in names}
    return light


class Tower(nn.Module):
    """Turns contents of one modality, and their mask if there is one, into vectors `(n, hidden_size)`."""

    def __init__(self, model: TransRecModel, name: str):
        super().__init__()
        others = [module for other in model.config.modalities if other != name for module in parts_of(model, other)]
        self.encoder, self.name = without(model.item_encoder, "item_embedding", *others), name
        self.encoder.modalities = (name,)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.encoder.encode(self.name, *inputs)


class Items(nn.Module):
    """
    Turns the vectors of the modalities of items into item vectors `(n, hidden_size)`, one number wider if the model
    adds popularity. The inputs are one tensor `(n, hidden_size)` for each modality (any numbers where an item lacks
    it); `present`, `(n, n_modalities)`, in the order of the model; the rows of the items if the model has ID vectors
    (-1 for items without one); and their log popularity if the model adds popularity.
    """

    def __init__(self, model: TransRecModel):
        super().__init__()
        of_contents = [module for name in model.config.modalities for module in parts_of(model, name)]
        self.model = without(model, "item_encoder", "user_encoder", "content_prior")
        self.encoder = without(model.item_encoder, "text_pooling", *of_contents)

    def forward(self, *inputs: Tensor) -> Tensor:
        config, encoder = self.model.config, self.encoder
        modalities, rest, vectors = config.modalities, list(inputs[len(config.modalities) :]), None
        if modalities:
            present = rest.pop(0)
            slots = torch.arange(present.shape[0], device=present.device)
            parts = {
                name: (part * present[:, i : i + 1], slots)
                for i, (name, part) in enumerate(zip(modalities, inputs, strict=False))
            }
            vectors = encoder.fuse(parts, all_columns(present, modalities))
        if config.num_items is not None:
            rows = rest.pop(0)
            of_ids = encoder.item_embedding(rows.clamp(min=0)) * (rows >= 0).unsqueeze(1)
            vectors = of_ids if vectors is None else vectors + of_ids
        finished = self.model._finished(vectors)  # type: ignore[arg-type]
        return self.model.with_popularity(finished, rest.pop(0) if config.popularity_prior else None)


class Users(nn.Module):
    """
    Turns the item vectors of histories, oldest first, and their mask `(n_users, length)` into user vectors, whose dot
    product with item vectors is the score. All vectors are as wide as those of [`Items`].
    """

    def __init__(self, model: TransRecModel):
        super().__init__()
        self.model = without(model, "item_encoder")
        self.reads_present = hasattr(model.user_encoder, "modality_embedding")

    def forward(self, *inputs: Tensor) -> Tensor:
        modalities, (vectors, mask, *rest) = self.model.config.modalities, inputs
        present = all_columns(rest.pop(0).flatten(0, 1), modalities) if self.reads_present else None
        slots = torch.arange(vectors.shape[0] * vectors.shape[1], device=vectors.device).view(vectors.shape[:2])
        history = torch.where(mask, slots, -1)
        vectors = vectors.flatten(0, 1)[:, : self.model.config.hidden_size]
        states = self.model.get_user_features(vectors, history, present, *rest)
        return last_state(states, history)


def parts_of(model: TransRecModel, name: str) -> list[str]:
    """Names of the parts of the item encoder that only the contents of one modality pass."""
    modality = MODALITIES[name]
    return [part for part in (modality.tower, modality.projection, f"{name}_side") if part]


def all_columns(present: Tensor, modalities: tuple[str, ...]) -> Tensor:
    """
    Which modalities items have, `(n, len(MODALITIES))`: a column for every modality, not only for those of the model.
    """
    absent = torch.zeros_like(present[:, 0])
    given = {COLUMNS[name]: present[:, i] for i, name in enumerate(modalities)}
    return torch.stack([given.get(column, absent) for column in range(len(MODALITIES))], dim=1)


@dataclass
class Graph:
    """
    One graph of an export.

    Args:
        name (`str`): Name of its file.
        module (`nn.Module`): The module that it computes.
        output (`str`): Name of the output.
        inputs (`dict[str, Tensor]`): Example inputs.
        others (`dict[str, Tensor]`): Example inputs of another batch size and another length.
        dynamic (`dict[str, list[str]]`): For each input, the names of the leading dimensions that may change.
    """

    name: str
    module: nn.Module
    output: str
    inputs: dict[str, Tensor]
    others: dict[str, Tensor]
    dynamic: dict[str, list[str]]


def graphs_of(model: TransRecModel, processor: TransRecProcessor | None) -> Iterator[Graph]:
    """The graphs of a model: one for each modality, `items` and `users`."""
    config, generator = model.config, torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def mask(count: int, length: int) -> Tensor:
        return torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=generator)

    def both(make: Any, longest: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return make(3, min(5, longest)), make(4, min(8, longest - 1) if longest > 2 else longest)

    def texts(count: int, length: int) -> dict[str, Tensor]:
        real = mask(count, length).long()
        tokens = torch.randint(config.text_config.vocab_size, real.shape, generator=generator)
        return {"input_ids": tokens * real, "attention_mask": real}

    def images(count: int, length: int) -> dict[str, Tensor]:
        assert processor is not None
        one = processor.prepare("image", [Image.new("RGB", (64, 64))])["pixel_values"]
        return {"pixel_values": numbers(count, *one.shape[1:])}

    def features(count: int, length: int) -> dict[str, Tensor]:
        return {"features": numbers(count, config.features_size)}

    def items(count: int, length: int) -> dict[str, Tensor]:
        inputs = {f"{name}_vectors": numbers(count, config.hidden_size) for name in config.modalities}
        if inputs:
            inputs["present"] = torch.rand(count, len(inputs), generator=generator) < 0.5
            inputs["present"][:, 0] |= ~inputs["present"].any(dim=1)
        if config.num_items is not None:
            inputs["item_rows"] = torch.randint(-1, config.num_items, (count,), generator=generator)
        if config.popularity_prior:
            inputs["log_popularity"] = numbers(count)
        return inputs

    def users(count: int, length: int) -> dict[str, Tensor]:
        width = config.hidden_size + config.popularity_prior
        inputs = {"item_vectors": numbers(count, length, width), "mask": mask(count, length)}
        if hasattr(model.user_encoder, "modality_embedding"):
            inputs["present"] = torch.ones(count, length, len(config.modalities), dtype=torch.bool)
        if config.time_buckets:
            inputs["timestamps"] = torch.arange(count * length).view(count, length)
        return inputs

    def sounds(count: int, length: int) -> dict[str, Tensor]:
        assert processor is not None
        one = processor.prepare("audio", [torch.zeros(processor.window_samples)])["audio_values"]
        return {"audio_values": numbers(count, length, *one.shape[2:]), "audio_mask": mask(count, length).float()}

    def videos(count: int, length: int) -> dict[str, Tensor]:
        assert processor is not None
        one = processor.prepare("video", [[Image.new("RGB", (64, 64))]])["video_values"]
        return {"video_values": numbers(count, length, *one.shape[2:]), "video_mask": mask(count, length).float()}

    def codes(count: int, length: int) -> dict[str, Tensor]:
        return {
            "codes": torch.randint(config.codebook_size, (count, int(config.num_codebooks or 0)), generator=generator)
        }

    contents = {"text": texts, "image": images, "features": features, "audio": sounds, "video": videos}
    contents["codes"] = codes
    dims_of = {
        "text": ["texts", "tokens"],
        "image": ["images"],
        "features": ["features"],
        "codes": ["codes"],
        "audio": ["sounds", "windows"],
        "video": ["videos", "frames"],
    }
    for name in config.modalities:
        longest = (model.item_encoder.positions or 2**20) if MODALITIES[name].has_tokens else 8
        dims = dims_of[name]
        given = both(contents[name], longest)
        yield Graph(name, Tower(model, name), f"{name}_vectors", *given, dict.fromkeys(given[0], dims))
    given = both(items)
    yield Graph("items", Items(model), "item_vectors", *given, {name: ["items"] for name in given[0]})
    given = both(users, config.max_position_embeddings)
    yield Graph("users", Users(model), "user_vectors", *given, {name: ["users", "length"] for name in given[0]})


def program_of(graph: Graph) -> ExportedProgram:
    """
    A graph as a program of `torch.export`, with free batch size and length. This fails if the code makes one of them a
    constant. The ONNX exporter alone would write such a constant into the file without a warning.
    """
    shapes = [
        {i: Dim.DYNAMIC for i in range(len(graph.dynamic[name])) if tensor.shape[i] > 2}
        for name, tensor in graph.inputs.items()
    ]
    # the modules take `*inputs`, which are one argument to torch.export
    return torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=(tuple(shapes),))


@torch.no_grad()
def export_model(
    model: TransRecModel,
    processor: TransRecProcessor | None,
    folder: str | os.PathLike,
    file_format: str = "onnx",
    statistics: ItemStatistics | None = None,
) -> dict[str, float]:
    """
    Write a model as graphs: one for each modality, one that combines their vectors into item vectors, and one that
    turns the item vectors of histories into user vectors. The folder also holds the processor, the statistics of the
    items, and `export.json`, which names inputs, outputs and sizes. Each graph is run on another batch size and
    another length than its examples, and compared with the model.

    Args:
        model ([`TransRecModel`]): The model, exported in fp32.
        processor ([`TransRecProcessor`], *optional*): The processor of the model; the ID baseline has none.
        folder (`str` or `os.PathLike`): Output folder; it appears as a whole.
        file_format (`str`, *optional*, defaults to `"onnx"`): Or `"torch"`, for `torch.export.load`.
        statistics ([`ItemStatistics`], *optional*): The item statistics of the checkpoint, in which callers find the
            row of an item's ID vector and its popularity.

    Returns:
        `dict[str, float]`: For each graph, its largest difference to the model.

    Raises:
        [`DataError`]: If a library for ONNX is missing, or the output of a graph differs from the model's.
    """
    if file_format not in SUFFIXES:
        raise DataError(f"there is no file format {file_format!r}: choose one of {', '.join(SUFFIXES)}")
    for library in ("onnx", "onnxscript", "onnxruntime") if file_format == "onnx" else ():
        if importlib.util.find_spec(library) is None:
            raise DataError(f"{library} is not installed: pip install 'transrec-hf[export]'")
    model = model.float().cpu().eval()
    config, suffix = model.config, SUFFIXES[file_format]
    manifest: dict[str, Any] = {
        "transrec_hf": __version__,
        "modalities": list(config.modalities),
        "hidden_size": config.hidden_size,
        "max_history": config.max_position_embeddings,
        "popularity_prior": config.popularity_prior,
        "graphs": {},
    }
    found = {}
    with written_whole(folder) as partial:
        for graph in graphs_of(model, processor):
            file = partial / f"{graph.name}{suffix}"
            with _quiet():
                program = program_of(graph)
                if file_format == "onnx":
                    names: Any = {"input_names": list(graph.inputs), "output_names": [graph.output]}
                    torch.onnx.export(program, (), file, dynamo=True, verbose=False, **names)
                else:
                    torch.export.save(program, file)
            found[graph.name] = difference(graph, file)
            if not found[graph.name] <= TOLERANCE:
                raise DataError(
                    f"{file.name}: the graph differs from the model by {found[graph.name]:.1e} of its largest number, "
                    f"more than {TOLERANCE:.0e}. Nothing was written; report this with the output of `transrec env`."
                )
            manifest["graphs"][graph.name] = {
                "file": file.name,
                "inputs": {
                    name: [*graph.dynamic[name], *tensor.shape[len(graph.dynamic[name]) :]]
                    for name, tensor in graph.inputs.items()
                },
                "output": graph.output,
            }
        if processor is not None:
            for part in (MODALITIES[name].part for name in processor.modalities):
                if part is not None:
                    getattr(processor, part).save_pretrained(partial)
            manifest["max_text_length"] = processor.max_text_length
        if statistics is not None:
            statistics.save(partial)
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the messages of exporters about missing operators of torchvision and about deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def difference(graph: Graph, file: Path) -> float:
    """The largest difference between the outputs of a graph in a file and of its module, with outputs scaled to 1."""
    worst = 0.0
    for inputs in (graph.inputs, graph.others):
        expected = graph.module(*inputs.values()).numpy()
        if file.suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        else:
            got = torch.export.load(file).module()(*inputs.values()).numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        worst = max(worst, float(np.abs(got - expected).max()) / scale)
    return worst


__all__ = ["export_model"]
