"""Weights spread over processes train, rank, save and resume as whole ones do; the launch configurations say so."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from testing_utils import (
    BEST_CHECKPOINT,
    assert_same_weights,
    in_processes,
    logged,
    make_catalogue,
    make_config,
    make_model,
    make_processor,
    make_split,
    make_trainer,
)

from transrec_hf import ItemSource, RankingEvaluator, TransRecModel, TransRecTrainer
from transrec_hf.items.encoding import encode_catalogue
from transrec_hf.training.sharding import check_sharding


EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))
ZERO = pytest.param(
    "deepspeed_zero2",
    id="ZeRO-2",
    marks=[
        pytest.mark.slow,  # it compiles its collectives for CPUs first
        pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    ],
)


# The configurations


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes of a configuration."""
    path = next(path for path in CONFIGS if path.stem == name)
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, defaults, _ = _validate_launch_command(parsed)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_understood(path):
    config = load_config_from_file(str(path))  # refuses unknown keys, but not those of a section
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(known)
    assert config.num_processes == 2 and config.mixed_precision == "no"


def test_documented_files_exist():
    """Those of the commands and links of the page on the examples."""
    page = EXAMPLES / "README.md"
    text = page.read_text()
    named = re.findall(r"(?<=\s)(examples/[\w./]+\w)", text) + [
        f"examples/{link}" for link in re.findall(r"\]\((\w[^)]*)\)", text)
    ]
    assert "examples/accelerate_configs/ddp.yaml" in named and "examples/finetune.py" in named
    assert not [name for name in named if not (EXAMPLES.parent / name).exists()]
    assert not [path.name for path in CONFIGS if path.name not in text]


