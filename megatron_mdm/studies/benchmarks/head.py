"""The output layer and its loss: time and peak memory beside layers that hold all logits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.model.head import CHUNK_BYTES, LinearCrossEntropy, Predictions, VocabularySlice
from megatron_mdm.studies.benchmarks.harness import (
    compare_cases,
    run_in_turn,
    run_isolated,
    summarize,
)
from megatron_mdm.studies.benchmarks.settings import HeadSettings

# Forward and backward passes of one process; the first is not timed.
_PASSES = 4


class _Inputs(NamedTuple):
    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    masked_T: Tensor


def measure_head(settings: HeadSettings) -> dict[str, Any]:
    """Times forward and backward of the output layer on a CPU, each case in processes of its own.

    `all_logits` computes the logits of all positions and picks those of the masks, as the papers'
    code does; `masked_logits` computes those of the masks at once; `chunked` is ours.

    Args:
        settings: Sizes.

    Returns:
        Of each case seconds and peak bytes above those of a process that holds the inputs and
        their gradients; the loss; and ours as a share of each.

    Raises:
        ConfigError: A setting is out of range.
    """
    floor = run_isolated(_passes, "nothing", settings).peak_bytes
    cases = {name: (_passes, name, settings) for name in _CASES if name != "nothing"}
    runs = run_in_turn(cases, settings.repeats)
    seconds = {name: [run.value[0] for run in found] for name, found in runs.items()}
    peaks = {name: [run.peak_bytes - floor for run in found] for name, found in runs.items()}
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
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(settings.num_tokens, settings.hidden_size, generator=generator)
    weight_VH = torch.randn(settings.vocab_size, settings.hidden_size, generator=generator)
    targets_T = torch.randint(settings.vocab_size, (settings.num_tokens,), generator=generator)
    inputs = _Inputs(
        hidden_TH.requires_grad_(),
        weight_VH.mul_(0.02).requires_grad_(),
        targets_T,
        torch.arange(settings.num_tokens) % 2 == 0,
    )
    seconds = []
    for _ in range(_PASSES):
        inputs.hidden_TH.grad = inputs.weight_VH.grad = None
        start = time.perf_counter()
        loss = _CASES[name](inputs)
        torch.autograd.backward(loss)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), float(loss.detach())


def _nothing(inputs: _Inputs) -> Tensor:
    return inputs.hidden_TH.sum() + inputs.weight_VH.sum()


def _all_logits(inputs: _Inputs) -> Tensor:
    logits_TV = F.linear(inputs.hidden_TH, inputs.weight_VH)
    return F.cross_entropy(logits_TV[inputs.masked_T], inputs.targets_T[inputs.masked_T])


def _masked_logits(inputs: _Inputs) -> Tensor:
    logits_MV = F.linear(inputs.hidden_TH[inputs.masked_T], inputs.weight_VH)
    return F.cross_entropy(logits_MV, inputs.targets_T[inputs.masked_T])


def _chunked(inputs: _Inputs) -> Tensor:
    targets_M = inputs.targets_T[inputs.masked_T]
    num_rows = len(inputs.weight_VH)
    losses_B: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        inputs.hidden_TH[inputs.masked_T],
        inputs.weight_VH,
        Predictions(
            targets_M,
            torch.full_like(targets_M, 1 / len(targets_M), dtype=torch.float32),
            torch.zeros_like(targets_M),
            1,
        ),
        VocabularySlice(0, num_rows, num_rows, num_rows, None),
        CHUNK_BYTES["cpu"],
    )
    return losses_B.sum()


_CASES: dict[str, Callable[[_Inputs], Tensor]] = {
    "nothing": _nothing,
    "all_logits": _all_logits,
    "masked_logits": _masked_logits,
    "chunked": _chunked,
}
