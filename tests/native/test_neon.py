"""The NEON path, compiled for 64-bit ARM and run under an emulator where both are there. Slow."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import haast


@pytest.mark.slow
def test_neon_products(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    kernels = Path(haast.__file__).parent / "native" / "kernels.cpp"
    program = tmp_path / "check"
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-pthread", "-static"]
    subprocess.run([compiler, *flags, kernels, Path(__file__).parents[1] / "neon_check.cpp", "-o", program], check=True)
    done = subprocess.run([emulator, program], capture_output=True, text=True, timeout=600, check=False)
    old = subprocess.run(
        [emulator, "-cpu", "cortex-a72", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0 and done.stdout == "696 cases agree, with dot products\n", done.stdout + done.stderr
    assert old.returncode == 0 and old.stdout == "696 cases agree\n", old.stdout + old.stderr
