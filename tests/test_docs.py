"""The pages: every public name is in the reference, every block of code runs, every number is a row of a table.

A block that cannot run here says why in the line before it: `<!-- not run: REASON -->`. Programs run in an empty
folder with two small platforms, `my_source` and `my_target`, a trained model of each under `runs/`, tiny towers under
the names of real ones, and the exports of a shop.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, PartialState
from local_hub import LocalHub
from testing_utils import load_example
from transformers import AutoModel

import transrec_cli
import transrec_hf
from transrec_hf import TransRecTrainingArguments
from transrec_hf.data import demo
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.model.configuration_transrec import OBJECTIVES
from transrec_hf.model.user_encoder_transrec import USER_ENCODERS
from transrec_hf.publishing.dataset import write_interactions, write_items
from transrec_hf.training.tuning import TUNINGS


ROOT = Path(__file__).parents[1]
PAGES = re.findall(r'"([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.M | re.S)
REFERENCE = {page: text for page, text in TEXTS.items() if page.startswith("docs/reference/")}
RECORD = r"""
set -eu
transrec() { printf '%s\x1f' transrec "$@"; echo; }
python() { printf '%s\x1f' python "$@"; echo; }
"""
"""What the shell makes of a block: each command that would run, its words apart, on a line."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and code of the blocks that are to run."""
    found = [block for block in BLOCK.finditer(TEXTS[page]) if block["language"] in ("python", "bash")]
    return [(block["language"], block["code"]) for block in found if not block["why"]]


ELSEWHERE = ("docs/extending.md", "model_cards/")
"""Pages whose code is run by tests/test_extending.py, and rendered and run by tests/test_modelcard.py."""

WITH_CODE = [page for page in PAGES if blocks(page) and not page.startswith(ELSEWHERE)]
QUICK = {"README.md", *REFERENCE}
"""Pages whose blocks run in the default tests; the others take longer."""


# Names


def test_every_public_name_is_in_the_reference_and_in_an_example_there() -> None:
    directives = re.findall(r"^::: transrec_hf\.(\w+)$", "\n".join(REFERENCE.values()), re.M)
    names = set(transrec_hf.__all__)
    assert sorted(directives) == sorted(names - {"__version__"})
    code = "\n".join(code for page in REFERENCE for _, code in blocks(page))
    assert names <= set(re.findall(r"\w+", code)), names - set(re.findall(r"\w+", code))


def test_every_verb_is_in_the_reference() -> None:
    table = re.findall(r"^\| (`.+?) \|", REFERENCE["docs/reference/command.md"], re.M)
    assert {*transrec_cli.VERBS, "push", "card", "info"} == set(re.findall(r"`([\w-]+)`", " ".join(table)))


def test_every_choice_is_in_its_guide() -> None:
    choices = {"objectives": [*OBJECTIVES, *USER_ENCODERS], "tuning": TUNINGS, "protocols": transrec_hf.PROTOCOLS}
    for page, names in choices.items():
        assert set(names) <= set(re.findall(r"`([\w-]+)`", TEXTS[f"docs/{page}.md"])), page


@pytest.mark.parametrize("name", sorted(set(transrec_hf.__all__) - {"__version__", "PROTOCOLS"}))
def test_every_public_name_says_what_it_is(name: str) -> None:
    value = getattr(transrec_hf, name)
    own = value.__doc__ or ""
    assert len(own) > 60 and re.match(r"[A-Z\[]", own.strip()), name
    public = (
        [m for key, m in vars(value).items() if key[0] != "_" and inspect.isfunction(m)]
        if inspect.isclass(value)
        else []
    )
    for method in public:
        assert inspect.getdoc(method) or any(hasattr(base, method.__name__) for base in value.__mro__[1:]), (
            f"{name}.{method.__name__} has no docstring"
        )


def test_every_page_is_in_the_navigation_once() -> None:
    assert len(PAGES) == len(set(PAGES))
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} <= set(PAGES), (
        "add it to zensical.toml"
    )


