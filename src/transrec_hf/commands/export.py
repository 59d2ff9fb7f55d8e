"""`transrec export`: a model as graphs for ONNX Runtime or `torch.export.load`, which need nothing of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError
from ..items.meeting import ItemStatistics
from ..publishing.checkpoint import load_checkpoint
from ..serving.export import MANIFEST_NAME, export_model
from .options import option
from .parsing import parse_arguments


@dataclass
class ExportArguments:
    """Which model is exported, and to which folder."""

    _argument_group_name = "export"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    output_dir: str | None = option(None, "Folder for the graphs.")
    file_format: Literal["onnx", "torch"] = option("onnx", "ONNX, or programs of torch.export.")


def export(argv: Sequence[str] | None = None) -> dict[str, float]:
    """
    Write a model as graphs that run without this package: one for each modality, items and users.

        transrec export runs/my_target --output_dir runs/onnx
        transrec export runs/my_target --output_dir runs/programs --file_format torch

    Batch and length are free. Each graph is run on another batch and another length than it was made from and compared
    with the model; export.json names inputs and outputs. examples/onnx_only.py recommends from such a folder.
    """
    (args,) = parse_arguments((ExportArguments,), argv, export, positional="checkpoint")
    if not args.checkpoint or not args.output_dir:
        raise DataError("give the folder or Hub id of a TransRec model first, and --output_dir")
    if (Path(args.output_dir) / MANIFEST_NAME).exists():
        raise DataError(f"{args.output_dir} holds an export already: choose another folder")
    statistics = ItemStatistics.from_pretrained(args.checkpoint)
    differences = export_model(*load_checkpoint(args.checkpoint), args.output_dir, args.file_format, statistics)
    for name, difference in differences.items():
        print(f"{name:<9} differs from the model by {difference:.1e}")
    return differences
