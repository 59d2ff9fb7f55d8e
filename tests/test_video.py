"""Moving pictures, from the column of a catalogue to recommendations, cards and the Hub."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import (
    TEXT_TOWERS,
    TRANSFORMER,
    USER_ENCODER,
    VISION_TOWERS,
    WORDS,
    assert_graph_is_general,
    assert_same_weights,
    assert_stored_alike,
    catalogue_of,
    make_image_processor,
    make_tokenizer,
    train_and_serve,
)
from transformers import (
    AutoModel,
    AutoProcessor,
    PreTrainedConfig,
    TimesformerConfig,
    VideoMAEConfig,
    VideoMAEImageProcessor,
    ViTModel,
    VivitConfig,
)

from transrec_hf import (
    Catalogue,
    DataError,
    ItemSource,
    TransRecConfig,
    TransRecModel,
    TransRecProcessor,
    encode_catalogue,
    load_catalogue,
)
from transrec_hf.data import sounds
from transrec_hf.data.clips import evenly
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.items.store import ActivationStore
from transrec_hf.publishing.dataset import write_items
from transrec_hf.serving.raw import encode_raw, read_raw


av = pytest.importorskip("av")

FRAMES = 4
CLIP = {**TRANSFORMER, "image_size": 32, "patch_size": 16, "num_frames": FRAMES}
CLIP_TOWERS: dict[str, Callable[..., PreTrainedConfig]] = {
    "videomae": partial(VideoMAEConfig, **CLIP),
    "vivit": partial(VivitConfig, **{**CLIP, "tubelet_size": [2, 16, 16]}),
    "timesformer": partial(TimesformerConfig, **CLIP),
}
TOWERS = {**VISION_TOWERS, **CLIP_TOWERS}


def make_processor(**kwargs: Any) -> TransRecProcessor:
    return TransRecProcessor(frame_image_processor=make_image_processor(), **{"num_frames": FRAMES, **kwargs})


def make_model(name: str = "vit", **fields: Any) -> TransRecModel:
    torch.manual_seed(0)
    return TransRecModel(TransRecConfig(**{**USER_ENCODER, "video_config": TOWERS[name](), **fields})).eval()


def pictures(count: int = 10, size: tuple[int, int] = (32, 16)) -> list[Image.Image]:
    """Frames that are lighter and lighter, blue at the left and red at the right."""
    frames = np.zeros((count, size[1], size[0], 3), dtype=np.uint8)
    frames[:] = (np.arange(count) * 20 + 30)[:, None, None, None]
    frames[:, :, : size[0] // 2, 2] = frames[:, :, size[0] // 2 :, 0] = 255
    return [Image.fromarray(frame) for frame in frames]


def mp4(
    frames: list[Image.Image], times: list[int] | None = None, container: str = "mp4", codec: str = "mpeg4"
) -> bytes:
    """A video of frames, a tenth of a second each or at `times` in milliseconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for place, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = (times[place] if times else 100 * place), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def animated(frames: list[Image.Image], kind: str = "GIF") -> bytes:
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def lightness(frames: list[Image.Image]) -> list[int]:
    """What of its series each frame is, about."""
    return [round((np.asarray(frame)[..., 1].mean() - 30) / 20) for frame in frames]


clips_of = partial(catalogue_of, "video")


# Reading


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("mov", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mjpeg")]
)
def test_frames_are_evenly_spaced(container, codec):
    catalogue = clips_of(mp4(pictures(), container=container, codec=codec))
    found = lightness(catalogue.read(0, num_frames=5)["video"])
    assert np.abs(np.array(found) - [1, 3, 5, 7, 9]).max() <= 1 and found == sorted(set(found))
    few = lightness(catalogue.read(0, num_frames=20)["video"])
    assert few == list(range(10))


def test_frames_of_a_varying_rate_are_those_that_are_seen_at_the_time():
    times = [0, 20, 40, 60, 80, 100, 120, 140, 160, 1000]  # the last but one is seen most of the time
    found = lightness(clips_of(mp4(pictures(), times)).read(0, num_frames=4)["video"])
    assert found[0] in (6, 7, 8) and set(found[1:]) <= {8, 9}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_videos(kind):
    catalogue = clips_of(animated(pictures(), kind), animated(pictures(1), kind))
    assert np.abs(np.array(lightness(catalogue.read(0, num_frames=5)["video"])) - [1, 3, 5, 7, 9]).max() <= 1
    assert len(catalogue.read(1, num_frames=5)["video"]) == 1


