"""Windows of prompts and responses: documents whose first tokens are a prompt, packed together.

Beside the shards lies `PREFIX.prompts`, the length of every document's prompt, 4 bytes each. A
document is prompt, response and the end-of-text token.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import Config, FinetuningConfig, SourceConfig
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.order import DocumentKey
from megatron_mdm.data.packing import pack
from megatron_mdm.data.shards import prompts_path
from megatron_mdm.data.source import TokenSource
from megatron_mdm.data.store import TokenStore
from megatron_mdm.data.windows import WindowSource, find_token_beyond
from megatron_mdm.diffusion.samples import PromptResponseSpan, TextWindow

_LOG = logging.getLogger(__name__)
_REMEDY = "make them with mdm prepare-finetuning"


def read_prompt_lengths(tokens: TokenSource) -> NDArray[np.int32]:
    """Reads and checks how long the prompts of shards are.

    Args:
        tokens: The open shards.

    Returns:
        int32 [documents], tokens of each prompt.

    Raises:
        DataError: The shards hold text without prompts, or the two do not belong together.
    """
    path = prompts_path(tokens.prefix)
    recipe = tokens.manifest.exchanges if tokens.manifest is not None else None
    if recipe is None or tokens.manifest is None or tokens.manifest.subset is not None:
        raise DataError(
            f"{tokens.prefix} holds text and no prompts with responses: {_REMEDY}, or pre-train "
            "with mdm train."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {_REMEDY} again.") from error
    lengths_N = np.frombuffer(content, dtype="<i4")
    fits = hashlib.sha256(content).hexdigest() == recipe.prompts_sha256
    if not fits or lengths_N.shape != (tokens.num_documents,):
        raise DataError(
            f"{path} does not belong to the {tokens.num_documents} documents of {tokens.prefix}: "
            f"{_REMEDY} again."
        )
    return lengths_N.astype(np.int32)


class PackedPairs(WindowSource):
    """Windows of whole prompt-response pairs; none is cut, and each is in exactly one window.

    Args:
        source: Open shards, one document per pair.
        prompt_lengths_N: int32 [documents], tokens of each prompt.
        seq_length: Tokens per window, S.
        vocab_size: Every token id must be below it.
        settings: What follows a response, and whether pairs share windows.
        fill_tokens: Tokens that a response is filled up to with end-of-text tokens.

    Raises:
        DataError: A pair is longer than a window, or all are.
    """

    def __init__(
        self,
        source: TokenStore,
        prompt_lengths_N: NDArray[np.int32],
        seq_length: int,
        vocab_size: int,
        settings: FinetuningConfig,
        *,
        fill_tokens: int,
    ) -> None:
        if source.manifest is None:
            raise ValueError("pairs need shards with a manifest")
        self.source = source
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._end_token_id = source.manifest.eod_token_id
        self._end = settings.end_of_text
        self._fill_tokens = fill_tokens
        self._prompt_lengths_N = prompt_lengths_N.astype(np.int64)
        stored_N = source.document_lengths
        self._starts_N = np.cumsum(stored_N) - stored_N
        self._text_lengths_N = stored_N - (self._end == "none")
        self._sizes_N = self._fill(self._text_lengths_N)
        self._packing = settings.packing
        kept_N = self._select_fitting(settings)
        self._windows = self._pack(kept_N)
        self._pairs_per_window = len(kept_N) / len(self._windows)

    @classmethod
    def open(cls, config: Config, source: SourceConfig, tokens: TokenSource) -> PackedPairs:
        """See `WindowSource.open`."""
        if not isinstance(tokens, TokenStore):
            raise DataError(
                f"{source.path} is no store of prompts and responses: make one with "
                "mdm prepare-finetuning."
            )
        return cls(
            tokens,
            read_prompt_lengths(tokens),
            config.data.seq_length,
            config.model.vocab_size,
            config.finetuning,
            fill_tokens=config.finetuning.count_fill_tokens(fills=config.objective.fills_responses),
        )

    @property
    def num_windows(self) -> int:
        """Windows of a pass."""
        return len(self._windows)

    @property
    def learned_share(self) -> float:
        """Share of the tokens that are learned, in (0, 1]."""
        kept_N = np.concatenate(self._windows)
        learned_N = self._sizes_N[kept_N] - self._prompt_lengths_N[kept_N] - (self._end == "given")
        return float(learned_N.sum()) / (len(self._windows) * self.seq_length)

    def fingerprint(self) -> str:
        """Identifies what a sample order refers to, by content.

        Returns:
            A sha256 over tokens, prompts and packing.
        """
        told = (
            f"{self.source.fingerprint()} {self.seq_length} {self._end} {self._fill_tokens} "
            f"{self._packing} {self.num_windows}"
        )
        digest = hashlib.sha256(told.encode())
        digest.update(self._prompt_lengths_N.astype("<i8").tobytes())
        return digest.hexdigest()

    def find_documents(self, window_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gives each window a number of its own: it holds whole pairs.

        Args:
            window_N: int64 [N], each in 0..num_windows-1.

        Returns:
            int64 [N], the windows.
        """
        return window_N

    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """Tokens of a window and the pairs among them.

        Args:
            window: Index in 0..num_windows-1.
            shift: 0, for pairs have no other windows.
            document_key: None, for the same reason.

        Returns:
            The window; what no pair fills holds end-of-text tokens.

        Raises:
            IndexError: There is no such window.
            DataError: A token id lies beyond the vocabulary, or the file cannot be read.
        """
        if shift or document_key is not None or not 0 <= window < self.num_windows:
            raise IndexError(f"window {window} of {self.num_windows} shifted by {shift}")
        tokens_S = np.full(self.seq_length, self._end_token_id, dtype=np.int64)
        pairs, start = [], 0
        for document in self._windows[window].tolist():
            size, prompt = self._sizes_N[document], int(self._prompt_lengths_N[document])
            stop = start + int(size)
            text_stop = start + int(self._text_lengths_N[document])
            first = int(self._starts_N[document])
            tokens_S[start:text_stop] = self.source.read(first, first + text_stop - start)
            learned_stop = stop - (self._end == "given")
            pairs.append(PromptResponseSpan(start, start + prompt, learned_stop, stop))
            start = stop
        self._check_tokens(tokens_S, window)
        return TextWindow(tokens_S, pairs=tuple(pairs), pairs_per_window=self._pairs_per_window)

    def _fill(self, lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
        wanted_N = np.minimum(self._prompt_lengths_N + self._fill_tokens, self.seq_length)
        return np.maximum(lengths_N, wanted_N)

    def _select_fitting(self, settings: FinetuningConfig) -> NDArray[np.int64]:
        fits_N = self._text_lengths_N <= self.seq_length
        if fits_N.all():
            return np.arange(len(fits_N))
        longest, missed = int(self._text_lengths_N.max()), int((~fits_N).sum())
        told = (
            f"{missed} of the {len(fits_N)} pairs of {self.source.prefix} are longer than "
            f"data.seq_length={self.seq_length}, the longest has {longest} tokens"
        )
        if settings.too_long == "refuse" or not fits_N.any():
            raise DataError(
                f"{told}: use a longer window, or leave them out with finetuning.too_long=skip."
            )
        _LOG.warning("%s: they are left out.", told)
        return np.flatnonzero(fits_N)

    def _pack(self, kept_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if not self._packing:
            return list(kept_N[:, None])
        bins = pack(self._sizes_N[kept_N].tolist(), self.seq_length)
        return [kept_N[items] for items in bins]

    def _check_tokens(self, tokens_S: NDArray[np.int64], window: int) -> None:
        offset = find_token_beyond(tokens_S, self._vocab_size)
        if offset is not None:
            raise DataError(
                f"{self.source.prefix} holds the token id {tokens_S[offset]} in window {window}, "
                f"beyond the model's vocabulary of {self._vocab_size}: the shards are damaged or "
                f"of another tokenizer; {_REMEDY} again."
            )
