from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from megatron.core.transformer.enums import AttnMaskType
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from megatron_mdm.model.attention import AttentionInputs, ScaledDotProductCoreAttention
from megatron_mdm.model.attention_mask import attention_lookahead, attention_mask, visibility
from megatron_mdm.model.elementwise import Rotation


def documents_of(ends_BS):
    """Numbers of documents that end where told."""
    ends_BS = torch.as_tensor(ends_BS, dtype=torch.int32)
    return (ends_BS.cumsum(1) - ends_BS).int()


def sees(documents, length, causal, query, key):
    """The rule, for a query that counts."""
    return documents[query] == documents[key] and key < length and (key <= query or not causal)


windows = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        arrays.arrays(np.bool_, (2, size)),
        st.none() | arrays.arrays(np.int64, 2, elements=st.integers(1, size)),
    )
)


@settings(max_examples=60, deadline=None)
@given(windows, st.booleans())
def test_a_token_sees_what_the_rule_says(window, causal):
    ends_BS, lengths_B = window
    size = ends_BS.shape[1]
    documents_BS = documents_of(ends_BS)
    mask = attention_mask(
        2,
        size,
        None if lengths_B is None else torch.from_numpy(lengths_B),
        documents_BS,
        causal=causal,
        block_sparse=False,
    )
    assert (mask.dtype, mask.shape) == (torch.bool, (2, 1, size, size))
    # A softmax needs at least one key, whether or not the query counts.
    assert mask.any(-1).all()
    for sequence, documents in enumerate(documents_BS.tolist()):
        length = size if lengths_B is None else lengths_B[sequence]
        expected = [
            [sees(documents, length, causal, query, key) for key in range(size)]
            for query in range(length)
        ]
        assert mask[sequence, 0, :length].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(windows, st.booleans(), st.integers(0, 12))
def test_a_token_sees_no_further_than_its_lookahead(window, has_documents, lookahead):
    ends_BS, lengths_B = window
    size = ends_BS.shape[1]
    documents_BS = documents_of(ends_BS) if has_documents else None
    mask = attention_mask(
        2,
        size,
        None if lengths_B is None else torch.from_numpy(lengths_B),
        documents_BS,
        causal=False,
        block_sparse=False,
        lookahead=torch.tensor(lookahead),
    )
    assert (mask.dtype, mask.shape) == (torch.bool, (2, 1, size, size))
    assert mask.any(-1).all()
    for sequence in range(2):
        documents = [0] * size if documents_BS is None else documents_BS[sequence].tolist()
        length = size if lengths_B is None else lengths_B[sequence]
        expected = [
            [
                sees(documents, length, False, query, key) and key - query <= lookahead
                for key in range(size)
            ]
            for query in range(length)
        ]
        assert mask[sequence, 0, :length].tolist() == expected


def test_the_lookahead_goes_from_nothing_to_all_in_the_steps_of_annealing():
    assert [attention_lookahead(step, 4, 10) for step in range(6)] == [0, 2, 5, 7, None, None]
    assert [attention_lookahead(step, 5, 3) for step in range(6)] == [0, 0, 1, 1, 2, None]
    assert attention_lookahead(0, 0, 10) is None


@pytest.mark.parametrize(("causal", "lookahead"), [(False, None), (True, None), (False, 17)])
@pytest.mark.parametrize("lengths", [None, [300, 131]])
def test_blocks_describe_the_same_mask_as_elements(causal, lookahead, lengths):
    documents_BS = documents_of(np.random.default_rng(0).random((2, 300)) < 0.02)
    lengths_B = None if lengths is None else torch.tensor(lengths)
    dense, blocks = (
        attention_mask(
            2,
            300,
            lengths_B,
            documents_BS,
            causal=causal,
            block_sparse=block_sparse,
            lookahead=None if lookahead is None else torch.tensor(lookahead),
        )
        for block_sparse in (False, True)
    )
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 300, 300, "cpu"), dense)
    padded = torch.nn.functional.pad(dense, (0, 84, 0, 84)).unflatten(2, (3, 128))
    seen_blocks = padded.unflatten(4, (3, 128)).any(5).any(3)
    assert torch.equal(blocks.to_dense().bool(), seen_blocks)
    assert not seen_blocks.all()


def test_documents_alone_call_for_a_mask_in_causal_attention():
    lengths_B = torch.tensor([1, 3])
    assert attention_mask(2, 3, lengths_B, None, causal=True, block_sparse=False) is None
    assert attention_mask(2, 3, None, None, causal=False, block_sparse=True) is None
    keys = attention_mask(2, 3, lengths_B, None, causal=False, block_sparse=True)
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
    dense, blocks = (
        core(
            query,
            key,
            value,
            AttentionInputs(
                attention_mask(
                    2, 300, lengths_B, documents_BS, causal=causal, block_sparse=block_sparse
                ),
                Rotation.of(300, 8, 10000.0, query.device),
            ),
        )
        for block_sparse in (False, True)
    )
    torch.testing.assert_close(blocks, dense, rtol=1e-5, atol=1e-6)


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
        mask = build(visibility(documents_BS, causal, lookahead), 2, None, 40, 40, device="cpu")
        attend(heads, heads, heads, block_mask=mask)
    assert (builder.frame_count, kernel.frame_count) == (1, 1)
