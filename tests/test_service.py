"""The service: answers, limits, hostile requests, load; over a real socket where the wire matters."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testing_utils import make_catalogue, make_config, make_image, make_model, make_processor

from transrec_hf import DataError, ItemSource, Recommender
from transrec_hf.commands.serve import ServiceArguments, how_to_listen, serve


httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
TestClient = pytest.importorskip("fastapi.testclient").TestClient
requests = pytest.importorskip("transrec_hf.serving.requests")
service = pytest.importorskip("transrec_hf.serving.service")
Settings, create_app = service.Settings, service.create_app

TOKEN = "a-token-of-the-tests"
PICTURE = make_image(np.random.default_rng(0))


def make_recommender(**options: Any) -> Recommender:
    counts = {f"item-{row}": 12 - row for row in range(12)}
    return Recommender(
        make_model(make_config()), ItemSource(make_catalogue(), make_processor()), counts=counts, **options
    )


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    """One that no test changes."""
    return make_recommender()


@pytest.fixture(scope="module")
def client(recommender: Recommender) -> Iterator[Any]:
    with TestClient(create_app(recommender, Settings(read_only=True)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def changing() -> Iterator[Any]:
    """A service whose items may be changed."""
    with TestClient(create_app(make_recommender()), raise_server_exceptions=False) as client:
        yield client


def ids(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["users"][0]["items"]]


# Answers


def test_answers_are_those_of_the_recommender(client: Any, recommender: Recommender) -> None:
    histories = [["item-0", "item-1"], ["item-5"]]
    answer = client.post("/recommend", json={"histories": histories, "k": 3}).json()
    expected = recommender.recommend(histories, 3)
    assert [[item["item_id"] for item in user["items"]] for user in answer["users"]] == [
        [item.item_id for item in user] for user in expected
    ]
    assert answer["users"][0]["items"][0]["score"] == pytest.approx(expected[0][0].score)
    assert answer["versions"] == {"model": recommender.versions.model, "index": recommender.versions.index}
    similar = client.post("/similar", json={"item": "item-0", "k": 2}).json()["items"]
    assert [item["item_id"] for item in similar] == [item.item_id for item in recommender.similar_items("item-0", 2)]


def test_strangers_raw_items_and_reasons(client: Any) -> None:
    raw = {"text": "red hat", "image": base64.b64encode(PICTURE).decode()}
    body = {"histories": [[raw, "item-3"]], "k": 2, "explain": True}
    (user,) = client.post("/recommend", json=body).json()["users"]
    assert set(user["items"][0]["explanation"]["history"]) == {"0", "1"}
    assert set(user["items"][0]["explanation"]["modalities"]) == {"text", "image"}
    assert client.post("/similar", json={"item": {"text": "red hat"}}).status_code == 200
    (user,) = client.post("/recommend", json={"histories": [[]], "k": 2}).json()["users"]
    assert user["fallback"] == "popular" and [item["item_id"] for item in user["items"]] == ["item-0", "item-1"]


def test_options_reach_the_recommender(client: Any) -> None:
    def ask(**options: Any) -> list[str]:
        return ids(client.post("/recommend", json={"histories": [["item-0"]], **options}))

    assert "item-0" not in ask() and "item-0" in ask(exclude_seen=False, k=12)
    assert set(ask(candidates=["item-2", "item-3"])) == {"item-2", "item-3"}
    assert ask(filter="'hat' in text", k=12) != ask(k=12)
    assert set(ask(modality="image", k=12)) == {f"item-{row}" for row in range(1, 12) if row % 3}
    body = {"histories": [["gone", "item-0"]], "on_unknown": "skip"}
    assert client.post("/recommend", json=body).json()["users"][0]["skipped"] == ["gone"]


def test_requests_that_come_together_are_answered_one_by_one(recommender: Recommender) -> None:
    """Different `k`, options and histories in one batch; a bad request spoils its own answer only."""
    bodies: list[dict[str, Any]] = [
        {"histories": [["item-0"], ["item-2"]], "k": 1},
        {"histories": [["item-1"]], "k": 5},
        {"histories": [["nobody"]]},
        {"histories": [["item-1"]], "candidates": ["item-4"]},
        {"histories": [["item-1"]], "candidates": ["item-5"]},
        {"histories": [["item-1"]], "exclude_seen": False, "k": 12},
    ]
    asked = [requests.Recommend.model_validate(body) for body in bodies]
    together = service.answer_together(recommender, asked)
    assert isinstance(together[2], DataError)
    assert [len(user["items"]) for user in together[0]["users"]] == [1, 1] and len(
        together[1]["users"][0]["items"]
    ) == 5
    for request, answer in zip(asked, together, strict=True):
        if not isinstance(answer, Exception):
            (alone,) = service.answer_together(recommender, [request])
            for one, other in zip(alone["users"], answer["users"], strict=True):
                assert [item.item_id for item in one["items"]] == [item.item_id for item in other["items"]]
                assert [item.score for item in one["items"]] == pytest.approx([item.score for item in other["items"]])


def test_items_come_and_go(changing: Any) -> None:
    new = {"item_id": "new", "text": "red hat", "columns": {"price": 3.5, "stock": 2}}
    answer = changing.post("/items", json={"items": [new, {"item_id": "other", "text": "blue sock"}]})
    assert answer.json()["item_ids"] == ["new", "other"], answer.text
    ask = {"histories": [["item-0"]], "k": 20, "filter": "price < 4"}
    assert ids(changing.post("/recommend", json=ask)) == ["new"]
    assert changing.post("/items", json={"items": [new]}).status_code == 422  # is there already
    assert changing.put("/items", json={"items": [{**new, "columns": {"price": 5.0}}]}).status_code == 200
    assert ids(changing.post("/recommend", json=ask)) == []
    assert changing.put("/items", json={"items": [{"item_id": "nobody", "text": "a hat"}]}).status_code == 404
    gone = {"item_ids": ["new"], "readable": True}
    version = changing.post("/items/remove", json=gone).json()["versions"]["index"]
    assert changing.get("/readyz").json()["versions"]["index"] == version
    assert "new" not in ids(changing.post("/recommend", json={"histories": [["new"]], "k": 20}))
    assert changing.post("/items/remove", json={"item_ids": ["new", "other"]}).status_code == 200
    assert changing.post("/recommend", json={"histories": [["new"]]}).json()["item_ids"] == ["new"]


def test_images_come_as_text_or_as_files(changing: Any, tmp_path: Path) -> None:
    item = {"item_id": "drawn", "image": base64.b64encode(PICTURE).decode()}
    assert changing.post("/items", json={"items": [item]}).status_code == 200
    data = {"item": json.dumps({"item_id": "uploaded", "columns": {"price": 1}})}
    files = {"image": ("../../../etc/passwd\x00.png", PICTURE, "image/png")}  # a name is not looked at
    assert changing.post("/items/upload", data=data, files=files).json()["item_ids"] == ["uploaded"]
    similar = changing.post("/similar", json={"item": "uploaded", "k": 1}).json()["items"]
    assert similar[0]["item_id"] == "drawn" and similar[0]["score"] == pytest.approx(1, abs=1e-4)
    for wrong in ("{", "[]", '{"item_id": "x", "price": 1}', '{"item_id": 5}'):
        assert changing.post("/items/upload", data={"item": wrong}).status_code == 422
    assert changing.options("/items").headers["allow"] == "POST, PUT"


def test_a_service_that_is_read_only_changes_nothing(client: Any) -> None:
    assert client.post("/items", json={"items": [{"item_id": "x", "text": "a"}]}).status_code == 404
    assert "/items" not in client.get("/openapi.json").json()["paths"]


# Bad input


BAD: dict[str, tuple[Any, int, str]] = {
    "no field": ({}, 422, "Field required"),
    "unknown field": ({"histories": [["item-0"]], "top_k": 3}, 422, "Extra inputs are not permitted"),
    "k of 0": ({"histories": [["item-0"]], "k": 0}, 422, "greater than or equal to 1"),
    "k below 0": ({"histories": [["item-0"]], "k": -1}, 422, "greater than or equal to 1"),
    "enormous k": ({"histories": [["item-0"]], "k": 10**9}, 422, "less than or equal to 1000"),
    "k as text": ({"histories": [["item-0"]], "k": "3"}, 422, "valid integer"),
    "k as truth": ({"histories": [["item-0"]], "k": True}, 422, "valid integer"),
    "id as number": ({"histories": [[17]]}, 422, "valid"),
    "one history": ({"histories": ["item-0"]}, 422, "valid list"),
    "no history": ({"histories": []}, 422, "at least 1 item"),
    "control characters": ({"histories": [["a\u0000b"]]}, 422, "pattern"),
    "long id": ({"histories": [["x" * 300]]}, 422, "at most 256"),
    "long history": ({"histories": [["item-0"] * 1001]}, 422, "at most 1000"),
    "unknown id": ({"histories": [["nobody"]]}, 404, "nobody"),
    "unknown candidate": ({"histories": [["item-0"]], "candidates": ["nobody"]}, 404, "nobody"),
    "filter of no column": ({"histories": [["item-0"]], "filter": "price < 3"}, 422, "'price'"),
    "filter that runs": ({"histories": [["item-0"]], "filter": "__import__('os')"}, 422, "not understood"),
    "empty raw item": ({"histories": [[{}]]}, 422, "nothing"),
    "blank text": ({"histories": [[{"text": "  "}]]}, 422, "not blank"),
    "no image": ({"histories": [[{"image": "aGVsbG8="}]]}, 422, "cannot be read"),
    "no base64": ({"histories": [[{"image": "abc!"}]]}, 422, "pattern"),
    "vectors to a model of contents": ({"histories": [[{"features": [1.0]}]]}, 422, "features"),
    "a sound to a model that hears none": ({"histories": [[{"audio": "aGVsbG8="}]]}, 422, "has audio"),
    "many raw items": ({"histories": [[{"text": "a hat"}] * 65]}, 422, "at most 64 are allowed"),
    "many to explain": ({"histories": [["item-0"]] * 17, "explain": True}, 422, "at most 16 are allowed"),
    "times of others": ({"histories": [["item-0"]], "timestamps": [[1, 2]]}, 422, "one entry for each item"),
    "unknown option": ({"histories": [["item-0"]], "on_unknown": "ignore"}, 422, "'raise' or 'skip'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name: str, client: Any) -> None:
    body, status, message = BAD[name]
    answer = client.post("/recommend", json=body)
    assert answer.status_code == status and message in answer.json()["message"], answer.text
    assert set(answer.json()) == {"type", "message", "where", "item_ids"}


@pytest.mark.parametrize("body", [b"\xff\xfe", b"{", b"", b"null", b"[" * 100_000, b'{"k": NaN}', b'{"k": 1e999}'])
def test_what_is_no_json_is_refused(body: bytes, client: Any) -> None:
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["message"]


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


HOSTILE = {
    "bomb": bomb(),
    "thin": bomb(1, 60_000),
    "cut off": PICTURE[: len(PICTURE) // 2],
    "drawing": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "archive": b"PK\x03\x04" + bytes(100),
    "document": b"%PDF-1.4 ",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused(name: str, changing: Any) -> None:
    content = HOSTILE[name]
    text = base64.b64encode(content).decode()
    start = time.monotonic()
    answers = [
        changing.post("/recommend", json={"histories": [[{"image": text}]]}),
        changing.post("/items", json={"items": [{"item_id": "x", "image": text}]}),
        changing.post("/items/upload", data={"item": '{"item_id": "x"}'}, files={"image": ("x.png", content)}),
    ]
    assert [answer.status_code for answer in answers] == [422] * 3, [answer.text for answer in answers]
    assert time.monotonic() - start < 5
    assert changing.get("/readyz").json()["items"] == 12


def test_no_answer_tells_a_place_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recommender, kinds = make_recommender(), [DataError, OSError, RuntimeError]

    def fail(*arguments: Any, **options: Any) -> Any:
        raise kinds[0](f"{tmp_path}/runs/index/item_index.safetensors: cannot be used (now in {os.getcwd()})")

    monkeypatch.setattr(recommender, "recommend", fail)
    settings = Settings(secrets=(str(tmp_path),))
    with TestClient(create_app(recommender, settings), raise_server_exceptions=False) as client:
        for status in (422, 500, 500):
            answer = client.post("/recommend", json={"histories": [["item-0"]]})
            assert answer.status_code == status
            assert str(tmp_path) not in answer.text and os.getcwd() not in answer.text
            kinds.pop(0)


# Limits


def test_a_token_is_asked_for_and_not_told(recommender: Recommender) -> None:
    settings = Settings(token=TOKEN)
    assert TOKEN not in repr(settings)
    with TestClient(create_app(recommender, settings)) as client:
        body = {"histories": [["item-0"]]}
        for given in (
            {},
            {"Authorization": "Bearer x"},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            for answer in (
                client.post("/recommend", json=body, headers=given),
                client.get("/metrics", headers=given),
                client.get("/openapi.json", headers=given),
            ):
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in answer.text
        assert client.post("/recommend", json=body, headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        schema = client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
        assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_when_too_many_wait_others_are_told_to_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first request is computed one may wait; what waited too long is not computed."""
    recommender = make_recommender()
    held, calls, compute = threading.Event(), [], recommender.recommend

    def slow(histories: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(histories)
        held.wait(10)
        return compute(histories, *arguments, **options)

    monkeypatch.setattr(recommender, "recommend", slow)
    settings = Settings(max_waiting=1, timeout=0.5)
    with TestClient(create_app(recommender, settings)) as client:
        answers: dict[str, Any] = {}

        def ask(item: str) -> None:
            answers[item] = client.post("/recommend", json={"histories": [[item]]})

        threads = []
        for item in ("item-0", "item-1", "item-2"):
            threads.append(threading.Thread(target=ask, args=(item,)))
            threads[-1].start()
            time.sleep(0.1)
        assert answers["item-2"].status_code == 503 and answers["item-2"].headers["retry-after"] == "1"
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
        for thread in threads:
            thread.join()
        assert answers["item-0"].status_code == answers["item-1"].status_code == 504
        held.set()
        assert client.post("/recommend", json={"histories": [["item-3"]]}).status_code == 200
        assert calls == [[["item-0"]], [["item-3"]]]
        text = client.get("/metrics").text
    for line in (
        'transrec_requests_total{route="/recommend",status="504"} 2.0',
        'transrec_requests_total{route="/recommend",status="503"} 1.0',
        'transrec_request_seconds_count{route="/recommend"} 4.0',
        "transrec_batch_size_count 2.0",
        "transrec_items 12.0",
    ):
        assert line in text, text


def test_the_description_has_examples_that_are_valid(changing: Any) -> None:
    schema = changing.get("/openapi.json").json()
    for name in ("Recommend", "Similar", "Items", "Removal"):
        kind = getattr(requests, name)
        assert schema["components"]["schemas"][name]["examples"]
        for example in schema["components"]["schemas"][name]["examples"]:
            kind.model_validate(example)
    for path in schema["paths"].values():
        for operation in path.values():
            assert {"200", "400", "422", "503", "504"} <= set(operation["responses"])
    assert "cdn" not in json.dumps(schema) and changing.get("/docs").status_code == 404


# Over the wire


@pytest.fixture
def port(recommender: Recommender) -> Iterator[int]:
    """A service on a socket, with bodies of at most 1 MB that arrive in a second."""
    app = create_app(recommender, Settings(max_body=10**6, timeout=1.0))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def talk(port: int, *parts: bytes) -> bytes:
    """What a service answers to bytes on a socket."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        try:
            for part in parts:
                wire.sendall(part)
        except OSError:
            pass  # it has hung up: it read enough
        answer = b""
        try:
            while part := wire.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer and b"connection: close" in answer.lower() and answer.endswith(b"}"):
                    break
        except OSError:
            pass
    return answer


HEAD = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_body_of_a_gigabyte_is_not_read(port: int) -> None:
    assert b" 413 " in talk(port, HEAD + b"Content-Length: 1073741824\r\n\r\n").split(b"\r\n")[0]
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = talk(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 64)
    assert b" 413 " in answer.split(b"\r\n")[0] and b"at most 1,000,000 bytes" in answer


def test_a_body_that_does_not_come_is_given_up(port: int) -> None:
    start = time.monotonic()
    answer = talk(port, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert b" 408 " in answer.split(b"\r\n")[0] and time.monotonic() - start < 5


@pytest.mark.parametrize("length", [b"x", b"-5", b"1e9", b"99999999999999999999999999"])
def test_a_length_that_is_none_is_refused(length: bytes, port: int) -> None:
    answer = talk(port, HEAD + b"Content-Length: " + length + b"\r\n\r\n{}")
    assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommender with its index, as a folder."""
    folder = tmp_path_factory.mktemp("served") / "checkpoint"
    make_recommender().save_pretrained(folder, columns=True)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached by other machines: give a token in TRANSREC_TOKEN"),
        (["--workers", "2"], "through the folder of an index: give --index"),
        (["--port", "70000"], "port must be between 0 and 65535"),
        (["--max_waiting", "0"], "must be 1 or more"),
        (["--token_file", "gone"], "gone: the token cannot be read"),
        (["--token_file", os.devnull], "the file is empty"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(options: list[str], message: str, checkpoint: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        serve([str(checkpoint), *options])
    with pytest.raises(DataError, match="give the folder or Hub id"):
        serve([])


def test_workers_are_told_where_the_vectors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process makes do without towers, whose weights are nowhere."""
    checkpoint = tmp_path / "model"
    make_model(modalities=("text",), item_map="whitened").save_pretrained(checkpoint)
    make_processor("text").save_pretrained(checkpoint)
    items = [{"item_id": str(row), "text": "red hat"} for row in range(4)]
    Recommender.from_pretrained(checkpoint, items, index=tmp_path)
    told: list[str] = []
    monkeypatch.setattr("transrec_hf.commands.serve.run_workers", lambda *arguments: told.append(arguments[3]))
    serve([str(checkpoint), "--index", str(tmp_path), "--workers", "2", "--use_cpu"])
    assert told == ["cpu"]
    with pytest.raises(DataError, match="4 items are too few for an approximate index"):
        serve([str(checkpoint), "--index", str(tmp_path), "--approximate", "0.9"])


def test_towers_are_loaded_at_once_if_that_is_wanted(tmp_path: Path) -> None:
    make_recommender().save_pretrained(tmp_path)
    for load_towers in (False, True):
        served = Recommender.from_pretrained(tmp_path)
        with TestClient(create_app(served, Settings(load_towers=load_towers))) as client:
            assert client.get("/readyz").json()["towers"] is load_towers
            raw = {"histories": [[{"text": "a red hat"}]]}
            assert client.post("/recommend", json=raw).status_code == 200
            assert client.get("/readyz").json()["towers"] is True


def test_workers_that_are_busy_are_not_killed() -> None:
    assert uvicorn.Config("app", **how_to_listen(ServiceArguments())).timeout_worker_healthcheck >= 60


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert ServiceArguments(token_file=str(tmp_path / "token")).token() == TOKEN
    monkeypatch.setenv("TRANSREC_TOKEN", "another")
    assert ServiceArguments().token() == "another"
    for wrong in ("two words", "schl\u00fcssel"):
        monkeypatch.setenv("TRANSREC_TOKEN", wrong)
        with pytest.raises(DataError, match="an HTTP header cannot hold") as error:
            ServiceArguments().token()
        assert wrong not in str(error.value)


class Served:
    """`transrec serve` in a process of its own."""

    def __init__(self, *arguments: Any, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "transrec_cli", "serve", *map(str, arguments), "--port", str(self.port)]
        paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1] / "src")])
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths, **environment})
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                assert self.process.poll() is None
                time.sleep(0.1)
        raise AssertionError("the service does not come up")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.mark.slow
def test_a_fuzzer_finds_nothing(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    statuses = (
        '["2xx", "401", "403", "404", "409", "422", "5xx"]'  # no schema says which ids, filters, images are known
    )
    (tmp_path / "schemathesis.toml").write_text(f"[checks]\npositive_data_acceptance.expected-statuses = {statuses}\n")
    with Served(checkpoint, TRANSREC_TOKEN=TOKEN) as served:
        command = [Path(sys.executable).parent / "st", "--config-file", "schemathesis.toml", "run"]
        command += [f"{served.url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", "--checks=all"]
        command += ["--phases=examples,coverage,fuzzing", "--max-time=30"]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:]
        assert httpx.get(f"{served.url}/readyz").status_code == 200


@pytest.mark.slow
def test_workers_share_the_items_and_stop_gracefully(tmp_path: Path) -> None:
    """What one worker is told, the other knows; requests that were accepted are answered before the end."""
    checkpoint, items = tmp_path / "model", tmp_path / "items.parquet"
    make_model(make_config(item_map="whitened")).save_pretrained(checkpoint)
    make_processor().save_pretrained(checkpoint)
    make_catalogue().items.to_parquet(items)
    options = ("--index", tmp_path / "index", "--workers", 2, "--timeout", 60)
    with Served(checkpoint, "--items", items, *options) as served:
        new = {"items": [{"item_id": "new", "text": "red hat"}]}
        assert httpx.post(f"{served.url}/items", json=new, timeout=60).status_code == 200
        body = {"histories": [["new"]], "k": 3}
        answers = [httpx.post(f"{served.url}/recommend", json=body) for _ in range(40)]  # a connection each
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1
        counted = httpx.get(f"{served.url}/metrics").text
        assert 'transrec_requests_total{route="/recommend",status="200"} 40.0' in counted
        found: list[int] = []

        def ask() -> None:
            many = {"histories": [["new"] * 100] * 256, "k": 3}
            found.append(httpx.post(f"{served.url}/recommend", json=many, timeout=120).status_code)

        begin = time.monotonic()
        ask()
        took = time.monotonic() - begin
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(max(0.3, took / 2))  # on a busy machine they are accepted no sooner
        served.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert found == [200] * 5
        served.process.wait(30)
    with Served(checkpoint, "--index", tmp_path / "index", "--workers", 2) as served:  # without towers
        assert httpx.get(f"{served.url}/readyz").json()["items"] == 13
