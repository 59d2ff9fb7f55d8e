"""The `transrec` command: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from local_hub import LocalHub
from testing_utils import assert_same_weights, make_catalogue, make_model, make_processor, make_split

import transrec_cli
import transrec_hf
from transrec_hf import DataError, TransRecModel
from transrec_hf.data.statistics import data_statistics, save_statistics
from transrec_hf.items.meeting import ITEM_STATISTICS_NAME, ItemStatistics
from transrec_hf.publishing.card import write_model_card
from transrec_hf.publishing.checkpoint import load_checkpoint, save_checkpoint
from transrec_hf.publishing.facts import save_evaluation
from transrec_hf.publishing.hub import upload_checkpoint
from transrec_hf.publishing.results import append_results


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def transrec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command: exit code, standard output, standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transrec", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            transrec_cli.main()
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err  # type: ignore[return-value]

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    save_statistics(data_statistics(make_catalogue(), make_split()), folder)
    metrics = {"hit_rate@10": 0.25, "ndcg@10": 0.125}
    report = {"metrics": metrics, "intervals": {"ndcg@10": [0.1, 0.15]}, "protocol": {"num_users": 10}}
    save_evaluation({"reports": {"test": report}}, folder)
    write_model_card(folder)
    return folder


def test_help_is_quick_and_lists_the_verbs() -> None:
    """It imports neither torch nor transformers."""
    code = (
        "import sys, transrec_cli; print('torch' in sys.modules, 'transformers' in sys.modules); transrec_cli.main()"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(transrec_cli.__file__).parent)
    assert done.returncode == 0 and done.stdout.startswith("False False")
    assert done.stdout.count("...") == 1, "what a verb does is cut short in the list"
    assert all(f"\n  {verb}  " in done.stdout for verb in ("push", "card", "info", *transrec_cli.VERBS))


@pytest.mark.parametrize("verb", ["push", "card", "info"])
def test_help_of_a_verb_has_an_example(transrec: Run, verb: str) -> None:
    code, out, _ = transrec(verb, "--help")
    assert code == 0 and f"\n      transrec {verb} runs/my_target" in out, out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("push", "nope", "me/x"), 2),
        (("push", "--nope"), 2),
        (("card", "nope"), 2),
        (("info", "/nope"), 2),
        (("info", "."), 2),
        (("info", "--nope"), 2),
        (("--version",), 0),
        (("info", str(Path(__file__).parent / "checkpoints" / "v0.1.0")), 0),
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments: tuple[str, ...], code: int) -> None:
    lines = (
        "import atexit, sys, transrec_cli",
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules))",
        "transrec_cli.main()",
    )
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(transrec_cli.__file__).parent)
    assert done.returncode == code and done.stdout.endswith("False False\n"), done


def test_a_look_at_a_folder_does_not_import_torch(checkpoint: Path) -> None:
    code = (
        "import atexit, sys, transrec_cli; atexit.register(lambda: print('torch' in sys.modules)); transrec_cli.main()"
    )
    command = [sys.executable, "-c", code, "info", str(checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(transrec_cli.__file__).parent)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done
    assert json.loads(done.stdout.removesuffix("False\n"))["sizes"]["hidden_size"] == 16


def test_version(transrec: Run) -> None:
    assert transrec("--version")[:2] == (0, transrec_hf.__version__ + "\n")
    citation = Path(__file__).parents[1] / "CITATION.cff"
    assert f"\nversion: {transrec_hf.__version__}\n" in citation.read_text()


def test_info_for_people(transrec: Run, checkpoint: Path) -> None:
    code, out, err = transrec("info", checkpoint)
    assert (code, err) == (0, "")
    for line in (
        "modalities     text, image",
        "text tower     bert, not pre-trained",
        "data           unnamed data, 12 items, 10 users",
        "metrics        test targets",
        "ndcg@10      0.1250 [0.1000, 0.1500]",
    ):
        assert line in out, out


def test_info_for_programs(transrec: Run, checkpoint: Path) -> None:
    code, out, _ = transrec("info", checkpoint, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["modalities"] == ["text", "image"]
    assert facts["metrics"] == {"hit_rate@10": 0.25, "ndcg@10": 0.125} and facts["split"] == "test"
    assert facts["parameters"]["total"] == TransRecModel.from_pretrained(checkpoint).num_parameters()
    assert facts["sizes"]["hidden_size"] == 16 and facts["data"]["num_items"] == 12


def test_push_then_info_and_load(transrec: Run, checkpoint: Path, hub: LocalHub) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"a pickle")
    code, out, err = transrec("push", checkpoint, "me/pushed", "--private")
    assert (code, err) == (0, "") and out.strip().endswith("/me/pushed")
    files = hub.files("me/pushed")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "evaluation.json"} <= set(files)
    assert "optimizer.pt" not in files and hub.repos["models/me/pushed"].private
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "pushed" and 'from_pretrained("me/pushed"' in card.text
    code, out, _ = transrec("info", "me/pushed", "--json")
    assert code == 0 and json.loads(out)["metrics"]["ndcg@10"] == 0.125
    assert TransRecModel.from_pretrained("me/pushed").num_parameters() > 0


def test_a_push_with_the_statistics_of_items_is_silent(transrec: Run, checkpoint: Path, hub: LocalHub) -> None:
    ItemStatistics(np.array([f"item-{row}" for row in range(12)]), np.arange(12)).save(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        assert transrec("push", checkpoint, "me/pushed")[::2] == (0, "")
    assert ITEM_STATISTICS_NAME in hub.files("me/pushed")


def test_a_push_that_is_refused_leaves_no_repository(
    transrec: Run, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thin checkpoint whose other weights are in a folder of this machine; and any, without a network."""
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    TransRecModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "thin", thin=True)
    code, _, err = transrec("push", tmp_path / "thin", "me/thin")
    assert code == 2 and err.startswith(f"error: {tmp_path / 'thin'}: a thin checkpoint") and not hub.repos
    assert not (tmp_path / "thin" / "README.md").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = transrec("push", tmp_path / "whole", "me/whole")
    assert (code, err) == (
        2,
        "error: me/whole: nothing can be pushed while HF_HUB_OFFLINE is set: unset it, then push again\n",
    )


