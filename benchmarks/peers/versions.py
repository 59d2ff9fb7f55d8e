"""Train for some steps with the version of this package in the folder that the first argument names."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

from serving import serve


sys.path.insert(0, sys.argv[1])

from transformers import AutoProcessor, TrainerCallback, set_seed

from transrec_hf import (
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
    load_domain,
)


WARM_UP = 2
DOMAINS: dict[str, Any] = {}


class Clock(TrainerCallback):
    """Notes the processor seconds at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time())


def train(start: str, data: str, steps: int, seed: int, trainable_blocks: int | None) -> dict[str, Any]:
    """Returns the processor seconds of the steps after the first few, and the mean loss."""
    if data not in DOMAINS:
        DOMAINS[data] = load_domain(data)
    catalogue, sequences = DOMAINS[data]
    clock = Clock()
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TransRecTrainingArguments(
            folder,
            max_steps=WARM_UP + steps,
            seed=seed,
            trainable_blocks=trainable_blocks,
            activation_store=sys.argv[2] or None,
            eval_strategy="no",
            save_strategy="no",
            eval_on_start=False,
            load_best_model_at_end=False,
            logging_steps=WARM_UP + steps,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = TransRecTrainer(
            TransRecModel.from_pretrained(start),
            arguments,
            catalogue=catalogue,
            split=leave_one_out(sequences),
            processing_class=AutoProcessor.from_pretrained(start),
            callbacks=[clock],
        )
        loss = trainer.train().training_loss
    return {"seconds": clock.seconds[-1] - clock.seconds[WARM_UP - 1], "loss": loss}


if __name__ == "__main__":
    serve(train)
