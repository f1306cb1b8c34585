"""Windows of pairs: whole, each in one window, filled and padded as told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_shards import END, write_pairs

from megatron_mdm.config import FinetuningConfig
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.prompt_response_pairs import PackedPairs, read_prompt_lengths
from megatron_mdm.data.shards import prompts_path
from megatron_mdm.data.store import TokenStore, open_tokens

VOCAB = 100


def shards_of(prefix: Path, pairs, **options) -> TokenStore:
    write_pairs(prefix, pairs, VOCAB, **options)
    return open_tokens(prefix)


def windows_of(shards, seq_length=16, fill_tokens=0, **settings_) -> PackedPairs:
    return PackedPairs(
        shards,
        read_prompt_lengths(shards),
        seq_length,
        VOCAB,
        FinetuningConfig(enabled=True, **settings_),
        fill_tokens=fill_tokens,
    )


def contents(windows: PackedPairs):
    """Prompt, learned tokens and all tokens of every pair, and the padding of every window."""
    found, padding = [], []
    for number in range(windows.num_windows):
        window = windows.read_window(number)
        tokens = window.tokens_S.tolist()
        end = 0
        for one in window.pairs:
            assert one.start == end
            end = one.stop
            found.append(
                (
                    tuple(tokens[one.start : one.response]),
                    tuple(tokens[one.response : one.learned_stop]),
                    tuple(tokens[one.start : one.stop]),
                )
            )
        padding.append(tokens[end:])
    return found, padding


pair_lists = st.lists(
    st.tuples(
        st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6),
        st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(pair_lists, st.sampled_from([0, 3, 9, 16]), st.booleans())
def test_every_pair_is_whole_in_one_window_and_filled(tmp_path_factory, pairs, fill, packing):
    shards = shards_of(tmp_path_factory.mktemp("s") / "a", pairs)
    windows = windows_of(shards, fill_tokens=fill, packing=packing)
    found, padding = contents(windows)
    expected = []
    for prompt, response in pairs:
        learned = [*response, END]
        learned += [END] * (min(fill, 16 - len(prompt)) - len(learned))
        expected.append((tuple(prompt), tuple(learned), (*prompt, *learned)))
    assert sorted(found) == sorted(expected)
    assert all(set(part) <= {END} for part in padding)
    if not packing:
        assert windows.num_windows == len(pairs)
    total = sum(len(learned) for _, learned, _ in expected)
    assert windows.learned_share == pytest.approx(total / (16 * windows.num_windows))
    window = windows.read_window(0)
    assert window.pairs_per_window == len(pairs) / windows.num_windows


@pytest.mark.parametrize(
    ("policy", "learned", "seen"),
    [
        ("learned", (3, 4, END), (1, 2, 3, 4, END)),
        ("given", (3, 4), (1, 2, 3, 4, END)),
        ("none", (3, 4), (1, 2, 3, 4)),
    ],
)
def test_the_end_of_text_is_learned_given_or_left_out(tmp_path, policy, learned, seen):
    windows = windows_of(shards_of(tmp_path / "a", [([1, 2], [3, 4])]), end_of_text=policy)
    assert contents(windows)[0] == [((1, 2), learned, seen)]
    assert windows.learned_share == len(learned) / 16


def test_what_is_too_long_is_refused_or_left_out_with_a_word(tmp_path, caplog):
    pairs = [([1] * 10, [2] * 6), ([3], [4]), ([5] * 9, [6] * 6)]
    shards = shards_of(tmp_path / "a", pairs)
    with pytest.raises(DataError) as caught:
        windows_of(shards)
    assert str(caught.value) == (
        f"1 of the 3 pairs of {tmp_path}/a are longer than data.seq_length=16, the longest has "
        "17 tokens: use a longer window, or leave them out with finetuning.too_long=skip."
    )
    windows = windows_of(shards, too_long="skip")
    assert "1 of the 3 pairs" in caplog.text
    assert sorted(prompt[0] for prompt, _, _ in contents(windows)[0]) == [3, 5]
    # Without its end it fits.
    assert windows_of(shards, end_of_text="none").num_windows == 3
    with pytest.raises(DataError, match="3 of the 3 pairs"):
        windows_of(shards, seq_length=2, too_long="skip")


def test_text_without_prompts_and_prompts_of_other_shards_are_refused(tmp_path):
    plain = shards_of(tmp_path / "plain", [([1], [2])], with_recipe=False)
    with pytest.raises(DataError, match="holds text and no prompts with responses"):
        read_prompt_lengths(plain)
    shards = shards_of(tmp_path / "a", [([1], [2]), ([3, 4], [5])])
    assert read_prompt_lengths(shards).tolist() == [1, 2]
    prompts_path(tmp_path / "a").write_bytes(np.array([2, 1], dtype="<i4").tobytes())
    with pytest.raises(DataError, match="does not belong to the 2 documents"):
        read_prompt_lengths(shards)
    prompts_path(tmp_path / "a").unlink()
    with pytest.raises(DataError, match=r"a.prompts cannot be read"):
        read_prompt_lengths(shards)


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    windows = windows_of(shards_of(tmp_path / "a", [([1, VOCAB], [2])]))
    with pytest.raises(DataError, match=r"holds the token id 100 in window 0, beyond"):
        windows.read_window(0)


def test_the_fingerprint_knows_tokens_prompts_and_packing(tmp_path):
    pairs = [([1, 2], [3, 4]), ([5], [6])]
    first = windows_of(shards_of(tmp_path / "a", pairs))
    again = windows_of(shards_of(tmp_path / "b", pairs))
    assert first.fingerprint() == again.fingerprint()
    others = [
        windows_of(shards_of(tmp_path / "c", [([1], [2, 3, 4]), ([5], [6])])),
        windows_of(shards_of(tmp_path / "d", [([1, 2], [3, 5]), ([5], [6])])),
        windows_of(shards_of(tmp_path / "e", pairs), fill_tokens=4),
        windows_of(shards_of(tmp_path / "f", pairs), packing=False),
        windows_of(shards_of(tmp_path / "g", pairs), end_of_text="given"),
        windows_of(shards_of(tmp_path / "h", pairs), seq_length=12),
    ]
    prints = {one.fingerprint() for one in [first, *others]}
    assert len(prints) == 7


def test_windows_outside_the_data_are_refused(tmp_path):
    windows = windows_of(shards_of(tmp_path / "a", [([1], [2])]))
    for number, shift in ((-1, 0), (1, 0), (0, 1)):
        with pytest.raises(IndexError):
            windows.read_window(number, shift)
