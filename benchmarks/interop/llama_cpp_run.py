"""Checks exported EAGLE-3 heads in llama.cpp: both export routes load and draft, and the text does not change.

    cmake --build llama-build --target llama-speculative-simple llama-simple
    python -m venv .venv-llama && .venv-llama/bin/pip install -r benchmarks/interop/requirements-llama_cpp.txt
    python benchmarks/interop/llama_cpp_run.py --sources llama.cpp --bin llama-build/bin \
        --python .venv-llama/bin/python --target SmolLM2-135M-Instruct.Q4_1.gguf --head my-head \
        --json results/interop-llama-cpp.json

The routes: `haast export --to gguf`, a file that llama.cpp loads directly, and `--to llama.cpp`, a folder for its
`convert_hf_to_gguf.py`. Both resulting files are compared tensor by tensor. Then `llama-speculative-simple` answers a
few prompts greedily with each file, and `llama-simple` without a head, and the texts are compared. At the first
difference, the gap of the target's two best logits is reported, computed by stock transformers: llama.cpp multiplies in
8 bits, and verifies several tokens with other kernels, so close logits can swap. Haast's own counts, on unpacked
weights, are reported too. The exit status is 1 if a file does not load, no draft is accepted, or texts differ at a gap
above `--tie`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from sides import OtherSideError, answers, checked, differences, environment, run, weights_folder

from haast.api import Haast, find_head
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.formats.export import export_head
from haast.formats.gguf import GGUF_FILE, read_gguf
from haast.formats.opened import OpenedHead, open_head
from haast.formats.probe import PROMPTS
from haast.heads.checkpoint import Head
from haast.target.load import DEFAULT_MODEL, hub_name, load_target, read_config
from haast.target.target import Target

_COUNTS = re.compile(r"n_(drafted|accept)\s*=\s*(\d+)")


def load_user_head(arguments: argparse.Namespace, target: Target) -> Head:
    """The head of --head, fitted to the target."""
    path = find_head(arguments.head, arguments.model)
    assert path is not None, "--head is required"
    head = open_head(path)
    return head.fitted(target)[0] if isinstance(head, OpenedHead) else head


def export_files(arguments: argparse.Namespace, head: Head, folder: Path) -> dict[str, Path]:
    """The head as a GGUF file, by export route."""
    config, name = read_config(arguments.model), hub_name(arguments.model)
    export_head(head, "gguf", name, config, folder / "gguf")
    export_head(head, "llama.cpp", name, config, folder / "folder")
    converted = folder / "converted.gguf"
    script, target = arguments.sources / "convert_hf_to_gguf.py", str(weights_folder(arguments.model, folder))
    command = [str(arguments.python), str(script), str(folder / "folder"), "--target-model-dir", target]
    done = run([*command, "--outfile", str(converted), "--outtype", "f16"], arguments.timeout)
    if done.returncode:
        raise OtherSideError(f"{script.name} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return {"--to gguf": folder / "gguf" / GGUF_FILE, "--to llama.cpp": converted}


def same_files(one: Path, other: Path) -> bool:
    """Whether two GGUF files hold equal tensors."""
    ours, theirs = (read_gguf(path, path.name).tensors for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def answer(arguments: argparse.Namespace, prompt: str, head: Path | None) -> tuple[str, dict[str, int]]:
    """The text after a prompt, and the numbers of drafted and accepted tokens; None: without a head."""
    if head is None:
        name, options = "llama-simple", ["-m", str(arguments.target), "-n", str(arguments.max_new_tokens), prompt]
    else:
        name, options = "llama-speculative-simple", ["-m", str(arguments.target), "-md", str(head), "-p", prompt]
        options += ["--spec-type", "draft-eagle3", "--spec-draft-n-max", str(arguments.depth), "--temp", "0"]
        options += [
            "-n",
            str(arguments.max_new_tokens),
            "-c",
            "2048",
            "-t",
            str(arguments.threads),
            "-td",
            str(arguments.threads),
        ]
    done = run([str(arguments.bin / name), *options], arguments.timeout)
    if done.returncode:
        raise OtherSideError(f"{name} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    counts = {key: int(value) for key, value in _COUNTS.findall(done.stderr)}
    return done.stdout.partition(prompt)[2].rstrip("\n"), counts


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer all prompts without the head and with each exported file. Raises OtherSideError, ValueError."""
    if not arguments.target.is_file():
        raise ValueError(f"no GGUF file at {arguments.target}: give the target as a GGUF file with --target")
    target = load_target(arguments.model, packing="off")
    head = load_user_head(arguments, target)
    model = Haast(target, head_drafter(target, head, DraftShape(kind="chain", depth=arguments.depth)))
    texts = [
        str(
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True
            )
        )
        for each in PROMPTS[: arguments.limit]
    ]
    prompts = [list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    with tempfile.TemporaryDirectory() as temporary:
        files = export_files(arguments, head, Path(temporary))
        same = same_files(*files.values())
        plain = [answer(arguments, text, None)[0] for text in texts]
        results = {road: [answer(arguments, text, file) for text in texts] for road, file in files.items()}
    _, stats = answers(model, prompts, arguments.max_new_tokens)
    rows = [row(arguments, road, plain, own, model, prompts) for road, own in results.items()]
    settings = {name: getattr(arguments, name) for name in ("depth", "max_new_tokens", "limit", "threads")}
    return {
        "kind": "interop-llama-cpp",
        "head": Path(arguments.head).name,
        "target": arguments.target.name,
        "same_tensors": same,
        "roads": rows,
        "haast": {"drafted": arguments.depth * stats.reached_by_depth[0], "accepted": sum(stats.accepted_by_depth)},
        "environment": environment({"llama.cpp": "of llama-cpp-python 0.3.36"}, settings) | {"packing": "llama.cpp's"},
    }


def row(
    arguments: argparse.Namespace,
    road: str,
    plain: list[str],
    answers: list[tuple[str, dict[str, int]]],
    model: Haast,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """The result of one export route."""
    # llama-speculative-simple stops after a whole draft, later than llama-simple: compare the common length.
    pairs = [
        [text[: min(len(text), len(other))] for text in (text, other)]
        for (text, _), other in zip(answers, plain, strict=True)
    ]
    ids = [[list(model.tokenizer(pair[i], add_special_tokens=False)["input_ids"]) for pair in pairs] for i in (0, 1)]
    drafted, accepted = (sum(counts[key] for _, counts in answers) for key in ("drafted", "accept"))
    return {
        "road": road,
        "drafted": drafted,
        "accepted": accepted,
        "texts_equal": sum(a == b for a, b in pairs),
        "prompts": len(prompts),
        "differences": differences(arguments.model, prompts, *ids),
    }


def main() -> None:
    """Run, compare and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder of llama.cpp's sources, for its converter")
    parser.add_argument("--bin", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of the converter's environment")
    parser.add_argument("--target", type=Path, required=True, help="the target as a GGUF file")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the same target, for Haast")
    parser.add_argument("--head", required=True, help="an EAGLE-3 head")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--limit", type=int, default=6, help="number of Haast's built-in prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tie", type=float, default=0.5, help="logits closer than this may swap")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per run")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    found = checked(check, arguments)
    print(f"the two files hold {'the same' if found['same_tensors'] else 'DIFFERENT'} tensors")
    print("Haast, unpacked weights:", "accepted {accepted} of {drafted} drafts".format(**found["haast"]))
    for each in found["roads"]:
        print(f"{each['road']:15s} accepted {each['accepted']} of {each['drafted']} drafts", end="; ")
        print(f"{each['texts_equal']} of {each['prompts']} texts equal, differences: {each['differences']}")
    gaps = [one for each in found["roads"] for one in each["differences"] if one["gap"] > arguments.tie]
    if gaps or not found["same_tensors"] or not all(each["accepted"] for each in found["roads"]):
        raise SystemExit("FAILED: see above")


if __name__ == "__main__":
    main()
