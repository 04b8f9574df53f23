"""The library's front door: `Haast.from_pretrained(...).generate(...)` and `.stream(...)`.

Owns what users touch: prompts as text or chat messages, settings as keywords, text and statistics out. Decoding lives
in `engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haast.drafters.base import Drafter
from haast.drafters.calibrated import draft_as_usual
from haast.drafters.eagle import EagleDrafter
from haast.drafters.heads import drafter_with
from haast.drafters.shape import DraftShape, shape_for, usual_nodes
from haast.drafters.vanilla import VanillaDrafter
from haast.dropin.arguments import check_model
from haast.dropin.decoder import Decoder
from haast.engine import PREFILL_CHUNK, Engine, Stats, StopConfig, check_chunk, check_prompts
from haast.errors import PromptError
from haast.heads.checkpoint import check_fits, head_folder, load_head, read_head_config
from haast.models import DEFAULT_MODEL, check_compile, load_target
from haast.past import Past
from haast.placement import execution_device
from haast.sampling import Processor, SamplingConfig
from haast.spreading import Spread
from haast.support import own_model
from haast.target import Target
from haast.text import StopWatch, TextStream, checked_stops

_LOG = logging.getLogger(__name__)
Prompt = str | Sequence[int] | Sequence[dict[str, str]]  # text, token ids, or chat messages


@dataclass(frozen=True)
class Piece:
    """A stretch of new text. `drafted`: its last token was drafted and accepted; else the target's own bonus token."""

    text: str
    drafted: bool
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What one call generated."""

    text: str
    tokens: tuple[int, ...]
    stats: Stats


class Haast:
    """A target and a drafter, ready to answer.

    Build with `from_pretrained`; the constructor takes parts that are already loaded.
    """

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.target = target
        self.drafter = drafter

    @classmethod
    def from_pretrained(
        cls,
        model: str | PreTrainedModel = DEFAULT_MODEL,
        *,
        head: str | Path | None = "default",
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
    ) -> Haast:
        """Load a target and its head.

        Args:
            model: a name as in `haast.models.load_target`, or a loaded transformers causal LM (left as it is: not
                packed, not moved, only its attention implementation is set).
            head: a head's folder; "default" is the one shipped for the default model; None decodes without drafting.
            tokenizer: for a loaded model; a named model brings its own.
            shape: chain, static or dynamic tree and its size; None is what `haast calibrate` found here, else a small
                tree on a CPU, 60 nodes elsewhere.
            calibration: without a shape: "auto", "off", or the file of a calibration. Where it found that drafting
                does not pay here, the text is decoded without.
            draft_window: positions that an EAGLE head looks back; its memory and time then do not grow with the text.
                None is all of the text.
            dtype, device, packing: see `load_target`; they apply to named models.
            device_map, max_memory, offload_folder, tensor_parallel: see `haast.spreading.Spread`; of named models. A
                loaded model may have been spread by transformers itself (docs/devices.md).
            compile: "on" compiles the decoder layers of target and head, "auto" does on CUDA, "off" does not; nothing
                stays on a loaded model.

        Raises:
            ValueError: a setting, model or head is not usable; the message says what to do.
        """
        folder = find_head(head, model if isinstance(model, str) else None)
        if folder is not None:
            read_head_config(folder)  # a broken head is told before the model loads
        spread = Spread(device_map, max_memory, offload_folder, tensor_parallel)
        if isinstance(model, str):
            target = load_target(model, dtype=dtype, device=device, packing=packing, compile=compile, spread=spread)
        elif spread:
            raise ValueError("device_map and tensor_parallel are for models that are named: load yours spread")
        else:
            model = own_model(model)
            compiled = check_compile(compile, "float32", str(execution_device(model) or "cpu"), "off")
            target = Target(model, tokenizer)
            if compiled and not (target.spread and compile == "auto"):
                target.use_compiled_layers()
        if folder is None:
            return cls(target, VanillaDrafter())
        loaded = load_head(folder)
        check_fits(loaded.module.config, target.hidden_size, target.vocab_size, str(target.model.name_or_path))
        if shape is not None:
            return cls(target, drafter_with(target, loaded, shape, draft_window))
        usual = shape_for(usual_nodes(target.device.type))
        drafter = drafter_with(target, loaded, usual, draft_window)
        if isinstance(drafter, EagleDrafter) and not draft_as_usual(target, drafter, calibration):
            _LOG.warning("drafting is slower than decoding without on this machine: decoding without (see calibrate)")
            return cls(target, VanillaDrafter())
        return cls(target, drafter)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        processors: Sequence[Processor] = (),
        eos: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        chat: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Generation:
        """Answer one prompt; the text is what vanilla decoding with the same settings gives.

        Args:
            prompt: text, chat messages (`{"role": ..., "content": ...}`), or token ids.
            max_new_tokens: exact upper bound of new tokens.
            temperature, top_k, top_p, min_p, repetition_penalty, seed, processors: see `SamplingConfig`.
            eos: token ids that end the text; None takes the model's own.
            stop: strings (or one) that end the text; they are cut from it (the tokens keep what completed them).
            chat: put a text prompt through the model's chat template, where it has one.
            prefill_chunk: prompt tokens a forward: fewer take less memory. The text does not depend on it.
        """
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(processors))
        stats = Stats()
        stream = self._pieces(prompt, sampling, max_new_tokens, eos, stop, chat, stats, None, prefill_chunk)
        tokens: list[int] = []
        text = ""
        for piece in stream:
            tokens.extend(piece.tokens)
            text += piece.text
        return Generation(text, tuple(tokens), stats)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        eos: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        chat: bool = True,
        stats: Stats | None = None,
        past: Past | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Iterator[Piece]:
        """As `generate`, piece by piece as text is accepted. Stop iterating at any time: what came is what was said.

        With a `past`, what an earlier text that began the same has left in it is not computed again (see `Session`).
        """
        law = sampling or SamplingConfig()
        return self._pieces(prompt, law, max_new_tokens, eos, stop, chat, stats or Stats(), past, prefill_chunk)

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises:
            PromptError: text without a tokenizer, or an empty prompt.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt, chat)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise PromptError(
                f"the prompt is a {type(prompt).__name__}: give text, a list of token ids (tensor.tolist()), or a list "
                f"of chat messages"
            )
        ids = [item for item in prompt if isinstance(item, int)]
        if len(ids) == len(prompt):
            return ids
        messages = [item for item in prompt if isinstance(item, dict)]
        if len(messages) != len(prompt):
            raise PromptError("a prompt is text, a list of token ids, or a list of chat messages, not a mixture")
        return self._encode_chat(messages)

    def _encode_text(self, text: str, chat: bool) -> list[int]:
        if not text:
            raise PromptError("the prompt is empty")
        if chat and self.tokenizer.chat_template:
            return self._encode_chat([{"role": "user", "content": text}])
        return list(self.tokenizer(text)["input_ids"])

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        encoded: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer. Raises PromptError where there is none."""
        if self.target.tokenizer is None:
            raise PromptError("this target was given without a tokenizer: pass token ids, or give the tokenizer")
        return self.target.tokenizer

    @property
    def custom_generate(self) -> Decoder:
        """For transformers' own `generate` on `target.model`; see `haast.dropin`."""
        return Decoder.of(self.target, self.drafter)

    def eos_ids(self) -> tuple[int, ...]:
        """The token ids with which the model ends a text."""
        config = self.target.model.generation_config
        ids = None if config is None else config.eos_token_id
        if ids is None:
            ids = self.target.config.eos_token_id
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)

    def _pieces(
        self,
        prompt: Prompt,
        sampling: SamplingConfig,
        max_new_tokens: int,
        eos: Sequence[int] | None,
        stop: Sequence[str],
        chat: bool,
        stats: Stats,
        past: Past | None,
        prefill_chunk: int,
    ) -> Iterator[Piece]:
        check_chunk(prefill_chunk)
        check_model(self.target.model)
        ids = self.encode(prompt, chat)
        check_prompts([ids], self.target.context_length, self.target.vocab_size)
        ends = self.eos_ids() if eos is None else _checked_eos(eos, self.target.vocab_size)
        rules = StopConfig(max_new_tokens, ends)
        if not stop and not isinstance(stop, str):
            texts = None if self.target.tokenizer is None else TextStream(self.target.tokenizer)
            return self._run(ids, sampling, rules, texts, stats, past, prefill_chunk)
        if self.target.tokenizer is None:
            raise PromptError("stop strings need a tokenizer: give one, or stop by eos ids")
        stops = checked_stops(self.target.tokenizer, stop)
        rules = replace(rules, stop=StopWatch(self.target.tokenizer, stops))
        texts = TextStream(self.target.tokenizer, stops)
        return self._run(ids, sampling, rules, texts, stats, past, prefill_chunk)

    def _run(
        self,
        ids: list[int],
        sampling: SamplingConfig,
        rules: StopConfig,
        texts: TextStream | None,
        stats: Stats,
        past: Past | None,
        prefill_chunk: int,
    ) -> Iterator[Piece]:
        held: list[int] = []
        engine = Engine(self.target, self.drafter, prefill_chunk=prefill_chunk)
        for emission in engine.run([ids], sampling, rules, stats, past):
            for place, token in enumerate(emission.tokens):
                held.append(token)
                text = "" if texts is None else texts.push(token)
                last = emission.finished and place + 1 == len(emission.tokens)
                if last and texts is not None:
                    text += texts.finish()
                if text or last or texts is None:
                    yield Piece(text, place < emission.drafted, tuple(held))
                    held = []


def _checked_eos(eos: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """End tokens that can come up. Raises ValueError."""
    if not isinstance(eos, Sequence) or isinstance(eos, str):
        raise ValueError(f"eos={eos!r} is not allowed: give a list of token ids")
    for each in eos:
        if not isinstance(each, int) or not 0 <= each < vocab_size:
            raise ValueError(f"eos holds {each!r}: give token ids of 0..{vocab_size - 1}")
    return tuple(eos)


def find_head(head: str | Path | None, model: str | None) -> Path | None:
    """The folder of a head by the user's word. Raises ValueError where "default" names none for this model."""
    if head is None:
        return None
    if head != "default":
        return head_folder(head)
    if model != DEFAULT_MODEL:
        raise ValueError(
            f"no head is shipped for {model or 'a model given as an object'!r}: give its folder, or None to decode "
            f"without drafting (`haast train --model ...` makes a head)"
        )
    return Path(__file__).parent / "data" / "heads" / DEFAULT_MODEL
