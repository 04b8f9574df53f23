"""The callable that `generate(custom_generate=...)` takes: `Decoder`, and the one for any model, `custom_generate`.

Owns the call: checks, the model for the length of it, the engine's run, the output. The arguments are those that
transformers' own decoding methods get (`GenerationMixin._sample`). docs/drop-in.md says what is honoured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

from haast import seams
from haast.cache import CACHE_NAMES
from haast.drafters.base import Drafter
from haast.drafters.calibrated import draft_as_usual
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.lookup import PromptLookupDrafter, SuffixDrafter
from haast.drafters.shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.dropin import arguments
from haast.dropin.handover import HandedOver
from haast.dropin.loan import Loan, borrowed
from haast.dropin.output import Live, assembled
from haast.dropin.processors import for_rows, refuse_linked
from haast.dropin.rows import Ends, Rows
from haast.engine import Engine, Stats, StopConfig
from haast.errors import HeadMismatchError, PromptError
from haast.heads.checkpoint import Head, head_folder, load_head
from haast.support import own_model
from haast.target import Target, choose_attention

_HEADED: dict[str, Callable[[EagleDrafter], Drafter]] = {"eagle": lambda eagle: eagle, "eagle+suffix": HybridDrafter}
_HEADLESS: dict[str, Callable[[Target], Drafter]] = {
    "suffix": lambda target: SuffixDrafter(device=target.device),
    "lookup": lambda target: PromptLookupDrafter(device=target.device),
    "lookahead": lambda target: LookaheadDrafter(target.vocab_size, device=target.device),
    "vanilla": lambda target: VanillaDrafter(),
}


class Decoder:
    """A decoding method for `model.generate(..., custom_generate=decoder)`.

    Without a head it decodes for any model that it is called with. With one it belongs to one model.

    Args:
        model: the model that a head or a drafter drafts for; in the dtype and on the device where it will run.
        head: a head's folder, or a loaded `Head`.
        drafter: without a head "suffix", "lookup", "lookahead" or "vanilla"; with one "eagle" or "eagle+suffix"; or a
            ready drafter. None is "suffix", or "eagle".
        shape: of a head's trees, for any number of rows; None is what `haast calibrate` found here, which may be none,
            else what is usual for the device and the number of rows.
        draft_window: positions that a head looks back; None is all.

    Attributes:
        stats: of the last call.

    Raises:
        ValueError: an unknown drafter, or what does not go together. UnsupportedModelError: see `Target`.
        HeadMismatchError: the head is another model's, or its files are damaged.
    """

    __signature__ = HandedOver()

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *,
        head: str | Path | Head | None = None,
        drafter: str | Drafter | None = None,
        shape: DraftShape | None = None,
        draft_window: int | None = None,
    ) -> None:
        self.stats = Stats()
        self._name = _drafter_name(head is not None, drafter)
        self._target: Target | None = None
        self._drafter = None if not isinstance(drafter, Drafter) else drafter
        if head is None and (shape is not None or draft_window is not None):
            raise ValueError("shape and draft_window are of a head's drafts: give a head too")
        if model is None:
            if head is not None or self._drafter is not None:
                raise ValueError("a head and a ready drafter draft for one model: give it too")
            return
        model = own_model(model)
        arguments.check_model(model)
        loaded = head if head is None or isinstance(head, Head) else _load(head)
        with borrowed(model):
            self._bind(Target(model))
        if loaded is not None:
            assert self._target is not None, "it was bound"
            eagle = EagleDrafter(self._target, loaded, shape, draft_window)
            pays = shape is not None or draft_as_usual(self._target, eagle)
            self._drafter = _HEADED[self._name](eagle) if pays else VanillaDrafter()

    @classmethod
    def of(cls, target: Target, drafter: Drafter) -> Decoder:
        """A decoder of parts that are loaded already."""
        made = cls()
        made._name, made._drafter = drafter.name, drafter
        made._bind(target)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles a decoder for any model. Raises TypeError where it belongs to one."""
        if self._target is not None:
            raise TypeError(
                f"this Decoder belongs to one {type(self._target.model).__name__} of this process, so it can't be "
                f"copied or pickled: make one where it is needed, from the model there and the head's folder"
            )
        return super().__reduce_ex__(protocol)

    def _bind(self, target: Target) -> None:
        self._target = target
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
            logits_processor, stopping_criteria, generation_config: as prepared.
            synced_gpus: refused where True.
            streamer: gets the new tokens one by one; the prompt it has had from `generate`.
            tokenizer: only `generate` itself needs it, for stop strings.
            handover: what transformers keeps from callables (see `handover`): streamer, assistant_model, synced_gpus.
            model_kwargs: for the model's forward.

        Returns:
            (rows, width + new tokens), or a GenerateDecoderOnlyOutput, as stock `generate` returns.

        Raises:
            UnsupportedArgumentError: an argument that Haast does not honour, by name.
            ValueError: a model, mask or prompt that can't be answered.
        """
        for_model = dict(model_kwargs)
        for name in CACHE_NAMES:  # an empty one is what `generate` prepares; the user's own is in `handover`
            if (cache := model_kwargs.get(name)) is not None and cache.get_seq_length() == 0:
                del model_kwargs[name]
        given = {**model_kwargs, "synced_gpus": synced_gpus, **(handover or {})}
        streamer = given.pop("streamer", None) or streamer
        given.pop("tokenizer", None)
        arguments.refuse_settings(generation_config)
        arguments.refuse_arguments(given)
        arguments.check_model(model)
        begins = arguments.padding(input_ids, model_kwargs)
        arguments.check_ids(input_ids, int(model.config.get_text_config().vocab_size))
        arguments.check_prepared(model, input_ids, for_model)
        processors = for_rows(logits_processor, len(begins))
        if len(begins) > 1:
            refuse_linked(logits_processor, stopping_criteria, processors[0])
        pad = _pad(generation_config, stopping_criteria, len(begins))
        with borrowed(model) as loan:
            target, drafter = self._parts(model, loan)
            most = arguments.new_tokens_allowed(stopping_criteria, input_ids.shape[1], begins, target)
            rows = Rows(
                input_ids,
                begins,
                processors,
                Ends(stopping_criteria, len(begins), most, padded=pad is not None),
                room=most,
                seed=_seed() if generation_config.do_sample else None,
                keep_scores=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
                keep_logits=bool(generation_config.return_dict_in_generate and generation_config.output_logits),
            )
            live, stats = Live(streamer, rows, pad or 0), Stats()
            for _ in Engine(target, drafter).run(rows.prompts, rows, StopConfig(most, (), rows.stop), stats):
                live.flush()
            live.end()
        self.stats = stats
        return assembled(rows, input_ids, pad or 0, generation_config)

    def _parts(self, model: PreTrainedModel, loan: Loan) -> tuple[Target, Drafter]:
        """The model as a target, and who drafts for it."""
        if self._target is None:
            target = Target(model, probed=loan.probed)
            loan.probed = target.probed
            return target, _HEADLESS[self._name](target)
        target = self._target
        if target.model is not model:
            raise HeadMismatchError(
                f"this decoder was made for another model than the {type(model).__name__} that generate was called on: "
                f"make a Decoder for this one"
            )
        if self._built != (target.device, target.dtype):
            raise HeadMismatchError(
                f"the model is on {target.device} in {target.dtype} now; its drafter was made for it on "
                f"{self._built[0]} in {self._built[1]}: move the model first, then make the Decoder"
            )
        choose_attention(model)
        return target, self._drafter or _HEADLESS[self._name](target)


def _load(head: Any) -> Head:
    if not isinstance(head, str | Path):
        raise HeadMismatchError(f"head is a {type(head).__name__}: give its folder, or what load_head returns")
    return load_head(head_folder(head))


def _drafter_name(headed: bool, drafter: str | Drafter | None) -> str:
    if isinstance(drafter, Drafter):
        if headed:
            raise ValueError("give a head or a ready drafter, not both")
        return drafter.name
    name = drafter or ("eagle" if headed else "suffix")
    known = sorted(_HEADED if headed else _HEADLESS)
    if name not in known:
        raise ValueError(f"drafter={name!r} is unknown {'with' if headed else 'without'} a head: choose one of {known}")
    return name


def _pad(config: GenerationConfig, criteria: StoppingCriteriaList, rows: int) -> int | None:
    """The token behind the end of a row, None where rows go on until all are done.

    Raises:
        PromptError: rows would have to be padded and there is no pad token.
    """
    if all(getattr(each, "eos_token_id", None) is None for each in criteria):
        return None
    pad = config.pad_token_id if config.pad_token_id is not None else seams.prepared_pad_token(config)
    if pad is None and rows > 1:
        raise PromptError("rows of the batch end at different places and there is no pad token: give pad_token_id")
    return 0 if pad is None else int(pad)


def _seed() -> int:
    """A seed from torch's own generator, so that `torch.manual_seed` makes sampling repeatable."""
    return int(torch.randint(2**63 - 1, (1,)))


custom_generate = Decoder()  # for any model, with the suffix drafter
