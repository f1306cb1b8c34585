"""Windows of `seq_length` tokens over the concatenated token streams of shard sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.stream import TokenSource
from megatron_mdm.errors import DataError

IntArray = NDArray[np.int64]


class SourceWindows:
    """Fixed-length windows over one shard set.

    Args:
        source: An open shard set.
        seq_length: Tokens a window, S.
        vocab_size: Every token id must be below it.
        max_unique_tokens: Use only the first so many tokens; None: all.

    Raises:
        DataError: There is not one whole window.
    """

    def __init__(
        self,
        source: TokenSource,
        seq_length: int,
        vocab_size: int,
        max_unique_tokens: int | None = None,
    ) -> None:
        self.source = source
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._num_tokens = min(source.num_tokens, max_unique_tokens or source.num_tokens)
        if self._num_tokens < seq_length:
            limit = f" of which max_unique_tokens={max_unique_tokens}" if max_unique_tokens else ""
            raise DataError(
                f"{source.prefix} holds {source.num_tokens} tokens{limit}, less than one window of "
                f"data.seq_length={seq_length}: use a longer corpus or a shorter window."
            )

    @property
    def num_windows(self) -> int:
        """Windows of a pass. Tokens that do not fill a window are left out of it."""
        return int(self._num_tokens // self.seq_length)

    @property
    def eod_token_id(self) -> int | None:
        """The token that ends every document, None where no manifest vouches for one."""
        manifest = self.source.manifest
        return manifest.eod_token_id if manifest is not None and manifest.append_eod else None

    def fingerprint(self) -> str:
        """Identifies what a sample order refers to, by content.

        Returns:
            A sha256 over the tokens' own fingerprint, the window length and the number of tokens.
        """
        told = f"{self.source.fingerprint()} {self.seq_length} {self._num_tokens}"
        return hashlib.sha256(told.encode()).hexdigest()

    def read(self, window: int, shift: int = 0) -> IntArray:
        """Tokens of a window.

        Args:
            window: Index in 0..num_windows-1.
            shift: Tokens by which all windows start later, 0 or more. The last ones go on at the
                start of the stream, so that a pass shows the same number of tokens at any shift.

        Returns:
            int64 [seq_length].

        Raises:
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """
        tokens_S = np.empty(self.seq_length, dtype=np.int64)
        self.read_into(tokens_S, window, shift)
        return tokens_S

    def read_into(self, out_S: IntArray, window: int, shift: int = 0) -> None:
        """Reads a window into an array, without another copy.

        Args:
            out_S: int64 [seq_length], filled.
            window: Index in 0..num_windows-1.
            shift: As for `read`.

        Raises:
            IndexError: There is no such window.
            DataError: As for `read`.
        """
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window} of {self.num_windows} in {self.source.prefix}")
        start = (window * self.seq_length + shift) % self._num_tokens
        before_end = min(self.seq_length, self._num_tokens - start)
        self.source.read_into(start, out_S[:before_end])
        if before_end < self.seq_length:
            self.source.read_into(0, out_S[before_end:])
        # Compared as unsigned, a negative id is beyond the vocabulary too.
        beyond = out_S.view(np.uint64) >= self._vocab_size
        if beyond.any():
            offset = int(beyond.argmax())
            raise DataError(
                f"{self.source.prefix} holds the token id {out_S[offset]} at token "
                f"{(start + offset) % self._num_tokens}, beyond "
                f"model.vocab_size={self._vocab_size}: the shards are damaged or of another "
                "tokenizer; make them anew with tools/preprocess_data.py."
            )


class Windows:
    """The windows of one or more shard sets, in the order of the config, under one numbering.

    A window never crosses from one shard set into the next.

    Args:
        sources: Windows of each shard set.
    """

    def __init__(self, sources: Sequence[SourceWindows]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *(source.num_windows for source in sources)])

    @property
    def num_windows(self) -> int:
        """Windows in all."""
        return int(self._starts[-1])

    def fingerprint(self) -> str:
        """Identifies the data that a sample order refers to, by content.

        Returns:
            A sha256 over the fingerprints of all shard sets.
        """
        told = " ".join(source.fingerprint() for source in self.sources)
        return hashlib.sha256(told.encode()).hexdigest()

    def read(self, number: int) -> IntArray:
        """Tokens of a window.

        Args:
            number: In 0..num_windows-1.

        Returns:
            int64 [seq_length].

        Raises:
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """
        source = self._place(number)
        return self.sources[source].read(number - int(self._starts[source]))

    def source_of(self, number: int) -> SourceWindows:
        """The shard set that a window belongs to.

        Args:
            number: In 0..num_windows-1.

        Returns:
            Its windows.
        """
        return self.sources[self._place(number)]

    def _place(self, number: int) -> int:
        if not 0 <= number < self.num_windows:
            raise IndexError(f"window {number} of {self.num_windows}")
        return int(np.searchsorted(self._starts, number, side="right")) - 1


def document_numbers(tokens_S: IntArray, eod_token_id: int) -> NDArray[np.int32]:
    """Numbers the documents of a window. A document ends with its end-of-document token.

    Args:
        tokens_S: int64 [S], clean tokens.
        eod_token_id: The token that ends a document, which text cannot produce.

    Returns:
        int32 [S]: 0 for the tokens of the first document, 1 for those of the second, and so on.
    """
    numbers_S = np.zeros(len(tokens_S), dtype=np.int32)
    np.cumsum(tokens_S[:-1] == eod_token_id, out=numbers_S[1:])
    return numbers_S
