"""Tensor parallel targets: two gloo processes on the CPU say what one process says, and only one of them decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import RandomTrees, collect, tiny_llama, tiny_target, vanilla
from test_text import byte_tokenizer
from torch import distributed as dist
from torch.torch_version import TorchVersion
from transformers import GenerationConfig

import haast
from haast.checking.divergence import diagnose
from haast.core import SamplingParams
from haast.drafters.base import Accepted, Drafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import shape_for
from haast.engine.engine import Engine, StopParams
from haast.engine.rules import rule_named
from haast.errors import HeadMismatchError
from haast.target.device_map import Placement
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.target import Target
from haast.tree import DraftTree

# Both processes run it; each writes what it said. What differs between them on purpose is named at the end.
DRIVER = """
import json, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.distributed.configuration_utils import DistributedConfig

import haast
from fakes import decode, random_head, vanilla
from haast.engine.rules import rule_named
from haast.drafters.eagle import EagleDrafter
from haast.drafters.ngram import SuffixDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.small_model import SmallModelDrafter
from haast.engine.engine import Engine, StopParams
from haast.errors import PromptError, UnsupportedModelError
from haast.core import SamplingParams
from haast.tuning.policy import CostModel
from haast.target.target import Target
from fakes import collect, tiny_llama, tiny_target
from torch.distributed.fsdp import fully_shard

folder, out = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto")
)
target, rank = Target(model), dist.get_rank()
PROMPTS, SAMPLED = json.loads(sys.argv[3]), SamplingParams(temperature=1.0, top_p=0.9, seed=5)
tree = DraftShape("dynamic", depth=3, top_k=8, width=4, nodes=20)
eagle = EagleDrafter(target, random_head(target), tree)
reduced = EagleDrafter(target, random_head(target, range(0, target.vocab_size, 2)), tree)
small = SmallModelDrafter(target, tiny_target(target.vocab_size, seed=3))
said = {
    "greedy vanilla": vanilla(target, PROMPTS, 24),
    "greedy eagle": decode(target, eagle, PROMPTS, 24),
    "greedy reduced": decode(target, reduced, PROMPTS, 24),
    "greedy suffix": decode(target, SuffixDrafter(), PROMPTS, 24),
    "sampled eagle": decode(target, eagle, PROMPTS, 24, SAMPLED),
    "sampled small": decode(target, small, PROMPTS, 24, SAMPLED),
}
eagle.reshape(tree, CostModel((8.0,) * 20, 0.1, 0.2))
said["greedy paced"] = decode(target, eagle, PROMPTS, 24)
for name in ("rejection", "typical"):
    run = Engine(target, eagle, rule_named(name)).run(PROMPTS, SamplingParams(), StopParams(24))
    said[f"greedy {name}"] = collect(run, len(PROMPTS))
texts = []
for prompt in (PROMPTS[0], PROMPTS[0] + [3, 1]):
    run = Engine(target, eagle).run([prompt], SamplingParams(), StopParams(24))
    texts.append(collect(run, 1)[0])
said["turns"] = texts
ids = torch.tensor(PROMPTS[:1])
decoder = haast.Decoder(model, head=random_head(target), shape=tree)
torch.manual_seed(rank)  # every process draws another seed
said["generate"] = model.generate(ids, do_sample=True, max_new_tokens=24, custom_generate=decoder).tolist()

