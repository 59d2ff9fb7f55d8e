"""`transrec demo`: a recommender in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from ..errors import DataError
from .options import DataArguments, option
from .parsing import parse_arguments
from .serve import is_loopback, load_recommender, require


logger = logging.get_logger(__name__)


@dataclass
class DemoArguments:
    """What is shown, and where."""

    _argument_group_name = "demo"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    compare: list[str] | None = field(default=None, metadata={"help": "Further checkpoints, shown beside the first."})
    index: str | None = option(None, "Folder that keeps the items' vectors of the first checkpoint.")
    host: str = option("127.0.0.1", "Address to listen at.")
    port: int = option(7860, "Port to listen at.")
    public: bool = option(False, "Show it to other machines: everybody who reaches --host may use it.")
    use_cpu: bool = option(False, "Leave the accelerator alone.")


def demo(argv: Sequence[str] | None = None) -> None:
    """
    Show a recommender in the browser.

        transrec demo runs/my_target --data my_target
        transrec demo runs/my_target --compare runs/scratch --items my_target/items.parquet --index runs/index

    The catalogue with its pictures, search and filters, histories by clicking or of items of your own, recommendations
    with scores and reasons, several checkpoints side by side, and a map of the items. It needs no network.
    """
    data_args, args = parse_arguments((DataArguments, DemoArguments), argv, demo, positional="checkpoint")
    require("gradio", extra="demo")
    if not args.public and not is_loopback(args.host):
        raise DataError(f"{args.host} can be reached by other machines: say --public if they are meant to")
    checkpoints = [args.checkpoint, *(args.compare or [])]
    names = [Path(str(checkpoint)).name for checkpoint in checkpoints]
    names = names if len(set(names)) == len(names) else [str(checkpoint) for checkpoint in checkpoints]
    indexes = [args.index, *[None] * (len(names) - 1)]
    recommenders = {
        name: load_recommender(checkpoint, data_args, index, args.use_cpu)
        for name, checkpoint, index in zip(names, checkpoints, indexes, strict=True)
    }
    from ..serving.app import launch

    logger.info("The demo is at http://%s:%s", args.host, args.port)
    launch(recommenders, args.host, args.port)
