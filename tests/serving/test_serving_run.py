"""`haast serve` as a process: its flags, what it says before it loads, a signal's end; metrics and the dashboard."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fakes import tiny_llama
from serving import client_of, run, served, tiny_service, tokenizer
from torch import Tensor
from typer.testing import CliRunner

from haast.cli import app
from haast.core import Processor
from haast.serving.config import ServeConfig
from haast.serving.plan import Plan
from haast.serving.service import Service

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("served") / "tiny-model"
    words = tokenizer()
    tiny = tiny_llama(vocab=len(words), context=512)
    tiny.config.eos_token_id = tiny.generation_config.eos_token_id = words.eos_token_id
    torch.nn.Module.float(tiny)
    tiny.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def process(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    command = [
        sys.executable, "-m", "haast", "serve", "--model", str(model), "--head", "none", "--port", str(port),
        "--threads", "1", "--grace", "20", "--api-key-file", str(model / "keys"), "--calibration", "off",
    ]  # fmt: skip
    (model / "keys").write_text("# comment\nsecret-7\n")
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=model)
    try:
        yield started, f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


def test_a_whole_life(process: tuple[subprocess.Popen[str], str]) -> None:
    """Loading is told, answers come, a signal lets the running one end and takes no other."""
    started, url = process
    statuses = set()
    with httpx2.Client(base_url=url, headers={"Authorization": "Bearer secret-7"}, timeout=60) as http:
        for _ in range(600):
            with suppress(httpx2.ConnectError):
                statuses.add(http.get("/health").status_code)
            if 200 in statuses:
                break
            time.sleep(0.1)
        assert statuses <= {200, 503} and 200 in statuses
        assert http.get("/v1/models").json()["data"][0]["id"] == "tiny-model"
        body = {"prompt": "a", "max_tokens": 200, "stream": True, "seed": 1, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            started.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert started.wait(timeout=60) in (0, -signal.SIGTERM)
    assert started.stderr is not None
    log = started.stderr.read()
    assert "listening on http://127.0.0.1" in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file"),
        (["--host", "0.0.0.0", "--api-key-file", "/nowhere"], "can't be read"),
        (["--port", "70000"], "port=70000"),
        (["--api-key", "with blank"], "no header can carry"),
        (["--max-running", "0"], "max_running=0"),
        (["--timeout", "-1"], "timeout=-1"),
        (["--model", "/nowhere/at-all"], "/nowhere/at-all"),
        (["--head", "/nowhere"], "/nowhere"),
        (["--drafter", "magic"], "magic"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_loads(flags: list[str], words: str) -> None:
    begun = time.monotonic()
    done = CliRunner().invoke(app, ["serve", *flags])
    assert done.exit_code == 2 and words in done.output and done.output.count("\n") == 1, done.output
    assert time.monotonic() - begun < 20


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = CliRunner().invoke(app, ["serve", "--head", "none", "--port", str(server.getsockname()[1])])
    assert done.exit_code == 2 and "can't be listened on" in done.output, done.output


def test_a_model_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-m", "haast", "serve", "--model", "broken", "--head", "none", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (2, 3), done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("haast: ")


def test_the_dashboard_reads_what_there_is() -> None:
    dashboard = json.loads((ROOT / "examples" / "serve" / "grafana.json").read_text())
    service = tiny_service()

    async def metrics() -> str:
        async with client_of(service) as client:
            body = {"prompt": "a b c a b c", "max_tokens": 8, "seed": 1}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert (await client.post("/v1/completions", json=body | {"n": 0})).status_code == 422
            return (await client.get("/metrics")).text

    text = run(metrics())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in shown for name in re.findall(r"haast:[a-z0-9_]+", expression)}
    assert len(names) > 12
    for name in names:
        assert re.search(rf"^{name}\{{", text, re.MULTILINE), name
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) and dashboard["schemaVersion"] >= 36
    counted = dict(re.findall(r"^(haast:\w+)\{[^}]*\} ([0-9.e+]+)$", text, re.MULTILINE))
    assert float(counted["haast:generation_tokens_total"]) == 8
    assert float(counted["haast:num_requests_running"]) == 0


class Slow(Service):
    """Every token takes a while."""

    def _processors(self, plan: Plan, length: int) -> list[Processor]:
        def wait(history: Tensor, scores: Tensor) -> Tensor:
            time.sleep(0.15)
            return scores

        return [wait, *super()._processors(plan, length)]


def slow(config: ServeConfig) -> Slow:
    return Slow(tiny_service()._haast, "tiny", config)


def test_a_silent_stream_says_that_it_lives() -> None:
    with served(slow(ServeConfig(keep_alive=0.04))) as url:
        reply = httpx2.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 4, "stream": True})
    assert reply.text.count("\n: ping") > 4 and reply.text.endswith("data: [DONE]\n\n")


def test_answers_that_take_too_long_are_told() -> None:
    body = {"prompt": "a", "max_tokens": 40, "seed": 1}
    with served(slow(ServeConfig(timeout=0.5))) as url:
        whole = httpx2.post(f"{url}/v1/completions", json=body)
        stream = httpx2.post(f"{url}/v1/completions", json={**body, "stream": True})
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "timeout"
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert stream.status_code == 200 and chunks[0]["object"] == "text_completion"
    assert chunks[-1]["error"]["code"] == "timeout" and stream.text.endswith("data: [DONE]\n\n")


def test_a_full_queue_says_come_again() -> None:
    config = ServeConfig(max_running=1, max_waiting=0)
    service = slow(config)
    scheduler = service.engine("auto").scheduler
    scheduler.max_batch, scheduler.max_waiting = 1, 0
    first_body = {"prompt": "a", "max_tokens": 20, "stream": True, "ignore_eos": True}
    with served(service) as url, httpx2.Client(base_url=url) as http:
        with http.stream("POST", "/v1/completions", json=first_body) as first:
            lines = first.iter_lines()  # dropped, it would close the stream
            next(lines)
            second = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert second.status_code == 429 and int(second.headers["retry-after"]) >= 1
        assert second.json()["error"]["code"] == "queue_full"
        for _ in range(100):  # the first has left: its place is free
            third = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            if third.status_code == 200:
                break
            time.sleep(0.05)
        assert third.status_code == 200


def test_absent_addresses_say_why() -> None:
    async def ask() -> list[Any]:
        async with client_of(tiny_service()) as client:
            return [await client.post(path, json={}) for path in ("/v1/embeddings", "/v1/audio/speech", "/v1/nothing")]

    for reply in run(ask()):
        assert reply.status_code == 404 and reply.json()["error"]["type"] == "not_found_error"
