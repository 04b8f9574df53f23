"""Worker process of one peer: reads {"ids": [...], "new": 128} as lines of JSON, writes tokens and times.

Owns how each peer is loaded and called. Everything is greedy, batch 1, two threads by default. The timer starts with
the call, and `ms_first` is the time to the first new token. Started by run.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Answers a prompt and yields new tokens as they come. A peer without streaming first generates one token, yields the
# seconds that it took, and then generates the whole answer again; that time is its time to the first token.
Answer = Callable[[list[int], int], Iterator[list[int] | float]]

_PROCESSES = ["self"]  # whose memory is a peer's


def haast(kind: str, weights: Path, threads: int) -> Answer:
    import torch

    from haast.api import Haast
    from haast.core import SamplingParams
    from haast.engine.engine import Engine, StopParams

    torch.set_num_threads(threads)
    _, drafter, packing = kind.split()
    vanilla = drafter == "vanilla"
    options: dict[str, Any] = {} if vanilla else {"drafter": drafter}
    model = Haast.from_pretrained(head=None if vanilla else "default", packing=packing, **options)
    ends = model.eos_ids()

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        model.target.pool.clear()  # compute the whole prompt, as the peers do
        for emission in Engine(model.target, model.drafter).run([ids], SamplingParams(), StopParams(new, ends)):
            yield list(emission.tokens)

    return answer


def hf(kind: str, weights: Path, threads: int) -> Answer:
    import queue
    import threading

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(weights / "hf", dtype=torch.bfloat16 if "bf16" in kind else torch.float32).eval()
    more = {"prompt_lookup_num_tokens": 10} if "lookup" in kind else {}

    class Pipe(BaseStreamer):
        def __init__(self) -> None:
            self.items: queue.Queue[list[int] | None] = queue.Queue()
            self.first = True

        def put(self, value: Any) -> None:
            if not self.first:
                self.items.put(value.reshape(-1).tolist())
            self.first = False

        def end(self) -> None:
            self.items.put(None)

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        pipe, inputs = Pipe(), torch.tensor([ids])
        arguments = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(inputs), **more}
        work = threading.Thread(target=model.generate, args=(inputs,), kwargs={**arguments, "streamer": pipe})
        work.start()
        while (item := pipe.items.get()) is not None:
            yield item
        work.join()

    return answer


def llama_cpp(kind: str, weights: Path, threads: int) -> Answer:
    from llama_cpp import Llama

    name = kind.removeprefix("llama.cpp ").lower()
    model = Llama(str(weights / f"{name}.gguf"), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    end = model.token_eos()

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        model.reset()
        for count, token in enumerate(model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), start=1):
            yield [int(token)]
            if token == end or count >= new:
                return

    return answer


def llama_server(kind: str, weights: Path, threads: int) -> Answer:
    """llama.cpp's server, which drafts by the n-gram methods that its Python binding lacks; from PATH."""
    import atexit
    import http.client
    import socket
    import subprocess

    _, name, method = kind.split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--model": weights / f"{name.lower()}.gguf",
        "--port": port,
        "--threads": threads,
        "--threads-batch": threads,
        "--ctx-size": 2048,
        "--parallel": 1,
        "--spec-type": method.removeprefix("server:"),
    }
    command = ["llama-server", *(str(part) for pair in options.items() for part in pair)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    _PROCESSES.append(str(server.pid))
    while True:  # until it has loaded
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                break
        except ConnectionError:
            if server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {server.returncode}") from None
        time.sleep(0.1)

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        body = {"prompt": ids, "n_predict": new, "temperature": 0, "top_k": 1, "repeat_penalty": 1.0}
        more = {"stream": True, "cache_prompt": False, "return_tokens": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body | more), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["tokens"]

    return answer


def ort(kind: str, weights: Path, threads: int) -> Answer:
    import onnxruntime_genai as og

    config = og.Config(str(weights / f"ort-{kind.split()[-1]}"))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(overlay))
    model = og.Model(config)

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + new, do_sample=False)
        generator = og.Generator(model, options)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            yield [int(generator.get_next_tokens()[0])]

    return answer


