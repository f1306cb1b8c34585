"""Does generated text repeat itself? How varied tokens are, and a remark where they hardly are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_mdm.diffusion.decoding import SCORED_ORDERS, Decoding

# Shorter texts say little.
_LEAST_TOKENS = 16
# Of what a text's entropy can be. Of 3,200 windows of held-out text 2 had less than half of it.
_LEAST_SHARE_OF_ENTROPY = 0.5
# Where the corpus is not known: the largest share of one token, and the least of distinct pairs.
_MOST_OF_ONE_TOKEN = 0.5
_LEAST_DISTINCT_PAIRS = 0.25


def token_entropy(tokens: Sequence[int]) -> float:
    """Entropy of the tokens of one text, -sum p ln p with p a token's share of it.

    It is at most ln(min(V, number of tokens)), so that only texts of one length compare.

    Args:
        tokens: Token ids of the text.

    Returns:
        Nats; 0 for one token, nan for none.

    Source:
        arXiv 2409.02908.
    """
    if not tokens:
        return math.nan
    total = len(tokens)
    # Not -sum p ln p, which is -0.0 for one token.
    return math.fsum(c / total * math.log(total / c) for c in Counter(tokens).values())


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among the n-grams of all texts; none crosses from text to text.

    It falls with the number of tokens, so compare only equal numbers of tokens. The source
    divides by the number of tokens, n - 1 more a text.

    Args:
        texts: Token ids of each.
        n: Tokens of an n-gram, at least 1.

    Returns:
        In (0, 1]; nan where no text has n tokens.

    Source:
        arXiv 1510.03055.
    """
    found = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(found)) / len(found) if found else math.nan


class RepetitionWatch:
    """Collects texts, and says whether most of them repeat themselves.

    Args:
        corpus_nats: Of a token of the corpus, by the counts of single tokens; None: not known.
    """

    def __init__(self, corpus_nats: float | None) -> None:
        self._corpus_nats = corpus_nats
        self._texts: list[Sequence[int]] = []

    def add(self, tokens: Sequence[int]) -> None:
        """Adds the new tokens of a text; few of them do not count."""
        if len(tokens) >= _LEAST_TOKENS:
            self._texts.append(tokens)

    def remark(self, decoding: Decoding, option: Callable[[str, str], str]) -> str | None:
        """Says that the texts repeat themselves.

        With the corpus' entropy H: the mean entropy of the texts is less than half of the mean of
        min(H, ln n), since n tokens cannot have more than ln n. Without it: in most texts one token
        makes more than half, or less than a quarter of neighbouring pairs are distinct.

        Args:
            decoding: How they were made.
            option: Writes an option and a value as the user would.

        Returns:
            A sentence with what to try; None: they do not, or are too short to tell.
        """
        complaint = self._complain() if self._texts else None
        if complaint is None:
            return None
        remedies = []
        if (decoding.temperature or 0.0) < 1.0:
            remedies.append(option("temperature", "1"))
        if decoding.order in SCORED_ORDERS:
            remedies.append(option("order", "random"))
        remedy = f"try {' or '.join(remedies)}" if remedies else "the model may need more training"
        return f"the text repeats itself: {complaint}; {remedy}"

    def _complain(self) -> str | None:
        texts, nats = self._texts, self._corpus_nats
        if nats is not None:
            found = sum(map(token_entropy, texts)) / len(texts)
            possible = sum(min(nats, math.log(len(text))) for text in texts) / len(texts)
            if found >= _LEAST_SHARE_OF_ENTROPY * possible:
                return None
            told = f"{found:.1f} nats per token where the corpus has {nats:.1f}"
            return told if possible > 0.95 * nats else f"{told} and so short a text {possible:.1f}"
        most = [max(Counter(text).values()) / len(text) for text in texts]
        distinct = [distinct_n([text], 2) for text in texts]
        repeating = [
            (share, pairs)
            for share, pairs in zip(most, distinct, strict=True)
            if share > _MOST_OF_ONE_TOKEN or pairs < _LEAST_DISTINCT_PAIRS
        ]
        if 2 * len(repeating) <= len(texts):
            return None
        share, pairs = (sum(one) / len(repeating) for one in zip(*repeating, strict=True))
        if share > _MOST_OF_ONE_TOKEN:
            return f"one token makes {share:.0%} of it"
        return f"{pairs:.0%} of its pairs of tokens are distinct"
