"""CSV and JSONL files as Arrow tables. Arrow reads the files that it reads correctly; Python reads all others row by
row.

Messages name rows as users see them: data rows count from 1; the header of a CSV file and blank lines do not count.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from ..errors import MAX_EXAMPLES, DataError, Defects, describe, printable, raise_defects, shortened
from .columns import FLOAT_IDS, NEEDED, STRING_COLUMNS
from .frames import plain_table_of


BYTES = 1 << 24  # read at a time
ROWS = 2**16  # converted at a time
DEEPEST = 64  # most nested brackets in a line of JSON for Arrow, which has no limit and would crash the process


def read_text_table(path: Path) -> pa.Table:
    """A CSV or JSONL file as an Arrow table; encoding and shape of every row are checked. Cells of CSV are strings."""
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in blocks. Raises [`DataError`] if they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(BYTES):
                decoder.decode(block)
                yield block
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            good = file.tell() - len(error.object) + error.start
            file.seek(0)
            head = file.read(good)
            line = head.count(b"\n") + 1
            is_utf16 = head[:2] in (b"\xff\xfe", b"\xfe\xff") or (not head and byte in (0xFE, 0xFF))
            encoding = "UTF-16" if is_utf16 else "CP1252"
            name = shortened(path.name.encode("utf-8", "backslashreplace").decode())
            raise DataError(
                f"{printable(path)}: line {line} of the file is not UTF-8 (byte 0x{byte:02x}). "
                f"Convert it, for example: iconv -f {encoding} -t UTF-8 '{name}' > utf8.csv"
            ) from None


# --------------------------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> pa.Table:
    quoted = False
    for block in _blocks(path):
        quoted = quoted or b'"' in block
    names, delimiter = _header(path)
    return _read_quoted_csv(path, delimiter) if quoted else _read_plain_csv(path, names, delimiter)


def _header(path: Path) -> tuple[list[str], str]:
    """The names of the columns and their separator: the one that gives most known names, otherwise a comma."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        line = file.readline(2**20)
    found = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in ",;\t|"}
    delimiter = max(found, key=lambda key: len(set(found[key]) & set(NEEDED)))
    if len(found[delimiter]) < 2:
        delimiter = max(found, key=lambda key: len(found[key]))
    return found[delimiter], delimiter


def _raise_ragged(path: Path, cells: dict[int, int], columns: int) -> None:
    what = f"number of cells differs from the {columns} of the header"
    mend = "Put text that holds commas, quotes or line breaks in quotes."
    raise_defects(printable(path), describe(what, list(cells), mend, lambda row: f"{cells[row]} cells"))


def _read_plain_csv(path: Path, names: list[str], delimiter: str) -> pa.Table:
    """Read a file without any quotes."""
    ragged: list[pa.csv.InvalidRow] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    with open(path, "rb") as file:
        try:
            table = pa.csv.read_csv(
                file,
                read_options=pa.csv.ReadOptions(use_threads=False),  # so that errors name the row
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=False, invalid_row_handler=skip),
                convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{printable(path)}: not a readable CSV file ({shortened(error, 200)}). Write it again."
            ) from error
    _raise_ragged(path, {row.number - 2: row.actual_columns for row in ragged}, len(table.column_names))
    return table


