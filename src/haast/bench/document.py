"""The JSON of a suite run ("haast-suite-1"): made from records, read from a file, merged from several.

Owns the schema and what has to agree in a merge; `aggregate` adds what goes over suites. Speeds of two machines are no
comparison, so they are refused; who asks for it anyway gets every environment and the reasons in the document. Decoders
of different files did not run interleaved, and of their texts only the lengths can be compared.

Neither prompts nor answers are in it: their licences are their authors', and counts are all that a reader needs.
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

KIND = "suite"  # of the results in results/
FORMAT = "haast-suite-1"
_MADE_BY = {FORMAT: "a suite.json of `haast bench --suite`", TRACE_FORMAT: "what `haast trace --json` wrote"}
_KEYS: dict[str, type] = {
    "environment": dict, "suites": dict, "decoders": dict, "temperatures": list, "rounds": int, "rows": list,
    "ratios": list, "differences": list, "answers": list, "bootstrap": object, "calibration": object, "traces": list,
}  # fmt: skip
_SAME = ("commit", "sources_sha256", "cpu", "threads", "device", "model", "dtype", "packing", "versions")
_DRAFTER = ("shape", "pace")  # of the settings: each decoder's own, compared there


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
                describe_answer(cell, prompt, decoder, own[place])
                for place, prompt in enumerate(suite.prompts)
                for decoder, own in records.items()
            ]
    complete(document)
    return document


def check_format(document: Document, kind: str = FORMAT) -> None:
    """Raises ValueError for a document of another kind."""
    if document.get("format") != kind:
        raise ValueError(f"format={document.get('format')!r} is not {kind!r}: give {_MADE_BY[kind]}")


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
    missing = sorted(set(_KEYS) - set(value))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run `haast bench --suite` again with --resume")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(value[key], kind)]
    if not wrong:
        named = {str(row.get("decoder")) for row in value["rows"] if isinstance(row, dict)}
        numbers = all(type(temperature) in (int, float) for temperature in value["temperatures"])
        wrong = [*(["temperatures"] if not numbers else []), *(["decoders"] if named - set(value["decoders"]) else [])]
    if wrong:
        words = ", ".join(wrong)
        raise ValueError(f"{path}: {words} hold something else than `haast bench --suite` writes: a damaged document")
    return value


def merged(documents: Mapping[str, Document], anyway: bool = False) -> dict[str, Any]:
    """One document.

    Args:
        documents: by file name.
        anyway: merge although something differs that decides speed.

    Raises:
        ValueError: one suite, decoder and temperature twice, one name for two suites, or a difference without `anyway`.
    """
    names, parts = list(documents), list(documents.values())
    if len(parts) == 1:
        return dict(parts[0])
    _refuse_clashes(documents)
    first = parts[0]
    result: dict[str, Any] = {"kind": KIND, "format": first["format"], "environment": {}}
    result["suites"] = {name: suite for part in parts for name, suite in part["suites"].items()}
    known = {name: own for part in reversed(parts) for name, own in part["decoders"].items()}
    result["decoders"] = {name: known[name] for part in parts for name in part["decoders"]}
    result["temperatures"] = sorted({temperature for part in parts for temperature in part["temperatures"]})
    result["rounds"], result["ratios"] = max(part["rounds"] for part in parts), []
    for key in ("rows", "differences", "answers", "traces"):
        result[key] = [dict(each) for part in parts for each in part[key]]
    result["bootstrap"] = first["bootstrap"]
    result["calibration"] = next((part["calibration"] for part in parts if part["calibration"] is not None), None)
    complaints = [words for name in names[1:] for words in _differing(names[0], first, name, documents[name])]
    complaints += _uneven(result)
    if complaints and not anyway:
        raise ValueError(
            f"these are not one measurement: {'; '.join(complaints)}: merge what ran alike, or give --merge-anyway"
        )
    listed, warnings = list[dict[str, Any]](), list[str]()
    for part in parts:
        own = dict(part["environment"])
        warnings += own.pop("warnings", [])
        listed += own.pop("merged", [own])
    result["environment"] = {**listed[0], "merged": listed, "warnings": [*warnings, *complaints]}
    complete(result)
    return result


def _refuse_clashes(documents: Mapping[str, Document]) -> None:
    """What no document can hold, whoever asks."""
    owners, suites = dict[tuple[str, str, float], str](), dict[str, tuple[str, Any]]()
    for file, document in documents.items():
        for suite, about in document["suites"].items():
            same = (about, list(dict.fromkeys(a["id"] for a in document["answers"] if a["suite"] == suite)))
            other, known = suites.setdefault(suite, (file, same))
            if known != same:
                raise ValueError(f"suite {suite!r} has other prompts in {other} than in {file}: rename one, run again")
        for row in document["rows"]:
            key = (row["suite"], row["decoder"], row["temperature"])
            if row["suite"] == "all":
                continue
            if key in owners:
                where = f"{row['decoder']} on {row['suite']} at temperature {row['temperature']:g}"
                raise ValueError(f"{where} is in {owners[key]} and in {file}: leave one of the files out")
            owners[key] = file


def _differing(one: str, before: Document, other: str, now: Document) -> Iterator[str]:
    """What decides speed and is not the same, in words."""
    pairs = [(key, before["environment"].get(key), now["environment"].get(key)) for key in _SAME]
    old, new = (document["environment"].get("settings", {}) for document in (before, now))
    names = [key for key in {**old, **new} if key not in _DRAFTER]
    pairs += [(key, old.get(key), new.get(key)) for key in names]
    pairs += [(key, before[key], now[key]) for key in ("rounds", "bootstrap") if key not in names]
    for name in set(before["decoders"]) & set(now["decoders"]):
        pairs.append((f"settings of {name}", before["decoders"][name], now["decoders"][name]))
    for key, mine, theirs in pairs:
        if mine != theirs:
            yield f"{key} is {short(mine)} in {one}, {short(theirs)} in {other}"


def _uneven(document: Document) -> Iterator[str]:
    """Decoders bound to vanilla's text whose answers to one prompt have other lengths, and no difference on record."""
    excused = {(d["suite"], d["temperature"], d["prompt"], d["decoder"]) for d in document["differences"]}
    lengths: dict[tuple[str, float, str], dict[str, int]] = {}
    for answer in document["answers"]:
        key, name = (answer["suite"], answer["temperature"], answer["id"]), answer["decoder"]
        own_text = answer["temperature"] > 0 and document["decoders"][name]["rule"] != "match"
        if name != "hf" and not own_text and (*key, name) not in excused:
            lengths.setdefault(key, {})[name] = answer["tokens"]
    for (suite, temperature, prompt), own in lengths.items():
        if len(set(own.values())) > 1:
            yield f"answers to {prompt} of {suite} at temperature {temperature:g} have other lengths: {own}"
            return
