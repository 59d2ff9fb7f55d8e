"""Pushing to and loading from a Hub, and what can go wrong on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from huggingface_hub import HfApi, create_branch, create_tag, model_info
from huggingface_hub.errors import GatedRepoError
from local_hub import READ_TOKEN, LocalHub, cut_answer, hang_up, refuse
from safetensors import safe_open
from safetensors.torch import load
from testing_utils import assert_same_weights, make_catalogue, make_model, make_processor, make_split
from transformers import AutoConfig, AutoModel, AutoProcessor

from transrec_hf import (
    DataError,
    HubError,
    ItemSource,
    Recommender,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
)
from transrec_hf.data.statistics import data_statistics, load_statistics, save_statistics
from transrec_hf.errors import explain, hub_errors
from transrec_hf.model.configuration_transrec import FORMAT_VERSION
from transrec_hf.publishing.hub import PICKLES, upload_checkpoint
from transrec_hf.serving import building


ID = "me/tiny"
HISTORY = ["item-3", "item-7"]
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh cache for each test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recommender(hub: LocalHub) -> Recommender:
    return Recommender(make_model(), ItemSource(make_catalogue(), make_processor()))


@pytest.fixture
def pushed(hub: LocalHub, tmp_path: Path) -> TransRecModel:
    """A model in the repository `me/tiny` with its processor and the statistics of its data."""
    model = make_model()
    model.save_pretrained(tmp_path / "checkpoint")
    make_processor().save_pretrained(tmp_path / "checkpoint")
    save_statistics(data_statistics(make_catalogue(), make_split()), tmp_path / "checkpoint")
    hub.create(ID)
    upload_checkpoint(tmp_path / "checkpoint", ID)
    hub.log.clear()
    return model


def test_the_tower_of_a_model_from_the_hub_reads_no_folder_of_this_machine(hub: LocalHub, tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "secret").mkdir()
    model.item_encoder.text_model.config._name_or_path = str(tmp_path / "secret")
    model.save_pretrained(tmp_path / "checkpoint")
    hub.create(ID)
    upload_checkpoint(tmp_path / "checkpoint", ID)
    new = TransRecModel.from_text_vision_pretrained(text_model=ID)
    torch.testing.assert_close(new.item_encoder.text_model.state_dict(), model.item_encoder.text_model.state_dict())
    assert new.item_encoder.text_model.config._name_or_path == ID
    assert new.original_towers() == {}  # those of the Hub are the same


def recommended(recommender: Recommender) -> dict[str, float]:
    """The best items and their scores, best first; the order of the sums in a dot product is not ours to fix."""
    return {item.item_id: round(item.score, 4) for item in recommender.recommend(HISTORY, k=5)}


def downloaded(cache: Path) -> Iterator[Path]:
    return (path for path in cache.rglob("blobs/*") if path.is_file())


def weights_of(hub: LocalHub) -> bytes:
    return hub.files(ID)[WEIGHTS]


# A repository


def test_one_repository_holds_all(hub: LocalHub, pushed: TransRecModel) -> None:
    files = hub.files(ID)
    assert {"config.json", WEIGHTS, "processor_config.json", "tokenizer.json", "data_statistics.json"} <= files.keys()
    assert json.loads(files["config.json"])["format_version"] == 1
    assert_same_weights(TransRecModel.from_pretrained(ID), pushed)
    assert_same_weights(AutoModel.from_pretrained(ID), pushed)
    assert AutoConfig.from_pretrained(ID).to_dict()["text_config"] == pushed.config.to_dict()["text_config"]
    for auto_class in (AutoProcessor, TransRecProcessor):
        loaded = auto_class.from_pretrained(ID)
        assert type(loaded) is TransRecProcessor
        assert [loaded.fingerprint(m) for m in ("text", "image")] == [
            make_processor().fingerprint(m) for m in ("text", "image")
        ]
    assert load_statistics(ID) == data_statistics(make_catalogue(), make_split())


@pytest.mark.parametrize("modalities", ["text", "image"])
def test_each_part_pushes_itself(hub: LocalHub, modalities: str) -> None:
    model, processor = make_model(modalities=[modalities]), make_processor([modalities])
    model.push_to_hub(ID, private=True, commit_message="Weights")
    processor.push_to_hub(ID)
    assert hub.repos[f"models/{ID}"].private
    assert_same_weights(TransRecModel.from_pretrained(ID), model)
    assert AutoProcessor.from_pretrained(ID).modalities == [modalities]
    uploads = [path for method, path in hub.log if method == "PUT"]
    assert len(uploads) == 1 and uploads[0].startswith("/lfs/"), "the weights, and nothing else, go by LFS"


def test_large_weights_are_sharded(hub: LocalHub) -> None:
    model = make_model()
    model.push_to_hub(ID, max_shard_size="40KB")
    shards = [name for name in hub.files(ID) if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors.index.json" in hub.files(ID)
    assert_same_weights(TransRecModel.from_pretrained(ID), model)


def test_revisions(hub: LocalHub) -> None:
    first, second, third = (make_model(seed=seed) for seed in range(3))
    commit = first.push_to_hub(ID).rsplit("/", 1)[1]
    create_tag(ID, tag="v1")
    create_branch(ID, branch="dev")
    second.push_to_hub(ID)
    third.push_to_hub(ID, revision="dev")
    found = {name: TransRecModel.from_pretrained(ID, revision=name) for name in (commit, "v1", "main", "dev")}
    for name, model in {commit: first, "v1": first, "main": second, "dev": third}.items():
        assert_same_weights(found[name], model)
    pull_request = first.push_to_hub(ID, create_pr=True)
    assert pull_request and "refs/pr/1" in hub.repos[f"models/{ID}"].branches
    assert_same_weights(TransRecModel.from_pretrained(ID), second)


def test_a_subfolder(hub: LocalHub, recommender: Recommender, tmp_path: Path) -> None:
    recommender.save_pretrained(tmp_path / "checkpoint")
    hub.create(ID)
    upload_checkpoint(tmp_path / "checkpoint", ID, path_in_repo="deep/tiny")
    place = {"subfolder": "deep/tiny"}
    assert_same_weights(TransRecModel.from_pretrained(ID, **place), recommender.model)
    assert_same_weights(AutoModel.from_pretrained(ID, **place), recommender.model)
    assert AutoProcessor.from_pretrained(ID, **place).modalities == ["text", "image"]
    assert recommended(Recommender.from_pretrained(ID, **place)) == recommended(recommender)


def test_private_needs_a_token(hub: LocalHub, recommender: Recommender) -> None:
    recommender.push_to_hub(ID, private=True)
    with pytest.raises(HubError, match=r"no such repository, or it is private: check the id, .*, or log in"):
        Recommender.from_pretrained(ID, token=False)
    assert recommended(Recommender.from_pretrained(ID, token=READ_TOKEN)) == recommended(recommender)


def test_cache_and_no_network(hub: LocalHub, recommender: Recommender, tmp_path: Path) -> None:
    recommender.push_to_hub(ID)
    place = {"cache_dir": tmp_path / "elsewhere"}
    with pytest.raises(HubError, match="not in the cache, and the Hub was not asked"):
        Recommender.from_pretrained(ID, local_files_only=True, **place)
    Recommender.from_pretrained(ID, **place)
    hub.log.clear()
    assert recommended(Recommender.from_pretrained(ID, local_files_only=True, **place)) == recommended(recommender)
    assert hub.log == []
    assert not list(downloaded(tmp_path / "cache"))

    # in another process, which is told by its environment, and has nobody at the other end
    script = f"""
