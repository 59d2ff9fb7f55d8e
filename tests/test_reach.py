"""How far a data set reaches: from the Hub into its repository, a local one into its folder, links resolved."""

from __future__ import annotations

import http.server
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_hub import LocalHub

from transrec_hf import load_catalogue, load_domain
from transrec_hf.data.places import lies_in
from transrec_hf.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image of the user that no data set may see, beside a folder for a data set."""
    (tmp_path / "home").mkdir()
    (tmp_path / "shop").mkdir()
    (tmp_path / "home" / "private.png").write_bytes(picture(7))
    return tmp_path / "home" / "private.png"


def paths(secret: Path) -> list[str]:
    """Ways to name the file."""
    up = os.path.relpath(secret, secret.parent.parent / "shop")
    return [
        str(secret),
        up,
        f"./{up}",
        f"images/../{up}",
        f"/proc/self/root{secret}",
        f"~/{secret.name}",
        f"shop/../../{up}",
    ]


def table(form: str, path: str) -> tuple[str, bytes]:
    """Items whose second one names an image by `path`."""
    if form == "csv":
        return "items.csv", f'item_id,text,image\na,x,\nb,y,"{path}"\n'.encode()
    if form == "jsonl":
        return "items.jsonl", f'{{"item_id": "a", "text": "x"}}\n{{"item_id": "b", "file_name": "{path}"}}\n'.encode()
    image = pa.array([None, path]) if form == "parquet" else pa.array([None, {"bytes": None, "path": path}])
    file = io.BytesIO()
    pq.write_table(pa.table({"item_id": ["a", "b"], "text": ["x", "y"], "image": image}), file)
    return "items.parquet", file.getvalue()


def card(data_files: str) -> bytes:
    return f"---\nconfigs:\n- config_name: items\n  data_files: {data_files}\n---\n".encode()


def message(run) -> str:
    with pytest.raises(DataError) as caught:
        run()
    return str(caught.value)


FORMS = ("csv", "jsonl", "parquet", "struct")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", range(7))
def test_a_local_data_set_names_images_in_its_own_folder_only(form: str, way: int, secret: Path) -> None:
    folder = secret.parent.parent / "shop"
    name, content = table(form, paths(secret)[way])
    (folder / name).write_bytes(content)
    said = message(lambda: load_catalogue(folder))
    assert "row 2" in said and picture(7).hex() not in said
    if way != 5:  # "~" is an ordinary name of a file that the folder does not have
        assert "leaves the folder" in said
    secret.unlink()
    assert message(lambda: load_catalogue(folder)) == said  # nobody learns which files there are


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", range(7))
def test_a_data_set_of_the_hub_names_images_of_its_own_repository_only(
    form: str, way: int, secret: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(secret.parent.parent / "shop")  # relative paths are not relative to where the program runs
    (Path("images")).mkdir()
    name, content = table(form, paths(secret)[way])
    hub.create("evil/shop", "datasets").commit({"README.md": card(name), name: content})
    said = message(lambda: load_catalogue("evil/shop"))
    assert "evil/shop (items): " in said and "row 2" in said
    secret.unlink()
    assert message(lambda: load_catalogue("evil/shop")) == said


def test_an_object_from_the_hub_is_no_way_around(secret: Path, hub: LocalHub) -> None:
    name, content = table("csv", str(secret))
    hub.create("evil/shop", "datasets").commit({"README.md": card(name), name: content})
    splits = datasets.load_dataset("evil/shop", name="items", cache_dir=str(datasets.config.HF_DATASETS_CACHE))
    for source in (splits, splits["train"], splits["train"].select([1, 0])):
        assert "leaves the folder" in message(lambda source=source: load_catalogue(source))


def test_images_in_a_repository_are_read(hub: LocalHub) -> None:
    names = ["one.png", "two.png", "three.png"]
    metadata = "".join(f'{{"item_id": "{name}", "file_name": "{name}"}}\n' for name in names)
    files = {f"items/{name}": picture(seed) for seed, name in enumerate(names)}
    files["items/metadata.jsonl"] = metadata.encode()
    readme = b"---\nconfigs:\n- config_name: items\n  data_dir: items\n---\n"
    hub.create("good/shop", "datasets").commit({"README.md": readme, **files})
    catalogue = load_catalogue("good/shop")
    for seed, name in enumerate(names):
        assert catalogue.encoded("image", int(catalogue.rows([name])[0])) == picture(seed)


def test_a_snapshot_of_the_cache_is_its_own_folder(hub: LocalHub) -> None:
    from huggingface_hub import snapshot_download

    files = {"items.csv": b"item_id,image\na,x/one.png\n", "x/one.png": picture(3)}
    hub.create("good/shop", "datasets").commit(files)
    folder = snapshot_download("good/shop", repo_type="dataset")
    assert load_catalogue(folder).encoded("image", 0) == picture(3)


def test_links_out_of_the_folder_are_not_followed(secret: Path) -> None:
    folder = secret.parent.parent / "shop"
    (folder / "items.csv").write_text("item_id,image\na,a.png\nb,home/private.png\n")
    (folder / "real.png").write_bytes(picture(1))
    (folder / "a.png").symlink_to("real.png")
    (folder / "home").symlink_to(secret.parent)
    said = message(lambda: load_catalogue(folder))
    assert "row 2 (item_id 'b': the image path leaves the folder" in said and "row 1" not in said
    (folder / "items.csv").write_text("item_id,image\na,a.png\n")
    assert load_catalogue(folder).encoded("image", 0) == picture(1)  # a link inside is its own
    (folder.parent / "link").symlink_to(folder)
    assert load_catalogue(folder.parent / "link").encoded("image", 0) == picture(1)  # the user has named the link


@pytest.mark.parametrize("name", ["items.csv", "items.parquet", "items/metadata.jsonl", "interactions.jsonl"])
@pytest.mark.parametrize("exists", [True, False])
def test_tables_that_are_links_out_of_the_folder_are_not_read(name: str, exists: bool, secret: Path) -> None:
    folder = secret.parent.parent / "shop"
    if name.startswith("interactions"):
        (folder / "items.csv").write_text("item_id,text\na,x\n")
    (folder / name).parent.mkdir(exist_ok=True)
    target = secret.with_name("secret.txt")
    if exists:
        target.write_text("root:x:0:0\n")
    (folder / name).symlink_to(target)
    said = message(lambda: load_domain(folder))
    assert "is a link that leaves its folder" in said and "root:x" not in said


def test_blobs_that_are_no_blobs(tmp_path: Path, secret: Path) -> None:
    """A folder that looks like a snapshot of the cache opens nothing else."""
    snapshot = tmp_path / "shop" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "shop" / "blobs").symlink_to(secret.parent)
    (snapshot / "a.png").symlink_to(secret)
    assert not lies_in(snapshot / "a.png", snapshot)


@pytest.mark.parametrize("name", ["pipe.png", "x" * 300 + ".png", "nul\0.png", "folder.png", "loop.png"])
def test_odd_files_are_not_found(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    said = message(lambda: load_catalogue(pa.table({"item_id": ["a"], "image": [name]}), image_folder=tmp_path))
    assert "image file not found" in said or "leaves the folder" in said


def test_absolute_paths_in_a_folder_that_the_user_names(secret: Path) -> None:
    (secret.parent.parent / "shop" / "items.csv").write_text(f"item_id,image\na,{secret}\nb,private.png\n")
    catalogue = load_catalogue(secret.parent.parent / "shop", image_folder=secret.parent)
    assert [catalogue.encoded("image", row) for row in (0, 1)] == [picture(7)] * 2


class Listener(http.server.BaseHTTPRequestHandler):
    hits: list[str] = []

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[str]:
    Listener.hits.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


ADDRESSES = {
    "plain": "http://{host}/meta.csv",
    "list": "[items.csv, 'http://{host}/meta.csv']",
    "split": "[{{split: train, path: 'http://{host}/meta.csv'}}]",
    "paths of a split": "[{{split: train, path: [items.csv, 'http://{host}/meta.csv']}}]",
    "zip": "'zip://items.csv::http://{host}/x.zip'",
    "gzip": "'gzip://items.csv::http://{host}/x.gz'",
    "chained": "'simplecache::http://{host}/meta.csv'",
    "absolute": "/etc/passwd",
    "up": "../../../../etc/passwd",
    "up inside": "data/../../../etc/passwd",
    "file": "file:///etc/passwd",
    "home": "~/.netrc",
    "other repository": "hf://datasets/someone/private/items.csv",
}


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_addresses_in_a_data_set_of_the_hub_are_not_asked(
    name: str, file: str, key: str, hub: LocalHub, listener: str
) -> None:
    if key == "data_dir" and ADDRESSES[name].startswith("["):
        pytest.skip("a folder is one")
    header = f"configs:\n- config_name: items\n  {key}: {ADDRESSES[name].format(host=listener)}\n"
    content = (f"---\n{header}---\n" if file == "README.md" else header).encode()
    hub.create("evil/shop", "datasets").commit({file: content, "items.csv": b"item_id,text\na,x\n"})
    said = message(lambda: load_catalogue("evil/shop"))
    assert f"{file} names a file outside of the repository" in said and "root:" not in said
    assert not Listener.hits


def test_a_local_readme_is_not_asked_either(listener: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card(f"http://{listener}/meta.csv"))
    (tmp_path / "items.csv").write_text("item_id,text\na,x\n")
    assert len(load_catalogue(tmp_path)) == 1 and not Listener.hits


@pytest.mark.parametrize("header", ["{", "a: &a [*a]", "- 1", "5", "configs: 7", ""])
def test_headers_of_any_kind_end_in_a_sentence(header: str, hub: LocalHub) -> None:
    files = {"README.md": f"---\n{header}\n---\n".encode(), "items.csv": b"item_id,text\na,x\n"}
    hub.create("odd/shop", "datasets").commit(files)
    assert "odd/shop: " in message(lambda: load_catalogue("odd/shop"))
