"""The callable that `generate(custom_generate=...)` takes: `Decoder`, and the one for any model, `custom_generate`.

Owns the call: checks, the model for the length of it, a request per row. The arguments are those that transformers' own
decoding methods get (`GenerationMixin._sample`). docs/drop-in.md says what is honoured.
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
from haast.integrations.model_lock import LockedModel, borrowed
from haast.integrations.processors import for_rows, refuse_linked
from haast.integrations.rows import Ends, RowChooser, Rows
from haast.target.kv_cache import CACHE_NAMES
from haast.target.support import own_model, refuse_unsupported
from haast.target.target import Target


class SignatureHook:
    """A descriptor for `__signature__`: the signature of `__call__`, and what `generate` keeps put back.

    `compat.recover_arguments` does that when the signature is read. transformers has changed nothing by then, so
    the model and the inputs are checked too.
    """

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class has its constructor's signature, as every class
        given = compat.recover_arguments(arguments.PARAMETERS, CACHE_NAMES)
        if given is not None:
            model: Any = given["self"]
            refuse_unsupported(model)
            arguments.check_model(model)
            config = given.get("generation_config") or model.generation_config
            arguments.validate_inputs({"stop_strings": config.stop_strings, **given})
        call = inspect.signature(owner.__call__)
        return call.replace(parameters=list(call.parameters.values())[1:])


class Decoder:
    """A decoding method for `model.generate(..., custom_generate=decoder)`, from any number of threads.

    Without a head it decodes for any model that it is called with. With one it belongs to one model.

    Args:
        model: the model that a head or a drafter drafts for; in the dtype and on the device where it will run.
        head: a head's folder, "default" for the one shipped for the default model, or a loaded `Head`.
        drafter: a name, see `haast.drafters.factory`; or a ready drafter.
        shape: of a head's trees, for any number of rows; None is what pays here.
        draft_window: positions that an EAGLE head looks back; None is all.
        small: the model that drafts for "small-model"; its attention implementation stays switched.

    Attributes:
        stats: of the last call.

    Raises:
        ValueError: an unknown drafter, what does not go together, or no head is shipped for the model.
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
                raise ValueError("give a head or a ready drafter, not both")
            self._name = drafter.name
        else:
            self._name = drafter or "auto"
            if head is None:
                self._name = check_drafter(self._name, small=small is not None)
            elif not needs_head(self._name) and check_drafter(self._name, small=True) != "none":
                why = f"leave the head out, or choose one of {HEADED}"
                raise ValueError(f"drafter={self._name!r} drafts without a head: {why}")
        if head is None and (shape is not None or draft_window is not None):
            raise ValueError("shape and draft_window are of a head's drafts: give a head too")
        if model is None:
            if head is not None or self._drafter is not None or small is not None:
                raise ValueError("a head, a small model and a ready drafter draft for one model: give it too")
            return
        model = own_model(model)
        arguments.check_model(model)
        loaded = open_head(head, str(model.name_or_path) or type(model).__name__)
        drafts = None if small is None else Target(own_model(small))
        with borrowed(model):
            target = Target(model)
            made = self._drafter or make_drafter(
                self._name, target, loaded, shape=shape, window=draft_window, small=drafts
            )
        self._bind(target, made)

    @classmethod
    def of(cls, target: Target, drafter: Drafter) -> Decoder:
        """A decoder of parts that are loaded already."""
        made = cls()
        made._name = drafter.name
        made._bind(target, drafter)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles a decoder for any model. Raises TypeError where it belongs to one."""
        if self._target is not None:
            raise TypeError(
                f"this Decoder belongs to one {type(self._target.model).__name__} of this process, so it can't be "
                f"copied or pickled: make one where it is needed, from the model there and the head's folder"
            )
        return super().__reduce_ex__(protocol)

    def _bind(self, target: Target, drafter: Drafter) -> None:
        self._target, self._drafter = target, drafter
        self._built = (target.device, target.dtype)

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
        """Decode what `generate` prepared; transformers calls it.

        Args:
            model: that `generate` was called on.
            input_ids: (rows, width), left-padded, one row per sequence that is returned.
            logits_processor, stopping_criteria, generation_config, streamer: as prepared.
            synced_gpus, tokenizer: refused where True; only `generate` itself needs it, for stop strings.
            handover: what transformers keeps from callables (`compat.recover_arguments`): streamer, ...
            model_kwargs: for the model's forward.

        Returns (rows, width + new tokens), or a GenerateDecoderOnlyOutput, as stock `generate` returns. Raises
        UnsupportedArgumentError for an argument that Haast does not honour, ValueError for what can't be answered.
        """
        more = {"synced_gpus": synced_gpus, **(handover or {})}
        streamer = more.pop("streamer", None) or streamer
        more.pop("tokenizer", None)
        begins = _checked(model, input_ids, generation_config, model_kwargs, more)
        processors = for_rows(logits_processor, len(begins))
        if len(begins) > 1:
            refuse_linked(logits_processor, stopping_criteria, processors[0])
        pad = _pad(generation_config, stopping_criteria, len(begins))
        with borrowed(model) as locked:
            target, drafter = self._parts(model, locked)
            most = arguments.new_tokens_allowed(stopping_criteria, input_ids.shape[1], begins, target)
            ends = Ends(stopping_criteria, len(begins), most, together=pad is None and len(begins) > 1)
            choosers = _choosers(input_ids, begins, processors, ends, generation_config, target)
            rows, stats = Rows(choosers, ends, streamer, pad or 0), Stats()
            _decode(Engine(target, drafter), rows, stats)
        self.stats = stats
        return rows.output(input_ids, generation_config)

    def _parts(self, model: PreTrainedModel, locked: LockedModel) -> tuple[Target, Drafter]:
        """The model as a target, and who drafts for it."""
        target, drafter = self._target, self._drafter
        if target is None or drafter is None:
            return locked.parts(model, self._name, make_drafter)
        if target.model is not model:
            raise HeadMismatchError(
                f"this decoder was made for another model than the {type(model).__name__} that generate was called on: "
                f"make a Decoder for this one"
            )
        target.check_device(self._built)
        return target, drafter


def _checked(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    for_model: Mapping[str, Any],
    more: Mapping[str, Any],
) -> list[int]:
    """Refuse what can't be honoured or answered; returns the padding tokens before each row."""
    given = dict(for_model)
    for name in CACHE_NAMES:  # an empty one is what `generate` prepares; the user's own is in `more`
        if (cache := given.get(name)) is not None and cache.get_seq_length() == 0:
            del given[name]
    arguments.refuse_settings(config)
    arguments.refuse_arguments({**given, **more})
    arguments.check_model(model)
    begins = arguments.padding(input_ids, given)
    arguments.check_ids(input_ids, int(model.config.get_text_config().vocab_size))
    arguments.check_own_inputs(model, input_ids, for_model)
    return begins


