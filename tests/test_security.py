"""What files of strangers cannot do: each promise of SECURITY.md about checkpoints, cards and pushes."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from local_hub import LocalHub
from safetensors.torch import load_file
from testing_utils import make_catalogue, make_config, make_model, make_processor, make_tokenizer
from transformers import ViTImageProcessorPil

import transrec_cli
from transrec_hf import DataError, HubError, Recommender, TransRecConfig, TransRecModel, TransRecProcessor
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.items.preparing import ItemSource
from transrec_hf.items.store import prefix_key
from transrec_hf.publishing.card import describe_checkpoint, model_card
from transrec_hf.publishing.checkpoint import load_checkpoint, save_checkpoint
from transrec_hf.publishing.facts import UNKNOWN_LICENCE, read_licence, save_evaluation, towers_of_run
from transrec_hf.publishing.hub import upload_checkpoint
from transrec_hf.publishing.markdown import code, plain, quoted
from transrec_hf.publishing.results import append_results, read_results, without_secrets
from transrec_hf.serving.index import encoder_hash


PICKLE = pickle.dumps(print)
SECRET = "hf_SecretOfTheUser"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, as somebody may have got it from anywhere."""
    save_checkpoint(tmp_path / "theirs", make_model(), make_processor())
    return tmp_path / "theirs"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint without weights, enough for cards."""
    make_config().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def transrec(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["transrec", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        transrec_cli.main()
    return end.value.code or 0  # type: ignore[return-value]


# Code


EVIL = "open({mark!r}, 'w')\nclass Evil: pass\n"


@pytest.mark.parametrize("entry", ["load_checkpoint", "Recommender", "from_towers", "processor"])
@pytest.mark.parametrize("part", ["tokenizer", "image processor"])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(
    folder: Path, entry: str, part: str, tmp_path: Path
) -> None:
    """Not even if somebody has put a "y" on standard input."""
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    if part == "tokenizer":
        file, fields = "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
        change(folder / file, tokenizer_class="EvilTokenizer", **fields)
    else:
        auto_map = {"AutoImageProcessor": "evil.Evil"}
        settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        evil = {**settings, "auto_map": auto_map, "image_processor_type": "EvilProcessor"}
        change(folder / "processor_config.json", image_processor=evil)
        (folder / "preprocessor_config.json").write_text(json.dumps(evil))
    calls = {
        "load_checkpoint": lambda: load_checkpoint(str(folder)),
        "Recommender": lambda: Recommender.from_pretrained(folder, make_catalogue()),
        "from_towers": lambda: TransRecProcessor.from_towers(
            *((str(folder), None) if part == "tokenizer" else (None, str(folder)))
        ),
        "processor": lambda: TransRecProcessor.from_pretrained(folder),
    }
    read, write = os.pipe()
    os.write(write, b"y\n" * 9)
    stdin = os.dup(0)
    os.dup2(read, 0)
    try:
        with (
            pytest.raises((ValueError, OSError), match=r"trust_remote_code=True")
            if part == "tokenizer"
            else _any_end()
        ):
            calls[entry]()
    finally:
        os.dup2(stdin, 0)
        for descriptor in (read, write, stdin):
            os.close(descriptor)
    assert not mark.exists()


class _any_end:
    """A block that may end as it likes, as long as nothing else happens."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> bool:
        return error[0] is None or issubclass(error[0], ValueError | OSError)


def test_code_of_a_tower_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)))
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        TransRecModel.from_text_vision_pretrained(str(tmp_path))
    assert not mark.exists()


KERNELS = ["attn_implementation", "_attn_implementation", "experts_implementation", "_attn_implementation_internal"]


