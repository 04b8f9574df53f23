"""Near-duplicates among texts, by MinHash over word shingles (Broder, 1997; bands as in Indyk and Motwani, 1998).

Owns the comparison. Does not know what a text is for. Memory: about 1.5 KB for each text that is remembered, however
long it is.

    text        -> words -> shingles of five words -> the least value of each of 60 hash functions: the signature
    similarity  shingles in common, as a share of both texts' shingles; two signatures agree in about this share
    candidates  a text is compared with the first one that shares a band (five values) of its signature
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORDS = 5  # of a shingle
_BANDS, _ROWS = 12, 5  # texts of similarity 0.8 share a band in 99 % of cases, those of 0.3 in 3 %
_SIMILAR = 0.8
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """The texts so far, and whether another one says nearly the same."""

    def __init__(self) -> None:
        draws = np.random.default_rng(0)
        size = (_BANDS * _ROWS, 1)
        self._factors = draws.integers(2**63, size=size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = draws.integers(2**63, size=size, dtype=np.uint64)
        self._bands: dict[tuple[int, bytes], bytes] = {}  # (band, its values) -> signature of the first such text

    def add(self, text: str) -> bool:
        """Remember a text, unless it is a near-duplicate of an earlier one; returns whether it is new."""
        signature = self._signature(text)
        if self._known(signature):
            return False
        for key in _keys(signature):
            self._bands.setdefault(key, signature)
        return True

    def has(self, text: str) -> bool:
        """Whether a text is a near-duplicate of a remembered one."""
        return self._known(self._signature(text))

    def _known(self, signature: bytes) -> bool:
        found = {self._bands[key] for key in _keys(signature) if key in self._bands}
        values = np.frombuffer(signature, np.uint32)
        return any(float((np.frombuffer(each, np.uint32) == values).mean()) >= _SIMILAR for each in found)

    def _signature(self, text: str) -> bytes:
        shingles = _shingles(_WORD.findall(text.lower()) or [text])
        hashed = (shingles * self._factors + self._offsets) >> np.uint64(32)  # (functions, shingles)
        return bytes(hashed.min(axis=1).astype(np.uint32))


def _shingles(words: Sequence[str]) -> NDArray[np.uint64]:
    """A hash of every run of five words; of the whole text if it is shorter."""
    ids = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) + 1 for word in words], np.uint64)
    width = min(_WORDS, len(ids))
    factors = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, width + 1)], np.uint64)
    return np.lib.stride_tricks.sliding_window_view(ids, width) @ factors


def _keys(signature: bytes) -> list[tuple[int, bytes]]:
    size = len(signature) // _BANDS
    return [(band, signature[band * size : (band + 1) * size]) for band in range(_BANDS)]
