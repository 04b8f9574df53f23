"""The optimiser's share of a training step, in time and in operations, for heads of hidden size 576 and 896.

    python benchmarks/optimizer.py --json results/optimizer.json

The heads are FeatExtrapolators of the sizes of SmolLM2-135M and Qwen2.5-0.5B with random weights, on random sequences
of 190 tokens of which two thirds are supervised, as in the data of the shipped head. Each optimiser uses its default
batch size. Rounds are interleaved over heads and optimisers; results are medians. Times are CPU times of the process,
which other jobs disturb less than wall-clock time; if there are other jobs, set OMP_NUM_THREADS=1. `counted` is the
optimiser's share of the operations of matrix products, which a test bounds. --torch adds `torch.optim.Muon`, which
orthogonalises in bf16: minutes per step on a CPU without bf16 instructions. To measure a newer CPU as such a CPU:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/optimizer.py ...
"""

from __future__ import annotations

import argparse
import os
from statistics import median
from time import process_time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from haast.bench.report import machine
from haast.files import write_json
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.progress import Progress
from haast.training.batches import Example, pack
from haast.training.config import TrainConfig
from haast.training.objective import Objective
from haast.training.optimizer import HeadOptimizer, Muon, matmul_precision
from haast.training.scaled_head import make_head
from haast.training.target_weights import TargetWeights

_SIZES: dict[int, dict[str, Any]] = {
    576: {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    896: {"intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
}
_TOKENS, _PROMPT, _TOP = 190, 64, 16
_LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)  # variables that hide newer instructions


class Arm:
    """A head with a batch and an optimiser."""

    def __init__(self, hidden: int, optimizer: str) -> None:
        uses_torch = optimizer == "torch's muon"
        self.hidden, self.optimizer = hidden, optimizer
        config = TrainConfig(
            optimizer="muon" if uses_torch else optimizer, initialisation="random", mixed_precision="no"
        ).with_batch_tokens(hidden)
        self.config = config
        vocab = config.draft_vocab
        sizes = FeatExtrapolatorConfig.for_target(LlamaConfig(hidden_size=hidden, vocab_size=vocab, **_SIZES[hidden]))
        generator = torch.Generator().manual_seed(hidden)
        count = config.positions // (_TOKENS - 1)
        examples = [_example(hidden, vocab, generator) for _ in range(count)]
        rows = torch.randn(vocab, hidden, generator=generator) / 10
        frozen, drafted = TargetWeights(rows, rows, None, (1,)), torch.arange(vocab)
        self._objective = Objective(make_head(config, sizes, frozen, examples, drafted), frozen, drafted, config)
        self._batch = pack(examples)
        self._head_optimizer = HeadOptimizer(self._objective.named_parameters(), config)
        if uses_torch:
            (ours,) = self._head_optimizer.parts[1:]
            kind: Any = getattr(torch.optim, "Muon")  # noqa: B009 - missing in older torch
            matrices, rate = ours.param_groups[0]["params"], config.learning_rate
            self._head_optimizer.parts[1] = kind(
                matrices, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        self.times: list[tuple[float, float]] = []
        with FlopCounterMode(display=False) as counter:  # also the warm-up
            self._forward_backward()
            before = counter.get_total_flops()
            self._head_optimizer.step(config.learning_rate)
            self.counted = 1 - before / counter.get_total_flops()

    def step(self) -> None:
        """Run and time one training step."""
        begin = process_time()
        self._forward_backward()
        between = process_time()
        self._head_optimizer.step(self.config.learning_rate)
        self.times.append((between - begin, process_time() - between))

    def row(self) -> dict[str, Any]:
        """Medians over rounds, in ms of CPU time."""
        model, optimizer = (median(values) for values in zip(*self.times, strict=True))
        return {
            "hidden": self.hidden,
            "optimizer": self.optimizer,
            "batch_tokens": self.config.positions,
            "views": self._batch.supervised_count,
            "model_ms": 1e3 * model,
            "optimizer_ms": 1e3 * optimizer,
            "share": median(own / (own + other) for other, own in self.times),
            "counted": self.counted,
        }

    def _forward_backward(self) -> None:
        loss, _ = self._objective(self._batch, passes=1)
        loss.backward()


def _example(hidden: int, vocab: int, generator: torch.Generator) -> Example:
    tokens = torch.randint(vocab, (_TOKENS,), generator=generator, dtype=torch.int32)
    supervised = torch.ones(_TOKENS, dtype=torch.uint8)
    supervised[:_PROMPT] = 0
    features = torch.randn(_TOKENS, hidden, generator=generator).half()
    ids = torch.randint(vocab, (_TOKENS, _TOP), generator=generator, dtype=torch.int32)
    return Example(tokens, features, supervised, ids, torch.full((_TOKENS, _TOP), 1 / _TOP).half())


def matrix(rounds: int) -> dict[str, Any] | None:
    """CPU time in ms of a Muon step for one matrix, with Haast and with torch; None if torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        return None
    rows, columns = 576, 1536
    weight = torch.nn.Parameter(torch.zeros(rows, columns))
    weight.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    kinds: dict[str, torch.optim.Optimizer] = {"haast": Muon([weight], 0.0, 0.0), "torch": torch.optim.Muon([weight])}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):  # the first warms up
        for name, optimizer in kinds.items():
            begin = process_time()
            optimizer.step()
            times[name].append(1e3 * (process_time() - begin))
    return {"shape": [rows, columns], **{f"{name}_ms": median(values[1:]) for name, values in times.items()}}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch", action="store_true", help="also measure torch.optim.Muon")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    names = ("adamw", "muon", *(("torch's muon",) if arguments.torch else ()))
    precision = TrainConfig().matmul_precision
    with matmul_precision(precision):
        with Progress("one matrix"):
            one = matrix(arguments.rounds)
        with Progress("warm-up"):
            arms = [Arm(hidden, name) for hidden in _SIZES for name in names]
        with Progress("training steps", "steps", arguments.rounds * len(arms)) as progress:
            for _ in range(arguments.rounds):
                for arm in arms:
                    arm.step()
                    progress.step()
    limits = {name: os.environ[name] for name in _LIMITS if name in os.environ}
    settings = {
        "rounds": arguments.rounds,
        "matmul_precision": precision,
        "instructions": _capability(),
        "limits": limits,
    }
    where = machine() | {"device": "cpu", "dtype": "float32", "packing": "off", "settings": settings}
    rows = [arm.row() for arm in arms]
    write_json({"kind": "optimizer", "optimizers": rows, "matrix": one, "environment": where}, arguments.json)


def _capability() -> str:
    """The vector instructions that torch's own kernels use."""
    return str(torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    main()
