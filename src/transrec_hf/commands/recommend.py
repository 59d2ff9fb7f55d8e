"""`transrec recommend`: the best items for the users of a data set or of a file, or for one history."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..data.interactions import Sequences
from ..errors import MAX_EXAMPLES, DataError, describe, raise_defects
from ..files import whole_file
from ..serving.recommender import Recommender
from ..serving.results import SCHEMA, Recommendations
from .index import APPROXIMATE, line_of, open_recommender
from .options import DataArguments, option
from .parsing import parse_arguments
from .reporting import format_table
from .tables import SUFFIXES, as_ids, as_times, read_table, table_writer


logger = logging.get_logger(__name__)

PART = 2**14  # users whose recommendations are written at a time


class History(NamedTuple):
    """A user, the items that they chose, oldest first, and the times, if they are known."""

    user: str
    items: list[str]
    times: list[int] | None = None


@dataclass
class RecommendationArguments:
    """Who gets recommendations, and where they are written."""

    _argument_group_name = "recommendation"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    history: list[str] | None = field(default=None, metadata={"help": "Item ids that one user chose, oldest first."})
    histories: str | None = option(
        None,
        "File of histories: columns user_id, item_id and, if rows are not in order, timestamp; or user_id and items.",
    )
    users: list[str] | None = field(
        default=None, metadata={"help": "Ids of users of the interactions [the first three users]."}
    )
    all_users: bool = option(False, "All users of the interactions.")
    top_k: int = option(10, "Items per user.")
    include_history: bool = option(False, "Recommend items that the user had before, too.")
    on_unknown: Literal["error", "skip"] = option("error", "What to do about unknown items of a history.")
    output_file: str | None = option(
        None, "Parquet, CSV or JSONL file for user_id, item_id, rank, score [print tables]."
    )
    json: bool = option(False, "Print JSON, a list of user_id, item_id, rank, score.")
    filter: str | None = option(
        None, "Recommend only items for which this expression over their columns is true, e.g. 'stock > 0'."
    )
    index: str | None = option(None, "Folder in which the item vectors are kept for the next call.")
    approximate: float | None = option(None, APPROXIMATE)
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")
    batch_size: int = option(256, "Number of users at a time.")

    def __post_init__(self) -> None:
        if sum(map(bool, (self.history, self.histories, self.users, self.all_users))) > 1:
            raise ValueError("history, histories, users and all_users exclude each other: give one of them")
        if min(self.top_k, self.batch_size) < 1:
            raise ValueError("top_k and batch_size must be 1 or more")
        if self.output_file and Path(self.output_file).suffix not in SUFFIXES:
            raise ValueError(
                f"{self.output_file}: the name must end in .parquet, .csv or .jsonl, which gives the format"
            )


def recommend(argv: Sequence[str] | None = None) -> int:
    """
    Recommend items to users.

        transrec recommend runs/my_target --data my_target --users alice bob --top_k 5
        transrec recommend runs/my_target --items my_target --history item-17 item-4
        transrec recommend runs/my_target --data my_target --all_users --output_file all.parquet --index runs/index
        transrec recommend runs/my_target --index runs/index --histories today.csv --output_file today.csv

    With --index the items are encoded once: the folder is written if it is missing or outdated, and read otherwise. If
    it is up to date, --data and --items may be left out. A user without a history gets the popular items, if the model
    knows them.
    """
    data_args, args = parse_arguments(
        (DataArguments, RecommendationArguments), argv, recommend, positional="checkpoint"
    )
    if not args.checkpoint:
        raise DataError("there is no model: give the folder or Hub id of a TransRec model as the first argument")
    catalogue = sequences = None
    if (data_args.items or data_args.data) and not (args.history or args.histories):
        catalogue, sequences = data_args.load()
    elif data_args.items or data_args.data:
        catalogue = data_args.load_items()
    histories = _histories(args, catalogue, sequences)
    recommender = open_recommender(args.checkpoint, catalogue, args.index, args.use_cpu, args.approximate)
    if recommender.model.config.time_buckets and any(history.times is None for history in histories):
        raise DataError(
            "this model needs the times of the interactions: give --data, or --histories with a timestamp column"
        )
    histories = _known(histories, recommender, args)
    if args.json and not args.output_file:
        rows = (found.rows(history.user) for history, found in _recommend(recommender, histories, args))
        print(json.dumps(list(itertools.chain.from_iterable(rows)), indent=2))
    elif not args.output_file:
        for history, found in _recommend(recommender, histories, args):
            _print(history, found, recommender)
    else:
        _write(recommender, histories, args)
        logger.info("Recommendations for %s users are in %s", f"{len(histories):,}", args.output_file)
    return len(histories)


def _histories(
    args: RecommendationArguments, catalogue: Catalogue | None, sequences: Sequences | None
) -> list[History]:
    """The histories that the options ask for."""
    if args.history:
        return [History("history", args.history)]
    if args.histories:
        return read_histories(Path(args.histories))
    if catalogue is None or sequences is None:
        raise DataError("there are no users: give --data with --users or --all_users, or --histories or --history")
    row_of = {str(user): row for row, user in enumerate(sequences.user_ids)}
    users = list(row_of) if args.all_users else args.users or list(row_of)[:3]
    unknown = [user for user in users if user not in row_of]
    if unknown:
        raise DataError(
            f"{len(unknown)} unknown user ids: {unknown[:MAX_EXAMPLES]}. Add their interactions or leave them out."
        )
    views = (sequences[row_of[user]] for user in users)
    return [
        History(user, catalogue.item_ids[view["items"]].tolist(), view["timestamps"].tolist())
        for user, view in zip(users, views, strict=True)
    ]


def read_histories(path: Path) -> list[History]:
    """
    Histories from a file with either the columns `user_id` and `items` (lists), or the columns `user_id`, `item_id`
    and, unless the items of each user are already in order, `timestamp`. Raises [`DataError`] if anything is wrong.
    """
    table = read_table(path)
    names = table.column_names
    if "user_id" not in names or not {"items", "item_id"} & set(names):
        raise DataError(
            f"{path}: needs the columns user_id and item_id, or user_id and items; found {names}. Rename its columns."
        )
    users, _ = as_ids(table["user_id"])
    if "items" in names:
        if not pa.types.is_list(table["items"].type):
            raise DataError(
                f"{path}: the column items holds {table['items'].type}, not lists of ids. Write a row for each "
                "item_id."
            )
        lists = (list(map(str, items or [])) for items in table["items"].to_pylist())
        return [History(str(user), items) for user, items in zip(users, lists, strict=True)]
    items, _ = as_ids(table["item_id"])
    rows, times = np.arange(len(table)), None
    if "timestamp" in names:
        times, missing, wrong = as_times(table["timestamp"])
        bad = np.flatnonzero(missing | wrong)
        raise_defects(str(path), describe("no timestamp that can be read", bad, "Write integers or ISO dates."))
        rows = np.argsort(times, kind="stable")
    chosen: dict[str, list[int]] = {str(user): [] for user in users}  # users in the order of the file
    for row in rows.tolist():
        chosen[str(users[row])].append(row)
    return [
        History(user, [str(items[row]) for row in own], None if times is None else times[own].tolist())
        for user, own in chosen.items()
    ]


def _known(histories: list[History], recommender: Recommender, args: RecommendationArguments) -> list[History]:
    """
    The histories without their unknown items, if these are skipped. Users without a history get the popular items, if
    these are known. Raises [`DataError`] otherwise.
    """
    known = set(recommender.item_ids.tolist())
    kept = [_select(history, [item in known for item in history.items]) for history in histories]
    lost = {item for history in histories for item in history.items if item not in known}
    if lost and args.on_unknown == "error":
        raise DataError(
            f"{args.histories or 'history'}: {len(lost)} unknown item ids: {sorted(lost)[:MAX_EXAMPLES]}. "
            "Add them to the items, or use --on_unknown skip."
        )
    left = [history for history in kept if history.items or recommender.items.counts is not None]
    if len(left) < len(kept) and args.on_unknown == "error":
        raise DataError(
            f"{args.histories}: {len(kept) - len(left)} histories are empty. Add items, or use --on_unknown skip."
        )
    if lost or len(left) < len(kept):
        logger.warning(
            "%s unknown items were skipped; %s users who have no other items were left out",
            len(lost),
            len(kept) - len(left),
        )
    return left


def _select(history: History, keep: list[bool]) -> History:
    times = None if history.times is None else list(itertools.compress(history.times, keep))
    return History(history.user, list(itertools.compress(history.items, keep)), times)


def _recommend(
    recommender: Recommender, histories: list[History], args: RecommendationArguments
) -> Iterator[tuple[History, Recommendations]]:
    """Each history with its recommendations, computed block by block."""
    reads_time = bool(recommender.model.config.time_buckets)
    starts = range(0, len(histories), args.batch_size)
    for start in logging.tqdm(starts, desc="Recommending", unit="batch", delay=2):
        block = histories[start : start + args.batch_size]
        found = recommender.recommend(
            [history.items for history in block],
            args.top_k,
            exclude_seen=not args.include_history,
            filter=args.filter,
            timestamps=[history.times or [] for history in block] if reads_time else None,
        )
        yield from zip(block, found, strict=True)


def _write(recommender: Recommender, histories: list[History], args: RecommendationArguments) -> None:
    """
    Write the table of recommendations as a whole. For many users it is made in parts, which are kept in a hidden
    folder beside the file until it is complete: the same command continues from these parts after an interruption.
    """
    file = Path(args.output_file or "")
    asked = json.dumps([dataclasses.asdict(recommender.versions), args.top_k, args.include_history, args.filter])
    key = hashlib.sha256(asked.encode())
    parts = file.parent / f".{file.name}.parts"
    tables = []
    for start in range(0, len(histories), PART):
        some = histories[start : start + PART]
        key.update(json.dumps(some).encode())
        part = parts / f"{key.hexdigest()[:32]}.parquet"
        if not part.is_file():
            rows = [row for history, found in _recommend(recommender, some, args) for row in found.rows(history.user)]
            table = pa.Table.from_pylist(rows, SCHEMA)
            if len(histories) <= PART:
                tables.append(table)
                break
            with whole_file(part) as partial:
                pq.write_table(table, partial)
        tables.append(pq.read_table(part, memory_map=True))
    with whole_file(file) as partial, table_writer(partial, SCHEMA) as write:
        for table in tables:
            write(table)
    shutil.rmtree(parts, ignore_errors=True)


def _print(history: History, found: Recommendations, recommender: Recommender) -> None:
    """A table of one user's last items and recommendations."""
    snapshot, chosen = recommender.items, history.items[-3:]
    columns = snapshot.take_columns(snapshot.find(chosen)).to_pylist() if chosen else []
    rows = [["", "item", "text", "score"]]
    for item_id, of in zip(chosen, columns, strict=True):
        rows.append(["chosen", item_id, line_of(of.get("text")), ""])
    for rank, item in enumerate(found, 1):
        rows.append([f"{rank}.", item.item_id, line_of(item.text), f"{item.score:.3f}"])
    said = " (no history: the popular items)" if found.fallback else ""
    print(f"\n{history.user}{said}\n{format_table(rows, flush_left=3)}")
