"""
Write a tiny checkpoint, its items and its outputs, for later versions to reproduce:

    PYTHONPATH=src:tests python tests/checkpoints/write_checkpoint.py

Run it once per version that changes what is written, and commit the folder; never rewrite the one of a release.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from testing_utils import make_catalogue, make_model, make_processor, make_split

from transrec_hf import ItemSource, Recommender, TransRecModel, __version__
from transrec_hf.data.statistics import data_statistics, save_statistics


HISTORIES = [["item-3", "item-7", "item-5"], ["item-1"]]


def outputs(model: TransRecModel, recommender: Recommender) -> dict[str, torch.Tensor]:
    """What must stay the same: vectors of the items, states of the users, scores of the recommendations."""
    rows = [[recommender.item_ids.tolist().index(item_id) for item_id in history] for history in HISTORIES]
    index = torch.tensor([row + [-1] * (3 - len(row)) for row in rows])
    with torch.no_grad():
        states = model.get_user_features(recommender.item_embeds, index, recommender.present)
    scores = [[item.score for item in found] for found in recommender.recommend(HISTORIES, k=5)]
    return {"item_embeds": recommender.item_embeds, "states": states[index >= 0], "scores": torch.tensor(scores)}


def main() -> None:
    folder = Path(__file__).parent / f"v{__version__}"
    catalogue, model, processor = make_catalogue(), make_model(seed=1), make_processor()
    recommender = Recommender(model, ItemSource(catalogue, processor))
    recommender.save_pretrained(folder)
    save_statistics(data_statistics(catalogue, make_split()), folder)
    for code in folder.glob("*.py"):
        code.unlink()  # this tests the package, not the code that travels
    catalogue.items.to_parquet(folder / "items.parquet")
    save_file(outputs(model, recommender), folder / "outputs.safetensors")
    found = [[item.item_id for item in items] for items in recommender.recommend(HISTORIES, k=5)]
    (folder / "recommendations.json").write_text(
        json.dumps({"histories": HISTORIES, "item_ids": found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
