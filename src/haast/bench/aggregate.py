"""From answers to rows: of one prompt, of many, of all suites; spread over rounds, ratios of decoders.

Owns the arithmetic and the rows' schema, so that a run, a suite and a merge of suites count alike: times are medians
over rounds per prompt, counts are the first round's, and a decoded token is every one but the prefill's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations, zip_longest
from statistics import median
from typing import Any

from haast.bench.bootstrap import Bootstrap, rates, ratio
from haast.bench.runner import BenchPrompt, Record, Records
from haast.stats import loop_share, loops

Row = dict[str, Any]
Group = dict[tuple[float, str], dict[str, list[Row]]]  # (temperature, suite or "all") -> decoder -> its answers
ALL = "all"
SUITE_FORMAT = "haast-suite-1"
_BY_DEPTH = ("alpha_by_depth", "acceptance_by_depth")
_PER_STEP = ("ms_draft", "ms_verify", "ms_overhead", "nodes_per_forward")


def build_rows(records: Records, prompts: Sequence[BenchPrompt]) -> list[Row]:
    """One row per decoder.

    `tokens_per_s` is decoded tokens over decode time by one rule for all decoders; `whole_call_tokens_per_s` counts
    every token and the prefill. ms_draft, ms_verify, ms_overhead are per decoding step. `peak_rss_mb` is the process's
    peak while that decoder ran, with all decoders' models in memory.
    """
    rows = []
    for name, own in records.items():
        answers = [describe_answer({}, prompt, name, each) for prompt, each in zip(prompts, own, strict=True)]
        rows.append(pooled([_row_of(name, each) for each in own], answers))
    _compare(rows, {row["decoder"]: row["tokens_per_s"] for row in rows})
    return rows


def _row_of(name: str, record: Record) -> Row:
    """What of one answer a row is made of, beside its answer."""
    stats = record.runs[0].stats
    row: Row = {"decoder": name, "peak_rss_mb": record.peak_rss_mb, "tokens": len(record.tokens), "prompts": 1}
    row["decoded_tokens"] = record.decoded
    if stats is None:  # outside the engine
        return row | {"tau": None, "target_forwards": None} | {key: [] for key in (*_BY_DEPTH, "reached_by_depth")}
    steps = max(stats.target_forwards, 1)
    row |= {key: getattr(stats, key) for key in ("tau", *_BY_DEPTH, "reached_by_depth", "by_length", "target_forwards")}
    row |= {key: record.ms_part(key) / steps for key in _PER_STEP if key.startswith("ms_")}
    return row | {"nodes_per_forward": stats.nodes / steps}


def describe_answer(cell: Mapping[str, Any], prompt: BenchPrompt, decoder: str, record: Record) -> Row:
    """What one decoder did with one prompt; `cell` has its suite and temperature."""
    return {
        "suite": cell.get("suite"),
        "id": prompt.id,
        "category": prompt.category,
        "temperature": cell.get("temperature"),
        "decoder": decoder,
        "tokens": len(record.tokens),
        **{key: [getattr(run, key) for run in record.runs] for key in ("ms_decode", "ms_prefill")},
        **{key: getattr(record.runs[0].stats, key, None) for key in ("target_forwards", "tau", "nodes")},
        "looping": loops(record.tokens),
    }


def per_prompt(records: Records, prompts: Sequence[BenchPrompt]) -> list[Row]:
    """What each decoder did with each prompt, prompt by prompt."""
    listed = []
    for place, prompt in enumerate(prompts):
        one: Row = {"id": prompt.id, "category": prompt.category, "prompt_tokens": len(prompt.tokens)}
        for name, own in records.items():
            stats, tokens = own[place].runs[0].stats, own[place].tokens
            speed = rate(own[place].decoded, own[place].ms_decode)
            tau = None if stats is None else stats.tau
            one[name] = {"tokens": len(tokens), "tokens_per_s": speed, "tau": tau, "loop_share": loop_share(tokens)}
        listed.append(one)
    return listed


def rate(tokens: int, ms: float) -> float:
    """Tokens a second; 0 where no time was taken."""
    return 1e3 * tokens / ms if ms else 0.0


def _compare(rows: Sequence[Row], speeds: Mapping[str, float]) -> None:
    """Add the speed-ups over those decoders whose speeds there are."""
    for row in rows:
        for base in ("vanilla", "hf"):
            row[f"speedup_vs_{base}"] = row["tokens_per_s"] / speeds[base] if speeds.get(base) else None


def grouped(document: Row) -> Group:
    """The answers by temperature, suite and decoder; under "all" those decoders that answered every suite."""
    groups: Group = {}
    for answer in document["answers"]:
        cell = groups.setdefault((answer["temperature"], answer["suite"]), {})
        cell.setdefault(answer["decoder"], []).append(answer)
    for temperature in document["temperatures"]:
        cells = [groups.get((temperature, suite), {}) for suite in document["suites"]]
        common = [name for name in document["decoders"] if all(name in cell for cell in cells)]
        groups[temperature, ALL] = {name: [answer for cell in cells for answer in cell[name]] for name in common}
    return groups


def complete(document: Row) -> None:
    """Add, from rows of single suites and answers, what goes over them: rows of "all", speed-ups, spread, ratios."""
    groups = grouped(document)
    rows = [row for row in document["rows"] if row["suite"] != ALL]
    for temperature in document["temperatures"]:
        for name, answers in groups[temperature, ALL].items():
            parts = [row for row in rows if (row["temperature"], row["decoder"]) == (temperature, name)]
            rows.append({"suite": ALL, "temperature": temperature, **pooled(parts, answers)})
    for row in rows:
        cell = groups[row["temperature"], row["suite"]]
        row["spread"] = spread(cell[row["decoder"]])
        _compare([row], {name: speed(own) for name, own in cell.items()})
    rank = {name: number for number, name in enumerate([*document["suites"], ALL])}
    decoders = list(document["decoders"])
    rows.sort(key=lambda row: (row["temperature"], rank[row["suite"]], decoders.index(row["decoder"])))
    document["rows"] = rows
    document["ratios"] = list(_ratios(document, groups))


def speed(answers: Sequence[Row]) -> float:
    """Decoded tokens a second."""
    return rate(sum(map(decoded, answers)), sum(map(decode_ms, answers)))


def decoded(answer: Row) -> int:
    """Tokens that decode time stands for."""
    return max(int(answer["tokens"]) - 1, 0)


def decode_ms(answer: Row) -> float:
    """Median over rounds."""
    return float(median(answer["ms_decode"]))


def spread(answers: Sequence[Row]) -> dict[str, float]:
    """Slowest and fastest round, in tokens a second."""
    tokens, rounds = sum(map(decoded, answers)), min(len(answer["ms_decode"]) for answer in answers)
    speeds = [rate(tokens, sum(answer["ms_decode"][i] for answer in answers)) for i in range(rounds)]
    return {"low": min(speeds), "high": max(speeds)}


def pooled(parts: Sequence[Row], answers: Sequence[Row]) -> Row:
    """One decoder's row over several suites, from its rows of each and its answers: as `build_rows` has it."""
    engine = parts[0]["tau"] is not None
    names = sorted({answer["category"] for answer in answers if answer["category"]})
    categories = {name: [a for a in answers if a["category"] == name] for name in names}
    straight = [answer for answer in answers if not answer["looping"]]
    whole = sum(median(map(sum, zip(a["ms_prefill"], a["ms_decode"], strict=True))) for a in answers)
    return {
        "decoder": parts[0]["decoder"],
        "tokens_per_s": speed(answers),
        "whole_call_tokens_per_s": rate(sum(answer["tokens"] for answer in answers), whole),
        "tau": _tau(answers) if engine else None,
        "tau_loop_filtered": _tau(straight) if engine else None,
        "looping_outputs": len(answers) - len(straight),
        "tau_by_category": {name: _tau(own) for name, own in categories.items()} if engine else {},
        **{key: _by_depth(parts, key) for key in _BY_DEPTH},
        "reached_by_depth": [sum(own) for own in zip_longest(*(p["reached_by_depth"] for p in parts), fillvalue=0)],
        "by_length": _by_length(parts),
        **{key: _mean((p[key], p["target_forwards"]) for p in parts) if engine else None for key in _PER_STEP},
        "peak_rss_mb": max(part["peak_rss_mb"] for part in parts),
        **{key: sum(part[key] for part in parts) for key in ("tokens", "decoded_tokens", "prompts")},
        "target_forwards": sum(part["target_forwards"] for part in parts) if engine else None,
    }