import sys
from transrec_hf import Recommender
from transrec_hf.errors import HubError
for cache in sys.argv[1:]:
    try:
        found = Recommender.from_pretrained({ID!r}, cache_dir=cache).recommend({HISTORY!r}, k=5)
        print({{item.item_id: round(item.score, 4) for item in found}})
    except HubError as error:
        print(error)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(place["cache_dir"]), str(tmp_path / "empty")]
    process = subprocess.run(command, env={**os.environ, **offline}, stdout=subprocess.PIPE, text=True, check=True)
    found, error = process.stdout.splitlines()[-2:]
    assert eval(found) == recommended(recommender)
    assert error.startswith(f"{ID}: not in the cache, and the Hub was not asked")


def test_no_network(hub: LocalHub) -> None:
    hub.fail("GET", "", hang_up, times=100)
    with pytest.raises(HubError, match=f"^{ID}: the Hub at {hub.endpoint} cannot be reached or broke off"):
        Recommender.from_pretrained(ID)
    assert len(hub.log) == 1, "it is found out at once"


# The item index


def test_recommending_from_the_index_needs_no_encoding(
    hub: LocalHub, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender.push_to_hub(ID)
    monkeypatch.delattr(building, "encode_catalogue")
    found = Recommender.from_pretrained(ID)
    assert recommended(found) == recommended(recommender)
    assert all(item.text is None for item in found.recommend(HISTORY))
    with_items = Recommender.from_pretrained(ID, make_catalogue())
    assert recommended(with_items) == recommended(recommender)
    assert [item.text for item in with_items.recommend(HISTORY)] == [
        item.text for item in recommender.recommend(HISTORY)
    ]
    with pytest.raises(DataError, match=r"unknown item ids: .'nothing'"):
        found.recommend(["item-3", "nothing"])


def test_index_files(hub: LocalHub, recommender: Recommender, tmp_path: Path) -> None:
    recommender.save_pretrained(tmp_path)
    with safe_open(tmp_path / "item_index.safetensors", "pt") as file:
        with pa.ipc.open_stream(file.get_tensor("items").numpy()) as reader:
            assert reader.read_all()["item_id"].to_pylist() == make_catalogue().item_ids.tolist()
        assert torch.equal(file.get_tensor("item_embeds"), recommender.item_embeds)
        assert "columns" not in file.keys(), "what is pushed holds no texts unless that is asked for"
        assert file.metadata()["format"] == "3"


def other_weights(model: TransRecModel) -> None:
    model.item_encoder.text_projection.bias.data[0] += 1e-3


def another_dtype(model: TransRecModel) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [other_weights, another_dtype])
def test_index_of_another_model_is_not_used(
    recommender: Recommender, tmp_path: Path, change: Callable[[TransRecModel], None]
) -> None:
    recommender.save_pretrained(tmp_path)
    change(recommender.model)
    recommender.model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="give the catalogue, so that it is encoded"):
        Recommender.from_pretrained(tmp_path)
    model = TransRecModel.from_pretrained(tmp_path)
    fresh = Recommender(model, ItemSource(make_catalogue(), make_processor()))
    assert recommended(Recommender.from_pretrained(tmp_path, make_catalogue())) == recommended(fresh)


