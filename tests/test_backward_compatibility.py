"""Checkpoints of every version that wrote one load and give what they gave; see `checkpoints/write_checkpoint.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing_utils import assert_same_weights
from transformers import AutoModel, AutoProcessor

from transrec_hf import ItemSource, Recommender, TransRecModel, load_catalogue
from transrec_hf.data.statistics import load_statistics
from transrec_hf.serving import building


CHECKPOINTS = sorted(path for path in (Path(__file__).parent / "checkpoints").iterdir() if path.is_dir())
MAX_BYTES = 200_000
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # of another processor's order of summation; a real change is far larger

pytestmark = pytest.mark.parametrize(
    "checkpoint", [path for path in CHECKPOINTS if path.name.startswith("v")], ids=lambda path: path.name
)


def test_it_is_small(checkpoint: Path) -> None:
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < MAX_BYTES


def test_loads_without_a_missing_or_unknown_weight(checkpoint: Path) -> None:
    model, found = TransRecModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(AutoModel.from_pretrained(checkpoint), model)
    assert AutoProcessor.from_pretrained(checkpoint).modalities == ["text", "image"]
    assert load_statistics(checkpoint)["num_items"] == 12


def test_gives_the_same_from_raw_items(checkpoint: Path, tmp_path: Path) -> None:
    stored = load_file(checkpoint / "outputs.safetensors")
    recommendations = json.loads((checkpoint / "recommendations.json").read_text())
    model, processor = TransRecModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    recommender = Recommender(model, ItemSource(load_catalogue(checkpoint / "items.parquet"), processor))
    torch.testing.assert_close(recommender.item_embeds, stored["item_embeds"], **TOLERANCE)

    histories = recommendations["histories"]
    length = max(map(len, histories))
    rows = [recommender.catalogue.rows(history) for history in histories]  # type: ignore[union-attr]
    index = torch.from_numpy(np.stack([np.pad(row, (0, length - len(row)), constant_values=-1) for row in rows]))
    with torch.no_grad():
        states = model.get_user_features(recommender.item_embeds, index, recommender.present)
    torch.testing.assert_close(states[index >= 0], stored["states"], **TOLERANCE)

    found = recommender.recommend(histories, k=5)
    assert [[item.item_id for item in items] for items in found] == recommendations["item_ids"]
    scores = torch.tensor([[item.score for item in items] for items in found])
    torch.testing.assert_close(scores, stored["scores"], **TOLERANCE)


def test_gives_the_same_from_its_index(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(building, "encode_catalogue")  # neither the weights nor the items have changed
    recommendations = json.loads((checkpoint / "recommendations.json").read_text())
    found = Recommender.from_pretrained(checkpoint, checkpoint / "items.parquet").recommend(
        recommendations["histories"], k=5
    )
    assert [[item.item_id for item in items] for items in found] == recommendations["item_ids"]