def test_configurations_shard_what_they_say(monkeypatch):
    assert "ACCELERATE_USE_FSDP" not in launch_environment("ddp")
    assert launch_environment("deepspeed_zero2")["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    fsdp = launch_environment("fsdp2")
    assert fsdp["ACCELERATE_USE_FSDP"] == "true"
    for key, value in fsdp.items():
        monkeypatch.setenv(key, value)
    check_sharding(FullyShardedDataParallelPlugin())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_version": 1}, "version 2 .not 1"),
        ({"auto_wrap_policy": "transformer_based_wrap"}, "auto_wrap_policy NO_WRAP"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "FULL_STATE_DICT .not SHARDED_STATE_DICT.*fsdp2.yaml"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading False"),
    ],
)
def test_other_kinds_of_sharding_are_refused(options, message, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    fsdp2 = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    with pytest.raises(ValueError, match=message):
        check_sharding(FullyShardedDataParallelPlugin(**{**fsdp2, **options}))


# Training


class ShardingTrainer(TransRecTrainer):
    """Shards on CPUs too, where accelerate would not look at the configuration."""

    def create_accelerator_and_postprocess(self):
        kinds = {
            "ACCELERATE_USE_FSDP": DistributedType.MULTI_GPU,
            "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
        }
        for variable, kind in kinds.items():
            if variable in os.environ:
                PartialState().distributed_type = kind
        super().create_accelerator_and_postprocess()


def trainer_of(folder: Path, batch_size: int, **options: Any) -> TransRecTrainer:
    """13 items and 12 users, who are not divided evenly either."""
    return make_trainer(
        folder,
        make_config(),
        trainer_class=ShardingTrainer,
        catalogue=make_catalogue(13),
        split=make_split(num_users=12, num_items=13, lengths=(4, 8)),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=3,
        trainable_blocks=1,
        max_grad_norm=0.5,
        **{**BEST_CHECKPOINT, **options},
    )


def train(folder: Path, batch_size: int, configuration: str | None = None) -> dict[str, Any]:
    """A run, and what is left of one that went on from its first checkpoint."""
    if configuration is not None:
        os.environ.update(launch_environment(configuration))
    found: dict[str, Any] = {}
    for name, start in (("whole", None), ("resumed", folder / "checkpoint-2")):
        trainer = trainer_of(folder, batch_size)
        trainer.source.max_tokens = 16  # so that processes have different numbers of buckets of texts
        trainer.train(resume_from_checkpoint=start and str(start))
        trainer.save_model(str(folder / name))
        found[name] = {
            "losses": logged(trainer),
            "ndcg": logged(trainer, "eval_ndcg@10"),
            "final": {metric: value for metric, value in trainer.evaluate().items() if "@" in metric},
        }
    weights = [getattr(weight, "_local_tensor", weight) for weight in trainer.model.parameters()]
    return {**found, "share": sum(weight.numel() for weight in weights), "kind": trainer.accelerator.distributed_type}


@pytest.mark.parametrize("configuration", [pytest.param("fsdp2", id="FSDP2"), ZERO])
def test_a_sharded_run_is_the_run_of_one_process_with_twice_the_batch(configuration, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
    alone = train(tmp_path / "alone", batch_size=6)
    ranks = in_processes(train, 2, tmp_path, tmp_path / "sharded", 3, configuration)

    if configuration == "fsdp2":
        assert ranks[0]["kind"] == DistributedType.FSDP
        assert 0.4 * alone["share"] < ranks[0]["share"] < 0.6 * alone["share"]
        assert ranks[0]["share"] + ranks[1]["share"] == alone["share"]
    else:
        assert ranks[0]["kind"] == DistributedType.DEEPSPEED
    for rank in ranks:
        for name in ("whole", "resumed"):
            for values in ("losses", "ndcg", "final"):
                assert rank[name][values] == pytest.approx(alone["whole"][values], rel=1e-4), (name, values)

    folders = {name: tmp_path / "sharded" / name for name in ("whole", "resumed", "checkpoint-2")}
    saved = {name: TransRecModel.from_pretrained(folder) for name, folder in folders.items()}
    expected = TransRecModel.from_pretrained(tmp_path / "alone" / "whole").state_dict()
    torch.testing.assert_close(saved["whole"].state_dict(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(saved["resumed"].state_dict(), saved["whole"].state_dict(), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="item_encoder"):
        assert_same_weights(saved["checkpoint-2"], saved["whole"])

    files = {path.name for path in folders["whole"].iterdir()}
    assert files == {path.name for path in (tmp_path / "alone" / "whole").iterdir()}
    assert {"model.safetensors", "modeling_transrec.py"} <= files
    pickled = {"optimizer.bin", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}
    if configuration == "fsdp2":  # the checkpoints of DeepSpeed are what it makes them
        assert {path.name for path in folders["checkpoint-2"].iterdir()} - files == pickled | {"trainer_state.json"}
    assert (folders["whole"] / "config.json").read_text() == (tmp_path / "alone/whole/config.json").read_text()


# Encoding and ranking


def encode_and_rank(num_items: int, num_users: int, shared: bool = True) -> tuple[torch.Tensor, dict[str, Any]]:
    accelerator = Accelerator(cpu=True) if shared else None
    catalogue, model = make_catalogue(num_items), make_model()
    split = make_split(num_users, num_items, lengths=(4, 8))
    evaluator = RankingEvaluator(ItemSource(catalogue, make_processor()), split.test, train=split.train, batch_size=2)
    vectors = encode_catalogue(model, ItemSource(catalogue, make_processor()), batch_size=2, accelerator=accelerator)
    return vectors, evaluator.evaluate(model, accelerator=accelerator)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize(("num_items", "num_users"), [(13, 10), (7, 1), (2, 2)])
def test_uneven_shares_give_the_vectors_and_the_report_of_one_process(num_processes, num_items, num_users, tmp_path):
    """Of seven items and one user, say, two of three processes have no user; of two items one has no item."""
    vectors, report = encode_and_rank(num_items, num_users, shared=False)
    for found in in_processes(encode_and_rank, num_processes, tmp_path, num_items, num_users, start_method="fork"):
        torch.testing.assert_close(found[0], vectors)
        assert found[1] == report
