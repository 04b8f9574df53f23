"""Muon: torch's numbers in better arithmetic, its checkpoints, and its share of a training step, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny_llama
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.target.target import Target
from haast.training import optimizer as muon
from haast.training.batches import Example, pack
from haast.training.config import TrainConfig
from haast.training.features import stream_examples
from haast.training.objective import Objective
from haast.training.optimizer import COEFFICIENTS, HeadOptimizer, Muon, orthogonalise, symmetric_product
from haast.training.scaled_head import make_head
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

SHAPES = [(96, 96), (64, 80), (70, 200), (300, 65), (130, 97), (5, 9)]
_BF16 = 0.02  # relative: five steps in bf16 leave an error of 0.01
needs_torchs = pytest.mark.skipif(torch.__version__ < "2.9", reason="torch has no Muon before 2.9")


@pytest.fixture(autouse=True)
def full_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device that multiplies fp32 as it is; and on one thread."""
    monkeypatch.setattr(muon, "matmul_rounds_inputs", lambda device, precision: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(shape: tuple[int, int], decay: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix whose singular values fall as i ** -decay."""
    generator = torch.Generator().manual_seed(sum(shape))
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    made: Tensor = left @ torch.diag(values) @ right
    return made.to(dtype)


def off(one: Tensor, other: Tensor) -> float:
    """How far one lies from the other, as a share of the latter."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def stepped(made: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        made.step()
        made.zero_grad()


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(drawn(shape)) for shape in SHAPES]


def torchs(params: list[nn.Parameter], rate: float = 0.02, decay: float = 0.1, **more: Any) -> torch.optim.Optimizer:
    kind: Any = getattr(torch.optim, "Muon")  # noqa: B009 - torch 2.6 has none
    made: torch.optim.Optimizer = kind(
        params, lr=rate, weight_decay=decay, **{"adjust_lr_fn": "match_rms_adamw", **more}
    )
    return made


# ------------------------------------------------------------------ the numbers


@needs_torchs
def test_an_update_is_torchs_up_to_the_rounding_of_bf16() -> None:
    ours, theirs, start = weights(), weights(), weights()
    stepped(Muon(ours, 0.02, 0.1), ours, 5)
    stepped(torchs(theirs), theirs, 5)
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert 0 < off((one - before).detach(), (other - before).detach()) < _BF16


@needs_torchs
@pytest.mark.parametrize(
    "changed", [{"nesterov": False}, {"momentum": 0.9}, {"ns_steps": 4}, {"adjust_lr_fn": "original"}]
)
def test_other_settings_would_be_seen(changed: dict[str, Any]) -> None:
    ours, theirs, start = weights(), weights(), weights()
    stepped(Muon(ours, 0.02, 0.1), ours, 5)
    stepped(torchs(theirs, **changed), theirs, 5)
    moves = [
        off((one - before).detach(), (other - before).detach())
        for one, other, before in zip(ours, theirs, start, strict=True)
    ]
    assert max(moves) > _BF16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5, 2.5])
def test_both_ways_are_the_plain_iteration(shape: tuple[int, int], decay: float) -> None:
    """Also for the singular values of real momenta, which fall by a thousand."""
    matrix = drawn(shape, decay, torch.float64)
    wide = matrix if shape[0] <= shape[1] else matrix.T
    start = wide / wide.norm()
    plain = muon._iterate_matrix(start, 5, torch.matmul)
    assert off(muon._iterate_gram(start, 5), plain) < 1e-9
    assert off(muon._iterate_matrix(start, 5, symmetric_product), plain) < 1e-9
    in_bf16 = off(muon._iterate_matrix(start.bfloat16(), 5, torch.matmul), plain)
    assert off(muon._iterate_gram(start.float(), 5), plain) < in_bf16 / 10
    made = orthogonalise(matrix)
    assert made.shape == shape and off(made, plain if wide is matrix else plain.T) < 1e-9


@needs_torchs
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_it_is_nearer_to_the_exact_iteration_than_torchs(shape: tuple[int, int]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz as in_bf16

    matrix = drawn(shape, 0.5)
    exact = orthogonalise(matrix.double())
    assert off(orthogonalise(matrix), exact) < 1e-5 < 1e-3 < off(in_bf16(matrix, COEFFICIENTS, 5, 1e-7), exact)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(drawn(shape, 0.3)))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    assert float(torch.linalg.svdvals(orthogonalise(drawn(shape, 0.3), steps=1)).min()) < 0.6, "five steps are needed"


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonalise(torch.zeros(70, 200)), torch.zeros(70, 200))


