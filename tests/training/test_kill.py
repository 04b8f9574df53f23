"""SIGKILL at seeded places of a training run and of a regeneration: what comes out is as if nothing had happened.

place    a number of lines in the job's own output, then a few milliseconds more
kill     the process is gone, with whatever it was writing
resume   again until it is killed at the next place, at last to the end
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kill_jobs
import pytest
import torch

from haast.training import checkpoints

Job = Callable[[Path, bool, int], None]
_DEADLINE = 120.0  # seconds for one process
# A server that has imported the heavy parts forks every job: a job then starts in a moment.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["haast.training.trainer", "haast.training.regenerate"])


def run(job: Job, folder: Path, resume: bool, size: int, kill_at: tuple[Path, int, float] | None = None) -> bool:
    """Run a job in a process; with `kill_at` (file, lines in it, seconds more) kill it there. Was it killed?"""
    process = _PROCESSES.Process(target=job, args=(folder, resume, size))
    process.start()
    deadline = time.monotonic() + _DEADLINE
    if kill_at is not None:
        path, lines, more = kill_at
        while process.is_alive() and count_lines(path) < lines:
            assert time.monotonic() < deadline, f"{path} did not come to {lines} lines"
            time.sleep(0.001)
        time.sleep(more)
        process.kill()
    process.join(_DEADLINE)
    killed = process.exitcode == -signal.SIGKILL
    assert killed or process.exitcode == 0, process.exitcode
    assert kill_at is not None or not killed
    process.close()
    return killed


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_resume(job: Job, folder: Path, output: str, size: int, lines: int, kills: int, seed: int) -> None:
    """Kill `kills` times on the way to `lines` lines of output, then run to the end."""
    draws = random.Random(seed)
    places = sorted(draws.sample(range(lines), kills))
    killed = [
        run(job, folder, number > 0, size, (folder / output, place, draws.uniform(0, 0.03)))
        for number, place in enumerate(places)
    ]
    assert any(killed), "the job was over before every kill: make it longer"
    run(job, folder, True, size)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics lines without the one number that depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("views_per_s", "seconds")} for line in lines]


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, tensors within dicts and lists included."""
    pairs = (list, tuple)  # betas come back as a list
    assert type(one) is type(other) or (isinstance(one, pairs) and isinstance(other, pairs))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Metrics, the last state (weights, averages, optimiser, progress) and the best head."""
    assert metrics(folder) == metrics(undisturbed)
    states = [checkpoints.load_newest(where) or {} for where in (folder, undisturbed)]
    for state in states:
        state["progress"].pop("seconds")  # the clock's
    assert_same(*states)
    best = [torch.load(where / "best" / "head.pt", weights_only=True) for where in (folder, undisturbed)]
    assert_same(*best)
    names = [sorted(path.name for path in where.iterdir()) for where in (folder, undisturbed)]
    assert names[0] == names[1], "a kill leaves nothing behind"


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "answers.jsonl").read_text().splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    assert len(records) == len(lines), "no answer stands there twice"
    return records


VIEWS, LENGTH = 3000, 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(kill_jobs.train, folder, False, VIEWS)
    yield folder


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(kill_jobs.answer, folder, False, LENGTH)
    yield folder


SEEDS = [pytest.param(0, 3, id="quick"), *(pytest.param(s, 8, marks=pytest.mark.slow) for s in range(1, 9))]


@pytest.mark.parametrize(("seed", "kills"), SEEDS)
def test_a_killed_training_run_ends_as_an_undisturbed_one(trained: Path, tmp_path: Path, seed: int, kills: int) -> None:
    lines = len(metrics(trained))
    kill_and_resume(kill_jobs.train, tmp_path, "metrics.jsonl", VIEWS, lines, kills, seed)
    assert_same_run(tmp_path, trained)


@pytest.mark.parametrize(("seed", "kills"), SEEDS)
def test_a_killed_regeneration_ends_with_the_same_answers(
    answered: Path, tmp_path: Path, seed: int, kills: int
) -> None:
    assert len(answers(answered)) == kill_jobs.ANSWERS
    kill_and_resume(kill_jobs.answer, tmp_path, "answers.jsonl", LENGTH, kill_jobs.ANSWERS, kills, seed)
    assert answers(tmp_path) == answers(answered)


def test_a_finished_run_that_is_resumed_stays_as_it_is(trained: Path) -> None:
    before = metrics(trained)
    run(kill_jobs.train, trained, True, VIEWS)
    assert metrics(trained) == before


@pytest.mark.parametrize("kept", [0.5, *(pytest.param(k, marks=pytest.mark.slow) for k in (0.0, 0.999))])
def test_a_kill_while_a_checkpoint_is_written(trained: Path, tmp_path: Path, kept: float) -> None:
    """The newest state and a temporary file lie there in part: the state before is taken, and both are cleared away."""
    assert run(kill_jobs.train, tmp_path, False, VIEWS, (tmp_path / "metrics.jsonl", 8, 0.0))
    newest = max(tmp_path.glob("state-*.pt"))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(kept * len(content))])
    (tmp_path / ".state-99999998.pt.1.1.tmp").write_bytes(content[: int(kept * len(content))])
    run(kill_jobs.train, tmp_path, True, VIEWS)
    assert_same_run(tmp_path, trained)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", ["metrics.jsonl", "state-00000030.pt", "head.pt"])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From step 29 on, one of the files is written to a device that is always full."""
    opening = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        late = any(state.name >= "state-00000029.pt" for state in tmp_path.glob("state-*.pt"))
        written = path.name == name or path.name.startswith(f".{name}.")  # itself, or what will be renamed to it
        is_full = late and written and "r" not in mode
        return opening(Path("/dev/full") if is_full else path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match=r"cannot write .*free space; the run resumes") as caught:
        kill_jobs.train(tmp_path, False, VIEWS)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoints.load_newest(tmp_path) is not None
    kill_jobs.train(tmp_path, True, VIEWS)
    assert_same_run(tmp_path, trained)
