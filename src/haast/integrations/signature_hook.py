"""The moment at which transformers' `generate` reads a decoder's signature.

Owns what is done then: `generate(custom_generate=callable)` passes on only what the callable's signature names, and
what it keeps is put back among the arguments (`compat.hand_over`). A transformers that passes all of it by itself is
served as well. transformers has touched nothing yet at that moment, so the model and the inputs are checked too. Knows
no decoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from haast import compat
from haast.integrations.arguments import check_model
from haast.integrations.supported_args import PARAMETERS
from haast.integrations.validate_inputs import validate_inputs
from haast.target.kv_cache import CACHE_NAMES
from haast.target.support import refuse_unsupported


class SignatureHook:
    """A descriptor for `__signature__`: the signature of `__call__`, and what `generate` keeps put back."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class has its constructor's signature, as every class
        given = compat.hand_over(PARAMETERS, CACHE_NAMES)
        if given is not None:
            _check(given)
        call = inspect.signature(owner.__call__)
        return call.replace(parameters=list(call.parameters.values())[1:])


def _check(given: Mapping[str, Any]) -> None:
    model: Any = given["self"]
    refuse_unsupported(model)
    check_model(model)
    config = given.get("generation_config") or model.generation_config
    validate_inputs({"stop_strings": config.stop_strings, **given})
