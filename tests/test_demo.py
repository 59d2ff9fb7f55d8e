"""The demo world: deterministic, nothing in common but content and drift, both modalities tell the attributes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from transrec_hf import load_domain
from transrec_hf.data.demo import (
    ATTRIBUTES,
    SOURCE,
    TARGET,
    TASTE_WEIGHTS,
    DemoPlatform,
    DemoWorld,
    demo_config,
    demo_world,
)


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return demo_world()


@pytest.fixture(params=["source", "target"])
def platform(request: pytest.FixtureRequest, world: DemoWorld) -> DemoPlatform:
    return getattr(world, request.param)


def parse_title(title: str) -> list[int]:
    words = title.split()
    return [next(i for i, value in enumerate(values) if value in words) for values in ATTRIBUTES.values()]


def hit_rate(scores: np.ndarray, platform: DemoPlatform, k: int = 10) -> float:
    """Of ranking each user's last item by `scores`, `(num_users, num_items)`, without the items before it."""
    sequences, hits = platform.sequences, []
    for row, start, end in zip(scores, sequences.starts, sequences.ends, strict=True):
        row = row.astype(float)
        row[sequences.items[start : end - 1]] = -np.inf
        target = row[sequences.items[end - 1]]
        hits.append((row > target).sum() + ((row == target).sum() - 1) / 2 < k)
    return float(np.mean(hits))


def test_same_seed_gives_the_same_world_quickly(world: DemoWorld) -> None:
    started = time.process_time()
    again = demo_world()
    assert time.process_time() - started < 5
    for name in ("source", "target"):
        one, two = getattr(world, name), getattr(again, name)
        assert one.catalogue.content_hash() == two.catalogue.content_hash()
        for field in ("items", "timestamps", "starts", "ends", "user_ids"):
            assert (getattr(one.sequences, field) == getattr(two.sequences, field)).all()
    assert demo_world(seed=1).source.catalogue.content_hash() != world.source.catalogue.content_hash()


def test_platforms_share_no_item_user_or_combination(world: DemoWorld) -> None:
    source, target = world.source, world.target
    assert not set(source.catalogue.item_ids) & set(target.catalogue.item_ids)
    assert not set(source.sequences.user_ids) & set(target.sequences.user_ids)
    combinations = np.concatenate([source.attributes, target.attributes])
    assert len(np.unique(combinations, axis=0)) == len(combinations)
    assert all(len(np.unique(source.attributes[:, column])) == len(v) for column, v in enumerate(ATTRIBUTES.values()))


def test_saved_platform_loads_the_same(world: DemoWorld, tmp_path: Path) -> None:
    world.target.save(tmp_path)
    catalogue, sequences = load_domain(tmp_path)
    assert catalogue.content_hash() == world.target.catalogue.content_hash()
    assert (sequences.items == world.target.sequences.items).all()
    descriptions = np.array(catalogue.items["attributes"])
    assert [parse_title(description) for description in descriptions] == world.target.attributes.tolist()


def test_sizes_lengths_and_modality_mix(platform: DemoPlatform, world: DemoWorld) -> None:
    style = SOURCE if platform is world.source else TARGET
    catalogue, sequences = platform.catalogue, platform.sequences
    assert (len(catalogue), len(sequences)) == (style.num_items, style.num_users)
    assert (sequences.lengths.min(), sequences.lengths.max()) == style.lengths
    kinds = catalogue.has_text + 2 * catalogue.has_image
    assert (np.bincount(kinds, minlength=4)[1:] > 0.2 * len(catalogue)).all()
    assert all(len(set(user["items"])) == len(user["items"]) for user in sequences)


def test_titles_tell_the_attributes(platform: DemoPlatform) -> None:
    rows = np.flatnonzero(platform.catalogue.has_text).tolist()
    titles = [platform.catalogue.text(row) or "" for row in rows]
    assert [parse_title(title) for title in titles] == platform.attributes[rows].tolist()
    assert len(set(titles)) == len(titles)


def test_images_tell_the_attributes(world: DemoWorld) -> None:
    """A linear probe of the source's pixels reads the attributes of the target's images."""

    def examples(platform: DemoPlatform) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero(platform.catalogue.has_image).tolist()
        pixels = np.stack([np.asarray(platform.catalogue.image(row), dtype=float) / 255 for row in rows])
        saturation, mean = np.ptp(pixels, axis=-1), pixels.mean(axis=(1, 2))
        features = np.concatenate([mean - pixels[:, 0, 0], saturation.reshape(len(rows), -1)], axis=1)
        return features - features.mean(axis=0), platform.attributes[rows]

    (features, attributes), (new_features, new_attributes) = examples(world.source), examples(world.target)
    gram = features @ features.T + np.eye(len(features))
    for column, values in enumerate(ATTRIBUTES.values()):
        dual = np.linalg.solve(gram, np.eye(len(values))[attributes[:, column]])
        predicted = (new_features @ features.T @ dual).argmax(axis=1)
        assert (predicted == new_attributes[:, column]).mean() > 2 / len(values)


def test_tastes_decide_and_popularity_does_not(platform: DemoPlatform) -> None:
    sequences, attributes = platform.sequences, platform.attributes
    taste = platform.tastes[sequences.ends - 1]
    matches = (taste[:, None] == attributes[None, :, : taste.shape[1]]) @ np.array(TASTE_WEIGHTS)
    popularity = np.tile(np.bincount(sequences.items, minlength=len(attributes)), (len(sequences), 1))
    assert hit_rate(matches, platform) > 0.7
    assert hit_rate(popularity, platform) < 0.1


def test_tastes_move_along_the_cycles(platform: DemoPlatform) -> None:
    inner = np.setdiff1d(np.arange(1, len(platform.tastes)), platform.sequences.starts)
    cycles = [len(values) for values in ATTRIBUTES.values()][:3]
    moves = (platform.tastes[inner] - platform.tastes[inner - 1]) % cycles
    assert set(np.unique(moves)) == {0, 1}


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "quickstart.py"
    command = [
        sys.executable,
        str(script),
        "--output_dir",
        str(tmp_path),
        "--pretrain_epochs",
        "0.1",
        "--target_epochs",
        "1",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("and is recommended") == 3
    assert {"checkpoint", "quickstart.png", "results.csv", "results.json", "source", "target"} == set(
        os.listdir(tmp_path)
    )
    assert {"model.safetensors", "processor_config.json", "data_statistics.json"} <= set(
        os.listdir(tmp_path / "checkpoint")
    )


def test_id_baseline_config() -> None:
    config = demo_config(text_config=None, vision_config=None, num_items=7)
    assert not config.modalities and config.num_items == 7