def openvino(kind: str, weights: Path, threads: int) -> Answer:
    import queue
    import threading

    import numpy as np
    import openvino as ov
    import openvino_genai as ovg

    name = kind.removeprefix("openvino ").lower()
    pipeline = ovg.LLMPipeline(str(weights / f"{name}.gguf"), "CPU", INFERENCE_NUM_THREADS=threads)

    class Pipe(ovg.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.items: queue.Queue[list[int] | None] = queue.Queue()

        def write(self, token: Any) -> Any:
            self.items.put(list(token) if isinstance(token, list) else [int(token)])
            return ovg.StreamingStatus.RUNNING

        def end(self) -> None:
            self.items.put(None)

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        pipe = Pipe()
        inputs = ovg.TokenizedInputs(
            ov.Tensor(np.array([ids], dtype=np.int64)), ov.Tensor(np.ones((1, len(ids)), dtype=np.int64))
        )
        config = ovg.GenerationConfig(max_new_tokens=new, do_sample=False, apply_chat_template=False)
        work = threading.Thread(target=pipeline.generate, args=(inputs, config, pipe))
        work.start()
        while (item := pipe.items.get()) is not None:
            yield item
        work.join()

    return answer


def economize(kind: str, weights: Path, threads: int) -> Answer:
    import economize as eco
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    load: Any = AutoModelForCausalLM.from_pretrained
    stock = load(weights / "hf", dtype=torch.float32).eval()
    model = eco.apply(stock, *([eco.techniques.lookup.LookupConfig()] if "lookup" in kind else []))

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        inputs = torch.tensor([ids])
        begin = time.perf_counter()
        model.generate(inputs, max_new_tokens=1, do_sample=False)
        yield time.perf_counter() - begin
        output: Any = model.generate(inputs, max_new_tokens=new, do_sample=False)
        yield list(output[0, len(ids) :].tolist())

    return answer


def vllm(kind: str, weights: Path, threads: int) -> Answer:
    from vllm import LLM, SamplingParams

    model = LLM(str(weights / "hf"), dtype="float32", max_model_len=2048)

    def ask(ids: list[int], new: int) -> list[int]:
        outputs = model.generate(
            {"prompt_token_ids": ids}, SamplingParams(temperature=0.0, max_tokens=new), use_tqdm=False
        )
        return list(outputs[0].outputs[0].token_ids)

    def answer(ids: list[int], new: int) -> Iterator[list[int] | float]:
        begin = time.perf_counter()
        ask(ids, 1)
        yield time.perf_counter() - begin
        yield ask(ids, new)

    return answer


PEERS: dict[str, Callable[[str, Path, int], Answer]] = {
    "haast vanilla f16": haast,
    "haast eagle f16": haast,
    "haast eagle+suffix f16": haast,
    "haast vanilla gguf": haast,
    "haast eagle gguf": haast,
    "haast eagle+suffix gguf": haast,
    "transformers fp32": hf,
    "transformers bf16": hf,
    "transformers fp32 lookup": hf,
    "llama.cpp F16": llama_cpp,
    "llama.cpp Q8_0": llama_cpp,
    "llama.cpp Q4_1": llama_cpp,
    "llama.cpp Q4_1 server:none": llama_server,
    "llama.cpp Q4_1 server:ngram-simple": llama_server,
    "llama.cpp Q4_1 server:ngram-mod": llama_server,
    "llama.cpp Q4_1 server:ngram-cache": llama_server,
    "onnxruntime-genai fp32": ort,
    "onnxruntime-genai int4": ort,
    "openvino F16": openvino,
    "openvino Q8_0": openvino,
    "openvino Q4_1": openvino,
    "economize": economize,
    "economize lookup": economize,
    "vllm fp32": vllm,
}


def main() -> None:
    """Load the peer, then answer requests line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    protocol = sys.stdout
    sys.stdout = sys.stderr  # the output of a peer must not mix with the protocol
    begin = time.perf_counter()
    try:
        answer = PEERS[arguments.peer](arguments.peer, arguments.weights, arguments.threads)
    except Exception as error:  # any error makes the peer absent; the others go on
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=protocol, flush=True)
        return
    print(json.dumps({"loaded_s": time.perf_counter() - begin}), file=protocol, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_timed(answer, request["ids"], request["new"])), file=protocol, flush=True)


def _timed(answer: Answer, ids: list[int], new: int) -> dict[str, Any]:
    start = time.perf_counter()
    tokens, first_s = list[int](), None
    for piece in answer(ids, new):
        if isinstance(piece, float):
            first_s, start = piece, time.perf_counter()
            continue
        if first_s is None and piece:
            first_s = time.perf_counter() - start
        tokens.extend(piece)
    whole_s = time.perf_counter() - start
    first_s = whole_s if first_s is None else first_s
    return {"tokens": tokens, "ms_first": 1e3 * first_s, "ms_rest": 1e3 * (whole_s - first_s), "peak_mb": _peak()}


def _peak() -> float:
    """Peak memory in MB. Not `ru_maxrss`, which a process inherits from who starts it."""
    statuses = [Path(f"/proc/{process}/status").read_text() for process in _PROCESSES]
    return max(float(re.findall(r"VmHWM:\s*(\d+)", status)[0]) for status in statuses) * 1024 / 1e6


if __name__ == "__main__":
    main()
