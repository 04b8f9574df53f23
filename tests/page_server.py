"""A server that says what the chat page's tests need: the page's real files under its real policy, and canned answers.

Which answer comes is told by the first word of the prompt; see `Stub.reply`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from haast.serving.step_view import step_html

Json = dict[str, Any]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MODEL = "smollm2-135m-instruct"
HOSTILE = "</span><img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>&amp;"
SHARED = ("common.css", "page.js")  # of the report's templates
_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}

# Answers, a step a line: "|" parts tokens, and the last one is the model's own. The very first stands before all steps.
SKY = """The
 sky| is| blue
 because
 of| a| phenomenon| called| Ray
leigh| scattering|.
 Sun
light| is| made| of| all| the| colours
 of| the| rainbow|,| and
 the| short| blue| waves
 are| scattered| far| more| than
 the| long| red| ones
 by| the| gas
es
 of| the| air|.
 So| blue| light| comes
 from| every| side|,| and
 at| dusk|,| when| its| way
 is| longer|,| the| red
 is| left|.| Voil
à|."""
OTHERS = (" clear", " <b>green</b>", " due", " light", ",", " in", " this", "\n", " to", " scattered")


def answer(lines: str) -> list[list[str]]:
    """The first token alone, then each step's."""
    return [line.split("|") for line in lines.split("\n")]


def step_document(number: int, position: int, before: str, tokens: list[str]) -> Json:
    """A step that kept all tokens but the last, beside drafts that were rejected or not reached."""
    nodes = [_node(0, -1, 0, before)]
    place = 0  # of the last accepted node
    for depth, token in enumerate(tokens, start=1):
        chance = 0.35 + 0.6 * ((number * 7 + depth * 5) % 10) / 10
        nodes[place]["choice"] = {"token": _id(token), "text": token, "prob": chance}
        kept = depth < len(tokens)
        parent = place
        if kept:
            place = len(nodes)
            nodes.append(_node(place, parent, depth, token, chance) | {"accepted": True})
        if kept or len(tokens) > 1 or number % 2:
            aside = len(nodes)
            wrong = OTHERS[(number + depth) % len(OTHERS)]
            nodes.append(_node(aside, parent, depth, wrong, (1 - chance) * 0.6))
            if (number + depth) % 3 == 0:
                nodes.append(_node(aside + 1, aside, depth + 1, OTHERS[(number + depth + 4) % len(OTHERS)], 0.42))
    emitted = [{"token": _id(token), "text": token, "drafted": at + 1 < len(tokens)} for at, token in enumerate(tokens)]
    costs = {"ms_draft": 5.5 + number % 3, "ms_verify": 24.2 + len(nodes) / 2, "ms_overhead": 0.4}
    return {"number": number, "position": position, **costs, "emitted": emitted, "nodes": nodes}


def _id(text: str) -> int:
    return zlib.crc32(text.encode()) % 49152


def _node(number: int, parent: int, depth: int, text: str, chance: float | None = None) -> Json:
    flags = {"accepted": False, "probe": False, "live": True}
    return {"id": number, "parent": parent, "depth": depth, "token": _id(text), "text": text, **flags} | {
        "target_prob": chance,
        "choice": None,
    }


