"""A fake OpenAI-compatible server for test_conform.py: correct by default, or with exactly one fault (`Fault`).

Its text comes from hashes, so it is fast and repeatable. Tests reach it without sockets and with a clock of its own
(`DirectWire`), or over HTTP (`served`).
"""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from haast.serving.conform.wire import Opened, Request

MODEL, KEY, CONTEXT = "fake-1", "secret", 4096
PACE = 0.003  # seconds a token takes, by the fake's own clock
END, BYTES = 0, 300  # ids: the end of a text, and the first of 256 single bytes
WORDS = (  # noqa: SIM905  (a list would take forty lines)
    " sea fox old grey lamp tower wave night wind gull ice snow keeper light rock boat storm song rope star moon door "
    "glass stair north east salt foam dark deep calm tide reef mist cliff path fire shore bell oar"
).split()
BRIEF = ("one word", "number only", "One word", "Say yes")  # prompts with a short answer
Body = dict[str, Any]
Hook = Callable[["Fake", str, Body, Any], Any]
Condition = Callable[[str, Body], bool]


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        self.status, self.body = status, {"error": error}


# The model


def piece(token: int) -> bytes:
    if BYTES <= token < BYTES + 256:
        return bytes([token - BYTES])
    return f" {WORDS[token - 1] if token <= len(WORDS) else f't{token}'}".encode()


def decoded(ids: list[int]) -> str:
    """The text so far; a character that is not whole yet is held back."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(piece(token) for token in ids))


@lru_cache(maxsize=20000)
def raw_scores(prompt: str, position: int) -> dict[int, float]:
    """The scores of the few tokens that can come next."""
    wide = "".join(c for c in prompt if ord(c) > 0x7FF).encode()
    if wide:
        return {BYTES + wide[position % len(wide)]: 9.0, 1: 0.0}
    drawn = random.Random(f"{prompt}/{position}").sample(range(1, len(WORDS) + 1), 6)
    scores = dict(zip(drawn, (3.0, 2.2, 1.5, 1.0, 0.5, 0.0), strict=True))
    if position >= 3 and any(words in prompt for words in BRIEF):
        scores[END] = 20.0
    return scores


def processed(prompt: str, ids: list[int], body: Body) -> dict[int, float]:
    """Scores after everything that a request asks for, temperature and what follows it aside."""
    scores = dict(raw_scores(prompt, len(ids)))
    if len(ids) < (body.get("min_tokens") or 0):
        scores.pop(END, None)
    for token, bias in (body.get("logit_bias") or {}).items():
        scores[int(token)] = scores.get(int(token), -5.0) + bias
    for token, count in Counter(ids).items():
        if token in scores:
            penalty = body.get("presence_penalty", 0) + count * body.get("frequency_penalty", 0)
            scores[token] = (scores[token] - penalty) / body.get("repetition_penalty", 1)
    return scores


def picked(scores: dict[int, float], body: Body, draw: float) -> int:
    heat = body.get("temperature", 1)
    ranked = sorted(scores, key=lambda token: (-scores[token], token))
    if heat == 0:
        return ranked[0]
    weights = [math.exp((scores[token] - scores[ranked[0]]) / heat) for token in ranked]
    total, kept, mass = sum(weights), list[tuple[int, float]](), 0.0
    for token, weight in list(zip(ranked, weights, strict=True))[: body.get("top_k") or None]:
        if kept and (mass >= body.get("top_p", 1) * total or weight < body.get("min_p", 0)):
            break
        kept.append((token, weight))
        mass += weight
    place = draw * mass
    for token, weight in kept:
        place -= weight
        if place < 0:
            return token
    return kept[-1][0]


def log_softmax(scores: dict[int, float]) -> dict[int, float]:
    total = math.log(sum(math.exp(score) for score in scores.values()))
    return {token: score - total for token, score in scores.items()}


def entry(token: int, logprob: float) -> Body:
    return {"token": piece(token).decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece(token))}


@dataclass
class Said:
    """One choice: its text, piece by piece as the tokens gave it, and what stands beside it."""

    pieces: list[str]
    finish: str
    tokens: int
    entries: list[Body] = field(default_factory=list)
    calls: list[Body] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def spoken(prompt: str, body: Body, seed: object) -> Said:
    """Token after token, until an end, a stop or the limit."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    ids, entries, starts, pieces, text = list[int](), list[Body](), list[int](), list[str](), ""
    finish = "length"
    while len(ids) < limit and finish == "length":
        scores = processed(prompt, ids, body)
        token = picked(scores, body, 0.0 if seed == "greedy" else random.Random(f"{seed}/{len(ids)}").random())
        if token == END:
            return Said(pieces, "stop", len(ids), entries)
        before, ids = text, [*ids, token]
        text = decoded(ids)
        found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        text, finish = (text[: min(found)], "stop") if found else (text, finish)
        entries += [entry_of(token, log_softmax(scores), body)] if body.get("logprobs") else []
        starts.append(len(before))
        pieces = [*pieces, text[len(before) :]] if text.startswith(before) else cut(pieces, len(text))
    kept = sum(start < len(text) for start in starts) if finish == "stop" else len(ids)
    return Said(pieces, finish, len(ids), entries[:kept])


