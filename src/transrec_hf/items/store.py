"""States after the frozen lower blocks of towers, computed once per item and kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
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

from ..data.catalogue import Catalogue
from ..errors import DataError, InputError, one_line
from ..files import whole_file
from ..model.modalities_transrec import COLUMNS, MODALITIES, ItemBatch, ItemPart
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
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
from .encoding import content_of, fit_texts, item_loader, packed_linears, sort_by_length
from .fingerprints import adapter_settings, hash_weight, tower_settings
from .preparing import ItemSource, bucket_by_tokens


if TYPE_CHECKING:
    from accelerate import Accelerator


KEY_BYTES = 16  # bytes of the hash of a content
FILE_BYTES = 2**26  # approximate bytes of one file
FILE_SECONDS = 30  # seconds after which a smaller file is written


def prefix_key(
    tower: PreTrainedModel,
    depth: int,
    pooling: str | None,
    preprocessing: str,
    dtype: torch.dtype,
    lower: Sequence[int] = (),
) -> str:
    """
    A name that depends on everything that stored states depend on, except the item: the settings of the tower and its
    adapters, the weights and the number of the frozen blocks, the pooling after them if it is frozen too, the lower
    depths, the preprocessing, and the dtypes of computation and storage. If any of them changes, the name changes too,
    so states are never outdated.
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
            continue  # lower blocks may read frozen weights that are registered after the blocks
        digest.update(name.encode())
        hash_weight(digest, tensor)
    return digest.hexdigest()[:32]


