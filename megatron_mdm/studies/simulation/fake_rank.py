"""One process plays one rank of a layout: the real model and engine, on tensors without memory.

PyTorch's fake process group lets a process believe that it has peers, and its fake tensors have
shapes and no values. So one rank of a thousand can be run on a laptop; what it would compute is
unknown, but not what it would send, in which order, and what it would hold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed  # noqa: F401  it patches PyTorch when it is imported: before any tensor is fake
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import utils as zero_checks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mdm.config import Config, check_layout
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import TextWindow
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.model import layers
from megatron_mdm.model.elementwise import fused_rms_norm
from megatron_mdm.model.memory import Dtype
from megatron_mdm.model.transformer import build_model
from megatron_mdm.studies.simulation.calls import NUM_STEPS, CallLog, PlayedRank
from megatron_mdm.studies.simulation.memory_log import MemoryLog
from megatron_mdm.training.engine import Engine

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def play_rank(config: Config, rank: int, world_size: int, dtype: Dtype) -> PlayedRank:
    """Starts a rank and takes two steps on made-up text.

    The process is of no use for anything else afterwards: PyTorch, DeepSpeed and its group are
    changed for good.

    Args:
        config: The run, checked against the number of ranks; `run.device` does not matter.
        rank: The rank to play.
        world_size: Ranks that it believes in.
        dtype: Dtype of forward and backward.

    Returns:
        What it did.
    """
    layout = check_layout(config, world_size)
    # A GPU's kernel draws the dropout of attention within; a CPU's would keep S x S numbers for it.
    model_config = config.model.model_copy(update={"attention_dropout": 0.0})
    config = config.model_copy(update={"model": model_config})
    _pretend(rank, world_size)
    calls, memory = CallLog(), MemoryLog()
    # DeepSpeed prints what memory the machine has, as if it were in use.
    with (
        contextlib.redirect_stdout(None),
        open_mesh(config.parallel, torch.device("cpu")) as mesh,
    ):
        batches = [
            make_batches(config, layout.num_micro_batches, step) for step in range(NUM_STEPS)
        ]
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers(), calls, memory:
            model = build_model(config, mesh, _DTYPES[dtype], draws_weights=False)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda owner: memory.recount(owner.grad, "gradients")
                )
            with memory.making("optimizer"):
                engine = Engine(config, layout, mesh, model, _DTYPES[dtype])
            memory.follow_optimizer(engine.optimizer)
            for parameter in model.parameters():
                memory.recount(parameter, "weights")
            for step, micro_batches in enumerate(batches):
                with calls.during(f"step {step}"), memory.making("activations"):
                    engine.train_step(step, micro_batches, config.optimizer.lr)
    positions = sum(int(np.count_nonzero(batch.weights_BS)) for batch in batches[-1])
    return PlayedRank(rank, calls.calls, memory.fullest, positions)


def make_batches(config: Config, num_micro_batches: int, step: int) -> list[Batch]:
    """Made-up micro batches, the same for every replica: what is drawn changes sizes.

    Args:
        config: The run.
        num_micro_batches: How many.
        step: Optimizer step.

    Returns:
        Samples of random tokens.
    """
    objective, size = build_objective(config), config.batch.micro_batch_size
    tokens = np.arange(config.model.vocab_size)
    tokens = tokens[tokens != config.model.mask_id]
    batches = []
    for number in range(step * num_micro_batches, (step + 1) * num_micro_batches):
        generator = np.random.default_rng(number)
        samples = [
            objective.sample(
                TextWindow(generator.choice(tokens, config.data.seq_length)), number * size + one
            )
            for one in range(size)
        ]
        batches.append(Batch.stack(samples))
    return batches


class _Answers(TorchDispatchMode):
    """Answers what code asks of values that no tensor has: 1, and that nothing has overflowed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def _pretend(rank: int, world_size: int) -> None:
    """Joins a world of which this process is all there is."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    for name in ("megatron", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    # On a CPU the norm of half-precision numbers is many operations, on a GPU one.
    layers.rms_norm = _norm
    # ZeRO-3 compares lists of all ranks, and the first one's never arrive.
    zero_checks.assert_lst_len_same_as_other_ranks = _send_length
    receive = zero_checks.get_lst_from_rank0

    def receive_own(values: list[int]) -> list[int]:
        receive(values)
        return values

    zero_checks.get_lst_from_rank0 = receive_own


def _send_length(values: list[int]) -> None:
    dist.broadcast(torch.tensor(len(values)), src=0)


def _norm(
    hidden: torch.Tensor, weight_H: torch.Tensor, eps: float, *, compiled: bool = False
) -> torch.Tensor:
    del compiled
    return fused_rms_norm(hidden, weight_H, eps)


def _apply(
    module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """Moves or casts a module's tensors; PyTorch would exchange fake parameters for new ones."""
    if recurse:
        for child in module.children():
            child._apply(change)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                parameter.data = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
