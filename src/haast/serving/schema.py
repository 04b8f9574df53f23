"""What clients may send: the bodies of requests, as OpenAI, vLLM and Haast itself name their fields.

Owns types, ranges and names. A field that would change the answer and is not supported is refused by name (`refused`);
one that nobody knows is left out and told once in the log. What fields mean is `plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import CoreSchema

Item = TypeVar("Item")


class _FirstWrong:
    """The first wrong item ends the reading of a list.

    pydantic would describe all of them otherwise: a body of 3 MB with a million wrong items took 40 s and 4 GB, in
    which nobody was answered. (Its own FailFast can't stand in a union: it has no hash.)
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return {**handler(source), "fail_fast": True}


Number = Annotated[float, Field(allow_inf_nan=False)]
_Id = Annotated[int, Field(ge=0)]
JsonObject = dict[str, Any]
Items = Annotated[list[Item], _FirstWrong()]
_MOST_FIELDS = 64  # of a part that knows all of its fields
_MOST_BIASES = 10_000


def _at_most(most: int, what: str) -> BeforeValidator:
    """An object of so many names at most: each wrong one would be described too."""

    def checked(value: Any) -> Any:
        if isinstance(value, Mapping) and len(value) > most:
            raise ValueError(f"holds {len(value)} {what}: give {most} at most")
        return value

    return BeforeValidator(checked)


_FEW = _at_most(_MOST_FIELDS, "fields")
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _at_most(_MOST_BIASES, "tokens")]

# Fields of OpenAI's and of other servers that would change an answer, and why they are not here.
REFUSED = {
    "audio": "Haast answers in text",
    "beam_width": "beam search is not offered",
    "best_of": "all answers are returned: ask for n of them",
    "bad_words": "words are barred by logit_bias on their tokens, or by a grammar",
    "conversation": "the server keeps no conversations: send all messages",
    "allowed_token_ids": "say it by logit_bias or a grammar",
    "function_call": "it was replaced by tool_choice",
    "functions": "they were replaced by tools",
    "guided_grammar": "it is called grammar here, or structured_outputs",
    "guided_json": "it is called response_format here, or structured_outputs",
    "guided_regex": "it is called regex here, or structured_outputs",
    "guided_choice": "it is called choice here, or structured_outputs",
    "length_penalty": "beam search is not offered",
    "logits_processors": "code from clients is not run",
    "lora": "adapters are not offered",
    "max_tool_calls": "the server runs no tools",
    "mirostat": "it is not offered: temperature, top_k, top_p and min_p are",
    "modalities": "Haast answers in text",
    "previous_response_id": "the server keeps no answers: send all messages",
    "prompt_logprobs": "logprobs are of new tokens",
    "repeat_penalty": "it is called repetition_penalty here",
    "suffix": "texts are continued at their end alone",
    "top_a": "it is not offered: temperature, top_k, top_p and min_p are",
    "typical_p": "it is not offered: temperature, top_k, top_p and min_p are",
    "use_beam_search": "beam search is not offered",
    "verbosity": "the model has no such setting",
    "web_search_options": "the server searches nothing",
}
# Fields that change no word of an answer.
IDLE = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    "background", "include", "truncation", "skip_special_tokens", "spaces_between_special_tokens", "cache_salt",
    "priority", "request_id", "add_special_tokens",
})  # fmt: skip


class Body(BaseModel):
    """Any body: what it does not know is kept aside, see `unknown`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields that are not among its own."""
        return dict(self.model_extra or {})


class Strict(BaseModel):
    """A part of a body that knows all of its fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class HaastFields(Strict):
    """How a request's drafts are steered and shown; its answer does not depend on it."""

    drafter: StrictStr | None = None
    max_nodes: Annotated[StrictInt, Field(ge=1)] | None = None
    trace: StrictBool = False


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: StrictBool = False


class Prediction(Strict):
    """Text that the answer is expected to hold (OpenAI's predicted outputs)."""

    type: Literal["content"]
    content: str | Items[TextPart]


class TextPart(Body):
    """A part of a message."""

    type: StrictStr
    text: StrictStr | None = None


class JsonSchema(Body):
    """A named schema."""

    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's name for a form of an answer; one of them."""

    json_: JsonObject | None = Field(default=None, alias="json")
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Items[StrictStr] | None = None
    grammar: StrictStr | None = None


class Sampled(Body):
    """The fields that all kinds of answers share."""

    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    seed: StrictInt | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: StrictStr | Items[StrictStr] | None = None
    stop_token_ids: Items[_Id] | None = None
    include_stop_str_in_output: StrictBool = False
    ignore_eos: StrictBool = False
    min_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    stream: StrictBool | None = None
    stream_options: Annotated[StreamOptions, _FEW] | None = None
    response_format: ResponseFormat | None = None
    regex: StrictStr | None = None
    grammar: StrictStr | None = None
    choice: Items[StrictStr] | None = None
    structured_outputs: Annotated[StructuredOutputs, _FEW] | None = None
    prediction: Annotated[Prediction, _FEW] | None = None
    haast: Annotated[HaastFields, _FEW] = Field(default_factory=HaastFields)


class FunctionCall(Body):
    """A call in an assistant's message."""

    name: StrictStr
    arguments: StrictStr | JsonObject = ""


class ToolCallMessage(Body):
    """A call in an assistant's message, with the id by which its result is told."""

    id: StrictStr | None = None
    type: StrictStr = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Items[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: Items[ToolCallMessage] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None


class Function(Body):
    """What a tool is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: StrictStr | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class Tool(Body):
    """A function that the model may call; the client runs it."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a tool."""

    name: StrictStr


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    """Body of /v1/chat/completions."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool = True
    reasoning_effort: StrictStr | None = None
    chat_template_kwargs: JsonObject | None = None


class CompletionRequest(Sampled):
    """Body of /v1/completions."""

    prompt: StrictStr | Items[StrictStr] | Items[StrictInt] | Items[Items[StrictInt]]
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class InputItem(Body):
    """One item of a response's input."""

    type: StrictStr = "message"
    role: StrictStr | None = None
    content: StrictStr | Items[TextPart] | None = None
    call_id: StrictStr | None = None
    name: StrictStr | None = None
    arguments: StrictStr | None = None
    output: StrictStr | Items[TextPart] | None = None


class TextFormat(Body):
    """The form of a response's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: StrictStr | None = None
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class TextSettings(Strict):
    """How a response's text is written."""

    format: TextFormat = Field(default_factory=TextFormat)


class ResponseTool(Body):
    """A function that a response may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: StrictStr | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class NamedResponseTool(Body):
    """The tool that a response has to call."""

    type: Literal["function"]
    name: StrictStr


class Reasoning(Body):
    """How much a response reasons."""

    effort: StrictStr | None = None


class ResponsesRequest(Body):
    """Body of /v1/responses; stateless."""

    model: StrictStr | None = None
    input: StrictStr | Items[InputItem]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    stream: StrictBool | None = None
    text: Annotated[TextSettings, _FEW] = Field(default_factory=TextSettings)
    tools: Items[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: StrictBool = True
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    store: StrictBool | None = None
    haast: Annotated[HaastFields, _FEW] = Field(default_factory=HaastFields)


class TokenizeRequest(Body):
    """Body of /tokenize: a text, or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Items[ChatMessage] | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False
    chat_template_kwargs: JsonObject | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: StrictStr | None = None
    tokens: Items[_Id]
