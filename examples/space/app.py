"""Show the demo as a Space on the Hub. Set its variables `MODEL` and `ITEMS`, or edit the two lines below."""

from __future__ import annotations

import os

from transrec_hf import Recommender
from transrec_hf.serving.app import launch


MODEL = os.environ.get(
    "MODEL", "me/my_recommender"
)  # a checkpoint; with an item index nothing is encoded at the start
ITEMS = os.environ.get("ITEMS", "me/my_items")  # a data set with item_id, text and image

if __name__ == "__main__":
    recommender = Recommender.from_pretrained(MODEL, ITEMS)
    launch({MODEL.rsplit("/", 1)[-1]: recommender}, "0.0.0.0", int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
