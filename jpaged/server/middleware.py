"""What every request passes before it is looked at: API keys, size of the body, request ids. Plain ASGI."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jpaged.server.errors import ApiError, body_of

BODY_TIMEOUT = 60.0
"""Seconds in which a request's body must have arrived."""
MAX_HEADER_BYTES = 64 << 10
OWNER = "jpaged.owner"
"""Where a request's scope has the digest of its API key, if there are keys."""
_OPEN_PATHS = ("/health",)
_BROWSER_PATHS = ("/ui", "/ui/state")
"""What people open in a browser, which sends no bearer token but asks for a password: there, a key may be that.

A browser sends a password along with requests that other sites make it send, too. These paths change nothing."""


class Guard:
    """Answers 401 to requests without one of the keys; all paths but /health are guarded.

    Keys are compared by their digests, each of them, in constant time: how long it takes says nothing about them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [digest_of(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in _OPEN_PATHS:
            browser = scope["path"] in _BROWSER_PATHS
            given = digest_of(_key_in(Headers(scope=scope).get("authorization", ""), password=browser))
            matches = [hmac.compare_digest(given, digest) for digest in self._digests]
            if not any(matches):
                error = ApiError(401, "an API key is missing or wrong: send 'Authorization: Bearer KEY'.")
                error.code = "invalid_api_key"
                if browser:
                    error.headers = {"WWW-Authenticate": 'Basic realm="jpaged (the password is an API key)"'}
                return await _answer(error, scope, receive, send)
            scope[OWNER] = given.hex()
        await self._app(scope, receive, send)


class Limits:
    """Answers 413 to bodies that are too large and 431 to headers that are; drops bodies that do not arrive in time."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._most = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return await _answer(ApiError(431, "the headers are too large."), scope, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self._most:
            return await _answer(self._too_large(), scope, receive, send)
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT:g} s.") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._most:
                raise self._too_large()
            return message

        await self._app(scope, bounded, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most} bytes.", code="body_too_large")


class RequestIds:
    """Gives every answer an X-Request-Id header: the request's own, if it is a decent one, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = given_id(Headers(scope=scope)) or uuid.uuid4().hex

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, with_id)


def given_id(headers: Headers) -> str | None:
    """The X-Request-Id that a request came with, if it is a decent one."""
    given = headers.get("x-request-id", "")
    return given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else None


def _key_in(header: str, password: bool) -> bytes:
    """The key that an Authorization header brings; no key is empty."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("latin-1", "replace")
    if password and scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
    return b""


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(body_of(error), error.status_code, headers=error.headers)(scope, receive, send)
