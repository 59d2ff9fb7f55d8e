"""What one worker does with one partition: it reads one Parquet file and writes one. Started as a program, it does all
partitions in one process.

    python examples/distributed/partitions.py encode runs/model catalogue/ vectors/
    python examples/distributed/partitions.py join runs/model vectors/ runs/index
    python examples/distributed/partitions.py score runs/model users/ recommendations/ --index runs/index

A partition of the catalogue has the columns `item_id`, `text` and `image`. A partition of the users has `user_id` and
`items`, their histories. A partition whose output exists is skipped, so a stopped job goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from transrec_hf import ItemIndex, ItemSource, Recommender, encode_catalogue, load_catalogue
from transrec_hf.files import whole_file
from transrec_hf.publishing.checkpoint import load_checkpoint
from transrec_hf.serving.index import encoder_hash, statistics_of


class Encoder:
    """Encodes partitions of the catalogue to `item_id`, `vector` and `present`, with the checkpoint's statistics."""

    def __init__(self, checkpoint: str, output: str):
        self.model, self.processor = load_checkpoint(checkpoint)
        self.output = Path(output)

    def __call__(self, path: str) -> int:
        source = ItemSource(load_catalogue(path), self.processor)
        vectors = encode_catalogue(self.model, source).cpu().numpy()
        columns = {
            "item_id": source.catalogue.item_ids.tolist(),
            "vector": list(vectors),
            "present": source.present.tolist(),
        }
        return write(pa.table(columns), self.output / Path(path).name)


class Scorer:
    """Turns partitions of users into the flat table of `user_id`, `item_id`, `rank` and `score`."""

    def __init__(self, checkpoint: str, output: str, index: str, k: int = 10):
        self.recommender, self.output, self.k = Recommender.from_pretrained(checkpoint, index=index), Path(output), k

    def __call__(self, path: str) -> int:
        users = pq.read_table(path).to_pydict()
        found = self.recommender.recommend(users["items"], self.k, on_unknown="skip")
        return write(found.to_arrow(users["user_id"]), self.output / Path(path).name)


def write(table: pa.Table, path: Path) -> int:
    """Writes the whole file or none of it. Returns the number of its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        pq.write_table(table, partial)
    return len(table)


def join(checkpoint: str, vectors: str, index: str) -> int:
    """Joins all vectors in one index, which every scorer maps into its memory. Returns the number of items."""
    model, processor = load_checkpoint(checkpoint)
    table = pa.concat_tables(pq.read_table(path) for path in sorted(Path(vectors).glob("*.parquet")))
    embeds = torch.from_numpy(np.stack(table["vector"].to_numpy()).astype(np.float32))
    present = torch.tensor(table["present"].to_pylist())
    made_from = {"catalogue_hash": "joined", "encoder_hash": encoder_hash(model, processor)}
    ids = np.array(table["item_id"].to_pylist())
    ItemIndex(ids, embeds, present, **made_from, statistics=statistics_of(model)).save(index)
    return len(ids)


def todo(inputs: str, output: str) -> list[str]:
    """Returns the partitions whose output does not exist yet."""
    paths = sorted(Path(inputs).glob("*.parquet"))
    return [str(path) for path in paths if not (Path(output) / path.name).exists()]


def parse_arguments() -> tuple[argparse.Namespace, type[Encoder] | type[Scorer], list[str]]:
    """Returns the options, the class of the worker that they ask for, and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["encode", "join", "score"])
    parser.add_argument("checkpoint")
    parser.add_argument("inputs")
    parser.add_argument("output")
    parser.add_argument("--index", help="folder of the index that `join` wrote, for `score`")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    worker = Scorer if options.step == "score" else Encoder
    arguments = [options.checkpoint, options.output] + ([options.index] if worker is Scorer else [])
    return options, worker, arguments


if __name__ == "__main__":
    options, kind, arguments = parse_arguments()
    if options.step == "join":
        print(f"{join(options.checkpoint, options.inputs, options.output):,} items")
    elif paths := todo(options.inputs, options.output):
        work = kind(*arguments)
        for path in paths:
            print(f"{path}: {work(path):,} rows", flush=True)
