"""States of the towers' frozen lower blocks, computed once per item and kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import InputError, one_line
from ..files import whole_file
from ..model.modalities_transrec import COLUMNS, MODALITIES, ItemBatch, ItemPart
from ..model.modeling_transrec import TransRecModel
from ..model.towers_transrec import (
    frozen_depth,
    in_evaluation,
    lower_states,
    placeholder,
    read_below,
    reads_clips,
    resume_tower,
    run_tower,
    tower_blocks,
)
from ..model.windows_transrec import has_states_in_time
from .encoding import fit_texts, item_loader, packed_linears, sort_by_length
from .fingerprints import adapter_settings, hash_weight, tower_settings
from .preparing import ItemSource, bucket_by_tokens


if TYPE_CHECKING:
    from accelerate import Accelerator


KEY_BYTES = 16  # of the hash of a content
FILE_BYTES = 2**26  # states in one file, about
FILE_SECONDS = 30  # after which what there is is written all the same


def prefix_key(
    tower: PreTrainedModel,
    depth: int,
    pooling: str | None,
    preprocessing: str,
    dtype: torch.dtype,
    lower: Sequence[int] = (),
) -> str:
    """
    A name made of all that stored states depend on besides the item: the settings of the tower and the adapters in it,
    the weights and the number of the frozen blocks, the pooling after them if it is frozen too, the lower depths, the
    preprocessing, the dtypes of computation and of storage. If any of them changes, so does the name: states are never
    stale.
    """
    device = tower.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tower.dtype
    settings: list[Any] = [depth, pooling, str(computed), str(dtype), preprocessing]
    settings += [list(lower)] if lower else []
    settings += [tower_settings(tower), adapter_settings(tower)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    upper = [] if pooling else list(tower_blocks(tower)[depth:].state_dict(keep_vars=True).values())
    below, in_upper = True, {id(tensor) for tensor in upper}
    for name, tensor in tower.state_dict(keep_vars=True).items():
        below = below and id(tensor) not in in_upper
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not below and (id(tensor) in in_upper or not is_frozen):
            continue  # what is registered after the blocks, and frozen, the lower ones may read
        digest.update(name.encode())
        hash_weight(digest, tensor)
    return digest.hexdigest()[:32]


def checksum(shard: dict[str, Tensor]) -> str:
    """Of all that is in a file of the store."""
    value = 0
    for name in sorted(shard):
        value = zlib.crc32(shard[name].contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def read_shard(path: Path, check: bool = False) -> dict[str, Tensor]:
    """A file of the store, not copied. Raises [`InputError`] if it is none or, asked to `check`, if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("crc32")
            shard = {name: file.get_tensor(name) for name in ("states", "lengths", "keys")}
        if check and found != checksum(shard):
            raise ValueError("its checksum is another")
        if len(shard["keys"]) != len(shard["lengths"]) or shard["lengths"].sum() != len(shard["states"]):
            raise ValueError("its parts do not fit each other")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: a damaged file of an activation store ({one_line(error)}). Delete it: what it held is computed "
            "again."
        ) from error
    return shard


@torch.no_grad()
def check_resumes(name: str, tower: PreTrainedModel, depth: int) -> None:
    """
    Raises `ValueError` for a tower that cannot go on from stored states: one whose blocks hand on something else than
    one state for each token, or image, or whose frozen blocks read parameters that are trained.
    """
    kind = type(tower).__name__
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    mask: Any = None
    if MODALITIES[name].has_tokens:
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=tower.device)
        values = torch.arange(1, 6, device=tower.device).expand(2, 5) * mask
    else:
        values = torch.cat([placeholder(tower, None), placeholder(tower, None) + 1])
    try:
        with in_evaluation(tower):
            if MODALITIES[name].is_windowed and (has_states_in_time(tower) or reads_clips(tower)):
                raise ValueError("which of its states are real is known before its blocks alone")
            if trained and read_below(tower, depth, trained):
                raise ValueError("frozen blocks read parameters that are trained")
            with torch.autocast(tower.device.type, enabled=False):
                expected = run_tower(tower, values, mask).last_hidden_state
                states = lower_states(tower, depth, values, mask)
                if mask is not None:  # the second of two texts, without its padding, twice
                    mask, states, expected = (part[[1, 1], :3] for part in (mask, states, expected))
                found = resume_tower(tower, depth, states, mask).last_hidden_state
            tolerance = 1e-4 if expected.dtype == torch.float32 else 0.05
            if (found - expected).abs().max() > tolerance * expected.abs().max():  # what is not finite is seen later
                raise ValueError("from the states of its blocks it goes on otherwise")
    except Exception as error:
        raise ValueError(
            f"{kind} cannot go on from stored states, so its part of the activation store would be wrong "
            f"({one_line(error)}): leave out activation_store"
        ) from error


