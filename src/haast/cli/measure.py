"""`haast verify` and `haast bench`. Owns their flags and what they print; the work is `haast.checking`'s and `bench`'s."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import check_writable, human_output, write_json
from haast.cli.settings import Drafting, JsonOption, LimitOption, Loading, PromptsOption, Sampling, check_at_least

if TYPE_CHECKING:
    from haast.bench.arms import Arm
    from haast.bench.runner import BenchConfig, BenchPrompt, Record
    from haast.checking import Comparison, LawTest
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.shape import DraftShape
    from haast.prompts import Prompt
    from haast.target import Target

_OWN_PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List three things to check before a long drive.",
    "A train goes 60 km in 45 minutes. How fast is it in km/h? Show the steps.",
)


def verify(
    loading: Loading,
    drafting: Drafting,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of the sampled checks; above 0.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S")] = 0,
    samples: Annotated[int, typer.Option(metavar="N", help="Draws per chi-square test; 0 leaves them out.")] = 2000,
    json_out: JsonOption = None,
) -> None:
    """Check that drafting changes nothing: the same greedy text, the same sampled text, the same law.

    Every difference is classed: a floating-point tie (the two tokens' scores are closer than rounding) or a bug.
    Ends with exit code 1 on a bug.

    \b
    haast verify
    haast verify --prompts mt_bench.jsonl --limit 40 --max-new-tokens 128
    haast verify --model ./my-model --head ./my-head --dtype float64 --packing off --json verify.json
    """
    from haast.sampling import SamplingConfig

    check_at_least("max_new_tokens", max_new_tokens)
    check_at_least("samples", samples, 0)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not allowed in verify: the sampled checks need one above 0")
    laws = {"greedy": SamplingConfig(), "sampled": SamplingConfig(temperature=temperature, seed=seed)}
    loading.check()
    chosen = _read_prompts(prompts, limit)
    check_writable(json_out)
    shape = drafting.check(loading.model)
    target, drafter, encoded = _load_all(loading, drafting, shape, chosen)
    if drafter is None:
        raise ValueError("verify needs a head: leave out --head none")
    out = human_output(json_out)
    results: list[dict[str, Any]] = []
    for prompt in encoded:
        for kind, law in laws.items():
            results.append(_verify_one(target, drafter, prompt, kind, law, max_new_tokens))
            print(_verify_line(results[-1]), file=out, flush=True)
    tests = _laws(target, drafter, encoded[0].tokens, laws["sampled"], samples) if samples else []
    for test in tests:
        verdict = "passed" if test.passed else "BUG"
        expected = ", must fail" if test.expected_to_fail else ""
        print(f"chi-square, {test.name}{expected}: p = {test.p_value:.3g}, {test.samples} samples: {verdict}", file=out)
    _verify_end(target, loading, shape, results, tests, json_out)


def _verify_one(
    target: Target, drafter: EagleDrafter, prompt: BenchPrompt, kind: str, law: Any, max_new_tokens: int
) -> dict[str, Any]:
    from haast.checking import compare
    from haast.engine import StopConfig
    from haast.training.frozen import end_tokens

    done: Comparison = compare(target, drafter, prompt.tokens, law, StopConfig(max_new_tokens, end_tokens(target)))
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


def _laws(target: Target, drafter: EagleDrafter, prompt: Sequence[int], law: Any, samples: int) -> list[LawTest]:
    from haast.checking import sampled_law, tiny_law

    own = sampled_law(target, drafter, prompt, law, samples) if len(prompt) > 1 else []
    return tiny_law(samples, law.seed) + own


def _verify_end(
    target: Target,
    loading: Loading,
    shape: DraftShape,
    results: list[dict[str, Any]],
    tests: list[LawTest],
    json_out: str | None,
) -> None:
    from haast.bench.report import versions
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
        "model": loading.model,
        "dtype": loading.dtype,
        "shape": asdict(shape),
        "versions": versions(),
    }
    same = sum(r["same"] for r in results)
    words = f"{same} of {len(results)} texts the same, {ties} floating-point ties, {bugs} bugs"
    print(words, file=human_output(json_out))
    write_json(document, json_out)
    if bugs:
        raise typer.Exit(1)


def bench(
    loading: Loading,
    drafting: Drafting,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    decoders: Annotated[str, typer.Option(metavar="A,B,C", help="Of vanilla, eagle, hf.")] = "vanilla,eagle",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per prompt.")] = 128,
    rounds: Annotated[int, typer.Option(metavar="R", help="Timed rounds; the median per prompt counts.")] = 1,
    warmup: Annotated[int, typer.Option(metavar="N", help="Untimed tokens per decoder before.")] = 16,
    v_curve: Annotated[bool, typer.Option("--v-curve", help="Also measure forwards over 1 to 60 nodes.")] = False,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    raw: Annotated[bool, typer.Option("--raw", help="Don't put prompts through the chat template.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Compare decoders, interleaved per prompt in one run. First turns only; prefill is not counted.

    hf is stock `model.generate` in float32 with its own attention.

    \b
    haast bench --prompts mt_bench.jsonl --limit 20 --decoders vanilla,eagle,hf --json bench.json
    haast bench --prompts mt_bench.jsonl --nodes 24 --rounds 3 --v-curve --json -
    """
    from haast.bench.arms import check_decoders
    from haast.bench.runner import BenchConfig

    law = sampling.check()
    config = BenchConfig(max_new_tokens, rounds, warmup, law)
    names = check_decoders(decoders, drafting.head != "none", law.temperature)
    if "hf" in names and (law.repetition_penalty != 1.0):
        raise ValueError("decoder 'hf' is greedy without penalties here: leave out --repetition-penalty, or hf")
    loading.check()
    if prompts is None:
        raise ValueError("bench needs prompts: give --prompts FILE (JSON lines with `turns` or `prompt`)")
    chosen = _read_prompts(prompts, limit)
    check_writable(json_out)
    shape = drafting.check(loading.model) if "eagle" in names else None
    target, drafter, encoded = _load_all(loading, drafting, shape, chosen, raw)
    arms = _arms(names, target, drafter, loading, config)
    settings = {"shape": None if shape is None else asdict(shape), **_plain(config), "raw": raw}
    document = _bench(arms, encoded, config, target, loading.model, prompts, settings)
    if v_curve:
        from haast.bench.vcurve import measure_v_curve

        document["v_curve"] = measure_v_curve(target, drafter)
    _bench_end(document, json_out)


def _plain(config: BenchConfig) -> dict[str, Any]:
    values = asdict(config)
    values["sampling"].pop("processors")
    return values


def _arms(
    names: Sequence[str], target: Target, drafter: EagleDrafter | None, loading: Loading, config: BenchConfig
) -> list[Arm]:
    from haast.bench.arms import EngineArm, StockArm
    from haast.drafters.vanilla import VanillaDrafter
    from haast.models import load_stock
    from haast.training.frozen import end_tokens

    ends = end_tokens(target)
    arms: list[Arm] = []
    for name in names:
        if name == "hf":
            arms.append(StockArm(load_stock(loading.model)[0], ends))
        elif name == "vanilla":
            arms.append(EngineArm(target, VanillaDrafter(), config.sampling, ends))
        else:
            assert drafter is not None, "check_decoders refuses eagle without a head"
            arms.append(EngineArm(target, drafter, config.sampling, ends))
    return arms


def _bench(
    arms: Sequence[Arm],
    encoded: Sequence[BenchPrompt],
    config: BenchConfig,
    target: Target,
    model: str,
    prompts: Path,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from haast.bench import report, runner

    where = report.environment(target, model, prompts, len(encoded), settings)
    decoded, forwards = 0, 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=config.rounds * len(encoded) * len(arms))

        def progress(name: str, record: Record) -> None:
            nonlocal decoded, forwards
            stats = record.runs[-1].stats
            if name == "eagle" and stats is not None:
                decoded, forwards = decoded + stats.decoded_tokens, forwards + stats.target_forwards
            bar.update(task, advance=1, description=f"tau {decoded / forwards:.2f}" if forwards else "")

        records = runner.run_bench(arms, encoded, config, progress)
    found = runner.differences(records, encoded, target, config.sampling)
    return {
        "rows": report.build_rows(records, encoded),
        "differences": report.describe_differences(found),
        "per_prompt": report.per_prompt(records, encoded),
        "environment": where,
    }


def _bench_end(document: dict[str, Any], json_out: str | None) -> None:
    from rich.console import Console

    from haast.bench.report import show_table

    wide = None if sys.stdout.isatty() else 120
    show_table(document, Console(file=human_output(json_out), width=wide))
    write_json(document, json_out)
    bugs = [each for each in document["differences"] if each["kind"] == "bug"]
    if bugs:
        print(f"haast: {len(bugs)} outputs differ, and not by a floating-point tie: run `haast verify`", file=sys.stderr)
        raise typer.Exit(1)


def _read_prompts(path: Path | None, limit: int | None) -> list[Prompt]:
    from haast.prompts import Prompt, read_prompts

    if path is not None:
        return read_prompts(path, limit)
    if limit is not None:
        check_at_least("limit", limit)
    return [Prompt(f"built-in {i}", (text,)) for i, text in enumerate(_OWN_PROMPTS[:limit], start=1)]


def _load_all(
    loading: Loading, drafting: Drafting, shape: DraftShape | None, prompts: Sequence[Prompt], raw: bool = False
) -> tuple[Target, EagleDrafter | None, list[BenchPrompt]]:
    """Target, drafter (None without a shape or head) and encoded first turns; prompts beyond the context are refused."""
    from haast.api import Haast
    from haast.bench.runner import BenchPrompt
    from haast.drafters.vanilla import VanillaDrafter
    from haast.engine import check_prompts

    target = loading.load()
    drafter = None if shape is None else drafting.load(target, loading.model, shape)
    encoder = Haast(target, VanillaDrafter())
    encoded = []
    for prompt in prompts:
        tokens = encoder.encode(prompt.turns[0], chat=not raw)
        try:
            check_prompts([tokens], target.context_length, target.vocab_size)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error
        encoded.append(BenchPrompt(prompt.id, prompt.category, tuple(tokens)))
    return target, drafter, encoded