def checksum(shard: dict[str, Tensor]) -> str:
    """The checksum of everything in a file of the store."""
    value = 0
    for name in sorted(shard):
        value = zlib.crc32(shard[name].contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def read_shard(path: Path, check: bool = False) -> dict[str, Tensor]:
    """Map a file of the store. Raises [`InputError`] if it is not such a file or, with `check`, if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("crc32")
            shard = {name: file.get_tensor(name) for name in ("states", "lengths", "keys")}
        if check and found != checksum(shard):
            raise ValueError("its checksum is wrong")
        if len(shard["keys"]) != len(shard["lengths"]) or shard["lengths"].sum() != len(shard["states"]):
            raise ValueError("its parts do not fit together")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: is a damaged file of an activation store ({one_line(error)}). Delete it, then its states are "
            "computed again."
        ) from error
    return shard


@torch.no_grad()
def check_resumes(name: str, tower: PreTrainedModel, depth: int) -> None:
    """
    Raises `ValueError` for a tower that cannot continue from stored states, because its blocks pass on something else
    than one state for each token or image, or its frozen blocks read trained parameters.
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
                raise ValueError("its mask of real states is known only before its blocks")
            if trained and read_below(tower, depth, trained):
                raise ValueError("frozen blocks read parameters that are trained")
            with torch.autocast(tower.device.type, enabled=False):
                expected = run_tower(tower, values, mask).last_hidden_state
                states = lower_states(tower, depth, values, mask)
                if mask is not None:  # the second of two texts twice, without its padding
                    mask, states, expected = (part[[1, 1], :3] for part in (mask, states, expected))
                found = resume_tower(tower, depth, states, mask).last_hidden_state
            tolerance = 1e-4 if expected.dtype == torch.float32 else 0.05
            if (
                found - expected
            ).abs().max() > tolerance * expected.abs().max():  # values that are not finite are found later
                raise ValueError("its output differs if it continues from the states of its blocks")
    except Exception as error:
        raise ValueError(
            f"{kind} cannot continue from stored states, so its part of the activation store would be wrong "
            f"({one_line(error)}): leave out activation_store"
        ) from error


class StoredStates:
    """
    The stored states of one modality. For each catalogue row it knows the hash of the content and, if it is stored,
    the file and the position of its states. It is a [`Preparation`] of the items.

    Args:
        folder (`Path`): Folder of the files.
        source ([`ItemSource`]): The items.
        name (`str`): The modality.
        depth (`int`): Number of blocks of the tower after which the states are taken.
        ragged (`bool`): Whether an item has a state for each of its tokens or windows, rather than one.
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
        """The number of stored states of each item, `(n_items,)`, 0 if it lacks the modality."""
        return np.where(self.content_of < 0, 0, self.lengths[self.content_of])

    def __getstate__(self) -> dict[str, Any]:
        """Keep only the names of the files, so that a spawned process maps them itself and nothing is copied."""
        return {**vars(self), "files": list(self.files)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.files = {path: read_shard(path)["states"] for path in state["files"]}

    def refresh(self) -> None:
        """Map files that were added. Raises [`InputError`] for a damaged file."""
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
        """Which of the catalogue rows have contents that are not stored yet: boolean, `(n,)`."""
        contents = self.content_of[rows]
        return (contents >= 0) & (self.file_of[contents] < 0)

    def states(self, rows: np.ndarray) -> list[Tensor]:
        """
        The states of each catalogue row, `(states of the item, ...)`, without a copy. Raises [`InputError`] for rows
        whose states are not stored.
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
    The states of items after the frozen lower blocks of each tower. With them, training, evaluation and serving run
    only the upper blocks. If a whole tower is frozen, its pooled states are stored, and the tower does not run at all.
    Losses and gradients are the same, because frozen blocks do not change and have no dropout.

    Files are `FOLDER/MODALITY-KEY/*.safetensors`, with the `KEY` of [`prefix_key`]. Each file holds the states of some
    items with the hashes of their contents. It is written under another name and then renamed, so several processes
    can fill one store, and a killed process leaves no incomplete file.

    Args:
        folder (`str`): Folder for the stores of all keys.
        model ([`TransRecModel`]): A model with at least one frozen block in each tower, see
            [`~TransRecModel.freeze_towers`].
        source ([`ItemSource`]): The items.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of the stored states.

    Raises:
        `ValueError`: If a tower has no frozen block, or cannot continue from states.
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
                    f"none of the {len(tower_blocks(tower))} blocks of the {name} tower is frozen, so there is "
                    "nothing to store: lower trainable_blocks"
                )
            if not source.present[:, COLUMNS[name]].any():
                continue
            self.pooled[name] = pooled = encoder.is_stored_pooled(name)
            if encoder.depths[name] and not pooled and not MODALITIES[name].has_tokens:
                raise ValueError(
                    f"the side network of the {name} tower reads blocks of several shapes, of which only pooled "
                    "states can be stored: freeze the whole tower (tuning='side'), or leave out activation_store"
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
        """The items with stored states in place of the inputs of the towers."""
        return self.contents.with_preparations({**self.states})

    @property
    def is_current(self) -> bool:
        """Whether the same blocks are frozen as when the store was made."""
        encoder = self.model.item_encoder
        frozen = {name: encoder.is_stored_pooled(name) for name in self.states}
        depths = {name: frozen_depth(tower) for name, tower in encoder.towers.items()}
        return depths == self.depths and frozen == self.pooled

    def refresh(self) -> None:
        """Map files that other processes have added."""
        for states in self.states.values():
            states.refresh()

    def missing_rows(self) -> np.ndarray:
        """Catalogue rows that have states which are not stored yet."""
        rows = np.arange(len(self.contents))
        missing = [states.missing(rows) for states in self.states.values()]
        return np.flatnonzero(np.any(missing, axis=0)) if missing else rows[:0]

    @torch.no_grad()
    def fill(self, *, batch_size: int = 128, num_workers: int = 0, accelerator: Accelerator | None = None) -> None:
        """
        Compute and write missing states. After an interruption it continues, and at most a minute of work is lost.

        Args:
            batch_size (`int`, *optional*, defaults to 128): Items prepared at a time.
            num_workers (`int`, *optional*, defaults to 0): Processes that read, decode and tokenise.
            accelerator (`Accelerator`, *optional*): Its processes share the work.
        """
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        missing = self.missing_rows()
        own = missing[missing % world_size == rank]  # also if others have written files meanwhile
        if len(own):
            self._compute(own, batch_size, num_workers, show_progress=rank == 0)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        self.refresh()

    def _compute(self, rows: np.ndarray, batch_size: int, num_workers: int, show_progress: bool) -> None:
        """Compute and write the states of catalogue rows."""
        source = self.contents.select(rows)  # so that only their texts are tokenised
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
                                    f"item {self.contents.catalogue.item_ids[rows[row]]}: the {name} tower returns "
                                    f"numbers that are not finite in {self.dtype}. Check its weights, or leave out "
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
        """Write states of catalogue rows to a file, and remove them from memory."""
        for name, states in waiting.items():
            if states:
                rows, values = zip(*states, strict=True)
                self.states[name].write(np.array(rows), list(values), self.dtype)
                states.clear()

    def _states_of(self, batch: ItemBatch) -> dict[str, list[tuple[int, Tensor]]]:
        """For each modality, rows of the source and their states, each `(states of the item, ...)`, on the host."""
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


def content_vectors(
    towers: Mapping[str, str | None],
    catalogue: Catalogue,
    device: torch.device | str = "cpu",
    *,
    text_depths: int | None = None,
    max_text_length: int = 64,
    store: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """
    The outputs of pre-trained towers for the items, for the baseline of content neighbours: what [`content_of`]
    returns for a model of these towers, as they were published.

    Args:
        towers (`dict[str, str]`): Folders or Hub ids, by names such as `"text_model"`; at least one.
        catalogue ([`Catalogue`]): The items.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Device of the computation.
        text_depths (`int`, *optional*): Number of depths of the text tower that are read, as in the configuration.
        max_text_length (`int`, *optional*, defaults to 64): Most tokens that are read of a text.
        store (`str`, *optional*): Folder of an [`ActivationStore`]. States of the same towers, frozen, are read from
            it, and new ones are written to it.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of the stored states.

    Raises:
        [`DataError`]: If no item has a modality of the towers.
    """
    named: dict[str, Any] = {name: tower for name, tower in towers.items() if tower}
    design = {} if text_depths is None else {"text_depths": text_depths}
    model = TransRecModel.from_text_vision_pretrained(**named, **design).to(device)  # type: ignore[arg-type]
    model.freeze_towers(0)
    if not catalogue.has_any(model.config.modalities).any():
        raise DataError(f"{catalogue.source}: no item has content for {' and '.join(named)}. Leave out this encoder.")
    source = ItemSource(catalogue, TransRecProcessor.from_towers(**named, max_text_length=max_text_length))
    if store is not None:
        stored = ActivationStore(store, model, source, dtype)
        stored.fill()
        source = stored.source
    return content_of(model, source)


__all__ = ["ActivationStore", "content_vectors"]
