"""`transrec env`: the versions and the machine, for bug reports."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from ..publishing.results import cpu_name
from .options import option
from .parsing import parse_arguments


LIBRARIES = (
    *("torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "tokenizers", "safetensors"),
    *("numpy", "pandas", "pyarrow", "pillow", "typer", "av", "peft", "matplotlib", "torchvision"),
)
VARIABLES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")


@dataclass
class EnvironmentArguments:
    """How it is printed."""

    _argument_group_name = "environment"
    json: bool = option(False, "Print JSON.")


def env(argv: Sequence[str] | None = None) -> dict[str, str]:
    """
    Print the versions and the machine. Copy them into a bug report.

        transrec env
        transrec env --json
    """
    (args,) = parse_arguments((EnvironmentArguments,), argv, env)
    facts = environment()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(f"{name}: {value}" for name, value in facts.items()))
    return facts


def environment() -> dict[str, str]:
    """The versions of everything that results depend on, and the machine."""
    facts = {"transrec-hf": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    facts |= {library: _version(library) for library in LIBRARIES}
    facts["CPU"] = f"{os.cpu_count()} cores of {cpu_name()}, {torch.get_num_threads()} threads"
    facts["accelerator"] = "none"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        facts["accelerator"] = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    elif torch.accelerator.is_available():
        facts["accelerator"] = str(torch.accelerator.current_accelerator())
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
