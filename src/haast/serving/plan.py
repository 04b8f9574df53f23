"""Turns a request body into a `Plan`: every field checked, tokens and grammars made, nothing started.

Owns the meaning of fields, their defaults, and which can be combined. Knows the model's tokenizer, template and limits
through `ModelLimits`; runs nothing.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from haast.core import SamplingParams
from haast.serving.api_errors import ApiError, TooLongError, refused
from haast.serving.conversation import LETTERS, ChatTemplate, joined
from haast.serving.reasoning import ReasoningMarks
from haast.serving.schema import (
    IDLE,
    REFUSED,
    Body,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    Sampled,
    StructuredOutputs,
    Tool,
)
from haast.serving.structured import SPACING, Grammar, Grammars
from haast.serving.tool_formats import CallFormat, Schemas, call_grammar
from haast.text import stop_strings

_LOG = logging.getLogger("haast.serving")
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values of refused fields that have no effect, so they are accepted
    "beam_width": (1,), "length_penalty": (1, 0), "modalities": (["text"],), "use_beam_search": (False,),
    "repeat_penalty": (1,), "mirostat": (0,), "typical_p": (1,), "top_a": (0,), "best_of": (1,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True, False), "background": (False,),
    "truncation": ("disabled",), "include": ([],), "suffix": ("",),
}  # fmt: skip
_MAX_STOPS = 16
_ANCHOR_TOKENS = 8  # last tokens of the prompt that are put before a prediction
_logged_fields: set[str] = set()  # unknown fields that were logged already


@dataclass(frozen=True)
class ModelLimits:
    """Properties and limits of the served model."""

    template: ChatTemplate
    grammars: Grammars
    vocab_size: int
    context: int | None
    pool_tokens: int
    ends: tuple[int, ...]
    drafters: tuple[str, ...]
    max_choices: int

    @property
    def most(self) -> int:
        """Maximum tokens of prompt and answer together."""
        return min(self.pool_tokens, self.context or self.pool_tokens)


@dataclass
class Plan:
    """A checked request."""

    prompts: list[list[int]]
    n: int
    sampling: SamplingParams
    max_tokens: int | None
    ends: tuple[int, ...]
    stops: tuple[str, ...]
    keep_stop: bool
    min_tokens: int
    presence: float
    frequency: float
    bias: dict[int, float]
    drafter: str | None
    max_nodes: int | None  # 1 turns drafting off, including tokens that a grammar forces
    trace: bool
    stream: bool
    usage_in_stream: bool
    processed: bool
    logprobs: int | None = None  # number of likeliest tokens in addition to the chosen one; None: no logprobs
    grammar: Grammar | None = None
    prediction: list[int] = field(default_factory=list)
    echo: list[str] = field(default_factory=list)  # per prompt: its text, which is put before the answer
    calls: CallFormat | None = None  # of tool calls, if there are tools
    schemas: Schemas = field(default_factory=dict)  # of the tools' parameters
    special_marks: dict[str, int] = field(default_factory=dict)  # of tool calls
    marks: ReasoningMarks | None = None
    reasoning: bool = False  # the prompt ends inside a reasoning

    def foreseen(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The prediction after the prompt's last tokens, so that lookup drafting matches it at the answer's start."""
        return (*prompt[-_ANCHOR_TOKENS:], *self.prediction) if self.prediction else ()


def chat_plan(body: ChatRequest, model: ModelLimits) -> Plan:
    """The plan of a chat completion. Raises ApiError, PromptError or ValueError."""
    settings = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        if not model.template.knows("reasoning_effort"):
            raise refused("reasoning_effort", "this model's chat template does not use it; leave it out")
        settings["reasoning_effort"] = body.reasoning_effort
    tools = usable_tools(body)
    conversation = model.template.render(body.messages, tools, settings)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    plan = _plan(body, model, [conversation.ids], limit)
    plan.marks, plan.reasoning = model.template.marks, conversation.reasoning
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    plan.logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if tools:
        plan.calls, plan.special_marks = model.template.calls, model.template.special_marks
        plan.schemas = {tool.function.name: (tool.function.parameters or {}).get("properties", {}) for tool in tools}
        calls = _call_grammar(body, tools, model)
        if plan.grammar is not None and plan.grammar.field != "response_format":
            raise ApiError(
                400,
                f"{plan.grammar.field} and tools together are not supported: leave out one of them",
                param=plan.grammar.field,
                code="unsupported_parameter",
            )
        plan.grammar = calls
    _check_grammar(body, plan)
    return plan