def _read_quoted_csv(path: Path, delimiter: str) -> pa.Table:
    """Read a file with quotes by the rules of RFC 4180; Arrow would lose rows after a quote that is not closed."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = _Records(file, delimiter)
            names = next(records, [])
            schema = pa.schema([(name, pa.string()) for name in names])
            parts = [schema.empty_table()]
            ragged: dict[int, int] = {}
            while block := list(islice(records, ROWS)):
                wrong = {records.row - len(block) + row: len(cells) for row, cells in enumerate(block)}
                wrong = {row: cells for row, cells in wrong.items() if cells != len(names)}
                ragged |= wrong
                if not wrong:
                    columns = [pa.array(column, pa.string()) for column in zip(*block, strict=True)]
                    parts.append(pa.Table.from_arrays(columns, schema=schema))
    finally:
        csv.field_size_limit(limit)
    faults = records.faults
    if -1 in faults:
        raise DataError(f"{printable(path)}: the quotes of the header do not fit. Write it again.")
    mend = 'Close the quote; write one that belongs to the text twice, inside of quotes: "12"" monitor".'
    raise_defects(printable(path), describe("quotes that do not fit", list(faults), mend, faults.__getitem__))
    _raise_ragged(path, ragged, len(names))
    return pa.concat_tables(parts)


class _Records:
    """
    The records of a CSV file without blank lines.

    Attributes:
        row (`int`): Rows read so far, without the header.
        faults (`dict[int, str]`): The first rows that are not CSV, and why. After such a row, reading continues in the
            line after the one where the row begins.
    """

    def __init__(self, file: Iterable[str], delimiter: str) -> None:
        self.row = -1
        self.faults: dict[int, str] = {}
        self._delimiter, self._file = delimiter, iter(file)
        self._again: deque[str] = deque()  # lines to be read again
        self._record: list[str] = []  # lines of the record that is being read
        self._line = 0
        self._reader = csv.reader(self._lines(), delimiter=delimiter, strict=True)

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        while len(self.faults) < MAX_EXAMPLES:
            self._record = []
            begins = self._line + 1
            try:
                cells = next(self._reader)
            except csv.Error as error:
                reason = "never closed" if "end of data" in str(error) else str(error).replace("'", "")
                self.faults[self.row] = f"line {begins} of the file: {reason}, noticed in line {self._line}"
                below = self._record[1:]
                self._again.extendleft(reversed(below))
                self._line -= len(below)
                self._reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
                self.row += 1
                continue
            if cells:
                self.row += 1
                return cells
        raise StopIteration

    def _lines(self) -> Iterator[str]:
        while True:
            line = self._again.popleft() if self._again else next(self._file, None)
            if line is None:
                return
            self._record.append(line)
            self._line += 1
            yield line


# --------------------------------------------------------------------------------------------------------------------
# JSONL
# --------------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> pa.Table:
    simple, rest = True, b""
    for block in _blocks(path):
        if simple:
            lines, _, rest = (rest + block).removeprefix(codecs.BOM_UTF8).rpartition(b"\n")
            simple = _is_simple(lines)
    if simple and _is_simple(rest):
        try:
            return _read_simple_jsonl(path)
        except pa.ArrowInvalid:
            pass  # Python reads it, or finds out what is wrong and where
    return _read_odd_jsonl(path)


def _is_simple(lines: bytes) -> bool:
    """Whether every line seems to be one object without deep nesting, judged by its brackets."""
    block = np.frombuffer(b"\n%b\n" % lines, dtype=np.uint8)
    block = block[block != ord("\r")]
    ends = np.flatnonzero(block == ord("\n"))
    before, after = block[ends[1:] - 1], block[ends[:-1] + 1]
    whole = np.isin(before, (ord("}"), ord("\n"))).all() and np.isin(after, (ord("{"), ord("\n"))).all()
    opened = np.flatnonzero((block == ord("{")) | (block == ord("[")))
    counts = np.diff(np.searchsorted(opened, ends))
    return bool(whole and counts.max() <= DEEPEST)


def _read_simple_jsonl(path: Path) -> pa.Table:
    """
    Read a file with Arrow. Strings stay strings (a title such as "1984-06-08" is not a date); ids may be integers.
    """
    with open(path, encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "{}")
    try:
        cells = json.loads(first)
    except ValueError as error:
        raise pa.ArrowInvalid(str(error)) from error
    kinds: dict[str, pa.DataType] = {name: pa.string() for name in STRING_COLUMNS}
    kinds |= {name: pa.int64() for name in ("item_id", "user_id") if type(cells.get(name)) is int}
    with open(path, "rb") as file:
        table = pa.json.read_json(
            file,
            pa.json.ReadOptions(block_size=BYTES),
            pa.json.ParseOptions(explicit_schema=pa.schema(list(kinds.items()))),
        )
    absent = [name for name in kinds if table[name].null_count == len(table)]
    return table.drop_columns(absent) if len(table) else table


def _read_odd_jsonl(path: Path) -> pa.Table:
    """Read with Python a file that Arrow cannot read; the error names rows that Python cannot read either."""
    rows: list[dict[str, Any]] = []
    bad: dict[int, str] = {}
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
                if not isinstance(cells, dict):
                    bad[len(rows)], cells = "not an object", {}
            except RecursionError:
                bad[len(rows)], cells = "nested too deeply", {}
            except ValueError as problem:
                bad[len(rows)], cells = shortened(problem), {}
            rows.append(cells)
    name = printable(path)
    raise_defects(name, describe("malformed JSON", list(bad), "Write one object on each line.", bad.__getitem__))
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    defects = Defects()
    for key in set(columns) & set(NEEDED):
        _check_cells(key, columns[key], defects)
    raise_defects(name, defects.describe())
    return plain_table_of(columns, name)


def _check_cells(name: str, cells: list[Any], defects: Defects) -> None:
    """
    Check that the cells of a JSON column have one type that Arrow can hold; equivalent cells are converted in place.
    """

    def add(what: str, wrong: list[bool], mend: str) -> None:
        defects.add(f"{what} in column {name!r}", np.array(wrong), mend, 0, lambda row: shortened(repr(cells[row])))

    if name in ("item_id", "user_id"):
        kind = int if any(type(cell) is int for cell in cells[:1]) else str
        add("float", [isinstance(cell, float) for cell in cells], FLOAT_IDS)
        wrong = [cell is not None and type(cell) is not kind and not isinstance(cell, float) for cell in cells]
        add("a column that changes its type", wrong, "Give every column one type, for example all ids as strings.")
        cells[:] = [str(cell) if kind is int and cell is not None else cell for cell in cells]
    elif name in STRING_COLUMNS:
        add("no string", [cell is not None and not isinstance(cell, str) for cell in cells], "Write strings.")
    elif name == "timestamp" and any(isinstance(cell, str) for cell in cells):
        cells[:] = [None if cell is None else str(cell) for cell in cells]
    elif name == "timestamp":
        is_number = [cell is None or type(cell) in (int, float) for cell in cells]
        add("no number", [not number for number in is_number], "Write an integer or a date of ISO 8601.")
        if any(type(cell) is float for cell in cells) or any(abs(cell or 0) >= 2**63 for cell in cells if cell):
            cells[:] = [None if cell is None or cell != cell else repr(cell) for cell in cells]
    elif name == "codes":
        wrong = [
            cell is not None and not (_is_vector(cell, (int,)) and max(map(abs, cell), default=0) < 2**31)
            for cell in cells
        ]
        add("no list of whole numbers", wrong, "Write a list of codes for every item.")
    elif name == "features":
        wrong = [cell is not None and not _is_vector(cell) for cell in cells]
        add("no list of numbers", wrong, "Write a list of numbers for every item.")
        cells[:] = [None if cell is None else [float(number) for number in cell] for cell in cells if not any(wrong)]
    surrogates = [isinstance(cell, str) and any("\ud800" <= char <= "\udfff" for char in cell) for cell in cells]
    add("half of a character (a lone surrogate)", surrogates, "The text was cut inside a character: write it again.")


def _is_vector(cell: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    return isinstance(cell, list) and all(type(number) in kinds for number in cell)
