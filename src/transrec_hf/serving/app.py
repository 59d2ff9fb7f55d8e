"""A demo in the browser: choose items, or add your own, and see what is recommended and why."""

from __future__ import annotations

import functools
import html
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import IMAGE_FORMATS
from ..errors import DataError
from ..model.processing_transrec import check_image_size, to_rgb
from .filters import matching_rows
from .pictures import groups_of, places, search, thumbnail, tile
from .recommender import Recommender
from .results import Recommendation, Recommendations


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it is read when gradio is imported
import gradio as gr


PAGE = 24  # items
MAX_HISTORY = 50
MAX_IMAGE = "10mb"
ANY = "any"
CHOSEN, OTHER = "history and recommendations", "other items"
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#cc79a7",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#8c6bb1",
    "#a6761d",
    "#666666",
    "#b2df8a",
)
"""Colours of the groups of a map, which most people can tell apart."""
FONTS = ["system-ui", "sans-serif"]  # fonts of the machine: nothing is loaded from other sites
CSS = """
.gradio-container {max-width: 1400px !important; width: 100% !important; margin: auto}
.shelf, .shelf .grid-wrap, .shelf .gallery-container {min-height: 0 !important; max-height: none !important}
.shelf .grid-container {gap: 8px; padding: 4px}
.shelf .thumbnail-item {height: auto; aspect-ratio: auto; display: block; background: none}
.shelf .thumbnail-item img {aspect-ratio: 1; height: auto; width: 100%}
.shelf .caption-label {position: static; max-width: none; padding: 4px 6px; background: none; border: none;
  box-shadow: none; white-space: normal; font-size: 12px; line-height: 1.25; text-align: left; overflow-wrap: anywhere}
@media (max-width: 640px) {.shelf .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important}}
.reasons table {width: 100%; border: none !important; border-collapse: collapse; font-size: 13px; line-height: 1.35}
.reasons :is(th, td) {text-align: left; vertical-align: top; padding: 5px 8px !important; overflow-wrap: anywhere;
  border: none !important; border-bottom: 1px solid var(--border-color-primary) !important}
.reasons :is(th, td):nth-child(2) {text-align: right; overflow-wrap: normal}
footer {display: none !important}
"""
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"], primary_hue="teal"),
    "css": CSS,
    "max_file_size": MAX_IMAGE,
    "footer_links": [],
}
"""Arguments of `Blocks.launch` for the demo."""

History = list[dict[str, Any]]


class Shop:
    """
    A catalogue with titles and pictures, as people see it.

    Args:
        recommender ([`Recommender`]): A recommender that has its catalogue.

    Raises:
        [`DataError`]: If the recommender has no catalogue.
    """

    def __init__(self, recommender: Recommender):
        if recommender.catalogue is None:
            raise DataError(
                "the demo shows pictures and titles, which an index does not have: give --data or --items too"
            )
        self.recommender, self.catalogue = recommender, recommender.catalogue
        self.texts = [self.catalogue.text(row) or "" for row in range(len(self.catalogue))]
        self.lowered = [text.lower() for text in self.texts]
        self.groups = groups_of(self.catalogue)
        self.picture = functools.lru_cache(maxsize=2048)(self._picture)

    def title(self, row: int, length: int = 60) -> str:
        """The text under the picture of an item."""
        text = " ".join(self.texts[row].split())
        if not text:
            return str(self.catalogue.item_ids[row])
        return text if len(text) <= length else f"{text[: length - 3]}..."

    def _picture(self, row: int) -> Image.Image:
        image = self.catalogue.image(row) if self.catalogue.has("image")[row] else None
        return tile(self.title(row, 100)) if image is None else thumbnail(image)

    def gallery(self, rows: np.ndarray, captions: list[str] | None = None) -> list[tuple[Image.Image, str]]:
        """Pictures with captions."""
        titles = [self.title(row) for row in rows.tolist()] if captions is None else captions
        return [(self.picture(row), title) for row, title in zip(rows.tolist(), titles, strict=True)]

    def found(self, words: str, condition: str) -> np.ndarray:
        """Rows of the items that have all `words` and match the filter `condition`. Raises [`DataError`]."""
        rows = search(self.catalogue, self.lowered, words)
        if condition.strip():
            columns = self.recommender.items.columns
            allowed = set(np.array(self.recommender.item_ids)[matching_rows(condition, columns)].tolist())
            rows = rows[[self.catalogue.item_ids[row] in allowed for row in rows.tolist()]]
        return rows

    def rows(self, found: Recommendations) -> np.ndarray:
        """Rows of recommended items."""
        return self.catalogue.rows([item.item_id for item in found])

    def entry(self, row: int) -> dict[str, Any]:
        """An item of the catalogue as an entry of a history."""
        return {"item": str(self.catalogue.item_ids[row]), "title": self.title(row), "picture": self.picture(row)}


