"""`make test-matrix`: the suite in one environment per file of tests/versions, and what came of it.

Needs nothing but Python, git and pip. Stop it with Ctrl-C at any time: what has been made and passed is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from venvs import OUTCOMES, ROOT, BrokenError, Environment, copied, digest, installed, tested, tested_files, versions

_SHOWN = ("python", "torch", "transformers")


def environments(folder: Path) -> list[Environment]:
    """One for each file of tests/versions, the oldest first."""
    return [Environment.of(path, folder) for path in sorted((ROOT / "tests/versions").glob("*.txt"), reverse=True)]


def outcome(environment: Environment, files: list[Path], again: bool, more: list[str]) -> dict[str, Any]:
    """Make the environment and run the suite in it, as far as that is to be done."""
    environment.folder.mkdir(parents=True, exist_ok=True)
    log, kept = environment.folder / "log.txt", environment.folder / "outcome.json"
    log.write_text("", encoding="utf-8")
    copied(files, ROOT, environment.folder / "tree")
    _say(f"{environment.name}: installing, log in {log}")
    installed(environment, log)
    found = versions(environment)
    key = hashlib.sha256(json.dumps([digest(files, ROOT), found, more]).encode()).hexdigest()[:16]
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if before.get("key") == key and not before["failed"] and not again:
        _say(f"{environment.name}: has passed with this tree and these versions")
        return dict(before)
    _say(f"{environment.name}: testing with " + ", ".join(f"{name} {found[name]}" for name in _SHOWN))
    result = {"key": key, "versions": {name: found[name] for name in recorded()}, **tested(environment, more, log)}
    kept.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def recorded() -> list[str]:
    """What Haast and its tests depend on by themselves: its version stands beside the outcome."""
    oldest = next(each for each in environments(ROOT) if each.name == "oldest")
    return sorted({*_SHOWN, *(name.replace("_", "-") for name in oldest.pinned)})


def commit() -> str:
    """The commit that is tested; with a plus where the tree differs from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = [line for line in changed.stdout.splitlines() if not line.endswith(OUTCOMES)]
    return head.strip()[:12] + ("+" if dirty else "")


def record(results: dict[str, dict[str, Any]], command: str) -> None:
    """Add to results/matrix.json; environments that did not run keep their lines."""
    path = ROOT / OUTCOMES
    new: dict[str, Any] = {"kind": "matrix", "environments": {}}
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else new
    stamp = {"commit": commit(), "command": command, "platform": platform.platform()}
    for name, result in results.items():
        held["environments"][name] = {**{k: v for k, v in result.items() if k != "key"}, **stamp}
    path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def table(results: dict[str, dict[str, Any]]) -> str:
    """What came of each environment, one line each."""
    head = ["environment", *_SHOWN, "passed", "failed", "skipped", "seconds"]
    lines = [head]
    for name, result in results.items():
        if "broken" in result:
            lines.append([name, result["broken"]])
        else:
            numbers = [str(result[key]) for key in head[-4:]]
            lines.append([name, *(result["versions"][each] for each in _SHOWN), *numbers])
    widths = [max(len(line[i]) for line in lines if len(line) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines)


def main(words: list[str]) -> int:
    """Returns 0 where every environment passes, 1 where one does not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="environments, with commas between them")
    parser.add_argument("--again", action="store_true", help="test also what has passed already, unchanged")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where the environments lie")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest (behind --); the outcome is then not recorded")
    given = parser.parse_args(words)
    every = environments(given.folder)
    wanted = given.only.split(",") if given.only else [each.name for each in every]
    if unknown := set(wanted) - {each.name for each in every}:
        parser.error(f"no environment {sorted(unknown)}: there are {[each.name for each in every]}")
    results: dict[str, dict[str, Any]] = {}
    try:
        for each in (each for each in every if each.name in wanted):
            try:
                results[each.name] = outcome(each, tested_files(), given.again, given.pytest)
            except BrokenError as error:
                results[each.name] = {"broken": str(error)}
    except KeyboardInterrupt:
        _say("stopped; run it again to go on")
        return 130
    finally:
        whole = {name: result for name, result in results.items() if "broken" not in result}
        if whole and not given.pytest:
            record(whole, shlex.join(["python", "tests/matrix.py", *words]))
        _say(table(results))
    for name, result in results.items():
        _say("\n".join(f"{name}: {failure}" for failure in result.get("failures", [])))
    return int(any("broken" in result or result["failed"] for result in results.values()))


def _say(text: str) -> None:
    if text:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
