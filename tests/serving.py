"""A server in this process: a tiny fp64 model with the default target's own tokenizer, and drafts that are often right.

`Knowing` drafts what vanilla decoding said of the same prompt and seed, with mistakes strewn in, so that blocks of many
lengths are accepted at every field's own boundaries.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import cache
from typing import Any

import httpx2
import torch
import uvicorn
from fakes import FakeDrafter, FakeState, Node, tiny_llama
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haast.api import Haast
from haast.core import Processor, Request, TokenChooser
from haast.engine.scheduler import Scheduler
from haast.serving.app import make_app
from haast.serving.config import ServeConfig
from haast.serving.plan import Plan, chat_plan, completion_plan
from haast.serving.run import Server
from haast.serving.schema import ChatRequest, CompletionRequest
from haast.serving.service import Service
from haast.target.load import load_tokenizer
from haast.target.target import Target

NAME = "tiny"
Json = dict[str, Any]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The default target's."""
    return load_tokenizer()[0]


class Knowing(FakeDrafter):
    """Drafts what it was told that the text will be, right or wrong by a keyed coin, in chains and short branches."""

    name = "knowing"

    def __init__(self, depth: int = 6) -> None:
        super().__init__(depth + 2)
        self._depth, self._rows, self.turn = depth, list[tuple[int, int]](), 0
        self.known: dict[tuple[tuple[int, ...], int, int], list[int]] = {}  # (prompt, seed, choice) -> all tokens

    def learn(self, request: Request) -> None:
        """Know a text that vanilla has said."""
        prompt = tuple(request.tokens[: request.prompt_length])
        self.known[prompt, *_draws(request.chooser)] = list(request.tokens)

    def set_chooser(self, state: FakeState, chooser: TokenChooser) -> None:
        self._rows.append(_draws(chooser))  # not the chooser, whose grammar takes memory
        state.row = len(self._rows) - 1

    def draft(self, row: int, history: list[int]) -> list[Node]:
        begins = (history[:length] for length in {len(key[0]) for key in self.known} if length <= len(history))
        keys = ((tuple(begin), *self._rows[row]) for begin in begins)
        text = next((self.known[key] for key in keys if key in self.known), [])
        coins = random.Random(f"{self.turn} {row} {len(history)}")
        wrong = coins.randrange(self._depth + 2)
        begin = len(history)
        tokens = [text[p] if p < len(text) else 7 for p in range(begin, begin + self._depth)]
        if wrong < self._depth:
            tokens[wrong] = (tokens[wrong] + 1) % 1000
        return [*(Node(token, parent) for parent, token in enumerate(tokens)), Node(11, 0)]


def _draws(chooser: Any) -> tuple[int, int]:
    return chooser.params.seed, chooser.choice


class Scripted(Service):
    """A service whose model says a given text, then its end, unless a request's own rules forbid it."""

    script: tuple[int, ...] = ()

    @classmethod
    def of(cls, service: Service, script: str) -> Scripted:
        """Another service's model, with a script."""
        made = cls(service._haast, service.name, service.config)
        ids = service.tokenizer.encode(script, add_special_tokens=False)
        made.script = (*ids, *service.limits.ends[:1])
        return made

    def _processors(self, plan: Plan, length: int) -> list[Processor]:
        def follow(history: Tensor, scores: Tensor) -> Tensor:
            said = history.shape[1] - length
            if said < len(self.script):
                scores[:, self.script[said]] += 1000.0
            return scores

        return [follow, *super()._processors(plan, length)]


def tiny_haast(
    config: ServeConfig, seed: int = 0, std: float = 0.2, context: int = 2048, template: str | None = None
) -> Haast:
    """A tiny model; requests draft by `Knowing`, or by what they choose."""
    words = tokenizer()
    if template is not None:
        words = copy.deepcopy(words)
        words.chat_template = template
    model = tiny_llama(vocab=len(words), hidden=32, context=context, std=std, seed=seed)
    model.generation_config.eos_token_id = words.eos_token_id
    model.config.eos_token_id = words.eos_token_id
    target = Target(model, words)
    target.use_pool(20_000)
    target.scheduler = Scheduler(target, config.max_running, config.max_waiting)
    return Haast(target, Knowing())


def tiny_service(
    seed: int = 0, std: float = 0.2, context: int = 2048, config: ServeConfig | None = None, template: str | None = None
) -> Service:
    """A service on a tiny model."""
    chosen = config or ServeConfig()
    return Service(tiny_haast(chosen, seed, std, context, template), NAME, chosen)


@asynccontextmanager
async def client_of(service: Service, config: ServeConfig | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    """Asks the application without a network."""
    app, state = make_app(lambda: service, config or service.config, service.name)
    state.loaded = service  # a transport without a lifespan loads nothing
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


async def learn(service: Service, path: str, body: Json) -> None:
    """Run a request by vanilla, so that the service's drafter knows what it will say."""
    knowing = service.engine("auto").drafter
    if not isinstance(knowing, Knowing):  # it drafts by itself
        return
    if path.endswith("chat/completions"):
        plan = chat_plan(ChatRequest.model_validate(body), service.limits)
    else:
        plan = completion_plan(CompletionRequest.model_validate(body), service.limits)
    plan.drafter = "none"
    writings = service.begin(plan)
    for writing in writings:
        async with aclosing(writing.deltas()) as deltas:
            with suppress(ValueError):  # an error is an answer too
                async for _ in deltas:
                    pass
        knowing.learn(writing.request)


def parsed(stream: str) -> list[Json]:
    """The chunks of a stream; checks its frame."""
    lines = [line for line in stream.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def run(coroutine: Any) -> Any:
    """Run asynchronous code."""
    torch.set_num_threads(1)
    return asyncio.run(coroutine)


@contextmanager
def served(service: Service, config: ServeConfig | None = None) -> Iterator[str]:
    """A server with real sockets in a thread of its own; gives its address."""
    config = config or service.config
    app, state = make_app(lambda: service, config, service.name)
    server = Server(uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_config=None, access_log=False), state)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while state.loaded is None:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listening.close()
