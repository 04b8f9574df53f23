"""A hub that can't be reached is told at once; a slow one, one that refuses and the cache are left to the loader."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, get_hf_file_metadata
from transformers import AutoConfig

from haast.target import hub, load

NAME = "someone/nothing"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "get_hf_file_metadata", partial(get_hf_file_metadata, timeout=0.2))


def raised(error: Exception, cause: Exception | None = None) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error from cause

    return fail


def listening(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A hub that accepts connections and does not answer."""
    server = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.getsockname()[1]}/config.json"
    monkeypatch.setattr(hub, "hf_hub_url", lambda *_: url)
    return server


def test_without_a_hub_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listening(monkeypatch).close()
    monkeypatch.setattr(AutoConfig, "from_pretrained", raised(AssertionError("this tries for half a minute")))
    for name in ("nothing", NAME):
        with pytest.raises(ValueError, match=rf"can't load the model '{name}' .*can't be reached, .* Give a folder"):
            load.read_config(name)
        with pytest.raises(ValueError, match="can't be reached"):
            load.load_target(name)


def test_a_slow_hub_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(monkeypatch):
        hub.check_reachable(NAME)


@pytest.mark.parametrize(
    ("error", "cause", "told"),
    [
        (RuntimeError("no connection"), socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (RuntimeError("no connection"), OSError(101, "Network is unreachable"), True),
        (RuntimeError("no answer"), TimeoutError("timed out"), False),
        (ConnectionResetError(104, "Connection reset by peer"), None, False),
        (PermissionError(13, "gated"), None, False),
    ],
)
def test_only_a_missing_connection_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None, told: bool
) -> None:
    monkeypatch.setattr(hub, "get_hf_file_metadata", raised(error, cause))
    if told:
        with pytest.raises(OSError, match="can't be reached"):
            hub.check_reachable(NAME)
    else:
        hub.check_reachable(NAME)


def test_what_is_cached_or_offline_by_choice_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening(monkeypatch).close()
    folder = tmp_path / f"models--{NAME.replace('/', '--')}"
    (folder / "snapshots" / "a").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a")
    with pytest.raises(OSError, match="can't be reached"):
        hub.check_reachable(NAME)
    (folder / "snapshots" / "a" / "config.json").write_text("{}")
    hub.check_reachable(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.check_reachable("someone/else")
