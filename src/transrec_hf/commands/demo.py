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
    """Which models the demo shows, and where it listens."""

    _argument_group_name = "demo"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    compare: list[str] | None = field(
        default=None, metadata={"help": "More checkpoints to show beside the first one."}
    )
    index: str | None = option(None, "Folder in which the item vectors of the first checkpoint are kept.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(7860, "Port to listen on.")
    public: bool = option(False, "Allow other machines: everybody who can reach --host may use the demo.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")


def demo(argv: Sequence[str] | None = None) -> None:
    """
    Show a recommender in the browser.

        transrec demo runs/my_target --data my_target
        transrec demo runs/my_target --compare runs/scratch --items my_target/items.parquet --index runs/index

    The page shows the catalogue with pictures, search and filters. Make a history by clicking, or from items of your
    own, and see the recommendations of one or more checkpoints with scores and reasons, and a map of the items. The
    page needs no internet connection.
    """
    data_args, args = parse_arguments((DataArguments, DemoArguments), argv, demo, positional="checkpoint")
    require("gradio", extra="demo")
    if not args.public and not is_loopback(args.host):
        raise DataError(f"{args.host} can be reached by other machines: add --public if that is intended")
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
