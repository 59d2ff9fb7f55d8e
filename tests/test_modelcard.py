"""Model cards: rendered from a run, from its files again, and from tables of results; data sets with their card."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from local_hub import LocalHub
from testing_utils import (
    make_catalogue,
    make_config,
    make_model,
    make_paper_config,
    make_processor,
    make_sequences,
    make_split,
)
from transformers import TrainingArguments

from transrec_hf import (
    DataError,
    HubError,
    TransRecConfig,
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
    load_domain,
    push_dataset_to_hub,
)
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.publishing.card import (
    describe_checkpoint,
    describe_protocol,
    duration,
    model_card,
    non_default_arguments,
    update_model_card,
    verdict,
)
from transrec_hf.publishing.checkpoint import parameter_counts
from transrec_hf.publishing.facts import (
    UNKNOWN_LICENCE,
    load_evaluation,
    look,
    named_source,
    read_licence,
    save_evaluation,
)
from transrec_hf.publishing.results import RESULT_COLUMNS, append_results, read_results


ROOT = Path(__file__).parent.parent
FACTS = {"run": "first", "command": "python run.py", "seed": 0, "data": "tiny", "machine": "1 CPU", "protocol": "full"}
FACTS |= {"split": "test", "seconds": 90, "peak_memory_gb": 0.5, "date": "2026-01-01", "commit": "abc1234"}


def make_trainer(folder: Path, model: TransRecModel | None = None, **options: Any) -> TransRecTrainer:
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 5, "trainable_blocks": 1, **options}
    args = TransRecTrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **options)
    return TransRecTrainer(
        model or make_model(),
        args,
        catalogue=make_catalogue(),
        split=make_split(),
        processing_class=make_processor(),
    )


def make_report(value: float, **metrics: float) -> dict[str, Any]:
    metrics = {"hit_rate@5": value, "hit_rate@10": value, "ndcg@5": value / 2, "ndcg@10": value / 2, **metrics}
    intervals = {"hit_rate@10": (value - 0.1, value + 0.1), "ndcg@10": (value / 2 - 0.05, value / 2 + 0.05)}
    return {"metrics": metrics, "intervals": intervals, "protocol": {"num_users": 10}}


def write_table(path: Path, **facts: Any) -> Path:
    reports = {"ours": make_report(0.4), "co-occurrence": make_report(0.3), "ID baseline": make_report(0.5)}
    append_results(path, reports, **{**FACTS, **facts})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: trained, saved, reported on."""
    folder = tmp_path_factory.mktemp("run") / "my-model"
    trainer = make_trainer(folder)
    trainer.train()
    trainer.report()
    trainer.save_model()
    return folder


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def checked(card: ModelCard | DatasetCard) -> ModelCard | DatasetCard:
    """The card as a reader parses it; its metadata survive, and it is neat."""
    again = type(card)(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert "\n\n\n" not in card.text and "None" not in card.text and "{{" not in card.text
    assert not re.search(r"^\|.*[^|\n]$", card.text, flags=re.MULTILINE), "a row of a table that does not end"
    for table in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table
    return again


# From a run


def test_card_of_a_run(checkpoint: Path) -> None:
    text = text_of(checkpoint)
    card = checked(ModelCard(text))
    report = load_evaluation(checkpoint)["reports"]["test"]
    assert {"recommendation", "sequential-recommendation", "multimodal"} <= set(card.data.tags)
    assert card.data.library_name == "transformers" and card.data.get("pipeline_tag") is None
    assert card.data.model_name == "my-model" and card.data.get("base_model") is None
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == report["metrics"]
    assert {result.dataset_split for result in results.values()} == {"test"}
    for name, low_high in report["intervals"].items():
        low, high = low_high
        assert f"{report['metrics'][name]:.4f} [{low:.4f}, {high:.4f}]" in text
    for baseline in ("popularity", "repeat-last", "co-occurrence"):
        assert re.search(rf"^\| {baseline} \| \d\.\d{{4}} \[", text, flags=re.MULTILINE)
    for part in (
        "reads the **text and image** of items",
        "Preset: `full`",
        "Masking (`full`)",
        "Ties (`expected`)",
        "each of the 10 users with at least 3 interactions",
        "| modality of the target | text |",
        "| items | 12: 33.3% with text only, 33.3% with an image only, 33.3% with both |",
        "| text tower | 4,576 | `bert`, not pre-trained |",
        "| `trainable_blocks` | `1` |",
        "| hardware | ",
        "| time | ",
        "trust_remote_code=True",
        'Recommender.from_pretrained("my-model", "items.parquet")',
        "## Limits and biases",
        "licence of these weights has not been stated",
    ):
        assert part in text, part
    assert str(checkpoint.parent) not in text


def test_card_can_be_rendered_again_from_its_files(checkpoint: Path) -> None:
    assert str(model_card(checkpoint)) == text_of(checkpoint)


def test_a_card_is_written_when_it_is_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.evaluate()
    assert not (tmp_path / "README.md").exists()  # nothing is saved yet
    trainer.save_model()
    assert "Validation targets" in text_of(tmp_path) and "the numbers are too high" in text_of(tmp_path)
    trainer.report()
    assert "Validation targets" in text_of(tmp_path), "a report is no side effect"
    trainer.create_model_card()
    assert "Test targets" in text_of(tmp_path)
    trainer.reports["test"]["baselines"]["id_baseline"] = make_report(0.1, mrr=0.2)
    trainer.create_model_card(license="mit", tags="tiny", dataset_tags="org/data", model_name="org/name")
    card = checked(ModelCard(text_of(tmp_path)))
    assert "| ID baseline | 0.1000 [0.0000, 0.2000] |" in card.text and "under mit" in card.text
    assert (card.data.license, card.data.datasets) == ("mit", ["org/data"]) and "tiny" in card.data.tags
    assert {result.dataset_type for result in card.data.eval_results} == {"org/data"}
    trainer.save_model()  # what was said once is kept
    used = re.compile(r"^\| peak memory .*$", re.MULTILINE)  # which the process may have raised meanwhile
    assert used.sub("", text_of(tmp_path)) == used.sub("", str(card))


def test_each_checkpoint_has_the_card_of_its_own_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=3, learning_rate=0.05, save_total_limit=None)
    trainer.train()
    logged = {entry["step"]: entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry}
    for step, value in ((step, value) for step, value in logged.items() if step):
        folder = tmp_path / f"checkpoint-{step}"
        results = {r.metric_type: r.metric_value for r in ModelCard(text_of(folder)).data.eval_results}
        assert results["ndcg@10"] == load_evaluation(folder)["reports"]["validation"]["metrics"]["ndcg@10"] == value
    # the model that is left in the end is the best one, and so are its numbers
    assert trainer.reports["validation"]["metrics"]["ndcg@10"] == max(logged.values())


