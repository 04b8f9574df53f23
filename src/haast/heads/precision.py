"""Which precision a head was trained on, and what it costs to draft for a target held in another one."""

from __future__ import annotations

import warnings
from typing import Any

from haast.errors import HeadMismatchError, PrecisionWarning

# tau of the head for SmolLM2-135M-Instruct, trained on float16 weights, by the target's precision. A test compares it
# with results/precision.json.
MEASURED = {
    "float16": 2.46, "float32": 2.44, "bfloat16": 2.4, "int8": 2.43, "torchao-int8": 2.45, "torchao-int4": 2.41,
}  # fmt: skip
_FULL = ("float16", "bfloat16", "float32", "float64")  # one model to a head: see MEASURED


def warn_of_precision(about: dict[str, Any], target: str) -> None:
    """Tell, as a `PrecisionWarning`, that a head drafts for a target of another precision than it was trained on.

    16-bit and wider floats count as one: between them the measured effect is within the noise of the measurement.
    Raises HeadMismatchError where `precision` in the head's config.json is not a string.
    """
    trained = about.get("precision")
    if trained is not None and not isinstance(trained, str):
        raise HeadMismatchError(f"precision={trained!r} in the head's config.json is no name: give one, or take it out")
    if trained is None or trained == target or (trained in _FULL and target in _FULL):
        return
    effect = "not measured for these two"
    if trained in _FULL and target in MEASURED:
        head = f"tau {MEASURED['float16']:.2f} with float16, {MEASURED[target]:.2f} here"
        effect = f"with SmolLM2-135M-Instruct's head: {head}"
    warnings.warn(
        f"the head was trained on a target held in {trained}, and drafts for one held in {target}: the text stays the "
        f"target's own, fewer drafts may be accepted ({effect}). A head that is trained on this very target (`haast "
        f"train` with the same --packing) drafts best",
        PrecisionWarning,
        stacklevel=3,
    )
