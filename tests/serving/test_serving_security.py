"""Who may ask a server, how much, and what it lets out: keys, origins, hosts, limits, logs, texts that are markup."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2
import pytest
import serving_faults as faults
from hostile import MARKUP
from live import Live, live
from serving import Json, client_of, run, tiny_service
from typer.testing import CliRunner

from haast.cli import app as command
from haast.serving.config import ServeConfig
from haast.serving.security import MOST_HEADERS, Bucket, Rates
from haast.serving.service import Service

CHAT, TEXT = faults.CHAT, faults.TEXT
ASKED: Json = {"prompt": "the sky", "max_tokens": 2, "seed": 1}
KEY = {"authorization": "Bearer first-key"}
TYPED = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service()


@asynccontextmanager
async def open_client(service: Service, **fields: Any) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(service, ServeConfig(**fields)) as client:
        yield client


def asked(service: Service, fields: Json | None = None, **more: Any) -> httpx2.Response:
    """One request: POST of `ASKED`, unless told otherwise."""

    async def ask() -> httpx2.Response:
        async with open_client(service, **(fields or {})) as client:
            given: Any = {"method": "POST", "url": TEXT, **more}
            if given["method"] == "POST" and "content" not in given and "json" not in given:
                given["json"] = ASKED
            return await client.request(**given)

    found: httpx2.Response = run(ask())
    return found


def code(reply: httpx2.Response) -> str | None:
    """An error's code, once it is an error as it should be."""
    assert reply.headers["content-type"] == "application/json" and reply.headers["x-content-type-options"] == "nosniff"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    found: str | None = error["code"]
    return found


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "Bearer first-key, second-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"authorization": "Bearer FIRST-KEY"},
        {"authorization": "Bearer f\u00efrst-key"},
        {"x-api-key": "first-key"},
    ],
)
def test_without_a_known_key_nothing_is_answered(service: Service, tmp_path: Path, headers: dict[str, str]) -> None:
    (tmp_path / "keys").write_text("# ours\nfirst-key\n\nsecond-key\n")
    config = {"api_key_file": str(tmp_path / "keys")}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for method, path in (
        ("POST", TEXT),
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    ):
        reply = asked(service, config, method=method, url=path, headers=raw)
        assert reply.status_code == 401 and code(reply) == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer" and "first-key" not in reply.text
    assert asked(service, config, method="GET", url="/health", headers=raw).status_code == 200


@pytest.mark.parametrize("key", ["Bearer first-key", "bearer second-key", "Bearer third"])
def test_each_key_opens(service: Service, tmp_path: Path, key: str) -> None:
    (tmp_path / "keys").write_text("first-key\r\n  second-key  \n")
    config = {"api_key_file": str(tmp_path / "keys"), "api_key": "third"}
    assert asked(service, config, headers={"authorization": key}).status_code == 200


def test_keys_are_compared_in_constant_time(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")
    compared: list[tuple[bytes, bytes]] = []
    true = hmac.compare_digest

    def compare(sent: bytes, key: bytes) -> bool:
        compared.append((sent, key))
        return true(sent, key)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for sent in ("first-key", "nothing"):
        compared.clear()
        asked(service, {"api_key_file": str(tmp_path / "keys")}, headers={"authorization": f"Bearer {sent}"})
        assert compared == [(sent.encode(), b"first-key"), (sent.encode(), b"second-key")], "all, whichever fits"


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="holds no key"):
        ServeConfig(api_key_file=str(tmp_path / "keys"))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "10.0.0.1", "127.0.0.1.example.org"]
)
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="--api-key-file"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, api_key="a").keys == ("a",)
    assert not ServeConfig(host=host, auth=False).local


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.9"])
def test_this_machine_needs_none(host: str) -> None:
    assert ServeConfig(host=host).local


def test_the_command_refuses_before_anything_loads() -> None:
    result = CliRunner().invoke(command, ["serve", "--host", "0.0.0.0", "--model", "/nowhere"])
    assert result.exit_code != 0 and "--api-key-file" in result.output


# --------------------------------------------------------------------------------------------------- origins, hosts


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1:81", "http://127.0.0.1.evil.example", "http://[", "file://"],
)
def test_pages_of_other_origins_are_refused(service: Service, origin: str) -> None:
    reply = asked(service, headers={"origin": origin})
    assert reply.status_code == 403 and code(reply) == "origin_not_allowed"
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_its_own_page_may_ask(service: Service) -> None:
    reply = asked(service, headers={"origin": "http://127.0.0.1"})
    assert reply.status_code == 200 and not any(name.startswith("access-control") for name in reply.headers)


