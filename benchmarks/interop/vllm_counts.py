"""An exported head in vLLM and in Haast: the same drafts are accepted, and the same text is said.

    python -m venv .venv-vllm && .venv-vllm/bin/pip install -r benchmarks/interop/requirements-vllm.txt
    python benchmarks/interop/vllm_counts.py --python .venv-vllm/bin/python --prompts mt_bench.jsonl \
        --json results/interop-vllm-eagle.json

The head is written as `haast export --to vllm` does (or `--to speculators`, which vLLM reads too), and both sides read
that very folder: vLLM drafts chains over the whole vocabulary of an EAGLE-1 head, and so does Haast here. Greedy,
float32, one request at a time. Of each place of the chain, the share of drafts that are accepted where all before them
were must agree within `--tolerance`. Where texts differ, the first place that does must be a tie: the target's two best
logits there, by stock transformers, are those two tokens and lie within `--tie` of each other. Ends with 1 where
something does not agree.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sides import answers, ask, checked, differences, environment

from haast.api import Haast, find_head
from haast.bench.report import file_sha256, folder_sha256
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.formats.export import export_head
from haast.formats.opened import OpenedHead, embedding_of, open_head
from haast.heads.checkpoint import Head
from haast.prompts import read_prompts
from haast.target.load import DEFAULT_MODEL, config_on_disk, hub_name, load_target, read_config
from haast.target.target import Target


def exported(name: str, model: str, target: Target, layout: str, out: Path) -> None:
    """Write a head, as `haast export` does."""
    place = find_head(name, model)
    assert place is not None, "a head was named"
    head = open_head(place)
    if isinstance(head, OpenedHead):
        head, _ = head.fitted(target)
    export_head(head, layout, hub_name(model), read_config(model), out, embedding_of(target))


def imported(folder: Path, target: Target) -> Head:
    """What vLLM reads, read by Haast, and as it says of itself."""
    found = open_head(folder)
    assert isinstance(found, OpenedHead), "it was written for vLLM"
    return found.fitted(target, probe=False)[0]


def shares(drafts: int, accepted: list[int]) -> list[float]:
    """Of each place of a chain: accepted drafts over those whose forerunners were accepted."""
    return [now / before if before else 0.0 for before, now in zip([drafts, *accepted], accepted, strict=False)]


def without_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """Up to the end token: one side says it, the other does not."""
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the same prompts. Raises OtherSideError, ValueError."""
    target = load_target(given.model, packing="off")
    folder = config_on_disk(given.model)
    assert folder is not None, "it is loaded"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "head")
        exported(given.head, given.model, target, given.to, place)
        drafter = head_drafter(target, imported(place, target), DraftShape(kind="chain", depth=given.depth))
        model = Haast(target, drafter)
        prompts = [model.encode(prompt.turns[0]) for prompt in read_prompts(given.prompts, given.limit, spread=True)]
        said, stats = answers(model, prompts, given.max_new_tokens)
        request = {
            "target": str(folder),
            "head": str(place),
            "method": given.method,
            "depth": given.depth,
            "prompts": prompts,
            "max_new_tokens": given.max_new_tokens,
            "ends": list(model.eos_ids()),
        }
        theirs = ask(given.python, "vllm_side.py", request, given.timeout, VLLM_CPU_KVCACHE_SPACE="1")
        digest = folder_sha256(place)
    texts = [[without_end(tokens, model.eos_ids()) for tokens in side] for side in (said, theirs["tokens"])]
    here = shares(stats.reached_by_depth[0], stats.accepted_by_depth[: given.depth])
    there = shares(theirs["drafts"], theirs["accepted"])
    apart = [abs(a - b) / b if b else float(a > 0) for a, b in zip(here, there, strict=True)]
    return {
        "kind": "interop-vllm",
        "method": given.method,
        "layout": given.to,
        "head": Path(given.head).name,
        "export_sha256": digest,
        "haast": {"drafts": stats.reached_by_depth[0], "accepted": stats.accepted_by_depth, "shares": here},
        "vllm": {"drafts": theirs["drafts"], "accepted": theirs["accepted"], "shares": there},
        "relative_difference": apart,
        "prompts": len(prompts),
        "texts_equal": sum(a == b for a, b in zip(*texts, strict=True)),
        "tokens": sum(map(len, texts[0])),
        "differences": differences(given.model, prompts, *texts),
        "prompts_sha256": file_sha256(given.prompts),
        "environment": environment(theirs["versions"], {"depth": given.depth, "max_new_tokens": given.max_new_tokens}),
    }


def main() -> None:
    """Compare, write, and say."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--python", type=Path, required=True, help="the interpreter of vLLM's environment")
    words.add_argument("--prompts", type=Path, required=True, help="JSON lines with `turns` or `prompt`")
    words.add_argument("--limit", type=int, default=10)
    words.add_argument("--max-new-tokens", type=int, default=128)
    words.add_argument("--model", default=DEFAULT_MODEL)
    words.add_argument("--head", default="default")
    words.add_argument("--method", choices=("eagle", "eagle3"), default="eagle")
    words.add_argument("--to", choices=("vllm", "speculators"), default="vllm", help="the layout of the export")
    words.add_argument("--depth", type=int, default=3)
    words.add_argument("--tolerance", type=float, default=0.05, help="of shares, relative")
    words.add_argument("--tie", type=float, default=1e-3, help="logits closer than this are equal")
    words.add_argument("--timeout", type=float, default=1800.0, help="seconds for vLLM")
    words.add_argument("--json", required=True)
    given = words.parse_args()
    found = checked(check, given)
    for name in ("haast", "vllm"):
        print(
            f"{name:6s} {found[name]['drafts']} drafts, accepted by place: ",
            *map("{:.3f}".format, found[name]["shares"]),
        )
    print(f"texts: {found['texts_equal']} of {found['prompts']} equal; where they part: {found['differences']}")
    tied = all(each["the_two_best"] and each["gap"] <= given.tie for each in found["differences"])
    if max(found["relative_difference"]) > given.tolerance or not tied:
        raise SystemExit("NOT the same: see the numbers above")


if __name__ == "__main__":
    main()
