"""Attention: our kernels beside scores written out and a mask by elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.attention_rules import CausalAttention, FullAttention
from megatron_mdm.diffusion.samples import SEGMENT_IDS
from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.model.attention import AttentionInputs, ScaledDotProductCoreAttention
from megatron_mdm.model.attention_mask import build_attention_mask, suits_flex_attention
from megatron_mdm.model.block_config import BlockConfig
from megatron_mdm.model.elementwise import Rotation, rotate
from megatron_mdm.studies.benchmarks.devices import choose_device, choose_dtype, time_calls
from megatron_mdm.studies.benchmarks.harness import (
    compare_cases,
    draw_documents,
    run_above_floor,
    summarize,
)
from megatron_mdm.studies.benchmarks.settings import AttentionSettings
from megatron_mdm.training.throughput import find_peak_flops, measure_matmul_flops

_ROTARY_BASE = 10000.0
# Operations for each pair of query and key, head and channel: scores and output take a
# multiplication and an addition each, and the backward pass twice as many.
_FLOPS_PER_PAIR = 12
# Ours and what it is compared with.
_COMPARED = (
    ("full", "full_explicit"),
    ("documents", "documents_dense"),
    ("documents", "full"),
    ("causal", "full"),
)


class _Inputs(NamedTuple):
    query_SBND: Tensor
    key_SBGD: Tensor
    value_SBGD: Tensor
    documents_BS: Tensor
    rotation: Rotation


class _Passes(NamedTuple):
    milliseconds: float
    mask_milliseconds: float
    loss: float
    gradient_norm: float


class _Case(NamedTuple):
    # The mask of a forward pass, which all layers share.
    make_mask: Callable[[_Inputs], Any]
    attend: Callable[[_Inputs, Any], Tensor]


def measure_attention(settings: AttentionSettings) -> dict[str, Any]:
    """Times forward and backward of one layer's attention, each case in processes of its own.

    Every case turns queries and keys by their positions and brings the output into the same order.
    `full`, `causal` and `documents` are ours. `full_explicit` writes out scores and weights, as the
    papers' code does; `documents_dense` hands PyTorch's kernel a boolean mask of S x S elements per
    window. Float32 on a CPU, bfloat16 on a GPU, where passes queue up as those of layers do.

    Args:
        settings: Sizes.

    Returns:
        Of each case milliseconds, those of making the mask, which all layers of a model share, peak
        bytes above what holds inputs and their gradients, useful FLOP/s and their share of the rate
        of a large matmul, and of a known GPU's data sheet, and what shows that cases compute the
        same; ours over others.

    Raises:
        ConfigError: A setting is out of range, or there is no GPU where one is asked for.
    """
    _check(settings)
    device = choose_device(settings.device)
    dtype = choose_dtype(device)
    runs = run_above_floor(
        _passes, settings.cases, settings, matmul=(measure_matmul_flops, device, dtype)
    )
    matmul = [run.value for run in runs.pop("matmul")]
    ceilings = {"share_of_matmul": max(matmul)}
    if (peak := find_peak_flops(device, dtype)) is not None:
        ceilings["share_of_peak"] = peak
    times = {name: [run.value.milliseconds for run in found] for name, found in runs.items()}
    peaks = {name: [run.peak_bytes for run in found] for name, found in runs.items()}
    documents_BS = _documents(settings)
    results: dict[str, Any] = {
        "useful_flops": f"{_FLOPS_PER_PAIR} x pairs of query and key x heads x head width: 4 "
        "forward, 8 backward; softmax, rotation and recomputation not counted",
        "matmul_flops_per_second": summarize(matmul),
        "num_documents": int((documents_BS.diff(dim=1) != 0).sum()) + settings.micro_batch_size,
    }
    for name, measured in runs.items():
        flops = useful_flops(name, settings, documents_BS)
        speeds = [flops / time * 1e3 for time in times[name]]
        results[name] = {
            "milliseconds": summarize(times[name]),
            "mask_milliseconds": summarize([run.value.mask_milliseconds for run in measured]),
            "peak_bytes": summarize(peaks[name]),
            "useful_flops": flops,
            "useful_flops_per_second": summarize(speeds),
            **{
                name: summarize([speed / ceiling for speed in speeds])
                for name, ceiling in ceilings.items()
            },
            "loss": measured[0].value.loss,
            "gradient_norm": measured[0].value.gradient_norm,
        }
    compared = [pair for pair in _COMPARED if set(pair) <= set(settings.cases)]
    results["ratios"] = compare_cases(compared, milliseconds=times, peak_bytes=peaks)
    return results


def useful_flops(case: str, settings: AttentionSettings, documents_BS: Tensor) -> int:
    """Operations of a forward and backward pass that the result needs.

    Args:
        case: `full`, `causal` or `documents`, or a name that begins so.
        settings: Sizes.
        documents_BS: int [B, S], number of each token's document.

    Returns:
        12 N D times the pairs of a query and a key that it sees: B S^2, causal B S (S + 1) / 2,
        within documents the sum of their squared lengths.
    """
    size = settings.seq_length
    if case == "causal":
        pairs = settings.micro_batch_size * size * (size + 1) // 2
    elif case.startswith("documents"):
        pairs = sum(
            int((documents_S.unique_consecutive(return_counts=True)[1] ** 2).sum())
            for documents_S in documents_BS
        )
    else:
        pairs = settings.micro_batch_size * size**2
    return _FLOPS_PER_PAIR * settings.num_heads * settings.head_width * pairs


def _check(settings: AttentionSettings) -> None:
    groups = settings.query_groups or settings.num_heads
    if settings.num_heads % groups:
        raise ConfigError(
            f"--query-groups={groups} does not divide --num-heads={settings.num_heads}: each group "
            "needs the same number of heads."
        )
    if settings.head_width % 2:
        raise ConfigError(
            f"--head-width={settings.head_width} is odd, but rotary embeddings turn pairs of "
            "channels: use an even number."
        )


def _passes(name: str, settings: AttentionSettings) -> _Passes:
    keep_freed_memory()
    device = choose_device(settings.device)
    inputs = _make_inputs(settings, device)
    leaves = inputs[:3]
    case = _CASES[name](settings, device)
    grad_SBH = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).flatten(2)
    grad_SBH = grad_SBH.to(leaves[0])
    mask_seconds = time_calls(lambda: case.make_mask(inputs), device)
    mask = case.make_mask(inputs)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        out_SBH = case.attend(inputs, mask)
        torch.autograd.backward(out_SBH, grad_SBH)
        return out_SBH.detach()

    seconds, out_SBH = time_calls(run, device), run()
    # Wider on the host, so that they are no part of a GPU's peak.
    grads = [leaf.grad.cpu().double() for leaf in leaves if leaf.grad is not None]
    return _Passes(
        seconds * 1e3,
        mask_seconds * 1e3,
        float((out_SBH.cpu().double() * grad_SBH.cpu().double()).sum()),
        math.sqrt(sum(float(grad.square().sum()) for grad in grads)),
    )


def _make_inputs(settings: AttentionSettings, device: torch.device) -> _Inputs:
    generator = torch.Generator().manual_seed(0)
    groups = settings.query_groups or settings.num_heads
    query, key, value = (
        torch.randn(
            (settings.seq_length, settings.micro_batch_size, heads, settings.head_width),
            generator=generator,
        )
        .to(device, choose_dtype(device))
        .requires_grad_()
        for heads in (settings.num_heads, groups, groups)
    )
    return _Inputs(
        query,
        key,
        value,
        _documents(settings).to(device),
        Rotation.build(settings.seq_length, settings.head_width, _ROTARY_BASE, device),
    )


def _documents(settings: AttentionSettings) -> Tensor:
    shape = (settings.micro_batch_size, settings.seq_length)
    return torch.from_numpy(draw_documents(shape, settings.document_length))


def _ours(
    settings: AttentionSettings,
    device: torch.device,
    *,
    causal: bool = False,
    within_documents: bool = False,
) -> _Case:
    config = BlockConfig(
        compiled=device.type == "cuda",
        num_layers=1,
        hidden_size=settings.num_heads * settings.head_width,
        num_attention_heads=settings.num_heads,
        num_query_groups=settings.query_groups or settings.num_heads,
        kv_channels=settings.head_width,
        attention_dropout=0.0,
    )
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    core = ScaledDotProductCoreAttention(config, 1, mask_type, "self")

    def make_mask(inputs: _Inputs) -> Any:
        return build_attention_mask(
            settings.micro_batch_size,
            settings.seq_length,
            None,
            CausalAttention() if causal else FullAttention(),
            {SEGMENT_IDS: inputs.documents_BS} if within_documents else {},
            device=device,
            block_sparse=suits_flex_attention(device, settings.head_width, 0.0),
        )

    def attend(inputs: _Inputs, mask: Any) -> Tensor:
        out_SBH: Tensor = core(*inputs[:3], AttentionInputs(mask, inputs.rotation))
        return out_SBH

    return _Case(make_mask, attend)


def _explicit(settings: AttentionSettings, device: torch.device) -> _Case:
    def attend(inputs: _Inputs, _: None) -> Tensor:
        q_BNSD, k_BGSD, v_BGSD = _turned(inputs)
        k_BNSD, v_BNSD = _repeat_groups(q_BNSD, k_BGSD, v_BGSD)
        scores_BNSS = q_BNSD @ k_BNSD.transpose(2, 3) / math.sqrt(settings.head_width)
        return _in_order(scores_BNSS.softmax(-1) @ v_BNSD)

    return _Case(lambda inputs: None, attend)


def _dense(settings: AttentionSettings, device: torch.device) -> _Case:
    def make_mask(inputs: _Inputs) -> Tensor:
        documents_BS = inputs.documents_BS
        return (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)).unsqueeze(1)

    def attend(inputs: _Inputs, mask_B1SS: Tensor) -> Tensor:
        q, k, v = _turned(inputs)
        # No kernel of a GPU takes both a mask and groups without writing out all scores.
        k, v = _repeat_groups(q, k, v) if q.is_cuda else (k, v)
        is_grouped = q.shape[1] != k.shape[1]
        return _in_order(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SS, enable_gqa=is_grouped)
        )

    return _Case(make_mask, attend)


def _nothing(settings: AttentionSettings, device: torch.device) -> _Case:
    def attend(inputs: _Inputs, _: None) -> Tensor:
        # A small product: the library of a GPU takes memory for its first one.
        query_KD = inputs.query_SBND[:16, 0, 0]
        others = inputs.key_SBGD.sum() + inputs.value_SBGD.sum() + (query_KD @ query_KD.T).sum()
        return (inputs.query_SBND + others).flatten(2)

    return _Case(lambda inputs: None, attend)


def _turned(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rotate(inputs.query_SBND, inputs.rotation, compiled=inputs.query_SBND.is_cuda),
        rotate(inputs.key_SBGD, inputs.rotation, compiled=inputs.key_SBGD.is_cuda),
        inputs.value_SBGD.permute(1, 2, 0, 3).contiguous(),
    )


def _repeat_groups(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
    repeats = q_BNSD.shape[1] // k_BGSD.shape[1]
    return k_BGSD.repeat_interleave(repeats, dim=1), v_BGSD.repeat_interleave(repeats, dim=1)


def _in_order(out_BNSD: Tensor) -> Tensor:
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)


_CASES: dict[str, Callable[[AttentionSettings, torch.device], _Case]] = {
    "nothing": _nothing,
    "full": _ours,
    "full_explicit": _explicit,
    "causal": functools.partial(_ours, causal=True),
    "documents": functools.partial(_ours, within_documents=True),
    "documents_dense": _dense,
}