def entry_of(token: int, logs: dict[int, float], body: Body) -> Body:
    top = sorted(logs, key=lambda each: -logs[each])[: body.get("top_logprobs") or body.get("logprobs") or 1]
    return {**entry(token, logs[token]), "top_logprobs": [entry(each, logs[each]) for each in top]}


def cut(pieces: list[str], length: int) -> list[str]:
    """The pieces of a text that a stop made shorter than what was there before."""
    kept = list[str]()
    for each in pieces:
        kept.append(each[: max(0, length - sum(map(len, kept)))])
    return kept


# Values of a schema


def value_of(schema: Body, dice: random.Random) -> Any:
    if "enum" in schema:
        return dice.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if kind == "object":
        return {name: value_of(each, dice) for name, each in schema.get("properties", {}).items()}
    if kind == "string" and "pattern" in schema:
        return patterned(schema["pattern"].strip("^$"), dice)
    if kind in ("boolean", "null", "string"):
        return {"boolean": dice.random() < 0.5, "null": None, "string": "a"}[kind]
    raise RefusalError(400, f"response_format: a schema like {str(schema)[:80]} is not supported", "response_format")


def patterned(pattern: str, dice: random.Random) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RefusalError(400, f"response_format: the pattern {pattern!r} is broken", "response_format") from error
    return "-".join("".join(str(dice.randrange(10)) for _ in range(count)) for count in (3, 2))


