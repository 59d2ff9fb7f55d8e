"""Filters over columns: what they mean, and that nothing but expressions of columns is understood."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from transrec_hf import DataError
from transrec_hf.serving.filters import MAX_LENGTH, matching_rows


COLUMNS = pa.table(
    {
        "price": [5.0, 20.0, None, float("nan")],
        "stock": [1, 0, 3, 7],
        "category": ["hat", "sock", None, "shoe"],
        "text": ["a red hat", "blue socks", "a shoe", None],
        "new": [True, False, None, True],
        "unit price": [1, 2, 3, 4],
        "true": [0, 1, 0, 1],
    }
)
MEANINGS = {
    "price < 20": [0],
    "price <= 20 and stock > 0": [0],
    "10 < price <= 20": [1],
    "not (category == 'hat')": [1, 3],
    "category != 'hat' or price < 6": [0, 1, 3],
    "category in ['hat', 'shoe']": [0, 3],
    "category not in ('hat',)": [1, 2, 3],
    "'red' in text": [0],
    "price is None": [2, 3],
    "price is not None": [0, 1],
    "category == None": [2],
    "new": [0, 3],
    "not new": [1],
    "stock * 2 - 1 > 4": [2, 3],
    "stock / 2 == 1.5": [2],
    "price > -1": [0, 1],
    "stock > -price": [0, 1],
    "col('unit price') >= 3": [2, 3],
    "true == 1": [1, 3],
    "stock in [1, 3, -4]": [0, 2],
    "False": [],
    "not " * 900 + "new": [0, 3],
}


@pytest.mark.parametrize("expression", MEANINGS, ids=lambda text: text[:30])
def test_what_a_filter_means(expression: str) -> None:
    assert np.flatnonzero(matching_rows(expression, COLUMNS)).tolist() == MEANINGS[expression]


REFUSED = {
    "": "must be an expression",
    "   ": "must be an expression",
    "colour == 'red'": "names the unknown column 'colour'; the items have",
    "price = 3": "cannot be read",
    "price <": "cannot be read",
    "price": "does not give true or false",
    "price + 1": "does not give true or false",
    "category > 3": "does not fit the columns",
    "text and stock": "does not fit the columns",
    "__import__('os').system('true')": "not understood",
    "price.real > 1": "not understood",
    "(lambda: 1)()": "not understood",
    "[price for price in [1]]": "not understood",
    "price ** 9": "not understood",
    "stock // 0": "not understood",
    "f'{price}' == 'a'": "not understood",
    "price if new else stock": "not understood",
    "price in category": "not understood",
    "col(price) > 1": "not understood",
    "col('price', 'stock') > 1": "not understood",
    "b'a' == category": "not understood",
    "stock in [price]": "not understood",
    "price < 1j": "not understood",
    "x" * (MAX_LENGTH + 1): "characters",
    "(" * 1500 + "price < 1" + ")" * 1500: "cannot be read",
    "price < 3\x00": "cannot be read",
    "10000000000000000000000000000000000000 < stock": "does not fit|cannot be read",
}


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: text[:30])
def test_what_is_no_filter_is_refused(expression: str) -> None:
    with pytest.raises(DataError, match=REFUSED[expression]):
        matching_rows(expression, COLUMNS)
