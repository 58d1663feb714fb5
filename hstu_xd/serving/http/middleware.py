"""Checks that a request passes before its body is parsed: token, draining, queue, size."""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hstu_xd.serving.http import access_log
from hstu_xd.serving.http.access_log import Answered
from hstu_xd.serving.http.metrics import NOBODY_LEFT
from hstu_xd.serving.http.service import Service

PAGE = Path(__file__).parent / "page"


def page_files() -> dict[str, Path]:
    """Return the files of the web pages by the path that serves each."""
    named = {"index.html": "/", "docs.html": "/docs"}
    return {named.get(file.name, f"/{file.name}"): file for file in sorted(PAGE.glob("*.*"))}


Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER = {"Retry-After": "1"}

# Asked by those who watch the service: without a token, and answered while it drains.
PROBES = ("/healthz", "/livez", "/readyz")

_ROUTES = (
    *PROBES,
    "/",
    "/docs",
    "/docs.js",
    "/page.css",
    "/page.js",
    "/metrics",
    "/openapi.json",
    "/v1/domains",
    "/v1/events",
    "/v1/events/remove",
    "/v1/models",
    "/v1/models/shadow",
    "/v1/rank",
    "/v1/recommend",
    "/v1/score",
    "/v1/users",
)
_WITH_BODY = (
    "/v1/events",
    "/v1/events/remove",
    "/v1/models",
    "/v1/rank",
    "/v1/recommend",
    "/v1/score",
)
# These ask nothing of the thread that answers, however much waits for it.
_UNQUEUED = ("/v1/domains", "/v1/models", "/v1/models/shadow")
# Seconds that a request is held which is then told that the service is busy. Who asks again at once
# would be refused thousands of times a second, and whoever is being answered would wait for that:
# both take turns at one interpreter.
HELD_FOR = 0.1
# How much of a body that is too large is read and thrown away, in bodies of the largest size that
# is taken, and for how long: a client that is still writing could not read the answer otherwise.
_LINGER, _LINGER_SECONDS = 16, 5.0


class RequestGuard:
    """An ASGI application around another; counts what is under way, and how it ended.

    Args:
        app: of the service.
        service: whose state decides.
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service
        token = service.settings.token
        self._root = service.settings.root_path
        self._token = None if token is None else token.encode()
        # Open without a token: the state of the service, how to ask it, a page that holds no data.
        self._open = {*PROBES, "/openapi.json", *page_files()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if self._root and path.startswith(f"{self._root}/"):
            # The proxy hands on its prefix as well.
            path = path.removeprefix(self._root)
            scope = {**scope, "path": path}
        start, status = time.perf_counter(), NOBODY_LEFT
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = access_log.id_of(headers.get(b"x-request-id"))

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                version = quote(self._service.handled.by, safe=" ").encode()
                named = [(b"x-model", version), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *named]}
            await send(message)

        self._service.present()
        self._service.active += 1
        try:
            await self._pass(scope, headers, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self._service.active -= 1
            seconds, route = time.perf_counter() - start, route_of(path)
            self._service.metrics.answered(route, status, seconds)
            method, handled = scope["method"], self._service.handled
            answered = Answered(method, route, status, 1e3 * seconds, handled.by, request_id)
            access_log.write(answered, (scope.get("client") or ["-"])[0])
            if self._service.tracing is not None:
                self._service.tracing.record(answered, start, handled.steps, headers)

    async def _pass(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        path, service = scope["path"], self._service
        if not self._may(path, headers):
            await _refuse(
                send,
                401,
                "a bearer token is needed: send the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )
        elif path in PROBES:
            await self._app(scope, receive, send)
        elif service.draining:
            closing = RETRY_AFTER | {"Connection": "close"}
            await _refuse(send, 503, "the service is stopping; repeat the request later", closing)
        elif path.startswith("/v1/") and path not in _UNQUEUED and service.full:
            await asyncio.sleep(HELD_FOR)
            await _refuse(send, 503, "the service is busy; repeat the request later", RETRY_AFTER)
        elif (body := await self._body(headers, receive, send)) is not None:
            problem = _unreadable(headers) if path in _WITH_BODY else None
            if problem is not None and scope["method"] == "POST":
                await _refuse(send, 400, problem, {})
            else:
                await self._app(scope, _replay(body, receive), send)

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._token is None or path in self._open:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given, self._token)

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> bytes | None:
        """Read the body; None if it is too large and the client was told, or the client is gone."""
        limit = self._service.settings.limits.max_body
        announced = headers.get(b"content-length", b"0")
        body, too_large = bytearray(), announced.isdigit() and int(announced) > limit
        while not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            too_large = len(body) > limit
            if not message.get("more_body", False):
                break
        if not too_large:
            return bytes(body)
        text = f"the body has more than {limit} bytes; send less at a time"
        await _refuse(send, 413, text, {"Connection": "close"}, more=True)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_throw_away(receive, _LINGER * limit), _LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})
        return None


def _unreadable(headers: dict[bytes, bytes]) -> str | None:
    """Return what is wrong with the kind of a body; None where nothing is.

    A web page of somebody else can make a browser send anything but JSON without asking first.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        given = kind.decode("latin-1")[:100] or "missing"
        return f"the header Content-Type is {given}; send Content-Type: application/json"
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding != b"identity":
        given = coding.decode("latin-1")[:100]
        return f"the header Content-Encoding is {given}; send the JSON itself, not compressed"
    return None


async def _throw_away(receive: Receive, most: int) -> None:
    thrown, more = 0, True
    while more and thrown < most:
        message = await receive()
        thrown += len(message.get("body", b""))
        more = message.get("more_body", False)


def route_of(path: str) -> str:
    """Return the route of a path as metrics name it, in which names of users do not appear."""
    if path.startswith("/v1/users/"):
        return "/v1/users/{user}" + ("/history" if path.endswith("/history") else "")
    return path if path in _ROUTES else "other"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Make a receive that returns the body first."""
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(
    send: Send, status: int, error: str, headers: dict[str, str], *, more: bool = False
) -> None:
    body = json.dumps({"error": error}).encode()
    named = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
    encoded = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": more})
