"""Heads written for speculators, and heads that speculators wrote: its own classes and Haast's give the same logits.

    python -m venv .venv-speculators
    .venv-speculators/bin/pip install -r benchmarks/interop/requirements-speculators.txt
    python benchmarks/interop/speculators_logits.py --python .venv-speculators/bin/python \
        --json results/interop-speculators.json

There: random heads of every form that the layout holds (and `--head`, a trained one for `--model`) are written as
`haast export --to speculators` does and loaded by `SpeculatorModel.from_pretrained`. Back: speculators makes random
EAGLE-3 heads of Llama and of Qwen3 layers and P-EAGLE heads, saves them itself, and Haast reads them. All run over the
same random features and tokens, three depths each, as they do in training. Ends with 1 where logits differ by more
than `--tolerance`, or a head does not load.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sides import ask, checked, environment
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from haast.api import find_head
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, embedding_of, open_head
from haast.heads.checkpoint import Head, build_module
from haast.heads.eagle3 import Eagle3Config, Eagle3Head, default_layers
from haast.target.load import DEFAULT_MODEL, config_on_disk, load_target, read_config
from haast.target.target import Target

PLACES, DEPTHS = 12, 3
DRAFTED = (1, 2, 3, 5, 8, 13, 21, 34, 40, 41, 55, 60)  # target ids
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
THERE: dict[str, dict[str, Any]] = {
    "plain": {},
    "draft vocabulary": {"draft_vocab_size": len(DRAFTED)},
    "other layers": {"layer_ids": (1, 4, 7)},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "one norm before fc": {"input_norm": True, "norm_before_residual": True},
    "Qwen3 layers": {"qk_norm": True, "draft_vocab_size": len(DRAFTED)},
    "two layers": {"num_hidden_layers": 2},
    "a table of its own": {"own_embedding": True},
    "all biases": {"qkv_bias": True, "o_bias": True},
    "biases of q, k and v": {"qkv_bias": True},
}
BACK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"draft_vocab_size": 12}),
    "llama, whole vocabulary": ("llama", {"draft_vocab_size": 64, "norm_before_residual": True}),
    "llama, EAGLE-3.1": ("llama", {"draft_vocab_size": 12, "fc_norm": True, "norm_output": True}),
    "llama, one norm before fc": ("llama", {"draft_vocab_size": 12, "norm_before_fc": True}),
    "qwen3": ("qwen3", {"draft_vocab_size": 12, "norm_before_residual": True}),
    "qwen3, two layers": ("qwen3", {"draft_vocab_size": 12, "num_hidden_layers": 2}),
    "P-EAGLE, llama": ("llama", {"draft_vocab_size": 64, "mask_token_id": 7, "num_hidden_layers": 2}),
    "P-EAGLE, qwen3": ("qwen3", {"draft_vocab_size": 12, "mask_token_id": 7}),
}


@dataclass
class Case:
    """A head that both sides run: where it lies, what it reads, and who wrote it."""

    name: str
    target: Target
    folder: Path
    inputs: Path
    logits: Path
    form: dict[str, Any] | None = None  # of a head that speculators makes

    def request(self) -> dict[str, Any]:
        """What the other side has to know."""
        places = {"folder": str(self.folder), "inputs": str(self.inputs), "logits": str(self.logits)}
        return places | ({} if self.form is None else {"form": self.form})


def logits_of(head: Head, target: Target, inputs: dict[str, Tensor]) -> Tensor:
    """(depths, places, draft vocabulary): chains after every place, each depth on what the one before gave."""
    module = head.module
    assert isinstance(module, Eagle3Head), "an EAGLE-3 head"
    features, ids = inputs["features"][:, :PLACES], inputs["ids"]
    embed, masked = module.embedding(target.embedding), module.masked()
    states, embedded, found = module.fuse(features), list[Tensor](), list[Tensor]()
    for depth in range(DEPTHS):
        token = ids[:, depth : depth + PLACES]
        embedded.append(embed(torch.full_like(token, masked[0]) if masked and depth else token))
        output = module(torch.cat(embedded, 1), states, *places_and_mask(depth + 1))[:, -PLACES:]
        found.append((module.normed(output) @ module.lm_head.weight.T)[0])
        states = torch.cat([states, masked[1].expand(1, PLACES, -1) if masked else output], 1)
    return torch.stack(found)


def places_and_mask(depths: int) -> tuple[Tensor, Tensor]:
    """Positions of the pairs of so many depths; each sees the text up to its place, and its own chain."""
    place, depth = torch.arange(PLACES).repeat(depths), torch.arange(depths).repeat_interleave(PLACES)
    text = (depth[None] == 0) & (place[None] <= place[:, None])
    chain = (place[None] == place[:, None]) & (depth[None] <= depth[:, None])
    hidden = torch.zeros(len(place), len(place)).masked_fill(~(text | chain), torch.finfo(torch.float32).min)
    return (place + depth)[None], hidden[None, None]


def random_inputs(target: Target, layers: int, path: Path) -> Path:
    """Features and tokens for both sides."""
    generator = torch.Generator().manual_seed(5)
    length = PLACES + DEPTHS - 1
    features = torch.randn(1, length, layers * target.hidden_size, generator=generator)
    ids = torch.randint(target.vocab_size, (1, length), generator=generator)
    save_file({"features": features, "ids": ids}, path)
    return path


def random_head(target: Target, form: dict[str, Any]) -> Head:
    """A head of Haast's, of such a form."""
    config = Eagle3Config.for_target(target.config, **{"layer_ids": default_layers(target.config), **form})
    module: Any = build_module(config, None)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = drawn + 1 if "norm" in name else drawn
    vocab = torch.tensor(DRAFTED) if config.draft_vocab_size else None
    return Head(module.eval().requires_grad_(False), vocab, {})


