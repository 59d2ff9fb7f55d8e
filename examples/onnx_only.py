"""Recommend from the graphs of `transrec export` with ONNX Runtime, without PyTorch and without this package.

transrec export runs/finetune --output_dir runs/onnx
python examples/onnx_only.py runs/onnx items.parquet target-item-0001 target-item-0002
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from tokenizers import Tokenizer


folder, items, *history = sys.argv[1:]
about, rules = (json.load(open(f"{folder}/{name}.json")) for name in ("export", "preprocessor_config"))
graphs = about["graphs"]


def run(name: str, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(f"{folder}/{graphs[name]['file']}")
    # Some models have no input `present`
    return session.run(None, {of: inputs[of] for of in graphs[name]["inputs"]})[0]


def pixels_of(image: Image.Image) -> np.ndarray:
    """
    Prepares an image as the image processor does: stretches it, or resizes its shorter side and crops the center.
    """
    size, crop = rules["size"], rules.get("crop_size") if rules.get("do_center_crop") else None
    ratio = size.get("shortest_edge", 0) / min(image.size)
    width, height = (int(side * ratio) for side in image.size) if ratio else (size["width"], size["height"])
    image = image.convert("RGB").resize((width, height), rules["resample"])
    if crop:
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    return ((np.asarray(image) / 255 - rules["image_mean"]) / rules["image_std"]).transpose(2, 0, 1)


ids, texts, images = pyarrow.parquet.read_table(items, columns=["item_id", "text", "image"]).to_pydict().values()
present = np.array([[text is not None, image is not None] for text, image in zip(texts, images, strict=True)])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(about["max_text_length"])
tokenizer.enable_padding()
tokens = [(of.ids, of.attention_mask) for of in tokenizer.encode_batch([text or "" for text in texts])]
input_ids, attention_mask = np.array(tokens).swapaxes(0, 1)
of_text = run("text", input_ids=input_ids, attention_mask=attention_mask)
blank = Image.new("RGB", (64, 64))  # stands for a missing image, whose vector is not used
drawn = [Image.open(pa.BufferReader(image["bytes"])) if image else blank for image in images]
pixels = np.stack([pixels_of(image) for image in drawn]).astype(np.float32)
of_image = run("image", pixel_values=pixels)
more = {}  # further inputs of models with popularity or with ID vectors
if os.path.exists(statistics := f"{folder}/item_statistics.parquet"):
    known, counts = pyarrow.parquet.read_table(statistics).to_pydict().values()
    row_of = {item_id: row for row, item_id in enumerate(known)}
    chosen = np.array([max(1, counts[row_of[item_id]]) if item_id in row_of else 1 for item_id in ids])
    more["log_popularity"] = np.log(chosen / sum(counts)).astype(np.float32)
    more["item_rows"] = np.array([row_of.get(item_id, -1) for item_id in ids])
vectors = run("items", text_vectors=of_text, image_vectors=of_image, present=present, **more)

rows = [ids.index(item) for item in history][-about["max_history"] :]
mask = np.ones((1, len(rows)), bool)
scores = vectors @ run("users", item_vectors=vectors[rows][None], mask=mask, present=present[rows][None])[0]
scores[rows] = -np.inf
for row in np.argsort(-scores)[:5]:
    print(f"{ids[row]}  {scores[row]:.3f}")
