"""The kernels under AddressSanitizer: their own tests, run again on a library that checks every access. Slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import haast

TESTS = (
    "native/test_native.py",
    "native/test_blocks.py",
    "native/test_stack.py",
    "native/test_packed.py",
    "tuning/test_policy.py",
)


@pytest.mark.slow
def test_the_kernels_touch_only_what_is_theirs(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    package = tmp_path / "haast"
    shutil.copytree(Path(haast.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = package / "native" / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-pthread", "-fPIC", "-shared", "-fsanitize=address"]
    subprocess.run([compiler, *flags, str(package / "native" / "kernels.cpp"), "-o", str(library)], check=True)
    # With the C++ runtime beside it: it passes exceptions on only where it finds who throws them, and packages throw.
    runtimes = [_of_compiler(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(each.is_absolute() for each in runtimes):
        pytest.skip("g++ has no AddressSanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(str(each.resolve()) for each in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory behind at its end
        "PYTHONPATH": str(tmp_path),
    }
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / name) for name in TESTS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=here.parent,
        timeout=1500,
        check=False,
    )
    assert "AddressSanitizer" not in done.stderr + done.stdout, (done.stderr + done.stdout)[-4000:]
    assert done.returncode == 0, (done.stderr + done.stdout)[-4000:]
    seen = subprocess.run(
        [sys.executable, "-c", "import haast.native as n; print(n.available(), n.__file__)"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout
    assert seen.startswith("True") and str(tmp_path) in seen


def _of_compiler(compiler: str, name: str) -> Path:
    """A file of the compiler's; a bare name where it has none."""
    command = [compiler, f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
