"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the right status."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jpaged.errors import EngineDeadError, InvalidRequestError, QueueFullError, UnsupportedFeatureError

log = logging.getLogger("jpaged.server")

_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "internal_error", 503: "overloaded_error"}


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
      status: of HTTP.
      message: what was wrong and what to do.
      param: the field that it is about.
      code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, headers={"Retry-After": "1"} if status == 503 else None)
        self.param, self.code = param, code


def as_api_error(error: Exception) -> ApiError:
    """The answer to an error of the engine."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case UnsupportedFeatureError():
            return ApiError(400, str(error), code="unsupported")
        case InvalidRequestError():
            return ApiError(400, str(error))
        case QueueFullError():
            return ApiError(503, str(error), code="queue_full")
        case EngineDeadError():
            # What the device said may name files and addresses: it is in the log, and not for clients.
            return ApiError(
                500,
                "the engine has stopped; the request is lost, unless this server resumes requests.",
                code="engine_dead",
            )
    log.error("an error that nobody expected", exc_info=error)
    return ApiError(500, "internal error.", code="internal")


def body_of(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(error.status_code, "invalid_request_error")
    return {"error": {"message": str(error.detail), "type": kind, "param": error.param, "code": error.code}}


def install(app: FastAPI) -> None:
    """Makes an app answer all errors in this shape."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        return JSONResponse(body_of(told), told.status_code, headers=told.headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        return await answer(request, _of_validation(error))  # type: ignore[arg-type]

    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (HTTPException, InvalidRequestError, UnsupportedFeatureError, QueueFullError, EngineDeadError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"unknown field {'.'.join(where)!r}: it is not supported.", param=param, code="unknown_field"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(where)}: {message}" if where else message, param=param)
