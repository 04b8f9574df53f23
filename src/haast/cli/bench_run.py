"""Runs `haast bench` once everything is loaded: decodes under a progress bar, and writes the results.

Owns the result files and the contents of a journal's header; `haast.bench` does the measuring. Imported only when a
benchmark starts, because it imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer

from haast.bench import aggregate
from haast.bench.calibrate import measure_v_curve
from haast.bench.decoders import (
    HEADED,
    HF_SKIPPED,
    Decoder,
    DecoderRun,
    EngineDecoder,
    Parts,
    StockDecoder,
    base_of,
    drafter_for,
    lossy,
    rule_of,
)
from haast.bench.document import build_document
from haast.bench.journal import JOURNAL, Journal
from haast.bench.report import environment, file_sha256, folder_sha256, sources_sha256, weights_sha256
from haast.bench.runner import BenchConfig, BenchPrompt, Cells, Suite, Turn, differences, run_suite
from haast.bench.tables import suite_markdown, text
from haast.cli.bench import BenchOptions, Plan
from haast.cli.boundary import human_output
from haast.cli.loading import draft_settings
from haast.cli.settings import Drafting, Loading
from haast.drafters.factory import find_head
from haast.files import write_json, write_text
from haast.progress import Progress
from haast.target.load import load_stock
from haast.target.target import Target


@dataclass(frozen=True)
class Run:
    """A benchmark that is ready to run."""

    plan: Plan
    suites: dict[str, Suite]
    names: Sequence[str]
    config: BenchConfig
    target: Target
    loading: Loading
    parts: Parts

    def decoders_at(self) -> dict[float, list[Decoder]]:
        """The decoders per temperature."""
        return {t: [self._arm(name, t) for name in names] for t, names in self.plan.decoders(self.names).items()}

    def _arm(self, name: str, temperature: float) -> Decoder:
        ends, sampling = self.target.end_ids, replace(self.config.sampling, temperature=temperature)
        if name == "hf":
            stock = load_stock(self.loading.model)[0]
            stock.to(self.target.device)  # type: ignore[arg-type]
            return StockDecoder(stock, ends)
        drafter = drafter_for(name, self.target, self.parts, sampling)
        return EngineDecoder(self.target, drafter, sampling, ends, name, self.config.prefill_chunk)

    def total(self, decoders_at: Mapping[float, Sequence[Decoder]]) -> int:
        """The number of answers in the whole run."""
        return self.config.rounds * sum(len(decoders) for decoders in decoders_at.values()) * len(self.plan.prompts)

    def answer(
        self,
        decoders_at: Mapping[float, Sequence[Decoder]],
        answers: dict[Turn, DecoderRun],
        keep: Callable[[Turn, DecoderRun], None] = lambda turn, answer: None,
    ) -> Cells:
        """Generate every answer that is not in `answers` yet; see `run_suite`."""
        decoded = forwards = 0
        with Progress("bench", "answers", self.total(decoders_at), len(answers), rate="tokens") as progress:

            def keep_and_report(turn: Turn, answer: DecoderRun) -> None:
                """Keep the answer, and show EAGLE's tau so far."""
                nonlocal decoded, forwards
                keep(turn, answer)
                stats = answer.stats
                if turn.decoder == "eagle" and stats is not None:
                    decoded, forwards = decoded + stats.decoded_tokens, forwards + stats.target_forwards
                words = f"eagle's tau {decoded / forwards:.2f}" if forwards else ""
                progress.step(counted=len(answer.tokens), words=words)

            return run_suite(decoders_at, self.suites, self.config, answers, keep_and_report)


def suites_of(plan: Plan, encoded: Sequence[BenchPrompt]) -> dict[str, Suite]:
    """The suites by name; `encoded` are the encoded prompts of the plan, in order."""
    remaining = iter(encoded)
    return {
        path.stem: Suite(path.name, file_sha256(path), tuple(next(remaining) for _ in prompts))
        for path, prompts in plan.files.items()
    }


def bench_file(run: Run, options: BenchOptions, settings: dict[str, Any]) -> None:
    """Run the decoders on one prompt file and write the document; exit with 1 if an output differs by a bug."""
    machine = environment(run.target, run.loading.model, options.prompts, len(run.plan.prompts), settings)
    document: dict[str, Any] = {"kind": "bench", "environment": machine}
    (records,) = run.answer(run.decoders_at(), {}).values()
    (suite,) = run.suites.values()
    different = differences(records, suite.prompts, run.target, run.config.sampling)
    document["rows"] = aggregate.build_rows(records, suite.prompts)
    document["differences"] = [asdict(each) for each in different]
    document["per_prompt"] = aggregate.per_prompt(records, suite.prompts)
    if options.v_curve:
        with Progress("v curve"):
            document["v_curve"] = measure_v_curve(run.target, run.parts.eagle)
    print(text("bench.txt", d=document), file=human_output(options.json_out))
    write_json(document, options.json_out)
    _fail_on_bugs(document)


