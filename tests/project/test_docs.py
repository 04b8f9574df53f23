"""Every block of code in the README and the docs runs: on a tiny model by default, on the real one in the slow suite.

A page's blocks run from top to bottom in one folder, which holds what the pages speak of: `my-head`, `prompts.jsonl`,
`valid.jsonl`, ... Commands run with fewer tokens and prompts (`SHORTER`). What needs what this machine may lack is in
`ELSEWHERE`, with the reason; its flags are checked where it is ours. Nothing else is left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_model
from test_cli import save_random_head, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from haast import api
from haast.cli import app
from haast.drafters import factory
from haast.errors import PrecisionWarning
from haast.formats.export import export_head
from haast.heads.checkpoint import load_head, save_head
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.target import load as models
from haast.target.load import DEFAULT_MODEL, ModelSource

ROOT = Path(__file__).parents[2]
# A tiny head has seen tiny texts.
pytestmark = pytest.mark.filterwarnings("ignore::haast.errors.LongContextWarning")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SERVER = "http://127.0.0.1:8000"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SHORTER = {
    "generate": "--max-new-tokens 8",
    "trace": "--max-new-tokens 8",
    "chat": "",
    "info": "",
    "import": "",
    "export": "",
    "plan": "",
    "report": "",
    "calibrate": "--max-new-tokens 24 --rounds 1 --limit 2",
    "verify": "--limit 1 --max-new-tokens 8 --samples 50",
    "bench": "--limit 1 --max-new-tokens 8",
    "regenerate": "--max-new-tokens 40",  # a few tokens are no self-test
    "make-head": "--views 60 --lengths 40:1 --answers 3",
    "train": "--views 60 --draft-vocab 64 --topk 4 --valid-limit 1 --valid-tokens 8",
}
ELSEWHERE = {
    "pip install": "changes the environment that the test runs in; `make test` installs the same way",
    "vllm serve": "vLLM and a GPU; the client is tested against a fake server",
    "accelerate launch": "eight GPUs; two processes run in test_processes.py",
    "haast regenerate --model Qwen/Qwen3-8B": "that server",
    "torchrun": "two processes; run in the slow suite below",
    "haast check": "the head is random, which it tells by its status; run in test_cli_heads.py",
    "haast serve": "runs until it is stopped; run in test_serving_run.py",
    "haast conform": "asks a server; run in test_conform.py and test_serving_run.py",
    "curl": "asks a server; the same request is sent in test_serving_same.py",
    "make": "make test would run itself; the targets are looked up",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), f"{page.name}: a fence is not closed"
    return found


def commands(block: str) -> list[list[str]]:
    """The words of every command, comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def having(language: str) -> list[Any]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if any(kind == language for kind, _ in blocks(page))
    ]


def long_config() -> LlamaConfig:
    config = tiny_config()
    config.max_position_embeddings, config.intermediate_size = 4096, 64
    return config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(long_config()).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as SmolLM2 has it
    tokenizer.save_pretrained(folder / "model")
    save_random_head(folder / "head", long_config())
    return folder


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Where a page is followed; the default model is a tiny one, or itself."""
    with suppress(ImportError):  # the server comes with haast[serve]
        from serving import tokenizer

        tokenizer()  # cached for other tests, so it is loaded before the default model is another one
    kept = tmp_path / "kept"

    def assets(*, namespace: str, **_: str) -> Path:
        (kept / namespace).mkdir(parents=True, exist_ok=True)
        return kept / namespace

    for module in ("haast.tuning.latency", "haast.bench.plan"):
        monkeypatch.setattr(f"{module}.cached_assets_path", assets)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    if request.param == "tiny":
        source = ModelSource(DEFAULT_MODEL, str(tiny / "model"))
        resolve, find, model, head = models.resolve, factory.find_head, tiny / "model", tiny / "head"
        monkeypatch.setattr(models, "resolve", lambda name: source if name == DEFAULT_MODEL else resolve(name))
        for user in (api, factory):
            monkeypatch.setattr(user, "find_head", lambda name, of: head if name == "default" else find(name, of))
    else:
        model, head = _real_model(request), ROOT / "src" / "haast" / "data" / "heads" / DEFAULT_MODEL
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained

        def offline(name: Any, *words: Any, _load: Any = load, **more: Any) -> Any:
            return _load(str(model) if name == HUB else name, *words, **more)

        monkeypatch.setattr(auto, "from_pretrained", offline)
    place = tmp_path / "here"
    _furnish(place, model, head)
    monkeypatch.chdir(place)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield place
    torch.set_num_threads(before)


def _real_model(request: pytest.FixtureRequest) -> Path:
    """The default model in transformers' own files."""
    folder: Path = request.config.cache.mkdir("smollm2")
    if not (folder / "config.json").exists():
        target = models.load_target(DEFAULT_MODEL, packing="off")
        target.model.save_pretrained(folder)
        assert target.tokenizer is not None, "a named model brings its tokenizer"
        target.tokenizer.save_pretrained(folder)
    return folder


