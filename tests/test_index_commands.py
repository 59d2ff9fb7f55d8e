"""`transrec encode`, `index`, `similar`, and `recommend` from an index: what they write, print and refuse."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from testing_utils import make_model, make_processor

from transrec_cli import VERBS
from transrec_hf import DataError, Recommender
from transrec_hf.commands import recommend as recommend_module


ITEMS = "item_id,text,price\n" + "".join(
    f"00{row},{text},{row}\n"
    for row, text in enumerate(("red hat", "old sock", "blue shoe", "new red hat", "green sock", "old shoe"))
)
NEW = "item_id,text,price\n001,old old sock,50\n009,new shoe,9\n"


def run(verb: str, *arguments: Any) -> Any:
    room = importlib.import_module(f"transrec_hf.commands.{VERBS[verb][0]}")
    return getattr(room, verb)(
        [str(argument) for argument in (*arguments, *(("--use_cpu",) if verb != "index" else ()))]
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index-commands")
    make_model(modalities=("text",)).save_pretrained(folder / "model")
    make_processor(("text",)).save_pretrained(folder / "model")
    (folder / "items.csv").write_text(ITEMS)
    (folder / "new.csv").write_text(NEW)
    return folder


@pytest.fixture
def index(place: Path, tmp_path: Path) -> Path:
    assert run("encode", place / "model", "--items", place / "items.csv", "--index", tmp_path / "index") == 6
    return tmp_path / "index"


def test_items_are_encoded_once_and_changed_in_place(
    place: Path, index: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Recommender.from_pretrained(place / "model", index=index)
    assert run("index", "add", index, "--checkpoint", place / "model", "--items", place / "new.csv") == 2
    assert len(served) == 7 and served.recommend(["009"], 9, filter="price > 40")[0].item_id == "001"
    assert run("index", "remove", index, "--ids", "002", "003", "--readable") == 2
    assert run("index", "remove", index, "--items", place / "new.csv") == 2
    capsys.readouterr()
    assert run("index", "info", index, "--verify", "--json") == 5
    facts = json.loads(capsys.readouterr().out)
    assert facts["items"] == 5 and facts["recommendable"] == 3 and facts["verified"]
    assert facts["columns"] == ["text", "price"] and facts["changes since it was written"] == 3
    assert run("index", "info", index) == 5 and "recommendable" in capsys.readouterr().out
    monkeypatch.setattr("transrec_hf.serving.building.encode_catalogue", None)
    assert run("recommend", place / "model", "--index", index, "--history", "000", "002") == 1
    assert "004" in capsys.readouterr().out


def test_similar_to_an_item_and_to_a_text(place: Path, index: Path, capsys: pytest.CaptureFixture) -> None:
    found = run("similar", place / "model", "--index", index, "--text", "red hat", "--top_k", "2")
    assert found[0].item_id == "000" and found[0].score == pytest.approx(1, abs=1e-4)
    assert "red hat" in capsys.readouterr().out
    run("similar", place / "model", "--index", index, "--text", "red hat", "--top_k", "2", "--json")
    assert [row["item_id"] for row in json.loads(capsys.readouterr().out)] == [item.item_id for item in found]
    cheap = run("similar", place / "model", "--items", place / "items.csv", "--item", "000", "--filter", "price < 3")
    assert {item.item_id for item in cheap} == {"001", "002"}


def test_recommending_goes_on_after_an_interruption(
    place: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"user-{row},00{row % 6}\n" for row in range(25))
    (tmp_path / "histories.csv").write_text("user_id,item_id\n" + rows)
    ask = ("recommend", place / "model", "--index", index, "--histories", tmp_path / "histories.csv", "--top_k", 3)
    assert run(*ask, "--output_file", tmp_path / "whole.parquet") == 25
    monkeypatch.setattr(recommend_module, "PART", 10)
    calls: list[int] = []
    recommend = Recommender.recommend

    def counted(self: Recommender, histories: Any, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(histories))
        return recommend(self, histories, *args, **kwargs)

    monkeypatch.setattr(Recommender, "recommend", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*ask, "--output_file", tmp_path / "parts.parquet")
    assert calls == [10, 10] and not (tmp_path / "parts.parquet").exists()
    calls[:] = [0]
    assert run(*ask, "--output_file", tmp_path / "parts.parquet") == 25
    assert calls == [0, 5], "what was there was done again"
    whole, parts = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert parts.select(["user_id", "item_id", "rank"]).equals(whole.select(["user_id", "item_id", "rank"]))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no action": (("index",), "give one of add, remove, info"),
    "another action": (("index", "drop", "{index}"), "the verbs of index are add, remove, info"),
    "no index": (("index", "info", "{place}/nothing"), "there is no item index here"),
    "nothing to add": (("index", "add", "{index}", "--checkpoint", "{place}/model"), "give --items"),
    "no model": (("index", "add", "{index}", "--items", "{place}/new.csv"), "no model"),
    "new ones only": (
        ("index", "add", "{index}", "--checkpoint", "{place}/model", "--items", "{place}/new.csv", "--new_only"),
        "1 items exist already",
    ),
    "nothing to remove": (("index", "remove", "{index}"), "give --ids"),
    "an unknown id": (("index", "remove", "{index}", "--ids", "zz"), "unknown item ids: .'zz'"),
    "no place": (("encode", "{place}/model", "--items", "{place}/items.csv"), "give --index"),
    "like nothing": (("similar", "{place}/model", "--index", "{index}"), "one thing to compare with"),
    "like two things": (
        ("similar", "{place}/model", "--index", "{index}", "--item", "000", "--text", "a"),
        "one thing to compare with",
    ),
    "no image": (("similar", "{place}/model", "--index", "{index}", "--image", "no.png"), "no such file"),
    "a filter of no column": (
        ("recommend", "{place}/model", "--index", "{index}", "--history", "000", "--filter", "colour == 1"),
        "the unknown column 'colour'",
    ),
    "no items": (("recommend", "{place}/model", "--history", "000"), "no items: give --data"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(place: Path, index: Path, what: str) -> None:
    arguments, said = REFUSED[what]
    before = sorted(path.stat().st_mtime_ns for path in index.iterdir())
    with pytest.raises(DataError, match=said):
        run(*(str(part).format(place=place, index=index) for part in arguments))
    assert sorted(path.stat().st_mtime_ns for path in index.iterdir()) == before
