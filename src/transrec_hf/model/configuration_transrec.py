"""Configuration of a TransRec model: its towers, its user encoder and its objective."""

# ruff: noqa: I002  (no postponed annotations: `strict` checks values against the annotations, and cannot read strings)

import difflib
import json
import math
import re
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

from .modalities_transrec import MODALITIES


TEXT_POOLINGS = ("mean", "cls", "attention")
WINDOW_POOLINGS = ("mean", "attention")
OBJECTIVES = ("in_batch", "cpc", "bce", "bpr", "full_softmax", "sampled_softmax", "masked")
SIMILARITIES = ("dot", "cosine")
ITEM_MAPS = ("linear", "whitened")
USER_ENCODERS = ("transformer", "gru", "hstu", "mean")
CHOICES = {"user_encoder": USER_ENCODERS, "text_pooling": TEXT_POOLINGS, "window_pooling": WINDOW_POOLINGS}
CHOICES |= {"item_map": ITEM_MAPS, "similarity": SIMILARITIES, "objective": OBJECTIVES}
FORMAT_1 = {
    "item_map": "linear",
    "similarity": "dot",
    "content_prior": False,
    "popularity_prior": False,
    "user_hidden_size": None,
    "text_depths": 1,
}
"""Values of fields that checkpoints of format 1, and the paper's code, do not have."""
BOTTLENECK_PLACES = ("houlsby", "pfeiffer")
FORMAT_VERSION = 2
"""The newest format that this code reads. A checkpoint is written in the oldest format that can hold it."""
WITH_NEGATIVES = ("cpc", "bce", "bpr", "sampled_softmax")
AMONG_ALL = ("in_batch", "full_softmax", "masked")
"""Objectives that score the items of all processes."""
MAX_LAYERS, MAX_WIDTH, MAX_SIZE = 256, 2**16, 2**24
MAX_CODEBOOKS = 1024
MAX_SIDE, MAX_PATCHES = 4096, 2**18  # pixels and patches of an image that a tower reads
RANGES: dict[str, tuple[float, float]] = {
    "num_items": (1, 2**31 - 1),
    "features_size": (1, MAX_WIDTH),
    "num_codebooks": (1, MAX_CODEBOOKS),
    "codebook_size": (2, MAX_WIDTH),
    "hidden_size": (1, MAX_WIDTH),
    "user_hidden_size": (1, MAX_WIDTH),
    "time_buckets": (0, MAX_WIDTH),
    "num_hidden_layers": (0, MAX_LAYERS),
    "num_attention_heads": (1, MAX_WIDTH),
    "intermediate_size": (1, MAX_SIZE),
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "layer_norm_eps": (0, 1),
    "initializer_range": (0, 1000),
    "max_position_embeddings": (1, MAX_SIZE),
    "text_depths": (1, MAX_LAYERS),
    "pooling_head_size": (1, MAX_WIDTH),
    "pooling_query_size": (1, MAX_WIDTH),
    "projection_hidden_size": (1, MAX_SIZE),
    "num_positives": (1, MAX_WIDTH),
    "num_negatives": (0, MAX_SIZE),
    "mask_probability": (0, 1),
    "catalogue_shift": (0, 1),
}
"""Least and largest values of numbers, which are checked before memory is taken for them."""
STOCK = (
    *("attn_implementation", "auto_map", "experts_implementation", "format_version", "model_type", "num_labels"),
    *("output_attentions", "quantization_config", "tie_word_embeddings", "torch_dtype", "use_cache"),
)
"""Names that transformers gives to configurations, besides their fields."""


