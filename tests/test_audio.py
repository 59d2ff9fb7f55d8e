"""Sounds, from the column of a catalogue to recommendations, cards and the Hub."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import wave
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from testing_utils import (
    TEXT_TOWERS,
    USER_ENCODER,
    VISION_TOWERS,
    assert_graph_is_general,
    assert_same_weights,
    assert_stored_alike,
    catalogue_of,
    make_catalogue,
    make_image_processor,
    make_split,
    make_tokenizer,
    train_and_serve,
    weights_of,
)
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoModel,
    AutoProcessor,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    HubertConfig,
    MobileNetV1Config,
    PreTrainedConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from transrec_hf import (
    Catalogue,
    DataError,
    ItemSource,
    TransRecConfig,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainingArguments,
    encode_catalogue,
    load_catalogue,
)
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.items.store import ActivationStore
from transrec_hf.model.windows_transrec import LogMelFeatureExtractor, reads_samples
from transrec_hf.publishing.checkpoint import check_processor
from transrec_hf.publishing.dataset import write_items
from transrec_hf.training.planning import plan_run


av = pytest.importorskip("av")

RATE = 16_000
BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "initializer_range": 0.3}
DROPOUT = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
SAMPLES = {
    **BLOCKS,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_stride": (5, 8, 8),
    "conv_kernel": (10, 8, 8),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    **dict.fromkeys(DROPOUT, 0.0),
}
CLAP_AUDIO = {
    "spec_size": 32,
    "num_mel_bins": 8,
    "window_size": 2,
    "patch_embeds_hidden_size": 8,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "hidden_size": 16,
}
AUDIO_TOWERS: dict[str, Callable[..., PreTrainedConfig]] = {
    "ast": partial(ASTConfig, **BLOCKS, intermediate_size=24, max_length=16, num_mel_bins=16, patch_size=8),
    "wav2vec2": partial(Wav2Vec2Config, **SAMPLES),
    "group norm": partial(Wav2Vec2Config, **{**SAMPLES, "feat_extract_norm": "group"}),
    "hubert": partial(HubertConfig, **SAMPLES),
    "wavlm": partial(WavLMConfig, **SAMPLES),
    "whisper": partial(
        WhisperConfig,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=16,
        max_source_positions=50,
        vocab_size=8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    ),
    "clap": lambda: ClapConfig(audio_config=dict(CLAP_AUDIO)).audio_config,
    "clap fusion": lambda: ClapConfig(audio_config={**CLAP_AUDIO, "enable_fusion": True}).audio_config,
    "mobilenet": partial(
        MobileNetV1Config, num_channels=1, image_size=32, depth_multiplier=0.125, initializer_range=0.3
    ),
}


def extractor_for(name: str) -> Any:
    """A feature extractor whose window is of about 0.2 to 1 seconds."""
    if name == "ast":
        return ASTFeatureExtractor(num_mel_bins=16, max_length=16)
    if name == "whisper":
        return WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    if name.startswith("clap"):
        truncation = "fusion" if name.endswith("fusion") else "rand_trunc"
        return ClapFeatureExtractor(feature_size=8, max_length_s=1, sampling_rate=RATE, truncation=truncation)
    if name == "mobilenet":
        return LogMelFeatureExtractor(num_frames=32, num_mel_bins=32)
    return Wav2Vec2FeatureExtractor(return_attention_mask=name != "group norm")


def make_processor(name: str = "ast", **kwargs: Any) -> TransRecProcessor:
    return TransRecProcessor(feature_extractor=extractor_for(name), audio_seconds=0.2, **kwargs)


def make_model(name: str = "ast", **fields: Any) -> TransRecModel:
    torch.manual_seed(0)
    return TransRecModel(TransRecConfig(**{**USER_ENCODER, "audio_config": AUDIO_TOWERS[name](), **fields})).eval()


def tone(seconds: float = 0.1, pitch: float = 440, rate: int = RATE) -> np.ndarray:
    return 0.25 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """Samples `(length,)` or `(length, channels)`, in 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def encoded(samples: np.ndarray, container: str, codec: str, rate: int = RATE, layout: str = "mono") -> bytes:
    """Samples `(length,)`, the same in all channels."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        packed = np.repeat((samples * 32767).astype(np.int16), 1 if layout == "mono" else 2)
        frame = av.AudioFrame.from_ndarray(packed[None], format="s16", layout=layout)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return file.getvalue()


def says(file: bytes, place: int, kind: str, *values: int) -> bytes:
    """A file with other numbers at a place of its header."""
    return file[:place] + struct.pack(kind, *values) + file[place + struct.calcsize(kind) :]


sounds_of = partial(catalogue_of, "audio")


def mixed_catalogue(num_items: int = 12) -> Catalogue:
    """Items with text, an image, a sound, and all of them, in turn."""
    base = make_catalogue(num_items, kinds=("text image",)).items
    sounds = [{"bytes": wav(tone(0.1 + 0.02 * row, 200 + 50 * row)), "path": None} for row in range(num_items)]
    columns = {
        "item_id": base["item_id"],
        "text": [text if row % 4 in (0, 3) else None for row, text in enumerate(base["text"])],
        "image": [image if row % 4 in (1, 3) else None for row, image in enumerate(base["image"])],
        "audio": [sound if row % 4 >= 2 else None for row, sound in enumerate(sounds)],
    }
    return Catalogue(datasets.Dataset.from_dict(columns))


@pytest.fixture(scope="module")
def source() -> ItemSource:
    processor = TransRecProcessor(
        make_tokenizer(), make_image_processor(), max_text_length=16, feature_extractor=extractor_for("ast")
    )
    return ItemSource(mixed_catalogue(), processor)


def make_mixed_model(**fields: Any) -> TransRecModel:
    return make_model(text_config=TEXT_TOWERS["bert"](), vision_config=VISION_TOWERS["vit"](), **fields)


# Reading


@pytest.mark.parametrize(
    ("container", "codec", "extra"),
    [("flac", "flac", 0), ("mp3", "libmp3lame", 0), ("ogg", "opus", 0), ("mp4", "aac", 1)],
)
def test_formats_are_decoded_to_mono_at_the_rate_that_is_asked_for(container, codec, extra):
    rate = 48_000
    sound = tone(0.5, rate=rate)
    stereo = wav(np.stack([sound, -0.5 * sound], axis=1), rate)
    catalogue = sounds_of(wav(sound, rate), encoded(sound, container, codec, rate), stereo)
    original, compressed, mixed = (catalogue.read(row, sampling_rate=8000)["audio"] for row in range(3))
    assert original.dtype == np.float32 and abs(len(original) - 4000) < 10
    spectra = [np.abs(np.fft.rfft(part[:2000])) for part in (original, compressed)]
    assert spectra[0].argmax() == spectra[1].argmax() == 110  # 440 Hz
    np.testing.assert_allclose(mixed[100:-100], 0.25 * original[100:-100], atol=1e-3)


def test_no_more_of_a_long_sound_is_decoded_than_is_asked_for():
    minute = wav(np.tile(tone(1), 60))
    hours = minute[:4] + struct.pack("<I", 2**31) + minute[8:40] + struct.pack("<I", 2**31 - 64) + minute[44:]
    catalogue = sounds_of(minute * 1, hours)
    for windows in (1, 4):
        tracemalloc.start()
        samples = catalogue.read(0, seconds=2.0, windows=windows)["audio"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(samples) == 2 * RATE and peak < 2_000_000
        assert len(catalogue.read(1, seconds=2.0, windows=windows)["audio"]) == 2 * RATE


@pytest.mark.parametrize(
    ("container", "codec", "rate"), [("wav", "pcm_s16le", RATE), ("flac", "flac", 44_100), ("mp3", "libmp3lame", RATE)]
)
def test_windows_of_a_long_sound_are_spread_evenly(container, codec, rate):
    """Ten seconds, each of a pitch of its own: windows are those in the middles of parts, or where they are drawn."""
    sound = np.concatenate([tone(1, pitch=300 * (second + 1), rate=rate) for second in range(10)])
    catalogue = sounds_of(encoded(sound, container, codec, rate))

    def seconds_heard(**form: Any) -> list[int]:
        samples = catalogue.read(0, sampling_rate=RATE, seconds=1.0, windows=5, **form)["audio"]
        assert len(samples) == RATE
        return [round(abs(np.fft.rfft(part)).argmax() * 5 / 300) - 1 for part in samples.reshape(5, -1)]

    heard = seconds_heard()  # parts of two seconds, whose middles are the borders of two tones
    assert all(second in (2 * part, 2 * part + 1) for part, second in enumerate(heard))
    assert seconds_heard(at=0.1) == [0, 2, 4, 6, 8] and seconds_heard(at=0.9) == [1, 3, 5, 7, 9]


def test_samples_of_a_long_sound_are_windowed_as_a_file_is():
    processor = make_processor(max_audio_windows=3)
    sound = np.random.default_rng(0).normal(scale=0.1, size=7 * processor.window_samples).astype(np.float32)
    read = sounds_of(wav(sound)).read(0, **processor.form("audio"))["audio"]
    of_file, of_samples = (processor.prepare("audio", [samples])["audio_values"] for samples in (read, sound))
    torch.testing.assert_close(of_file, of_samples, atol=0.02, rtol=0)


def test_windows_are_drawn_in_training_and_depend_on_the_seed_alone():
    sounds = [wav(np.random.default_rng(row).normal(scale=0.1, size=4 * RATE)) for row in range(3)]
    source = ItemSource(sounds_of(*sounds), make_processor(max_audio_windows=2))
    middle, *drawn = (
        source.batch(np.arange(3), draws=None if seed is None else np.random.default_rng(seed))
        .parts["audio"]
        .values[0]
        for seed in (None, 0, 0, 1)
    )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(middle, drawn[0]) and torch.equal(
        middle, source.batch(np.arange(3)).parts["audio"].values[0]
    )


GOOD = wav(tone())
NOISE = np.random.default_rng(0).normal(scale=0.1, size=4 * RATE)


@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        (wav(tone()[:0]), "it has no samples"),
        (b"not a sound, whatever it is called", "not a file of a known format"),
        (b"", "not a file of a known format"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "not a file of a known format"),
        (GOOD[:30], "damaged|no audio stream"),
        (encoded(NOISE, "flac", "flac")[:40_000], "truncated: 1.1 of 4.0 seconds"),
        (b"fLaC" + b"\0" * 400, "damaged|no audio stream"),
        (b"ID3" + np.random.default_rng(0).bytes(20_000), "damaged|no audio stream"),
        (says(wav(np.zeros(300_000)), 40, "<I", 100), "damaged: it cannot be read without 100,000 jumps"),
        (says(GOOD, 20, "<H", 0x4242), "its codec is not known"),
        (says(GOOD, 24, "<I", 1), "1 samples per second in 1 channels; 1,000 to 768,000"),
        (says(wav(tone(0.1)), 20, "<HHIIHH", 3, 1, RATE, 4 * RATE, 4, 32), "NaN|but 1 is the loudest"),
        ("absent.wav", "audio file not found: 'absent.wav'"),
        ("https://example.org/a.mp3", "a URL, which is not read: download the audio"),
    ],
    ids=[
        *(
            "empty",
            "text",
            "nothing",
            "playlist",
            "cut",
            "truncated",
            "zeros",
            "noise",
            "chunks",
            "codec",
            "slow",
            "loud",
        ),
        *("absent", "url"),
    ],
)
def test_a_sound_that_cannot_be_used_is_named_with_row_and_mend(sound, reason):
    with pytest.raises(DataError, match=rf"unusable audio.*row 2.*item-1.*({reason}).*Replace or delete") as caught:
        sounds_of(GOOD, sound).check_contents()
    assert len(str(caught.value)) < 600


def test_odd_sounds_are_read_right(tmp_path):
    broken = bytearray(encoded(np.tile(tone(1), 3), "mp3", "libmp3lame"))
    broken[3000:3600] = bytes(600)
    (tmp_path / "a.wav").write_bytes(GOOD)
    (tmp_path / "half.wav").write_bytes(half := says(wav(NOISE), 40, "<I", 2 * RATE))
    sounds = {
        "silence": (wav(np.zeros(1600)), 1600),
        "one sample": (wav(np.ones(1)), 1),
        "one sample in FLAC": (encoded(np.ones(1), "flac", "flac"), 1),
        "32 bits": (encoded(tone(), "wav", "pcm_s32le"), 1600),
        "8 bits": (encoded(tone(), "wav", "pcm_u8"), 1600),
        "then stereo": (encoded(tone(1), "mp3", "mp3") + encoded(tone(1), "mp3", "mp3", layout="stereo"), 2 * RATE),
        "192 kHz": (wav(tone(0.1, rate=192_000), 192_000), 1600),
        "64 channels": (wav(np.stack([tone()] * 64, axis=1)), 1600),
        "broken frames": (bytes(broken), 3 * RATE),
        "a header that says more": (says(GOOD, 40, "<I", 2**30), 1600),
        "a header that says less": (half, RATE),
        "the same as a file": ("half.wav", RATE),
        "AAC": (encoded(np.tile(tone(1), 2), "adts", "aac"), 2 * RATE),
    }
    catalogue = sounds_of(*[sound for sound, _ in sounds.values()], image_folder=str(tmp_path))
    catalogue.check_contents()
    source = ItemSource(catalogue, make_processor())
    for row, (_, length) in enumerate(sounds.values()):
        samples = catalogue.read(row)["audio"]
        assert abs(len(samples) - length) <= 0.1 * length + 2
        assert abs(len(catalogue.read(row, sampling_rate=48_000)["audio"]) - 3 * length) <= 0.3 * length + 2
    for name, precision in {"64 channels": 1e-3, "32 bits": 1e-3, "8 bits": 2e-2}.items():
        np.testing.assert_allclose(catalogue.read(list(sounds).index(name))["audio"], tone(), atol=precision)
    assert encode_catalogue(make_model(), source).isfinite().all()
    assert sounds_of("a.wav", image_folder=str(tmp_path)).read(0)["audio"].shape == (1600,)
    with pytest.raises(DataError, match="leaves the folder"):
        sounds_of("../a.wav", image_folder=str(tmp_path / "inner"))


def test_the_picture_of_an_album_is_no_video():
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "JPEG")
    frame = b"\0image/jpeg\0\3\0" + picture.getvalue()
    tag = b"APIC" + struct.pack(">I", len(frame)) + b"\0\0" + frame
    sizes = bytes((len(tag) >> 7 * place) & 127 for place in (3, 2, 1, 0))
    album = b"ID3\3\0\0" + sizes + tag + encoded(tone(1), "mp3", "libmp3lame")
    assert len(sounds_of(album).read(0)["audio"]) > 15_000
    with pytest.raises(DataError, match="the file has no video stream"):
        catalogue_of("video", album)


def test_bad_sounds_take_little_time():
    started = time.perf_counter()
    with pytest.raises(DataError):
        sounds_of(b"ID3" + bytes(10_000_000))
    assert time.perf_counter() - started < 5


# Towers


@pytest.mark.parametrize("name", AUDIO_TOWERS)
def test_a_sound_has_the_same_vector_in_any_batch(name):
    model = make_model(name)
    processor = make_processor(name)
    rng = np.random.default_rng(0)
    sounds = [rng.normal(scale=0.1, size=size).astype(np.float32) for size in (1600, 40_000, 3200, 1)]
    together = model.get_item_features(**processor(audio=sounds))
    alone = torch.cat([model.get_item_features(**processor(audio=[sound])) for sound in sounds])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-4
    windows = processor(audio=sounds)["audio_mask"]
    assert windows.shape[1] == processor.windows("audio", np.array([40_000 / RATE]))[0]


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_what_follows_the_end_of_a_sound_is_not_pooled(name):
    model, sound = make_model(name), torch.from_numpy(tone(0.1)).float()
    tower, batch = model.item_encoder.audio_model, make_processor(name)(audio=[sound])
    values = batch["audio_values"][0]
    if reads_samples(tower):
        states = tower(values[:, : len(sound)]).last_hidden_state
    else:
        real = int(np.ceil(50 * len(sound) / RATE))
        states = tower(values).last_hidden_state[:, :real]
    expected = model.item_encoder.audio_projection(states.mean(dim=1))
    torch.testing.assert_close(model.get_item_features(**batch), expected, atol=1e-5, rtol=1e-4)


def test_windows_are_averaged_and_a_short_last_one_is_left_out():
    model, processor = make_model(), make_processor()
    size = processor.window_samples
    sound = np.random.default_rng(0).normal(scale=0.1, size=size * 3 // 2).astype(np.float32)
    parts = torch.cat(
        [model.item_encoder.state("audio", *window(processor, part)) for part in np.split(sound, [size])]
    )
    found = model.item_encoder.state("audio", *window(processor, sound))[0]
    torch.testing.assert_close(found, parts.mean(dim=0), atol=1e-5, rtol=1e-4)
    shorter = window(processor, sound[: size * 5 // 4])
    assert shorter[1].tolist() == [[1.0]] and processor.windows("audio", np.array([1.25 * size / RATE])) == [1]
    torch.testing.assert_close(model.item_encoder.state("audio", *shorter)[0], parts[0])


def window(processor: TransRecProcessor, sound: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    batch = processor(audio=[sound])
    return batch["audio_values"], batch["audio_mask"]


@pytest.mark.parametrize("name", ["ast", "wav2vec2"])
def test_windows_can_be_pooled_by_attention(name):
    model = make_model(name, window_pooling="attention")
    short, long = tone(0.05), np.random.default_rng(0).normal(scale=0.1, size=RATE)
    inputs = make_processor(name)(audio=[short, long])
    vectors = model.get_item_features(**inputs)
    alone = model.get_item_features(**make_processor(name)(audio=[short]))
    torch.testing.assert_close(vectors[:1], alone, atol=1e-5, rtol=1e-4)
    vectors.sum().backward()
    assert model.item_encoder.audio_pooling.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", AUDIO_TOWERS)
def test_all_that_is_trained_gets_a_gradient(name):
    model = make_model(name).train()
    inputs = make_processor(name)(audio=[tone(0.3), tone(0.1, 880)])
    (model.get_item_features(**inputs) ** 2).sum().backward()
    tower = model.item_encoder.audio_model
    trained = {part: parameter for part, parameter in tower.named_parameters() if parameter.requires_grad}
    assert not [part for part, parameter in trained.items() if parameter.grad is None]


def test_whisper_and_clap_are_taken_out_of_their_checkpoints(tmp_path):
    torch.manual_seed(0)
    whisper = WhisperModel(AUDIO_TOWERS["whisper"]())
    clap = ClapModel(ClapConfig(audio_config=dict(CLAP_AUDIO), text_config={**BLOCKS, "vocab_size": 9}))
    for name, whole, part in (("whisper", whisper, whisper.encoder), ("clap", clap, clap.audio_model)):
        whole.save_pretrained(tmp_path / name)
        extractor_for(name).save_pretrained(tmp_path / name)
        model = TransRecModel.from_text_vision_pretrained(audio_model=str(tmp_path / name), **USER_ENCODER)
        assert_same_weights(model.item_encoder.audio_model, part)
        processor = TransRecProcessor.from_towers(audio_model=str(tmp_path / name))
        assert model.get_item_features(**processor(audio=[tone()])).isfinite().all()
        for thin in (False, True):
            place = tmp_path / f"{name}-{thin}"
            model.save_pretrained(place, thin=thin)
            has_tower = any("audio_model." in key for key in load_file(place / "model.safetensors"))
            assert has_tower is not thin
            assert_same_weights(TransRecModel.from_pretrained(place), model)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_tower_that_hears_nothing_is_refused(name):
    config = (TEXT_TOWERS if name == "bert" else VISION_TOWERS)[name]()
    if name == "resnet":
        TransRecModel(TransRecConfig(**USER_ENCODER, audio_config=config))  # which may read spectrograms
        return
    with pytest.raises(ValueError, match="cannot be the audio tower, which must turn a sound into states"):
        TransRecModel(TransRecConfig(**USER_ENCODER, audio_config=config))


def test_log_mel_spectrograms_are_those_of_transformers():
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    extractor, sound = LogMelFeatureExtractor(num_frames=12), tone(0.2)
    size = extractor.window_samples
    found = extractor([sound[:size]])["input_values"][0, 0]
    bands = mel_filter_bank(257, 64, 125.0, 7500.0, RATE, mel_scale="htk", triangularize_in_mel_space=True)
    settings = {"frame_length": 400, "hop_length": 160, "fft_length": 512, "power": 1.0, "center": False}
    mel = spectrogram(sound[:size], window_function(400, "hann"), mel_filters=bands, mel_floor=0.0, **settings)
    np.testing.assert_allclose(found, np.log(mel.T + 0.001), atol=3e-3)


@pytest.mark.parametrize("name", ["ast", "mobilenet", "wav2vec2"])
def test_the_processor_is_saved_and_loaded(tmp_path, name):
    processor = make_processor(name, max_audio_windows=2)
    processor.save_pretrained(tmp_path)
    for loaded in (TransRecProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert loaded.modalities == ["audio"] and loaded.fingerprint("audio") == processor.fingerprint("audio")
        assert type(loaded.feature_extractor) is type(processor.feature_extractor)
        torch.testing.assert_close(loaded(audio=[tone(3)])["audio_values"], processor(audio=[tone(3)])["audio_values"])
    with pytest.raises(ValueError, match=r"instead of \(samples,\)"):
        processor(audio=[np.zeros((2, 100))])


# Through the house


def test_a_sequence_mixes_sounds_with_text_and_images(source):
    model = make_mixed_model()
    batch = source.batch(np.arange(4))
    vectors = model.get_item_features(batch)
    states = model.get_user_features(vectors, torch.tensor([[0, 1, 2, 3]]), batch.present)
    assert states.isfinite().all()
    alone = model.item_encoder.encode("audio", *window(source.processor, source.catalogue.read(2)["audio"]))
    both_missing = model.item_encoder.missing_embeds[:2].sum(dim=0)
    torch.testing.assert_close(vectors[2], alone[0] + both_missing)
    contents = [source.catalogue.read(row) for row in range(4)]
    flat = source.processor(
        text=[content.get("text") for content in contents],
        images=[content.get("image") for content in contents],
        audio=[content.get("audio") for content in contents],
    )
    torch.testing.assert_close(model.get_item_features(**flat), vectors)


@pytest.mark.parametrize("design", [{}, {"item_map": "whitened", "similarity": "cosine", "content_prior": True}])
def test_it_trains_is_saved_reported_and_served(tmp_path, source, design):
    model = make_mixed_model(**design)
    before = weights_of(model.item_encoder.audio_model)
    loaded, served = train_and_serve(tmp_path, model, source)
    after = loaded.item_encoder.audio_model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert changed and not any(name.startswith(("embeddings", "layers.0")) for name in changed)
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "run"), loaded)
    assert len(served.recommend(["item-2", "item-0"], k=3)) == 3
    given = ["item-2", {"audio": source.catalogue.encoded("audio", 2)}, {"audio": source.catalogue.read(2)["audio"]}]
    found = [served.recommend([item], k=3, exclude_seen=False) for item in given]
    assert len({tuple(item.item_id for item in items) for items in found}) == 1
    with pytest.raises(DataError, match="audio of a raw item cannot be read"):
        served.recommend([{"audio": b"nothing"}])


@pytest.mark.parametrize("name", AUDIO_TOWERS)
@pytest.mark.parametrize("trained", [0, 1])
def test_stored_states_give_the_same_vectors(tmp_path, name, trained):
    model = make_model(name)
    model.freeze_towers(trained)
    catalogue = sounds_of(*[wav(tone(seconds, 300 + 100 * seconds)) for seconds in (0.1, 0.5, 1.2)])
    source = ItemSource(catalogue, make_processor(name))
    if trained and (reads_samples(model.item_encoder.audio_model) or name == "whisper"):
        with pytest.raises(ValueError, match="leave out activation_store"):
            ActivationStore(tmp_path, model, source)
        return
    assert_stored_alike(tmp_path, model, source)


@pytest.mark.parametrize("name", ["ast", "wav2vec2"])
def test_a_run_is_planned_with_a_store_if_the_tower_can_have_one(tmp_path, name):
    catalogue = sounds_of(*[wav(tone(0.1, 300 + 10 * row)) for row in range(12)])
    settings = {"catalogue": catalogue, "split": make_split(), "processing_class": make_processor(name)}
    args = TransRecTrainingArguments(str(tmp_path), trainable_blocks=1, per_device_train_batch_size=4, report_to=[])
    plan = plan_run(make_model(name), args, **settings, seconds=0.1)
    assert (plan.with_store is None) is (name == "wav2vec2") and plan.step.units["audio"] > 0
    if name == "wav2vec2":
        assert "cannot continue from stored states" in plan.advice[0]
        args.activation_store = str(tmp_path / "store")
        with pytest.raises(ValueError, match="leave out activation_store"):
            plan_run(make_model(name), args, **settings, seconds=0.1)


def test_they_are_published_and_read_again(tmp_path, source):
    write_items(source.catalogue, tmp_path / "items.parquet")
    assert load_catalogue(tmp_path / "items.parquet").content_hash() == source.catalogue.content_hash()
    hidden = source.catalogue.select(np.array([0, 1, 3])).with_policy("one_per_item", seed=3)
    assert (np.stack([hidden.has(name) for name in hidden.contents]).sum(axis=0) == 1).all()
    columns = {"item_id": ["a", "b"], "audio": [GOOD, None], "text": ["red", "hat"]}
    assert load_catalogue(columns).has("audio").tolist() == [True, False]
    (tmp_path / "a.wav").write_bytes(GOOD)
    (tmp_path / "items.csv").write_text("item_id,audio\nx,a.wav\n")
    assert load_catalogue(tmp_path / "items.csv").read(0)["audio"].shape == (1600,)


@pytest.mark.parametrize("name", ["ast", "wav2vec2", "whisper", "clap"])
def test_the_graph_of_an_export_takes_any_number_of_sounds_and_windows(name):
    source = ItemSource(sounds_of(GOOD), make_processor(name))
    assert_graph_is_general(make_model(name), source, "audio")


def test_the_demo_world_can_be_heard():
    modalities = ("text", "audio")
    target = demo_world(modalities=modalities).target
    catalogue, processor = target.catalogue, demo_processor(modalities)
    assert processor.modalities == list(modalities) and not catalogue.has("image").any()
    assert 0.2 < (catalogue.has("text") & catalogue.has("audio")).mean() < 0.4 and catalogue.has_any().all()
    rows = np.flatnonzero(catalogue.has("audio"))[:40]
    values = ItemSource(catalogue.select(rows), processor).batch(np.arange(40)).parts["audio"].values[0][:, 0]
    loudness, sizes = values.amax(dim=(1, 2)), torch.from_numpy(target.attributes[rows, 3])
    assert loudness[sizes == 0].mean() < loudness[sizes == 1].mean() < loudness[sizes == 2].mean()
    model = TransRecModel(demo_config(modalities))
    assert encode_catalogue(model, ItemSource(catalogue.select(rows), processor)).isfinite().all()


def test_a_processor_that_asks_for_hours_is_refused():
    with pytest.raises(DataError, match="seconds of every sound"):
        check_processor(make_processor("wav2vec2", max_audio_windows=10**6))


def test_a_world_of_sounds_alone_is_read_in_silence(tmp_path, caplog):
    world = demo_world(modalities=["audio"])
    world.target.save(tmp_path)
    assert load_catalogue(tmp_path).content_hash() == world.target.catalogue.content_hash()
    assert not [record for record in caplog.records if "transrec_hf" in record.name]
