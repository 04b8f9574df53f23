"""The version matrix: the lower bounds are what is tested, outcomes are counted, and what has passed is not redone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import matrix
import pytest
import venvs
from venvs import ROOT, BrokenError, Environment

OLDEST = Environment.of(ROOT / "tests/versions/oldest.txt", Path("unused"))
CHECKOUT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tree is a copy, perhaps the matrix's own")
SUITE = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure message="no"/></testcase>
<testcase classname="tests.b" name="three"><skipped message="later"/></testcase>
<testcase classname="tests.b" name="four"/>
<testcase classname="tests.b" name="four"><error message="at the end"/></testcase>
</testsuite></testsuites>"""


def bounds() -> dict[str, str]:
    """Package -> lower bound, of all that a user of Haast and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["curves"], *extras["endpoint"], *extras["test"]]
    pairs = [line.split(">=") for line in lines if not line.startswith("haast[")]
    return {name.replace("-", "_"): bound for name, bound in pairs}


def padded(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return (*parts, *[0] * (3 - len(parts)))


def test_every_lower_bound_is_what_the_oldest_environment_has() -> None:
    pinned = {name.replace("-", "_"): version for name, version in OLDEST.pinned.items()}
    assert {name: padded(bound) for name, bound in bounds().items()} == {n: padded(v) for n, v in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={OLDEST.python}"


@CHECKOUT
def test_what_is_recorded_has_passed_with_these_bounds() -> None:
    held = json.loads((ROOT / "results/matrix.json").read_text(encoding="utf-8"))["environments"]
    assert set(held) == {each.name for each in matrix.environments(Path("unused"))}
    for result in held.values():
        assert result["failed"] == 0 and result["failures"] == [] and result["passed"] > 1000
    versions = held["oldest"]["versions"]
    for name, bound in OLDEST.pinned.items():
        assert versions[name.replace("_", "-")].split("+")[0] == bound
    assert held["oldest-torch"]["versions"]["torch"] == versions["torch"]
    assert held["oldest-transformers"]["versions"]["transformers"] == versions["transformers"]


def test_the_page_names_the_bounds() -> None:
    page = " ".join((ROOT / "docs/versions.md").read_text(encoding="utf-8").split())
    found = re.search(r"Python ([\d.]+) and newer, torch ([\d.]+) and newer, transformers ([\d.]+) and newer", page)
    assert found is not None
    assert found.groups() == (OLDEST.python, bounds()["torch"], bounds()["transformers"])


def test_tests_are_counted_once_and_errors_are_failures(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(SUITE)
    assert venvs.counts(tmp_path / "junit.xml") == {
        "passed": 2, "failed": 2, "skipped": 1, "failures": ["tests.a::two", "tests.b::four"],
    }  # fmt: skip


def test_a_copy_of_the_tree_follows_it(tmp_path: Path) -> None:
    source, tree = tmp_path / "source", tmp_path / "tree"
    (source / "in").mkdir(parents=True)
    (source / "in/a.py").write_text("1")
    (source / "b.py").write_text("2")
    venvs.copied([Path("in/a.py"), Path("b.py")], source, tree)
    (tree / "in/compiled.so").write_text("kept")
    (source / "in/a.py").write_text("3")
    before = venvs.digest([Path("in/a.py")], tree)
    venvs.copied([Path("in/a.py")], source, tree)
    assert (tree / "in/a.py").read_text() == "3" and not (tree / "b.py").exists()
    assert (tree / "in/compiled.so").read_text() == "kept"
    assert venvs.digest([Path("in/a.py")], tree) == venvs.digest([Path("in/a.py")], source) != before


@CHECKOUT
def test_files_of_the_tree_are_found() -> None:
    files = set(map(str, venvs.tested_files()))
    assert {"pyproject.toml", "tests/project/test_matrix.py", "src/haast/compat.py"} <= files
    assert venvs.OUTCOMES not in files
    assert not any(name.endswith(".so") for name in files)


def test_a_python_that_is_not_there_is_named() -> None:
    with pytest.raises(BrokenError, match=r"no python3\.0 on the PATH"):
        venvs.interpreter("3.0")
    assert Path(venvs.interpreter("newest")).name.startswith("python3.")


class Ran:
    """Stands for installing and testing; counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failed: int = 0) -> None:
        self.tested, self.failed = 0, failed
        self.recorded: dict[str, Any] = {}
        found = dict.fromkeys(matrix.recorded(), "1.0")
        monkeypatch.setattr(matrix, "copied", lambda *_: None)
        monkeypatch.setattr(matrix, "installed", lambda *_: True)
        monkeypatch.setattr(matrix, "versions", lambda *_: found)
        monkeypatch.setattr(matrix, "tested", self.suite)
        monkeypatch.setattr(matrix, "record", lambda results, command: self.recorded.update(results))

    def suite(self, *_: Any) -> dict[str, Any]:
        self.tested += 1
        names = ["tests.a::two"] * self.failed
        return {"passed": 9, "failed": self.failed, "skipped": 1, "failures": names, "seconds": 3}


def test_what_has_passed_is_not_tested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ran, words = Ran(monkeypatch), ["--only", "oldest,newest", "--folder", str(tmp_path)]
    assert matrix.main(words) == 0 and ran.tested == 2
    assert set(ran.recorded) == {"oldest", "newest"}
    assert matrix.main(words) == 0 and ran.tested == 2
    shown = capsys.readouterr().out
    assert re.search(r"^oldest +1\.0 +1\.0 +1\.0 +9 +0 +1 +3 *$", shown, re.MULTILINE)
    assert matrix.main([*words, "--again"]) == 0 and ran.tested == 4


def test_a_failure_is_told_and_tested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ran, words = Ran(monkeypatch, failed=1), ["--only", "oldest", "--folder", str(tmp_path)]
    assert matrix.main(words) == 1 and "oldest: tests.a::two" in capsys.readouterr().out
    assert matrix.main(words) == 1 and ran.tested == 2


def test_a_broken_environment_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran = Ran(monkeypatch)

    def install(environment: Environment, log: Path) -> bool:
        if environment.name == "oldest":
            raise BrokenError("no such torch")
        return True

    monkeypatch.setattr(matrix, "installed", install)
    assert matrix.main(["--only", "oldest,newest", "--folder", str(tmp_path)]) == 1
    assert ran.tested == 1 and set(ran.recorded) == {"newest"}
    assert "no such torch" in capsys.readouterr().out


def test_stopping_records_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(monkeypatch)

    def suite(environment: Environment, *_: Any) -> dict[str, Any]:
        if environment.name == "newest":
            raise KeyboardInterrupt
        return ran.suite()

    monkeypatch.setattr(matrix, "tested", suite)
    assert matrix.main(["--only", "oldest,newest", "--folder", str(tmp_path)]) == 130
    assert set(ran.recorded) == {"oldest"}


def test_an_unknown_environment_is_refused() -> None:
    command = [sys.executable, str(ROOT / "tests/matrix.py"), "--only", "odd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no environment ['odd']" in done.stderr and "oldest-torch" in done.stderr