def check_sizes(config: Any, name: str) -> None:
    """
    Refuse a configuration of a tower with absurd sizes, before memory is taken for them.

    Args:
        config (`dict` or `PreTrainedConfig`, *optional*): The configuration of the tower.
        name (`str`): Its name, for messages.

    Raises:
        `ValueError`: If a size is negative or far too large.
    """
    if isinstance(config, PreTrainedConfig):
        config = config.to_dict()
    for key, value in (config or {}).items():
        high = MAX_LAYERS if re.search(r"layers$|depths?$", key) else MAX_SIZE
        if re.fullmatch(r"hidden_sizes?|d_model|dim|embed_dim|.*_channels", key):
            high = MAX_WIDTH
        if re.fullmatch(r"image_sizes?|patch_sizes?", key):
            high = MAX_SIDE
        if re.search(r"sizes?$|layers$|depths?$|dims?$|d_model|width|channels|heads|positions|embeddings", key):
            for size in value if isinstance(value, list) else [value]:
                if isinstance(size, int | float) and not (-1 <= size <= high):
                    raise ValueError(f"{name}.{key} must be between 0 and {high:,}, got {size:,}")
    side, patch = ((config or {}).get(key) for key in ("image_size", "patch_size"))
    if isinstance(side, int) and isinstance(patch, int) and patch and (side // patch) ** 2 > MAX_PATCHES:
        raise ValueError(f"{name}: images of {side:,} pixels have more than {MAX_PATCHES:,} patches of {patch}")


def check_bottleneck(bottleneck: dict[str, Any]) -> None:
    """Raises `ValueError` for wrong settings of bottleneck adapters."""
    values = {"places": "houlsby", "parallel": False, **bottleneck}
    size, places, parallel = values.pop("size", None), values.pop("places"), values.pop("parallel")
    if isinstance(size, bool) or not isinstance(size, int) or not (1 <= size <= MAX_WIDTH) or values:
        raise ValueError(f"bottleneck must have a size of 1 or more, places and parallel, got {bottleneck}")
    if places not in BOTTLENECK_PLACES or not isinstance(parallel, bool):
        raise ValueError(
            f"bottleneck: places must be one of {BOTTLENECK_PLACES} and parallel a bool, got {bottleneck}"
        )


def check_side(side: dict[str, Any]) -> None:
    """Raises `ValueError` for wrong settings of side networks."""
    text, tower = json.dumps(side, sort_keys=True, default=str), r'"(image|text)": \[(\[\d+, [1-9]\d*\](, )?)*\](, )?'
    is_one = re.fullmatch(rf'{{"depths": {{({tower})+}}, "size": [1-9]\d*}}', text)
    if not is_one or any(int(number) > MAX_WIDTH for number in re.findall(r"\d+", text)):
        raise ValueError(f"side must have a size of 1 or more and depths of text or image, with widths; got {text}")


def check_weight_source(source: Any) -> None:
    """Raises `ValueError` for an entry of `weights_from` that `save_pretrained` would not write."""
    form = {"name": r"[^\0]+", "revision": r"[0-9a-f]{40}", "sha256": r"[0-9a-f]{64}", "prefix": r"[\w.]*"}
    values = source if isinstance(source, dict) else {}
    weights = values.get("weights")
    for key, pattern in form.items():
        value = values.get(key)
        if not (isinstance(value, str) and re.fullmatch(pattern, value)) and (key, value) != ("revision", None):
            raise ValueError(f"weights_from: {key} must look like {pattern}, got {value!r}")
    if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"weights_from: weights must be a list of names, got {weights!r}")


def check_foreign(config: Any) -> None:
    """Refuse a configuration (also a nested one) that would run code of a repository, such as an attention kernel."""
    values = vars(config) if isinstance(config, PreTrainedConfig) else config if isinstance(config, dict) else {}
    for key, value in values.items():
        if "implementation" in str(key) and "/" in str(value):
            raise ValueError(f"{key} {value!r} names code of a repository, which is not run: remove it")
        check_foreign(value)


