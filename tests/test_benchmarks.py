"""The table of benchmarks is whole, and the page shows what it says."""

from __future__ import annotations

import csv
import importlib
import re
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
    assert len({tuple(row.values()) for row in ROWS}) == len(ROWS), "a row stands there twice"
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
    for plot in (module.plot_speedups, module.plot_ablation, module.plot_compression):
        plot(FOLDER / "results.csv", tmp_path)
    for plot in (module.plot_balance, module.plot_sources, module.plot_quickstart):
        plot(tmp_path)
    shown = {"speedups": "x", "ablation": "x", "compression": "student, 1 block", "balance": ".0594"}
    shown["meta_transfer"] = "gradient similarity, guarded"
    for name, text in {**shown, "quickstart": "0.407"}.items():
        drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in drawn and f"{text}</text>" in drawn


def test_pictures_of_pages_have_light_and_dark_colours():
    root = FOLDER.parent
    pages = [root / "README.md", *FOLDER.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/*.md")]
    pictures = {
        (page.parent / name).resolve()
        for page in pages
        for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    }
    assert len(pictures) > 8
    photographs = {picture for picture in pictures if picture.name.startswith("demo-")}  # of the demo, in both modes
    for picture in pictures - photographs:
        assert picture.suffix == ".svg", f"{picture.name}: draw it as an SVG for light and dark screens"
        assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8"), picture.name


def test_every_benchmark_can_be_run():
    for name in importlib.import_module("run").BENCHMARKS:
        module = importlib.import_module(name)
        assert module.__doc__ and callable(module.run) and callable(module.add_options)
        assert any(row["benchmark"] == name for row in ROWS), f"{name} has no row"
