"""Every family of transformers that can be a tower is one, with and without the store; the others are refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from testing_utils import make_catalogue, make_config, make_model, make_processor
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transrec_hf import ActivationStore, ItemSource, encode_catalogue
from transrec_hf.model.towers_transrec import build_tower


SENTENCES = ("cannot be the", "has a decoder too", "does not name the width")
STORE_SENTENCES = ("cannot continue from stored states", "is frozen, so there is", "has no list of blocks")
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "emb_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_inner", "d_ff", "ffn_dim"), 24),
    **dict.fromkeys(("head_dim", "d_kv", "patch_size"), 8),
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "image_size": 32,
    "num_channels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_window": 4,
    "block_size": 2,
}
OF_STAGES: dict[str, dict[str, Any]] = {
    "convnext": {"patch_size": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "convnextv2": {"patch_size": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "donut-swin": {"patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 2},
    "hiera": {
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "embed_dim": 8,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 2],
        "num_query_pool": 2,
    },
    "pvt": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "pvt_v2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "swin": {"patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 2},
    "swinv2": {"patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 2},
    "yolos": {"image_size": [32, 32]},
}
LARGE = 30_000_000  # parameters, of a family whose sizes have other names


def tiny_configs() -> Iterator[tuple[str, Any]]:
    """Of each family that can be made small, by the common names of sizes."""
    for name in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[name]
        if kind not in AutoModel._model_mapping or name == "transrec":
            continue
        known = set(inspect.signature(kind.__init__).parameters)
        known |= {field for base in kind.__mro__ for field in getattr(base, "__annotations__", {})}
        sizes = {field: value for field, value in {**SIZES, **OF_STAGES.get(name, {})}.items() if field in known}
        try:
            config = kind(**sizes)
            with torch.device("meta"):
                if sum(parameter.numel() for parameter in build_tower(config).parameters()) > LARGE:
                    continue
        except Exception:  # of a size that is none for this family, or a package that is not here
            continue
        yield name, config


def outcome(config: Any, folder: Path) -> str:
    """What a family is good for. Anything but a result or one of our sentences is raised."""
    found = AutoModel._model_mapping[type(config)]
    kind = getattr(found[0] if isinstance(found, tuple) else found, "main_input_name", "")
    modality = "image" if kind == "pixel_values" else "text"
    catalogue, processor = make_catalogue(6, kinds=(modality,)), make_processor(modality)
    try:
        model = make_model(
            make_config(modality, **{"vision_config" if modality == "image" else "text_config": config})
        )
    except ValueError as error:
        assert any(sentence in str(error) for sentence in SENTENCES), error
        return "refused"
    source = ItemSource(catalogue, processor)
    model.train()
    vectors = model.get_item_features(source.batch(np.arange(6)))
    vectors.square().sum().backward()
    assert vectors.isfinite().all()
    try:
        model.freeze_towers(1)
        store = ActivationStore(folder, model, source)
    except ValueError as error:
        assert any(sentence in str(error) for sentence in STORE_SENTENCES), error
        return "without the store"
    store.fill()
    expected = encode_catalogue(model, source)
    torch.testing.assert_close(encode_catalogue(model, store.source), expected, atol=1e-4, rtol=1e-3)
    return "with the store"


@pytest.mark.slow
def test_every_family_is_a_tower_or_is_refused(tmp_path: Path) -> None:
    outcomes: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name, config in tiny_configs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes[name] = outcome(config, tmp_path / name)
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {str(error)[:150]}"
    counts = {kind: sum(found == kind for found in outcomes.values()) for kind in sorted({*outcomes.values()})}
    print(f"\ntransformers {transformers.__version__}: {counts}")
    for kind in counts:
        print(kind, *(name for name, found in outcomes.items() if found == kind))
    assert not broken, "\n".join(f"{name}: {reason}" for name, reason in broken.items())
    assert counts["with the store"] > 100
    for name in ("mpnet", "deberta", "deberta-v2", "rembert", "swin", "hiera", "data2vec-vision"):
        assert outcomes[name] == "with the store", name
