"""Errors that clients get, in OpenAI's format: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from haast.errors import KVPoolError, PromptError, QueueFullError, UnsupportedArgumentError

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error", 500: "server_error",
    503: "service_unavailable_error",
}  # fmt: skip
_MAX_MESSAGE = 2000  # characters; some messages quote the request
_FIELD = re.compile(r"^(?:field )?'?([a-z_]+)'?(?:=| holds | can't| is | needs)")


class ApiError(Exception):
    """An error that is sent to the client.

    Attributes:
        status: HTTP status.
        message: for people: the wrong value and the remedy; cut at 2,000 characters.
        param: the request field that is wrong, or None.
        code: for programs.
        headers: HTTP headers to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class TooLongError(ApiError):
    """A prompt that does not fit the model's context with the requested tokens."""

    def __init__(self, most: int, length: str, param: str) -> None:
        super().__init__(
            400,
            f"this model's maximum context length is {most} tokens; the prompt has {length}: shorten the prompt, or "
            f"request fewer",
            param=param,
            code="context_length_exceeded",
        )


def refused(field: str, why: str) -> ApiError:
    """The error for a field that is not supported."""
    return ApiError(400, f"{field} is not supported: {why}", param=field, code="unsupported_parameter")


def invalid(first: Mapping[str, Any]) -> ApiError:
    """The error for a body that pydantic rejects; `first` is its first error. Does not quote the body."""
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    return ApiError(422, f"{where or 'the body'}: {first['msg']}", param=where or None, code="invalid_type")


def problem_of(error: BaseException) -> ApiError:
    """The error that a client gets for an exception. Details of an unexpected one stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(
            429, "too many requests are waiting: try again", code="queue_full", headers={"Retry-After": "1"}
        )
    if isinstance(error, KVPoolError):
        return ApiError(400, str(error), param="max_tokens", code="kv_pool_exceeded")
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply", code="invalid_value")
    if isinstance(error, ValidationError):
        return invalid(error.errors(include_url=False, include_input=False)[0])
    if isinstance(error, PromptError | UnsupportedArgumentError | ValueError):
        field = _FIELD.match(str(error))
        return ApiError(400, str(error), param=field[1] if field else None, code="invalid_value")
    return ApiError(500, "the server failed on this request: see its log", code="internal_error")
