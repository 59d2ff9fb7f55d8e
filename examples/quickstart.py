"""Pre-train on one platform, transfer to another, compare, save, reload, recommend: `make quickstart`.

The two platforms are the built-in demo world (`transrec_hf.data.demo`). Its items have a title, a drawn image or both;
`--modalities text audio` chooses other modalities. No user and no item of the source occurs on the target. The script
takes about two minutes on two CPU cores and writes into the output folder

    source/, target/    the data, in the format that the other examples read
    checkpoint/         the fine-tuned model, its processor and the statistics of its data
    results.csv         the comparison on the test targets of the target platform
    results.json        the same with slices, learning curves, seed and versions
    quickstart.png      a plot of both
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser, ProgressCallback, TrainerCallback, set_seed
from transformers.utils import logging

from transrec_hf import (
    Recommender,
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
    __version__,
    leave_one_out,
    load_domain,
)
from transrec_hf.data.demo import DemoPlatform, demo_config, demo_processor, demo_world


METRICS = ("hit_rate@10", "ndcg@10", "mrr")
ROWS = ("fine-tuned", "zero-shot", "from scratch", "ID baseline", "co-occurrence", "popularity")
COLOURS = {
    "pre-training": "#5c946e",
    "fine-tuned": "#1f6f8b",
    "zero-shot": "#7fb7be",
    "from scratch": "#e09f3e",
    "ID baseline": "#9e2a2b",
}
GREY = "#a9a9a9"


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder that everything is written to."})
    seed: int = field(default=0, metadata={"help": "Seed of the demo world, of the models and of training."})
    modalities: list[str] = field(
        default_factory=lambda: ["text", "image"],
        metadata={
            "help": "Modalities of the items: text, image, audio, video. Some items have only one of those given."
        },
    )
    pretrain_epochs: float = field(default=6, metadata={"help": "Epochs on the source."})
    target_epochs: float = field(default=50, metadata={"help": "Most epochs on the target; every run may stop early."})
    recommend: bool = field(default=False, metadata={"help": "Only recommend, with the checkpoint of an earlier run."})


class Bar(TrainerCallback):
    """Shows one progress bar for a run, with the NDCG@10 on the validation targets."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"{self.name:<12}", unit=" steps", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.bar.set_postfix({"validation ndcg@10": f"{metrics['eval_ndcg@10']:.3f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.total = self.bar.n  # it may have stopped early
        self.bar.close()
        if self.bar.disable:  # not a terminal
            print(
                f"{self.name:<12} {state.global_step} steps, best validation ndcg@10 {state.best_metric or 0:.3f}",
                flush=True,
            )


def make_trainer(
    name: str, model: TransRecModel, platform: DemoPlatform, rate: float, args: QuickstartArguments, **options: Any
) -> TransRecTrainer:
    """Returns a trainer of a model on a platform. It keeps the best epoch on the validation targets."""
    training_args = TransRecTrainingArguments(
        f"{args.output_dir}/.checkpoints/{name}",
        learning_rate=rate,
        tower_learning_rate=rate,  # these small towers are not pre-trained: no need to protect them
        warmup_steps=20,
        per_device_train_batch_size=32,
        eval_on_start=True,
        save_only_model=True,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
        **options,
    )
    trainer = TransRecTrainer(
        model,
        training_args,
        catalogue=platform.catalogue,
        split=leave_one_out(platform.sequences),
        processing_class=demo_processor(args.modalities) if model.config.modalities else None,
        callbacks=[Bar(name)],
    )
    trainer.remove_callback(ProgressCallback)
    return trainer


def compare(args: QuickstartArguments) -> dict[str, Any]:
    """Trains the models and saves the fine-tuned one. Returns reports on the test targets, and learning curves."""
    output_dir, world = Path(args.output_dir), demo_world(args.seed, args.modalities)
    for name, platform in (("source", world.source), ("target", world.target)):
        print(f"{name}: {len(platform.catalogue)} items, {len(platform.sequences)} users", flush=True)
        platform.save(output_dir / name)

    set_seed(args.seed)
    model, scratch = (TransRecModel(demo_config(args.modalities)) for _ in range(2))
    ids = TransRecModel(demo_config(modalities=(), num_items=len(world.target.catalogue)))
    on_target: dict[str, Any] = {"num_train_epochs": args.target_epochs, "early_stopping_patience": 10}

    pretrainer = make_trainer("pre-training", model, world.source, 2e-3, args, num_train_epochs=args.pretrain_epochs)
    pretrainer.train()
    reports = {"zero-shot": make_trainer("zero-shot", model, world.target, 0.0, args).report(baselines=False)}
    trainers: dict[str, TransRecTrainer] = {"pre-training": pretrainer}
    for name, start, rate in (
        ("fine-tuned", model, 5e-4),
        ("from scratch", scratch, 1e-3),
        ("ID baseline", ids, 1e-3),
    ):
        trainers[name] = make_trainer(name, start, world.target, rate, args, **on_target)
        trainers[name].train()
        reports[name] = trainers[name].report()
    trainers["fine-tuned"].save_model(str(output_dir / "checkpoint"))
    shutil.rmtree(output_dir / ".checkpoints")

    baselines = reports["fine-tuned"]["baselines"]
    reports |= {"co-occurrence": baselines["co_occurrence"], "popularity": baselines["popularity"]}
    curves = {name: learning_curve(trainer) for name, trainer in trainers.items()}
    return {"reports": {name: reports[name] for name in ROWS}, "learning_curves": curves}


def learning_curve(trainer: TransRecTrainer) -> list[tuple[float, float]]:
    """Returns pairs of an epoch and the NDCG@10 on the validation targets after it."""
    log = trainer.state.log_history
    return [(entry["epoch"], entry["eval_ndcg@10"]) for entry in log if "eval_ndcg@10" in entry]


def write_table(reports: dict[str, Any], file: Path) -> None:
    """Prints the comparison and writes it as CSV."""
    print("\nTest targets of the target platform among all its items, with 95 % intervals:\n")
    print(" " * 14 + "".join(f"{metric:^24}" for metric in METRICS))
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["model", *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high"))])
        for name, report in reports.items():
            cells = [(report["metrics"][metric], *report["intervals"][metric]) for metric in METRICS]
            writer.writerow([name, *(f"{number:.4f}" for cell in cells for number in cell)])
            printed = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in cells)
            print(f"{name:<14}" + "".join(f"{cell:^24}" for cell in printed))


def plot(reports: dict[str, Any], learning_curves: dict[str, Any], file: Path) -> None:
    """Draws the comparison and the learning curves. Without Matplotlib it only says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNothing was drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(13, 4), layout="constrained")
    bars, source, target = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.1))
    for name, report in reversed(reports.items()):
        value, (low, high) = report["metrics"]["hit_rate@10"], report["intervals"]["hit_rate@10"]
        bars.barh(name, value, color=COLOURS.get(name, GREY), height=0.65)
        bars.errorbar(value, name, xerr=[[value - low], [high - value]], color="#333333", capsize=3, linewidth=1.2)
        bars.text(high, name, f"  {value:.3f}", va="center")
    bars.set(title="Target: test users", xlabel="hit rate @ 10, with 95 % interval")
    bars.margins(x=0.12)
    bars.tick_params(axis="y", length=0)
    for name, curve in learning_curves.items():
        panel = source if name == "pre-training" else target
        epochs, values = zip(*curve, strict=True)
        panel.plot(epochs, values, color=COLOURS[name], linewidth=2)
        panel.annotate(f"  {name}", (epochs[-1], values[-1]), color=COLOURS[name], va="center", annotation_clip=False)
    source.set(title="Source: pre-training", xlabel="epoch", ylabel="validation NDCG @ 10", ylim=(0, None))
    target.set(title="Target: learning curves", xlabel="epoch", ylabel="validation NDCG @ 10", ylim=(0, None))
    for panel in (bars, source, target):
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (source, target):
        panel.set_xlim(0, 1.35 * panel.dataLim.xmax)  # room for the names
    figure.savefig(file, dpi=150)


def recommend(output_dir: Path) -> None:
    """Loads the checkpoint and prints what it recommends to three users of the target platform."""
    catalogue, sequences = load_domain(output_dir / "target")
    recommender = Recommender.from_pretrained(output_dir / "checkpoint", catalogue)
    others = [f"  ({' and '.join(catalogue.read(row))})" for row in range(len(catalogue))]
    shown = ["" if has_text else other for has_text, other in zip(catalogue.has_text, others, strict=True)]
    titles = [title + note for title, note in zip(catalogue.items["attributes"], shown, strict=True)]
    for user in range(3):
        *history, target = sequences[user]["items"]
        print(f"\n{sequences.user_ids[user]} chose")
        print(*(f"      {titles[row]}" for row in history), sep="\n")
        print("  and is recommended")
        found = recommender.recommend(catalogue.item_ids[history].tolist(), k=5)
        for place, row in enumerate(catalogue.rows([item.item_id for item in found]), start=1):
            print(f"   {place}. {titles[row]}" + ("   <- chosen next" if row == target else ""))


def main() -> None:
    args = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(1)  # as fast for such small models, and steadier on a busy machine
    logging.disable_progress_bar()  # training has bars of its own
    datasets.disable_progress_bars()
    output_dir = Path(args.output_dir)
    if args.recommend:
        return recommend(output_dir)
    started = time.perf_counter()
    results = compare(args)
    write_table(results["reports"], output_dir / "results.csv")
    plot(**results, file=output_dir / "quickstart.png")
    versions = {"transrec_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    results |= {"arguments": asdict(args), "versions": versions, "seconds": time.perf_counter() - started}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    print(f"\nA fresh process loads {output_dir / 'checkpoint'} and recommends:", flush=True)
    subprocess.run([sys.executable, __file__, "--recommend", "--output_dir", args.output_dir], check=True)
    print(f"\n{time.perf_counter() - started:.0f} s. Table, plot, data and checkpoint are in {output_dir}/")


if __name__ == "__main__":
    main()
