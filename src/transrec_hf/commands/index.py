"""`transrec encode`, `index` and `similar`: the vectors of a catalogue, changes to them, and similar items."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.utils import logging

from ..data.catalogue import Catalogue, load_catalogue
from ..errors import DataError, bad_input, shortened
from ..items.codes import ItemQuantizer
from ..publishing.checkpoint import check_place, load_checkpoint
from ..serving.index import INDEX_NAME, ItemIndex
from ..serving.journal import JOURNAL_NAME
from ..serving.live import LiveItems
from ..serving.packing import FORMS, pack_index, unpack_index
from ..serving.recommender import Recommender, has_index
from ..serving.results import Recommendations
from .options import DataArguments, option
from .parsing import parse_arguments
from .reporting import format_table
from .tables import as_ids, read_table


logger = logging.get_logger(__name__)

APPROXIMATE = "For millions of items: search only so many that this share of the best is found, e.g. 0.99."
SHOWN = 60  # characters of a text in a table for people


def open_recommender(
    checkpoint: str | None,
    items: Catalogue | None,
    index: str | None,
    use_cpu: bool = False,
    approximate: float | None = None,
    cells: str | None = None,
    **kwargs: Any,
) -> Recommender:
    """The recommender that the options of a verb describe. Raises [`DataError`]."""
    if not checkpoint:
        raise DataError("there is no model: give the folder or Hub id of a TransRec model as the first argument")
    check_place(checkpoint)
    if items is None and index is None and ItemIndex.from_pretrained(checkpoint) is None:
        raise DataError(
            "there are no items: give --data or --items, or --index with a folder that holds their vectors"
        )
    device = Accelerator(cpu=use_cpu).device
    recommender = Recommender.from_pretrained(checkpoint, items, index=index, device=device, **kwargs)
    if approximate is not None:
        found = recommender.approximate(approximate, file=cells)
        logger.info("The search is approximate: it finds %.3f of the ten best items", found)
    return recommender


@dataclass
class EncodeArguments:
    """With which model, and into which folder."""

    _argument_group_name = "encoding"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    index: str | None = option(None, "Folder for the index.")
    batch_size: int = option(128, "Items at a time.")
    num_workers: int = option(0, "Processes that read and decode.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")


def encode(argv: Sequence[str] | None = None) -> int:
    """
    Encode the items of a platform, and keep their vectors in a folder.

        transrec encode runs/my_target --items my_target --index runs/index

    Vectors of the same model and contents that are already in the folder are used again, and an interrupted encoding
    continues where it stopped.
    """
    data_args, args = parse_arguments((DataArguments, EncodeArguments), argv, encode, positional="checkpoint")
    if not args.index:
        raise DataError("there is no folder for the vectors: give --index")
    items = data_args.load_items()
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    recommender = open_recommender(args.checkpoint, items, args.index, args.use_cpu, **options)
    logger.info("The vectors of %s items are in %s", f"{len(recommender):,}", args.index)
    return len(recommender)


@dataclass
class IndexArguments:
    """Which index, and what to do with it."""

    _argument_group_name = "index"
    index: str | None = option(None, "Folder of the index.")
    checkpoint: str | None = option(None, "For add: folder or Hub id of the model that made it.")
    items: str | None = option(None, "For add: file or folder of items. For remove: file with a column item_id.")
    ids: list[str] | None = field(default=None, metadata={"help": "For remove: ids of items."})
    readable: bool = option(False, "For remove: the items may still occur in histories.")
    new_only: bool = option(False, "For add: refuse items that are there already, instead of updating them.")
    verify: bool = option(False, "For info: read the whole index, and compare it with its hash.")
    json: bool = option(False, "For info: print JSON.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")
    output_dir: str | None = option(None, "For pack and unpack: folder for the result.")
    form: str = option("codes", "For pack: how vectors are kept.", choices=FORMS)
    size: int | None = option(
        None, "For pack: number of codes of a vector [a 16th of its bytes], or length of a prefix."
    )


def index(argv: Sequence[str] | None = None) -> int:
    """
    Add, update and remove items of an index, look at it, or keep it in fewer bytes.

        transrec index add runs/index --checkpoint runs/my_target --items new.csv
        transrec index remove runs/index --ids item-17 item-4
        transrec index remove runs/index --items discontinued.csv --readable
        transrec index info runs/index --verify
        transrec index pack runs/index --checkpoint runs/my_target --output_dir runs/small
        transrec index unpack runs/small --output_dir runs/index

    A service that uses the folder sees a change at its next request. Only new contents are encoded. Packed vectors
    take a 16th of the bytes (codes), a quarter (int8), half (fp16), or keep only their first --size numbers (prefix).
    `unpack` makes an index of nearly the same vectors from them.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    actions = {"add": _add, "remove": _remove, "info": _info, "pack": _pack, "unpack": _unpack}
    if rest and rest[0] not in actions and not rest[0].startswith("-"):
        raise DataError(f"{rest[0]}: the verbs of index are {', '.join(actions)}")
    action = actions[rest.pop(0)] if rest and rest[0] in actions else None
    (args,) = parse_arguments((IndexArguments,), rest, index, positional="index")
    if action is None:
        raise DataError(f"the verb of index is missing: give one of {', '.join(actions)} as the first argument")
    if action is not _unpack and (not args.index or not has_index(args.index)):
        raise DataError(
            f"{args.index or 'no folder given'}: there is no item index here. Make one with transrec encode."
        )
    return action(args)