@pytest.mark.parametrize("n", [3, 64, 97])
def test_symmetric_products(n: int) -> None:
    long, square = drawn((n, 2 * n), dtype=torch.float64), drawn((n, n), dtype=torch.float64)
    assert torch.allclose(symmetric_product(long, long.T), long @ long.T, atol=1e-12)
    one = square @ square.T
    assert torch.allclose(symmetric_product(one, one @ one), one @ one @ one, atol=1e-12)
    if n >= 64:
        assert not torch.allclose(symmetric_product(square, one), square @ one), "of others a quarter is wrong"


def test_matrices_alone() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], 0.1, 0.0)


# ------------------------------------------------------------------ bf16, and where it is


def test_devices_that_round_get_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = orthogonalise(drawn((70, 200), 0.5).double())
    monkeypatch.setattr(muon, "matmul_rounds_inputs", lambda device, precision: True)
    made = orthogonalise(drawn((70, 200), 0.5))
    assert made.dtype is torch.bfloat16 and 1e-3 < off(made, exact) < 0.05
    assert orthogonalise(exact).dtype is torch.float64


def test_rounding_is_seen_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    muon.matmul_rounds_inputs.cache_clear()
    cpu, precision = torch.device("cpu"), torch.get_float32_matmul_precision()
    assert precision == "highest" and not muon.matmul_rounds_inputs(cpu, precision)
    product = torch.Tensor.__matmul__
    for kind, rounds in ((torch.bfloat16, True), (torch.float32, False)):

        def rounding(one: Tensor, other: Tensor, kind: torch.dtype = kind) -> Tensor:
            found: Tensor = product(one.to(kind).float(), other.to(kind).float())
            return found

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", rounding)
            muon.matmul_rounds_inputs.cache_clear()
            assert muon.matmul_rounds_inputs(cpu, precision) == rounds
    muon.matmul_rounds_inputs.cache_clear()


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the dtypes of all tensors that operators take or give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.dtypes |= {each.dtype for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor)}
        return found


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"optimizer": "muon", "head": "eagle3"}]
)
def test_no_step_of_training_computes_in_bf16(settings: dict[str, Any], tmp_path: Path) -> None:
    model: Any = tiny_llama()
    target = Target(model.float())
    layers = (0, 1, 2) if "head" in settings else ()
    some = [e for _, e in stream_examples(target, sequences(), topk=4, layer_ids=layers)]
    kind: type[Any] = Eagle3Config if layers else FeatExtrapolatorConfig
    sizes = kind.for_target(target.config, **({"layer_ids": layers} if layers else {}))
    for mixed in ("no", "bf16"):
        config = TrainConfig(
            views=100, batch_tokens=200, draft_vocab=16, initialisation="random", mixed_precision=mixed,
            alignment_steps=2, **settings,
        )  # fmt: skip
        run = Trainer(config, sizes, TargetWeights.of(target), some, some, tmp_path / mixed, quiet=True)
        with Seen() as seen:
            run._advance(run._order.batches())
            run.evaluate()
        assert (torch.bfloat16 in seen.dtypes) == (mixed == "bf16")


# ------------------------------------------------------------------ checkpoints


