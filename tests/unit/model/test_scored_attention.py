"""Capped scores and sinks against their formula in float64, on both kernels."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from attention_examples import mask_of, rule_of
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_mdm.model.attention import AttentionInputs
from megatron_mdm.model.elementwise import Rotation, rotate
from megatron_mdm.model.scored_attention import ScoredCoreAttention

SIZE, HEADS, WIDTH, BATCH = 40, 4, 6, 2
ROTATION = Rotation.build(SIZE, WIDTH, 10000.0, torch.device("cpu"))


def core_of(groups: int, causal: bool, cap: float | None, has_sink: bool) -> ScoredCoreAttention:
    sizes = SimpleNamespace(
        attention_dropout=0.0,
        num_query_groups=groups,
        num_attention_heads=HEADS,
        kv_channels=WIDTH,
        tensor_model_parallel_size=1,
        attention_soft_cap=cap,
        attention_sink=has_sink,
    )
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    core = ScoredCoreAttention(sizes, 1, mask_type, "self").double()
    generator = torch.Generator().manual_seed(1)
    for parameter in core.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return core


def heads(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(SIZE, BATCH, number, WIDTH) for number in (HEADS, groups, groups)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


def write_out(core, qkv, seen_BSS: Tensor, cap: float | None) -> Tensor:
    """The formula, [S, B, N * D]: the sink is a token before all others."""
    query, key, value = qkv
    repeats = HEADS // key.shape[2]
    q, k = rotate(query, ROTATION), rotate(key, ROTATION)
    v = value.permute(1, 2, 0, 3)
    if core.sink_key is not None:
        k = torch.cat([core.sink_key[None, :, None].expand(BATCH, -1, -1, -1), k], dim=2)
        v = torch.cat([core.sink_value[None, :, None].expand(BATCH, -1, -1, -1), v], dim=2)
        seen_BSS = torch.nn.functional.pad(seen_BSS, (1, 0), value=True)
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH)
    if cap is not None:
        scores = cap * (1 - 2 / (torch.exp(2 * scores / cap) + 1))
    scores = scores.masked_fill(~seen_BSS[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("blocks", [False, True], ids=["scores", "flex"])
@pytest.mark.parametrize(("cap", "has_sink"), [(0.7, False), (None, True), (0.7, True)])
@pytest.mark.parametrize(("groups", "causal"), [(HEADS, False), (2, True)])
@pytest.mark.parametrize("document", [None, 17])
def test_scored_attention_is_its_formula(blocks, cap, has_sink, groups, causal, document):
    core, qkv = core_of(groups, causal, cap, has_sink), heads(groups)
    places = torch.arange(SIZE)
    lengths_B = torch.tensor([SIZE, 23])
    documents_BS = None if document is None else (places // document).int().repeat(BATCH, 1)
    mask = mask_of(
        rule_of(causal),
        BATCH,
        SIZE,
        lengths_B,
        documents_BS,
        block_sparse=blocks,
        blocks_alone=blocks,
    )
    # What would go to a GPU's kernel is described by blocks, whatever it is.
    assert isinstance(mask, BlockMask) == blocks
    # FlexAttention has gradients on a GPU alone.
    with torch.set_grad_enabled(not blocks):
        out = core(*qkv, AttentionInputs(mask, ROTATION))
    own_BS = torch.zeros(BATCH, SIZE, dtype=torch.int32) if document is None else documents_BS
    own_BS = torch.where(places < lengths_B[:, None], own_BS, -1)
    seen_BSS = own_BS[:, :, None] == own_BS[:, None]
    if causal:
        seen_BSS = seen_BSS & (places <= places[:, None])
    expected = write_out(core, qkv, seen_BSS, cap)
    # What stands beyond a cut means nothing.
    is_real_SB1 = (places < lengths_B[:, None]).T.unsqueeze(-1)
    torch.testing.assert_close(out * is_real_SB1, expected * is_real_SB1, rtol=1e-9, atol=1e-11)
    if blocks:
        return
    inputs = [*qkv, *core.parameters()]
    weight = torch.randn(out.shape, dtype=out.dtype) * is_real_SB1
    found, wanted = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_without_a_mask_all_tokens_and_the_sink_are_seen():
    core, qkv = core_of(HEADS, False, 0.7, True), heads(HEADS)
    found = core(*qkv, AttentionInputs(None, ROTATION))
    seen_BSS = torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool)
    torch.testing.assert_close(found, write_out(core, qkv, seen_BSS, 0.7), rtol=1e-9, atol=1e-11)
