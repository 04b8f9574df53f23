"""The compiled part of Haast: one C++ library, no Python or torch headers, loaded with ctypes.

It is optional. Without a working compiler the install goes on, and `haast.native.why_not()` says so at run time.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# No -march: the kernels dispatch at run time. No contraction: a sum has the same bits wherever the compiler puts it.
FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]


class BuildKernels(build_ext):
    """Builds the library, or leaves it out with one clear line."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`; a compiler that is missing or fails is no error."""
        try:
            super().build_extension(ext)
        except (CCompilerError, BaseError, OSError) as error:
            print(f"haast: built without native kernels, PyTorch will do their work ({error})")


setup(
    ext_modules=[
        Extension(
            "haast.native._kernels",
            ["src/haast/native/kernels.cpp"],
            depends=sorted(str(path) for path in Path("src/haast/native").glob("*.h")),
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
