"""The GPU benchmark runs from end to end at tiny sizes, and its oracle drafts as well as it is asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import DEPTH, TAUS, chance_for  # noqa: E402


@pytest.mark.parametrize("tau", TAUS)
def test_the_oracles_chance_gives_the_tau_that_is_asked_for(tau: float) -> None:
    chance = chance_for(tau)
    assert sum(chance**depth for depth in range(DEPTH + 1)) == pytest.approx(tau)


@pytest.mark.slow
def test_one_command_measures_everything_and_is_lossless(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--rounds", "1", "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500, capture_output=True)
    sections = json.loads(out.read_text())["sections"]
    assert [section["mode"] for section in sections] == ["eager", "compiled"]
    for section in sections:
        assert all(section["lossless"].values()) and {"vanilla", "tau 2", "tau 3", "tau 4"} < set(section["lossless"])
        assert section["tau"]["tau 4"] > section["tau"]["vanilla"] == 1
        assert set(section["v"]) == {"1", "2", "4", "8"} and section["c_per_step"] > 0
        assert section["tokens_per_s"]["stock"] > 0
    assert sections[0]["per_step"]["vanilla"]["operators"] > 0
