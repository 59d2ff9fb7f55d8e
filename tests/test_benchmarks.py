"""The table of benchmarks is whole, and the page shows what it says."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS = list(csv.DictReader((FOLDER / "results.csv").open(encoding="utf-8")))


@pytest.fixture(scope="module", autouse=True)
def path():
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_every_row_tells_how_it_came_about():
    columns = importlib.import_module("common").COLUMNS
    assert ROWS and tuple(ROWS[0]) == columns
    for row in ROWS:
        float(row["value"])
        for name in ("benchmark", "variant", "metric", "repeats", "data", "seed", "machine", "command", "date"):
            assert row[name], (name, row)
        assert " /" not in row["command"], f"a path of one machine: {row['command']}"
        assert row["reference"] or row["unit"] != "x", row
        if row["low"]:
            assert float(row["low"]) <= float(row["value"]) <= float(row["high"])


def test_the_pages_show_the_tables():
    module = importlib.import_module("page")
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- end -->" in text
        assert module.fill_tables(text, FOLDER / "results.csv") == text, f"{page.name}: run make pages"


def test_the_plots_are_drawn_for_light_and_dark(tmp_path):
    module = importlib.import_module("page")
    for plot, name in ((module.plot_speedups, "speedups"), (module.plot_ablation, "ablation")):
        plot(FOLDER / "results.csv", tmp_path)
        drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in drawn and "x</text>" in drawn
        assert "prefers-color-scheme: dark" in (FOLDER / f"{name}.svg").read_text(encoding="utf-8")


def test_every_benchmark_can_be_run():
    for name in importlib.import_module("run").BENCHMARKS:
        module = importlib.import_module(name)
        assert module.__doc__ and callable(module.run) and callable(module.add_options)
        assert any(row["benchmark"] == name for row in ROWS), f"{name} has no row"
