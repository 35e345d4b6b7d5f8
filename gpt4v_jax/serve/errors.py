"""Errors as OpenAI's bodies: {"error": {"message", "type", "param", "code"}}. None of them has a traceback in it."""

import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request

from gpt4v_jax import config
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.serve.requests import Busy
from gpt4v_jax.serve.wire import Reply

log = logging.getLogger("gpt4v_jax.serve")
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # of others: invalid_request_error

LONGEST = 1000  # characters of a message: some quote what was sent


class ApiError(Exception):
    """What is answered instead of a result."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None, status: int = 400,
                 headers: dict[str, str] | None = None):  # fmt: skip
        super().__init__(message)
        self.message, self.field, self.code, self.status, self.headers = message, field, code, status, headers or {}

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error")
        message = self.message if len(self.message) <= LONGEST else self.message[:LONGEST] + "..."
        return {"error": {"message": message, "type": kind, "param": self.field, "code": self.code}}


def closing() -> ApiError:
    return ApiError("the server is closing: try again later", None, "closing", 503, {"Retry-After": "10"})


def internal() -> ApiError:
    return ApiError("something went wrong on the server; its log says what", None, "internal_error", 500)


def unknown_model(name: str, known: str) -> ApiError:
    text = f"the model {shown(name)} does not exist here: this server has {known!r}"
    return ApiError(text, "model", "model_not_found", 404)


def shown(value) -> str:
    """-> a value of whatever size as messages quote it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-10:]


def of(error: Exception) -> ApiError:
    """-> what a client is told of an error. What is nobody's fault but ours is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        later = {"Retry-After": str(max(1, round(error.seconds)))}
        return ApiError(str(error), None, "rate_limit_exceeded", 429, later)
    if isinstance(error, BadMedium):
        return ApiError(f"a medium cannot be used: {error}", None, "invalid_medium")
    if isinstance(error, config.InputError):
        return ApiError(str(error))
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail).lower(), None, None, error.status_code, dict(error.headers or {}))
    log.error("%s", type(error).__name__, exc_info=error)
    return internal()


async def handle(request: Request, error: Exception) -> Reply:
    """Of Starlette's exception handlers."""
    found = of(error)
    return Reply(found.body, found.status, found.headers)
