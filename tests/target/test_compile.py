"""Compiled decoder layers: the modules' text at few static shapes, compiled once for each, and nothing left behind.

Most tests compile with a backend that only counts: it sees a graph for every version that torch.compile makes.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fakes import RandomTrees, commit, decode, full_texts, random_head, tiny_llama, tiny_target, vanilla
from test_families import VOCAB, stock

from haast import Haast
from haast.cli.settings import Loading
from haast.cli.settings import compiling as telling
from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, StopParams
from haast.target import compiled as compiling
from haast.target.attention import tree_mask
from haast.target.compiled import CompiledLayers, cache_folder, layers_of, nodes_for, slots_for, wrapped
from haast.target.load import check_compile, load_target
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.tree import DraftTree

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Counting:
    """A backend that runs what it is given as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def untraced() -> Iterator[None]:
    """torch traces itself into a log that nobody reads but that pytest collects; it takes most of the time."""
    log = logging.getLogger("torch.__trace")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.fixture
def counting() -> Iterator[Counting]:
    torch._dynamo.reset()  # else another test's code of the same model would serve, and nothing be counted
    yield Counting()
    torch._dynamo.reset()


def test_shapes_are_few() -> None:
    assert [nodes_for(n) for n in (1, 2, 6, 7, 25, 60, 128, 129)] == [1, 6, 6, 12, 32, 64, 128, None]
    assert [slots_for(n) for n in (1, 256, 257, 513, 5000)] == [256, 256, 512, 1024, 8192]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_padded_tree_answers_as_before(rows: int) -> None:
    """No node sees the dead ones, and none of them can be accepted."""
    parents = torch.tensor([[-1, 0, 0, 1]] * rows)
    probe = torch.tensor([[False, False, True, False]] * rows)
    tree = DraftTree.from_parents(torch.arange(4).expand(rows, -1), parents, placeholder=probe)
    padded = tree.padded(6)
    again = DraftTree.from_parents(padded.tokens, padded.parents, padded.live, padded.placeholder)
    for name in ("tokens", "parents", "depths", "ancestors", "live", "placeholder"):
        assert torch.equal(getattr(padded, name), getattr(again, name)), name
    assert [padded.children(row)[:4] for row in range(rows)] == [tree.children(row) for row in range(rows)]
    assert padded.live.sum() == 4 * rows and tree.padded(4) is tree
    with pytest.raises(ValueError, match="4 nodes and can't be padded to 3"):
        tree.padded(3)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 2]])
@pytest.mark.parametrize("window", [None, 3])
def test_a_wider_mask_hides_what_is_in_no_use(lengths: list[int], window: int | None) -> None:
    tree = DraftTree.chain(torch.zeros(2, 3, dtype=torch.long))
    past = torch.tensor(lengths)
    positions = past.unsqueeze(1) + tree.depths
    narrow, wide = (
        tree_mask(
            tree.ancestors,
            past,
            slots,
            torch.float64,
            positions=positions,
            flight_positions=positions,
            window=window,
        )
        for slots in (max(lengths) + 3, 16)
    )
    assert torch.equal(wide[..., : narrow.shape[3]], narrow)
    assert bool((wide[..., narrow.shape[3] :] == torch.finfo(torch.float64).min).all())


def test_200_steps_over_a_growing_context_compile_each_shape_once(counting: Counting) -> None:
    """Trees of changing sizes and of live nodes, and a text that outgrows 256 slots."""
    plain, target = tiny_target(context=1024), tiny_target(context=1024)
    text = full_texts(plain, [PROMPT], 460)[0]
    target.use_compiled_layers(counting)
    cache, rng, at, seen = target.new_cache(1, 1024), random.Random(0), len(PROMPT), list[tuple[int, int]]()
    target.forward(DraftTree.chain(torch.tensor([PROMPT])), cache, last_only=True)
    commit(cache, [range(len(PROMPT))])
    for step in range(200):
        nodes = rng.choice([1, 2, 5, 6, 7, 11])
        parents = [-1] + [max(0, n - 1 - (n > 3)) for n in range(1, nodes)]
        live = [True] + [n < nodes - step % 2 for n in range(1, nodes)]
        tokens = [text[at + depth] if depth < 3 else rng.randrange(32) for depth in range(nodes)]
        output = target.forward(
            DraftTree.from_parents(torch.tensor([tokens]), torch.tensor([parents]), torch.tensor([live])), cache
        )
        assert output.logits.shape == (1, nodes, 32) and int(output.logits[0, 0].argmax()) == text[at + 1]
        shape = (nodes_for(nodes) or 0, slots_for(cache.longest + (nodes_for(nodes) or 0)))
        known, made = shape in seen, counting.graphs
        seen.append(shape)
        kept = min(2, sum(live[:2]))
        commit(cache, [range(kept)])
        at += kept
        assert counting.graphs == len(set(seen)), f"step {step}: {'an old' if known else 'a new'} shape, was {made}"
    assert at > 256 and len(set(seen)) == 6, "three node counts, two lengths"
    assert target.compiled is not None and len(target.compiled.shapes) == 6


