"""Windows of `seq_length` tokens over the concatenated token stream of one or more shard sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.shards import TokenShards
from megatron_mdm.errors import DataError

_NUM_BLOCKS = 1024
_BLOCK_TOKENS = 512


class Windows:
    """Fixed-length windows; a window never crosses from one shard set into the next.

    Args:
        sources: Open shard sets, in the order of the config.
        seq_length: Tokens a window.
        vocab_size: Every token id must be below it.

    Raises:
        DataError: A source is shorter than one window.
    """

    def __init__(self, sources: Sequence[TokenShards], seq_length: int, vocab_size: int) -> None:
        self.seq_length = seq_length
        self._sources = sources
        self._vocab_size = vocab_size
        for source in sources:
            if source.num_tokens < seq_length:
                raise DataError(
                    f"{source.prefix} holds {source.num_tokens} tokens, less than one window of "
                    f"data.seq_length={seq_length}: use a longer corpus or a shorter window."
                )
        counts = [source.num_tokens // seq_length for source in sources]
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    @property
    def num_windows(self) -> int:
        """Windows in all. The tail of a source that does not fill a window is left out."""
        return int(self._starts[-1])

    def fingerprint(self) -> str:
        """Identifies the data that a sample order refers to, by content.

        Returns:
            A sha256 over the window length and, for every source, its document lengths and up to
            1,024 blocks of its tokens: enough to tell corpora apart, cheap at any size.
        """
        digest = hashlib.sha256(f"{self.seq_length}".encode())
        for source in self._sources:
            digest.update(f"{source.num_tokens} {source.num_documents}".encode())
            digest.update(np.asarray(source.document_lengths, dtype=np.int64).tobytes())
            length = min(_BLOCK_TOKENS, source.num_tokens)
            last = source.num_tokens - length
            for start in np.unique(np.linspace(0, last, _NUM_BLOCKS).astype(np.int64)):
                digest.update(source.read(int(start), length).tobytes())
        return digest.hexdigest()

    def read(self, window: int) -> NDArray[np.int64]:
        """Tokens of a window.

        Args:
            window: Index in 0..num_windows-1.

        Returns:
            int64 [seq_length].

        Raises:
            DataError: A token id lies beyond the vocabulary.
        """
        which = int(np.searchsorted(self._starts, window, side="right")) - 1
        source = self._sources[which]
        start = (window - int(self._starts[which])) * self.seq_length
        tokens_S = source.read(start, self.seq_length)
        beyond = (tokens_S >= self._vocab_size) | (tokens_S < 0)
        if beyond.any():
            offset = start + int(beyond.argmax())
            raise DataError(
                f"{source.prefix}.bin holds the token id {tokens_S[offset - start]} at token "
                f"{offset}, beyond model.vocab_size={self._vocab_size}: the file is damaged or was "
                "made with another tokenizer; make it anew with tools/preprocess_data.py."
            )
        return tokens_S
