"""What the site gets from the code when it is built: the command line's own help texts."""

from __future__ import annotations

from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from haast.cli import app

MARK = "<!-- help of every command -->"


def help_texts() -> str:
    """`haast --help`, and that of every command, as blocks of text."""
    names = sorted(getattr(get_command(app), "commands", {}))
    parts = []
    for words in ([], *([name] for name in names)):
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
        if shown.exit_code:
            raise RuntimeError(f"haast {' '.join(words)} --help failed: {shown.output}")
        parts.append(f"## haast {' '.join(words)}\n\n```text\n{shown.output.strip()}\n```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, **_more: Any) -> str:
    """Called by MkDocs for every page."""
    return markdown.replace(MARK, help_texts()) if MARK in markdown else markdown
