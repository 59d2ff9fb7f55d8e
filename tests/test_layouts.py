"""Published data sets, in tiny files of their layouts, become domains; what is missing or broken is said."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_audio import tone, wav
from test_video import mp4, pictures

from transrec_hf import DataError, load_domain
from transrec_hf.commands.prepare import prepare
from transrec_hf.data.layouts import LAYOUTS


T = 1_600_000_000
EVENTS = (("u1", "11", T), ("u1", "12", T + 60), ("u2", "12", T + 10), ("u2", "13", T + 70), ("u2", "11", T + 90))
"""What all of the data sets below hold, as far as their layout has ids and times of its own."""


def jpg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 16), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(content))


def rows(*columns: Any, events: Any = EVENTS, between: str = ",") -> str:
    """Events as lines of the cells that `columns` make of them."""
    return "".join(between.join(str(column(*event)) for column in columns) + "\n" for event in events)


def user(u: str, i: str, t: int) -> str:
    return u


def item(u: str, i: str, t: int) -> str:
    return i


def time(u: str, i: str, t: int) -> int:
    return t


def ninerec(folder: Path) -> None:
    titles = '11,红色的鞋,Red shoe\n12,蓝色的鞋,"Blue shoe, large"\n13,绿色的帽子,Green hat\n99,没有人要,Nobody\'s\n'
    covers = {f"TN_cover/{name}.jpg": jpg() for name in ("11", "12")} | {"TN_cover/13.jpg": jpg()[:100]}
    write(folder, {"TN_pair.csv": rows(item, user, time), "TN_item.csv": titles, **covers, "QB_item.csv": "1,a,b\n"})


def morec(folder: Path) -> None:
    lines = "u1\t11 12\nu2\t12 13 11\n"
    write(folder, {"mind_60w_users.tsv": lines, "mind_60w_items.tsv": "11\tRed shoe\n12\tBlue\n13\tGreen hat\n"})


def microlens(folder: Path) -> None:
    write(
        folder,
        {
            "MicroLens-50k_pairs.csv": "user,item,timestamp\n" + rows(user, item, lambda u, i, t: t * 1000),
            "MicroLens-50k_titles.csv": "item,title\n11,Red shoe\n12,Blue\n13,Green hat\n",
            "MicroLens-50k_covers/11.jpg": jpg(),
            "MicroLens-50k_audios/12.wav": wav(tone()),
            "MicroLens-50k_audios/13.wav": b"RIFF",
            "MicroLens-50k_videos/13.mp4": mp4(pictures(3), codec="mpeg4", container="mp4"),
        },
    )


def pixelrec(folder: Path) -> None:
    info = "item_id,view_number,title_en,title,description,tag\n"
    info += "11,5,Red shoe,红,leather,x\n12,5,Blue,蓝,,x\n13,1,Green,绿,,\n"
    log = "item_id,user_id,timestamp\n" + rows(item, user, time)
    write(folder, {"Pixel200K.csv": log, "item_info/Pixel200K.csv": info, "cover/11.jpg": jpg()})


def amazon_2018(folder: Path) -> None:
    log = [{"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t} for u, i, t in EVENTS]
    meta = [
        {"asin": i, "title": title, "description": ["a", "b"], "imageURL": ["https://x/y.jpg"]} for i, title in TITLES
    ]
    write(folder, {"Games_5.json.gz": lines(log), "meta_Games.json.gz": lines([*meta, meta[0]])})


def amazon_ratings(folder: Path) -> None:
    """Of 2018, ratings only: without a header, items first."""
    meta = [{"asin": i, "title": title} for i, title in TITLES]
    log = rows(item, user, lambda *event: "5.0", time)
    write(folder, {"Games.csv": log, "meta_Games.json": lines(meta)})


def amazon_2023(folder: Path) -> None:
    meta = [{"parent_asin": i, "title": title, "images": [{"large": "https://x/y.jpg"}]} for i, title in TITLES]
    header, parts = "user_id,parent_asin,rating,timestamp\n", (EVENTS[:3], EVENTS[3:4], EVENTS[4:])
    logs = {
        f"Games.{name}.csv": header + rows(user, item, lambda *event: 4.0, lambda u, i, t: t * 1000, events=part)
        for name, part in zip(("train", "valid", "test"), parts, strict=True)
    }
    write(folder, {**logs, "meta_Games.jsonl": lines(meta)})


def amazon_reviews(folder: Path) -> None:
    log = [{"rating": 1.0, "parent_asin": i, "user_id": u, "timestamp": t * 1000, "images": []} for u, i, t in EVENTS]
    meta = [{"parent_asin": i, "title": title} for i, title in TITLES]
    write(folder, {"Games.jsonl.gz": lines(log), "meta_Games.jsonl.gz": lines(meta)})


TITLES = (("11", "Red shoe"), ("12", "Blue"), ("13", "Green hat"))


def lines(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def mind(folder: Path) -> None:
    shown = "1\tu1\t11/11/2019 9:05:58 AM\t11\t12-1 13-0\n2\tu2\t11/12/2019 1:05:58 PM\t12 13\t12-0 11-1\n"
    shown += "3\tu2\t11/12/2019 1:06:58 PM\t12 13\t13-0\n"
    news = "".join(f'{i}\tsports\tx\t{title}\t"An abstract\thttps://x\t[]\t[]\n' for i, title in TITLES)
    write(folder, {"MINDsmall_train/behaviors.tsv": shown, "MINDsmall_train/news.tsv": news})


def hm(folder: Path) -> None:
    articles = "article_id,prod_name,detail_desc\n" + "".join(f'01{i},{title},"Nice, soft"\n' for i, title in TITLES)
    log = "t_dat,customer_id,article_id,price,sales_channel_id\n"
    log += "".join(f"2020-09-{10 + place},{u},01{i},0.05,2\n" for place, (u, i, _) in enumerate(EVENTS))
    write(folder, {"articles.csv": articles, "transactions_train.csv": log, "images/011/0111.jpg": jpg()})


def movielens_1m(folder: Path) -> None:
    films = "".join(f"{i}::{title} é (1995)::Comedy|Drama\n" for i, title in TITLES).encode("latin-1")
    log = rows(user, item, lambda *event: 4, time, between="::")
    write(folder, {"ml-1m/ratings.dat": log, "ml-1m/movies.dat": films, "ml-1m/posters/11.jpg": jpg()})


def movielens_25m(folder: Path) -> None:
    films = "movieId,title,genres\n" + "".join(f'{i},"{title}, The",(no genres listed)\n' for i, title in TITLES)
    log = "userId,movieId,rating,timestamp\n" + rows(user, item, lambda *event: 3.5, time)
    write(folder, {"ratings.csv": log, "movies.csv": films})


def movielens_100k(folder: Path) -> None:
    films = "".join(f"{i}|{title} (1995)|01-Jan-1995||http://x|0|1\n" for i, title in TITLES)
    write(folder, {"u.data": rows(user, item, lambda *event: 3, time, between="\t"), "u.item": films})


def kuairec(folder: Path) -> None:
    header = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
    log = rows(
        user,
        item,
        lambda *e: 5,
        lambda *e: 6,
        lambda *e: "2020",
        lambda *e: 1,
        lambda u, i, t: t + 0.25,
        lambda *e: 0.9,
    )
    captions = "video_id,manual_cover_text,caption,topic_tag,first_level_category_id\n"
    captions += '11,UNKNOWN,Red shoe,"[a,b]",1\n12,Blue,"two\nlines",[],1\n13,UNKNOWN,Green hat,[],1\nstray line,,,,\n'
    write(
        folder,
        {"data/small_matrix.csv": header + log + "u2,13,5,6,,,,0.5\n", "data/kuairec_caption_category.csv": captions},
    )


def music4all(folder: Path) -> None:
    log = "user_id\ttrack_id\ttimestamp\n" + rows(
        user, item, lambda u, i, t: f"2020-03-01 10:{(t - T) // 2:02}", between="\t"
    )
    tracks = "id\tartist\tsong\talbum_name\n" + "".join(f"{i}\tThe Band\t{title}\tx\n" for i, title in TITLES)
    write(
        folder,
        {
            "userid_trackid_timestamp.tsv.bz2": log,
            "id_information.csv": tracks,
            "audios/11.wav": wav(tone()),
            "audios/12.wav": b"not a sound",
        },
    )


MADE: dict[Callable, tuple[str, dict[str, Any], list[str | None]]] = {
    ninerec: ("ninerec", {"domain": "TN"}, ["Red shoe", "Blue shoe, large", "Green hat"]),
    morec: ("morec", {}, ["Red shoe", "Blue", "Green hat"]),
    microlens: ("microlens", {}, ["Red shoe", "Blue", "Green hat"]),
    pixelrec: ("pixelrec", {}, ["Red shoe. leather", "Blue", "Green"]),
    amazon_2018: ("amazon", {}, ["Red shoe", "Blue", "Green hat"]),
    amazon_ratings: ("amazon", {}, ["Red shoe", "Blue", "Green hat"]),
    amazon_2023: ("amazon", {}, ["Red shoe", "Blue", "Green hat"]),
    amazon_reviews: ("amazon", {"text": "title"}, ["Red shoe", "Blue", "Green hat"]),
    mind: ("mind", {}, ["Red shoe", "Blue", "Green hat"]),
    hm: ("hm", {}, ["Red shoe. Nice, soft", "Blue. Nice, soft", "Green hat. Nice, soft"]),
    movielens_1m: ("movielens", {}, [f"{title} é (1995). Comedy, Drama" for _, title in TITLES]),
    movielens_25m: ("movielens", {"min_value": 3.5}, [f"{title}, The" for _, title in TITLES]),
    movielens_100k: ("movielens", {}, [f"{title} (1995)" for _, title in TITLES]),
    kuairec: ("kuairec", {}, ["Red shoe. a, b", "two lines. Blue", "Green hat"]),
    music4all: ("music4all", {}, [f"The Band. {title}" for _, title in TITLES]),
}


def prepared(folder: Path, layout: str, **options: Any) -> dict[str, Any]:
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return prepare(["--layout", layout, "--folder", str(folder), "--output_dir", str(folder / "made"), *given])


def test_every_layout_is_tested() -> None:
    assert {layout for layout, *_ in MADE.values()} == set(LAYOUTS)


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_a_published_data_set_becomes_a_domain(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    layout, options, texts = MADE[make]
    done = prepared(tmp_path, layout, **options)
    catalogue, sequences = load_domain(tmp_path / "made")
    assert [name[-2:] for name in catalogue.item_ids] == ["11", "12", "13"]
    assert [catalogue.text(row) for row in range(3)] == texts
    assert sequences.user_ids.tolist() == ["u1", "u2"]
    assert [sequences[place]["items"].tolist() for place in range(2)] == [[0, 1], [1, 2, 0]]
    assert done["interactions"] == 5 and done["users"] == 2


def test_headers_and_the_order_of_columns_are_found_out_and_said(tmp_path: Path, capsys: Any) -> None:
    ninerec(tmp_path)
    prepared(tmp_path, "ninerec", domain="TN", language="zh")
    printed = capsys.readouterr().out
    assert "TN_pair.csv: no header; its columns are item, user, timestamp, recognised by their cells" in printed
    assert "titles (zh) in column 2" in printed and "dropped 1 images" in printed
    catalogue, sequences = load_domain(tmp_path / "made")
    assert catalogue.text(0) == "红色的鞋" and sequences.timestamps.tolist() == [T, T + 60, T + 10, T + 70, T + 90]


@pytest.mark.parametrize("order", [(user, item, time), (time, item, user), (item, time, user)])
def test_columns_are_told_by_their_cells(order: Any, tmp_path: Path) -> None:
    ninerec(tmp_path)
    number = {"u1": "1", "u2": "2"}  # users are numbers too
    columns = [(lambda u, i, t: number[u]) if column is user else column for column in order]
    write(tmp_path, {"TN_pair.csv": rows(*columns)})
    prepared(tmp_path, "ninerec", domain="TN")
    sequences = load_domain(tmp_path / "made")[1]
    assert sequences.user_ids.tolist() == ["1", "2"] and sequences.timestamps.tolist()[0] == T


def test_bad_files_are_listed_kept_out_and_counted(tmp_path: Path) -> None:
    microlens(tmp_path)
    write(tmp_path, {"MicroLens-50k_covers/12.jpg": b"<html>", "MicroLens-50k_covers/99.jpg": b"of no item"})
    done = prepared(tmp_path, "microlens")
    assert done["dropped"]["images"] == 1 and done["dropped"]["sounds"] == 1 and "videos" not in done["dropped"]
    assert (done["items_with_image"], done["items_with_audio"], done["items_with_video"]) == (1, 1, 1)
    with open(tmp_path / "made" / "left_out.csv", encoding="utf-8") as file:
        listed = [(row["kind"], row["name"]) for row in csv.DictReader(file)]
    assert listed == [("images", "12"), ("sounds", "13")]


def test_items_without_any_content_are_left_out_with_their_interactions(tmp_path: Path) -> None:
    microlens(tmp_path)
    (tmp_path / "MicroLens-50k_titles.csv").unlink()
    write(tmp_path, {"MicroLens-50k_covers/12.jpg": b"<html>"})
    done = prepared(tmp_path, "microlens", modalities="image")
    assert done["items"] == 1 and done["interactions"] == 2
    assert done["dropped"]["interactions with an item that is not there"] == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("TN_pair.csv", "are missing: interactions .TN_pair.csv or TN_behaviour.tsv."),
        ("TN_item.csv", "holds QB. Name one with --domain, not TN"),
    ],
)
def test_missing_parts_are_named_before_anything_runs(name: str, said: str, tmp_path: Path) -> None:
    ninerec(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, "ninerec", domain="TN")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "TN_pair.csv: has no rows. Download it again"),
        ("<html>Sign in</html>\n", "the first one is '<html>Sign in</html>'. Download it again"),
        ("u1,x1,1600000000\nu1,x2,1600000001\n", "the first one is 'u1,x1,1600000000'"),
        ("user,item,timestamp\n", "TN_pair.csv: has no rows"),
        ("user,item,timestamp\nu1,11,soon\n", "no interaction is left: none has a user, a time and an item"),
        ("0,11,u1,1600000000\n1,12,u1,1600000060\n", "has 3 cells .*'0,11,u1,1600000000'.*names of its columns"),
        ("11,u1,soon\n12,u1,later\n", "none of its columns is a timestamp; the first row is '11,u1,soon'"),
    ],
    ids=["empty", "page", "other items", "header", "no time", "rows numbered", "no column of times"],
)
def test_a_log_without_interactions_is_named(log: str, said: str, tmp_path: Path) -> None:
    ninerec(tmp_path)
    (tmp_path / "TN_pair.csv").write_text(log)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}.*{said}"):
        prepared(tmp_path, "ninerec", domain="TN")


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_any_file_may_be_compressed_and_an_empty_one_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    layout, options, _ = MADE[make]
    make(tmp_path)
    files = [
        path for path in tmp_path.rglob("*.*") if path.suffix in (".csv", ".tsv", ".json", ".jsonl", ".dat", ".item")
    ]
    for path in files:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert prepared(tmp_path, layout, **options)["interactions"] == len(EVENTS)
    shutil.rmtree(tmp_path / "made")
    for path in files:
        packed = path.with_name(f"{path.name}.gz")
        whole = packed.read_bytes()
        packed.write_bytes(gzip.compress(b"\n"))
        if not path.name.startswith(("QB", "item_info")) and path.parent.name != "item_info":  # nobody needs these
            with pytest.raises(DataError, match=re.escape(packed.name)):
                prepared(tmp_path, layout, **options)
            assert not (tmp_path / "made").exists()
        packed.write_bytes(whole)


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_contents_that_are_not_there_are_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    layout, options, _ = MADE[make]
    absent = "video" if layout != "microlens" else "image"
    shutil.rmtree(tmp_path / "MicroLens-50k_covers", ignore_errors=True)
    with pytest.raises(DataError, match=rf"there is no {absent}\. Name some of \['text'.* with --modalities"):
        prepared(tmp_path, layout, **options, modalities=absent)


def test_titles_are_found_in_any_column_and_in_the_other_language(tmp_path: Path, capsys: Any) -> None:
    ninerec(tmp_path)
    write(tmp_path, {"TN_item.csv": '鞋,11,Red shoe\n鞋,12,Blue\n帽子,13,Green hat\n"broken\n'})
    prepared(tmp_path, "ninerec", domain="TN", language="zh")
    assert "ids are in column 2, titles (zh) in column 1" in capsys.readouterr().out
    assert [load_domain(tmp_path / "made")[0].text(row) for row in range(3)] == ["鞋", "鞋", "帽子"]
    shutil.rmtree(tmp_path / "made")
    write(tmp_path, {"TN_item.csv": "id,title\n11,Red shoe\n12,Blue\n13,Green hat\n"})
    prepared(tmp_path, "ninerec", domain="TN", language="zh")
    assert "ids are in column 1, titles (en, because there are none in zh) in column 2" in capsys.readouterr().out


@pytest.mark.parametrize("order", [(user, item, time), (item, user, time), (time, item, user)])
def test_users_with_ids_like_those_of_items_are_the_column_with_fewer(order: Any, tmp_path: Path) -> None:
    events = [(str(1 + n % 3), str(1 + n), T + n) for n in range(12)]
    titles = "".join(f"{n},标题,Title {n}\n" for n in range(1, 13))
    write(tmp_path, {"KU_pair.csv": rows(*order, events=events), "KU_item.csv": titles})
    done = prepared(tmp_path, "ninerec")
    assert (done["users"], done["items"]) == (3, 12)


def test_dates_are_times_in_a_file_without_a_header_too(tmp_path: Path) -> None:
    ninerec(tmp_path)
    write(tmp_path, {"TN_pair.csv": rows(user, lambda u, i, t: f"2020-09-01 10:00:{t - T:02}", item)[:-30]})
    assert prepared(tmp_path, "ninerec", domain="TN")["users"] == 2


@pytest.mark.parametrize(
    ("make", "name", "lines", "said"),
    [
        (morec, "mind_60w_users.tsv", "u1 11 12\n", r"none has .*\(mind_60w_users.tsv, row 1: no tab between"),
        (morec, "mind_60w_users.tsv", "u1\t11,12\n", "no item of the interactions .such as '11,12'. .*such as '11'"),
        (amazon_2023, "Games.valid.csv", None, "are missing: the valid part .Games.valid.csv."),
        (movielens_25m, "movies.csv", "<html>\n<body>\n", r"no item is left: .*\(movies.csv, row 1: 1 cells instead"),
    ],
    ids=["no tab", "commas", "a part", "page"],
)
def test_what_leaves_nothing_is_said(
    make: Callable[[Path], None], name: str, lines: str | None, said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    (tmp_path / name).unlink() if lines is None else (tmp_path / name).write_text(lines)
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, MADE[make][0])
    assert not (tmp_path / "made").exists()


def test_a_rating_that_nothing_has_is_said(tmp_path: Path) -> None:
    ninerec(tmp_path)
    with pytest.raises(DataError, match="an item and a time and a rating of at least 3"):
        prepared(tmp_path, "ninerec", domain="TN", min_value=3)


def test_that_no_folder_of_media_is_there_is_said(tmp_path: Path, capsys: Any) -> None:
    ninerec(tmp_path)
    shutil.rmtree(tmp_path / "TN_cover")
    prepared(tmp_path, "ninerec", domain="TN")
    assert "no images: there is no folder of files named by item (unpack archives)" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_lacks_all_parts(layout: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"files of {layout} are missing: .*Download the missing files"):
        prepared(tmp_path, layout)
    with pytest.raises(DataError, match="no such folder"):
        prepared(tmp_path / "gone", layout)


def test_ratings_and_cores_leave_out_the_rest(tmp_path: Path) -> None:
    movielens_100k(tmp_path)
    log = [f"u{n % 4}\t{11 + n % 3}\t{1 + n % 5}\t{T + n}\n" for n in range(60)] + [f"u9\t11\t5\t{T}\n"]
    write(tmp_path, {"u.data": "".join(log)})
    with pytest.raises(DataError, match="k_core must be 1 or more, got -1"):
        prepared(tmp_path, "movielens", k_core=-1)
    done = prepared(tmp_path, "movielens", min_value=3, k_core=5)
    assert done["users"] == 4 and done["interactions"] == 36 and done["items"] == 3


def test_rows_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    hm(tmp_path)
    log = (tmp_path / "transactions_train.csv").read_text()
    write(tmp_path, {"transactions_train.csv": log + "2020-09-01,u1\nyesterday,u1,0111,1,2\n2020-09-02,,0111,1,2\n"})
    dropped = prepared(tmp_path, "hm")["dropped"]
    assert dropped["rows"] == dropped["interactions without a time"] == dropped["interactions without a user"] == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("Games_5.json.gz", b"{'asin': 1}\n" * 200, "Games_5.json.gz: does not hold one JSON object on each line"),
        ("meta_Games.json.gz", None, "meta_Games.json.gz: cannot be read"),
        ("Games_5.json.gz", b"\xff\xfe", "Games_5.json.gz: is not UTF-8"),
    ],
)
def test_files_of_another_kind_are_refused(name: str, content: Any, said: str, tmp_path: Path) -> None:
    amazon_2018(tmp_path)
    if content is None:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    else:
        write(tmp_path, {name: content})
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, "amazon")


def test_an_unknown_field_of_the_text_is_named(tmp_path: Path) -> None:
    pixelrec(tmp_path)
    with pytest.raises(DataError, match=r"no field 'titel'. Name some of .*'title_en'"):
        prepared(tmp_path, "pixelrec", text="titel")


def test_a_folder_of_files_beside_a_table(tmp_path: Path) -> None:
    """Exports of one's own: paths in columns, and files named by item."""
    table = "item_id,text,video\n11,Red shoe,clips/a.mp4\n12,Blue,\n"
    log = "user_id,item_id,timestamp\nu,11,1\nu,12,2\n"
    clip = mp4(pictures(3), codec="mpeg4", container="mp4")
    write(tmp_path, {"i.csv": table, "e.csv": log, "clips/a.mp4": clip, "sounds/12.wav": wav(tone())})
    place = ["--items", str(tmp_path / "i.csv"), "--interactions", str(tmp_path / "e.csv"), "--output_dir"]
    done = prepare([*place, str(tmp_path / "made"), "--audio_folder", str(tmp_path / "sounds")])
    assert done["items_with_audio"] == done["items_with_video"] == 1
    catalogue, _ = load_domain(tmp_path / "made")
    assert catalogue.encoded("video", 0) == clip and catalogue.has("audio").tolist() == [False, True]
    (tmp_path / "clips/a.mp4").unlink()
    with pytest.raises(DataError, match=r"1 videos whose file is not there: row 1 .*--drop missing_videos"):
        prepare([*place, str(tmp_path / "again")])
    (tmp_path / "clips/a.mp4").write_bytes(clip[:30])
    with pytest.raises(DataError, match=r"i\.csv: 1 videos that cannot be decoded: row 1 \(item '11'"):
        prepare([*place, str(tmp_path / "again")])
    write(tmp_path, {"i.csv": "item_id,text\n11,nan\n12,Blue\n"})
    with pytest.raises(DataError, match=r"i\.csv, as prepared: .*row 1 \(item_id '11'.*missing value") as caught:
        prepare([*place, str(tmp_path / "again")])
    assert ".partial" not in str(caught.value) and not (tmp_path / "again").exists()
