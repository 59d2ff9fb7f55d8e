"""Recommend from the graphs of `transrec export` with ONNX Runtime, neither PyTorch nor this package.

transrec export runs/finetune --output_dir runs/onnx
python examples/onnx_only.py runs/onnx items.parquet target-item-0001 target-item-0002
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet
from PIL import Image
from tokenizers import Tokenizer


def main(folder: Path, items: Path, history: list[str], top_k: int = 5) -> list[tuple[str, float]]:
    about = json.loads((folder / "export.json").read_text())
    rules = json.loads((folder / "preprocessor_config.json").read_text())  # of the images, here stretched to one size
    size, mean, std = (rules["size"]["width"], rules["size"]["height"]), rules["image_mean"], rules["image_std"]

    def run(name: str, *inputs: np.ndarray) -> np.ndarray:
        graph = about["graphs"][name]
        session = onnxruntime.InferenceSession(folder / graph["file"])
        return session.run(None, dict(zip(graph["inputs"], inputs, strict=True)))[0]

    table = pyarrow.parquet.read_table(items).to_pydict()
    ids, texts, images = table["item_id"], table["text"], table["image"]
    present = np.array([[text is not None, image is not None] for text, image in zip(texts, images, strict=True)])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(about["max_text_length"])
    tokenizer.enable_padding()
    tokens = tokenizer.encode_batch([text or "" for text in texts])
    of_texts = run("text", np.array([t.ids for t in tokens]), np.array([t.attention_mask for t in tokens]))
    blank = Image.new("RGB", size)  # where an item lacks a modality, its vector does not count
    drawn = [Image.open(io.BytesIO(image["bytes"])) if image else blank for image in images]
    pixels = np.stack([np.asarray(image.convert("RGB").resize(size), np.float32) / 255 for image in drawn])
    of_images = run("image", ((pixels - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    vectors = run("items", of_texts, of_images, present)

    rows = [ids.index(item) for item in history][-about["max_history"] :]
    read = [vectors[rows][None], np.ones((1, len(rows)), bool), present[rows][None]]
    scores = vectors @ run("users", *read[: len(about["graphs"]["users"]["inputs"])])[0]
    scores[rows] = -np.inf
    return [(ids[row], float(scores[row])) for row in np.argsort(-scores)[:top_k]]


if __name__ == "__main__":
    for item, score in main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]):
        print(f"{item}  {score:.3f}")
