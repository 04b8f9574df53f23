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
from serving import client_of, run, tiny_service, tokenizer
from typer.testing import CliRunner

from haast.cli import app

ROOT = Path(__file__).parent.parent


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


def test_absent_addresses_say_why() -> None:
    async def ask() -> list[Any]:
        async with client_of(tiny_service()) as client:
            return [await client.post(path, json={}) for path in ("/v1/embeddings", "/v1/audio/speech", "/v1/nothing")]

    for reply in run(ask()):
        assert reply.status_code == 404 and reply.json()["error"]["type"] == "not_found_error"
