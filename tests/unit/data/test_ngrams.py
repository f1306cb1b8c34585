from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.data import ngrams
from megatron_mdm.data.ngrams import count_tokens, judge_windows
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.diffusion.samples import TextWindow

VOCAB, SEQ = 5, 4


def windows_of(prefix, tokens) -> SourceWindows:
    with ShardWriter(prefix, np.uint16) as writer:
        writer.add_document(np.asarray(tokens))
        writer.finish()
    return SourceWindows(open_tokens(prefix), SEQ, VOCAB)


def cost_by_hand(streams, tokens, first):
    """Costs of a window's tokens by counting in plain Python."""
    single = Counter(token for stream in streams for token in stream)
    pairs = Counter(pair for stream in streams for pair in pairwise(stream))

    def unigram(token):
        return (single[token] + 1) / (single.total() + VOCAB)

    def bigram(before, token):
        after = {pair: count for pair, count in pairs.items() if pair[0] == before}
        if not after:
            return unigram(token)
        kinds = len(after)
        return (pairs[before, token] + kinds * unigram(token)) / (sum(after.values()) + kinds)

    one = [-math.log(unigram(token)) for token in tokens]
    two = [
        one[place] if place in first else -math.log(bigram(tokens[place - 1], token))
        for place, token in enumerate(tokens)
    ]
    return one, two


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_counts_are_those_of_a_count_by_hand(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("counted")
    ids = st.integers(0, VOCAB - 1)
    streams = data.draw(st.lists(st.lists(ids, min_size=SEQ, max_size=40), min_size=1, max_size=3))
    sources = [windows_of(folder / str(n), stream) for n, stream in enumerate(streams)]
    used = [stream[: len(stream) // SEQ * SEQ] for stream in streams]
    judged = data.draw(st.lists(st.lists(ids, min_size=SEQ, max_size=SEQ), min_size=1, max_size=3))
    whole = [TextWindow(np.array(tokens)) for tokens in judged]
    # Two texts of two tokens in each window.
    halves = [TextWindow(np.array(tokens), np.array([0, 0, 1, 1])) for tokens in judged]
    counts = count_tokens(sources, VOCAB, SEQ)
    assert counts.num_tokens == sum(map(len, used))
    for windows, first in ((whole, {0}), (halves, {0, 2})):
        for found, places in zip(
            judge_windows(counts, windows),
            (range(SEQ), [place for place in range(SEQ) if place not in first]),
            strict=True,
        ):
            costs = [cost_by_hand(used, tokens, first) for tokens in judged]
            for kind in range(2):
                expected = np.mean([[cost[kind][place] for place in places] for cost in costs])
                assert found[kind] == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_all_tokens_sum_to_one(tmp_path):
    counts = count_tokens([windows_of(tmp_path / "a", [0, 1, 0, 2, 0, 1, 2, 2])], VOCAB, SEQ)
    every = np.arange(VOCAB)
    assert counts.compute_unigram(every).sum() == pytest.approx(1)
    for before in range(VOCAB):
        assert counts.compute_bigram(np.full(VOCAB, before), every).sum() == pytest.approx(1)


def test_a_large_corpus_is_counted_in_blocks_from_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ngrams, "_BLOCK_TOKENS", 8)
    sources = [windows_of(tmp_path / "a", np.arange(4000) // 1000)]
    sources += [windows_of(tmp_path / "b", np.full(1000, 4))]
    counts = count_tokens(sources, VOCAB, SEQ, most=1000)
    assert counts.num_tokens == pytest.approx(1000, rel=0.05)
    assert counts.token_V == pytest.approx(200, rel=0.1)
    # Pairs across the ends of blocks are counted too: nearly as many as tokens.
    assert counts.count_P.sum() >= counts.num_tokens - 2
