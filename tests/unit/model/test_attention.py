"""Core attention against softmax(Q K^T / sqrt(D)) V written out, in float64, and its memory."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from attention_examples import Dropping, mask_of, rule_of
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_mdm.diffusion.key_dropout import DroppedKeys
from megatron_mdm.model.attention import AttentionInputs, ScaledDotProductCoreAttention
from megatron_mdm.model.elementwise import Rotation, rotate

SIZE, HEADS, WIDTH = 90, 4, 6
CPU = torch.device("cpu")


def core_of(groups: int, causal: bool) -> ScaledDotProductCoreAttention:
    sizes = SimpleNamespace(
        attention_dropout=0.0, num_query_groups=groups, num_attention_heads=HEADS
    )
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return ScaledDotProductCoreAttention(sizes, 1, mask_type, "self")


def heads(size: int, batch_size: int, groups: int, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    return [
        torch.randn(
            size, batch_size, number, WIDTH, dtype=dtype, generator=generator
        ).requires_grad_()
        for number in (HEADS, groups, groups)
    ]


def write_out(query: Tensor, key: Tensor, value: Tensor, seen_BSS: Tensor) -> Tensor:
    """The formula, [S, B, N * D]."""
    rotation = Rotation.build(query.shape[0], WIDTH, 10000.0, CPU)
    repeats = HEADS // key.shape[2]
    q, k = rotate(query, rotation), rotate(key, rotation).repeat_interleave(repeats, 1)
    v = value.permute(1, 2, 0, 3).repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(WIDTH)).masked_fill(~seen_BSS[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def documents_of(kind: str, batch_size: int, size: int = SIZE) -> Tensor:
    if kind == "one":
        return torch.zeros(batch_size, size, dtype=torch.int32)
    if kind == "tokens":
        return torch.arange(size, dtype=torch.int32).repeat(batch_size, 1)
    # Two long ones with a handful of tiny ones before, between and after them.
    generator = torch.Generator().manual_seed(batch_size)
    ends = torch.rand(batch_size, size, generator=generator) < 0.3
    ends[:, 8:40] = ends[:, 45 : size - 10] = False
    return (ends.cumsum(1) - ends.int()).int()


def rule(documents_BS: Tensor, lengths_B: Tensor | None, lookahead: int | None) -> Tensor:
    places = torch.arange(documents_BS.shape[1])
    if lengths_B is not None:
        documents_BS = torch.where(places < lengths_B[:, None], documents_BS, -1)
    seen_BSS = documents_BS[:, :, None] == documents_BS[:, None]
    return seen_BSS & (places <= places[:, None] + (SIZE if lookahead is None else lookahead))


def attend(core, qkv, documents_BS, lengths_B=None, lookahead=None):
    size, batch_size = qkv[0].shape[:2]
    mask = mask_of(rule_of(core._is_causal, lookahead), batch_size, size, lengths_B, documents_BS)
    return core(*qkv, AttentionInputs(mask, Rotation.build(size, WIDTH, 10000.0, CPU)))


def assert_follows_the_rule(groups, batch_size, documents_BS, lengths_B, lookahead, causal):
    qkv = heads(SIZE, batch_size, groups)
    out = attend(core_of(groups, causal), qkv, documents_BS, lengths_B, lookahead)
    if documents_BS is None:
        documents_BS = documents_of("one", batch_size)
    expected = write_out(*qkv, rule(documents_BS, lengths_B, 0 if causal else lookahead))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    found, wanted = (torch.autograd.grad((x * weight).sum(), qkv) for x in (out, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["mixed", "one", "tokens"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_within_documents_is_its_formula(kind, batch_size, groups, causal):
    documents_BS = documents_of(kind, batch_size)
    assert_follows_the_rule(groups, batch_size, documents_BS, None, None, causal)


@pytest.mark.parametrize("lengths", [(1, 2, 7), (41, 42, 66), (89, 90, 77)])
@pytest.mark.parametrize("causal", [False, True])
def test_cut_samples_are_documents_that_end_early(lengths, causal):
    lengths_B = torch.tensor(lengths)
    assert_follows_the_rule(2, 3, documents_of("mixed", 3), lengths_B, None, causal)


@pytest.mark.parametrize("lookahead", [0, 1, 30, 88, 89, 90])
@pytest.mark.parametrize("kind", [None, "mixed"])
def test_a_lookahead_is_causal_attention_of_later_queries(lookahead, kind):
    documents_BS = None if kind is None else documents_of(kind, 3)
    for lengths_B in (None, torch.tensor([90, 5, 71])):
        assert_follows_the_rule(2, 3, documents_BS, lengths_B, lookahead, False)


@pytest.mark.parametrize("causal", [False, True])
def test_a_document_has_no_gradient_from_another(causal):
    documents_BS = documents_of("mixed", 1)
    qkv = heads(SIZE, 1, 2, torch.float32)
    out_SBH = attend(core_of(2, causal), qkv, documents_BS)
    for number in documents_BS.unique().tolist():
        here_S = documents_BS[0] == number
        for grad in torch.autograd.grad(out_SBH[here_S].sum(), qkv, retain_graph=True):
            assert (grad[~here_S] == 0).all()
        assert (grad[here_S] != 0).any()


def peak_bytes(size: int, run) -> int:
    """Most that is allocated at once by run(query, key, value), kernels' own memory included."""
    qkv = heads(size, 1, 2, torch.float32)
    run(qkv)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(qkv)

    def walk(events):
        for event in events:
            yield event
            yield from walk(event.children)

    tree = walk(found.profiler.kineto_results.experimental_event_tree())
    events = sorted(
        (event.start_time_ns, event.typed[1].alloc_size)
        for event in tree
        if event.tag.name == "Allocation"
    )
    return max(itertools.accumulate(num_bytes for _, num_bytes in events))