def _mean(values: Iterable[tuple[float, float]]) -> float:
    """Of (value, weight); 0 without any weight."""
    pairs = list(values)
    whole = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / whole) if whole else 0.0


def _tau(answers: Sequence[Row]) -> float:
    return _mean((answer["tau"], answer["target_forwards"]) for answer in answers)


def _by_depth(parts: Sequence[Row], key: str) -> list[float]:
    found: list[list[tuple[float, float]]] = [[] for _ in range(max(len(part[key]) for part in parts))]
    for part in parts:
        for own, pair in zip(found, zip(part[key], part["reached_by_depth"], strict=True), strict=False):
            own.append(pair)
    return [_mean(own) for own in found]


def _by_length(parts: Sequence[Row]) -> list[Row]:
    """Buckets of several rows together; documents of an older Haast have none."""
    buckets: dict[int, list[Row]] = {}
    for part in parts:
        for each in part.get("by_length", ()):
            buckets.setdefault(each["begin"], []).append(each)
    return [
        {
            **own[0],
            **{key: sum(each[key] for each in own) for key in ("target_forwards", "drafted")},
            "tau": _mean((each["tau"], each["target_forwards"]) for each in own),
            "acceptance": _mean((each["acceptance"], each["drafted"]) for each in own),
        }
        for _, own in sorted(buckets.items())
    ]


def _ratios(document: Row, groups: Group) -> Iterator[Row]:
    settings = document["bootstrap"]
    bootstrap = Bootstrap(settings["samples"], settings["seed"], settings["level"])
    sizes = {name: suite["prompts"] for name, suite in document["suites"].items()}
    for temperature in document["temperatures"]:
        for suite in (*sizes, ALL):
            cell = groups.get((temperature, suite), {})
            draws = bootstrap.draws(list(sizes.values()) if suite == ALL else [sizes[suite]])
            drawn = {n: rates([*map(decoded, own)], [*map(decode_ms, own)], draws) for n, own in cell.items()}
            for one, other in permutations(cell, 2):
                base = speed(cell[other])
                found = bootstrap.interval(ratio(drawn[one], drawn[other]))
                low, high = (None, None) if found is None else found
                value = speed(cell[one]) / base if base else None
                names = {"suite": suite, "temperature": temperature, "decoder": one, "over": other}
                yield {**names, "ratio": value, "low": low, "high": high}
