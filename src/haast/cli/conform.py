"""`haast conform`: conformance checks for any OpenAI-compatible server. Owns the flags; `serving.conform` the checks.

Loads no model and no torch.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption, check_at_least
from haast.errors import expanded
from haast.files import check_writable, write_json


def conform(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server, with or without /v1.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model to test; default: the only one of the server.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="API key, if the server needs one.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the API key, which keeps it out of `ps`.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the server in the result.")] = None,
    server_version: Annotated[
        str | None, typer.Option(metavar="V", help="Version of the server in the result.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="LIST", help="Checks, themes or rows to run, comma-separated: stops,n,A6.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Context length in tokens, if the server does not report it.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Maximum seconds to wait for output.")] = 60.0,
    json_out: JsonOption = None,
) -> None:
    """Check any OpenAI-compatible server over HTTP: stops, counts, logprobs, seeds, streams, schemas, tools, errors.

    Each check tests a property that holds for any model. A field that is accepted and then ignored counts as a failure;
    an error that names the field does not. Takes one to three minutes. The exit code is 1 if a check fails.

    \b
    haast conform http://127.0.0.1:8000
    haast conform http://127.0.0.1:8080 --model my-model --name llama.cpp --server-version b9999 --json conform.json
    haast conform http://127.0.0.1:8000 --only stops,A6
    """
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout={timeout} is not allowed: give a value above 0")
    if context is not None:
        check_at_least("context", context)
    key = _key(api_key, api_key_file)
    check_writable(json_out)

    from haast.serving.conform.client import Client
    from haast.serving.conform.report import document, line, summary, totals
    from haast.serving.conform.suite import chosen, root_of, run, subject_at
    from haast.serving.conform.wire import HttpWire

    checks, root, out = chosen(only), root_of(url), human_output(json_out)
    with closing(HttpWire(root)) as wire:
        subject = subject_at(Client(wire, key, timeout), root, model, context)
        outcomes = run(subject, checks, lambda *checked: print(line(*checked), file=out, flush=True))
    print(summary(totals(outcomes)), file=out)
    server = {"name": name, "version": server_version, "model": subject.model, "owner": subject.owner, "url": root}
    write_json(document(checks, outcomes, server), json_out)
    if any(outcome.verdict.failed for outcome in outcomes.values()):
        raise typer.Exit(1)


def _key(api_key: str | None, file: Path | None) -> str | None:
    """The key, from the command line or a file. Raises ValueError."""
    if file is None:
        return api_key
    if api_key is not None:
        raise ValueError("--api-key and --api-key-file can't be given together: leave one out")
    try:
        key = expanded(file, "cannot read").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read --api-key-file {file} ({error}): give a file that contains only the key"
        ) from error
    if not key:
        raise ValueError(f"--api-key-file {file} is empty: write the key into it")
    return key