def test_a_thin_checkpoint_is_pushed_whole(transrec: Run, tmp_path: Path, hub: LocalHub) -> None:
    """With all that belongs to it."""
    model = make_model()
    save_checkpoint(tmp_path / "whole", model, make_processor())
    save_checkpoint(tmp_path / "thin", model, make_processor())
    TransRecModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "thin", thin=True)
    ItemStatistics(np.array(["a", "b"]), np.array([1, 2])).save(tmp_path / "thin")
    code, _, err = transrec("push", tmp_path / "thin", "me/thin", "--whole")
    assert (code, err) == (0, "")
    assert {"model.safetensors", "processor_config.json", ITEM_STATISTICS_NAME} <= hub.files("me/thin").keys()
    shutil.rmtree(tmp_path / "whole")
    for place in ("me/thin", str(tmp_path / "thin")):
        loaded, _ = load_checkpoint(place)
        assert loaded.config.weights_from is None
        assert_same_weights(loaded, model)


def test_a_checkpoint_of_others_is_not_pushed(transrec: Run, tmp_path: Path, hub: LocalHub) -> None:
    """Not even if it has a card of its own, so that none is made."""
    make_model().item_encoder.text_model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("A card.")
    for options in ([], ["--whole"]):
        code, _, err = transrec("push", tmp_path, "me/tower", *options)
        assert code == 2 and "is a checkpoint of 'bert', not of 'transrec'" in err and not hub.repos


