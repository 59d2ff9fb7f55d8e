"""Write data sets in NineRec's layout, to try `transrec benchmark ninerec` on data that is not from NineRec.

    python benchmarks/ninerec_layout.py shared/data/hm shared/data/amazon-toys --output_dir ninerec --users 2000

Each given folder has `items.parquet` (item_id, text, image) and `interactions.parquet`. The files that are written
look like the published ones: they have no header, pairs have the item first, and covers are JPGs named by item.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from transrec_hf import load_domain


def write_layout(folder: Path, output: Path, users: int, seed: int = 0) -> None:
    """Writes one data set, with at most `users` users drawn among those with five items or more."""
    catalogue, sequences = load_domain(folder)
    name = folder.name
    able = np.flatnonzero(sequences.lengths >= 5)
    drawn = np.sort(np.random.default_rng(seed).permutation(able)[:users])
    seen = set()
    with open(output / f"{name}_pair.csv", "w", encoding="utf-8", newline="") as file:
        for place in drawn.tolist():
            view = sequences[place]
            for row, time in zip(view["items"].tolist(), view["timestamps"].tolist(), strict=True):
                csv.writer(file).writerow((catalogue.item_ids[row], sequences.user_ids[place], time))
                seen.add(row)
    covers = output / f"{name}_cover"
    covers.mkdir(exist_ok=True)
    with open(output / f"{name}_item.csv", "w", encoding="utf-8", newline="") as file:
        for row in sorted(seen):
            item = catalogue.item_ids[row]
            csv.writer(file).writerow((item, "标题", catalogue.text(row) or ""))
            if (image := catalogue.image(row)) is not None:
                image.save(covers / f"{item}.jpg", quality=90)
    print(f"{name}: {len(drawn):,} users, {len(seen):,} items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--users", type=int, default=2000)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for folder in args.folders:
        write_layout(folder, args.output_dir, args.users)


if __name__ == "__main__":
    main()
