"""Answer generation by a server: any OpenAI-compatible endpoint that runs the target (vLLM, SGLang, llama.cpp).

Owns the requests (rate, retries, when to give up) and the conversion of replies into answers. The `openai` package
implements the protocol and the waiting after 429, 5xx, timeouts and lost connections (`Retry-After` included). Only the
target's tokenizer is needed here. Replies are not trusted: their structure, the prompt's token ids and the answer's
token ids are checked. If the server returns token ids (vLLM) they are stored; otherwise its text is tokenised again and
the record has `retokenised`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from haast.errors import check_at_least
from haast.training.chat import alternating, end_of_turn
from haast.training.generation_queue import AnswerRun, Outcome, Question

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

_MAX_REPLIES = 3  # requests for one prompt while the replies are not usable chat completions
_CONNECT_TIMEOUT = 10.0  # seconds
_MAX_FAILURES = 8  # consecutive failures, or refusals before any answer, that end a run
# Turn off sampling defaults of the server that would change the distribution.
_UNCHANGED_SAMPLING: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class NoAnswerError(Exception):
    """One prompt got no answer; others may. `refused`: the server rejected the prompt, so a retry is useless."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True)
class EndpointConfig:
    """A server and how to send requests to it.

    Args:
        url: of the server, with or without /v1.
        model: the target's name on the server; None asks the server, which must then serve one model only.
        api_key: None if the server needs none.
        concurrency: maximum requests in flight.
        rate: maximum requests per second, retries included; None is no limit.
        timeout: seconds per answer.
        retries: of one request, with growing waits.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 32
    rate: float | None = None
    timeout: float = 600.0
    retries: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint={self.url!r} is not a URL: give one like http://localhost:8000/v1")
        check_at_least("concurrency", self.concurrency)
        check_at_least("retries", self.retries, 0)
        for name in ("rate", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is not allowed: give a value above 0")

    @property
    def base(self) -> str:
        """The base URL, to which /chat/completions is appended."""
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"


def check_installed() -> None:
    """Raise ValueError if the `openai` package is missing."""
    if importlib.util.find_spec("openai") is None:
        raise ValueError('--endpoint needs the openai package, which is not installed: pip install "haast[endpoint]"')


def regenerate_from_endpoint(run: AnswerRun, end_ids: Sequence[int], endpoint: EndpointConfig) -> Outcome:
    """Let a server answer every prompt's turns.

    Args:
        run: the prompts and the answers file; its tokenizer has a chat template.
        end_ids: tokens that end the target's answers.
        endpoint: the server.

    Returns:
        The counts; refused prompts (HTTP 400, for example too long) count as failed.

    Raises:
        ValueError: no `openai` package, a wrong URL, model or key, a server that stopped answering, that uses another
            chat template or splits reasoning from answers, or an error of `AnswerRun`.
    """
    check_installed()
    if run.tokenizer.chat_template is None:
        raise ValueError(f"{run.name} has no chat template, but --endpoint needs one: set tokenizer.chat_template")
    with run:
        workers = _RequestWorkers(run, end_ids, endpoint)
        try:
            asyncio.run(workers.run_all())
        except ExceptionGroup as group:  # of all workers; the first one is the cause
            raise group.exceptions[0] from group
    return run.outcome(workers.failed, workers.last_error)


class _RequestWorkers:
    """Concurrent workers that send requests until no question is left."""

    def __init__(self, run: AnswerRun, end_ids: Sequence[int], endpoint: EndpointConfig) -> None:
        self._run, self._endpoint = run, endpoint
        end = end_of_turn(run.tokenizer)
        self._end = end if end is not None else next(iter(end_ids), None)
        self._ends = {*end_ids, self._end}
        self._extra = _UNCHANGED_SAMPLING | {"return_token_ids": True}
        if run.config.thinking is not None:
            self._extra["chat_template_kwargs"] = {"enable_thinking": run.config.thinking}
        self._model = endpoint.model or ""
        self._consecutive_failures = self.failed = 0
        self.last_error = ""

    async def run_all(self) -> None:
        """Send all questions. Raises ValueError (in a group) if every further request would fail too."""
        import openai

        limiter = _RateLimiter(self._endpoint.rate)
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [limiter.wait]})
        async with openai.AsyncOpenAI(
            base_url=self._endpoint.base,
            api_key=self._endpoint.api_key or "none",
            timeout=openai.Timeout(self._endpoint.timeout, connect=_CONNECT_TIMEOUT),
            max_retries=self._endpoint.retries,
            http_client=http,
        ) as client:
            self._model = await self._resolve_model(client)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._endpoint.concurrency, self._run.questions.total)):
                    group.create_task(self._work(client))

    async def _resolve_model(self, client: openai.AsyncOpenAI) -> str:
        """The model's name on the server; also checks that the server is up and accepts the key."""
        import openai

        try:
            served = [model.id async for model in client.with_options(max_retries=2).models.list()]
        except openai.APIConnectionError as error:
            raise ValueError(
                f"no server answers at {self._endpoint.base} ({error}): start it or check the URL"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._wrong_key(error) from error
        except (openai.APIError, ValueError, TypeError):  # a server without /models
            served = []
        if self._endpoint.model is None and len(served) != 1:
            raise ValueError(
                f"{self._endpoint.base} serves {', '.join(served) or 'models that it does not list'}: choose one with "
                f"--endpoint-model"
            )
        return self._endpoint.model or served[0]

    async def _work(self, client: openai.AsyncOpenAI) -> None:
        while (item := self._run.take()) is not None:
            question, prompt, _ = item
            try:
                self._store_answer(await self._request_usable(client, question), question, prompt)
                self._consecutive_failures = 0
            except NoAnswerError as failure:
                self._count_failure(failure)

    def _store_answer(self, completion: ChatCompletion, question: Question, prompt: list[int]) -> None:
        """Store a completion's answer; an answer that finished by itself gets the end-of-turn token.

        Raises:
            NoAnswerError: the answer is empty.
            ValueError: the server runs another model or template, or splits reasoning from the answer.
        """
        choice, tokenizer, name = completion.choices[0], self._run.tokenizer, self._run.name
        text, finished = choice.message.content or "", choice.finish_reason == "stop"
        token_ids: list[int] | None = (choice.model_extra or {}).get("token_ids")
        if token_ids:
            prompt_ids = (completion.model_extra or {}).get("prompt_token_ids")
            if prompt_ids is not None and list(prompt_ids) != prompt:
                raise ValueError(
                    f"the endpoint encodes prompt {question.id!r} as {len(prompt_ids)} tokens, which differ from the "
                    f"{len(prompt)} of {name}: serve the target itself, with its own chat template"
                )
            tokens = [int(i) for i in token_ids]
            if max(tokens) >= len(tokenizer):
                raise ValueError(
                    f"the endpoint answers with token {max(tokens)}, but the vocabulary of {name} has "
                    f"{len(tokenizer)}: serve the target itself"
                )
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        else:
            fields = choice.message.model_extra or {}
            if fields.get("reasoning_content") or fields.get("reasoning"):
                raise ValueError(
                    "the endpoint splits the reasoning from the answer, so the target's own text is lost: serve it "
                    "without a reasoning parser, or use --no-thinking"
                )
            tokens = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        if finished and self._end is not None and (not tokens or tokens[-1] not in self._ends):
            tokens.append(self._end)
        if not tokens:
            raise NoAnswerError("the answer is empty")
        more = {"endpoint_model": self._model, **({} if token_ids else {"retokenised": True})}
        self._run.keep(question, text, tokens, finished, **more)

    def _count_failure(self, failure: NoAnswerError) -> None:
        """Count a prompt without an answer. Raises ValueError after too many of them."""
        self.failed, self.last_error = self.failed + 1, str(failure)
        self._consecutive_failures += not failure.refused
        answered = self._run.added or self._run.questions.before
        never = failure.refused and not answered and self.failed >= _MAX_FAILURES
        if self._consecutive_failures >= _MAX_FAILURES or never:
            raise ValueError(
                f"{self._endpoint.base} left {self.failed} prompts without an answer, the last because: {failure}; "
                f"finished answers are kept: fix the server or the settings and run again"
            )

    async def _request_usable(self, client: openai.AsyncOpenAI, question: Question) -> ChatCompletion:
        """A usable completion. Raises NoAnswerError if this prompt failed, ValueError if all prompts would fail."""
        problem = ""
        for _ in range(_MAX_REPLIES):
            completion = await self._request(client, question)
            problem = _reply_problem(completion)
            if completion is not None and not problem:
                return completion
        raise NoAnswerError(problem)

    async def _request(self, client: openai.AsyncOpenAI, question: Question) -> ChatCompletion | None:
        """The server's completion; None if the reply is not one. Settings that it does not know are dropped."""
        import openai

        messages: Any = alternating(question.turns)
        while True:
            extra = dict(self._extra)  # another worker may remove settings meanwhile
            try:
                return await client.chat.completions.create(
                    model=self._model,
                    messages=messages,
                    temperature=self._run.config.temperature(question.index),
                    top_p=1.0,
                    max_tokens=self._run.config.length(question.index),
                    seed=question.seed(self._run.config.seed),
                    extra_body=extra,
                )
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise self._wrong_key(error) from error
            except openai.NotFoundError as error:
                raise ValueError(
                    f"{self._endpoint.base} does not serve {self._model!r} ({_one_line(error)}): give the name on the "
                    f"server with --endpoint-model, and check the URL"
                ) from error
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                raise NoAnswerError(f"no answer after {self._endpoint.retries} retries ({_one_line(error)})") from error
            except openai.APIStatusError as error:
                unknown = [name for name in extra if name in str(error)]
                if "chat_template_kwargs" in unknown:  # without it the answers would not match the record's `thinking`
                    raise ValueError(
                        f"{self._endpoint.base} does not accept chat_template_kwargs ({_one_line(error)}), so thinking "
                        f"cannot be set: leave --thinking or --no-thinking out, or use another server"
                    ) from error
                if not unknown:
                    raise NoAnswerError(f"refused ({_one_line(error)})", refused=True) from error
                for name in unknown:
                    self._extra.pop(name, None)
            except (openai.APIError, ValueError):  # the body is not JSON, or not a completion
                return None

    def _wrong_key(self, error: openai.APIStatusError) -> ValueError:
        return ValueError(
            f"{self._endpoint.base} does not accept the key ({_one_line(error)}): put the right one into an "
            f"environment variable and give its name with --api-key-env"
        )


def _reply_problem(completion: ChatCompletion | None) -> str:
    """Why a reply is unusable; empty if it is usable. The `openai` package does not validate replies."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return "the reply is no chat completion"
    if not isinstance(choices[0].message.content, str | None):
        return "the reply's content is not a string"
    if choices[0].finish_reason not in ("stop", "length"):
        return f"the answer has finish_reason {choices[0].finish_reason!r}"
    return ""


class _RateLimiter:
    """Sends a request every 1/rate seconds. Hooked into the HTTP client, so that retries wait too."""

    def __init__(self, rate: float | None) -> None:
        self._gap, self._next = 0.0 if rate is None else 1 / rate, 0.0

    async def wait(self, _request: object) -> None:
        """Sleep until this request may be sent."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self._gap
        await asyncio.sleep(start - now)


def _one_line(error: Exception) -> str:
    """An error message on one line, cut at 300 characters."""
    return " ".join(str(error).split())[:300]
