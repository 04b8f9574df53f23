"""How large a target's KV pool is, and in what form it holds keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haast.device import free_memory
from haast.errors import KVPoolError
from haast.target.kv_pool import BLOCK
from haast.target.kv_stores import KV_DTYPES

_RETAIN = 8192  # token slots of ended texts that are kept as prefixes
_MOST_TOKENS = 1 << 20  # of a pool whose budget nobody has set


@dataclass(frozen=True)
class KVBudget:
    """The budget of a KV pool.

    Attributes:
        tokens: token slots of all requests together; None goes by `size`.
        size: bytes of keys and values; None is a quarter of the memory that is free.
        retain: token slots of ended texts that are kept as prefixes for later ones; None is 8,192.
        kv_dtype: "auto" holds keys and values as the model gives them, "float16" or "bfloat16" in 16 bits: the target
            with 16-bit keys and values is then the target, for vanilla and drafted decoding alike.

    Raises:
        KVPoolError: a budget below 1, both budgets, or an unknown dtype.
    """

    tokens: int | None = None
    size: int | None = None
    retain: int | None = None
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, value, least in (("tokens", self.tokens, 1), ("size", self.size, 1), ("retain", self.retain, 0)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise KVPoolError(f"{name}={value!r} is not allowed for a KV pool: give {least} or more")
        if self.tokens is not None and self.size is not None:
            raise KVPoolError(f"tokens={self.tokens} and size={self.size} are two budgets of one KV pool: give one")
        if self.kv_dtype != "auto" and self.kv_dtype not in KV_DTYPES:
            raise KVPoolError(f"kv_dtype={self.kv_dtype!r} is unknown: choose auto, {' or '.join(KV_DTYPES)}")

    @property
    def dtype(self) -> torch.dtype | None:
        """What keys and values are stored in; None is as the model gives them."""
        return KV_DTYPES.get(self.kv_dtype)

    @property
    def kept(self) -> int:
        """Token slots of ended texts that are kept."""
        return _RETAIN if self.retain is None else self.retain

    def slots(self, bytes_per_token: int, device: torch.device) -> int:
        """Token slots of the pool. Raises KVPoolError where its bytes hold too few."""
        if self.tokens is not None:
            return self.tokens
        size = self.size or free_memory(device) // 4
        blocks = size // (BLOCK * max(bytes_per_token, 1)) - 1  # one is for padding
        if blocks < 1:
            raise KVPoolError(
                f"a KV pool of {size} bytes is too small: {2 * BLOCK} token slots, the least, take "
                f"{2 * BLOCK * bytes_per_token} here"
            )
        return min(blocks * BLOCK, _MOST_TOKENS)
