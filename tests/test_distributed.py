"""Two processes are one process with the batches of both: losses, gradients, trained weights, encoded items."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import transformers
from testing_utils import (
    VISION_TOWERS,
    logged,
    make_batch,
    make_catalogue,
    make_collator,
    make_config,
    make_model,
    make_processor,
    make_split,
    make_trainer,
)

from transrec_hf import ItemSource, TransRecModel
from transrec_hf.items.encoding import encode_catalogue
from transrec_hf.items.preparing import pad_right
from transrec_hf.model.loss_transrec import share_items


CATALOGUE = make_catalogue()
NEGATIVES = [3, 0, 11, 6, 3]  # of sampled softmax; the same for both processes

# Of each process its users. Items are shared within and between processes, the numbers of users, positions and
# distinct items differ.
CASES: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "uneven": ([[0, 1, 2, 3], [5, 3, 5]], [[2, 1], [6, 7, 8, 9, 10, 11, 0], [3, 3]]),
    "all items in common": ([[0, 1, 2], [2, 1, 0]], [[1, 0, 2], [2, 0, 1]]),
    "no item in common": ([[0, 1, 2]], [[3, 4, 5, 6]]),
    "text here, images there": ([[0, 3, 6], [6, 9]], [[1, 4, 7, 10], [4, 1]]),
}
SHARES = {"some in common": ([1, 4, 5, 7, 9], [0, 4, 5, 9]), "all in common": ([2, 3, 8],) * 2, "one": ([6], [6])}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "in_batch": {},
    "cpc": {"is_causal": False, "num_positives": 2, "num_negatives": 2},
    "bce": {"num_negatives": 2},
    "bpr": {"num_negatives": 2},
    "full_softmax": {},
    "sampled_softmax": {},
    "masked": {"is_causal": False},
}
RUNS: dict[str, dict[str, Any]] = {
    "mixed items": {},
    "frozen towers": {"trainable_blocks": 1},
    "in chunks": {"item_chunk_size": 2},
    "text only, with gradient checkpointing": {"kinds": ("text",), "gradient_checkpointing": True},
}


IMAGES: dict[str, Any] = {"catalogue": make_catalogue(kinds=("image",)), "per_device_eval_batch_size": 2}

# What a process does


def batch_of(config, lines) -> dict[str, Any]:
    batch = make_batch(config, lines, CATALOGUE)
    if config.objective == "sampled_softmax":
        batch = join([batch], config, NEGATIVES)
    return batch


def join(batches: list[dict[str, Any]], config, sampled: list[int] | None = None) -> dict[str, Any]:
    """One batch of the users of several."""
    ids = [torch.cat([batch["items"].item_rows, torch.tensor([-1])]) for batch in batches]
    names = ("history_index", "target_index", "negative_index")
    joined = {
        name: [own[row].numpy() for own, batch in zip(ids, batches, strict=True) for row in batch[name]]
        for name in names
        if name in batches[0]
    }
    if sampled is not None:
        joined["negative_index"] = [np.array([item]) for item in sampled]
    items = np.unique(np.concatenate([row.ravel() for rows in joined.values() for row in rows]))
    items = np.arange(len(CATALOGUE)) if config.objective == "full_softmax" else items[items >= 0]
    collator = make_collator(config, CATALOGUE)
    batch: dict[str, Any] = {"items": collator.source.batch(items)}
    batch["log_popularity"] = torch.from_numpy(collator.log_popularity[items])
    length = max(len(row) for row in joined["history_index"])
    for name, rows in joined.items():
        if rows[0].ndim == 2:  # negatives of every position
            padded = np.stack([np.pad(row, ((0, length - len(row)), (0, 0)), constant_values=-1) for row in rows])
        else:
            padded = pad_right(rows)
        index = np.where(padded == -1, -1, np.searchsorted(items, padded))
        batch[name] = torch.from_numpy(index)
    if sampled is not None:
        batch["negative_index"] = batch["negative_index"].flatten()
    return batch


def loss_and_gradients(objective: str, case: str, rank: int | None = None) -> dict[str, Any]:
    """Of one process with its batch; of none, with the batch of both."""
    content = {"modalities": ("text", "image")} if objective in ("in_batch", "bce") else {}
    ids = {} if content else {"modalities": "", "num_items": len(CATALOGUE)}
    config = make_config(**content, **ids, objective=objective, **OBJECTIVES[objective])
    model: torch.nn.Module = make_model(config).train()
    batches = [batch_of(config, lines) for lines in CASES[case]]
    if rank is None:
        batch = join(batches, config, NEGATIVES if objective == "sampled_softmax" else None)
    else:
        batch = batches[rank]
        # as strict as can be: each parameter must have a gradient in every step
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients}


def train(name: str, folder: Path, batch_size: int) -> dict[str, Any]:
    options = dict(RUNS[name])
    catalogue = make_catalogue(kinds=options.pop("kinds", ("text", "image", "text image")))
    trainer = make_trainer(
        folder,
        make_config(),
        catalogue=catalogue,
        split=make_split(num_users=12, lengths=(4, 8)),
        per_device_train_batch_size=batch_size,
        optim="sgd",  # Adam would blow up the rounding errors of gradients that should be zero
        learning_rate=0.05,
        tower_learning_rate=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        **options,
    )
    trainer.train()
    return {
        "losses": logged(trainer),
        "ndcg": logged(trainer, "eval_ndcg@10"),
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
    }


def encode(accelerator=None) -> torch.Tensor:
    catalogue = make_catalogue(13)
    return encode_catalogue(
        make_model(), ItemSource(catalogue, make_processor()), batch_size=3, accelerator=accelerator
    )


def owned_items(item_ids: torch.Tensor) -> list[int]:
    shared = share_items(item_ids)
    assert shared.encoded.any() and (shared.encoded >= shared.owned).all()
    return item_ids[shared.owned].tolist()


def train_batch_norm(folder: Path) -> dict[str, float]:
    """Metrics of a model with batch norms; process 0 saves its own."""
    trainer = make_trainer(folder, make_config("image", vision_config=VISION_TOWERS["mobilenet_v1"]()), **IMAGES)
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


def work(rank: int, port: int, folder: str) -> None:
    from accelerate import Accelerator

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = Accelerator(cpu=True)
    results = {
        "losses": {
            (objective, case): loss_and_gradients(objective, case, rank) for objective in OBJECTIVES for case in CASES
        },
        "runs": {name: train(name, Path(folder) / name, batch_size=3) for name in RUNS},
        "items": encode(accelerator),
        "batch norm": train_batch_norm(Path(folder) / "batch_norm"),
        "owned": {case: owned_items(torch.tensor(SHARES[case][rank])) for case in SHARES},
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2, join=False)
    try:
        assert any(context.join(timeout=300) for _ in range(2)), "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [{"folder": folder, **torch.load(folder / f"{rank}.pt", weights_only=False)} for rank in range(2)]


# Tests


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_joined_batch(ranks, objective, case):
    expected = loss_and_gradients(objective, case)
    found = [rank["losses"][objective, case] for rank in ranks]
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, expected["loss"], rtol=1e-5, atol=1e-6)
    for rank in found:
        torch.testing.assert_close(rank["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6)


def test_candidates_of_the_other_process_count():
    """The case is worth testing: without them the loss would be another."""
    config = make_config("", num_items=len(CATALOGUE))
    model = make_model(config)
    alone = [model(**batch_of(config, lines)).loss for lines in CASES["uneven"]]
    joined = model(**join([batch_of(config, lines) for lines in CASES["uneven"]], config)).loss
    assert not torch.allclose(sum(alone) / 2, joined, rtol=0.05)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_is_the_run_of_one_with_twice_the_batch(ranks, name, tmp_path):
    expected = train(name, tmp_path, batch_size=6)
    for rank in ranks:
        found = rank["runs"][name]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert found["ndcg"] == pytest.approx(expected["ndcg"], rel=1e-3)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_end_with_the_same_weights(ranks, name):
    one, other = (rank["runs"][name]["weights"] for rank in ranks)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("case", SHARES)
def test_an_item_that_both_processes_have_is_encoded_by_one(ranks, case):
    owned = [rank["owned"][case] for rank in ranks]
    assert sorted(owned[0] + owned[1]) == sorted({*SHARES[case][0], *SHARES[case][1]})
    assert abs(len(owned[0]) - len(owned[1])) <= 1


def test_two_processes_share_the_encoding_of_a_catalogue(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["items"], encode())


def test_two_processes_report_on_the_model_that_is_saved(ranks, tmp_path):
    saved = TransRecModel.from_pretrained(ranks[0]["folder"] / "batch_norm")
    alone = make_trainer(tmp_path, model=saved, **IMAGES).evaluate()
    names = [name for name in alone if "@" in name or "mrr" in name]
    for rank in ranks:
        assert [rank["batch norm"][name] for name in names] == pytest.approx([alone[name] for name in names])
