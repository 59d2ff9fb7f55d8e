"""Plans of runs: counts, operations and bytes are those of the run; what needs a clock is only looked at for sense."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Run, transrec  # noqa: F401
from testing_utils import make_catalogue, make_config, make_model, make_processor, make_split
from torch import nn

from transrec_hf import ItemSource, TransRecModel, TransRecTrainingArguments
from transrec_hf.data.statistics import log_popularity
from transrec_hf.items.store import ActivationStore
from transrec_hf.training.calibration import (
    Costs,
    Counts,
    TowerCost,
    count_bytes,
    count_flop,
    simulate_steps,
)
from transrec_hf.training.collator import DataCollatorForNextItem, TrainingWindows
from transrec_hf.training.planning import (
    Plan,
    advise_batch,
    advise_store,
    encoding_bytes,
    make_forecast,
    plan_run,
    training_bytes,
)


DEMO = ("--data", "demo:target", "--report_to", "none")


def make_arguments(folder: Path, **arguments: Any) -> TransRecTrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    return TransRecTrainingArguments(str(folder), **{**defaults, **arguments})


def make_plan(folder: Path, model: TransRecModel, num_items: int = 12, **arguments: Any) -> Plan:
    return plan_run(
        model,
        make_arguments(folder, **arguments),
        catalogue=make_catalogue(num_items),
        split=make_split(4 * num_items, num_items),
        processing_class=make_processor(model.config.modalities) if model.config.modalities else None,
        seconds=0.1,
    )


@pytest.mark.parametrize("objective", ["in_batch", "cpc", "bce", "full_softmax"])
def test_counts_are_those_of_the_collator(objective: str) -> None:
    config, catalogue, split = make_config(objective=objective), make_catalogue(), make_split()
    processor, popularity = make_processor(), log_popularity(split.train.item_counts(12))
    windows = TrainingWindows(split.train, config.max_position_embeddings, config.num_targets)
    source = ItemSource(catalogue, processor, max_tokens=16)
    rows_alone = DataCollatorForNextItem(ItemSource(catalogue, max_tokens=16), config, popularity)
    counts, features = simulate_steps(windows, rows_alone, len(windows), source.units())
    batch = DataCollatorForNextItem(source, config, popularity)(features)
    text, image = (batch["items"].parts[name] for name in ("text", "image"))
    assert (counts.users, counts.items) == (len(windows), len(batch["items"]))
    assert counts.contents == {"text": len(text.rows), "image": len(image.rows)}
    assert counts.units == {"text": sum(mask.numel() for mask in text.masks), "image": len(image.rows)}
    assert counts.at_once == {"text": max(mask.numel() for mask in text.masks), "image": len(image.rows)}
    chosen = sum(len(feature["items"]) for feature in features)
    negatives = int((batch["negative_index"] >= 0).sum()) if "negative_index" in batch else 0
    assert counts.slots == max(chosen + negatives, counts.items)
    assert 0 < counts.distinct_share <= 1


def test_steps_of_an_epoch_cover_all_windows() -> None:
    config, catalogue, split = make_config(), make_catalogue(), make_split()
    windows = TrainingWindows(split.train, config.max_position_embeddings)
    collator = DataCollatorForNextItem(ItemSource(catalogue), config, log_popularity(split.train.item_counts(12)))
    counts, _ = simulate_steps(windows, collator, 4, ItemSource(catalogue, make_processor()).units())
    num_steps = -(-len(windows) // 4)
    assert counts.users * num_steps == pytest.approx(len(windows))
    assert counts.slots * num_steps == pytest.approx(sum(len(windows[i]["items"]) for i in range(len(windows))))


def test_operations_of_a_text_tower_are_those_of_the_formula() -> None:
    model = make_model(modalities="text")
    config, n, tokens = model.config.text_config, 3, 5
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    ids = torch.ones(n, tokens, dtype=torch.long)
    linear = 2 * n * tokens * (4 * width * width + 2 * width * wide)
    attention = 2 * n * (2 * tokens * tokens * width)
    expected = layers * (linear + attention)
    with torch.no_grad():
        assert count_flop(lambda: model.item_encoder.text_model(ids, torch.ones_like(ids))) == expected

    states = torch.randn(n, tokens, width, requires_grad=True)  # without it the first layer has less to go back to
    whole = count_flop(
        lambda: (
            model.item_encoder.text_model(inputs_embeds=states, attention_mask=torch.ones_like(ids))
            .last_hidden_state.sum()
            .backward()
        )
    )
    assert whole == 3 * expected


def test_bytes_are_those_of_the_living_tensors() -> None:
    layers = nn.Sequential(*(nn.Linear(100, 100) for _ in range(5)))
    inputs, size = torch.randn(10, 100), 4 * 10 * 100
    with torch.no_grad():
        assert count_bytes(lambda: layers(inputs)) == (2 * size, size)
    assert count_bytes(lambda: layers(inputs)) == (5 * size, 5 * size)
    assert count_bytes(lambda: inputs[:5].view(-1)) == (0, 0)


def test_a_larger_step_takes_more_and_a_chunk_less_memory(tmp_path: Path) -> None:
    tower = TowerCost(2e-3, 1e-3, 1e6, train_bytes=500.0, held_bytes=300.0, eval_bytes=200.0, input_bytes=100.0)
    costs = Costs(1e-3, 1e-2, 1e6, 50.0, 1e-3, 1.0, base_bytes=2**30, prepare_seconds=1e-3, towers={"image": tower})
    few, many = (Counts(n, {"image": n}, {"image": n}, {"image": n}, users=8, slots=2 * n) for n in (40, 80))
    args = make_arguments(tmp_path)
    low, high = (make_forecast(args, 10, counts, many, costs) for counts in (few, many))
    assert low.step_seconds == pytest.approx(1e-3 + 40 * 1e-3 + 40 * 2e-3 + 1e-2 + 1e-3)
    assert low.epoch_seconds == pytest.approx(10 * low.step_seconds)
    assert low.evaluation_seconds == pytest.approx(80 * 2e-3 + 1.0)
    assert low.step_tflop == pytest.approx((40 * 1e6 + 1e6) / 1e12)
    assert high.step_seconds > low.step_seconds and high.memory_gb > low.memory_gb > 1

    assert training_bytes(few, costs) == 40 * (100 + 500)
    assert training_bytes(few, costs, chunk=10) == 40 * 100 + 10 * 500
    assert encoding_bytes(many, costs, batch_size=20) == 20 * (100 + 200)
    assert list(high.chunk_memory_gb) == [16, 32, 64]
    assert sorted(high.chunk_memory_gb.values()) == list(high.chunk_memory_gb.values())
    assert high.chunk_memory_gb[64] <= high.memory_gb

    with_workers = make_forecast(make_arguments(tmp_path, dataloader_num_workers=1), 10, few, many, costs)
    assert with_workers.step_seconds < low.step_seconds


@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_the_size_of_the_store_is_that_of_its_files(tmp_path: Path, trainable_blocks: int) -> None:
    model = make_model()
    plan = make_plan(tmp_path, model, num_items=300, trainable_blocks=trainable_blocks)
    store = ActivationStore(tmp_path, model, ItemSource(make_catalogue(300), make_processor()))
    store.fill()
    files = list(tmp_path.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert plan.store_gb * 2**30 == pytest.approx(size - headers, rel=0.1 if trainable_blocks else 1e-6)


def test_a_plan_of_both_ways(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_model(), trainable_blocks=1, activation_store=str(tmp_path / "store"))
    assert plan.with_store is not None and plan.uses_store and plan.forecast is plan.with_store
    assert not any(tmp_path.iterdir())
    for way in (plan.with_store, plan.without_store):
        assert min(way.step_seconds, way.evaluation_seconds, way.epoch_tflop, way.memory_gb) > 0
        assert 0 < way.tower_share < 1
    assert plan.with_store.step_tflop < plan.without_store.step_tflop
    assert plan.fill_seconds >= 0 and plan.available_gb > plan.with_store.memory_gb
    assert plan.steps_per_epoch > max(plan.larger_steps) and plan.larger_steps.keys() == plan.larger_batches.keys()
    shares = [plan.step.distinct_share, *(counts.distinct_share for counts in plan.larger_steps.values())]
    assert shares == sorted(shares, reverse=True)
    assert [sentence.split(":")[0] for sentence in plan.advice] == [
        *("activation_store", "batch", "item_chunk_size", "dataloader_num_workers")
    ]


def test_advice_goes_out_from_the_store_if_it_pays(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_model(), trainable_blocks=0, num_train_epochs=2)
    assert plan.with_store is not None and not plan.uses_store and plan.forecast is plan.without_store
    slow = replace(plan.without_store, epoch_seconds=100.0, step_seconds=10.0)
    fast = replace(plan.with_store, epoch_seconds=9.0, memory_gb=0.1)
    faster = replace(fast, epoch_seconds=4.0)
    batches = dict.fromkeys(plan.larger_batches, faster)
    plan = replace(
        plan, without_store=slow, with_store=fast, larger_batches=batches, available_gb=8.0, fill_seconds=1.0
    )
    paid = replace(plan, store_pays=True)
    assert paid.advised is fast and ": 4 s an epoch with the store and 0.1 GB" in advise_batch(paid)
    arguments = make_arguments(tmp_path, num_train_epochs=2)
    assert advise_store(paid, arguments).startswith("activation_store: yes, an epoch takes")
    unpaid = replace(plan, store_pays=False)
    assert unpaid.advised is slow and "with the store" not in advise_batch(unpaid)
    assert advise_store(unpaid, arguments).startswith("activation_store: no")


def test_what_is_trained_whole_has_no_store(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_model())
    assert plan.with_store is None and not plan.uses_store and plan.advice[0].startswith("activation_store: no")
    with pytest.raises(ValueError, match="lower trainable_blocks"):
        make_plan(tmp_path, make_model(), activation_store=str(tmp_path / "store"))


def test_an_id_baseline_has_no_towers(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_model(make_config(modalities=(), num_items=12)))
    assert plan.with_store is None and plan.forecast.tower_share == 0 and plan.forecast.step_tflop > 0
    assert len(plan.advice) == 1


def test_planning_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_plan(tmp_path, model, trainable_blocks=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command calibrates for a moment only."""
    monkeypatch.setattr("transrec_hf.training.planning.plan_run", partial(plan_run, seconds=0.1))


def test_the_command_line(transrec: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, out, _ = transrec("plan", *DEMO, "--id_baseline", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["steps_per_epoch"] > 0 and plan["without_store"]["epoch_seconds"] > 0
    options = tmp_path / "options.yaml"
    options.write_text("data: demo:target\nid_baseline: true\nreport_to: none\n")
    code, out, _ = transrec("plan", options, "--per_device_train_batch_size", 16)
    assert code == 0 and "a step encodes" in out and "seconds of an epoch" in out
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--date", "demo:target"), "unknown option --date: did you mean --data?"),
        ((), "no data: give --data"),
        (("nothing.yaml",), "nothing.yaml: cannot be read"),
        ((*DEMO, "--activation_store", "store"), "nothing to store: lower trainable_blocks"),
        ((*DEMO, "--split", "temporal"), "a temporal split needs validation_from and test_from"),
    ],
)
def test_bad_options_end_in_one_sentence(
    transrec: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = transrec("plan", *arguments)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and sentence in last
