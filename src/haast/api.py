"""The main class, `Haast`: generates text from strings, chat messages or token ids, with statistics."""

from __future__ import annotations

import difflib
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Unpack, cast, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haast.core import SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.factory import check_corpus, find_head, make_drafter, open_head, plan_drafter
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import PREFILL_CHUNK, Engine, check_prompts
from haast.engine.scheduler import Scheduler, check_limits
from haast.errors import CancelledError, PromptError, QueueFullError
from haast.formats.mtp import MTP
from haast.generation import (
    Generation,
    Ids,
    Message,
    Piece,
    Prompt,
    Prompts,
    Settings,
    TextRequest,
    collect,
    split_prompts,
)
from haast.integrations.arguments import check_model
from haast.integrations.decoder import Decoder
from haast.stats import Stats
from haast.target.device_map import Placement, execution_device
from haast.target.kv_budget import KVBudget
from haast.target.load import DEFAULT_MODEL, check_compile, load_target, resolve
from haast.target.support import own_model
from haast.target.target import Target
from haast.text import StopWatch, TextStream, checked_stops
from haast.tuning.calibration import Calibration

__all__ = ["Generation", "Haast", "Piece", "Prompt", "find_head"]
MAX_BATCH = 256  # requests that are decoded at once


class Haast:
    """A loaded target with its drafter. Any number of threads and tasks may call it; it batches their requests.

    Create it with `from_pretrained`; the constructor takes parts that are already loaded.

    Attributes:
        target, drafter: the model that generates, and the drafter for it.
        engine: decodes the requests.
    """

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.target, self.drafter, self.engine = target, drafter, Engine(target, drafter)
        self._tokenizing = threading.Lock()  # a call of a fast tokenizer changes its state

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
        corpus: str | Path | None = None,
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
            head: a head's folder; "default" is the one shipped for the default model, "mtp" the one in the model's own
                checkpoint (docs/heads.md); None for no head.
            drafter: "auto" is "eagle+suffix" with an EAGLE head, else "suffix", which drafts repetitions of earlier
                text. Also "eagle", "block", "medusa", "lookup", "lookahead", "small-model" and "none", which decodes
                without drafts; see `haast.drafters.factory`. Drafts that cost more time than they save are skipped.
            small: for "small-model", a smaller model of the same tokenizer, by name (loaded as `model` is) or loaded.
            tokenizer: for a loaded model; a model given by name has its own.
            shape: fixed shape of a head's draft trees: chain, static or dynamic, and its size. None chooses the
                fastest.
            calibration: how to choose the shape if none is given. "auto" uses the result of `haast calibrate`, else
                costs that are measured at first use (a few seconds) and cached; "off" measures nothing and drafts a
                small tree on a CPU, 60 nodes elsewhere; otherwise the path of a calibration file.
            draft_window: number of positions that an EAGLE head attends to, which bounds its memory and time. None is
                the whole text.
            corpus: for "auto", "eagle+suffix" and "suffix", a file of earlier answers to draft from too. It is created
                if missing, grows with every answer, and is bounded; one process at a time may use it.
            dtype, device, packing: see `load_target`; only for models given by name.
            device_map, max_memory, offload_folder, tensor_parallel: see `haast.target.device_map.Placement`; only for
                models given by name. Transformers may have spread a loaded model already (docs/devices.md).
            compile: "on" compiles the decoder layers of target and head, "auto" does so on CUDA, "off" does not. A
                loaded model itself stays uncompiled.
            kv_tokens, kv_bytes: size of the KV pool for all requests together, in tokens or bytes; by default a
                quarter of the free memory. Requests wait for free blocks.
            kv_dtype: "auto", "float16" or "bfloat16", see `haast.target.kv_budget.KVBudget`.
            max_batch: requests that are decoded at once; others wait.
            max_waiting: requests that may wait in addition to `max_batch`; more are refused. None is no limit.

        Raises:
            ValueError: a setting, model or head is not usable; the message has the remedy.
        """
        KVBudget(kv_tokens, kv_bytes, kv_dtype=kv_dtype)
        check_limits(max_batch, max_waiting)
        # Check what can be checked before the model loads.
        if isinstance(model, str):
            resolve(model)
        if calibration not in ("auto", "off"):
            Calibration.load(Path(calibration))
        requested = "none" if isinstance(drafter, Drafter) else drafter
        known = model if isinstance(model, str) else (model.name_or_path or None if head == MTP else None)
        name, folder = plan_drafter(requested, head, known, small is not None)
        check_corpus(name, corpus)
        placement = Placement(device_map, max_memory, offload_folder, tensor_parallel)
        load = partial(load_target, dtype=dtype, device=device, packing=packing)
        if isinstance(model, str):
            target = load(model, compile=compile, placement=placement)
        else:
            target = _wrap_model(model, tokenizer, compile, placement)
        target.use_pool(kv_tokens, size=kv_bytes, kv_dtype=kv_dtype)
        target.scheduler = Scheduler(target, max_batch, max_waiting)
        if isinstance(drafter, Drafter):
            return cls(target, drafter)
        if isinstance(small, str):
            draft_model: Target | None = load(small)
        else:
            draft_model = None if small is None else Target(own_model(small), tokenizer)
        opened = open_head(folder, None)
        loaded_drafter = make_drafter(
            name,
            target,
            opened,
            shape=shape,
            window=draft_window,
            small=draft_model,
            calibration=calibration,
            corpus=corpus,
        )
        return cls(target, loaded_drafter)

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
        """Generate text for one or several prompts; the output is that of vanilla decoding with the same settings.

        Args:
            prompt: a string, chat messages (`{"role": ..., "content": ...}`), or token ids as a list, tensor or array;
                or a list of these. A tensor or array of two dimensions has one prompt per row, without padding.
            n: number of texts per prompt, with random streams derived from the seed. They share the prefill; the
                first is the text that the prompt gives without `n`.
            **settings: see `Settings`.

        Returns:
            A `Generation`, or a list of n with `n`. For a list of prompts, a list with the result of each.

        Raises:
            ValueError: wrong settings. PromptError: a prompt that can't be answered. KVPoolError: prompt and new
                tokens could never fit the KV pool. QueueFullError: more texts than may run and wait.
            Exception: raised by a processor; this cancels the other texts of the call, but not other calls.
        """
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise ValueError(f"n={n!r} is not allowed: give 1 text or more for each prompt")
        prompts, single = split_prompts(prompt)
        texts = self._prepare(prompts, n or 1, None, **settings)
        most = self.engine.scheduler.max_requests
        if most is not None and len(texts) > most:
            raise QueueFullError(
                f"{len(texts)} texts in one call, but only {most} may run and wait: ask for fewer, or raise max_batch "
                f"or max_waiting"
            )
        try:
            for text in texts:
                self.engine.start(text.request)
            results = [collect(self._pieces(text), text.request.stats) for text in texts]
        finally:
            for text in texts:
                if not text.request.finished:
                    self.engine.cancel(text.request)
        if n is None:
            return results[0] if single else results
        grouped = [results[start : start + n] for start in range(0, len(results), n)]
        return grouped[0] if single else grouped

    def stream(
        self, prompt: Prompt, *, stats: Stats | None = None, **settings: Unpack[Settings]
    ) -> Generator[Piece, None, None]:
        """Like `generate` for one prompt, but yields the text in pieces as tokens are accepted.

        The request starts when the first piece is requested, and is cancelled when the iterator is closed or dropped.

        Args:
            prompt: see `generate`.
            stats: updated while the text is generated.
            **settings: see `Settings`.

        Raises:
            CancelledError: the `timeout` has passed; all pieces up to then were yielded. Otherwise see `generate`.
        """
        return self._pieces(self._prepare([_single(prompt)], 1, stats, **settings)[0], start=True)

    def astream(
        self, prompt: Prompt, *, stats: Stats | None = None, **settings: Unpack[Settings]
    ) -> AsyncGenerator[Piece, None]:
        """Like `stream`, for asyncio: does not block the event loop while the model runs."""
        return self._apieces(self._prepare([_single(prompt)], 1, stats, **settings)[0])

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of one prompt. Raises PromptError for text without a tokenizer, an empty prompt, or several."""
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
            try:
                encoded: Any = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            except Exception as error:  # a template is code of its own, which can raise anything
                raise PromptError(
                    f"the model's chat template can't take these messages ({type(error).__name__}: {error}): give each "
                    "a role and a content, both text, in an order that the template knows"
                ) from error
        return list(encoded["input_ids"])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer. Raises PromptError if it has none."""
        if self.target.tokenizer is None:
            raise PromptError("this target was loaded without a tokenizer: pass token ids, or give a tokenizer")
        return self.target.tokenizer

    @property
    def custom_generate(self) -> Decoder:
        """A `custom_generate` for transformers' `generate` on `target.model`; see `haast.integrations`."""
        return Decoder.of(self.target, self.drafter)

    def eos_ids(self) -> tuple[int, ...]:
        """The model's end-of-text token ids."""
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
        **fields: Any,
    ) -> list[TextRequest]:
        """Check the arguments and create `n` requests per prompt, not queued yet. `fields` are of `SamplingParams`."""
        if sampling is not None and fields:
            raise ValueError(f"sampling was given with {', '.join(sorted(fields))}: put them into SamplingParams")
        for name in fields.keys() - Settings.__annotations__.keys():
            similar = difflib.get_close_matches(name, Settings.__annotations__, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"it takes {', '.join(Settings.__annotations__)}"
            hint = "set it when the model is loaded, by from_pretrained" if name == "drafter" else hint
            raise TypeError(f"generate has no argument {name!r}: {hint}")
        if "processors" in fields:
            fields["processors"] = tuple(fields["processors"])
        params = sampling or SamplingParams(**fields)
        check_model(self.target.model)
        encoded = [self._encode(prompt, chat) for prompt in prompts]
        check_prompts(encoded, self.target.context_length, self.target.vocab_size)
        ends = self.eos_ids() if eos is None else _checked_eos(eos, self.target.vocab_size)
        tokenizer, texts, stops = self.target.tokenizer, [], tuple[str, ...]()
        if stop or isinstance(stop, str):
            if tokenizer is None:
                raise PromptError("stop strings need a tokenizer: give one, or stop by eos ids")
            stops = checked_stops(tokenizer, stop)
        for ids, choice in product(encoded, range(n)):
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
            texts.append(TextRequest(request, None if tokenizer is None else TextStream(tokenizer, stops)))
        return texts

    def _pieces(self, text: TextRequest, start: bool = False) -> Generator[Piece, None, None]:
        if start:
            self.engine.start(text.request)
        with closing(self.engine.read(text.request)) as emissions:
            try:
                for emission in emissions:
                    yield from text.pieces(emission)
            except CancelledError:
                yield text.rest()
                raise

    async def _apieces(self, text: TextRequest) -> AsyncGenerator[Piece, None]:
        self.engine.start(text.request)
        async with aclosing(self.engine.aread(text.request)) as emissions:
            try:
                async for emission in emissions:
                    for piece in text.pieces(emission):
                        yield piece
            except CancelledError:
                yield text.rest()
                raise


def _single(prompt: Prompt) -> str | list[int] | list[Message]:
    prompts, _ = split_prompts(prompt)
    if len(prompts) != 1:
        raise PromptError(f"{len(prompts)} prompts where one is expected: give one at a time, or use `generate`")
    return prompts[0]


def _checked_eos(eos: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The end tokens, checked. Raises ValueError."""
    if not isinstance(eos, Sequence) or isinstance(eos, str):
        raise ValueError(f"eos={eos!r} is not allowed: give a list of token ids")
    for each in eos:
        if not isinstance(each, int) or not 0 <= each < vocab_size:
            raise ValueError(f"eos holds {each!r}: give token ids in 0..{vocab_size - 1}")
    return tuple(eos)


def _wrap_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, compile: str, placement: Placement
) -> Target:
    """A target for a loaded model. Raises ValueError for a placement: the model lies where its user has put it."""
    if placement:
        raise ValueError(
            "device_map and tensor_parallel are for models given by name: spread a loaded model with transformers"
        )
    model = own_model(model)
    compiled = check_compile(compile, "float32", str(execution_device(model) or "cpu"), "off")
    target = Target(model, tokenizer)
    if compiled and not (target.spread and compile == "auto"):
        target.use_compiled_layers()
    return target
