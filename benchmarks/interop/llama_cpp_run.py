"""An exported EAGLE-3 head in llama.cpp: both roads load, draft, and leave the text as it is.

    cmake --build llama-build --target llama-speculative-simple llama-simple
    python -m venv .venv-llama && .venv-llama/bin/pip install -r benchmarks/interop/requirements-llama_cpp.txt
    python benchmarks/interop/llama_cpp_run.py --sources llama.cpp --bin llama-build/bin \
        --python .venv-llama/bin/python --target SmolLM2-135M-Instruct.Q4_1.gguf --head my-head \
        --json results/interop-llama-cpp.json

The roads: `haast export --to gguf`, a file that llama.cpp loads as it is; and `--to llama.cpp`, a folder for its own
`convert_hf_to_gguf.py`. Both files are read again and compared, tensor by tensor. Then `llama-speculative-simple`
answers a few prompts greedily with each, and `llama-simple` without a head. Texts are compared; where they part, the
gap of the target's two best logits there, by stock transformers, is told: llama.cpp multiplies in 8 bits, and with
other kernels where it verifies several tokens at once, so that close ones change places. Haast's own counts, on the
weights unpacked, stand beside. Ends with 1 where a file does not load, nothing is accepted, or texts part at a gap
above `--tie`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from sides import OtherSideError, answers, checked, differences, environment, run

from haast.api import Haast, find_head
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.formats.export import GGUF_FILE, export_head
from haast.formats.gguf import read_gguf
from haast.formats.opened import OpenedHead, open_head
from haast.formats.probe import PROMPTS
from haast.heads.checkpoint import Head
from haast.target.load import DEFAULT_MODEL, config_on_disk, hub_name, load_target, read_config
from haast.target.target import Target

_COUNTS = re.compile(r"n_(drafted|accept)\s*=\s*(\d+)")


def opened(given: argparse.Namespace, target: Target) -> Head:
    """The user's head."""
    place = find_head(given.head, given.model)
    assert place is not None, "a head was named"
    head = open_head(place)
    return head.fitted(target)[0] if isinstance(head, OpenedHead) else head


def files_of(given: argparse.Namespace, head: Head, folder: Path) -> dict[str, Path]:
    """The head as a GGUF file, by each of the roads."""
    config, name = read_config(given.model), hub_name(given.model)
    export_head(head, "gguf", name, config, folder / "gguf")
    export_head(head, "llama.cpp", name, config, folder / "folder")
    converted = folder / "converted.gguf"
    script, target = given.sources / "convert_hf_to_gguf.py", str(config_on_disk(given.model))
    command = [str(given.python), str(script), str(folder / "folder"), "--target-model-dir", target]
    done = run([*command, "--outfile", str(converted), "--outtype", "f16"], given.timeout)
    if done.returncode:
        raise OtherSideError(f"{script.name} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return {"--to gguf": folder / "gguf" / GGUF_FILE, "--to llama.cpp": converted}


def same_files(one: Path, other: Path) -> bool:
    """Whether two GGUF files hold the same tensors."""
    ours, theirs = (read_gguf(path, path.name).tensors for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def answer(given: argparse.Namespace, prompt: str, head: Path | None) -> tuple[str, dict[str, int]]:
    """The text that follows a prompt, and what was drafted and accepted."""
    if head is None:
        name, words = "llama-simple", ["-m", str(given.target), "-n", str(given.max_new_tokens), prompt]
    else:
        name, words = "llama-speculative-simple", ["-m", str(given.target), "-md", str(head), "-p", prompt]
        words += ["--spec-type", "draft-eagle3", "--spec-draft-n-max", str(given.depth), "--temp", "0"]
        words += ["-n", str(given.max_new_tokens), "-c", "2048", "-t", str(given.threads), "-td", str(given.threads)]
    done = run([str(given.bin / name), *words], given.timeout)
    if done.returncode:
        raise OtherSideError(f"{name} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    counts = {key: int(value) for key, value in _COUNTS.findall(done.stderr)}
    return done.stdout.partition(prompt)[2].rstrip("\n"), counts


def check(given: argparse.Namespace) -> dict[str, Any]:
    """All prompts, without the head and with it as it came by each road. Raises OtherSideError, ValueError."""
    if not given.target.is_file():
        raise ValueError(f"no GGUF file at {given.target}: give the target's, as --target")
    target = load_target(given.model, packing="off")
    head = opened(given, target)
    model = Haast(target, head_drafter(target, head, DraftShape(kind="chain", depth=given.depth)))
    texts = [
        str(
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": each}], tokenize=False, add_generation_prompt=True
            )
        )
        for each in PROMPTS[: given.limit]
    ]
    prompts = [list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    with tempfile.TemporaryDirectory() as temporary:
        files = files_of(given, head, Path(temporary))
        same = same_files(*files.values())
        plain = [answer(given, text, None)[0] for text in texts]
        found = {road: [answer(given, text, file) for text in texts] for road, file in files.items()}
    _, stats = answers(model, prompts, given.max_new_tokens)
    rows = [row(given, road, plain, said, model, prompts) for road, said in found.items()]
    settings = {name: getattr(given, name) for name in ("depth", "max_new_tokens", "limit", "threads")}
    return {
        "kind": "interop-llama-cpp",
        "head": Path(given.head).name,
        "target": given.target.name,
        "same_tensors": same,
        "roads": rows,
        "haast": {"drafted": given.depth * stats.reached_by_depth[0], "accepted": sum(stats.accepted_by_depth)},
        "environment": environment({"llama.cpp": "of llama-cpp-python 0.3.36"}, settings) | {"packing": "llama.cpp's"},
    }


def row(
    given: argparse.Namespace,
    road: str,
    plain: list[str],
    answers: list[tuple[str, dict[str, int]]],
    model: Haast,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """What one road's file did."""
    # llama-speculative-simple stops after whole drafts, a few tokens late; llama-simple counts its first token.
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
        "differences": differences(given.model, prompts, *ids),
    }


def main() -> None:
    """Run, compare, write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sources", type=Path, required=True, help="llama.cpp's own folder, for its converter")
    words.add_argument("--bin", type=Path, required=True, help="where its programs were built")
    words.add_argument("--python", type=Path, required=True, help="the interpreter of the converter's environment")
    words.add_argument("--target", type=Path, required=True, help="the target as a GGUF file")
    words.add_argument("--model", default=DEFAULT_MODEL, help="the same target for Haast")
    words.add_argument("--head", required=True, help="an EAGLE-3 head")
    words.add_argument("--depth", type=int, default=3)
    words.add_argument("--limit", type=int, default=6, help="prompts, of a few of Haast's own")
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--tie", type=float, default=0.5, help="logits closer than this may change places")
    words.add_argument("--timeout", type=float, default=300.0, help="seconds for one run")
    words.add_argument("--json", required=True)
    given = words.parse_args()
    found = checked(check, given)
    print(f"the two files hold {'the same' if found['same_tensors'] else 'OTHER'} tensors")
    print("Haast, without 4 bits:", "accepted {accepted} of {drafted} drafts".format(**found["haast"]))
    for each in found["roads"]:
        print(f"{each['road']:15s} accepted {each['accepted']} of {each['drafted']} drafts", end="; ")
        print(f"{each['texts_equal']} of {each['prompts']} texts equal, others part at {each['differences']}")
    parted = [one for each in found["roads"] for one in each["differences"] if one["gap"] > given.tie]
    if parted or not found["same_tensors"] or not all(each["accepted"] for each in found["roads"]):
        raise SystemExit("NOT as it should be: see above")


if __name__ == "__main__":
    main()
