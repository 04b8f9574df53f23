"""The front door, `Haast`: prompts as text, chat messages or token ids in, text and statistics out."""

from __future__ import annotations

import difflib
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from itertools import product
from pathlib import Path
from typing import Any, Unpack, cast, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haast.core import SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.factory import find_head, make_drafter, open_head, plan_drafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import PREFILL_CHUNK, Engine, check_prompts
from haast.engine.scheduler import Scheduler, check_limits
from haast.errors import CancelledError, PromptError, QueueFullError
from haast.generation import Answer, Generation, Ids, Message, Piece, Prompt, Prompts, Settings, collected, split
from haast.integrations.arguments import check_model
from haast.integrations.decoder import Decoder
from haast.stats import Stats
from haast.target.device_map import Spread, execution_device
from haast.target.kv_budget import KVBudget
from haast.target.load import DEFAULT_MODEL, check_compile, load_target
from haast.target.support import own_model
from haast.target.target import Target
from haast.text import StopWatch, TextStream, checked_stops

__all__ = ["Generation", "Haast", "Piece", "Prompt", "find_head"]
MAX_BATCH = 256  # requests that run at once


class Haast:
    """A target and a drafter, ready to answer: any number of threads and tasks, all requests together.

    Build with `from_pretrained`; the constructor takes parts that are already loaded.

    Attributes:
        target, drafter: the model that answers, and what drafts for it.
        engine: where its requests go.
    """

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.target, self.drafter, self.engine = target, drafter, Engine(target, drafter)
        self._tokenizing = threading.Lock()  # fast tokenizers keep settings of a call in themselves

    @classmethod
    def from_pretrained(
        cls,
        model: str | PreTrainedModel = DEFAULT_MODEL,
        *,
        head: str | Path | None = "default",
        drafter: str | Drafter = "auto",
        small: str | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        shape: DraftShape | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        packing: str = "auto",
        compile: str = "off",
        calibration: str | Path = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | None = None,
        tensor_parallel: bool = False,
        draft_window: int | None = None,
        kv_tokens: int | None = None,
        kv_bytes: int | None = None,
        kv_dtype: str = "auto",
        max_batch: int = MAX_BATCH,
        max_waiting: int | None = None,
    ) -> Haast:
        """Load a target and its head.

        Args:
            model: a name as in `haast.target.load.load_target`, or a loaded transformers causal LM (left as it is: not
                packed, not moved, only its attention implementation is set).
            head: a head's folder; "default" is the one shipped for the default model; None drafts without one.
            drafter: "auto" is the best there is: with an EAGLE head "eagle+suffix", else "suffix", which drafts what
                the text has said before. Also "eagle", "medusa", "lookup", "lookahead", "small-model" and "none", which
                decodes without drafting; see `haast.drafters.factory`. Whatever does not pay here is not drafted.
            small: for "small-model", a smaller model of the same tokenizer, by name (loaded as `model` is) or loaded.
            tokenizer: for a loaded model; a named model brings its own.
            shape: of a head's trees, which are then drafted as they are: chain, static or dynamic, and its size. None
                is what pays here.
            calibration: without a shape: "auto" goes by what `haast calibrate` found, else by costs that are measured
                at first use (a few seconds) and kept; "off" measures nothing and drafts a small tree on a CPU, 60 nodes
                elsewhere; else the file of a calibration.
            draft_window: positions that an EAGLE head looks back; its memory and time then do not grow with the text.
                None is all of the text.
            dtype, device, packing: see `load_target`; they apply to named models.
            device_map, max_memory, offload_folder, tensor_parallel: see `haast.target.device_map.Spread`; of named
                models. A loaded model may have been spread by transformers itself (docs/devices.md).
            compile: "on" compiles the decoder layers of target and head, "auto" does on CUDA, "off" does not; nothing
                stays on a loaded model.
            kv_tokens, kv_bytes: memory for the keys and values of all requests together, as one or the other; a
                quarter of what is free if neither is given. Requests wait for room.
            kv_dtype: "auto", "float16" or "bfloat16", see `haast.target.kv_budget.KVBudget`.
            max_batch: requests that run at once; others wait.
            max_waiting: requests that may wait beside `max_batch`, further ones are refused; None is any number.

        Raises:
            ValueError: a setting, model or head is not usable; the message says what to do.
        """
        KVBudget(kv_tokens, kv_bytes, kv_dtype=kv_dtype)
        check_limits(max_batch, max_waiting)
        wanted = drafter if isinstance(drafter, str) else "none"
        # A wrong name and a broken head are told before the model loads.
        name, folder = plan_drafter(wanted, head, model if isinstance(model, str) else None, small is not None)
        spread = Spread(device_map, max_memory, offload_folder, tensor_parallel)
        if isinstance(model, str):
            target = load_target(model, dtype=dtype, device=device, packing=packing, compile=compile, spread=spread)
        elif spread:
            raise ValueError("device_map and tensor_parallel are for models that are named: load yours spread")
        else:
            target = _target_of(own_model(model), tokenizer, compile)
        target.use_pool(kv_tokens, size=kv_bytes, kv_dtype=kv_dtype)
        target.scheduler = Scheduler(target, max_batch, max_waiting)
        if isinstance(drafter, Drafter):
            return cls(target, drafter)
        if isinstance(small, str):
            drafts: Target | None = load_target(small, dtype=dtype, device=device, packing=packing)
        else:
            drafts = None if small is None else Target(own_model(small), tokenizer)
        made = make_drafter(
            name,
            target,
            open_head(folder, None),
            shape=shape,
            window=draft_window,
            small=drafts,
            calibration=calibration,
        )
        return cls(target, made)

    @overload
    def generate(
        self, prompt: str | Sequence[int] | Sequence[Message], *, n: None = None, **settings: Unpack[Settings]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: str | Sequence[int] | Sequence[Message], *, n: int, **settings: Unpack[Settings]
    ) -> list[Generation]: ...

    @overload
    def generate(self, prompt: Prompts, *, n: None = None, **settings: Unpack[Settings]) -> list[Generation]: ...

    @overload
    def generate(self, prompt: Prompts, *, n: int, **settings: Unpack[Settings]) -> list[list[Generation]]: ...

    @overload
    def generate(self, prompt: Ids, *, n: int | None = None, **settings: Unpack[Settings]) -> Any: ...

    def generate(self, prompt: Prompt | Prompts, *, n: int | None = None, **settings: Unpack[Settings]) -> Any:
        """Answer one prompt, or several together; each text is what vanilla decoding with the same settings gives.

        Args:
            prompt: text, chat messages (`{"role": ..., "content": ...}`), or token ids as a list, tensor or array;
                or a list of these. Tensors and arrays with two dimensions are a prompt a row, without padding.
            n: how many texts for each prompt: those of one seed, numbered. They share the prompt's computation; the
                first one is what the prompt gives without `n`.
            **settings: see `Settings`.

        Returns:
            a `Generation`, with `n` a list of n; for a list of prompts a list of what each one gives.

        Raises:
            ValueError: wrong settings. PromptError: a prompt that can't be answered. KVPoolError: prompt and new
                tokens could never fit the KV pool. QueueFullError: more texts than may run and wait.
            Exception: whatever a processor raised; the call's other texts end then, those of other calls do not.
        """
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise ValueError(f"n={n!r} is not allowed: give 1 text or more for each prompt")
        prompts, single = split(prompt)
        answers = self._prepare(prompts, n or 1, None, **settings)
        most = self.engine.scheduler.max_requests
        if most is not None and len(answers) > most:
            raise QueueFullError(
                f"{len(answers)} texts at once are more than may run and wait here, {most}: ask for fewer, or allow "
                f"more (max_batch, max_waiting)"
            )
        try:
            for answer in answers:
                self.engine.start(answer.request)
            said = [collected(self._listen(answer), answer.request.stats) for answer in answers]
        finally:
            for answer in answers:
                if not answer.request.finished:
                    self.engine.cancel(answer.request)
        if n is None:
            return said[0] if single else said
        grouped = [said[begin : begin + n] for begin in range(0, len(said), n)]
        return grouped[0] if single else grouped

    def stream(
        self, prompt: Prompt, *, stats: Stats | None = None, **settings: Unpack[Settings]
    ) -> Generator[Piece, None, None]:
        """As `generate` for one prompt, piece by piece as text is accepted.

        The request begins with the first piece that is asked for, and ends where the iterator is closed or dropped:
        what came is what was said.

        Args:
            prompt: see `generate`.
            stats: filled as the text grows.
            **settings: see `Settings`.

        Raises:
            CancelledError: the text ran into its `timeout`; all pieces have come. Else see `generate`.
        """
        return self._listen(self._prepare([_single(prompt)], 1, stats, **settings)[0], start=True)

    def astream(
        self, prompt: Prompt, *, stats: Stats | None = None, **settings: Unpack[Settings]
    ) -> AsyncGenerator[Piece, None]:
        """As `stream`, for asynchronous code: the event loop goes on while the model works."""
        return self._astream(self._prepare([_single(prompt)], 1, stats, **settings)[0])

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of one prompt. Raises PromptError: text without a tokenizer, an empty prompt, or several."""
        return self._encode(_single(prompt), chat)

    def _encode(self, prompt: str | list[int] | list[Message], chat: bool) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty")
            if not chat or not self.tokenizer.chat_template:
                with self._tokenizing:
                    return list(self.tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if not prompt or not isinstance(prompt[0], Mapping):
            return cast(list[int], prompt)
        with self._tokenizing:
            encoded: Any = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer. Raises PromptError where there is none."""
        if self.target.tokenizer is None:
            raise PromptError("this target was given without a tokenizer: pass token ids, or give the tokenizer")
        return self.target.tokenizer

    @property
    def custom_generate(self) -> Decoder:
        """For transformers' own `generate` on `target.model`; see `haast.integrations`."""
        return Decoder.of(self.target, self.drafter)

    def eos_ids(self) -> tuple[int, ...]:
        """The token ids with which the model ends a text."""
        return self.target.end_ids

    def _prepare(
        self,
        prompts: Sequence[str | list[int] | list[Message]],
        n: int,
        stats: Stats | None,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams | None = None,
        eos: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        chat: bool = True,
        timeout: float | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        **chosen: Any,
    ) -> list[Answer]:
        """`n` requests for each prompt, checked and not queued yet. `chosen` are `SamplingParams` one by one."""
        if sampling is not None and chosen:
            raise ValueError(f"sampling was given beside {', '.join(sorted(chosen))}: put them into SamplingParams")
        for name in chosen.keys() - Settings.__annotations__.keys():
            alike = difflib.get_close_matches(name, Settings.__annotations__, n=1)
            hint = f"did you mean {alike[0]}?" if alike else f"it takes {', '.join(Settings.__annotations__)}"
            hint = "it is chosen when the model is loaded, by from_pretrained" if name == "drafter" else hint
            raise TypeError(f"generate has no argument {name!r}: {hint}")
        if "processors" in chosen:
            chosen["processors"] = tuple(chosen["processors"])
        params = sampling or SamplingParams(**chosen)
        check_model(self.target.model)
        texts = [self._encode(prompt, chat) for prompt in prompts]
        check_prompts(texts, self.target.context_length, self.target.vocab_size)
        ends = self.eos_ids() if eos is None else _checked_eos(eos, self.target.vocab_size)
        tokenizer, made, stops = self.target.tokenizer, [], tuple[str, ...]()
        if stop or isinstance(stop, str):
            if tokenizer is None:
                raise PromptError("stop strings need a tokenizer: give one, or stop by eos ids")
            stops = checked_stops(tokenizer, stop)
        for ids, choice in product(texts, range(n)):
            watch = StopWatch(self.tokenizer, stops) if stops else None
            request = self.engine.submit(
                ids,
                params,
                StopParams(max_new_tokens, ends, watch),
                choice=choice,
                stats=stats,
                timeout=timeout,
                prefill_chunk=prefill_chunk,
                queued=False,
            )
            made.append(Answer(request, None if tokenizer is None else TextStream(tokenizer, stops)))
        return made

    def _listen(self, answer: Answer, start: bool = False) -> Generator[Piece, None, None]:
        if start:
            self.engine.start(answer.request)
        with closing(self.engine.read(answer.request)) as emissions:
            try:
                for emission in emissions:
                    yield from answer.pieces(emission)
            except CancelledError:
                yield answer.rest()
                raise

    async def _astream(self, answer: Answer) -> AsyncGenerator[Piece, None]:
        self.engine.start(answer.request)
        async with aclosing(self.engine.aread(answer.request)) as emissions:
            try:
                async for emission in emissions:
                    for piece in answer.pieces(emission):
                        yield piece
            except CancelledError:
                yield answer.rest()
                raise


def _single(prompt: Prompt) -> str | list[int] | list[Message]:
    prompts, _ = split(prompt)
    if len(prompts) != 1:
        raise PromptError(f"{len(prompts)} prompts where one is wanted: give them one by one, or all to `generate`")
    return prompts[0]


def _checked_eos(eos: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """End tokens that can come up. Raises ValueError."""
    if not isinstance(eos, Sequence) or isinstance(eos, str):
        raise ValueError(f"eos={eos!r} is not allowed: give a list of token ids")
    for each in eos:
        if not isinstance(each, int) or not 0 <= each < vocab_size:
            raise ValueError(f"eos holds {each!r}: give token ids of 0..{vocab_size - 1}")
    return tuple(eos)


def _target_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, compile: str) -> Target:
    """The target of a model that is loaded already."""
    compiled = check_compile(compile, "float32", str(execution_device(model) or "cpu"), "off")
    target = Target(model, tokenizer)
    if compiled and not (target.spread and compile == "auto"):
        target.use_compiled_layers()
    return target