def test_parent_and_towers_are_named_without_local_paths(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TransRecModel.from_pretrained(checkpoint))
    trainer.save_model()
    assert "fine-tuned from `my-model`, a local checkpoint" in text_of(tmp_path)
    assert named_source("org/tower") == {"name": "org/tower", "on_hub": True}
    assert named_source(str(checkpoint)) == {"name": "my-model", "on_hub": False}

    evaluation = load_evaluation(tmp_path)
    evaluation["finetuned_from"] = named_source("org/base")
    save_evaluation(evaluation, tmp_path)
    assert checked(model_card(tmp_path)).data.base_model == ["org/base"]

    evaluation["finetuned_from"] = None
    evaluation["towers"][0] |= {**named_source("org/words"), "licence": "apache-2.0"}
    evaluation["towers"][1] |= {**named_source("pictures"), "licence": UNKNOWN_LICENCE}
    save_evaluation(evaluation, tmp_path)
    card = checked(model_card(tmp_path))
    assert card.data.base_model == ["org/words", "pictures"]
    assert "`bert` from org/words, licence: apache-2.0" in card.text
    assert "`vit` from pictures, licence: unknown: check" in card.text


def test_licence_is_that_of_the_towers_own_card_or_unknown(hub: LocalHub, tmp_path: Path) -> None:
    hub.create("org/open").commit({"README.md": b"---\nlicense: mit\n---\n# open"})
    hub.create("org/silent").commit({"README.md": b"# silent"})
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: my-licence\n---\n")
    assert read_licence("org/open") == "mit"
    assert read_licence("org/silent") == read_licence("org/missing") == UNKNOWN_LICENCE
    assert read_licence(str(tmp_path)) == "my-licence"
    assert read_licence(str(tmp_path.parent)) == UNKNOWN_LICENCE


def test_info_and_card_count_the_same_parameters(tmp_path: Path) -> None:
    model = make_model(make_config(num_items=12, item_map="whitened"))
    model.save_pretrained(tmp_path)
    assert {"whitening", "axes", "mean", "num_fitted"} <= {name.split(".")[-1] for name in model.state_dict()}
    counted = {name: count for name, count in describe_checkpoint(tmp_path)["parameters"].items() if name != "total"}
    assert counted == parameter_counts(model.config)


