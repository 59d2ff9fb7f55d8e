"""Contents of several windows, such as the seconds of a sound: running a tower on windows, and spectrograms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .towers_transrec import run_tower


def reads_samples(tower: PreTrainedModel) -> bool:
    """Whether a tower reads the samples of a sound, so that longer sounds have more states."""
    return hasattr(tower, "_get_feature_vector_attention_mask")


def has_states_in_time(tower: PreTrainedModel) -> bool:
    """Whether the states of a tower belong to moments, so that states after the end of a sound must be left out."""
    return reads_samples(tower) or tower.config.model_type == "whisper"


def window_starts(length: float, size: float, count: int, at: float = 0.5) -> list[float]:
    """
    The starts of `count` windows of `size` in a content that is longer than all of them together. The content is
    divided into equal parts, and each window is in its own part, at the share `at` of the free room; by default in the
    middle.
    """
    part = length / count
    return [part * number + at * (part - size) for number in range(count)]


@functools.lru_cache(maxsize=16)
def _mel_filters(fft_length: int, num_mel_bins: int, low: float, high: float, sampling_rate: int) -> Tensor:
    """A mel filter bank `(fft_length // 2 + 1, num_mel_bins)`."""
    filters = mel_filter_bank(
        fft_length // 2 + 1,
        num_mel_bins,
        low,
        high,
        sampling_rate,
        mel_scale="htk",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(filters).float()


def as_clips(windows: Tensor, real: Tensor, length: int) -> Tensor:
    """
    Resample the real windows of `(n, windows, ...)`, marked by `real`, evenly to `length` windows for each content.
    """
    counts = real.sum(dim=1, keepdim=True)
    places = torch.arange(length, device=real.device) * counts // length
    return windows[torch.arange(windows.shape[0], device=real.device)[:, None], places]


def run_windows(tower: PreTrainedModel, values: Tensor, shares: Tensor) -> tuple[Any, Tensor | None]:
    """
    Run a tower on windows, and find its real states.

    Args:
        tower (`PreTrainedModel`): The tower.
        values (`Tensor` of shape `(n, ...)`): The windows.
        shares (`Tensor` of shape `(n,)`): The real share of each window, from its beginning.

    Returns:
        The output of the tower and, if its states belong to moments, which of them are real, `(n, states)`, boolean.
    """
    if not reads_samples(tower):
        output = run_tower(tower, values)
        if not has_states_in_time(tower):
            return output, None
        states = output.last_hidden_state
        lengths = (shares * states.shape[1]).ceil().clamp(min=1)
        return output, torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    config, least = tower.config, 1  # samples that make one state
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        least = (least - 1) * stride + kernel
    lengths = (shares * values.shape[1]).round().clamp(min=least)
    mask = (torch.arange(values.shape[1], device=values.device) < lengths[:, None]).long()
    # if a group norm uses statistics of the whole window, the tower was trained without a mask
    is_masked = getattr(config, "feat_extract_norm", "layer") == "layer"
    read = {"attention_mask": mask} if is_masked else {}
    output = tower(**{tower.main_input_name: values.to(tower.dtype)}, **read)
    reduced = tower._get_feature_vector_attention_mask(output.last_hidden_state.shape[1], mask)  # type: ignore[operator]
    return output, reduced.bool()


def masked_mean(states: Tensor, weights: Tensor) -> Tensor:
    """Mean of states `(n, length, width)` with weights `(n, length)`."""
    weights = weights.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


class LogMelFeatureExtractor(FeatureExtractionMixin):
    """
    Log-mel spectrograms of windows of one length, for towers that have no feature extractor. The defaults are those of
    YAMNet.

    Args:
        sampling_rate (`int`, *optional*, defaults to 16000): Samples per second.
        num_frames (`int`, *optional*, defaults to 96): Frames of a window.
        num_mel_bins (`int`, *optional*, defaults to 64): Number of frequency bands.
        window_length (`int`, *optional*, defaults to 400): Samples of a frame.
        hop_length (`int`, *optional*, defaults to 160): Samples from one frame to the next.
        fft_length (`int`, *optional*, defaults to 512): Length of a frame's Fourier transform.
        frequencies (`tuple[float, float]`, *optional*, defaults to `(125.0, 7500.0)`): Lowest and highest frequency,
            in Hz.
        offset (`float`, *optional*, defaults to 0.001): Added before the logarithm.
        is_image (`bool`, *optional*, defaults to `True`): Whether a window becomes an image of one channel.
    """

    model_input_names = ["input_values"]

    def __init__(
        self,
        sampling_rate: int = 16_000,
        num_frames: int = 96,
        num_mel_bins: int = 64,
        window_length: int = 400,
        hop_length: int = 160,
        fft_length: int = 512,
        frequencies: Sequence[float] = (125.0, 7500.0),
        offset: float = 0.001,
        is_image: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.sampling_rate, self.num_frames, self.num_mel_bins = sampling_rate, num_frames, num_mel_bins
        self.window_length, self.hop_length, self.fft_length = window_length, hop_length, fft_length
        self.frequencies, self.offset, self.is_image = list(frequencies), offset, is_image

    @property
    def window_samples(self) -> int:
        """Samples of a window."""
        return (self.num_frames - 1) * self.hop_length + self.window_length

    def __call__(self, sounds: Sequence[Any], **kwargs: Any) -> BatchFeature:
        """Turn windows `(samples,)` into `input_values` `(n, [1,] num_frames, num_mel_bins)`, padded with silence."""
        windows = torch.zeros(len(sounds), self.window_samples)
        for window, sound in zip(windows, sounds, strict=True):
            window[: len(sound)] = torch.as_tensor(sound)
        frames = windows.unfold(1, self.window_length, self.hop_length) * torch.hann_window(self.window_length)
        filters = _mel_filters(self.fft_length, self.num_mel_bins, *self.frequencies, self.sampling_rate)
        magnitudes = torch.fft.rfft(frames, self.fft_length).abs()
        values = (magnitudes @ filters + self.offset).log()
        return BatchFeature({"input_values": values.unsqueeze(1) if self.is_image else values})


__all__ = ["LogMelFeatureExtractor"]
