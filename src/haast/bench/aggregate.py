"""From answers to rows: of one prompt, of many, of all suites; spread over rounds, ratios of decoders.

Owns the arithmetic and the rows' schema, so that a run, a suite and a merge of suites count alike: times are medians
over rounds per prompt, counts are the first round's, and a decoded token is every one but the prefill's.

How sure a ratio of speeds is says the percentile bootstrap over prompts. The prompts are the sample (another run of the
same prompts says nothing of other prompts), so prompts are drawn with replacement, all decoders with the same draw
since they answered the same prompts. Several suites are strata: each is drawn from within itself and keeps its size.
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
Group = dict[tuple[float, str], dict[str, list[Row]]]  # (temperature, suite or "all") -> decoder -> its answers
ALL = "all"
_BY_DEPTH = ("alpha_by_depth", "acceptance_by_depth")
_PER_STEP = ("ms_draft", "ms_verify", "ms_overhead", "nodes_per_forward")


@dataclass(frozen=True)
class Bootstrap:
    """How often prompts are drawn, by which seed, and the share of the draws that an interval holds."""

    samples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seed < 0 or not 0 < self.level < 1:
            raise ValueError(f"{self} is not allowed: give 1 sample or more, a seed from 0 on, a level within 0 and 1")

    def draws(self, strata: Sequence[int]) -> NDArray[np.int64]:
        """Prompt numbers (samples, prompts); `strata` are the sizes of the suites, one after the other."""
        generator, begin = np.random.default_rng(self.seed), 0
        parts = []
        for size in strata:
            parts.append(begin + generator.integers(size, size=(self.samples, size)))
            begin += size
        return np.concatenate(parts, axis=1)

    def interval(self, values: NDArray[np.float64]) -> tuple[float, float] | None:
        """The middle `level` of the values (samples,); None where one of them is no number."""
        if not np.isfinite(values).all():
            return None
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def build_rows(records: Records, prompts: Sequence[BenchPrompt]) -> list[Row]:
    """One row per decoder.

    `tokens_per_s` is decoded tokens over decode time by one rule for all decoders; `whole_call_tokens_per_s` counts
    every token and the prefill. ms_draft, ms_verify, ms_overhead are per decoding step. `peak_rss_mb` is the process's
    peak while that decoder ran, with all decoders' models in memory.
    """
    rows = []
    for name, own in records.items():
        answers = [describe_answer({}, prompt, name, each) for prompt, each in zip(prompts, own, strict=True)]
        rows.append(pooled([_row_of(*each) for each in zip(answers, own, strict=True)], answers))
    _compare(rows, {row["decoder"]: row["tokens_per_s"] for row in rows})
    return rows


def _row_of(answer: Row, record: Record) -> Row:
    """What of one answer a row is made of, beside the answer."""
    stats = record[0].stats
    row: Row = {key: answer[key] for key in ("decoder", "tokens", "tau", "target_forwards")}
    row |= {"prompts": 1, "decoded_tokens": decoded(answer), "peak_rss_mb": max(run.peak_rss_mb for run in record)}
    if stats is None:  # outside the engine
        return row | {key: [] for key in (*_BY_DEPTH, "reached_by_depth")}
    steps = max(stats.target_forwards, 1)
    row |= {key: getattr(stats, key) for key in (*_BY_DEPTH, "reached_by_depth", "by_length")}
    for key in ("ms_draft", "ms_verify", "ms_overhead"):
        row[key] = median(getattr(run.stats, key) for run in record) / steps
    return row | {"nodes_per_forward": stats.nodes / steps}


def describe_answer(cell: Mapping[str, Any], prompt: BenchPrompt, decoder: str, record: Record) -> Row:
    """What one decoder did with one prompt; `cell` has its suite and temperature."""
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
    """What each decoder did with each prompt, prompt by prompt."""
    listed = []
    for place, prompt in enumerate(prompts):
        one: Row = {"id": prompt.id, "category": prompt.category, "prompt_tokens": len(prompt.tokens)}
        for name, own in records.items():
            answer = describe_answer({}, prompt, name, own[place])
            told = {"tokens": answer["tokens"], "tokens_per_s": speed([answer]), "tau": answer["tau"]}
            one[name] = told | {"loop_share": loop_share(own[place][0].tokens)}
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
    pairs = [zip(part[key], part["reached_by_depth"], strict=True) for part in parts]
    return [_mean(own) for own in zip_longest(*pairs, fillvalue=(0.0, 0))]


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


def rates(tokens: Sequence[int], ms: Sequence[float], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens a second (samples,) of every draw: all its tokens over all its time; nan where it took none.

    Args:
        tokens: per prompt.
        ms: per prompt.
        draws: prompt numbers (samples, prompts).
    """
    counts, times = (np.asarray(values, dtype=np.float64)[draws].sum(1) for values in (tokens, ms))
    return ratio(1e3 * counts, times)


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """One over the other (samples,); nan or inf where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = numerator / denominator
    return found
