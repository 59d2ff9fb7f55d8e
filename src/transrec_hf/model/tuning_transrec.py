"""What of a model is trained, and what its checkpoints then hold: thin ones, bottleneck adapters, side networks."""

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
MOST_DEPTHS = 7  # that a side network reads of a tower: every second one of twelve blocks, and the first


def weights_hash(name: str, **place: Any) -> tuple[str, str | None]:
    """
    SHA-256 of the weights of a checkpoint, and the commit that they are of, which a folder does not have. Of a single
    file it is the one that the Hub shows; of shards, that of the hexadecimal hashes of all, in the order of their
    names.

    Raises:
        `OSError`: If there are no weights in safetensors.
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
    """Short for many names of weights: a `*` stands for any number, unless that would name one of the others too."""
    short = {name: re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
    taken = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in others}
    return sorted({name if pattern in taken else pattern for name, pattern in short.items()})


def as_expression(patterns: Iterable[str]) -> str:
    """A regular expression of [`names_as_patterns`]."""
    return "^(" + "|".join(re.escape(pattern).replace(r"\*", r"\d+") for pattern in patterns) + ")$"


class WholeFolders:
    """
    Writes a folder whole or not at all, and reads one state of it, where the package is installed; the code that
    travels with a checkpoint does as `transformers` does.
    """

    files: Any = None
    """`transrec_hf.files`, if it is there."""

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
    A model whose checkpoints may be thin: they hold the weights that differ from those of other checkpoints (the
    towers that it was made with, or the model that it was trained from), and name these by id, commit and SHA-256.
    """

    saves_thin = False
    """Whether `save_pretrained` writes thin checkpoints, where it is not told."""
    _pushes = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == "__main__":
            cls._auto_class = None  # the code of a program does not travel with its checkpoints

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
        As in `PreTrainedModel`; what a thin checkpoint does not hold is taken from where it says, offline too if it is
        in the cache.

        Raises:
            `ValueError`: If a checkpoint that it names is not what it was.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.weights_from:
            place = {name: kwargs[name] for name in ACCESS if name in kwargs}
            model._take_named(str(pretrained_model_name_or_path), place)
        return loaded

    @torch.no_grad()
    def _take_named(self, checkpoint: str, place: dict[str, Any]) -> None:
        """Fill in what the checkpoint names."""
        own = {name.replace(".base_layer.", "."): weight for name, weight in self.state_dict().items()}  # of adapters
        for source in self.config.weights_from:
            name, revision = source["name"], source["revision"]
            if revision is None and not os.path.isdir(name):
                raise ValueError(
                    f"{checkpoint}: is thin, and the folder {name} that its other weights are in is not there. Put it "
                    "back, or get a checkpoint that was saved with thin=False."
                )
            found = weights_hash(name, **place, **({"revision": revision} if revision else {}))[0]
            if found != source["sha256"]:
                raise ValueError(
                    f"{checkpoint}: is thin, and {name} is not what it was saved with: its weights have SHA-256 "
                    f"{found[:12]}..., not {source['sha256'][:12]}.... Get {name} as it was, or a checkpoint that was "
                    "saved with thin=False."
                )
            weights = self._weights_of(
                name, source["prefix"], {**place, **({"revision": revision} if revision else {})}
            )
            is_named = re.compile(as_expression(source["weights"])).match
            for key in filter(is_named, own):
                if key not in weights or weights[key].shape != own[key].shape:
                    raise ValueError(f"{checkpoint}: is thin, and {name} has no {key} of this shape")
                own[key].copy_(weights[key])

    def _weights_of(self, name: str, prefix: str, place: dict[str, Any]) -> dict[str, Tensor]:
        """Weights of a tower or, with its prefix, of a checkpoint of this class, by their names in this model."""
        config = PreTrainedConfig.get_config_dict(name, **place)[0]
        if config.get("model_type") == self.config.model_type:
            weights = type(self).from_pretrained(name, **place).state_dict()
            return {key: weight for key, weight in weights.items() if key.startswith(prefix)}
        part = next(modality for modality in MODALITIES.values() if f"item_encoder.{modality.tower}." == prefix)
        tower = load_tower(name, part.config, **place)
        return {f"{prefix}{key}": weight for key, weight in tower.state_dict().items()}

    def _candidates(self) -> Iterator[tuple[str, str | None, str]]:
        """Name, revision and prefix of the checkpoints that some of these weights may be of, the likeliest first."""
        for source in self.config.weights_from or []:
            yield source["name"], source["revision"], source["prefix"]
        for name, tower in self.item_encoder.towers.items():
            if tower.config._name_or_path:
                prefix = f"item_encoder.{MODALITIES[name].tower}."
                yield tower.config._name_or_path, getattr(tower.config, "_commit_hash", None), prefix
        if self.config._name_or_path:
            yield self.config._name_or_path, getattr(self.config, "_commit_hash", None), ""

    def _without_named(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The weights that no other checkpoint has, and where the others are."""
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
                continue  # it is not there, or not readable without code of its own
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
        As in `PreTrainedModel`.

        Args:
            save_directory (`str`): The folder.
            thin (`bool`, *optional*): Leave out the weights that the checkpoints have with which the model was made
                (its towers, or the model that it was trained from), and name these by id, commit and SHA-256:
                megabytes instead of hundreds. `saves_thin` of the model if not given.
            state_dict (`dict`, *optional*): Weights to save instead of the model's.
            args, kwargs: Of `PreTrainedModel.save_pretrained`.

        Raises:
            `ValueError`: If a thin checkpoint is asked for, and no other checkpoint has these weights, or it would be
                pushed and one of them is a folder of this machine.
        """
        before = self.config.weights_from
        sources: list[dict[str, Any]] = []
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if (self.saves_thin if thin is None else thin) and not is_adapter:
            state_dict, sources = self._without_named(self.state_dict() if state_dict is None else state_dict)
            if not sources and thin:
                raise ValueError(
                    "a thin checkpoint would hold all weights: none of them is as in the checkpoints that the model "
                    "was made with, or these are not at hand. Save it with thin=False."
                )
            if self._pushes or kwargs.get("push_to_hub"):
                refuse_local(sources)
        self.config.weights_from = sources or None
        try:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            self.config.weights_from = before

    def push_to_hub(self, repo_id: str, *args: Any, thin: bool | None = None, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`; for `thin` see [`~ThinCheckpoints.save_pretrained`]."""
        before = self.saves_thin
        self._pushes, self.saves_thin = True, before if thin is None else thin
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            self._pushes, self.saves_thin = False, before


class Bottleneck(nn.Module):
    """
    A bottleneck adapter (Houlsby et al., 2019): two small layers whose output, zero at the start, is added to that of
    a sub-layer. A serial one reads that output, a parallel one what the sub-layer reads.
    """

    def __init__(self, width: int, output_width: int, size: int):
        super().__init__()
        # parameters and no linear layers: the towers' own initialisation would undo the start at zero
        self.down = nn.Parameter(torch.randn(size, width) / width**0.5)
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(output_width, size))
        self.up_bias = nn.Parameter(torch.zeros(output_width))

    def forward(self, states: Tensor) -> Tensor:
        hidden = nn.functional.gelu(nn.functional.linear(states, self.down, self.down_bias))
        return nn.functional.linear(hidden, self.up, self.up_bias)

    def remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A hook of the first layer of the sub-layer: what that reads."""
        self.__dict__["read"] = inputs[0]

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A hook of its last layer."""
        return output + self(self.__dict__.pop("read", output))


def sub_layers(root: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Linear]]:
    """
    The sub-layers of all Transformer blocks inside: `"attention"` or `"feed_forward"`, its first and its last linear
    layer. A block is an element of a list of modules with an attention, told by the name of its class, and what else
    is linear in it is the feed-forward layer.
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
    Add a [`Bottleneck`] to the blocks inside, which then has the names of the layers it is added to.

    Args:
        root (`nn.Module`): A tower, or the user encoder.
        size (`int`): Width of the bottlenecks.
        places (`str`, *optional*, defaults to `"houlsby"`): After attention and feed-forward layer, or `"pfeiffer"`,
            after the feed-forward layer only.
        parallel (`bool`, *optional*, defaults to `False`): Read what the sub-layer reads, not what it says.
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
    """A model of which parts are trained: the top blocks of its towers, bottleneck adapters, or side networks."""

    def post_init(self) -> None:
        if self.config.bottleneck:
            self._insert()
        super().post_init()

    def get_adapter_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in `PreTrainedModel`, with names of DoRA's magnitudes that `load_adapter` finds, and not PEFT alone."""
        weights = super().get_adapter_state_dict(*args, **kwargs)
        return {f"{key}.weight" if key.endswith("_vector") else key: weight for key, weight in weights.items()}

    def _insert(self) -> None:
        for part in (*self.item_encoder.towers.values(), self.user_encoder):
            insert_bottlenecks(part, **self.config.bottleneck)

    def freeze_towers(self, trainable_blocks: int | None) -> None:
        """
        Train only the top blocks of each tower, as the paper does with two.

        Args:
            trainable_blocks (`int`, *optional*):
                Blocks at the top of each tower that are trained, with whatever follows them; 0 freezes the towers,
                `None` trains them whole. Projections, pooling and the user encoder are always trained.
        """
        for tower in self.item_encoder.towers.values():
            freeze_below(tower, trainable_blocks)
        self.train(self.training)

    def add_bottlenecks(self, size: int = 32, places: str = "houlsby", parallel: bool = False) -> None:
        """
        Add bottleneck adapters to the Transformer blocks of towers and user encoder, and freeze all else in these;
        what a model has already stays as it is.

        Args:
            size (`int`, *optional*, defaults to 32): Their width.
            places (`str`, *optional*, defaults to `"houlsby"`): After attention and feed-forward layer, or
                `"pfeiffer"`, after the feed-forward layer only.
            parallel (`bool`, *optional*, defaults to `False`): Read what the sub-layer reads, not what it says.

        Raises:
            `ValueError`: If there are others already, or the model has no Transformer block.
        """
        wanted = {"size": size, "places": places, "parallel": parallel}
        if self.config.bottleneck not in (None, wanted):
            raise ValueError(f"the model has other bottleneck adapters: {self.config.bottleneck}, not {wanted}")
        if self.config.bottleneck is None:
            self.config.bottleneck = wanted
            self._insert()
        for part in (*self.item_encoder.towers.values(), self.user_encoder):
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(".bottleneck." in name)
        if not any(isinstance(module, Bottleneck) for module in self.modules()):
            self.config.bottleneck = None
            raise ValueError(
                "neither a tower nor the user encoder has Transformer blocks to put bottleneck adapters in"
            )
        self.train(self.training)

    def add_side(self, size: int = 64) -> None:
        """
        Freeze the towers of texts and images, and put a [`SideNetwork`] beside each; one that a model has already
        stays as it is. The towers of sounds and videos are frozen and have none. No weight changes its value by it:
        there is nothing to merge.

        Args:
            size (`int`, *optional*, defaults to 64): Width of the bottlenecks in it.

        Raises:
            `ValueError`: If there are others already, or the model reads neither texts nor images by a tower.
        """
        encoder, before = self.item_encoder, self.config.side
        towers = {name: tower for name, tower in encoder.towers.items() if name in ("text", "image")}
        if not towers:
            raise ValueError("a side network is beside a tower of texts or images, and this model has none")
        if before is not None and before["size"] != size:
            raise ValueError(f"the model has other side networks, of size {before['size']}, not {size}")
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
    """Raises `ValueError` if a thin checkpoint names a folder: others could not load it."""
    for source in sources:
        if source.get("revision") is None:
            raise ValueError(
                f"a thin checkpoint whose other weights are in the folder {source.get('name')} works on this machine "
                "only: push it with thin=False, or push that folder first and load the model from there"
            )


__all__ = ["Bottleneck", "ThinCheckpoints", "TunableModel"]
