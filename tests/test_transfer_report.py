"""`transrec transfer-report`: every cell once, a verdict for each, and nothing computed twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from testing_utils import QUICK, assert_same_weights

from transrec_hf import Catalogue, DataError
from transrec_hf.commands.runs import finetune, pretrain
from transrec_hf.commands.transfer import check_no_source, compare, transfer_report, verdict
from transrec_hf.evaluation.metrics import paired_bootstrap
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.publishing.checkpoint import load_checkpoint, save_checkpoint
from transrec_hf.training.transfer_cells import MODELS, Cell, Target, cells_of


SETTINGS = Path(__file__).parent.parent / "examples" / "transfer"
REPORT = ("--epochs", "1", "--batch_size", "16", "--use_cpu", "--fractions", "0.2", "--seeds", "0")

pytestmark = pytest.mark.usefixtures("workplace")


def test_a_report_of_the_demo_world(capsys, monkeypatch):
    options = ["--sources", "source", "--targets", "demo:target", "--output_dir", "report", *REPORT]
    report = transfer_report(options)
    rows = {(row["model"], row["fraction"]): row for row in report["rows"]}
    without_users = {"content_neighbours", "untrained", "zero_shot"}
    assert set(rows) == {(m, None) if m in without_users else (m, 0.2) for m in MODELS}
    assert {row["train_users"] for row in report["rows"]} == {None, 6}
    compared = {"zero_shot", "zero_shot_popularity", "fine_tuned", "scratch_hybrid", "hybrid"}
    assert {row["model"] for row in report["rows"] if "verdict" in row} == compared
    table = capsys.readouterr().out
    assert "from scratch" in table and "compared with" in table and "20% (6)" in table
    assert "eval_" not in table  # what a cell logs would hide how far the report is
    folder = Path("report")
    with open(folder / "report.csv") as file:
        assert len(list(csv.DictReader(file))) == len(report["rows"])
    written = json.loads((folder / "report.json").read_text())
    assert written["rows"] == json.loads(json.dumps(report["rows"]))
    (scratch,) = (cell for cell in written["cells"] if cell["model"] == "from_scratch")
    assert list(scratch["learning_curve"]) == ["0", "1.0"]
    assert scratch["validation"] == max(scratch["learning_curve"].values())
    assert (folder / "demo_target.png").read_bytes().startswith(b"\x89PNG")
    cells = list((folder / "cells").iterdir())
    assert len(cells) == len(rows) and {cell.suffix for cell in cells} == {".safetensors"}

    # once more: only what is missing
    ran = []
    run = Target.run

    def counted(self, cell, source):
        ran.append(cell)
        return run(self, cell, source)

    monkeypatch.setattr(Target, "run", counted)
    lost = next(cell for cell in cells if "popularity+" in cell.name and "0.2" in cell.name)
    lost.unlink()
    again = transfer_report(options)
    assert len(ran) == 1 and again["rows"] == report["rows"]
    with pytest.raises(DataError, match="its results were made with epochs 1"):
        transfer_report([*options, "--epochs", "2"])


def test_a_hybrid_is_a_source_without_its_item_vectors(workplace):
    pretrain(["demo:source", "--hybrid", "--output_dir", "hybrid_source", *QUICK])
    assert load_checkpoint("hybrid_source")[0].config.num_items is not None
    options = [
        "--targets",
        "demo:target",
        "--output_dir",
        "of_hybrid",
        *REPORT,
        "--models",
        "from_scratch",
        "fine_tuned",
    ]
    rows = transfer_report(["--sources", "hybrid_source", *options])["rows"]
    assert [row["model"] for row in rows] == ["from_scratch", "fine_tuned"]


@pytest.fixture
def spoiled(workplace) -> str:
    """The source, whose text tower has lost what it knew."""
    model, processor = load_checkpoint("source")
    tower = model.item_encoder.text_model
    tower.save_pretrained("tower")
    tower.config._name_or_path = "tower"
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn_like(parameter))
    save_checkpoint("spoiled", model, processor)
    return "spoiled"


def test_scratch_has_the_towers_from_before_the_source(spoiled):
    models = ["--models", "content_neighbours", "untrained", "untrained_popularity", "from_scratch", "fine_tuned"]
    options = ["--targets", "demo:target", *REPORT, *models]
    rows = {}
    for source in ("source", spoiled):
        report = transfer_report(["--sources", source, "--output_dir", f"of_{source}", *options])
        rows[source] = {row["model"]: row["ndcg@10"] for row in report["rows"]}
    for model in models[1:-1]:
        assert rows[spoiled][model] == pytest.approx(rows["source"][model]), model
    (cell,) = (cell for cell in report["cells"] if cell["model"] == "fine_tuned")
    assert cell["starts"]["scratch"] != cell["starts"]["none"]


def test_towers_from_before_that_are_gone_are_told(spoiled, tmp_path):
    Path("tower").rename("moved")
    with pytest.raises(DataError, match="the text tower comes from tower, which cannot be read"):
        finetune(
            [spoiled, "--data", "demo:target", "--output_dir", str(tmp_path / "gone"), "--init", "scratch", *QUICK]
        )
    assert not (tmp_path / "gone").exists()
    Path("moved").rename("tower")


def test_a_run_leaves_towers_that_do_harm(spoiled):
    """And takes the same start when it is resumed."""
    options = [spoiled, "--data", "demo:target", "--output_dir", "mended", "--init", "scratch", *QUICK]
    report = finetune(options)
    assert report["start"]["init"] == "scratch"
    towers = [load_checkpoint(name)[0].item_encoder.text_model for name in ("source", "mended")]
    assert_same_weights(*towers)
    again = finetune([*options, "--resume"])
    assert again["start"] == report["start"] and again["metrics"] == report["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", "demo:target", "--fractions", "1.5"), "fractions must be above 0 and at most 1, got 1.5"),
        (("--targets", "demo:target", "--fractions", "some"), "fractions: 'some' is not a number"),
        (("--targets", "demo:target", "--models", "best"), "models: there is no model 'best'; choose from popularity"),
        ((), "no targets: give --targets"),
        (("--targets", "demo:source"), "demo:source: the source source was trained on this data set"),
        (("--targets", "nowhere"), "nowhere"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message, tmp_path):
    with pytest.raises(DataError, match=message):
        transfer_report(["--sources", "source", "--output_dir", str(tmp_path / "bad"), *options])
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("name", ["mixed_to_mixed", "mixed_to_text", "mixed_to_image", "other_platform"])
def test_the_four_settings_run(name):
    quick = ("--fractions", "1", "--models", "untrained", "zero_shot", "content_neighbours", "--use_cpu")
    report = transfer_report([f"{SETTINGS / name}.yaml", "--sources", "source", "--output_dir", name, *quick])
    assert [row["verdict"] for row in report["rows"] if row["model"] == "zero_shot"]
    assert all(0 <= row["ndcg@10"] <= 1 for row in report["rows"])


def test_the_source_of_the_settings_is_understood(monkeypatch):
    captured = []
    monkeypatch.setattr("transrec_hf.commands.runs.run_training", lambda *options: captured.append(options))
    pretrain([str(SETTINGS / "source.yaml")])
    assert captured[0][0].item_map == "whitened" and captured[0][0].content_prior is True


def test_a_damaged_cell_is_named():
    options = ["--sources", "source", "--targets", "demo:target", "--output_dir", "damaged", *REPORT]
    options += ["--models", "popularity"]
    transfer_report(options)
    cell = next(Path("damaged/cells").iterdir())
    cell.write_bytes(b"no ranks")
    with pytest.raises(DataError, match=r"cannot be used .* Delete it"):
        transfer_report(options)


def test_shops_that_number_their_items_alike_are_two(tmp_path):
    items = {"item_id": [str(number) for number in range(40)], "text": [f"thing {number}" for number in range(40)]}
    catalogue = Catalogue(Dataset.from_dict(items), "shop")
    counts = np.arange(40)
    ItemStatistics(catalogue.item_ids, counts).save(tmp_path)
    with pytest.raises(DataError, match="was trained on this data set"):
        check_no_source(str(tmp_path), "shop", catalogue, counts + 2)
    check_no_source(str(tmp_path), "shop", catalogue, np.random.default_rng(0).permutation(counts))


def test_cells_do_not_repeat_what_does_not_depend_on_the_source():
    cells = cells_of(["t"], ["a", "b"], MODELS, [0.1, 1.0], [0, 1])
    assert len(set(cells)) == len(cells)
    count = {model: sum(cell.model == model for cell in cells) for model in MODELS}
    assert count["popularity"] == count["id_baseline"] == 4
    assert count["zero_shot"] == count["content_neighbours"] == 2 and count["untrained"] == 4
    assert count["fine_tuned"] == 8


def test_verdicts_follow_the_interval():
    assert (verdict(0.1, 0.2), verdict(-0.1, 0.2), verdict(-0.2, -0.1)) == ("helps", "no difference", "negative")
    good, bad = torch.full((500,), 2.0), torch.full((500,), 9.0)
    results = {
        Cell.of("t", model, "s", 1.0, seed): (good if model == "fine_tuned" else bad, {"train_users": 5})
        for model in ("from_scratch", "fine_tuned")
        for seed in (0, 1)
    }
    rows = compare(results, ["t"], ["s"], ["from_scratch", "fine_tuned"], [1.0], [0, 1])
    assert rows[1]["verdict"] == "helps" and rows[1]["compared_with"] == "from_scratch" and rows[1]["seeds"] == 2


def test_seeds_widen_the_interval_of_a_difference():
    """Two seeds that disagree leave it open which model is better, however many users there are."""
    other = torch.full((2, 4000), 5.0)
    ranks = torch.stack([torch.full((4000,), 2.0), torch.full((4000,), 9.0)])
    found = paired_bootstrap(ranks, other)
    assert found["low"] < 0 < found["high"]
    alike = paired_bootstrap(ranks[[0, 0]], other)
    assert 0 < alike["low"] <= alike["difference"] <= alike["high"]
