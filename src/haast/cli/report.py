"""`haast report`. Owns its flags and files; `haast.bench` renders the tables and pages from the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption
from haast.errors import expanded
from haast.files import check_writable, write_json, write_text


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="suite.json of `haast bench --suite`.")],
    html: Annotated[str | None, typer.Option(metavar="OUT", help="Write an HTML page.")] = None,
    markdown: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write Markdown; it goes to stdout if no file is given.")
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add the trees of `haast trace --json`; may be repeated."),
    ] = None,
    json_out: JsonOption = None,
    merge_anyway: Annotated[
        bool,
        typer.Option("--merge-anyway", help="Merge runs of different commits, machines or settings, with a warning."),
    ] = False,
) -> None:
    """Make tables and pages from one or several `haast bench --suite` results of the same machine and commit.

    \b
    haast report results/suite/suite.json --html report.html
    haast report mt_bench/suite.json gsm8k/suite.json --markdown both.md --json both.json
    haast report results/suite/suite.json --trace trace.json --html report.html
    """
    for path in (html, markdown, json_out):
        check_writable(path)

    from haast.bench.document import merged, read_document
    from haast.bench.page import report_html
    from haast.bench.tables import suite_markdown
    from haast.bench.trace import TRACE_FORMAT

    if len(set(files)) < len(files):
        raise ValueError("a file is listed twice: list each once")
    documents = {str(file): read_document(expanded(file, "cannot read")) for file in files}
    traces = [read_document(expanded(file, "cannot read"), TRACE_FORMAT) for file in trace or ()]
    try:  # render everything before writing anything
        document = merged(documents, merge_anyway)
        document["traces"] = [*document["traces"], *traces]
        tables = suite_markdown(document)
        page = "" if html is None else report_html(document)
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        # A file with the right top-level keys may still hold wrong values at any depth.
        names = ", ".join(map(str, [*files, *(trace or ())]))
        raise ValueError(
            f"cannot read {names} ({type(error).__name__}: {error}): the document is damaged; `haast bench --suite "
            f"--resume` writes it again"
        ) from error
    for warning in document["environment"].get("warnings", ()):
        typer.echo(f"haast: warning: {warning}", err=True)
    write_json(document, json_out)
    if html is not None:
        write_text(html, page)
    if markdown is not None or (html is None and json_out is None):
        write_text(markdown or "-", tables)
    files_out = [path for path in (html, markdown, json_out) if path is not None]
    for path in files_out:
        if path != "-":
            print(f"written to {path}", file=human_output("-" if "-" in files_out else None))
