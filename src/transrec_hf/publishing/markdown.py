"""
Cards from templates. Texts from a run, a data set or a stranger's checkpoint are escaped, so that they stay text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CardData, RepoCard


TEMPLATES = Path(__file__).parent / "templates"
MAX_TEXT = 1000  # characters of one value
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")
_MARKS = re.compile(r"[\\`*\[\]|$~]|(?<!\w)_|_(?!\w)|^[-+#=>]|^\d+(?=[.)]\s)")
_LINKS = re.compile(r":(?=//)|(?<=www)\.|(?<=mailto):|(?<=xmpp):|(?<=\w)@(?=[\w-]+\.\w)", re.IGNORECASE)


class Markdown(str):
    """Our own Markdown, in which all texts from elsewhere were escaped by [`plain`] or [`code`]."""


def _line(value: Any) -> str:
    text = _INVISIBLE.sub(" ", str(value))
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def plain(value: Any) -> Markdown:
    """A value as text on one line, which cannot become a heading, table, link, HTML or formula."""
    text = _line(value).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKS.sub(lambda found: f"\\{found[0]}" if not found[0][0].isdigit() else f"{found[0]}\\", text)
    return Markdown(_LINKS.sub(lambda found: f"&#{ord(found[0])};", text))


def code(value: Any) -> Markdown:
    """A value between backticks, also in a table."""
    return Markdown(f"`{_line(value).replace('`', chr(39)).replace('|', chr(92) + '|') or ' '}`")


def quoted(value: Any) -> Markdown:
    """A value as a Python string in a block of code."""
    return Markdown('"' + re.sub(r'["\\`]', "", _line(value)) + '"')


def shares_in_words(shares: Mapping[str, float]) -> str:
    """The result of [`modality_shares`] in words, for a card."""
    names = {"image": "an image", "features": "a vector", "audio": "a sound", "video": "a video"}
    kinds = {name.removesuffix("_only"): share for name, share in shares.items() if name != "both"}
    parts = [f"{share:.1%} with {names.get(name, name)} only" for name, share in kinds.items()]
    return ", ".join([*parts, f"{shares['both']:.1%} with {'both' if len(kinds) == 2 else 'several'}"])


def render(card_class: type[RepoCard], template: str, data: CardData, values: Mapping[str, Any]) -> Any:
    """A card from one of our templates. Every value that is not [`Markdown`] is escaped by [`plain`]."""
    environment = jinja2.Environment(
        finalize=lambda value: value if isinstance(value, Markdown) else plain(value),
    )
    environment.filters |= {"code": code, "quoted": quoted, "plain": plain}
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return card_class(environment.from_string(text).render(card_data=Markdown(data.to_yaml()), **values))