def test_origins_are_allowed_by_flag_alone(service: Service) -> None:
    before = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = {"allow_origin": "https://a.example, https://b.example/"}
    for origin, config, status, told in (
        ("https://a.example", {}, 403, None),
        ("https://a.example", allowed, 200, "https://a.example"),
        ("https://b.example", allowed, 200, "https://b.example"),
        ("https://c.example", allowed, 403, None),
    ):
        reply = asked(service, config, headers={"origin": origin})
        assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (status, told)
        assert "access-control-allow-credentials" not in reply.headers
        reply = asked(service, config, method="OPTIONS", headers={"origin": origin, **before})
        assert (reply.status_code < 400, reply.headers.get("access-control-allow-origin")) == (status == 200, told)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "[", "[::1", "127.0.0.1.evil.example", "a]b"]
)
def test_names_of_others_that_point_here_are_refused(service: Service, host: str) -> None:
    reply = asked(service, headers={"host": host})
    assert reply.status_code == 403 and code(reply) == "host_not_allowed"
    assert asked(service, {"allow_host": "evil.example"}, headers={"host": "evil.example"}).status_code == 200
    assert asked(service, headers={"host": "localhost:8000"}).status_code == 200


def test_only_json_is_taken(service: Service) -> None:
    """A form or a text can be sent by any page without asking first; JSON can't."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        reply = asked(service, content=json.dumps(ASKED).encode(), headers={"content-type": kind})
        assert reply.status_code == 415 and code(reply) == "unsupported_media_type"
    kind = "Application/JSON; charset=utf-8"
    assert asked(service, content=json.dumps(ASKED).encode(), headers={"content-type": kind}).status_code == 200


# ----------------------------------------------------------------------------------------------------------- markup


HOSTILE: list[tuple[str, Json]] = [
    (TEXT, {**ASKED, "prompt": MARKUP, "echo": True}),
    (TEXT, {**ASKED, "choice": [MARKUP]}),
    (TEXT, {**ASKED, "model": MARKUP}),
    (TEXT, {**ASKED, "haast": {"drafter": MARKUP}}),
    (TEXT, {**ASKED, "haast": {MARKUP: 1}}),
    (TEXT, {**ASKED, "grammar": MARKUP}),
    (TEXT, {**ASKED, "regex": MARKUP + "("}),
    (CHAT, {"messages": [{"role": MARKUP, "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": MARKUP}]}]}),
    (CHAT, {
        "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": MARKUP}}],
    }),
    (CHAT, {
        "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": {"type": "function", "function": {"name": MARKUP}},
    }),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": MARKUP}}),
    ("/v1/responses", {"input": [{"type": MARKUP}]}),
    ("/v1/responses", {"input": [{"role": MARKUP, "content": MARKUP}]}),
    ("/tokenize", {"prompt": MARKUP, "return_token_strs": True}),
    ("/haast/step", {"nodes": MARKUP}),
    (f"/{MARKUP}", {}),
    (f"/v1/models/{MARKUP}", {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), HOSTILE)
def test_markup_is_never_html(service: Service, path: str, body: Json) -> None:
    for method in ("POST", "GET"):
        reply = asked(service, method=method, url=path, **({"json": body} if method == "POST" else {}))
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        reply.json()


def test_markup_in_an_answer_is_that_text(service: Service) -> None:
    reply = asked(service, json={**ASKED, "choice": [MARKUP], "max_tokens": 60})
    assert reply.json()["choices"][0]["text"] == MARKUP, "the control: it was there"
    stream = asked(service, json={**ASKED, "choice": [MARKUP], "max_tokens": 60, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["x-content-type-options"] == "nosniff"
    assert faults.plain(faults.Reply(200, dict(stream.headers), stream.content)) == [MARKUP]


def test_the_page_has_a_policy(service: Service) -> None:
    reply = asked(service, method="GET", url="/")
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for name, value in (
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("x-content-type-options", "nosniff"),
    ):
        assert reply.headers[name] == value


@pytest.mark.parametrize(
    "path",
    [
        "/static/../config.py", "/static/%2e%2e/config.py", "/static/..%2fconfig.py", "/static//etc/passwd",
        "/static/%2fetc%2fpasswd", "/static/..\\config.py", "/static/%00", "/static/",
        "/static/../../../../../../../../etc/passwd", "/static/%2e%2e/v1/models", "/static/../metrics",
    ],
)  # fmt: skip
def test_no_file_beside_the_pages_is_read(service: Service, path: str) -> None:
    async def ask() -> faults.Reply:
        """As sent: a client would tidy the path up."""
        found: list[Any] = []
        async with open_client(service, api_key="a") as client:
            application: Any = client._transport.app  # type: ignore[attr-defined]
            raw = path.encode()
            scope = {
                "type": "http", "method": "GET", "path": unquote(path), "raw_path": raw, "query_string": b"",
                "headers": [(b"host", b"127.0.0.1")], "http_version": "1.1", "scheme": "http", "root_path": "",
            }  # fmt: skip

            async def receive() -> Json:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Any) -> None:
                found.append(message)

            await application(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in found[1:])
        return faults.Reply(
            found[0]["status"], {key.decode(): value.decode() for key, value in found[0]["headers"]}, body
        )

    reply = run(ask())
    assert reply.status in (401, 404) and reply.well_formed, "neither a file, nor an answer for which a key is needed"


# ----------------------------------------------------------------------------------------------------------- limits


def test_bodies_have_a_limit(service: Service) -> None:
    small = {"max_body": 1000}
    assert asked(service, small).status_code == 200
    reply = asked(service, small, json={**ASKED, "user": "a" * 1000})
    assert reply.status_code == 413 and code(reply) == "body_too_large"

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async def chunked() -> httpx2.Response:
        async with open_client(service, **small) as client:
            return await client.post(TEXT, content=pieces(), headers=TYPED)

    assert code(run(chunked())) == "body_too_large", "a length that is not told is counted"


@pytest.mark.parametrize("length", ["-1", "1e3", "\u00b2", "9" * 30, "0x10", " ", "12, 12"])
def test_lengths_that_are_none_are_refused(service: Service, length: str) -> None:
    headers = [(b"content-length", length.encode("latin-1")), (b"content-type", b"application/json")]
    reply = asked(service, content=b"{}", headers=headers)
    assert reply.status_code == 413 and code(reply) == "body_too_large"


def test_headers_have_a_limit(service: Service) -> None:
    fits = {"x-long": "a" * (MOST_HEADERS - 1000)}
    assert asked(service, headers=fits).status_code == 200
    for more in ({"x-long": "a" * MOST_HEADERS}, {f"x-{number}": "a" * 100 for number in range(400)}):
        reply = asked(service, headers=more)
        assert reply.status_code == 431 and code(reply) == "headers_too_large"
    reply = asked(service, method="GET", url="/health?" + "a" * MOST_HEADERS)
    assert reply.status_code == 431


def test_each_key_has_its_own_minute(service: Service, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")

    async def ask(**limit: int) -> list[int]:
        other = {"authorization": "Bearer second-key"}
        async with open_client(service, api_key_file=str(tmp_path / "keys"), **limit) as client:
            found = []
            for headers in (KEY, KEY, KEY, other, {"authorization": "Bearer unknown"}):
                reply = await client.post(TEXT, json={**ASKED, "max_tokens": 30, "ignore_eos": True}, headers=headers)
                found.append(reply.status_code)
                if reply.status_code == 429:
                    assert code(reply) == "rate_limit_exceeded" and 0 < int(reply.headers["retry-after"]) <= 61
            assert (await client.get("/v1/models", headers=KEY)).status_code == 200, "looking costs nothing"
            return found

    assert run(ask()) == [200, 200, 200, 200, 401], "the control: no limits by default"
    assert run(ask(requests_per_minute=2)) == [200, 200, 429, 200, 401]
    assert run(ask(tokens_per_minute=40)) == [200, 200, 429, 200, 401], "60 of 40 were taken: the next one waits"


def test_a_minute_fills_again() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    bucket.take(61)
    assert bucket.wait() == pytest.approx(2)
    now[0] = 1.9
    assert bucket.wait() > 0
    now[0] = 2.1
    assert bucket.wait() == 0
    now[0] = 1e6
    assert bucket.wait() == 0
    bucket.take(60)
    assert bucket.wait() > 0, "never more than a minute's worth"


def test_streams_and_vanished_clients_are_counted(service: Service) -> None:
    config = ServeConfig(tokens_per_minute=20)

    async def ask() -> int:
        async with client_of(service, config) as client:
            body = {**ASKED, "max_tokens": 30, "ignore_eos": True, "stream": True}
            assert (await client.post(TEXT, json=body)).status_code == 200
            return (await client.post(TEXT, json=body)).status_code

    assert run(ask()) == 429


def test_keys_that_are_remembered_are_bounded() -> None:
    rates = Rates(ServeConfig(requests_per_minute=1))
    for number in range(10_100):
        rates.admit(f"key {number}")
    assert len(rates._buckets) == 10_000


# ------------------------------------------------------------------------------------------------------------- logs


def test_no_word_of_a_prompt_is_logged_unless_asked(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = {**ASKED, "prompt": "xylophone\nforged line", "choice": ["marimba"], "max_tokens": 20}
    for asks in (body, {**body, "stream": True}):
        for fields in ({}, {"log_prompts": True}):
            caplog.clear()
            assert asked(service, fields, json=asks).status_code == 200
            lines = [each.getMessage() for each in caplog.records if each.name.startswith("haast")]
            told = [line for line in lines if "xylophone" in line]
            assert len(told) == len(fields), "asked for: one line a choice"
            assert all("marimba" in line and "\n" not in line for line in told)
            assert fields or "marimba" not in caplog.text


def test_an_unforeseen_error_lets_out_no_words(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("/secret/path: the prompt was xylophone")

    monkeypatch.setattr(service, "begin", fail)
    caplog.set_level(logging.INFO)
    reply = asked(service)
    assert reply.status_code == 500 and code(reply) == "internal_error"
    for word in ("secret", "xylophone", "Traceback", ".py", "RuntimeError"):
        assert word not in reply.text
    assert "RuntimeError" in caplog.text and "fail" in caplog.text, "the log says where"
    for word in ("secret", "xylophone", "Traceback", str(Path(__file__).parents[1])):
        assert word not in caplog.text


def test_an_error_in_a_stream_lets_out_no_words(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("/secret/path: the prompt was xylophone")

    monkeypatch.setattr("haast.serving.generation.Generation._delta_of", fail)
    caplog.set_level(logging.INFO)
    reply = asked(service, json={**ASKED, "stream": True})
    assert '"code":"internal_error"' in reply.text and reply.text.endswith("data: [DONE]\n\n")
    assert "xylophone" not in reply.text + caplog.text
    assert service.engine("auto").scheduler.running == 0


def test_wrong_bodies_are_told_without_what_was_sent(service: Service) -> None:
    secret = "xylophone" * 1000
    for path, body in (
        (CHAT, {"messages": [{"role": secret, "content": secret}]}),
        (CHAT, {"messages": secret}),
        (TEXT, {"prompt": {"a": secret}}),
        ("/v1/responses", {"input": [{"role": secret, "content": secret}]}),
    ):
        reply = asked(service, url=path, json=body)
        assert reply.status_code in (400, 422) and secret[:20] not in reply.text and "pydantic" not in reply.text
    reply = asked(service, json={**ASKED, "haast": {"drafter": secret}})
    assert len(reply.text) < 3000, "messages have an end"


def test_a_request_has_the_id_it_brought_unless_that_is_odd(service: Service) -> None:
    assert asked(service, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", MARKUP, "a" * 200, "\u00e9"):
        found = asked(service, headers=[(b"x-request-id", odd.encode())]).headers["x-request-id"]
        assert found != odd and len(found) == 32


# -------------------------------------------------------------------------------------------------------- smuggling


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(grace=1) as found:
        yield found


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + b"content-length: 4\r\ncontent-length: 60\r\n\r\nnull" + HIDDEN,
        HEAD + b"content-length: 60\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 60\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"transfer-encoding: chunked\r\n\r\n0x0\r\n\r\n" + HIDDEN,
        HEAD + b"content-length: +4\r\n\r\nnull" + HIDDEN,
        HEAD + b"content-length: 4 4\r\n\r\nnull" + HIDDEN,
        HEAD + b"x: a\rcontent-length: 60\r\ncontent-length: 4\r\n\r\nnull" + HIDDEN,
    ],
)
def test_a_message_has_one_length(server: Live, raw: bytes) -> None:
    """h11's work, but for a length beside chunks, which it takes and this server refuses: one reply, and the end."""

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(faults.HOST, server.port)
        writer.write(raw)
        read = await asyncio.wait_for(reader.read(), 10)
        await faults.shut(writer)
        return read

    read = run(ask())
    assert read.startswith(b"HTTP/1.1 400 ") and read.count(b"HTTP/1.1") == 1 and b'"object":"list"' not in read
    assert b'"error"' in read and b"nosniff" in read and b"text/html" not in read


def test_what_is_hidden_there_would_be_answered(server: Live) -> None:
    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(faults.HOST, server.port)
        writer.write(
            HEAD + b"content-length: 4\r\n\r\nnull" + HIDDEN.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        )
        read = await asyncio.wait_for(reader.read(), 10)
        await faults.shut(writer)
        return read

    read = run(ask())
    assert read.count(b"HTTP/1.1") == 2 and b'"object":"list"' in read, "the control"
