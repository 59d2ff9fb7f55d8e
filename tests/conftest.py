"""Fixtures shared by all tests: everything is tiny, random, made in memory and offline."""
# ruff: noqa: E402

from __future__ import annotations

import os
import tempfile

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
from testing_utils import (
    TEXT_TOWERS,
    VISION_TOWERS,
    make_catalogue,
    make_image_processor,
    make_processor,
    make_split,
    make_tokenizer,
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


@pytest.fixture(params=TEXT_TOWERS)
def text_config(request: pytest.FixtureRequest) -> transformers.PreTrainedConfig:
    """A tiny text tower of every supported family in turn."""
    return TEXT_TOWERS[request.param]()


@pytest.fixture(params=VISION_TOWERS)
def vision_config(request: pytest.FixtureRequest) -> transformers.PreTrainedConfig:
    """A tiny vision tower of every supported family in turn."""
    return VISION_TOWERS[request.param]()