def test_user_encoder_does_not_make_the_index_stale(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender.save_pretrained(tmp_path)
    recommender.model.user_encoder.final_norm.weight.data.mul_(0.5)
    recommender.model.save_pretrained(tmp_path)
    monkeypatch.delattr(building, "encode_catalogue")
    assert recommended(Recommender.from_pretrained(tmp_path)) == recommended(recommender)


def test_index_of_another_preprocessing_is_not_used(recommender: Recommender, tmp_path: Path) -> None:
    recommender.save_pretrained(tmp_path)
    processor = make_processor()
    processor.max_text_length = 3
    processor.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no item index of this model"):
        Recommender.from_pretrained(tmp_path)


def test_an_index_of_another_order_is_put_in_order(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender.save_pretrained(tmp_path)
    other = make_catalogue().select([*range(11, -1, -1)])
    monkeypatch.delattr(building, "encode_catalogue")
    found = Recommender.from_pretrained(tmp_path, other)
    assert recommended(found) == recommended(recommender)
    assert found.item_ids.tolist() == other.item_ids.tolist()
    assert torch.equal(found.item_embeds, recommender.item_embeds.flip(0))


def test_a_checkpoint_without_an_index_needs_the_items(pushed: TransRecModel) -> None:
    with pytest.raises(DataError, match="give the catalogue"):
        Recommender.from_pretrained(ID)
    assert Recommender.from_pretrained(ID, make_catalogue()).recommend(HISTORY)


def test_index_of_the_id_baseline(hub: LocalHub) -> None:
    recommender = Recommender(make_model(modalities=(), num_items=12), ItemSource(make_catalogue()))
    recommender.push_to_hub(ID)
    assert recommended(Recommender.from_pretrained(ID)) == recommended(recommender)


# Training


def train(output_dir: Path, **options: Any) -> TransRecTrainer:
    args = TransRecTrainingArguments(
        str(output_dir),
        num_train_epochs=3,
        per_device_train_batch_size=5,
        use_cpu=True,
        push_to_hub=True,
        **{"hub_model_id": ID, **options},
    )
    trainer = TransRecTrainer(
        make_model(), args, catalogue=make_catalogue(), split=make_split(), processing_class=make_processor()
    )
    trainer.train()
    return trainer


def test_trainer_pushes_while_and_after_it_trains(hub: LocalHub, tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", hub_always_push=True, hub_private_repo=True)
    trainer.push_to_hub()
    repo = hub.repos[f"models/{ID}"]
    assert repo.private
    assert len(repo.commits) >= 4, "one per epoch, and the last"
    every_file = {name for files in repo.commits.values() for name in files}
    assert not [name for name in every_file if name.endswith(tuple(pattern[1:] for pattern in PICKLES))]
    assert not [name for name in every_file if name.startswith(("checkpoint-", "trainer_state"))]
    assert {WEIGHTS, "processor_config.json", "data_statistics.json", "training_args.json"} <= repo.files().keys()
    assert "hf_" not in repo.files()["training_args.json"].decode(), "no token travels along"
    assert_same_weights(TransRecModel.from_pretrained(ID), trainer.model)
    assert load_statistics(ID)["num_items"] == 12
    # whatever the moment, a stranger gets a whole model
    for commit, files in repo.commits.items():
        if WEIGHTS in files:
            TransRecModel.from_pretrained(ID, revision=commit)


def test_trainer_pushes_at_the_end_only(hub: LocalHub, tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", hub_strategy="end")
    assert WEIGHTS not in hub.files(ID)
    trainer.push_to_hub()
    assert_same_weights(TransRecModel.from_pretrained(ID), trainer.model)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_push_pickles_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as a pickle: use 'every_save' or 'end'"):
        TransRecTrainingArguments(str(tmp_path), push_to_hub=True, hub_strategy=strategy, use_cpu=True)


def test_pickles_and_hidden_files_stay_behind(hub: LocalHub, tmp_path: Path) -> None:
    for name in ("config.json", "optimizer.pt", "training_args.bin", ".env", "_notes", "checkpoint-3/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    hub.create(ID)
    upload_checkpoint(tmp_path, ID)
    assert hub.files(ID).keys() == {".gitattributes", "config.json"}


# What goes wrong


def test_interrupted_upload_and_retry(hub: LocalHub, pushed: TransRecModel, tmp_path: Path) -> None:
    before, improved = hub.files(ID), make_model(seed=1)
    hub.fail("POST", "/commit/", hang_up)
    with (
        pytest.raises(HubError, match="cannot be reached or broke off: check the network, then try again"),
        hub_errors(ID),
    ):
        improved.push_to_hub(ID)
    assert hub.files(ID) == before, "a commit is whole or not there"
    assert_same_weights(TransRecModel.from_pretrained(ID), pushed)
    hub.log.clear()
    improved.push_to_hub(ID)
    assert "PUT" not in {method for method, _ in hub.log}, "what arrived the first time is not sent again"
    assert_same_weights(TransRecModel.from_pretrained(ID), improved)


def test_upload_of_weights_is_retried_by_itself(hub: LocalHub) -> None:
    model = make_model()
    hub.fail("PUT", "/lfs/", hang_up)
    model.push_to_hub(ID)
    assert [method for method, _ in hub.log].count("PUT") == 2
    assert_same_weights(TransRecModel.from_pretrained(ID), model)


def test_interrupted_download_is_resumed(hub: LocalHub, pushed: TransRecModel) -> None:
    hub.fail("GET", "/lfs/", cut_answer)
    assert_same_weights(TransRecModel.from_pretrained(ID), pushed)
    assert [method for method, path in hub.log if path.startswith("/lfs/")] == ["GET", "GET"]


def test_failed_download_leaves_nothing(hub: LocalHub, pushed: TransRecModel, tmp_path: Path) -> None:
    hub.fail("GET", "/lfs/", cut_answer)
    hub.fail("GET", "/lfs/", refuse(500))
    with pytest.raises(HubError, match=r"overloaded or out of order \(HTTP 500\): try again later"), hub_errors(ID):
        TransRecModel.from_pretrained(ID)
    assert all(b"model_type" in path.read_bytes() for path in downloaded(tmp_path / "cache")), "only config.json"
    assert_same_weights(TransRecModel.from_pretrained(ID), pushed)


def test_files_of_one_commit_whatever_is_pushed_meanwhile(hub: LocalHub, pushed: TransRecModel) -> None:
    other = make_model(seed=1, num_hidden_layers=1)
    changes = {WEIGHTS: b"", "config.json": other.config.to_json_string().encode(), "tokenizer.json": b"{}"}

    def push_another(handler: Any) -> bool:
        hub.repos[f"models/{ID}"].commit(changes)
        return False

    hub.fail("HEAD", WEIGHTS, push_another)
    recommender = Recommender.from_pretrained(ID, make_catalogue())
    assert hub.files(ID)[WEIGHTS] == b"", "it was pushed"
    assert_same_weights(recommender.model, pushed)
    assert recommender.processor is not None
    assert recommender.processor.fingerprint("text") == make_processor().fingerprint("text")


def test_weights_cut_in_half(hub: LocalHub, pushed: TransRecModel, tmp_path: Path) -> None:
    whole = weights_of(hub)
    hub.repos[f"models/{ID}"].commit({WEIGHTS: whole[: len(whole) // 2]})
    with pytest.raises(HubError, match=f"^{ID}: a weight file is damaged or cut off .*upload it again$"):
        Recommender.from_pretrained(ID, make_catalogue())
    hub.repos[f"models/{ID}"].commit({WEIGHTS: whole})
    assert_same_weights(TransRecModel.from_pretrained(ID), pushed)

    blob = next(path for path in downloaded(tmp_path / "cache") if path.read_bytes() == whole)
    blob.write_bytes(whole[: len(whole) // 2])  # a full disk, say
    with pytest.raises(HubError, match="download it again with force_download=True"):
        Recommender.from_pretrained(ID, make_catalogue())
    assert_same_weights(TransRecModel.from_pretrained(ID, force_download=True), pushed)


def test_index_cut_in_half(recommender: Recommender, tmp_path: Path) -> None:
    recommender.save_pretrained(tmp_path)
    path = tmp_path / "item_index.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(HubError, match="a weight file is damaged or cut off"):
        Recommender.from_pretrained(tmp_path)


def test_config_of_the_future(hub: LocalHub, pushed: TransRecModel, tmp_path: Path) -> None:
    config = json.loads(hub.files(ID)["config.json"])
    future = {**config, "format_version": FORMAT_VERSION + 1, "objective": "telepathy", "hidden_size": "large"}
    hub.repos[f"models/{ID}"].commit({"config.json": json.dumps(future).encode()})
    for load_it in (TransRecModel.from_pretrained, AutoModel.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(
            ValueError, match=rf"has format {FORMAT_VERSION + 1}, .* reads up to {FORMAT_VERSION}: run `"
        ):
            load_it(ID)


def test_code_that_nobody_trusted(hub: LocalHub, pushed: TransRecModel) -> None:
    config = json.loads(hub.files(ID)["config.json"])
    hub.repos[f"models/{ID}"].commit({"config.json": json.dumps({**config, "model_type": "unheard_of"}).encode()})
    with (
        pytest.raises(HubError, match=r"it contains code, .*: read the code, then pass trust_remote_code=True"),
        hub_errors(ID),
    ):
        AutoModel.from_pretrained(ID, trust_remote_code=False)


def test_wrong_id(hub: LocalHub) -> None:
    with pytest.raises(HubError, match=r"^me/nothing: the Hub at .* has no such repository, or it is private"):
        Recommender.from_pretrained("me/nothing", make_catalogue())


def test_no_id(hub: LocalHub) -> None:
    with pytest.raises(HubError, match=r"^some/folder/here: neither a folder nor an id of the Hub"):
        Recommender.from_pretrained("some/folder/here", make_catalogue())


def test_missing_revision(hub: LocalHub, pushed: TransRecModel) -> None:
    with pytest.raises(HubError, match="no such revision: check the branch, tag or commit"):
        Recommender.from_pretrained(ID, make_catalogue(), revision="v9")


def test_gated(hub: LocalHub, pushed: TransRecModel) -> None:
    hub.repos[f"models/{ID}"].gated = True
    for token in (False, READ_TOKEN):
        with pytest.raises(HubError, match="access needs a permission") as caught:
            Recommender.from_pretrained(ID, make_catalogue(), token=token)
        assert isinstance(caught.value.__cause__.__cause__, GatedRepoError)
    assert model_info(ID).gated == "manual"


@pytest.mark.parametrize(
    "token, sentence",
    [
        (False, "the Hub does not know you: log in with `hf auth login`"),
        ("hf_expired", "the Hub does not know you: .* or set HF_TOKEN to a valid token"),
        (READ_TOKEN, "your token is not allowed to do this: use one with write access"),
    ],
)
def test_pushing_without_the_right(hub: LocalHub, recommender: Recommender, token: Any, sentence: str) -> None:
    with pytest.raises(HubError, match=sentence), hub_errors(ID):
        recommender.push_to_hub(ID, token=token)
    assert hub.repos == {}


def test_an_expired_token(hub: LocalHub, pushed: TransRecModel) -> None:
    with pytest.raises(HubError, match="the Hub does not know you"):
        Recommender.from_pretrained(ID, make_catalogue(), token="hf_expired")


def test_a_file_that_is_missing(hub: LocalHub, pushed: TransRecModel) -> None:
    hub.repos[f"models/{ID}"].commit({WEIGHTS: None})
    with pytest.raises(HubError, match=r"no weights in safetensors .*, and pickled weights are not read"):
        Recommender.from_pretrained(ID, make_catalogue())


def test_other_errors_stay_as_they_are() -> None:
    assert explain(KeyError("something else")) is None
    with pytest.raises(KeyError), hub_errors(ID):
        raise KeyError("something else")


def test_the_server_keeps_what_it_is_given(hub: LocalHub, pushed: TransRecModel) -> None:
    """The double itself: what it serves by LFS is what was pushed, and the client finds it among the files."""
    assert load(weights_of(hub)).keys()
    assert set(HfApi().list_repo_files(ID)) == set(hub.files(ID))
    assert HfApi().whoami()["name"] == "me"


@pytest.mark.slow
def test_the_round_trip_of_the_examples(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "hub_round_trip.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--local", "--max_steps", "3"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert [line.split(":")[0] for line in process.stdout.splitlines() if line.startswith(("pushed", "loaded"))] == [
        "pushed me/transrec-demo",
        "loaded where transrec_hf is not installed",
        "pushed me/transrec-demo-target",
        "loaded the adapter on its base",
        "loaded the same from its index, without the items",
    ]
    assert not list(tmp_path.iterdir()), "nothing is left behind"
