"""Compares logits of Haast and of speculators for heads that either of them wrote.

    python -m venv .venv-speculators
    .venv-speculators/bin/pip install -r benchmarks/interop/requirements-speculators.txt
    python benchmarks/interop/speculators_logits.py --python .venv-speculators/bin/python \
        --json results/interop-speculators.json

Export: Haast writes random heads of every variant of the layout (and `--head`, a trained head for `--model`) as `haast
export --to speculators` does, and `SpeculatorModel.from_pretrained` loads them. Import: speculators creates and saves
random EAGLE-3 heads with Llama and Qwen3 layers and P-EAGLE heads, and Haast reads them. All heads run on the same
random features and tokens, to a depth of three, as in training. The exit status is 1 if logits differ by more than
`--tolerance`, or a head does not load.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sides import ask, checked, environment, weights_folder
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from haast.api import find_head
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, embedding_of, open_head
from haast.heads.checkpoint import Head, build_module
from haast.heads.eagle3 import Eagle3Config, Eagle3Head, default_layers
from haast.target.load import DEFAULT_MODEL, load_target, read_config
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
EXPORTED: dict[str, dict[str, Any]] = {
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
IMPORTED: dict[str, tuple[str, dict[str, Any]]] = {
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
    """A head that both programs run: the paths of its files, its inputs and its logits."""

    name: str
    target: Target
    folder: Path
    inputs: Path
    logits: Path
    form: dict[str, Any] | None = None  # the settings of a head that speculators creates

    def request(self) -> dict[str, Any]:
        """The part of the request that describes this head."""
        paths = {"folder": str(self.folder), "inputs": str(self.inputs), "logits": str(self.logits)}
        return paths | ({} if self.form is None else {"form": self.form})


def logits_of(head: Head, target: Target, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (depths, places, draft vocabulary) of a chain from every place; a depth reads the output of the last."""
    module = head.module
    assert isinstance(module, Eagle3Head), "an EAGLE-3 head"
    features, ids = inputs["features"][:, :PLACES], inputs["ids"]
    embed, masked = module.embedding(target.embedding), module.masked()
    states, embedded, found = module.fuse(features), list[Tensor](), list[Tensor]()
    for depth in range(DEPTHS):
        token = ids[:, depth : depth + PLACES]
        embedded.append(embed(torch.full_like(token, masked[0]) if masked and depth else token))
        output = module(torch.cat(embedded, 1), states, *positions_and_mask(depth + 1))[:, -PLACES:]
        found.append((module.normed(output) @ module.lm_head.weight.T)[0])
        states = torch.cat([states, masked[1].expand(1, PLACES, -1) if masked else output], 1)
    return torch.stack(found)


def positions_and_mask(depths: int) -> tuple[Tensor, Tensor]:
    """Positions and attention mask of `depths` depths; a pair attends to the text up to its place and to its chain."""
    place, depth = torch.arange(PLACES).repeat(depths), torch.arange(depths).repeat_interleave(PLACES)
    text = (depth[None] == 0) & (place[None] <= place[:, None])
    chain = (place[None] == place[:, None]) & (depth[None] <= depth[:, None])
    hidden = torch.zeros(len(place), len(place)).masked_fill(~(text | chain), torch.finfo(torch.float32).min)
    return (place + depth)[None], hidden[None, None]


def random_inputs(target: Target, layers: int, path: Path) -> Path:
    """Write features and tokens for both programs."""
    generator = torch.Generator().manual_seed(5)
    length = PLACES + DEPTHS - 1
    features = torch.randn(1, length, layers * target.hidden_size, generator=generator)
    ids = torch.randint(target.vocab_size, (1, length), generator=generator)
    save_file({"features": features, "ids": ids}, path)
    return path


def random_head(target: Target, form: dict[str, Any]) -> Head:
    """A random head of Haast with these settings."""
    config = Eagle3Config.for_target(target.config, **{"layer_ids": default_layers(target.config), **form})
    module: Any = build_module(config, None)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = values + 1 if "norm" in name else values
    vocab = torch.tensor(DRAFTED) if config.draft_vocab_size else None
    return Head(module.eval().requires_grad_(False), vocab, {})


