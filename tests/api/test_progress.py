"""How far a long job is: one line every 30 s in a log, a bar on a terminal, and that every long job tells it."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import save_random_head, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from haast import progress as module
from haast.cli import app
from haast.progress import EVERY, Progress


class FakeTime(threading.Event):
    """A clock that only waiting moves: each wait lasts as long as was asked, and meanwhile `work` goes on.

    Args:
        work: (seconds that have passed) -> None; done while somebody waits.
        waits: before the job is over.
    """

    def __init__(self, work: Callable[[float], None] = lambda seconds: None, waits: int = 3) -> None:
        super().__init__()
        self.now, self.asked = 100.0, list[float | None]()
        self._work, self._waits = work, waits
        self.finished = threading.Event()

    def clock(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "nobody waits for ever"
        self.asked.append(timeout)
        self.now += timeout
        if len(self.asked) > self._waits:
            self.finished.set()
            return True
        self._work(self.now - 100.0)
        return False


class Terminal(io.StringIO):
    """What a terminal is given."""

    def isatty(self) -> bool:
        return True


def told(time: FakeTime, job: Progress) -> None:
    """Run a job until its time is over; a job that tells nothing waits for nothing."""
    with job:
        assert time.finished.wait(20 if job._prints_lines else 0) == job._prints_lines


def test_a_log_gets_a_line_every_30_s_and_none_between(capsys: pytest.CaptureFixture[str]) -> None:
    done = 0

    def work(seconds: float) -> None:
        nonlocal done
        for _ in range(1000):  # steps enough for a line each, if it were steps that print
            done += 1
            job.step(counted=5, words=f"tau {done / 1000:.2f}")

    time = FakeTime(work)
    job = Progress("answers", "answers", 9000, rate="tokens", clock=time.clock, over=time)
    told(time, job)
    said = capsys.readouterr()
    assert said.out == "" and time.asked == [EVERY] * 4 and EVERY == 30
    assert said.err.splitlines() == [
        "answers: 1000 of 9000 answers, 167 tokens/s, 4 min left, tau 1.00",
        "answers: 2000 of 9000 answers, 167 tokens/s, 4 min left, tau 2.00",
        "answers: 3000 of 9000 answers, 167 tokens/s, 3 min left, tau 3.00",
    ]


def test_a_job_whose_first_step_takes_minutes_is_heard_of(capsys: pytest.CaptureFixture[str]) -> None:
    time = FakeTime(waits=5)
    told(time, Progress("training", "views", 60_000, clock=time.clock, over=time))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 0 of 60000 views, 30 s so far" and lines[-1].endswith("2 min so far")
    assert len(lines) == 5


def test_what_was_done_before_is_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    time = FakeTime(lambda seconds: job.step(3), waits=1)
    job = Progress("training", "views", 1000, 970, clock=time.clock, over=time)
    told(time, job)
    assert capsys.readouterr().err == "training: 973 of 1000 views, 0.1 views/s, 4 min left\n"


def test_jobs_that_count_nothing_tell_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    time = FakeTime(lambda seconds: job.set_status("draft levels [x]"), waits=1)
    job = Progress("calibrating", clock=time.clock, over=time)
    told(time, job)
    assert capsys.readouterr().err == "calibrating: 30 s so far, draft levels [x]\n"


def test_quiet_jobs_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    time = FakeTime()
    told(time, Progress("features", "tokens", 10, quiet=True, clock=time.clock, over=time))
    assert capsys.readouterr() == ("", "") and time.asked == []


def test_a_terminal_gets_the_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, time = Terminal(), FakeTime()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("answers", "answers", 4, rate="tokens", clock=time.clock, over=time) as job:
        time.now += 2
        job.step(counted=50, words="tau 2.50 [b]")
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "━" in drawn and "1 of 4 answers  25 tokens/s  tau 2.50 [b]" in drawn
    assert time.asked == [] and "answers: " not in drawn


def test_what_a_job_prints_stays_out_of_its_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout may be a file while stderr is a terminal: it then gets its own lines, not the terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("verifying", "texts", 2):
        print("a text")
    assert capsys.readouterr().out == "a text\n" and "a text" not in terminal.getvalue()


def test_a_bar_on_stdout_leaves_lines_to_a_log_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `haast train 2> log` on a terminal, whose bar is drawn where its log lines are printed."""
    terminal, time = Terminal(), FakeTime(waits=2)
    monkeypatch.setenv("TERM", "xterm")
    told(time, Progress("training", "views", 10, console=Console(file=terminal), clock=time.clock, over=time))
    assert "0 of 10 views" in terminal.getvalue() and len(capsys.readouterr().err.splitlines()) == 2


