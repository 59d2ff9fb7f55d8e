"""
Whatever is written is the old state or the new one, never a mixture: the process is killed before each of its file
operations in turn, or told there that the disk is full; readers and other writers come at any time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from testing_utils import make_config, make_model, make_processor, make_trainer
from transformers import logging

from transrec_hf import DataError, ItemIndex, Recommender, TransRecModel, TransRecProcessor, TransRecTrainer, files
from transrec_hf.data.statistics import load_statistics, save_statistics
from transrec_hf.files import locked, read_whole, recover, whole_file, written_whole
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.publishing.card import model_card, update_model_card
from transrec_hf.publishing.checkpoint import checkpoints_of, load_checkpoint, remove_old_checkpoints, save_checkpoint
from transrec_hf.publishing.facts import load_evaluation, save_evaluation
from transrec_hf.publishing.hub import upload_checkpoint
from transrec_hf.publishing.results import append_results, read_results
from transrec_hf.training.resuming import last_complete_checkpoint


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
KILLED = 9


def _steps(folder: Path, stop: Callable[[], None], at: int) -> Callable[[], int]:
    """
    From now on in this process, call `stop` before the file operation number `at` below a folder. Tells how many
    there were.
    """
    count, fsync = 0, os.fsync

    def step() -> None:
        nonlocal count
        count += 1
        if count == at:
            stop()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            inside = os.path.abspath(os.fsdecode(arguments[0])).startswith(str(folder)) or event == "os.rmdir"
            if inside and not reads:
                step()

    def counted_fsync(fd: Any) -> None:
        step()
        fsync(fd)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    return lambda: count


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            work()
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(
    folder: Path, prepare: Callable[[], None], write: Callable[[], None], *, full_disk: bool = False, most: int = 40
) -> Iterator[int]:
    """
    Brings a folder into its old state and writes to it, once for each file operation that this takes, and stops it
    there; of more than `most` operations at some of the first ones and at all of the last. Yields after each of them.
    """

    def stopped_at(at: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        prepare()

        def work() -> None:
            count = _steps(folder, _no_space if full_disk else lambda: os._exit(KILLED), at)
            with contextlib.suppress(OSError) if full_disk else contextlib.nullcontext():
                write()
            (folder.parent / "operations").write_text(str(count()))

        assert in_child(work) in (0, KILLED)

    stopped_at(sys.maxsize)
    total = int((folder.parent / "operations").read_text())
    assert total > 3, "no operation was seen"
    first = max(0, total - most)
    for at in [*range(1, first + 1, max(1, first // 4)), *range(first + 1, total + 1)]:
        stopped_at(at)
        yield at


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def texts(folder: Path) -> dict[str, str]:
    """What is seen by a program that knows nothing of ours."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.name[0] != "."}


# Folders


OLD = {"config.json": "old", "model-00001-of-00002.safetensors": "old", "kept.txt": "kept"}
NEW = {"config.json": "new", "model.safetensors": "new", "processor_config.json": "new"}
BOTH = {**NEW, "kept.txt": "kept"}


def fill(folder: Path, contents: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "folder", OLD)
    return tmp_path / "folder"


def write_new(folder: Path) -> None:
    with written_whole(folder) as partial:
        fill(partial, NEW)


@pytest.mark.parametrize("full_disk", [False, True], ids=["killed", "full disk"])
def test_a_folder_is_old_or_new_at_every_operation(folder: Path, full_disk: bool) -> None:
    seen = {True}
    for _ in interrupted(folder, lambda: fill(folder, OLD), lambda: write_new(folder), full_disk=full_disk):
        assert "config.json" not in texts(folder) or texts(folder) in (OLD, BOTH)
        recover(folder)
        assert texts(folder) in (OLD, BOTH)
        seen.add(texts(folder) == BOTH)
        write_new(folder)  # and the next writer clears up what the killed one has left
        assert texts(folder) == BOTH and names(folder) == set(BOTH)
    assert seen == {False, True}


