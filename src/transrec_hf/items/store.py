"""States of the towers' frozen lower blocks, computed once per item and kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.catalogue import Catalogue
from ..model.item_encoder_transrec import frozen_depth, lower_states, tower_blocks
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from .encoding import item_loader, move, packed_linears, sort_by_length
from .preparing import TOKENS_ON_CPU, bucket_by_tokens


if TYPE_CHECKING:
    from accelerate import Accelerator


KEY_BYTES = 16  # of the hash of a content
FILE_BYTES = 2**26  # states in one file, about


def prefix_key(tower: PreTrainedModel, depth: int, pooling: str | None, preprocessing: str, dtype: torch.dtype) -> str:
    """
    A name made of all that stored states depend on besides the item: the weights and the number of the frozen blocks,
    the pooling after them if it is frozen too, the preprocessing, the dtypes of computation and of storage. If any of
    them changes, so does the name: states are never stale.
    """
    device = tower.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tower.dtype
    digest = hashlib.sha256(json.dumps([depth, pooling, str(computed), str(dtype), preprocessing]).encode())
    upper = {} if pooling else tower_blocks(tower)[depth:].state_dict(keep_vars=True)
    first = next(iter(upper.values()), None)
    for name, tensor in tower.state_dict(keep_vars=True).items():
        if tensor is first:
            break
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


class _Modality:
    """
    Where the states of one modality are: by catalogue row the hash of its content, and by content, once it is stored,
    the file and the states in it.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, modality: str):
        self.folder = folder
        self.present = catalogue.has_text if modality == "text" else catalogue.has_image
        rows = np.flatnonzero(self.present)

        def content(row: int) -> bytes:
            return (catalogue.text(row) or "").encode() if modality == "text" else catalogue.encoded_image(row)

        digests = b"".join(hashlib.sha256(content(row)).digest()[:KEY_BYTES] for row in rows.tolist())
        self.keys, contents = np.unique(np.frombuffer(digests, dtype=f"V{KEY_BYTES}"), return_inverse=True)
        self.content_of = np.full(len(catalogue), -1)
        self.content_of[rows] = contents
        self.files: list[Tensor] = []
        self.known: set[Path] = set()
        self.file_of = np.full(len(self.keys), -1, dtype=np.int32)
        self.starts, self.lengths = np.zeros((2, len(self.keys)), dtype=np.int64)

    def refresh(self) -> None:
        """Map the files that were added."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.known):
            shard = load_file(path)
            keys = np.ascontiguousarray(shard["keys"].numpy()).view(f"V{KEY_BYTES}").ravel()
            contents = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            wanted = self.keys[contents] == keys
            lengths = shard["lengths"].numpy()
            self.file_of[contents[wanted]] = len(self.files)
            self.starts[contents[wanted]] = (np.cumsum(lengths) - lengths)[wanted]
            self.lengths[contents[wanted]] = lengths[wanted]
            self.files.append(shard["states"])
            self.known.add(path)

    def missing(self, catalogue_rows: np.ndarray) -> np.ndarray:
        """Which of the rows have a content that is not stored yet: boolean, `(n,)`."""
        contents = self.content_of[catalogue_rows]
        return (contents >= 0) & (self.file_of[contents] < 0)

    def states(self, rows: np.ndarray) -> list[Tensor]:
        """The states of each row, `(states of the item, ...)`, not copied."""
        contents = self.content_of[rows]
        where = zip(self.file_of[contents], self.starts[contents], self.lengths[contents], strict=True)
        return [self.files[file][start : start + length] for file, start, length in where]

    def write(self, rows: np.ndarray, states: list[Tensor], dtype: torch.dtype) -> None:
        """Add a file with the states of the given rows, each `(states of the item, ...)`."""
        shard = {
            "states": torch.cat(states).to(dtype).contiguous(),
            "lengths": torch.tensor([len(item) for item in states]),
            "keys": torch.from_numpy(self.keys[self.content_of[rows]].view(np.uint8).reshape(len(rows), KEY_BYTES)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            save_file(shard, path.with_suffix(".writing"))
            os.replace(path.with_suffix(".writing"), path)
        finally:
            path.with_suffix(".writing").unlink(missing_ok=True)


class ActivationStore:
    r"""
    The states of items after the frozen lower blocks of each tower. Training, evaluation and serving then run the
    upper blocks only; of a tower that is frozen whole, the pooled states are stored, and nothing of it runs. Losses
    and gradients are the same: nothing below changes, and dropout is off in frozen blocks.

    Files are `FOLDER/MODALITY-KEY/*.safetensors`, `KEY` being [`prefix_key`]. Each holds the states of some items with
    the hashes of their contents, and is written under another name and then renamed: several processes may fill one
    store, and one that is killed leaves nothing that could be read.

    Args:
        folder (`str`): where the stores of all keys are.
        model ([`TransRecModel`]): with at least one frozen block in each tower, see [`~TransRecModel.freeze_towers`].
        processor ([`TransRecProcessor`]): of the model.
        catalogue ([`Catalogue`]): the items.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the stored states.

    Raises:
        `ValueError`: if a tower has no frozen block.

    Example:

    ```python
    >>> model.freeze_towers(2)  # as in the training, whose store this is; `activation_store` of the arguments
    >>> store = ActivationStore("my_store", model, processor, catalogue)
    >>> store.fill()  # what it lacks: items that are new, or whose content has changed
    >>> item_embeds = encode_catalogue(model, catalogue, processor, store=store)
    >>> RankingEvaluator(catalogue, split.test, processor).evaluate(model, item_embeds=item_embeds)
    >>> Recommender(model, catalogue, processor, store=store)
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: TransRecModel,
        processor: TransRecProcessor,
        catalogue: Catalogue,
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.processor, self.catalogue, self.dtype = model, processor, catalogue, dtype
        encoder = model.item_encoder
        self.depths = {modality: frozen_depth(tower) for modality, tower in encoder.towers.items()}
        self.modalities: dict[str, _Modality] = {}
        for modality, tower in encoder.towers.items():
            if not self.depths[modality]:
                raise ValueError(
                    f"the {modality} tower has {len(tower_blocks(tower))} blocks and none is frozen, so there is "
                    "nothing to store: lower trainable_blocks"
                )
            pooling = encoder.pooling_strategy if encoder.is_stored_pooled(modality) else None
            preprocessing = processor.fingerprint(modality)
            key = prefix_key(tower, self.depths[modality], pooling, preprocessing, dtype)
            self.modalities[modality] = _Modality(Path(folder) / f"{modality}-{key}", catalogue, modality)
        self.refresh()

    def refresh(self) -> None:
        """Map the files that are there now."""
        for of_modality in self.modalities.values():
            of_modality.refresh()

    def missing_rows(self) -> np.ndarray:
        """Catalogue rows of which some state is not stored yet."""
        rows = np.arange(len(self.catalogue))
        return np.flatnonzero(np.any([part.missing(rows) for part in self.modalities.values()], axis=0))

    @torch.no_grad()
    def fill(self, *, batch_size: int = 128, num_workers: int = 0, accelerator: Accelerator | None = None) -> None:
        """
        Compute and write what is missing; a run that is stopped goes on where it was.

        Args:
            batch_size (`int`, *optional*, defaults to 128): items prepared at a time.
            num_workers (`int`, *optional*, defaults to 0): processes that read, decode and tokenise.
            accelerator (`Accelerator`, *optional*): its processes share the work.
        """
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        missing = self.missing_rows()
        own = missing[missing % world_size == rank]  # also if some see what others have written meanwhile
        if len(own):
            self._compute(own, batch_size, num_workers, show_progress=rank == 0)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        self.refresh()

    def _compute(self, rows: np.ndarray, batch_size: int, num_workers: int, show_progress: bool) -> None:
        """Compute and write the states of catalogue rows."""
        catalogue = self.catalogue.select(rows)  # of which alone the texts are tokenised
        order = sort_by_length(catalogue, self.processor)
        loader = item_loader(
            catalogue, self.processor, order, batch_size, num_workers=num_workers, device=self.model.device
        )
        waiting: dict[str, list[tuple[int, Tensor]]] = {modality: [] for modality in self.modalities}
        num_bytes = dict.fromkeys(waiting, 0)
        was_training = self.model.training
        self.model.eval()
        try:
            with packed_linears(self.model):
                for batch in tqdm(loader, desc="Storing frozen states", disable=not show_progress):
                    batch["item_ids"] = torch.from_numpy(rows)[batch["item_ids"]]
                    for modality, states in self._states_of(batch).items():
                        waiting[modality] += states
                        num_bytes[modality] += sum(state.nbytes for _, state in states)
                        if num_bytes[modality] > FILE_BYTES:
                            self._write(modality, waiting[modality])
                            num_bytes[modality] = 0
            for modality, states in waiting.items():
                self._write(modality, states)
        finally:
            self.model.train(was_training)

    def _write(self, modality: str, states: list[tuple[int, Tensor]]) -> None:
        """Write states of catalogue rows, and forget them."""
        if states:
            rows, values = zip(*states, strict=True)
            self.modalities[modality].write(np.array(rows), list(values), self.dtype)
            states.clear()

    def _states_of(self, batch: dict[str, Any]) -> dict[str, list[tuple[int, Tensor]]]:
        """By modality, catalogue rows and their states, each `(states of the item, ...)`, on the host."""
        encoder, rows, found = self.model.item_encoder, batch["item_ids"], {}
        batch = move(batch, self.model.device)
        parts: list[Tensor] = []
        if "text_index" in batch:
            for input_ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                inputs = {"input_ids": input_ids, "attention_mask": mask}
                if encoder.is_stored_pooled("text"):
                    states = encoder.pool_text(encoder.text_model(**inputs).last_hidden_state, mask)
                    parts += states.to(self.dtype).cpu().unsqueeze(1)
                else:
                    states = lower_states(encoder.text_model, self.depths["text"], **inputs).to(self.dtype).cpu()
                    parts += [item[kept] for item, kept in zip(states, mask.bool().cpu(), strict=True)]
            found["text"] = list(zip(rows[batch["text_index"].cpu()].tolist(), parts, strict=True))
        if "image_index" in batch:
            parts = []
            for pixels in batch["pixel_values"].split(self.model.image_pass_size()):
                pixels = pixels.to(encoder.vision_model.dtype, memory_format=torch.channels_last)
                if encoder.is_stored_pooled("image"):
                    states = encoder.pool_image(encoder.vision_model(pixel_values=pixels))
                else:
                    states = lower_states(encoder.vision_model, self.depths["image"], pixel_values=pixels)
                parts += states.to(self.dtype).cpu().unsqueeze(1)
            found["image"] = list(zip(rows[batch["image_index"].cpu()].tolist(), parts, strict=True))
        return found

    def prepare(self, rows: np.ndarray, max_tokens: int = TOKENS_ON_CPU) -> dict[str, Any]:
        """Stored states of the given rows, in place of what [`prepare_items`] would read for them."""
        has = {modality: part.content_of[rows] >= 0 for modality, part in self.modalities.items()}
        none = np.zeros(len(rows), dtype=bool)
        modalities = np.stack([has.get("text", none), has.get("image", none)], axis=1)
        batch: dict[str, Any] = {"item_modalities": torch.from_numpy(modalities)}
        if has.get("text", none).any():
            slots = np.flatnonzero(has["text"])
            states = self.modalities["text"].states(rows[slots])
            if self.model.item_encoder.is_stored_pooled("text"):
                batch["text_states"] = [torch.cat(states)]
                batch["attention_mask"] = [torch.ones(len(states), 1, dtype=torch.long)]
                batch["text_index"] = torch.from_numpy(slots)
            else:
                lengths = np.array([len(item) for item in states])
                buckets = bucket_by_tokens(lengths, max_tokens)
                batch["text_states"] = [pad_sequence([states[i] for i in bucket], True) for bucket in buckets]
                batch["attention_mask"] = [
                    torch.from_numpy(np.arange(lengths[bucket].max()) < lengths[bucket][:, None]).long()
                    for bucket in buckets
                ]
                batch["text_index"] = torch.from_numpy(slots[np.concatenate(buckets)])
        if has.get("image", none).any():
            slots = np.flatnonzero(has["image"])
            batch["image_states"] = torch.cat(self.modalities["image"].states(rows[slots]))
            batch["image_index"] = torch.from_numpy(slots)
        return batch
