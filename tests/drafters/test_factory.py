"""One factory: names to drafters, what each needs, and that none of them changes the text, with costs or without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import block_head, decode, random_head, tiny_llama, tiny_target, vanilla
from test_cli import save_random_head, tiny_config, tiny_tokenizer
from test_medusa import medusa
from test_online import COSTS, DEAR, FLAT
from test_stack import KINDS, made
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from haast.cli import app
from haast.core import SamplingParams
from haast.drafters import factory
from haast.drafters.base import Drafter
from haast.drafters.batch_policy import config_for, gain_of, measured_configs, nodes_for
from haast.drafters.block import BlockDrafter
from haast.drafters.calibrated import draft_ms, eagle_cost, small_model_cost
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import (
    NAMES,
    check_drafter,
    find_head,
    head_drafter,
    kind_of,
    make_drafter,
    needs_head,
    plan_drafter,
)
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import CPU_NODES, DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import HeadMismatchError
from haast.heads.checkpoint import Head, save_head
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.tuning import latency as latencies
from haast.tuning.latency import Latency, latency_of, measure_forwards, smoothed, target_identity

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [1, 2, 1, 2, 1, 2]]
LAWS = [SamplingParams(), SamplingParams(0.9, top_p=0.95, repetition_penalty=1.1, seed=5)]
HEADS = {"eagle": "eagle", "eagle+suffix": "eagle", "block": "block", "block+suffix": "block", "medusa": "medusa"}


@cache
def target() -> Target:
    return tiny_target()


@cache
def small() -> Target:
    return tiny_target(layers=1, seed=5)


def head_for(name: str, kind: str | None = None) -> Head | None:
    """A head where the name needs one."""
    kind = kind or HEADS.get(name)
    makers: dict[str, Any] = {"eagle": random_head, "block": block_head, "medusa": medusa}
    return None if kind is None else makers[kind](target())


def drafter(name: str, calibration: str = "off", **more: Any) -> Drafter:
    return make_drafter(name, target(), head_for(name), small=small(), calibration=calibration, **more)


@pytest.fixture
def costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Latency]:
    """As if the machine had these costs; nothing is measured."""
    known = COSTS[request.param]
    monkeypatch.setattr(factory, "latency_of", lambda *args, **rest: known)
    yield known


EVERY = [name for name in NAMES if name != "auto"]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("costs", COSTS, indirect=True)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.one_of_each
def test_the_text_is_vanillas_with_the_closed_loop(name: str, costs: Latency, law: SamplingParams) -> None:
    made_one = drafter(name, "auto")
    assert decode(target(), made_one, PROMPTS, 40, law) == vanilla(target(), PROMPTS, 40, law)
    assert decode(target(), made_one, PROMPTS[:1], 40, law) == vanilla(target(), PROMPTS[:1], 40, law)
    if name not in ("none", "suffix", "lookup"):  # those weigh before they propose
        assert made_one.policy is not None


@pytest.mark.parametrize("name", EVERY)
def test_off_measures_nothing_and_has_no_policy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latencies, "timed", lambda *args, **rest: pytest.fail("it was measured"))
    made_one = drafter(name)
    assert made_one.policy is None
    assert decode(target(), made_one, PROMPTS, 12) == vanilla(target(), PROMPTS, 12)
    kinds = {"eagle": EagleDrafter, "eagle+suffix": HybridDrafter, "medusa": MedusaDrafter, "none": VanillaDrafter}
    kinds |= {"block": BlockDrafter, "block+suffix": HybridDrafter}
    assert made_one.name == ("vanilla" if name == "none" else name) and isinstance(made_one, kinds.get(name, Drafter))


def test_what_auto_is() -> None:
    assert check_drafter("auto") == "suffix" and check_drafter("auto", "eagle") == "eagle+suffix"
    assert check_drafter("auto", "block") == "block+suffix"
    assert check_drafter("auto", "medusa") == "medusa" and check_drafter("auto", small=True) == "small-model"
    assert check_drafter("auto", "eagle", small=True) == "eagle+suffix"
    assert check_drafter("vanilla") == check_drafter("none", "eagle") == "none"
    assert isinstance(make_drafter("vanilla", target()), VanillaDrafter)
    assert make_drafter("auto", target(), random_head(target()), calibration="off").name == "eagle+suffix"
    assert [name for name in NAMES if needs_head(name)] == ["auto", *HEADS]


@pytest.mark.parametrize(
    ("name", "head", "error", "words"),
    [
        ("egale", None, ValueError, r"drafter='egale' is unknown: choose one of auto, eagle, .*none"),
        ("", "eagle", ValueError, "drafter='' is unknown"),
        ("eagle", None, ValueError, r"drafter='eagle' needs an EAGLE head: give head .*or choose .*suffix"),
        ("eagle+suffix", None, ValueError, "needs an EAGLE head"),
        ("medusa", None, ValueError, "drafter='medusa' needs Medusa heads"),
        ("medusa", "eagle", HeadMismatchError, "holds eagle heads, which do not draft for 'medusa': give medusa ones"),
        ("eagle", "medusa", HeadMismatchError, "holds medusa heads, which do not draft for 'eagle'"),
        ("eagle", "block", HeadMismatchError, "holds block heads, which do not draft for 'eagle': give eagle ones"),
        ("block+suffix", "eagle", HeadMismatchError, "holds eagle heads, .*: give block ones"),
        ("block", None, ValueError, "drafter='block' needs a block head"),
        ("small-model", "eagle", ValueError, "needs a smaller model with the same tokenizer"),
    ],
)
def test_what_can_not_be_made_is_refused(name: str, head: str | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_drafter(name, head)
    with pytest.raises(error, match=words):
        make_drafter(name, target(), None if head is None else head_for(name, head), calibration="off")


def test_heads_are_found_by_name() -> None:
    assert find_head(None, "anything") is None
    shipped = find_head("default", DEFAULT_MODEL)
    assert shipped is not None and (shipped / "config.json").is_file()
    for name in (f"HuggingFaceTB/{DEFAULT_MODEL}", f"/assets/{DEFAULT_MODEL}-q8_0-0123", "org/SmolLM2-135M-Instruct"):
        assert find_head("default", name) == shipped
    for other in ("org/other", None, ""):
        with pytest.raises(ValueError, match=r"no head is shipped for .*None to draft without one"):
            find_head("default", other)


def test_a_head_draws_its_own_kind_of_drafter() -> None:
    assert isinstance(head_drafter(target(), medusa(target()), DraftShape(nodes=7)), MedusaDrafter)
    eagle = head_drafter(target(), random_head(target()))
    assert isinstance(eagle, EagleDrafter) and eagle.nodes == CPU_NODES
    assert head_drafter(target(), eagle) is eagle
    assert kind_of(eagle) == kind_of(random_head(target())) == "eagle" and kind_of(None) is None
    assert kind_of(medusa(target())) == kind_of(MedusaDrafter(target(), medusa(target()))) == "medusa"
    with pytest.raises(ValueError, match="draft_window=4 is for EAGLE heads"):
        head_drafter(target(), medusa(target()), window=4)
    with pytest.raises(HeadMismatchError):
        make_drafter("eagle", tiny_target(vocab=40), random_head(target()), calibration="off")


@pytest.mark.parametrize("costs", ["packed"], indirect=True)
def test_a_shape_that_is_asked_for_is_drafted_as_it_is(costs: Latency) -> None:
    shape = DraftShape("chain", depth=2)
    for name in ("eagle", "eagle+suffix"):
        made_one = make_drafter(name, target(), random_head(target()), shape=shape)
        assert made_one.policy is None
        eagle = made_one.eagle if isinstance(made_one, HybridDrafter) else made_one
        assert isinstance(eagle, EagleDrafter) and eagle.shape == shape and set(eagle.configs) == {1}


@pytest.mark.parametrize("costs", ["packed"], indirect=True)
def test_decoders_of_one_head_share_it(costs: Latency) -> None:
    eagle = make_drafter("eagle", target(), random_head(target()))
    assert isinstance(eagle, EagleDrafter)
    both = make_drafter("eagle+suffix", target(), eagle)
    assert isinstance(both, HybridDrafter) and both.eagle is eagle and both.policy is not eagle.policy
    for each in (eagle, both):
        assert decode(target(), each, PROMPTS, 20) == vanilla(target(), PROMPTS, 20)


# ------------------------------------------------------------------ what pays by costs


def test_trees_follow_costs() -> None:
    flat, packed, dear = (measured_configs(each, paced=False) for each in (FLAT, COSTS["packed"], DEAR))
    sizes = {rows: config.shape.nodes for rows, config in packed.items() if config.shape is not None}
    assert list(sizes) == sorted(sizes) and list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert config_for(flat, 1).mean_nodes > config_for(packed, 1).mean_nodes > 2
    assert (
        config_for(dear, 1).mean_nodes > config_for(packed, 1).mean_nodes
    )  # after the second, nodes cost little there
    for configs in (flat, packed, dear):
        assert all(config.shape is not None and config.gain is not None for config in configs.values())
    paced = measured_configs(COSTS["packed"], paced=True)[1]
    assert paced.pace is not None and paced.shape is not None and paced.shape.nodes == len(paced.pace.forward_ms)
    assert paced.mean_nodes == packed[1].mean_nodes < paced.shape.nodes
    assert measured_configs(FLAT, False, most_gain=0.1)[1].expected_gain == 0.1
    assert gain_of(1) == 0 and gain_of(5) == gain_of(5.9) == 1.27 and nodes_for(1.27) == 5 and nodes_for(9) == 60


# ------------------------------------------------------------------ measuring


class Ticks:
    """A clock that only forwards move: so much a node, and something to begin with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: Target, first: float = 10.0, node: float = 0.5) -> None:
        self.now, self.forwards = 0.0, list[int]()
        forward = at.forward

        def ticking(tree: Any, *rest: Any, **more: Any) -> Any:
            self.now += (first + node * tree.nodes) / 1e3
            self.forwards.append(tree.nodes)
            return forward(tree, *rest, **more)

        monkeypatch.setattr(at, "forward", ticking)

    def __call__(self) -> float:
        return self.now