def test_a_killed_completion_is_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader that completes is killed as well, at each of its operations."""

    def killed_with_its_journal_written() -> None:
        fill(folder, OLD)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_move", lambda *_: os._exit(KILLED))
            assert in_child(lambda: write_new(folder)) == KILLED
        assert files.JOURNAL in names(folder) and texts(folder) == OLD

    for _ in interrupted(folder, killed_with_its_journal_written, lambda: recover(folder)):
        assert "config.json" not in texts(folder) or texts(folder) in (OLD, BOTH)
        recover(folder)
        assert texts(folder) == BOTH


def test_an_error_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    for place in (folder, tmp_path / "a" / "b"):
        with (
            pytest.raises(OSError, match=r"nothing was kept \(full\). Free disk space"),
            written_whole(place) as partial,
        ):
            (partial / "config.json").write_text("new")
            raise OSError("full")
    assert names(folder) == set(OLD) and not (tmp_path / "a").exists()


def test_permissions_are_those_of_the_umask(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        with written_whole(folder) as partial:
            (partial / "secret").touch(0o600)
            (partial / "open").touch()
    finally:
        os.umask(before)
    assert {(folder / name).stat().st_mode & 0o777 for name in ("secret", "open")} == {0o640}


def test_a_link_is_replaced_and_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (folder / "card").symlink_to(tmp_path / "target")
    with whole_file(folder / "card") as partial:
        partial.write_text("theirs")
    assert (tmp_path / "target").read_text() == "mine" and (folder / "card").read_text() == "theirs"


def test_what_other_weights_knew_of_their_items_goes_with_them(folder: Path) -> None:
    for name in ("item_statistics.parquet", "item_index.json", "notes.parquet"):
        (folder / name).write_text("old")
    with written_whole(folder) as partial:
        fill(partial, {**NEW, "item_index.safetensors": "new"})
    assert texts(folder) == {**BOTH, "item_index.safetensors": "new", "notes.parquet": "old"}


def test_replacing_all(folder: Path) -> None:
    (folder / "sub").mkdir()
    with written_whole(folder, replaces_all=True) as partial:
        fill(partial, NEW)
    assert texts(folder) == NEW


# Several processes


def test_two_writers_of_other_files_do_not_disturb_each_other(tmp_path: Path) -> None:
    with written_whole(tmp_path / "run") as one:
        (one / "one.json").write_text("1")
        with written_whole(tmp_path / "run") as two:
            (two / "two.json").write_text("2")
    assert texts(tmp_path / "run") == {"one.json": "1", "two.json": "2"}


def test_a_writer_is_refused_while_another_one_moves_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    with locked(folder), pytest.raises(OSError, match="another process is writing there"):
        write_new(folder)
    assert names(folder) == set(OLD)
    (folder / files.JOURNAL).write_text("{}")
    with locked(folder), pytest.raises(OSError, match="another process is writing there"):
        recover(folder)


def test_the_lock_of_a_process_ends_with_it_and_is_not_inherited(folder: Path) -> None:
    def die_with_the_lock() -> None:
        with locked(folder):
            os._exit(KILLED)

    assert in_child(die_with_the_lock) == KILLED
    with locked(folder, wait=0):
        orphan = os.fork()
        if orphan == 0:  # as a worker of a loader that outlives its parent for some seconds
            time.sleep(60)
            os._exit(0)
    try:
        with locked(folder, wait=0):
            pass
    finally:
        os.kill(orphan, 9)
        os.waitpid(orphan, 0)
    assert names(folder) == set(OLD)


def test_many_writers_leave_the_files_of_one(folder: Path) -> None:
    children = []
    for writer in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(OSError):
                for _ in range(5):
                    with written_whole(folder) as partial:
                        fill(partial, dict.fromkeys(("config.json", "model.safetensors", "a.json"), str(writer)))
                status = 0
            os._exit(status)
        children.append(child)
    torn = 0
    while children:
        found = read_whole(folder, lambda: texts(folder))
        torn += len({text for name, text in found.items() if not name.startswith(("kept", "model-"))}) > 1
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    assert torn == 0
    assert len(set(texts(folder).values()) - {"kept"}) == 1


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "[]",
        "[" * 9999,
        '{"from": ".partial-0", "inode": 0, "move": [], "remove": ["kept.txt"]}',
        '{"from": "..", "inode": INODE, "move": [], "remove": ["kept.txt"]}',
        '{"from": ".partial-1", "inode": INODE, "move": ["../target"], "remove": []}',
        '{"from": ".partial-1", "inode": INODE, "move": [], "remove": ["/etc/passwd"]}',
        '{"from": ".partial-1", "inode": 1, "move": [], "remove": ["kept.txt"]}',
    ],
)
def test_a_journal_of_somebody_else_is_not_obeyed(folder: Path, journal: str) -> None:
    (folder / ".partial-1").mkdir()
    inode = str((folder / ".partial-1").stat().st_ino)
    (folder / files.JOURNAL).write_text(journal.replace("INODE", inode))
    with pytest.raises(OSError, match="was copied while it was being written"):
        recover(folder)
    assert texts(folder) == OLD


# All writers


def baseline(seed: int, width: int = 16) -> TransRecModel:
    return make_model(make_config("", num_items=12, hidden_size=width), seed=seed)


def weights(folder: Path) -> float:
    """What tells one model of these tests from another, if a folder holds one whole."""
    model, _ = load_checkpoint(str(folder))
    return float(sum(value.double().sum() for value in model.state_dict().values()))


def index(model: TransRecModel) -> ItemIndex:
    ids = np.array([f"item-{row}" for row in range(12)])
    table = model.item_encoder.item_embedding.weight.detach()
    return Recommender(model, index=ItemIndex(ids, table, None, "", hash_of(model))).index


def hash_of(model: TransRecModel) -> str:
    from transrec_hf.serving.index import encoder_hash

    return encoder_hash(model, None)


def write_index(folder: Path, seed: int) -> None:
    found = index(baseline(seed))
    turned = {"item_ids": found.item_ids[::-1], "item_embeds": found.item_embeds.flip(0)} if seed == 2 else {}
    ItemIndex(**{**vars(found), **turned}).save(folder)


def read_index(folder: Path) -> tuple[str, float]:
    found = ItemIndex.from_pretrained(folder)
    return str(found.item_ids[0]), float(found.item_embeds[0].sum())


def write_recommender(folder: Path, seed: int) -> None:
    model = baseline(seed, width=16 if seed == 1 else 8)
    Recommender(model, index=index(model)).save_pretrained(folder, max_shard_size="1KB" if seed == 1 else "1GB")


def read_recommender(folder: Path) -> list[float]:
    return [item.score for item in Recommender.from_pretrained(folder).recommend(["item-1"], k=3)]


def make_report(value: float) -> dict[str, Any]:
    return {"metrics": {"ndcg@10": value}, "intervals": {}, "protocol": {"num_users": 3}}


def write_card(folder: Path, seed: int) -> None:
    if seed == 1:
        make_config("", num_items=12).save_pretrained(folder)
        save_evaluation({"towers": []}, folder)
    update_model_card(folder, {"reports": {"test": make_report(seed / 10)}}, license=f"licence-{seed}")


def read_card(folder: Path) -> str:
    """Which is that of the evaluation beside it."""
    recover(folder)
    assert (folder / "README.md").read_text() == str(model_card(folder))
    return load_evaluation(folder)["metadata"]["license"]


def write_results(folder: Path, seed: int) -> None:
    facts = {"command": "run", "data": "tiny", "machine": "1 CPU", "protocol": "full", "split": "test"}
    append_results(folder / "table.csv", {"ours": make_report(0.5)}, run=f"run-{seed}", seed=seed, **facts)


def read_rows(folder: Path) -> int:
    text = (folder / "table.csv").read_text()
    assert text.endswith("\n") and read_results(folder / "table.csv", run="run-1")
    return text.count("\n")


def old_checkpoint(folder: Path, seed: int) -> None:
    """A checkpoint of a run as far as a resume looks at it; the second one has files of other names."""
    with written_whole(folder / "checkpoint-4", replaces_all=True) as partial:
        baseline(seed).save_pretrained(partial)
        for name in (f"rng_state_{seed}.pth", "optimizer.pt", "scheduler.pt"):
            (partial / name).write_bytes(b"pickled")
        (partial / "trainer_state.json").write_text(json.dumps({"seed": seed}))


def read_checkpoint(folder: Path) -> tuple[float, ...]:
    newest = Path(str(last_complete_checkpoint(folder)))
    states = [int(path.stem.rpartition("_")[2]) for path in newest.glob("rng_state_*")]
    return (weights(newest), *states, json.loads((newest / "trainer_state.json").read_text())["seed"])


def write_checkpoint(folder: Path, seed: int) -> None:
    size = {"max_shard_size": "1KB"} if seed == 1 else {}
    baseline(seed, width=16 if seed == 1 else 8).save_pretrained(folder, **size)


def write_processor(folder: Path, seed: int) -> None:
    processor = make_processor("text")
    processor.max_text_length = 10 + seed
    processor.tokenizer.model_max_length = 10 + seed
    processor.save_pretrained(folder)


def read_processor(folder: Path) -> int:
    processor = TransRecProcessor.from_pretrained(folder)
    assert processor.tokenizer.model_max_length == processor.max_text_length
    return processor.max_text_length


def write_item_statistics(folder: Path, seed: int) -> None:
    ItemStatistics(np.array(["a", "b"][:seed]), np.arange(seed)).save(folder)


def read_item_statistics(folder: Path) -> list[str]:
    recover(folder)
    found = ItemStatistics.from_pretrained(folder)
    assert found is not None and len(found.item_ids) == len(found.train_counts)
    return found.item_ids.tolist()


WRITERS: dict[str, tuple[Callable[[Path, int], Any], Callable[[Path], Any]]] = {
    "checkpoint over one of another width and in shards": (write_checkpoint, weights),
    "processor": (write_processor, read_processor),
    "statistics of items": (write_item_statistics, read_item_statistics),
    "save_checkpoint": (lambda folder, seed: save_checkpoint(folder, baseline(seed)), weights),
    "recommender with its index": (write_recommender, read_recommender),
    "index over that of another order": (write_index, read_index),
    "statistics": (lambda folder, seed: save_statistics({"seed": seed}, folder), load_statistics),
    "evaluation": (lambda folder, seed: save_evaluation({"data": f"{seed}"}, folder), load_evaluation),
    "card and evaluation": (write_card, read_card),
    "table of results": (write_results, read_rows),
    "checkpoint of a run over one of the same step": (old_checkpoint, read_checkpoint),
}


FULL_DISKS = (
    "checkpoint over one of another width and in shards",
    "processor",
    "recommender with its index",
    "card and evaluation",
    "table of results",
)


@pytest.mark.parametrize(
    ("name", "full_disk"),
    [*((name, False) for name in WRITERS), *((name, True) for name in FULL_DISKS)],
    ids=lambda value: value if isinstance(value, str) else ["killed", "full disk"][value],
)
def test_every_writer_leaves_the_old_state_or_the_new_one(tmp_path: Path, name: str, full_disk: bool) -> None:
    write, read = WRITERS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, 1)
    old = read(folder)
    shutil.copytree(folder, tmp_path / "old")
    write(folder, 2)
    states = [old, read(folder)]
    assert states[0] != states[1]
    prepare, work = (lambda: shutil.copytree(tmp_path / "old", folder)), (lambda: write(folder, 2))
    points = interrupted(folder, prepare, work, full_disk=full_disk, most=12)
    seen = [states.index(read(folder)) for _ in points]
    assert 0 in seen and len(seen) >= 7


def test_a_trainer_saves_whole(tmp_path: Path) -> None:
    """The model over another one, with card, processor and statistics."""
    folder = tmp_path / "folder"
    trainers = [make_trainer(tmp_path / f"run-{seed}", model=baseline(seed)) for seed in (1, 2)]
    trainers[0].save_model(folder)
    shutil.copytree(folder, tmp_path / "old")
    states = [weights(folder)]
    trainers[1].save_model(tmp_path / "new")
    states.append(weights(tmp_path / "new"))
    points = interrupted(
        folder, lambda: shutil.copytree(tmp_path / "old", folder), lambda: trainers[1].save_model(folder), most=12
    )
    for _ in points:
        state = states.index(weights(folder))
        assert load_evaluation(folder)["metadata"]["model_id"] == f"run-{state + 1}"


# Runs


def train(folder: Path, seed: int, **options: Any) -> TransRecTrainer:
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, **options}
    trainer = make_trainer(folder, model=baseline(seed), **options)
    trainer.train()
    return trainer


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path, files.TRAINING_LOCK),
        pytest.raises(OSError, match="another training writes its checkpoints there"),
    ):
        train(tmp_path, 1)
    assert checkpoints_of(tmp_path) == [] and train(tmp_path, 1).state.global_step == 2


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    whole = train(tmp_path / "whole", 1)
    last = {}
    for at in interrupted(folder, folder.mkdir, lambda: train(folder, 1), most=6):
        newest = last_complete_checkpoint(folder)
        last[at] = int(newest.rpartition("-")[2]) if newest else 0
        names_there = {path.name for path in folder.iterdir() if path.name[0] != "."}
        assert names_there <= {"checkpoint-1", "checkpoint-2"}
        if newest:
            assert load_file(Path(newest) / "model.safetensors")
    assert set(last.values()) >= {0, 1} and list(last.values()) == sorted(last.values())
    resumed = make_trainer(folder, model=baseline(1), max_steps=2, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=bool(last_complete_checkpoint(folder)))
    for one, other in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clock", [-10_000, 10_000, 0])
def test_the_steps_say_which_checkpoint_is_old_and_not_the_clock(tmp_path: Path, clock: int) -> None:
    for step in (1, 2, 3, 10, 99):
        old_checkpoint(tmp_path / "one", 1)
        (tmp_path / "one" / "checkpoint-4").rename(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 + clock * step, 1e9 + clock * step))
    (tmp_path / "checkpoint-old").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-99")
    remove_old_checkpoints(tmp_path, 2, current=10, best=str(tmp_path / "checkpoint-1"))
    left = [path.name for path in checkpoints_of(tmp_path)]
    assert left == ["checkpoint-1", "checkpoint-10", "checkpoint-99"], "99 is of another run"
    (tmp_path / "checkpoint-99" / "trainer_state.json").write_text("{")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


# Readers beside writers


def test_a_reader_gets_one_state_while_a_writer_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    states = set()
    for seed in (1, 2):
        write_recommender(folder, seed)
        states.add(tuple(read_recommender(folder)))
    writer = os.fork()
    if writer == 0:
        with contextlib.suppress(OSError):
            for turn in range(12):
                write_recommender(folder, 1 + turn % 2)
        os._exit(0)
    found = set()
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        found.add(tuple(read_recommender(folder)))
    assert found <= states


def test_a_push_takes_one_state_of_a_folder_in_use(tmp_path: Path, hub: LocalHub) -> None:
    folder = tmp_path / "folder"
    sums = []
    for seed in (1, 2):
        write_checkpoint(folder, seed)
        sums.append(weights(folder))
    hub.create("me/used")

    def replace(handler: Any) -> bool:
        write_checkpoint(folder, 1)
        return False

    hub.fail("POST", "", replace)
    upload_checkpoint(folder, "me/used")
    assert weights(folder) == sums[0], "it was replaced while it was pushed"
    for name, content in hub.files("me/used").items():
        (tmp_path / "pushed").mkdir(exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)
    assert weights(tmp_path / "pushed") == sums[1]
    assert not [name for name in names(folder) if name[0] == "."]


def test_rows_of_runs_that_end_at_once_are_all_kept(tmp_path: Path) -> None:
    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            for turn in range(3):
                write_results(tmp_path, 10 * seed + turn + 1)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert read_rows(tmp_path) == 1 + 12


LIES = ("fewer", "more", "twice", "turned", "nested", "numbers", "nan", "width", "cut")


@pytest.mark.parametrize(
    ("change", "index_format"),
    # format 1 cannot tell ids in another order without the catalogue, with which they are compared
    [(lie, version) for lie in LIES for version in (1, 2, 3) if (lie, version) != ("turned", 1)],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: str, index_format: int) -> None:
    from transrec_hf.serving.index import _as_bytes, _contents_hash, encoder_hash

    model = baseline(1)
    model.save_pretrained(tmp_path)
    found = index(model)
    ids: Any = found.item_ids.tolist()
    embeds = found.item_embeds.clone()
    metadata = {"catalogue_hash": "", "encoder_hash": encoder_hash(model, None, index_format)}
    if index_format == 2:
        tensors = {"item_embeds": embeds, "item_ids": _json(ids)}
        metadata |= {"format": "2", "contents_hash": _contents_hash(tensors)}
        save_file(tensors, tmp_path / "item_index.safetensors", metadata)
        assert read_recommender(tmp_path)
    elif index_format == 3:
        found.save(tmp_path)
        metadata = _metadata(tmp_path)
        assert read_recommender(tmp_path)
    changes = {"fewer": ids[:-1], "more": [*ids, "x"], "twice": [ids[0], *ids[:-1]], "turned": ids[::-1]}
    ids = {**changes, "nested": [ids], "numbers": list(range(12))}.get(change, ids)
    if change == "nan":
        embeds[3, 2] = float("nan")
    embeds = embeds[:, :8].contiguous() if change == "width" else embeds
    tensors = {"item_embeds": embeds}
    if index_format == 1:
        (tmp_path / "item_index.json").write_text(json.dumps(ids))
    elif index_format == 2:
        tensors["item_ids"] = _json(ids)
    else:
        tensors["items"] = _as_bytes(pa.table({"item_id": ids}))
    if change == "cut" and index_format > 1:
        metadata["contents_hash"] = "0"
    save_file(tensors, tmp_path / "item_index.safetensors", metadata)
    if change == "cut":
        path = tmp_path / "item_index.safetensors"
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((DataError, OSError), match=r"item_index|item index|no item index|damaged or cut off"):
        Recommender.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ['["item-1"]', '["item-1", ', "[[]]", "{}", "[" * 99_999])
def test_ids_of_another_index_beside_it_are_refused(tmp_path: Path, text: str) -> None:
    write_recommender(tmp_path, 1)
    (tmp_path / "item_index.json").write_text(text)
    with pytest.raises(DataError, match=r"item_index"):
        Recommender.from_pretrained(tmp_path)


def _json(ids: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(ids), "utf-8"), dtype=torch.uint8)


def _metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "item_index.safetensors", "pt") as file:
        return file.metadata()


def test_ids_of_format_1_in_another_order_are_found_by_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Path(__file__).parent / "checkpoints" / "v0.1.0"
    shutil.copytree(checkpoint, tmp_path / "copy")
    right = Recommender.from_pretrained(checkpoint, checkpoint / "items.parquet").recommend(["item-1"], 3)
    path = tmp_path / "copy" / "item_index.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    found = Recommender.from_pretrained(tmp_path / "copy", checkpoint / "items.parquet").recommend(["item-1"], 3)
    assert [item.item_id for item in found] == [item.item_id for item in right]
    assert "made from another catalogue" in caplog.text
