"""Decoding method for `generate(custom_generate=...)`: `Decoder`, and `custom_generate`, an instance for any model.

Owns a call: checks, the switch of the model's attention, one request per row. The arguments are those of transformers'
own decoding methods (`GenerationMixin._sample`). docs/drop-in.md lists the supported ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from haast import compat
from haast.drafters.base import Drafter
from haast.drafters.factory import HEADED, check_drafter, make_drafter, needs_head, open_head
from haast.drafters.tree_shape import DraftShape
from haast.engine.engine import Engine, Stats
from haast.engine.tensor_parallel import agreement
from haast.errors import HeadMismatchError, PromptError, UnsupportedArgumentError
from haast.heads.checkpoint import Head
from haast.integrations import arguments
from haast.integrations.model_lock import LockedModel, tree_attention
from haast.integrations.processors import for_rows, refuse_linked
from haast.integrations.rows import Ends, RowChooser, Rows
from haast.target.kv_cache import CACHE_NAMES, is_empty
from haast.target.positions import counting_embeddings
from haast.target.prompt_inputs import PromptInputs, carried
from haast.target.support import has_recurrent_layers, own_model, refuse_unsupported
from haast.target.target import Target


class SignatureHook:
    """A descriptor for `__signature__`, which transformers reads at the start of `generate`.

    Returns the signature of `__call__`. On that occasion `compat.recover_arguments` collects the arguments that
    `generate` does not pass on to callables, and the model and the inputs are checked, before transformers has changed
    anything.
    """

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class itself has its constructor's signature
        passed = compat.recover_arguments(arguments.PARAMETERS, CACHE_NAMES)
        if passed is not None:
            model: Any = passed["self"]
            refuse_unsupported(model)
            arguments.check_model(model)
            config = passed.get("generation_config") or model.generation_config
            arguments.validate_inputs({"stop_strings": config.stop_strings, **passed})
        call = inspect.signature(owner.__call__)
        return call.replace(parameters=list(call.parameters.values())[1:])


class Decoder:
    """A decoding method for `model.generate(..., custom_generate=decoder)`; thread-safe.

    Without a head it decodes for any model that it is called with. With a head it belongs to one model.

    Args:
        model: the target of a head or a drafter, in its final dtype and on its final device.
        head: a head's folder, "default" for the one shipped for the default model, or a loaded `Head`.
        drafter: a name, see `haast.drafters.factory`; or a `Drafter`.
        shape: of a head's trees, for any number of rows; None chooses the fastest on this machine.
        draft_window: number of positions that an EAGLE head attends to; None is all.
        small: the model that drafts for "small-model"; its attention implementation stays switched.

    Attributes:
        stats: of the last call.

    Raises:
        ValueError: an unknown drafter, incompatible arguments, or no head is shipped for the model.
        UnsupportedModelError: see `Target`. HeadMismatchError: the head is another model's, or its files are damaged.
    """

    __signature__ = SignatureHook()

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *,
        head: str | Path | Head | None = None,
        drafter: str | Drafter | None = "auto",
        shape: DraftShape | None = None,
        draft_window: int | None = None,
        small: PreTrainedModel | None = None,
    ) -> None:
        self.stats = Stats()
        self._target: Target | None = None
        self._drafter = drafter if isinstance(drafter, Drafter) else None
        if isinstance(drafter, Drafter):
            if head is not None:
                raise ValueError("give a head or a Drafter, not both")
            self._name = drafter.name
        else:
            self._name = drafter or "auto"
            if head is None:
                self._name = check_drafter(self._name, small=small is not None)
            elif not needs_head(self._name) and check_drafter(self._name, small=True) != "none":
                remedy = f"leave the head out, or choose one of {HEADED}"
                raise ValueError(f"drafter={self._name!r} drafts without a head: {remedy}")
        if head is None and (shape is not None or draft_window is not None):
            raise ValueError("shape and draft_window are options of a head: give a head too")
        if model is None:
            if head is not None or self._drafter is not None or small is not None:
                raise ValueError("a head, a small model or a Drafter drafts for one target: give the model too")
            return
        model = own_model(model)
        refuse_unsupported(model)
        arguments.check_model(model)
        loaded = open_head(head, str(model.name_or_path) or type(model).__name__)
        small_target = None if small is None else Target(own_model(small))
        with tree_attention(model):
            target = Target(model)
            ready = self._drafter or make_drafter(
                self._name, target, loaded, shape=shape, window=draft_window, small=small_target
            )
        self._bind(target, ready)

    @classmethod
    def of(cls, target: Target, drafter: Drafter) -> Decoder:
        """A decoder from a loaded target and its drafter."""
        decoder = cls()
        decoder._name = drafter.name
        decoder._bind(target, drafter)
        return decoder

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle a decoder for any model. Raises TypeError for a decoder of one model."""
        if self._target is not None:
            raise TypeError(
                f"this Decoder belongs to one {type(self._target.model).__name__} of this process, so it cannot be "
                f"copied or pickled: make one where it is needed, from the model there and the head's folder"
            )
        return super().__reduce_ex__(protocol)

    def _bind(self, target: Target, drafter: Drafter) -> None:
        self._target, self._drafter = target, drafter
        self._device_and_dtype = (target.device, target.dtype)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        handover: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Decode the batch that `generate` prepared; transformers calls this.

        Args:
            model: the model that `generate` was called on.
            input_ids: (rows, width), left-padded, one row per sequence to return.
            logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate`.
            synced_gpus: refused if True.
            tokenizer: not used; `generate` needs it for stop strings.
            handover: arguments that transformers does not pass to callables (`compat.recover_arguments`): streamer,
                assistant_model, ...
            model_kwargs: for the model's forward.

        Returns (rows, width + new tokens), or a GenerateDecoderOnlyOutput, as stock `generate` does. Raises
        UnsupportedArgumentError for an argument that Haast does not support, ValueError for invalid inputs.
        """
        more = {"synced_gpus": synced_gpus, **(handover or {})}
        streamer = more.pop("streamer", None) or streamer
        more.pop("tokenizer", None)
        left_padding, inputs = _check_call(model, input_ids, generation_config, model_kwargs, more)
        processors = for_rows(logits_processor, len(left_padding))
        if len(left_padding) > 1:
            refuse_linked(logits_processor, stopping_criteria, processors[0])
        pad = _pad_token(generation_config, stopping_criteria, len(left_padding))
        with tree_attention(model) as locked:
            target, drafter = self._target_and_drafter(model, locked)
            max_new = arguments.new_tokens_allowed(stopping_criteria, input_ids.shape[1], left_padding, target)
            to_longest = pad is None and len(left_padding) > 1
            ends = Ends(stopping_criteria, len(left_padding), max_new, to_longest=to_longest)
            choosers = _row_choosers(input_ids, left_padding, processors, ends, generation_config, target)
            rows, stats = Rows(choosers, ends, streamer, pad or 0), Stats()
            _decode(Engine(target, drafter), rows, stats, inputs)
        self.stats = stats
        return rows.output(input_ids, generation_config)

    def _target_and_drafter(self, model: PreTrainedModel, locked: LockedModel) -> tuple[Target, Drafter]:
        target, drafter = self._target, self._drafter
        if target is None or drafter is None:
            return locked.target_and_drafter(model, self._name, make_drafter)
        if target.model is not model:
            raise HeadMismatchError(
                f"this decoder was made for another model than the {type(model).__name__} that generate was called on: "
                f"make a Decoder for this one"
            )
        target.check_device(self._device_and_dtype)
        return target, drafter


def _check_call(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    more: Mapping[str, Any],
) -> tuple[list[int], PromptInputs | None]:
    """Raise for unsupported arguments and invalid inputs.

    Returns the number of padding tokens before each row, and what the prompt has besides tokens.
    """
    forward_arguments = dict(model_kwargs)
    for name in CACHE_NAMES:  # an empty cache comes from `generate` itself; the user's cache is in `more`
        if (cache := forward_arguments.get(name)) is not None and is_empty(cache):
            del forward_arguments[name]
    arguments.refuse_settings(config)
    if config.use_cache is False and has_recurrent_layers(model):
        raise UnsupportedArgumentError("use_cache=False", "the states of recurrent layers are cached; leave it out")
    names = carried(model, forward_arguments) if input_ids.numel() else ()
    arguments.refuse_arguments({**forward_arguments, **more}, names)
    arguments.check_model(model)
    left_padding = arguments.padding(input_ids, forward_arguments, images=bool(names))
    if any(left_padding) and counting_embeddings(model):
        reason = f"{type(model).__name__} counts padding as positions, so its text depends on it; give each row alone"
        raise UnsupportedArgumentError("padding on the left", reason)
    arguments.check_ids(input_ids, int(model.config.get_text_config().vocab_size))
    if names:
        return left_padding, PromptInputs.of(model, input_ids, model_kwargs, left_padding[0])
    arguments.check_prepared_inputs(model, input_ids, model_kwargs)
    return left_padding, None


def _row_choosers(
    input_ids: Tensor,
    left_padding: list[int],
    processors: list[LogitsProcessorList],
    ends: Ends,
    config: GenerationConfig,
    target: Target,
) -> list[RowChooser]:
    """One `RowChooser` per row. Their seeds come from torch's global generator, so that `manual_seed` repeats a call.

    Raises UnsupportedArgumentError for scores or logits of a tensor-parallel model: only one process has them.
    """
    scores, logits = (
        bool(config.return_dict_in_generate and wanted) for wanted in (config.output_scores, config.output_logits)
    )
    if target.ranks is not None and (scores or logits):
        reason = "with a tensor-parallel model only the first process has them; leave it out"
        raise UnsupportedArgumentError(f"output_{'scores' if scores else 'logits'}=True", reason)
    count = len(left_padding)
    seeds = torch.randint(2**63 - 1, (count,)).tolist() if config.do_sample else [None] * count
    parts = zip(input_ids, left_padding, processors, seeds, strict=True)
    return [
        RowChooser(row, ids, begin, row_processors, ends, seed=seed, keep_scores=scores, keep_logits=logits)
        for row, (ids, begin, row_processors, seed) in enumerate(parts)
    ]


def _decode(engine: Engine, rows: Rows, stats: Stats, inputs: PromptInputs | None) -> None:
    """Decode every row to its end; tokens are streamed as they are emitted. `inputs` are of a single row."""
    ranks = agreement(engine.target.ranks)
    while unfinished := rows.unfinished():
        stops = [row.start_request() for row in unfinished]
        texts, sampling = [row.prompt + row.tokens for row in unfinished], [row.params for row in unfinished]
        with closing(engine.run(texts, sampling, stops, stats, choosers=unfinished, inputs=inputs)) as emissions:
            for emission in emissions:
                unfinished[emission.row].append(emission)
                rows.flush()
        rows.fix_ends(lambda length: ranks.numbers(lambda: (length,))[0])
    rows.finish()


def _pad_token(config: GenerationConfig, criteria: StoppingCriteriaList, rows: int) -> int | None:
    """The pad token after the end of a row; None if no row ends before the longest one.

    Raises PromptError if rows may end at different places and there is no pad token.
    """
    if all(getattr(each, "eos_token_id", None) is None for each in criteria):
        return None
    pad = config.pad_token_id if config.pad_token_id is not None else compat.prepared_pad_token(config)
    if pad is None and rows > 1:
        raise PromptError("rows of the batch end at different places and there is no pad token: give pad_token_id")
    return 0 if pad is None else int(pad)


custom_generate = Decoder()  # for any model, with the suffix drafter