def test_a_reader_who_has_gone_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    time = FakeTime(waits=2)
    job = Progress("answers", "answers", 4, clock=time.clock, over=time)
    monkeypatch.setattr(sys, "stderr", Gone())
    with job:
        job.step()
        job._printer.join(20)
    assert time.asked == [30.0], "one try, then silence"


def test_it_ends_at_once_and_with_what_went_wrong() -> None:
    with pytest.raises(KeyboardInterrupt), Progress("answers", "answers", 4) as job:
        raise KeyboardInterrupt
    assert not job._printer.is_alive()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (7200, "2.0 h")]
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert module._duration(seconds) == words


# ------------------------------------------------------------------ the jobs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, head/, suites/one.jsonl, answers.jsonl."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_random_head(folder / "head", tiny_config())
    (folder / "suites").mkdir()
    lines = [{"id": f"p{i}", "turns": [f"Say {i}."]} for i in range(2)]
    (folder / "suites" / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "one two three four five"
    answers = [
        {"id": f"p{i}", "prompt": f"Say {i}.", "response": said, "response_ids": list(said.encode())} for i in "ab"
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return folder


_TRAIN = "train --answers {home}/answers.jsonl --topk 4 --draft-vocab 64 --views 200"
_PROMPTS = "--prompts {home}/suites/one.jsonl --max-new-tokens 16"
_HEAD = "--head {home}/head --nodes 5 --depth 2"


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (f"regenerate {_PROMPTS} --out {{out}}/a.jsonl", ["answers: 0 of 2 answers, "]),
        (
            f"{_TRAIN} --out {{out}}/run",
            [r"features: \d+ of \d+ tokens, ", r"training: \d+ of 200 supervised tokens, .*loss"],
        ),
        (f"{_TRAIN} --out {{out}}/run --shards {{out}}/shards --self-test", [r"features: \d+ of ", "self-test: "]),
        (f"bench {_PROMPTS} {_HEAD} --v-curve", [r"bench: \d of 4 answers, .* tokens/s", "v curve: "]),
        (f"bench --suite {{home}}/suites --out {{out}} --max-new-tokens 16 {_HEAD}", [r"bench: \d+ of 16.*tau"]),
        (f"verify {_PROMPTS} {_HEAD} --samples 100", [r"verifying: \d of 4 texts, ", "verifying: 4 .*chi-square"]),
        (f"calibrate {_PROMPTS} --head {{home}}/head --rounds 1 --out {{out}}/c.json", ["calibrating: .*, replaying "]),
    ],
)  # fmt: skip
def test_every_long_command_tells_a_log(
    command: str, lines: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a log would be told after every step: each command uses the one piece, and with its own words."""
    told = list[str]()
    monkeypatch.setattr(Progress, "_show", lambda job: told.append(job.line()))
    monkeypatch.setattr("haast.bench.calibrate.BUDGETS", (2, 4))  # a small search, for one row
    monkeypatch.setattr("haast.bench.calibrate.WIDTHS", (1,))
    monkeypatch.setattr("haast.bench.calibrate.measure_batches", lambda *_: {})
    words = f"{command} --model {home}/model --packing off --threads 1".format(home=home, out=tmp_path).split()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for line in lines:
        assert re.search(f"^{line}", "\n".join(told), re.MULTILINE), told
