"""Regeneration through a server: a local one that fails in all the ways servers do."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chats import family
from fakes import dies_after
from transformers import LlamaConfig
from typer.testing import CliRunner

from haast import jsonl_log
from haast.cli import app
from haast.prompts import Prompt
from haast.target.load import load_tokenizer
from haast.training.answers import read_answers
from haast.training.chat import encode_prompt
from haast.training.config import RegenerateConfig
from haast.training.data import encode_answers
from haast.training.endpoint import EndpointConfig, regenerate_from_endpoint
from haast.training.generation_queue import AnswerRun, Outcome

TOKENIZER = family("smollm2")
END = int(TOKENIZER.eos_token_id or 0)
Body = dict[str, Any]


def said(body: Body) -> str:
    """What the server answers: something that depends on all that was said to it."""
    return f"one two {len(body['messages'])} {body['messages'][-1]['content']}"


def completion(body: Body, text: str | None = None, **choice: Any) -> Body:
    message = {"role": "assistant", "content": said(body) if text is None else text}
    whole = {"index": 0, "message": message, "finish_reason": "stop", **choice}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [whole]}


class Server(ThreadingHTTPServer):
    """`plan` is asked for the reply to the n-th request: (status, headers, body), or None to hang up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: Callable[[int, Body], Any] = lambda number, body: (200, {}, completion(body))
        self.models: list[str] = ["tiny"]
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.guard = threading.Lock()
        self.busy = self.busiest = 0
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        return

    def _send(self, status: int, headers: dict[str, str], content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        assert self.path == "/v1/models", self.path
        self._send(
            200, {}, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
        )

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions", self.path
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            number = len(server.bodies)
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        time.sleep(server.delay)
        reply = server.plan(number, body)
        with server.guard:
            server.busy -= 1
        if reply is None:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._send(*reply)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def prompts(count: int = 6, turns: int = 1) -> list[Prompt]:
    return [Prompt(f"p{i}", tuple(f"say {i} {turn}" for turn in range(turns))) for i in range(count)]


def settings(**changes: Any) -> RegenerateConfig:
    return replace(RegenerateConfig(max_new_tokens=20, max_prompt_tokens=200, seed=5), **changes)


def ask(server: Server, out: Path, many: list[Prompt] | None = None, **changes: Any) -> Outcome:
    own = {name: changes.pop(name) for name in ("turns", "thinking") if name in changes}
    endpoint = replace(EndpointConfig(server.url, concurrency=2, retries=3), **changes)
    run = AnswerRun(TOKENIZER, many or prompts(), out, settings(**own), name="target", quiet=True)
    return regenerate_from_endpoint(run, (END,), endpoint)


def by_id(path: Path) -> dict[str, Body]:
    return {record["id"]: record for record in read_answers(path)}


# What is asked, and what becomes of the answers


def test_answers_are_the_servers_text_in_the_targets_tokens(server: Server, tmp_path: Path) -> None:
    outcome = ask(server, tmp_path / "a.jsonl", api_key="secret")
    config, got = settings(), by_id(tmp_path / "a.jsonl")
    tokens = sum(len(record["response_ids"]) for record in got.values())
    assert outcome == Outcome(total=6, before=0, added=6, tokens=tokens) and tokens > 0
    seeds = set()
    for index, prompt in enumerate(prompts()):
        record = got[prompt.id]
        assert record["response"] == f"one two 1 say {index} 0" and record["finished"] and record["retokenised"]
        assert record["response_ids"] == [*TOKENIZER.encode(record["response"]), END]
        assert (record["model"], record["endpoint_model"], record["prompt"]) == ("target", "tiny", prompt.turns[0])
        body = next(b for b in server.bodies if b["messages"][0]["content"] == prompt.turns[0])
        assert body["temperature"] == record["temperature"] == config.temperature(index)
        assert (body["max_tokens"], body["top_p"], body["top_k"], body["min_p"]) == (20, 1.0, -1, 0.0)
        seeds.add(body["seed"])
    assert len(seeds) == 6 and len({record["temperature"] for record in got.values()}) > 1
    assert set(server.keys) == {"Bearer secret"}
    sequences = encode_answers(TOKENIZER, list(got.values()))
    assert all(sequence.answer[-1] == END for sequence in sequences)


def test_token_ids_are_taken_where_the_server_tells_them(server: Server, tmp_path: Path) -> None:
    ids = [*TOKENIZER.encode("tw"), *TOKENIZER.encode("o")]  # not how the tokenizer would write "two"

    def plan(_number: int, body: Body) -> Any:
        assert body["return_token_ids"] is True
        prompt = encode_prompt(TOKENIZER, [body["messages"][0]["content"]])
        return 200, {}, {**completion(body, "two", token_ids=ids), "prompt_token_ids": prompt}

    server.plan = plan
    ask(server, tmp_path / "a.jsonl", prompts(1))
    (record,) = read_answers(tmp_path / "a.jsonl")
    assert record["response_ids"] == [*ids, END] and record["response"] == "two" and "retokenised" not in record
    server.plan = lambda _n, body: (200, {}, {**completion(body, token_ids=ids), "prompt_token_ids": [1, 2]})
    with pytest.raises(ValueError, match=r"prompt 'p0' as 2 tokens.*chat template"):
        ask(server, tmp_path / "b.jsonl", prompts(1))
    server.plan = lambda _n, body: (200, {}, completion(body, token_ids=[10**6]))
    with pytest.raises(ValueError, match="token 1000000"):
        ask(server, tmp_path / "b.jsonl", prompts(1))


def test_an_answer_cut_at_the_limit_is_not_finished(server: Server, tmp_path: Path) -> None:
    server.plan = lambda _n, body: (200, {}, completion(body, finish_reason="length"))
    ask(server, tmp_path / "a.jsonl", prompts(1))
    (record,) = read_answers(tmp_path / "a.jsonl")
    assert not record["finished"] and record["response_ids"][-1] != END


def test_turns_are_answered_in_order_with_the_servers_own_history(server: Server, tmp_path: Path) -> None:
    outcome = ask(server, tmp_path / "a.jsonl", prompts(3, turns=3), turns=2, thinking=False)
    got = by_id(tmp_path / "a.jsonl")
    assert outcome.added == 6 and set(got) == {f"p{i}{more}" for i in range(3) for more in ("", "#2")}
    later = got["p1#2"]
    assert later["history"] == ["say 1 0", got["p1"]["response"]] and later["prompt"] == "say 1 1"
    assert later["response"] == "one two 3 say 1 1" and later["temperature"] == got["p1"]["temperature"]
    assert later["thinking"] is False
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)


