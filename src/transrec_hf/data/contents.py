"""
The contents of items. A reader for each modality tells which items have it, what is wrong with it, and its bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import BadContent, DataError, shortened
from .clips import Clips
from .columns import VISIBLE, is_list, is_text, missing_words, whole_column
from .images import Images
from .sounds import Sounds


if TYPE_CHECKING:
    import datasets
    from typing_extensions import Self


QUANTIZER_NAME = "item_quantizer.safetensors"
"""Name of the quantizer file, which is beside the items or in a checkpoint."""
MAX_CODES = 2**16  # values that a code can have
ROWS = 2**14  # vectors that are checked at a time


class Content(Protocol):
    """
    One modality of the items of a catalogue.

    Attributes:
        present (`np.ndarray` of shape `(N,)` and type bool): Which items have it. A policy hides contents by changing
            this array.
        mend (`str`): What to do about defects, for messages.
    """

    present: np.ndarray
    mend: str

    def __init__(self, rows: datasets.Dataset, folder: str | None) -> None:
        """`rows` are formatted as Arrow; `folder` holds the files that they name. Raises [`BadContent`]."""

    def read(self, row: int, *args: Any, **form: Any) -> Any:
        """
        The content of an item in the form that a processor needs, see [`TransRecProcessor.form`]. Raises
        [`BadContent`].
        """

    def encoded(self, row: int) -> bytes:
        """The bytes of the content that are hashed and published. Raises [`BadContent`]."""

    def defects(self, full: bool) -> dict[int, str]:
        """Rows whose content cannot be used, and why; all contents are decoded if `full`."""

    def select(self, rows: np.ndarray) -> Self:
        """The contents of the items at `rows`, in that order."""


class _Column:
    """A content that is stored in one Arrow column."""

    present: np.ndarray

    def __init__(self, rows: datasets.Dataset, name: str) -> None:
        self._column = whole_column(rows, name)

    def select(self, rows: np.ndarray) -> Self:
        other = copy.copy(self)
        other._column, other.present = self._column.take(pa.array(rows)), self.present[rows]
        return other


class Texts(_Column):
    """Texts: strings; blank strings count as missing."""

    mend = "Leave the cell empty (if the word is the title, add a full stop); write text in UTF-8."

    def __init__(self, rows: datasets.Dataset, folder: str | None = None) -> None:
        super().__init__(rows, "text")
        if not is_text(self._column.type):
            raise BadContent(f"holds {self._column.type}, not strings. Write it as text.")
        self._defects: dict[int, str] = {}
        try:
            self._column.validate(full=True)
        except pa.ArrowInvalid:
            wrong = [row for row, text in enumerate(self._column) if not _is_utf8(text)]
            self._defects = dict.fromkeys(wrong, "not UTF-8")
            self.present = np.ones(len(rows), dtype=bool)
            return
        self.present = pc.fill_null(pc.match_substring_regex(self._column, VISIBLE), False).to_numpy()
        for row in np.flatnonzero(missing_words(self._column)).tolist():
            self._defects[row] = f"text {shortened(self.read(row))!r}, a missing value written as a word"

    def read(self, row: int) -> str:
        return self._column[int(row)].as_py()

    def encoded(self, row: int) -> bytes:
        return self.read(row).encode()

    def defects(self, full: bool = False) -> dict[int, str]:
        return self._defects


def _is_utf8(text: pa.Scalar) -> bool:
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


class _Lists(_Column):
    """
    Lists of numbers, all of one length; empty lists count as missing.

    Attributes:
        size (`int`): The most frequent length of the lists, which all should have.
    """

    def __init__(self, rows: datasets.Dataset, name: str, is_number: Callable[[pa.DataType], bool], kind: str) -> None:
        super().__init__(rows, name)
        found = self._column.type
        if not (is_list(found) and is_number(found.value_type)):
            raise BadContent(f"holds {found}. Write a list of {kind} for every item, in Parquet or JSONL.")
        lengths = pc.fill_null(pc.list_value_length(self._column), 0).to_numpy()
        self.present = lengths > 0
        sizes, counts = np.unique(lengths[self.present], return_counts=True)
        self.size = int(sizes[counts.argmax()]) if len(sizes) else 0
        other = np.flatnonzero(self.present & (lengths != self.size))
        self._defects = self._useless(lengths)
        self._defects |= {row: f"{lengths[row]} numbers, but most items have {self.size}" for row in other.tolist()}

    def _useless(self, lengths: np.ndarray) -> dict[int, str]:
        """Rows of lists that cannot be used, and why, from the length of every row."""
        raise NotImplementedError

    def defects(self, full: bool = False) -> dict[int, str]:
        return self._defects


class Vectors(_Lists):
    """Vectors that another model has made; see [`_Lists`]."""

    mend = "Write vectors of finite numbers, all of one length, or leave the cell empty."

    def __init__(self, rows: datasets.Dataset, folder: str | None = None) -> None:
        super().__init__(rows, "features", lambda of: pa.types.is_floating(of) or pa.types.is_integer(of), "numbers")

    def _useless(self, lengths: np.ndarray) -> dict[int, str]:
        wrong: dict[int, str] = {}
        first = 0
        for chunk in self._column.chunks:
            for start in range(0, len(chunk), ROWS):
                block = chunk.slice(start, ROWS)
                numbers, last = _float32(block.flatten()), first + len(block)
                rows = np.repeat(np.arange(first, last), lengths[first:last])
                infinite = np.unique(rows[~np.isfinite(numbers)]).tolist()
                zero = np.setdiff1d(rows, rows[numbers != 0]).tolist()
                wrong |= dict.fromkeys(infinite, "a number is missing, NaN, infinite or too large for float32")
                wrong |= dict.fromkeys(zero, "all numbers are zero")
                first = last
        return wrong

    def read(self, row: int) -> np.ndarray:
        """The vector, float32 of shape `(size,)`."""
        return _float32(self._column[int(row)].values)

    def encoded(self, row: int) -> bytes:
        return self.read(row).astype("<f4").tobytes()


def _float32(numbers: pa.Array) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large numbers become infinite, which is a defect
        return numbers.to_numpy(zero_copy_only=False).astype(np.float32)


class Codes(_Lists):
    """
    Codes of an [`ItemQuantizer`], whole numbers from 0; see [`_Lists`].

    Attributes:
        largest (`np.ndarray` of shape `(N,)`): The largest code of each item, -1 for items without codes.
        quantizer (`Path`, *optional*): The file of the quantizer, if it is beside the items.
    """

    mend = "Write codes as whole numbers from 0, the same count for every item, or leave the cell empty."

    def __init__(self, rows: datasets.Dataset, folder: str | None = None) -> None:
        super().__init__(rows, "codes", pa.types.is_integer, "whole numbers")
        file = None if folder is None else Path(folder) / QUANTIZER_NAME
        self.quantizer = file if file is not None and file.is_file() else None

    def _useless(self, lengths: np.ndarray) -> dict[int, str]:
        numbers = pc.list_flatten(self._column)
        values = pc.fill_null(numbers.cast(pa.int64()), -1).to_numpy()
        rows = np.repeat(np.arange(len(lengths)), lengths)
        self.largest = np.full(len(lengths), -1)
        np.maximum.at(self.largest, rows, values)
        wrong = np.unique(rows[(values < 0) | (values >= MAX_CODES)]).tolist()
        return dict.fromkeys(wrong, f"a code that is missing, below 0 or above {MAX_CODES - 1}")

    def read(self, row: int) -> np.ndarray:
        """The codes, int64 of shape `(size,)`."""
        return self._column[int(row)].values.to_numpy(zero_copy_only=False).astype(np.int64)

    def encoded(self, row: int) -> bytes:
        return self.read(row).astype("<i4").tobytes()

    def select(self, rows: np.ndarray) -> Self:
        other = super().select(rows)
        other.largest = self.largest[rows]
        return other


def whole_codes(codes: Any, end: int = MAX_CODES) -> np.ndarray:
    """
    Codes of items `(n, num_codebooks)` as an array of integers.

    Raises:
        [`DataError`]: If they have another shape, or are not whole numbers from 0 to below `end`.
    """
    try:
        values = np.asarray(codes)
    except ValueError:  # lists of different lengths
        values = np.zeros(0)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise DataError(
            f"codes must be whole numbers of the shape (n_items, num_codebooks), got {values.dtype} of the shape "
            f"{values.shape}"
        )
    wrong = ((values < 0) | (values >= end)).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"codes: {values[row].tolist()} of row {row + 1} is out of range, from 0 to {end - 1}")
    return values.astype(np.int64)


READERS: dict[str, type[Content]] = {
    "text": Texts,
    "image": Images,
    "features": Vectors,
    "audio": Sounds,
    "video": Clips,
    "codes": Codes,
}
"""The reader of every modality."""
