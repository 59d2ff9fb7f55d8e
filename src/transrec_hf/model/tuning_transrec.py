"""Choosing what is trained and saved: thin checkpoints, bottleneck adapters, side networks."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils.hub import get_checkpoint_shard_files

from .modalities_transrec import MODALITIES
from .towers_transrec import depth_widths, freeze_below, load_tower, lower_depths, tower_blocks


ACCESS = ("cache_dir", "local_files_only", "token")
MOST_DEPTHS = 7  # depths that a side network reads: every second one of twelve blocks, and the embeddings


def weights_hash(name: str, **place: Any) -> tuple[str, str | None]:
    """
    SHA-256 of the weights of a checkpoint, and their commit (a folder has none). For a single file it is the hash that
    the Hub shows; for shards it is the hash of the hexadecimal hashes of all, in the order of their names.

    Raises:
        `OSError`: If there are no safetensors weights.
    """
    files = [cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **place)]
    if files[0] is None:
        index = cached_file(name, "model.safetensors.index.json", **place)
        files = sorted(get_checkpoint_shard_files(name, index, **place)[0])
    hashes = []
    for path in files:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        hashes.append(digest.hexdigest())
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return whole, None if os.path.isdir(name) else extract_commit_hash(files[0], None)


def names_as_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """
    Short patterns for many names of weights: a `*` stands for any number, unless one of the `others` would match too.
    """
    short = {name: re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
    taken = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in others}
    return sorted({name if pattern in taken else pattern for name, pattern in short.items()})


def as_expression(patterns: Iterable[str]) -> str:
    """A regular expression for the patterns of [`names_as_patterns`]."""
    return "^(" + "|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns) + ")$"


class WholeFolders:
    """
    If this package is installed, writes a folder as a whole or not at all, and reads one state of it. The copy of this
    code in a checkpoint does the same as `transformers`.
    """

    files: Any = None
    """The module `transrec_hf.files`, if the package is installed."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        if self.files is None or not kwargs.get("is_main_process", True):
            parent.save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        with self.files.written_whole(save_directory) as folder:
            parent.save_pretrained(str(folder), *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        if cls.files is None or pretrained_model_name_or_path is None:
            return parent.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return cls.files.read_whole(
            pretrained_model_name_or_path,
            lambda: parent.from_pretrained(pretrained_model_name_or_path, *args, **kwargs),
        )


class ThinCheckpoints(WholeFolders, PreTrainedModel):
    """
    A model whose checkpoints may be thin. A thin checkpoint holds only the weights that differ from those of other
    checkpoints (the towers that the model was made with, or the model that it was trained from), and names these by
    id, commit and SHA-256.
    """

    saves_thin = False
    """Whether `save_pretrained` writes thin checkpoints by default."""
    _pushes = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == "__main__":
            cls._auto_class = None  # the code of a user's program is not saved with checkpoints

    def post_init(self) -> None:
        super().post_init()
        self._ignore_named()

    def _ignore_named(self) -> None:
        patterns = [pattern for source in self.config.weights_from or [] for pattern in source["weights"]]
        if patterns:
            ignored: Any = getattr(self, "_keys_to_ignore_on_load_missing", None)
            self._keys_to_ignore_on_load_missing = {*(ignored or ()), as_expression(patterns)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Like `PreTrainedModel.from_pretrained`. The weights that a thin checkpoint does not hold are read from the
        checkpoints that it names, also offline if they are in the cache.

        Raises:
            `ValueError`: If a checkpoint that it names has changed.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.weights_from:
            place = {name: kwargs[name] for name in ACCESS if name in kwargs}
            model._take_named(str(pretrained_model_name_or_path), place)
        return loaded

    @torch.no_grad()
    def _take_named(self, checkpoint: str, place: dict[str, Any]) -> None:
        """Read the weights from the checkpoints that a thin checkpoint names."""
        own = {
            name.replace(".base_layer.", "."): weight for name, weight in self.state_dict().items()
        }  # without the names of adapters
        for source in self.config.weights_from:
            name, revision = source["name"], source["revision"]
            if revision is None and not os.path.isdir(name):
                raise ValueError(
                    f"{checkpoint}: is thin, and the folder {name} with its other weights does not exist. Restore it, "
                    "or use a checkpoint that was saved with thin=False."
                )
            found = weights_hash(name, **place, **({"revision": revision} if revision else {}))[0]
            if found != source["sha256"]:
                raise ValueError(
                    f"{checkpoint}: is thin, and {name} has changed since it was saved: its weights have SHA-256 "
                    f"{found[:12]}..., not {source['sha256'][:12]}.... Restore the old {name}, or use a checkpoint "
                    "that was saved with thin=False."
                )
            weights = self._weights_of(
                name, source["prefix"], {**place, **({"revision": revision} if revision else {})}
            )
            is_named = re.compile(as_expression(source["weights"])).match
            for key in filter(is_named, own):
                if key not in weights or weights[key].shape != own[key].shape:
                    raise ValueError(
                        f"{checkpoint}: is thin, and {name} has no {key} of this shape: use one saved with thin=False"
                    )
                own[key].copy_(weights[key])

    def _weights_of(self, name: str, prefix: str, place: dict[str, Any]) -> dict[str, Tensor]:
        """Weights of a tower (or, with `prefix`, of a checkpoint of this class) by their names in this model."""
        config = PreTrainedConfig.get_config_dict(name, **place)[0]
        if config.get("model_type") == self.config.model_type:
            weights = type(self).from_pretrained(name, **place).state_dict()
            return {key: weight for key, weight in weights.items() if key.startswith(prefix)}
        part = next(modality for modality in MODALITIES.values() if f"item_encoder.{modality.tower}." == prefix)
        tower = load_tower(name, part.config, **place)
        return {f"{prefix}{key}": weight for key, weight in tower.state_dict().items()}

    @classmethod
    def _read_tower(cls, name: str, tower: str, field: str) -> PreTrainedModel:
        """A tower from a checkpoint of its own, or from one of this class."""
        if PreTrainedConfig.get_config_dict(name)[0].get("model_type") != cls.config_class.model_type:
            return load_tower(name, field)
        model = cls.from_pretrained(name)
        if not hasattr(model.item_encoder, tower):
            raise ValueError(f"{name} has no {tower}: name another encoder")
        if model.config.bottleneck:
            raise ValueError(f"{name} has adapters in its towers, which are no part of them: name another encoder")
        found = getattr(model.item_encoder, tower)
        origin = found.config._name_or_path
        if os.path.isdir(origin) and not os.path.isdir(name):  # a claim from the Hub about a folder of this machine
            found.config._name_or_path, found.config._commit_hash = name, getattr(model.config, "_commit_hash", None)
        return found

    def _tower_origins(self) -> Iterator[tuple[str, tuple[str, str | None, str]]]:
        """For each modality, what its tower was loaded from: name, revision, and the prefix of its weights here."""
        for name, tower in self.item_encoder.towers.items():
            if tower.config._name_or_path:
                prefix = f"item_encoder.{MODALITIES[name].tower}."
                yield name, (tower.config._name_or_path, getattr(tower.config, "_commit_hash", None), prefix)

    def original_towers(self) -> dict[str, Tensor]:
        """
        Weights of the towers before any training, by their names in this model: those that differ now. A tower that
        was not loaded from anywhere has none.

        Raises:
            `ValueError`: If they cannot be read. From a folder of this machine they are read only if the model itself
                is not from the Hub.
        """
        is_local = not self.config._name_or_path or os.path.isdir(self.config._name_or_path)
        own = self.state_dict()
        found: dict[str, Tensor] = {}
        for name, (origin, revision, prefix) in self._tower_origins():
            if os.path.isdir(origin) and not is_local:
                raise ValueError(f"the {name} tower comes from {origin}, which is a folder of this machine")
            place = {} if os.path.isdir(origin) else {"revision": revision}
            try:
                weights = self._weights_of(origin, prefix, place)
            except (OSError, ValueError) as error:
                message = str(error).strip().split("\n")[0]
                raise ValueError(f"the {name} tower comes from {origin}, which cannot be read: {message}") from error
            if any(key not in own or own[key].shape != weight.shape for key, weight in weights.items()):
                raise ValueError(f"the {name} tower comes from {origin}, which has other weights now")
            found |= {key: weight for key, weight in weights.items() if not torch.equal(weight.to(own[key]), own[key])}
        return found

    def _candidates(self) -> Iterator[tuple[str, str | None, str]]:
        """Name, revision and prefix of the checkpoints that may hold some of these weights, the likeliest first."""
        for source in self.config.weights_from or []:
            yield source["name"], source["revision"], source["prefix"]
        yield from (origin for _, origin in self._tower_origins())
        if self.config._name_or_path:
            yield self.config._name_or_path, getattr(self.config, "_commit_hash", None), ""

    def _without_named(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The weights that no other checkpoint has, and the checkpoints that have the others."""
        left = dict(state_dict)
        sources: list[dict[str, Any]] = []
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        towers = tuple(f"item_encoder.{MODALITIES[name].tower}." for name in self.item_encoder.towers)
        for name, revision, prefix in self._candidates():
            wanted = [key for key in left if key.startswith(prefix or towers) or (not prefix and key in frozen)]
            if not wanted:
                continue
            try:
                place = {} if os.path.isdir(name) else {"revision": revision}
                sha256, commit = weights_hash(name, **place)
                weights = self._weights_of(name, prefix, {} if commit is None else {"revision": commit})
            except (OSError, ValueError):
                continue  # it does not exist, or cannot be read without its own code
            same = {
                key
                for key in wanted
                if key in weights and torch.equal(weights[key].to(left[key].dtype), left[key].detach().cpu())
            }
            if any(left[key].dim() > 1 for key in same):
                where = os.path.abspath(name) if commit is None else name
                patterns = names_as_patterns(same, state_dict.keys() - same)
                sources.append(
                    {"name": where, "revision": commit, "sha256": sha256, "prefix": prefix, "weights": patterns}
                )
                left = {key: weight for key, weight in left.items() if key not in same}
        return left, sources

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        thin: bool | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Like `PreTrainedModel.save_pretrained`.

        Args:
            save_directory (`str`): The folder.
            thin (`bool`, *optional*): Whether to leave out weights that other checkpoints have (the towers that the
                model was made with, or the model that it was trained from), and to name these by id, commit and
                SHA-256. This takes a few megabytes instead of hundreds. By default `saves_thin` of the model.
            state_dict (`dict`, *optional*): Weights to save instead of the model's.
            args, kwargs: Further arguments of `PreTrainedModel.save_pretrained`.

        Raises:
            `ValueError`: If `thin` is true, but no other checkpoint has these weights, or the checkpoint would be
                pushed and one of the others is a folder of this machine.
        """
        before = self.config.weights_from
        sources: list[dict[str, Any]] = []
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if (self.saves_thin if thin is None else thin) and not is_adapter:
            state_dict, sources = self._without_named(self.state_dict() if state_dict is None else state_dict)
            if not sources and thin:
                raise ValueError(
                    "a thin checkpoint would hold all weights, since the checkpoints that the model was made with "
                    "have other weights, or cannot be read. Save it with thin=False."
                )
            if self._pushes or kwargs.get("push_to_hub"):
                refuse_local(sources)
        self.config.weights_from = sources or None
        try:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            self.config.weights_from = before

    def push_to_hub(self, repo_id: str, *args: Any, thin: bool | None = None, **kwargs: Any) -> Any:
        """Like `PreTrainedModel.push_to_hub`; for `thin` see [`~ThinCheckpoints.save_pretrained`]."""
        before = self.saves_thin
        self._pushes, self.saves_thin = True, before if thin is None else thin
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            self._pushes, self.saves_thin = False, before


class Bottleneck(nn.Module):
    """
    A bottleneck adapter (Houlsby et al., 2019): two small layers whose output, zero at the start, is added to the
    output of a sub-layer. A serial adapter reads the output of the sub-layer, a parallel one its input.
    """

    def __init__(self, width: int, output_width: int, size: int):
        super().__init__()
        # parameters instead of linear layers, since the towers' own initialisation would undo the start at zero
        self.down = nn.Parameter(torch.randn(size, width) / width**0.5)
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(output_width, size))
        self.up_bias = nn.Parameter(torch.zeros(output_width))

    def forward(self, states: Tensor) -> Tensor:
        hidden = nn.functional.gelu(nn.functional.linear(states, self.down, self.down_bias))
        return nn.functional.linear(hidden, self.up, self.up_bias)

    def remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A hook of the first layer of the sub-layer, which remembers its input."""
        self.__dict__["read"] = inputs[0]

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A hook of the last layer of the sub-layer, which adds to its output."""
        return output + self(self.__dict__.pop("read", output))


def sub_layers(root: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Linear]]:
    """
    The sub-layers of all Transformer blocks in a module: `"attention"` or `"feed_forward"`, with its first and its
    last linear layer. A block is an element of a list of modules that has an attention (recognised by its class name);
    all its other linear layers are the feed-forward layer.
    """
    blocks = [block for blocks in root.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]
    for block in blocks:
        if any(isinstance(module, nn.ModuleList) for module in block.modules()):
            continue  # a stage of blocks
        attentions = [module for module in block.modules() if "Attention" in type(module).__name__]
        inside = [module for part in attentions[:1] for module in part.modules() if isinstance(module, nn.Linear)]
        others = [module for module in block.modules() if isinstance(module, nn.Linear) and module not in inside]
        if inside:
            yield "attention", inside[0], inside[-1]
        if inside and others:
            yield "feed_forward", others[0], others[-1]


def insert_bottlenecks(root: nn.Module, size: int, places: str = "houlsby", parallel: bool = False) -> None:
    """
    Add a [`Bottleneck`] to the blocks of a module. Its weights have the names of the layers that it is added to.

    Args:
        root (`nn.Module`): A tower, or the user encoder.
        size (`int`): Width of the bottlenecks.
        places (`str`, *optional*, defaults to `"houlsby"`): After attention and feed-forward layer, or `"pfeiffer"`,
            after the feed-forward layer only.
        parallel (`bool`, *optional*, defaults to `False`): Whether it reads the input of the sub-layer, not its
            output.
    """
    for kind, first, last in list(sub_layers(root)):
        if kind == "attention" and places == "pfeiffer":
            continue
        width = first.in_features if parallel else last.out_features
        last.bottleneck = Bottleneck(width, last.out_features, size).to(last.weight)
        if parallel:
            first.register_forward_pre_hook(last.bottleneck.remember)
        last.register_forward_hook(last.bottleneck.add)


class TunableModel(ThinCheckpoints):
    """A model that can be trained in part: the top blocks of its towers, bottleneck adapters, or side networks."""

    def post_init(self) -> None:
        if self.config.bottleneck:
            self._insert()
        super().post_init()

    def get_adapter_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Like in `PreTrainedModel`, but DoRA's magnitudes get names that `load_adapter` finds too."""
        weights = super().get_adapter_state_dict(*args, **kwargs)
        return {f"{key}.weight" if key.endswith("_vector") else key: weight for key, weight in weights.items()}

    def _insert(self) -> None:
        for part in (*self.item_encoder.towers.values(), self.user_encoder):
            insert_bottlenecks(part, **self.config.bottleneck)

    def freeze_towers(self, trainable_blocks: int | None) -> None:
        """
        Train only the top blocks of each tower. The paper trains two.

        Args:
            trainable_blocks (`int`, *optional*):
                Number of blocks at the top of each tower that are trained, with everything after them. 0 freezes the
                towers, `None` trains the whole towers. Projections, pooling and the user encoder are always trained.
        """
        for tower in self.item_encoder.towers.values():
            freeze_below(tower, trainable_blocks)
        self.train(self.training)

    def add_bottlenecks(self, size: int = 32, places: str = "houlsby", parallel: bool = False) -> None:
        """
        Add bottleneck adapters to the Transformer blocks of towers and user encoder, and freeze everything else in
        these. Adapters that the model already has stay as they are.

        Args:
            size (`int`, *optional*, defaults to 32): Width of the adapters.
            places (`str`, *optional*, defaults to `"houlsby"`): After attention and feed-forward layer, or
                `"pfeiffer"`, after the feed-forward layer only.
            parallel (`bool`, *optional*, defaults to `False`): Whether they read inputs of sub-layers, not outputs.

        Raises:
            `ValueError`: If the model already has other adapters, or has no Transformer block.
        """
        wanted = {"size": size, "places": places, "parallel": parallel}
        if self.config.bottleneck not in (None, wanted):
            raise ValueError(
                f"the model already has bottleneck adapters with {self.config.bottleneck}, not {wanted}: use these"
            )
        if self.config.bottleneck is None:
            self.config.bottleneck = wanted
            self._insert()
        for part in (*self.item_encoder.towers.values(), self.user_encoder):
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(".bottleneck." in name)
        if not any(isinstance(module, Bottleneck) for module in self.modules()):
            self.config.bottleneck = None
            raise ValueError(
                "neither a tower nor the user encoder has Transformer blocks for bottleneck adapters: use another "
                "tuning"
            )
        self.train(self.training)

    def add_side(self, size: int = 64) -> None:
        """
        Freeze all towers, and add a [`SideNetwork`] beside each tower of texts or images. Side networks that the model
        already has stay as they are. Towers of sounds and videos get none. Side networks cannot be merged into towers.

        Args:
            size (`int`, *optional*, defaults to 64): Width of the bottlenecks in the side networks.

        Raises:
            `ValueError`: If the model already has other side networks, or has no tower of texts or images.
        """
        encoder, before = self.item_encoder, self.config.side
        towers = {name: tower for name, tower in encoder.towers.items() if name in ("text", "image")}
        if not towers:
            raise ValueError(
                "side networks need a tower of texts or images, and this model has none: use another tuning"
            )
        if before is not None and before["size"] != size:
            raise ValueError(
                f"the model already has side networks of size {before['size']}, not {size}: use that size"
            )
        self.freeze_towers(0)
        if before is not None:
            return
        depths = {
            name: lower_depths(tower, min(MOST_DEPTHS, 1 + len(tower_blocks(tower)) // 2))
            for name, tower in towers.items()
        }
        self.config.side = {
            "size": size,
            "depths": {
                name: [[*pair] for pair in zip(read, depth_widths(towers[name], read), strict=True)]
                for name, read in depths.items()
            },
        }
        self.config.validate()
        for name, tower in towers.items():
            encoder.add_side(self.config, name)
            encoder.side(name).to(tower.device, tower.dtype).apply(self._init_weights)
        self.train(self.training)


def refuse_local(sources: Iterable[Mapping[str, Any]]) -> None:
    """Raises `ValueError` if a thin checkpoint names a folder, since other people could not load it."""
    for source in sources:
        if source.get("revision") is None:
            raise ValueError(
                f"a thin checkpoint whose other weights are in the folder {source.get('name')} works only on this "
                "machine: push it with thin=False (`transrec push --whole`), or push that folder first and load the "
                "model from the Hub"
            )


__all__ = ["Bottleneck", "ThinCheckpoints", "TunableModel"]
