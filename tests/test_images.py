"""Images as people see them, and what is no image."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pyarrow as pa
import pytest
from testing_utils import make_catalogue, make_config, make_image_processor, make_trainer

from transrec_hf import TransRecProcessor
from transrec_hf.data.catalogue import Catalogue, load_catalogue
from transrec_hf.errors import DataError
from transrec_hf.model.processing_transrec import UnusableImage, to_rgb


GRAY = np.linspace(0, 255, 48).reshape(6, 8)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def seen(content: bytes) -> np.ndarray:
    """What the catalogue shows of an image; the processor must see the same in the file itself."""
    items = datasets.Dataset.from_dict({"item_id": ["a"], "image": [{"bytes": content, "path": None}]})
    catalogue = Catalogue(items)
    catalogue.check_contents()
    image = catalogue.image(0)
    assert image is not None and image.mode == "RGB"
    processor = TransRecProcessor(image_processor=make_image_processor())
    shown, raw = (processor(images=[i])["pixel_values"] for i in (image, PIL.Image.open(io.BytesIO(content))))
    assert (shown == raw).all()
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("largest", [255, 65535, 1])
def test_gray_of_many_bits(format: str, mode: str, largest: int) -> None:
    if (format == "PNG" and mode != "I;16") or (mode == "I;16" and largest < 65535) or (mode == "I" and largest == 1):
        pytest.skip("16 bits are 16 bits, PNG has no others, and integers up to 1 are no picture")
    values = GRAY / 255 * largest
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    picture = PIL.Image.fromarray(np.round(values).astype(kind) if mode != "F" else values.astype(kind))
    pixels = seen(encoded(picture, format))
    assert np.abs(pixels - np.round(GRAY)[..., None]).max() <= 1


@pytest.mark.parametrize("values", [np.array([[-5.0, 0, 5]]), np.array([[0.0, 1e5, 2e5]])])
def test_other_ranges_go_from_black_to_white(values: np.ndarray) -> None:
    pixels = seen(encoded(PIL.Image.fromarray(values.astype(np.float32)), "TIFF"))
    assert np.abs(pixels[0, :, 0] - [0, 127, 255]).max() <= 1


def test_16_bits_of_darkness_stay_dark() -> None:
    assert seen(encoded(PIL.Image.fromarray(np.full((4, 4), 200, np.uint16)))).max() <= 1
    assert seen(encoded(PIL.Image.fromarray(np.full((4, 4), 65535, np.uint16)))).min() == 255


def logo(mark: int) -> PIL.Image.Image:
    """Black on nothing, whose colour is black too."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[mark, :] = 255
    return PIL.Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), alpha]))


def palette(mark: int) -> PIL.Image.Image:
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.paste(1, (0, mark, 8, mark + 1))
    return image