def _furnish(place: Path, model: Path, head: Path) -> None:
    """What the pages suppose to be there."""
    place.mkdir()
    shutil.copytree(head, place / "my-head")
    (place / "my-model").symlink_to(model)
    (place / "small").symlink_to(model)  # the target itself as its small model
    write_model(place / "my-model-Q4_K_M.gguf")
    sizes = MedusaConfig.for_target(LlamaConfig.from_pretrained(model), 2, 1)
    weights = {name: torch.randn(shape) / 8 for name, shape in _shapes(sizes).items()}
    save_head(place / "heads" / "smollm2-135m-instruct-medusa", sizes, weights, torch.arange(0, 256, 2), {})
    config = LlamaConfig.from_pretrained(model)
    export_head(load_head(place / "my-head"), "sglang", "tiny", config, place / "their-head")
    lines = [{"id": f"p{i}", "category": "ab"[i % 2], "turns": [f"Say {i}.", "Again."]} for i in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("prompts.jsonl", "valid.jsonl", "prompt-files/one.jsonl", "prompt-files/two.jsonl"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    with gzip.open(place / "prompts.jsonl.gz", "wt") as packed:
        packed.write(text)
    (place / "results").mkdir()
    shutil.copy(ROOT / "results" / "suite.json", place / "results")


def _shapes(sizes: MedusaConfig) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in MedusaHeads(sizes, 128).state_dict().items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    for kind, text in blocks(page):
        assert kind in ("python", "bash", "json", "nginx", "text"), (
            f"{page.name}: a block of {kind or 'no language'}: {text[:60]}"
        )
        if kind == "json":
            for line in text.splitlines():
                json.loads(line)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", having("python"))
def test_its_python_runs(page: Path) -> None:
    _need(page)
    names: dict[str, Any] = {"__name__": "page"}
    with _server(page) as url:
        for number, (kind, text) in enumerate(blocks(page)):
            if kind == "python" and not text.startswith("# torchrun"):
                exec(compile(text.replace(SERVER, url), f"{page.name}, block {number}", "exec"), names)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", having("bash"))
def test_its_commands_run(page: Path) -> None:
    _need(page)
    for kind, text in blocks(page):
        if kind == "bash":
            for words in commands(text):
                _follow(words)


@contextmanager
def _server(page: Path) -> Iterator[str]:
    """The address of a server that clients on the page can ask."""
    if page.name != "server.md":
        yield SERVER
        return
    pytest.importorskip("llguidance", reason="the server comes with haast[serve]")
    from serving import served, tiny_service

    service = tiny_service(context=256)  # what the page asks fills it
    service.name = DEFAULT_MODEL
    with served(service) as url:
        yield url


def _need(page: Path) -> None:
    if page.name == "quantised.md":
        pytest.importorskip("torchao")
        warnings.simplefilter("ignore", PrecisionWarning)  # the page speaks of it; pytest undoes this after the test


@pytest.mark.slow
def test_what_runs_under_torchrun(tiny: Path, tmp_path: Path) -> None:
    page = ROOT / "docs" / "devices.md"
    _furnish(tmp_path / "here", tiny / "model", tiny / "head")
    (script,) = (text for kind, text in blocks(page) if kind == "python" and text.startswith("# torchrun"))
    (tmp_path / "here" / "answer.py").write_text(script)
    lines = [words for kind, text in blocks(page) if kind == "bash" for words in commands(text)]
    ours = [[*words, "--max-new-tokens", "8"] for words in lines if words[0] == "torchrun"]
    for words in [*ours, script.splitlines()[0].removeprefix("#").split()]:
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]


def _follow(words: list[str]) -> None:
    line = " ".join(words)
    reason = next((why for begin, why in ELSEWHERE.items() if line.startswith(begin)), None)
    if words[0] == "make":
        shown = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert shown.returncode == 0 or "usage:" in shown.stdout, shown.stderr
    elif words[0] == "python":
        _parse_only(words[1:])
    elif reason is None:
        assert words[0] == "haast", f"{line!r}: neither ours nor in ELSEWHERE"
        _run_ours(words[1:])


def _parse_only(words: list[str]) -> None:
    """Benchmarks take hours: their flags have to be those of the command."""

    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        parse(self, words[1:])
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParsedError):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def _run_ours(words: list[str]) -> None:
    name = words[0]
    assert name in SHORTER, f"haast {name}: say in SHORTER how it runs in seconds"
    more = shlex.split(SHORTER[name])
    if name == "train" and {"--self-test", "--show-data"} & set(words):
        more = []
    done = CliRunner().invoke(app, [*words, *more], input="Hello\n" if name == "chat" else None)
    assert done.exit_code == 0, f"haast {' '.join(words)}\n{done.output}"


def test_nothing_in_the_lists_is_left_over() -> None:
    lines = [
        " ".join(words) for page in PAGES for kind, text in blocks(page) if kind == "bash" for words in commands(text)
    ]
    for begin in ELSEWHERE:
        assert any(line.startswith(begin) for line in lines), begin
    for name in SHORTER:
        assert any(line.startswith(f"haast {name}") for line in lines), name
