"""Recommend items to users, whose histories are given by hand or read from an interactions table.

    python examples/recommend.py                                  # what finetune.py has left, three demo users
    python examples/recommend.py --checkpoint runs/my_target --items my_target --history item-17 item-4
    python examples/recommend.py --checkpoint runs/my_target --data my_target --users alice bob --top_k 5
    python examples/recommend.py --checkpoint runs/my_target --data my_target --all_users --output_file all.jsonl

Prints a table per user or, with `output_file`, writes a JSON object per user and line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from transrec_hf import Catalogue, DataError, Recommender, Sequences
from transrec_hf.commands.options import DataArguments, option, parse_arguments, script
from transrec_hf.commands.reporting import format_table
from transrec_hf.publishing.checkpoint import check_fits, load_checkpoint, written_whole


@dataclass
class RecommendationArguments:
    checkpoint: str = option("runs/finetune", "Folder or Hub id of a TransRec model.")
    history: list[str] | None = field(default=None, metadata={"help": "Item ids that one user chose, oldest first."})
    users: list[str] | None = field(default=None, metadata={"help": "Users of the interactions [first three]."})
    all_users: bool = option(False, "All users of the interactions.")
    top_k: int = option(10, "Items per user.")
    include_history: bool = option(False, "Recommend what the user had before, too.")
    output_file: str | None = option(None, "JSON Lines file to write instead of tables.")
    batch_size: int = option(256, "Users at a time.")

    def __post_init__(self) -> None:
        if sum(map(bool, (self.history, self.users, self.all_users))) > 1:
            raise ValueError("history, users and all_users exclude each other: give one of them")
        if min(self.top_k, self.batch_size) < 1:
            raise ValueError("top_k and batch_size must be 1 or more")


def read_histories(args: RecommendationArguments, catalogue: Catalogue, sequences: Sequences) -> dict[str, list[str]]:
    """Item ids by user, oldest first."""
    row_of = {str(user): row for row, user in enumerate(sequences.user_ids)}
    users = list(row_of) if args.all_users else args.users or list(row_of)[:3]
    unknown = [user for user in users if user not in row_of]
    if unknown:
        raise DataError(f"{len(unknown)} unknown user ids: {unknown[:5]}. Add their interactions or leave them out.")
    return {user: catalogue.item_ids[sequences[row_of[user]]["items"]].tolist() for user in users}


@script
def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    data_args, args = parse_arguments((DataArguments, RecommendationArguments), argv, __doc__, data="demo:target")
    model, processor = load_checkpoint(args.checkpoint)
    if args.history:
        catalogue = data_args.load_items()
        histories = {"history": args.history}
        catalogue.rows(args.history)  # are they known?
    else:
        catalogue, sequences = data_args.load()
        histories = read_histories(args, catalogue, sequences)
    check_fits(model, catalogue)
    recommender = Recommender(model.to(Accelerator().device), catalogue, processor)

    results: list[dict[str, Any]] = []
    users = list(histories)
    for start in tqdm(range(0, len(users), args.batch_size), desc="Recommending", unit="batch", delay=2):
        block = users[start : start + args.batch_size]
        found = recommender.recommend_batch(
            [histories[user] for user in block], args.top_k, exclude_history=not args.include_history
        )
        for user, items in zip(block, found, strict=True):
            results.append({"user_id": user, "recommendations": [asdict(item) for item in items]})

    if args.output_file:
        output_file = Path(args.output_file)
        with written_whole(output_file.parent) as folder:
            lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            (folder / output_file.name).write_text("".join(lines), encoding="utf-8")
    else:
        for result in results:
            print_recommendations(result, histories[result["user_id"]], catalogue)
    return results


def print_recommendations(result: dict[str, Any], history: list[str], catalogue: Catalogue) -> None:
    """A table of one user's last items and recommendations."""
    rows = [["", "item", "text", "score"]]
    for row in catalogue.rows(history[-3:]):
        rows.append(["chosen", str(catalogue.item_ids[row]), catalogue.text(row) or "[image]", ""])
    for place, item in enumerate(result["recommendations"], start=1):
        rows.append([f"{place}.", item["item_id"], item["text"] or "[image]", f"{item['score']:.3f}"])
    print(f"\n{result['user_id']}\n{format_table(rows, flush_left=3)}")


if __name__ == "__main__":
    main()
