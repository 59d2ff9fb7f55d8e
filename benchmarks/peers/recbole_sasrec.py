"""Train and test RecBole's SASRec: leave-one-out, ranking the whole catalogue, with or without the history."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from serving import serve


setattr(np, "float", float)  # noqa: B010 - RecBole's metrics name it, numpy has dropped it
METRICS = {"hit@10": "hit_rate@10", "ndcg@10": "ndcg@10"}


class TimedTrainer(Trainer):
    """
    Notes the seconds that each training epoch takes, without evaluation.

    Args:
        mask_history (`bool`): Whether the items of a history are not ranked.
    """

    def __init__(self, config: Config, model: SASRec, mask_history: bool):
        super().__init__(config, model)
        self.seconds: list[float] = []
        self.mask_history = mask_history

    def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        loss = super()._train_epoch(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)
        return loss

    def _full_sort_batch_eval(self, batched_data: Any) -> Any:
        interaction, scores, *positives = super()._full_sort_batch_eval(batched_data)
        if self.mask_history:
            scores.scatter_(1, interaction["item_id_list"], -np.inf)
        return interaction, scores, *positives


def write_interactions(data: Path, folder: Path) -> None:
    """Writes the interactions of a data set as RecBole's atomic file, in the same order of rows."""
    table = pd.read_parquet(data / "interactions.parquet", columns=["user_id", "item_id", "timestamp"])
    table.columns = ["user_id:token", "item_id:token", "timestamp:float"]
    (folder / data.name).mkdir()
    table.to_csv(folder / data.name / f"{data.name}.inter", sep="\t", index=False)


def targets(dataset: Any) -> dict[str, Any]:
    """Returns the number of targets of a split and a hash of the pairs of user and target."""
    users = dataset.id2token("user_id", dataset.inter_feat["user_id"].numpy())
    items = dataset.id2token("item_id", dataset.inter_feat["item_id"].numpy())
    lines = "\n".join(sorted(f"{user} {item}" for user, item in zip(users, items, strict=True)))
    return {"count": len(users), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def train(data: str, seed: int, mask_history: bool = False, **settings: Any) -> dict[str, Any]:
    """
    Train, keep the epoch with the best validation ndcg@10, and test it.

    Args:
        data (`str`): Folder of the data set.
        seed (`int`): Seed of weights, batches and dropout.
        mask_history (`bool`): Whether the items of a history, as long as the model reads it, are not ranked.
        settings: Settings of RecBole, for example `epochs`, `learning_rate` and `hidden_size`.

    Returns:
        `dict`: The `seconds` of each epoch, the `validation` metrics of each, the `best_epoch` counted from 1, the
        `test` metrics if `test=True`, and the `users`, `items` and `targets` that were seen.
    """
    test, source = settings.pop("test"), Path(data).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where RecBole leaves its logs
        write_interactions(source, Path(folder))
        config = Config(
            model="SASRec",
            dataset=source.name,
            config_dict={
                "data_path": folder,
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
                "train_neg_sample_args": None,  # the softmax has every item already
                "metrics": ["Hit", "NDCG"],
                "topk": [10],
                "valid_metric": "NDCG@10",
                "metric_decimal_place": 10,
                "stopping_step": settings["epochs"],
                "use_gpu": False,
                "show_progress": False,
                "seed": seed,
                **settings,
            },
        )
        init_seed(seed, reproducibility=True)
        dataset = create_dataset(config)
        loaders = dict(zip(("train", "validation", "test"), data_preparation(config, dataset), strict=True))
        seen = {split: targets(loader._dataset) for split, loader in loaders.items()}
        init_seed(seed, reproducibility=True)
        model = SASRec(config, loaders["train"]._dataset)
        trainer = TimedTrainer(config, model, mask_history)
        validation: list[float] = []
        best: dict[str, Any] = {}

        def keep_best(epoch: int, score: float) -> None:
            if score > max(validation, default=0.0):
                best.update(epoch=epoch + 1, state=copy.deepcopy(model.state_dict()))
            validation.append(float(score))
            print(f"  epoch {epoch + 1}: {trainer.seconds[-1]:.0f} s, validation ndcg@10 {score:.4f}", flush=True)

        _, metrics = trainer.fit(
            loaders["train"], loaders["validation"], verbose=False, saved=False, callback_fn=keep_best
        )
        answer = {
            "seconds": trainer.seconds,
            "validation_ndcg@10": validation,
            "best_epoch": best["epoch"],
            "validation": {name: float(metrics[key]) for key, name in METRICS.items()},
            "users": dataset.user_num - 1,  # one of them is padding
            "items": dataset.item_num - 1,
            "targets": seen,
        }
        if test:
            model.load_state_dict(best["state"])
            metrics = trainer.evaluate(loaders["test"], load_best_model=False)
            answer["test"] = {name: float(metrics[key]) for key, name in METRICS.items()}
        os.chdir(source)
    return answer


if __name__ == "__main__":
    serve(train)