def bench_suites(run: Run, out: Path, options: BenchOptions, drafting: Drafting, settings: dict[str, Any]) -> None:
    """Run or resume a suite and write its documents; exit with 1 if an output differs by a bug."""
    decoders_at, path = run.decoders_at(), out / JOURNAL
    header = _header(run, decoders_at, options, drafting, settings)
    with Journal(path, header, options.resume) as journal:
        try:
            cells = run.answer(decoders_at, journal.answers, journal.keep)
        except KeyboardInterrupt:
            done = f"{len(journal.answers)} of {run.total(decoders_at)} answers are in {path}"
            typer.echo(f"\nstopped; {done}, run the same command with --resume to continue", err=True)
            raise
        document = build_document(journal.header, cells, run.suites, run.target, run.config.sampling)
    write_json(document, str(out / "suite.json"))
    write_text(out / "suite.md", suite_markdown(document))
    for temperature in document["temperatures"]:
        rows = [row for row in document["rows"] if (row["suite"], row["temperature"]) == ("all", temperature)]
        different = [
            {**each, "prompt": f"{each['suite']} {each['prompt']}"}
            for each in document["differences"]
            if each["temperature"] == temperature
        ]
        typer.echo(f"temperature {temperature:g}, {', '.join(document['suites'])}")
        shown = {"environment": document["environment"], "rows": rows, "differences": different}
        typer.echo(text("bench.txt", d=shown))
    typer.echo(f"written: {out / 'suite.json'}, {out / 'suite.md'}")
    _fail_on_bugs(document)


def _header(
    run: Run,
    decoders_at: Mapping[float, Sequence[Decoder]],
    options: BenchOptions,
    drafting: Drafting,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The header of the journal, which a resumed run must match; the document repeats it."""
    # The temperature is a property of each cell of the suite.
    sampling = {key: value for key, value in settings["sampling"].items() if key != "temperature"}
    machine = environment(
        run.target, run.loading.model, None, len(run.plan.prompts), {**settings, "sampling": sampling}
    )
    del machine["prompts_file"], machine["prompts_sha256"]
    machine |= {"sources_sha256": sources_sha256(), "weights_sha256": weights_sha256(run.target)}
    if "hf" in run.names:
        skipped = [temperature for temperature in decoders_at if temperature > 0]
        machine["skipped"] = [{"decoder": "hf", "temperature": t, "why": HF_SKIPPED} for t in skipped]
    parts = _part_settings(run, options, drafting)
    decoders = {}
    for decoder in (decoder for group in decoders_at.values() for decoder in group):
        engine = (
            {"nodes": decoder.nodes, **parts.get(base_of(decoder.name), {})}
            if isinstance(decoder, EngineDecoder)
            else None
        )
        about = {
            "lossy": lossy(decoder.name),
            "rule": rule_of(decoder.name),
            "settings": engine or {"dtype": "float32"},
        }
        decoders[decoder.name] = about
    calibration = drafting.calibrated(run.target, run.parts.eagle)
    return {
        "environment": machine,
        "suites": {
            name: {"file": suite.file, "sha256": suite.sha256, "tokens_sha256": suite.tokens_sha256}
            for name, suite in run.suites.items()
        },
        "decoders": decoders,
        "temperatures": list(run.plan.temperatures),
        "rounds": run.config.rounds,
        "calibration": None if calibration is None else calibration.document(),
    }


def _part_settings(run: Run, options: BenchOptions, drafting: Drafting) -> dict[str, dict[str, Any]]:
    """Draft settings and weight digests of the decoders that use a head or a draft model."""
    by_decoder: dict[str, dict[str, Any]] = {}
    model = run.loading.model
    eagle = None if run.parts.eagle is None else drafting.folder(model)
    groups = ((HEADED, run.parts.eagle, eagle), (("medusa",), run.parts.medusa, find_head(options.medusa_head, model)))
    for names, drafter, folder in groups:
        if folder is not None:
            settings = {**draft_settings(drafter), "head_sha256": folder_sha256(folder)}
            by_decoder |= dict.fromkeys(names, settings)
    if run.parts.small is not None:
        by_decoder["small-model"] = {"model": options.small_model, "weights_sha256": weights_sha256(run.parts.small)}
    return by_decoder


def _fail_on_bugs(document: dict[str, Any]) -> None:
    bugs = sum(each["kind"] == "bug" for each in document["differences"])
    if bugs:
        print(f"haast: {bugs} outputs differ by more than a floating-point tie: run `haast verify`", file=sys.stderr)
        raise typer.Exit(1)