def _choosers(
    input_ids: Tensor,
    begins: list[int],
    processors: list[LogitsProcessorList],
    ends: Ends,
    config: GenerationConfig,
    target: Target,
) -> list[RowChooser]:
    """One per row; what is drawn is drawn by seeds from torch's own generator, so that a call can be repeated.

    Raises UnsupportedArgumentError for scores or logits where only one of several processes has them.
    """
    scores, logits = (
        bool(config.return_dict_in_generate and wanted) for wanted in (config.output_scores, config.output_logits)
    )
    if target.ranks is not None and (scores or logits):
        why = "of the processes that hold a tensor-parallel model only the first one chooses tokens; leave it out"
        raise UnsupportedArgumentError(f"output_{'scores' if scores else 'logits'}=True", why)
    count = len(begins)
    seeds = torch.randint(2**63 - 1, (count,)).tolist() if config.do_sample else [None] * count
    parts = zip(input_ids, begins, processors, seeds, strict=True)
    return [
        RowChooser(row, ids, begin, own, ends, seed=seed, keep_scores=scores, keep_logits=logits)
        for row, (ids, begin, own, seed) in enumerate(parts)
    ]


def _decode(engine: Engine, rows: Rows, stats: Stats) -> None:
    """Run every row to its end; tokens are streamed as they come."""
    agreed = agreement(engine.target.ranks)
    while left := rows.unfinished():
        stops = [row.begun() for row in left]
        texts, sampling = [row.prompt + row.tokens for row in left], [row.params for row in left]
        with closing(engine.run(texts, sampling, stops, stats, choosers=left)) as emissions:
            for emission in emissions:
                left[emission.row].take(emission)
                rows.flush()
        rows.settle(lambda own: agreed.numbers(lambda: (own,))[0])
    rows.finish()


def _pad(config: GenerationConfig, criteria: StoppingCriteriaList, rows: int) -> int | None:
    """The token after the end of a row, None where rows go on until all are done. Raises PromptError where none is
    known.
    """
    if all(getattr(each, "eos_token_id", None) is None for each in criteria):
        return None
    pad = config.pad_token_id if config.pad_token_id is not None else compat.prepared_pad_token(config)
    if pad is None and rows > 1:
        raise PromptError("rows of the batch end at different places and there is no pad token: give pad_token_id")
    return 0 if pad is None else int(pad)


custom_generate = Decoder()  # for any model, with the suffix drafter
