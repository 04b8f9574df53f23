"""Curves and TensorBoard: what they hold after an interruption, and that a run goes on without either."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from haast.training import curves
from haast.training.curves import draw_curves, tau_trend
from haast.training.report import Finding, Reporter

SUMS = {"loss": 200.0, "ce": 150.0, "feature": 10.0, "top1": 40.0, "accepted": 30.0, "views": 100.0}
PNG = b"\x89PNG\r\n"


def evaluation(views: float, tau: float) -> dict[str, Any]:
    return {"step": int(views), "views": views, "valid_ce": 2.0, "valid_top1": 0.5, "tau": tau}


def drive(report: Reporter, steps: Sequence[int]) -> None:
    """A line at every step of 100 views, an evaluation at every other."""
    for step in steps:
        report.step(step * 100, SUMS, 1.0)
        report.line(step)
        if step % 2 == 0:
            report.evaluation(step, step * 100, {"valid_ce": 3.0 - step / 10, "tau": 1 + step / 10}, None)


def test_another_doubling_brings_the_slope() -> None:
    taus = [evaluation(1000 * 2**k, 1.5 + 0.2 * k) for k in range(4)]
    assert tau_trend(taus) == pytest.approx((0.2, 1.5 - 0.2 * math.log2(1000)))
    assert tau_trend([*taus, {"step": 1, "views": 500, "loss": 3.0}]) == tau_trend(taus)
    wavering = [evaluation(v, t) for v, t in ((1, 1.0), (2, 1.4), (4, 1.2), (8, 1.6))]
    assert tau_trend(wavering) == pytest.approx((0.16, 1.06))


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [evaluation(10, 1.2), evaluation(20, 1.3)],
        [evaluation(10, 1.2), evaluation(20, 1.3), evaluation(20, 1.4)],
        [evaluation(0, 1.1), evaluation(10, 1.2), evaluation(20, 1.3)],
        [evaluation(5, float("nan")), evaluation(10, 1.2), evaluation(20, 1.3)],
    ],
)
def test_too_few_evaluations_say_nothing(metrics: list[dict[str, Any]]) -> None:
    assert tau_trend(metrics) is None


@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_picture_is_whole_or_not_there(tmp_path: Path, count: int) -> None:
    draw_curves([evaluation(100 * (i + 1), 1 + i / 10) for i in range(count)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_it_is_drawn_at_evaluations_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(curves, "draw_curves", lambda metrics, path: drawn.append(len(metrics)))
    report = Reporter(1000, tmp_path / "metrics.jsonl", True, {"curves.png": partial(curves.curves, tmp_path)})
    report.start(0)
    drive(report, range(1, 6))
    assert drawn == [3, 6]
    report.close()
    report.close()
    assert drawn == [3, 6, 7]
    again = Reporter(1000, tmp_path / "metrics.jsonl", True, {"curves.png": partial(curves.curves, tmp_path)})
    again.start(3)
    drive(again, [4])
    again.close()
    assert drawn[3:] == [6]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_metrics_once_after_an_interruption(tmp_path: Path) -> None:
    """Killed after step 6 with a checkpoint of step 4, whose own lines came before it; then resumed."""
    path = tmp_path / "metrics.jsonl"
    killed = Reporter(1000, path, True, {"TensorBoard": partial(curves.tensorboard, tmp_path)})
    killed.start(0)
    drive(killed, range(1, 5))
    state, begun = killed.state(), int(time.time())
    drive(killed, range(5, 7))
    killed.close()
    while int(time.time()) == begun:  # event files are read in the order of the second they were opened in
        time.sleep(0.05)
    resumed = Reporter(1000, path, True, {"TensorBoard": partial(curves.tensorboard, tmp_path)})
    resumed.start(4, state)
    drive(resumed, range(5, 8))
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shown = scalars(tmp_path / "tensorboard")
    for tag, name in (("train/ce", "ce"), ("train/top1", "top1"), ("valid/ce", "valid_ce"), ("tau", "tau")):
        assert shown[tag] == [(line["views"], round(line[name], 5)) for line in lines if name in line], tag
    assert [step for step, _ in shown["train/loss"]] == [100 * step for step in range(1, 8)]


def test_a_run_goes_on_without_the_optional_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("matplotlib.figure", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    both = {"curves.png": partial(curves.curves, tmp_path), "TensorBoard": partial(curves.tensorboard, tmp_path)}
    report = Reporter(1000, tmp_path / "metrics.jsonl", False, both)
    report.start(0)
    drive(report, range(1, 5))
    report.close()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("pip install 'haast[curves]'; training continues") == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def full(kept: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any] | None], None]:
    """A watcher whose disk is full."""
    assert not kept

    def follow(line: Mapping[str, Any] | None) -> None:
        assert line is not None, "it was dropped"
        raise OSError(28, "No space left on device")

    return follow


def test_a_watcher_that_fails_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(1000, tmp_path / "metrics.jsonl", False, {"picture": full})
    report.start(0)
    drive(report, range(1, 5))
    report.close()
    assert capsys.readouterr().out.count("no picture ([Errno 28] No space left on device); training continues") == 1


def test_an_alarm_is_in_the_metrics_and_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(1000, tmp_path / "metrics.jsonl", False)
    report.start(0)
    report.evaluation(1, 100, {"tau": 1.01}, [Finding("mask", "0.1% of tokens", "suspect", "look at them")])
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["alarm"] == [
        {"check": "mask", "text": "0.1% of tokens", "state": "suspect", "remedy": "look at them"},
    ]
    said = capsys.readouterr().out
    assert "tau is about 1" in said and "0.1% of tokens; look at them" in said


def test_neither_package_is_loaded_before_a_run() -> None:
    code = "import sys, haast.training.run; print(sorted({'matplotlib', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
