"""`transrec benchmark ninerec`: three models on every target in NineRec's layout, beside the published numbers."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

from transrec_hf import DataError
from transrec_hf.commands.benchmark import FOOTNOTES, PUBLISHED, benchmark, rows_of
from transrec_hf.commands.runs import pretrain
from transrec_hf.data import demo
from transrec_hf.training import transfer_cells
from transrec_hf.training.transfer_cells import Target


QUICK = ("--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu", "--disable_tqdm", "True")
CELLS = ("--sources", "source", "--epochs", "1", "--init_epochs", "0.2", "--batch_size", "16", "--use_cpu")


def write_target(folder: Path, name: str, seed: int) -> None:
    """A small platform of the demo world, titles only, in NineRec's layout."""
    platform = demo.demo_world(seed, ["text"]).target
    items, sequences = platform.catalogue, platform.sequences
    with open(folder / f"{name}_item.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            (item, "标题", items.text(row)) for row, item in enumerate(items.item_ids) if items.has_text[row]
        )
    with open(folder / f"{name}_pair.csv", "w", encoding="utf-8", newline="") as file:
        for place, user in enumerate(sequences.user_ids):
            view = sequences[place]
            for step, row in enumerate(view["items"]):
                csv.writer(file).writerow((items.item_ids[row], user, 1_600_000_000 + step))


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
        patch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=30))
        patch.setattr(transfer_cells, "ID_SEARCH", ({},))
        patch.setattr(transfer_cells.choose_start, "__defaults__", (("none", "all"), 0))
        patch.chdir(tmp_path_factory.mktemp("ninerec"))
        Path("data").mkdir()
        for seed, name in enumerate(("TN", "QB")):
            write_target(Path("data"), name, seed)
        pretrain(["--data", "demo:source", "--output_dir", "source", "--max_position_embeddings", "8", *QUICK])
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_targets_are_prepared_compared_and_not_computed_again(capsys, monkeypatch):
    report = benchmark(["ninerec", "--folder", "data", "--output_dir", "out", *CELLS])
    printed = capsys.readouterr().out
    assert FOOTNOTES in printed
    rows = report["table"]
    assert [row["target"] for row in rows] == ["QB", "TN"]
    assert all(0 <= row[name] <= 100 for row in rows for name in ("ID", "scratch", "pre-trained"))
    assert [rows[1][f"BERT base: {name}"] for name in ("ID", "scratch", "pre-trained")] == [*PUBLISHED["text"]["TN"]]
    with open("out/table.csv", encoding="utf-8") as file:
        assert [row["Swin base: ID"] for row in csv.DictReader(file)] == ["33.92", "15.74"]
    assert len(list(Path("out/cells").iterdir())) == 6
    protocols = {row["train_users"] for row in report["rows"]}
    assert protocols and max(protocols) <= 30

    ran, run = [], Target.run

    def counted(self, cell, source):
        ran.append(cell)
        return run(self, cell, source)

    monkeypatch.setattr(Target, "run", counted)
    next(cell for cell in Path("out/cells").iterdir() if "id_baseline" in cell.name).unlink()
    shutil.rmtree("out/data/TN")
    assert benchmark(["ninerec", "--folder", "data", "--output_dir", "out", *CELLS])["table"] == rows
    assert [cell.model for cell in ran] == ["id_baseline"]


def test_a_target_that_cannot_be_split_is_named_before_any_model_is_trained(tmp_path):
    write_target(tmp_path, "DY", 2)
    write_target(tmp_path, "KU", 3)
    log = tmp_path / "KU_pair.csv"
    log.write_text("".join(line for line in log.open() if int(line.split(",")[2]) % 100 < 3))
    with pytest.raises(DataError, match=r"KU: no user has 5 interactions \(the longest history has 3\)"):
        benchmark(["ninerec", "--folder", str(tmp_path), "--output_dir", str(tmp_path / "out"), *CELLS])
    assert not (tmp_path / "out" / "cells").exists()


def test_every_source_has_its_own_numbers_and_verdict():
    shared = {"target": "data/TN", "fraction": 1}
    rows = [{**shared, "model": "id_baseline", "source": None, "hit_rate@10": 0.1}]
    for source, value, verdict in (("films", 0.2, "helps"), ("games", 0.3, "negative")):
        rows.append({**shared, "model": "fine_tuned", "source": source, "hit_rate@10": value, "verdict": verdict})
    found = [(row["source"], row["ID"], row["pre-trained"], row["verdict"]) for row in rows_of("TN", rows)]
    assert found == [("films", 10, 20, "helps"), ("games", 10, 30, "negative")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--folder", "data"], "which benchmark"),
        (["ninerec"], "no folder: give --folder"),
        (["ninerec", "--folder", "data"], "no sources: give --sources"),
        (
            ["ninerec", "--folder", "data", "--targets", "KU", "--sources", "source"],
            "no target KU. Name some of QB, TN",
        ),
        (["ninerec", "--folder", "source", "--sources", "source"], "no target of NineRec's layout"),
        (["ninerec", "--folder", "lacking", "--sources", "source"], r"are missing: interactions .DY_pair.csv"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(options, said):
    Path("lacking").mkdir(exist_ok=True)
    Path("lacking/DY_item.csv").write_text("1,a,b\n")
    with pytest.raises(DataError, match=said):
        benchmark([*options, "--output_dir", "none"] if "ninerec" in options else options)
    assert not Path("none").exists()