def _add(args: IndexArguments) -> int:
    if not args.items:
        raise DataError("nothing to add: give --items, a file or folder")
    recommender = open_recommender(args.checkpoint, None, args.index, args.use_cpu)
    added = recommender.add_items(load_catalogue(args.items), exist_ok=not args.new_only)
    logger.info("items added or updated: %s; items in the index: %s", f"{len(added):,}", f"{len(recommender):,}")
    return len(added)


def _remove(args: IndexArguments) -> int:
    assert args.index is not None
    ids = list(args.ids or [])
    if args.items:
        table = read_table(Path(args.items))
        if "item_id" not in table.column_names:
            raise DataError(
                f"{args.items}: has no column item_id; found {table.column_names}. Rename the column of the ids."
            )
        ids += [str(item_id) for item_id in as_ids(table["item_id"])[0] if item_id is not None]
    if not ids:
        raise DataError("nothing to remove: give --ids, or --items with a column item_id")
    live = LiveItems.open(args.index)
    removed = live.remove(ids, args.readable)
    logger.info("items removed: %s; items in the index: %s", f"{len(removed):,}", f"{live.snapshot.num_items:,}")
    return len(removed)


def _pack(args: IndexArguments) -> int:
    if not args.output_dir or not args.checkpoint:
        raise DataError("give --output_dir, a folder, and --checkpoint, the model that made the index")
    live = LiveItems.open(str(args.index))
    if live.snapshot.changes:
        raise DataError(f"{args.index}: was changed since it was encoded. Encode it again first with transrec encode.")
    if args.form == "prefix" and args.size is None:
        raise DataError("--form prefix needs --size, how many numbers of each vector are kept")
    model, processor = load_checkpoint(args.checkpoint)
    if not live.base.belongs_to(model, processor):
        raise DataError(
            f"{args.index}: its vectors were made by another model than {args.checkpoint}. Give the model that made "
            "them, or encode the items again with transrec encode."
        )
    width, quantizer = model.config.hidden_size, None
    vectors = live.base.item_embeds[:, :width]
    if args.form == "codes":
        with bad_input("bad options"):
            quantizer = ItemQuantizer.fit(vectors, args.size or width // 4, method="product", rotations=0)
    taken = pack_index(live.base, args.output_dir, width, args.form, args.size, quantizer)
    logger.info(
        "The packed index, with %s bytes for each item instead of %s, is in %s", taken, 4 * width, args.output_dir
    )
    return taken


def _unpack(args: IndexArguments) -> int:
    if not args.output_dir or not args.index:
        raise DataError("give the folder of the packed index, and --output_dir for the unpacked one")
    if has_index(args.output_dir):
        raise DataError(f"{args.output_dir}: already holds an index. Choose another folder.")
    found = unpack_index(args.index)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    found.save(args.output_dir)
    logger.info("%s items are in %s", f"{len(found):,}", args.output_dir)
    return len(found)


def _info(args: IndexArguments) -> int:
    assert args.index is not None
    live = LiveItems.open(args.index)
    base, snapshot = live.base, live.snapshot
    if args.verify:
        base.verify()
    sizes = {name: (Path(args.index) / name) for name in (INDEX_NAME, JOURNAL_NAME)}
    facts = {
        "items": snapshot.num_items,
        "recommendable": int(snapshot.offered.count_nonzero()),
        "numbers of a vector": base.item_embeds.shape[1],
        "columns": snapshot.columns.column_names,
        "version": snapshot.version,
        "changes since it was written": snapshot.changes,
        "popularity": "known" if snapshot.counts is not None else "not known",
        "made by": base.encoder_hash[:16],
        "format": base.format,
        "bytes": {name: os.path.getsize(path) for name, path in sizes.items() if path.is_file()},
        **({"verified": True} if args.verify else {}),
    }
    if args.json:
        print(json.dumps({"index": args.index, **facts}, indent=2))
    else:
        width = max(map(len, facts))
        lines = [f"  {name:<{width}}  {_shown(value)}" for name, value in facts.items()]
        print("\n".join([args.index, *lines]))
    return snapshot.num_items


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass
class SimilarArguments:
    """Which item, text or image to find similar items for."""

    _argument_group_name = "similar"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    item: str | None = option(None, "Id of an item of the catalogue.")
    text: str | None = option(None, "A text instead of an id: find items that are similar to an item with this text.")
    image: str | None = option(None, "Image file, instead of an id or with the text.")
    top_k: int = option(10, "Number of items.")
    filter: str | None = option(None, "Only items for which this expression over their columns is true.")
    index: str | None = option(None, "Folder in which the item vectors are kept for the next call.")
    json: bool = option(False, "Print JSON, a list of item_id, rank, score.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")


def line_of(text: str | None) -> str:
    """A text for a cell of a table, its line breaks as spaces."""
    return shortened(" ".join((text or "").split()), SHOWN)


def similar(argv: Sequence[str] | None = None) -> Recommendations:
    """
    Find items that are similar to another one, or to a text or an image.

        transrec similar runs/my_target --index runs/index --item item-17
        transrec similar runs/my_target --items my_target --text "a red hat"
    """
    data_args, args = parse_arguments((DataArguments, SimilarArguments), argv, similar, positional="checkpoint")
    raw: dict[str, Any] = {"text": args.text} if args.text else {}
    if args.image:
        if not Path(args.image).is_file():
            raise DataError(f"{args.image}: no such file (now in {os.getcwd()}). Check the path.")
        raw["image"] = Path(args.image).read_bytes()
    if bool(raw) == bool(args.item):
        raise DataError("give one thing to compare with: --item, or --text, --image or both")
    items = data_args.load_items() if data_args.items or data_args.data else None
    recommender = open_recommender(args.checkpoint, items, args.index, args.use_cpu)
    found = recommender.similar_items(args.item or raw, args.top_k, filter=args.filter)
    if args.json:
        ranked = [{"item_id": item.item_id, "rank": rank, "score": item.score} for rank, item in enumerate(found, 1)]
        print(json.dumps(ranked, indent=2))
        return found
    rows = [["", "item", "text", "cosine"]]
    for rank, item in enumerate(found, 1):
        rows.append([f"{rank}.", item.item_id, line_of(item.text), f"{item.score:.3f}"])
    print(format_table(rows, flush_left=3))
    return found
