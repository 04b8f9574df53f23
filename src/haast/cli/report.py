"""`haast report`. Owns its flags and files; pages are made by `haast.bench` from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haast.cli.boundary import check_writable, write_json, write_text
from haast.cli.settings import JsonOption
from haast.errors import expanded


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="suite.json of `haast bench --suite`.")],
    html: Annotated[str | None, typer.Option(metavar="OUT", help="Write one page of HTML.")] = None,
    markdown: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write Markdown; without any file it goes to stdout.")
    ] = None,
    json_out: JsonOption = None,
    merge_anyway: Annotated[
        bool, typer.Option("--merge-anyway", help="Merge runs of other commits, machines or settings, with a warning.")
    ] = False,
) -> None:
    """Make the tables of a suite again, or of several: other suites or decoders of the same machine and commit.

    \b
    haast report results/suite/suite.json --html report.html
    haast report mt_bench/suite.json gsm8k/suite.json --markdown both.md --json both.json
    """
    for path in (html, markdown, json_out):
        check_writable(path)

    from haast.bench.document import read_document
    from haast.bench.merge import merged
    from haast.bench.suite_tables import suite_markdown

    if len(set(files)) < len(files):
        raise ValueError("a file is named twice: name each once")
    named = {str(file): read_document(expanded(file, "cannot read")) for file in files}
    document = merged(named, merge_anyway)
    for words in document["environment"].get("warnings", ()):
        typer.echo(f"haast: warning: {words}", err=True)
    write_json(document, json_out)
    if html is not None:
        from haast.bench.page import report_html

        _write(html, report_html(document))
    if markdown is not None or (html is None and json_out is None):
        _write(markdown or "-", suite_markdown(document))


def _write(path: str, text: str) -> None:
    if path == "-":
        typer.echo(text, nl=False)
    else:
        write_text(expanded(path, "cannot write"), text)
