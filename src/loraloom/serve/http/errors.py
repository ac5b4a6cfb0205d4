"""Errors as OpenAI's clients expect them: an object, and a status code that fits."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loraloom.errors import FormatError, LoraloomError, plain
from loraloom.generation.sequence import RequestError
from loraloom.serve.adapters import AdapterMemoryError, BusyDownloadingError, UnknownModelError


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is no success."""

    error: ErrorObject


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = ErrorBody(
            error=ErrorObject(message=plain(message), type=kind, param=param, code=code)
        )

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


class ClientGoneError(LoraloomError):
    """The client does not wait any more."""


def api_error(error: Exception) -> ApiError:
    """Say an error of the engine or of loraloom as an answer."""
    match error:
        case ApiError():
            return error
        case ClientGoneError():
            return ApiError(499, "the client has gone")
        case UnknownModelError():
            return ApiError(404, str(error), code="model_not_found", param="model")
        case RequestError(code=code, param=param, retry_after_s=seconds):
            status = {"queue_full": 429, "stopping": 503, "timeout": 504}.get(code or "", 400)
            headers = _later(seconds) if seconds else None
            return ApiError(status, str(error), code=code, param=param, headers=headers)
        case BusyDownloadingError():
            return ApiError(429, str(error), code="busy_downloading", headers=_later(30))
        case AdapterMemoryError():
            return ApiError(507, str(error), code="adapter_memory")
        case FormatError():  # no client's fault
            pass
        case LoraloomError():
            return ApiError(400, str(error))
    return ApiError(500, "the server failed at this request; its log says why", code="internal")


def handle_errors(app: FastAPI) -> None:
    """Let an application answer every error with an object."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    def of_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(step) for step in first["loc"][1:])
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body must be JSON: {first['ctx']['error']}").response()
        return ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param).response()

    for kind in (ApiError, LoraloomError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_body)


def _later(seconds: int) -> dict[str, str]:
    return {"Retry-After": str(seconds)}
