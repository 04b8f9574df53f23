"""The clients that people have (openai-python, httpx, langchain) against real sockets: what they read is the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx2
import openai
import pytest

pytest.importorskip("langchain_openai", reason="the clients come with haast[dev]")

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from serving import NAME, served, tiny_service

from haast.serving.config import ServeConfig
from haast.serving.service import Service

ASK: Any = [{"role": "user", "content": "Tell me of the sky."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    """What the parse helper makes a schema of."""

    name: str = Field(max_length=12)
    kind: Literal["cat", "dog"]
    ages: list[int] = Field(max_length=3)


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service(config=ServeConfig(api_key="secret-1"))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="secret-1", max_retries=0) as made:
        yield made


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=NAME, messages=ASK, seed=3, max_tokens=24, logprobs=True, top_logprobs=2
    )
    stream = client.chat.completions.create(
        model=NAME, messages=ASK, seed=3, max_tokens=24, logprobs=True, top_logprobs=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    text, logprobs, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            logprobs += choice.logprobs.content or [] if choice.logprobs else []
    assert text == whole.choices[0].message.content and whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    told = [entry.token for entry in whole.choices[0].logprobs.content]
    assert [entry.token for entry in logprobs] == told and len(told) == 24
    assert usage is not None and whole.usage is not None
    assert (usage.completion_tokens, usage.total_tokens) == (24, whole.usage.total_tokens)


def test_the_parse_helper(client: openai.OpenAI) -> None:
    for seed in range(5):
        made = client.chat.completions.parse(
            model=NAME, messages=ASK, seed=seed, max_tokens=200, temperature=1.0, response_format=Person
        )
        found = made.choices[0].message.parsed
        assert isinstance(found, Person) and len(found.ages) <= 3


def test_the_streaming_helper_with_a_schema(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=NAME, messages=ASK, seed=1, max_tokens=200, response_format=Person
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    settings: Any = {
        "model": NAME, "messages": ASK, "seed": 5, "max_tokens": 200, "tools": [WEATHER], "tool_choice": choice,
        "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].finish_reason == "tool_calls"
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function" and set(json.loads(call.function.arguments)) == {"place", "unit"}
    names, arguments = [], ""
    for chunk in client.chat.completions.create(**settings, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.function is not None
            names += [part.function.name] if part.function.name else []
            arguments += part.function.arguments or ""
    assert (names, arguments) == (["get_weather"], call.function.arguments)
    back: Any = [
        *ASK,
        whole.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "cloudy"},
    ]
    again = client.chat.completions.create(model=NAME, messages=back, tools=[WEATHER], max_tokens=4, seed=1)
    assert again.choices[0].finish_reason in ("length", "stop", "tool_calls")


def test_completions_with_choices(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=NAME, prompt=["The sky", "A tree"], n=2, seed=4, max_tokens=6, logprobs=2, echo=False, temperature=1.0
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text != made.choices[1].text, "choices are distinct"
    again = client.completions.create(model=NAME, prompt="A tree", n=2, seed=4, max_tokens=6, temperature=1.0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in made.choices[2:]]
    assert made.choices[0].logprobs is not None and len(made.choices[0].logprobs.tokens or []) == 6


def test_predicted_outputs(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=NAME, messages=ASK, seed=2, max_tokens=30, temperature=0)
    text = first.choices[0].message.content or ""
    expected: Any = {"type": "content", "content": text}
    again = client.chat.completions.create(
        model=NAME, messages=ASK, seed=2, max_tokens=30, temperature=0, prediction=expected,
        extra_body={"haast": {"drafter": "suffix"}},
    )  # fmt: skip
    assert again.choices[0].message.content == text and again.usage is not None
    details = again.usage.completion_tokens_details
    assert details is not None and details.accepted_prediction_tokens is not None
    assert details.accepted_prediction_tokens > 10  # random text is tokenised otherwise than it was written
    told: Any = again.usage.model_dump()["haast"]
    assert told["tau"] > 1.5, "the prediction was drafted"


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=NAME, input="Tell me.", max_output_tokens=16, temperature=0, store=False)
    assert whole.status == "incomplete" and whole.output_text and whole.usage is not None
    text, kinds = "", []
    with client.responses.stream(model=NAME, input="Tell me.", max_output_tokens=16, temperature=0) as stream:
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    parsed = client.responses.parse(
        model=NAME, input="A person.", text_format=Person, max_output_tokens=200, extra_body={"seed": 3}
    )
    assert isinstance(parsed.output_parsed, Person)
    flat: Any = {"type": "function", **{k: WEATHER["function"][k] for k in ("name", "parameters", "strict")}}
    called = client.responses.create(
        model=NAME, input="Weather?", tools=[flat], tool_choice="required", max_output_tokens=200, temperature=0,
        parallel_tool_calls=False,
    )  # fmt: skip
    assert [item.type for item in called.output] == ["function_call"]


def test_asynchronous_clients_side_by_side(url: str) -> None:
    async def ask() -> tuple[list[str | None], list[str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="secret-1", max_retries=0) as client:

            async def whole(seed: int) -> str | None:
                made = await client.chat.completions.create(
                    model=NAME, messages=ASK, seed=seed, max_tokens=12, temperature=1.0
                )
                return made.choices[0].message.content

            async def streamed(seed: int) -> str:
                text = ""
                async for chunk in await client.chat.completions.create(
                    model=NAME, messages=ASK, seed=seed, max_tokens=12, temperature=1.0, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            both = await asyncio.gather(*(whole(seed) for seed in range(8)), *(streamed(seed) for seed in range(8)))
            return list(both[:8]), [str(text) for text in both[8:]]

    wholes, streams = asyncio.run(ask())
    assert wholes == streams and len(set(wholes)) > 4


def test_errors_are_the_clients_own(url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-9", messages=ASK)
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 2048 tokens.*4000"):
        client.chat.completions.create(model=NAME, messages=ASK, max_tokens=4000)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=ASK, extra_body={"beam_width": 4})
    assert refused.value.param == "beam_width"
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(model=NAME, messages=ASK, temperature="hot")  # type: ignore[call-overload]
    with (
        openai.OpenAI(base_url=url, api_key="other", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_models_and_tokens_by_httpx(url: str) -> None:
    head = {"Authorization": "Bearer secret-1", "X-Request-Id": "mine-7"}
    with httpx2.Client(base_url=url.removesuffix("/v1"), headers=head) as http:
        listed = http.get("/v1/models")
        assert listed.headers["x-request-id"] == "mine-7" and listed.json()["data"][0]["id"] == NAME
        ids = http.post("/tokenize", json={"prompt": "The sky is blue."}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The sky is blue."}
        talk = http.post("/tokenize", json={"messages": ASK}).json()
        assert talk["count"] == len(talk["tokens"]) > len(ids)
        assert "haast:generation_tokens_total" in http.get("/metrics").text
        assert http.get("/health").json()["status"] == "ok"


def test_langchain(url: str) -> None:
    @tool
    def get_weather(place: Literal["here", "there"]) -> str:
        """The weather of a place."""
        return place

    chat = ChatOpenAI(base_url=url, api_key="secret-1", model=NAME, temperature=0, max_tokens=64, seed=1)  # type: ignore[arg-type, call-arg]
    whole = chat.invoke([HumanMessage("Tell me.")])
    assert "".join(str(part.content) for part in chat.stream([HumanMessage("Tell me.")])) == whole.content
    structured = chat.with_structured_output(Person, method="json_schema").invoke("A person.")
    assert isinstance(structured, Person)
    called = chat.bind_tools([get_weather], tool_choice="required", strict=True).invoke([HumanMessage("Weather?")])
    assert isinstance(called, AIMessage) and called.tool_calls[0]["name"] == "get_weather"
    answered = chat.invoke(
        [HumanMessage("Weather?"), called, *(ToolMessage("fine", tool_call_id=c["id"]) for c in called.tool_calls)]
    )
    assert isinstance(answered.content, str)
