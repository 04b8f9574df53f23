"""What goes wrong around a server: clients that vanish, slow ones, floods, broken bodies, hostile grammars, signals.

Counts are small here; `-m slow` and benchmarks/serving_faults.py run them in full. Sockets are real where they matter.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
import pytest
import serving_faults as faults
from hostile import GRAMMARS, JSON, REGEXES, SCHEMAS, SPECIAL, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live
from serving import Json, client_of, run, tiny_service

from haast.errors import CancelledError
from haast.serving import connection, security
from haast.serving import run as running
from haast.serving.plan import completion_plan
from haast.serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest
from haast.serving.service import Service, prediction_counts
from haast.serving.streaming import encoded, in_pieces

LONG: Json = {"prompt": "the sky", "max_tokens": 480, "ignore_eos": True, "seed": 3, "haast": {"drafter": "none"}}


@pytest.fixture(scope="module")
def busy() -> Iterator[Live]:
    """Few run at once, so that most wait."""
    with live(max_running=4, max_waiting=64, timeout=120, grace=1) as found:
        yield found


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service()


def test_clients_that_vanish_leave_nothing_and_disturb_nobody(busy: Live) -> None:
    found = run(faults.crowd(busy.port, 36, at_once=24))
    assert found.wrong == [] and found.stayed + found.busy == 7 and found.stayed > 3
    assert sum(found.vanished.values()) == 36 and len(found.vanished) == len(faults.WAYS)
    assert found.quiet_s < 5 and run(faults.gauges(busy.port))["kv_cache_usage_perc"] == 0


def test_another_text_would_be_seen(busy: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = faults.numbered
    monkeypatch.setattr(
        faults, "numbered", lambda number, tokens=12, stream=False: mixed(number + stream, tokens, stream)
    )
    assert run(faults.crowd(busy.port, 10, at_once=4)).wrong == [0], "the control: client 0 reads client 1's text"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["at once", "in the middle", "by a reset"])
def test_requests_end_with_their_client(busy: Live, way: str, stream: bool) -> None:
    async def leave() -> None:
        body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
        reader, writer = await asyncio.open_connection(faults.HOST, busy.port)
        writer.write(faults.head_of(faults.TEXT, len(body)) + body)
        if way == "at once":
            await writer.drain()
            await faults.shut(writer)
            return
        while busy.here[0] < 2:
            await asyncio.sleep(0.005)
        if stream:
            assert await asyncio.wait_for(reader.read(1), 10)
        if way == "by a reset":
            faults.reset_at_close(writer)
        await faults.shut(writer)

    before = generated(busy)
    run(leave())
    busy.until(lambda: busy.here == (0, 0), 5)
    assert generated(busy) - before < 2 * 480, "they have not run to their end"


def generated(busy: Live) -> float:
    """New tokens of all requests that have ended."""
    return float(re.findall(rb"^haast:generation_tokens_total{.*} (\S+)$", busy.service.metrics.page(), re.M)[0])


def test_for_a_client_that_stays_they_do(busy: Live) -> None:
    before = generated(busy)
    assert run(faults.ask(busy.port, faults.TEXT, {**LONG, "n": 2})).status == 200
    assert generated(busy) - before == 2 * 480, "the control"


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_is_not_there_any_more(busy: Live, stream: bool) -> None:
    async def leave() -> None:
        first = asyncio.create_task(faults.ask(busy.port, faults.TEXT, {**LONG, "n": 4}))
        while busy.here[0] < 4:
            await asyncio.sleep(0.005)
        body = json.dumps({**LONG, "stream": stream, "n": 3}).encode()
        _, writer = await asyncio.open_connection(faults.HOST, busy.port)
        writer.write(faults.head_of(faults.TEXT, len(body)) + body)
        while busy.here != (4, 3):
            await asyncio.sleep(0.005)
        await faults.shut(writer)
        begun = time.monotonic()
        while busy.here[1]:
            assert time.monotonic() - begun < 2, "it waits for nobody"
            await asyncio.sleep(0.005)
        assert busy.here[0] == 4, "the others run on"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    run(leave())
    busy.until(lambda: busy.here == (0, 0), 3)


def test_a_body_that_stops_coming(busy: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    config = busy.service.config
    monkeypatch.setattr(running, "_EXTRA_CONNECTIONS", 4)
    monkeypatch.setattr(connection, "IDLE", 0.5)
    monkeypatch.setattr(connection, "_HEAD", 0.5)
    with live(max_running=1, max_waiting=0, body_timeout=0.3, grace=1) as server:

        async def ask() -> None:
            raw = faults.head_of(faults.TEXT, 5000) + b'{"prompt": "a'
            reply = await faults.ask(server.port, "", raw=raw)
            assert reply.status == 408 and reply.data["error"]["code"] == "body_timeout"
            assert reply.headers["connection"] == "close"
            heads = [await asyncio.open_connection(faults.HOST, server.port) for _ in range(5)]
            for _, writer in heads:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: ")
            await asyncio.sleep(0.1)
            late = await faults.ask(server.port, faults.TEXT, faults.numbered(1))
            assert late.status == 503 and late.data["error"]["code"] == "busy", "no more connections than that"
            for reader, _ in heads:
                assert await asyncio.wait_for(reader.read(), 5) == b"", "a head that never ends is waited for so long"
            assert (await faults.ask(server.port, faults.TEXT, faults.numbered(1))).status == 200
            for _, writer in heads:
                await faults.shut(writer)

        run(ask())
    assert config.body_timeout == 30


def test_a_slow_reader_gets_all_and_one_that_never_reads_is_ended() -> None:
    body = json.dumps({**LONG, "max_tokens": 200, "stream": True, "haast": {"trace": True}}).encode()
    with live(send_buffer=4096, send_timeout=0.5, grace=1) as server:

        async def read(pace: float | None) -> str:
            made = faults.narrow(server.port)
            reader, writer = await asyncio.open_connection(sock=made, limit=1024)
            writer.write(faults.head_of(faults.TEXT, len(body)) + body)
            try:
                if pace is None:
                    while server.here[0] == 0:
                        await asyncio.sleep(0.01)
                    reply = await faults.ask(server.port, faults.TEXT, faults.numbered(2))
                    assert reply.status == 200, "others are answered meanwhile"
                    while server.here[0] or len(server.server.server_state.connections):
                        await asyncio.sleep(0.05)
                    return "ended"
                return "whole" if (await faults.read_reply(reader, pace)).well_formed else "cut"
            finally:
                await faults.shut(writer)

        assert run(asyncio.wait_for(read(0.0002), 90)) == "whole"
        assert run(asyncio.wait_for(read(None), 60)) == "ended", "its requests and its connection"


def test_floods_are_refused_in_json(busy: Live) -> None:
    found = {each.rpartition(":")[0]: each.rpartition(": ")[2] for each in run(faults.floods(busy.port))}
    assert not any(" " in status for status in found.values()), found
    for name in ("many headers", "a long header", "a long line"):
        assert found.pop(name) in ("431", "closed")
    assert found.pop("a body too long") == "413"
    assert set(found.values()) == {"400"}, found


def test_prompts_at_the_edge_of_the_context(busy: Live) -> None:
    found = run(faults.edges(busy.port))
    assert list(found.values()) == [200, 400, 400, 400, 200, 400], found
    assert "context-1 and 1: 1" in found and "context-5 and 5: 5" in found, found


def test_bodies_that_no_friend_sends(busy: Live) -> None:
    found = run(faults.fuzz(busy.port, 120))
    assert found.wrong == [] and sum(found.statuses.values()) == 120
    assert {"200", "400", "415", "422"} <= set(found.statuses)
    assert found.stalled_s < 1 + found.machine_stalled_s, "others are answered meanwhile"


def test_a_wrong_reply_would_be_seen() -> None:
    kinds = {"content-type": "application/json", "x-content-type-options": "nosniff"}
    error = b'{"error": {"message": "", "type": "", "param": null, "code": null}}'
    stream = {**kinds, "content-type": "text/event-stream"}
    assert faults.judged(faults.Reply(400, kinds, error)) is None
    for status, headers, body in (
        (500, kinds, error),
        (400, kinds, b'{"detail": "no"}'),
        (400, {**kinds, "content-type": "text/html"}, error),
        (400, {"content-type": "application/json"}, error),
        (400, kinds, error.replace(b'""', b'"Traceback"', 1)),
        (200, stream, b'data: {"a": 1}\n\n'),
    ):
        assert faults.judged(faults.Reply(status, headers, body)) is not None


def test_schemathesis_finds_no_body_that_is_not_answered_or_told(service: Service) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="it comes with haast[dev]")

    async def document() -> Json:
        async with client_of(service) as client:
            found: Json = (await client.get("/openapi.json")).json()
            return found

    schema = schemathesis.openapi.from_dict(run(document()))
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [each for each in operations if each.method == "post"]
    assert len(posts) > 5
    modes = schemathesis.GenerationMode
    cases = st.one_of(
        [each.as_strategy(generation_mode=mode) for each in posts for mode in (modes.NEGATIVE, modes.POSITIVE)]
    )
    statuses = Counter[int]()

    @settings(max_examples=50)
    @given(case=cases)
    def check(case: Any) -> None:
        body = case.body if isinstance(case.body, bytes) else _json(case.body)
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):  # to the point
                case.body[name] = 2 if not case.body.get(name) else case.body[name]
            body = _json(case.body)
        statuses[run(_status(service, case.operation.path, body))] += 1

    check()
    assert set(statuses) <= {200, 400, 404, 413, 415, 422} and statuses[422] > 5 and len(statuses) > 2, statuses


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode("utf-8", "surrogatepass")


async def _status(service: Service, path: str, body: bytes) -> int:
    async with client_of(service) as client:
        reply = await client.post(path, content=body, headers=JSON)
        wrong = faults.judged(faults.Reply(reply.status_code, dict(reply.headers), reply.content))
        assert wrong is None, (wrong, reply.text, body)
        return reply.status_code


def _forms() -> Iterator[Json]:
    for regex in REGEXES:
        yield {"regex": regex}
    for grammar in GRAMMARS:
        yield {"grammar": grammar}
    for schema in SCHEMAS:
        yield {"structured_outputs": {"json": schema}}
    yield {"choice": ["a" * 150_000]}
    yield {"choice": [f"c{number}" for number in range(20_000)]}
    yield {"stop": ["a" * 200_000] * 16}
    yield {"stop_token_ids": list(range(49_000)) * 10, "ignore_eos": True}
    yield {"logit_bias": {str(number): -100 for number in range(10_000)}}
    yield {"prediction": {"type": "content", "content": "ab " * 300_000}}
    yield {"prompt": "a" * 3_500_000}
    yield {"prompt": "a b " * 900_000}
    yield {"prompt": SPECIAL * 20_000}
    yield {"n": 16, "prompt": [1] * 400}
    yield {"grammar": "(" * 3_900_000}
    yield {"regex": "(a|b)*" * 600_000}
    yield {"choice": ["ab"] * 240_000}


def _large() -> Iterator[tuple[str, Json]]:
    """What is much to read or to write, and is answered or refused."""
    many: Json = {"prompt": "a", "max_tokens": 40, "ignore_eos": True, "logprobs": 20}
    yield faults.TEXT, {**many, "n": 8}
    yield faults.TEXT, {**many, "stream": True, "stop": "\n" * 500, "logit_bias": {"198": 100}}  # all is held back
    for stream in (False, True):
        yield "/v1/responses", {"input": "a", "max_output_tokens": 80, "top_logprobs": 20, "stream": stream}
    yield "/v1/responses", {"input": [{}] * 29_000}
    yield faults.CHAT, {"messages": [{"role": "user", "content": "a"}] * 9_900}
    yield faults.TEXT, {"prompt": [1] * 240_000}
    yield "/tokenize", {"prompt": "a b " * 60_000, "return_token_strs": True}
    yield "/detokenize", {"tokens": [5] * 240_000}


def test_hostile_forms_and_large_ones_take_no_time_and_hold_up_nobody(service: Service) -> None:
    """Seconds of a processor, not of a clock: other programs run beside this one."""
    slow: list[Any] = []
    asked = [(faults.TEXT, {"prompt": "the sky", "max_tokens": 8, **form}) for form in _forms()]

    async def beat(worst: list[float]) -> None:
        while True:
            begun = time.process_time()  # of all threads: the loop waits for whoever holds Python's lock, too
            await asyncio.sleep(0.01)
            worst[0] = max(worst[0], time.process_time() - begun)

    async def every() -> None:
        async with client_of(service) as client:
            worst = [0.0]
            beating = asyncio.create_task(beat(worst))
            for path, form in [*asked, *_large()]:
                body = text_of(form).encode("utf-8", "surrogatepass")
                await asyncio.sleep(0.02)
                worst[0], begun = 0.0, time.process_time()
                reply = await client.post(path, content=body, headers=JSON)
                assert reply.status_code in (200, 400, 422), reply.text
                took = time.process_time() - begun
                if took > 2 or worst[0] > 0.15:
                    slow.append((path, body[:100], took, worst[0]))
            beating.cancel()

    service.limits.grammars.prepare()
    gc.freeze()  # as `serve` does
    try:
        run(every())
    finally:
        gc.unfreeze()
    assert slow == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [{}] * 300_000}),
        (ChatRequest, {"messages": [1] * 300_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 300_000}]}),
        (ChatRequest, {"messages": [{"role": "user"}], "haast": {str(number): 0 for number in range(200_000)}}),
        (ChatRequest, {"messages": [{"role": "user"}], "logit_bias": {str(number): "a" for number in range(200_000)}}),
        (DetokenizeRequest, {"tokens": ["a"] * 300_000}),
    ],
)
def test_a_body_of_many_mistakes_is_refused_at_the_first(kind: Any, body: Json) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError) as told:
        kind.model_validate(body)
    assert time.process_time() - begun < 0.5
    errors: Any = told.value
    assert errors.error_count() <= 4, "one of each kind of list"


def test_one_grammar_that_fails_at_once_ends_no_neighbour(service: Service) -> None:
    async def both() -> tuple[list[int], list[str]]:
        async with client_of(service) as client:
            wrong = {"prompt": "the sky", "max_tokens": 4, "grammar": "start: start"}
            right = [faults.numbered(number) for number in range(4)]
            alone = [(await client.post(faults.TEXT, json=body)).json()["choices"] for body in right]
            replies = await asyncio.gather(*(client.post(faults.TEXT, json=body) for body in (*right, wrong, *right)))
            same = [reply.json().get("choices") for reply in replies]
            assert same[:4] == same[5:] == alone
            return [reply.status_code for reply in replies], []

    assert run(both())[0] == [200] * 4 + [400] + [200] * 4


def test_nothing_begins_after_the_end() -> None:
    service = tiny_service()
    plan = completion_plan(CompletionRequest.model_validate(LONG), service.limits)
    service.begin(plan)
    service.end_all()
    with pytest.raises(CancelledError, match="shutting down"):
        service.begin(plan)
    assert service.engine("auto").scheduler.running == 0
    service.engine("auto").scheduler.step()
    assert service.engine("auto").scheduler.requests == []


def test_at_a_shutdown_who_can_end_ends_and_who_cannot_is_told() -> None:
    with live(max_running=4, max_waiting=64, grace=3) as server:

        async def many() -> Counter[str]:
            bodies = [
                {**LONG, "seed": number, "stream": number % 2 == 0, "max_tokens": 60 if number < 2 else 480}
                for number in range(12)
            ]
            tasks = [asyncio.create_task(faults.ask(server.port, faults.TEXT, body)) for body in bodies[:2]]
            while server.here[0] < 2 and not all(task.done() for task in tasks):
                await asyncio.sleep(0.005)
            tasks += [asyncio.create_task(faults.ask(server.port, faults.TEXT, body)) for body in bodies[2:]]
            while server.here[0] < 4:
                await asyncio.sleep(0.005)
            server.server.should_exit = True
            replies = await asyncio.gather(*tasks)
            assert all(reply.well_formed for reply in replies)
            errors = [b'"error"' in reply.body for reply in replies]
            assert errors[:2] == [False, False], "short ones are whole"
            return Counter(map(str, errors))

        found = run(asyncio.wait_for(many(), 60))
    assert found["True"] >= 4, "long ones were told"


def test_sigterm_under_load(tmp_path: Path) -> None:
    command = faults.tiny_command(max_running=4, max_waiting=64, grace=1)
    with faults.served(command, tmp_path / "log") as server:
        found = run(faults.signalled(server, signal.SIGTERM, 16, 1))
    assert found.cut == 0 and found.whole + found.told == 16 and found.told > 0
    assert set(found.late) <= {"503", "refused", "200"} and found.code in (0, -signal.SIGTERM), found
    assert found.seconds < 10 and "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_after_sigkill_it_starts_again_on_the_same_port(tmp_path: Path) -> None:
    with faults.served(faults.tiny_command(max_running=4), tmp_path / "log") as server:
        said = faults.plain(run(faults.ask(server.port, faults.TEXT, faults.numbered(5))))
        run(faults.signalled(server, signal.SIGKILL, 12, 1))
        assert server.process.poll() == -signal.SIGKILL
        with faults.served(faults.tiny_command(port=server.port), tmp_path / "again") as again:
            assert faults.plain(run(faults.ask(again.port, faults.TEXT, faults.numbered(5)))) == said


@pytest.mark.slow
def test_a_thousand_vanish_and_nothing_leaks(tmp_path: Path) -> None:
    with faults.served(faults.tiny_command(max_running=8, max_waiting=64), tmp_path / "log") as server:
        assert faults.problems(faults.leaks(server, 1000, 48, 20_000)) == []


@pytest.mark.slow
def test_ten_thousand_bodies(tmp_path: Path) -> None:
    with faults.served(faults.tiny_command(max_running=8, max_waiting=64, timeout=20), tmp_path / "log") as server:
        assert faults.problems(faults.fuzzed(server, 10_000, 20_000)) == []


def test_what_is_read_is_http(busy: Live) -> None:
    async def cut() -> None:
        server = await asyncio.start_server(_cut_answer, faults.HOST, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises((faults.CutError, h11.RemoteProtocolError)):
                await faults.ask(port, "/")

    run(cut())


def test_who_leaves_waits_for_nobody_that_holds_the_model(service: Service) -> None:
    """A step that begins just now, a session, a measurement: they may take seconds, and the event loop has none."""
    scheduler, held, left, late = service.engine("auto").scheduler, threading.Event(), threading.Event(), list[bool]()
    (writing,) = service.begin(completion_plan(CompletionRequest.model_validate(LONG), service.limits))

    def hold() -> None:
        with scheduler.target.lock:
            held.set()
            late.append(not left.wait(20))

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    writing.close()
    left.set()
    other.join()
    assert late == [False]
    until = time.monotonic() + 10
    while scheduler.requests and time.monotonic() < until:
        time.sleep(0.005)
    assert scheduler.requests == [], "what it holds is free soon"


def test_what_is_loaded_is_no_work_for_the_collector_and_heaps_are_few(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = list[Any]()

    def stop(*given: Any) -> Any:
        assert given[-1] is running._prepare_service
        raise InterruptedError

    try:
        running._prepare_service(service)
        before = gc.get_freeze_count()
        gc.unfreeze()
        monkeypatch.setattr(running, "make_server", stop)
        monkeypatch.setattr(running, "_call_c", lambda *given: called.append(given))
        monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
        with pytest.raises(InterruptedError):
            running.serve(lambda: service._haast, "tiny", service.config)
        assert before > 100_000 and gc.get_freeze_count() > 100_000
        assert called == [("mallopt", -8, 2)]
    finally:
        gc.unfreeze()


WORDS = st.text(st.sampled_from('ab\\"{[,:é\ud800'), max_size=5)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), WORDS),
    lambda inside: st.one_of(st.lists(inside, max_size=40), st.dictionaries(WORDS, inside, max_size=4)),
)


@given(VALUES)
def test_long_answers_are_written_as_short_ones(value: Any) -> None:
    assert in_pieces(value) == encoded(value)


@given(VALUES, st.integers(1, 9), st.booleans())
def test_signs_are_counted_outside_of_texts(value: Any, piece: int, ascii_alone: bool) -> None:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return [bare(each) for each in value.values()]
        return [bare(each) for each in value] if isinstance(value, list) else 0

    def names(value: Any) -> int:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (len(value) if isinstance(value, dict) else 0) + sum(map(names, inside))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(security, "_PIECE", piece)
        body = bytearray(json.dumps(value, ensure_ascii=ascii_alone).encode("utf-8", "surrogatepass"))
        parts, values = security._count_delimiters(json.dumps(bare(value)).encode())
        assert security._count_outside_strings(body) == (parts + names(value), values)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": [[]] * 31_000}, "too_many_values"),
        ({"prompt": "a", "x": {str(number): 0 for number in range(31_000)}}, "too_many_values"),
        ({"prompt": [1] * 251_000}, "too_many_values"),
        ({"prompt": [1] * 240_000}, "context_length_exceeded"),
        ({"prompt": ',"{:[\\' * 250_000}, "context_length_exceeded"),
    ],
)
def test_what_python_reads_in_one_go_is_bounded(service: Service, body: Json, code: str) -> None:
    async def ask() -> None:
        async with client_of(service) as client:
            reply = await client.post(faults.TEXT, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)

    run(ask())


def test_a_long_prediction_of_one_word_is_counted_soon() -> None:
    begun = time.process_time()
    assert prediction_counts([1, 1, 1, 2] * 5000, [1] * 20_000)[0] > 0
    assert time.process_time() - begun < 1


async def _cut_answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"a')
    await writer.drain()
    await faults.shut(writer)
