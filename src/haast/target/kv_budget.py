"""Size of a target's KV pool, and the dtype in which it stores keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haast.device import free_memory
from haast.errors import KVPoolError
from haast.target.kv_pool import BLOCK
from haast.target.kv_stores import KV_DTYPES
from haast.target.mixers import Layout
from haast.target.snapshots import Snapshots

_RETAIN = 8192  # default number of token slots that are kept as prefixes
_SNAPSHOTS = 4  # of a recurrent model's budget, one part of so many is for the states that are kept with prefixes
_LEAST_STATES = 4  # number of states that are kept whatever the budget
_MOST_TOKENS = 1 << 20  # limit for a pool whose size in tokens is not set


@dataclass(frozen=True)
class KVBudget:
    """The budget of a KV pool.

    Attributes:
        tokens: token slots of all requests together; None: derived from `size`.
        size: bytes of keys and values; None is a quarter of the free memory.
        retain: token slots of finished requests that are kept as prefixes for later ones; None is 8,192.
        kv_dtype: "auto" stores keys and values in the model's dtype, "float16" and "bfloat16" in 16 bits. Vanilla and
            drafted decoding both use the 16-bit values, so drafted text is still the target's own.

    Raises:
        KVPoolError: a budget below 1, both budgets, or an unknown dtype.
    """

    tokens: int | None = None
    size: int | None = None
    retain: int | None = None
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("kv_tokens", self.tokens, 1),
            ("kv_bytes", self.size, 1),
            ("retain", self.retain, 0),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise KVPoolError(f"{name}={value!r} is not allowed for a KV pool: give {least} or more")
        if self.tokens is not None and self.size is not None:
            raise KVPoolError(
                f"kv_tokens={self.tokens} and kv_bytes={self.size} both set the size of a KV pool: give one"
            )
        if self.kv_dtype != "auto" and self.kv_dtype not in KV_DTYPES:
            raise KVPoolError(f"kv_dtype={self.kv_dtype!r} is unknown: choose auto, {' or '.join(KV_DTYPES)}")

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of stored keys and values; None is the model's own."""
        return KV_DTYPES.get(self.kv_dtype)

    @property
    def kept(self) -> int:
        """Token slots of finished requests that are kept as prefixes."""
        return _RETAIN if self.retain is None else self.retain

    def snapshots(
        self, layout: Layout | None, bytes_per_token: int, device: torch.device, retain: int
    ) -> Snapshots | None:
        """Room for the states of a model with recurrent layers: a quarter of the budget, or a few states.

        None for other models. No state is kept if no prefixes are (`retain` 0).
        """
        if layout is None:
            return None
        size = self.size or free_memory(device) // 4 if self.tokens is None else self.tokens * bytes_per_token
        limit = max(size // _SNAPSHOTS, _LEAST_STATES * layout.nbytes) if retain else 0
        return Snapshots(limit, layout.consistent)

    def slots(self, bytes_per_token: int, device: torch.device, recurrent: bool = False) -> int:
        """Token slots of the pool, apart from snapshots of recurrent states. Raises KVPoolError for too few bytes."""
        if self.tokens is not None:
            return self.tokens
        size = self.size or free_memory(device) // 4
        size -= size // _SNAPSHOTS if recurrent else 0
        blocks = size // (BLOCK * max(bytes_per_token, 1)) - 1  # one block is for padding
        if blocks < 1:
            raise KVPoolError(
                f"a KV pool of {size} bytes is too small: the minimum of {2 * BLOCK} token slots takes "
                f"{2 * BLOCK * bytes_per_token} bytes"
            )
        return min(blocks * BLOCK, _MOST_TOKENS)
