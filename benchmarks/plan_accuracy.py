"""
Measure how well `transrec plan` predicts. For each configuration one process plans, and right after that another
process trains with `TransRecTrainer` for an epoch, or for some steps of one.

    python benchmarks/run.py plan_accuracy --data data --text_model all-MiniLM-L6-v2 \\
        --vision_model weights/mobilenet-v1-0.5-160

The rows have the seconds of an epoch, of an evaluation and of filling the store, the size of the store, and the peak
memory of training (resident set). Each is predicted, measured, and `predicted_over_measured`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Results
from transformers import TrainerCallback

from transrec_hf import TransRecTrainer
from transrec_hf.commands.options import DataArguments, ModelArguments, SplitArguments
from transrec_hf.commands.parsing import parse_arguments
from transrec_hf.commands.runs import RunArguments, prepare_run
from transrec_hf.publishing.results import describe_device


HM = "--data {data}/hm --protocol ninerec --max_position_embeddings 20 --hidden_size 256 --max_text_length 32"
HM += " --per_device_train_batch_size 256 --bf16"
BEAUTY = "--data {data}/amazon-beauty --max_position_embeddings 20 --hidden_size 256"
BOTH = "--text_model {text_model} --vision_model {vision_model}"
CONFIGURATIONS = {  # options of transrec pretrain, and the steps to measure; None: an epoch
    "hm-frozen-store": (f"{HM} {BOTH} --trainable_blocks 0 --activation_store {{folder}}/store", None),
    "hm-two-blocks": (f"{HM} {BOTH} --trainable_blocks 2", 12),
    "beauty-text-two-blocks-store": (
        f"{BEAUTY} --text_model {{text_model}} --trainable_blocks 2 --activation_store {{folder}}/store",
        12,
    ),
    "beauty-id": (f"{BEAUTY} --id_baseline", 60),
}
WARM_UP = 2  # steps that are not measured
QUANTITIES = {
    "epoch_seconds": "s",
    "evaluation_seconds": "s",
    "fill_seconds": "s",
    "store_gb": "GB",
    "memory_gb": "GB",
}


class StepClock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Returns the mean seconds of a step, including its batch."""
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


class TimedTrainer(TransRecTrainer):
    """Notes how long it took to fill the store."""

    fill_seconds = 0.0

    def fill_store(self) -> None:
        started = time.perf_counter()
        super().fill_store()
        self.fill_seconds += time.perf_counter() - started


def measure(arguments: list[str]) -> dict[str, float]:
    """Trains with the options of `transrec pretrain` and evaluates. Returns the time and the memory of both."""
    kinds = (ModelArguments, DataArguments, SplitArguments, RunArguments)
    quiet = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    model_args, data_args, split_args, args = parse_arguments(kinds, arguments, num_train_epochs=1, **quiet)
    catalogue, split, model, processor = prepare_run(model_args, data_args, split_args, args.seed)
    clock = StepClock()
    trainer = TimedTrainer(
        model,
        args,
        catalogue=catalogue,
        split=split,
        processing_class=processor,
        protocol=split_args.protocol,
        callbacks=[clock],
    )
    trainer.train()
    memory_gb = describe_device(args.device)["peak_memory_gb"]
    started = time.perf_counter()
    trainer.evaluate()
    store = Path(args.activation_store).rglob("*.safetensors") if args.activation_store else ()
    return {
        "step_seconds": clock.seconds,
        "evaluation_seconds": time.perf_counter() - started,
        "fill_seconds": trainer.fill_seconds,
        "store_gb": sum(path.stat().st_size for path in store) / 2**30,
        "memory_gb": memory_gb,
    }


def last_line(*command: str) -> Any:
    """Runs a command in a process of its own. Returns the JSON at the end of its output."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("\n{") :] if "\n{" in done.stdout else done.stdout)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data", help="folder with the data sets hm and amazon-beauty")
    parser.add_argument("--text_model", default="all-MiniLM-L6-v2")
    parser.add_argument("--vision_model", default="weights/mobilenet-v1-0.5-160")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")


def run(options: argparse.Namespace, results: Results) -> None:
    for name in options.only:
        template, steps = CONFIGURATIONS[name]
        rounds = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                places = {"data": options.data, "folder": folder}
                places |= {"text_model": options.text_model, "vision_model": options.vision_model}
                arguments = [*template.format(**places).split(), "--seed", str(options.seed)]
                plan = last_line("-m", "transrec_cli", "plan", *arguments, "--json")
                predicted = plan["with_store"] if plan["uses_store"] else plan["without_store"]
                if plan["uses_store"]:
                    predicted |= {"fill_seconds": plan["fill_seconds"], "store_gb": plan["store_gb"]}
                limit = ["--max_steps", str(steps)] if steps else []
                measured = last_line(__file__, *arguments, "--output_dir", f"{folder}/run", *limit)
                measured["epoch_seconds"] = measured["step_seconds"] * plan["steps_per_epoch"]
                rounds.append((predicted, measured))
        facts = {"data": "hm" if "hm" in name else "amazon-beauty", "dtype": plan["dtype"]}
        for quantity, unit in QUANTITIES.items():
            if quantity not in predicted:
                continue
            columns = [[values[quantity] for values in side] for side in zip(*rounds, strict=True)]
            results.add(name, f"{quantity}_predicted", columns[0], unit, **facts)
            results.add(name, f"{quantity}_measured", columns[1], unit, **facts)
            ratio = [high / low for high, low in zip(*columns, strict=True)]
            results.add(name, f"{quantity}_predicted_over_measured", ratio, "x", reference="measured", **facts)


if __name__ == "__main__":
    print("\n" + json.dumps(measure(sys.argv[1:])))