def test_forwards_are_measured_after_a_short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    at = tiny_target()
    clock = Ticks(monkeypatch, at)
    found = measure_forwards(at, clock=clock)
    assert found == pytest.approx({nodes: 10 + 0.5 * nodes for nodes in (1, 2, 4, 8, 16, 32, 64)})
    assert at._cache is None, "requests' own keys and values are left alone"


def test_a_slow_model_is_measured_at_three_points(monkeypatch: pytest.MonkeyPatch) -> None:
    at = tiny_target()
    clock = Ticks(monkeypatch, at, first=3000.0)
    assert set(measure_forwards(at, seconds=2.0, clock=clock)) == {1, 2, 8} and len(clock.forwards) == 4


def test_a_short_context_is_measured_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    at = tiny_target(context=12)
    assert set(measure_forwards(at, clock=Ticks(monkeypatch, at))) == {1, 2, 4}


def test_disturbed_times_are_smoothed() -> None:
    assert smoothed({1: 10.0, 2: 9.0, 4: 55.0, 8: 30.0}) == {1: 10.0, 2: 10.0, 4: 40.0, 8: 40.0}


def test_costs_between_and_beyond_points() -> None:
    known = Latency({1: 10.0, 2: 11.0, 8: 20.0}, 1.0, {1: 0.5, 8: 1.2})
    assert known.forward(5) == 15.5 and known.forward(16) == 32.0
    assert known.draft(0, 1) == 0 and known.draft(1, 1) == 1.0 and known.draft(3, 1) == 2.0 and known.level(8) == 1.2
    assert known.draft(3, 1, rows=8) == 4.0 and known.step(1, 5, 3, 1) == 17.5
    assert Latency({1: 1.0}).draft(3, 1) == 0 and Latency({1: 1.0}, 2.0).draft(1, 1) == 2.0
    for wrong in ({}, {2: 1.0}, {1: 0.0}, {1: float("nan")}):
        with pytest.raises(ValueError, match="give ms above 0"):
            Latency(wrong)
    with pytest.raises(ValueError, match="first_ms=-1"):
        Latency({1: 1.0}, -1.0)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is measured, and an empty memory."""
    monkeypatch.setattr(latencies, "cached_assets_path", lambda **_: tmp_path)
    monkeypatch.setattr(latencies, "_measured", {})
    monkeypatch.setattr(factory, "latency_of", latency_of)
    return tmp_path


def test_what_was_measured_is_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = tiny_target()
    first = latency_of(at)
    assert first is not None and set(first.forward_ms) == {1, 2, 4, 8, 16, 32, 64}
    file = next(kept.iterdir())
    assert latency_of(tiny_target()) is first  # of another model of these sizes, too
    monkeypatch.setattr(latencies, "_measured", {})
    assert latency_of(at) == first
    assert latency_of(tiny_target(layers=1)) != first and len(list(kept.iterdir())) == 2
    file.write_text("{")  # damaged: measured anew
    monkeypatch.setattr(latencies, "_measured", {})
    again = latency_of(at)
    assert again is not None and again != first and len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 9, "forward_ms": {"1": 1}}', "\x00"])
def test_what_is_no_measurement_is_not_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert latencies._read(tmp_path / "x.json") is None


def test_a_folder_that_can_not_be_written_does_no_harm(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latencies, "cached_assets_path", lambda **_: kept / "file" / "below")
    (kept / "file").write_text("no folder")
    at = tiny_target()
    assert latency_of(at) is latency_of(at)


def test_compiled_layers_are_not_measured(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = tiny_target()
    at.use_compiled_layers(backend="eager")
    assert latency_of(at) is None
    for name in ("suffix", "eagle", "lookahead"):
        made_one = make_drafter(name, at, random_head(at) if name == "eagle" else None)
        assert made_one.policy is None and made_one.nodes <= 2 * CPU_NODES


def test_an_identity_is_the_same_inside_and_outside_of_a_step() -> None:
    packed = made(KINDS["llama"])
    outside = target_identity(packed)
    with packed.step_threads():
        assert target_identity(packed) == outside


@pytest.mark.parametrize("packed", [False, True])
def test_drafts_are_timed_and_leave_no_trace(packed: bool) -> None:
    at = made(KINDS["llama"]) if packed else tiny_target()
    eagle = EagleDrafter(at, random_head(at), DraftShape(nodes=9))
    before, expected = eagle.shape, decode(at, eagle, [[1, 2, 3]], 20)
    first, levels = eagle_cost(at, eagle)
    assert first > 0 and set(levels) == {1, 8} and all(ms > 0 for ms in levels.values())
    assert eagle.shape == before and decode(at, eagle, [[1, 2, 3]], 20) == expected
    if not packed:
        chain = SmallModelDrafter(at, small())
        first, levels = small_model_cost(at, chain, small())
        assert first > 0 and levels[1] > 0
        assert draft_ms(at, MedusaDrafter(at, medusa(at))) > 0
        assert decode(at, chain, [[1, 2, 3]], 20) == expected


def test_measured_at_first_use_and_lossless(kept: Path) -> None:
    """The real thing: nothing is faked, whatever the costs turn out to be."""
    at = Target(tiny_llama())
    for name in EVERY:
        made_one = make_drafter(name, at, head_for(name), small=small())
        assert decode(at, made_one, PROMPTS, 30) == vanilla(at, PROMPTS, 30)
    assert len(list(kept.iterdir())) == 5  # forwards alone, with each of three kinds of head, and a small model


def test_a_plan_looks_at_files_before_anything_is_loaded(tmp_path: Path) -> None:
    for name, head in (("eagle", random_head(target())), ("medusa", medusa(target()))):
        weights = dict(head.module.state_dict())
        save_head(tmp_path / name / "best", head.module.config, weights, None, dtype=torch.float32)
    best = tmp_path / "eagle" / "best"  # of a training run's folder
    assert plan_drafter("auto", tmp_path / "eagle", "any") == ("eagle+suffix", best)
    assert plan_drafter("auto", tmp_path / "medusa", "any") == ("medusa", tmp_path / "medusa" / "best")
    assert plan_drafter("auto", None, "any") == ("suffix", None)
    assert plan_drafter("suffix", "default", "any") == ("suffix", None)  # it needs no head: none is looked for
    assert plan_drafter("vanilla", tmp_path / "nowhere", "any") == ("none", None)
    with pytest.raises(HeadMismatchError, match="holds medusa heads"):
        plan_drafter("eagle", tmp_path / "medusa", "any")
    with pytest.raises(HeadMismatchError, match="nowhere"):
        plan_drafter("auto", tmp_path / "nowhere", "any")
    with pytest.raises(ValueError, match="no head is shipped"):
        plan_drafter("eagle", "default", "any")
    with pytest.raises(ValueError, match="needs an EAGLE head"):
        plan_drafter("eagle+suffix", None, "any")


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a head for it."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(3)
    LlamaForCausalLM(tiny_config()).double().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_random_head(folder / "head", tiny_config())
    return folder


def run(home: Path, *words: object) -> Any:
    exact = ["--model", home / "model", "--head", home / "head", "--dtype", "float64", "--packing", "off"]
    return CliRunner().invoke(app, [str(word) for word in (words[0], *words[1:], *exact)])


def test_the_command_line_takes_every_drafter(home: Path) -> None:
    wanted = None
    for name in ("none", "vanilla", "auto", "eagle", "eagle+suffix", "suffix", "lookup", "lookahead"):
        said = run(home, "generate", "Hello", "--raw", "--drafter", name, "--max-new-tokens", 12, "--json", "-")
        assert said.exit_code == 0, said.output
        document = json.loads(said.stdout)
        wanted = wanted or document["tokens"]
        assert document["tokens"] == wanted
    small = ["--drafter", "small-model", "--small-model", home / "model"]
    said = run(home, "generate", "Hello", "--raw", *small, "--max-new-tokens", 12, "--json", "-")
    document = json.loads(said.stdout)
    assert document["tokens"] == wanted and document["stats"]["tau"] > 1  # it drafts for itself
    sure = run(
        home, "verify", "--drafter", "suffix", "--limit", 1, "--max-new-tokens", 8, "--samples", 0, "--json", "-"
    )
    assert sure.exit_code == 0 and json.loads(sure.stdout)["environment"]["settings"]["drafter"] == "suffix"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate", "Hi", "--drafter", "egale"), "drafter='egale' is unknown"),
        (("generate", "Hi", "--drafter", "medusa"), "the head holds eagle heads"),
        (("generate", "Hi", "--drafter", "small-model"), "needs a smaller model"),
        (("generate", "Hi", "--drafter", "eagle", "--small-model", "x"), "leave one out"),
        (("generate", "Hi", "--drafter", "none", "--compare"), "leave out --drafter none"),
        (("verify", "--drafter", "vanilla"), "leave out --drafter vanilla"),
        (("trace", "Hi", "--drafter", "egale"), "drafter='egale' is unknown"),
        (("chat", "--drafter", "egale"), "drafter='egale' is unknown"),
    ],
)
def test_the_command_line_refuses_before_loading(
    home: Path, words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haast.target.load.load_target", None)
    result = run(home, *words)
    assert result.exit_code == 2 and told in result.stderr and result.stderr.count("\n") == 1, result.output


def test_forwards_alone_can_be_calibrated(home: Path, kept: Path) -> None:
    """For drafters without a head: what the command has measured is what they find."""
    words = ["calibrate", "--model", home / "model", "--head", "none", "--packing", "off", "--rounds", 1]
    result = CliRunner().invoke(app, [*map(str, words), "--json", "-"])
    assert result.exit_code == 0, result.output
    told = {int(nodes): ms for nodes, ms in json.loads(result.stdout)["forward_ms"].items()}
    found = latency_of(load_target(str(home / "model"), packing="off"))
    assert found is not None and found.forward_ms == told and len(list(kept.iterdir())) == 1
    refused = CliRunner().invoke(app, [*map(str, words), "--limit", "2"])
    assert refused.exit_code == 2 and "leave them out, or give a head" in refused.stderr
