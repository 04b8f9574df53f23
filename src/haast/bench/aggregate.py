"""Aggregates answers into rows: one row per decoder, suite and temperature, with spread and ratios of decoders.

Owns the arithmetic and the rows' schema, so that a run, a suite and a merge of suites count alike: times are medians
over rounds per prompt, counts are those of the first round, and every token is a decoded token except the one that
prefill emits.

Intervals of speed ratios come from the percentile bootstrap over prompts. The prompts are the sample, because another
run of the same prompts is no evidence about other prompts. Prompts are drawn with replacement, and all decoders share
each draw, because they answered the same prompts. Suites are strata: each is resampled within itself, at its size.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap", ch. 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, zip_longest
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haast.bench.runner import BenchPrompt, Record, Records
from haast.stats import loop_share, loops

Row = dict[str, Any]
Group = dict[tuple[float, str], dict[str, list[Row]]]  # (temperature, suite or "all") -> decoder -> answers
ALL = "all"
_BY_DEPTH = ("alpha_by_depth", "acceptance_by_depth")
_PER_STEP = ("ms_draft", "ms_verify", "ms_overhead", "nodes_per_forward")


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap: number of draws, seed, and the share of the draws that an interval covers."""

    samples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seed < 0 or not 0 < self.level < 1:
            raise ValueError(
                f"{self} is not allowed: give 1 sample or more, a seed from 0 on, and a level between 0 and 1"
            )

    def draws(self, strata: Sequence[int]) -> NDArray[np.int64]:
        """Prompt indices (samples, prompts); `strata` are the sizes of the suites, in the order of the prompts."""
        generator, offset = np.random.default_rng(self.seed), 0
        parts = []
        for size in strata:
            parts.append(offset + generator.integers(size, size=(self.samples, size)))
            offset += size
        return np.concatenate(parts, axis=1)

    def interval(self, values: NDArray[np.float64]) -> tuple[float, float] | None:
        """Bounds of the middle `level` of the values (samples,); None if one of them is not finite."""
        if not np.isfinite(values).all():
            return None
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def build_rows(records: Records, prompts: Sequence[BenchPrompt]) -> list[Row]:
    """One row per decoder.

    `tokens_per_s` is decoded tokens over decode time, by the same rule for all decoders; `whole_call_tokens_per_s`
    includes the prefill and its token. ms_draft, ms_verify and ms_overhead are per decoding step. `peak_rss_mb` is the
    peak of the process while that decoder ran, with all decoders' models in memory.
    """
    rows = []
    for name, own in records.items():
        answers = [describe_answer({}, prompt, name, each) for prompt, each in zip(prompts, own, strict=True)]
        rows.append(pooled([_row_of(*each) for each in zip(answers, own, strict=True)], answers))
    _add_speedups(rows, {row["decoder"]: row["tokens_per_s"] for row in rows})
    return rows


def _row_of(answer: Row, record: Record) -> Row:
    """The row of one answer: what `pooled` needs in addition to the answer itself."""
    stats = record[0].stats
    row: Row = {key: answer[key] for key in ("decoder", "tokens", "tau", "target_forwards")}
    row |= {"prompts": 1, "decoded_tokens": decoded(answer), "peak_rss_mb": max(run.peak_rss_mb for run in record)}
    if stats is None:  # a decoder outside the engine
        return row | {key: [] for key in (*_BY_DEPTH, "reached_by_depth")}
    steps = max(stats.target_forwards, 1)
    row |= {key: getattr(stats, key) for key in (*_BY_DEPTH, "reached_by_depth", "by_length")}
    for key in ("ms_draft", "ms_verify", "ms_overhead"):
        row[key] = median(getattr(run.stats, key) for run in record) / steps
    return row | {"nodes_per_forward": stats.nodes / steps}


def describe_answer(cell: Mapping[str, Any], prompt: BenchPrompt, decoder: str, record: Record) -> Row:
    """The measurements of one decoder on one prompt; `cell` holds its suite and temperature."""
    return {
        "suite": cell.get("suite"),
        "id": prompt.id,
        "category": prompt.category,
        "temperature": cell.get("temperature"),
        "decoder": decoder,
        "tokens": len(record[0].tokens),
        **{key: [getattr(run, key) for run in record] for key in ("ms_decode", "ms_prefill")},
        **{key: getattr(record[0].stats, key, None) for key in ("target_forwards", "tau", "nodes")},
        "looping": loops(record[0].tokens),
    }


def per_prompt(records: Records, prompts: Sequence[BenchPrompt]) -> list[Row]:
    """The measurements of each decoder, one entry per prompt."""
    entries = []
    for index, prompt in enumerate(prompts):
        entry: Row = {"id": prompt.id, "category": prompt.category, "prompt_tokens": len(prompt.tokens)}
        for name, own in records.items():
            answer = describe_answer({}, prompt, name, own[index])
            counts = {"tokens": answer["tokens"], "tokens_per_s": speed([answer]), "tau": answer["tau"]}
            entry[name] = counts | {"loop_share": loop_share(own[index][0].tokens)}
        entries.append(entry)
    return entries


