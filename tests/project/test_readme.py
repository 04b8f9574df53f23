"""The README's commands exist and its numbers are those of `results/`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from readme import render
from typer.testing import CliRunner

from haast.bench.tables import markdown
from haast.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    blocks = [
        b for page in PAGES for b in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines if line.strip()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_say_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    numbered = ("README.md", "results.md", "speed.md", "training.md", "why-it-works.md")
    assert text.count("<!-- results:") >= (page.name in numbered)
    assert render(text, ROOT / "results") == text, "run `make readme`"


def test_a_changed_number_would_be_noticed() -> None:
    number = re.search(r"\| eagle \| ([0-9.]+) \|", README)
    assert number is not None
    forged = README.replace(number[0], number[0].replace(number[1], "999.9"), 1)
    assert render(forged, ROOT / "results") == README


def test_what_would_end_a_cell_is_escaped_and_nothing_else() -> None:
    row = {"rows": "1 | <2>\n& 3", "ms": 1.0, "roofline_ms": 0.5, "times": None}
    document = {"linears": [row], "bandwidth": 1e9, "peak": 2e9, "weight_bytes": 3e6}
    assert "| 1 \\| <2> & 3 | 1.00 | 0.50 |  |" in markdown("results.md", "roofline", document)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("haast ")])
def test_its_commands_and_flags_exist(command: str) -> None:
    name = command.split()[1]
    help_text = CliRunner().invoke(app, [name, "--help"]).output
    assert f"haast {name}" in help_text
    for flag in re.findall(r"--[a-z-]+", command):
        assert flag in help_text, f"{command}: no flag {flag}"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_its_make_targets_exist(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_row_of_a_table_has_the_columns_of_its_head() -> None:
    for page in PAGES:
        columns = 0
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.startswith("|"):
                columns = 0
                continue
            found = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
            assert found == (columns or found), f"{page.name}:{number}: {line}"
            columns = found


def test_no_absolute_path_of_a_machine_in_results() -> None:
    for path in (ROOT / "results").glob("*.json"):
        assert not re.search(r'"[^"]*(/home/|/work/|/root/|/tmp/|\.\./)', path.read_text(encoding="utf-8")), path.name


def test_the_report_is_the_page_of_the_results() -> None:
    page = (ROOT / "docs" / "report.html").read_text(encoding="utf-8")
    document = json.loads((ROOT / "results" / "suite.json").read_text(encoding="utf-8"))
    assert len(page) < 2_000_000 and document["environment"]["commit"]["hash"][:12] in page
    wanted = ("all", 0.0, "eagle+suffix", "vanilla")
    keys = ("suite", "temperature", "decoder", "over")
    best = next(each for each in document["ratios"] if tuple(each[key] for key in keys) == wanted)
    assert f"{best['ratio']:.2f}" in page, "run `make readme`"
