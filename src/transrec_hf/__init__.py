"""Transferable recommendation from raw text and images, the Hugging Face way."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from . import files
from .model.configuration_transrec import TransRecConfig
from .model.modeling_transrec import TransRecModel, TransRecOutput, TransRecPreTrainedModel
from .model.processing_transrec import TransRecProcessor


if TYPE_CHECKING:
    from .data.catalogue import Catalogue, load_catalogue
    from .data.interactions import (
        Sequences,
        Split,
        k_core,
        keep_items,
        leave_one_out,
        load_domain,
        load_interactions,
        temporal_split,
    )
    from .data.statistics import data_statistics
    from .errors import DataError, HubError
    from .evaluation.evaluator import RankingEvaluator
    from .evaluation.metrics import bootstrap_interval, paired_bootstrap
    from .evaluation.metrics_evaluate import MRR, NDCG, HitRate
    from .evaluation.protocol import PROTOCOLS, EvaluationProtocol
    from .items.encoding import encode_catalogue
    from .items.preparing import ItemSource
    from .items.store import ActivationStore
    from .publishing.dataset import push_dataset_to_hub
    from .serving.index import ItemIndex
    from .serving.recommender import Recommender
    from .training.arguments import TransRecTrainingArguments
    from .training.collator import DataCollatorForNextItem
    from .training.trainer import TransRecTrainer

__version__ = "0.2.0"

AutoConfig.register("transrec", TransRecConfig)
AutoModel.register(TransRecConfig, TransRecModel)
AutoProcessor.register(TransRecConfig, TransRecProcessor)

# a saved checkpoint holds the modules that read it, for users who have only transformers (`trust_remote_code=True`)
TransRecConfig.register_for_auto_class()
TransRecModel.register_for_auto_class("AutoModel")
TransRecProcessor.register_for_auto_class()

TransRecModel.files = TransRecProcessor.files = files  # this package writes folders as a whole

# names that need datasets, the trainer or an evaluator are imported when they are first used
_LAZY = {
    "ActivationStore": "items.store",
    "Catalogue": "data.catalogue",
    "DataError": "errors",
    "Sequences": "data.interactions",
    "Split": "data.interactions",
    "data_statistics": "data.statistics",
    "k_core": "data.interactions",
    "keep_items": "data.interactions",
    "leave_one_out": "data.interactions",
    "load_catalogue": "data.catalogue",
    "load_domain": "data.interactions",
    "load_interactions": "data.interactions",
    "temporal_split": "data.interactions",
    "DataCollatorForNextItem": "training.collator",
    "EvaluationProtocol": "evaluation.protocol",
    "PROTOCOLS": "evaluation.protocol",
    "RankingEvaluator": "evaluation.evaluator",
    "HitRate": "evaluation.metrics_evaluate",
    "MRR": "evaluation.metrics_evaluate",
    "NDCG": "evaluation.metrics_evaluate",
    "bootstrap_interval": "evaluation.metrics",
    "paired_bootstrap": "evaluation.metrics",
    "push_dataset_to_hub": "publishing.dataset",
    "HubError": "errors",
    "ItemIndex": "serving.index",
    "ItemSource": "items.preparing",
    "Recommender": "serving.recommender",
    "TransRecTrainer": "training.trainer",
    "TransRecTrainingArguments": "training.arguments",
    "encode_catalogue": "items.encoding",
}

__all__ = [
    "TransRecConfig",
    "TransRecModel",
    "TransRecOutput",
    "TransRecPreTrainedModel",
    "TransRecProcessor",
    "__version__",
    *sorted(_LAZY),
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
