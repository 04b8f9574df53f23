"""HTTP routes: OpenAI's, Haast's own, and a 404 with a reason for those that other servers offer.

Owns the routes, and how an answer's requests are started, and cancelled when their client disconnects. State is in
`app.AppState`; request fields are checked in `plan`, answers formatted in `shapes`.
"""

from __future__ import annotations

import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from fastapi.responses import Response as HttpResponse
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from haast.serving.api_errors import ApiError
from haast.serving.generation import Delta, Generation
from haast.serving.plan import Plan, chat_plan, check_unknown, completion_plan
from haast.serving.responses import Response, as_chat, response_events
from haast.serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest
from haast.serving.service import Service
from haast.serving.shapes import ChatShape, CompletionShape, Shape
from haast.serving.step_view import step_html
from haast.serving.streaming import events, json_of, until_gone, whole
from haast.text import token_text

if TYPE_CHECKING:
    from haast.serving.app import AppState

_LOG = logging.getLogger("haast.serving")
ROUTES = APIRouter()
# Routes of other servers that this one does not offer, with the reason.
_NOT_OFFERED = {
    "/v1/embeddings": "Haast generates text, no embeddings",
    "/v1/rerank": "Haast generates text, it does not rank it",
    "/v1/audio/speech": "Haast supports text only",
    "/v1/audio/transcriptions": "Haast supports text only",
    "/v1/audio/translations": "Haast supports text only",
    "/v1/images/generations": "Haast supports text only",
    "/v1/images/edits": "Haast supports text only",
    "/v1/moderations": "Haast does not classify text",
    "/v1/fine_tuning/jobs": "train heads with `haast train`, and targets with other tools",
    "/v1/files": "the server stores nothing",
    "/v1/batches": "send single requests: the server batches them",
    "/v1/assistants": "the server stores no conversations",
}


@ROUTES.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Any:
    """OpenAI's chat completions."""
    service = _state(request).service
    _check_model(body.model, service)
    plan = await run_in_threadpool(chat_plan, body, service.limits)
    return await _respond(request, plan, lambda: ChatShape(service, plan, _id("chatcmpl"), _now()))


@ROUTES.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Any:
    """OpenAI's text completions."""
    service = _state(request).service
    _check_model(body.model, service)
    plan = await run_in_threadpool(completion_plan, body, service.limits)
    return await _respond(request, plan, lambda: CompletionShape(service, plan, _id("cmpl"), _now()))


@ROUTES.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Any:
    """OpenAI's responses, stateless."""
    service = _state(request).service
    _check_model(body.model, service)
    plan = await run_in_threadpool(lambda: chat_plan(as_chat(body), service.limits))
    response = Response(service, plan, _id("resp"), _now())
    generations = await _start(request, plan)
    if plan.stream:
        return _Stream(response_events(response, generations), request, generations)
    deltas = await _wait_for(request, whole(generations), generations)
    return await json_of(lambda: response.whole(deltas, generations))


@ROUTES.get("/v1/models")
async def models(request: Request) -> Any:
    """The served model and its drafters."""
    return {"object": "list", "data": [_model(_state(request).service)]}


@ROUTES.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Any:
    """The served model."""
    _check_model(name, _state(request).service)
    return _model(_state(request).service)


@ROUTES.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Any:
    """Token ids of a text, or of a conversation in the model's chat template."""
    service = _state(request).service
    answer = await run_in_threadpool(_tokenized, body, service)
    return await json_of(lambda: answer)


@ROUTES.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Any:
    """The text of token ids, special tokens included."""
    service = _state(request).service
    answer = {"prompt": await run_in_threadpool(_detokenized, body, service)}
    return await json_of(lambda: answer)


@ROUTES.get("/health")
async def health(request: Request) -> Any:
    """200 when ready; 503 while the model loads and during a shutdown."""
    return {"status": "ok", "model": _state(request).service.name}


