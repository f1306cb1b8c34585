"""What counting predicts: cross-entropies of unigrams and bigrams, below which a model has learned.

The counts are of the training windows' tokens, or of blocks spread evenly over them, so that they
cost seconds at any size of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.source import IntArray, spread_blocks
from megatron_mdm.data.windows import WindowSource
from megatron_mdm.diffusion.samples import TextWindow, find_places_after_first

MOST_COUNTED_TOKENS = 10_000_000
_BLOCK_TOKENS = 1 << 14

FloatArray = NDArray[np.float64]


class TokenCounts(NamedTuple):
    """Counts of tokens and of pairs of neighbours.

    Attributes:
        token_V: int64 [V], how often each token occurs.
        pair_P: int64 [P], the pairs that occur, first * V + second, ascending.
        count_P: int64 [P], how often each does.
        first_V: int64 [V], pairs by their first token.
        followers_V: int64 [V], different tokens that follow a token.
    """

    token_V: IntArray
    pair_P: IntArray
    count_P: IntArray
    first_V: IntArray
    followers_V: IntArray

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted, n."""
        return int(self.token_V.sum())

    def compute_unigram(self, tokens_N: IntArray) -> FloatArray:
        """Probability of tokens by their own counts: (c(w) + 1) / (n + V), Laplace's rule.

        Args:
            tokens_N: int64 [N].

        Returns:
            float64 [N].
        """
        return (self.token_V[tokens_N] + 1) / (self.num_tokens + len(self.token_V))

    def compute_bigram(self, before_N: IntArray, tokens_N: IntArray) -> FloatArray:
        """Probability of tokens after others, interpolated with the unigram as Witten and Bell do.

        (c(v, w) + t(v) p(w)) / (c(v) + t(v)), where t(v) different tokens follow v and p is the
        unigram; p(w) where nothing was seen to follow v.

        Args:
            before_N: int64 [N], the token before each.
            tokens_N: int64 [N].

        Returns:
            float64 [N].

        Source:
            Chen and Goodman 1998, An Empirical Study of Smoothing Techniques, section 2.5.
        """
        key_N = before_N * len(self.token_V) + tokens_N
        place_N = np.minimum(np.searchsorted(self.pair_P, key_N), len(self.pair_P) - 1)
        pairs_N = np.where(self.pair_P[place_N] == key_N, self.count_P[place_N], 0)
        unigram_N, kinds_N = self.compute_unigram(tokens_N), self.followers_V[before_N]
        total_N = self.first_V[before_N] + kinds_N
        mixed_N = (pairs_N + kinds_N * unigram_N) / np.maximum(total_N, 1)
        return np.where(total_N > 0, mixed_N, unigram_N)


class CrossEntropy(NamedTuple):
    """Mean over windows of the mean over tokens, nats per token; a bigram's first is a unigram."""

    unigram: float
    bigram: float


def count_tokens(
    sources: Sequence[WindowSource], vocab_size: int, seq_length: int, most: int | None = None
) -> TokenCounts:
    """Counts the tokens of all windows, each once, whatever the weights of their sources.

    Args:
        sources: Windows of each set of shards; no pair reaches from one into the next.
        vocab_size: V.
        seq_length: Tokens per window.
        most: About so many tokens are read of a larger corpus, in blocks; None: 10 million.

    Returns:
        The counts.

    Raises:
        DataError: The shards cannot be read, or hold an id beyond the vocabulary.
    """
    limit = MOST_COUNTED_TOKENS if most is None else most
    token_V = np.zeros(vocab_size, dtype=np.int64)
    pairs = []
    share = min(1.0, limit / (sum(one.num_windows for one in sources) * seq_length))
    for source in sources:
        num_tokens = source.num_windows * seq_length
        for start, stop in _list_blocks(num_tokens, share):
            # With the first token of the next block, so that no pair is lost.
            block = source.source.read_stored(start, min(stop + 1, num_tokens)).astype(np.int64)
            if block.min() < 0 or block.max() >= vocab_size:
                raise DataError(
                    f"{source.source.prefix} holds ids beyond model.vocab_size={vocab_size}: make "
                    "the shards anew with mdm prepare."
                )
            token_V += np.bincount(block[: stop - start], minlength=vocab_size)
            pairs.append(block[:-1] * vocab_size + block[1:])
    pair_P, count_P = np.unique(np.concatenate(pairs), return_counts=True)
    first_P = pair_P // vocab_size
    first_V = np.zeros(vocab_size, dtype=np.int64)
    np.add.at(first_V, first_P, count_P)
    return TokenCounts(
        token_V, pair_P, count_P, first_V, np.bincount(first_P, minlength=vocab_size)
    )


def judge_windows(
    counts: TokenCounts, windows: Iterable[TextWindow]
) -> tuple[CrossEntropy, CrossEntropy]:
    """What counting gives on windows.

    Args:
        counts: Of other text.
        windows: At least one.

    Returns:
        Over all tokens; and over all but the first of each text, which next-token prediction does
        not predict.
    """
    of_all, of_rest = [], []
    for window in windows:
        tokens_S = window.tokens_S
        place_N = find_places_after_first(window)
        costs_2S = np.tile(-np.log(counts.compute_unigram(tokens_S)), (2, 1))
        after_N = counts.compute_bigram(tokens_S[place_N - 1], tokens_S[place_N])
        costs_2S[1, place_N] = -np.log(after_N)
        of_all.append(costs_2S.mean(axis=1))
        # As for a model, a window of nothing but first tokens counts with the loss 0.
        of_rest.append(costs_2S[:, place_N].mean(axis=1) if len(place_N) else np.zeros(2))
    first, second = (CrossEntropy(*np.mean(each, axis=0).tolist()) for each in (of_all, of_rest))
    return first, second


def _list_blocks(num_tokens: int, share: float) -> Iterator[tuple[int, int]]:
    """Where blocks begin and end that hold about a share of a stream; all of it for 1."""
    length = min(_BLOCK_TOKENS, num_tokens)
    if share >= 1:
        starts = list(range(0, num_tokens, length))
    else:
        starts = spread_blocks(num_tokens, length, max(1, round(share * num_tokens / length)))
    for start in starts:
        yield start, min(start + length, num_tokens)
