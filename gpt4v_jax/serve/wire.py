"""Bytes in and out: JSON bodies, replies, and work that ends when its client has gone."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import numpy as np
from starlette.responses import Response

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class TooDeep(Exception):
    """Lists or objects within each other, some hundreds or more."""


class Reply(Response):
    """JSON; its text is ASCII, for a client may have sent half a surrogate pair, which UTF-8 cannot write."""

    media_type = "application/json"

    def __init__(self, value: Any, status: int = 200, headers: dict[str, str] | None = None):
        super().__init__(encoded(value), status, headers)


def encoded(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def decoded(body: bytes) -> Any:
    """Raises ValueError for what is no JSON, and for NaN and Infinity, TooDeep for what Python cannot read."""
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(str(body, "utf-8-sig"), parse_constant=refuse)  # bytes of UTF-16, `counted` would misread
    except RecursionError:
        raise TooDeep from None


_NO_MARKS = bytes(set(range(256)) - set(b'",[{'))


def counted(body: bytes) -> tuple[int, int]:
    """-> how many commas a JSON text has outside of its strings, and how many lists and objects begin there, without
    parsing it: of media, which are long strings, nothing is left after the first line."""
    marks = body.replace(rb"\\", b"").replace(rb'\"', b"").translate(None, _NO_MARKS)
    codes = np.frombuffer(marks, np.uint8)
    outside = codes[~np.bitwise_xor.accumulate(codes == ord('"'))]
    return np.count_nonzero(outside == ord(",")), np.count_nonzero((outside == ord("[")) | (outside == ord("{")))


async def while_there(receive: Callable[[], Awaitable[dict]], work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, which is cancelled when the client hangs up: then raises ClientGone. The body must be read."""
    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
