"""CSV files: what `csv.reader(strict=True)` reads is read, and nothing else."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from transrec_hf.data.catalogue import load_catalogue
from transrec_hf.data.interactions import load_domain
from transrec_hf.data.text_tables import read_text_table
from transrec_hf.errors import DataError


many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder: Path, text: str | bytes, name: str = "items.csv") -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return folder / name


def as_rows(table: pa.Table) -> list[list[str]]:
    return [list(row.values()) for row in table.to_pylist()]


@many
@given(st.text(alphabet='ab,"\n\r ', max_size=40))
@example('x,"y')
@example('x,"y"z\n')
@example('x,y"z"\n')
@example('x,"y\nz,"w"\n')
@example('"x","y""z"\r\n\r\n"w",')
def test_any_text_is_read_as_the_standard_reader_reads_it(tmp_path: Path, text: str) -> None:
    text = f"item_id,text\n{text}"
    try:
        expected = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row][1:]
        is_sound = all(len(row) == 2 for row in expected)
    except csv.Error:
        is_sound = False
    if is_sound:
        assert as_rows(read_text_table(written(tmp_path, text))) == expected
    else:
        with pytest.raises(DataError, match=r"items\.csv: (quotes that do not fit|number of cells)"):
            read_text_table(written(tmp_path, text))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


@many
@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=8),
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_what_is_written_comes_back(tmp_path, rows, delimiter, quoting, line_end, has_mark) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
    writer.writerows([("item_id", "text"), *rows])
    text = file.getvalue()
    expected = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row][1:]
    content = ("\ufeff" if has_mark else "") + text
    assert as_rows(read_text_table(written(tmp_path, content))) == expected


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (['a,"12-inch', "b,blue", "c,green"], [("row 1 (line 2", "never closed")]),
        (["a,red", 'b,"big" lamp', "c,green"], [("row 2 (line 3", "expected after")]),
        (
            ['a,"big" lamp', "b,blue", 'c,"small" lamp', 'd,"open'],
            [("row 1 (line 2",), ("row 3 (line 4",), ("row 4",)],
        ),
        (['a,"two', 'lines"', "", 'b,"x" y'], [("row 2 (line 5",)]),
        (['"a,red', "b,blue"], [("row 1 (line 2",)]),
    ],
)
def test_a_quote_that_does_not_fit_is_named(lines: list[str], rows: list[tuple[str, ...]], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_catalogue(written(tmp_path, "\n".join(["item_id,text", *lines, ""])))
    for parts in rows:
        assert all(part in str(caught.value) for part in parts), caught.value


def test_many_wrong_quotes_do_not_take_for_ever(tmp_path: Path) -> None:
    rows = "".join(f'{row},"x" y\n' for row in range(20_000))
    with pytest.raises(DataError, match=r"row 5 \(line 6"):
        load_catalogue(written(tmp_path, f"item_id,text\n{rows}"))


def test_a_wrong_quote_in_the_header(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="quotes of the header"):
        load_catalogue(written(tmp_path, 'item_id,"te"xt\na,red\n'))


@pytest.mark.parametrize("place", range(-3, 4))
def test_line_breaks_in_cells_are_kept_wherever_they_fall(place: int, tmp_path: Path) -> None:
    head = 'item_id,text\na,"'
    long = "z" * (2**20 + place - len(head)) + "\r\nend"
    assert read_text_table(written(tmp_path, f'{head}{long}"\n'))["text"][0].as_py() == long


def test_long_cells_need_no_setting_and_change_none(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "word " * 100_000
    assert load_catalogue(written(tmp_path, f'item_id,text\na,"{text}"\n')).text(0) == text
    with pytest.raises(DataError):
        load_catalogue(written(tmp_path, 'item_id,text\na,"x'))
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_what_separates_cells_is_found_out(delimiter: str, quote: str, suffix: str, tmp_path: Path) -> None:
    for name, rows in (
        (
            "items",
            [("item_id", "text", "price"), ("a", "red hat", "1,5"), ("b", "cap" + "; x" * len(quote), "2")],
        ),
        ("interactions", [("user_id", "item_id", "timestamp"), ("u", "a", "1"), ("u", "b", "2")]),
    ):
        cells = [[cell if quote or delimiter != "," else cell.replace(",", ".") for cell in row] for row in rows]
        lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in cells]
        written(tmp_path, "\n".join(lines), f"{name}.{suffix}")
    catalogue, sequences = load_domain(tmp_path)
    assert catalogue.text(0) == "red hat" and sequences[0]["items"].tolist() == [0, 1]


def test_numbers_of_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    catalogue = load_catalogue(written(tmp_path, "item_id,text,code\n007,1984-06-08,00123\n7,1e5,1.50\n"))
    assert catalogue.item_ids.tolist() == ["007", "7"] and catalogue.items["code"][:] == ["00123", "1.50"]
    assert [catalogue.text(row) for row in (0, 1)] == ["1984-06-08", "1e5"]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("item_id,text\na,caf\u00e9\n".encode("latin-1"), "CP1252"),
        ("item_id,text\na,\u201cquoted\u201d \u2013 5 \u20ac\n".encode("cp1252"), "CP1252"),
        ("item_id,text\na,red\n".encode("utf-16"), "UTF-16"),
        (
            "item_id,text\na,blau\u84dd\n".encode("utf-16-be")[:0] + b"\xfe\xff" + "item_id".encode("utf-16-be"),
            "UTF-16",
        ),
    ],
)
def test_other_encodings_are_named(content: bytes, encoding: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"line \d of the file is not UTF-8.* iconv -f {encoding} -t UTF-8"):
        load_catalogue(written(tmp_path, content))


def test_the_advice_gives_back_what_was_meant(tmp_path: Path) -> None:
    text = "\u201csoft\u201d \u2013 5 \u20ac"
    content = f"item_id,text\na,{text}\n".encode("cp1252")
    assert load_catalogue(written(tmp_path, content.decode("cp1252"))).text(0) == text