@pytest.mark.parametrize("document", [20, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_grows_like_the_window_and_not_like_its_square(document, causal):
    core = core_of(2, causal)

    def within_documents(qkv):
        documents_BS = torch.arange(qkv[0].shape[0])[None].int() // document
        attend(core, qkv, documents_BS).sum().backward()

    peaks = [peak_bytes(size, within_documents) for size in (1024, 4096)]
    assert peaks[1] < 4.4 * peaks[0]
    # A byte for each of the elements of a mask is more than all there is.
    assert peaks[1] < 4096**2


def test_the_memory_of_a_lookahead_grows_no_faster():
    core = core_of(2, False)

    def half_way(qkv):
        attend(core, qkv, None, lookahead=qkv[0].shape[0] // 2).sum().backward()

    peaks = [peak_bytes(size, half_way) for size in (1024, 4096)]
    assert peaks[1] < 4.4 * peaks[0]


def test_tokens_that_say_where_they_stand_may_come_in_any_order():
    core, qkv = core_of(2, causal=False), heads(SIZE, 3, 2)
    generator = torch.Generator().manual_seed(0)
    places_BS = torch.stack([torch.randperm(SIZE, generator=generator) for _ in range(3)])
    rotation = Rotation.build(SIZE, WIDTH, 10000.0, CPU)
    index_SB = places_BS.T[:, :, None, None]
    mixed = [x.gather(0, index_SB.expand_as(x)) for x in qkv]
    found = core(*mixed, AttentionInputs(None, rotation.gather(places_BS)))
    expected = core(*qkv, AttentionInputs(None, rotation))
    expected = expected.gather(0, places_BS.T[:, :, None].expand_as(expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_dropped_keys_are_left_out_of_the_formula():
    core, qkv = core_of(HEADS, causal=True), heads(SIZE, 2, HEADS)
    dropout = DroppedKeys.from_chances(torch.tensor([1, 2]), torch.tensor([0.5, 0.9]))
    mask = mask_of(Dropping(dropout), 2, SIZE)
    rotation = Rotation.build(SIZE, WIDTH, 10000.0, CPU)
    out = core(*qkv, AttentionInputs(mask, rotation))
    expected = write_out(*qkv, mask[:, 0])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
