"""Readers: from a file, a folder, a `datasets` object or a Hub id to Arrow columns, and the words of their errors.

Rows are named as users see them: data rows counted from 1, the header of a CSV file not counted.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError, describe, raise_defects
from ..model.modalities_transrec import MODALITIES


if TYPE_CHECKING:
    import datasets


INTERACTION_COLUMNS = ("user_id", "item_id", "timestamp")
BLOCK = 2**18
"""Interactions read, sorted or counted at a time: what is done with all of them is done in such blocks."""
_SUFFIXES = (".parquet", ".csv", ".jsonl")
_STRING_COLUMNS = ("item_id", "user_id", "text", "image", "file_name")


def check_columns(found: Sequence[str], source: str, required: Sequence[str], any_of: Sequence[str] = ()) -> None:
    """Refuse a table without the `required` columns, or with none of `any_of`; suggest what is nearly named so."""
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise DataError(f"{source}: column {twice[0]!r} occurs twice. Keep one of them.")
    missing = [name for name in required if name not in found]
    if any_of and not any(name in found for name in any_of):
        missing.append(" or ".join(any_of))
    if not missing:
        return
    plain = {re.sub("[^a-z]", "", name.lower()): name for name in found}
    hints = []
    for name in (*required, *any_of):
        near = difflib.get_close_matches(name.replace("_", ""), plain, n=1, cutoff=0.7)
        if name not in found and near:
            hints.append(f"rename {plain[near[0]]!r} to {name!r}")
    mend = "; ".join(hints) or "add or rename columns"
    raise DataError(f"{source}: missing column {', '.join(missing)}; found {list(found)}. Mend: {mend}.")


def open_source(source: Any, table: str, revision: str | None) -> tuple[datasets.Dataset | Path, str]:
    """A `datasets.Dataset` or the local file that holds `table` ("items" or "interactions"), and its name."""
    import datasets

    if isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise DataError(f"{table}: a streamed data set has no rows to look up. Load it without streaming=True.")
    if isinstance(source, Mapping):
        return _only_split(source, table), table
    if isinstance(source, datasets.Dataset):
        return source, table
    path = Path(source)
    if path.is_dir():
        return (found := _find_table(path, table)), str(found)
    if path.exists():
        return path, str(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in _SUFFIXES:
        name = f"{source} ({table})"
        return _only_split(_load_hub(str(source), table, revision), name), name
    raise DataError(f"{source}: no such file or folder. Check the path (now in {os.getcwd()}).")


def _load_hub(repo_id: str, table: str, revision: str | None) -> Mapping[str, datasets.Dataset]:
    import datasets

    try:
        return datasets.load_dataset(repo_id, name=table, revision=revision)
    except Exception as error:
        raise DataError(
            f"{repo_id}: neither a folder here nor a data set of the Hub with a configuration {table!r} that can be "
            f"read ({type(error).__name__}: {error}). Check the id, the network and HF_HUB_OFFLINE."
        ) from error


def _only_split(splits: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset:
    if len(splits) == 1:
        return next(iter(splits.values()))
    if "train" in splits:
        return splits["train"]
    raise DataError(f"{name}: which split of {sorted(splits)}? Pass one of them, or keep the table in one split.")


def _find_table(folder: Path, table: str) -> Path:
    """The only file of `folder` that can hold `table`."""
    candidates = [folder / f"{table}{suffix}" for suffix in _SUFFIXES]
    if table == "items":
        candidates += [folder / "metadata.jsonl", folder / "items" / "metadata.jsonl"]
    found = [path for path in candidates if path.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder}: several {table} files: {[str(p.relative_to(folder)) for p in found]}. Keep one.")
    there = sorted(path.name for path in folder.iterdir())[:10]
    raise DataError(f"{folder}: no {table} file among {there}. Add {table}.parquet, {table}.csv or {table}.jsonl.")


def _check_file(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise DataError(
            f"{path}: unsupported extension {path.suffix!r}. Save it as one of {', '.join(_SUFFIXES)} "
            "(comma-separated, or one JSON object a line)."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty. Write it again.")


def _read_text_table(path: Path) -> pa.Table:
    """CSV or JSONL as an Arrow table; encoding and shape of every row are checked."""
    _check_utf8(path)
    table = _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)
    if "file_name" in table.column_names and "image" not in table.column_names:
        table = table.rename_columns({"file_name": "image"})
    return table


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(1 << 24):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            good = file.tell() - len(error.object) + error.start
            file.seek(0)
            line = file.read(good).count(b"\n") + 1
            raise DataError(
                f"{path}: line {line} of the file is not UTF-8 (byte 0x{error.object[error.start]:02x}). "
                f"Convert it, for example: iconv -f LATIN1 -t UTF-8 {path.name}"
            ) from None


def _read_csv(path: Path) -> pa.Table:
    ragged: list[pa.csv.InvalidRow] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False),  # so that ragged rows carry their number
            parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(_STRING_COLUMNS, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable CSV file ({error}). Write it again with quoted text.") from error
    cells = {row.number - 2: f"{row.actual_columns} cells" for row in ragged}
    what = f"number of cells other than the {len(table.column_names)} of the header"
    mend = "Quote text that holds commas or quotes."
    raise_defects(str(path), describe(what, list(cells), mend, cells.__getitem__))
    return table


def _read_jsonl(path: Path) -> pa.Table:
    strings = pa.schema([(name, pa.string()) for name in _STRING_COLUMNS])
    large = pa.json.ReadOptions(block_size=1 << 24)
    try:
        try:  # as strings, lest Arrow reads titles such as "1984-06-08" as dates ...
            table = pa.json.read_json(path, large, pa.json.ParseOptions(explicit_schema=strings))
        except pa.ArrowInvalid:  # ... but ids may be numbers
            return pa.json.read_json(path, large)
    except pa.ArrowInvalid as error:
        _raise_jsonl(path, error)
    absent = [name for name in _STRING_COLUMNS if table[name].null_count == len(table)]
    return table.drop_columns(absent) if len(table) else table


def _raise_jsonl(path: Path, error: Exception) -> NoReturn:
    """Name the lines that Arrow could not read."""
    bad: dict[int, str] = {}
    with open(path, encoding="utf-8-sig") as lines:
        for row, line in enumerate(lines):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    bad[row] = "not an object"
            except json.JSONDecodeError as problem:
                bad[row] = str(problem)
    raise_defects(str(path), describe("malformed JSON", list(bad), "Write an object a line.", bad.__getitem__))
    mend = "Give every column one type, for example all ids as strings."
    raise DataError(f"{path}: a column changes its type ({error}). {mend}") from error


def read_items(path: Path) -> datasets.Dataset:
    """The items of a file. Parquet goes through the `datasets` cache, hence memory-mapped, images included."""
    import datasets

    _check_file(path)
    if path.suffix != ".parquet":
        table = _read_text_table(path)
        check_columns(table.column_names, str(path), ("item_id",), tuple(MODALITIES))
        return datasets.Dataset(table)
    columns, rows = _read_parquet_shape(path)
    check_columns(columns, str(path), ("item_id",), tuple(MODALITIES))
    if rows == 0:
        raise DataError(f"{path}: the catalogue is empty. Add at least one item.")
    unbuffered = pa.dataset.ParquetFragmentScanOptions(pre_buffer=False)  # or Arrow holds the whole file
    try:
        return datasets.load_dataset(
            "parquet", data_files=_escape_glob(path), split="train", fragment_scan_options=unbuffered
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(
            f"{path}: cannot be read into the cache ({error.__cause__ or error}). Write it again."
        ) from error


def _escape_glob(path: Path) -> str:
    return re.sub(r"([*?[])", r"[\1]", str(path.absolute()))


def _read_parquet_shape(path: Path) -> tuple[list[str], int]:
    """Names of the columns and number of rows, from the footer."""
    try:
        footer = pa.parquet.read_metadata(path)
        return footer.schema.to_arrow_schema().names, footer.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write the file again.") from error


def read_interactions(source: datasets.Dataset | Path, name: str) -> tuple[int, Iterator[pa.Table]]:
    """Number of interactions, and their three columns in blocks. Parquet and data sets are never held as a whole."""
    columns = list(INTERACTION_COLUMNS)
    if not isinstance(source, Path):
        check_columns(source.column_names, name, columns)
        return len(source), source.select_columns(columns).with_format("arrow").iter(BLOCK)
    _check_file(source)
    if source.suffix != ".parquet":
        table = _read_text_table(source)
        check_columns(table.column_names, name, columns)
        return len(table), (table.slice(start, BLOCK).select(columns) for start in range(0, len(table), BLOCK))
    found, rows = _read_parquet_shape(source)
    check_columns(found, name, columns)
    return rows, _read_parquet_blocks(source, columns)


def _read_parquet_blocks(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            for row_group in range(file.num_row_groups):  # of all that it iterates over, Arrow holds what it has read
                for batch in file.iter_batches(BLOCK, row_groups=[row_group], columns=columns):
                    yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Write the file again.") from error


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, whether they are written as a dictionary or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def whole_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column of rows formatted as Arrow, not copied unless it is in slivers."""
    column = rows.select_columns(name)[:][name]
    if column.num_chunks > 1 + len(rows) // 100:  # a selection comes as one chunk per row
        column = pa.chunked_array([column.combine_chunks()])
    return column


