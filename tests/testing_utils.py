"""Builders of tiny towers, models, items and users."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.multiprocessing
import transformers
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    BertConfig,
    BertTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    DistilBertConfig,
    MobileNetV1Config,
    MobileNetV2Config,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ResNetConfig,
    RobertaConfig,
    SiglipVisionConfig,
    TrainerCallback,
    ViTConfig,
    ViTImageProcessorPil,
)

from transrec_hf import (
    ItemSource,
    Recommender,
    TransRecConfig,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    encode_catalogue,
)
from transrec_hf.data import demo
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.data.interactions import Sequences, Split, leave_one_out
from transrec_hf.data.statistics import log_popularity
from transrec_hf.items.store import ActivationStore
from transrec_hf.model.configuration_transrec import FORMAT_1
from transrec_hf.serving.export import graphs_of, program_of
from transrec_hf.training.collator import DataCollatorForNextItem


IMAGE_SIZE = 32  # pixels, both sides
WORDS = ("red", "green", "blue", "old", "new", "hat", "sock", "shoe")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)

# weights so large that attention attends to something and a missing mask shows; dropout where a test asks for it
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PATCHES = {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": 16}
BERT = {**TRANSFORMER, "vocab_size": len(VOCABULARY), "max_position_embeddings": 24}

TEXT_TOWERS: dict[str, Callable[..., PreTrainedConfig]] = {
    "bert": partial(BertConfig, **BERT),
    "minilm": partial(BertConfig, **{**BERT, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "roberta": partial(RobertaConfig, **BERT, type_vocab_size=1, pad_token_id=0),
    "distilbert": partial(
        DistilBertConfig,
        vocab_size=len(VOCABULARY),
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        pad_token_id=0,
        initializer_range=0.3,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "modernbert": partial(
        ModernBertConfig,
        **BERT,
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
}
VISION_TOWERS: dict[str, Callable[..., PreTrainedConfig]] = {
    "vit": partial(ViTConfig, **PATCHES),
    "dinov2": partial(Dinov2Config, **{k: v for k, v in PATCHES.items() if k != "intermediate_size"}),
    "clip": partial(CLIPVisionConfig, **PATCHES),
    "siglip": partial(SiglipVisionConfig, **PATCHES),
    "resnet": partial(ResNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "mobilenet_v1": partial(MobileNetV1Config, image_size=IMAGE_SIZE, depth_multiplier=0.125, initializer_range=0.3),
    "mobilenet_v2": partial(MobileNetV2Config, image_size=IMAGE_SIZE, depth_multiplier=0.1, initializer_range=0.3),
}
USER_ENCODER = {
    **FORMAT_1,
    **TRANSFORMER,
    "max_position_embeddings": 6,
    "pooling_head_size": 4,
    "pooling_query_size": 8,
}
DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


# Models


def make_config(modalities: str | Sequence[str] = ("text", "image"), **fields: Any) -> TransRecConfig:
    """A model with a BERT, a ViT or both; `num_items` among the fields and no modalities make an ID baseline."""
    towers = {
        "text_config": TEXT_TOWERS["bert"]() if "text" in modalities else None,
        "vision_config": VISION_TOWERS["vit"]() if "image" in modalities else None,
    }
    return TransRecConfig(**{**USER_ENCODER, **towers, **fields})


def make_paper_config(**fields: Any) -> TransRecConfig:
    """The paper preset, only smaller."""
    sizes = {**USER_ENCODER, "intermediate_size": 8}
    towers = {"text_config": TEXT_TOWERS["bert"](), "vision_config": VISION_TOWERS["resnet"]()}
    return TransRecConfig.paper(**{**sizes, **towers, **fields})


def make_model(config: TransRecConfig | None = None, seed: int = 0, **fields: Any) -> TransRecModel:
    """A model in evaluation mode, whose biases and norms look as if they had learned something."""
    torch.manual_seed(seed)
    model = TransRecModel(config or make_config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "missing" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# Items and users


def make_tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)})


def make_image_processor() -> BaseImageProcessor:
    return ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def make_processor(modalities: str | Sequence[str] = ("text", "image")) -> TransRecProcessor:
    return TransRecProcessor(
        make_tokenizer() if "text" in modalities else None,
        make_image_processor() if "image" in modalities else None,
        max_text_length=16,
    )


def make_title(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(1, 8)))


def make_image(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    pixels = rng.integers(255, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_catalogue(num_items: int = 12, kinds: Sequence[str] = ("text", "image", "text image")) -> Catalogue:
    """Items `item-0`, `item-1`, ..., the same whatever the `kinds`: these tell in turn what of it an item shows."""
    rng = np.random.default_rng(0)
    shown = [kinds[row % len(kinds)] for row in range(num_items)]
    contents = [(make_title(rng), {"bytes": make_image(rng), "path": None}) for _ in shown]
    columns = {
        "item_id": [f"item-{row}" for row in range(num_items)],
        "text": [title if "text" in kind else None for kind, (title, _) in zip(shown, contents, strict=True)],
        "image": [image if "image" in kind else None for kind, (_, image) in zip(shown, contents, strict=True)],
    }
    return Catalogue(datasets.Dataset.from_dict(columns))


def catalogue_of(modality: str, *contents: Any, **columns: Any) -> Catalogue:
    """Items with these sounds or videos: bytes, a path or none each."""
    values = [{"path": one, "bytes": None} if isinstance(one, str) else {"bytes": one} for one in contents]
    rows = {"item_id": [f"item-{row}" for row in range(len(contents))], modality: values}
    return Catalogue(datasets.Dataset.from_dict(rows), **columns)


def make_sequences(lines: Sequence[Sequence[int]]) -> Sequences:
    ends = np.cumsum([len(line) for line in lines])
    items = np.concatenate(lines).astype(np.int32)
    users = np.array([f"user-{row}" for row in range(len(lines))])
    return Sequences(items, np.arange(len(items)), np.concatenate([[0], ends[:-1]]), ends, users)


def make_split(num_users: int = 10, num_items: int = 12, lengths: tuple[int, int] = (4, 11), seed: int = 0) -> Split:
    """Users who walk through the catalogue, mostly to the next item, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_users):
        steps = rng.choice([1, 1, 1, 2], size=rng.integers(*lengths, endpoint=True))
        lines.append((rng.integers(num_items) + np.cumsum(steps)) % num_items)
    return leave_one_out(make_sequences(lines))


