"""
Items that change while they are served: in the folder of an index a change is there whole or not at all, whatever
operation the process dies at; several processes see each other's changes, and never write at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_writers import in_child, interrupted
from testing_utils import make_catalogue, make_model, make_processor

from transrec_hf import DataError, ItemIndex, ItemSource, Recommender
from transrec_hf.files import locked
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.serving import building
from transrec_hf.serving import live as module
from transrec_hf.serving.journal import JOURNAL_NAME, append_record, read_journal
from transrec_hf.serving.live import INDEX_LOCK, LiveItems
from transrec_hf.serving.snapshot import Change


SIZE = 4


def make_index(ids: list[str], value: float = 0.0, price: int = 1) -> ItemIndex:
    """Vectors that tell the number in an id, and `value`."""
    rows = [[float(item_id.split("-")[1]), value, 1.0, 2.0] for item_id in ids]
    columns = pa.table({"text": ids, "price": [price] * len(ids)})
    present = torch.ones(len(ids), 3, dtype=torch.bool)
    hashes = np.full((len(ids), 16), int(value), dtype=np.uint8)
    parts = (np.array(ids, dtype=object), torch.tensor(rows), present, "", "model")
    return ItemIndex(*parts, item_hashes=hashes, columns=columns, counts=torch.zeros(len(ids), dtype=torch.long))


def make_ids(n: int, start: int = 0) -> list[str]:
    return [f"item-{row}" for row in range(start, start + n)]


def start(folder: Path, n: int = 6) -> LiveItems:
    folder.mkdir(exist_ok=True)
    make_index(make_ids(n)).save(folder)
    return LiveItems.open(folder, SIZE)


def state(folder: Path) -> dict[str, tuple]:
    """What a fresh reader sees, by id."""
    snapshot = LiveItems.open(folder, SIZE).snapshot
    rows = snapshot.known_rows
    seen = zip(
        snapshot.ids(rows),
        snapshot.vectors(rows).tolist(),
        snapshot.offered[torch.from_numpy(rows)].tolist(),
        snapshot.take_columns(rows).to_pylist(),
        strict=True,
    )
    return {item_id: (vector, offered, columns["price"]) for item_id, vector, offered, columns in seen}


def add(ids: list[str], value: float = 1.0, price: int = 2) -> Change:
    return Change(make_index(ids, value, price))


def always(change: Change) -> Callable[[Any], Change]:
    return lambda snapshot: change


CHANGES = {
    "add": add(["item-90", "item-91"]),
    "update": add(["item-0", "item-90"], 5.0),
    "remove": Change(removed=["item-1", "item-2"]),
    "hide": Change(hidden=["item-3"]),
    "all": Change(make_index(["item-90", "item-0"], 3.0), ["item-1"], ["item-2"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_here_and_elsewhere(tmp_path: Path, what: str) -> None:
    live = start(tmp_path / "index")
    other = LiveItems.open(tmp_path / "index", SIZE)
    before = other.snapshot
    live.change(lambda snapshot: CHANGES[what])
    assert other.snapshot is before and other.refresh() and not other.refresh()
    assert other.snapshot.version == live.snapshot.version != before.version
    change = CHANGES[what]
    seen = state(tmp_path / "index")
    for item_id in change.removed:
        assert item_id not in seen
    for item_id in change.hidden:
        assert seen[item_id][1] is False
    for item_id in [] if change.added is None else change.added.item_ids.tolist():
        assert seen[item_id][0] == change.added.item_embeds[change.added.item_ids.tolist().index(item_id)].tolist()
        assert seen[item_id][1] and seen[item_id][2] in (1, 2)
    live.compact()
    assert state(tmp_path / "index") == seen
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"item_index.safetensors"}
    assert other.refresh() and other.snapshot.num_items == len(seen)


@pytest.mark.parametrize("what", [*CHANGES, "compact", "open"])
@pytest.mark.parametrize("full_disk", [False, True], ids=["killed", "full disk"])
def test_killed_at_each_operation(tmp_path: Path, what: str, full_disk: bool) -> None:
    folder = tmp_path / "index"
    live = start(folder)
    live.change(lambda snapshot: add(["item-50"]))
    expected = [state(folder)]
    if what in CHANGES:
        live.change(lambda snapshot: CHANGES[what])
        expected.append(state(folder))

    def prepare() -> None:
        start(folder).change(lambda snapshot: add(["item-50"]))

    def write() -> None:
        if what == "open":
            make_index(make_ids(3)).save(folder)
            return
        mine = LiveItems.open(folder, SIZE)
        if what == "compact":
            mine.compact()
        else:
            mine.change(lambda snapshot: CHANGES[what])

    if what == "open":
        prepare()
        make_index(make_ids(3)).save(folder)
        expected.append(state(folder))
    seen = []
    for _ in interrupted(folder, prepare, write, full_disk=full_disk):
        seen.append(state(folder))
        assert seen[-1] in expected
        again = LiveItems.open(folder, SIZE)  # and the folder can be written to
        again.change(lambda snapshot: add(["item-70"]))
        assert "item-70" in state(folder) and state(folder).keys() - {"item-70"} == seen[-1].keys()
    if len(expected) > 1 and not full_disk:
        assert expected[0] in seen


def test_a_torn_record_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    live = start(folder)
    live.change(lambda snapshot: add(["item-50"]))
    first = (folder / JOURNAL_NAME).stat().st_size
    one = state(folder)
    live.change(lambda snapshot: add(["item-51"]))
    whole = (folder / JOURNAL_NAME).read_bytes()
    for cut in {*range(first, len(whole), 97), len(whole) - 1, first + 1, first + 20}:
        (folder / JOURNAL_NAME).write_bytes(whole[:cut])
        assert state(folder) == one
    (folder / JOURNAL_NAME).write_bytes(whole[: first - 1])
    assert set(state(folder)) == set(make_ids(6))
    (folder / JOURNAL_NAME).write_bytes(b"nonsense")
    assert set(state(folder)) == set(make_ids(6))
    broken = bytearray(whole)
    broken[first - 5] ^= 1
    (folder / JOURNAL_NAME).write_bytes(broken)
    with pytest.raises(DataError, match="a change is damaged"):
        state(folder)
    for place in (3, 25):  # of what it is, and of the hash of the index that it belongs to
        broken = bytearray(whole)
        broken[place] ^= 128
        (folder / JOURNAL_NAME).write_bytes(broken)
        with pytest.raises(DataError, match="its head is damaged"):
            state(folder)


def test_a_journal_of_another_index_is_not_read(tmp_path: Path) -> None:
    live = start(tmp_path / "index")
    live.change(lambda snapshot: add(["item-50"]))
    journal = (tmp_path / "index" / JOURNAL_NAME).read_bytes()
    other = tmp_path / "other"
    start(other, 3)
    (other / JOURNAL_NAME).write_bytes(journal)
    assert set(state(other)) == set(make_ids(3))
    LiveItems.open(other, SIZE).change(lambda snapshot: add(["item-9"]))
    assert set(state(other)) == {*make_ids(3), "item-9"}


def test_two_writers_are_not_at_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.1)
    live = start(tmp_path / "index")

    def write() -> None:
        with pytest.raises(OSError, match="another process is changing this index"):
            LiveItems.open(tmp_path / "index", SIZE).change(lambda snapshot: add(["item-50"]))

    with locked(tmp_path / "index", INDEX_LOCK):
        assert in_child(write) == 0
    live.change(lambda snapshot: add(["item-51"]))
    assert "item-51" in state(tmp_path / "index") and "item-50" not in state(tmp_path / "index")


def test_several_processes_lose_no_change(tmp_path: Path) -> None:
    start(tmp_path / "index")
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                mine = LiveItems.open(tmp_path / "index", SIZE)
                for step in range(5):
                    new = add([f"item-{100 + 10 * number + step}"])
                    mine.change(always(new))
                    if step == 2:
                        mine.compact()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    expected = {f"item-{100 + 10 * number + step}" for number in range(3) for step in range(5)}
    assert set(state(tmp_path / "index")) == {*make_ids(6), *expected}


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_journal_that_has_grown_is_written_into_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folder: bool
) -> None:
    monkeypatch.setattr(module, "MIN_COMPACTED", 10)
    live = start(tmp_path / "index") if in_folder else LiveItems(make_index(make_ids(6)), SIZE)
    versions, rng, expected = {live.snapshot.version}, np.random.default_rng(0), dict.fromkeys(range(6), 0.0)
    for step in range(40):
        number = int(rng.integers(30))
        if number in expected and step % 3 == 0 and len(expected) > 1:
            del expected[number]
            change = Change(removed=[f"item-{number}"])
        else:
            expected[number] = float(step)
            change = add([f"item-{number}"], float(step))
        live.change(always(change))
        versions.add(live.snapshot.version)
        rows = live.snapshot.known_rows
        seen = dict(zip(live.snapshot.ids(rows), live.snapshot.vectors(rows)[:, 1].tolist(), strict=True))
        assert seen == {f"item-{number}": value for number, value in expected.items()}
        assert len(live.snapshot) < 40
    assert len(versions) == 41, "each state has a version of its own"
    if in_folder:
        assert {item_id: vector[1] for item_id, (vector, *_) in state(tmp_path / "index").items()} == seen


def test_an_index_says_whether_it_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = start(tmp_path)
    live.base.verify()
    path = tmp_path / "item_index.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + length])["item_embeds"]["data_offsets"][0] + 8 + length
    content[begin + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="have changed since"):
        LiveItems.open(tmp_path, SIZE)
    monkeypatch.setattr("transrec_hf.serving.index.MAX_CHECKED", 0)  # as of an index of a gigabyte
    with pytest.raises(DataError, match="have changed since"):
        LiveItems.open(tmp_path, SIZE).base.verify()
    for broken in (b"", content[:100], content[:-1], b"no safetensors" * 100):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be used"):
            LiveItems.open(tmp_path, SIZE)


def test_vectors_are_mapped_and_not_read(tmp_path: Path) -> None:
    start(tmp_path)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        before = maps.read().count("item_index.safetensors")
    live = LiveItems.open(tmp_path, SIZE)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert maps.read().count("item_index.safetensors") > before
    assert live.snapshot.num_items == 6


def test_appending_needs_no_whole_record_before(tmp_path: Path) -> None:
    end = append_record(tmp_path, "ab12", 0, b"one")
    with open(tmp_path / JOURNAL_NAME, "ab") as file:
        file.write(b"half of")
    assert append_record(tmp_path, "ab12", end, b"two") > end
    assert read_journal(tmp_path, "ab12")[0] == [b"one", b"two"]
    assert read_journal(tmp_path, "ab12", end)[0] == [b"two"]
    assert read_journal(tmp_path, "cd34") == ([], 0)


def test_a_recommender_keeps_its_changes(tmp_path: Path) -> None:
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    first = Recommender.from_pretrained(tmp_path / "model", make_catalogue(), index=tmp_path / "index")
    first.add_items([{"item_id": "new", "text": "red hat"}])
    second = Recommender.from_pretrained(tmp_path / "model", index=tmp_path / "index")
    assert second.recommend(["new", "item-1"], 20) == first.recommend(["new", "item-1"], 20)
    second.remove_items(["item-2"], readable=True)
    assert first.recommend(["new", "item-1"], 20) == second.recommend(["new", "item-1"], 20)
    assert "item-2" not in [item.item_id for item in first.recommend(["item-1"], 20)]
    other = Recommender(make_model(seed=1), ItemSource(make_catalogue(), processor)).model
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="no item index of this model"):
        Recommender.from_pretrained(tmp_path / "other", index=tmp_path / "index")


def test_a_deleted_index_is_served_on_and_not_changed(tmp_path: Path) -> None:
    """Nothing is written beside an index that is gone; when one is there again, it is read."""
    served = Recommender(make_model(), ItemSource(make_catalogue(), make_processor()), folder=tmp_path)
    before = served.recommend(["item-1"], 3)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    assert served.recommend(["item-1"], 3) == before
    with pytest.raises(FileNotFoundError, match=r"the item index .* was deleted"):
        served.remove_items(["item-2"])
    assert not (tmp_path / JOURNAL_NAME).exists()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    served.remove_items([before[0].item_id])
    assert before[0].item_id not in [item.item_id for item in served.recommend(["item-1"], 10)]


def test_an_interrupted_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BLOCK", 3)
    monkeypatch.setattr(building, "RESUMED", 6)
    encoded: list[int] = []
    encode = building.encode_catalogue

    def counted(model: Any, source: Any, **kwargs: Any) -> torch.Tensor:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(source))
        return encode(model, source, **kwargs)

    monkeypatch.setattr(building, "encode_catalogue", counted)
    arguments = (make_model(), ItemSource(make_catalogue(), make_processor()))
    with pytest.raises(KeyboardInterrupt):
        Recommender(*arguments, folder=tmp_path / "index")
    encoded.append(0)
    monkeypatch.setattr(building, "encode_catalogue", counted)
    found = Recommender(*arguments, folder=tmp_path / "index")
    assert encoded == [3, 3, 0, 3, 3], "two of four blocks were left to do"
    monkeypatch.setattr(building, "RESUMED", 10**6)
    torch.testing.assert_close(found.item_embeds, Recommender(*arguments).item_embeds, atol=1e-5, rtol=1e-5)
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"item_index.safetensors"}


@pytest.mark.parametrize("options", [{}, {"similarity": "cosine", "popularity_prior": True, "item_map": "whitened"}])
def test_towers_are_loaded_when_they_are_needed(tmp_path: Path, options: dict[str, Any]) -> None:
    first = Recommender(make_model(**options), ItemSource(make_catalogue(), make_processor()))
    first.save_pretrained(tmp_path, columns=True)
    served = Recommender.from_pretrained(tmp_path)
    tower = served.model.item_encoder.text_model
    assert all(value.device.type == "meta" for value in tower.parameters())
    history = ["item-3", "item-1"]
    assert served.recommend(history, 5) == first.recommend(history, 5)
    assert served.versions == Recommender.from_pretrained(tmp_path, make_catalogue()).versions
    raw = [{"text": "red hat"}, "item-1"]
    found, expected = (of.recommend(raw, 5) for of in (served, first))
    assert [item.item_id for item in found] == [item.item_id for item in expected]
    assert found[0].score == pytest.approx(expected[0].score, abs=1e-4)
    assert all(value.device.type == "cpu" for value in served.model.parameters())
    again = Recommender.from_pretrained(tmp_path)
    again.add_items([{"item_id": "new", "text": "old shoe"}])
    first.add_items([{"item_id": "new", "text": "old shoe"}])
    assert [item.item_id for item in again.recommend(["new"], 5)] == [
        item.item_id for item in first.recommend(["new"], 5)
    ]
    again.save_pretrained(tmp_path / "copy")
    assert Recommender.from_pretrained(tmp_path / "copy").recommend(["new"], 5)[0].score == pytest.approx(
        again.recommend(["new"], 5)[0].score
    )


def test_an_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LiveItems(make_index(make_ids(5)), SIZE, tmp_path).remove(["item-2"])
    reads = [ItemIndex.from_pretrained(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(ItemIndex, "from_pretrained", lambda folder: reads.pop())
        live = LiveItems.open(tmp_path, SIZE)
    assert live.snapshot.num_items == 4
    LiveItems(make_index(make_ids(7)), SIZE, tmp_path)  # another index in its place
    live.refresh()
    assert live.snapshot.num_items == 7


@pytest.mark.parametrize("trained", [False, True])
def test_an_index_of_a_whitened_model_is_encoded_once(
    trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that no catalogue was whitened for yet: it takes the axes that the index has."""
    model = make_model(item_map="whitened")
    if trained:
        standardize_projections(model, ItemSource(make_catalogue(9), make_processor()))
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    folder = tmp_path / "index"
    first = Recommender.from_pretrained(tmp_path / "model", make_catalogue(), index=folder)
    first.save_pretrained(tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(building, "encode_catalogue", None)
        again = [
            Recommender.from_pretrained(tmp_path / "model", make_catalogue(), index=folder),
            Recommender.from_pretrained(tmp_path / "model", index=folder),
            Recommender.from_pretrained(tmp_path / "copy"),
            Recommender(model, index=first.index, processor=make_processor()),
        ]
    for served in again:
        assert torch.equal(served.item_embeds, first.item_embeds) and served.versions.model == first.versions.model
        raw, expected = (of.recommend([{"text": "red hat"}], 5) for of in (served, first))
        assert [item.item_id for item in raw] == [item.item_id for item in expected]
    other = make_model(item_map="whitened")
    standardize_projections(other, ItemSource(make_catalogue(5), make_processor()))
    other.item_encoder.text_projection.get_buffer("axes").add_(1)
    with pytest.raises(DataError, match="no item index of this model"):
        Recommender(other, index=first.index, processor=make_processor())


def test_a_large_index_keeps_its_smaller_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transrec_hf.serving import search, snapshot

    monkeypatch.setattr(snapshot, "MIN_SCANNED", 10)
    monkeypatch.setattr(search, "SMALL", 10)
    items = make_index(make_ids(200))
    items.item_embeds = torch.nn.functional.normalize(
        torch.randn(200, SIZE, generator=torch.Generator().manual_seed(0))
    )
    live = LiveItems(items, SIZE, tmp_path)
    if not search.scans_in_int8():
        pytest.skip("this processor does not multiply 8 bits")
    for _ in range(2):
        live.refresh()
        opened = LiveItems.open(tmp_path, SIZE)
        assert opened.base.scan is not None
        with monkeypatch.context() as patch:  # nothing of it is computed again
            patch.setattr(torch.Tensor, "norm", None)
            again = LiveItems.open(tmp_path, SIZE)
        assert again.snapshot.segments[0].matrix.whole == opened.snapshot.segments[0].matrix.whole
        query = opened.snapshot.vectors(np.array([7]))
        assert torch.equal(again.snapshot.search(query, 9)[1], live.snapshot.search(query, 9)[1])
        live.change(always(Change(make_index(["item-999"]), ["item-3"])))  # as many as before, and others
        live.compact()


@pytest.mark.parametrize("kept", [10, 1000], ids=["with its smaller copy", "without"])
def test_a_large_index_is_changed_without_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Nobody says how wide its vectors are without the popularity."""
    from transrec_hf.serving import search, snapshot

    monkeypatch.setattr(snapshot, "MIN_SCANNED", kept)
    monkeypatch.setattr(search, "SMALL", 10)
    monkeypatch.setattr(search, "scans_in_int8", lambda device="cpu": True)
    items = make_index(make_ids(200))
    items.item_embeds = torch.cat([items.item_embeds, torch.zeros(200, 1)], dim=1)  # with popularity
    LiveItems(items, SIZE, tmp_path)
    live = LiveItems.open(tmp_path)
    live.remove(["item-3"])
    live.compact()
    opened = LiveItems.open(tmp_path, SIZE)
    assert opened.snapshot.find(["item-3", "item-4"]).tolist() == [-1, 3]
    scan = opened.base.scan
    assert scan is None if kept > 200 else scan is not None and scan.values.shape == (199, SIZE)
