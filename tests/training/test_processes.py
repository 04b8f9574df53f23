"""Several processes train as one does: whole parameters (DDP) and sharded ones (FSDP), on the CPU over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from haast.training.processes import Processes

TESTS = Path(__file__).parents[1]
# One step takes the same batches in both: two processes with one each, or one process with two.
DRIVER = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
import test_heads as tiny
from haast.training.config import TrainConfig
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

out, accumulate, shard, views, resume = Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:])
target = tiny.llama(torch.float32)
made = tiny.stream_examples(target, tiny.sequences(24), topk=8, layer_ids=tiny.LAYERS)
examples = [example for _, example in sorted(made, key=lambda pair: pair[0])]
config = TrainConfig(
    views=1500, batch_tokens=60, draft_vocab=48, accumulate=accumulate, shard=bool(shard), feature_noise=0.1,
    alignment_steps=2, log_every=100, evaluate_every=500, checkpoint_every=300, initialisation="random",
    optimizer="adamw", mixed_precision="no",
)
weights = TargetWeights.of(target)
run = Trainer(config, tiny.sizes(target, "feat"), weights, examples[:20], examples[20:], out, quiet=True)
if views:
    step = run._step
    def dying(batches):
        if run._state.views >= views:
            raise SystemExit(3)
        return step(batches)
    run._step = dying
run.run(resume=bool(resume))
"""


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("views_per_s", "seconds")} for line in lines]


def launch(*command_line: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a driver script, or `-m haast ...`, in one process or several."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "heads"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--main_process_port", str(port)]
    return subprocess.run(
        [*command, *map(str, command_line)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("shard", [0, 1], ids=["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_of_one_with_twice_the_batch(shard: int, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    assert launch(driver, tmp_path / "one", 2, 0, 0, 0).returncode == 0
    assert launch(driver, tmp_path / "two", 1, shard, 0, 0, processes=2).returncode == 0
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) > 10
    for here, there in zip(one, two, strict=True):
        assert here.keys() == there.keys()
        for name in here:
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-4), name
    assert launch(driver, tmp_path / "cut", 1, shard, 800, 0, processes=2).returncode != 0
    assert launch(driver, tmp_path / "cut", 1, shard, 0, 1, processes=2).returncode == 0
    for here, there in zip(curve(tmp_path / "cut"), two, strict=True):
        assert here["views"] == there["views"]
        assert here.get("loss", 0.0) == pytest.approx(there.get("loss", 0.0), rel=1e-5)


def test_one_process_has_nothing_to_shard() -> None:
    with pytest.raises(ValueError, match="accelerate launch"):
        Processes(shard=True)