def rate(tokens: int, ms: float) -> float:
    """Tokens per second; 0 if `ms` is 0."""
    return 1e3 * tokens / ms if ms else 0.0


def _add_speedups(rows: Sequence[Row], speeds: Mapping[str, float]) -> None:
    """Add the speed-ups over vanilla and hf; None for one that did not run."""
    for row in rows:
        for base in ("vanilla", "hf"):
            row[f"speedup_vs_{base}"] = row["tokens_per_s"] / speeds[base] if speeds.get(base) else None


def grouped(document: Row) -> Group:
    """The answers by temperature, suite and decoder; "all" holds the decoders that answered every suite."""
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
    """Add what is computed over suites, from their rows and answers: rows of "all", speed-ups, spread, ratios."""
    groups = grouped(document)
    rows = [row for row in document["rows"] if row["suite"] != ALL]
    for temperature in document["temperatures"]:
        for name, answers in groups[temperature, ALL].items():
            parts = [row for row in rows if (row["temperature"], row["decoder"]) == (temperature, name)]
            rows.append({"suite": ALL, "temperature": temperature, **pooled(parts, answers)})
    for row in rows:
        cell = groups[row["temperature"], row["suite"]]
        row["spread"] = spread(cell[row["decoder"]])
        _add_speedups([row], {name: speed(own) for name, own in cell.items()})
    rank = {name: number for number, name in enumerate([*document["suites"], ALL])}
    decoders = list(document["decoders"])
    rows.sort(key=lambda row: (row["temperature"], rank[row["suite"]], decoders.index(row["decoder"])))
    document["rows"] = rows
    document["ratios"] = list(_ratios(document, groups))


def speed(answers: Sequence[Row]) -> float:
    """Decoded tokens per second."""
    return rate(sum(map(decoded, answers)), sum(map(decode_ms, answers)))


def decoded(answer: Row) -> int:
    """Tokens that were generated during the decode time: all but the first."""
    return max(int(answer["tokens"]) - 1, 0)


def decode_ms(answer: Row) -> float:
    """The decode time, as the median over rounds."""
    return float(median(answer["ms_decode"]))


def spread(answers: Sequence[Row]) -> dict[str, float]:
    """Tokens per second of the slowest and of the fastest round."""
    tokens, rounds = sum(map(decoded, answers)), min(len(answer["ms_decode"]) for answer in answers)
    speeds = [rate(tokens, sum(answer["ms_decode"][i] for answer in answers)) for i in range(rounds)]
    return {"low": min(speeds), "high": max(speeds)}


def pooled(parts: Sequence[Row], answers: Sequence[Row]) -> Row:
    """One decoder's row over several suites or answers, in the schema of `build_rows`.

    Args:
        parts: the rows to pool.
        answers: the answers that those rows were made from.
    """
    engine = parts[0]["tau"] is not None
    names = sorted({answer["category"] for answer in answers if answer["category"]})
    categories = {name: [a for a in answers if a["category"] == name] for name in names}
    no_loops = [answer for answer in answers if not answer["looping"]]
    whole = sum(median(map(sum, zip(a["ms_prefill"], a["ms_decode"], strict=True))) for a in answers)
    return {
        "decoder": parts[0]["decoder"],
        "tokens_per_s": speed(answers),
        "whole_call_tokens_per_s": rate(sum(answer["tokens"] for answer in answers), whole),
        "tau": _tau(answers) if engine else None,
        "tau_loop_filtered": _tau(no_loops) if engine else None,
        "looping_outputs": len(answers) - len(no_loops),
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
    """The weighted mean of (value, weight) pairs; 0 if all weights are 0."""
    pairs = list(values)
    total = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / total) if total else 0.0


def _tau(answers: Sequence[Row]) -> float:
    return _mean((answer["tau"], answer["target_forwards"]) for answer in answers)


def _by_depth(parts: Sequence[Row], key: str) -> list[float]:
    pairs = [zip(part[key], part["reached_by_depth"], strict=True) for part in parts]
    return [_mean(own) for own in zip_longest(*pairs, fillvalue=(0.0, 0))]


def _by_length(parts: Sequence[Row]) -> list[Row]:
    """The length buckets of several rows, merged; documents of older versions have none."""
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
                interval = bootstrap.interval(ratio(drawn[one], drawn[other]))
                low, high = (None, None) if interval is None else interval
                value = speed(cell[one]) / base if base else None
                names = {"suite": suite, "temperature": temperature, "decoder": one, "over": other}
                yield {**names, "ratio": value, "low": low, "high": high}


def rates(tokens: Sequence[int], ms: Sequence[float], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens per second (samples,) of every draw: its total tokens over its total time; nan if the time is 0.

    Args:
        tokens: per prompt.
        ms: per prompt.
        draws: prompt indices (samples, prompts).
    """
    counts, times = (np.asarray(values, dtype=np.float64)[draws].sum(1) for values in (tokens, ms))
    return ratio(1e3 * counts, times)


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient (samples,); nan or inf where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: NDArray[np.float64] = numerator / denominator
    return quotient