def test_the_site_that_is_built_is_the_one_that_is_published() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text(encoding="utf-8"))["jobs"]["build"][
        "steps"
    ]
    (built,) = re.findall(r'^site_dir = "(.+)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"), re.M)
    assert "make docs" in [step.get("run") for step in steps] and steps[-1]["with"]["path"] == built


def test_no_block_is_left_out_without_a_reason() -> None:
    for page, text in TEXTS.items():
        for block in BLOCK.finditer(text):
            assert block["language"], f"{page}: a block without a language, e.g. text:\n{block['code']}"
            assert block["why"] is None or len(block["why"]) > 10


# Numbers


def decimals(text: str) -> list[str]:
    """The decimal numbers of a paragraph, without code and references."""
    text = re.sub(
        r"`[^`]*`|\]\([^)]*\)|arXiv\s+\d+\.\d+|License 2\.0|Python [\d.]+|Apache-2\.0|version [\d.]+", "", text
    )
    return re.findall(r"(?<![\w.\d])\d*\.\d+", text)


NUMBERS = ("value", "difference", "low", "high", "cosine", "validation_ndcg@10")


def numbers_of(source: str) -> list[float]:
    """The numbers of the rows that `FILE COLUMN=VALUE COLUMN=VALUE; FILE ...` names, without their signs."""
    numbers = []
    for entry in source.split(";"):
        file, _, filters = entry.strip().partition(" ")
        wanted = re.findall(r"(\w+)=(.+?)(?= \w+=|$)", filters)
        (path,) = (
            place for place in (ROOT / "benchmarks" / file, ROOT / "examples" / "results" / file) if place.exists()
        )
        with open(path, newline="", encoding="utf-8") as table:
            rows = [row for row in csv.DictReader(table) if all(row[name] == value for name, value in wanted)]
        assert rows, f"no row of {entry}"
        names = [name for name in rows[0] if name in NUMBERS]
        numbers += [abs(float(row[name])) for row in rows for name in names if row[name]]
    return numbers


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md" and "cards/" not in page])
def test_every_number_of_a_page_is_a_row_of_a_table(page: str) -> None:
    """
    Tables are filled by benchmarks/page.py; what a sentence or another table says names its rows in the comment before
    it: `<!-- numbers: FILE COLUMN=VALUE; FILE COLUMN=VALUE -->`. What is in backticks is a setting.
    """
    text = re.sub(r"<!-- (quality|runs|table)\b.*?<!-- end -->", "", TEXTS[page], flags=re.S)
    text = re.sub(r"^(<!-- numbers: .+ -->)\n\n", r"\1\n", BLOCK.sub("", text), flags=re.M)
    for paragraph in re.split(r"\n\n", text):
        source = re.match(r"<!-- numbers: (.+) -->\n", paragraph)
        if source is None:
            assert not decimals(paragraph), f"{page}: name the rows of\n{paragraph}"
            continue
        values = numbers_of(source[1])
        for number in decimals(paragraph.removeprefix(source[0])):
            half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-12
            assert any(abs(value - float(number)) <= half for value in values), f"{page}: {number} is in no row"


# Code


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the programs of the pages find."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
        patch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=40))
        patch.chdir(folder)
        write_platforms(folder)
        short(patch)
        text_model = "sentence-transformers/all-MiniLM-L6-v2"
        towers = ("--text_model", text_model, "--vision_model", "google/mobilenet_v2_1.0_224")
        transrec("pretrain", "my_source", *towers, "--output_dir", "runs/my_source")
        transrec("pretrain", "my_target", *towers, "--output_dir", "runs/my_target")
        transrec("encode", "runs/my_target", "--items", "my_target", "--index", "runs/index")
        for checkpoint in (folder / "runs").glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)  # a page that trains into the same folder begins anew
        yield folder


