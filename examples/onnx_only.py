"""Recommend from the graphs of `transrec export` with ONNX Runtime, neither PyTorch nor this package.

transrec export runs/finetune --output_dir runs/onnx
python examples/onnx_only.py runs/onnx items.parquet target-item-0001 target-item-0002
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from tokenizers import Tokenizer


folder, items, *history = sys.argv[1:]
about, rules = (json.load(open(f"{folder}/{name}.json")) for name in ("export", "preprocessor_config"))
graphs, size = about["graphs"], (rules["size"]["width"], rules["size"]["height"])  # images are stretched to one size


def run(name: str, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(f"{folder}/{graphs[name]['file']}")
    return session.run(None, {of: inputs[of] for of in graphs[name]["inputs"]})[0]  # not all models ask for `present`


ids, texts, images = pyarrow.parquet.read_table(items, columns=["item_id", "text", "image"]).to_pydict().values()
present = np.array([[text is not None, image is not None] for text, image in zip(texts, images, strict=True)])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(about["max_text_length"])
tokenizer.enable_padding()
tokens = [(of.ids, of.attention_mask) for of in tokenizer.encode_batch([text or "" for text in texts])]
input_ids, attention_mask = np.array(tokens).swapaxes(0, 1)
of_text = run("text", input_ids=input_ids, attention_mask=attention_mask)
blank = Image.new("RGB", size)  # where an item lacks a modality, its vector does not count
drawn = [Image.open(pa.BufferReader(image["bytes"])) if image else blank for image in images]
pixels = np.stack([np.asarray(image.convert("RGB").resize(size)) / 255 for image in drawn])
pixels = ((pixels - rules["image_mean"]) / rules["image_std"]).transpose(0, 3, 1, 2).astype(np.float32)
of_image = run("image", pixel_values=pixels)
vectors = run("items", text_vectors=of_text, image_vectors=of_image, present=present)

rows = [ids.index(item) for item in history][-about["max_history"] :]
mask = np.ones((1, len(rows)), bool)
scores = vectors @ run("users", item_vectors=vectors[rows][None], mask=mask, present=present[rows][None])[0]
scores[rows] = -np.inf
for row in np.argsort(-scores)[:5]:
    print(f"{ids[row]}  {scores[row]:.3f}")