def form_of(body: Body) -> Body | None:
    """The schema that a request asks for."""
    asked = body.get("response_format") or {}
    if asked.get("type") == "json_object":
        return {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    if asked.get("type") == "json_schema":
        schema: Body = asked["json_schema"]["schema"]
        return schema
    if asked and asked.get("type") != "text":
        raise RefusalError(400, f"response_format {asked.get('type')!r} is not known", "response_format")
    return None


def formed(body: Body, dice: random.Random) -> Said | None:
    """A text of a given form, or a call; None where the request asks for neither."""
    schema, regex = form_of(body), (body.get("structured_outputs") or {}).get("regex")
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        raise RefusalError(400, f"tool_choice {choice!r} is not known", "tool_choice")
    if choice == "required" or isinstance(choice, dict):
        return called(body, choice, dice)
    if schema is None and regex is None:
        return None
    text = patterned(regex, dice) if regex else json.dumps(value_of(schema or {}, dice))
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    limit = body.get("max_tokens") or 16
    return Said(pieces[:limit], "stop" if len(pieces) <= limit else "length", min(len(pieces), limit))


def called(body: Body, choice: str | Body, dice: random.Random) -> Said:
    names = [choice["function"]["name"]] if isinstance(choice, dict) else []
    tools = [each["function"] for each in body["tools"] if not names or each["function"]["name"] in names]
    tool = dice.choice(tools)
    arguments = json.dumps(value_of(tool["parameters"], dice))
    function = {"name": tool["name"], "arguments": arguments}
    return Said([], "tool_calls", 12, calls=[{"id": "call_7", "type": "function", "function": function}])


# The server


@dataclass(frozen=True)
class Fault:
    """One broken promise, and how the check that must notice ends."""

    check: str
    request: Hook | None = None  # changes what the server reads
    whole: Hook | None = None  # changes an answer
    chunks: Hook | None = None  # changes a list of chunks, the last of which is "[DONE]"
    made: Hook | None = None  # changes status, headers or body at the end
    setup: Callable[[Fake], None] = lambda fake: None
    ends: str = "fail"


@dataclass
class Made:
    """What the server sends; `chunks` for a stream."""

    status: int
    body: Any = None
    chunks: list[Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    tokens: int = 0

    def pieces(self) -> list[bytes]:
        if self.chunks is not None:
            said = (each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in self.chunks)
            return [f"data: {each}\n\n".encode() for each in said]
        return [self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()]


class Fake:
    """The server without a socket."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault or Fault("")
        self.key: str | None = KEY
        self.held = False  # a stream that comes all at its end
        self.deaf = ""  # "stream" or "whole": goes on when the client has left
        self.running, self.drafted = 0, 0
        self.seen: Counter[str] = Counter()
        self.numbers = iter(range(1, 10**9))
        self.fault.setup(self)

    def reply(self, method: str, path: str, headers: dict[str, str], content: bytes) -> Made:
        asked: Body = {}
        try:
            if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
                raise RefusalError(401, "the key is wrong")
            made = self._get(path) if method == "GET" else None
            if made is None:
                asked = self._read(content)
                made = self._post(path, deepcopy(asked))
        except RefusalError as refusal:
            made = Made(refusal.status, refusal.body)
        made.headers["x-request-id"] = f"r{next(self.numbers)}"
        if self.fault.made is not None:
            made = self.fault.made(self, path, asked, made) or made
        made.headers["content-type"] = "application/json" if made.chunks is None else "text/event-stream"
        return made

    def _get(self, path: str) -> Made:
        entries = [{"id": MODEL, "object": "model", "owned_by": "haast", "max_model_len": CONTEXT}]
        running, drafted = f"x_num_requests_running {self.running}\n", f"x_draft_tokens_total {self.drafted}\n"
        known = {
            "/v1/models": {"object": "list", "data": entries},
            "/health": {},
            "/metrics": f"{running}{drafted}x_accepted_tokens_total {self.drafted // 2}\n",
        }
        if path not in known:
            raise RefusalError(404, f"{path} is not here")
        return Made(200, known[path])

    def _read(self, content: bytes) -> Body:
        try:
            body = json.loads(content)
        except ValueError as error:
            raise RefusalError(400, f"the body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise RefusalError(400, "the body is no JSON object")
        self.seen[content.decode("utf-8", "replace")] += 1
        return body

    def _post(self, path: str, body: Body) -> Made:
        asked = deepcopy(body)
        if self.fault.request is not None:
            body = self.fault.request(self, path, asked, body) or body
        if path == "/tokenize":
            return Made(200, {"tokens": [WORDS.index(word) + 1 for word in body["prompt"].split()]})
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise RefusalError(404, f"{path} is not here")
        check_request(body)
        chat = "chat" in path
        said = self._answers(body)
        if body.get("stream"):
            chunks = [*chunked(body, said, chat, self._head(chat, True)), "[DONE]"]
            if self.fault.chunks is not None:
                chunks = self.fault.chunks(self, path, asked, chunks) or chunks
            return Made(200, chunks=chunks, tokens=sum(each.tokens for each in said))
        answer = {**self._head(chat, False), "choices": wholes(body, said, chat), "usage": usage_of(body, said)}
        if self.fault.whole is not None:
            answer = self.fault.whole(self, path, asked, answer) or answer
        return Made(200, answer, tokens=sum(each.tokens for each in said))

    def _head(self, chat: bool, stream: bool) -> Body:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
        return {"id": f"a{next(self.numbers)}", "object": kind, "created": int(time.time()), "model": MODEL}

    def _answers(self, body: Body) -> list[Said]:
        seed = body.get("seed", f"free {next(self.numbers)}")
        said = []
        for number in range(body.get("n") or 1):
            mark = f"{seed}/{number}" if body.get("temperature", 1) else "greedy"
            said.append(formed(body, random.Random(mark)) or spoken(prompt_of(body), body, mark))
        self.drafted += sum(each.tokens for each in said)
        return said


def prompt_of(body: Body) -> str:
    if "prompt" in body:
        return str(body["prompt"])
    return " ".join(str(each.get("content")) for each in body.get("messages") or ())


RANGES = {
    "temperature": (0, 2), "top_p": (1e-9, 1), "n": (1, 8), "max_tokens": (1, 10**6), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "top_logprobs": (0, 20), "min_p": (0, 1), "max_completion_tokens": (1, 10**6),
}  # fmt: skip


def check_request(body: Body) -> None:
    if body.get("model") != MODEL:
        raise RefusalError(404, f"there is no model {body.get('model')!r}", "model")
    if "prompt" not in body and not body.get("messages"):
        raise RefusalError(400, "messages must not be empty", "messages")
    for name, (least, most) in RANGES.items():
        value = body.get(name, least)
        if not isinstance(value, int | float) or not least <= value <= most:
            raise RefusalError(400, f"{name}={value!r} is not between {least} and {most}", name)
    if not isinstance(body.get("stop") or "", str | list):
        raise RefusalError(400, "stop is a string or a list", "stop")
    if any(int(token) > 10**6 for token in body.get("logit_bias") or ()):
        raise RefusalError(400, "logit_bias names a token that is not there", "logit_bias")
    if "audio" in (body.get("modalities") or ()):
        raise RefusalError(400, "modalities: only text", "modalities")
    if any(0xD800 <= ord(character) < 0xE000 for character in prompt_of(body)):
        raise RefusalError(400, "messages hold half a character", "messages")
    words = len(prompt_of(body).split())
    if words > CONTEXT:
        raise RefusalError(400, f"the prompt has {words} tokens, the context is {CONTEXT} long", "messages")


def usage_of(body: Body, said: list[Said]) -> Body:
    prompt, completion = len(prompt_of(body).split()) + 3, sum(each.tokens for each in said)
    told: Body = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if body.get("prediction"):
        details = {"accepted_prediction_tokens": completion - 1, "rejected_prediction_tokens": 0}
        told["completion_tokens_details"] = details
    return told


def logprobs_of(body: Body, entries: list[Body], chat: bool, start: int = 0) -> Any:
    if not body.get("logprobs"):
        return None
    if chat:
        return {"content": entries}
    tokens, offsets = [each["token"] for each in entries], list[int]()
    for token in tokens:
        offsets.append(start)
        start += len(token)
    tops = [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in entries]
    numbers = [each["logprob"] for each in entries]
    return {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": tops, "text_offset": offsets}


def wholes(body: Body, said: list[Said], chat: bool) -> list[Body]:
    choices = []
    for number, each in enumerate(said):
        message: Body = {"role": "assistant", "content": None if each.calls else each.text}
        if each.calls:
            message["tool_calls"] = deepcopy(each.calls)
        content: Body = {"message": message} if chat else {"text": each.text}
        more = {"finish_reason": each.finish, "logprobs": logprobs_of(body, each.entries, chat)}
        choices.append({"index": number, **content, **more})
    return choices


def chunked(body: Body, said: list[Said], chat: bool, head: Body) -> Iterator[Body]:
    for number, each in enumerate(said):

        def chunk(content: Body, finish: str | None = None, number: int = number, **more: Any) -> Body:
            said = {"delta": content} if chat else {"text": content.get("content", "")}
            return {**head, "choices": [{"index": number, **said, "finish_reason": finish, **more}]}

        if chat:
            yield chunk({"role": "assistant", "content": ""})
        for call in each.calls:
            yield from (chunk({"tool_calls": part}) for part in call_parts(call))
        for place, words in enumerate(each.pieces):
            told = logprobs_of(body, each.entries[place : place + 1], chat)
            if words or told:
                yield chunk({"content": words}, logprobs=told)
        yield chunk({}, each.finish)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": usage_of(body, said)}


def call_parts(call: Body) -> Iterator[list[Body]]:
    function = call["function"]
    yield [{**call, "index": 0, "function": {"name": function["name"], "arguments": ""}}]
    for start in range(0, len(function["arguments"]), 5):
        yield [{"index": 0, "function": {"arguments": function["arguments"][start : start + 5]}}]


class DirectWire:
    """The way to the fake without a socket; its clock goes on by what the fake's tokens take."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.now, self._guard = fake, 0.0, threading.Lock()

    @contextmanager
    def open(self, request: Request) -> Iterator[Opened]:
        with self._guard:
            made = self.fake.reply(request.method, request.path, dict(request.headers), request.content)
        pieces = made.pieces()
        pace = made.tokens * PACE / len(pieces)
        if self.fake.held or made.chunks is None:
            self.now, pace = self.now + made.tokens * PACE, 0.0
        yield Opened(made.status, made.headers, self._paced(pieces, pace))

    def _paced(self, pieces: list[bytes], pace: float) -> Iterator[bytes]:
        for each in pieces:
            self.now += pace
            yield each

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# The server over HTTP


class Serving:
    """The fake as an application: one request at a time, and it stops when its client leaves, unless it is deaf."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.turn = fake, asyncio.Lock()
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: HttpRequest) -> Response:
        headers = dict(request.headers)
        made = self.fake.reply(request.method, request.url.path, headers, await request.body())
        if made.chunks is not None:
            return StreamingResponse(self._stream(made), made.status, made.headers)
        if made.tokens:
            await self._take(made.tokens, request)
        return Response(made.pieces()[0], made.status, made.headers)

    async def _take(self, tokens: int, request: HttpRequest) -> None:
        async with self.turn:
            self.fake.running += 1
            for _ in range(tokens // 20 + 1):
                if self.fake.deaf != "whole" and tokens > 100 and await request.is_disconnected():
                    break
                await asyncio.sleep(20 * PACE / 3 if tokens > 20 else 0)
            self.fake.running -= 1

    async def _stream(self, made: Made) -> AsyncIterator[bytes]:
        pieces = made.pieces()
        await self.turn.acquire()
        self.fake.running += 1
        left = len(pieces)
        try:
            for each in pieces:
                yield each
                left -= 1
                await asyncio.sleep(PACE / 2 if len(pieces) > 20 else 0)
        finally:
            if left and self.fake.deaf == "stream":
                asyncio.get_running_loop().call_later(left * PACE / 2, self._freed)
            else:
                self._freed()

    def _freed(self) -> None:
        self.fake.running -= 1
        self.turn.release()


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    """The fake on a port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(Serving(fake).app, log_level="error", lifespan="off", ws="none", loop="asyncio")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join(10)