@pytest.mark.parametrize("layers", [1, 4])
def test_layers_of_one_kind_share_their_code(layers: int, counting: Counting) -> None:
    target = tiny_target(layers=layers)
    expected = vanilla(target, [PROMPT], 12)
    target.use_compiled_layers(counting)
    assert vanilla(target, [PROMPT], 12) == expected
    assert counting.graphs == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_the_modules_for_vanilla_and_eagle(temperature: float, counting: Counting) -> None:
    plain, target, sampling = tiny_target(), tiny_target(), SamplingParams(temperature, seed=4)
    prompts = [PROMPT, PROMPT[:3]]
    expected = vanilla(plain, prompts, 60, sampling)
    target.use_compiled_layers(counting)
    assert vanilla(target, prompts, 60, sampling) == expected
    drafter = EagleDrafter(target, random_head(target), DraftShape("dynamic", depth=3, top_k=4, width=3, nodes=10))
    before = counting.graphs
    assert decode(target, drafter, prompts, 60, sampling) == expected
    # The target's trees of 12 nodes; the head's levels of 6 (1 to 3 wide) and the kept positions of 1 to 4.
    assert 3 <= counting.graphs - before <= 5
    made = counting.graphs
    assert decode(target, drafter, prompts, 60, sampling) == expected
    assert counting.graphs == made, "another text meets the same shapes"


def proposals(drafter: EagleDrafter, target: Target) -> list[DraftTree]:
    """Every tree of a run over two rows."""
    grown: list[DraftTree] = []
    propose = drafter.propose

    def noting(states: Any, budget: int | None = None) -> DraftTree:
        grown.append(propose(states, budget))
        return grown[-1]

    setattr(drafter, "propose", noting)  # noqa: B010
    decode(target, drafter, [PROMPT, PROMPT[:5]], 20)
    return grown


@pytest.mark.parametrize("window", [None, 4])
def test_a_compiled_draft_is_the_modules(counting: Counting, window: int | None) -> None:
    trees: list[list[DraftTree]] = []
    for on in (False, True):
        target = tiny_target()
        if on:
            target.use_compiled_layers(counting)
        shape = DraftShape("dynamic", depth=3, top_k=4, width=3, nodes=10)
        drafter = EagleDrafter(target, random_head(target), shape, window)
        trees.append(proposals(drafter, target))
    assert len(trees[0]) == len(trees[1])
    both = [pair for pair in zip(*trees, strict=True) if pair[0].rows == 2]  # compiled rows stay when they have ended
    assert len(both) > 10
    for mine, theirs in both:
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.parents, theirs.parents)


SLOW = [
    pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2-sliding", "gemma2", "gpt_neox", "phi3", "olmo2", "cohere")
]


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mistral-sliding", "llama-fp32", *SLOW])
def test_families(name: str, counting: Counting) -> None:
    """Masks and angles by kind of layer, windows, learned positions, arguments without names: all compile."""
    texts = full_texts(Target(stock(name)), [PROMPT], 40)
    target = Target(stock(name))
    target.use_compiled_layers(counting)
    trees = RandomTrees(5, 1, texts, vocab=VOCAB, dead=0.2)
    assert decode(target, trees, [PROMPT], 40)[0] == texts[0][len(PROMPT) :]
    assert target.compiling == "on" and counting.graphs in (1, 2)


