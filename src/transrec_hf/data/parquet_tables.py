"""Parquet files: their shape, their rows in blocks, and items as memory-mapped files in the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from ..errors import DataError, one_line, printable, shortened
from .frames import plain_table


if TYPE_CHECKING:
    import datasets


CACHE_FORMAT = 1
BUFFER = 1 << 20  # bytes read at a time
CONVERTED = 1 << 23  # bytes that are converted at a time, by the sizes of the footer


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error of Arrow about a file into a [`DataError`]."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{printable(path)}: is not a Parquet file, or cannot be read "
            f"({shortened(one_line(error), 200)}). Write it again."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    # opened here, as Arrow refuses some names; without reading ahead, as Arrow would hold the whole file
    with open(path, "rb") as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER) as table:
        yield table


def read_shape(path: Path) -> tuple[list[str], int]:
    """Names of the columns and number of rows, from the footer."""
    with _readable(path), _opened(path) as file:
        footer = file.metadata
        groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        if sum(groups) != footer.num_rows or min(groups, default=0) < 0:
            raise DataError(
                f"{printable(path)}: its footer counts {footer.num_rows} rows, its parts {sum(groups)}. "
                "Write it again."
            )
        if footer.num_rows > path.stat().st_size and len(
            footer.schema.names
        ):  # count the rows, since the footer may lie
            for _ in read_blocks(path, footer.num_rows, file.schema_arrow.names[:1], 2**20):
                pass
        return file.schema_arrow.names, footer.num_rows


def read_blocks(path: Path, rows: int, columns: Sequence[str] | None, size: int) -> Iterator[pa.Table]:
    """Blocks of at most `size` rows. Raises [`DataError`] if they are not `rows` in all."""
    found = 0
    with _readable(path), _opened(path) as file:
        for row_group in range(file.num_row_groups):  # one by one, since Arrow keeps what it has read in one iteration
            for batch in file.iter_batches(size, row_groups=[row_group], columns=columns):
                found += len(batch)
                yield pa.Table.from_batches([batch])
        if found != rows:
            raise DataError(f"{printable(path)}: its footer counts {rows} rows, but it has {found}. Write it again.")


def read_cached(path: Path, rows: int) -> datasets.Dataset:
    """The file as a data set, images included, which is memory-mapped from the cache of `datasets`."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "transrec"
    folder.mkdir(parents=True, exist_ok=True)
    cached = folder / f"{_state(path)}.arrow"
    with WeakFileLock(cached.with_suffix(".lock")):
        if not (cached.is_file() and _count(cached) == rows):
            partial = cached.with_suffix(f".{os.getpid()}")
            try:
                _convert(path, rows, partial)
                partial.replace(cached)
            finally:
                partial.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(cached))


def _count(cached: Path) -> int:
    """Rows in a file of the cache, -1 if it is damaged."""
    try:
        with pa.memory_map(str(cached)) as file:
            return pa.ipc.open_stream(file).read_all().num_rows
    except (pa.ArrowException, OSError):
        return -1


def _state(path: Path) -> str:
    """
    A value that changes whenever the file changes. It depends on the modification time, which `tar`, `rsync` and `cp
    -p` keep, on the change time of the file system, which nobody can set, and on the footer with its statistics.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        file.seek(max(0, status.st_size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, status.st_size - 8 - length))
        footer = file.read()
    known = (CACHE_FORMAT, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return hashlib.sha256(repr((os.fsencode(path.absolute()), known)).encode() + footer).hexdigest()[:32]


def _convert(path: Path, rows: int, target: Path) -> None:
    """Write the columns that `datasets` can hold as an Arrow stream."""
    writer = None
    bar = logging.tqdm(total=rows, desc="Reading items", delay=2)
    with _readable(path), bar:
        with _opened(path) as file:
            metadata = file.schema_arrow.metadata
            groups = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
        size = min(10_000, 1 + CONVERTED * rows // max(1, sum(groups)))
        for block in read_blocks(path, rows, None, size):
            table = plain_table(block, printable(path))
            if writer is None:
                schema = _with_sound_metadata(table.schema, metadata)
                writer = pa.ipc.new_stream(str(target), schema)
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            bar.update(len(block))
        if writer is not None:
            writer.close()


def _with_sound_metadata(schema: pa.Schema, metadata: dict[bytes, bytes] | None) -> pa.Schema:
    """The schema with the metadata of `datasets`, unless these are damaged or belong to other columns."""
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema.with_metadata(metadata))
        fits = features.arrow_schema.remove_metadata() == schema.remove_metadata()
    except Exception:  # the metadata may hold anything
        fits = False
    return features.arrow_schema if fits else schema.remove_metadata()
