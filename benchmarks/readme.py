"""The numbers of the README and of docs/, from the JSON files in `results/` and nothing else.

Owns the text between `<!-- results:NAME -->` (or NAME+NAME: one table of several files; NAME#short: a suite's one
table) and `<!-- end -->`. `python benchmarks/readme.py` rewrites it; a test keeps the two equal.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from haast.bench.tables import markdown, suite_markdown
from haast.serving.conform.report import KIND as CONFORM
from haast.serving.conform.report import markdown as conformance

KINDS = (  # of documents in results/ but suites, each by the key that only this kind has
    "base", "seconds_to_tau", "explained_variance", "peers", "linears", "contexts", "oracle", "baselines", "lengths",
    "forward_ms", "batches", "precisions", "conversation", "optimizers", "watched", "load", "grammars",
)  # fmt: skip
_BLOCK = re.compile(r"(<!-- results:(?P<name>[a-z0-9+-]+)(?P<short>#short)? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def render(readme: str, results: Path) -> str:
    """Replace every results block by what its JSON says.

    Raises:
        ValueError: a block names a file that is not there.
    """

    def block(match: re.Match[str]) -> str:
        documents = {f"results/{name}.json": _read(results / f"{name}.json") for name in match["name"].split("+")}
        return match[1] + _told(documents, match["short"] is not None) + match["end"]

    return _BLOCK.sub(block, readme)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"a page names {path.name}, which is not in {path.parent}: run the bench that writes it")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _told(documents: dict[str, dict[str, Any]], short: bool) -> str:
    """The table of one document or several, and where they come from."""
    name, document = next(iter(documents.items()))
    if "ratios" in document:  # a suite
        return suite_markdown(document, "short" if short else "tables", name)
    if document.get("kind") == CONFORM:
        return conformance([Path(each) for each in documents])
    if document.get("kind") == "interop-vllm":
        table = markdown("results.md", "interop", documents)
    elif "added" in document:
        table = markdown("results.md", "added", documents)
    elif kind := next((key for key in KINDS if key in document), None):
        table = markdown("results.md", kind, document)
    elif any(row["decoder"] == "vanilla" for row in document["rows"]):
        table = markdown("results.md", "decoders", document)
    else:  # no denominator: runs for tau alone
        table = markdown("results.md", "taus", documents)
    sources = (markdown("results.md", "source", name, each["environment"]) for name, each in documents.items())
    return f"{table}\n\n" + "\n".join(sources) + "\n"


def main() -> None:
    """Rewrite README.md and docs/ in the current folder from results/."""
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = render(old, Path("results"))
        path.write_text(new, encoding="utf-8")
        sys.stdout.write(f"{path} {'is up to date' if old == new else 'rewritten'}\n")


if __name__ == "__main__":
    main()
