"""Which items may be recommended, as an expression over their columns: parsed here, evaluated by Arrow."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from ..errors import DataError, one_line, shortened


MAX_LENGTH = 4000  # characters of an expression
MEND = "An example is \"price < 20 and category in ['hat', 'sock']\"."

_COMPARISONS: dict[type, Callable[[Any, Any], pc.Expression]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], pc.Expression]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left.cast("double") / right.cast("double"),
}
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def matching_rows(expression: str, columns: pa.Table) -> np.ndarray:
    """
    The rows for which an expression over columns is true: `(n_rows,)`, bool. The expression may use Python's
    comparisons, `and`, `or`, `not`, `in`, `is None` and arithmetic. `'hat' in text` finds a part of a text, and
    `col('unit price')` names any column. Null counts as not true.

    Args:
        expression (`str`): E.g. `"price < 20 and stock > 0"`.
        columns (`pa.Table`): The columns that it may name.

    Raises:
        [`DataError`]: If the expression cannot be read, names an unknown column, or does not fit the types of the
            columns.
    """
    parsed = parse_filter(expression, tuple(columns.column_names))
    try:
        found = pa.dataset.dataset(columns).to_table(columns={"found": parsed})["found"]
    except pa.ArrowException as error:
        raise DataError(
            f"the filter {shortened(expression)!r} does not fit the columns ({shortened(one_line(error), 200)})"
        ) from error
    if not pa.types.is_boolean(found.type):
        raise DataError(f"the filter {shortened(expression)!r} does not give true or false for an item. {MEND}")
    return pc.fill_null(found, False).to_numpy()


@functools.lru_cache(maxsize=256)
def parse_filter(expression: str, names: tuple[str, ...]) -> pc.Expression:
    """The expression as an Arrow expression over columns of these names. Raises [`DataError`]."""
    if not isinstance(expression, str) or not expression.strip():
        raise DataError(f"a filter must be an expression over columns, got {shortened(repr(expression))}. {MEND}")
    if len(expression) > MAX_LENGTH:
        raise DataError(f"the filter has {len(expression):,} characters; at most {MAX_LENGTH:,} are allowed")
    try:
        return _Reader(expression, names).expression(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        said = getattr(error, "msg", None) or shortened(one_line(error), 200)
        raise DataError(f"the filter {shortened(expression)!r} cannot be read ({said}). {MEND}") from None


class _Reader:
    """Turns Python syntax into Arrow expressions. Syntax that is not listed here is refused."""

    def __init__(self, text: str, names: tuple[str, ...]):
        self.text, self.names = text, names

    def refuse(self, node: ast.AST) -> DataError:
        part = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
        return DataError(f"the filter holds {shortened(part)!r}, which is not understood. {MEND}")

    def column(self, name: str) -> pc.Expression:
        if name not in self.names:
            raise DataError(
                f"the filter names the unknown column {shortened(name)!r}; the items have {list(self.names)}"
            )
        return pc.field(name)

    def expression(self, node: ast.AST) -> pc.Expression:
        """A column, a number, a text, or an expression of them."""
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return functools.reduce(join, map(self.expression, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.expression(node.operand)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return pc.scalar(0) - self.expression(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self.expression(node.left), self.expression(node.right))
        if isinstance(node, ast.Compare):
            terms = [node.left, *node.comparators]
            steps = zip(terms[:-1], node.ops, terms[1:], strict=True)
            return functools.reduce(operator.and_, (self.comparison(*step) for step in steps))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "col":
            if len(node.args) == 1 and not node.keywords and isinstance(name := self.value(node.args[0]), str):
                return self.column(name)
        if isinstance(node, ast.Name) and node.id not in self.names and node.id.lower() in _CONSTANTS:
            return pc.scalar(_CONSTANTS[node.id.lower()])
        if isinstance(node, ast.Name):
            return self.column(node.id)
        return pc.scalar(self.value(node))

    def comparison(self, left: ast.AST, kind: ast.cmpop, right: ast.AST) -> pc.Expression:
        if isinstance(kind, (ast.In, ast.NotIn)):
            found = self.membership(left, right)
            return ~found if isinstance(kind, ast.NotIn) else found
        for one, other in ((left, right), (right, left)):
            if self.is_null(one):
                if isinstance(kind, (ast.Is, ast.Eq)):
                    return self.expression(other).is_null(nan_is_null=True)
                if isinstance(kind, (ast.IsNot, ast.NotEq)):
                    return ~self.expression(other).is_null(nan_is_null=True)
        if type(kind) not in _COMPARISONS:
            raise self.refuse(right)
        return _COMPARISONS[type(kind)](self.expression(left), self.expression(right))

    def membership(self, left: ast.AST, right: ast.AST) -> pc.Expression:
        if isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            return self.expression(left).isin([self.value(value) for value in right.elts])
        if isinstance(part := self.value(left), str):
            return pc.match_substring(self.expression(right), part)
        raise self.refuse(left)

    def is_null(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id not in self.names and node.id.lower() in ("null", "none")
        return isinstance(node, ast.Constant) and node.value is None

    def value(self, node: ast.AST) -> Any:
        """A number, a text, true, false or null."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            if isinstance(node.operand.value, (int, float)):
                return -node.operand.value
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
            return node.value
        raise self.refuse(node)
