"""The JSON of a suite run ("haast-suite-1"), from its records. Owns the schema; `aggregate` adds what goes over suites.

Neither prompts nor answers are in it: their licences are their authors', and counts are all that a reader needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from haast.bench.aggregate import SUITE_FORMAT, build_rows, complete, describe_answer, describe_differences
from haast.bench.bootstrap import Bootstrap
from haast.bench.runner import Cells, Suite, differences
from haast.bench.trace import TRACE_FORMAT
from haast.core import SamplingParams
from haast.target.target import Target

FORMAT = SUITE_FORMAT
_MADE_BY = {FORMAT: "a suite.json of `haast bench --suite`", TRACE_FORMAT: "what `haast trace --json` wrote"}
_KEYS = {"environment", "suites", "decoders", "temperatures", "rounds", "rows", "ratios", "differences", "answers"}
_KEYS |= {"bootstrap", "calibration", "traces"}


def build_document(
    header: Mapping[str, Any],
    cells: Cells,
    suites: Mapping[str, Suite],
    target: Target,
    sampling: SamplingParams,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """The document of a finished run.

    Args:
        header: environment, suites, decoders, temperatures, rounds, calibration, as the journal fixed them.
        cells: the records.
        suites: by name.
        target: judges differing texts.
        sampling: the distribution; each cell's temperature replaces its own.
        bootstrap: of the intervals.
    """
    document = {
        "format": FORMAT,
        **{key: header[key] for key in ("environment", "suites", "decoders", "temperatures", "rounds")},
        "rows": [],
        "ratios": [],
        "differences": [],
        "answers": [],
        "bootstrap": asdict(bootstrap or Bootstrap()),
        "calibration": header["calibration"],
        "traces": [],
    }
    document["suites"] = {name: _suite(suite) for name, suite in suites.items()}
    ruled = [name for name, decoder in header["decoders"].items() if decoder["rule"] != "match"]
    for temperature in header["temperatures"]:
        for name, suite in suites.items():
            records, cell = cells[temperature, name], {"suite": name, "temperature": temperature}
            law, own_text = replace(sampling, temperature=temperature), ruled if temperature > 0 else ()
            found = differences(records, suite.prompts, target, law, own_text)
            document["rows"] += [{**cell, **row} for row in build_rows(records, suite.prompts)]
            document["differences"] += [{**cell, **each} for each in describe_differences(found)]
            document["answers"] += [
                describe_answer(cell, prompt, decoder, own[place])
                for place, prompt in enumerate(suite.prompts)
                for decoder, own in records.items()
            ]
    complete(document)
    return document


def _suite(suite: Suite) -> dict[str, Any]:
    return {"file": suite.file, "sha256": suite.sha256, "prompts": len(suite.prompts)}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_document(path: Path, kind: str = FORMAT) -> dict[str, Any]:
    """A suite document from its file, or one trace's.

    Raises:
        ValueError: no such file, or not one of this format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): give {_MADE_BY[kind]}") from error
    if not isinstance(value, dict) or value.get("format") != kind:
        raise ValueError(f"{path} is no document of {kind}: give {_MADE_BY[kind]}")
    if kind == TRACE_FORMAT:
        return value
    missing = sorted(_KEYS - set(value))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run `haast bench --suite` again with --resume")
    lists = ("temperatures", "rows", "ratios", "differences", "answers", "traces")
    kinds: dict[str, type] = dict.fromkeys(lists, list) | dict.fromkeys(("environment", "suites", "decoders"), dict)
    wrong = [key for key, kind in (kinds | {"rounds": int}).items() if not isinstance(value[key], kind)]
    if "temperatures" not in wrong and not all(type(t) in (int, float) for t in value["temperatures"]):
        wrong.append("temperatures")
    if not wrong and not {str(row.get("decoder")) for row in value["rows"] if isinstance(row, dict)} <= {
        *value["decoders"]
    }:
        wrong.append("decoders")
    if wrong:
        words = ", ".join(wrong)
        raise ValueError(f"{path}: {words} hold something else than `haast bench --suite` writes: a damaged document")
    return value
