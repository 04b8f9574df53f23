"""A report document and trace documents for the page's tests: every key of the formats, no model."""

from __future__ import annotations

import random
from typing import Any

NASTY = "<script>alert('x')</script> & \"quotes\" \u202e $x^2$"
_FACTS: dict[str, tuple[float, float, list[float], float]] = {  # speed-up, tau, acceptance, nodes
    "vanilla": (1.0, 1.0, [], 1),
    "eagle": (1.83, 2.48, [0.74, 0.74, 0.70, 0.69], 8.0),
    "eagle+suffix": (1.90, 2.68, [0.75, 0.75, 0.72, 0.74, 0.8], 8.6),
    "lookahead": (1.17, 1.33, [0.38], 5),
    "lookup": (1.28, 1.39, [0.34, 0.7, 0.71], 4),
    "suffix": (1.26, 1.37, [0.31, 0.72, 0.74], 4),
    "medusa": (1.52, 1.95, [0.66, 0.55, 0.5], 7.2),
}
_SUITES = {"mt_bench": 1.0, "humaneval": 1.12, "gsm8k": 1.2}


def suite_document(
    *, calibrated: bool = True, traces: list[dict[str, Any]] | None = None, small: bool = False
) -> dict[str, Any]:
    """A "haast-suite-1" document of seven decoders, three suites and two temperatures (one of each where `small`)."""
    chosen = {"mt_bench": 1.0} if small else {"all": 1.08, **_SUITES}
    temperatures = (0.0,) if small else (0.0, 1.0)
    rng = random.Random(7)
    rows, ratios = [], []
    for suite, factor in chosen.items():
        for temperature in temperatures:
            for decoder in _FACTS:
                row, ratio = _measured(suite, factor * (1 - 0.2 * temperature), temperature, decoder, rng)
                rows.append(row)
                if decoder != "vanilla":
                    ratios.append(ratio)
    suites = {name: {"file": f"{name}.jsonl", "sha256": "ab" * 32, "prompts": 80} for name in chosen if name != "all"}
    return {
        "format": "haast-suite-1",
        "environment": environment(),
        "suites": suites,
        "decoders": {
            name: {"lossy": name == "medusa", "settings": {"shape": {"kind": "dynamic", "nodes": 32}}}
            for name in _FACTS
        },
        "temperatures": list(temperatures),
        "rounds": 2,
        "rows": rows,
        "ratios": ratios,
        "differences": [
            {"prompt": NASTY, "decoder": "hf", "reference": "vanilla", "index": 59, "kind": "precision", "gap": None}
        ],
        "answers": [],
        "bootstrap": {"resamples": 2000, "level": 0.95, "seed": 0},
        "calibration": calibration() if calibrated else None,
        "traces": [trace_document()] if traces is None else traces,
    }


def _measured(
    suite: str, factor: float, temperature: float, decoder: str, rng: random.Random
) -> tuple[dict[str, Any], dict[str, Any]]:
    speed, tau, chances, nodes = _FACTS[decoder]
    ratio = 1 + (speed - 1) * factor * rng.uniform(0.9, 1.1)
    tau = 1 + (tau - 1) * factor
    chances = [min(chance * factor, 0.97) for chance in chances]
    row = {
        "suite": suite, "temperature": temperature, "decoder": decoder, "tokens_per_s": 126 * ratio,
        "spread": {"low": 124 * ratio, "high": 128 * ratio}, "whole_call_tokens_per_s": 110 * ratio, "tau": tau,
        "tau_loop_filtered": 0.97 * tau, "looping_outputs": 4, "tau_by_category": {"writing": tau, "math": tau},
        "alpha_by_depth": [0.7 * chance for chance in chances], "acceptance_by_depth": chances,
        "ms_draft": 0.0 if decoder == "vanilla" else 0.2 * nodes ** 0.9, "ms_verify": 7.6 + 0.25 * nodes,
        "ms_overhead": 0.3, "peak_rss_mb": 2552.4, "tokens": 9600, "decoded_tokens": 9520, "target_forwards": 4000,
        "nodes_per_forward": nodes, "prompts": 80, "speedup_vs_vanilla": ratio, "speedup_vs_hf": None,
        "by_length": [_length(0, 256, tau), _length(256, 512, 0.9 * tau), _length(512, 1024, 0.8 * tau)],
    }  # fmt: skip
    key = {"suite": suite, "temperature": temperature, "decoder": decoder, "over": "vanilla"}
    return row, {**key, "ratio": ratio, "low": ratio - 0.05 * ratio, "high": ratio + 0.06 * ratio}