def cases(arguments: argparse.Namespace, folder: Path) -> tuple[list[Case], Path]:
    """All heads, with Haast's own already exported, and the folder of the tiny target."""
    tiny = folder / "target"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tiny)
    target = Target(LlamaForCausalLM.from_pretrained(tiny))
    inputs = random_inputs(target, 3, folder / "inputs.safetensors")
    found: list[Case] = []
    for name, form in EXPORTED.items():
        place = folder / f"there-{len(found)}"
        export_head(
            random_head(target, form), "speculators", str(tiny), target.model.config, place, embedding_of(target)
        )
        found.append(Case(f"to speculators: {name}", target, place, inputs, place.with_suffix(".logits")))
    if arguments.head is not None:
        found.append(trained(arguments, folder))
    for number, (name, (layers, options)) in enumerate(IMPORTED.items()):
        sizes = {**SIZES, "num_hidden_layers": options.get("num_hidden_layers", 1)}
        options = {key: value for key, value in options.items() if key != "num_hidden_layers"}
        options["eagle_aux_hidden_state_layer_ids"] = [2, 4, 5]
        place = folder / f"back-{number}"
        form = {"seed": number, "layers": layers, "sizes": sizes, "options": options}
        found.append(Case(f"from speculators: {name}", target, place, inputs, place.with_suffix(".logits"), form))
    return found, tiny


def trained(arguments: argparse.Namespace, folder: Path) -> Case:
    """Export the head of --head; speculators reads the embedding from its target's folder."""
    target, place = load_target(arguments.model, packing="off"), find_head(arguments.head, arguments.model)
    assert place is not None, "--head names one"
    head = open_head(place)
    if isinstance(head, OpenedHead):
        head, _ = head.fitted(target)
    if not isinstance(head.module, Eagle3Head):
        raise ValueError(f"{arguments.head} is not an EAGLE-3 head: speculators 0.9 supports no other")
    out = folder / "trained"
    export_head(
        head,
        "speculators",
        str(weights_folder(arguments.model, folder)),
        read_config(arguments.model),
        out,
        embedding_of(target),
    )
    inputs = random_inputs(target, len(head.module.config.layer_ids), folder / "trained-inputs.safetensors")
    return Case("to speculators: the trained head", target, out, inputs, folder / "trained.logits")


def compared(case: Case) -> dict[str, Any]:
    """The largest difference of the logits, in total and by depth, and their standard deviation."""
    opened = open_head(case.folder)
    assert isinstance(opened, OpenedHead), "it has speculators' layout"
    head, _ = opened.fitted(case.target, probe=False)
    with torch.no_grad():
        ours = logits_of(head, case.target, load_file(case.inputs))
    theirs = load_file(case.logits)["logits"]
    if ours.shape != theirs.shape:
        return {
            "head": case.name,
            "error": f"logits have shape {tuple(ours.shape)} in Haast and {tuple(theirs.shape)} in speculators",
        }
    by_depth = (ours - theirs).abs().amax(dim=(1, 2)).tolist()
    return {"head": case.name, "max_difference": max(by_depth), "by_depth": by_depth, "std": float(theirs.std())}


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every head in both programs. Raises OtherSideError, ValueError."""
    with tempfile.TemporaryDirectory() as temporary:
        every, tiny = cases(arguments, Path(temporary))
        heads = {case.name: case.request() for case in every}
        request = {"target": str(tiny), "depths": DEPTHS, "heads": heads}
        answer = ask(arguments.python, "speculators_side.py", request, arguments.timeout)
        rows = [
            {"head": case.name, "error": answer["failed"][case.name]}
            if case.name in answer["failed"]
            else compared(case)
            for case in every
        ]
    where = environment(answer["versions"], {"places": PLACES, "depths": DEPTHS, "tolerance": arguments.tolerance})
    return {"kind": "interop-speculators", "heads": rows, "environment": where}


def main() -> None:
    """Run both programs, compare and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of speculators' environment")
    parser.add_argument("--head", help="also compare a trained EAGLE-3 head")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="target of --head")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--timeout", type=float, default=600.0, help="time limit of speculators, in seconds")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    rows = checked(check, arguments)["heads"]
    for row in rows:
        print(f"{row['head']:44s} {row.get('error') or format(row['max_difference'], '.1e')}")
    if any(row.get("max_difference", float("inf")) > arguments.tolerance for row in rows):
        raise SystemExit("FAILED, logits differ: see above")


if __name__ == "__main__":
    main()
