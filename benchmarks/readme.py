"""Writes the result tables of README.md and docs/ from the JSON files in `results/`.

Owns the text between `<!-- results:NAME -->` and `<!-- end -->`. NAME is a file of `results/` without its ending;
NAME+NAME puts several files into one table; NAME#short is a suite's short table. The `kind` of a document chooses its
table, a macro of `src/haast/bench/templates/results.md`, which is where its columns are. `python benchmarks/readme.py`
rewrites the blocks; a test checks that they are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from haast.bench.document import KIND as SUITE
from haast.bench.tables import markdown, suite_markdown
from haast.serving.conform.report import KIND as CONFORM
from haast.serving.conform.report import markdown as conformance

KINDS = (  # whose table is the macro of this name in results.md; "-" is "_" there
    "ablation", "baselines", "batches", "block-drafter", "calibration", "calibration-curves", "context",
    "conversation", "draft-vocab", "forwards", "gguf", "grammars", "head-check", "hybrid", "interop-vllm",
    "long-context", "optimizer", "oracle", "peers", "precision", "regenerate", "roofline", "sampling-loss",
    "serving-load", "tau-by-turn", "training", "why-it-works", "zoo",
)  # fmt: skip
_JOINED = ("interop-vllm", "regenerate", "zoo")  # kinds that show several documents in one table
_BLOCK = re.compile(r"(<!-- results:(?P<name>[a-z0-9+-]+)(?P<short>#short)? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def render(page: str, results: Path) -> str:
    """Fill in every results block of a page.

    Raises:
        ValueError: a block names a file that does not exist, or whose kind has no table.
    """

    def block(match: re.Match[str]) -> str:
        documents = {f"results/{name}.json": _read(results / f"{name}.json") for name in match["name"].split("+")}
        return match[1] + _block(documents, match["short"] is not None) + match["end"]

    return _BLOCK.sub(block, page)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"a page uses {path}, which does not exist: run the benchmark that writes it")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _block(documents: dict[str, dict[str, Any]], short: bool) -> str:
    """The table of these documents (by path), followed by one line per document that names its source."""
    path, document = next(iter(documents.items()))
    kind = document.get("kind")
    if kind == SUITE:
        return suite_markdown(document, "short" if short else "tables", path)
    if kind == CONFORM:
        return conformance([Path(each) for each in documents])
    if kind == "bench":
        table = _bench_table(documents)
    elif kind in KINDS:
        shown = documents if kind in _JOINED else document
        table = markdown("results.md", kind.replace("-", "_"), shown)
    else:
        raise ValueError(f"{path} has kind={kind!r}, which has no table: use one of {', '.join(KINDS)}")
    sources = (markdown("results.md", "source", name, each["environment"]) for name, each in documents.items())
    return f"{table}\n\n" + "\n".join(sources) + "\n"


def _bench_table(documents: dict[str, dict[str, Any]]) -> str:
    """Speeds and speed-ups where vanilla ran; tau alone where it did not."""
    document = next(iter(documents.values()))
    if any(row["decoder"] == "vanilla" for row in document["rows"]):
        return markdown("results.md", "decoders", document)
    return markdown("results.md", "taus", documents)


def main() -> None:
    """Rewrite README.md and docs/ in the current folder from results/."""
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        try:
            new = render(old, Path("results"))
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        path.write_text(new, encoding="utf-8")
        sys.stdout.write(f"{path} {'is up to date' if old == new else 'rewritten'}\n")


if __name__ == "__main__":
    main()