@pytest.mark.parametrize("place", ["model", "tower", "inside of the tower"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", ["evil/kernel", "paged|evil/kernel@main:run", {"text_config": "evil/kernel"}])
def test_an_attention_kernel_of_a_repository_is_refused(folder: Path, place: str, name: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    parts = {"model": config, "tower": config["text_config"]}
    parts["inside of the tower"] = config["text_config"].setdefault("part_config", {})
    parts[place][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="names code of a repository, which is not run"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("name", KERNELS[:3])
def test_an_attention_kernel_of_a_tower_is_refused(tmp_path: Path, name: str) -> None:
    make_model(modalities=["text"]).item_encoder.text_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: "evil/kernel"}))
    with pytest.raises(ValueError, match="names code of a repository, which is not run"):
        TransRecModel.from_text_vision_pretrained(text_model=str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    for load in (load_checkpoint, Recommender.from_pretrained):
        with pytest.raises(DataError, match=rf"pickled \({name}\), and reading a pickle can run code"):
            load(str(folder))


def test_pickled_weights_of_a_tower_are_refused(tmp_path: Path) -> None:
    tower = make_model().item_encoder.text_model
    tower.save_pretrained(tmp_path)
    torch.save(tower.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        TransRecModel.from_text_vision_pretrained(str(tmp_path))


# Weights


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/{tmp}/outside.safetensors", "sub/a.safetensors", "", 3])
def test_an_index_of_weights_stays_in_its_folder(folder: Path, tmp_path: Path, shard: Any) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "other.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    shard = shard.format(tmp=tmp_path) if isinstance(shard, str) else shard
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (load_checkpoint, Recommender.from_pretrained):
        with pytest.raises(DataError, match="names files that are not in its folder"):
            load(str(folder))


def drop_a_layer(weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in weights if "user_encoder.layers.0" in name)]


def add_a_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["user_encoder.more"] = torch.zeros(2)


def another_shape(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if "user_encoder" in name and weights[name].dim() == 2)
    weights[name] = torch.zeros(2, 2)


@pytest.mark.parametrize("fault", [drop_a_layer, add_a_weight, another_shape])
def test_weights_that_do_not_fit_are_refused_everywhere(folder: Path, fault: Any) -> None:
    from safetensors.torch import save_file

    weights = load_file(folder / "model.safetensors")
    fault(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for load in (load_checkpoint, Recommender.from_pretrained):
        with pytest.raises(DataError, match=r"the weights do not fit config\.json"):
            load(str(folder))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    make_model().item_encoder.text_model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="architecture 'bert', not 'transrec'"):
        Recommender.from_pretrained(tmp_path, make_catalogue())


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    model, processor = load_checkpoint(str(folder))
    recommender = Recommender(model, ItemSource(make_catalogue(), processor))
    recommender.item_embeds[3] = float("nan")
    with pytest.raises(DataError, match="scores are not finite"):
        recommender.recommend(["item-1"])
    model.item_encoder.text_projection.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"finite|NaN|nan"):
        Recommender(model, ItemSource(make_catalogue(), processor))


# Sizes


CONFIGS: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**8},
    "width": {"hidden_size": 10**9},
    "no width": {"hidden_size": 0},
    "negative width": {"hidden_size": -16},
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -2},
    "positions": {"max_position_embeddings": 10**12},
    "feed-forward": {"intermediate_size": -1},
    "epsilon": {"layer_norm_eps": -1},
    "no epsilon": {"layer_norm_eps": 0},
    "dropout": {"hidden_dropout_prob": 1.5},
    "dropout of all": {"attention_probs_dropout_prob": 1.0},
    "dropout NaN": {"hidden_dropout_prob": float("nan")},
    "activation": {"hidden_act": "foo"},
    "positives": {"num_positives": 0},
    "negatives": {"num_negatives": -3},
    "format as text": {"format_version": "1"},
    "a later format": {"format_version": 99},
    "dtype": {"dtype": "float9"},
    "a slip": {"num_hiden_layers": 4},
    "tower layers": {"text_config": {"num_hidden_layers": 10**8}},
    "tower width": {"text_config": {"hidden_size": 10**9}},
    "tower vocabulary": {"text_config": {"vocab_size": 10**15}},
    "tower heads": {"text_config": {"num_attention_heads": 0}},
    "tower negative": {"text_config": {"hidden_size": -16}},
    "tower activation": {"text_config": {"hidden_act": "foo"}},
    "image size": {"vision_config": {"image_size": 10**9}},
    "image size that would be allocated": {"vision_config": {"image_size": 10**6}},
    "image sizes": {"vision_config": {"image_size": [10**5, 10**5]}},
    "patches": {"vision_config": {"image_size": 4096, "patch_size": 1}},
    "no patch": {"vision_config": {"patch_size": 0}},
    "unknown tower": {"text_config": {"model_type": "unheard_of"}},
    "tower as text": {"text_config": "bert"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_absurd_settings_are_one_sentence(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    for field, value in CONFIGS[name].items():
        config[field] = {**config[field], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_checkpoint, Recommender.from_pretrained):
        with pytest.raises(DataError) as caught:
            load(str(folder))
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", "{", "[" * 99999, '{"model_type": "transrec", "z": ' + "[" * 99999]
)
def test_a_configuration_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    for look in (load_checkpoint, Recommender.from_pretrained, describe_checkpoint, model_card):
        with pytest.raises(DataError):
            look(str(folder))


def test_large_weights_for_small_files_are_refused_before_memory_is_taken(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 2**24
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="the weights do not fit text_config, which needs at least 268,435,712"):
        load_checkpoint(str(folder))


def test_slips_of_the_pen_are_refused() -> None:
    with pytest.raises(ValueError, match="no setting 'num_hiden_layers': did you mean 'num_hidden_layers'"):
        make_config(num_hiden_layers=4)
    assert TransRecConfig(**make_config().to_dict()).hidden_size == 16


@pytest.mark.parametrize(
    "size", [{"height": 60000, "width": 60000}, {"shortest_edge": 60000}, {"height": 0, "width": 9}]
)
def test_an_image_processor_that_fills_the_memory_is_refused(tmp_path: Path, size: dict[str, int]) -> None:
    processor = TransRecProcessor(make_tokenizer(), ViTImageProcessorPil(size=size), 16)
    with pytest.raises(DataError, match="image processor: size makes images of"):
        Recommender(make_model(), ItemSource(make_catalogue(), processor))
    save_checkpoint(tmp_path, make_model(), processor)
    with pytest.raises(DataError, match="image processor: size makes images of"):
        load_checkpoint(str(tmp_path))


def test_a_giant_text_is_read_as_far_as_it_is_used() -> None:
    processor = make_processor(["text"])
    whole = "red hat blue sock " * 300_000
    texts = [whole, "old shoe"] * 3
    tokens = processor.tokenize(texts)
    assert tokens[0] == processor.tokenize([whole[:1000]])[0] and len(tokens[0]) == 16
    assert tokens[1] == processor.tokenize(["old shoe"])[0] and len(tokens) == 6


# What is pushed


def test_only_what_belongs_to_a_checkpoint_is_pushed(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    """No link out of the folder, no hidden file, no pickle under another name, nothing of an unknown kind."""
    (tmp_path / "id_rsa").write_text("SECRET")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "notes.md").write_text("SECRET")
    links = {"notes.txt": tmp_path / "id_rsa", "photos": tmp_path / "private", "passwd.json": Path("/etc/passwd")}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "again.json").symlink_to("config.json")  # stays in the folder
    for name in (".env", "sub/.env", "sub/deep/.secret", "_notes.md", "checkpoint-3/config.json", "sub/.git/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("TOKEN")
    pickles = ("x.PT", "x.pth.tar", "x.joblib", "sub/.metadata", "x.txt", "x.json", "x.safetensors", "x.model", "x.md")
    for name in (*pickles, "x", "x.png", "events.out.tfevents.1", "x.parquet", "x.npy", "x.exe"):
        (folder / name).write_bytes(PICKLE)
    (folder / "old.txt").write_bytes(pickle.dumps(print, protocol=0))  # text, and a pickle as well
    (folder / "LICENSE").write_text("MIT")
    ItemStatistics(np.array(["a"]), np.array([1])).save(folder)
    (folder / "sub" / "extra.json").write_text("{}")
    os.mkfifo(folder / "pipe.json")
    hub.create("me/x")
    upload_checkpoint(folder, "me/x")
    pushed = hub.files("me/x")
    assert not {"SECRET", "TOKEN", "root:"} & {content.decode(errors="ignore")[:5] for content in pushed.values()}
    assert PICKLE not in pushed.values()
    ours = {"config.json", "model.safetensors", "item_statistics.parquet", "LICENSE", "again.json", "sub/extra.json"}
    assert ours <= pushed.keys()
    assert not {"old.txt", "pipe.json", *links, "x", "x.md"} & pushed.keys()
    assert not [name for name in pushed if re.search(r"(^|/)[._](?!gitattributes)|checkpoint-", name)]


def test_a_checkpoint_whose_configuration_is_a_link_is_not_pushed(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    hub.create("me/x")
    with pytest.raises(DataError, match=r"config\.json cannot be pushed: it is a link out of the folder"):
        upload_checkpoint(folder, "me/x")
    assert "config.json" not in hub.files("me/x")


# Cards


TEXTS = (
    "shop\n\n# Verified by Hugging Face",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![pixel](https://evil.example/p.png)",
    "https://evil.example",
    "www.evil.example",
    "write to me@evil.example",
    "a | b | c",
    "`code` **bold** ~~gone~~ $x$",
    "a\r\n---\r\nlicense: mit",
    "{{ 7 * 7 }} {% raw %}",
    "\u202eevil\u200b",
    "```\nrun me\n```",
    "x" * 10_000,
)


def visible(card: str) -> str:
    """The card without what is inert: code between backticks, and the metadata."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", card.split("\n---\n", 1)[1], flags=re.DOTALL)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_a_stranger_says_of_himself_stays_text(small: Path, text: str) -> None:
    report = {
        "metrics": {"ndcg@10": 0.5, text: 0.1},
        "intervals": {},
        "interval": text,
        "protocol": {"name": text},
        "baselines": {text: {"metrics": {"ndcg@10": 0.1}, "intervals": {}}},
        "slices": {text: {text: {"num_users": 3, "ndcg@10": 0.1}, "b": {"num_users": 3, "ndcg@10": 0.1}}},
    }
    tower = {"modality": "text", "architecture": text, "name": text, "on_hub": True, "licence": text}
    evaluation = {
        "data": text,
        "reports": {text: report},
        "towers": [tower],
        "finetuned_from": {"name": text, "on_hub": False},
        "run": {
            "device": text,
            "command": text,
            "date": text,
            "commit": text,
            "versions": {text: text},
            "seeds": [text],
        },
        "arguments": {text: text},
        "metadata": {"model_id": text, "license": text, "tags": [text], "language": text},
        "results": {"file": text, "run": text, "model": text, "split": text},
    }
    save_evaluation(evaluation, small)
    card = str(model_card(small))
    honest = str(
        model_card(
            small, changes={"evaluation.json": json.loads(json.dumps(evaluation).replace(json.dumps(text)[1:-1], "x"))}
        )
    )
    shown = visible(card)
    for pattern in (r"^#+ ", r"^---", r"^\|.*\|$", "```"):  # headings, rules, rows of tables, blocks of code
        ours = re.findall(pattern, card.split("\n---\n", 1)[1], flags=re.MULTILINE)
        assert len(ours) == len(re.findall(pattern, honest.split("\n---\n", 1)[1], flags=re.MULTILINE)), pattern
    assert not re.search(
        r"<(?!!--)[a-z/]|(?<!\\)\]\(https?://evil|(?<!\()https?://evil|www\.evil|me@evil", shown, re.IGNORECASE
    )
    assert "49" not in shown or "49" in visible(honest)
    assert not re.search(r"[\u202e\u200b]", card.split("\n---\n", 1)[1])
    parsed = ModelCard(card)
    assert parsed.data.license == text and parsed.data.tags[-1] == text, "the metadata say what was said, as text"
    assert len(card) < 200_000


def test_text_code_and_strings() -> None:
    assert plain("H&M <b>") == "H&amp;M &lt;b&gt;" and plain("ndcg@10 of my_data") == "ndcg@10 of my_data"
    assert plain("1. one") == "1\\. one" and plain("0.1.0") == "0.1.0" and plain("- x") == "\\- x"
    assert code("a`b\n|") == "`a'b \\|`" and quoted('x", "y') == '"x, y"'


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"reports": "x"}'),
        ("evaluation.json", '{"reports": {"test": 3}}'),
        ("evaluation.json", '{"reports": {"test": {"metrics": {"ndcg@10": "x"}, "protocol": {}}}}'),
        ("evaluation.json", '{"reports": {"test": {"protocol": {"mask_history": []}}}}'),
        ("evaluation.json", '{"towers": [{}]}'),
        ("evaluation.json", '{"towers": "bert"}'),
        ("evaluation.json", '{"finetuned_from": {"name": 3, "on_hub": true}}'),
        ("evaluation.json", '{"metadata": [1]}'),
        ("evaluation.json", '{"run": {"seconds": "x"}}'),
        ("evaluation.json", "[" * 99999),
        ("evaluation.json", "\udce9"),
        ("data_statistics.json", '{"num_items": 3}'),
        ("data_statistics.json", '{"num_items": "<b>"}'),
        ("data_statistics.json", "null"),
        ("training_args.json", "[3]"),
        ("adapter_config.json", "[" * 99999),
    ],
)
def test_small_files_of_another_shape_are_one_sentence(small: Path, file: str, text: str) -> None:
    (small / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        model_card(small)
    assert "\n" not in str(caught.value) and str(small) in str(caught.value)


def test_a_card_is_not_written_through_a_link(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "authorized_keys"
    target.write_text("mine\n")
    for name in ("README.md", "evaluation.json"):
        (small / name).unlink(missing_ok=True)
        (small / name).symlink_to(target if name == "README.md" else tmp_path / "nothing")
    assert transrec(monkeypatch, "card", small) == 0
    assert target.read_text() == "mine\n" and not (tmp_path / "nothing").exists()
    assert "Not evaluated yet" in (small / "README.md").read_text()


def test_nobody_is_asked_and_no_other_folder_read_for_a_local_checkpoint(
    small: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Not the Hub for towers that a configuration names, nor the README of a folder that it names."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "README.md").write_text("---\nlicense: PRIVATE\n---\n")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["_name_or_path"] = str(tmp_path / "private")
    config["vision_config"]["_name_or_path"] = "org/asked"
    (small / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("PRIVATE")
    results = {"file": str(tmp_path / "table.csv"), "run": "a", "model": "b", "split": "test"}
    save_evaluation({"results": results}, small)
    hub.log.clear()
    assert transrec(monkeypatch, "info", small) == 0 and transrec(monkeypatch, "card", small) == 0
    assert "PRIVATE" not in capsys.readouterr().out + (small / "README.md").read_text()
    assert hub.log == []
    make_model(TransRecConfig.from_pretrained(small)).save_pretrained(small)
    model = TransRecModel.from_pretrained(small)  # fine-tuning it does not read them either
    assert [tower["licence"] for tower in towers_of_run(model.config)] == [UNKNOWN_LICENCE] * 2
    (small / "config.json").rename(tmp_path / "config.json")
    (small / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    with pytest.raises(DataError):
        describe_checkpoint(small)
    assert hub.log == []


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "matter", [BOMB + "license: *i\n", "license: [" * 5000, "license: !!python/object:os.system x"]
)
def test_a_bomb_in_the_card_of_a_tower_is_not_read(tmp_path: Path, matter: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\n")
    assert read_licence(str(tmp_path)) == UNKNOWN_LICENCE


def test_a_long_licence_is_cut(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {'x' * 9999}\n---\n")
    assert len(read_licence(str(tmp_path))) == 100


# Secrets


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (f"transrec pretrain --hub_token {SECRET} --seed 1", "transrec pretrain --hub_token *** --seed 1"),
        (f"python run.py --hub_token={SECRET}", "python run.py '--hub_token=***'"),
        (f"transrec push a b --token {SECRET}", "transrec push a b --token ***"),
        ("run --api-key abc --password x --client_secret y", "run --api-key *** --password *** --client_secret ***"),
        (f"run --note {SECRET}", "run --note ***"),
        ("run https://me:word@host/data", "run 'https://***@host/data'"),
        ("run --max_tokens 5 --seed 1", "run --max_tokens 5 --seed 1"),
        ("run 'unbalanced", "run 'unbalanced"),
    ],
)
def test_secrets_of_a_command_line_are_hidden(command: str, shown: str, tmp_path: Path) -> None:
    assert without_secrets(command).replace("'", "") == shown.replace("'", "")
    report = {"metrics": {"ndcg@10": 0.5}, "intervals": {}, "protocol": {"num_users": 3}}
    facts = {"run": "a", "seed": 0, "data": "d", "machine": "m", "protocol": "full", "split": "test"}
    append_results(tmp_path / "table.csv", {"ours": report}, command=command, **facts)
    for path in tmp_path.iterdir():
        assert SECRET not in path.read_text()
    text = (tmp_path / "table.csv").read_text()
    (tmp_path / "old.csv").write_text(text.replace("***", SECRET))  # by a version that wrote it
    assert SECRET not in json.dumps(read_results(tmp_path / "old.csv")["run"])


def test_a_token_is_in_no_file_of_a_run(tmp_path: Path) -> None:
    from testing_utils import make_trainer

    options = {"hub_token": SECRET, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "run", make_config("", num_items=12), **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if SECRET.encode() in path.read_bytes()]


# Keys of stores and indexes


@pytest.mark.parametrize("setting", [{"layer_norm_eps": 0.1}, {"hidden_act": "relu"}])
def test_an_index_and_a_store_know_the_settings_of_the_towers(folder: Path, setting: dict[str, Any]) -> None:
    model, processor = load_checkpoint(str(folder))
    Recommender(model, ItemSource(make_catalogue(), processor)).save_pretrained(folder)
    keys = [encoder_hash(model, processor), key_of(model)]
    assert Recommender.from_pretrained(folder), "the settings of a loaded model are those of the saved one"
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= setting
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="no item index of this model"):
        Recommender.from_pretrained(folder)
    changed, _ = load_checkpoint(str(folder))
    assert all(new != old for new, old in zip([encoder_hash(changed, processor), key_of(changed)], keys, strict=True))


def test_settings_of_training_do_not_make_an_index_stale(folder: Path) -> None:
    model, processor = load_checkpoint(str(folder))
    before = [encoder_hash(model, processor), key_of(model)]
    model.item_encoder.text_model.config.hidden_dropout_prob = 0.4
    model.item_encoder.text_model.config._name_or_path = "elsewhere"
    assert [encoder_hash(model, processor), key_of(model)] == before


def test_an_index_and_a_store_know_the_adapter_in_use(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model, processor = load_checkpoint(str(folder))
    for name in ("a", "b"):
        model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2, lora_alpha=3), adapter_name=name)
    keys = set()
    for name in ("a", "b"):
        model.set_adapter(name)
        keys |= {encoder_hash(model, processor), key_of(model)}
    model.disable_adapters()
    keys |= {encoder_hash(model, processor), key_of(model)}
    assert len(keys) == 6


def key_of(model: TransRecModel) -> str:
    return prefix_key(model.item_encoder.text_model, 1, None, "", torch.float32)


# Requests


@pytest.mark.parametrize("top_k", [-1, 0, None, 2.5, "3", True])
def test_how_many_is_a_positive_number(folder: Path, top_k: Any) -> None:
    recommender = Recommender.from_pretrained(folder, make_catalogue())
    with pytest.raises(DataError, match="k must be a whole number"):
        recommender.recommend(["item-1"], top_k)


@pytest.mark.parametrize("with_catalogue", [True, False])
@pytest.mark.parametrize("history", ["item-1", [["item-1"], "item-1"], [None], [1.5], [[]]])
def test_a_history_is_a_list_of_ids(folder: Path, history: Any, with_catalogue: bool) -> None:
    Recommender.from_pretrained(folder, make_catalogue()).save_pretrained(folder)
    recommender = Recommender.from_pretrained(folder, make_catalogue() if with_catalogue else None)
    with pytest.raises(DataError):
        recommender.recommend(history)
    assert recommender.recommend(iter(["item-1"]), 3) == recommender.recommend(("item-1",), 3)


def test_many_users_are_scored_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transrec_hf.serving import recommender as module
    from transrec_hf.serving import search

    recommender = Recommender.from_pretrained(folder, make_catalogue())
    histories = [[f"item-{row % 12}"] for row in range(30)]
    whole = recommender.recommend(histories, 3)
    monkeypatch.setattr(search, "SCORES", 12 * 7)
    monkeypatch.setattr(module, "USERS", 10)
    for parts in (recommender.recommend(histories, 3), recommender.recommend_batch(histories, 3)):
        assert [[item.item_id for item in user] for user in parts] == [
            [item.item_id for item in user] for user in whole
        ]


def test_a_terminal_that_cannot_show_a_character(folder: Path, tmp_path: Path) -> None:
    items, log = "item_id,text\n", "user_id,item_id,timestamp\n"
    items += "".join(f"i{row},日本 red {row}\n" for row in range(9))
    log += "".join(f"u,i{row},{row}\n" for row in range(5))
    (tmp_path / "items.csv").write_text(items, encoding="utf-8")
    (tmp_path / "interactions.csv").write_text(log)
    save_checkpoint(folder, make_model(modalities=["text"]), make_processor(["text"]))
    command = [
        sys.executable,
        transrec_cli.__file__,
        "recommend",
        "--checkpoint",
        str(folder),
        "--data",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"??" in done.stdout


ROOT = Path(__file__).parents[1]


def rows_of_tables(file: str) -> list[str]:
    """The rows of all tables of a page, without their headers."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and not line.startswith(("|---", "| promise", "| kind"))]


@pytest.mark.parametrize("file", ["SECURITY.md", "docs/trust.md"])
def test_the_promises_name_their_tests(file: str) -> None:
    """Each row has a test, and each test that is named is there."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert len(rows_of_tables(file)) > 15 and all("`test_" in row for row in rows_of_tables(file))
    named = re.findall(r"`(test_\w+)`", (ROOT / file).read_text(encoding="utf-8"))
    assert not {name for name in named if f"def {name}(" not in tests}


def test_as_many_inputs_are_tried_as_it_says(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword:
        pytest.skip("a part of the tests")
    collected = Counter(getattr(item, "originalname", "") for item in request.session.items)
    total = 0
    for row in rows_of_tables("docs/trust.md"):
        names = re.findall(r"`(test_\w+)`", row)
        said = int(re.findall(r"\d+", row.split("|")[3])[0])
        is_of_stops = "kills" in row.split("|")[3]
        if all(collected[name] for name in names) and not is_of_stops:
            assert sum(collected[name] for name in names) >= said, row
        total += said
    assert total > 1000


def test_errors_of_the_hub_stay_those_of_the_hub(hub: LocalHub) -> None:
    with pytest.raises(HubError, match="has no such repository"):
        Recommender.from_pretrained("me/nothing", make_catalogue())
    assert issubclass(HubError, OSError)
