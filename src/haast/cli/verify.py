"""`haast verify`. Owns its flags and what it prints; the judgement is `haast.checking`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import human_output
from haast.cli.loading import drawn_by, encoded_prompts, load_chosen, read_prompt_file
from haast.cli.settings import Choice, Drafting, JsonOption, Loading, PromptsOption, SpreadLimitOption, check_at_least
from haast.files import check_writable, write_json

if TYPE_CHECKING:
    from haast.bench.runner import BenchPrompt
    from haast.checking import Comparison, DistributionTest
    from haast.core import SamplingParams
    from haast.drafters.base import Drafter
    from haast.target.target import Target
_TINY_SAMPLES = 1000  # fewer would not see the control's bias


def verify(
    loading: Loading,
    choice: Choice,
    drafting: Drafting,
    prompts: PromptsOption = None,
    limit: SpreadLimitOption = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of the sampled checks; above 0.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S")] = 0,
    samples: Annotated[int, typer.Option(metavar="N", help="Draws per chi-square test; 0 leaves them out.")] = 2000,
    json_out: JsonOption = None,
) -> None:
    """Check that drafting changes nothing: the same greedy text, the same sampled text, the same distribution.

    Every difference is classed: a floating-point tie (the two tokens' scores are closer than rounding) or a bug.
    Ends with exit code 1 on a bug.

    \b
    haast verify
    haast verify --prompts mt_bench.jsonl --limit 40 --max-new-tokens 128
    haast verify --model ./my-model --head ./my-head --dtype float64 --packing off --json verify.json
    """
    check_at_least("max_new_tokens", max_new_tokens)
    check_at_least("samples", samples, 0)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not allowed in verify: the sampled checks need one above 0")
    if choice.drafter in ("none", "vanilla"):
        raise ValueError(f"verify needs something to verify: leave out --drafter {choice.drafter}")
    chosen = read_prompt_file(prompts, limit)
    check_writable(json_out)
    drafting.check_shape(loading.device)

    from haast.bench.report import environment
    from haast.core import SamplingParams
    from haast.progress import Progress

    kinds = {"greedy": SamplingParams(), "sampled": SamplingParams(temperature=temperature, seed=seed)}
    loading.check()
    target, drafter = load_chosen(choice, loading, drafting)
    encoded = encoded_prompts(target, chosen)
    out = human_output(json_out)
    results: list[dict[str, Any]] = []
    with Progress("verifying", "texts", len(kinds) * len(encoded)) as progress:
        for prompt in encoded:
            for kind, params in kinds.items():
                results.append(_verify_one(target, drafter, prompt, kind, params, max_new_tokens))
                print(_verify_line(results[-1]), file=human_output(json_out), flush=True)  # above the bar
                progress.step()
        progress.say("chi-square tests" if samples else "")
        tests = _distributions(target, drafter, encoded[0].tokens, kinds["sampled"], samples) if samples else []
    for test in tests:
        verdict = "passed" if test.passed else "BUG"
        expected = ", must fail" if test.expected_to_fail else ""
        print(f"chi-square, {test.name}{expected}: p = {test.p_value:.3g}, {test.samples} samples: {verdict}", file=out)
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings = {"drafter": drafter.name, **drawn_by(drafter), **asked}
    where = environment(target, loading.model, prompts, len(encoded), settings)
    _verify_end(target, where, results, tests, json_out)


def _verify_one(
    target: Target, drafter: Drafter, prompt: BenchPrompt, kind: str, params: SamplingParams, max_new_tokens: int
) -> dict[str, Any]:
    from haast.checking import compare
    from haast.engine.engine import StopParams
    from haast.target.load import end_tokens

    done: Comparison = compare(
        target,
        drafter,
        prompt.tokens,
        params,
        StopParams(max_new_tokens, end_tokens(target.model.generation_config, target.config)),
    )
    return {
        "prompt": prompt.id,
        "check": kind,
        "same": done.divergence is None,
        "tokens": len(done.vanilla),
        "tau": done.drafted_stats.tau,
        "divergence": None if done.divergence is None else asdict(done.divergence),
    }


def _verify_line(result: dict[str, Any]) -> str:
    words = f"{result['prompt']}, {result['check']}: {result['tokens']} tokens, tau {result['tau']:.2f}: "
    found = result["divergence"]
    if found is None:
        return words + "the same"
    name = "floating-point tie" if found["kind"] == "tie" else "BUG"
    return words + (
        f"{name} at token {found['index']} ({found['vanilla']} or {found['drafted']}): gap {found['gap']:.2g}, top-2 "
        f"logit gap {found['top2_gap']:.2g}, a tie up to {found['allowed']:.2g}"
    )


def _distributions(
    target: Target, drafter: Drafter, prompt: Sequence[int], params: SamplingParams, samples: int
) -> list[DistributionTest]:
    from haast.checking import sampled_distribution, tiny_distribution

    own = sampled_distribution(target, drafter, prompt, params, samples) if len(prompt) > 1 else []
    return tiny_distribution(max(samples, _TINY_SAMPLES), params.seed) + own


def _verify_end(
    target: Target,
    environment: dict[str, Any],
    results: list[dict[str, Any]],
    tests: list[DistributionTest],
    json_out: str | None,
) -> None:
    from haast.checking import tolerance

    ties = sum(r["divergence"] is not None and r["divergence"]["kind"] == "tie" for r in results)
    bugs = sum(r["divergence"] is not None and r["divergence"]["kind"] == "bug" for r in results)
    bugs += sum(not test.passed for test in tests)
    document = {
        "bugs": bugs,
        "ties": ties,
        "tolerance": tolerance(target.dtype),
        "tolerance_of": "the largest processed logit at that position (greedy: gap in logits, sampled: in probability)",
        "comparisons": results,
        "laws": [{**asdict(test), "passed": test.passed} for test in tests],
        "environment": environment,
    }
    same = sum(r["same"] for r in results)
    words = f"{same} of {len(results)} texts the same, {ties} floating-point ties, {bugs} bugs"
    print(words, file=human_output(json_out))
    write_json(document, json_out)
    if bugs:
        raise typer.Exit(1)
