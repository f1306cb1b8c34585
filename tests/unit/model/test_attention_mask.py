from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_examples import annealed_reaches, mask_of, rule_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from megatron.core.transformer.enums import AttnMaskType
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from megatron_mdm.diffusion.attention_rules import CausalAttention, FullAttention
from megatron_mdm.model.attention import AttentionInputs, ScaledDotProductCoreAttention
from megatron_mdm.model.attention_mask import (
    Segment,
    Segments,
    build_visibility_rule,
)
from megatron_mdm.model.elementwise import Rotation


def documents_of(ends_BS):
    """Numbers of documents that end where told."""
    ends_BS = torch.as_tensor(ends_BS, dtype=torch.int32)
    return (ends_BS.cumsum(1) - ends_BS).int()


def visible(documents_BS, lengths_B, lookahead):
    """The rule, bool [B, S, S]: the same document, as far beyond the cut, and not too far ahead."""
    documents_BS = np.asarray(documents_BS)
    places = np.arange(documents_BS.shape[1])
    beyond_BS = np.zeros_like(documents_BS, dtype=bool)
    if lengths_B is not None:
        beyond_BS = places >= np.asarray(lengths_B)[:, None]
    same = documents_BS[:, :, None] == documents_BS[:, None]
    same = np.where(beyond_BS[:, :, None], beyond_BS[:, None], same & ~beyond_BS[:, None])
    return same & (places <= places[:, None] + (len(places) if lookahead is None else lookahead))


def write_out(mask, shape):
    """Segments as bool [B, S, S]."""
    batch_size, size = shape
    seen = np.zeros((batch_size, size, size), dtype=bool)
    covered = np.zeros(shape, dtype=int)
    for sequence, start, stop, part in mask.segments:
        covered[sequence, start:stop] += 1
        if part is None:
            within = np.ones((stop - start,) * 2, dtype=bool)
            within = within if mask.lookahead is None else np.tril(within, mask.lookahead)
        else:
            # Linear in S: of no more than so many keys a query.
            assert stop - start <= 64
            within = part[0, 0].numpy()
        seen[sequence, start:stop, start:stop] = within
    assert (covered == 1).all()
    return seen


@st.composite
def windows(draw):
    """Documents of two sequences of up to 200 tokens, most of them short, and lengths or None."""
    size = draw(st.integers(1, 200))
    longest = draw(st.sampled_from([1, 10, 100, 300]))
    ends_BS = np.zeros((2, size), dtype=bool)
    for ends_S in ends_BS:
        tokens = draw(st.lists(st.integers(1, longest), max_size=size))
        ends = np.cumsum(tokens, dtype=int) - 1
        ends_S[ends[ends < size]] = True
    return ends_BS, draw(st.none() | arrays.arrays(np.int64, 2, elements=st.integers(1, size)))


@settings(max_examples=150, deadline=None)
@given(windows(), st.booleans(), st.none() | st.integers(0, 210), st.booleans())
def test_a_token_sees_what_the_rule_says(window, causal, lookahead, has_documents):
    ends_BS, lengths_B = window
    if causal:
        lookahead = None
    documents_BS = documents_of(ends_BS if has_documents or lookahead is None else 0 * ends_BS)
    mask = mask_of(
        rule_of(causal, lookahead),
        *ends_BS.shape,
        None if lengths_B is None else torch.from_numpy(lengths_B),
        documents_BS if has_documents or lookahead is None else None,
    )
    expected = visible(documents_BS, lengths_B, 0 if causal else lookahead)
    # A softmax needs at least one key, whether or not the query counts.
    assert expected.any(-1).all()
    np.testing.assert_array_equal(write_out(mask, ends_BS.shape), expected)


def test_tiny_documents_share_a_segment_and_others_need_no_mask():
    documents_BS = torch.repeat_interleave(
        torch.arange(7), torch.tensor([65, 1, 60, 4, 300, 3, 1])
    )[None]
    mask = mask_of(FullAttention(), 1, 434, None, documents_BS)
    bounds = [(start, stop, part is None) for _, start, stop, part in mask.segments]
    assert bounds[:3] == [(0, 65, True), (65, 126, False), (126, 130, True)]
    assert bounds[3:] == [(130, 430, True), (430, 434, False)]


