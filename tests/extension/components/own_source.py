"""A token source from outside the package: sums of squares, in documents of ten tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_mdm.data.source import IntArray, TokenSource

END = 0


class SquareSums(TokenSource):
    """As many tokens as the last part of its path says."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        places = np.arange(int(prefix.name))
        self._tokens = 1 + (places // 10 + places**2) % 60
        self._tokens[9::10] = END

    @classmethod
    def open(cls, prefix: Path | str) -> SquareSums:
        return cls(Path(prefix))

    @property
    def num_documents(self) -> int:
        return len(self._tokens) // 10

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def eod_token_id(self) -> int:
        return END

    def read(self, start: int, stop: int) -> IntArray:
        if not 0 <= start <= stop <= len(self._tokens):
            raise IndexError(f"tokens {start} to {stop} of {len(self._tokens)}")
        return self._tokens[start:stop].copy()

    def find_documents(self, token_N: IntArray) -> IntArray:
        return token_N // 10