class StoredStates:
    """
    The states of one modality, by catalogue row: the hash of its content and, once it is stored, the file and the
    states in it. It is a [`Preparation`] of the items.

    Args:
        folder (`Path`): Of the files.
        source ([`ItemSource`]): The items.
        name (`str`): The modality.
        depth (`int`): Blocks of the tower after which they are.
        ragged (`bool`): There are as many states for an item as it has tokens, or windows; else one.
    """

    def __init__(self, folder: Path, source: ItemSource, name: str, depth: int, ragged: bool):
        self.folder, self.depth, self.ragged = folder, depth, ragged
        rows = np.flatnonzero(source.present[:, COLUMNS[name]].numpy())
        contents = (source.catalogue.encoded(name, row) or b"" for row in rows.tolist())
        digests = b"".join(hashlib.sha256(content).digest()[:KEY_BYTES] for content in contents)
        self.keys, codes = np.unique(np.frombuffer(digests, dtype=f"V{KEY_BYTES}"), return_inverse=True)
        self.content_of = np.full(len(source), -1)
        self.content_of[rows] = codes
        self.files: dict[Path, Tensor] = {}
        self.file_of = np.full(len(self.keys), -1, dtype=np.int32)
        self.starts, self.lengths = np.zeros((2, len(self.keys)), dtype=np.int64)

    @property
    def units(self) -> np.ndarray:
        """Stored states of each item, `(n_items,)`, 0 where it lacks the modality."""
        return np.where(self.content_of < 0, 0, self.lengths[self.content_of])

    def __getstate__(self) -> dict[str, Any]:
        """Of the files their names: a process that is spawned maps them itself, and nothing is copied."""
        return {**vars(self), "files": list(self.files)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.files = {path: read_shard(path)["states"] for path in state["files"]}

    def refresh(self) -> None:
        """Map the files that were added. Raises [`InputError`] for one that is damaged."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - set(self.files)):
            shard = read_shard(path, check=True)
            lengths = shard["lengths"].numpy()
            keys = np.ascontiguousarray(shard["keys"].numpy()).view(f"V{KEY_BYTES}").ravel()
            contents = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            wanted = self.keys[contents] == keys
            self.file_of[contents[wanted]] = len(self.files)
            self.starts[contents[wanted]] = (np.cumsum(lengths) - lengths)[wanted]
            self.lengths[contents[wanted]] = lengths[wanted]
            self.files[path] = shard["states"]

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Which of the catalogue rows have a content that is not stored yet: boolean, `(n,)`."""
        contents = self.content_of[rows]
        return (contents >= 0) & (self.file_of[contents] < 0)

    def states(self, rows: np.ndarray) -> list[Tensor]:
        """
        The states of each catalogue row, `(states of the item, ...)`, not copied. Raises [`InputError`] for rows whose
        states are not stored.
        """
        contents, files = self.content_of[rows], list(self.files.values())
        if missing := int(self.missing(rows).sum()):
            raise InputError(f"{self.folder}: states of {missing} items are not stored yet: call fill() of the store")
        where = zip(self.file_of[contents], self.starts[contents], self.lengths[contents], strict=True)
        return [files[file][start : start + length] for file, start, length in where]

    def __call__(self, rows: np.ndarray, slots: Tensor, max_tokens: int) -> ItemPart:
        states = self.states(rows)
        if not self.ragged:
            return ItemPart(slots, [torch.cat(states)], stored=self.depth)
        lengths = np.array([len(item) for item in states])
        buckets = bucket_by_tokens(lengths, max_tokens)
        values = [pad_sequence([states[i] for i in bucket], batch_first=True) for bucket in buckets]
        masks = [
            torch.from_numpy(np.arange(lengths[bucket].max()) < lengths[bucket][:, None]).long() for bucket in buckets
        ]
        return ItemPart(slots[torch.from_numpy(np.concatenate(buckets))], values, masks, stored=self.depth)

    def write(self, rows: np.ndarray, states: list[Tensor], dtype: torch.dtype) -> None:
        """Add a file with the states of the given catalogue rows, each `(states of the item, ...)`."""
        shard = {
            "states": torch.cat(states).to(dtype).contiguous(),
            "lengths": torch.tensor([len(item) for item in states]),
            "keys": torch.from_numpy(self.keys[self.content_of[rows]].view(np.uint8).reshape(len(rows), KEY_BYTES)),
        }
        with whole_file(self.folder / f"{uuid.uuid4().hex}.safetensors") as partial:
            save_file(shard, partial, {"crc32": checksum(shard)})


class ActivationStore:
    r"""
    The states of items after the frozen lower blocks of each tower. Training, evaluation and serving then run the
    upper blocks only; of a tower that is frozen whole, the pooled states are stored, and nothing of it runs. Losses
    and gradients are the same: nothing below changes, and dropout is off in frozen blocks.

    Files are `FOLDER/MODALITY-KEY/*.safetensors`, `KEY` being [`prefix_key`]. Each holds the states of some items with
    the hashes of their contents, and is written under another name and then renamed: several processes may fill one
    store, and one that is killed leaves nothing that could be read.

    Args:
        folder (`str`): Where the stores of all keys are.
        model ([`TransRecModel`]): With at least one frozen block in each tower, see [`~TransRecModel.freeze_towers`].
        source ([`ItemSource`]): The items.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the stored states.

    Raises:
        `ValueError`: If a tower has no frozen block, or cannot go on from states.
        [`InputError`]: If a file of the store is damaged.

    Example:

    ```python
    >>> model.freeze_towers(2)  # as in the training, whose store this is; `activation_store` of the arguments
    >>> store = ActivationStore("my_store", model, ItemSource(catalogue, processor))
    >>> store.fill()  # what it lacks: items that are new, or whose content has changed
    >>> item_embeds = encode_catalogue(model, store.source)
    >>> RankingEvaluator(store.source, split.test).evaluate(model, item_embeds=item_embeds)
    >>> Recommender(model, store.source)
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: TransRecModel,
        source: ItemSource,
        dtype: torch.dtype = torch.float32,
    ):
        fit_texts(model, source)
        self.model, self.contents, self.dtype = model, source, dtype
        encoder = model.item_encoder
        self.depths = {name: frozen_depth(tower) for name, tower in encoder.towers.items()}
        self.states: dict[str, StoredStates] = {}
        self.pooled: dict[str, bool] = {}
        for name, tower in encoder.towers.items():
            if not self.depths[name]:
                raise ValueError(
                    f"the {name} tower has {len(tower_blocks(tower))} blocks and none is frozen, so there is "
                    "nothing to store: lower trainable_blocks"
                )
            if not source.present[:, COLUMNS[name]].any():
                continue
            self.pooled[name] = pooled = encoder.is_stored_pooled(name)
            if encoder.depths[name] and not pooled and not MODALITIES[name].has_tokens:
                raise ValueError(
                    f"the side network of the {name} tower reads blocks of several shapes, which are stored pooled "
                    "only: freeze the tower whole (tuning='side'), or leave out activation_store"
                )
            if not (pooled and MODALITIES[name].is_windowed):
                check_resumes(name, tower, self.depths[name])
            preprocessing = source.processor.fingerprint(name)  # type: ignore[union-attr]
            pooling, lower = encoder.pooling_strategy if pooled else None, encoder.depths[name]
            lower = [depth for depth in lower if depth < self.depths[name]]
            key = prefix_key(tower, self.depths[name], pooling, preprocessing, dtype, lower)
            ragged = MODALITIES[name].mask is not None and not pooled
            self.states[name] = StoredStates(Path(folder) / f"{name}-{key}", source, name, self.depths[name], ragged)
        self.refresh()

    @property
    def source(self) -> ItemSource:
        """The items with their stored states in place of what the towers' frozen blocks would read."""
        return self.contents.with_preparations({**self.states})

    @property
    def is_current(self) -> bool:
        """Whether the same blocks are frozen as when it was made."""
        encoder = self.model.item_encoder
        frozen = {name: encoder.is_stored_pooled(name) for name in self.states}
        depths = {name: frozen_depth(tower) for name, tower in encoder.towers.items()}
        return depths == self.depths and frozen == self.pooled

    def refresh(self) -> None:
        """Map the files that are there now."""
        for states in self.states.values():
            states.refresh()

    def missing_rows(self) -> np.ndarray:
        """Catalogue rows of which some state is not stored yet."""
        rows = np.arange(len(self.contents))
        missing = [states.missing(rows) for states in self.states.values()]
        return np.flatnonzero(np.any(missing, axis=0)) if missing else rows[:0]

    @torch.no_grad()
    def fill(self, *, batch_size: int = 128, num_workers: int = 0, accelerator: Accelerator | None = None) -> None:
        """
        Compute and write what is missing; a run that is stopped goes on where it was, within a minute's work.

        Args:
            batch_size (`int`, *optional*, defaults to 128): Items prepared at a time.
            num_workers (`int`, *optional*, defaults to 0): Processes that read, decode and tokenise.
            accelerator (`Accelerator`, *optional*): Its processes share the work.
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
        source = self.contents.select(rows)  # of which alone the texts are tokenised
        loader = item_loader(source, sort_by_length(source), batch_size, num_workers, self.model.device)
        waiting: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self.states}
        num_bytes, written = 0, time.monotonic()
        try:
            with in_evaluation(self.model), packed_linears(self.model):
                for batch in logging.tqdm(loader, desc="Storing frozen states", disable=not show_progress):
                    for name, states in self._states_of(batch).items():
                        for row, state in states:
                            if not state.isfinite().all():
                                raise InputError(
                                    f"item {self.contents.catalogue.item_ids[rows[row]]}: the {name} tower says "
                                    f"something that is not finite in {self.dtype}. Look at its weights, or leave out "
                                    "bf16."
                                )
                        waiting[name] += [(int(rows[row]), state) for row, state in states]
                        num_bytes += sum(state.nbytes for _, state in states)
                    if num_bytes > FILE_BYTES or time.monotonic() - written > FILE_SECONDS:
                        self._write(waiting)
                        num_bytes, written = 0, time.monotonic()
        finally:
            self._write(waiting)

    def _write(self, waiting: dict[str, list[tuple[int, Tensor]]]) -> None:
        """Write states of catalogue rows, and forget them."""
        for name, states in waiting.items():
            if states:
                rows, values = zip(*states, strict=True)
                self.states[name].write(np.array(rows), list(values), self.dtype)
                states.clear()

    def _states_of(self, batch: ItemBatch) -> dict[str, list[tuple[int, Tensor]]]:
        """By modality, rows of the source and their states, each `(states of the item, ...)`, on the host."""
        encoder, found = self.model.item_encoder, {}
        for name, part in batch.to(self.model.device, non_blocking=True).parts.items():
            if name not in self.states:
                continue
            tower, depth = encoder.towers[name], self.depths[name]
            states: list[Tensor] = []
            for values, mask in part.passes(self.model.pass_size(name)):
                if self.pooled[name]:
                    states += encoder.state(name, values, mask).to(self.dtype).cpu().unsqueeze(1)
                elif MODALITIES[name].is_windowed:
                    assert mask is not None
                    real = mask.gt(0)
                    reached = lower_states(tower, depth, values[real]).to(self.dtype).cpu()
                    states += reached.split(real.sum(dim=1).tolist())
                elif mask is not None:
                    reached = encoder.states_to_store(name, values, mask, depth).to(self.dtype).cpu()
                    states += [item[real] for item, real in zip(reached, mask.bool().cpu(), strict=True)]
                else:
                    states += lower_states(tower, depth, values).to(self.dtype).cpu().unsqueeze(1)
            rows = batch.item_rows[part.rows.cpu()].tolist()  # type: ignore[index]
            found[name] = list(zip(rows, states, strict=True))
        return found


__all__ = ["ActivationStore"]