def test_hidden_states_are_given(counting: Counting) -> None:
    plain, target = tiny_target(), tiny_target()
    target.use_compiled_layers(counting)
    found = []
    for each in (plain, target):
        cache = each.new_cache()
        each.forward(DraftTree.chain(torch.tensor([PROMPT])), cache, last_only=True)
        commit(cache, [range(len(PROMPT))])
        for _ in range(2):  # the second is compiled for sure
            output = each.forward(DraftTree.chain(torch.tensor([[7, 8, 9]])), cache, hidden_layers=(0, 1, 2))
        found.append(output)
    assert counting.graphs == 1
    for index in (0, 1, 2):
        torch.testing.assert_close(found[0].hidden[index], found[1].hidden[index], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0].features, found[1].features, rtol=1e-6, atol=1e-6)


def test_nothing_stays_on_the_model(counting: Counting) -> None:
    model = tiny_llama()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    target = Target(model)
    target.use_compiled_layers(counting)
    vanilla(target, [PROMPT], 5)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks and module._compiled_call_impl is None
    target.use_modules()
    made = counting.graphs
    vanilla(target, [PROMPT * 40], 5)
    assert target.compiling == "off" and counting.graphs == made
    assert copy.deepcopy(target).compiled is None


def test_a_failing_forward_leaves_nothing_either(counting: Counting) -> None:
    target = tiny_target()
    target.use_compiled_layers(counting)
    vanilla(target, [PROMPT], 5)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    hook = target.model.get_submodule("model.layers.1").register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        vanilla(target, [PROMPT], 5)
    hook.remove()
    assert all("forward" not in vars(module) for module in target.model.modules())


def test_a_mixture_that_routes_by_data_runs_uncompiled(counting: Counting, caplog: pytest.LogCaptureFixture) -> None:
    texts = full_texts(Target(stock("mixtral")), [PROMPT], 12)
    target = Target(stock("mixtral"))
    target.use_compiled_layers(counting)
    assert vanilla(target, [PROMPT], 12)[0] == texts[0][len(PROMPT) :]
    assert target.compiled is None and target.compiling.startswith("off (")
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("the forward runs uncompiled: ")


