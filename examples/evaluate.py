"""Rank the held-out items of a data set with a trained model, and report under a protocol.

    python examples/evaluate.py                                   # what finetune.py has left, on the demo's target
    python examples/evaluate.py --checkpoint runs/my_target --data my_target --protocol ninerec
    python examples/evaluate.py --checkpoint runs/my_source --data my_target        # zero-shot

Prints the model beside baselines that need no training, with 95 % intervals, and the model on slices of the users;
`output_file` gets everything as JSON. With `text_model` or `vision_model`, nearest neighbours by these untouched
encoders are a baseline too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from transrec_hf import RankingEvaluator
from transrec_hf.commands.options import DataArguments, SplitArguments, option, parse_arguments, script
from transrec_hf.commands.reporting import format_report
from transrec_hf.commands.runs import write_json
from transrec_hf.errors import bad_input
from transrec_hf.items.encoding import content_vectors
from transrec_hf.publishing.checkpoint import check_fits, load_checkpoint, written_whole


@dataclass
class EvaluationArguments:
    checkpoint: str = option("runs/finetune", "Folder or Hub id of a TransRec model.")
    part: Literal["validation", "test"] = option("test", "Whose targets are ranked.")
    output_file: str = option("runs/report.json", "Where the report goes.")
    text_model: str | None = option(None, "Folder or Hub id of a text encoder, for the content baseline.")
    vision_model: str | None = option(None, "Folder or Hub id of an image encoder, for the content baseline.")
    batch_size: int = option(128, "Items encoded at a time.")
    num_workers: int = option(0, "Processes that read and decode items.")


@script
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = (DataArguments, SplitArguments, EvaluationArguments)
    data_args, split_args, args = parse_arguments(options, argv, __doc__, data="demo:target")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model, processor = load_checkpoint(args.checkpoint)
    catalogue, sequences = data_args.load()
    check_fits(model, catalogue)
    encoding = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    with bad_input(catalogue.source):
        split = split_args.apply(sequences, model.config.max_position_embeddings)
        vectors = None
        if args.text_model or args.vision_model:
            vectors = content_vectors(
                args.text_model,
                args.vision_model,
                catalogue,
                device=accelerator.device,
                accelerator=accelerator,
                **encoding,
            )
        evaluator = RankingEvaluator(
            catalogue,
            getattr(split, args.part),
            processor,
            protocol=split_args.protocol,
            train=split.train,
            content_vectors=vectors,
            **encoding,
        )
    report = evaluator.evaluate(model.to(accelerator.device), accelerator=accelerator)
    report["model"] = {"checkpoint": args.checkpoint, "data": data_args.name, "part": args.part}
    if accelerator.is_main_process:
        output_file = Path(args.output_file)
        with written_whole(output_file.parent) as folder:
            write_json(report, folder / output_file.name)
        print(f"\n{args.checkpoint}, {args.part} targets of {data_args.name}\n\n{format_report(report)}\n")
    return report


if __name__ == "__main__":
    main()