class Late(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        late = rank == 0 and input_ids.shape[1] >= ids.shape[1] + 7
        return torch.full((1,), late, dtype=torch.bool)

stops = StoppingCriteriaList([Late()])
said["stopped"] = model.generate(
    ids, do_sample=False, max_new_tokens=24, stopping_criteria=stops, custom_generate=decoder
).tolist()
stop = StopParams(24, stop=lambda new: rank == 0 and len(new) >= 5)
said["engine stopped"] = collect(Engine(target, eagle).run(PROMPTS, SamplingParams(), stop), len(PROMPTS))
try:
    vanilla(target, [[1, 2, 3 + rank]], 8)
except PromptError as error:
    said["refused"] = str(error)
fully_sharded = tiny_llama()
fully_shard(fully_sharded)
try:
    Target(fully_sharded)
except UnsupportedModelError as error:
    said["fsdp"] = str(error)
Path(out, f"{rank}.json").write_text(json.dumps(said))
dist.destroy_process_group()
"""
PROMPTS = [[1, 2, 3, 4], [5, 6, 7], [9]]


def torchrun(*command_line: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *map(str, command_line)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    tiny_llama(std=0.4).save_pretrained(tmp_path / "model")
    done = torchrun(driver, tmp_path / "model", tmp_path, json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr
    said, follower = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert said == follower
    target, sampled = tiny_target(), SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    greedy, drawn = vanilla(target, PROMPTS, 24), vanilla(target, PROMPTS, 24, sampled)
    for name, texts in said.items():
        if name.startswith(("greedy", "sampled")):
            assert texts == (greedy if name.startswith("greedy") else drawn), name
    assert said["turns"] == [vanilla(target, [text], 24)[0] for text in (PROMPTS[0], [*PROMPTS[0], 3, 1])]
    assert said["stopped"][0] == PROMPTS[0] + greedy[0][:7]
    assert [len(text) for text in said["engine stopped"]] == [5, 5, 5]
    assert len(said["generate"][0]) == len(PROMPTS[0]) + 24 and "different prompts" in said["refused"]
    assert "sharded by FSDP" in said["fsdp"]


class Wire:
    """Stands in for `Ranks`: what the leader says is kept, for a follower that runs later."""

    def __init__(self, said: deque[list[int]], leads: bool) -> None:
        self.said, self.leads = said, leads

    def share(self, values: Sequence[int] = ()) -> list[int]:
        if self.leads:
            self.said.append(list(values))
        return list(values) if self.leads else self.said.popleft()

    def leading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def same(self, value: int) -> bool:
        return True


class Silent(Drafter):
    """A follower's: nobody may ask it anything."""

    name = "silent"
    nodes = 20

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> None:
        raise AssertionError("only the leader drafts")

    def observe(self, states: Sequence[None], accepted: Accepted) -> None:
        raise AssertionError("only the leader drafts")

    def end(self, state: None) -> None:
        raise AssertionError("only the leader drafts")

    def propose(self, states: Sequence[None], budget: int | None = None) -> DraftTree:
        raise AssertionError("only the leader drafts")


@pytest.mark.parametrize("rule", [None, "rejection"])
def test_a_follower_says_what_the_leader_says_whatever_it_would_say_itself(rule: str | None) -> None:
    """The follower has other weights, another seed and other stop rules: every decision is the leader's."""
    said: deque[list[int]] = deque()
    texts = []
    for leads, seed in ((True, 5), (False, 6)):
        target = tiny_target(seed=0 if leads else 9)
        cast(Any, target).ranks = Wire(said, leads)
        drafter: Drafter = RandomTrees(20, 1, dead=0.2, probes=0.2) if leads else Silent()
        stop = StopParams(24, stop=partial(ends, 9 if leads else 3))
        run = Engine(target, drafter, None if rule is None else rule_named(rule))
        texts.append(collect(run.run(PROMPTS, SamplingParams(1.0, seed=seed), stop), len(PROMPTS)))
    assert texts[0] == texts[1] and not said and [len(text) for text in texts[0]] == [9, 9, 9]


def ends(length: int, new: Sequence[int]) -> bool:
    return len(new) >= length


def test_a_small_model_that_drafts_is_held_by_one_process() -> None:
    target, small = tiny_target(), tiny_target(seed=1)
    cast(Any, small).ranks = Wire(deque(), True)
    with pytest.raises(HeadMismatchError, match="one process drafts"):
        SmallModelDrafter(target, small)


SMOLLM2 = """
import json, sys
from pathlib import Path
import torch.distributed as dist
import haast
from haast.drafters.tree_shape import shape_for

haast = haast.Haast.from_pretrained(tensor_parallel=True, shape=shape_for(6))
said = [list(haast.generate(prompt, max_new_tokens=48).tokens) for prompt in json.loads(sys.argv[2])]
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(said))
dist.destroy_process_group()
"""
QUESTIONS = ["Why is the sky blue?", "Write a function that reverses a list."]


@pytest.mark.slow
def test_the_default_model_says_the_same_in_three_processes_and_from_disk(tmp_path: Path) -> None:
    """In fp32, where processes add in another order: a difference has to be a tie."""
    driver = tmp_path / "driver.py"
    driver.write_text(SMOLLM2)
    done = torchrun(driver, tmp_path / "said.json", json.dumps(QUESTIONS), processes=3)
    assert done.returncode == 0, done.stderr
    parallel = json.loads((tmp_path / "said.json").read_text())
    kept = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{i}": "disk" if i % 3 else "cpu" for i in range(30)}
    paged = haast.Haast.from_pretrained(device_map={**kept, **layers}, shape=shape_for(6))
    plain = haast.Haast.from_pretrained(head=None, packing="off")
    for question, three in zip(QUESTIONS, parallel, strict=True):
        expected = list(plain.generate(question, max_new_tokens=48).tokens)
        for said in (three, list(paged.generate(question, max_new_tokens=48).tokens)):
            found = diagnose(plain.target, plain.encode(question), expected, said, SamplingParams())
            assert found is None or found.kind == "tie"


@pytest.mark.slow
def test_the_command_line_answers_once(tmp_path: Path) -> None:
    folder, result = tmp_path / "model", tmp_path / "said.json"
    model = tiny_llama(len(byte_tokenizer()))
    model.generation_config = cast(Any, GenerationConfig)()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    common = ["-m", "haast", "generate", "hello", "--head", "none", "--dtype", "float64", "--raw", "--model", folder]
    common += ["--max-new-tokens", 8, "--tensor-parallel"]
    done = torchrun(*common, "--json", result)
    assert done.returncode == 0, done.stderr
    document = json.loads(result.read_text())
    assert document["tokens"] == decode_hello(model)
    assert done.stdout.count(document["text"].strip()) == 1 and done.stderr.count("tokens/s") == 1


def decode_hello(model: Any) -> list[int]:
    return vanilla(Target(model), [list(byte_tokenizer()("hello")["input_ids"])], 8)[0]


@pytest.mark.slow
def test_heads_that_do_not_divide_are_refused_by_number(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    tiny_llama().save_pretrained(tmp_path / "model")
    done = torchrun(driver, tmp_path / "model", tmp_path, json.dumps(PROMPTS), processes=3)
    assert done.returncode != 0 and "its 2 key heads can't be cut over 3 processes" in done.stderr


@pytest.mark.parametrize(("name", "version"), [("transformers.__version__", "5.15.2"), ("torch.__version__", "2.6.0")])
def test_versions_without_tensor_parallelism_are_told(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(name, TorchVersion(version))
    with pytest.raises(ValueError, match=r"needs torch 2\.7 and transformers 5\.16 or newer, these are .*device_map"):
        Placement(tensor_parallel=True).check("cpu", "off", "off")
