"""Pictures of the demo: thumbnails of items, tiles for items without an image, and positions on a map."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.catalogue import Catalogue
from .recommender import Recommender


SIDE = 192  # pixels of a thumbnail
PAPER, INK = "#eef1f6", "#33415c"
MAX_POINTS = 5000  # of a map
MAX_GROUPS = 12  # colours


def thumbnail(image: Image.Image) -> Image.Image:
    """An image in a square; a smaller one is enlarged without blur."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return square


def tile(text: str) -> Image.Image:
    """A text as a picture, for an item that has no image."""
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    lines = textwrap.wrap(text, 14, max_lines=6, placeholder=" ...") or ["(nothing)"]
    position, font = (SIDE / 2, SIDE / 2), ImageFont.load_default(22)
    ImageDraw.Draw(square).multiline_text(position, "\n".join(lines), INK, font, anchor="mm", align="center")
    return square


def groups_of(catalogue: Catalogue) -> dict[str, np.ndarray]:
    """Groupings of the items: by name, a label for each item, `(n_items,)`; by modality, and by suitable columns."""
    kinds = np.stack([catalogue.has(name) for name in ("text", "image", "features")], axis=1)
    names = {tuple(kind): " and ".join(np.array(["text", "image", "features"])[list(kind)]) for kind in kinds.tolist()}
    groups = {"what an item shows": np.array([names[tuple(kind)] for kind in kinds.tolist()])}
    columns = catalogue.items.remove_columns(
        [name for name in ("item_id", "text", "image", "features") if name in catalogue.items.column_names]
    )
    for name in columns.column_names:
        values = pd.Series(list(columns[name]))
        if pd.api.types.is_numeric_dtype(values) and values.nunique() > MAX_GROUPS:
            values = pd.qcut(values, 4, duplicates="drop").astype(str)
        if values.map(lambda value: isinstance(value, (list, dict))).any() or values.nunique() > 200:
            continue
        common = set(values.value_counts().index[:MAX_GROUPS])
        groups[name] = np.array([str(value) if value in common else "other items" for value in values])
    return groups


def places(recommender: Recommender, ids: list[str], seed: int = 0) -> pd.DataFrame:
    """
    A map of the items: their vectors on the two axes along which they differ most (a principal component analysis of
    all vectors). For a large catalogue a sample is shown.

    Args:
        recommender ([`Recommender`]): The recommender with the items.
        ids (`list[str]`): Ids of the items that are always shown.
        seed (`int`, *optional*, defaults to 0): Seed of the sample.
    """
    item_ids = recommender.item_ids
    vectors = recommender.item_embeds[:, : recommender.model.config.hidden_size].double().cpu()
    centred = vectors - vectors.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -2:].flip(1)
    axes = (
        axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    )  # otherwise the map could be mirrored by chance
    found = (centred @ axes).numpy()
    rows = np.arange(len(item_ids))
    if len(rows) > MAX_POINTS:
        keep = np.random.default_rng(seed).permutation(len(rows))[:MAX_POINTS]
        rows = np.union1d(keep, np.flatnonzero(np.isin(item_ids, ids)))
    return pd.DataFrame({"item": item_ids[rows], "first axis": found[rows, 0], "second axis": found[rows, 1]})


def search(catalogue: Catalogue, texts: list[str], words: str) -> np.ndarray:
    """Rows of the items whose id or text contains all words."""
    wanted = words.lower().split()
    pairs: Any = zip(catalogue.item_ids.tolist(), texts, strict=True)
    return np.array(
        [row for row, (item, text) in enumerate(pairs) if all(word in f"{item.lower()} {text}" for word in wanted)],
        dtype=np.int64,
    )
