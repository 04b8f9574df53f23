"""Structured output of fifty JSON schemas at three temperatures: validity, equality with vanilla, and tau.

    python benchmarks/grammars.py --json results/grammars.json

The server's code answers every question three times: with schema and drafting, with schema but no drafting, and with
drafting but no schema. The jsonschema package checks the texts that were not cut off by length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
from schemas import SCHEMAS, Schema

from haast.api import Haast
from haast.bench.report import environment
from haast.files import check_writable, write_json
from haast.progress import Progress
from haast.serving.config import ServeConfig
from haast.serving.plan import chat_plan
from haast.serving.schema import ChatRequest
from haast.serving.service import Service
from haast.serving.shapes import ChatShape
from haast.serving.streaming import whole


def answer(service: Service, question: str, temperature: float, tokens: int, **more: Any) -> dict[str, Any]:
    """One complete answer, as the response body."""
    body = {
        "messages": [{"role": "user", "content": f"{question} Answer in JSON."}],
        "temperature": temperature,
        "seed": 1,
        "max_tokens": tokens,
        **more,
    }
    plan = chat_plan(ChatRequest.model_validate(body), service.limits)
    writings = service.begin(plan)
    return ChatShape(service, plan, "bench", 0).whole(asyncio.run(whole(writings)), writings)


def row(service: Service, question: str, schema: Schema, temperature: float, tokens: int) -> dict[str, Any]:
    """The result of one schema at one temperature."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    off = {"drafter": "none"}
    drafted = answer(service, question, temperature, tokens, response_format=form)
    vanilla = answer(service, question, temperature, tokens, response_format=form, haast=off)
    free = answer(service, question, temperature, tokens)
    choice = drafted["choices"][0]
    complete, valid = choice["finish_reason"] == "stop", False
    if complete:
        try:
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
            valid = True
        except (ValueError, jsonschema.ValidationError) as error:
            sys.stderr.write(f"not valid: {question} {choice['message']['content']!r} {str(error)[:200]}\n")
    result = {"question": question, "temperature": temperature, "cut": not complete, "valid": valid}
    result["same"] = drafted["choices"] == vanilla["choices"]
    for name, response in (("grammar", drafted), ("free", free)):
        usage = response["usage"]["haast"]
        result[f"{name}_forwards"] = usage["target_forwards"]
        result[f"{name}_tokens"] = response["usage"]["completion_tokens"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", default="0,0.7,1")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, default=len(SCHEMAS))
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    check_writable(arguments.json)
    haast = Haast.from_pretrained()
    service = Service(haast, "smollm2-135m-instruct", ServeConfig())
    rows, temperatures = list[dict[str, Any]](), [float(each) for each in arguments.temperatures.split(",")]
    with Progress("schemas", len(temperatures) * arguments.limit) as progress:
        for temperature in temperatures:
            for question, schema in SCHEMAS[: arguments.limit]:
                rows.append(row(service, question, schema, temperature, arguments.tokens))
                progress.step()
    document = {
        "kind": "grammars",
        "grammars": [summary(rows, temperature) for temperature in temperatures],
        "rows": rows,
        "environment": environment(haast.target, service.name, None, arguments.limit, {"tokens": arguments.tokens}),
    }
    write_json(document, arguments.json)


def summary(rows: list[dict[str, Any]], temperature: float) -> dict[str, Any]:
    """The summary of all schemas at one temperature."""
    own = [each for each in rows if each["temperature"] == temperature]
    tau = {
        f"tau_{name}": (sum(each[f"{name}_tokens"] for each in own) - len(own))
        / max(sum(each[f"{name}_forwards"] for each in own), 1)
        for name in ("grammar", "free")
    }
    uncut = [each for each in own if not each["cut"]]
    return {
        "temperature": temperature,
        "schemas": len(own),
        "cut": len(own) - len(uncut),
        "valid": sum(each["valid"] for each in uncut),
        "same": sum(each["same"] for each in own),
        **tau,
    }


if __name__ == "__main__":
    main()
