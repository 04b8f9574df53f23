"""Recording steps: what the watcher sees, the document's schema and laws, tokens made readable, the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import MISTRAL, pieces_tokenizer
from fakes import OracleChain, RandomTrees, always, decode, full_texts, tiny_target, vanilla
from pages import trace_document
from rich.console import Console
from test_cli import EXACT, SMALL, save_random_head, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from haast.bench.document import check_format
from haast.bench.trace import TRACE_FORMAT, StepView, percent, record_trace, visible
from haast.cli import app
from haast.cli.trace import show_trace
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, Step, StopParams
from haast.sampling import Sampler
from haast.target.target import Target
from haast.text import token_text

PROMPT = [3, 9, 27, 5, 15]


@pytest.fixture(scope="module")
def spoken() -> Target:
    """A tiny target whose tokens are bytes."""
    target = tiny_target(vocab=258)
    target.tokenizer = tiny_tokenizer()
    return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a random head on disk."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_random_head(folder / "head", tiny_config())
    return folder


def traced(target: Target, drafter: Drafter, sampling: SamplingParams | None = None, new: int = 24) -> dict[str, Any]:
    return record_trace(target, drafter, PROMPT, sampling or SamplingParams(), StopParams(new), "hello", {})


def trees(target: Target, new: int = 24) -> RandomTrees:
    texts = full_texts(target, [PROMPT], new)
    return RandomTrees(7, 3, texts, rate=0.5, dead=0.2, probes=0.2, vocab=target.vocab_size)


def test_a_watcher_sees_every_step_and_changes_nothing(llama: Target) -> None:
    texts = full_texts(llama, [PROMPT, PROMPT[:3]], 20)
    prompts, stats, steps = [PROMPT, PROMPT[:3]], Stats(), list[Step]()
    told = [list[int](), list[int]()]
    run = Engine(llama, always(texts)).run(prompts, SamplingParams(), StopParams(20), stats, watch=steps.append)
    for emission in run:
        told[emission.row].extend(emission.tokens)
    assert told == [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    emitted = [token for step in steps for emission in step.emissions if emission.row == 0 for token in emission.tokens]
    assert emitted == told[0][1:], "all but the prefill's token"
    assert sum(step.ms_verify for step in steps) == pytest.approx(stats.ms_verify)
    assert sum(step.ms_draft + step.ms_overhead for step in steps) == pytest.approx(stats.ms_draft + stats.ms_overhead)
    assert all(step.logits.shape[:2] == step.tree.tokens.shape for step in steps)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_trace_says_what_vanilla_says_and_which_of_it_was_drafted(spoken: Target, temperature: float) -> None:
    law = SamplingParams(temperature, top_k=20, seed=4) if temperature else SamplingParams()
    document = json.loads(json.dumps(traced(spoken, trees(spoken), law)))
    check_format(document, TRACE_FORMAT)
    emitted = [token for step in document["steps"] for token in step["emitted"]]
    tokens = [document["prefill"]["token"], *(token["token"] for token in emitted)]
    assert tokens == vanilla(spoken, [PROMPT], 24, law)[0]
    assert document["prefill"]["text"] + "".join(token["text"] for token in emitted) == document["text"]
    assert document["tokens"] == 24 and document["target_forwards"] == len(document["steps"])
    assert document["tau"] == pytest.approx(23 / len(document["steps"]))
    positions = [step["position"] for step in document["steps"]]
    counts = [len(step["emitted"]) for step in document["steps"]]
    assert positions == [len(PROMPT) + 1 + sum(counts[:at]) for at in range(len(counts))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_probabilities_are_the_targets_own_behind_the_path(spoken: Target, temperature: float) -> None:
    law = SamplingParams(temperature, top_k=20, repetition_penalty=1.3, seed=4)
    document = traced(spoken, trees(spoken), law)
    history, checked = [*PROMPT, document["prefill"]["token"]], 0
    for step in document["steps"]:
        view = StepView(step)
        for number, node in view.nodes.items():
            if node["target_prob"] is None:
                assert number == 0 or node["probe"]
                continue
            way, parent = list[int](), node["parent"]
            while parent > 0:
                way, parent = [view.nodes[parent]["token"], *way], view.nodes[parent]["parent"]
            past = [*history, *way]
            logits = spoken.model(torch.tensor([past])).logits[0, -1]
            scores = Sampler(law).scores(past, logits.detach())
            assert node["target_prob"] == pytest.approx(float(scores.softmax(-1)[node["token"]]), abs=1e-9)
            checked += 1
        history += [token["token"] for token in step["emitted"]]
    assert checked > 40


def test_a_choice_stands_at_every_visited_node_and_nowhere_else(spoken: Target) -> None:
    document = traced(spoken, trees(spoken))
    fates = set()
    for step in document["steps"]:
        view = StepView(step)
        visited = [number for number, node in view.nodes.items() if node["choice"] is not None]
        assert visited == [0, *(number for number, node in view.nodes.items() if node["accepted"])]
        for number in visited[1:]:
            assert view.nodes[number]["token"] == view.nodes[view.nodes[number]["parent"]]["choice"]["token"]
        fates |= {view.fate(number) for number in view.nodes}
    assert {"root", "accepted", "rejected", "unreached", "probe"} <= fates


def test_fates_and_words() -> None:
    view = StepView(trace_document()["steps"][0])
    assert [view.fate(number) for number in view.nodes] == ["root", "accepted", "rejected", "unreached", "probe"]
    drafted, choice = "drafted \u201c\u00b7<b>cat</b>\u201d (target 3 %)", "\u201c\u00b7sky\u201d (71 %)"
    assert view.why(2) == f"{drafted}: rejected, the target chose {choice}"
    assert (view.drafted, view.kept) == (3, 1)
    assert view.bonus() == (1, view.nodes[1]["choice"])
    cut = StepView(trace_document()["steps"][1])
    assert cut.fate(2) == "cut" and cut.bonus() is None, "the text ended before the second draft"


def test_never_and_always_right_drafts_read_so(spoken: Target) -> None:
    texts = full_texts(spoken, [PROMPT], 24)
    document = traced(spoken, OracleChain(texts, 3, lambda row, position: False, spoken.vocab_size))
    assert all(StepView(step).kept == 0 and StepView(step).bonus() for step in document["steps"])
    document = traced(spoken, OracleChain(texts, 3, lambda row, position: True, spoken.vocab_size))
    assert all(StepView(step).kept == 3 for step in document["steps"][:-1])


def test_a_text_of_one_token_has_no_steps(spoken: Target) -> None:
    document = traced(spoken, VanillaDrafter(), new=1)
    assert document["steps"] == [] and document["tau"] == 0 and document["tokens"] == 1
    out = io.StringIO()
    show_trace(document, Console(file=out, width=80))
    assert "no step was taken" in out.getvalue()


def test_a_trace_needs_a_tokenizer(llama: Target) -> None:
    with pytest.raises(ValueError, match="without a tokenizer"):
        traced(llama, VanillaDrafter())


def test_pieces_of_characters_are_readable() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a \u00e9\n")["input_ids"]
    assert [token_text(tokenizer, token) for token in ids] == ["a", " ", "\\xc3", "\\xa9", "\n"]
    assert token_text(tokenizer, tokenizer.eos_token_id) == "<|im_end|>"
    assert visible(" a\n\t\x1b[31m\u202e") == "\u00b7a\u21b5\u21e5\\x1b[31m\\u202e"
    assert visible("") == "\u2205" and len(visible("x" * 99)) == 24


def test_percentages_never_round_to_certainty() -> None:
    shown = [percent(chance) for chance in (0.0, 0.0004, 0.004, 0.03, 0.994, 0.9951, 1.0)]
    assert shown == ["<0.1 %", "<0.1 %", "0.4 %", "3 %", "99 %", ">99 %", ">99 %"]


def test_the_terminal_shows_trees_with_and_without_colour() -> None:
    document = trace_document()
    plain, colour = io.StringIO(), io.StringIO()
    show_trace(document, Console(file=plain, width=100))
    show_trace(document, Console(file=colour, width=100, force_terminal=True, color_system="standard"))
    text = plain.getvalue()
    assert "\x1b" not in text and "\x1b[32m" in colour.getvalue()
    for line in (
        "\u2713 \u00b7sky  71 %",
        "\u2717 \u00b7<b>cat</b>  3 %  the target chose \u201c\u00b7sky\u201d (71 %)",
        "\u00b7sat  40 %  not reached",
        "? \u00b7probe  probe",
        "+ \u00b7is  90 %  bonus token",
        "the text ended before it",
    ):
        assert line in text
    assert "dead" not in text


def test_the_command_writes_what_it_shows(saved: Path, tmp_path: Path) -> None:
    words = ["trace", "hello", "--model", str(saved / "model"), "--head", str(saved / "head"), *EXACT, *SMALL]
    out = [*words, "--max-new-tokens", "12", "--json", str(tmp_path / "t.json"), "--html", str(tmp_path / "t.html")]
    result = CliRunner().invoke(app, out)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["decoder"] == "eagle+suffix" and document["environment"]["dtype"] == "float64"
    assert result.output.count("\nstep ") == len(document["steps"]) > 0
    assert (tmp_path / "t.html").read_text().startswith("<!DOCTYPE html>")
    for decoder in ("lookup", "suffix", "lookahead", "vanilla"):
        other = CliRunner().invoke(app, [*words[:4], *EXACT, "--head", "none", "--decoder", decoder, "--json", "-"])
        assert other.exit_code == 0, other.output
        assert json.loads(other.stdout)["decoder"] == decoder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--decoder", "hf"], "can't be traced"),
        (["--decoder", "eagle,lookup"], "can't be traced"),
        (["--decoder", "albatross"], "drafter='albatross' is unknown"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--html", "/nowhere/at/all.html"], "cannot write"),
        (["--html", "-", "--json", "-"], "both write to stdout"),
    ],
)
def test_wrong_input_is_refused_at_once(words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["trace", "hello", *words])
    assert result.exit_code == 2 and told in result.output


def test_sentencepiece_words_keep_their_space() -> None:
    tokenizer = pieces_tokenizer(MISTRAL, "</s>", [])
    pieces = {str(tokenizer.convert_ids_to_tokens(i)): i for i in range(len(tokenizer))}
    spaced = [piece for piece in pieces if piece.startswith("\u2581")]
    assert spaced and all(token_text(tokenizer, pieces[piece]).startswith(" ") for piece in spaced)


def test_watching_costs_no_draw(llama: Target) -> None:
    """The recorder asks the law, never the sampler's draws: the text is that of an unwatched run."""
    law = SamplingParams(0.9, seed=5)
    told = list[int]()
    for emission in Engine(llama, VanillaDrafter()).run([PROMPT], law, StopParams(16), watch=lambda step: None):
        told.extend(emission.tokens)
    assert [told] == decode(llama, VanillaDrafter(), [PROMPT], 16, law)