@dataclass
class Stub:
    """What the server was asked, and how it behaves."""

    key: str | None = None
    loading: int = 0  # requests that are still told that the model is loading
    asked: list[Json] = field(default_factory=list)
    unfinished: int = 0  # streams whose reader went away

    def app(self) -> Starlette:
        routes = [
            Route("/", self.index),
            Route("/static/{name}", self.static),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/haast/step", self.step, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def index(self, _: Request) -> Response:
        page = files("haast.serving").joinpath("static/index.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        place = files("haast.bench") / "templates" if name in SHARED else files("haast.serving") / "static"
        file = place / name
        if not file.is_file():
            return Response(status_code=404)
        return Response(file.read_bytes(), media_type=_TYPES[name.rpartition(".")[2]])

    def refused(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "this server asks for a key")
        if self.loading:
            self.loading -= 1
            return error(503, "the model is loading", {"Retry-After": "0"})
        return None

    async def models(self, request: Request) -> Response:
        about = {"drafter": "eagle+suffix", "drafters": ["none", "eagle+suffix"], "context_length": 8192}
        model = {"id": MODEL, "object": "model", "owned_by": "haast", "haast": about | {"vanilla_tokens_per_s": 31.2}}
        return self.refused(request) or JSONResponse({"object": "list", "data": [model]})

    async def step(self, request: Request) -> Response:
        if (refused := self.refused(request)) is not None:
            return refused
        try:
            return HTMLResponse(step_html(await request.json()))
        except ValueError as wrong:
            return error(400, str(wrong))

    async def chat(self, request: Request) -> Response:
        if (refused := self.refused(request)) is not None:
            return refused
        body = await request.json()
        self.asked.append(body)
        mode = body["messages"][-1]["content"].split()[0]
        if mode == "refuse":
            return error(400, f"temperature has to be 0 or more {HOSTILE}", param="temperature")
        if mode == "busy":
            return error(429, "too many requests wait", {"Retry-After": "7"})
        return StreamingResponse(self.reply(mode, body), media_type="text/event-stream")

    async def reply(self, mode: str, body: Json) -> AsyncIterator[bytes]:
        """The stream. Modes: html, different, slow, reason, odd, tool, cut, broken; all else is answered with `SKY`."""
        plain = body["haast"].get("drafter") == "none"
        lines = {
            "html": f"<h1>\n{HOSTILE}| &lt;b&gt;| \U0001f305\n<script>document.title='hacked'</script>",
            "different": SKY.replace(" dusk", " dawn") if plain else SKY,
            "slow": "\n".join([SKY] * 40),
        }.get(mode, SKY)
        end = {"cut": 3, "broken": 3, "odd": 2}.get(mode)
        whole = False
        try:
            for chunk in _opening(mode):
                yield chunk
            steps = list[Json]()
            for tokens, text, told in islice(self.tokens(lines, plain), end):
                steps += told
                chunk = event({"content": text}, haast={"tokens": tokens, "steps": told})
                middle = chunk.find("\u00e0".encode()) + 1  # a character comes in two pieces
                if middle:
                    yield chunk[:middle]
                    await asyncio.sleep(0.01)
                yield chunk[middle:]
                await asyncio.sleep(0.02 if mode == "slow" else 0.001)
            if mode == "broken":
                yield f"data: {json.dumps({'error': {'message': HOSTILE, 'type': 'server_error'}})}\n\n".encode()
            if mode not in ("cut", "broken"):
                yield event({}, finish="tool_calls" if mode == "tool" else "stop")
                yield usage(steps, plain)
                yield b"data: [DONE]\n\n"
            whole = True
        finally:
            self.unfinished += not whole

    def tokens(self, lines: str, plain: bool) -> Iterator[tuple[list[Json], str, list[Json]]]:
        """(tokens, their text, documents of their steps), a chunk each."""
        groups = answer(lines)
        if plain:
            groups = [[token] for group in groups for token in group]
        before, position = groups[0][-1], 40
        first = {"text": before, "drafted": False, "step": None}
        yield [first], before, []
        for number, group in enumerate(groups[1:]):
            step = step_document(number, position, before, group)
            if plain:
                step["nodes"] = step["nodes"][:1]
                step["ms_draft"] = 0.0
            told = [{"text": each["text"], "drafted": each["drafted"], "step": number} for each in step["emitted"]]
            yield told, "".join(group), [step]
            before, position = group[-1], position + len(group)


def _opening(mode: str) -> Iterator[bytes]:
    """What comes before the answer's text."""
    yield b": ping\r\n\r\n"
    yield event({"role": "assistant", "content": ""})
    if mode == "reason":
        for word in ("The user asks", " about <the> sky", "."):
            yield event({"reasoning_content": word})
    if mode == "odd":  # delimiters, half a character, text that is held back, and text that no token has
        yield _told({}, ("", True), ("<think>", True))
        yield _told({"reasoning_content": "hm <"}, ("hm", True), (" <x>", True))
        yield _told({"reasoning_content": "x>", "content": "no token. "}, ("</think>", False))
        yield _told({"content": "\u00e9<"}, ("", False), ("\u00e9", False), ("<b", False))
        yield _told({"content": "b"})
    if mode == "tool":
        call = {"index": 0, "id": "a", "type": "function", "function": {"name": HOSTILE, "arguments": '{"a": 1}'}}
        yield event({"tool_calls": [call]})


def _told(delta: Json, *tokens: tuple[str, bool]) -> bytes:
    told = [{"text": text, "drafted": drafted, "step": 99} for text, drafted in tokens]
    return event(delta, haast={"tokens": told, "steps": []})


def event(delta: Json, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return f"data: {json.dumps(chunk | more, ensure_ascii=False)}\r\n\r\n".encode()


def usage(steps: list[Json], plain: bool) -> bytes:
    tokens = 1 + sum(len(step["emitted"]) for step in steps)
    parts = {key: sum(step[key] for step in steps) for key in ("ms_draft", "ms_verify", "ms_overhead")}
    rate = 31.0 if plain else 1000 * tokens / sum(parts.values())
    stats = {
        "tau": (tokens - 1) / len(steps), "tokens_per_s": rate, "vanilla_tokens_per_s": 31.2, "ms_prefill": 118.0,
        "target_forwards": len(steps), "decoder": "vanilla" if plain else "eagle+suffix",
    } | parts  # fmt: skip
    counts = {"prompt_tokens": 40, "completion_tokens": tokens, "total_tokens": 40 + tokens}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": []}
    return f"data: {json.dumps(chunk | {'usage': counts, 'haast': {'stats': stats}})}\n\n".encode()


def error(status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None) -> Response:
    told = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return JSONResponse({"error": told}, status, headers)


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    """Serve from a thread of this process; the address."""
    server = uvicorn.Server(uvicorn.Config(stub.app(), port=0, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the stub did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)