def test_the_card_of_a_hybrid_says_that_it_reads_content(tmp_path: Path) -> None:
    make_config(("text",), num_items=12).save_pretrained(tmp_path)
    text = checked(model_card(tmp_path)).text
    assert "reads the **text** of items" in text and "each of the 12 items of its training also has" in text
    assert "ids only" not in text and "cannot be recommended" not in text and "Transfer can hurt" in text


@pytest.mark.parametrize("kind", ["text", "image", "id"])
def test_card_of_other_models(kind: str, tmp_path: Path) -> None:
    config = make_config((), num_items=12) if kind == "id" else make_config((kind,))
    config.save_pretrained(tmp_path)
    card = checked(model_card(tmp_path))
    assert "Not evaluated yet." in card.text and "Statistics of these data were not kept." in card.text
    assert card.data.eval_results is None and "multimodal" not in card.data.tags
    if kind == "id":
        assert "knows its 12 items by their ids only" in card.text and "trust_remote_code" not in card.text
    else:
        assert f"reads the **{kind}** of items" in card.text
        assert ("images=" in card.text) == (kind == "image") and ("text=" in card.text) == (kind == "text")


def test_card_of_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(checkpoint)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    card = checked(model_card(tmp_path))
    assert "only a LORA adapter" in card.text and "`my-model`" in card.text and str(checkpoint) not in card.text
    assert "PeftModel.from_pretrained" in card.text and card.data.library_name == "peft"
    assert describe_checkpoint(tmp_path)["adapter"] == "LORA"


def test_arguments_shown_are_those_that_shaped_the_result() -> None:
    args = TransRecTrainingArguments("/secret/place", bf16=True, use_cpu=True, weight_decay=0.1, logging_steps=7)
    shown = non_default_arguments(json.loads(args.to_json_string()), TransRecTrainingArguments)
    always = {"learning_rate": 1e-3, "tower_learning_rate": 1e-4, "per_device_train_batch_size": 128}
    assert shown == {**always, "num_train_epochs": 10, "seed": 42, "bf16": True, "weight_decay": 0.1}
    args = json.loads(TransRecTrainingArguments("x", use_cpu=True, trainable_blocks=0).to_json_string())
    for of in (TransRecTrainingArguments, TrainingArguments):  # by the run itself; by the card of one of version 0.1
        assert non_default_arguments(args, of)["trainable_blocks"] == 0


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ({"mask_history": "none", "max_history": 10}, "nothing is masked"),
        ({"mask_history": "window", "window_extra": 1, "max_history": 20}, "the last 20 + 1 items before the target"),
        ({"mask_history": "full", "protect_target": True}, "no item that the user had before can be recommended."),
        ({"ties": "pessimistic"}, "all count as ranked before it"),
        ({"candidates": "interacted", "num_items": 1234}, "all items that some user chose, 1,234 in number"),
        ({"name": "ninerec", "min_interactions": 5, "num_users": 7}, "each of the 7 users with at least 5"),
        ({"name": "somebody's"}, "Protocol `somebody's`"),
    ],
)
def test_protocol_in_words(protocol: dict[str, Any], words: str) -> None:
    assert words in " ".join(describe_protocol(protocol))


def test_verdict_looks_at_the_intervals() -> None:
    baselines = {"popularity": make_report(0.1), "repeat_last": make_report(0.11), "co_occurrence": make_report(0.45)}
    report = {**make_report(0.5), "baselines": {**baselines, "better": make_report(0.6)}}
    assert verdict(report) == (
        "In `ndcg@10` it is above popularity and repeat-last; it is above, but with overlapping intervals, "
        "co-occurrence; it is **not** above better."
    )


def test_parameters_and_durations() -> None:
    model = make_model()
    assert sum(parameter_counts(model.config).values()) == model.num_parameters()
    assert parameter_counts(make_config((), num_items=12))["item embeddings"] == 12 * 16
    assert [duration(seconds) for seconds in (47, 720, 12600)] == ["47 s", "12 min", "3.5 h"]


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_paper_config(),  # its image tower has batch norms
        make_config((), num_items=12, user_encoder="mean"),
        make_config(("text",), features_size=4, user_encoder="gru"),
    ],
)
def test_a_look_without_the_model_finds_the_same(config: TransRecConfig, tmp_path: Path) -> None:
    make_model(config).save_pretrained(tmp_path)
    facts = look(tmp_path)
    assert facts == json.loads(json.dumps(describe_checkpoint(tmp_path))) and facts is not None
    assert facts["parameters"]["total"] == make_model(config).num_parameters()


