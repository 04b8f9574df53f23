"""The JSON document of a suite run ("haast-suite-1"): builds it from records, reads it from a file, merges several.

Owns the schema and what must agree in a merge; `aggregate` adds what is computed over suites. Speeds of two machines
cannot be compared, so a merge of them is refused; with `anyway` it is done, and the document lists every environment
and the reasons against it. Decoders of different files did not run interleaved, and only the lengths of their texts can
be compared.

The document holds neither prompts nor answers: their licences belong to their authors, and the counts are enough.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from haast.bench.aggregate import Bootstrap, build_rows, complete, describe_answer
from haast.bench.journal import short
from haast.bench.runner import Cells, Suite, differences
from haast.bench.trace import TRACE_FORMAT
from haast.core import SamplingParams
from haast.target.target import Target

Document = Mapping[str, Any]

KIND = "suite"
FORMAT = "haast-suite-1"
_WRITTEN_BY = {FORMAT: "a suite.json of `haast bench --suite`", TRACE_FORMAT: "a file of `haast trace --json`"}
_KEYS: dict[str, type] = {
    "environment": dict, "suites": dict, "decoders": dict, "temperatures": list, "rounds": int, "rows": list,
    "ratios": list, "differences": list, "answers": list, "bootstrap": object, "calibration": object, "traces": list,
}  # fmt: skip
_MUST_AGREE = ("commit", "sources_sha256", "cpu", "threads", "device", "model", "dtype", "packing", "versions")
_PER_DECODER = ("shape", "pace")  # settings that are compared decoder by decoder


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
        header: environment, suites, decoders, temperatures, rounds and calibration, from the journal's header.
        cells: the records.
        suites: by name.
        target: decides whether two differing texts are a tie or a bug.
        sampling: the distribution; each cell's temperature replaces its temperature.
        bootstrap: settings of the intervals.
    """
    document: dict[str, Any] = {"kind": KIND, "format": FORMAT, **{key: header[key] for key in _KEYS if key in header}}
    document["suites"] = {
        name: {"file": suite.file, "sha256": suite.sha256, "prompts": len(suite.prompts)}
        for name, suite in suites.items()
    }
    document |= {key: [] for key in ("rows", "ratios", "differences", "answers", "traces")}
    document["bootstrap"] = asdict(bootstrap or Bootstrap())
    for temperature in header["temperatures"]:
        for name, suite in suites.items():
            records, cell = cells[temperature, name], {"suite": name, "temperature": temperature}
            found = differences(records, suite.prompts, target, replace(sampling, temperature=temperature))
            document["rows"] += [{**cell, **row} for row in build_rows(records, suite.prompts)]
            document["differences"] += [{**cell, **asdict(each)} for each in found]
            document["answers"] += [
                describe_answer(cell, prompt, decoder, own[index])
                for index, prompt in enumerate(suite.prompts)
                for decoder, own in records.items()
            ]
    complete(document)
    return document