@strict
class TransRecConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TransRecModel`]: an item is its text, its image or both; a user is the ordered items they
    chose; a score is a dot product of the two (arXiv 2206.06190).

    At least one of `text_config`, `vision_config`, `features_size` and `num_items` has to be set before a model is
    built from it. The ID baseline is the same model with `num_items` and no content tower.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the text tower, any encoder that [`AutoModel`] knows. `None` means no text tower.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision tower, any encoder that [`AutoModel`] knows. `None` means no vision tower.
        audio_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the audio tower: a sound encoder that [`AutoModel`] knows, the audio tower of CLAP, the
            encoder of Whisper, or an image encoder for one channel. `None` means no audio tower.
        video_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the video tower: an image encoder, which reads frame by frame, or an encoder of clips,
            such as VideoMAE. `None` means no video tower.
        features_size (`int`, *optional*):
            Length of ready vectors of the items, made by any other encoder. `None` means that none are read.
        num_codebooks (`int`, *optional*):
            Number of codes of an item, whole numbers by an [`ItemQuantizer`]. The model learns a vector for each value
            of each code. `None` means that none are read.
        codebook_size (`int`, *optional*, defaults to 256):
            Number of values of a code.
        quantizer_hash (`str`, *optional*):
            Hash of the quantizer that made the codes, see [`ItemQuantizer.hash`]; training writes it.
        num_items (`int`, *optional*):
            Number of items for whose ids the model learns vectors. A model that reads nothing else is the ID baseline;
            a model that also reads content is a hybrid, which adds these vectors to the content.
        hidden_size (`int`, *optional*, defaults to 384):
            Width of item and user vectors.
        user_encoder (`str`, *optional*, defaults to `"transformer"`):
            The network that reads a history: `"transformer"`; `"gru"`, the recurrent layers of GRU4Rec (arXiv
            1511.06939); `"hstu"`, pointwise gated attention with relative positions (arXiv 2402.17152); or `"mean"`,
            the mean of the items so far, without parameters. All but the first read forwards only.
        time_buckets (`int`, *optional*, defaults to 0):
            Number of buckets for the time between two items (by its logarithm to base 2), for which `"hstu"` learns a
            bias. The model then reads timestamps. 32 buckets of seconds cover 136 years.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Number of blocks of the user encoder.
        num_attention_heads (`int`, *optional*, defaults to 4):
            Number of attention heads in each block of the user encoder.
        intermediate_size (`int`, *optional*, defaults to 512):
            Width of the feed-forward layer in each block of the user encoder.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layer.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.2):
            Dropout of the user encoder's input and sub-layers, and of the text states before pooling by attention.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of the attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal initialisation.
        max_position_embeddings (`int`, *optional*, defaults to 50):
            Longest history, in items, that the user encoder reads.
        is_causal (`bool`, *optional*, defaults to `True`):
            Whether a position sees only itself and earlier ones. Objectives with a target at every position need it.
        norm_first (`bool`, *optional*, defaults to `True`):
            Whether layer norms are before each sub-layer (and at the end) rather than after it.
        input_layer_norm (`bool`, *optional*, defaults to `True`):
            Whether there is a layer norm on the input of the user encoder.
        use_modality_embedding (`bool`, *optional*, defaults to `True`):
            Whether the user encoder adds a learned vector for the modalities of an item. Only models of several
            modalities have it.
        text_pooling (`str`, *optional*, defaults to `"mean"`):
            How token states become one vector: `"mean"` or `"cls"`, or `"attention"`, the paper's masked multi-head
            self-attention followed by additive attention.
        window_pooling (`str`, *optional*, defaults to `"mean"`):
            How the states of the windows of a sound, or of the frames of a video, become one vector: `"mean"`, or
            `"attention"` as for texts.
        text_depths (`int`, *optional*, defaults to 2):
            Number of depths of the text tower whose pooled states are concatenated: 1 means the last states, 2 these
            and the word embeddings; more depths are evenly spaced between. The states below the last ones are
            averaged, whatever `text_pooling` is.
        pooling_head_size (`int`, *optional*, defaults to 20):
            Width of a head of the self-attention in pooling by attention.
        pooling_query_size (`int`, *optional*, defaults to 200):
            Width of the additive attention in pooling by attention.
        projection_hidden_size (`int`, *optional*):
            Width of a hidden layer between the output of a tower and the item vector. If it is not given, a `"linear"`
            item map has no hidden layer, as in the paper's code, and a `"whitened"` one has 256.
        item_map (`str`, *optional*, defaults to `"whitened"`):
            How the output of a tower becomes an item vector: `"linear"`, a learned projection; or `"whitened"`,
            whitened by the statistics of the catalogue at hand, plus a learned correction that starts at zero.
        similarity (`str`, *optional*, defaults to `"cosine"`):
            `"dot"` of user state and item vector, as in the paper's code, or their `"cosine"` times a learned scale.
        content_prior (`bool`, *optional*, defaults to `True`):
            Whether the user state is a mean of the history's item vectors, with more weight for recent ones, plus the
            output of the user encoder, which starts at zero. Otherwise it is the output of the user encoder alone.
        popularity_prior (`bool`, *optional*, defaults to `True`):
            Whether scores add a learned multiple of the log popularity of an item, a statistic of the training data.
        user_hidden_size (`int`, *optional*, defaults to 128):
            Width of the user encoder with `content_prior`; `None`, or no prior, means `hidden_size`.
        objective (`str`, *optional*, defaults to `"in_batch"`):
            Training objective, a function of `loss_transrec`: `"in_batch"`, `"cpc"`, `"bce"`, `"bpr"`,
            `"full_softmax"`, `"sampled_softmax"`; or `"masked"`, the in-batch softmax of items that are hidden in a
            history, for a bidirectional user encoder (BERT4Rec, arXiv 1904.06690).
        num_positives (`int`, *optional*, defaults to 5):
            Number of next items of a user that are positives in `"cpc"`.
        num_negatives (`int`, *optional*, defaults to 5):
            Negatives drawn per user (`"cpc"`), per position (`"bce"`, `"bpr"`) or per batch (`"sampled_softmax"`).
        mask_probability (`float`, *optional*, defaults to 0.15):
            Share of the items that `"masked"` hides. In a history without a hidden item, the last one is hidden.
        matryoshka_dims (`list[int]`, *optional*):
            Lengths (below `hidden_size`) of prefixes of item vectors that are trained beside the whole vectors, so
            that an index may keep only the beginning of each vector. Whitened axes are then sorted by their variance.
        bottleneck (`dict`, *optional*):
            Bottleneck adapters in the Transformer blocks, see [`~TransRecModel.add_bottlenecks`]: `size`, `places` and
            `parallel`.
        side (`dict`, *optional*):
            Side networks, see [`~TransRecModel.add_side`]: `size`, and the `depths` that they read, with their widths.
        weights_from (`list[dict]`, *optional*):
            In a thin checkpoint, the other checkpoints from which weights are read; `save_pretrained` writes it.
        catalogue_shift (`float`, *optional*, defaults to 0):
            How far trained towers have moved the catalogue of the training from the statistics of a `"whitened"` item
            map, see [`standardize_for`]; training writes it. A catalogue that is farther away is another one.

    Raises:
        `StrictDataclassClassValidationError`: If the values contradict each other.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> from transrec_hf import TransRecConfig, TransRecModel

    >>> config = TransRecConfig(text_config=BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    >>> model = TransRecModel(config)
    ```
    """

    model_type = "transrec"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(AutoConfig, model_type="vit", optional=True),
        "audio_config": SubConfigSpec(AutoConfig, model_type="audio-spectrogram-transformer", optional=True),
        "video_config": SubConfigSpec(AutoConfig, model_type="vit", optional=True),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    video_config: dict | PreTrainedConfig | None = None
    features_size: int | None = None
    num_codebooks: int | None = None
    codebook_size: int = 256
    quantizer_hash: str | None = None
    num_items: int | None = None
    hidden_size: int = 384
    user_encoder: str = "transformer"
    time_buckets: int = 0
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.2
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float | int = 1e-12
    initializer_range: float | int = 0.02
    max_position_embeddings: int = 50
    is_causal: bool = True
    norm_first: bool = True
    input_layer_norm: bool = True
    use_modality_embedding: bool = True
    text_pooling: str = "mean"
    window_pooling: str = "mean"
    text_depths: int = 2
    pooling_head_size: int = 20
    pooling_query_size: int = 200
    projection_hidden_size: int | None = None
    item_map: str = "whitened"
    similarity: str = "cosine"
    content_prior: bool = True
    popularity_prior: bool = True
    user_hidden_size: int | None = 128
    objective: str = "in_batch"
    num_positives: int = 5
    num_negatives: int = 5
    mask_probability: float | int = 0.15
    matryoshka_dims: list | None = None
    bottleneck: dict | None = None
    side: dict | None = None
    weights_from: list | None = None
    catalogue_shift: float | int = 0

    @classmethod
    def paper(cls, **kwargs: Any) -> "TransRecConfig":
        """
        The settings of the paper's released code: a bidirectional user encoder of four post-norm blocks with a
        feed-forward layer of 128, pooling by attention, five positives and five negatives in a binary cross-entropy.
        """
        settings: dict[str, Any] = {
            **FORMAT_1,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 25,
            "is_causal": False,
            "norm_first": False,
            "input_layer_norm": False,
            "use_modality_embedding": False,
            "text_pooling": "attention",
            "objective": "cpc",
            "num_positives": 5,
            "num_negatives": 5,
            "hidden_dropout_prob": 0.1,
        }
        return cls(**{**settings, **kwargs})

    @classmethod
    def esasrec(cls, num_items: int, **kwargs: Any) -> "TransRecConfig":
        """
        A strong baseline that reads item ids only, tuned on validation: SASRec with one block, one head, a width of
        256, cosines, the recency-weighted mean of the history's own vectors, and the in-batch softmax.

        Args:
            num_items (`int`): Size of the catalogue.
            kwargs: Fields to change.
        """
        settings: dict[str, Any] = {
            "hidden_size": 256,
            "user_hidden_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 1024,
            "hidden_dropout_prob": 0.3,
            "attention_probs_dropout_prob": 0.3,
            "popularity_prior": False,
        }
        return cls(num_items=num_items, **{**settings, **kwargs})

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the item encoder reads, in the order of `MODALITIES`; empty for the ID baseline."""
        return tuple(name for name, modality in MODALITIES.items() if getattr(self, modality.config) is not None)

    @property
    def is_hybrid(self) -> bool:
        """Whether the model has vectors for item ids and also reads content."""
        return self.num_items is not None and bool(self.modalities)

    @property
    def user_width(self) -> int:
        """Width of the user encoder."""
        return self.user_hidden_size if self.content_prior and self.user_hidden_size else self.hidden_size

    @property
    def num_targets(self) -> int:
        """The number of next items that the objective predicts from one history."""
        return {"cpc": self.num_positives, "masked": 0}.get(self.objective, 1)

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if not self._is_known(name):
                nearest = self._nearest(name)
                raise ValueError(
                    f"there is no setting {name!r}: " + (f"did you mean {nearest!r}?" if nearest else "leave it out")
                )
        super().__post_init__(**kwargs)

    @classmethod
    def _is_known(cls, name: str) -> bool:
        return name in STOCK or name.endswith("name_or_path") or name.startswith("_") or name in cls._fields()

    @classmethod
    def _fields(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def _nearest(cls, name: str, cutoff: float = 0.8) -> str | None:
        return next(iter(difflib.get_close_matches(name, cls._fields(), n=1, cutoff=cutoff)), None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # before anything else, since this code may not understand a later format
        version = config_dict.get("format_version", 1)
        if not isinstance(version, int):
            raise ValueError(f"format_version must be a whole number, got {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has format {version}, but this version of transrec-hf reads up to {FORMAT_VERSION}: "
                "run `pip install --upgrade transrec-hf`"
            )
        if version == 1:
            config_dict = {**FORMAT_1, **config_dict}
        check_foreign(config_dict)
        # a later transformers, or the author, may write further fields: only near misses of our names are refused,
        # not settings that other models have, such as layer_norm_epsilon
        more = {name for name in config_dict if not cls._is_known(name) and cls._nearest(name, 0.9) is None}
        return super().from_dict({name: config_dict[name] for name in config_dict if name not in more}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        is_new = (
            {self.features_size, self.num_codebooks} != {None}
            or (self.audio_config or self.video_config) is not None
            or self.user_encoder != "transformer"
            or (self.item_map, self.similarity) != ("linear", "dot")
            or self.content_prior
            or self.popularity_prior
            or self.is_hybrid
            or self.objective == "masked"
            or (self.text_config is not None and self.text_depths > 1)
            or any((self.bottleneck, self.side, self.weights_from))
        )
        return {**super().to_dict(), "format_version": 2 if is_new else 1}

    def validate_architecture(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high):
                raise ValueError(f"{name} must be between {low:,} and {high:,}, got {value:,}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"):
            value = getattr(self, name)
            if not math.isfinite(value) or value == (0 if name == "layer_norm_eps" else 1):
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if self.hidden_act not in ACT2FN:
            nearest = difflib.get_close_matches(self.hidden_act, list(ACT2FN), n=1)
            raise ValueError(
                f"there is no activation {self.hidden_act!r}" + (f": did you mean {nearest[0]!r}?" if nearest else "")
            )
        if self.bottleneck is not None:
            check_bottleneck(self.bottleneck)
        for size in self.matryoshka_dims or []:
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < self.hidden_size:
                raise ValueError(f"matryoshka_dims must be whole numbers below {self.hidden_size}, got {size!r}")
        if len(set(self.matryoshka_dims or [])) < len(self.matryoshka_dims or []):
            raise ValueError(f"matryoshka_dims must differ from each other, got {self.matryoshka_dims}")
        if self.side is not None:
            check_side(self.side)
        for source in self.weights_from or []:
            check_weight_source(source)
        if self.objective in WITH_NEGATIVES and not self.num_negatives:
            raise ValueError(f"objective {self.objective!r} needs num_negatives of 1 or more, got 0")
        for name in self.sub_configs_defaults:
            check_sizes(getattr(self, name), name)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.user_encoder != "transformer" and not self.is_causal:
            raise ValueError(f"user_encoder {self.user_encoder!r} reads histories forwards only: set is_causal=True")
        if self.time_buckets and self.user_encoder != "hstu":
            raise ValueError(f"user_encoder {self.user_encoder!r} does not read timestamps: leave out time_buckets")
        if self.user_width % self.num_attention_heads:
            name = "user_hidden_size" if self.content_prior and self.user_hidden_size else "hidden_size"
            raise ValueError(
                f"{name} ({self.user_width}) must be a multiple of num_attention_heads ({self.num_attention_heads})"
            )
        if self.is_hybrid and self.objective != "in_batch":
            raise ValueError(
                f"a hybrid (num_items with {' and '.join(self.modalities)}) needs objective 'in_batch': "
                f"{self.objective!r} would train ID vectors of items that nobody chose"
            )
        if self.objective == "masked" and (self.is_causal or not self.mask_probability):
            raise ValueError(
                "objective 'masked' predicts hidden items from the items on both sides: set is_causal=False "
                "and mask_probability above 0"
            )
        if self.objective not in ("cpc", "masked") and not self.is_causal:
            raise ValueError(
                f"objective {self.objective!r} has a target at every position, and a bidirectional user encoder would "
                "see the targets: set is_causal=True, or objective='cpc' or 'masked'"
            )


__all__ = ["TransRecConfig"]
