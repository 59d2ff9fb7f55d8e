"""Run sentence-transformers: `python sentence_encoder.py MODEL DTYPE TEXTS`. TEXTS is a JSON file with a list."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from serving import serve


def main() -> None:
    name, dtype, texts_file = sys.argv[1:]
    model = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    vectors = np.empty(0)

    def answer(batch_size: int = 32, stride: int = 1, save_to: str | None = None) -> dict[str, Any]:
        """Encodes every `stride`-th text; or saves the vectors of the last call and describes the model."""
        nonlocal vectors
        if save_to is None:
            vectors = model.encode(texts[::stride], batch_size=batch_size, show_progress_bar=False)
            return {}
        np.save(save_to, vectors)
        return {
            "threads": torch.get_num_threads(),
            "max_length": model.max_seq_length,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }

    serve(answer)


if __name__ == "__main__":
    main()
