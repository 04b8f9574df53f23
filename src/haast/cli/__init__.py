"""The command line. Owns the list of commands; each group of commands has its own module.

Nothing here imports torch, so `haast --help` is fast; commands import what they need when they run.
"""

from __future__ import annotations

import typer

from haast.cli import (
    bench,
    calibrate,
    conform,
    generate,
    heads,
    info,
    make_head,
    regenerate,
    report,
    serve,
    trace,
    train,
    verify,
)
from haast.cli.boundary import Boundary
from haast.cli.settings import expanded

app = typer.Typer(
    cls=Boundary,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help, because importing rich would take most of the time
    pretty_exceptions_enable=False,
    add_completion=False,
    help="EAGLE speculative decoding: a Hugging Face LLM generates faster, with the same output.",
)
for _command in (
    generate.generate,
    generate.chat,
    serve.serve,
    conform.conform,
    regenerate.regenerate,
    train.train,
    make_head.make_head,
    heads.import_,
    heads.export,
    heads.check,
    verify.verify,
    bench.bench,
    report.report,
    trace.trace,
    calibrate.calibrate,
    calibrate.plan,
    info.info,
):
    app.command(_command.__name__.rstrip("_").replace("_", "-"))(expanded(_command))


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"haast {version('haast')}")
        raise typer.Exit


@app.callback()
def _settings(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    ctx.obj = {"debug": debug, **(ctx.obj or {})}


def main() -> None:
    """Entry point of the `haast` command."""
    app(prog_name="haast")
