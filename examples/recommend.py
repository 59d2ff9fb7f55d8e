"""Recommend with the model of `finetune.py`: `python examples/recommend.py`.

The command `transrec recommend` does the same for the users of a data set or a file, and writes tables.
"""

from __future__ import annotations

from transrec_hf import Recommender
from transrec_hf.data.demo import demo_world


def main() -> None:
    platform = demo_world().target
    recommender = Recommender.from_pretrained("runs/finetune", platform.catalogue)  # or a folder, a file, a Hub id
    for user in range(3):
        history = platform.catalogue.item_ids[platform.sequences[user]["items"]].tolist()
        print(f"\n{platform.sequences.user_ids[user]} chose {', '.join(history)} and is recommended")
        for item in recommender.recommend(history, k=5):
            print(f"  {item.item_id}  {item.score:6.3f}  {item.text or '[image]'}")
    recommender.save_pretrained("runs/recommender")  # with the items' vectors: a service needs no items


if __name__ == "__main__":
    main()
