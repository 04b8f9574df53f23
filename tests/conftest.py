"""One thread (tiny models starve with two on a loaded machine), a seeded hypothesis profile, and shared tiny models."""

from __future__ import annotations

import gc
import importlib.util
import os
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
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands that tests start would compile all of Haast anew
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
    tables = dict[str, list[pytest.Item]]()
    for item in items:
        if item.get_closest_marker("one_of_each"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for table in tables.values():
        values = [dict(getattr(item, "callspec").params) for item in table]  # noqa: B009 - not part of pytest's types
        # Which value an item has is found by identity: of tables over several decorators pytest numbers the items.
        seen = {name: list(dict.fromkeys(id(each[name]) for each in values)) for name in values[0]}
        counts = {name: len(each) for name, each in seen.items()}
        for item, own in zip(table, values, strict=True):
            if not on_diagonal({name: seen[name].index(id(value)) for name, value in own.items()}, counts):
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


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