def make_collator(
    config: TransRecConfig,
    catalogue: Catalogue | None = None,
    counts: np.ndarray | None = None,
    source: ItemSource | None = None,
    **options: Any,
) -> DataCollatorForNextItem:
    catalogue = make_catalogue() if catalogue is None else catalogue
    counts = np.arange(len(catalogue)) + 1 if counts is None else counts
    processor = make_processor(config.modalities) if config.modalities else None
    source = ItemSource(catalogue, processor) if source is None else source
    return DataCollatorForNextItem(source, config, log_popularity(counts), **options)


LINES = ((0, 1, 2, 3, 4), (5, 3, 5), (6, 7, 8, 9, 10, 11, 0), (2, 1))


def make_batch(
    config: TransRecConfig, lines: Sequence[Sequence[int]] = LINES, catalogue: Catalogue | None = None, **options: Any
) -> dict[str, Any]:
    """A training batch of users who chose the catalogue rows in `lines`."""
    features = [{"user": user, "items": np.array(line)} for user, line in enumerate(lines)]
    return make_collator(config, catalogue, **options)(features)


# Training

QUICK = (
    *("--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu", "--disable_tqdm", "True"),
    *("--trainable_blocks", "0", "--activation_store", "store"),
)
DESIGN = ("--item_map", "whitened", "--similarity", "cosine", "--content_prior", "True", "--popularity_prior", "True")


def shrink_demo(patch: pytest.MonkeyPatch) -> None:
    """A demo world of a few dozen items and users."""
    patch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
    patch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=30))


