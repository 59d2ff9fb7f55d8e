"""Columns of tables: their names, plain arrays, ids and timestamps."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..errors import DataError, shortened
from ..model.modalities_transrec import MODALITIES


if TYPE_CHECKING:
    import datasets


logger = logging.get_logger(__name__)

INTERACTION_COLUMNS = ("user_id", "item_id", "timestamp")
STRING_COLUMNS = ("item_id", "user_id", "text", "image", "file_name", "audio", "video")
NEEDED = (*INTERACTION_COLUMNS, *MODALITIES, "file_name")
"""Columns that are read. Other columns are left out if they cannot be read."""
OTHER_NAMES = {
    "text": ("title", "titles", "texts", "name", "description", "caption"),
    "image": ("images", "imagepath", "imagefile", "imagebytes", "imageurl", "img", "picture", "photo", "filename"),
    "audio": ("sound", "sounds", "audiopath", "audiofile", "audiobytes", "audiourl", "song", "track"),
    "video": ("videos", "videopath", "videofile", "videobytes", "videourl", "clip", "movie", "mp4"),
    "features": ("feature", "featurevector", "embedding", "embeddings", "vector", "vectors"),
    "user_id": ("user", "userid", "uid", "customerid", "visitorid", "sessionid"),
    "item_id": ("item", "itemid", "iid", "productid", "articleid", "id"),
    "timestamp": ("time", "datetime", "date", "timestamps", "unixtime"),
}
"""Other names that people give the columns, in letters only."""
NOUNS = {
    "image": ("image", "images", "img", "imgs", "pic", "picture", "photo", "poster", "thumbnail", "cover", "jpg"),
    "text": ("text", "title", "caption", "headline", "description", "summary"),
    "features": ("embedding", "embeddings", "emb", "vector", "vectors"),
}
"""Words in a longer name, such as `product_title`, that tell the modality."""
MEASURES = ("count", "date", "format", "hash", "height", "id", "ids", "lang", "language", "length", "size", "type")
"""Words at the end of a name that tell that the column is something else."""
MISSING_WORDS = (
    *("nan", "+nan", "-nan", "1.#qnan", "-1.#qnan", "1.#ind", "-1.#ind", "nat", "none", "null", "(null)", "<null>"),
    *(r"\n", "<na>", "n/a", "#na", "#n/a", "#n/a n/a", "#null!", "undefined", "<none>", "[null]"),
)
"""Words that programs write for a missing value, in upper or lower case. `NA` counts in capitals only."""
_INVISIBLE = r"\s\p{Z}\p{Cc}\p{Cf}\x{034F}\x{115F}\x{1160}\x{2800}\x{3164}\x{FE00}-\x{FE0F}\x{FFA0}"
VISIBLE = f"[^{_INVISIBLE}]"
"""A character that a reader can see."""
SECOND = 10**6  # microseconds
LAST_SECOND = 2**42  # seconds since 1970 that are sure to fit in microseconds
ISO_DATE = (
    r"^(?P<date>\d{4}-\d\d-\d\d)(?:[T ](?P<time>\d\d:\d\d(?::\d\d)?)(?:[.,](?P<fraction>\d{1,9}))?"
    r"\s*(?P<zone>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?)?$"
)
FLOAT_IDS = "Ids have become floats: convert the column before writing it, in pandas with .astype('Int64')."


def check_columns(found: Sequence[str], source: str, required: Sequence[str], any_of: Sequence[str] = ()) -> None:
    """Refuse a table that lacks a `required` column, or has none of `any_of`; suggest columns with similar names."""
    check_names(found, source)
    missing = [name for name in required if name not in found]
    if any_of and not any(name in found for name in any_of):
        missing.append(" or ".join(any_of))
    if missing:
        mend = "; ".join(_renamings(found, (*required, *any_of))) or "add or rename columns"
        shown = [shortened(name, 40) for name in found[:20]]
        more = f" and {len(found) - 20} more" if len(found) > 20 else ""
        raise DataError(f"{source}: missing column {', '.join(missing)}; found {shown}{more}. Mend: {mend}.")


def check_names(found: Sequence[str], source: str) -> None:
    """Refuse two columns of one name."""
    if len(set(found)) < len(found):
        twice = next(name for name, count in Counter(found).items() if count > 1)
        raise DataError(f"{source}: column {shortened(twice)!r} occurs twice. Keep one of them.")


def warn_of_near_misses(schema: pa.Schema, source: str) -> None:
    """
    Warn of columns that are not read, but have nearly the name of a modality without a column, or hold images under
    another name.
    """
    renamings = _renamings(schema.names, tuple(MODALITIES))
    if "image" not in schema.names and not any(renaming.endswith("to 'image'") for renaming in renamings):
        structs = [field for field in schema if pa.types.is_struct(field.type) and field.name not in NEEDED]
        images = [field.name for field in structs if field.type.get_field_index("bytes") >= 0]
        renamings += [f"rename {shortened(name, 40)!r} to 'image'" for name in images[:1]]
    for renaming in renamings:
        logger.warning(f"{source}: a column is not read: {renaming} if it holds this content.")


def _renamings(found: Sequence[str], wanted: Sequence[str]) -> list[str]:
    # a command writes codes, so a column `code` is something else
    pairs = [(_nearest(name, found), name) for name in wanted if name not in found and name != "codes"]
    return [f"rename {shortened(near, 40)!r} to {name!r}" for near, name in pairs if near is not None]


def _nearest(name: str, found: Sequence[str]) -> str | None:
    """The column that probably means `name`, judged by its own name."""
    plain_names = {re.sub("[^a-z]", "", column.lower()): column for column in found if column not in NEEDED}
    for word in (name.replace("_", ""), *OTHER_NAMES[name]):
        if word in plain_names:
            return plain_names[word]
    near = difflib.get_close_matches(name.replace("_", ""), plain_names, n=1, cutoff=0.75)
    if near:
        return plain_names[near[0]]
    for column in plain_names.values():
        words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", column).lower())
        if set(NOUNS.get(name, ())) & set(words) and words[-1] not in MEASURES:
            return column
    return None


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values without dictionaries, views, runs and extension types."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type))
    if pa.types.is_dictionary(kind):
        return plain(column.cast(kind.value_type))
    if pa.types.is_run_end_encoded(kind):
        return plain(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], kind.value_type))
    if kind == pa.string_view():
        return column.cast(pa.large_string())
    if kind == pa.binary_view():
        return column.cast(pa.large_binary())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return column.cast(pa.large_list(kind.value_type))
    return column


def whole_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column of rows formatted as Arrow, copied only if it consists of many small pieces."""
    column = rows.select_columns(name)[:][name]
    if column.num_chunks > 1 + len(rows) // 100:  # a selection comes as one chunk per row
        column = pa.chunked_array([column.combine_chunks()])
    return plain(column)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def missing_words(texts: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Which texts are a missing value written as a word, (n,) bool."""
    is_short = pc.fill_null(pc.less(pc.binary_length(texts), 24), False)
    words = pc.utf8_trim_whitespace(texts.filter(is_short))
    if not pc.all(pc.string_is_ascii(words)).as_py():  # what is not visible and no blank either
        words = pc.replace_substring_regex(words, f"^[{_INVISIBLE}]+|[{_INVISIBLE}]+$", "")
    is_word = pc.is_in(pc.utf8_lower(words), pa.array(MISSING_WORDS, texts.type))
    mask = is_short.to_numpy(zero_copy_only=False).copy()
    mask[mask] = pc.or_(is_word, pc.equal(words, "NA")).to_numpy(zero_copy_only=False)
    return mask


def _matches(texts: pa.Array, pattern: str) -> np.ndarray:
    """Which texts contain a match of the pattern, (n,) bool."""
    return pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)


def encode_ids(column: pa.ChunkedArray, name: str, source: str) -> tuple[np.ndarray, pa.StringArray]:
    """
    For each row the index of its id among the distinct ids, (rows,), -1 for an empty id; and these ids as strings.
    """
    column = plain(column)
    kind = column.type
    if not (pa.types.is_integer(kind) or is_text(kind)) and column.null_count < len(column):
        mend = FLOAT_IDS if pa.types.is_floating(kind) else "Write ids as strings or integers."
        raise DataError(f"{source}: column {name!r} holds {kind}, not strings or integers. {mend}")
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    try:
        values = encoded.dictionary.cast(pa.string())
        values.validate(full=True)
    except pa.ArrowInvalid:
        raise DataError(f"{source}: column {name!r} is not UTF-8 text. Write it again in UTF-8.") from None
    codes = encoded.indices.fill_null(-1).to_numpy()
    if is_text(kind):
        odd = np.flatnonzero(~pc.ascii_is_alnum(values).to_numpy(zero_copy_only=False))  # the others need no regex
        odd_values = values.take(pa.array(odd))
        empty = odd[~_matches(odd_values, VISIBLE)]
        if len(empty):
            codes = np.where(np.isin(codes, empty), -1, codes)
        floats = odd[_matches(odd_values, r"^-?\d+\.0+$")]
        if len(floats) and len(floats) + len(empty) == len(values):
            first = shortened(values[int(floats[0])])
            raise DataError(f"{source}: column {name!r} holds {first!r} and the like. {FLOAT_IDS}")
    return codes, values


class Timestamps:
    """
    The timestamps of a block of interactions: integers, floats that are integers, dates, or strings of these.

    Attributes:
        numbers (`np.ndarray` of shape `(rows,)`, int64): The integers, or for dates the microseconds since 1970.
        are_dates (`bool`): Whether they are dates.
        missing (`np.ndarray` of shape `(rows,)`, bool): Which timestamps are missing.
        inexact (`np.ndarray` of shape `(rows,)`, bool): Which timestamps were rounded by their type or notation.
        wrong (`np.ndarray` of shape `(rows,)`, bool): Which values are not timestamps.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        column = plain(column)
        self.kind = column.type
        self.are_dates = False
        self.numbers = np.zeros(len(column), dtype=np.int64)
        self.missing = pc.is_null(column, nan_is_null=True).to_numpy()
        self.inexact, self.wrong = np.zeros((2, len(column)), dtype=bool)
        if pa.types.is_integer(self.kind):
            self._keep(np.arange(len(column)), column.fill_null(0).to_numpy())
        elif pa.types.is_floating(self.kind):
            self._read_floats(column.to_numpy())
        elif pa.types.is_date(self.kind) or pa.types.is_timestamp(self.kind):
            self._read_dates(column)
        elif is_text(self.kind) or pa.types.is_decimal(self.kind):
            self._read_strings(column.cast(pa.large_string()).combine_chunks())
        else:
            self.wrong = ~self.missing

    def _keep(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Keep integers of any type as the numbers of these rows, if they are not too large."""
        fits = values <= np.iinfo(np.int64).max
        self.wrong[rows] = ~fits
        self.numbers[rows] = np.where(fits, values, 0).astype(np.int64)

    def _read_floats(self, values: np.ndarray) -> None:
        exact = 2.0 ** (
            np.finfo(values.dtype).nmant + 1
        )  # from here on, the type cannot tell neighbouring integers apart
        values = np.where(self.missing, 0, values.astype(np.float64))
        self.inexact = np.isfinite(values) & (np.abs(values) >= exact)
        self.wrong = ~self.inexact & ~(np.isfinite(values) & (values == np.floor(values)))
        self.numbers = np.where(self.wrong | self.inexact, 0, values).astype(np.int64)

    def _read_dates(self, column: pa.ChunkedArray) -> None:
        self.are_dates = True
        unit = "s" if pa.types.is_date(self.kind) else self.kind.unit
        values = column.cast(pa.timestamp(unit) if pa.types.is_date(self.kind) else self.kind).cast(pa.int64())
        numbers = values.fill_null(0).to_numpy()
        per_second = {"s": 1, "ms": 10**3, "us": SECOND, "ns": 10**9}[unit]
        self.wrong = ~self.missing & (np.abs(numbers / per_second) > LAST_SECOND)
        numbers = np.where(self.wrong, 0, numbers)
        self.numbers = numbers // 1000 if unit == "ns" else numbers * (SECOND // per_second)

    def _read_strings(self, texts: pa.Array) -> None:
        texts = pc.utf8_trim_whitespace(texts)
        self.missing = pc.fill_null(pc.equal(texts, ""), True).to_numpy(zero_copy_only=False) | missing_words(texts)
        rows = np.flatnonzero(~self.missing)
        whole = self._matching(texts, rows, r"^[+-]?\d{1,18}(\.0*)?$")
        numbers = pc.replace_substring_regex(texts.take(pa.array(whole)), r"^\+|\..*$", "")
        self.numbers[whole] = numbers.cast(pa.int64()).to_numpy(zero_copy_only=False)
        rows = np.setdiff1d(rows, whole, assume_unique=True)
        dates = self._matching(texts, rows, ISO_DATE)
        if len(dates) and len(whole) == 0:
            self.are_dates = True
            self._read_iso(texts.take(pa.array(dates)), dates)
            rows = np.setdiff1d(rows, dates, assume_unique=True)
        for row in rows.tolist():
            self._read_odd(texts[row].as_py(), row)

    def _matching(self, texts: pa.Array, rows: np.ndarray, pattern: str) -> np.ndarray:
        return rows[_matches(texts.take(pa.array(rows)), pattern)]

    def _read_iso(self, texts: pa.Array, rows: np.ndarray) -> None:
        """Read dates of ISO 8601; dates without a time zone are in UTC."""
        parts = pc.extract_regex(texts, ISO_DATE)
        date, time, fraction, zone = (pc.struct_field(parts, part) for part in ("date", "time", "fraction", "zone"))
        time = pc.if_else(pc.equal(time, ""), pa.scalar("00:00", time.type), time)
        seconds = pc.binary_join_element_wise(date, time, pa.scalar("T", date.type))
        try:
            numbers = seconds.cast(pa.timestamp("s")).cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid:  # such as the 30th of February
            numbers = np.zeros(len(rows), dtype=np.int64)
            for place, text in enumerate(seconds.to_pylist()):
                try:
                    numbers[place] = int(datetime.fromisoformat(f"{text}+00:00").timestamp())
                except ValueError:
                    self.wrong[rows[place]] = True
        zones = zone.dictionary_encode()
        offsets = np.array([_offset(text) for text in zones.dictionary.to_pylist()], dtype=np.int64)
        digits = pc.utf8_slice_codeunits(pc.utf8_rpad(fraction, 6, "0"), 0, 6).cast(pa.int64()).to_numpy()
        self.numbers[rows] = (numbers - offsets[zones.indices.to_numpy()]) * SECOND + digits

    def _read_odd(self, text: str, row: int) -> None:
        """A number in another notation."""
        try:
            number = Decimal(text)
            whole = number.is_finite() and number == number.to_integral_value() and -(2**63) <= number < 2**63
        except (InvalidOperation, OverflowError):
            whole = False
        if not whole or self.are_dates:
            self.wrong[row] = True
        elif int(number.as_tuple().exponent) > 0:  # the last digits were not written
            self.inexact[row] = True
        else:
            self.numbers[row] = int(number)


def were_rounded(timestamps: np.ndarray) -> bool:
    """
    Whether integers were float32 before, which rounds seconds since 1970 to about two minutes. This is so if there are
    at least 16, float32 can hold all of them exactly, and they are not whole days.
    """
    sample = np.unique(timestamps[:: 1 + len(timestamps) // 2**16])
    sample = sample[np.abs(sample) >= 2**30]
    return bool(len(sample) >= 16 and (sample == sample.astype(np.float32)).all() and (sample % 86_400).any())


def _offset(zone: str) -> int:
    """Seconds that a time zone is ahead of UTC."""
    if zone in ("", "Z", "UTC", "GMT"):
        return 0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return (int(digits[:2]) * 3600 + int(digits[2:]) * 60) * (-1 if zone[0] == "-" else 1)
