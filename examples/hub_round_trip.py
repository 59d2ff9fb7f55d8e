"""Share a recommender on the Hub: push it, use it without this package, adapt it elsewhere, push the adapter.

    python examples/hub_round_trip.py --local              # a Hub on this machine, which ends with the script
    python examples/hub_round_trip.py --owner my_name      # the real Hub, or that of HF_ENDPOINT; private repositories

The script pre-trains a tiny model on the demo's source and pushes it with its processor, statistics and card. A second
process, in which `transrec_hf` cannot be imported, loads the model from the Hub and must get the same vectors. Then
the script trains an adapter (LoRA) on the demo's target. It pushes only the adapter, a few hundred kB, and the index
of the target's items. The adapter is loaded on its base again, with and without the items at hand, and must recommend
the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


NUM_USERS = 300  # of each platform
TITLES = ["crimson striped star , large", "gold plain ring , small"]

STRANGER = """
import json, sys
sys.modules["transrec_hf"] = None  # from here on, importing it fails

import torch
from transformers import AutoModel, AutoProcessor

repo_id, commit, *titles = sys.argv[1:]
trusted = {"trust_remote_code": True, "revision": commit}  # the code of this commit, which was read, and no later one
model = AutoModel.from_pretrained(repo_id, **trusted).eval()
processor = AutoProcessor.from_pretrained(repo_id, **trusted)
with torch.no_grad():
    print(json.dumps(model.get_item_features(**processor(text=titles)).tolist()))
"""


def round_trip(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all steps. Returns what was recommended and the sizes of the repositories in bytes."""
    # These imports come after the environment names the Hub, as the libraries read it when they are imported
    import numpy as np
    import torch
    from huggingface_hub import HfApi
    from peft import LoraConfig
    from transformers import set_seed

    from transrec_hf import (
        ItemSource,
        Recommender,
        TransRecModel,
        TransRecTrainer,
        TransRecTrainingArguments,
        leave_one_out,
    )
    from transrec_hf.data.demo import demo_config, demo_processor, demo_world
    from transrec_hf.errors import hub_errors

    set_seed(args.seed)
    world, processor = demo_world(args.seed), demo_processor()
    base_id, adapter_id = f"{args.owner}/transrec-demo", f"{args.owner}/transrec-demo-target"

    def train_and_push(model: TransRecModel, platform: Any, repo_id: str, folder: str) -> str:
        arguments = TransRecTrainingArguments(
            folder,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            seed=args.seed,
            push_to_hub=True,
            hub_model_id=repo_id,
            hub_strategy="end",
            hub_private_repo=True,
            disable_tqdm=True,
        )
        split = leave_one_out(platform.sequences.select(np.arange(NUM_USERS)))
        with hub_errors(repo_id):
            trainer = TransRecTrainer(
                model, arguments, catalogue=platform.catalogue, split=split, processing_class=processor
            )
            trainer.train()
            return trainer.push_to_hub().oid

    def size(repo_id: str) -> int:
        return sum(file.size or 0 for file in HfApi().list_repo_tree(repo_id) if hasattr(file, "size"))

    def recommend(recommender: Recommender) -> list[list[str]]:
        return [[item.item_id for item in found] for found in recommender.recommend(histories, k=5)]

    with tempfile.TemporaryDirectory() as folder:
        model = TransRecModel(demo_config())
        commit = train_and_push(model, world.source, base_id, f"{folder}/source")
        print(f"pushed {base_id}: model, processor, statistics, card and code, {size(base_id)} bytes")

        command = [sys.executable, "-c", STRANGER, base_id, commit, *TITLES]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        theirs = torch.tensor(json.loads(answer.splitlines()[-1]))
        with torch.no_grad():
            ours = model.eval().cpu().get_item_features(**processor(text=TITLES))
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
        print("loaded where transrec_hf is not installed: the same vectors")

        with hub_errors(base_id):
            adapted = TransRecModel.from_pretrained(base_id)
        adapted.add_adapter(LoraConfig(r=8, target_modules=["query", "value", "q_proj", "v_proj"]))
        train_and_push(adapted, world.target, adapter_id, f"{folder}/target")

    catalogue, sequences = world.target.catalogue, world.target.sequences
    histories = [catalogue.item_ids[sequences[user]["items"]].tolist() for user in range(3)]
    recommender = Recommender(adapted, ItemSource(catalogue, processor))
    expected = recommend(recommender)
    with hub_errors(adapter_id):
        recommender.push_to_hub(adapter_id)
    print(f"pushed {adapter_id}: the adapter and the index of the target's items, {size(adapter_id)} bytes")

    loaded = {
        "the adapter on its base": Recommender.from_pretrained(adapter_id, catalogue),
        "the same from its index, without the items": Recommender.from_pretrained(adapter_id),
    }
    for what, other in loaded.items():
        if recommend(other) != expected:
            raise SystemExit(f"error: {what} recommends {recommend(other)}, not {expected}")
        print(f"loaded {what}: the same recommendations")
    return {"recommendations": expected, "base_bytes": size(base_id), "adapter_bytes": size(adapter_id)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", action="store_true", help="start a Hub on this machine and use it")
    parser.add_argument("--owner", help="user or organisation that will own the repositories")
    parser.add_argument("--max_steps", type=int, default=60, help="training steps, on each platform [60]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.local == bool(args.owner):
        parser.error("give exactly one of --local and --owner")
    with tempfile.TemporaryDirectory() as home:
        if args.local:
            sys.path.append(str(Path(__file__).parents[1] / "tests"))
            from local_hub import USER, LocalHub

            os.environ |= {**LocalHub().start().environment, "HF_HOME": home}
            args.owner = USER
        return round_trip(args)


if __name__ == "__main__":
    main()
