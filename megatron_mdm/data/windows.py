"""Windows of `seq_length` tokens over the concatenated token streams of shard sets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import Config, SourceConfig, TrainSourceConfig
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.source import IntArray, TokenSource
from megatron_mdm.diffusion.samples import TextWindow


class WindowReader(Protocol):
    """Windows that can be read."""

    @property
    def num_windows(self) -> int:
        """Windows of a pass."""
        ...

    def read_window(self, window: int, shift: int = 0) -> TextWindow:
        """Reads a window."""
        ...


class WindowSource(ABC):
    """The windows of one set of shards.

    Attributes:
        source: The tokens that the windows are cut out of.
    """

    source: TokenSource

    @classmethod
    @abstractmethod
    def open(cls, config: Config, source: SourceConfig, tokens: TokenSource) -> Self:
        """Cuts what a run reads into windows.

        Args:
            config: The run.
            source: The shards' place in it.
            tokens: The open shards.

        Returns:
            The windows.

        Raises:
            DataError: There is not one window, or the shards are not of this kind.
        """

    @property
    @abstractmethod
    def num_windows(self) -> int:
        """Windows of a pass. Tokens that do not fill a window are left out of it."""

    @property
    @abstractmethod
    def learned_share(self) -> float:
        """Share of the tokens that are learned, in (0, 1]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies what a sample order refers to, by content; a sha256."""

    @abstractmethod
    def find_documents(self, window_N: IntArray) -> IntArray:
        """Finds which document each window is of; int64 [N], a number for each document."""

    @abstractmethod
    def read_window(self, window: int, shift: int = 0) -> TextWindow:
        """Reads a window.

        Args:
            window: Index in 0..num_windows-1.
            shift: Tokens by which all windows start later, 0 or more.

        Returns:
            The window.

        Raises:
            IndexError: There is no such window.
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """


class SourceWindows(WindowSource):
    """Fixed-length windows over one shard set.

    Args:
        source: An open shard set.
        seq_length: Tokens per window, S.
        vocab_size: Every token id must be below it.
        max_unique_tokens: Use only the first so many tokens; None: all.
        by_document: Number the documents of every window.

    Raises:
        DataError: There is not one whole window, or nothing says where documents end.
    """

    def __init__(
        self,
        source: TokenSource,
        seq_length: int,
        vocab_size: int,
        max_unique_tokens: int | None = None,
        *,
        by_document: bool = False,
    ) -> None:
        self.source = source
        self._by_document = by_document
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._num_tokens = min(source.num_tokens, max_unique_tokens or source.num_tokens)
        if self._num_tokens < seq_length:
            limit = f" of which max_unique_tokens={max_unique_tokens}" if max_unique_tokens else ""
            raise DataError(
                f"{source.prefix} holds {source.num_tokens} tokens{limit}, less than one window of "
                f"data.seq_length={seq_length}: use a longer corpus or a shorter window."
            )

        if by_document and self.source.eod_token_id is None:
            raise DataError(
                f"data.attention=document needs to know where documents end, and {source.prefix} "
                "has no manifest that names an end-of-document token: make the shards with "
                "mdm prepare, or use data.attention=window."
            )

    @classmethod
    def open(cls, config: Config, source: SourceConfig, tokens: TokenSource) -> SourceWindows:
        """See `WindowSource.open`."""
        limit = source.max_unique_tokens if isinstance(source, TrainSourceConfig) else None
        return cls(
            tokens,
            config.data.seq_length,
            config.model.vocab_size,
            limit,
            by_document=config.data.attention == "document",
        )

    @property
    def num_windows(self) -> int:
        """See `WindowSource.num_windows`."""
        return int(self._num_tokens // self.seq_length)

    @property
    def learned_share(self) -> float:
        """See `WindowSource.learned_share`: all."""
        return 1.0

    def fingerprint(self) -> str:
        """See `WindowSource.fingerprint`."""
        told = f"{self.source.fingerprint()} {self.seq_length} {self._num_tokens}"
        return hashlib.sha256(told.encode()).hexdigest()

    def find_documents(self, window_N: IntArray) -> IntArray:
        """See `WindowSource.find_documents`: the one of the token in the window's middle."""
        return self.source.find_documents(window_N * self.seq_length + self.seq_length // 2)

    def read_window(self, window: int, shift: int = 0) -> TextWindow:
        """See `WindowSource.read_window`: its tokens, and their documents where these are numbered.

        The last windows of a shifted pass go on at the start of the stream, so that it shows the
        same number of tokens at any shift.
        """
        tokens_S = self.read(window, shift)
        if not self._by_document or self.source.eod_token_id is None:
            return TextWindow(tokens_S)
        return TextWindow(tokens_S, number_documents(tokens_S, self.source.eod_token_id))

    def read(self, window: int, shift: int = 0) -> IntArray:
        """Reads the tokens of a window, int64 [seq_length]; else as `read_window`."""
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window} of {self.num_windows} in {self.source.prefix}")
        start = (window * self.seq_length + shift) % self._num_tokens
        after_end = max(0, start + self.seq_length - self._num_tokens)
        out_S = self.source.read(start, start + self.seq_length - after_end)
        if after_end:
            out_S = np.concatenate([out_S, self.source.read(0, after_end)])
        offset = find_token_beyond(out_S, self._vocab_size)
        if offset is not None:
            raise DataError(
                f"{self.source.prefix} holds the token id {out_S[offset]} at token "
                f"{(start + offset) % self._num_tokens}, beyond the model's vocabulary of "
                f"{self._vocab_size}: the shards are damaged or of another tokenizer; make them "
                "anew with mdm prepare."
            )
        return out_S


class Windows:
    """The windows of one or more shard sets, in the order of the config, under one numbering.

    A window never crosses from one shard set into the next.

    Args:
        sources: Windows of each shard set.
    """

    def __init__(self, sources: Sequence[WindowSource]) -> None:
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

    def find_documents(self, number_N: IntArray) -> IntArray:
        """Finds which document each window is of.

        Args:
            number_N: int64 [N], each in 0..num_windows-1.

        Returns:
            int64 [N, 2]: set of shards, document there.
        """
        source_N = np.searchsorted(self._starts, number_N, side="right") - 1
        document_N = np.empty_like(number_N)
        for source in np.unique(source_N).tolist():
            mine = source_N == source
            inside = number_N[mine] - int(self._starts[source])
            document_N[mine] = self.sources[source].find_documents(inside)
        return np.stack([source_N, document_N], axis=1)

    def read_window(self, number: int) -> TextWindow:
        """Reads a window.

        Args:
            number: In 0..num_windows-1.

        Returns:
            The window.

        Raises:
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """
        if not 0 <= number < self.num_windows:
            raise IndexError(f"window {number} of {self.num_windows}")
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.sources[source].read_window(number - int(self._starts[source]))


def find_token_beyond(tokens_S: IntArray, vocab_size: int) -> int | None:
    """Finds a token id outside of the vocabulary.

    Args:
        tokens_S: int64 [S].
        vocab_size: Ids are 0..vocab_size-1.

    Returns:
        The place of the first, or None.
    """
    # Compared as unsigned, a negative id is beyond the vocabulary too.
    beyond_S = tokens_S.view(np.uint64) >= vocab_size
    return int(beyond_S.argmax()) if beyond_S.any() else None


def number_documents(tokens_S: IntArray, eod_token_id: int) -> NDArray[np.int32]:
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
