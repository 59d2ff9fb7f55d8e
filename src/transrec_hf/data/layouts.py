"""
The layouts of published data sets: one function for each layout, which finds items and interactions in the files of a
folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import mode
from typing import Any

from ..errors import DataError, printable
from .published import (
    SAMPLE,
    LeftOut,
    Parts,
    Published,
    Table,
    cells_of,
    encoding_of,
    json_lines,
    lines_of,
    media_of,
    name_of,
    no_rows,
    number_of,
    open_table,
    seconds_of,
    time_of,
)


Interactions = Iterator[tuple[str, str, "int | None", "float | None"]]
Items = Iterator[dict[str, Any]]
Layout = Callable[[Parts, "str | None", str], Published]

USERS = ("user", "user_id", "userid", "uid", "reviewerid", "customer_id")
ITEMS = ("item", "item_id", "itemid", "iid", "video", "video_id", "videoid", "vid", "movieid", "parent_asin", "asin")
TIMES = ("timestamp", "time", "ts", "unixreviewtime")
VALUES = ("rating", "overall", "value", "watch_ratio")
PAIR = {"user": USERS, "item": (*ITEMS, "article_id", "song", "track_id"), "timestamp": TIMES}
CHINESE = re.compile("[\u4e00-\u9fff]")
MIND_TIME = "%m/%d/%Y %I:%M:%S %p"


def pairs(table: Table) -> Interactions:
    """The rows of a table as interactions."""
    for row in table:
        value = number_of(row["value"]) if "value" in row else None
        yield row["user"].strip(), row["item"].strip(), time_of(row["timestamp"]), value


def sequences(path: Path, left_out: LeftOut) -> Interactions:
    """Interactions from lines of a user, a tab, and items in time order; the position of an item is its timestamp."""
    number = 0
    for number, line in enumerate(filter(str.strip, lines_of(path)), start=1):
        user, tab, items = line.strip().partition("\t")
        if not tab:
            left_out.add("rows", f"{path.name}, row {number}", "no tab between a user and items")
        for place, item in enumerate(items.split()):
            yield user, item, place, None
    if not number:
        raise no_rows(path)


def interactions_of(
    parts: Parts, pair: Sequence[Path], lines: Sequence[Path], known: Mapping[str, Any]
) -> Callable[[], Interactions]:
    """Interactions from a file of pairs or, if there is none, from a file of lines."""
    if pair:
        table = open_table(parts, pair[0], PAIR, ("user", "item", "timestamp"), known=known)
        return lambda: pairs(table)
    parts.notes.append(f"{lines[0].name}: items are in time order; their positions are the timestamps")
    return lambda: sequences(lines[0], parts.left_out)


def titles_of(parts: Parts, path: Path, log: Path, language: str) -> Table:
    """
    The table of ids and titles in a file that may have no header. Ids are the column that the interactions name most;
    Chinese titles are told by their characters.
    """
    sample = list(islice(cells_of(path), 200))
    if not sample:
        raise no_rows(path)
    width = mode(map(len, sample))
    if width < 2:
        raise DataError(
            f"{printable(path)}: has only one column instead of an id and titles, separated by commas. Download it "
            "again."
        )
    named = {cell for line in islice(lines_of(log), SAMPLE) for cell in re.split(r"[\s,]+", line)}
    columns = [[row[column].strip() for row in sample if len(row) == width] for column in range(width)]
    ids = max(range(width), key=lambda column: (sum(cell in named for cell in columns[column]), -column))
    chinese = [sum(bool(CHINESE.search(cell)) for cell in cells) for cells in columns]
    others = [column for column in range(width) if column != ids]
    title = (max if language == "zh" else min)(others, key=lambda column: (chinese[column], column))
    found = "zh" if chinese[title] > len(sample) / 2 else "en"
    has_header = columns[ids][0].lower() in (*ITEMS, "id")
    header = "" if has_header else "no header; "
    only = "" if found == language else f", because there are none in {language}"
    parts.notes.append(
        f"{path.name}: {header}ids are in column {ids + 1}, titles ({found}{only}) in column {title + 1}"
    )
    return Table(path, ",", {"item_id": ids, "title": title}, has_header, parts.left_out)


def ninerec(parts: Parts, domain: str | None, language: str) -> Published:
    """NineRec: `D_pair.csv` or `D_behaviour.tsv`, `D_item.csv` and `D_cover/` of each data set D."""
    named = [name_of(file).removesuffix("_item.csv") for file in parts.files("*_item.csv")]
    if not named:
        parts.miss("items of a data set (D_item.csv, for D as TN)")
    chosen = parts.choose(named, domain)
    item = parts.need("items", f"{chosen}_item.csv")
    pair, lines = parts.files(f"{chosen}_pair.csv"), parts.files(f"{chosen}_behaviour.tsv")
    if not pair and not lines:
        parts.miss(f"interactions ({chosen}_pair.csv or {chosen}_behaviour.tsv)")
    shared = ("bili*_cover*", "source_cover*") if chosen.lower().startswith("bili") else ()
    cover = parts.folder(f"{chosen.lower()}_cover*", *shared)
    parts.check()
    table = titles_of(parts, item, (pair or lines)[0], language)
    covers = media_of(cover)
    known = dict.fromkeys((row["item_id"].strip() for row in table), True) | dict.fromkeys(covers, True)

    def items() -> Items:
        for row in table:
            yield {"item_id": row["item_id"].strip(), "title": row["title"]}

    interactions = interactions_of(parts, pair, lines, known)
    return parts.published(items, interactions, ("title",), image=covers)


def morec(parts: Parts, domain: str | None, language: str) -> Published:
    """MoRec (MIND, HM, Bili): `D_users.tsv`, `D_items.tsv` of ids and, for MIND, titles, and a folder of images."""
    named = [name_of(file).removesuffix("_users.tsv") for file in parts.files("*_users.tsv")]
    if not named:
        parts.miss("lines of users (D_users.tsv, for D as mind_60w)")
    chosen = parts.choose(named, domain)
    item, lines = (parts.need(what, f"{chosen}_{what}.tsv") for what in ("items", "users"))
    parts.check()
    stem = chosen.split("_")[0].lower()
    images = media_of(parts.folder(f"{stem}*image*", f"{stem}*cover*", "*image*", "*cover*"))
    first = next(cells_of(item, "\t"), [])
    if len(first) < 2 and not images:
        packed = [file.name for file in parts.files("*.lmdb")]
        mend = f" ({packed[0]} holds pickled objects, which are not read)" if packed else ""
        parts.miss(f"titles in {item.name}, or a folder of images, named by item{mend}")
        parts.check()
    columns = {"item_id": 0, **({"title": 1} if len(first) > 1 else {})}
    has_header = bool(first) and first[0].strip().lower() in (*ITEMS, "id")
    table = Table(item, "\t", columns, has_header, parts.left_out)
    interactions = interactions_of(parts, [], [lines], {})
    return parts.published(lambda: iter(table), interactions, ("title",)[: len(columns) - 1], image=images)


def microlens(parts: Parts, domain: str | None, language: str) -> Published:
    """MicroLens: `D_pairs.csv` or `.tsv`, `D_title*.csv`, and folders of covers, audios and videos named by item."""
    named = [re.sub(r"_pairs\.(csv|tsv)$", "", name_of(file)) for file in parts.files("*_pairs.csv", "*_pairs.tsv")]
    if not named:
        parts.miss("interactions (D_pairs.csv or D_pairs.tsv, for D as MicroLens-50k)")
    chosen = parts.choose(named, domain)
    media = {
        name: media_of(parts.folder(f"{chosen.lower()}*{word}*", f"*{word}*"))
        for name, word in (("image", "cover"), ("audio", "audio"), ("video", "video"))
    }
    titles = parts.files(f"{chosen}*title*_{language}.csv", f"{chosen}*title*.csv", "*title*.csv")
    if not titles and not any(media.values()):
        parts.miss("titles (D_title*.csv), or a folder of covers, audios or videos")
    parts.check()
    names = {"item": (*ITEMS, "id"), "title": ("title", "text", "caption")}
    table = open_table(parts, titles[0], names, ("item", "title")) if titles else None
    if table is None:
        parts.notes.append(f"no titles: there is no file {chosen}_title*.csv")
    known = dict.fromkeys((row["item"] for row in table or ()), True) | dict.fromkeys(chain(*media.values()), True)

    def items() -> Items:
        seen = set()
        for row in table or ():
            seen.add(row["item"])
            yield {"item_id": row["item"], "title": row["title"]}
        for item in known.keys() - seen:
            yield {"item_id": item, **({"title": None} if titles else {})}

    pair, lines = (parts.files(f"{chosen}_pairs.{suffix}") for suffix in ("csv", "tsv"))
    text = ("title",) if titles else ()
    return parts.published(items, interactions_of(parts, pair, lines, known), text, **media)


def pixelrec(parts: Parts, domain: str | None, language: str) -> Published:
    """PixelRec: CSV files of interactions and of items, told by their headers, and a folder of covers."""
    headers = {file: next(cells_of(file), []) for file in parts.files("*.csv")}
    pair = {name_of(file).removesuffix(".csv"): file for file, header in headers.items() if "user_id" in header}
    info = [file for file, header in headers.items() if "item_id" in header and {"title", "title_en"} & {*header}]
    if not pair:
        parts.miss("interactions (a CSV of item_id, user_id, timestamp, as Pixel200K.csv)")
    images = media_of(parts.folder("*cover*", "*image*"))
    if not info and not images:
        parts.miss("items (a CSV of item_id, title, ..., as item_info.csv), or a folder of covers")
    if not pair or not (info or images):
        parts.check()
    chosen = parts.choose(pair, domain)
    same = [file for file in info if name_of(file) == f"{chosen}.csv"] or info
    if not info:
        parts.notes.append("no titles: there is no CSV of item_id, title, ...")
    fields = [name for name in headers[same[0]] if name != "item_id"] if same else []
    table = (
        Table(
            same[0], ",", {name: headers[same[0]].index(name) for name in ("item_id", *fields)}, True, parts.left_out
        )
        if same
        else None
    )
    title = "title_en" if language == "en" and "title_en" in fields else "title"

    def items() -> Items:
        if table is None:
            yield from ({"item_id": item} for item in images)
        else:
            yield from table

    log = open_table(parts, pair[chosen], PAIR)
    text = [name for name in (title, "description") if name in fields]
    return parts.published(items, lambda: pairs(log), text, image=images)


def amazon(parts: Parts, domain: str | None, language: str) -> Published:
    """
    Amazon Reviews of 2018 and 2023: `C_5.json`, `C.json`, `C.jsonl` or `C.csv` of a category C, and `meta_C.json` or
    `.jsonl`; compressed or not.
    """
    endings = ("_5.json", ".train.csv", ".csv", ".jsonl", ".json")
    stem = re.compile(r"(_5)?(\.(train|valid|test))?\.(csv|jsonl|json)$")
    meta = {stem.sub("", name_of(file))[5:]: file for file in parts.files("meta_*.json", "meta_*.jsonl")}
    found = [file for file in parts.files("*.json", "*.jsonl", "*.csv") if not file.name.startswith("meta_")]
    if not meta:
        parts.miss("items (meta_C.jsonl.gz, or of 2018 meta_C.json.gz, for a category C)")
    if not found:
        parts.miss("interactions (C.csv.gz, C.jsonl.gz, or of 2018 C_5.json.gz)")
    parts.check()
    chosen = parts.choose({stem.sub("", name_of(file)) for file in found} & meta.keys() or meta, domain)
    mine = [file for ending in endings for file in parts.files(f"{chosen}{ending}")]
    if not mine:
        parts.miss(f"interactions of {chosen} ({chosen}_5.json, .csv or .jsonl)")
        parts.check()
    logs = mine[:1]
    if ".train." in mine[0].name:
        logs += [parts.need(f"the {part} part", f"{chosen}.{part}.csv") for part in ("valid", "test")]
        parts.check()
    parts.notes.append(f"interactions are those of {', '.join(file.name for file in logs)}")
    parts.notes.append("images are named by URLs, which are not downloaded; a folder images/ is read, named by item")
    known: dict[str, bool] = {}
    tables = []
    if ".csv" in logs[0].name:
        first = next(cells_of(logs[0]), [])
        if "user_id" not in first:
            known = {_asin(row): True for row in json_lines(meta[chosen], parts.left_out)}
        order = () if "user_id" in first else ("user", "item", "value", "timestamp")
        names = {**PAIR, "value": VALUES}
        tables = [open_table(parts, log, names, order, known=known) for log in logs]

    def interactions() -> Interactions:
        return chain.from_iterable(map(pairs, tables)) if tables else _reviews(logs[0], parts)

    def items() -> Items:
        for row in json_lines(meta[chosen], parts.left_out):
            texts = {name: _joined(row.get(name)) for name in ("title", "description", "features", "brand", "store")}
            if "getTime()" in (texts["title"] or ""):  # a script of the page, in files of 2018
                texts["title"] = None
            yield {"item_id": _asin(row), **texts}

    return parts.published(items, interactions, ("title",), image=media_of(parts.folder("*image*")))


def _asin(row: Mapping[str, Any]) -> str:
    return str(row.get("parent_asin") or row.get("asin") or "")


def _joined(value: Any) -> str | None:
    return " ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def _reviews(path: Path, parts: Parts) -> Interactions:
    for row in json_lines(path, parts.left_out):
        user, time = row.get("user_id") or row.get("reviewerID"), row.get("timestamp", row.get("unixReviewTime"))
        value = row.get("rating", row.get("overall"))
        yield str(user or ""), _asin(row), None if time is None else time_of(str(time)), number_of(value)


def mind(parts: Parts, domain: str | None, language: str) -> Published:
    """MIND: `behaviors.tsv` and `news.tsv`, of one set or of several in folders of their own."""
    logs, news = parts.files("behaviors.tsv"), parts.files("news.tsv")
    for what, found in (("behaviors.tsv", logs), ("news.tsv", news)):
        if not found:
            parts.miss(what)
    parts.check()
    fields = ("item_id", "category", "subcategory", "title", "abstract")
    tables = [Table(file, "\t", dict(zip(fields, range(5), strict=True)), False, parts.left_out) for file in news]
    columns = {name: place for place, name in enumerate(("id", "user", "time", "history", "shown"))}
    shown = [Table(file, "\t", columns, False, parts.left_out) for file in logs]
    parts.notes.append("the history of a user has no times: its items are numbered, before all later clicks")

    def interactions() -> Interactions:
        known = set()
        for row in chain.from_iterable(shown):
            if row["user"] not in known:
                known.add(row["user"])
                for place, item in enumerate(row["history"].split()):
                    yield row["user"], item, place, None
            time = seconds_of(row["time"], MIND_TIME)
            for item in row["shown"].split():
                if item.endswith("-1"):
                    yield row["user"], item[:-2], time, None

    return parts.published(lambda: chain.from_iterable(tables), interactions, ("title",))


def hm(parts: Parts, domain: str | None, language: str) -> Published:
    """H&M: `articles.csv`, `transactions_train.csv` and `images/`, in folders of the first three digits."""
    articles = parts.need("items", "articles.csv")
    log = parts.need("interactions", "transactions_train.csv")
    parts.check()
    header = next(cells_of(articles), [])
    if missing := {"article_id", "prod_name"} - {*header}:
        raise DataError(f"{printable(articles)}: no column {', '.join(sorted(missing))}. Download it again.")
    table = Table(articles, ",", {name: place for place, name in enumerate(header)}, True, parts.left_out)
    bought = open_table(parts, log, {"user": USERS, "item": ("article_id",), "timestamp": ("t_dat",)})

    def items() -> Items:
        for row in table:
            yield {"item_id": row["article_id"], **row}

    text = [name for name in ("prod_name", "detail_desc") if name in header]
    return parts.published(items, lambda: pairs(bought), text, image=media_of(parts.folder("images*")))


def movielens(parts: Parts, domain: str | None, language: str) -> Published:
    """MovieLens of any size: `ratings` and `movies` (`.csv` or `.dat`), or `u.data` and `u.item`; and posters."""
    ratings = parts.need("ratings", "ratings.csv", "ratings.dat", "u.data")
    movies = parts.need("films", "movies.csv", "movies.dat", "u.item")
    parts.check()
    encoding, order = encoding_of(movies), ("user", "item", "value", "timestamp")
    marks = {"ratings.dat": "::", "movies.dat": "::", "u.data": "\t", "u.item": "|"}
    places = [marks.get(name_of(path), ",") for path in (ratings, movies)]
    names = {**PAIR, "value": VALUES}
    columns = {name: place for place, name in enumerate(order)}
    if places[0] == ",":
        log = open_table(parts, ratings, names, order)
    else:
        log = Table(ratings, places[0], columns, False, parts.left_out)
    fields = ("item_id", "title") if places[1] == "|" else ("item_id", "title", "genres")
    first = next(cells_of(movies, places[1], encoding), [""])
    has_header = first[0].strip().lower() == "movieid"
    films = Table(
        movies, places[1], {name: place for place, name in enumerate(fields)}, has_header, parts.left_out, encoding
    )
    if encoding != "utf-8-sig":
        parts.notes.append(f"{movies.name}: Latin-1, not UTF-8")

    def items() -> Items:
        for row in films:
            genres = row.get("genres", "").replace("(no genres listed)", "").replace("|", ", ")
            yield {"item_id": row["item_id"], "title": row["title"], "genres": genres}

    posters = media_of(parts.folder("*poster*", "*image*", "*cover*"))
    return parts.published(items, lambda: pairs(log), ("title", "genres"), image=posters)


def kuairec(parts: Parts, domain: str | None, language: str) -> Published:
    """KuaiRec: `big_matrix.csv` or `small_matrix.csv` (`--domain`), `kuairec_caption_category.csv`, maybe covers."""
    captions = parts.need("captions", "kuairec_caption_category.csv")
    matrices = {file.name.split("_")[0]: file for file in parts.files("*_matrix.csv")}
    if not matrices:
        parts.miss("interactions (big_matrix.csv or small_matrix.csv)")
    parts.check()
    chosen = parts.choose(matrices, domain or ("big" if "big" in matrices else None))
    watched = open_table(parts, matrices[chosen], {**PAIR, "value": VALUES})
    parts.notes.append(f"{matrices[chosen].name}: watched videos; the value of an interaction is the watched share")
    header = next(cells_of(captions), [])
    fields = ("video_id", "caption", "manual_cover_text", "topic_tag")
    if missing := {*fields} - {*header}:
        raise DataError(f"{printable(captions)}: no column {', '.join(sorted(missing))}. Download it again.")
    table = Table(captions, ",", {name: header.index(name) for name in fields}, True, parts.left_out)

    def items() -> Items:
        for row in table:
            item = row.pop("video_id").strip()
            if not item.isdecimal():  # a row of a caption with line breaks
                parts.left_out.add("rows", f"{captions.name}, {item[:40]!r}", "no id of a video")
                continue
            tags = row["topic_tag"].strip("[] ").replace(",", ", ")
            cover = row["manual_cover_text"].replace("UNKNOWN", "")
            yield {"item_id": item, "caption": row["caption"], "manual_cover_text": cover, "topic_tag": tags}

    def interactions() -> Interactions:
        for row in watched:
            seconds = number_of(row["timestamp"])
            time = None if seconds is None or seconds != seconds else round(1000 * seconds)
            yield row["user"], row["item"], time, number_of(row["value"])

    covers = media_of(parts.folder("*cover*", "*image*"))
    return parts.published(items, interactions, ("caption", "manual_cover_text", "topic_tag"), image=covers)


def music4all(parts: Parts, domain: str | None, language: str) -> Published:
    """
    Music4All and Music4All-Onion: `listening_history.csv` or `userid_trackid_timestamp.tsv`, `id_information.csv`, and
    a folder of previews (`audios/`).
    """
    heard = parts.need("interactions", "userid_trackid_timestamp.tsv", "listening_history.csv")
    previews = media_of(parts.folder("*audio*", "*preview*"))
    tracks = next(iter(parts.files("id_information.csv", "id_information.tsv")), None)
    if tracks is None and not previews:
        parts.miss("tracks (id_information.csv), or a folder of previews (audios/)")
    parts.check()
    log = open_table(parts, heard, PAIR)
    names: dict[str, Sequence[str]] = {"item_id": ("id", "track_id"), "artist": ("artist",), "song": ("song", "track")}
    table = None if tracks is None else open_table(parts, tracks, names)
    if table is None:
        parts.notes.append("no artists and songs: there is no file id_information.csv")

    def items() -> Items:
        if table is None:
            yield from ({"item_id": item} for item in previews)
        else:
            yield from table

    text = () if table is None else ("artist", "song")
    return parts.published(items, lambda: pairs(log), text, audio=previews)


LAYOUTS: dict[str, Layout] = {
    "ninerec": ninerec,
    "morec": morec,
    "microlens": microlens,
    "pixelrec": pixelrec,
    "amazon": amazon,
    "mind": mind,
    "hm": hm,
    "movielens": movielens,
    "kuairec": kuairec,
    "music4all": music4all,
}
"""The layouts that `transrec prepare --layout` reads."""


def open_published(layout: str, folder: str | Path, domain: str | None = None, language: str = "en") -> Published:
    """
    Open a published data set, without reading it.

    Args:
        layout (`str`): One of `LAYOUTS`.
        folder (`str`): Folder with its files.
        domain (`str`, *optional*): Which of several data sets in the folder, such as `TN`.
        language (`str`, *optional*, defaults to `"en"`): Language of the titles if there are several, `"en"` or
            `"zh"`.

    Raises:
        [`DataError`]: If files are missing, or if there are several data sets and `domain` names none.
    """
    return LAYOUTS[layout](Parts(folder, layout), domain, language)
