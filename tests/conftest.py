"""Fixtures shared by all tests: everything is tiny, random, made in memory and offline."""
# ruff: noqa: E402

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from local_hub import LocalHub


# The Hugging Face libraries read these when they are first imported: nothing that imports them may come before. What
# reaches for the network meets a Hub on loopback, which has nothing but what a test has pushed.
HUB = LocalHub().start()
_HF_HOME = tempfile.TemporaryDirectory(prefix="transrec-tests-")
os.environ.update(HUB.environment)
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from testing_utils import (
    DESIGN,
    QUICK,
    TEXT_TOWERS,
    VISION_TOWERS,
    make_catalogue,
    make_image_processor,
    make_processor,
    make_split,
    make_tokenizer,
    shrink_demo,
)

from transrec_hf import TransRecProcessor
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.data.interactions import Split


torch.set_num_threads(1)  # tensors are tiny, and the machine may have others to serve
transformers.logging.set_verbosity_error()  # no table of missing keys with every fresh head
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    transformers.set_seed(0)


@pytest.fixture
def hub() -> LocalHub:
    """The Hub that everything in this process talks to, empty."""
    HUB.reset()
    return HUB


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="session")
def image_processor() -> transformers.BaseImageProcessor:
    return make_image_processor()


@pytest.fixture(scope="session")
def processor() -> TransRecProcessor:
    """Of a model with two towers."""
    return make_processor()


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """Twelve items: a third with text, a third with an image, a third with both."""
    return make_catalogue()


@pytest.fixture(scope="session")
def split() -> Split:
    """Ten users of `catalogue`, leave-one-out."""
    return make_split()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, a model of the source of a demo world, and the `store` of its states."""
    from transrec_hf.commands.runs import pretrain

    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        shrink_demo(patch)
        patch.chdir(folder)
        pretrain(["--data", "demo:source", "--output_dir", "source", *DESIGN, *QUICK])
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_world: Path) -> Iterator[None]:
    """A folder of the module's own with all of `small_world`, in which the demo world stays as small."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_demo(patch)
        patch.chdir(shutil.copytree(small_world, tmp_path_factory.mktemp("workplace"), dirs_exist_ok=True))
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(params=TEXT_TOWERS)
def text_config(request: pytest.FixtureRequest) -> transformers.PreTrainedConfig:
    """A tiny text tower of every supported family in turn."""
    return TEXT_TOWERS[request.param]()


@pytest.fixture(params=VISION_TOWERS)
def vision_config(request: pytest.FixtureRequest) -> transformers.PreTrainedConfig:
    """A tiny vision tower of every supported family in turn."""
    return VISION_TOWERS[request.param]()
