"""Request bodies as pydantic models, with the field names of OpenAI, vLLM and Haast.

Owns types, ranges and names. An unsupported field that would change the answer is refused by name (`REFUSED`); an
unknown field is ignored and logged once. `plan` owns the meaning of fields.
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


class _FailFast:
    """Stops validating a list at its first wrong item.

    pydantic would report all of them: a body of 3 MB with a million wrong items took 40 s and 4 GB, and blocked all
    other requests. (pydantic's own FailFast can't be used in a union: it has no hash.)
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return {**handler(source), "fail_fast": True}


Number = Annotated[float, Field(allow_inf_nan=False)]
_Id = Annotated[int, Field(ge=0)]
JsonObject = dict[str, Any]
Items = Annotated[list[Item], _FailFast()]
_MAX_FIELDS = 64  # of an object that allows no unknown fields
_MAX_BIASES = 10_000


def _at_most(most: int, what: str) -> BeforeValidator:
    """Limits the number of names in an object: pydantic would report each wrong one."""

    def checked(value: Any) -> Any:
        if isinstance(value, Mapping) and len(value) > most:
            raise ValueError(f"holds {len(value)} {what}: give {most} at most")
        return value

    return BeforeValidator(checked)


_FEW_FIELDS = _at_most(_MAX_FIELDS, "fields")
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _at_most(_MAX_BIASES, "tokens")]

# Unsupported fields of OpenAI and other servers that would change the answer, with the reason or the replacement.
REFUSED = {
    "audio": "Haast generates text only",
    "beam_width": "beam search is not offered",
    "best_of": "use n: all answers are returned",
    "bad_words": "use logit_bias on their tokens, or a grammar",
    "conversation": "the server stores no conversations: send all messages",
    "allowed_token_ids": "use logit_bias or a grammar",
    "function_call": "use tool_choice, which replaced it",
    "functions": "use tools, which replaced them",
    "guided_grammar": "use grammar or structured_outputs",
    "guided_json": "use response_format or structured_outputs",
    "guided_regex": "use regex or structured_outputs",
    "guided_choice": "use choice or structured_outputs",
    "length_penalty": "beam search is not offered",
    "logits_processors": "the server runs no code of clients",
    "lora": "adapters are not supported",
    "max_tool_calls": "the server runs no tools",
    "mirostat": "use temperature, top_k, top_p and min_p",
    "modalities": "Haast generates text only",
    "previous_response_id": "the server stores no answers: send all messages",
    "prompt_logprobs": "logprobs are given for new tokens only",
    "repeat_penalty": "use repetition_penalty",
    "suffix": "texts are continued at their end only",
    "top_a": "use temperature, top_k, top_p and min_p",
    "typical_p": "use temperature, top_k, top_p and min_p",
    "use_beam_search": "beam search is not offered",
    "verbosity": "the model has no such setting",
    "web_search_options": "the server does not search the web",
}
# Accepted fields without effect: they would not change the answer.
IDLE = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    "background", "include", "truncation", "skip_special_tokens", "spaces_between_special_tokens", "cache_salt",
    "priority", "request_id", "add_special_tokens",
})  # fmt: skip


class Body(BaseModel):
    """Base of bodies that accept unknown fields and keep them in `unknown`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def unknown(self) -> dict[str, Any]:
        """The unknown fields, by name."""
        return dict(self.model_extra or {})


class Strict(BaseModel):
    """Base of objects that allow no unknown fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class HaastFields(Strict):
    """Haast's own fields: drafter, maximum tree size, and trace. The answer's text does not depend on them."""

    drafter: StrictStr | None = None
    max_nodes: Annotated[StrictInt, Field(ge=1)] | None = None
    trace: StrictBool = False


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: StrictBool = False


class Prediction(Strict):
    """Text that the answer is expected to contain (OpenAI's predicted outputs)."""

    type: Literal["content"]
    content: str | Items[TextPart]


class TextPart(Body):
    """One content part of a message."""

    type: StrictStr
    text: StrictStr | None = None


class JsonSchema(Body):
    """A named schema."""

    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Body):
    """Format of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's field for the format of an answer; one of its fields at most."""

    json_: JsonObject | None = Field(default=None, alias="json")
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Items[StrictStr] | None = None
    grammar: StrictStr | None = None


class Sampled(Body):
    """Fields that chat and text completions share."""

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
    stream_options: Annotated[StreamOptions, _FEW_FIELDS] | None = None
    response_format: ResponseFormat | None = None
    regex: StrictStr | None = None
    grammar: StrictStr | None = None
    choice: Items[StrictStr] | None = None
    structured_outputs: Annotated[StructuredOutputs, _FEW_FIELDS] | None = None
    prediction: Annotated[Prediction, _FEW_FIELDS] | None = None
    haast: Annotated[HaastFields, _FEW_FIELDS] = Field(default_factory=HaastFields)


class FunctionCall(Body):
    """Function name and arguments of a tool call in an assistant's message."""

    name: StrictStr
    arguments: StrictStr | JsonObject = ""


class ToolCallMessage(Body):
    """A tool call in an assistant's message; the message with its result repeats its id."""

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
    """Definition of a function that can be called as a tool."""

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
    """A `tool_choice` that requires this tool."""

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
    """One input item of the Responses API."""

    type: StrictStr = "message"
    role: StrictStr | None = None
    content: StrictStr | Items[TextPart] | None = None
    call_id: StrictStr | None = None
    name: StrictStr | None = None
    arguments: StrictStr | None = None
    output: StrictStr | Items[TextPart] | None = None


class TextFormat(Body):
    """Format of a response's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: StrictStr | None = None
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class TextSettings(Strict):
    """Text options of the Responses API."""

    format: TextFormat = Field(default_factory=TextFormat)


class ResponseTool(Body):
    """A function tool of the Responses API."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: StrictStr | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class NamedResponseTool(Body):
    """A `tool_choice` of the Responses API that requires this tool."""

    type: Literal["function"]
    name: StrictStr


class Reasoning(Body):
    """Reasoning options of the Responses API."""

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
    text: Annotated[TextSettings, _FEW_FIELDS] = Field(default_factory=TextSettings)
    tools: Items[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: StrictBool = True
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    store: StrictBool | None = None
    haast: Annotated[HaastFields, _FEW_FIELDS] = Field(default_factory=HaastFields)


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