# What goes wrong and is tried again


def test_busy_broken_and_silent_servers_are_asked_again(server: Server, tmp_path: Path) -> None:
    soon = {"retry-after-ms": "20"}
    trouble: dict[int, Any] = {
        0: (429, soon, {"error": {"message": "slow down"}}),
        1: (500, soon, {"error": {"message": "oops"}}),
        2: (503, soon, b"not even JSON"),
        3: (200, {}, b"<html>garbage"),
        4: (200, {}, {"choices": []}),
        5: None,
    }
    server.plan = lambda number, body: trouble[number] if number in trouble else (200, {}, completion(body))
    assert ask(server, tmp_path / "a.jsonl").added == 6
    assert len(server.bodies) == 12 and len(read_answers(tmp_path / "a.jsonl")) == 6


def test_retry_after_is_honoured(server: Server, tmp_path: Path) -> None:
    server.plan = lambda number, body: (200, {}, completion(body)) if number else (429, {"Retry-After": "1"}, {})
    ask(server, tmp_path / "a.jsonl", prompts(1))
    assert server.times[1] - server.times[0] >= 0.95


def test_refused_prompts_are_counted_and_the_rest_answered(server: Server, tmp_path: Path) -> None:
    def plan(_number: int, body: Body) -> Any:
        if "say 2" in body["messages"][0]["content"]:
            return 400, {}, {"error": {"message": "this model's maximum context length is 10"}}
        return 200, {}, completion(body)

    server.plan = plan
    outcome = ask(server, tmp_path / "a.jsonl")
    assert (outcome.added, outcome.failed, outcome.left_out) == (5, 1, 0)
    assert "maximum context length" in outcome.last_error
    long = [*prompts(1), Prompt("long", ("x" * 300,))]
    assert ask(server, tmp_path / "b.jsonl", long).left_out == 1  # never sent


