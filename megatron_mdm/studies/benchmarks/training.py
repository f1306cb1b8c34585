"""Training speed: our engine beside a plain model, transformers' Llama and a large matmul."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mdm.config import Config, check_layout, expand_preset, list_presets
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import TextWindow
from megatron_mdm.distributed.host_memory import keep_freed_memory, return_freed_memory
from megatron_mdm.distributed.mesh import Mesh, open_mesh
from megatron_mdm.distributed.processes import resolve_device, start_process_group
from megatron_mdm.model.accounting import count_parameters, run_flops_per_token
from megatron_mdm.model.transformer import build_model
from megatron_mdm.studies.benchmarks.harness import bare_config, now, summarize, summarize_ratios
from megatron_mdm.studies.benchmarks.public_code import llama, plain_transformer
from megatron_mdm.studies.benchmarks.settings import DEMO_SIZES, TrainingSettings
from megatron_mdm.training.engine import Engine
from megatron_mdm.training.optimizers import build_optimizer
from megatron_mdm.training.throughput import measure_peak_flops

_EPS = 1e-3
_LR = 1e-4
_MANY = 100_000
# What runs in a process as our training sets it up.
_OURS = ("ours", "model_alone")
# Batches that the model alone goes through again and again.
_PREPARED = 32


class _Case(NamedTuple):
    step: Callable[[], Tensor]
    first_loss: float


def measure_training(settings: TrainingSettings) -> dict[str, Any]:
    """Times training steps on random tokens: forward, backward and AdamW, all in one process.

    On a CPU malloc keeps freed memory for our cases, as in training, and not for the others, as in
    programs of their own.

    On a CPU all cases are held in memory and take turns; on a GPU one comes after the other, so
    that each has the memory for itself.

    Args:
        settings: What is trained.

    Returns:
        Of each case tokens per second, seconds per step, the loss of the initial weights on one and
        the same noised batch, peak memory on a GPU, and the share of the machine's matmul rate
        that goes into useful FLOPs; how many times faster ours is.

    Raises:
        ConfigError: A setting is out of range.
    """
    config = _config(settings)
    device = resolve_device(config.run.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start_process_group(device)
    seconds: dict[str, list[float]] = {name: [] for name in settings.cases}
    facts: dict[str, dict[str, float]] = {}
    ceilings: dict[str, list[float]] = {name: [] for name in settings.cases}
    turns = [settings.cases] if device.type == "cpu" else [(name,) for name in settings.cases]
    for names in turns:
        with contextlib.ExitStack() as stack:
            mesh = stack.enter_context(open_mesh(config.parallel, device))
            cases = {name: stack.enter_context(_CASES[name](config, mesh, dtype)) for name in names}
            for _ in range(settings.repeats):
                ceiling = measure_peak_flops(device, dtype)
                for name, case in cases.items():
                    # Other programs have glibc's own thresholds.
                    _ = keep_freed_memory() if name in _OURS else return_freed_memory()
                    ceilings[name].append(ceiling)
                    seconds[name].append(_time(case, settings.steps, device))
            for name, case in cases.items():
                facts[name] = {"first_loss": round(case.first_loss, 5)}
                if device.type == "cuda":
                    facts[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            del cases, case
        _release(device)
    return _describe(config, seconds, facts, ceilings, settings)


def _describe(
    config: Config,
    seconds: dict[str, list[float]],
    facts: dict[str, dict[str, float]],
    ceilings: dict[str, list[float]],
    settings: TrainingSettings,
) -> dict[str, Any]:
    tokens = config.batch.global_batch_size * config.data.seq_length
    useful = run_flops_per_token(config)
    counts = count_parameters(config.model)
    results: dict[str, Any] = {
        "parameters": {"non_embedding": counts.non_embedding, "total": counts.total},
        "useful_flops_per_token": useful,
        "useful_flops": "6 (linear layers + head at the positions that count) + 12 L S a a token",
        "matmul_flops_per_second": summarize(ceilings[settings.cases[0]]),
    }
    for name, found in seconds.items():
        results[name] = {
            "tokens_per_second": summarize([tokens / value for value in found]),
            "step_seconds": summarize(found),
            # Of the matmul of the same turn: the speed of a shared machine changes by the minute.
            "share_of_matmul": summarize_ratios(
                [useful * tokens / value for value in found], ceilings[name]
            ),
            **facts[name],
        }
    results["ratios"] = {
        f"{settings.cases[0]}_over_{name}": summarize_ratios(
            seconds[name], seconds[settings.cases[0]]
        )
        for name in settings.cases[1:]
    }
    return results


def _config(settings: TrainingSettings) -> Config:
    known = ("demo", *list_presets())
    if settings.preset not in known:
        raise ConfigError(f"--preset={settings.preset} is unknown: use one of {', '.join(known)}.")
    fields = dict(DEMO_SIZES) if settings.preset == "demo" else expand_preset(settings.preset)
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return bare_config(
        fields | {"vocab_size": settings.vocab_size},
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        run={
            "seed": 0,
            "device": settings.device,
            "compile": "on" if settings.compile else "auto",
        },
        # The papers' objective, so that one noised batch means the same to every case.
        objective={"kind": "mdm", "process": {"masking": "bernoulli", "eps": _EPS}},
        parallel={"zero_stage": int(on_gpu)},
        optimizer={"lr": _LR},
    )


class _RandomWindows:
    """Windows of random tokens in memory."""

    num_windows = 64

    def __init__(self, config: Config) -> None:
        self.seq_length = config.data.seq_length
        shape = (self.num_windows, self.seq_length)
        self.tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)

    def read_window(self, window: int, shift: int = 0) -> TextWindow:
        """Copies a window."""
        return TextWindow(self.tokens[window].copy())


def _batches(config: Config) -> TrainingBatches:
    windows = _RandomWindows(config)
    return TrainingBatches(
        [windows],
        SampleOrder(
            [10**6], [windows.num_windows], seq_length=windows.seq_length, kind="shuffle", seed=0
        ),
        build_objective(config),
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
    )


@contextlib.contextmanager
def _ours(config: Config, mesh: Mesh, dtype: torch.dtype) -> Iterator[_Case]:
    batches = _batches(config)
    model = build_model(config, mesh, dtype)
    engine = Engine(config, check_layout(config, 1), mesh, model, dtype)
    evaluated = engine.evaluate(batches.read_step(0)[0])
    assert evaluated is not None  # one process is its own last stage
    stream = enumerate(batches.iterate(0, _MANY, threads=config.data.reader_threads))

    def step() -> Tensor:
        number, micro_batches = next(stream)
        return engine.train_step(number, micro_batches, _LR).loss_sum

    yield _Case(step, float(evaluated.mean()))
    engine.deepspeed.destroy()


@contextlib.contextmanager
def _model_alone(config: Config, mesh: Mesh, dtype: torch.dtype) -> Iterator[_Case]:
    """Our model on the same batches, made beforehand: no loader, no noise, no DeepSpeed."""
    model = build_model(config, mesh, dtype).to(dtype)
    model.train()
    optimizer = build_optimizer(model, config.optimizer)
    batches = _batches(config)

    def tensors(step: int) -> dict[str, Tensor]:
        batch = batches.read_step(step)[0]
        arrays = {
            "inputs_BS": batch.inputs_BS,
            "targets_BS": batch.targets_BS,
            "weights_BS": batch.weights_BS,
            "positions_M": np.flatnonzero(batch.weights_BS),
        }
        return {name: torch.from_numpy(array).to(mesh.device) for name, array in arrays.items()}

    prepared = [tensors(step) for step in range(_PREPARED)]
    numbers = count()

    def step() -> Tensor:
        loss: Tensor = model(**prepared[next(numbers) % _PREPARED]).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        return loss.detach()

    with torch.no_grad():
        first = model(**prepared[0]).mean()
    yield _Case(step, float(first))


@contextlib.contextmanager
def _bare_loop(
    make_model: Callable[[Config], nn.Module], config: Config, mesh: Mesh, dtype: torch.dtype
) -> Iterator[_Case]:
    """Forward noising on the device, all logits, cross-entropy at the masks, AdamW."""
    device = mesh.device
    model = make_model(config).to(device)
    tokens = torch.from_numpy(_RandomWindows(config).tokens).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    size, numbers = config.batch.micro_batch_size, count()

    def loss_of(noised_BS: Tensor, tokens_BS: Tensor, weights_BS: Tensor) -> Tensor:
        with mixed:
            output = model(noised_BS)
        logits_BSV = output if isinstance(output, Tensor) else output.logits
        masked_BS = weights_BS > 0
        nll = F.cross_entropy(logits_BSV[masked_BS].float(), tokens_BS[masked_BS], reduction="none")
        return (nll * weights_BS[masked_BS]).sum() / len(tokens_BS)

    def step() -> Tensor:
        start = next(numbers) * size % (len(tokens) - size + 1)
        tokens_BS = tokens[start : start + size]
        p_B1 = (1 - _EPS) * torch.rand(size, 1, device=device) + _EPS
        masked_BS = torch.rand(tokens_BS.shape, device=device) < p_B1
        noised_BS = torch.where(masked_BS, config.model.mask_id, tokens_BS)
        loss = loss_of(noised_BS, tokens_BS, masked_BS / p_B1 / tokens_BS.shape[1])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    batch = _batches(config).read_step(0)[0]
    arrays = (batch.inputs_BS, batch.targets_BS, batch.weights_BS)
    with torch.no_grad():
        first = loss_of(*(torch.from_numpy(array).to(device) for array in arrays))
    yield _Case(step, float(first))


_Make = Callable[[Config, Mesh, torch.dtype], contextlib.AbstractContextManager[_Case]]
_CASES: dict[str, _Make] = {
    "ours": _ours,
    "model_alone": _model_alone,
    "plain": functools.partial(_bare_loop, plain_transformer),
    "transformers": functools.partial(_bare_loop, llama),
}


def _time(case: _Case, steps: int, device: torch.device) -> float:
    """Seconds per step, after one that pays for memory and kernels."""
    float(case.step())
    start = now(device)
    for _ in range(steps):
        case.step()
    return (now(device) - start) / steps


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