TRANSPARENT: dict[str, Any] = {
    "RGBA PNG": lambda mark: encoded(logo(mark)),
    "LA PNG": lambda mark: encoded(logo(mark).convert("LA")),
    "WebP": lambda mark: encoded(logo(mark), "WEBP", lossless=True, exact=True),
    "TIFF": lambda mark: encoded(logo(mark), "TIFF"),
    "palette PNG": lambda mark: encoded(palette(mark), transparency=0),
    "palette PNG, bytes": lambda mark: encoded(palette(mark), transparency=b"\x00\xff"),
    "palette GIF": lambda mark: encoded(palette(mark), "GIF", transparency=0),
    "RGB PNG with a colour": lambda mark: encoded(
        logo(mark).convert("RGB").point(lambda v: v), transparency=(9, 9, 9)
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_white(name: str) -> None:
    one, other = (seen(TRANSPARENT[name](mark)) for mark in (1, 5))
    if "colour" in name:  # nothing in it has that colour
        assert not one.any()
        return
    assert (one[1] < 5).all() and (np.delete(one, 1, axis=0) == 255).all()
    assert (one != other).any()


def test_half_transparent_is_half_white() -> None:
    image = PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert np.abs(seen(encoded(image)) - [255, 127, 127]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright_for_catalogue_and_processor(orientation: int, format: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = PIL.Image.fromarray(np.dstack([GRAY] * 3).astype(np.uint8))
    pixels = seen(encoded(image, format, exif=exif))
    assert pixels.shape[:2] == ((6, 8) if orientation < 5 else (8, 6))


def test_opaque_images_are_not_changed() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    assert (seen(encoded(PIL.Image.fromarray(pixels))) == pixels).all()


def test_very_large_images_are_shrunk_and_look_the_same() -> None:
    image = PIL.Image.linear_gradient("L").resize((4096, 4096))
    small = to_rgb(image)
    assert small.size == (2048, 2048) and small.mode == "RGB"
    assert np.abs(np.asarray(small).astype(int)[::8, ::8] - np.asarray(image)[::16, ::16, None]).max() <= 2
    assert to_rgb(PIL.Image.new("RGB", (2000, 2000))).size == (2000, 2000)


@pytest.mark.parametrize("size", [(1, 101), (101, 1), (1, 60_000), (3000, 29), (8_001, 8_000)])
def test_sizes_that_need_too_much_memory(size: tuple[int, int]) -> None:
    image = PIL.Image.new("1", size)
    with pytest.raises(DataError, match=r"row 1 \(item_id 'a': \d+ x \d+ pixels"):
        seen(encoded(image))
    with pytest.raises(UnusableImage):
        TransRecProcessor(image_processor=make_image_processor())(images=[image])


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (1, 1), (728, 90)])
def test_other_sizes_do_not(size: tuple[int, int]) -> None:
    assert seen(encoded(PIL.Image.new("RGB", size))).shape[:2] == size[::-1]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_metadata_is_blamed_if_it_is_too_large(kind: bytes, place: str) -> None:
    large = zlib.compress(b"x" * 5_000_000)
    body = b"Comment\0" + {b"zTXt": b"\0", b"iCCP": b"\0", b"iTXt": b"\x01\0\0\0"}[kind] + large
    content = encoded(PIL.Image.new("RGB", (8, 8)))
    cut = content.index(b"IDAT") - 4 if place == "before" else content.index(b"IEND") - 4
    content = content[:cut] + chunk(kind, body) + content[cut:]
    try:
        assert seen(content).shape == (8, 8, 3)
    except DataError as error:
        assert "metadata" in str(error) and "damaged" not in str(error).replace("--drop damaged_images", "")


NO_PATHS: dict[str, tuple[str, str]] = {
    "http": ("http://example.org/x.png", "a URL"),
    "https": ("HTTPS://example.org/x.png", "a URL"),
    "s3": ("s3://bucket/x.png", "a URL"),
    "gs": ("gs://bucket/x.png", "a URL"),
    "hf": ("hf://datasets/a/b/x.png", "a URL"),
    "file": ("file:///etc/x.png", "a URL"),
    "one slash": ("https:/example.org/x.png", "a URL"),
    "no scheme": ("//example.org/x.png", "a URL"),
    "www": ("www.example.org/x.png", "a URL"),
    "zip": ("zip://x.png::http://example.org/y.zip", "a URL"),
    "data": ("data:image/png;base64,iVBORw0KGgo=", "a data URI"),
    "png": ("iVBORw0KGgo" + "A" * 50, "base64"),
    "jpeg": ("/9j/4AAQSkZJRgABAQAAAQ" + "A" * 50, "base64"),
    "webp": ("UklGR" + "A" * 50, "base64"),
    "wrapped": ("iVBORw0KGgo" + "A" * 40 + "\n" + "A" * 70, "base64"),
    "anything": ("QUJD" * 100 + "==", "base64"),
    "url-safe": ("QU-_" * 100, "base64"),
    "word": ("nan", "a missing value written as a word"),
    "another word": (" NULL", "a missing value written as a word"),
    "bytes as Python prints them": (repr(b"\x89PNG\r\n" + bytes(200)), "a printed Python object"),
    "a struct as Python prints it": ("{'bytes': b'x', 'path': None}", "a printed Python object"),
    "an image as Python prints it": ("<PIL.PngImagePlugin.PngImageFile mode=RGB>", "a printed Python object"),
    "pixels as Python prints them": ("[[[1, 2, 3]]]", "a printed Python object"),
}


@pytest.mark.parametrize("name", NO_PATHS)
def test_what_is_no_path_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    cell, word = NO_PATHS[name]
    with pytest.raises(DataError, match=word) as caught:
        load_catalogue(pa.table({"item_id": ["a"], "image": [cell]}), image_folder=tmp_path)
    message = str(caught.value)
    assert len(message) < 500 and "leaves" not in message and "not found" not in message


@pytest.mark.parametrize(
    "path", ["a.png", "./a.png", "x/../a.png", "x y/a.png", "C:/a.png", "a:b/c.png", "b" * 120 + "/a.png"]
)
def test_paths_are_paths(path: str, tmp_path: Path) -> None:
    file = tmp_path / path
    (tmp_path / "x").mkdir()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(PIL.Image.new("RGB", (5, 5))))
    catalogue = load_catalogue(pa.table({"item_id": ["a"], "file_name": [path]}), image_folder=tmp_path)
    assert catalogue.image(0) is not None


FIELDS: dict[str, Any] = {
    "other names": [{"data": b"x", "mime": "y"}],
    "bytes of numbers": [{"bytes": 3, "path": "a"}],
    "bytes of text": [{"bytes": "x", "path": None}],
    "path of numbers": [{"bytes": b"x", "path": 7}],
    "numbers": [5],
    "lists of images": [[{"bytes": b"x", "path": None}]],
    "pixels": [[[1, 2], [3, 4]]],
    "truth": [True],
    "another field beside an empty path": [{"data": b"x", "path": None}],
    "pixels beside an empty path": [{"array": [[1, 2]], "path": None}],
}


@pytest.mark.parametrize("name", FIELDS)
def test_columns_that_hold_no_images(name: str) -> None:
    with pytest.raises(DataError, match=r"column 'image' holds .*'bytes' and 'path'"):
        load_catalogue(pa.table({"item_id": ["a"], "text": ["x"], "image": FIELDS[name]}))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([encoded(PIL.Image.new("RGB", (5, 5)))]),
        pa.array([encoded(PIL.Image.new("RGB", (5, 5)))], pa.large_binary()),
        pa.array([encoded(PIL.Image.new("RGB", (5, 5)))], pa.binary_view()),
        pa.array([{"bytes": encoded(PIL.Image.new("RGB", (5, 5)))}]),
        pa.array([{"bytes": encoded(PIL.Image.new("RGB", (5, 5))), "path": "x.png", "width": 5}]),
        pa.array([{"path": None, "bytes": encoded(PIL.Image.new("RGB", (5, 5)))}]),
    ],
    ids=["binary", "large", "view", "bytes", "more fields", "other order"],
)
def test_columns_that_hold_images(column: pa.Array) -> None:
    assert load_catalogue(pa.table({"item_id": ["a"], "image": column})).image(0).size == (5, 5)


