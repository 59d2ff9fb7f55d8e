"""Go on training a model on the items and interactions of another platform.

    python examples/finetune.py                                   # what pretrain.py has left, on the demo's target
    python examples/finetune.py options.yaml --seed 1             # options from a file, one of them changed
    python examples/finetune.py --from_checkpoint runs/my_source --data my_target --output_dir runs/my_target

Options and results are those of `pretrain.py`, which also trains the same model from scratch on the target for
comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transrec_hf import DataError
from transrec_hf.commands.options import DataArguments, ModelArguments, SplitArguments, parse_arguments, script
from transrec_hf.commands.runs import RunArguments, run_training


@script
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = (ModelArguments, DataArguments, SplitArguments, RunArguments)
    demo = Path(__file__).parent / "configs" / "finetune_demo.yaml"
    parsed = parse_arguments(options, argv, __doc__, demo, output_dir="runs/finetune", logging_steps=20)
    if not parsed[0].from_checkpoint:
        raise DataError("nothing to fine-tune: give --from_checkpoint, a folder or Hub id of a TransRec model")
    return run_training(*parsed)


if __name__ == "__main__":
    main()
