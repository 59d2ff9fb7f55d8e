"""The programs of `examples/distributed/`: two workers write what one process writes, and go on where they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from testing_utils import make_catalogue, make_config, make_model, make_processor

from transrec_hf import ItemSource, Recommender


pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[1] / "examples" / "distributed"
RAY = [sys.executable, FOLDER / "on_ray.py"]
ACCELERATE: list[Any] = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
ACCELERATE += [FOLDER / "on_accelerate.py"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a catalogue in four partitions, users in three, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("batch")
    model, processor = make_model(make_config()), make_processor()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    items = make_catalogue(num_items=24).items
    (folder / "catalogue").mkdir()
    (folder / "users").mkdir()
    for part in range(4):
        items.select(range(6 * part, 6 * part + 6)).to_parquet(folder / "catalogue" / f"part-{part}.parquet")
    rng = np.random.default_rng(0)
    for part in range(3):
        histories = [[f"item-{row}" for row in rng.integers(24, size=length)] for length in (1, 4, 9)]
        users = {"user_id": [f"user-{part}-{user}" for user in range(3)], "items": histories}
        Dataset.from_dict(users).to_parquet(folder / "users" / f"part-{part}.parquet")
    one = [sys.executable, FOLDER / "partitions.py"]
    run(one, "encode", folder / "model", folder / "catalogue", folder / "vectors")
    run(one, "join", folder / "model", folder / "vectors", folder / "index")
    run(one, "score", folder / "model", folder / "users", folder / "scores", "--index", folder / "index")
    return folder


def run(command: list[Any], *arguments: Any) -> str:
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(FOLDER.parents[1] / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same(one: Path, other: Path) -> None:
    paths = sorted(path.name for path in one.glob("*.parquet"))
    assert paths and paths == sorted(path.name for path in other.glob("*.parquet"))
    for path in paths:
        ours, theirs = pq.read_table(one / path).to_pydict(), pq.read_table(other / path).to_pydict()
        assert list(ours) == list(theirs)
        for name, values in ours.items():
            if name in ("vector", "score"):
                np.testing.assert_allclose(values, theirs[name], rtol=1e-5, atol=1e-5)
            else:
                assert values == theirs[name]


def test_one_process_scores_as_a_recommender_does(place: Path) -> None:
    recommender = Recommender(make_model(make_config()), ItemSource(make_catalogue(num_items=24), make_processor()))
    users = pq.read_table(place / "users" / "part-1.parquet").to_pydict()
    expected = recommender.recommend(users["items"], 10).to_arrow(users["user_id"]).to_pydict()
    found = pq.read_table(place / "scores" / "part-1.parquet").to_pydict()
    assert found["item_id"] == expected["item_id"] and found["user_id"] == expected["user_id"]
    torch.testing.assert_close(torch.tensor(found["score"]), torch.tensor(expected["score"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("launcher", ["ray", "accelerate"])
def test_two_workers_write_what_one_process_writes(launcher: str, place: Path, tmp_path: Path) -> None:
    if launcher == "ray":
        pytest.importorskip("ray")
    command = RAY if launcher == "ray" else ACCELERATE
    run(command, "encode", place / "model", place / "catalogue", tmp_path / "vectors")
    same(place / "vectors", tmp_path / "vectors")
    run(command, "score", place / "model", place / "users", tmp_path / "scores", "--index", place / "index")
    same(place / "scores", tmp_path / "scores")
    (tmp_path / "vectors" / "part-2.parquet").unlink()
    printed = run(command, "encode", place / "model", place / "catalogue", tmp_path / "vectors")
    assert "part-2.parquet: 6 rows" in printed and "part-1" not in printed
    same(place / "vectors", tmp_path / "vectors")
