"""Codes of items as semantic ids, in the layout of generative recommenders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.contents import whole_codes
from ..errors import DataError, one_line, shortened
from ..files import write_json


SEMANTIC_IDS_NAME = "semantic_ids.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST = 10**9


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


def collision_rate(codes: Tensor) -> float:
    """The share of items that share all their codes `(n, num_codebooks)` with another one."""
    _, inverse, sizes = np.unique(codes.numpy(), axis=0, return_inverse=True, return_counts=True)
    return float((sizes[inverse.reshape(-1)] > 1).mean())


def save_semantic_ids(file: str | os.PathLike, item_ids: Sequence[str] | np.ndarray, codes: Tensor) -> None:
    """
    Write codes as one token per codebook for each item, the layout of LC-Rec and its successors:
    `{"item id": ["<a_17>", "<b_3>", "<c_201>"], ...}`. More than 26 codes, one for each letter, are written as
    numbers, the layout of RPG: `{"item id": [17, 3, 201, ...], ...}`.

    Raises:
        [`DataError`]: If codes are not whole numbers from 0, or there is not one id for each item.
    """
    rows, ids = whole_codes(codes, MOST).tolist(), list(map(str, item_ids))
    if len(set(ids)) != len(rows) or len(ids) != len(rows):
        raise DataError(f"{len(set(ids))} different ids for {len(rows)} items of codes: give one id for each item")
    if codes.shape[1] <= len(LETTERS):
        rows = [[f"<{letter}_{code}>" for letter, code in zip(LETTERS, row, strict=False)] for row in rows]
    write_json(file, dict(zip(ids, rows, strict=True)))


def load_semantic_ids(file: str | os.PathLike) -> tuple[np.ndarray, Tensor]:
    """
    Read item ids and codes `(n, num_codebooks)` from a file of [`save_semantic_ids`].

    Raises:
        [`DataError`]: If the file has another layout; the message names the item.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({one_line(error)}). Write it again.") from error
    if not isinstance(rows, dict) or not rows:
        raise DataError(f'{file}: holds no {{"item id": ["<a_1>", "<b_2>"]}}')
    codes, length = [], None
    for item_id, tokens in rows.items():
        if not (found := _numbers(tokens)):
            raise DataError(f'{file}: item {item_id!r} has no codes like ["<a_1>", "<b_2>"] or [1, 2]')
        length = length or len(found)
        if len(found) != length:
            raise DataError(f"{file}: item {item_id!r} has {len(found)} codes, the first one {length}")
        codes.append(found)
    return np.array(list(rows)), torch.tensor(codes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON with these keys. Raises `ValueError` if a key is there twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shortened(key)!r} is there twice")
        found[key] = value
    return found


def _numbers(tokens: Any) -> list[int]:
    """The codes of an item in a file; none if they are in no layout."""
    if not isinstance(tokens, list):
        return []
    if all(type(token) is int and 0 <= token < MOST for token in tokens):
        return tokens
    found = [re.fullmatch(r"<([a-z])_([0-9]{1,9})>", str(token)) for token in tokens]
    letters = "".join(match.group(1) for match in found if match)
    fits = len(letters) == len(tokens) and letters == LETTERS[: len(letters)]
    return [int(match.group(2)) for match in found if match] if fits else []


def codes_of(item_ids: Sequence[str] | np.ndarray, file: str | os.PathLike) -> Tensor:
    """
    The codes `(n, num_codebooks)` of items in a file of [`save_semantic_ids`] or of another program.

    Raises:
        [`DataError`]: If the file has another layout, or lacks an item.
    """
    ids, codes = load_semantic_ids(file)
    rows = {item: row for row, item in enumerate(ids.tolist())}
    if missing := [item for item in item_ids if item not in rows]:
        raise DataError(
            f"{file}: has no codes of {len(missing)} of {len(item_ids)} items, such as {shortened(missing[0])!r}; its "
            f"first item is {shortened(ids[0])!r}. Take the file of these items."
        )
    return codes[[rows[item] for item in item_ids]]