def test_a_rotated_video_is_turned_upright():
    clip = bytearray(mp4(pictures()))
    place = clip.index(b"tkhd") + 44
    assert struct.unpack(">9i", clip[place : place + 36])[0] == 2**16
    clip[place : place + 36] = struct.pack(">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)
    plain, turned = (clips_of(bytes(video)).read(0)["video"][0] for video in (mp4(pictures()), clip))
    assert plain.size == (32, 16) and turned.size == (16, 32)
    blue, red = np.asarray(turned)[2, 8], np.asarray(turned)[-3, 8]  # a quarter clockwise: what was left is on top
    assert blue[2] > 150 > blue[0] and red[0] > 150 > red[2]


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (b"not a video", "not a file of a known format"),
        (b"", "not a file of a known format"),
        (mp4(pictures())[:400], "truncated or damaged|no video stream"),
        (animated(pictures())[:200], "damaged"),
        ("absent.mp4", "video file not found"),
        ("https://example.org/a.mp4", "download the video"),
    ],
    ids=["text", "nothing", "cut", "cut gif", "absent", "url"],
)
def test_a_video_that_cannot_be_used_is_named_with_row_and_mend(clip, reason):
    with pytest.raises(DataError, match=rf"unusable video.*row 2.*item-1.*({reason}).*Replace or delete"):
        clips_of(mp4(pictures(2)), clip).check_contents()