def _length(begin: int, end: int, tau: float) -> dict[str, float]:
    return {"begin": begin, "end": end, "target_forwards": 1300, "drafted": 1200, "tau": tau, "acceptance": 0.3 * tau}


def environment() -> dict[str, Any]:
    """Of a report or a trace."""
    return {
        "cpu": "AMD EPYC", "cpu_count": 2, "threads": 2, "device": "cpu", "model": "smollm2-135m-instruct",
        "dtype": "float32", "packing": "f16",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "haast": "0.1.0"},
        "commit": {"hash": "5bd39d4325dc0e3d6cfc3a1ab48101d9d1c0ac6d", "dirty": False},
        "command": "haast bench --suite mt_bench,humaneval,gsm8k --rounds 2 --json suite.json",
        "date": "2026-11-24T22:21:40+00:00", "settings": {"max_new_tokens": 128},
        "tau_convention": "tau = tokens emitted per decoding target forward, the bonus token included",
        "loop_filter": "outputs with more than 30% repeated 8-grams are left out",
    }  # fmt: skip


def calibration() -> dict[str, Any]:
    """What the page reads of a calibration."""
    counts = (1, 2, 3, 4, 6, 8, 10, 12, 16, 18, 24, 32)
    return {
        "forward_ms": {str(n): 6.4 + 0.35 * n + 0.008 * n * n for n in counts},
        "expected": {"tau": 2.22, "nodes": 4.86, "speedup": 1.59},
    }


def trace_document(prompt: str = NASTY) -> dict[str, Any]:
    """A "haast-trace-1" document of two steps that has every fate: accepted, cut, rejected, unreached, probe, dead."""
    first = [
        _node(0, -1, 0, "The", choice=(" sky", 0.71)),
        _node(1, 0, 1, " sky", prob=0.71, accepted=True, choice=(" is", 0.9)),
        _node(2, 0, 1, " <b>cat</b>", prob=0.03),
        _node(3, 2, 2, " sat", prob=0.4),
        _node(4, 0, 1, " probe", probe=True),
        _node(5, -1, 0, "dead", live=False),
    ]
    second = [
        _node(0, -1, 0, " is", choice=(" blue", 0.6)),
        _node(1, 0, 1, " blue", prob=0.6, accepted=True, choice=("\\xe2\\x96", 0.2)),
        _node(2, 1, 2, "\\xe2\\x96", prob=0.2, accepted=True, choice=(".", 0.9995)),
        _node(3, 0, 1, " due", prob=0.0004),
    ]
    return {
        "format": "haast-trace-1", "decoder": "eagle", "prompt": prompt, "text": "The sky is blue", "tau": 1.5,
        "tokens": 4, "target_forwards": 2, "temperature": 0.0, "probabilities": "softmax of the scores",
        "environment": environment(), "prefill": {"token": 1, "text": "The"},
        "steps": [
            _step(10, [(" sky", True), (" is", False)], first),
            _step(12, [(" blue", True)], second),
        ],
    }  # fmt: skip


def _step(position: int, emitted: list[tuple[str, bool]], nodes: list[dict[str, Any]]) -> dict[str, Any]:
    said = [{"token": len(text), "text": text, "drafted": drafted} for text, drafted in emitted]
    return {
        "position": position, "ms_draft": 1.2, "ms_verify": 8.9, "ms_overhead": 0.3, "emitted": said, "nodes": nodes,
    }  # fmt: skip


def _node(
    number: int,
    parent: int,
    depth: int,
    text: str,
    *,
    prob: float | None = None,
    accepted: bool = False,
    probe: bool = False,
    live: bool = True,
    choice: tuple[str, float] | None = None,
) -> dict[str, Any]:
    chosen = None if choice is None else {"token": len(choice[0]), "text": choice[0], "prob": choice[1]}
    return {
        "id": number, "parent": parent, "depth": depth, "token": len(text), "text": text, "accepted": accepted,
        "probe": probe, "live": live, "target_prob": prob, "choice": chosen,
    }  # fmt: skip