def encode_ids(column: pa.ChunkedArray, name: str, source: str) -> tuple[np.ndarray, pa.StringArray]:
    """Codes (rows,) into the distinct ids, -1 where empty; these ids as strings (integers count too)."""
    kind = plain_type(column.type)
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        if column.null_count < len(column):
            raise DataError(f"{source}: column {name!r} holds {kind}. Write ids as strings or integers.")
    if not pa.types.is_dictionary(column.type):  # in one piece: the time to unify many dictionaries is quadratic
        column = pa.chunked_array([column.combine_chunks().dictionary_encode()])
    encoded = column.unify_dictionaries().combine_chunks()
    try:
        values = encoded.dictionary.cast(pa.string())
        values.validate(full=True)
    except pa.ArrowInvalid:
        raise DataError(f"{source}: column {name!r} is not UTF-8 text. Write it again in UTF-8.") from None
    codes = encoded.indices.fill_null(-1).to_numpy()
    if (empty := values.index("").as_py()) >= 0:
        codes = np.where(codes == empty, -1, codes)
    return codes, values


def read_timestamps(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timestamps int64, which are missing and which are wrong, all (rows,). Floats may be integers."""
    kind = column.type
    missing = pc.is_null(column, nan_is_null=True).to_numpy()
    wrong = np.zeros(len(column), dtype=bool)
    numbers = np.zeros(len(column), dtype=np.int64)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = column.to_numpy()
        wrong = ~missing & ~((values >= -(2**63)) & (values < 2**63) & (values == np.floor(values)))
        numbers = np.where(missing | wrong, 0, values).astype(np.int64)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        integers = pc.fill_null(pc.match_substring_regex(column, r"^[+-]?\d+$"), False).to_numpy()
        wrong = ~missing & (~integers if not integers.all() else True)
    elif not pa.types.is_null(kind):
        wrong = ~missing
    return numbers, missing, wrong
