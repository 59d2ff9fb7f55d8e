"""The options that commands share: where a model, items and interactions come from, and how these are split."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers.utils import logging

from ..data.catalogue import MODALITY_POLICIES, Catalogue, load_catalogue
from ..data.demo import demo_config, demo_processor, demo_world
from ..data.interactions import Sequences, Split, k_core, load_interactions, of_modality, temporal_split
from ..errors import DataError, bad_input
from ..evaluation.protocol import PROTOCOLS
from ..items.codes import ItemQuantizer
from ..items.meeting import ItemStatistics, match_items, needs_item_statistics, set_item_vectors
from ..items.store import content_vectors
from ..model.configuration_transrec import TransRecConfig
from ..model.modalities_transrec import MODALITIES
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.checkpoint import check_fits, check_place, load_checkpoint


if TYPE_CHECKING:
    from ..training.trainer import TransRecTrainer

logger = logging.get_logger(__name__)

DEMO = "demo:"
DEFAULT, PAPER = TransRecConfig(), TransRecConfig.paper()
PRESETS = {"default": DEFAULT, "paper": PAPER, "esasrec": TransRecConfig.esasrec(1)}


def option(default: Any, text: str, **kwargs: Any) -> Any:
    """A field of a dataclass of options, with its line in `--help`."""
    return field(default=default, metadata={"help": text, **kwargs})


# Towers and num_items have their own options below; fields that a checkpoint does not hold are not settings.
OTHERS = (
    *(*TransRecConfig.sub_configs_defaults, "num_items", "bottleneck", "side"),
    *("weights_from", "quantizer_hash", "catalogue_shift"),
)
CONFIG_FIELDS = tuple(
    field.name
    for field in fields(TransRecConfig)
    if field.name in TransRecConfig.__annotations__ and field.name not in OTHERS
)
_ARGUMENT = re.compile(r"^ {8}(\w+) \(.*\):\n((?: {12}.+\n)+)", re.MULTILINE)
MEANING = {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(TransRecConfig.__doc__ or "")}
ConfigArguments = make_dataclass(
    "ConfigArguments",
    [
        (
            name,
            list[int] | None
            if name == "matryoshka_dims"
            else type(getattr(DEFAULT, name)) | None
            if getattr(DEFAULT, name) is not None
            else int | None,
            option(None, f"{MEANING.get(name, '')} [{getattr(DEFAULT, name)}; paper: {getattr(PAPER, name)}]"),
        )
        for name in CONFIG_FIELDS
    ],
)


def fit_to(catalogue: Catalogue, model: TransRecModel, checkpoint: str) -> ItemStatistics | None:
    """
    Match what a checkpoint knows of single items to those of a catalogue, by id; see [`match_items`].

    Returns:
        [`ItemStatistics`]: Those of the catalogue's items, if the model needs any and the checkpoint has them.

    Raises:
        [`DataError`]: If the model cannot represent every item of the catalogue.
    """
    known = None
    if needs_item_statistics(model):
        known = match_items(model, catalogue, ItemStatistics.from_pretrained(checkpoint))
    check_fits(model, catalogue)
    return known


@dataclass
class ModelArguments(ConfigArguments):  # type: ignore[valid-type, misc]
    """Where the model comes from. Every field of [`TransRecConfig`] is an option too."""

    _argument_group_name = "model"
    from_checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model to start from.")
    text_model: str | None = option(None, "Folder or Hub id of a text encoder, for a new model.")
    vision_model: str | None = option(None, "Folder or Hub id of an image encoder, for a new model.")
    audio_model: str | None = option(None, "Folder or Hub id of an encoder of sounds, for a new model.")
    video_model: str | None = option(None, "Folder or Hub id of an encoder of images or clips, for a new model.")
    id_baseline: bool = option(False, "Make a new model without towers, with one vector for the id of each item.")
    preset: Literal["default", "paper", "esasrec"] = option(
        "default", "Settings of a new model (esasrec for the ID baseline); other options override them."
    )
    hybrid: bool = option(
        False, "Learn a vector for the id of each item too. Not for a source model, since ids do not transfer."
    )
    max_text_length: int | None = option(None, "Most tokens that are read of a text [64, or as in the checkpoint].")

    def __post_init__(self) -> None:
        origins = {
            "from_checkpoint": self.from_checkpoint,
            "text_model, vision_model, audio_model or video_model": any(self.towers.values()),
            "id_baseline": self.id_baseline,
        }
        given = [name for name, value in origins.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.hybrid and self.id_baseline:
            raise ValueError(
                "hybrid adds ID vectors to content, but id_baseline reads no content: leave one of them out"
            )
        if self.preset == "esasrec" and not self.id_baseline:
            raise ValueError("preset esasrec is for a model that reads item ids only: add id_baseline")
        if self.from_checkpoint and self.preset != "default":
            raise ValueError(
                "preset is for a new model, and from_checkpoint has its own settings: leave one of them out"
            )

    @property
    def towers(self) -> dict[str, str | None]:
        """Folder or Hub id of every tower, by its name in the table."""
        return {modality.tower: getattr(self, modality.tower) for modality in MODALITIES.values() if modality.tower}

    def load(self, catalogue: Catalogue, is_demo: bool = False) -> tuple[TransRecModel, TransRecProcessor | None]:
        """
        The model and its processor (`None` for the ID baseline).

        Args:
            catalogue ([`Catalogue`]): The items; the ID baseline needs their number.
            is_demo (`bool`, *optional*, defaults to `False`): For items of the demo world, tiny towers are made if
                none is named.

        Raises:
            [`DataError`]: If no towers are named, one cannot be read, or settings contradict each other.
        """
        changes = {name: getattr(self, name) for name in CONFIG_FIELDS if getattr(self, name) is not None}
        if self.from_checkpoint:
            model, processor = load_checkpoint(self.from_checkpoint, **changes)
            fit_to(catalogue, model, self.from_checkpoint)
            if self.hybrid and model.config.num_items is None:
                with bad_input("model configuration"):
                    set_item_vectors(model, torch.zeros(len(catalogue), model.config.hidden_size))
            if processor is not None and self.max_text_length is not None:
                processor.max_text_length = self.max_text_length
            return model, processor
        base = demo_config() if is_demo and self.preset == "default" else PRESETS[self.preset]
        settings = changes if base is DEFAULT else {**{name: getattr(base, name) for name in CONFIG_FIELDS}, **changes}
        if self.hybrid:
            settings["num_items"] = len(catalogue)
        max_text_length = 64 if self.max_text_length is None else self.max_text_length
        if self.id_baseline:
            with bad_input("model configuration"):
                return TransRecModel(TransRecConfig(num_items=len(catalogue), **settings)), None
        named: dict[str, Any] = {name: tower for name, tower in self.towers.items() if tower}
        codes: Any = catalogue.contents.get("codes")
        if settings.get("num_codebooks") and codes is not None and codes.quantizer is not None:
            quantizer = ItemQuantizer.from_pretrained(codes.quantizer.parent)
            own = {"hidden_size": quantizer.size, "codebook_size": quantizer.codebooks.shape[1]}
            settings |= {name: value for name, value in own.items() if name not in changes}
        given = {"features_size": settings.get("features_size"), "num_codebooks": settings.get("num_codebooks")}
        reads = named or any(given.values())
        given |= {"codebook_size": settings["codebook_size"]} if "codebook_size" in settings else {}
        if reads:
            for tower in named.values():
                check_place(tower)
            with bad_input(" and ".join(f"{name} {tower}" for name, tower in named.items()) or "model configuration"):
                model = TransRecModel.from_text_vision_pretrained(**named, **settings)
                return model, TransRecProcessor.from_towers(**named, max_text_length=max_text_length, **given)
        if not is_demo:
            raise DataError(
                "no model: give --text_model, --vision_model, --audio_model, --video_model, --features_size, "
                "--num_codebooks or some of them, or --from_checkpoint, or --id_baseline"
            )
        with bad_input("model configuration"):
            model, processor = TransRecModel(demo_config(**settings)), demo_processor()
        processor.max_text_length = max_text_length
        return model, processor


@dataclass
class DataArguments:
    """Where items and interactions come from."""

    _argument_group_name = "data"
    data: str | None = option(
        None, "Folder or Hub id of items and interactions; demo:source and demo:target are built in."
    )
    items: str | None = option(None, "The items alone, instead of --data: file, folder or Hub id.")
    interactions: str | None = option(None, "The interactions for --items: file, folder or Hub id.")
    revision: str | None = option(None, "Revision of the Hub data set.")
    modality_policy: str = option(
        "both",
        "Which modalities of an item the model sees; one_per_item draws one at random.",
        choices=MODALITY_POLICIES,
    )
    modality_seed: int = option(0, "Seed for one_per_item.")
    modality: str | None = option(
        None, "Keep only the items that have this modality, and only this content of them.", choices=tuple(MODALITIES)
    )
    k_core: int | None = option(None, "Keep only users and items with at least this many interactions [all].")

    @property
    def name(self) -> str:
        """What to call the data in print."""
        return str(self.items or self.data)

    @property
    def is_demo(self) -> bool:
        """Whether these are items of the demo world."""
        return self.items is None and (self.data or "").startswith(DEMO)

    def load_items(self) -> Catalogue:
        """Read and check the items. Raises [`DataError`]."""
        catalogue = self._draw_demo()[0] if self.is_demo else self._read_items()
        if self.modality is None:
            return catalogue
        return catalogue.select(catalogue.has(self.modality)).with_policy(self.modality)

    def load(self) -> tuple[Catalogue, Sequences]:
        """Read and check items and interactions. Raises [`DataError`]."""
        if bool(self.items) != bool(self.interactions):
            raise DataError("--items and --interactions belong together: give both, or --data alone")
        if self.is_demo:
            catalogue, sequences = self._draw_demo()
        else:
            catalogue = self._read_items()
            sequences = load_interactions(self.interactions or self.data, catalogue, revision=self.revision)
        if self.modality is not None:
            catalogue, sequences = of_modality(catalogue, sequences, self.modality)
        if self.k_core is not None:
            catalogue, sequences = k_core(catalogue, sequences, self.k_core)
        logger.info("%r, %r", catalogue, sequences)
        return catalogue, sequences

    def _read_items(self) -> Catalogue:
        if not (self.items or self.data):
            raise DataError("there are no data: give --data, or --items and --interactions")
        return load_catalogue(
            self.items or self.data,
            revision=self.revision,
            modality_policy=self.modality_policy,
            seed=self.modality_seed,
        )

    def _draw_demo(self) -> tuple[Catalogue, Sequences]:
        name = str(self.data).removeprefix(DEMO)
        if name not in ("source", "target"):
            raise DataError(f"{self.data}: the demo world has demo:source and demo:target")
        platform = getattr(demo_world(), name)
        return platform.catalogue.with_policy(self.modality_policy, self.modality_seed), platform.sequences


@dataclass
class SplitArguments:
    """How the interactions are split, what is trained on, and what is ranked."""

    _argument_group_name = "split and protocol"
    split: Literal["leave_one_out", "temporal"] = option(
        "leave_one_out", "Test on each user's last item, or on the first one after test_from."
    )
    validation_from: str | None = option(
        None,
        "Start of the validation period of a temporal split: a timestamp, or a date if timestamps are seconds since "
        "1970.",
    )
    test_from: str | None = option(None, "Start of the test period of a temporal split.")
    protocol: str = option("full", "Evaluation protocol.", choices=tuple(PROTOCOLS))
    user_fraction: float | None = option(
        None, "Share of the training users to train on, drawn at random [all of them]."
    )
    max_train_users: int | None = option(None, "Largest number of users to train on, drawn at random [all of them].")
    sample_seed: int = option(0, "Seed of this sample of users; a smaller sample is part of a larger one.")

    def __post_init__(self) -> None:
        bounds = (self.validation_from, self.test_from)
        if self.split == "temporal" and None in bounds:
            raise ValueError("a temporal split needs validation_from and test_from, in the unit of the timestamps")
        if self.split != "temporal" and bounds != (None, None):
            raise ValueError("validation_from and test_from are for split=temporal")
        if self.user_fraction is not None and not 0 < self.user_fraction <= 1:
            raise ValueError(f"user_fraction must be above 0 and at most 1, got {self.user_fraction}")
        if self.max_train_users is not None and self.max_train_users < 1:
            raise ValueError(f"max_train_users must be 1 or more, got {self.max_train_users}")

    def apply(self, sequences: Sequences, max_history: int) -> Split:
        """Split under the protocol, for a model that reads `max_history` items. Raises [`DataError`]."""
        if self.split == "temporal":
            split = temporal_split(sequences, as_time(self.validation_from), as_time(self.test_from))
        else:
            split = PROTOCOLS[self.protocol].split(sequences, max_history)
        users = len(split.train)
        kept = min(math.ceil((self.user_fraction or 1) * users), self.max_train_users or users)
        if kept == users:
            return split
        drawn = np.random.default_rng(self.sample_seed).permutation(users)[:kept]
        logger.info("Training on %s of %s users", f"{kept:,}", f"{users:,}")
        return dataclasses.replace(split, train=split.train.select(np.sort(drawn)))


def as_time(value: Any) -> int:
    """A timestamp as it is, or a date in seconds since 1970 (in UTC, unless it names a time zone)."""
    try:
        return int(value)
    except ValueError:
        pass
    try:
        date = pd.Timestamp(value)
    except ValueError:
        raise DataError(f"{value!r} is neither an integer nor a date such as 2024-01-31") from None
    return int((date.tz_localize("UTC") if date.tzinfo is None else date).timestamp())


def content_baseline(trainer: TransRecTrainer, towers: Mapping[str, str | None]) -> torch.Tensor | None:
    """
    Item vectors for the baseline of content neighbours, or `None` if no tower is named. They are read from the
    activation store of the run, if it has the states of these towers.
    """
    if not any(towers.values()):
        return None
    args, processor = trainer.args, trainer.source.processor
    with trainer.quiet(), trainer.autocast_smart_context_manager():
        return content_vectors(
            towers,
            trainer.source.catalogue,
            args.device,
            text_depths=trainer.model.config.text_depths,
            max_text_length=64 if processor is None else processor.max_text_length,
            store=args.activation_store,
            dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
