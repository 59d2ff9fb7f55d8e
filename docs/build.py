"""
Builds the site into build/site, strictly:

    python docs/build.py

The pages lie in the repository where they are at home and keep their places on the site, so that their links hold here
and there. What is linked and no page, as a program, goes along. The build fails where a link leads nowhere, a
cross-reference of a docstring names nothing, or a page is not in the navigation.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
LINK = re.compile(r'(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)|(src|srcset)="(?P<file>[^"]+)"')


def pages_of(settings: str) -> list[str]:
    """The pages that the navigation names, in its order."""
    return re.findall(r'"([\w/.-]+\.md)"', settings)


def gather(pages: list[str]) -> None:
    """Copy the pages, and what they link to."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in pages:
        page = ROOT / name
        text = re.sub(r"\A---\n.*?\n---\n", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # of model cards
        text = re.sub(r"^> \[!(NOTE|WARNING)\]\n", "", text, flags=re.MULTILINE)

        def linked(match: re.Match, page: Path = page) -> str:
            address, hash_mark, anchor = (match["target"] or match["file"]).partition("#")
            if not address or urlsplit(address).scheme:
                return match[0]
            target = (page.parent / address).resolve()
            if not target.exists():
                sys.exit(f"{page.relative_to(ROOT)}: {address} is not there. Mend the link.")
            place = target.relative_to(ROOT)
            if target.is_dir() and f"{place}/README.md" in pages:
                return f"{match['text']}({address.rstrip('/')}/README.md{hash_mark}{anchor})"
            if target.is_dir():  # a folder of programs or tables is no page: its name is all there is to say
                return match["text"][1:-1]
            if str(place) not in pages:
                copy = PAGES / place
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(target, copy)
            return match[0]

        copy = PAGES / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(LINK.sub(linked, text), encoding="utf-8")


class Page(HTMLParser):
    """The links of a page, and the places that links may lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.places |= {values["id"] or ""} if "id" in values else set()
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


def dead_links() -> list[str]:
    """Links of the site that lead nowhere, and cross-references that were not resolved."""
    found = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in SITE.rglob("*.html")}
    dead = []
    for file, page in found.items():
        if file.name == "404.html":
            continue
        name = file.relative_to(SITE)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in found and unquote(parts.fragment) not in found[target].places):
                dead.append(f"{name}: {link}")
        text = re.sub(r"<pre.*?</pre>", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        dead += [f"{name}: the reference {match[0]}" for match in re.finditer(r"\[<code>[^<]*</code>\](\[|$)?", text)]
    return dead


def main() -> None:
    pages = pages_of((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    lost = [
        name for page in sorted((ROOT / "docs").rglob("*.md")) if (name := str(page.relative_to(ROOT))) not in pages
    ]
    if lost:
        sys.exit(f"zensical.toml: {', '.join(lost)} is not in the navigation. Add it to `nav`.")
    gather(pages)
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=False)
    if built.returncode:
        sys.exit(built.returncode)
    if dead := dead_links():
        sys.exit("\n".join(["Links that lead nowhere:", *dead]))
    print(f"{len(pages)} pages in {SITE.relative_to(ROOT)}, every link leads somewhere")


if __name__ == "__main__":
    main()