def check_format(document: Document, kind: str = FORMAT) -> None:
    """Raises ValueError if a document has another format."""
    if document.get("format") != kind:
        raise ValueError(f"format={document.get('format')!r} is not {kind!r}: give {_WRITTEN_BY[kind]}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def read_document(path: Path, kind: str = FORMAT) -> dict[str, Any]:
    """Read a suite document, or with `kind` a trace, from its file.

    Raises:
        ValueError: no such file, or it does not hold this format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): give {_WRITTEN_BY[kind]}") from error
    if not isinstance(value, dict) or value.get("format") != kind:
        raise ValueError(f"{path} is no document of format {kind}: give {_WRITTEN_BY[kind]}")
    if kind == TRACE_FORMAT:
        return value
    missing = sorted(set(_KEYS) - set(value))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run `haast bench --suite` again with --resume")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(value[key], kind)]
    if not wrong:
        in_rows = {str(row.get("decoder")) for row in value["rows"] if isinstance(row, dict)}
        numbers = all(type(temperature) in (int, float) for temperature in value["temperatures"])
        wrong = [
            *(["temperatures"] if not numbers else []),
            *(["decoders"] if in_rows - set(value["decoders"]) else []),
        ]
    if wrong:
        raise ValueError(f"{path} is damaged: `haast bench --suite` does not write such values in {', '.join(wrong)}")
    return value


def merged(documents: Mapping[str, Document], anyway: bool = False) -> dict[str, Any]:
    """Several documents as one.

    Args:
        documents: by file name.
        anyway: merge even if something differs that affects speed.

    Raises:
        ValueError: two files measured the same suite, decoder and temperature, two suites share a name, or something
            differs that affects speed and `anyway` is not set.
    """
    names, parts = list(documents), list(documents.values())
    if len(parts) == 1:
        return dict(parts[0])
    _refuse_clashes(documents)
    first = parts[0]
    result: dict[str, Any] = {"kind": KIND, "format": first["format"], "environment": {}}
    result["suites"] = {name: suite for part in parts for name, suite in part["suites"].items()}
    settings = {name: own for part in reversed(parts) for name, own in part["decoders"].items()}
    result["decoders"] = {name: settings[name] for part in parts for name in part["decoders"]}
    result["temperatures"] = sorted({temperature for part in parts for temperature in part["temperatures"]})
    result["rounds"], result["ratios"] = max(part["rounds"] for part in parts), []
    for key in ("rows", "differences", "answers", "traces"):
        result[key] = [dict(each) for part in parts for each in part[key]]
    result["bootstrap"] = first["bootstrap"]
    result["calibration"] = next((part["calibration"] for part in parts if part["calibration"] is not None), None)
    conflicts = [words for name in names[1:] for words in _differing(names[0], first, name, documents[name])]
    conflicts += _uneven(result)
    if conflicts and not anyway:
        raise ValueError(
            f"these runs are not comparable: {'; '.join(conflicts)}: merge runs of one setup, or give --merge-anyway"
        )
    environments, warnings = list[dict[str, Any]](), list[str]()
    for part in parts:
        own = dict(part["environment"])
        warnings += own.pop("warnings", [])
        environments += own.pop("merged", [own])
    result["environment"] = {**environments[0], "merged": environments, "warnings": [*warnings, *conflicts]}
    complete(result)
    return result


def _refuse_clashes(documents: Mapping[str, Document]) -> None:
    """Raise ValueError for what no merge can hold: one measurement twice, or two suites of one name."""
    owners, suites = dict[tuple[str, str, float], str](), dict[str, tuple[str, Any]]()
    for file, document in documents.items():
        for suite, about in document["suites"].items():
            identity = (about, list(dict.fromkeys(a["id"] for a in document["answers"] if a["suite"] == suite)))
            other, expected = suites.setdefault(suite, (file, identity))
            if expected != identity:
                raise ValueError(
                    f"suite {suite!r} has different prompts in {other} and in {file}: rename one and run it again"
                )
        for row in document["rows"]:
            key = (row["suite"], row["decoder"], row["temperature"])
            if row["suite"] == "all":
                continue
            if key in owners:
                where = f"{row['decoder']} on {row['suite']} at temperature {row['temperature']:g}"
                raise ValueError(f"{where} is in {owners[key]} and in {file}: leave one of the files out")
            owners[key] = file


def _differing(one: str, before: Document, other: str, now: Document) -> Iterator[str]:
    """Sentences on everything that affects speed and differs between two documents."""
    pairs = [(key, before["environment"].get(key), now["environment"].get(key)) for key in _MUST_AGREE]
    old, new = (document["environment"].get("settings", {}) for document in (before, now))
    names = [key for key in {**old, **new} if key not in _PER_DECODER]
    pairs += [(key, old.get(key), new.get(key)) for key in names]
    pairs += [(key, before[key], now[key]) for key in ("rounds", "bootstrap") if key not in names]
    for name in set(before["decoders"]) & set(now["decoders"]):
        pairs.append((f"settings of {name}", before["decoders"][name], now["decoders"][name]))
    for key, mine, theirs in pairs:
        if mine != theirs:
            yield f"{key} is {short(mine)} in {one}, {short(theirs)} in {other}"


def _uneven(document: Document) -> Iterator[str]:
    """Report the first prompt whose answers should be equal but differ in length, unless a difference is on record."""
    recorded = {(d["suite"], d["temperature"], d["prompt"], d["decoder"]) for d in document["differences"]}
    lengths: dict[tuple[str, float, str], dict[str, int]] = {}
    for answer in document["answers"]:
        key, name = (answer["suite"], answer["temperature"], answer["id"]), answer["decoder"]
        independent = answer["temperature"] > 0 and document["decoders"][name]["rule"] != "match"
        if name != "hf" and not independent and (*key, name) not in recorded:
            lengths.setdefault(key, {})[name] = answer["tokens"]
    for (suite, temperature, prompt), own in lengths.items():
        if len(set(own.values())) > 1:
            yield f"answers to {prompt} of {suite} at temperature {temperature:g} differ in length: {own}"
            return