def test_a_look_leaves_what_is_not_whole_to_others(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    assert look(tmp_path) is None  # no weights
    make_model().save_pretrained(tmp_path)
    assert look(tmp_path) is not None
    config = json.loads((tmp_path / "config.json").read_text())
    odd: dict[str, Any] = {"objective": "\x1b[31m", "hidden_size": "9" * 99, "text_config": [], "weights_from": [{}]}
    for name, value in {**odd, "model_type": "bert"}.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        assert look(tmp_path) is None, name


def test_damaged_or_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder"):
        model_card(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no config\.json"):
        model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="a checkpoint of 'bert', not of 'transrec'"):
        model_card(tmp_path)
    make_config().save_pretrained(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json: is not readable"):
        model_card(tmp_path)


# From a table of results


def test_results_of_one_seed(tmp_path: Path) -> None:
    results = read_results(write_table(tmp_path / "table.csv"), model="ours")
    report = results["reports"]["test"]
    assert report["metrics"] == make_report(0.4)["metrics"]
    assert report["intervals"]["ndcg@10"] == pytest.approx([0.15, 0.25])
    assert set(report["baselines"]) == {"co-occurrence", "ID baseline"}
    assert report["protocol"]["num_users"] == 10 and report["protocol"]["mask_history"] == "full"
    assert results["run"]["seconds"] == 90 and results["run"]["command"] == "python run.py"


def test_results_of_several_seeds_are_their_mean_and_range(tmp_path: Path) -> None:
    path = write_table(tmp_path / "table.csv")
    append_results(path, {"ours": make_report(0.6)}, **{**FACTS, "seed": 1, "seconds": 110})
    results = read_results(path, "first", "ours")
    report = results["reports"]["test"]
    assert report["metrics"]["hit_rate@10"] == 0.5 and report["intervals"]["hit_rate@10"] == [0.4, 0.6]
    assert report["interval"] == "lowest and highest of 2 seeds" and results["run"]["seconds"] == 100


def test_results_compare_only_what_is_comparable(tmp_path: Path) -> None:
    path = write_table(tmp_path / "table.csv")
    write_table(path, run="second")
    write_table(path, run="other", data="elsewhere")
    write_table(path, run="masked", protocol="recbole")
    baselines = read_results(path, "first", "ours")["reports"]["test"]["baselines"]
    assert set(baselines) == {
        "co-occurrence",
        "ID baseline",
        *(f"{m} (second)" for m in ("ours", "co-occurrence", "ID baseline")),
    }


@pytest.mark.parametrize(
    ("change", "choice", "message"),
    [
        (lambda text: text, {}, r"has several values of model: ID baseline, co-occurrence, ours"),
        (lambda text: text, {"model": "theirs"}, "no test row of model 'theirs', only of ID baseline"),
        (lambda text: text, {"split": "validation"}, "no validation row"),
        (lambda text: text.replace("0.4,", "much,"), {"model": "ours"}, "value of hit_rate@5 is 'much', not a number"),
        (lambda text: text.replace("metric,", "measure,", 1), {"model": "ours"}, "has no column metric"),
        (lambda text: text + text.split("\n")[1] + "\n", {"model": "ours"}, "occurs twice"),
    ],
)
def test_bad_tables_are_refused(change: Any, choice: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "table.csv")
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        read_results(path, **choice)


def test_card_from_a_table_and_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_table(Path("table.csv"))
    before = text_of(checkpoint)
    file = update_model_card(checkpoint, read_results(table, model="ours"), "cards/ours", model_id="org/ours")
    assert text_of(checkpoint) == before
    card = checked(ModelCard(text_of(file.parent)))
    assert card.text.count("0.4000 [0.3000, 0.5000]") == 1
    assert "above, but with overlapping intervals, co-occurrence; it is **not** above ID baseline" in card.text
    assert "run `first`, model `ours` in\n`table.csv`" in card.text and "| command | `python run.py` |" in card.text
    assert {path.suffix for path in file.parent.iterdir()} == {".json", ".md"}
    assert all(str(checkpoint.parent) not in path.read_text() for path in file.parent.iterdir())
    table.write_text(table.read_text().replace("0.4,", "0.44,"))
    update_model_card(file.parent)
    assert "0.4400 [" in text_of(file.parent)


def test_slices_of_the_run_stay_as_long_as_its_numbers_do(checkpoint: Path, tmp_path: Path) -> None:
    report = load_evaluation(checkpoint)["reports"]["test"]
    append_results(tmp_path / "table.csv", {"ours": report}, **FACTS)
    table = read_results(tmp_path / "table.csv")
    card = update_model_card(checkpoint, table, tmp_path / "same").read_text()
    assert "### Slices" in card and "12 in number" in card
    table["reports"]["test"]["metrics"]["mrr"] = 0.0
    assert "### Slices" not in update_model_card(checkpoint, table, tmp_path / "other").read_text()


# The released cards


RELEASED = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


def test_there_are_released_cards() -> None:
    assert RELEASED


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_released_card_agrees_with_its_table(folder: Path) -> None:
    """Mend with `make cards`."""
    evaluation = load_evaluation(folder)
    table = evaluation["results"]
    with open(ROOT / table["file"], newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if all(row[key] == table[key] for key in ("run", "model", "split"))
        ]
    expected: dict[str, list[float]] = {}
    for row in rows:
        expected.setdefault(row["metric"], []).append(float(row["value"]))
    card = checked(ModelCard(text_of(folder)))
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown and shown == pytest.approx({name: np.mean(expected[name]) for name in shown})
    for name in ("hit_rate@10", "ndcg@10"):
        assert f"{np.mean(expected[name]):.4f}" in card.text

    again = read_results(ROOT / table["file"], table["run"], table["model"], table["split"])
    for name, value in again.pop("reports")[table["split"]].items():
        kept = evaluation["reports"][table["split"]][name]
        if name == "protocol":  # the table knows only the name of it
            assert all(kept[field] == stated for field, stated in value.items() if stated is not None)
        else:
            assert kept == json.loads(json.dumps(value)), name
    assert {name: evaluation[name] for name in again} == {**again, "results": table}
    assert text_of(folder) == str(model_card(folder))


TABLES = {path.name: path for path in sorted((ROOT / "examples" / "results").glob("*.csv"))}
del TABLES["kill_and_resume.csv"]  # losses step by step, no metrics
for ablation in ("balance.csv", "meta_transfer.csv"):  # differences, too
    del TABLES[ablation]


@pytest.mark.parametrize("path", TABLES.values(), ids=TABLES)
def test_tables_of_results_have_all_columns(path: Path) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        assert tuple(next(csv.reader(file))) == RESULT_COLUMNS


# Data sets


def test_pushed_data_set_comes_back(hub: LocalHub) -> None:
    catalogue, sequences = make_catalogue(), make_split().test
    push_dataset_to_hub(catalogue, sequences, "me/data", license="cc0-1.0", revision="v1")
    card = checked(DatasetCard(hub.files("me/data", "v1", kind="datasets")["README.md"].decode()))
    assert card.data.license == "cc0-1.0" and [c["config_name"] for c in card.data.configs] == [
        "items",
        "interactions",
    ]
    assert "| users | 10 |" in card.text and 'load_domain("me/data")' in card.text
    loaded, again = load_domain("me/data", revision="v1")
    assert loaded.content_hash() == catalogue.content_hash()
    assert again.user_ids.tolist() == sequences.user_ids.tolist()
    for old, new in zip(sequences, again, strict=True):
        assert old["items"].tolist() == new["items"].tolist()


def test_what_is_hidden_is_not_pushed(hub: LocalHub) -> None:
    catalogue = make_catalogue(kinds=("text image",)).with_policy("one_per_item")
    push_dataset_to_hub(catalogue, make_split().test, "me/hidden")
    loaded, _ = load_domain("me/hidden")
    assert (loaded.has_text == catalogue.has_text).all() and (loaded.has_image == catalogue.has_image).all()
    assert (
        loaded.items.features["image"].decode is False and loaded.image(int(catalogue.has_image.argmax())) is not None
    )


def test_images_in_files_are_pushed_with_their_bytes(hub: LocalHub, tmp_path: Path) -> None:
    from datasets import Dataset

    source = make_catalogue(3, kinds=("image",))
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(source.encoded_image(row))
    items = {"item_id": source.item_ids.tolist(), "image": ["0.png", "1.png", "2.png"], "colour": ["a", "b", "c"]}
    catalogue = Catalogue(Dataset.from_dict(items), image_folder=tmp_path)
    push_dataset_to_hub(catalogue, make_sequences([[0, 1, 2]]), "me/files")
    loaded, _ = load_domain("me/files")
    assert loaded.content_hash() == source.content_hash() and loaded.items["colour"][:] == ["a", "b", "c"]


def test_data_that_cannot_be_pushed(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue, sequences = make_catalogue(), make_split().test
    with pytest.raises(DataError, match="no interactions"):
        push_dataset_to_hub(catalogue, sequences.select(np.array([], dtype=int)), "me/data")
    with pytest.raises(DataError, match="a user has several views"):
        push_dataset_to_hub(catalogue, sequences.windows(3), "me/data")
    with pytest.raises(HubError, match="me/data: "):
        push_dataset_to_hub(catalogue, sequences, "me/data", token="hf_wrong")
    assert not hub.repos
