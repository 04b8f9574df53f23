"""Sends answers: merges the choices of a request into server-sent events, or into one whole answer.

Owns the order of a stream (role, text, finish_reason, usage, [DONE]) and its end; an error is an event of its own.
Closing a stream, or a client that disconnects, cancels its requests at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.responses import Response as HttpResponse

from haast.serving.api_errors import ApiError, problem_of
from haast.serving.generation import Delta, Generation
from haast.serving.shapes import Shape

_LOG = logging.getLogger("haast.serving")
_FRAMES = 12  # of an error's traceback that are logged
_DONE = b"data: [DONE]\n\n"
_MANY = 32  # logprobs and steps in a delta above which it is encoded in a thread
_SLICE = 16  # list items to encode at once
Result = TypeVar("Result")


def event(data: dict[str, Any], name: str | None = None, long: bool = False) -> bytes:
    """One server-sent event; a long one is encoded in pieces, see `in_pieces`."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + (in_pieces(data) if long else encoded(data)) + b"\n\n"


def encoded(data: Any) -> bytes:
    """JSON in UTF-8. Lone surrogates, which UTF-8 can't encode, become JSON escapes."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def in_pieces(data: Any) -> bytes:
    """As `encoded`, for long data: one call of json.dumps would block all other threads until it ends."""
    if isinstance(data, dict):
        return b"{" + b",".join(encoded(name) + b":" + in_pieces(each) for name, each in data.items()) + b"}"
    if not isinstance(data, list):
        return encoded(data)
    if len(data) <= _SLICE:
        return b"[" + b",".join(map(in_pieces, data)) + b"]"
    slices = (data[start : start + _SLICE] for start in range(0, len(data), _SLICE))
    return b"[" + b",".join(encoded(part)[1:-1] for part in slices) + b"]"


async def json_of(make: Callable[[], dict[str, Any]]) -> HttpResponse:
    """A JSON response that is built and encoded in a thread, not on the event loop.

    Uses asyncio's own threads: those of `run_in_threadpool` may all be busy parsing requests.
    """
    return HttpResponse(await asyncio.to_thread(lambda: in_pieces(make())), media_type="application/json")


class Json(JSONResponse):
    """A JSON response that can hold lone surrogates; see `encoded`."""

    def render(self, content: Any) -> bytes:
        return encoded(content)


async def events(shape: Shape, generations: Sequence[Generation]) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. An error becomes an event."""
    try:
        for index in range(len(generations)):
            for chunk in shape.opening(index):
                yield event(chunk)
        async with aclosing(merged(generations)) as parts:
            async for index, delta in parts:
                if delta is None:
                    yield event(shape.closing(index, generations[index]))
                else:
                    for each in await _chunks(shape, index, delta):
                        yield each
        if shape.plan.usage_in_stream:
            yield event(await asyncio.to_thread(shape.totals, generations))
    except Exception as error:
        yield event(api_error(error).body())
    yield _DONE


async def _chunks(shape: Shape, index: int, delta: Delta) -> list[bytes]:
    """The events of a delta; long ones, after text was held back, are encoded in a thread."""
    long = len(delta.logprobs) + len(delta.steps) > _MANY

    def encode() -> list[bytes]:
        return [event(chunk, long=long) for chunk in shape.delta_chunks(index, delta)]

    return await asyncio.to_thread(encode) if long else encode()


async def whole(generations: Sequence[Generation]) -> list[Delta]:
    """One joined delta per answer. Raises the error that ended one of the requests."""
    deltas = [Delta() for _ in generations]
    async with aclosing(merged(generations)) as parts:
        async for index, delta in parts:
            if delta is not None:
                join(deltas[index], delta)
    return deltas


def join(all_of: Delta, delta: Delta) -> None:
    """Append `delta` to `all_of`."""
    for name, value in vars(delta).items():
        setattr(all_of, name, getattr(all_of, name) + value)


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta | None], None]:
    """Deltas of several answers as they come, as (answer's index, delta); (index, None) at the end of each."""
    if len(generations) == 1:
        async with aclosing(generations[0].deltas()) as deltas:
            async for delta in deltas:
                yield 0, delta
        yield 0, None
        return
    ready: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def follow(index: int, generation: Generation) -> None:
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    ready.put_nowait((index, delta))
            ready.put_nowait((index, None))
        except BaseException as error:
            ready.put_nowait((index, error))
            raise

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            index, part = await ready.get()
            if isinstance(part, BaseException):
                raise part
            left -= part is None
            yield index, part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_gone(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled if the client disconnects first.

    Raises:
        ApiError: the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(408, "the client disconnected before the answer was ready", code="client_closed_request")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def api_error(error: BaseException) -> ApiError:
    """The error that the client gets. An unexpected one is logged without its message, which may quote a prompt."""
    problem = problem_of(error)
    if problem.status == 500:
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        _LOG.error("a request failed with %s at %s", type(error).__name__, places)
    return problem