def test_the_lookahead_goes_from_nothing_to_all_in_the_steps_of_annealing():
    assert annealed_reaches(4, 10, range(6)) == [0, 2, 5, 7, None, None]
    assert annealed_reaches(5, 3, range(6)) == [0, 0, 1, 1, 2, None]


@pytest.mark.parametrize(("causal", "lookahead"), [(False, None), (True, None), (False, 17)])
@pytest.mark.parametrize("lengths", [None, [300, 131]])
def test_blocks_describe_the_rule(causal, lookahead, lengths):
    documents_BS = documents_of(np.random.default_rng(0).random((2, 300)) < 0.02)
    blocks = mask_of(
        rule_of(causal, lookahead),
        2,
        300,
        None if lengths is None else torch.tensor(lengths),
        documents_BS,
        block_sparse=True,
    )
    dense = torch.from_numpy(visible(documents_BS, lengths, 0 if causal else lookahead))[:, None]
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 300, 300, "cpu"), dense)
    padded = torch.nn.functional.pad(dense, (0, 84, 0, 84)).unflatten(2, (3, 128))
    seen_blocks = padded.unflatten(4, (3, 128)).any(5).any(3)
    assert torch.equal(blocks.to_dense().bool(), seen_blocks)
    assert not seen_blocks.all()


def test_documents_alone_call_for_a_mask_in_causal_attention():
    lengths_B = torch.tensor([1, 3])
    assert mask_of(CausalAttention(), 2, 3, lengths_B) is None
    assert mask_of(FullAttention(), 2, 3, block_sparse=True) is None
    documents_BS = torch.zeros(2, 3, dtype=torch.int32)
    mask = mask_of(CausalAttention(), 2, 3, None, documents_BS)
    assert mask == Segments((Segment(0, 0, 3, None), Segment(1, 0, 3, None)), 0)
    keys = mask_of(FullAttention(), 2, 3, lengths_B, block_sparse=True)
    assert keys[:, 0, 0].tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_both_kernels_attend_alike(causal, groups):
    config = SimpleNamespace(attention_dropout=0.0, num_query_groups=groups, num_attention_heads=4)
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    core = ScaledDotProductCoreAttention(config, 1, mask_type, "self")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(300, 2, heads, 8, generator=generator) for heads in (4, groups, groups)
    )
    documents_BS = documents_of(np.random.default_rng(1).random((2, 300)) < 0.02)
    lengths_B = torch.tensor([300, 131])
    segments, blocks = (
        core(
            query,
            key,
            value,
            AttentionInputs(
                mask_of(
                    rule_of(causal), 2, 300, lengths_B, documents_BS, block_sparse=block_sparse
                ),
                Rotation.build(300, 8, 10000.0, query.device),
            ),
        )
        for block_sparse in (False, True)
    )
    torch.testing.assert_close(blocks, segments, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("causal", "lookaheads"), [(False, None), (True, None), (False, (0, 7, 39))]
)
def test_new_documents_and_steps_need_no_new_compilation(causal, lookaheads):
    builder, kernel = CompileCounter(), CompileCounter()
    build = torch.compile(create_block_mask, backend=builder, dynamic=False)
    attend = torch.compile(flex_attention, backend=kernel, dynamic=False)
    heads = torch.ones(2, 1, 40, 8)
    for seed in range(3):
        documents_BS = documents_of(np.random.default_rng(seed).random((2, 40)) < 0.2)
        lookahead = None if lookaheads is None else torch.tensor(lookaheads[seed])
        reach = 0 if causal else lookahead
        mask = build(build_visibility_rule(documents_BS, reach), 2, None, 40, 40, device="cpu")
        attend(heads, heads, heads, block_mask=mask)
    assert (builder.frame_count, kernel.frame_count) == (1, 1)
