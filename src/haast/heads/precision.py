"""Warning if a head was trained on a target with another precision than the one it drafts for."""

from __future__ import annotations

import warnings
from typing import Any

from haast.errors import HeadMismatchError, PrecisionWarning

# tau of the head for SmolLM2-135M-Instruct, trained on float16 weights, per precision of the target. A test compares it
# with results/precision.json.
MEASURED = {
    "float16": 2.46, "gguf": 2.37, "float32": 2.44, "bfloat16": 2.45, "int8": 2.42, "torchao-int8": 2.45,
    "torchao-int4": 2.41,
}  # fmt: skip
# Treated as one precision: see MEASURED. The weights of "gguf" are the file's own; only activations are rounded.
_FULL = ("float16", "bfloat16", "float32", "float64", "gguf")


def warn_of_precision(about: dict[str, Any], target: str) -> None:
    """Issue a `PrecisionWarning` if the head was trained on a target with another precision than `target`.

    Floats of 16 bits and more, and a file's own blocks, count as equal: they differ by less than texts do. Raises
    HeadMismatchError if `precision` in the head's config.json is not a string.
    """
    trained = about.get("precision")
    if trained is not None and not isinstance(trained, str):
        raise HeadMismatchError(
            f"precision={trained!r} in the head's config.json is not a string: give the name of a precision, or remove "
            f"the entry"
        )
    if trained is None or trained == target or (trained in _FULL and target in _FULL):
        return
    effect = "not measured for these two"
    if trained in _FULL and target in MEASURED:
        tau = f"tau {MEASURED['float16']:.2f} with float16, {MEASURED[target]:.2f} with {target}"
        effect = f"measured with SmolLM2-135M-Instruct's head: {tau}"
    warnings.warn(
        f"the head was trained on a target in {trained} and drafts for one in {target}: the text stays the target's "
        f"own, but fewer drafts may be accepted ({effect}). A head trained on this target with the same packing "
        f"(`haast train --packing`) drafts best",
        PrecisionWarning,
        stacklevel=3,
    )