@ROUTES.get("/metrics")
async def metrics(request: Request) -> Any:
    """All metrics in Prometheus' text format."""
    return HttpResponse(_state(request).service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@ROUTES.post("/haast/step")
async def step(body: dict[str, Any], request: Request) -> Any:
    """One step of a trace, drawn as HTML like in the report."""
    return HTMLResponse(await run_in_threadpool(step_html, body))


def _state(request: Request) -> AppState:
    state: AppState = request.app.state.haast
    return state


async def _respond(request: Request, plan: Plan, shape: Callable[[], Shape]) -> HttpResponse:
    """Start the requests of a plan and send their answers."""
    formatter = shape()
    generations = await _start(request, plan)
    if plan.stream:
        return _Stream(events(formatter, generations), request, generations)
    deltas = await _wait_for(request, whole(generations), generations)
    return await json_of(lambda: formatter.whole(deltas, generations))


async def _start(request: Request, plan: Plan) -> list[Generation]:
    return await run_in_threadpool(_state(request).service.begin, plan)


async def _wait_for(request: Request, work: Awaitable[list[Delta]], generations: Sequence[Generation]) -> list[Delta]:
    try:
        return await until_gone(request, work)
    finally:
        _close(request, generations)


def _close(request: Request, generations: Sequence[Generation]) -> None:
    """Cancel requests that still run, count the generated tokens against the key, and log the texts if configured."""
    for generation in generations:
        generation.close()
    state = _state(request)
    state.rates.spent(request.state.key, sum(len(generation.new_tokens) for generation in generations))
    if state.config.log_prompts and state.loaded is not None:
        for generation in generations:
            end, tokens = generation.request.prompt_length, generation.request.tokens
            texts = (json.dumps(_text(state.loaded, part)) for part in (tokens[:end], tokens[end:]))  # JSON: one line
            _LOG.info("request %s: prompt %s, answer %s", request.state.request_id, *texts)


def _text(service: Service, tokens: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return str(service.tokenizer.decode(list(tokens), skip_special_tokens=False))


def _tokenized(body: TokenizeRequest, service: Service) -> dict[str, Any]:
    check_unknown(body, {"add_generation_prompt": True})
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, one of them", param="prompt", code="invalid_value")
    template = service.limits.template
    if body.messages is None:
        ids = template.text_ids(body.prompt or "", body.add_special_tokens, True)
    else:
        ids = template.render(body.messages, body.tools or (), body.chat_template_kwargs).ids
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.limits.context, "tokens": ids}
    return answer | ({"token_strs": _token_texts(service, ids)} if body.return_token_strs else {})


def _detokenized(body: DetokenizeRequest, service: Service) -> str:
    wrong = next((each for each in body.tokens if each >= service.limits.vocab_size), None)
    if wrong is not None:
        words = f"tokens holds {wrong}: give token ids of 0..{service.limits.vocab_size - 1}"
        raise ApiError(400, words, param="tokens", code="invalid_value")
    return _text(service, body.tokens)


def _token_texts(service: Service, tokens: Sequence[int]) -> list[str]:
    texts = {each: token_text(service.tokenizer, each) for each in set(tokens)}
    return [texts[each] for each in tokens]


class _Stream(EventSourceResponse):
    """A stream of events that cancels its requests however it ends, even before its first event."""

    def __init__(self, parts: AsyncIterator[bytes], request: Request, generations: Sequence[Generation]) -> None:
        config = _state(request).config
        # At a shutdown `Server` cancels the running answers after the grace period: the library only waits for that.
        super().__init__(
            parts, ping=config.keep_alive, sep="\n", send_timeout=config.send_timeout, shutdown_event=anyio.Event(),
            shutdown_grace_period=config.grace + 5,
        )  # fmt: skip
        self._end = functools.partial(_close, request, generations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _LOG.info("a client reads too slowly: its stream is closed")
        finally:
            self._end()


def _check_model(name: str | None, service: Service) -> None:
    if name not in (None, "", service.name, "default"):
        words = f"the model {ascii(name)[:100]} is not served here: this server has {service.name!r}"
        raise ApiError(404, words, param="model", code="model_not_found")


def _model(service: Service) -> dict[str, Any]:
    speed = service.vanilla_tokens_per_s
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "haast",
        "max_model_len": service.limits.context,
        "haast": {
            "drafter": service.drafter,
            "drafters": list(service.limits.drafters),
            "context_length": service.limits.context,
            "vanilla_tokens_per_s": None if speed is None else round(speed, 1),
        },
    }


def _not_offered(path: str, why: str) -> Callable[[], Any]:
    async def absent() -> Any:
        raise ApiError(404, f"{path} is not offered: {why}", code="not_offered")

    return absent


def _id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def _now() -> int:
    return int(time.time())


for path, why in _NOT_OFFERED.items():
    ROUTES.add_api_route(path, _not_offered(path, why), methods=["GET", "POST"], include_in_schema=False)