def test_settings_that_a_server_does_not_know_are_left_away(server: Server, tmp_path: Path) -> None:
    def plan(_number: int, body: Body) -> Any:
        for name in ("return_token_ids", "min_p"):
            if name in body:
                return 400, {}, {"error": {"message": f"Unknown parameter: '{name}'"}}
        return 200, {}, completion(body)

    server.plan = plan
    assert ask(server, tmp_path / "a.jsonl").added == 6
    assert server.bodies[-1]["top_k"] == -1 and "min_p" not in server.bodies[-1]


def test_a_server_that_cannot_be_told_how_to_think_is_not_asked_otherwise(server: Server, tmp_path: Path) -> None:
    """Its answers would say `thinking: false` and hold thoughts."""
    server.plan = lambda number, body: (400, {}, {"error": {"message": "unknown field chat_template_kwargs"}})
    with pytest.raises(ValueError, match="leave --thinking or --no-thinking out"):
        ask(server, tmp_path / "a.jsonl", thinking=False)
    assert not (tmp_path / "a.jsonl").read_text()


# What ends a run


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not accept the key.*--api-key-env"), (403, "--api-key-env"), (404, "'tiny'.*--endpoint-model")],
)
def test_a_wrong_key_or_name_stops_at_once(server: Server, tmp_path: Path, status: int, message: str) -> None:
    server.plan = lambda _n, _body: (status, {}, {"error": {"message": "no"}})
    with pytest.raises(ValueError, match=message):
        ask(server, tmp_path / "a.jsonl", concurrency=1)
    assert len(server.bodies) == 1


def test_a_server_that_answers_nothing_ends_the_run(server: Server, tmp_path: Path) -> None:
    server.plan = lambda _n, _body: (200, {}, b"garbage")
    with pytest.raises(ValueError, match=r"8 prompts without an answer.*no chat completion.*run again"):
        ask(server, tmp_path / "a.jsonl", prompts(20))
    server.plan = lambda _n, _body: (422, {}, {"error": {"message": "seed is forbidden"}})
    with pytest.raises(ValueError, match="seed is forbidden"):
        ask(server, tmp_path / "a.jsonl", prompts(20))
    server.plan = lambda _n, body: (200, {}, _reasoning(body))
    with pytest.raises(ValueError, match="reasoning parser"):
        ask(server, tmp_path / "a.jsonl")


def _reasoning(body: Body) -> Body:
    whole = completion(body)
    whole["choices"][0]["message"]["reasoning_content"] = "hm"
    return whole


def test_addresses_and_names_are_checked(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"localhost:8000.*http://"):
        EndpointConfig("localhost:8000")
    wrong: list[dict[str, Any]] = [{"concurrency": 0}, {"rate": 0.0}, {"timeout": -1.0}, {"retries": -1}]
    for setting in wrong:
        ((name, value),) = setting.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            EndpointConfig("http://localhost", **setting)
    for url in ("http://h:1", "http://h:1/v1/", "http://h:1/v1/chat/completions"):
        assert EndpointConfig(url).base == "http://h:1/v1"
    server.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"serves a, b.*--endpoint-model"):
        ask(server, tmp_path / "a.jsonl")
    assert ask(server, tmp_path / "a.jsonl", model="b").added == 6 and server.bodies[0]["model"] == "b"
    server.server_close()
    with pytest.raises(ValueError, match="no server answers at"):
        ask(server, tmp_path / "c.jsonl")


