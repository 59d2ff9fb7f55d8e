"""What the scripts share: their options, YAML files, and the one line that a user gets on bad input."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser

from ..data.catalogue import MODALITY_POLICIES, Catalogue, load_catalogue
from ..data.demo import demo_config, demo_processor, demo_world
from ..data.interactions import Sequences, Split, k_core, load_interactions, temporal_split
from ..errors import DataError, bad_input, one_line
from ..evaluation.protocol import PROTOCOLS
from ..model.configuration_transrec import TransRecConfig
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.checkpoint import check_place, load_checkpoint


logger = logging.getLogger(__name__)

DEMO = "demo:"
DEFAULT, PAPER = TransRecConfig(), TransRecConfig.paper()


def option(default: Any, text: str, **kwargs: Any) -> Any:
    """A field of a dataclass of options, with its line in `--help`."""
    return field(default=default, metadata={"help": text, **kwargs})


# Towers and num_items are options of their own below.
CONFIG_FIELDS = tuple(
    field.name
    for field in fields(TransRecConfig)
    if field.name in TransRecConfig.__annotations__ and field.name not in ("text_config", "vision_config", "num_items")
)
ConfigArguments = make_dataclass(
    "ConfigArguments",
    [
        (
            name,
            type(getattr(DEFAULT, name)) | None if getattr(DEFAULT, name) is not None else int | None,
            option(None, f"TransRecConfig.{name} [default: {getattr(DEFAULT, name)}, paper: {getattr(PAPER, name)}]"),
        )
        for name in CONFIG_FIELDS
    ],
)


@dataclass
class ModelArguments(ConfigArguments):  # type: ignore[valid-type, misc]
    """Where the model comes from. Every field of [`TransRecConfig`] is an option too."""

    from_checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model to start from.")
    text_model: str | None = option(None, "Folder or Hub id of a text encoder, for a new model.")
    vision_model: str | None = option(None, "Folder or Hub id of an image encoder, for a new model.")
    id_baseline: bool = option(False, "A new model without towers, of one vector per item.")
    preset: Literal["default", "paper"] = option("default", "Settings of a new model; others can be set by name.")
    max_text_length: int | None = option(None, "Tokens after which a text is cut [64, or as in the checkpoint].")

    def __post_init__(self) -> None:
        origins = {
            "from_checkpoint": self.from_checkpoint,
            "text_model or vision_model": self.text_model or self.vision_model,
            "id_baseline": self.id_baseline,
        }
        given = [name for name, value in origins.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.from_checkpoint and self.preset != "default":
            raise ValueError("preset is for a new model, from_checkpoint brings its own settings: leave one out")

    def load(self, catalogue: Catalogue, is_demo: bool = False) -> tuple[TransRecModel, TransRecProcessor | None]:
        """
        The model and its processor (`None` for the ID baseline).

        Args:
            catalogue ([`Catalogue`]): the items, which the ID baseline counts.
            is_demo (`bool`, *optional*, defaults to `False`): for items of the demo world, tiny towers are made if
                none is named.

        Raises:
            [`DataError`]: if no towers are named, one cannot be read, or settings contradict each other.
        """
        changes = {name: getattr(self, name) for name in CONFIG_FIELDS if getattr(self, name) is not None}
        if self.from_checkpoint:
            model, processor = load_checkpoint(self.from_checkpoint, **changes)
            if processor is not None and self.max_text_length is not None:
                processor.max_text_length = self.max_text_length
            return model, processor
        base = PAPER if self.preset == "paper" else demo_config() if is_demo else DEFAULT
        settings = {**{name: getattr(base, name) for name in CONFIG_FIELDS}, **changes}
        max_text_length = 64 if self.max_text_length is None else self.max_text_length
        if self.id_baseline:
            with bad_input("model configuration"):
                return TransRecModel(TransRecConfig(num_items=len(catalogue), **settings)), None
        if self.text_model or self.vision_model:
            towers = {"text_model": self.text_model, "vision_model": self.vision_model}
            named = {name: tower for name, tower in towers.items() if tower}
            for tower in named.values():
                check_place(tower)
            with bad_input(" and ".join(f"{name} {tower}" for name, tower in named.items())):
                model = TransRecModel.from_text_vision_pretrained(**towers, **settings)
                return model, TransRecProcessor.from_towers(**towers, max_text_length=max_text_length)
        if not is_demo:
            raise DataError("no model: give --text_model, --vision_model or both, --from_checkpoint, or --id_baseline")
        with bad_input("model configuration"):
            model, processor = TransRecModel(demo_config(**settings)), demo_processor()
        processor.max_text_length = max_text_length
        return model, processor


@dataclass
class DataArguments:
    """Where items and interactions come from."""

    data: str | None = option(
        None, "Folder or Hub id with items and interactions; demo:source and demo:target are built in."
    )
    items: str | None = option(None, "The items alone, instead of data: file, folder or Hub id.")
    interactions: str | None = option(None, "The interactions that go with items.")
    revision: str | None = option(None, "Revision of the Hub data set.")
    modality_policy: str = option(
        "both", "Which modalities of an item are shown; one_per_item draws one.", choices=MODALITY_POLICIES
    )
    modality_seed: int = option(0, "Seed of the draw of one_per_item.")
    k_core: int | None = option(None, "Keep users and items with at least as many interactions [all].")

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
        if self.is_demo:
            return self._draw_demo()[0]
        if not (self.items or self.data):
            raise DataError("no data: give --data, or --items and --interactions")
        return load_catalogue(
            self.items or self.data,
            revision=self.revision,
            modality_policy=self.modality_policy,
            seed=self.modality_seed,
        )

    def load(self) -> tuple[Catalogue, Sequences]:
        """Read and check items and interactions. Raises [`DataError`]."""
        if bool(self.items) != bool(self.interactions):
            raise DataError("--items and --interactions belong together: give both, or --data alone")
        if self.is_demo:
            catalogue, sequences = self._draw_demo()
        else:
            catalogue = self.load_items()
            sequences = load_interactions(self.interactions or self.data, catalogue, revision=self.revision)
        if self.k_core is not None:
            catalogue, sequences = k_core(catalogue, sequences, self.k_core)
        logger.info("%r, %r", catalogue, sequences)
        return catalogue, sequences

    def _draw_demo(self) -> tuple[Catalogue, Sequences]:
        name = str(self.data).removeprefix(DEMO)
        if name not in ("source", "target"):
            raise DataError(f"{self.data}: the demo world has demo:source and demo:target")
        platform = getattr(demo_world(), name)
        return platform.catalogue.with_policy(self.modality_policy, self.modality_seed), platform.sequences


@dataclass
class SplitArguments:
    """How the interactions are split, and what is ranked."""

    split: Literal["leave_one_out", "temporal"] = option(
        "leave_one_out", "Test on each user's last item, or on the first one after test_from."
    )
    validation_from: int | None = option(None, "First timestamp of the validation period of a temporal split.")
    test_from: int | None = option(None, "First timestamp of the test period of a temporal split.")
    protocol: str = option("full", "Evaluation protocol.", choices=tuple(PROTOCOLS))

    def __post_init__(self) -> None:
        bounds = (self.validation_from, self.test_from)
        if self.split == "temporal" and None in bounds:
            raise ValueError("a temporal split needs validation_from and test_from, in the unit of the timestamps")
        if self.split != "temporal" and bounds != (None, None):
            raise ValueError("validation_from and test_from are for split=temporal")

    def apply(self, sequences: Sequences, max_history: int) -> Split:
        """Split under the protocol for a model that reads `max_history` items. Raises [`DataError`]."""
        if self.split == "temporal":
            return temporal_split(sequences, self.validation_from, self.test_from)  # type: ignore[arg-type]
        return PROTOCOLS[self.protocol].split(sequences, max_history)


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    demo_yaml: str | os.PathLike | None = None,
    **defaults: Any,
) -> tuple[Any, ...]:
    """
    One object per dataclass, from `[options.yaml] [--option value ...]`; the command line wins over the file.

    Args:
        dataclass_types (`Sequence[type]`): dataclasses of options.
        argv (`Sequence[str]`, *optional*): `sys.argv[1:]` if not given.
        description (`str`, *optional*): for `--help`, the script's docstring.
        demo_yaml (`str` or `os.PathLike`, *optional*): read if neither a file nor data are named.
        defaults: of this script, where they differ from those of the dataclasses.

    Raises:
        [`DataError`]: for an unknown option (naming the nearest one), or a value that is none of its type.
    """
    parser = _Parser(
        dataclass_types,
        usage="%(prog)s [options.yaml] [--option value ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        parser.set_defaults(**parser.read_yaml(arguments.pop(0)))
    elif demo_yaml is not None and not any(a.split("=")[0] in ("--data", "--items") for a in arguments):
        parser.set_defaults(**parser.read_yaml(demo_yaml))
    with bad_input("bad options"):
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        raise DataError(f"unknown option {unknown[0]}{parser.nearest(unknown[0])}")
    return tuple(parsed)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """An [`~transformers.HfArgumentParser`] that also reads YAML, checks it as strictly, and raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise DataError(message)

    def nearest(self, name: str) -> str:
        """The end of an error message: the option that was probably meant."""
        names = {action.dest for action in self._actions}
        found = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), names, n=1)
        return f": did you mean {found[0]}?" if found else "; --help lists all"

    def read_yaml(self, path: str | os.PathLike) -> dict[str, Any]:
        """The options in a file. Values are parsed as on the command line, so `1e-3` is a number and `no` a word."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path}: not YAML ({one_line(error)})") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: write one 'option: value' a line")
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if name not in hints:
                raise DataError(f"{path}: unknown option {name}{self.nearest(str(name))}")
            if value is None and type(None) in get_args(hints[name]):
                parsed[name] = None
                continue
            try:
                namespace, rest = self.parse_known_args(_as_arguments(name, value, hints[name]))
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
            if rest:
                raise DataError(f"{path}: argument --{name}: one value expected, got {value}")
            parsed[name] = getattr(namespace, name)
        return parsed


def _as_arguments(name: str, value: Any, hint: Any) -> list[str]:
    """A value of a YAML file as one would write it on the command line."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
        value = "yes" if value else "no"  # YAML takes these words for booleans, as in eval_strategy: no
    return [f"--{name}={'' if value is None else value}"]


def script(main: Callable[..., Any]) -> Callable[..., Any]:
    """
    Decorates the `main(argv=None)` of a script: says what is happening, and on bad input or a full disk ends with one
    line on stderr and exit code 2. `TRANSREC_DEBUG=1` shows where the error came from as well.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> Any:
        logging.basicConfig(format="%(message)s")
        logging.getLogger(__package__).setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        try:
            return main(argv)
        except (DataError, OSError, SafetensorError) as error:
            if os.environ.get("TRANSREC_DEBUG"):
                raise
            print(f"error: {error if isinstance(error, DataError) else one_line(error)}", file=sys.stderr)
            raise SystemExit(2) from None

    return run
