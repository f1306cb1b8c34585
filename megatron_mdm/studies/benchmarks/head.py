"""The output layer and its loss: time and peak memory beside layers that hold all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.model.head import (
    CHUNK_BYTES,
    ChunkedLinearLoss,
    Predictions,
    cross_entropy_of_chunk,
)
from megatron_mdm.model.vocabulary import VocabularySlice
from megatron_mdm.studies.benchmarks.devices import choose_device, choose_dtype, time_calls
from megatron_mdm.studies.benchmarks.harness import compare_cases, run_above_floor, summarize
from megatron_mdm.studies.benchmarks.settings import HeadSettings


class _Inputs(NamedTuple):
    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    # Where they are is known on the host, as in training.
    masked_M: Tensor


def measure_head(settings: HeadSettings) -> dict[str, Any]:
    """Times forward and backward of the output layer, each case in processes of its own.

    `all_logits` computes the logits of all positions and picks those of the masks, as the papers'
    code does; `masked_logits` computes those of the masks at once; `chunked` is ours. Float32 on a
    CPU, bfloat16 on a GPU, the softmax in float32.

    Args:
        settings: Sizes.

    Returns:
        Of each case seconds and peak bytes above those of a process that holds the inputs and
        their gradients; the loss; and ours as a share of each.

    Raises:
        ConfigError: A setting is out of range, or there is no GPU where one is asked for.
    """
    choose_device(settings.device)
    runs = run_above_floor(_passes, _CASES, settings)
    seconds = {name: [run.value[0] for run in found] for name, found in runs.items()}
    peaks = {name: [run.peak_bytes for run in found] for name, found in runs.items()}
    results: dict[str, Any] = {
        name: {
            "seconds": summarize(seconds[name]),
            "peak_bytes": summarize(peaks[name]),
            "loss": round(runs[name][0].value[1], 5),
        }
        for name in runs
    }
    pairs = [("chunked", other) for other in ("all_logits", "masked_logits")]
    return results | compare_cases(pairs, seconds=seconds, peak_bytes=peaks)


def _passes(name: str, settings: HeadSettings) -> tuple[float, float]:
    """Median seconds of a forward and backward pass, and the loss."""
    keep_freed_memory()
    device = choose_device(settings.device)
    place = (device, choose_dtype(device))
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(settings.num_tokens, settings.hidden_size, generator=generator)
    weight_VH = torch.randn(settings.vocab_size, settings.hidden_size, generator=generator)
    targets_T = torch.randint(settings.vocab_size, (settings.num_tokens,), generator=generator)
    inputs = _Inputs(
        hidden_TH.to(*place).requires_grad_(),
        weight_VH.mul_(0.02).to(*place).requires_grad_(),
        targets_T.to(device),
        torch.arange(0, settings.num_tokens, 2, device=device),
    )

    def run() -> Tensor:
        inputs.hidden_TH.grad = inputs.weight_VH.grad = None
        loss = _CASES[name](inputs)
        torch.autograd.backward(loss)
        return loss.detach()

    return time_calls(run, device), float(run())


def _nothing(inputs: _Inputs) -> Tensor:
    # A small product: the library of a GPU takes memory for its first one.
    hidden_KH = inputs.hidden_TH[:16]
    return inputs.hidden_TH.sum() + inputs.weight_VH.sum() + (hidden_KH @ hidden_KH.T).sum()


def _all_logits(inputs: _Inputs) -> Tensor:
    logits_TV = F.linear(inputs.hidden_TH, inputs.weight_VH)
    return _cross_entropy(logits_TV[inputs.masked_M], inputs)


def _masked_logits(inputs: _Inputs) -> Tensor:
    hidden_MH = inputs.hidden_TH.index_select(0, inputs.masked_M)
    return _cross_entropy(F.linear(hidden_MH, inputs.weight_VH), inputs)


def _cross_entropy(logits_MV: Tensor, inputs: _Inputs) -> Tensor:
    return F.cross_entropy(logits_MV.float(), inputs.targets_T[inputs.masked_M])


def _chunked(inputs: _Inputs) -> Tensor:
    targets_M = inputs.targets_T[inputs.masked_M]
    num_rows = len(inputs.weight_VH)
    losses_B: Tensor = ChunkedLinearLoss.apply(  # type: ignore[no-untyped-call]
        inputs.hidden_TH.index_select(0, inputs.masked_M),
        inputs.weight_VH,
        Predictions(
            targets_M,
            torch.full_like(targets_M, 1 / len(targets_M), dtype=torch.float32),
            torch.zeros_like(targets_M),
            1,
        ),
        VocabularySlice(0, num_rows, num_rows, num_rows, None),
        CHUNK_BYTES[inputs.weight_VH.device.type],
        cross_entropy_of_chunk,
    )
    return losses_B.sum()


_CASES: dict[str, Callable[[_Inputs], Tensor]] = {
    "nothing": _nothing,
    "all_logits": _all_logits,
    "masked_logits": _masked_logits,
    "chunked": _chunked,
}