def test_of_a_damaged_video_the_frames_that_are_left_are_read():
    """Checked, it is refused; read nevertheless, it is shown as far as it goes."""
    clip = mp4([frame.resize((64, 48)) for frame in pictures()] * 60, codec="libx264")
    start, size = 10_000, 20_000  # of about 36,000 before the index
    broken = clip[:start] + bytes(size) + clip[start + size :]
    gif = animated(pictures())
    for clip, expected in ((broken, [2, 2]), (gif[: len(gif) * 3 // 4], [0, 1, 3])):
        catalogue = clips_of(clip)
        with pytest.raises(DataError, match=r"unusable video.*row 1.*damaged"):
            catalogue.check_contents()
        assert lightness(catalogue.read(0, num_frames=5, at=0.1)["video"])[: len(expected)] == expected


def test_a_clock_that_starts_late_is_followed():
    late = mp4(pictures(), [3_600_000 + 100 * place for place in range(10)], container="matroska")
    assert lightness(clips_of(late).read(0, num_frames=5)["video"]) == [1, 3, 5, 7, 9]


def test_no_more_frames_of_a_large_animated_image_are_decoded_than_take_a_bounded_time(monkeypatch):
    monkeypatch.setattr("transrec_hf.data.clips.MAX_ANIMATED", 32 * 16 * 4)
    assert lightness(clips_of(animated(pictures())).read(0, num_frames=2)["video"]) == [1, 3]
    absurd = bytearray(animated(pictures()))
    absurd[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(DataError, match="decompression bomb"):
        clips_of(bytes(absurd))


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "libx264")])
def test_a_frame_is_decoded_once_if_no_key_frame_is_nearer(container, codec, monkeypatch):
    decoded = []

    def counted(*args: Any) -> Iterator[Any]:
        for frame in sounds.frames_of(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("transrec_hf.data.clips.frames_of", counted)
    catalogue = clips_of(
        mp4([frame.resize((64, 48)) for frame in pictures() for _ in range(10)], None, container, codec)
    )
    found = lightness(catalogue.read(0, num_frames=10)["video"])
    assert found == list(range(10)) and len(decoded) == len(set(decoded)) <= 100


def test_a_video_that_is_cut_off_is_named():
    whole = mp4([frame.resize((64, 48)) for frame in pictures() * 6], container="webm", codec="libvpx-vp9")
    with pytest.raises(DataError, match=r"unusable video.*truncated: [12].\d of 6.0 seconds can be decoded"):
        clips_of(whole[: 2 * len(whole) // 5]).check_contents()
    still = mp4(pictures(3), [0, 100, 200])  # the last picture is seen for most of the time
    clips_of(whole, still, mp4(pictures(2), [0, 3000]), with_sound(0.3, 2.0)).check_contents()


def with_sound(seconds: float, seconds_of_sound: float, container: str = "matroska") -> bytes:
    """A video and a sound, which comes first."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        heard, seen = output.add_stream("aac", rate=16_000, layout="mono"), output.add_stream("mpeg4", rate=10)
        seen.width, seen.height, seen.pix_fmt = 32, 16, "yuv420p"
        silence = np.zeros((1, int(16_000 * seconds_of_sound)), dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.sample_rate = 16_000
        output.mux([*heard.encode(frame), *heard.encode(None)])
        for image in pictures(int(10 * seconds)):
            output.mux(seen.encode(av.VideoFrame.from_image(image)))
        output.mux(seen.encode(None))
    return file.getvalue()


def test_frames_that_change_their_size_are_read_up_to_the_limit():
    def motion(sizes: list[tuple[int, int]]) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format="avi") as output:
            stream = output.add_stream("mjpeg", rate=10)
            stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
            for place, size in enumerate(sizes):
                picture = io.BytesIO()
                Image.new("RGB", size, "red").save(picture, "JPEG")
                packet = av.Packet(picture.getvalue())
                packet.stream, packet.pts, packet.dts = stream, place, place
                output.mux(packet)
        return file.getvalue()

    small, large = [(32, 16), (64, 64), (16, 128)], (9000, 9000)
    assert [frame.size for frame in clips_of(motion(small)).read(0)["video"]] == small
    found = clips_of(motion([*small, large])).read(0)["video"]
    assert [frame.size for frame in found] == small


def test_a_video_without_pictures_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        output.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(DataError, match="the file has no video stream"):
        clips_of(file.getvalue())


def test_large_frames_are_shrunk_and_larger_ones_refused():
    started = time.perf_counter()
    large = mp4([Image.new("RGB", (7680, 4320), "blue")], codec="mjpeg", container="avi")
    found = clips_of(large).read(0)["video"]
    assert len(found) == 1 and 200_000 < found[0].width * found[0].height < 600_000
    assert abs(found[0].width / found[0].height - 16 / 9) < 0.02
    absurd = bytearray(animated(pictures()))
    absurd[6:10] = struct.pack("<HH", 9000, 9000)
    with pytest.raises(DataError, match="9000 x 9000 pixels, more than"):
        clips_of(bytes(absurd))
    assert time.perf_counter() - started < 60


def listed(*videos: Any, folder: Any = None, **columns: Any) -> Catalogue:
    """A catalogue whose videos are lists of images."""
    rows = {"item_id": [f"item-{row}" for row in range(len(videos))], "video": list(videos), **columns}
    return Catalogue(datasets.Dataset.from_dict(rows), image_folder=folder)


def frames_of(*shades: int) -> list[bytes]:
    return [png(pictures()[shade]) for shade in shades]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_video_may_be_a_list_of_images(tmp_path):
    for place, frame in enumerate(frames_of(*range(10))):
        (tmp_path / f"{place}.png").write_bytes(frame)
    columns: dict[str, list[Any]] = {
        "bytes": frames_of(*range(10)),
        "paths": [f"{place}.png" for place in range(10)],
        "structs": [{"bytes": frame, "path": None} for frame in frames_of(*range(10))],
    }
    for column in columns.values():
        catalogue = listed(column, None, column[:1], text=["a", "b", "c"], folder=str(tmp_path))
        assert catalogue.has("video").tolist() == [True, False, True]
        catalogue.check_contents()
        assert lightness(catalogue.read(0, ["video"], num_frames=5)["video"]) == [1, 3, 5, 7, 9]
        assert lightness(catalogue.read(2, ["video"], num_frames=5)["video"]) == [0]
        assert encode_catalogue(make_model(), ItemSource(catalogue.select([0, 2]), make_processor())).isfinite().all()
        write_items(catalogue, tmp_path / "items.parquet")
        again = load_catalogue(tmp_path / "items.parquet")
        assert again.content_hash() == catalogue.content_hash()


def test_a_raw_list_of_images_is_read_as_that_of_a_catalogue(monkeypatch):
    decoded = []

    def counted(image):
        decoded.append(1)
        return image.convert("RGB")

    monkeypatch.setattr("transrec_hf.serving.raw.to_rgb", counted)
    model, processor, many = make_model(), make_processor(), pictures() * 100
    vectors, _ = encode_raw(model, processor, [read_raw({"video": many}, ["video"])])
    source = ItemSource(listed([png(frame) for frame in many]), processor)
    torch.testing.assert_close(vectors, encode_catalogue(model, source), atol=1e-5, rtol=1e-4)
    assert len(decoded) == FRAMES
    with pytest.raises(DataError, match="the image of a raw item is int"):
        encode_raw(model, processor, [read_raw({"video": [1]}, ["video"])])


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"no image"], "not an image of a known format"),
        ([frames_of(1)[0], frames_of(1)[0][:60]], "damaged"),
        (["../a.png"], "leaves the folder|file not found"),
        ([frames_of(1)[0], None], "one of its files is missing"),
    ],
)
def test_a_bad_frame_of_a_list_is_named(frames, reason, tmp_path):
    with pytest.raises(DataError, match=f"unusable video.*row 1.*item-0.*({reason})"):
        listed(frames, None, text=["a", "b"], folder=str(tmp_path)).check_contents()


def test_a_list_of_anything_else_is_refused():
    with pytest.raises(DataError, match=r"column 'video' holds .*Write a video as bytes or a file path, or as a list"):
        listed([1.5, 2.5])


@pytest.mark.parametrize("kind", ["mp4", "gif", "list"])
def test_other_frames_are_drawn_in_training(kind):
    made = {"mp4": lambda: mp4(pictures()), "gif": lambda: animated(pictures()), "list": lambda: frames_of(*range(10))}
    catalogue = (listed if kind == "list" else clips_of)(made[kind]())
    found = [lightness(catalogue.read(0, num_frames=5, at=at)["video"]) for at in (0.1, 0.9)]
    assert np.abs(np.array(found) - [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]).max() <= 1 and found[0] != found[1]
    source = ItemSource(catalogue, make_processor(num_frames=2))
    values = [
        source.batch(np.arange(1), draws=np.random.default_rng(seed)).parts["video"].values[0] for seed in (0, 0, 3)
    ]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_places_are_even():
    assert evenly(10, 5) == [1, 3, 5, 7, 9] and evenly(3, 8) == [0, 1, 2] and evenly(1, 1) == [0]
    assert evenly(1000, 4) == [125, 375, 625, 875] and evenly(10, 5, 0.99) == [1, 3, 5, 7, 9]


# Towers


@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet_v1", *CLIP_TOWERS])
def test_a_video_has_the_same_vector_in_any_batch(name):
    model, processor = make_model(name), make_processor()
    videos = [pictures(10), pictures(2), pictures(1), pictures(40)]
    together = model.get_item_features(**processor(video=videos))
    alone = torch.cat([model.get_item_features(**processor(video=[video])) for video in videos])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    assert (together[0] - together[2]).abs().max() > 1e-5


def test_frames_are_averaged_or_pooled_by_attention():
    model, processor = make_model(), make_processor()
    frames = pictures(FRAMES)
    batch = processor(video=[frames])
    one_by_one = [model.item_encoder.state("video", *values_of(processor, [frame])) for frame in frames]
    found = model.item_encoder.state("video", *values_of(processor, frames))
    torch.testing.assert_close(found, torch.stack(one_by_one).mean(dim=0), atol=1e-5, rtol=1e-4)
    model = make_model(window_pooling="attention")
    model.get_item_features(**batch).sum().backward()
    assert model.item_encoder.video_pooling.query.weight.grad.abs().sum() > 0


def values_of(processor: TransRecProcessor, frames: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = processor(video=[frames])
    return batch["video_values"], batch["video_mask"]


def test_the_processor_is_saved_and_loaded(tmp_path):
    shape = {"shortest_edge": 32}, {"height": 32, "width": 32}
    for part in (make_image_processor(), VideoMAEImageProcessor(size=shape[0], crop_size=shape[1])):
        processor = TransRecProcessor(frame_image_processor=part, num_frames=3)
        processor.save_pretrained(tmp_path)
        for loaded in (TransRecProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
            assert loaded.modalities == ["video"] and loaded.fingerprint("video") == processor.fingerprint("video")
            assert loaded.form("video") == {"num_frames": 3}
            for video in (pictures(5), pictures(1)):
                found, expected = (one(video=[video])["video_values"] for one in (loaded, processor))
                torch.testing.assert_close(found, expected)
                assert found.shape == (1, min(len(video), 3), 3, 32, 32)
    with pytest.raises(ValueError, match="a video has no frame"):
        processor(video=[[]])


# Through the house


@pytest.fixture(scope="module")
def source() -> ItemSource:
    """Items with a text, a video, and both, in turn."""
    rng = np.random.default_rng(0)
    clips = [animated([Image.fromarray(rng.integers(255, size=(16, 16, 3), dtype=np.uint8))] * 2) for _ in range(11)]
    clips.append(mp4(pictures(3)))
    columns = {
        "item_id": [f"item-{row}" for row in range(12)],
        "text": [WORDS[row % len(WORDS)] if row % 3 != 1 else None for row in range(12)],
        "video": [{"bytes": clip} if row % 3 else None for row, clip in enumerate(clips)],
    }
    processor = TransRecProcessor(
        make_tokenizer(), max_text_length=16, frame_image_processor=make_image_processor(), num_frames=2
    )
    return ItemSource(Catalogue(datasets.Dataset.from_dict(columns)), processor)


@pytest.mark.parametrize("design", [{}, {"item_map": "whitened", "similarity": "cosine", "content_prior": True}])
def test_it_trains_is_saved_reported_and_served(tmp_path, source, design):
    _, served = train_and_serve(tmp_path, make_model(text_config=TEXT_TOWERS["bert"](), **design), source)
    given = ["item-1", {"video": source.catalogue.encoded("video", 1)}]
    given.append({"video": source.catalogue.read(1, num_frames=2)["video"]})
    found = [served.recommend([item], k=3, exclude_seen=False) for item in given]
    assert len({tuple(item.item_id for item in items) for items in found}) == 1
    with pytest.raises(DataError, match="video of a raw item cannot be read"):
        served.recommend([{"video": b"nothing"}])


@pytest.mark.parametrize("name", ["vit", *CLIP_TOWERS])
@pytest.mark.parametrize("trained", [0, 1])
def test_stored_states_give_the_same_vectors(tmp_path, name, trained):
    model = make_model(name)
    model.freeze_towers(trained)
    source = ItemSource(clips_of(*[animated(pictures(count)) for count in (1, 3, 9)]), make_processor())
    if trained and name in CLIP_TOWERS:
        with pytest.raises(ValueError, match="leave out activation_store"):
            ActivationStore(tmp_path, model, source)
        return
    assert_stored_alike(tmp_path, model, source)


def test_towers_are_loaded_from_checkpoints_of_images(tmp_path):
    tower = ViTModel(VISION_TOWERS["vit"](), add_pooling_layer=False)
    tower.save_pretrained(tmp_path)
    make_image_processor().save_pretrained(tmp_path)
    model = TransRecModel.from_text_vision_pretrained(video_model=str(tmp_path), **USER_ENCODER)
    assert_same_weights(model.item_encoder.video_model, tower)
    assert TransRecProcessor.from_towers(video_model=str(tmp_path)).num_frames == 8
    AutoModel.from_config(CLIP_TOWERS["videomae"]()).save_pretrained(tmp_path)
    for given, found in (({}, FRAMES), ({"num_frames": 6}, 6)):
        assert TransRecProcessor.from_towers(video_model=str(tmp_path), **given).num_frames == found


def test_they_are_published_and_read_again(tmp_path, source):
    write_items(source.catalogue, tmp_path / "items.parquet")
    assert load_catalogue(tmp_path / "items.parquet").content_hash() == source.catalogue.content_hash()
    (tmp_path / "a.mp4").write_bytes(mp4(pictures(2)))
    (tmp_path / "items.csv").write_text("item_id,video\nx,a.mp4\n")
    assert len(load_catalogue(tmp_path / "items.csv").read(0)["video"]) == 2


@pytest.mark.parametrize("name", ["vit", "videomae"])
def test_the_graph_of_an_export_takes_any_number_of_videos_and_frames(source, name):
    assert_graph_is_general(make_model(name, text_config=TEXT_TOWERS["bert"]()), source, "video")


def test_the_demo_world_moves():
    modalities = ("audio", "video")
    catalogue, processor = demo_world(modalities=modalities).target.catalogue, demo_processor(modalities)
    chosen = catalogue.select(np.arange(30))
    assert (
        catalogue.has("video").mean() > 0.5 and len(catalogue.read(int(catalogue.has("video").argmax()))["video"]) == 3
    )
    model = TransRecModel(demo_config(modalities))
    assert encode_catalogue(model, ItemSource(chosen, processor)).isfinite().all()
