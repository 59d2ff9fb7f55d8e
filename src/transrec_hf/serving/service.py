"""Recommendations over HTTP: a FastAPI application around one recommender."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, File, Form, Request, Response, Security, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from transformers.utils import logging

from .. import __version__
from ..errors import DataError, UnknownItems
from .guard import OPEN, Guard, Metrics
from .lanes import Busy, Lane, one_by_one
from .recommender import Recommender
from .requests import (
    FILES,
    MAX_EXPLAINED,
    MAX_FILE,
    MAX_RAW,
    ChangedOut,
    Health,
    Item,
    Items,
    Problem,
    RawItem,
    Recommend,
    RecommendOut,
    Removal,
    Similar,
    SimilarOut,
)


logger = logging.get_logger(__name__)

PROBLEMS: dict[int, str] = {
    400: "The body cannot be read.",
    401: "The token is missing or wrong.",
    404: "Some item ids are unknown.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "The request breaks a rule, or asks for something that the model or the items do not have.",
    500: "An error of the service.",
    503: "Too many requests are waiting: try again later.",
    504: "The request took too long.",
}


@dataclass(frozen=True)
class Settings:
    """
    Limits of the service.

    Args:
        token (`str`, *optional*): The token that clients have to send as `Authorization: Bearer`.
        read_only (`bool`, *optional*, defaults to `False`): Whether items cannot be changed.
        timeout (`float`, *optional*, defaults to 10): Seconds after which a request fails.
        timeout_of_changes (`float`, *optional*, defaults to 120): The same for requests with contents, which the
            towers have to read.
        max_waiting (`int`, *optional*, defaults to 256): Number of requests that may wait; further ones are refused.
        max_batch (`int`, *optional*, defaults to 64): Most requests that are computed together.
        max_body (`int`, *optional*, defaults to 16 MiB): Most bytes of a request.
        load_towers (`bool`, *optional*, defaults to `False`): With an index, whether the towers are loaded before the
            first request, rather than by the first request that needs them.
        secrets (`tuple[str]`, *optional*): Texts that no answer may contain, such as paths of folders.
    """

    token: str | None = field(default=None, repr=False)
    read_only: bool = False
    timeout: float = 10.0
    timeout_of_changes: float = 120.0
    max_waiting: int = 256
    max_batch: int = 64
    max_body: int = 2**24
    load_towers: bool = False
    secrets: tuple[str, ...] = ()


class Refused(DataError):
    """A request that fits the schema but exceeds a limit."""


def create_app(recommender: Recommender, settings: Settings | None = None) -> FastAPI:
    """
    Make the service. One thread computes the requests that hold only ids, in batches. Another thread computes requests
    with contents that the towers have to read, so that they do not delay the first ones.

    Args:
        recommender ([`Recommender`]): The model and its items.
        settings ([`Settings`], *optional*): The limits of the service.
    """
    settings = settings or Settings()
    metrics = Metrics()
    quick = Lane(
        partial(answer_together, recommender), settings.max_waiting, settings.max_batch, metrics.batches.observe
    )
    slow = Lane(one_by_one, settings.max_waiting, 1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.load_towers:
            recommender.whole_model()
        for lane in (quick, slow):
            lane.start()
        yield
        for lane in (quick, slow):
            await lane.stop()

    routes = {"/recommend", "/similar", "/items", "/items/upload", "/items/remove", "/metrics", *OPEN}
    guard = Middleware(
        Guard,
        metrics=metrics,
        routes=routes,
        token=settings.token,
        max_body=settings.max_body,
        timeout=settings.timeout,
    )
    app = FastAPI(
        title="transrec-hf",
        version=__version__,
        summary="Recommendations by the content of items.",
        docs_url=None,  # its pages would load scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
        middleware=[guard],
        responses={status: {"model": Problem, "description": text} for status, text in PROBLEMS.items()},
    )
    add_problems(app, settings)
    asks = [] if settings.token is None else [Security(HTTPBearer(auto_error=False))]  # for the description
    guarded = APIRouter(dependencies=asks)

    async def on_slow(job: Callable[[], Any]) -> Any:
        return await slow.submit(job, settings.timeout_of_changes)

    @guarded.post("/recommend", response_model=RecommendOut, summary="The best items for users")
    async def recommend(request: Recommend) -> Response:
        if request.is_quick():
            answers = await quick.submit(request, settings.timeout)
        else:
            answers = await on_slow(partial(answer_alone, recommender, request))
        return as_json(answers)

    @guarded.post("/similar", response_model=SimilarOut, summary="The items that are most similar to one")
    async def similar(request: Similar) -> Response:
        return as_json(await on_slow(partial(answer_similar, recommender, request)))

    @app.get("/healthz", response_model=Health, summary="Whether the process runs")
    async def healthz() -> Response:
        return as_json({"status": "alive"})

    @app.get("/readyz", response_model=Health, summary="Whether requests are answered")
    async def readyz() -> Response:
        if quick.is_full() or slow.is_full():
            raise Busy
        state = {"items": len(recommender), "versions": recommender.versions, "towers": recommender.has_towers}
        return as_json({"status": "ready", **state})

    @guarded.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def show_metrics() -> Response:
        metrics.waiting.set(len(quick) + len(slow))
        metrics.items.set(len(recommender))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    if settings.read_only:
        app.include_router(guarded)
        return app

    async def change(job: Callable[[], list[str]]) -> Response:
        ids = await on_slow(job)
        return as_json({"item_ids": ids, "versions": recommender.versions})

    @guarded.post("/items", response_model=ChangedOut, summary="Add items, which are recommended from now on")
    async def add(request: Items) -> Response:
        return await change(partial(recommender.add_items, rows_of(request.items)))

    @guarded.put("/items", response_model=ChangedOut, summary="Replace existing items")
    async def update(request: Items) -> Response:
        return await change(partial(recommender.update_items, rows_of(request.items)))

    @guarded.post("/items/remove", response_model=ChangedOut, summary="Stop recommending items")
    async def remove(request: Removal) -> Response:
        return await change(partial(recommender.remove_items, request.item_ids, readable=request.readable))

    @guarded.post("/items/upload", response_model=ChangedOut, summary="Add or replace one item, with files")
    async def upload(
        item: Annotated[
            str, Form(description="The item as JSON, like one of `items` of POST /items, without its files.")
        ],
        image: Annotated[UploadFile | None, File(description="A PNG, JPEG, WebP, ...")] = None,
        audio: Annotated[UploadFile | None, File(description="A WAV, FLAC, MP3, ...")] = None,
        video: Annotated[UploadFile | None, File(description="An MP4, WebM, ...")] = None,
    ) -> Response:
        try:
            given = TypeAdapter(Item).validate_json(item)
        except ValidationError as error:
            raise RequestValidationError(
                [{**found, "loc": ("body", "item", *found["loc"])} for found in error.errors()]
            ) from None
        (row,) = rows_of([given])
        for name, file in zip(FILES, (image, audio, video), strict=True):
            if file is not None:
                content = await file.read()
                if len(content) > MAX_FILE:
                    raise Refused(f"a file may have at most {MAX_FILE:,} bytes")
                row[name] = {"bytes": content, "path": None}  # the file name of the client is ignored
        return await change(partial(recommender.add_items, [row], exist_ok=True))

    app.include_router(guarded)
    return app


def answer_together(recommender: Recommender, requests: Sequence[Recommend]) -> list[Any]:
    """The answer to each request, or its exception. Those with the same options are computed together."""
    alike: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        alone = place if request.candidates is not None or request.timestamps is not None else None
        options = (request.exclude_seen, request.filter, request.modality, request.on_unknown, alone)
        alike.setdefault(options, []).append(place)
    answers: list[Any] = [None] * len(requests)
    for places in alike.values():
        try:
            found = answer_alike(recommender, [requests[place] for place in places])
        except Exception:  # one request failed: the others still get their answers
            found = one_by_one([partial(answer_alone, recommender, requests[place]) for place in places])
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
    return answers


def answer_alike(recommender: Recommender, requests: Sequence[Recommend]) -> list[dict[str, Any]]:
    """The answers to requests that differ only in histories and `k`."""
    first = requests[0]
    found = recommender.recommend(
        [[item_of(item) for item in history] for request in requests for history in request.histories],
        max(request.k for request in requests),
        exclude_seen=first.exclude_seen,
        filter=first.filter,
        candidates=first.candidates,
        modality=first.modality,
        on_unknown=first.on_unknown,
        explain=first.explain,
        timestamps=first.timestamps,
    )
    users = iter(found)
    return [
        {
            "users": [
                {"items": of_user[: request.k], "fallback": of_user.fallback, "skipped": of_user.skipped}
                for _, of_user in zip(request.histories, users, strict=False)
            ],
            "versions": found.versions,
        }
        for request in requests
    ]


def answer_alone(recommender: Recommender, request: Recommend) -> dict[str, Any]:
    """The answer to one request."""
    raw = sum(isinstance(item, RawItem) for history in request.histories for item in history)
    if raw > MAX_RAW:
        raise Refused(
            f"the request has {raw} raw items, and at most {MAX_RAW} are allowed: add them to the items first"
        )
    if request.explain and len(request.histories) > MAX_EXPLAINED:
        raise Refused(
            f"explain is asked for {len(request.histories)} histories, and at most {MAX_EXPLAINED} are allowed: send "
            "fewer"
        )
    return answer_alike(recommender, [request])[0]


def answer_similar(recommender: Recommender, request: Similar) -> dict[str, Any]:
    """The answer to one request for similar items."""
    found = recommender.similar_items(
        item_of(request.item), request.k, filter=request.filter, modality=request.modality
    )
    return {"items": list(found), "versions": found.versions}


def item_of(item: str | RawItem) -> Any:
    """An item of a request in the form that a recommender reads."""
    if isinstance(item, str):
        return item
    return {name: bytes_of(value) if name in FILES else value for name, value in item.contents().items()}


def bytes_of(text: str) -> bytes:
    """The bytes of a file in base64. Raises [`Refused`]."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("a file must be given as its bytes in base64, and this is not base64") from None


