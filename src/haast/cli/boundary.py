"""Turns exceptions into one line on stderr and an exit code. Knows no command.

Exit codes: 0 success; 1 a check failed; 2 wrong input; 3 an internal error; 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from haast.errors import HaastWarning

# If torchao is installed, transformers imports it. It logs which GPU kernels it can't load, and torch logs a
# deprecation of enums. A user can do nothing about either. Errors are still shown.
_CHATTY = ("torchao", "torch.utils._pytree")
_INTERNAL = (RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


class Boundary(TyperGroup):
    """The command group: wrong input ends with one clear line on stderr and exit code 2, Ctrl-C with 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command named on the command line."""
        try:
            with _quiet():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of the pipe (`haast ... | head`) has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, OSError, *_INTERNAL) as error:
            if isinstance(ctx.obj, dict) and ctx.obj.get("debug"):
                traceback.print_exc(file=sys.stderr)
            internal = not isinstance(error, ValueError | OSError)
            message = f"internal error, {type(error).__name__}: {error}" if internal else str(error)
            hint = " (please report it with the traceback of haast --debug ...)" if internal else ""
            typer.echo(f"haast: {' '.join(message.split())}{hint}", err=True)
            raise typer.Exit(3 if internal else 2) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Show Haast's warnings as one line without file and line number, and hide what libraries log on import."""
    usual = warnings.formatwarning
    levels = {name: logging.getLogger(name).level for name in _CHATTY}

    def one_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        own = issubclass(category, HaastWarning)
        return f"haast: warning: {message}\n" if own else usual(message, category, *where, **more)

    warnings.formatwarning = one_line
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = usual
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def human_output(json_path: str | None) -> TextIO:
    """The stream for human-readable output: stdout, or stderr if stdout carries JSON."""
    return sys.stderr if json_path == "-" else sys.stdout
