"""
Compare the training steps of this version with those of an earlier one: both train the same checkpoint of format 1
with the same data and arguments, in turns. Processor seconds are counted, so that other programs on the machine matter
less.

    git worktree add earlier ed2257c
    python benchmarks/run.py versions --earlier earlier/src
    python benchmarks/run.py versions --earlier earlier/src --data data/hm --text_model all-MiniLM-L6-v2 \
        --vision_model mobilenet-v1-0.25-128 --trainable_blocks 0 --store
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import transformers
from common import Peer, Results, ratios

import transrec_hf
from transrec_hf import TransRecModel, TransRecProcessor
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.model.configuration_transrec import FORMAT_1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(repeats=15)
    parser.add_argument("--earlier", required=True, help="folder of the earlier package: src of a checkout")
    parser.add_argument("--data", default="demo", help="folder of the data set [the source of the demo]")
    parser.add_argument("--text_model", help="folder of the text tower")
    parser.add_argument("--vision_model", help="folder of the vision tower")
    parser.add_argument("--trainable_blocks", type=int, help="trained blocks at the top of each tower [all]")
    parser.add_argument("--store", action="store_true", help="compute the states of frozen blocks once")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")


def write_start(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Writes the checkpoint that both versions train, and its data. Returns the paths of both."""
    transformers.set_seed(options.seed)
    if options.data == "demo":
        model, processor = TransRecModel(demo_config()), demo_processor()
        demo_world(options.seed).source.save(folder / "data")
    else:
        towers = (options.text_model, options.vision_model)
        model = TransRecModel.from_text_vision_pretrained(*towers, **FORMAT_1, hidden_size=256)
        processor = TransRecProcessor.from_towers(*towers, max_text_length=32)
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    return folder / "start", folder / "data" if options.data == "demo" else Path(options.data)


def run(options: argparse.Namespace, results: Results) -> None:
    packages = {"earlier": options.earlier, "this": str(Path(transrec_hf.__file__).parents[1])}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start, data = write_start(options, work)
        request = {"start": str(start), "data": str(data), "steps": options.steps, "seed": options.seed}
        request |= {"trainable_blocks": options.trainable_blocks}
        peers: dict[str, Peer] = {}
        rates: dict[str, list[float]] = {name: [] for name in packages}
        losses: dict[str, float] = {}
        for name, package in packages.items():
            store = str(work / f"store of {name}") if options.store else ""
            peers[name] = stack.enter_context(Peer(sys.executable, "versions.py", package, store))
        for _ in range(options.repeats):
            for name, peer in peers.items():
                answer = peer.ask(**request)
                rates[name].append(options.steps / answer["seconds"])
                losses[name] = answer["loss"]
                print(f"  {name}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
    kind = "with store" if options.store else "without store"
    for name in packages:
        results.add(f"{name}, {kind}", "training", rates[name], "steps/s", dtype="float32")
        results.add(f"{name}, {kind}", "mean loss", losses[name], "", dtype="float32")
    speeds = ratios(rates["this"], rates["earlier"])
    results.add(f"this, {kind}", "speedup", speeds, "x", dtype="float32", reference="earlier")