def own_item(text: str | None, path: str | None) -> dict[str, Any]:
    """An item that a visitor adds, as an entry of a history. Raises [`DataError`]."""
    item: dict[str, Any] = {}
    text = (text or "").strip()
    if text:
        item["text"] = text
    picture = tile(text)
    if path is not None:
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                check_image_size(*image.size)
                item["image"] = to_rgb(image)
        except Exception:  # whatever decoders raise
            raise DataError(
                "this image cannot be read: choose a PNG, JPEG, WebP or GIF that is not too large"
            ) from None
        picture = thumbnail(item["image"])
    if not item:
        raise DataError("give a text, an image or both")
    return {"item": item, "title": f"your own: {text[:40] or 'an image'}", "picture": picture}


def reasons(item: Recommendation, history: History) -> str:
    """The reasons for a recommendation: the two items of the history that raise its score most, and each modality."""
    why = item.explanation
    if why is None:
        return ""
    most = sorted(why.history.items(), key=lambda pair: -pair[1])[:2]
    said = [f"{history[place]['title']} {effect:+.2f}" for place, effect in most]
    return "; ".join(said + [f"{name} {effect:+.2f}" for name, effect in (why.modalities or {}).items()])


def as_table(rows: list[tuple[str, str, str]]) -> str:
    """Titles, scores and reasons, as HTML."""
    head = "<tr><th>item</th><th>score</th><th>raised by</th></tr>"
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def answer(shop: Shop, history: History, k: int, condition: str, modality: str, repeats: bool) -> tuple[Any, str, Any]:
    """Pictures, a table of scores and reasons, and the ids of what is recommended for a history."""
    if not history:
        return [], "", []
    found = shop.recommender.recommend(
        [entry["item"] for entry in history],
        int(k),
        exclude_seen=not repeats,
        filter=condition.strip() or None,
        modality=None if modality == ANY else modality,
        on_unknown="skip",
        explain=True,
    )
    if found.fallback is not None:
        gr.Info("The model knows no item of this history: these are the popular items.")
    rows = shop.rows(found)
    titles = [f"{rank}. {shop.title(row)}" for rank, row in enumerate(rows.tolist(), 1)]
    table = [(title, f"{item.score:.2f}", reasons(item, history)) for item, title in zip(found, titles, strict=True)]
    return shop.gallery(rows, titles), as_table(table), [item.item_id for item in found]


def draw_map(shop: Shop, colour: str, history: History, recommended: list[str]) -> dict[str, Any]:
    """The points of the map, with a group and a title each, and the colours of the groups."""
    chosen = [entry["item"] for entry in history if isinstance(entry["item"], str)]
    points = places(shop.recommender, chosen + recommended)
    rows = shop.catalogue.find(points["item"].tolist())
    if colour == CHOSEN:
        marks = {**dict.fromkeys(recommended, "recommended"), **dict.fromkeys(chosen, "history")}
        points["group"] = [marks.get(item, OTHER) for item in points["item"]]
    else:
        groups = shop.groups[colour]
        points["group"] = [groups[row] if row >= 0 else "new" for row in rows.tolist()]
    points["title"] = [shop.title(row) if row >= 0 else "" for row in rows.tolist()]
    names = sorted(set(points["group"]) - {OTHER})
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    return {"value": points, "color_map": {**colours, OTHER: "#b8c0cc"}}