def completion_plan(body: CompletionRequest, model: ModelLimits) -> Plan:
    """The plan of a text completion. Raises ApiError, PromptError or ValueError."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    ids = [model.template.text_ids(each) if isinstance(each, str) else _ids(each, model) for each in prompts]
    plan = _plan(body, model, ids, body.max_tokens if body.max_tokens is not None else 16)
    plan.logprobs = body.logprobs
    if body.echo:
        if body.logprobs is not None:
            raise refused("echo", "with logprobs, which cover new tokens only; leave out one of them")
        plan.echo = [each if isinstance(each, str) else model.template.text_of(each) for each in prompts]
    _check_grammar(body, plan)
    return plan


def usable_tools(body: ChatRequest) -> list[Tool]:
    """The tools that may be called. Raises ApiError for duplicate names, malformed schemas, a choice without a tool."""
    tools = list(body.tools or ())
    names = [tool.function.name for tool in tools]
    choice = body.tool_choice
    if len(set(names)) < len(names):
        raise ApiError(400, f"tools has two functions with the same name: {names}", param="tools", code="invalid_value")
    for number, tool in enumerate(tools):
        _check_schema(tool.function.parameters or {}, f"tools[{number}].function.parameters")
    if choice == "none":
        return []
    if choice is not None and choice != "auto" and not tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        words = f"tool_choice names {choice.function.name!r}: the tools are {', '.join(names)}"
        raise ApiError(400, words, param="tool_choice", code="invalid_value")
    return tools


def _check_schema(schema: Mapping[str, Any], where: str) -> None:
    for key, kind, words in (("properties", dict, "an object"), ("required", list, "a list")):
        if not isinstance(schema.get(key, kind()), kind):
            raise ApiError(400, f"{where}.{key} must be {words}", param=f"{where}.{key}", code="invalid_value")


def check_unknown(body: Body, neutral: Mapping[str, Any] | None = None) -> None:
    """Refuse unsupported fields that would change the answer, by name; log unknown ones once. Raises ApiError."""
    for name, value in body.unknown.items():
        if value is None or value in _NEUTRAL.get(name, ()) or (neutral or {}).get(name) == value:
            continue
        if name in REFUSED:
            raise refused(name, REFUSED[name])
        if name in IDLE and name not in _NEUTRAL:
            continue
        if name in IDLE:
            raise refused(name, f"only {_NEUTRAL[name][0]!r} is")
        if name not in _logged_fields and len(_logged_fields) < 1000:
            _logged_fields.add(name)
            _LOG.warning("a client sends an unknown field, which is ignored: %s", ascii(name)[:80])


def _plan(body: Sampled, model: ModelLimits, prompts: list[list[int]], limit: int | None) -> Plan:
    n = body.n or 1
    check_unknown(body, {"best_of": n})
    if len(prompts) * n > model.max_choices:
        raise ApiError(
            400, f"{len(prompts)} prompts times n={n} are more than {model.max_choices} answers per request", param="n",
            code="invalid_value",
        )  # fmt: skip
    for prompt in prompts:
        _check_length(len(prompt), limit, model)
    stops = stop_strings(() if body.stop is None else body.stop)
    if len(stops) > _MAX_STOPS:
        raise ApiError(400, f"stop holds {len(stops)} strings: give {_MAX_STOPS} at most", param="stop")
    own_ends = tuple(_token(each, "stop_token_ids", model) for each in body.stop_token_ids or ())
    ends = tuple(dict.fromkeys((*(() if body.ignore_eos else model.ends), *own_ends)))
    hints = body.haast
    if hints.drafter is not None and hints.drafter not in model.drafters:
        words = f"haast.drafter={hints.drafter!r} is unknown: choose one of {', '.join(model.drafters)}"
        raise ApiError(400, words, param="haast.drafter", code="invalid_value")
    options = body.stream_options
    if options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
    if options is not None and options.continuous_usage_stats:
        raise refused("stream_options.continuous_usage_stats", "usage comes with the last chunk")
    if body.min_tokens and limit is not None and body.min_tokens > limit:
        words = f"min_tokens={body.min_tokens} is more than the limit of {limit} new tokens"
        raise ApiError(400, words, param="min_tokens", code="invalid_value")
    return Plan(
        prompts=prompts,
        n=n,
        sampling=_sampling(body),
        max_tokens=limit,
        ends=ends,
        stops=stops,
        keep_stop=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        bias=_bias(body, model),
        drafter=hints.drafter,
        max_nodes=1 if hints.drafter == "none" else hints.max_nodes,
        trace=hints.trace,
        stream=bool(body.stream),
        usage_in_stream=options is not None and options.include_usage,
        processed=body.logprobs_mode == "processed",
        grammar=_grammar(body, model),
        prediction=_predicted(body, model),
    )


def _sampling(body: Sampled) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0) if body.top_k == -1 else body.top_k or 0,  # -1 turns top-k off in other servers
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=secrets.randbits(62) if body.seed is None else body.seed % 2**63,
    )


def _check_length(length: int, limit: int | None, model: ModelLimits) -> None:
    """Raises ApiError, with both numbers, for a prompt that does not fit with the requested new tokens."""
    most = model.most
    if length >= most or length + (limit or 0) > most:
        requested = "" if limit is None else f" and {limit} new ones are requested, {length + limit} in total"
        raise TooLongError(most, f"{length} tokens{requested}", "max_tokens" if length < most else "messages")


def _ids(prompt: Sequence[int], model: ModelLimits) -> list[int]:
    """Check a prompt of token ids. One that is too long is refused later, by its length."""
    if len(prompt) <= model.pool_tokens:
        for token in (min(prompt, default=0), max(prompt, default=0)):
            _token(token, "prompt", model)
    return list(prompt)


def _token(token: int, where: str, model: ModelLimits) -> int:
    if not 0 <= token < model.vocab_size:
        words = f"{where} holds {token}: give token ids of 0..{model.vocab_size - 1}"
        raise ApiError(400, words, param=where, code="invalid_value")
    return token


def _bias(body: Sampled, model: ModelLimits) -> dict[int, float]:
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 12:
            raise ApiError(400, f"logit_bias holds {key[:40]!r}: give token ids", param="logit_bias")
        bias[_token(int(key), "logit_bias", model)] = value
    return bias


def _predicted(body: Sampled, model: ModelLimits) -> list[int]:
    if body.prediction is None:
        return []
    text = joined(body.prediction.content, "predicted")
    return model.template.text_ids(text[: LETTERS * model.most], False)  # an answer can't be longer


def _grammar(body: Sampled, model: ModelLimits) -> Grammar | None:
    """The grammar of an answer's required format, if any. Raises ApiError if several formats are requested."""
    form, named, grammars = body.response_format, body.structured_outputs or StructuredOutputs(), model.grammars
    wanted: list[tuple[str, Any, Any]] = []
    if form is not None and form.type == "json_object":
        wanted.append(("response_format", {"type": "object"}, grammars.json_schema))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format of type json_schema needs json_schema", param="response_format")
        wanted.append(("response_format", form.json_schema.schema_, grammars.json_schema))
    for where, source in (("", body), ("structured_outputs.", named)):
        for name, make in (("regex", grammars.regex), ("choice", grammars.choice), ("grammar", grammars.lark)):
            wanted.append((f"{where}{name}", getattr(source, name), make))
    wanted.append(("structured_outputs.json", named.json_, grammars.json_schema))
    anything = {"type": "object"} if named.json_object else None
    wanted.append(("structured_outputs.json_object", anything, grammars.json_schema))
    wanted = [each for each in wanted if each[1] is not None]
    if len(wanted) > 1:
        names = ", ".join(name for name, *_ in wanted)
        raise ApiError(400, f"an answer has one format, but {names} ask for several", param=wanted[1][0])
    if not wanted:
        return None
    name, value, make = wanted[0]
    if name.endswith("choice") and not value:
        raise ApiError(400, f"{name} holds no text to choose from", param=name)
    grammar: Grammar = make(value, name)
    return grammar


