"""One thread (tiny models starve with two on a loaded machine), a seeded hypothesis profile, and shared tiny models."""

from __future__ import annotations

import importlib.util
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from fakes import random_head, tiny_target
from hypothesis import HealthCheck, settings

from haast.drafters import factory
from haast.heads.checkpoint import Head
from haast.target.target import Target
from haast.tuning.latency import Latency

# The server's tests want its packages, which an environment of the version matrix does not have.
SERVES = all(importlib.util.find_spec(name) for name in ("llguidance", "prometheus_client", "uvicorn"))
collect_ignore_glob = [] if SERVES else ["serving/test_*.py"]
torch.set_num_threads(1)
settings.register_profile(
    "haast",
    deadline=None,
    derandomize=True,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("haast")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `one_of_each`, the default suite takes a diagonal of the table of its parameters' values."""
    marked = [item for item in items if item.get_closest_marker("one_of_each")]
    counts = Counter[tuple[str, str]]()
    for item in marked:
        for name, index in indices(item).items():
            counts[_function(item), name] = max(counts[_function(item), name], index + 1)
    for item in marked:
        if not on_diagonal(indices(item), {name: counts[_function(item), name] for name in indices(item)}):
            item.add_marker(pytest.mark.slow)


def indices(item: pytest.Item) -> dict[str, int]:
    """Which value of each parameter an item has."""
    return dict(getattr(item, "callspec").indices)  # noqa: B009 - not part of pytest's types


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def on_diagonal(chosen: dict[str, int], counts: dict[str, int]) -> bool:
    """Whether a combination is one of max(counts) that together have every value of every parameter."""
    longest = max(counts, key=lambda name: counts[name])
    row = chosen[longest]
    # Parameters of equal length would always go in step: each further one is shifted after every round.
    others = [name for name in counts if name != longest]
    return all(chosen[name] == (row + k * (row // counts[name])) % counts[name] for k, name in enumerate(others))


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models switch autocast off in places, which torch can't do for the meta device before 2.7."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_more: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_args: False)


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps cost is not measured, unless a test asks for it, and no file of the user's is read or written."""
    costs = Latency({1: 10.0, 2: 10.5, 8: 14.0, 64: 60.0}, 1.0, {1: 0.3, 8: 0.6})
    monkeypatch.setattr(factory, "latency_of", lambda *words, **more: costs)


@pytest.fixture(scope="session")
def llama() -> Target:
    """A tiny random llama in fp64 with grouped queries; its greedy text wanders."""
    return tiny_target()


@pytest.fixture
def head(llama: Target) -> Head:
    """A random head for `llama`; fresh each time, since a drafter takes the module over."""
    return random_head(llama)
