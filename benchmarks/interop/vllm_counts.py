"""Compares an exported head in vLLM and in Haast: accepted drafts per position, and texts.

    python -m venv .venv-vllm && .venv-vllm/bin/pip install -r benchmarks/interop/requirements-vllm.txt
    python benchmarks/interop/vllm_counts.py --python .venv-vllm/bin/python --prompts mt_bench.jsonl \
        --json results/interop-vllm-eagle.json

The head is written as `haast export --to vllm` does (or `--to speculators`, which vLLM reads too), and both programs
read that folder. vLLM drafts chains over the whole vocabulary of an EAGLE-1 head, and so does Haast here. Greedy,
float32, one request at a time. For each position of the chain, the acceptance rate given that all drafts before were
accepted must agree within `--tolerance`. The first difference of two texts must be a tie: the two tokens are the
target's two best, by stock transformers, and their logits are within `--tie`. The exit status is 1 if anything does not
agree.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sides import answers, ask, checked, differences, environment, weights_folder

from haast.api import Haast, find_head
from haast.bench.report import file_sha256, folder_sha256
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, embedding_of, open_head
from haast.heads.checkpoint import Head
from haast.prompts import read_prompts
from haast.target.load import DEFAULT_MODEL, hub_name, load_target, read_config
from haast.target.target import Target


def export(name: str, model: str, target: Target, layout: str, out: Path) -> None:
    """Write a head, as `haast export` does."""
    path = find_head(name, model)
    assert path is not None, "--head names one"
    head = open_head(path)
    if isinstance(head, OpenedHead):
        head, _ = head.fitted(target)
    export_head(head, layout, hub_name(model), read_config(model), out, embedding_of(target))


def load_export(folder: Path, target: Target) -> Head:
    """Read the exported head with Haast, and trust its config without a probe."""
    head = open_head(folder)
    assert isinstance(head, OpenedHead), "it has a foreign layout"
    return head.fitted(target, probe=False)[0]


def shares(drafts: int, accepted: list[int]) -> list[float]:
    """Per position of a chain: the acceptance rate of drafts whose predecessors were all accepted."""
    return [now / before if before else 0.0 for before, now in zip([drafts, *accepted], accepted, strict=False)]


def before_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens before the end token, which only one of the programs returns."""
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both programs on the same prompts. Raises OtherSideError, ValueError."""
    target = load_target(arguments.model, packing="off")
    with tempfile.TemporaryDirectory() as temporary:
        folder = weights_folder(arguments.model, Path(temporary))
        place = Path(temporary, "head")
        export(arguments.head, arguments.model, target, arguments.to, place)
        drafter = head_drafter(target, load_export(place, target), DraftShape(kind="chain", depth=arguments.depth))
        model = Haast(target, drafter)
        prompts = [
            model.encode(prompt.turns[0]) for prompt in read_prompts(arguments.prompts, arguments.limit, spread=True)
        ]
        own, stats = answers(model, prompts, arguments.max_new_tokens)
        request = {
            "target": str(folder),
            "head": str(place),
            "method": arguments.method,
            "depth": arguments.depth,
            "prompts": prompts,
            "max_new_tokens": arguments.max_new_tokens,
            "ends": list(model.eos_ids()),
        }
        theirs = ask(arguments.python, "vllm_side.py", request, arguments.timeout, VLLM_CPU_KVCACHE_SPACE="1")
        digest = folder_sha256(place)
    texts = [[before_end(tokens, model.eos_ids()) for tokens in side] for side in (own, theirs["tokens"])]
    own_shares = shares(stats.reached_by_depth[0], stats.accepted_by_depth[: arguments.depth])
    their_shares = shares(theirs["drafts"], theirs["accepted"])
    relative = [abs(a - b) / b if b else float(a > 0) for a, b in zip(own_shares, their_shares, strict=True)]
    return {
        "kind": "interop-vllm",
        "method": arguments.method,
        "layout": arguments.to,
        "head": Path(arguments.head).name,
        "export_sha256": digest,
        "haast": {"drafts": stats.reached_by_depth[0], "accepted": stats.accepted_by_depth, "shares": own_shares},
        "vllm": {"drafts": theirs["drafts"], "accepted": theirs["accepted"], "shares": their_shares},
        "relative_difference": relative,
        "prompts": len(prompts),
        "texts_equal": sum(a == b for a, b in zip(*texts, strict=True)),
        "tokens": sum(map(len, texts[0])),
        "differences": differences(arguments.model, prompts, *texts),
        "prompts_sha256": file_sha256(arguments.prompts),
        "environment": environment(
            theirs["versions"], {"depth": arguments.depth, "max_new_tokens": arguments.max_new_tokens}
        ),
    }


def main() -> None:
    """Compare, write the JSON, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of vLLM's environment")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `turns` or `prompt`")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--head", default="default")
    parser.add_argument("--method", choices=("eagle", "eagle3"), default="eagle")
    parser.add_argument("--to", choices=("vllm", "speculators"), default="vllm", help="the layout of the export")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.05, help="relative difference of acceptance rates")
    parser.add_argument("--tie", type=float, default=1e-3, help="logits closer than this count as equal")
    parser.add_argument("--timeout", type=float, default=1800.0, help="time limit of vLLM, in seconds")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    found = checked(check, arguments)
    for name in ("haast", "vllm"):
        print(
            f"{name:6s} {found[name]['drafts']} drafts, acceptance rate by position: ",
            *map("{:.3f}".format, found[name]["shares"]),
        )
    print(f"texts: {found['texts_equal']} of {found['prompts']} equal; differences: {found['differences']}")
    tied = all(each["the_two_best"] and each["gap"] <= arguments.tie for each in found["differences"])
    if max(found["relative_difference"]) > arguments.tolerance or not tied:
        raise SystemExit("FAILED, the programs differ: see the numbers above")


if __name__ == "__main__":
    main()
