"""The demo: what its functions show, and all of it in a headless browser."""

from __future__ import annotations

import os
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import make_catalogue, make_config, make_model, make_processor

from transrec_hf import DataError, ItemSource, Recommender, TransRecModel
from transrec_hf.commands.demo import demo
from transrec_hf.data.demo import demo_config, demo_processor, demo_world
from transrec_hf.serving.pictures import SIDE, groups_of, places, search, thumbnail, tile


pytestmark = pytest.mark.slow  # gradio alone takes seconds to import
SHOTS = os.environ.get("TRANSREC_SCREENSHOTS")
"""Folder where the pictures of the documentation are drawn anew."""


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender(make_model(make_config()), ItemSource(make_catalogue(), make_processor()))


def test_pictures_are_squares() -> None:
    for image in (Image.new("RGB", (10, 40)), Image.new("L", (900, 300)), Image.new("RGBA", (192, 192))):
        assert thumbnail(image).size == (SIDE, SIDE)
    blank = tile("")
    assert blank.size == tile("a red hat " * 30).size == (SIDE, SIDE)
    assert len(np.unique(np.asarray(tile("a red hat")))) > 1


def test_the_map_is_an_exact_analysis(recommender: Recommender) -> None:
    points = places(recommender, [])
    vectors = recommender.item_embeds.numpy().astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    _, spread, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.linalg.norm(points[["first axis", "second axis"]], axis=0), spread[:2], rtol=1e-6)
    assert points["item"].tolist() == recommender.item_ids.tolist()


def test_items_are_grouped_by_what_they_show_and_by_columns() -> None:
    items = make_catalogue().items
    items = items.add_column("price", [float(row) for row in range(len(items))] * 1)
    items = items.add_column("kind", ["hat", "sock"] * (len(items) // 2)).add_column("tags", [["a"]] * len(items))
    catalogue = type(make_catalogue())(items)
    groups = groups_of(catalogue)
    assert list(groups) == ["what an item shows", "price", "kind"]
    assert groups["what an item shows"][:3].tolist() == ["text", "image", "text and image"]
    assert set(groups["kind"]) == {"hat", "sock"} and len(set(groups["price"])) <= 12


def test_search_finds_all_words() -> None:
    catalogue = make_catalogue()
    texts = [(catalogue.text(row) or "").lower() for row in range(len(catalogue))]
    assert search(catalogue, texts, "").tolist() == list(range(12))
    assert search(catalogue, texts, "ITEM-11").tolist() == [11]
    assert all("hat" in texts[row] and "old" in texts[row] for row in search(catalogue, texts, "old hat"))


def test_own_items_and_reasons(recommender: Recommender, tmp_path: Path) -> None:
    app = pytest.importorskip("transrec_hf.serving.app")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "own.png")
    shop = app.Shop(recommender)
    history = [shop.entry(0), app.own_item("a red hat", str(tmp_path / "own.png")), app.own_item(" hat ", None)]
    pictures, table, ids = app.answer(shop, history, 4, "", "any", False)
    assert len(pictures) == table.count("<tr>") - 1 == len(ids) == 4 and "item-0" not in ids
    assert len(re.findall(r"your own: .*? [+-]\d+\.\d\d; text [+-]\d+\.\d\d; image [+-]\d+\.\d\d", table)) >= 1
    assert app.as_table([("<script>", "&", "'")]).count("<td>") == 3
    assert "<script>" not in app.as_table([("<script>", "&", "'")])
    assert app.answer(shop, [], 4, "", "any", False)[2] == []
    assert set(app.answer(shop, history, 12, "'hat' in text", "any", True)[2]) <= set(shop.catalogue.item_ids)
    drawn = app.draw_map(shop, app.CHOSEN, history, ids)
    assert set(drawn["color_map"]) == {"other items", "recommended", "history"}
    assert drawn["value"]["group"].value_counts().to_dict() == {"other items": 7, "recommended": 4, "history": 1}
    (tmp_path / "no.png").write_bytes(b"<svg/>")
    for text, path in (("", None), ("  ", None), ("a hat", str(tmp_path / "no.png"))):
        with pytest.raises(DataError, match=r"give a text|cannot be read"):
            app.own_item(text, path)


def test_wrong_usage(tmp_path: Path, recommender: Recommender) -> None:
    app = pytest.importorskip("transrec_hf.serving.app")
    with pytest.raises(DataError, match="add --public if that is intended"):
        demo([str(tmp_path), "--host", "0.0.0.0"])
    with pytest.raises(DataError, match="give the folder or Hub id"):
        demo([])
    recommender.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="which an index does not have: give --data or --items"):
        app.build_demo({"x": Recommender.from_pretrained(tmp_path)})


