"""Answers on their way out: several choices merged, chunk by chunk as server-sent events, or all at once.

Owns the order of a stream (role, text, reason, usage, [DONE]) and what ends it: an error is an event of its own.
Leaving a stream, or a client that leaves, ends its requests at once.
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

from haast.serving.problems import ApiError, problem_of
from haast.serving.shapes import Shape
from haast.serving.writing import Delta, Writing

_LOG = logging.getLogger("haast.serving")
_FRAMES = 12  # of an error's trace that the log names
_DONE = b"data: [DONE]\n\n"
_MANY = 32  # tokens or steps at once that are not written on the event loop
_SLICE = 16  # items of a list that are written at once
Result = TypeVar("Result")


def event(data: dict[str, Any], name: str | None = None, long: bool = False) -> bytes:
    """One server-sent event; a long one is written in pieces."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + (in_pieces(data) if long else encoded(data)) + b"\n\n"


def encoded(data: Any) -> bytes:
    """JSON in UTF-8. Halves of characters, which UTF-8 has not, are escaped as JSON escapes them."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def in_pieces(data: Any) -> bytes:
    """As `encoded`, of what may be long: json.dumps by itself lets no other thread run until all of it is written."""
    if isinstance(data, dict):
        return b"{" + b",".join(encoded(name) + b":" + in_pieces(each) for name, each in data.items()) + b"}"
    if not isinstance(data, list):
        return encoded(data)
    if len(data) <= _SLICE:
        return b"[" + b",".join(map(in_pieces, data)) + b"]"
    slices = (data[start : start + _SLICE] for start in range(0, len(data), _SLICE))
    return b"[" + b",".join(encoded(part)[1:-1] for part in slices) + b"]"


async def json_of(make: Callable[[], dict[str, Any]]) -> HttpResponse:
    """An answer as JSON, made and written beside the event loop.

    In asyncio's own threads: those of `run_in_threadpool` may all be busy with requests that are still being read.
    """
    return HttpResponse(await asyncio.to_thread(lambda: in_pieces(make())), media_type="application/json")


class Json(JSONResponse):
    """An answer as JSON, whatever the texts in it."""

    def render(self, content: Any) -> bytes:
        return encoded(content)


async def events(shape: Shape, writings: Sequence[Writing]) -> AsyncGenerator[bytes, None]:
    """The answer as a stream."""
    try:
        for index in range(len(writings)):
            for chunk in shape.begun(index):
                yield event(chunk)
        async with aclosing(merged(writings)) as parts:
            async for index, delta in parts:
                if delta is None:
                    yield event(shape.ended(index, writings[index]))
                else:
                    for each in await _chunks(shape, index, delta):
                        yield each
        if shape.plan.usage_in_stream:
            yield event(await asyncio.to_thread(shape.totals, writings))
    except Exception as error:
        yield event(told(error).body())
    yield _DONE


async def _chunks(shape: Shape, index: int, delta: Delta) -> list[bytes]:
    """The events of a delta; what was held back for a while may be much."""
    long = len(delta.logprobs) + len(delta.steps) > _MANY

    def made() -> list[bytes]:
        return [event(chunk, long=long) for chunk in shape.said(index, delta)]

    return await asyncio.to_thread(made) if long else made()


async def whole(writings: Sequence[Writing]) -> list[Delta]:
    """All that each of the requests says. Raises what ended one of them."""
    deltas = [Delta() for _ in writings]
    async with aclosing(merged(writings)) as parts:
        async for index, delta in parts:
            if delta is not None:
                join(deltas[index], delta)
    return deltas


def join(all_of: Delta, delta: Delta) -> None:
    """Add a delta to those before it."""
    for name, value in vars(delta).items():
        setattr(all_of, name, getattr(all_of, name) + value)


async def merged(writings: Sequence[Writing]) -> AsyncGenerator[tuple[int, Delta | None], None]:
    """The deltas of several answers as they come, with the number of each, and None where one has ended."""
    if len(writings) == 1:
        async with aclosing(writings[0].deltas()) as deltas:
            async for delta in deltas:
                yield 0, delta
        yield 0, None
        return
    ready: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def follow(index: int, writing: Writing) -> None:
        try:
            async with aclosing(writing.deltas()) as deltas:
                async for delta in deltas:
                    ready.put_nowait((index, delta))
            ready.put_nowait((index, None))
        except BaseException as error:
            ready.put_nowait((index, error))
            raise

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(writings)]
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
    """The result of some work, which is cancelled where the client leaves before it is done.

    Raises:
        ApiError: the client has left; nobody reads it.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(408, "the client has left before the answer was ready", code="client_closed_request")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def told(error: BaseException) -> ApiError:
    """What the client is told; the log has where nobody foresaw it, but no words: they may hold some of the prompt."""
    problem = problem_of(error)
    if problem.status == 500:
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        _LOG.error("a request failed by %s at %s", type(error).__name__, places)
    return problem
