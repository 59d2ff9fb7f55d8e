"""Codes of items as semantic ids, in the layout of generative recommenders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, one_line
from ..files import write_json


SEMANTIC_IDS_NAME = "semantic_ids.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def resolve_collisions(codes: Tensor) -> Tensor:
    """
    Make codes `(n, num_codebooks)` unique: one more code numbers the items that share all others. The result is
    `(n, num_codebooks + 1)` (TIGER, arXiv 2305.05065).
    """
    _, inverse = np.unique(codes.numpy(), axis=0, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    groups = inverse.reshape(-1)[order]
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    ordinal = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    last = np.empty(len(order), dtype=np.int64)
    last[order] = ordinal
    return torch.cat([codes, torch.from_numpy(last).unsqueeze(1)], dim=1)


def save_semantic_ids(file: str | os.PathLike, item_ids: Sequence[str] | np.ndarray, codes: Tensor) -> None:
    """
    Write codes as one token per codebook for each item, the layout of LC-Rec and its successors:
    `{"item id": ["<a_17>", "<b_3>", "<c_201>"], ...}`.

    Raises:
        [`DataError`]: If the numbers of ids and items differ, or items have more than 26 codes.
    """
    if len(item_ids) != len(codes) or codes.shape[1] > len(LETTERS):
        raise DataError(
            f"{len(item_ids)} ids for {len(codes)} items of {codes.shape[1]} codes: give one id for each item, and at "
            f"most {len(LETTERS)} codes"
        )
    rows = ([f"<{letter}_{code}>" for letter, code in zip(LETTERS, row, strict=False)] for row in codes.tolist())
    write_json(file, dict(zip(map(str, item_ids), rows, strict=True)))


def load_semantic_ids(file: str | os.PathLike) -> tuple[np.ndarray, Tensor]:
    """
    Read item ids and codes `(n, num_codebooks)` from a file of [`save_semantic_ids`].

    Raises:
        [`DataError`]: If the file has another layout; the message names the item.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({one_line(error)}). Write it again.") from error
    if not isinstance(rows, dict) or not rows:
        raise DataError(f'{file}: holds no {{"item id": ["<a_1>", "<b_2>"]}}')
    codes, length = [], None
    for item_id, tokens in rows.items():
        tokens = tokens if isinstance(tokens, list) else []
        found = [re.fullmatch(r"<([a-z])_(\d{1,9})>", str(token)) for token in tokens]
        letters = "".join(match.group(1) for match in found if match)
        if not letters or len(letters) != len(tokens) or letters != LETTERS[: len(letters)]:
            raise DataError(f'{file}: item {item_id!r} has no codes like ["<a_1>", "<b_2>"]')
        length = length or len(tokens)
        if len(tokens) != length:
            raise DataError(f"{file}: item {item_id!r} has {len(tokens)} codes, the first one {length}")
        codes.append([int(match.group(2)) for match in found if match])
    return np.array(list(rows)), torch.tensor(codes)