def test_a_backend_that_fails_or_errs_is_left(caplog: pytest.LogCaptureFixture) -> None:
    def failing(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler was found")

    def wrong(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        return lambda *args: [output * 1.01 for output in graph.forward(*args)]

    expected = vanilla(tiny_target(), [PROMPT], 12)
    for backend, why in ((failing, "no C++ compiler"), (wrong, "other logits than its modules")):
        torch._dynamo.reset()
        target = tiny_target()
        target.use_compiled_layers(backend)
        assert vanilla(target, [PROMPT], 12) == expected
        assert target.compiled is None and why in target.compiling and why in caplog.messages[-1]
    torch._dynamo.reset()


def test_threads_do_not_meet_in_the_layers(counting: Counting) -> None:
    """While one thread's forward stands in for the layers, another thread's call of the model is its own."""
    target = tiny_target()
    target.use_compiled_layers(counting)
    vanilla(target, [PROMPT], 3)
    model, inside, done = target.model, threading.Event(), threading.Event()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    found: list[torch.Tensor] = []

    def outside() -> None:
        inside.wait(30)
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits)
        done.set()

    def wait(*args: object) -> None:
        if threading.current_thread() is main:
            inside.set()
            assert done.wait(30)

    main, other = threading.current_thread(), threading.Thread(target=outside)
    cache = target.cache.bind([target.pool.sequence()])  # compiled code is of one pool
    target.forward(DraftTree.chain(ids), cache, last_only=True)
    commit(cache, [range(len(PROMPT))])
    made = counting.graphs
    hook = model.get_submodule("model.layers.0").register_forward_hook(wait)
    other.start()
    target.forward(DraftTree.roots(torch.tensor([7])), cache)
    hook.remove()
    other.join()
    assert torch.equal(found[0], expected)
    assert counting.graphs == made, "the other thread's call was compiled"


def test_wrapped_and_unknown_layers_are_left_alone() -> None:
    decoder: Any = tiny_llama().model
    assert layers_of(decoder, 2) == list(decoder.layers)
    assert layers_of(decoder, 3) is None
    assert not wrapped(decoder.layers)
    vars(decoder.layers[1])["forward"] = decoder.layers[1].forward  # as accelerate's offloading does
    assert wrapped(decoder.layers)


def test_packed_targets_and_wrong_words_are_refused() -> None:
    model: Any = tiny_llama()
    target = Target(model.float())
    pack_linears(target.model)
    with pytest.raises(ValueError, match="packing='off'"):
        target.use_compiled_layers()
    with pytest.raises(ValueError, match="compile='maybe' is unknown: choose off, auto or on"):
        check_compile("maybe", "float32", "cpu", "off")
    with pytest.raises(ValueError, match="packing='off'"):
        check_compile("on", "float32", "cpu", "f16")
    assert check_compile("on", "float32", "cpu", "off") and check_compile("on", "float64", "cpu", "auto")
    assert not check_compile("auto", "float32", "cpu", "auto") and not check_compile("off", "float32", "cpu", "off")
    with pytest.raises(ValueError, match="compile='maybe'"):
        load_target("no-such-model", compile="maybe")
    with pytest.raises(ValueError, match="compile='maybe'"):
        Haast.from_pretrained(tiny_llama(), head=None, compile="maybe")


def test_a_terminal_sees_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with telling("the forward for 6 nodes"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt), telling("the forward for 6 nodes"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "haast: compiling the forward for 6 nodes ... 0 s\n"


def test_commands_refuse_wrong_words() -> None:
    with pytest.raises(ValueError, match="compile='maybe'"):
        Loading(compile="maybe").check()


def test_the_front_door_compiles() -> None:
    off = Haast.from_pretrained(tiny_llama(), head=None)
    on = Haast.from_pretrained(tiny_llama(), head=None, compile="on")
    assert off.target.compiling == "off" and on.target.compiling == "on"


def test_progress_wraps_every_compilation(counting: Counting) -> None:
    told: list[str] = []

    @contextmanager
    def progress(what: str) -> Iterator[None]:
        told.append(what)
        before = counting.graphs
        yield
        told.append(str(counting.graphs - before))

    target = tiny_target()
    target.use_compiled_layers(counting, progress)
    vanilla(target, [PROMPT], 5)
    assert told == ["the forward for 1 node and 256 slots", "1"]


def test_compiled_code_is_kept_in_haasts_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiling, "cached_assets_path", lambda **names: tmp_path.joinpath(*names.values()))
    folder = tmp_path / "haast" / "compiled" / "inductor"
    assert cache_folder() == folder
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch itself leaves it
    assert cache_folder() == folder
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_batches_are_padded_to_few_sizes(counting: Counting) -> None:
    plain, target = tiny_target(), tiny_target()
    prompts = [PROMPT[: 2 + row] for row in range(3)]
    expected = [vanilla(plain, [prompt], 8 + 4 * row)[0] for row, prompt in enumerate(prompts)]
    target.use_compiled_layers(counting)
    stops = [StopParams(8 + 4 * row) for row in range(3)]
    assert Engine(target, VanillaDrafter()).complete(prompts, SamplingParams(), stops) == expected
    assert target.compiled is not None and {shape[0] for shape in target.compiled.shapes} == {1, 4}
    assert [target.compiled.rows_for(n, 1, 256) for n in (1, 2, 3, 4, 5, 9)] == [1, 4, 4, 4, 8, 16]


def test_a_copied_instance_goes_by_modules() -> None:
    assert copy.deepcopy(CompiledLayers(torch.device("cpu"), Counting())) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when inductor is loaded
def test_inductor_says_what_the_modules_say() -> None:
    torch._dynamo.reset()
    plain, target = tiny_target(), tiny_target()
    expected = vanilla(plain, [PROMPT], 260)
    target.use_compiled_layers()
    assert vanilla(target, [PROMPT], 260) == expected
    drafter = EagleDrafter(target, random_head(target), DraftShape("dynamic", depth=2, top_k=4, width=3, nodes=6))
    engine = Engine(target, drafter)
    assert engine.complete([PROMPT], SamplingParams(), StopParams(260)) == expected
    assert target.compiled is not None and target.compiled.shapes == {(1, n, s) for n in (1, 6) for s in (256, 512)}
    torch._dynamo.reset()