@pytest.mark.parametrize("path", ["", " ", "\t", "\u00a0", "\u200b"])
def test_blank_paths_are_missing(path: str) -> None:
    assert not load_catalogue(pa.table({"item_id": ["a"], "text": ["x"], "image": [path]})).has_image.any()


@pytest.mark.parametrize("pixels", [[[np.nan, 1, 0]], [[1, np.nan, 0]], [[np.inf, 1, 0]], [[-np.inf, 1, 0]]])
def test_pixels_that_are_no_numbers_are_refused(pixels: list[list[float]]) -> None:
    image = PIL.Image.fromarray(np.array(pixels, dtype=np.float32))
    catalogue = load_catalogue(pa.table({"item_id": ["a"], "image": [encoded(image, "TIFF")]}))
    with pytest.raises(DataError, match="are NaN or infinite"):
        catalogue.check_contents()


def test_images_of_pil_in_a_table_have_a_mend() -> None:
    with pytest.raises(DataError, match="Write image bytes or file paths"):
        load_catalogue({"item_id": ["a"], "image": [PIL.Image.new("RGB", (5, 5))]})


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(PIL.Image.new("RGB", (5, 5))))
    catalogue = load_catalogue(pa.table({"item_id": ["a"], "image": ["a.png"]}), image_folder=tmp_path)
    (tmp_path / "a.png").unlink()
    for run in (lambda: catalogue.image(0), catalogue.content_hash, lambda: catalogue.encoded("image", 0)):
        with pytest.raises(DataError, match=r"items: unusable image: row 1 \(item_id 'a': image file not found"):
            run()


def test_images_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = {"bytes": encoded(PIL.Image.new("RGB", (5, 5))), "path": None}
    catalogue = Catalogue(datasets.Dataset.from_dict({"item_id": ["a", "b"], "image": [image] * 2}))
    catalogue.check_contents()
    monkeypatch.setattr(catalogue.contents["image"], "defects", lambda full: pytest.fail("decoded again"))
    catalogue.check_contents()
    catalogue.select([1]).check_contents()


def test_a_truncated_image_ends_a_training_before_it_begins(tmp_path: Path) -> None:
    catalogue = make_catalogue(kinds=("image",))
    images = [{"bytes": catalogue.encoded("image", row), "path": None} for row in range(12)]
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    images[7]["bytes"] = encoded(PIL.Image.fromarray(noise), "JPEG")[:-200]
    cut = Catalogue(datasets.Dataset.from_dict({"item_id": catalogue.item_ids.tolist(), "image": images}))
    trainer = make_trainer(tmp_path / "run", make_config("image"), catalogue=cut)
    with pytest.raises(DataError, match=r"row 8 \(item_id '.*': truncated or damaged"):
        trainer.train()
    assert trainer.state.global_step == 0
