"""A server answers prompts in the target's place: any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp).

Owns requests: their pace, what is tried again, and when to stop; and what of a reply becomes an answer. The `openai`
package does the protocol, and the waiting after 429, 5xx, timeouts and lost connections (`Retry-After` included). The
server must run the target itself; only the target's tokenizer is needed here. Replies are mistrusted: they are checked
for shape, for the target's own prompt, and for tokens that the target knows. Where the server tells token ids (vLLM)
they are taken, else its text is tokenised again and the record says `retokenised`.
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

_TRIES = 3  # of a reply that is no chat completion
_CONNECT = 10.0  # seconds that a server may take to pick up
_GIVE_UP = 8  # failures in a row, or refusals before any answer, that end a run
# Servers have sampling defaults of their own; without these, answers would be of another distribution than asked for.
_PLAIN_SAMPLING: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class NoAnswerError(Exception):
    """One prompt got no answer; others may. `refused`: the server said that this prompt never will."""

    def __init__(self, words: str, refused: bool = False) -> None:
        super().__init__(words)
        self.refused = refused


@dataclass(frozen=True)
class EndpointConfig:
    """Where answers come from.

    Args:
        url: of the server, with or without /v1.
        model: its name there; None asks the server, which must then serve one model only.
        api_key: None where the server wants none.
        concurrency: requests in flight at a time.
        rate: requests a second at most, repeated ones included; None is no limit.
        timeout: seconds that one answer may take.
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
            raise ValueError(f"endpoint={self.url!r} is no address: give one like http://localhost:8000/v1")
        check_at_least("concurrency", self.concurrency)
        check_at_least("retries", self.retries, 0)
        for name in ("rate", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is not allowed: give a value above 0")

    @property
    def base(self) -> str:
        """The address below which /chat/completions lies."""
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"


def check_installed() -> None:
    """Raises ValueError where the `openai` package is missing."""
    if importlib.util.find_spec("openai") is None:
        raise ValueError('--endpoint needs the openai package, which is not installed: pip install "haast[endpoint]"')


def regenerate_from_endpoint(run: AnswerRun, end_ids: Sequence[int], endpoint: EndpointConfig) -> Outcome:
    """Let a server answer every prompt's turns.

    Args:
        run: what is asked, and where answers go; its tokenizer has a chat template.
        end_ids: tokens that end the target's answers.
        endpoint: the server.

    Returns:
        The counts; refused prompts (400: too long, say) are among the failed.

    Raises:
        ValueError: no `openai` package, a wrong address, model or key, a server that stopped answering, one whose chat
            template is another or that parts reasoning from answers, or what `AnswerRun` refuses.
    """
    check_installed()
    if run.tokenizer.chat_template is None:
        raise ValueError(f"{run.name} has no chat template, but an endpoint answers chats: set tokenizer.chat_template")
    with run:
        asking = _Asking(run, end_ids, endpoint)
        try:
            asyncio.run(asking.everything())
        except ExceptionGroup as group:  # of the workers; the first one's is what went wrong
            raise group.exceptions[0] from group
    return run.outcome(asking.failed, asking.complaint)


class _Asking:
    """Workers that ask until no question is left."""

    def __init__(self, run: AnswerRun, end_ids: Sequence[int], endpoint: EndpointConfig) -> None:
        self._run, self._endpoint = run, endpoint
        end = end_of_turn(run.tokenizer)
        self._end = end if end is not None else next(iter(end_ids), None)
        self._ends = {*end_ids, self._end}
        self._extra = _PLAIN_SAMPLING | {"return_token_ids": True}
        if run.config.thinking is not None:
            self._extra["chat_template_kwargs"] = {"enable_thinking": run.config.thinking}
        self._model = endpoint.model or ""
        self._in_a_row = self.failed = 0
        self.complaint = ""

    async def everything(self) -> None:
        """Ask all questions. Raises ValueError (in a group) where going on makes no sense."""
        import openai

        pace = _Pace(self._endpoint.rate)
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [pace.wait]})
        async with openai.AsyncOpenAI(
            base_url=self._endpoint.base,
            api_key=self._endpoint.api_key or "none",
            timeout=openai.Timeout(self._endpoint.timeout, connect=_CONNECT),
            max_retries=self._endpoint.retries,
            http_client=http,
        ) as client:
            self._model = await self._served(client)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._endpoint.concurrency, self._run.questions.total)):
                    group.create_task(self._work(client))

    async def _served(self, client: openai.AsyncOpenAI) -> str:
        """The model to ask for; also finds out at once whether anybody answers, and takes the key."""
        import openai

        try:
            served = [model.id async for model in client.with_options(max_retries=2).models.list()]
        except openai.APIConnectionError as error:
            raise ValueError(f"nothing answers at {self._endpoint.base} ({error}): is the server up?") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._wrong_key(error) from error
        except (openai.APIError, ValueError, TypeError):  # a server that keeps no list
            served = []
        if self._endpoint.model is None and len(served) != 1:
            raise ValueError(
                f"{self._endpoint.base} serves {', '.join(served) or 'models that it does not name'}: say which with "
                f"--endpoint-model"
            )
        return self._endpoint.model or served[0]

    async def _work(self, client: openai.AsyncOpenAI) -> None:
        while (asked := self._run.take()) is not None:
            question, prompt, _ = asked
            try:
                self._keep(await self._ask(client, question), question, prompt)
                self._in_a_row = 0
            except NoAnswerError as failure:
                self._count(failure)

    def _keep(self, completion: ChatCompletion, question: Question, prompt: list[int]) -> None:
        """Store the answer in a usable completion; the end-of-turn token is put after what ended by itself.

        Raises:
            NoAnswerError: there is nothing in it.
            ValueError: the server runs another model or template, or keeps the reasoning apart.
        """
        choice, tokenizer, name = completion.choices[0], self._run.tokenizer, self._run.name
        text, finished = choice.message.content or "", choice.finish_reason == "stop"
        told: list[int] | None = (choice.model_extra or {}).get("token_ids")
        if told:
            theirs = (completion.model_extra or {}).get("prompt_token_ids")
            if theirs is not None and list(theirs) != prompt:
                raise ValueError(
                    f"the endpoint makes {len(theirs)} tokens of prompt {question.id!r}, {name} makes other "
                    f"{len(prompt)} of it: serve the target itself, with its own chat template"
                )
            tokens = [int(i) for i in told]
            if max(tokens) >= len(tokenizer):
                raise ValueError(
                    f"the endpoint answers with token {max(tokens)}, the tokenizer of {name} knows {len(tokenizer)}: "
                    f"serve the target itself"
                )
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        else:
            said = choice.message.model_extra or {}
            if said.get("reasoning_content") or said.get("reasoning"):
                raise ValueError(
                    "the endpoint parts the reasoning from the answer, so the target's own text is lost: serve it "
                    "without a reasoning parser, or ask with --no-thinking"
                )
            tokens = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        if finished and self._end is not None and (not tokens or tokens[-1] not in self._ends):
            tokens.append(self._end)
        if not tokens:
            raise NoAnswerError("the answer is empty")
        more = {"endpoint_model": self._model, **({} if told else {"retokenised": True})}
        self._run.keep(question, text, tokens, finished, **more)

    def _count(self, failure: NoAnswerError) -> None:
        """Account a prompt without an answer; raises ValueError where there is no end of them."""
        self.failed, self.complaint = self.failed + 1, str(failure)
        self._in_a_row += not failure.refused
        answered = self._run.added or self._run.questions.before
        never = failure.refused and not answered and self.failed >= _GIVE_UP
        if self._in_a_row >= _GIVE_UP or never:
            raise ValueError(
                f"{self._endpoint.base} left {self.failed} prompts without an answer, the last because: {failure}; "
                f"finished answers are kept: mend the server or the settings and run again"
            )

    async def _ask(self, client: openai.AsyncOpenAI, question: Question) -> ChatCompletion:
        """A usable completion. Raises NoAnswerError for this prompt alone, ValueError where all would fail."""
        problem = ""
        for _ in range(_TRIES):
            completion = await self._request(client, question)
            problem = _why_unusable(completion)
            if completion is not None and not problem:
                return completion
        raise NoAnswerError(problem)

    async def _request(self, client: openai.AsyncOpenAI, question: Question) -> ChatCompletion | None:
        """The server's words; None where they are no completion. Settings that it doesn't know are not sent again."""
        import openai

        messages: Any = alternating(question.turns)
        while True:
            extra = dict(self._extra)  # another worker may take names out meanwhile
            try:
                return await client.chat.completions.create(
                    model=self._model,
                    messages=messages,
                    temperature=self._run.config.temperature(question.index),
                    top_p=1.0,
                    max_tokens=self._run.config.max_new_tokens,
                    seed=question.seed(self._run.config.seed),
                    extra_body=extra,
                )
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise self._wrong_key(error) from error
            except openai.NotFoundError as error:
                raise ValueError(
                    f"{self._endpoint.base} does not serve {self._model!r} ({_words(error)}): give the name that it "
                    f"serves with --endpoint-model, and check the address"
                ) from error
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                raise NoAnswerError(f"no answer after {self._endpoint.retries} retries ({_words(error)})") from error
            except openai.APIStatusError as error:
                unknown = [name for name in extra if name in str(error)]
                if "chat_template_kwargs" in unknown:  # without it the answers would be of another kind than they say
                    raise ValueError(
                        f"{self._endpoint.base} does not take chat_template_kwargs ({_words(error)}), so thinking "
                        f"cannot be set there: leave --thinking or --no-thinking out, or use another server"
                    ) from error
                if not unknown:
                    raise NoAnswerError(f"refused ({_words(error)})", refused=True) from error
                for name in unknown:
                    self._extra.pop(name, None)
            except (openai.APIError, ValueError):  # a body that is no JSON, or none of a completion
                return None

    def _wrong_key(self, error: openai.APIStatusError) -> ValueError:
        return ValueError(
            f"{self._endpoint.base} does not take the key ({_words(error)}): put the right one into an environment "
            f"variable and name it with --api-key-env"
        )


def _why_unusable(completion: ChatCompletion | None) -> str:
    """Why a reply is no answer; empty where it is one. The `openai` package does not check what servers send."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return "the reply is no chat completion"
    if not isinstance(choices[0].message.content, str | None):
        return "the reply's content is no text"
    if choices[0].finish_reason not in ("stop", "length"):
        return f"the answer ended by {choices[0].finish_reason!r}"
    return ""


class _Pace:
    """Lets a request pass every 1/rate seconds. Hooked into the HTTP client, so that repeated ones wait too."""

    def __init__(self, rate: float | None) -> None:
        self._gap, self._next = 0.0 if rate is None else 1 / rate, 0.0

    async def wait(self, _request: object) -> None:
        """Sleep until it is this request's turn."""
        now = asyncio.get_running_loop().time()
        at = max(now, self._next)
        self._next = at + self._gap
        await asyncio.sleep(at - now)


def _words(error: Exception) -> str:
    """An error on one line of bearable length."""
    return " ".join(str(error).split())[:300]