def shelf(name: str, columns: int) -> gr.Gallery:
    """Pictures in rows, to click on."""
    return gr.Gallery(
        show_label=False,
        columns=columns,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=name,
        elem_classes="shelf",
    )


def build_demo(recommenders: dict[str, Recommender]) -> gr.Blocks:
    """
    The demo of one recommender, or of several side by side.

    Args:
        recommenders (`dict[str, Recommender]`): Recommenders by the name to show; each needs its catalogue.

    Raises:
        [`DataError`]: If a recommender has no catalogue.
    """
    shops = {name: Shop(recommender) for name, recommender in recommenders.items()}
    first = next(iter(shops.values()))

    def show(words: str, condition: str, page: int) -> tuple[Any, ...]:
        try:
            rows = first.found(words or "", condition or "")
        except DataError as error:
            gr.Warning(str(error))
            rows = np.empty(0, dtype=np.int64)
        pages = max(1, -(-len(rows) // PAGE))
        page = min(max(0, page), pages - 1)
        here = rows[page * PAGE : (page + 1) * PAGE]
        return first.gallery(here), here.tolist(), page, f"{len(rows):,} items, page {page + 1} of {pages}"

    def choose(history: History, here: list[int], event: gr.SelectData) -> History:
        return [*history, first.entry(here[event.index])][-MAX_HISTORY:]

    def bring(history: History, text: str, path: str | None) -> tuple[History, str, None]:
        try:
            return [*history, own_item(text, path)][-MAX_HISTORY:], "", None
        except DataError as error:
            raise gr.Error(str(error)) from None

    def drop(history: History, event: gr.SelectData) -> History:
        return history[: event.index] + history[event.index + 1 :]

    def recommend(history: History, k: int, condition: str, modality: str, repeats: bool) -> list[Any]:
        parts: list[Any] = [[(entry["picture"], entry["title"]) for entry in history]]
        for shop in shops.values():
            try:
                parts += answer(shop, history, k, condition or "", modality, repeats)
            except (DataError, ValueError) as error:
                gr.Warning(str(error))
                parts += [[], "", []]
        return parts

    with gr.Blocks(title="transrec-hf", analytics_enabled=False) as demo:
        history, here, page = gr.State([]), gr.State([]), gr.State(0)
        gr.Markdown(
            "## What next?\nClick items to build a history, or add an item of your own. "
            f"**{'** and **'.join(shops)}** recommend{'s' if len(shops) == 1 else ''} by the content of items, so a "
            "new item works as well."
        )
        with gr.Tab("Recommend"):
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    with gr.Row():
                        words = gr.Textbox(label="Search", placeholder="words of a title", min_width=160)
                        condition = gr.Textbox(
                            label="Filter",
                            placeholder="price < 20 and 'hat' in text",
                            info="Applies to the catalogue and to the recommendations.",
                            min_width=160,
                        )
                    catalogue = shelf("catalogue", 6)
                    with gr.Row(equal_height=True):
                        back = gr.Button("Back", size="sm", min_width=60)
                        count = gr.Markdown(elem_id="count")
                        on = gr.Button("On", size="sm", min_width=60)
                with gr.Column(scale=2, min_width=320):
                    gr.Markdown("**History**, oldest first; click to remove")
                    chosen = shelf("history", 5)
                    clear = gr.Button("Clear the history", size="sm")
                    with gr.Accordion("Add an item of your own", open=False, elem_id="own"):
                        text = gr.Textbox(label="Its text", placeholder="a small red hat", max_length=2000)
                        image = gr.Image(
                            label="Its image", type="filepath", height=140, sources=["upload", "clipboard"]
                        )
                        add = gr.Button("Add to the history", variant="primary", size="sm")
                    with gr.Row():
                        k = gr.Slider(1, 30, 8, step=1, label="How many", min_width=160)
                        modality = gr.Radio(
                            [ANY, *first.recommender.model.config.modalities], value=ANY, label="Of items with"
                        )
                    repeats = gr.Checkbox(False, label="Recommend items of the history, too")
            gr.Markdown(
                "Compare scores within one list only. Beside each score: how much lower it would be without that part."
            )
            outputs: list[Any] = [chosen]
            recommended: list[Any] = []
            with gr.Row():
                for number, name in enumerate(shops):
                    with gr.Column(min_width=320):
                        gr.Markdown(f"**Recommended** by {name}")
                        pictures = shelf(f"recommended-{number}", 8 if len(shops) == 1 else 4)
                        table = gr.HTML(elem_id=f"reasons-{number}", elem_classes="reasons")
                        recommended.append(gr.State([]))
                        outputs += [pictures, table, recommended[-1]]
        with gr.Tab("Map") as tab:
            with gr.Row():
                of = gr.Dropdown(list(shops), value=next(iter(shops)), label="Checkpoint", visible=len(shops) > 1)
                colour = gr.Dropdown([*first.groups, CHOSEN], value=next(iter(first.groups)), label="Colour")
            points = gr.ScatterPlot(
                x="first axis",
                y="second axis",
                color="group",
                tooltip=["item", "title"],
                height=560,
                elem_id="map",
                buttons=[],
            )
            gr.Markdown(
                "Items with similar vectors are close together. The axes are the two along which items differ most."
            )

        def draw(name: str, by: str, given: History, *lists: list[str]) -> gr.ScatterPlot:
            return gr.ScatterPlot(**draw_map(shops[name], by, given, lists[list(shops).index(name)]))

        asked_for: dict[str, Any] = {"inputs": [words, condition, page], "outputs": [catalogue, here, page, count]}
        options = [history, k, condition, modality, repeats]
        asked: dict[str, Any] = {"fn": recommend, "inputs": options, "outputs": outputs, "show_progress": "minimal"}
        drawn: dict[str, Any] = {"fn": draw, "inputs": [of, colour, history, *recommended], "outputs": points}
        demo.load(show, **asked_for)
        gr.on([words.submit, words.change, condition.submit], lambda: 0, outputs=page).then(show, **asked_for)
        back.click(lambda page: page - 1, page, page).then(show, **asked_for)
        on.click(lambda page: page + 1, page, page).then(show, **asked_for)
        catalogue.select(choose, [history, here], history)
        chosen.select(drop, history, history)
        clear.click(list, outputs=history)
        add.click(bring, [history, text, image], [history, text, image])
        gr.on([history.change, k.release, condition.submit, modality.change, repeats.change], **asked)
        gr.on([tab.select, of.change, colour.change], **drawn)
    return demo


def launch(recommenders: dict[str, Recommender], host: str = "127.0.0.1", port: int = 7860, **kwargs: Any) -> Any:
    """
    Show the demo. Returns when the demo is stopped, or at once with `prevent_thread_lock=True`.

    Args:
        recommenders (`dict[str, Recommender]`): See [`build_demo`].
        host (`str`), port (`int`): Address to listen on.
        kwargs: Further arguments of `gradio.Blocks.launch`.
    """
    here = Path(__file__).parent  # visitors may not read the code
    place: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "share": False,
        "ssr_mode": False,
        "quiet": True,
    }
    return build_demo(recommenders).launch(blocked_paths=[str(here)], **{**place, **LAUNCH, **kwargs})


__all__ = ["build_demo", "launch"]
