"""
transformers' own common model tests on a [`TransRecModel`] of text, of images, of both, and of ids. `fetch.py` brings
them; without them there is nothing to run.
"""

from __future__ import annotations

import sys
import unittest
from typing import Any

import pytest
import torch
from fetch import PACKAGE, PLACE
from testing_utils import IMAGE_SIZE, USER_ENCODER, VOCABULARY, make_config
from torch import nn

from transrec_hf import TransRecConfig, TransRecModel


if not (PLACE / PACKAGE).exists():
    pytest.skip("run tests/common/fetch.py to have transformers' common tests", allow_module_level=True)
sys.path.insert(0, str(PLACE))

from transformers_tests import test_configuration_common, test_modeling_common


pytestmark = pytest.mark.slow


class ModelTester:
    """Three users with histories of five of six items, each of which has all modalities of the model."""

    batch_size, num_items, seq_length = 3, 6, 5
    num_hidden_layers = USER_ENCODER["num_hidden_layers"]
    num_attention_heads = USER_ENCODER["num_attention_heads"]
    hidden_size = USER_ENCODER["hidden_size"]
    is_training = True

    def __init__(self, modalities: tuple[str, ...], user_encoder: str):
        self.modalities, self.user_encoder = modalities, user_encoder

    def get_config(self) -> TransRecConfig:
        items = {} if self.modalities else {"num_items": self.num_items}
        return make_config(self.modalities, user_encoder=self.user_encoder, **items)

    def items(self) -> dict[str, torch.Tensor]:
        """Contents by the names of a processor's output."""
        if not self.modalities:
            return {"item_rows": torch.arange(self.num_items)}
        tokens = torch.randint(5, len(VOCABULARY), (self.num_items, 7))
        contents = {
            "text": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
            "image": {"pixel_values": torch.randn(self.num_items, 3, IMAGE_SIZE, IMAGE_SIZE)},
        }
        return {name: value for modality in self.modalities for name, value in contents[modality].items()}

    def prepare_config_and_inputs_for_common(self) -> tuple[TransRecConfig, dict[str, torch.Tensor]]:
        history = torch.randint(self.num_items, (self.batch_size, self.seq_length))
        return self.get_config(), {"history_index": history, **self.items()}


class CommonTests(test_modeling_common.ModelTesterMixin):
    all_model_classes = (TransRecModel,)
    test_resize_embeddings = False
    modalities: tuple[str, ...] = ()
    user_encoder = "transformer"

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.modalities, self.user_encoder)
        self._is_composite = bool(self.modalities)
        for modality in ("text", "image"):
            if f"get_{modality}_features" in self._testMethodName and modality not in self.modalities:
                self.skipTest(f"the model reads no {modality}")

    def test_config(self) -> None:
        config = self.model_tester.get_config()
        test_configuration_common.ConfigTester(
            self, config_class=TransRecConfig, has_text_modality=False, **config.to_diff_dict()
        ).run_common_tests()

    def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if set(inputs).isdisjoint(("items", *self.model_tester.items())):  # a test made its own main input
            inputs |= self.model_tester.items()
        if return_labels:
            inputs |= self.targets(inputs["history_index"])
        return inputs

    def targets(self, history: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"target_index": history.roll(-1, dims=1), "log_popularity": torch.zeros(self.model_tester.num_items)}

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self) -> Any:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, inputs | self.targets(inputs["history_index"])  # the first output is the loss

    @unittest.skip("indices of a batch are part of its inputs: see test_users_split_in_two_have_the_same_states")
    def test_batching_equivalence(self) -> None:
        pass


class TextTest(CommonTests, unittest.TestCase):
    modalities = ("text",)


class ImageTest(CommonTests, unittest.TestCase):
    modalities = ("image",)

    def test_model_get_set_embeddings(self) -> None:
        """As transformers' own vision models have it: what makes embeddings of patches is no table."""
        model = TransRecModel(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), nn.Module)
        assert model.get_output_embeddings() is None


class TextImageTest(CommonTests, unittest.TestCase):
    modalities = ("text", "image")


class IdsTest(CommonTests, unittest.TestCase):
    pass


class GRUTest(CommonTests, unittest.TestCase):
    user_encoder = "gru"
    has_attentions = False


class HSTUTest(CommonTests, unittest.TestCase):
    user_encoder = "hstu"
