"""
Kill a training run with SIGKILL at random steps, resume it each time, and compare it with a run that nobody touched.

    python examples/kill_and_resume.py --kills 5

Both runs train on the built-in demo world, with text and image towers, dropout and drawn negatives. Each run is a
process that writes down the loss of every step to the last bit. The broken run is killed `kills` times, whatever it is
doing at that moment (computing, saving a checkpoint, removing an old one). Each time it is started again from its
newest complete checkpoint. Every loss must equal that of the unbroken run bit for bit, also in the steps that a
resumed run repeats, and so must every final weight (fp32, same machine, same number of threads). The losses are
written to a CSV file. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from transrec_hf import TransRecModel, TransRecTrainer, TransRecTrainingArguments, leave_one_out
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.training.resuming import last_complete_checkpoint


LOSSES_NAME = "losses.jsonl"
PATIENCE = 600  # seconds to wait for one step before the script gives up


@dataclass
class KillAndResumeArguments:
    """How long the run is, how often it is killed, and where the losses go."""

    kills: int = field(default=5, metadata={"help": "How often the run is killed."})
    max_steps: int = field(default=60, metadata={"help": "Steps of the run."})
    save_steps: int = field(default=5, metadata={"help": "Steps between two checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of the runs and of the moments of the kills."})
    num_threads: int = field(default=1, metadata={"help": "Threads of each run."})
    output: str = field(
        default=str(Path(__file__).parent / "results" / "kill_and_resume.csv"),
        metadata={"help": "CSV file for the losses."},
    )
    start_method: str = field(default="spawn", metadata={"help": "How processes start ('spawn': fresh ones)."})


class NotingTrainer(TransRecTrainer):
    """Writes down the loss of every step as soon as it is known."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        note = {"process": os.getpid(), "step": self.state.global_step + 1, "loss": loss.item().hex()}
        with open(Path(self.args.output_dir) / LOSSES_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        return loss


def train(folder: str, arguments: KillAndResumeArguments) -> None:
    """Begins the run in `folder`, or resumes it from its newest complete checkpoint. It is the work of one process."""
    torch.set_num_threads(arguments.num_threads)
    transformers.set_seed(arguments.seed)
    platform_ = demo_world().target
    model = TransRecModel(demo_config(hidden_size=32, objective="bce", num_negatives=1))
    trainer = NotingTrainer(
        model,
        TransRecTrainingArguments(
            folder,
            max_steps=arguments.max_steps,
            save_strategy="steps",
            save_steps=arguments.save_steps,
            per_device_train_batch_size=16,
            eval_strategy="no",
            load_best_model_at_end=False,
            seed=arguments.seed,
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        catalogue=platform_.catalogue,
        split=leave_one_out(platform_.sequences),
        processing_class=demo_processor(),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    (Path(folder) / "weights.sha256").write_text(digest.hexdigest())


def read_losses(folder: Path) -> list[dict[str, Any]]:
    """Returns the losses that the processes of a run wrote down. A line that a kill cut off is left out."""
    path = folder / LOSSES_NAME
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def run(folder: Path, arguments: KillAndResumeArguments, kill_after: int | None = None) -> bool:
    """
    Run one process, and kill it as soon as it has written `kill_after` losses.

    Returns:
        `bool`: Whether it was killed before its end.
    """
    before = len(read_losses(folder))
    context: Any = multiprocessing.get_context(arguments.start_method)
    process = context.Process(target=train, args=(str(folder), arguments))
    process.start()
    try:
        done, changed = before, time.monotonic()
        while process.is_alive():
            now = len(read_losses(folder))
            done, changed = (now, time.monotonic()) if now > done else (done, changed)
            if kill_after is not None and done - before >= kill_after:
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
                process.join()
                break
            if time.monotonic() - changed > PATIENCE:
                raise RuntimeError(f"the run did not finish a step in {PATIENCE} seconds")
            process.join(timeout=0.002)
    finally:
        process.kill()
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run failed with exit code {process.exitcode}")
    return process.exitcode != 0


def compare(unbroken: Path, broken: Path, path: Path, seed: int) -> bool:
    """Write both runs' losses to `path`. Returns whether they and the final weights are equal."""
    expected = {note["step"]: note["loss"] for note in read_losses(unbroken)}
    processes: list[int] = []
    rows, command = [], " ".join(["python", *sys.argv])
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    for note in read_losses(broken):
        if note["process"] not in processes:
            processes.append(note["process"])
        rows.append(
            {
                "step": note["step"],
                "process": len(processes),
                "loss_unbroken": repr(float.fromhex(expected[note["step"]])),
                "loss_killed_and_resumed": repr(float.fromhex(note["loss"])),
                "bit_equal": note["loss"] == expected[note["step"]],
                "seed": seed,
                "command": command,
                "machine": machine,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    same_weights = len({(folder / "weights.sha256").read_text() for folder in (unbroken, broken)}) == 1
    all_steps = {row["step"] for row in rows} == set(expected)
    return same_weights and all_steps and all(row["bit_equal"] for row in rows)


def kill_and_resume(arguments: KillAndResumeArguments) -> bool:
    """Does both runs. Returns whether they are equal."""
    rng = np.random.default_rng(arguments.seed)
    scratch = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    try:
        unbroken, broken = scratch / "unbroken", scratch / "broken"
        for folder in (unbroken, broken):
            folder.mkdir()
        with tqdm(total=arguments.kills + 2, desc="Processes") as bar:
            run(unbroken, arguments)
            bar.update()
            for kill in range(arguments.kills):
                # Draw the kill from an equal share of the steps left, so that steps are left for the next kill
                done = max((note["step"] for note in read_losses(broken)), default=0)
                share = max((arguments.max_steps - done) // (arguments.kills - kill + 1), 1)
                repeated = done - resumed_step(broken)
                killed = run(broken, arguments, kill_after=repeated + int(rng.integers(1, share, endpoint=True)))
                if not killed:
                    raise RuntimeError("the run ended before it was killed: give a larger --max_steps")
                bar.update()
            run(broken, arguments)
            bar.update()
        return compare(unbroken, broken, Path(arguments.output), arguments.seed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def resumed_step(folder: Path) -> int:
    """Returns the last step that a resumed run need not repeat."""
    checkpoint = last_complete_checkpoint(folder)
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


def main() -> None:
    (arguments,) = HfArgumentParser(KillAndResumeArguments).parse_args_into_dataclasses()
    equal = kill_and_resume(arguments)
    print(f"{arguments.kills} kills: {'every loss and weight is bit-equal' if equal else 'the runs DIFFER'}")
    print(f"Losses: {arguments.output}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
