"""From `[options.yaml] [--option value ...]` to dataclasses of options, and a `--help` with our options first."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import DataError, bad_input, one_line, shortened


SHORT_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "checkpoint": "from_checkpoint",
    "dim": "hidden_size",
    "dropout": "hidden_dropout_prob",
    "epochs": "num_train_epochs",
    "heads": "num_attention_heads",
    "k": "top_k",
    "layers": "num_hidden_layers",
    "loss": "objective",
    "lr": "learning_rate",
    "max_length": "max_position_embeddings",
    "model": "from_checkpoint",
    "negatives": "num_negatives",
    "out": "output_dir",
    "output": "output_dir",
    "patience": "early_stopping_patience",
    "steps": "max_steps",
    "wd": "weight_decay",
    "workers": "dataloader_num_workers",
}
"""Names that people often try, and the option that each of them means."""


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    verb: Callable[..., Any] | None = None,
    *,
    positional: str | None = None,
    later: Mapping[str, Collection[str]] | None = None,
    **defaults: Any,
) -> tuple[Any, ...]:
    """
    Parse `[options.yaml] [--option value ...]` into one object per dataclass. The command line overrides the file.

    Args:
        dataclass_types (`Sequence[type]`): Dataclasses of options; `_argument_group_name` is the heading of each.
        argv (`Sequence[str]`, *optional*): The arguments, `sys.argv[1:]` if not given.
        verb (`Callable`, *optional*): The function that uses the options. Its name and docstring begin `--help`.
        positional (`str`, *optional*): The option that may be given first, without its name.
        later (`dict[str, Collection[str]]`, *optional*): Headings at the end of `--help`, and the options under them.
        defaults: Defaults of this command that differ from those of the dataclasses.

    Raises:
        [`DataError`]: For an unknown option (the message names the most similar one), or a value of another type.
    """
    parser = _Parser(
        dataclass_types,
        prog=f"transrec {verb.__name__.replace('_', '-')}" if verb else None,
        usage=f"%(prog)s {f'[{positional.upper()}] ' if positional else ''}[options.yaml] [--option value ...]",
        description=inspect.getdoc(verb) if verb else None,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.tidy(later or {})
    parser.set_defaults(**defaults)
    arguments = list(sys.argv[1:] if argv is None else argv)
    while arguments and not arguments[0].startswith("-"):
        first = arguments.pop(0)
        is_yaml = Path(first).suffix in (".yaml", ".yml")
        if positional is None and not is_yaml and not Path(first).exists():
            name = shortened(first)
            raise DataError(f"{name!r} stands without the name of its option: write --NAME VALUE, see --help")
        if positional is None or is_yaml:
            parser.set_defaults(**parser.read_yaml(first))
        elif any(argument.partition("=")[0] == f"--{positional}" for argument in arguments):
            raise DataError(f"{first}: {positional} is given twice, first and as --{positional}")
        else:
            arguments += [f"--{positional}", first]
            positional = None
    with bad_input("bad options"):
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        raise DataError(f"unknown option {unknown[0]}{parser.nearest(unknown[0])}")
    return tuple(parsed)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, names each option once, and shows a default only if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        kind = getattr(action.type, "__name__", "str")
        metavar = {"str": "TEXT", "int": "INT", "float": "FLOAT"}.get(kind, "VALUE")
        value = "" if action.nargs == "?" else f" {self._format_args(action, metavar)}"
        return action.option_strings[0] + value


class _Parser(HfArgumentParser):
    """An [`~transformers.HfArgumentParser`] that also reads YAML, checks it as strictly, and raises [`DataError`]."""

    def error(self, message: str) -> NoReturn:
        if re.fullmatch(r"argument --seed: invalid int value: '[\d\s,\[\]]+'", message):
            message += (
                f". A run has one seed. For several, write a loop: for seed in 0 1 2; do {self.prog} ... --seed $seed "
                "--output_dir runs/seed-$seed; done. Only transfer-report and benchmark take --seeds 0,1,2."
            )
        raise DataError(message)

    def tidy(self, later: Mapping[str, Collection[str]]) -> None:
        """
        Let `bool | None` options need no value, hide `--no_` forms from `--help`, move `later` options to its end.
        """
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for action in self._actions:
            if bool in get_args(hints.get(action.dest)) and action.nargs is None:
                action.nargs, action.const = "?", True
        heading_of = {name: title for title, names in later.items() for name in names}
        moved: dict[str, list[argparse.Action]] = {title: [] for title in later}
        for group in self._action_groups:
            for action in list(group._group_actions):
                if action.const is False and action.nargs == 0:
                    action.help = argparse.SUPPRESS
                if action.dest in heading_of:
                    group._group_actions.remove(action)
                    moved[heading_of[action.dest]].append(action)
        for title, actions in moved.items():
            self.add_argument_group(title)._group_actions.extend(actions)
        self._action_groups.sort(key=lambda group: group is self._optionals)  # the group of `--help` itself comes last

    def nearest(self, name: str) -> str:
        """The end of an error message, with the option that was probably meant."""
        dashes = "--" if name.startswith("-") else ""
        plain = name.lstrip("-").split("=")[0].replace("-", "_")
        names = {action.dest for action in self._actions}
        found = [SHORT_NAMES.get(plain, "")] if SHORT_NAMES.get(plain) in names else []
        found += difflib.get_close_matches(plain, names, n=1)
        return f": did you mean {dashes}{found[0]}?" if found else "; --help lists all"

    def read_yaml(self, path: str | os.PathLike) -> dict[str, Any]:
        """The options in a file. Values are parsed as on the command line, so `1e-3` is a number and `no` a word."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(
                f"{path}: is not YAML ({one_line(error)}). Write one 'option: value' on each line."
            ) from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: holds no options. Write one 'option: value' on each line.")
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
