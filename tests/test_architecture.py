"""The house: wings whose imports run one way, no circle, no long file, travelling files that import siblings only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import transrec_hf


PACKAGE = Path(transrec_hf.__file__).parent
WINGS = ("errors", "files", "model", "data", "items", "evaluation", "publishing", "training", "serving", "commands")
LONGEST = 520


def modules() -> dict[str, ast.Module]:
    """The modules of the package by dotted name, without the `__init__` files, which only hand names on."""
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in files
    }


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports: at its top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name.split(".")[: -node.level]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{target}.{alias.name}".strip(".") for alias in node.names]
            found |= {other for other in (target, *names) if other in MODULES}
    return found


def wing(name: str) -> int:
    return WINGS.index(name.split(".")[0])


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards_through_the_wings(name):
    up = {other for other in imports(name) if wing(other) > wing(name)}
    assert not up, f"{name} belongs below {up}"


def test_there_is_no_circle_of_imports():
    left = {name: imports(name) for name in MODULES}
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_too_long_to_be_read(name):
    lines = (PACKAGE / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("model.")])
def test_files_that_travel_import_their_siblings_by_one_dot(name):
    """Custom code of a checkpoint is copied flat, by a pattern that finds `from .name import` wherever it stands."""
    text = (PACKAGE / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1 and (node.level == 0 or (node.module and "." not in node.module))
            assert node.level or not (node.module or "").startswith("transrec_hf")
    assert "from .." not in text
