"""Training speed: our engine beside a plain model, transformers' Llama and a large matmul."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from megatron_mdm.config import Config, check_layout
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.host_memory import keep_freed_memory, return_freed_memory
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import join_process_group
from megatron_mdm.model.accounting import count_parameters, run_flops_per_token
from megatron_mdm.model.head import CHUNK_BYTES
from megatron_mdm.model.memory import estimate_memory
from megatron_mdm.studies.benchmarks import devices
from megatron_mdm.studies.benchmarks.harness import (
    bare_config,
    find_sizes,
    run_isolated,
    summarize,
    summarize_ratios,
)
from megatron_mdm.studies.benchmarks.settings import TrainingSettings
from megatron_mdm.studies.benchmarks.training_cases import CASES, EPS, LEARNING_RATE, Case
from megatron_mdm.training.plan import check_compiler, choose_device, choose_dtype
from megatron_mdm.training.throughput import find_peak_flops, measure_matmul_flops

# What runs in a process as our training sets it up.
_OURS = ("ours", "model_alone")
# Sections that --overrides must leave alone for a case. Random windows hold no pairs to learn.
_FIXED = {"ours": ("finetuning",), "model_alone": ("finetuning", "batch")}
_FIXED_FOR_OTHERS = ("finetuning", "batch", "model", "objective", "data")
# On a GPU the numbers of masked positions, and so the sizes of what is allocated, change by step.
_WARM_UP_STEPS = {"cpu": 1, "cuda": 3}


class _Timings(NamedTuple):
    first_loss: float
    seconds: list[float]
    # Of a large matmul in the same turn: the speed of a shared machine changes by the minute.
    matmul_flops: list[float]
    # On a GPU.
    peak_bytes: list[int]


def measure_training(settings: TrainingSettings) -> dict[str, Any]:
    """Times training steps on random tokens: forward, backward and AdamW, all in one process.

    On a CPU all cases are held in memory and take turns; malloc keeps freed memory for our cases,
    as in training, and not for the others, as in programs of their own. On a GPU each case has a
    process, and so the memory, for itself.

    Args:
        settings: What is trained.

    Returns:
        Of each case tokens per second, seconds per step, the loss of the initial weights on one and
        the same noised batch, the share of the rate of a large matmul that goes into useful FLOPs,
        on a known GPU that of its data sheet's peak too, and on a GPU the peak of its memory; what
        ours is estimated to need; how many times faster ours is.

    Raises:
        ConfigError: A setting is out of range, or a case does not fit it or the GPU's memory.
    """
    config = make_config(settings)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    _check_cases(settings, config, device)
    if device.type == "cpu":
        timings = _time_cases(settings, settings.cases)
    else:
        timings = {}
        for name in settings.cases:
            timings |= run_isolated(_time_cases, settings, (name,)).value
    results = _describe(config, timings, settings, find_peak_flops(device, dtype))
    if "ours" in timings:
        estimate = estimate_memory(
            config,
            world_size=1,
            dtype="bf16" if dtype == torch.bfloat16 else "fp32",
            chunk_bytes=CHUNK_BYTES[device.type],
        )
        results["ours"]["estimated_bytes"] = estimate.total_bytes
    return results


def _time_cases(settings: TrainingSettings, names: Sequence[str]) -> dict[str, _Timings]:
    config = make_config(settings)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    timings: dict[str, _Timings] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(join_process_group(device))
        mesh = stack.enter_context(open_mesh(config.parallel, device))
        try:
            cases = {name: stack.enter_context(CASES[name](config, mesh, dtype)) for name in names}
            timings = {name: _Timings(case.first_loss, [], [], []) for name, case in cases.items()}
            for _ in range(settings.repeats):
                matmul_flops = measure_matmul_flops(device, dtype)
                for name, case in cases.items():
                    # Other programs have glibc's own thresholds.
                    _ = keep_freed_memory() if name in _OURS else return_freed_memory()
                    timings[name].matmul_flops.append(matmul_flops)
                    _time(case, settings.steps, device, timings[name])
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--micro-batch-size={settings.micro_batch_size} takes more memory than the GPU "
                f"has in the case {names[0]}: use fewer, or less with --overrides "
                "parallel.recompute=full."
            ) from None
    return timings


def _describe(
    config: Config,
    timings: dict[str, _Timings],
    settings: TrainingSettings,
    peak_flops: float | None,
) -> dict[str, Any]:
    tokens = config.batch.global_batch_size * config.data.seq_length
    useful = run_flops_per_token(config)
    counts = count_parameters(config.model)
    results: dict[str, Any] = {
        "parameters": {"non_embedding": counts.non_embedding, "total": counts.total},
        "useful_flops_per_token": useful,
        "useful_flops": "6 (linear layers + head at the positions that count) + 12 L S a a token, "
        "half of the last if causal; recomputation not counted, nor documents",
        "matmul_flops_per_second": summarize(timings[settings.cases[0]].matmul_flops),
    }
    if peak_flops is not None:
        results["peak_flops_per_second"] = peak_flops
    for name, (first_loss, seconds, matmul_flops, peak_bytes) in timings.items():
        rates = [useful * tokens / value for value in seconds]
        results[name] = {
            "tokens_per_second": summarize([tokens / value for value in seconds]),
            "step_seconds": summarize(seconds),
            "share_of_matmul": summarize_ratios(rates, matmul_flops),
            "first_loss": round(first_loss, 5),
        }
        if peak_flops is not None:
            results[name]["share_of_peak"] = summarize([rate / peak_flops for rate in rates])
        if peak_bytes:
            results[name]["peak_bytes"] = max(peak_bytes)
    first = settings.cases[0]
    results["ratios"] = {
        f"{first}_over_{name}": summarize_ratios(timings[name].seconds, timings[first].seconds)
        for name in settings.cases[1:]
    }
    return results


def make_config(settings: TrainingSettings) -> Config:
    """Makes the configuration that is trained; a ConfigError where it is not valid."""
    on_gpu = devices.choose_device(settings.device).type == "cuda"
    return bare_config(
        find_sizes(settings.preset) | {"vocab_size": settings.vocab_size},
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        overrides=settings.overrides,
        run={"seed": 0, "device": settings.device},
        # The papers' objective, so that one noised batch means the same to every case.
        objective={"kind": "mdm", "process": {"masking": "bernoulli", "eps": EPS}},
        parallel={"zero_stage": int(on_gpu)},
        optimizer={"lr": LEARNING_RATE},
    )


def _check_cases(settings: TrainingSettings, config: Config, device: torch.device) -> None:
    check_layout(config, 1)
    if config.run.compile == "on":
        check_compiler("run.compile=on", device)
    plain = make_config(replace(settings, overrides=()))
    for name in settings.cases:
        if name.endswith("_compiled"):
            check_compiler(f"--cases={name}", device)
        for section in _FIXED.get(name, _FIXED_FOR_OTHERS):
            if getattr(config, section) != getattr(plain, section):
                raise ConfigError(
                    f"--cases={name} learns what it does without --overrides, and these change "
                    f"{section}: leave the case out, such as with --cases ours."
                )


def _time(case: Case, steps: int, device: torch.device, timings: _Timings) -> None:
    """Times steps, after some that pay for memory and kernels."""
    if device.type == "cuda":
        # Not what was there before, such as the factors of the matmul.
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(_WARM_UP_STEPS[device.type]):
        case.step()
    start = devices.now(device)
    for _ in range(steps):
        case.step()
    timings.seconds.append((devices.now(device) - start) / steps)
    if device.type == "cuda":
        timings.peak_bytes.append(torch.cuda.max_memory_allocated(device))
