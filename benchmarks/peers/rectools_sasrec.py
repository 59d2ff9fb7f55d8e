"""Train RecTools' SASRec until it no longer improves, and test it: leave-one-out, ranking all but the history."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from serving import serve


def splits(data: Path) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame, pd.Series]:
    """Returns the training interactions, the validation targets, the interactions with these, and the test targets."""
    table = pd.read_parquet(data / "interactions.parquet", columns=["user_id", "item_id", "timestamp"])
    table = table.sort_values("timestamp", kind="stable")
    table.columns = [Columns.User, Columns.Item, Columns.Datetime]
    table[Columns.Datetime] = table.groupby(Columns.User).cumcount()  # any increasing number, but no equal ones
    table[Columns.Weight] = 1.0
    from_end = table.groupby(Columns.User).cumcount(ascending=False)
    targets = [table[from_end == place].set_index(Columns.User)[Columns.Item] for place in (1, 0)]
    return table[from_end >= 2], targets[0], table[from_end >= 1], targets[1]


def metrics(model: SASRecModel, seen: pd.DataFrame, targets: pd.Series) -> dict[str, float]:
    """Ranks the whole catalogue without the history of each user."""
    known = targets.index[targets.index.isin(seen[Columns.User])].to_numpy()
    ranked = model.recommend(known, Dataset.construct(seen), k=10, filter_viewed=True, on_unsupported_targets="ignore")
    hits = ranked[ranked[Columns.Item].to_numpy() == targets.loc[ranked[Columns.User]].to_numpy()]
    gains = 1 / np.log2(hits[Columns.Rank].to_numpy() + 1)
    return {"hit_rate@10": len(hits) / len(targets), "ndcg@10": float(gains.sum()) / len(targets)}


def train(data: str, seed: int, epochs: int, patience: int, **settings: Any) -> dict[str, Any]:
    """
    Train, keep the epoch with the best validation ndcg@10, and test it.

    Args:
        data (`str`): Folder of the data set.
        seed (`int`): Seed of weights, batches and dropout.
        epochs (`int`): The most epochs.
        patience (`int`): Epochs without a better validation metric after which training ends.
        settings: Settings of `SASRecModel`.

    Returns:
        `dict`: The `seconds` of each epoch, the `best_epoch` counted from 1, and the `test` metrics.
    """
    seed_everything(seed)
    seen, validation, longer, test = splits(Path(data))
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    model = SASRecModel(
        get_trainer_func=lambda: Trainer(max_epochs=1, enable_model_summary=False, **trainer),
        recommend_torch_device="cpu",
        **settings,
    )
    dataset = Dataset.construct(seen)
    seconds: list[float] = []
    values: list[float] = []
    best: dict[str, torch.Tensor] = {}
    while len(values) < epochs and len(values) - int(np.argmax([0.0, *values])) < patience:
        started = time.perf_counter()
        model.fit_partial(dataset, min_epochs=1, max_epochs=1)
        seconds.append(time.perf_counter() - started)
        value = metrics(model, seen, validation)["ndcg@10"]
        if value > max(values, default=0.0):
            best = copy.deepcopy(model.lightning_model.torch_model.state_dict())
        values.append(value)
        print(f"  epoch {len(values)}: {seconds[-1]:.0f} s, validation ndcg@10 {value:.4f}", flush=True)
    model.lightning_model.torch_model.load_state_dict(best)
    return {
        "seconds": seconds,
        "best_epoch": int(np.argmax(values)) + 1,
        "test": metrics(model, longer, test),
    }


if __name__ == "__main__":
    serve(train)