def rows_of(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as rows of a catalogue, which all have the same columns."""
    rows = []
    for item in items:
        contents = {
            name: {"bytes": bytes_of(value), "path": None} if name in FILES else value
            for name, value in item.contents().items()
        }
        rows.append({"item_id": item.item_id, **contents, **item.columns})
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def as_json(answer: Any) -> Response:
    """An answer as JSON; numbers that are not finite become null, and times become texts."""
    return Response(
        to_json(answer, inf_nan_mode="null", bytes_mode="base64", serialize_unknown=True),
        media_type="application/json",
    )


def add_problems(app: FastAPI, settings: Settings) -> None:
    """Turn every error into a [`Problem`] that reveals nothing about this machine."""
    secrets = {*settings.secrets, os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir()} - {"", "/"}

    def problem(status: int, kind: str, message: str, headers: Any = None, **more: Any) -> Response:
        for secret in sorted(secrets, key=len, reverse=True):
            message = message.replace(secret, "...")
        body = Problem(type=kind, message=message, **more)
        return Response(body.model_dump_json(), status, headers, media_type="application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [part if isinstance(part, (str, int)) else str(part) for part in first["loc"]]
        unreadable = first["type"] == "json_invalid" and where[1:2] != ["item"]  # of the body, not of a form
        return problem(400 if unreadable else 422, first["type"], first["msg"], where=where)

    @app.exception_handler(UnknownItems)
    async def unknown(request: Request, error: UnknownItems) -> Response:
        return problem(404, "unknown_items", str(error), item_ids=error.item_ids)

    @app.exception_handler(ValueError)
    async def bad_input(request: Request, error: ValueError) -> Response:
        if not isinstance(error, DataError):
            logger.info("A request was refused: %s", error)
        return problem(422, "bad_input", str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return problem(503, "busy", PROBLEMS[503], {"Retry-After": "1"})

    @app.exception_handler(asyncio.TimeoutError)
    async def late(request: Request, error: Exception) -> Response:
        return problem(504, "timeout", PROBLEMS[504])

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        headers = error.headers
        if error.status_code == 405:  # the methods of one route are not all methods of the path
            methods = app.openapi()["paths"].get(request.url.path, {})
            headers = {"Allow": ", ".join(sorted(methods)).upper()}
        return problem(error.status_code, "refused", str(error.detail), headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return problem(500, "fault", "an error of the service; its log has the details")


def app_of_worker() -> FastAPI:
    """The service in one of several worker processes, with the options that the first process passes on."""
    import torch

    told = json.loads(os.environ["TRANSREC_SERVE"])
    settings, places = told["settings"], told["places"]
    torch.set_num_threads(places["threads"])
    recommender = Recommender.from_pretrained(places["checkpoint"], index=places["index"], device=places["device"])
    if places["approximate"] is not None:
        recommender.approximate(places["approximate"], file=places["cells"])
    settings["secrets"] = tuple(settings["secrets"])
    return create_app(recommender, Settings(token=os.environ.get("TRANSREC_TOKEN") or None, **settings))


__all__ = ["Settings", "create_app"]
