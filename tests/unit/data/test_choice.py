"""The choice of windows to judge models on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from shard_examples import write

from megatron_mdm.data.choice import choose_windows
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows, Windows


class Documents:
    """Windows of documents of so many windows each."""

    def __init__(self, *sizes):
        self._document_N = np.repeat(np.arange(len(sizes)), sizes)
        self.num_windows = len(self._document_N)
        self.num_asked = 0

    def find_documents(self, number_N):
        self.num_asked += len(number_N)
        return self._document_N[number_N][:, None]


def documents_of(windows, number, key=(0,)):
    chosen = choose_windows(windows, number, key)
    assert len(set(chosen.window_N.tolist())) == len(chosen.window_N)
    found = windows.find_documents(chosen.window_N)[:, 0]
    # Numbers of documents tell the same ones apart.
    pairs = set(zip(found.tolist(), chosen.document_N.tolist(), strict=True))
    assert len(pairs) == len(set(found)) == chosen.document_N.max() + 1
    return Counter(found.tolist())


def test_one_long_document_is_not_most_of_what_is_judged():
    windows = Documents(900, *[10] * 9)
    assert documents_of(windows, 10) == dict.fromkeys(range(10), 1)
    assert documents_of(windows, 20) == dict.fromkeys(range(10), 2)
    # More than the short ones have: the rest is of the long one.
    assert documents_of(windows, 120) == {0: 30} | dict.fromkeys(range(1, 10), 10)
    assert documents_of(windows, 2000) == {0: 900} | dict.fromkeys(range(1, 10), 10)


def test_without_long_documents_every_window_is_equally_likely():
    windows = Documents(*[1] * 20)
    counts = Counter()
    for seed in range(4000):
        counts.update(choose_windows(windows, 5, (seed,)).window_N.tolist())
    assert set(counts) == set(range(20))
    # 1,000 each, with a standard deviation of 27.
    assert max(abs(count - 1000) for count in counts.values()) < 120


def test_windows_of_a_document_are_equally_likely():
    counts = Counter()
    for seed in range(3000):
        chosen = choose_windows(Documents(6, 6), 2, (seed,)).window_N
        counts.update(window for window in chosen.tolist() if window < 6)
    # 500 each, with a standard deviation of 20.
    assert max(abs(counts[window] - 500) for window in range(6)) < 90


def test_few_windows_of_a_large_corpus_are_looked_at():
    """Each costs reads of the index, and the first windows are of different documents anyway."""
    many = Documents(*[5] * 200_000)
    assert len(documents_of(many, 64)) == 64
    many.num_asked = 0
    choose_windows(many, 64, (0,))
    assert many.num_asked == 128
    # Where one document is nearly all there is, others are looked for, and not without end.
    windows = Documents(1_000_000, *[5000] * 3)
    assert documents_of(windows, 4) == dict.fromkeys(range(4), 1)
    alone = Documents(1_000_000, 1, 1)
    choose_windows(alone, 8, (0,))
    assert 1 << 14 <= alone.num_asked < 1 << 15


@pytest.mark.parametrize("seq_length", [3, 4])
def test_a_window_is_of_the_document_of_its_middle(tmp_path, seq_length):
    """Documents of 7, 0, 2 and 10 tokens, and then the same shards once more."""
    prefix = write(tmp_path / "tokens", [range(7), [], [8, 9], range(10)])
    windows = Windows([SourceWindows(open_tokens(prefix), seq_length, 20) for _ in range(2)])
    tokens = np.repeat([0, 2, 3], [7, 2, 10])
    middles = [w * seq_length + seq_length // 2 for w in range(19 // seq_length)]
    expected = [[source, tokens[middle]] for source in range(2) for middle in middles]
    assert windows.find_documents(np.arange(windows.num_windows)).tolist() == expected