def test_an_adapter_of_a_folder_is_not_pushed(transrec: Run, tmp_path: Path, hub: LocalHub) -> None:
    """Nobody else could load it, and the Hub would show the path of this machine."""
    save_checkpoint(tmp_path / "base", make_model(), make_processor())
    (tmp_path / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    code, _, err = transrec("push", tmp_path / "adapter", "me/adapter")
    assert code == 2 and "works only on this machine: push that folder first" in err and not hub.repos
    hub.create("me/adapter")
    with pytest.raises(DataError, match=r"adapter: an adapter of the folder .* works only on this machine"):
        upload_checkpoint(tmp_path / "adapter", "me/adapter")


@pytest.mark.parametrize("verb", ["info", "evaluate --data demo:target", "recommend --data demo:target --history a"])
def test_what_the_hub_has_not_ends_alike(transrec: Run, hub: LocalHub, verb: str) -> None:
    name, *options = verb.split()
    code, _, err = transrec(name, "me/none", *options)
    assert code == 1 and err.startswith("error: me/none: the Hub at") and "owner/name" in err


def test_push_to_a_branch_keeps_an_edited_card(transrec: Run, checkpoint: Path, hub: LocalHub) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n\n# By hand\n")
    code, _, err = transrec("push", checkpoint, "me/edited", "--revision", "v2", "--message", "Second")
    assert (code, err) == (0, "")
    assert b"# By hand" in hub.files("me/edited", "v2")["README.md"] and "README.md" not in hub.files("me/edited")


def test_card_from_a_table(transrec: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {"run": "a", "seed": 0, "data": "tiny", "machine": "1 CPU", "protocol": "full", "split": "test"}
    report = {"metrics": {"ndcg@10": 0.375}, "intervals": {}, "protocol": {"num_users": 10}}
    append_results("table.csv", {"ours": report, "theirs": report}, **facts)
    options = ("--from-results", "table.csv", "--model", "ours", "--id", "org/ours", "--license", "mit")
    code, out, err = transrec("card", checkpoint, *options, "--output", "cards/ours")
    assert (code, out, err) == (0, "cards/ours/README.md\n", "")
    card = ModelCard(Path("cards/ours/README.md").read_text())
    assert card.data.license == "mit" and card.data.eval_results[0].metric_value == 0.375
    Path("table.csv").write_text(Path("table.csv").read_text().replace("0.375", "0.5"))
    assert transrec("card", "cards/ours", checkpoint)[0] == 0
    assert ModelCard(Path("cards/ours/README.md").read_text()).data.eval_results[0].metric_value == 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("info", "{tmp}/nowhere"), 2, "no such folder"),
        (("info", "{tmp}"), 2, "no config.json"),
        (("info", "me/missing"), 1, "me/missing: the Hub at"),
        (("info", "me/pushed", "--revision", "v9"), 1, "no such revision"),
        (("card", "{tmp}/nowhere"), 2, "no such folder"),
        (("card", "{checkpoint}", "--from-results", "nowhere.csv"), 2, "nowhere.csv: no such file"),
        (("push", "{tmp}/nowhere", "me/new"), 2, "no such folder"),
        (("push", "{checkpoint}", "me/new", "--token", "hf_wrong"), 1, "log in with `hf auth login`"),
        (("push", "{checkpoint}", "not an id"), 1, "not an id"),
    ],
)
def test_errors_are_one_sentence(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    transrec: Run,
    checkpoint: Path,
    tmp_path: Path,
    hub: LocalHub,
) -> None:
    hub.create("me/pushed")
    filled = [part.format(tmp=tmp_path, checkpoint=checkpoint) for part in arguments]
    result = transrec(*filled)
    assert (result[0], result[1]) == (code, "") and message in result[2], result
    assert result[2].startswith("error: ") and result[2].count("\n") == 1
    assert "models/me/new" not in hub.repos


def test_wrong_usage(transrec: Run, checkpoint: Path) -> None:
    assert transrec("fly")[0] == 2
    code, _, err = transrec("card", checkpoint, checkpoint, "--id", "me/one")
    assert code == 2 and "give one PATH" in err


@pytest.mark.parametrize(
    ("given", "parsed"),
    [(["--disable_tqdm"], True), (["--disable_tqdm=no"], False), (["--disable_tqdm", "yes"], True)],
)
def test_a_switch_that_may_be_unset_stands_alone(given: list[str], parsed: bool, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from transrec_hf.commands.parsing import parse_arguments

    (arguments,) = parse_arguments([TrainingArguments], ["--output_dir", str(tmp_path), *given, "--seed", "1"])
    assert arguments.disable_tqdm is parsed and arguments.seed == 1