def _call_grammar(body: ChatRequest, tools: Sequence[Tool], model: ModelLimits) -> Grammar | None:
    """The grammar of tool calls, or of an answer in the required format instead of calls that are optional.

    None if calls are optional, may be several and have no strict arguments, and the answer has no format.
    """
    choice, template = body.tool_choice or "auto", model.template
    answer = _answer_schema(body) if choice == "auto" else None
    free = choice == "auto" and answer is None
    if free and body.parallel_tool_calls and not any(tool.function.strict for tool in tools):
        return None
    named = choice.function.name if isinstance(choice, NamedTool) else None
    usable = [tool for tool in tools if named in (None, tool.function.name)]
    several = body.parallel_tool_calls and named is None
    schemas = [_tool_schema(tool, choice) for tool in usable]
    text = call_grammar(schemas, template.calls, several, SPACING, free, template.special_marks, answer)
    return model.grammars.lark(text, "tools")


def _answer_schema(body: ChatRequest) -> dict[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    return {"type": "object"} if form.json_schema is None else form.json_schema.schema_


def _tool_schema(tool: Tool, choice: Any) -> dict[str, Any]:
    function = tool.function.model_dump(exclude_none=True)
    if choice == "auto" and not tool.function.strict:
        function["parameters"] = {"type": "object"}
    return {"type": "function", "function": function}


def _check_grammar(body: Sampled, plan: Plan) -> None:
    if plan.grammar is None:
        return
    for name, value in (("min_tokens", body.min_tokens), ("ignore_eos", body.ignore_eos)):
        if value:
            raise ApiError(
                400, f"{name} and {plan.grammar.field} together are not supported: the grammar ends the text",
                param=name, code="unsupported_parameter",
            )  # fmt: skip
