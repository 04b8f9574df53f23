"""`haast conform` against a correct fake server, and for every check against one with just the fault that it must find.

The fake server is in conform_fake.py. Most tests reach it without sockets and with a clock of its own; one goes over
HTTP, and so do clients that disconnect.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from conform_fake import (
    CONTEXT,
    KEY,
    MODEL,
    Body,
    Condition,
    DirectWire,
    Fake,
    Fault,
    Hook,
    Made,
    RefusalError,
    entry,
    prompt_of,
    served,
)
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from haast.cli.boundary import Boundary
from haast.cli.conform import conform
from haast.cli.settings import expanded
from haast.serving.conform.base import Outcome, Verdict
from haast.serving.conform.client import Client, EventReader
from haast.serving.conform.report import document, markdown, without_paths
from haast.serving.conform.subject import Subject
from haast.serving.conform.suite import chosen, judged, root_of, run, subject_at
from haast.serving.conform.wire import HttpWire, Request, WireError

# What is broken, check by check


def asks(body: Body, **fields: Any) -> bool:
    """Whether a request has these values."""
    return all(body.get(name) == value for name, value in fields.items())


def drops(name: str, only: Condition = lambda path, body: True) -> Hook:
    """The server does not read a field, of requests that meet a condition."""
    return when(only, lambda body: {each: value for each, value in body.items() if each != name})


def when(condition: Condition, change: Callable[[Any], Any]) -> Hook:
    """A change to what the server says, of requests that meet a condition; its result, if any, takes the place."""

    def hook(fake: Fake, path: str, asked: Body, given: Any) -> Any:
        return change(given) if condition(path, asked) else None

    return hook


def again(condition: Callable[[Body], bool], change: Callable[[Any], Any]) -> Hook:
    """A change from the second time on that a request is made."""

    def hook(fake: Fake, path: str, asked: Body, given: Any) -> Any:
        mark = json.dumps(asked)
        fake.seen[f"again {mark}"] += 1
        return change(given) if condition(asked) and fake.seen[f"again {mark}"] > 1 else None

    return hook


def always(path: str, body: Body) -> bool:
    return True


def says(words: str) -> Condition:
    return lambda path, body: words in prompt_of(body)


def made_error(status: int) -> Callable[[Made], Made]:
    return lambda made: Made(status, {"error": {"message": "no", "type": "x", "param": None, "code": None}})


def first(answer: Body) -> Body:
    choice: Body = answer["choices"][0]
    return choice


def reword(change: Callable[[str], str]) -> Callable[[Body], None]:
    """Change the text of an answer."""

    def apply(answer: Body) -> None:
        choice = first(answer)
        place, name = (choice["message"], "content") if "message" in choice else (choice, "text")
        place[name] = change(place[name] or "")

    return apply


def said_in(chunk: Any) -> Body:
    """What a chunk says: its delta, or for a plain completion the choice itself."""
    choice = first(chunk) if isinstance(chunk, dict) and chunk["choices"] else {}
    said: Body = choice.get("delta", choice)
    return said


def contents(chunks: list[Any]) -> list[int]:
    """Which chunks have text."""
    return [
        number for number, each in enumerate(chunks) if any(said_in(each).get(name) for name in ("content", "text"))
    ]


def without_chunk(place: int) -> Callable[[list[Any]], list[Any]]:
    def change(chunks: list[Any]) -> list[Any]:
        gone = contents(chunks)[place]
        return [each for number, each in enumerate(chunks) if number != gone]

    return change


def each_chunk(change: Callable[[int, Body], Any]) -> Callable[[list[Any]], None]:
    def apply(chunks: list[Any]) -> None:
        for number, each in enumerate(chunks[:-1]):
            change(number, each)

    return apply


def finish_with_text(chunks: list[Any]) -> list[Any] | None:
    ends = [n for n, each in enumerate(chunks[:-1]) if each["choices"] and first(each)["finish_reason"]]
    if not contents(chunks):
        return None
    first(chunks[contents(chunks)[-1]])["finish_reason"] = first(chunks[ends[-1]])["finish_reason"]
    return [each for number, each in enumerate(chunks) if number != ends[-1]]


def leaked_piece(fake: Fake, path: str, asked: Body, chunks: list[Any]) -> list[Any]:
    """A piece of the stop itself is sent."""
    leak = deepcopy(chunks[-2])
    if isinstance(asked.get("stop"), list) and len(asked["stop"]) == 1 and leak["choices"]:
        first(leak).update(delta={"content": asked["stop"][0][:1]}, finish_reason=None)
        return [*chunks[:-2], leak, *chunks[-2:]]
    return chunks


def leaked_stop(fake: Fake, path: str, asked: Body, answer: Body) -> None:
    stop, ended = asked.get("stop"), first(answer)["finish_reason"] == "stop"
    if isinstance(stop, list) and len(stop) == 1 and ended and "logprobs" not in asked:
        reword(lambda text: text + stop[0])(answer)


def broken_piece(chunks: list[Any]) -> None:
    said = said_in(chunks[contents(chunks)[0]])
    said["content" if "content" in said else "text"] += "\ufffd"


def extra_entry(answer: Body) -> None:
    content = first(answer)["logprobs"]["content"]
    content.append(entry(1, -1.0))


def zero_entries(answer: Body) -> None:
    for each in first(answer)["logprobs"]["content"]:
        each["logprob"] = 0.0


def shift_entries(chunks: list[Any]) -> None:
    for each in chunks[:-1]:
        for told in (first(each).get("logprobs") or {}).get("content", ()) if each["choices"] else ():
            told["logprob"] -= 0.5


def torn_arguments(answer: Body) -> None:
    function = first(answer)["message"]["tool_calls"][0]["function"]
    function["arguments"] = function["arguments"][:-1]


def doubled_arguments(chunks: list[Any]) -> list[Any]:
    return [*chunks[:3], chunks[2], *chunks[3:]]


def set_usage(name: str, change: int) -> Callable[[Body], None]:
    return lambda answer: answer["usage"].update({name: answer["usage"][name] + change})


def forget_key(fake: Fake) -> None:
    fake.key = None


def hold_back(fake: Fake) -> None:
    fake.held = True


def plain_model(fake: Fake, path: str, asked: Body, body: Body) -> Body:
    return {**body, "model": MODEL}


def claim_model(fake: Fake, path: str, asked: Body, answer: Body) -> Body:
    return {**answer, "model": asked["model"]}


def has_schema(name: str) -> Condition:
    return lambda path, body: ((body.get("response_format") or {}).get("json_schema") or {}).get("name") == name


def is_chat(path: str, body: Body) -> bool:
    return "chat" in path


def of(**fields: Any) -> Condition:
    return lambda path, body: asks(body, **fields)


def both(*conditions: Condition) -> Condition:
    return lambda path, body: all(each(path, body) for each in conditions)


def at(place: str) -> Condition:
    return lambda path, body: path == place


def content_error(made: Made) -> Made:
    return Made(200, chunks=[{"error": "temperature"}, "[DONE]"])


def metrics_wrong(made: Made) -> None:
    made.body = made.body.replace("accepted_tokens_total ", "accepted_tokens_total 9")


def no_ids(made: Made) -> None:
    made.headers.clear()


def unmarked(made: Made) -> None:
    made.body["data"][0]["object"] = "thing"


def usage_with_choices(chunks: list[Any]) -> None:
    chunks[-2].update(choices=chunks[1]["choices"])


def much_reasoning(answer: Body) -> None:
    answer["usage"]["completion_tokens_details"] = {"reasoning_tokens": 99}


def no_offsets(answer: Body) -> None:
    first(answer)["logprobs"]["text_offset"] = [0] * 8


def twins(answer: Body) -> None:
    answer["choices"][1]["message"] = answer["choices"][2]["message"]


def other_seed(body: Body) -> None:
    body["seed"] += 9


def other_tool(body: Body) -> None:
    body["tool_choice"]["function"]["name"] = "get_weather"


def hang_up(made: Made) -> None:
    raise WireError("no answer within 20 s", late=True)


def crash_on_nonsense(fake: Fake, path: str, asked: Body, made: Made) -> Made | None:
    return made_error(500)(made) if not asked and made.status == 400 else None


def role_left_out(chunks: list[Any]) -> list[Any]:
    return [{**chunks[0], "choices": chunks[1]["choices"]}, *chunks[2:]]


def one_tool(path: str, body: Body) -> bool:
    return isinstance(body.get("tool_choice"), dict)


def no_tool(path: str, body: Body) -> bool:
    return body.get("tool_choice") == "none" and len(body["messages"]) == 1


HOT = of(temperature="hot", stream=None)
FAULTS = [
    Fault("models", made=when(at("/v1/models"), unmarked)),
    Fault("health", made=when(at("/health"), made_error(500))),
    Fault("auth", setup=forget_key),
    Fault("request-id", made=when(always, no_ids)),
    Fault("answer-shape", whole=when(always, lambda answer: answer.update(id="a1"))),
    Fault("sse-frames", chunks=when(always, lambda chunks: chunks[:-1])),
    Fault("sse-frames", chunks=when(always, lambda chunks: [*chunks, "[DONE]"])),
    Fault("role-first", chunks=when(is_chat, role_left_out)),
    Fault("finish-chunk", chunks=when(is_chat, finish_with_text)),
    Fault(
        "usage-chunk",
        chunks=when(of(stream_options={"include_usage": True}), usage_with_choices),
    ),
    Fault("usage-chunk", request=drops("stream_options"), ends="silent"),
    Fault("chunk-ids", chunks=when(always, each_chunk(lambda number, chunk: chunk.update(id=f"a{number}")))),
    Fault("stream-equals-whole", chunks=when(both(at("/v1/completions"), says("0 1 2 3")), without_chunk(1))),
    Fault("stream-live", setup=hold_back),
    Fault("max-tokens", request=when(of(max_tokens=11), lambda body: body.update(max_tokens=10))),
    Fault("max-tokens", whole=when(of(max_tokens=9), set_usage("completion_tokens", 1))),
    Fault("max-completion-tokens", request=drops("max_completion_tokens"), ends="silent"),
    Fault("usage", whole=when(says("Hi."), set_usage("total_tokens", 1))),
    Fault(
        "usage",
        whole=when(says("Hi."), much_reasoning),
    ),
    Fault("min-tokens", request=drops("min_tokens"), ends="silent"),
    Fault("min-tokens", request=lambda fake, path, asked, body: {**body, "min_tokens": 3 * body.get("min_tokens", 0)}),
    Fault("stop-whole", whole=leaked_stop),
    Fault("stop-stream", chunks=leaked_piece),
    Fault("stop-forms", request=drops("stop", lambda path, body: isinstance(body.get("stop"), str)), ends="silent"),
    Fault("stop-counts", whole=when(lambda path, body: "stop" in body and "logprobs" in body, extra_entry)),
    Fault(
        "stop-counts",
        whole=when(lambda path, body: len(body.get("stop") or "") == 1, set_usage("completion_tokens", 4)),
    ),
    Fault("utf8-stream", chunks=when(says("\u65e5"), broken_piece)),
    Fault("utf8-cut", whole=when(both(says("\U0001f680"), of(max_tokens=3)), reword(lambda text: text + "\ufffd"))),
    Fault("logprobs", whole=when(of(top_logprobs=3), zero_entries)),
    Fault("logprobs", request=drops("logprobs", of(top_logprobs=3)), ends="silent"),
    Fault("logprobs-stream", chunks=when(always, shift_entries)),
    Fault("logprobs-stream", request=drops("logprobs", of(stream=True)), ends="silent"),
    Fault("logprobs-legacy", whole=when(of(logprobs=2), no_offsets)),
    Fault("greedy-steady", whole=again(lambda body: "lake at dawn" in prompt_of(body), reword(str.upper))),
    Fault("temperature", request=when(of(temperature=1.5), lambda body: body.update(temperature=0)), ends="silent"),
    Fault("bad-values", made=when(of(n=0), hang_up)),
    Fault("tiny-temperature", made=when(of(temperature=1e-6), made_error(500))),
    Fault(
        "seed",
        request=drops("seed", lambda path, body: body.get("seed", 9) < 5 and asks(body, max_tokens=16)),
        ends="silent",
    ),
    Fault("seed-busy", request=again(lambda body: body.get("seed", 0) > 20, other_seed)),
    Fault("n", request=drops("n", of(n=3)), ends="silent"),
    Fault("n", whole=when(of(n=3), twins)),
    Fault("top-p", request=drops("top_p", of(temperature=1.5)), ends="silent"),
    Fault("top-k", request=drops("top_k", of(temperature=1.5)), ends="silent"),
    Fault("min-p", request=drops("min_p", of(temperature=1.5)), ends="silent"),
    Fault("presence-penalty", request=drops("presence_penalty", of(max_tokens=32)), ends="silent"),
    Fault("frequency-penalty", request=drops("frequency_penalty", of(max_tokens=32)), ends="silent"),
    Fault("repetition-penalty", request=drops("repetition_penalty"), ends="silent"),
    Fault(
        "repetition-penalty", request=when(of(repetition_penalty=1.8), lambda body: body.update(repetition_penalty=0.2))
    ),
    Fault("logit-bias", request=drops("logit_bias"), ends="silent"),
    Fault("logit-bias", request=drops("logit_bias", lambda path, body: -100 in body.get("logit_bias", {}).values())),
    Fault("prediction", request=drops("prediction"), ends="silent"),
    Fault("honest-fields", request=drops("modalities"), ends="silent"),
    Fault("json-object", request=drops("response_format", of(response_format={"type": "json_object"})), ends="silent"),
    Fault(
        "json-schema",
        whole=when(both(has_schema("colour"), of(temperature=1.5)), reword(lambda text: text[:-2] + "}}")),
    ),
    Fault("json-pattern", whole=when(has_schema("patterned"), reword(lambda text: text.replace("-", "+")))),
    Fault("json-stream", chunks=when(has_schema("point"), without_chunk(1))),
    Fault("regex", whole=when(says("Tell me a story."), reword(lambda text: text + "."))),
    Fault("tool-required", whole=when(of(tool_choice="required", temperature=1), torn_arguments)),
    Fault("tool-required", request=drops("tool_choice", of(tool_choice="required")), ends="silent"),
    Fault("tool-named", request=when(one_tool, other_tool)),
    Fault("tool-none", request=when(no_tool, lambda body: body.update(tool_choice="required"))),
    Fault("tool-stream", chunks=when(of(tool_choice="required"), doubled_arguments)),
    Fault("tool-result", made=when(lambda path, body: "It is noon." in str(body.get("messages")), made_error(500))),
    Fault("drafting-unseen", whole=when(of(frequency_penalty=1.0, haast=None), reword(str.upper))),
    Fault("batch-rows", whole=again(lambda body: "Name a colour" in prompt_of(body), reword(str.upper))),
    Fault("batch-streams", chunks=when(both(says("Name a colour"), of(max_tokens=5)), without_chunk(-1))),
    Fault("warm-prefix", whole=again(lambda body: prompt_of(body).startswith("Note "), reword(str.upper))),
    Fault("long-prompt", chunks=when(says("Sum this up"), without_chunk(-1))),
    Fault("draft-counters", made=when(at("/metrics"), metrics_wrong)),
    Fault("error-shape", made=when(HOT, lambda made: Made(422, {"detail": "temperature"}))),
    Fault("malformed-json", made=crash_on_nonsense),
    Fault("unknown-model", request=plain_model, whole=claim_model, ends="silent"),
    Fault("unknown-field", made=when(of(haast_conform_no_such_field=1), made_error(500))),
    Fault("bad-values", request=when(of(n=0), lambda body: body.update(n=1))),
    Fault("stream-error", made=when(of(stream=True, temperature="hot"), content_error)),
    Fault("context-overflow", made=when(lambda path, body: len(str(body)) > 20000, made_error(400))),
    Fault("survives", made=when(says("\ud800"), made_error(500))),
]


# The tests

HIDDEN = {"untrimmable-cache", "published-tau", "training-tau", "never-slower"}
ABORTS = {"abort-stream", "abort-whole"}


def subject_of(fake: Fake) -> Subject:
    return subject_at(Client(DirectWire(fake), KEY, 60), "http://fake", None)


def outcomes_of(fake: Fake) -> dict[str, Outcome]:
    """All checks but those of clients that leave, which need a socket to leave from."""
    checks = [each for each in chosen(None) if each[1].id not in ABORTS]
    return run(subject_of(fake), checks, lambda theme, check, outcome: None)


def by_verdict(outcomes: dict[str, Outcome], *verdicts: str) -> dict[str, str]:
    return {name: each.detail for name, each in outcomes.items() if each.verdict in verdicts}


def test_an_honest_server_passes() -> None:
    outcomes = outcomes_of(Fake())
    assert by_verdict(outcomes, "fail", "silent", "refused", "not offered") == {}
    assert set(by_verdict(outcomes, "not visible")) == HIDDEN


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{number}-{fault.check}" for number, fault in enumerate(FAULTS)])
def test_each_broken_promise_is_noticed_by_its_check_alone(fault: Fault) -> None:
    outcomes = outcomes_of(Fake(fault))
    assert set(by_verdict(outcomes, "fail", "silent")) == {fault.check}, by_verdict(outcomes, "fail", "silent")
    assert outcomes[fault.check].verdict == fault.ends
    assert outcomes[fault.check].evidence["sent"].startswith(("GET /", "POST /"))


def test_every_check_has_a_broken_promise() -> None:
    known = {check.id for _, check in chosen(None)}
    assert known == {fault.check for fault in FAULTS} | HIDDEN | ABORTS


def test_a_server_that_offers_little_and_says_so_fails_nothing() -> None:
    usual = {"model", "messages", "temperature", "max_tokens", "stream", "haast_conform_no_such_field"}

    def little(fake: Fake, path: str, asked: Body, made: Made) -> Made | None:
        if path not in ("/v1/chat/completions", "/v1/models"):
            return made_error(404)(made)
        unknown = sorted(set(asked) - usual)
        return Made(400, RefusalError(400, f"{unknown[0]} is not supported", unknown[0]).body) if unknown else None

    outcomes = outcomes_of(Fake(Fault("", made=little)))
    assert by_verdict(outcomes, "fail", "silent") == {}
    assert {"n", "seed", "logprobs", "min-tokens", "stop-whole", "json-schema", "tool-required"} <= set(
        by_verdict(outcomes, "refused")
    )
    assert {"logprobs-legacy", "health", "draft-counters", "regex"} <= set(by_verdict(outcomes, "not offered"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Fake()) as url:
        yield url


def http_outcomes(url: str, only: str | None) -> dict[str, Outcome]:
    wire = HttpWire(url)
    subject = subject_at(Client(wire, KEY, 20), url, None)
    subject.patience = 0.3
    try:
        return run(subject, chosen(only), lambda theme, check, outcome: None)
    finally:
        wire.close()


def test_an_honest_server_passes_over_http(address: str) -> None:
    outcomes = http_outcomes(address, "basics,streaming,stops,unicode,tools,load,errors")
    assert by_verdict(outcomes, "fail", "silent", "refused", "not offered") == {}
    assert set(by_verdict(outcomes, "not visible")) <= {"stream-live"}


@pytest.mark.parametrize(("kind", "gauge"), [("", False), ("stream", True), ("whole", False)])
def test_a_server_that_goes_on_for_a_client_that_left_is_noticed(kind: str, gauge: bool) -> None:
    fake = Fake(None if gauge else Fault("", made=when(at("/metrics"), made_error(404))))
    fake.deaf = kind
    with served(fake) as url:
        outcomes = http_outcomes(url, f"abort-{kind}" if kind else "abort-stream,abort-whole")
    assert set(by_verdict(outcomes, "fail")) == ({f"abort-{kind}"} if kind else set()), outcomes
    assert (not kind and len(by_verdict(outcomes, "pass")) == 2) or kind


def test_a_server_that_dies_is_asked_no_more() -> None:
    class DyingWire(DirectWire):
        def open(self, request: Request) -> Any:
            if "la" in request.content.decode() and "thirty" in request.content.decode():
                self.fake.deaf = "dead"
            if self.fake.deaf:
                raise WireError("the connection was lost")
            return super().open(request)

    subject = subject_at(Client(DyingWire(Fake()), KEY), "http://fake", None)
    outcomes = run(subject, chosen("sampling,tools"), lambda theme, check, outcome: None)
    assert set(by_verdict(outcomes, "fail")) == {"presence-penalty", "frequency-penalty", "repetition-penalty"}
    assert outcomes["tool-none"].detail == "not run: the server no longer answers"


@given(st.binary(max_size=60), st.lists(st.integers(0, 400), max_size=12))
def test_events_are_the_same_however_they_are_cut(noise: bytes, cuts: list[int]) -> None:
    stream = (
        b': hello\n\nevent: x\r\ndata: {"a": "\xe6\x97\xa5"}\r\n\r\ndata: one\ndata: two\n\n'
        + noise
        + b"\n\ndata: [DONE]\n\n"
    )
    whole, parts = EventReader(), EventReader()
    whole.feed(stream, 0.0)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for start, end in pairwise(places):
        parts.feed(stream[start:end], 0.0)
    assert parts.events == whole.events and (parts.torn, parts.rest) == (whole.torn, whole.rest)
    assert [(each.data, each.name, each.comment) for each in whole.events[:3]] == [
        ("hello", "", True), ('{"a": "\u65e5"}', "x", False), ("one\ntwo", "", False),
    ]  # fmt: skip


# What is told


app = typer.Typer(cls=Boundary, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("conform")(expanded(conform))


@app.callback()
def _group() -> None:
    """Makes `conform` a command of a group, as it is in `haast`."""


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["conform", *arguments])


def test_the_command_prints_a_table_and_writes_json(address: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    out = tmp_path / "conform-fake.json"
    done = command(
        address, "--api-key-file", str(tmp_path / "key"), "--only", "stops,auth", "--name", "fake", "--json", str(out)
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "stop-whole" in done.stdout and done.stdout.endswith("5 pass\n")
    read = json.loads(out.read_text())
    assert (read["kind"], read["server"]["name"], read["totals"]["pass"]) == ("haast-conform-1", "fake", 5)
    assert [each["id"] for each in read["checks"]] == ["auth", "stop-whole", "stop-stream", "stop-forms", "stop-counts"]


def test_a_failed_check_ends_with_1(address: str) -> None:
    fake = Fake(Fault("", request=drops("n", of(n=3))))
    with served(fake) as url:
        done = command(url, "--api-key", KEY, "--only", "n", "--json", "-")
    assert done.exit_code == 1 and json.loads(done.stdout)["checks"][0]["outcome"] == "silent"
    assert "n=3 gives one choice" in done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ftp://x"], "url='ftp://x' is not an HTTP URL"),
        (["URL", "--only", "stops,nonsense"], "there is no check nonsense"),
        (["URL", "--timeout", "0"], "timeout=0.0 is not allowed"),
        (["URL", "--context", "0"], "context=0 is not allowed"),
        (["URL"], "refuses the key (HTTP 401): give it with --api-key-file"),
        (["URL", "--api-key", "x", "--api-key-file", "y"], "can't be given together"),
        (["URL", "--api-key-file", "not-there"], "cannot read --api-key-file not-there"),
        (["URL", "--json", "not-there/x.json"], "cannot write not-there/x.json"),
        ([f"http://127.0.0.1:{free_port()}"], "no server answers at http://127.0.0.1"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: str, address: str) -> None:
    done = command(*(address if each == "URL" else each for each in arguments))
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.output


def test_a_model_must_be_named_where_there_are_several() -> None:
    def two(made: Made) -> None:
        made.body["data"] *= 2
        made.body["data"][1] = {"id": "other", "object": "model"}

    with pytest.raises(ValueError, match=r"lists 2 models \('fake-1', 'other'\): name one with --model"):
        subject_of(Fake(Fault("", made=when(at("/v1/models"), two))))
    assert subject_at(Client(DirectWire(Fake()), KEY), "http://fake", MODEL).context == CONTEXT


def test_an_answer_of_no_known_shape_is_a_failure_and_no_crash() -> None:
    nonsense: list[Any] = [[], {"choices": []}, {"choices": [{}]}, {"choices": [{"index": 0, "message": 7}]}, "<html>"]
    for said in nonsense:
        fake = Fake(Fault("", made=when(is_chat, lambda made, said=said: Made(200, said))))  # type: ignore[misc]
        for _, check in chosen("stop-whole,logprobs-stream,tool-required,n,batch-rows"):
            assert judged(subject_of(fake), check).verdict == Verdict.FAIL


def test_results_stand_side_by_side_and_name_no_folder(tmp_path: Path) -> None:
    files = []
    for name, fault in (("one", None), ("two", Fault("", request=drops("n", of(n=3))))):
        checks = chosen("stops,n,A20")
        outcomes = run(subject_of(Fake(fault)), checks, lambda theme, check, outcome: None)
        outcomes["utf8-cut"] = Outcome(
            Verdict.FAIL, "File /work/a/b.py, ../c and /tmp/x|y at /v1/models", {"got": "/root/k"}
        )
        files.append(tmp_path / f"conform-{name}.json")
        server = {"name": name, "version": "1.0", "model": "/root/.cache/models/small"}
        files[-1].write_text(json.dumps(document(checks, outcomes, server)))
        assert not re.search(r"/(tmp|work|root)/|\.\./", files[-1].read_text())
    table = markdown(files)
    assert "| check | rows | asks | one 1.0 | two 1.0 |" in table
    assert "| sampling: `n` |  | n choices differ, and a seed gives the same ones again | yes | **ignored** |" in table
    assert "- `n`: n=3 gives one choice" in table and "File b.py, c and x\\|y at /v1/models" in table
    assert "(model small, " in table
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a result of `haast conform`"):
        markdown([tmp_path / "other.json"])


def test_paths_are_cut_and_nothing_else() -> None:
    kept = {"a": ["error:\\n x", "POST /v1/chat/completions", "http://127.0.0.1:8000", 3, None, "and/or"]}
    assert without_paths(kept) == kept
    assert without_paths("C:\\Users\\me\\m.gguf ~/k /home/me/") == "m.gguf k me"


def test_an_address_may_end_with_v1() -> None:
    assert root_of("http://127.0.0.1:1/v1/") == root_of("http://127.0.0.1:1") == "http://127.0.0.1:1"