def write_platforms(folder: Path) -> None:
    """Two platforms of the demo world, items of the target called item-0, ..., and the target as a shop exports it."""
    world = demo_world()
    for name in ("source", "target"):
        platform = getattr(world, name)
        ids = [f"{'item' if name == 'target' else 'thing'}-{row}" for row in range(len(platform.catalogue))]
        items = platform.catalogue.items
        titles = [text or words for text, words in zip(items["text"], items["attributes"], strict=True)]
        items = items.remove_columns(["item_id", "text"]).add_column("item_id", ids).add_column("text", titles)
        price = [5.0 + row for row in range(len(ids))]
        items = items.add_column("price", price).add_column("stock", [row % 3 for row in range(len(ids))])
        catalogue = transrec_hf.Catalogue(items)
        (folder / f"my_{name}").mkdir()
        write_items(catalogue, folder / f"my_{name}" / "items.parquet")
        write_interactions(catalogue, platform.sequences, folder / f"my_{name}" / "interactions.parquet")
    write_shop(folder, world.target)
    config, processor = demo_config(), demo_processor()
    for tower, place in (
        (config.text_config, "sentence-transformers/all-MiniLM-L6-v2"),
        (config.vision_config, "google/mobilenet_v2_1.0_224"),
    ):
        AutoModel.from_config(tower).save_pretrained(folder / place)
    processor.tokenizer.save_pretrained(folder / "sentence-transformers/all-MiniLM-L6-v2")
    processor.image_processor.save_pretrained(folder / "google/mobilenet_v2_1.0_224")


def write_shop(folder: Path, platform: Any) -> None:
    """Exports as shops have them: names of their own, ids that became floats, guests, items that are gone."""
    with open(folder / "products.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "description", "price"])
        for row in range(len(platform.catalogue)):
            writer.writerow(
                [1000 + row, platform.catalogue.items[row]["attributes"], "made by hand, of good stuff", 9.9]
            )
    user, place = platform.sequences.expand()
    with open(folder / "orders.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "product", "ordered_at"])
        for u, p in zip(user.tolist(), place.tolist(), strict=True):
            when = f"2026-03-{1 + p % 28:02d} {p % 24:02d}:{p % 60:02d}:00"
            writer.writerow([f"c{u}", f"{1000 + platform.sequences.items[p]}.0", when])
        writer.writerows([["", "1000.0", "2026-03-01 10:00:00"], ["c1", "77.0", "2026-03-01 10:00:00"]])


def short(patch: pytest.MonkeyPatch) -> None:
    """Whatever a program asks for, it trains for one epoch, in batches that suit a few dozen users."""
    init = TransRecTrainingArguments.__init__

    def one_epoch(self: TransRecTrainingArguments, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "num_train_epochs": 1, "per_device_train_batch_size": 16, "use_cpu": True})

    patch.setattr(TransRecTrainingArguments, "__init__", one_epoch)


def transrec(*words: str) -> None:
    """Run a verb of the command in this process; whatever it refuses is a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["transrec", *words])
        with pytest.raises(SystemExit) as end:
            transrec_cli.main()
    assert not end.value.code, f"transrec {' '.join(words)}"


def run_shell(code: str) -> None:
    """Run what the shell would: `transrec` and programs of `examples/`, in this process."""
    lines = subprocess.run(["bash", "-c", RECORD + code], capture_output=True, text=True, check=False)
    assert lines.returncode == 0, f"{lines.stderr}\n{code}"
    for line in lines.stdout.splitlines():
        program, *words = line.split("\x1f")[:-1]
        if program == "transrec":
            transrec(*words)
        else:
            load_example(Path(words[0]).stem).main(*words[1:])


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_are_programs(page: str) -> None:
    """Also those that are not run, or by the slow tests alone: lines that an editor has joined are none."""
    for block in BLOCK.finditer(TEXTS[page]):
        if block["language"] == "python":
            ast.parse(block["code"], page)
            comments = re.findall(r"#.*", block["code"])
            assert not [comment for comment in comments if re.search(r"\w\.?\w+\(.*\)  # ", comment)]
        elif block["language"] == "bash":
            assert not subprocess.run(["bash", "-n", "-c", block["code"]], capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in QUICK else pytest.mark.slow) for page in WITH_CODE]
)
def test_the_blocks_of_a_page_run_in_their_order(
    page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LocalHub
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    short(monkeypatch)
    monkeypatch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
    monkeypatch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=40))
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, code in blocks(page):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        if language == "python":
            exec(compile(code, page, "exec"), names)
        else:
            run_shell(code)