CHECKPOINTS = {"save_strategy": "epoch"}
BEST_CHECKPOINT = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}


def make_trainer(
    output_dir: str | os.PathLike,
    config: TransRecConfig | None = None,
    *,
    model: TransRecModel | None = None,
    catalogue: Catalogue | None = None,
    processor: TransRecProcessor | None = None,
    split: Split | None = None,
    trainer_class: type[TransRecTrainer] = TransRecTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> TransRecTrainer:
    """
    Two epochs of three steps, each logged, without evaluations and checkpoints (see `CHECKPOINTS`); whatever goes to
    `arguments` is an argument of the run.
    """
    model = make_model(config) if model is None else model
    catalogue = make_catalogue() if catalogue is None else catalogue
    if processor is None and model.config.modalities:
        processor = make_processor(model.config.modalities)
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "tower_learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    return trainer_class(
        model,
        TransRecTrainingArguments(str(output_dir), **{**defaults, **arguments}),
        catalogue=catalogue,
        split=make_split(num_items=len(catalogue)) if split is None else split,
        processing_class=processor,
        callbacks=list(callbacks),
    )


def train_and_serve(
    folder: Path, model: TransRecModel, source: ItemSource, trainable_blocks: int = 1
) -> tuple[TransRecModel, Recommender]:
    """A model that reads more than text and images: trained from stored states, reported, saved, loaded and served."""
    model.freeze_towers(trainable_blocks)
    trainer = make_trainer(
        folder / "run",
        model=model,
        catalogue=source.catalogue,
        processor=source.processor,
        num_train_epochs=1,
        trainable_blocks=trainable_blocks,
        activation_store=str(folder / "store"),
        item_chunk_size=2,
    )
    trainer.train()
    newest = model.config.modalities[-1]
    assert newest in trainer.report()["slices"]["target_modality"]
    trainer.save_model()
    assert newest in (folder / "run" / "README.md").read_text()
    loaded = TransRecModel.from_pretrained(folder / "run")
    assert_same_weights(model, loaded)
    assert loaded.config.to_dict()["format_version"] == 2
    processor = TransRecProcessor.from_pretrained(folder / "run")
    assert processor.modalities == list(model.config.modalities)
    return loaded, Recommender.from_pretrained(folder / "run", source.catalogue)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def logged(trainer: TransRecTrainer, name: str = "loss") -> dict[int, float]:
    """A logged value by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def load_example(name: str) -> ModuleType:
    """A script of `examples/` as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# Several processes


def _start(rank: int, work: Callable[..., Any], num_processes: int, port: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(num_processes), LOCAL_WORLD_SIZE=str(num_processes))
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork has that of its parent
    torch.save(work(*arguments), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def in_processes(
    work: Callable[..., Any],
    num_processes: int,
    folder: str | os.PathLike,
    *arguments: Any,
    start_method: str = "spawn",
) -> list[Any]:
    """
    What `work(*arguments)`, a function of a test module, returns in each of several processes, over gloo. `"fork"`
    starts at once, but cannot compute gradients.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _start,
        (work, num_processes, port, str(folder), arguments),
        nprocs=num_processes,
        join=False,
        start_method=start_method,
    )
    try:
        assert any(context.join(timeout=300) for _ in range(num_processes)), "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


# Comparisons


def gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bit for bit, names and buffers included."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def assert_stored_alike(folder: Path, model: TransRecModel, source: ItemSource) -> None:
    """Items have the same vectors from stored states."""
    store = ActivationStore(folder, model, source)
    store.fill()
    found, expected = encode_catalogue(model, store.source), encode_catalogue(model, source)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def assert_graph_is_general(model: TransRecModel, source: ItemSource, modality: str) -> None:
    """The graph of an export computes the same of any number of contents and windows."""
    graph = next(graph for graph in graphs_of(model, source.processor) if graph.name == modality)
    program = program_of(graph).module()
    for inputs in (graph.inputs, graph.others):
        torch.testing.assert_close(program(*inputs.values()), graph.module(*inputs.values()), atol=1e-5, rtol=1e-4)
