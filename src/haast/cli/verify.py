"""`haast verify`. Owns its flags and output; `haast.checking` makes the comparisons."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import human_output
from haast.cli.loading import draft_settings, encoded_prompts, load_chosen, read_prompt_file
from haast.cli.settings import Choice, Drafting, JsonOption, Loading, PromptsOption, SpreadLimitOption, check_at_least
from haast.files import check_writable, write_json

if TYPE_CHECKING:
    from haast.checking.distribution import DistributionTest
    from haast.checking.divergence import Comparison
    from haast.target.target import Target


def verify(
    loading: Loading,
    choice: Choice,
    drafting: Drafting,
    prompts: PromptsOption = None,
    limit: SpreadLimitOption = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="Temperature of the sampled checks.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the sampled checks.")] = 0,
    samples: Annotated[int, typer.Option(metavar="N", help="Samples per chi-square test; 0 skips them.")] = 2000,
    json_out: JsonOption = None,
) -> None:
    """Check that drafting is lossless: the same greedy text, the same sampled text, the same distribution.

    Each difference is either a floating-point tie (the scores of the two tokens differ by no more than rounding) or a
    bug. Ends with exit code 1 on a bug.

    \b
    haast verify
    haast verify --prompts mt_bench.jsonl --limit 40 --max-new-tokens 128
    haast verify --model ./my-model --head ./my-head --dtype float64 --packing off --json verify.json
    """
    check_at_least("max_new_tokens", max_new_tokens)
    check_at_least("samples", samples, 0)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not allowed in verify: give a number above 0")
    if choice.drafter in ("none", "vanilla"):
        raise ValueError(f"verify needs a drafter to verify: leave out --drafter {choice.drafter}")
    selected = read_prompt_file(prompts, limit)
    check_writable(json_out)
    drafting.check_shape(loading.device)

    from haast.bench.report import environment
    from haast.checking.distribution import distribution_tests
    from haast.checking.divergence import compare
    from haast.core import SamplingParams
    from haast.drafters.factory import draft_always
    from haast.engine.engine import StopParams
    from haast.progress import Progress

    kinds = {"greedy": SamplingParams(), "sampled": SamplingParams(temperature=temperature, seed=seed)}
    loading.check()
    target, drafter = load_chosen(choice, loading, drafting)
    out = human_output(json_out)
    if drafter.policy is not None and drafter.policy.drafting_off(1):
        print("drafts do not pay on this machine: trees of the default size are verified", file=out)
        draft_always(target, drafter)
    encoded, stop = encoded_prompts(target, selected), StopParams(max_new_tokens, target.end_ids)
    results: list[dict[str, Any]] = []
    with Progress("verifying", "texts", len(kinds) * len(encoded)) as progress:
        for prompt, kind in product(encoded, kinds):
            compared = compare(target, drafter, prompt.tokens, kinds[kind], stop)
            results.append(_comparison_entry(compared, prompt.id, kind))
            print(_line(results[-1]), file=out, flush=True)  # above the progress bar
            progress.step()
        progress.set_status("chi-square tests" if samples else "")
        tests = distribution_tests(target, drafter, encoded[0].tokens, kinds["sampled"], samples) if samples else []
    for test in tests:
        print(_test_line(test), file=out)
    settings = {"drafter": drafter.name, **draft_settings(drafter), "max_new_tokens": max_new_tokens}
    settings |= {"temperature": temperature, "seed": seed}
    document = _document(target, results, tests)
    document["environment"] = environment(target, loading.model, prompts, len(encoded), settings)
    _end(document, json_out)


def _end(document: dict[str, Any], json_out: str | None) -> None:
    results = document["comparisons"]
    summary = f"{sum(each['same'] for each in results)} of {len(results)} texts are the same, "
    summary += f"{document['ties']} floating-point ties, {document['bugs']} bugs"
    if not any(each["drafts"] for each in results):
        summary += "; nothing was drafted, so this says nothing of drafting"
    print(summary, file=human_output(json_out))
    write_json({"kind": "verify", **document}, json_out)
    if document["bugs"]:
        raise typer.Exit(1)


def _comparison_entry(comparison: Comparison, prompt: str, kind: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "check": kind,
        "same": comparison.divergence is None,
        "tokens": len(comparison.vanilla),
        "tau": comparison.drafted_stats.tau,
        "drafts": comparison.drafted_stats.nodes - comparison.drafted_stats.target_forwards,
        "divergence": None if comparison.divergence is None else asdict(comparison.divergence),
    }


def _line(result: dict[str, Any]) -> str:
    line = "{prompt}, {check}: {tokens} tokens, tau {tau:.2f}: ".format(**result)
    divergence = result["divergence"]
    if divergence is None:
        return line + "the same"
    template = (
        "{name} at token {index} ({vanilla} or {drafted}): gap {gap:.2g}, top-2 logit gap {top2_gap:.2g}, a tie is at "
        "most {allowed:.2g}"
    )
    return line + template.format(name="floating-point tie" if divergence["kind"] == "tie" else "BUG", **divergence)


def _test_line(test: DistributionTest) -> str:
    outcome, expected = "passed" if test.passed else "BUG", ", must fail" if test.expected_to_fail else ""
    return f"chi-square, {test.name}{expected}: p = {test.p_value:.3g}, {test.samples} samples: {outcome}"


def _document(target: Target, results: list[dict[str, Any]], tests: list[DistributionTest]) -> dict[str, Any]:
    from haast.checking.divergence import tolerance

    kinds = [result["divergence"]["kind"] for result in results if not result["same"]]
    return {
        "bugs": kinds.count("bug") + sum(not test.passed for test in tests),
        "ties": kinds.count("tie"),
        "tolerance": tolerance(target.dtype),
        "tolerance_of": "the largest processed logit at that position (greedy: gap in logits, sampled: in probability)",
        "comparisons": results,
        "laws": [{**asdict(test), "passed": test.passed} for test in tests],
    }