@needs_torchs
@pytest.mark.parametrize("from_torch", [True, False])
def test_either_goes_on_from_the_others_checkpoint(from_torch: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(drawn((70, 200))), nn.Parameter(drawn((96, 96)))

    def optimizers(module: Two) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        ours, theirs = Muon(module.parameters(), 0.02, 0.1), torchs(list(module.parameters()))
        return (theirs, ours) if from_torch else (ours, theirs)

    module, whole, fresh = Two(), Two(), Two()
    first, _ = optimizers(module)
    reference, _ = optimizers(whole)
    stepped(reference, list(whole.parameters()), 3)
    stepped(reference, list(whole.parameters()), 2, seed=9)
    stepped(first, list(module.parameters()), 3)
    _, second = optimizers(module)
    _, without = optimizers(fresh)
    fresh.load_state_dict(module.state_dict())
    set_optimizer_state_dict(module, second, optim_state_dict=get_optimizer_state_dict(module, first))
    assert second.param_groups[0]["lr"] == 0.02 and second.param_groups[0]["ns_steps"] == 5
    stepped(second, list(module.parameters()), 2, seed=9)
    stepped(without, list(fresh.parameters()), 2, seed=9)
    for one, other, third in zip(module.parameters(), whole.parameters(), fresh.parameters(), strict=True):
        moved = (other - drawn(tuple(other.shape))).detach()  # type: ignore[arg-type]
        assert float((one - other).detach().norm() / moved.norm()) < _BF16
        assert float((third - other).detach().norm() / moved.norm()) > _BF16, "the momentum counts"


# ------------------------------------------------------------------ the share of a step

SIZES: dict[int, dict[str, Any]] = {  # SmolLM2-135M's and Qwen2.5-0.5B's
    576: {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    896: {"intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
}
VOCAB = 8192  # drafted over


def sequences() -> list[Any]:
    from haast.training.data import TokenSequence

    return [TokenSequence(list(range(3, 15)), [False] * 4 + [True] * 8) for _ in range(6)]


def sizes_of(kind: str, hidden: int) -> HeadSizes:
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=8, vocab_size=VOCAB, **SIZES[hidden])
    if kind == "eagle3":
        return Eagle3Config.for_target(config, layer_ids=(1, 3, 5))
    return FeatExtrapolatorConfig.for_target(config)


def example(hidden: int, captured: int) -> Example:
    """190 tokens, two thirds of them supervised, which is the mean of what the shipped head was trained on."""
    tokens, supervised = torch.arange(5, 195, dtype=torch.int32), torch.ones(190, dtype=torch.uint8)
    supervised[:64] = 0
    probs = torch.full((190, 16), 1 / 16).half()
    features = torch.ones(190, hidden).half()
    return Example(tokens, features, supervised, torch.zeros(190, 16).int(), probs, torch.ones(190, captured).half())


def share(config: TrainConfig, hidden: int) -> float:
    """The optimiser's part of a step's operations, counted on tensors without data, with one pass over the batch."""
    config = config.with_batch_tokens(hidden)
    sizes, meta = sizes_of(config.head, hidden), torch.device("meta")
    some = [example(hidden, 3 * hidden if config.head == "eagle3" else 0)]
    some *= config.positions // some[0].pairs
    frozen = TargetWeights(torch.ones(VOCAB, hidden), torch.ones(VOCAB, hidden), None, (1,))
    head = make_head(config, sizes, frozen, some, torch.arange(VOCAB)).to(meta)
    objective = Objective(head, frozen, torch.arange(VOCAB), config, meta)
    optimizer = HeadOptimizer([(n, p) for n, p in objective.named_parameters() if p.requires_grad], config)
    with FlopCounterMode(display=False) as counter:
        loss, _ = objective(pack(some, head.reads).to(meta), passes=1)
        loss.backward()
        before = counter.get_total_flops()
        optimizer.step(1e-3)
        return float(1 - before / counter.get_total_flops())


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch, no_autocast: None) -> None:
    """What meta tensors lack: fused AdamW (elementwise: no counted operations) and autocast."""
    usual: Any = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **more: usual(*args, **more))


def test_adamw_multiplies_no_matrices(without_data: None) -> None:
    assert share(TrainConfig(optimizer="adamw", initialisation="random"), 576) == 0


@pytest.mark.parametrize("hidden", [576, 896])
@pytest.mark.parametrize("kind", ["feat-extrapolator", "eagle3"])
@pytest.mark.one_of_each
def test_the_optimiser_takes_a_quarter_of_a_step_at_most(
    kind: str, hidden: int, without_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(head=kind, initialisation="random")
    assert config.with_batch_tokens(hidden).batch_tokens == 6 * hidden and 0.1 < share(config, hidden) <= 0.25
    assert share(replace(config, batch_tokens=1536), hidden) > 0.25, "AdamW's batch would be too small"
    monkeypatch.setattr(muon, "_MIN_ASPECT", float("inf"))
    monkeypatch.setattr(muon, "_MIN_MIRRORED_ROWS", float("inf"))
    assert share(config, hidden) > 0.25, "and so would be torch's way: X iterated, every product whole"
