"""What `mdm benchmark train` compares: our engine, our model alone, and what others run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mdm.config import Config, check_layout
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.data.order import DocumentKey
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import TextWindow
from megatron_mdm.diffusion.stochastic_depth import build_stochastic_depth
from megatron_mdm.distributed.host_memory import choose_allocator
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.transformer import build_model
from megatron_mdm.studies.benchmarks.harness import draw_documents
from megatron_mdm.studies.benchmarks.public_code import llama, plain_transformer
from megatron_mdm.training.engine import Engine, send_batch
from megatron_mdm.training.optimizers import build_optimizer

# The papers' objective and optimizer, so that one noised batch means the same to every case.
EPS = 1e-3
LEARNING_RATE = 1e-4
_MANY = 100_000
# Batches that the model alone goes through again and again.
_PREPARED = 32
# Mean length of the documents, where attention stays within them.
_DOCUMENT_TOKENS = 256


class Case(NamedTuple):
    """One way to train.

    Attributes:
        step: Makes a step.
        first_loss: Of the initial weights, on one and the same noised batch.
    """

    step: Callable[[], Tensor]
    first_loss: float


class _RandomWindows:
    """Windows of random tokens in memory."""

    def __init__(self, config: Config) -> None:
        self.num_windows = max(64, config.batch.micro_batch_size)
        self.seq_length = config.data.seq_length
        shape = (self.num_windows, self.seq_length)
        self.tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
        self._documents = None
        if config.data.attention == "document":
            self._documents = draw_documents(shape, _DOCUMENT_TOKENS)

    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """Copies a window."""
        documents = self._documents
        segment_ids_S = None if documents is None else documents[window]
        return TextWindow(self.tokens[window].copy(), segment_ids_S)


def _batches(config: Config, device: torch.device) -> TrainingBatches:
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
        allocate=choose_allocator(device),
        draw_inputs=build_stochastic_depth(config),
    )


@contextlib.contextmanager
def _ours(config: Config, mesh: Mesh, dtype: torch.dtype) -> Iterator[Case]:
    batches = _batches(config, mesh.device)
    model = build_model(config, mesh, dtype)
    engine = Engine(config, check_layout(config, 1), mesh, model, dtype)
    evaluated = engine.evaluate(batches.read_step(0)[0])
    assert evaluated is not None  # one process is its own last stage
    stream = enumerate(batches.iterate(0, _MANY, threads=config.data.reader_threads))

    def step() -> Tensor:
        number, micro_batches = next(stream)
        return engine.train_step(number, micro_batches, config.optimizer.lr).loss_sum

    yield Case(step, float(evaluated.mean()))
    engine.deepspeed.destroy()


@contextlib.contextmanager
def _model_alone(config: Config, mesh: Mesh, dtype: torch.dtype) -> Iterator[Case]:
    """Our model on the same batches, made beforehand: no loader, no noise, no DeepSpeed."""
    model = build_model(config, mesh, dtype).to(dtype)
    model.train()
    optimizer = build_optimizer(model, config.optimizer)
    batches = _batches(config, mesh.device)
    prepared = [
        send_batch(batches.read_step(step)[0], config.batch, mesh.device)
        for step in range(_PREPARED)
    ]
    places = count()

    def step() -> Tensor:
        loss: Tensor = model(**prepared[next(places) % _PREPARED]).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        return loss.detach()

    model.eval()
    with torch.no_grad():
        first = model(**prepared[0]).mean()
    model.train()
    yield Case(step, float(first))


@contextlib.contextmanager
def _bare_loop(
    make_model: Callable[[Config, torch.device], nn.Module],
    config: Config,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
) -> Iterator[Case]:
    """Forward noising on the device, all logits, cross-entropy at the masks, AdamW."""
    device = mesh.device
    model: Any = make_model(config, device)
    if compiled:
        model = torch.compile(model)
    tokens = torch.from_numpy(_RandomWindows(config).tokens).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
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
        p_B1 = (1 - EPS) * torch.rand(size, 1, device=device) + EPS
        masked_BS = torch.rand(tokens_BS.shape, device=device) < p_B1
        noised_BS = torch.where(masked_BS, config.model.mask_id, tokens_BS)
        loss = loss_of(noised_BS, tokens_BS, masked_BS / p_B1 / tokens_BS.shape[1])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    batch = _batches(config, device).read_step(0)[0]
    arrays = (batch.inputs_BS, batch.targets_BS, batch.weights_BS)
    # As in a step, so that it is compiled once.
    first = loss_of(*(torch.from_numpy(array).to(device) for array in arrays)).detach()
    yield Case(step, float(first))


_Make = Callable[[Config, Mesh, torch.dtype], contextlib.AbstractContextManager[Case]]
CASES: dict[str, _Make] = {
    "ours": _ours,
    "model_alone": _model_alone,
    "plain": functools.partial(_bare_loop, plain_transformer),
    "transformers": functools.partial(_bare_loop, llama),
    "plain_compiled": functools.partial(_bare_loop, plain_transformer, compiled=True),
    "transformers_compiled": functools.partial(_bare_loop, llama, compiled=True),
}
