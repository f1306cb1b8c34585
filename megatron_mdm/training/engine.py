"""One optimizer step on any layout: DeepSpeed's ZeRO under Megatron's model parallelism.

Without pipeline stages DeepSpeed drives forward, backward and gradient accumulation. With stages
Megatron's 1F1B schedule, interleaved if a stage holds several chunks of the model, runs all micro
batches, gradients are reduced once, then DeepSpeed steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.checkpoint.flat_tensors import list_flat_tensors
from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
from megatron_mdm.config import BatchConfig, Config, Layout, ParameterGroups
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.distributed.mesh import Mesh, seed_dropout
from megatron_mdm.distributed.mpu import MegatronMpu
from megatron_mdm.model.interleaving import InterleavedStage, list_chunks
from megatron_mdm.model.memory import REDUCE_BUCKET_ELEMENTS
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.transformer import DiffusionTransformer
from megatron_mdm.training.gradients import (
    Float32GradientSums,
    spoil_gradients,
    spoil_infinite_loss,
)
from megatron_mdm.training.optimizers import Rates
from megatron_mdm.training.whole_parameters import DividedParameters


class StepResult(NamedTuple):
    """What a step measured.

    Attributes:
        loss_sum: Sum over this rank's samples, nats per token, float64; 0 on ranks that do not
            report.
        grad_norm: Global gradient norm before clipping; inf if the update was left out.
        is_applied: Was the update made? False on every rank if the gradient is not finite or the
            step was not accepted: weights and the optimizer's state are what they were.
    """

    loss_sum: Tensor
    grad_norm: float
    is_applied: bool


class Engine:
    """Trains one stage."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        mesh: Mesh,
        model: DiffusionTransformer | InterleavedStage,
        dtype: torch.dtype,
    ) -> None:
        self.mesh = mesh
        self.model = model
        self._chunks = list_chunks(model)
        self._config = config
        self._layout = layout
        self._attention = build_objective(config).attention
        self._zero_stage = config.parallel.zero_stage
        self._pipelined = mesh.pp.size > 1
        self._has_dropout = config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
        # Before ZeRO-3 empties the tensors, whose shapes name the shards.
        self.shards = list(name_shards(model, mesh))
        for shard in self.shards:
            if shard.is_copy:
                # Without this mark DeepSpeed counts the tied weight twice in the gradient norm.
                shard.parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
        wholes = DividedParameters(self.shards, config.model, mesh)
        _prepare_deepspeed(mesh.device)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=config.optimizer.build(ParameterGroups(wholes.parameters, wholes)),
            config=self._build_deepspeed_config(dtype),
            mpu=MegatronMpu(mesh),
            dist_init_required=False,
        )
        wholes.place(list_flat_tensors(self.optimizer, self._zero_stage))
        self.states = OptimizerStates(
            self.optimizer, self._zero_stage, config.optimizer, self.shards
        )
        self._rates = Rates(self.optimizer.param_groups)
        self._sums: Float32GradientSums | None = None
        if self._pipelined and dtype != torch.float32 and layout.num_micro_batches > 1:
            self._sums = Float32GradientSums(shard.parameter for shard in self.shards)

    def train_step(
        self,
        step: int,
        batches: Sequence[Batch],
        lr: float,
        accepts: Callable[[Tensor], bool] | None = None,
        decay_factor: float = 1.0,
    ) -> StepResult:
        """Forward, backward and update on one global batch.

        Args:
            step: Optimizer step, from 0; it seeds dropout, and the attention rule may ask for it.
            batches: This replica's micro batches.
            lr: Learning rate.
            accepts: Asked on every rank before the update, with this rank's loss sum; False,
                which has to be the answer on all ranks, leaves the update out. None: not asked.
            decay_factor: Of the optimizer's weight decay.

        Returns:
            Loss, gradient norm and whether the update was made.
        """
        self._rates.set(lr, decay_factor)
        self.deepspeed.train()
        if self._pipelined:
            loss_sum = self._run_pipelined(step, batches)
        else:
            loss_sum = self._run_single_stage(step, batches)
        is_accepted = accepts is None or accepts(loss_sum)
        if self._zero_stage == 0:
            return StepResult(loss_sum, *self._step_unsharded(is_accepted))
        if not is_accepted:
            spoil_gradients(self.optimizer)
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(loss_sum, grad_norm, self.deepspeed.was_step_applied())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor | None:
        """Weighted losses of each sequence of one micro batch.

        Args:
            batch: Exactly `batch.micro_batch_size` sequences.

        Returns:
            float64 [B] on the last stage, None before it.
        """
        self.deepspeed.eval()
        if not self._pipelined:
            return self.deepspeed(**self._make_tensors(batch, {})).double()
        # The interleaved schedule needs a multiple of the stages: the batch is repeated.
        copies = self.mesh.pp.size if len(self._chunks) > 1 else 1
        results = self._run_schedule([batch] * copies, forward_only=True)
        return results[0]["losses_B"].double() if self.mesh.pp.is_last else None

    def _run_single_stage(self, step: int, batches: Sequence[Batch]) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        step_inputs = self._make_step_inputs(step)
        for index, batch in enumerate(batches):
            self._seed_dropout(step, index)
            losses_B = self.deepspeed(**self._make_tensors(batch, step_inputs))
            self.deepspeed.backward(spoil_infinite_loss(losses_B.mean()))
            loss_sum += losses_B.detach().double().sum()
            if index < len(batches) - 1:
                self.deepspeed.step()
        return loss_sum if self.mesh.reports_loss else torch.zeros_like(loss_sum)

    def _run_pipelined(self, step: int, batches: Sequence[Batch]) -> Tensor:
        coalesced = (
            contextlib.nullcontext()
            if self._zero_stage == 0
            else self.deepspeed.coalesce_grad_reduction()
        )
        with coalesced:
            results = self._run_schedule(batches, step=step)
            if self._sums is not None:
                self._sums.hand_over()
            self._reduce_tied_gradient()
        if self._zero_stage == 0:
            self.deepspeed.buffered_allreduce_fallback()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.reports_loss:
            for result in results:
                loss_sum += result["losses_B"].double().sum()
        return loss_sum

    def _run_schedule(
        self, batches: Sequence[Batch], step: int = 0, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        is_interleaved = len(self._chunks) > 1
        # Evaluation runs the model as it will be used, without inputs of the step.
        step_inputs = {} if forward_only else self._make_step_inputs(step)
        # Under ZeRO-0 DeepSpeed has no hooks for a backward that it does not drive.
        call = self.model if self._zero_stage == 0 else self.deepspeed

        def forward_step(iterator: Iterator[tuple[int, Batch]], chunk: Any) -> tuple[Tensor, Any]:
            index, batch = next(iterator)
            if not forward_only:
                self._seed_dropout(step, index, chunk.vp_stage)
            which = {"chunk": chunk.vp_stage} if is_interleaved else {}
            return call(**which, **self._make_tensors(batch, step_inputs)), _mean_loss

        with self.mesh.redirect_cuda():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[enumerate(batches) for _ in self._chunks],
                model=self._chunks,
                num_microbatches=len(batches),
                seq_length=self._config.data.seq_length,
                micro_batch_size=self._config.batch.micro_batch_size,
                forward_only=forward_only,
            )

    def _reduce_tied_gradient(self) -> None:
        if not self._config.model.tie_embeddings:
            return
        if not (self.mesh.pp.is_first or self.mesh.pp.is_last):
            return
        chunk: Any = self._chunks[0] if self.mesh.pp.is_first else self._chunks[-1]
        weight = chunk.shared_embedding_or_output_weight()
        dist.all_reduce(weight.grad, group=self.mesh.get_group("tied"))

    def _step_unsharded(self, is_accepted: bool) -> tuple[float, bool]:
        grad_norm = self._clip_unsharded()
        is_applied = is_accepted and math.isfinite(grad_norm)
        if not is_applied:
            # DeepSpeed checks nothing here. Optimizers pass over parameters without a gradient.
            for shard in self.shards:
                shard.parameter.grad = None
        self.deepspeed.step()
        return (grad_norm if is_applied else math.inf), is_applied

    def _clip_unsharded(self) -> float:
        squares = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        for shard in self.shards:
            if shard.is_own:
                norm = torch.linalg.vector_norm(shard.parameter.grad, dtype=torch.float32)
                squares += norm.square()
        dist.all_reduce(squares, group=self.mesh.get_group("tp+pp"))
        total = math.sqrt(squares.item())
        limit = self._config.optimizer.clip_grad
        if 0 < limit < total:
            for shard in self.shards:
                shard.parameter.grad.mul_(limit / (total + 1e-6))  # type: ignore[union-attr]
        return total

    def _seed_dropout(self, step: int, micro_batch: int, chunk: int = 0) -> None:
        if self._has_dropout or self._config.parallel.sequence_parallel:
            seed_dropout(self.mesh, self._config.run.seed, step, micro_batch, chunk)

    def _make_step_inputs(self, step: int) -> dict[str, Tensor]:
        numbers = self._attention.step_inputs(step, self._config.data.seq_length)
        # Tensors, so that a compiled kernel serves all steps.
        return {
            name: torch.full((), number, dtype=torch.int64, device=self.mesh.device)
            for name, number in numbers.items()
        }

    def _make_tensors(self, batch: Batch, step_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        tensors = send_batch(batch, self._config.batch, self.mesh.device)
        tensors["model_inputs"] |= step_inputs
        return tensors

    def _build_deepspeed_config(self, dtype: torch.dtype) -> dict[str, Any]:
        bf16 = dtype == torch.bfloat16
        zero_stage = self._zero_stage
        if bf16 and self._pipelined and zero_stage == 1:
            # DeepSpeed's bf16 stage 1 cannot coalesce; with one reduction per step the two are
            # alike.
            zero_stage = 2
        return {
            "train_micro_batch_size_per_gpu": self._config.batch.micro_batch_size,
            # Megatron's schedule accumulates by itself: to DeepSpeed its step is one micro batch.
            "gradient_accumulation_steps": (
                1 if self._pipelined else self._layout.num_micro_batches
            ),
            "zero_optimization": {
                "stage": zero_stage,
                # All of it is allocated, however small the model.
                "reduce_bucket_size": min(
                    REDUCE_BUCKET_ELEMENTS, sum(shard.parameter.numel() for shard in self.shards)
                ),
                "overlap_comm": zero_stage == 3 or self._config.parallel.overlap_gradient_reduction,
            },
            "bf16": {"enabled": bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "gradient_clipping": self._config.optimizer.clip_grad if zero_stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            # It would let the host wait for the device twice in each micro batch.
            "timers": {"throughput": {"enabled": False}},
        }


def send_batch(batch: Batch, sizes: BatchConfig, device: torch.device) -> dict[str, Any]:
    """Sends a micro batch to where the model is.

    Args:
        batch: On the host.
        sizes: How places of the output layer are padded.
        device: Of the model; a GPU's host does not wait.

    Returns:
        What the model takes, by name.
    """

    def send(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            # From pinned memory, where training batches lie, the host need not wait for the copy.
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    is_cut = bool((batch.lengths_B < batch.inputs_BS.shape[1]).any())
    # On the host, where the weights are: looked up on a GPU, the host would wait for them.
    positions_M = _pad_positions(np.flatnonzero(batch.weights_BS), sizes)
    return {
        "inputs_BS": send(batch.inputs_BS),
        "targets_BS": send(batch.targets_BS),
        "weights_BS": send(batch.weights_BS),
        "positions_M": send(positions_M),
        # Lengths make a mask, which rules out the fastest kernels: only if a sample is cut.
        "lengths_B": send(batch.lengths_B) if is_cut else None,
        "model_inputs": {name: send(values) for name, values in batch.model_inputs.items()},
        "loss_inputs": {name: send(values) for name, values in batch.loss_inputs.items()},
        "attention": batch.attention,
    }


def _prepare_deepspeed(device: torch.device) -> None:
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # DeepSpeed would ask the machine's compilers which of its kernels they can build, and on CPUs
    # compile an all-reduce at the first start: minutes, for one node's worth of ranks.
    deepspeed.ops.__compatible_ops__ = {}
    if device.type == "cuda":
        # Its own way takes what CUDA_VISIBLE_DEVICES names for numbers; schedulers give UUIDs, too.
        get_accelerator().available_memory = lambda index=None: torch.cuda.mem_get_info(index)[0]


def _is_news(record: logging.LogRecord) -> bool:
    # DeepSpeed warns of every optimizer that it does not know.
    return "untested optimizer" not in record.getMessage()


def _pad_positions(positions_M: NDArray[np.int64], batch: BatchConfig) -> NDArray[np.int64]:
    capacity = batch.prediction_capacity
    if capacity is None:
        return positions_M
    rounds = max(-(-len(positions_M) // capacity), 1)
    missing = rounds * capacity - len(positions_M)
    return np.pad(positions_M, (0, missing), constant_values=-1)


def _mean_loss(losses_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return spoil_infinite_loss(losses_B.mean()), {"losses_B": losses_B.detach().clone()}