# Resuming, pace


def test_a_killed_run_resumes_to_the_same_answers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ask(server, whole, prompts(4, turns=2), turns=2)
    tail = b'{"id": "p0", "resp'
    monkeypatch.setattr(jsonl_log, "append", dies_after(jsonl_log.append, 3, tail))
    with pytest.raises(KeyboardInterrupt):
        ask(server, cut, prompts(4, turns=2), turns=2)
    monkeypatch.undo()
    again = ask(server, cut, prompts(4, turns=2), turns=2)
    assert (again.before, again.added) == (3, 5) and by_id(cut) == by_id(whole)
    asked = len(server.bodies)
    assert ask(server, cut, prompts(4, turns=2), turns=2).added == 0 and len(server.bodies) == asked


def test_ctrl_c_stops_and_keeps_what_is_there(server: Server, tmp_path: Path) -> None:
    def plan(number: int, body: Body) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return 200, {}, completion(body)

    server.plan = plan
    with pytest.raises(KeyboardInterrupt):
        ask(server, tmp_path / "a.jsonl", concurrency=1)
    assert len(by_id(tmp_path / "a.jsonl")) == 2
    assert ask(server, tmp_path / "a.jsonl").added == 4  # the lock went with the run


def test_requests_go_side_by_side_and_no_faster_than_asked(server: Server, tmp_path: Path) -> None:
    server.delay = 0.1
    ask(server, tmp_path / "a.jsonl", prompts(12), concurrency=4)
    assert 2 <= server.busiest <= 4
    server.delay, server.times = 0.0, []
    server.plan = lambda number, body: (
        (500, {"retry-after-ms": "1"}, {}) if number == 13 else (200, {}, completion(body))
    )
    ask(server, tmp_path / "b.jsonl", prompts(10), concurrency=8, rate=20.0)
    assert len(server.times) == 11  # the repeated one waits its turn too
    assert server.times[-1] - server.times[0] >= 10 / 20 * 0.9


# The command


@pytest.fixture
def tokenizer_only(tmp_path: Path) -> Path:
    """A model's folder without weights."""
    LlamaConfig(vocab_size=len(TOKENIZER), eos_token_id=END).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_needs_only_the_tokenizer(
    server: Server, tmp_path: Path, tokenizer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_tokenizer(str(tokenizer_only))[1] == (END,)
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["say", "more"]}\n{"prompt": "say too"}\n')
    begin = ["regenerate", "--model", str(tokenizer_only), "--prompts", str(tmp_path / "prompts.jsonl")]
    begin += ["--out", str(tmp_path / "a.jsonl"), "--turns", "2"]
    serving = ["--endpoint", server.url, "--api-key-env", "TINY_KEY"]
    result = CliRunner().invoke(app, [*begin, *serving])
    assert result.exit_code == 2 and "TINY_KEY" in result.stderr
    monkeypatch.setenv("TINY_KEY", "secret")
    result = CliRunner().invoke(app, [*begin, *serving, "--concurrency", "2", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["added"] == 3 and server.keys[-1] == "Bearer secret"
    for words, named in (
        (["--endpoint-model", "x"], "--endpoint-model needs a server"),
        ([*serving, "--shards", str(tmp_path)], "--shards"),
        ([*serving, "--turns", "0"], "turns=0"),
    ):
        result = CliRunner().invoke(app, [*begin, *words])
        assert result.exit_code == 2 and named in result.stderr and result.stderr.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, [*begin, *serving])
    assert result.exit_code == 2 and 'pip install "haast[endpoint]"' in result.stderr
