"""Train a new model on the items and interactions of one platform.

    python examples/pretrain.py                                   # the built-in demo world, tiny towers
    python examples/pretrain.py options.yaml --seed 1             # options from a file, one of them changed
    python examples/pretrain.py --data my_source --text_model sentence-transformers/all-MiniLM-L6-v2 \\
        --vision_model google/mobilenet_v2_1.0_224 --trainable_blocks 2 --output_dir runs/my_source

The folder `output_dir` then holds the model with its processor and data statistics, `report.json` on the test targets
and `learning_curve.png`. The options are the fields of `ModelArguments`, `TransRecConfig`, `DataArguments`,
`SplitArguments` and `TransRecTrainingArguments`, and `resume`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transrec_hf.commands.options import DataArguments, ModelArguments, SplitArguments, parse_arguments, script
from transrec_hf.commands.runs import RunArguments, run_training


@script
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = (ModelArguments, DataArguments, SplitArguments, RunArguments)
    demo = Path(__file__).parent / "configs" / "pretrain_demo.yaml"
    return run_training(*parse_arguments(options, argv, __doc__, demo, output_dir="runs/pretrain", logging_steps=20))


if __name__ == "__main__":
    main()
