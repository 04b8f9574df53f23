"""What transformers' `generate` keeps from a callable, and how it reaches ours.

Owns one thing: `generate(custom_generate=callable)` takes `streamer`, `tokenizer`, `assistant_model` and `synced_gpus`
out of its arguments and then passes on only what the callable's signature names and is still there, so these four are
lost: a streamer would wait forever, an assistant would be ignored, stop strings would find no tokenizer. While it
reads our signature, we put them back among the arguments, where the very next line looks for them. Read from
transformers 5.23 (`GenerationMixin._extract_generation_mode_kwargs`); a transformers that passes them by itself is
served as well. There, before transformers has touched anything, what was given is checked too.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

from haast.dropin.arguments import check_model
from haast.dropin.given import check_given

_READER = "_extract_generation_mode_kwargs"  # the method of transformers that asks for the signature
_FRAMES = 16  # between it and us stand a few of `inspect`


class HandedOver:
    """A descriptor for `__signature__`: the signature of the instance's `__call__`, and the four arguments put back."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class has its constructor's signature, as every class
        _put_back()
        call = inspect.signature(owner.__call__)
        return call.replace(parameters=list(call.parameters.values())[1:])


def _put_back() -> None:
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_code.co_name == _READER:
            taken: dict[str, Any] = dict(frame.f_locals["generation_mode_kwargs"])
            left: dict[str, Any] = frame.f_locals["kwargs"]
            left["handover"] = taken
            if "tokenizer" in taken:
                left["tokenizer"] = taken["tokenizer"]  # `generate` itself needs it for the stop strings
            _check(frame, left)
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


def _check(reader: FrameType, left: dict[str, Any]) -> None:
    model: Any = reader.f_locals["self"]
    check_model(model)
    asked: dict[str, Any] = {} if reader.f_back is None else reader.f_back.f_locals  # `generate` itself
    config = asked.get("generation_config") or model.generation_config
    check_given({"inputs": asked.get("inputs"), "stop_strings": config.stop_strings, **left})
