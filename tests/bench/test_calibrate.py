"""Calibration: measured on a tiny target, kept in a file that fits one machine and model, replayed exactly."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_policy import drafter
from test_stack import KINDS, made

from haast import native
from haast.bench import replay
from haast.bench.calibrate import calibrate, choose, draw, search
from haast.bench.plan import MACHINES, Machine, parse_machine, project
from haast.bench.tables import text
from haast.core import SamplingParams
from haast.drafters.batch_policy import DraftConfig, config_for
from haast.drafters.calibrated import apply_calibration, default_path, find_calibration, identity
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Stats, StopParams
from haast.target.packing import PackedLinear
from haast.target.target import Target
from haast.tuning.calibration import Batch, Calibration
from haast.tuning.latency import Latency
from haast.tuning.policy import CostModel

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [20, 21]]


@pytest.fixture(scope="module")
def target() -> Target:
    made_one = made(KINDS["llama"])
    made_one.use_one_call()
    return made_one


@pytest.fixture(scope="module")
def eagle(target: Target) -> EagleDrafter:
    return drafter(target, None)


@pytest.fixture(scope="module")
def found(target: Target, eagle: EagleDrafter) -> Calibration:
    said: list[str] = []
    before = eagle.shape
    configs = {1: DraftConfig(before), 4: DraftConfig(None)}
    eagle.reshape(before, None, configs)
    result = calibrate(target, eagle, PROMPTS, tokens=24, rounds=2, say=said.append)
    assert (eagle.shape, eagle.pace, eagle.configs) == (before, None, configs) and len(said) > 3
    eagle.reshape(before)
    return result


def test_what_is_measured(found: Calibration, target: Target) -> None:
    assert found.v(1) == 1.0 and set(found.forward_ms) >= {1, 6, 12, 24}
    assert all(ms > 0 for ms in (*found.forward_ms.values(), *found.level_ms.values(), found.first_ms))
    linears = [module for module in target.model.modules() if isinstance(module, PackedLinear)]
    assert found.parameters == sum(linear.in_features * linear.out_features for linear in linears)
    assert found.expected["tau"] >= 1.0 and found.measured["steps"] > 0
    if native.available():
        assert (
            found.bandwidth
            and found.peak
            and found.roofline_ms(1)
            == pytest.approx(1e3 * max(found.weight_bytes / found.bandwidth, 2 * found.parameters / found.peak))
        )


def test_a_file_goes_round_and_is_whole(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    found.save(path)
    assert Calibration.load(path, found.identity) == Calibration.load(path)
    assert Calibration.load(path).forward_ms == found.forward_ms
    assert [each.name for each in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu": "another"}, "cpu 'another'"),
        ({"head": "0123"}, "head '0123'"),
        ({"threads": 64}, "threads 64"),
        ({"packing": "int8"}, "packing 'int8'"),
    ],
)
def test_a_file_of_another_setting_is_refused(
    found: Calibration, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "c.json"
    found.save(path)
    values = json.loads(path.read_text())
    values["identity"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        Calibration.load(path, found.identity)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "identity": {}}', "\x00"])
def test_what_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="run `haast calibrate`"):
        Calibration.load(path)
    with pytest.raises(ValueError, match="no calibration at"):
        Calibration.load(tmp_path / "missing.json")


TREE = {"kind": "dynamic", "depth": 3, "top_k": 8, "width": 3, "nodes": 6}


def test_a_file_that_is_nested_too_deeply_is_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"c\.json is not a calibration"):
        Calibration.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {"bogus": 3}},
        {"pace": {"x": 3}},
        {"pace": {"forward_ms": [1.0], "level_ms": 1.0, "rate": 1.0, "trust": 1.0, "follow": 1.0}},
        {"forward_ms": None},
        {"forward_ms": {"1": "abc"}},
        {"forward_ms": {"2": 3.0}},
        {"forward_ms": {"1": float("nan")}},
        {"level_ms": {}},
        {"expected": {}},
        {"grid": [{"depth": 1}]},
        {"grid": [dict.fromkeys(("depth", "width", "nodes", "tau"), "x")]},
        {"shape": {**TREE, "kind": "bush"}},
        {"shape": {**TREE, "depth": 0}},
        {"shape": {**TREE, "depth": 10**12}},
        {"shape": {**TREE, "nodes": 1}},
        {"pace": {"forward_ms": [1.0, 10**400], "level_ms": 1.0, "rate": 1.0}},
        {"overhead_ms": -1.0},
        {"overhead_ms": "abc"},
        {"first_ms": 10**400},
        {"expected": dict.fromkeys(("tau", "nodes", "levels", "tokens_per_s", "vanilla_tokens_per_s"), 10**400)},
        {"bandwidth": "abc"},
        {"weight_bytes": None},
        {"peak": -1.0},
    ],
)
def test_a_damaged_calibration_is_refused(found: Calibration, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**found.document(), **change}))
    with pytest.raises(ValueError, match=r"c\.json is damaged .*run `haast calibrate` again"):
        Calibration.load(path)


def a_batch() -> Batch:
    """What eight rows draft where every node costs the same: made from the steps by hand."""
    return choose(hand_made(8), 8, Latency({1: 10.0, 8: 10.5}, 0.5, {1: 0.2, 8: 0.4}, 0.1))


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (2, {"shape": {"bogus": 3}}),
        (2, {"shape": []}),
        (2, {"shape": {**TREE, "top_k": 0}}),
        (2, {"overhead_ms": math.nan}),
        (2, {"pace": {}}),
        (2, {"pace": None}),
        (2, {"forward_ms": {}}),
        (2, {"forward_ms": {"1": -3.0}}),
        (2, {"level_ms": {"1": "abc"}}),
        (2, {"expected": {"tau": 2.0, "speedup": 1.0}}),
        (2, {"surplus": 1}),
        (1, {}),
        ("two", {}),
    ],
)
def test_damaged_batches_are_refused(
    found: Calibration, tmp_path: Path, rows: int | str, change: dict[str, object]
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**found.document(), "batches": {rows: {**asdict(a_batch()), **change}}}))
    with pytest.raises(ValueError, match=r"c\.json is damaged .*run `haast calibrate` again"):
        Calibration.load(path)


def test_batches_go_round_and_may_be_missing(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    replace(found, batches={8: a_batch()}).save(path)
    held = Calibration.load(path).batches
    assert set(held) == {8} and held[8].pace == a_batch().pace
    assert held[8] == a_batch()
    values = {key: value for key, value in found.document().items() if key != "batches"}
    path.write_text(json.dumps(values))  # written before there were any
    assert Calibration.load(path).batches == {}


def test_what_a_batch_drafts_is_chosen_by_its_costs() -> None:
    cheap = a_batch()
    assert cheap.expected["speedup"] > 1 and DraftShape(**cheap.shape).nodes > 2
    assert cheap.expected["vanilla_tokens_per_s"] == pytest.approx(8 * 1e3 / 10.1)
    dear = choose(hand_made(8), 8, Latency({1: 10.0, 2: 40.0, 8: 160.0}, 0.5, {1: 0.2, 8: 0.4}, 0.1))
    assert dear.shape == {} and dear.pace and dear.pace.rate == pytest.approx(1 / 10.1)


def test_more_keys_do_no_harm(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**found.document(), "environment": {}}))
    again = Calibration.load(path, found.identity).document()
    assert json.dumps(again) == json.dumps(found.document())


def test_it_is_found_and_put_to_use(
    found: Calibration, target: Target, eagle: EagleDrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haast.tuning.latency.cached_assets_path", lambda **_: tmp_path)
    known = identity(target, eagle)
    assert found.identity == known
    assert find_calibration(target, eagle) is None and find_calibration(target, eagle, "off") is None
    found.save(default_path(known))
    kept = find_calibration(target, eagle)
    assert kept is not None
    shape = {"kind": "dynamic", "depth": 2, "top_k": 3, "width": 2, "nodes": 5}
    pace = {"forward_ms": [1.0, 2.0], "level_ms": 1.0, "rate": 0.1, "trust": 1.0, "follow": 0.5}
    before = eagle.shape
    assert apply_calibration(eagle, replace(kept, shape=shape, pace=CostModel(**pace)))  # type: ignore[arg-type]
    assert eagle.shape == DraftShape(**shape) and eagle.pace is not None  # type: ignore[arg-type]
    assert config_for(eagle.configs, 8) != DraftConfig(
        eagle.shape, eagle.pace
    )  # without measured batches: what is usual
    batches = {2: a_batch(), 8: replace(a_batch(), shape={})}
    assert apply_calibration(eagle, replace(kept, shape=shape, batches=batches))
    two = eagle.configs[2]
    assert (two.shape, two.pace) == (DraftShape(**a_batch().shape), a_batch().pace)
    assert two.expected_gain == a_batch().expected["tau"] - 1
    assert config_for(eagle.configs, 5) == DraftConfig(None, a_batch().pace)
    eagle.reshape(before)
    assert not apply_calibration(eagle, replace(kept, shape={}, pace=None))
    assert eagle.shape == before
    default_path(known).write_text("{}")  # of an older Haast
    assert find_calibration(target, eagle) is None


def test_a_replayed_shape_has_the_tau_of_a_real_run(target: Target, eagle: EagleDrafter) -> None:
    """On steps that both runs share: the recorded shape itself, step by step."""
    shape = DraftShape("dynamic", depth=4, top_k=5, width=4, nodes=12)
    before = eagle.shape
    eagle.reshape(shape)
    stats = Stats()
    for prompt in PROMPTS:
        for _ in Engine(target, eagle).run([prompt], SamplingParams(), StopParams(40), stats):
            continue
    steps = replay.record(target, eagle, PROMPTS, 40)
    eagle.reshape(before)
    costs = Latency(dict.fromkeys(range(1, 13), 1.0), 0.5, {4: 0.1}, 0.0)
    outcome = replay.replay(replay.draft(steps, 4, 4), costs, 4, 12)
    assert 0 < len(steps) <= stats.target_forwards
    assert outcome.tau == pytest.approx(stats.tau, abs=0.3)  # the last steps of a text are left out
    assert outcome.levels == 3 and outcome.nodes == 12 and outcome.ms == pytest.approx(0.5 + 0.3 + 1.0)


def hand_made(times: int = 1) -> replay.Recorded:
    """Two steps: one whose chain of first choices is right to depth 3, one whose second choice is right, once."""
    no, parents = [False] * 4, [[0, 0, 1, 1]] * 2
    levels = (
        ([[-0.1, -2.5], [-0.5, -1.0]], [[True, False], [False, True]], [[-1, -1]] * 2),
        ([[-0.2, -3.0, -2.6, -4.0], [-0.9, -2.0, -1.5, -3.0]], [[True, *no[1:]], no], parents),
        ([[-0.3, -3.2, -2.7, -5.0], [-math.inf] * 4], [[True, *no[1:]], no], [[0, 0, 2, 2]] * 2),
    )
    return replay.Recorded(
        tuple(replay.Level(*(torch.tensor(part).repeat(times, 1) for part in level)) for level in levels)
    )


def test_replay_by_hand() -> None:
    steps = hand_made()
    costs = Latency({1: 10.0, 2: 10.5, 3: 11.0, 4: 12.0, 5: 13.0, 6: 14.0}, 0.6, {1: 0.5, 2: 1.0}, 0.4)
    one = replay.replay(replay.draft(steps, 1, 1), costs, 1, 2)
    assert (one.tau, one.nodes, one.levels) == (1.5, 2, 0) and one.ms == 11.5
    wide = replay.replay(replay.draft(steps, 3, 2), costs, 2, 4)
    assert wide.tau == (4 + 2) / 2  # all of the chain, and the second choice
    assert wide.ms == 1 + 2 * 1.0 + 12
    narrow = replay.replay(replay.draft(steps, 3, 1), costs, 1, 4)
    assert narrow.tau == 3.0
    assert replay.follow(steps) == pytest.approx(2 / 3) and 0 < replay.trust(steps, 4) < 2


def test_the_search_finds_the_fastest_and_a_pace_only_helps() -> None:
    costs = Latency({n: 10 + 0.2 * n for n in range(1, 33)}, 0.7, {1: 0.5, 8: 2.0}, 0.3)
    shape, outcome, grid = search(hand_made(5), costs)
    best = max(entry["tau"] / (1 + costs.forward_ms[int(entry["nodes"])]) for entry in grid if entry["nodes"] <= 32)
    assert outcome.rate <= best and outcome.tau > 1 and shape.depth >= 1
    assert len({(e["depth"], e["width"], e["nodes"]) for e in grid}) == len(grid)


def test_a_projection(found: Calibration) -> None:
    rows = project(found, [MACHINES["h100"], Machine("slow", 1e9, 1e10, 10.0)])
    assert [row.machine for row in rows][-2:] == ["h100", "slow"]
    assert all(row.speedup >= 1.0 and row.tokens_per_s >= row.vanilla_tokens_per_s for row in rows)
    if found.bandwidth is not None:
        assert rows[0].machine == "this machine" and rows[0].measured_speedup == found.expected["speedup"]
        *_, compared, trust = text("plan.txt", found=found, rows=rows).splitlines()
        assert f"measured: {found.expected['tokens_per_s']:.0f} tokens/s, {rows[0].measured_speedup:.2f}x;" in compared
        assert compared.endswith(f"{rows[0].tokens_per_s:.0f} tokens/s, {rows[0].speedup:.2f}x") and "trust" in trust
    big = project(found, [MACHINES["h100"]], billions=8)
    assert len(big) == 1 and big[0].vanilla_tokens_per_s == pytest.approx(1 / (16e9 / 3350e9 + 300e-6))
    assert parse_machine("mine:100:2:50") == Machine("mine", 100e9, 2e12, 50.0, "given")
    for wrong in (
        "mine",
        "mine:1",
        "mine:a:b",
        "mine:0:1",
        ":1:2",
        "mine:1:2:3:4",
        "mine:1:2:-1",
        "mine:nan:1",
        "mine:inf:1",
    ):
        with pytest.raises(ValueError, match="NAME:GB/S"):
            parse_machine(wrong)


def test_a_head_that_is_never_right_gets_no_pace() -> None:
    levels = (replace(level, right=torch.zeros_like(level.right)) for level in hand_made().levels)
    wrong = replay.Recorded(tuple(levels))
    costs = Latency({n: 10 + 0.2 * n for n in range(1, 33)}, 0.7, {1: 0.5, 8: 2.0}, 0.3)
    shape, outcome, _ = search(wrong, costs)
    assert outcome.pace is None and outcome.tau == 1.0 and (shape.depth, shape.nodes) == (1, 2)


def test_the_picture(found: Calibration, tmp_path: Path) -> None:
    draw(found, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_prompts_too_short_to_learn_from(target: Target, eagle: EagleDrafter) -> None:
    with pytest.raises(ValueError, match="too short"):
        calibrate(target, eagle, PROMPTS[:1], tokens=2, rounds=1)
    assert torch.get_num_threads() >= 1
