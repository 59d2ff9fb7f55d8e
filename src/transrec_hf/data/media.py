"""Contents that are files: encoded in the table or in files beside it, decoded one at a time."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..errors import BadContent, DataError, shortened
from .columns import VISIBLE, is_list, is_text, missing_words
from .places import lies_in


if TYPE_CHECKING:
    import datasets
    from typing_extensions import Self


FEATURES = {"image": "Image", "audio": "Audio", "video": "Video"}
"""The feature of `datasets` for the files of each modality."""
KINDS = {"image": "images", "audio": "sounds", "video": "videos"}
"""The word for the files of each modality."""
BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkq|TU0A|Qk)[A-Za-z0-9+/\s]{40}|[\w+/\s-]{200,}=*$")
"""The beginning of an image in base64, which no path has."""
PRINTED = re.compile(r"""b['"]|\{['"](bytes|path|array)['"]:|<PIL\.|\[\[""")
"""The beginning of a file that was written into a table of text with `str`."""
CHECKS: dict[str, Callable[[pa.DataType], bool]] = {
    "bytes": lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
    "path": is_text,
}
"""The types that the fields of a file may have."""


def file_feature(name: str, **kwargs: Any) -> Any:
    """The feature of a modality whose contents are files."""
    import datasets

    return getattr(datasets, FEATURES[name])(**kwargs)


def typed_files(items: datasets.Dataset, name: str, source: str) -> datasets.Dataset:
    """Items with a column of files as an undecoded feature."""
    kind = items.features.arrow_schema.field(name).type
    if name == "video" and is_list(kind):
        return _typed_frames(items, name, source)
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {"bytes": kind, "path": kind}
    given = {"bytes", "path"} & fields.keys()
    sound = {field for field in given if CHECKS[field](fields[field]) or pa.types.is_null(fields[field])}
    fits = (given and given <= sound) if pa.types.is_struct(kind) else sound
    if not fits or _holds_something_else(items, name, fields):
        raise DataError(
            f"{source}: column {name!r} holds {shortened(kind, 200)}. Write {name} bytes or file paths, or both in "
            "fields named 'bytes' and 'path'."
        )
    return items.cast_column(name, file_feature(name, decode=False))


def _typed_frames(items: datasets.Dataset, name: str, source: str) -> datasets.Dataset:
    """Items with a column of lists of images, the frames of a video, as undecoded features."""
    import datasets

    try:
        return items.cast_column(name, datasets.List(file_feature("image", decode=False)))
    except (pa.ArrowException, TypeError, ValueError) as error:
        kind = items.features.arrow_schema.field(name).type
        raise DataError(
            f"{source}: column {name!r} holds {shortened(kind, 200)}. Write a video as bytes or a file path, or as a "
            "list of the bytes or paths of its frames."
        ) from error


def _holds_something_else(items: datasets.Dataset, name: str, fields: dict[str, pa.DataType]) -> bool:
    """Whether structs that hold no file have values in a field of another name."""
    others = fields.keys() - CHECKS.keys()
    for batch in items.select_columns(name).with_format("arrow").iter(1000) if others else ():
        filled = {field: pc.is_valid(pc.struct_field(batch[name], field)) for field in fields}
        lost = functools.reduce(pc.or_, (filled[field] for field in others))
        for field in fields.keys() - others:
            lost = pc.and_(lost, pc.invert(filled[field]))
        if pc.any(lost).as_py():
            return True
    return False


class Files:
    """
    Files of one modality, as bytes or as paths relative to a folder; see [`Content`].

    Attributes:
        name (`str`): The modality.
        is_listed (`bool`): Whether each content is a list of files, such as the frames of a video.
    """

    name: str
    mend: str

    def __init__(self, rows: datasets.Dataset, folder: str | None = None) -> None:
        self.mend = f"Replace or delete them, or drop them with transrec prepare --drop damaged_{KINDS[self.name]}."
        self._rows, self._folder = rows, folder
        self._places = np.arange(len(rows))
        masks = []
        self.is_listed = is_list(rows.features.arrow_schema.field(self.name).type)
        for batch in rows.select_columns(self.name).iter(1000):  # so that no whole column of files is copied
            if self.is_listed:
                lengths = pc.fill_null(pc.list_value_length(batch[self.name]), 0)
                masks.append(pc.greater(lengths, 0).to_numpy(zero_copy_only=False))
                continue
            has_bytes = pc.is_valid(pc.struct_field(batch[self.name], "bytes"))
            paths = pc.struct_field(batch[self.name], "path")
            has_path = pc.fill_null(pc.match_substring_regex(paths, VISIBLE), False)
            masks.append(pc.or_(has_bytes, has_path).to_numpy(zero_copy_only=False))
        self.present = np.concatenate(masks)

    def select(self, rows: np.ndarray) -> Self:
        other = copy.copy(self)
        other._places, other.present = self._places[rows], self.present[rows]
        return other

    def encoded(self, row: int) -> bytes:
        """The bytes of the file, not decoded."""
        return self._bytes(self._source(row))

    def _bytes(self, source: pa.Buffer | str) -> bytes:
        if isinstance(source, pa.Buffer):
            return source.to_pybytes()
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise BadContent(f"{self.name} file cannot be read ({error.strerror})") from error

    def defects(self, full: bool = False) -> dict[int, str]:
        """Read the header of every file, or decode every file if `full`, in threads."""
        rows = np.flatnonzero(self.present)
        chunks = np.array_split(rows, max(1, len(rows) // 64))
        bad: dict[int, str] = {}
        description = f"Decoding {KINDS[self.name]}" if full else f"Reading headers of {KINDS[self.name]}"
        bar = logging.tqdm(total=len(rows), desc=description, delay=2)
        with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for size, reasons in pool.map(lambda chunk: (len(chunk), self._bad(chunk, full)), chunks):
                bad.update(reasons)
                bar.update(size)
        return bad

    def _bad(self, rows: np.ndarray, full: bool) -> dict[int, str]:
        bad = {}
        for row in rows.tolist():
            try:
                self._check(row, full)
            except BadContent as error:
                bad[row] = str(error)
        return bad

    def _check(self, row: int, full: bool) -> None:
        """Read the header of a file, or decode it if `full`. Raises [`BadContent`]."""
        raise NotImplementedError

    def _content(self, row: int) -> Any:
        """The cell of an item."""
        return self._rows[int(self._places[row])][self.name][0]

    def _source(self, row: int) -> pa.Buffer | str:
        """The encoded file, not copied, or its path."""
        return self._place(self._content(row))

    def _place(self, content: pa.StructScalar) -> pa.Buffer | str:
        """A file, not copied, or its path. Raises [`BadContent`]."""
        if not (content["bytes"].is_valid or content["path"].is_valid):
            raise BadContent("one of its files is missing")
        if content["bytes"].is_valid:
            return content["bytes"].as_buffer()
        path = content["path"].as_py()
        if (problem := _no_path(path, self.name)) is not None:
            raise BadContent(problem)
        if self._folder is not None:
            path = os.path.join(self._folder, path)
            if not lies_in(path, self._folder):
                raise BadContent(f"the {self.name} path leaves the folder of the data: {shortened(content['path'])!r}")
        if not os.path.isfile(path):
            raise BadContent(f"{self.name} file not found: {shortened(path, 300)!r}")
        return path


def _no_path(text: str, name: str) -> str | None:
    """What a text is if it is not a path; `None` if it may be a path."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(//|/[^/])|//|www\.", text):
        return f"a URL, which is not read: download the {name} and write its path ({shortened(text, 60)!r})"
    if text[:5].lower() == "data:":
        return f"a data URI, which is not read: write the {name} to a file, or its bytes into the column"
    if missing_words(pa.array([text]))[0]:
        return f"{shortened(text)!r}, a missing value written as a word: leave the cell empty"
    if PRINTED.match(text):
        return f"a printed Python object, not an {name}: write its bytes into Parquet, or a file and its path"
    if BASE64.match(text):
        return "base64, not a path: write the decoded bytes, or a file and its path"
    return None