def cases(given: argparse.Namespace, folder: Path) -> tuple[list[Case], Path]:
    """All heads, those of Haast's written; and the folder of the tiny target."""
    tiny = folder / "target"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tiny)
    target = Target(LlamaForCausalLM.from_pretrained(tiny))
    inputs = random_inputs(target, 3, folder / "inputs.safetensors")
    found: list[Case] = []
    for name, form in THERE.items():
        place = folder / f"there-{len(found)}"
        export_head(
            random_head(target, form), "speculators", str(tiny), target.model.config, place, embedding_of(target)
        )
        found.append(Case(f"to speculators: {name}", target, place, inputs, place.with_suffix(".logits")))
    if given.head is not None:
        found.append(trained(given, folder))
    for number, (name, (layers, options)) in enumerate(BACK.items()):
        sizes = {**SIZES, "num_hidden_layers": options.get("num_hidden_layers", 1)}
        options = {key: value for key, value in options.items() if key != "num_hidden_layers"}
        options["eagle_aux_hidden_state_layer_ids"] = [2, 4, 5]
        place = folder / f"back-{number}"
        form = {"seed": number, "layers": layers, "sizes": sizes, "options": options}
        found.append(Case(f"from speculators: {name}", target, place, inputs, place.with_suffix(".logits"), form))
    return found, tiny


def trained(given: argparse.Namespace, folder: Path) -> Case:
    """The user's head, written for its target's folder, whose embedding speculators reads."""
    target, place = load_target(given.model, packing="off"), find_head(given.head, given.model)
    assert place is not None, "a head was named"
    head = open_head(place)
    if isinstance(head, OpenedHead):
        head, _ = head.fitted(target)
    if not isinstance(head.module, Eagle3Head):
        raise ValueError(f"{given.head} is no EAGLE-3 head: speculators 0.9 holds no other")
    out = folder / "trained"
    export_head(
        head, "speculators", str(config_on_disk(given.model)), read_config(given.model), out, embedding_of(target)
    )
    inputs = random_inputs(target, len(head.module.config.layer_ids), folder / "trained-inputs.safetensors")
    return Case("to speculators: the trained head", target, out, inputs, folder / "trained.logits")


def compared(case: Case) -> dict[str, Any]:
    """Largest difference of two logits, and their size."""
    opened = open_head(case.folder)
    assert isinstance(opened, OpenedHead), "it lies there in speculators' layout"
    head, _ = opened.fitted(case.target, probe=False)
    with torch.no_grad():
        ours = logits_of(head, case.target, load_file(case.inputs))
    theirs = load_file(case.logits)["logits"]
    if ours.shape != theirs.shape:
        return {"head": case.name, "error": f"logits are {tuple(ours.shape)} here and {tuple(theirs.shape)} there"}
    by_depth = (ours - theirs).abs().amax(dim=(1, 2)).tolist()
    return {"head": case.name, "max_difference": max(by_depth), "by_depth": by_depth, "std": float(theirs.std())}


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Every head on both sides. Raises OtherSideError, ValueError."""
    with tempfile.TemporaryDirectory() as temporary:
        every, tiny = cases(given, Path(temporary))
        heads = {case.name: case.request() for case in every}
        request = {"target": str(tiny), "depths": DEPTHS, "heads": heads}
        told = ask(given.python, "speculators_side.py", request, given.timeout)
        rows = [
            {"head": case.name, "error": told["failed"][case.name]} if case.name in told["failed"] else compared(case)
            for case in every
        ]
    where = environment(told["versions"], {"places": PLACES, "depths": DEPTHS, "tolerance": given.tolerance})
    return {"kind": "interop-speculators", "heads": rows, "environment": where}


def main() -> None:
    """Run both sides, compare, write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--python", type=Path, required=True, help="the interpreter of speculators' environment")
    words.add_argument("--head", help="a trained EAGLE-3 head as well")
    words.add_argument("--model", default=DEFAULT_MODEL, help="whom it is for")
    words.add_argument("--tolerance", type=float, default=1e-4)
    words.add_argument("--timeout", type=float, default=600.0, help="seconds for speculators")
    words.add_argument("--json", required=True)
    given = words.parse_args()
    rows = checked(check, given)["heads"]
    for row in rows:
        print(f"{row['head']:44s} {row.get('error') or format(row['max_difference'], '.1e')}")
    if any(row.get("max_difference", float("inf")) > given.tolerance for row in rows):
        raise SystemExit("NOT the same: see above")


if __name__ == "__main__":
    main()