# In a browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The demo of two models of the demo world."""
    app = pytest.importorskip("transrec_hf.serving.app")
    recommenders = {}
    for seed, name in enumerate(("pre-trained", "from scratch")):
        torch.manual_seed(seed)
        checkpoint = os.environ.get("TRANSREC_SCREENSHOT_MODEL")
        model = TransRecModel.from_pretrained(checkpoint) if checkpoint and not seed else TransRecModel(demo_config())
        recommenders[name] = Recommender(model, ItemSource(demo_world().target.catalogue, demo_processor()))
    _, address, _ = app.launch(recommenders, port=None, prevent_thread_lock=True)
    yield address


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.mark.parametrize(
    ("name", "width", "theme"), [("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 390, "light")]
)
def test_a_visitor_clicks_and_sees(name: str, width: int, theme: str, url: str, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(f"{url}?__theme={theme}")

    page.get_by_label("Search").fill("large crimson")
    page.get_by_text("page 1 of 1").wait_for()
    page.locator("#catalogue .thumbnail-item").first.click()
    page.locator("#history .thumbnail-item").first.wait_for()
    page.get_by_label("Search").fill("")
    page.get_by_text("400 items").wait_for()
    page.locator("#catalogue .thumbnail-item").nth(3).click()
    page.locator("#history .thumbnail-item").nth(1).wait_for()
    page.locator("#own button").first.click()
    page.get_by_label("Its text").fill("small striped ring in rose")
    Image.new("RGB", (32, 32), "#fa96af").save(tmp_path / "own.png")
    page.locator("#own input[type=file]").set_input_files(tmp_path / "own.png")
    page.locator("#own img").first.wait_for()
    page.get_by_role("button", name="Add to the history").click()
    page.locator("#history .thumbnail-item").nth(2).wait_for()
    for number in range(2):
        page.locator(f"#recommended-{number} .thumbnail-item").nth(7).wait_for()
    page.wait_for_function("document.querySelector('#reasons-0').innerText.includes('your own')")
    page.locator("#own button").first.click()
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": width, "height": height})  # images are loaded when they come into view
    page.wait_for_function("[...document.images].every(image => image.complete)")
    page.wait_for_timeout(1500)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    picture = tmp_path / f"{name}.png"
    page.screenshot(path=picture, full_page=True)
    page.get_by_role("tab", name="Map").click()
    page.locator("#map canvas, #map svg").first.wait_for()
    page.wait_for_timeout(1500)
    chart = tmp_path / f"{name}-map.png"
    page.screenshot(path=chart)

    assert not wrong, wrong
    outside = [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not outside, outside
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert (pixels[:300].mean() < 110) == (theme == "dark")
    if SHOTS:
        for shot in (picture, chart) if name == "light" else (picture,):
            image = Image.open(shot).convert("RGB")
            image = image.crop((0, 0, image.width, min(image.height, 4 * image.width)))
            image.thumbnail((900, 2400))
            image.quantize(200, dither=Image.Dither.NONE).save(Path(SHOTS) / f"demo-{shot.stem}.png", optimize=True)


def test_the_space_serves_a_pushed_recommender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = pytest.importorskip("transrec_hf.serving.app")
    target = demo_world().target
    torch.manual_seed(0)
    Recommender(TransRecModel(demo_config()), ItemSource(target.catalogue, demo_processor())).save_pretrained(tmp_path)
    target.save(tmp_path / "items")
    shown: list[Any] = []
    monkeypatch.setattr(app, "launch", lambda *arguments: shown.append(arguments))
    monkeypatch.setenv("MODEL", str(tmp_path))
    monkeypatch.setenv("ITEMS", str(tmp_path / "items"))
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "space" / "app.py"), run_name="__main__")
    ((recommenders, host, port),) = shown
    assert (host, port) == ("0.0.0.0", 7860) and len(recommenders[tmp_path.name]) == 400
