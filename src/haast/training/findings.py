"""What the checks behind an alarm found, as a value and as a table. Owns the words; knows no tensors and no checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Finding:
    """One check that was run."""

    check: str  # its name, a few words
    text: str  # what was measured
    state: Literal["ok", "suspect"]
    remedy: str  # what to do if it is suspect


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per check, suspects in red with their remedy."""
    table = Table(title="tau is about 1: nothing that the head drafts is accepted. What was checked:", box=None)
    for heading in ("", "check", "found"):
        table.add_column(heading, justify="left", overflow="fold")
    for finding in sorted(findings, key=lambda f: f.state != "suspect"):
        suspect = finding.state == "suspect"
        words = Text(finding.text + (f"; {finding.remedy}" if suspect else ""))
        table.add_row(Text(finding.state, style="bold red" if suspect else "green"), Text(finding.check), words)
    return table
