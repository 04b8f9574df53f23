"""MkDocs hook: inserts the help texts of all commands into the command line page."""

from __future__ import annotations

from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from haast.cli import app

MARK = "<!-- help of every command -->"


def help_texts() -> str:
    """Help texts of `haast` and of every command, as Markdown sections."""
    names = sorted(getattr(get_command(app), "commands", {}))
    parts = []
    for words in ([], *([name] for name in names)):
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
        if shown.exit_code:
            raise RuntimeError(f"haast {' '.join(words)} --help failed: {shown.output}")
        parts.append(f"## haast {' '.join(words)}\n\n```text\n{shown.output.strip()}\n```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, **_more: Any) -> str:
    """Replace `MARK` by the help texts; MkDocs calls this for every page."""
    return markdown.replace(MARK, help_texts()) if MARK in markdown else markdown
