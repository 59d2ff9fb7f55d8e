"""Checks before the service reads a request: its token, and the size and time of its body; and counters."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from pydantic_core import to_json


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/healthz", "/readyz")
"""Routes that need no token, because load balancers call them."""
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counters that `/metrics` shows, summed over all workers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("transrec_requests", "Requests answered.", ["route", "status"], **of)
        self.seconds = Histogram("transrec_request_seconds", "Time to answer.", ["route"], buckets=SECONDS, **of)
        self.batches = Histogram("transrec_batch_size", "Requests computed together.", buckets=SIZES, **of)
        self.waiting = Gauge("transrec_waiting", "Requests that wait.", multiprocess_mode="livesum", **of)
        self.items = Gauge("transrec_items", "Items of the catalogue.", multiprocess_mode="livemax", **of)

    def text(self) -> bytes:
        """The counters in the format of Prometheus."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


class Guard:
    """
    An ASGI application around the service.

    Args:
        app (`Callable`): The service.
        metrics ([`Metrics`]): Where requests are counted.
        routes (`set[str]`): The paths of the service; all other paths are counted as one.
        token (`str`, *optional*): The token that clients have to send.
        max_body (`int`): Most bytes of a body.
        timeout (`float`): Seconds within which a body has to arrive.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        metrics: Metrics,
        routes: set[str],
        token: str | None,
        max_body: int,
        timeout: float,
    ):
        self.app, self.metrics, self.routes, self.max_body, self.timeout = app, metrics, routes, max_body, timeout
        self.token = None if token is None else f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, route = time.perf_counter(), scope["path"] if scope["path"] in self.routes else "other"
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            if not self._is_known(scope["path"], headers.get(b"authorization", b"")):
                return await problem(
                    watched, 401, "unauthorized", "send the token in the header, Authorization: Bearer ..."
                )
            if int(headers.get(b"content-length", b"0") or 0) > self.max_body:
                return await problem(watched, 413, "too_large", f"a body has at most {self.max_body:,} bytes")
            try:
                body = await asyncio.wait_for(self._body(receive), self.timeout)
            except asyncio.TimeoutError:  # of Python 3.10 too
                return await problem(watched, 408, "timeout", f"the body did not arrive in {self.timeout:g} seconds")
            if body is None:
                return await problem(watched, 413, "too_large", f"a body has at most {self.max_body:,} bytes")
            await self.app(scope, replayed(body, receive), watched)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _is_known(self, path: str, authorization: bytes) -> bool:
        if self.token is None or path in OPEN:
            return True
        scheme, _, given = authorization.partition(b" ")
        return hmac.compare_digest(scheme.lower() + b" " + given.strip(), self.token)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; `None` as soon as it is too large, and then the rest is not read."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.max_body:
                return None
        return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Returns a body that was already read, then further messages."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def problem(send: Send, status: int, kind: str, message: str) -> None:
    """Refuse a request and close the connection, so that the rest of the request is not read."""
    body = to_json({"type": kind, "message": message, "where": [], "item_ids": []})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] + ([(b"www-authenticate", b"Bearer")] if status == 401 else [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
