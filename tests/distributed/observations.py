"""What ranks observe inside a step: batches as received, dropout draws, losses and gradients."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from cases import Overrides, batches_of, engine_of, mean_loss, piece_of, stage_of
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from numpy.typing import NDArray

from megatron_mdm.data.loader import Batch
from megatron_mdm.distributed.mesh import seed_dropout
from megatron_mdm.model.attention import AttentionInputs
from megatron_mdm.model.interleaving import list_chunks
from megatron_mdm.model.parameters import find_parameter
from megatron_mdm.model.shards import NamedShard, name_shards


def received_batches(overrides: Overrides, num_steps: int) -> dict[str, Any]:
    """What reaches a rank's model when the engine trains.

    Args:
        overrides: As for `config_of`.
        num_steps: Optimizer steps.

    Returns:
        The rank's place, and inputs, targets and weights [steps, micro batches, B, S].
    """
    received: dict[str, list[NDArray[Any]]] = {"inputs": [], "targets": [], "weights": []}

    def record(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, torch.Tensor]) -> None:
        for kind, values in received.items():
            values.append(kwargs[f"{kind}_BS"].numpy().copy())

    with stage_of(overrides) as stage, engine_of(stage) as engine:
        stage.model.register_forward_pre_hook(record, with_kwargs=True)
        mesh = stage.mesh
        batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
        for step in range(num_steps):
            engine.train_step(step, batches.read_step(step), 0.0)
        return {
            "data_rank": mesh.dp.rank,
            "mask_id": stage.config.model.mask_id,
            **{
                kind: np.stack(values).reshape(num_steps, -1, *values[0].shape)
                for kind, values in received.items()
            },
        }


def received_lookaheads(
    overrides: Overrides, num_steps: int
) -> tuple[list[set[int | None]], set[int | None]]:
    """How far ahead tokens see in each pass that the engine makes.

    Args:
        overrides: As for `config_of`.
        num_steps: Optimizer steps.

    Returns:
        The values that this rank's chunks were given in each step, and those of an evaluation.
    """
    received: set[int | None] = set()

    def record(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lookahead = kwargs["model_inputs"].get("attention_reach")
        received.add(None if lookahead is None else lookahead.item())

    steps = []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        for chunk in list_chunks(stage.model):
            chunk.register_forward_pre_hook(record, with_kwargs=True)
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(num_steps):
            engine.train_step(step, batches.read_step(step), 0.0)
            steps.append(set(received))
            received.clear()
        engine.evaluate(batches.read_step(0)[0])
        return steps, received


def losses_of_steps(overrides: Overrides, steps: list[int]) -> list[float]:
    """Losses of the same batch at different steps, all with the initial weights.

    Args:
        overrides: As for `config_of`.
        steps: Numbers that the engine is told.

    Returns:
        Nats per token.
    """
    losses = []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in steps:
            torch.rand(7)
            result = engine.train_step(step, batches.read_step(0), 0.0)
            size = stage.config.batch.global_batch_size
            losses.append(mean_loss(engine, result.loss_sum, size))
    return losses


def dropout_draws(overrides: Overrides, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What hidden and attention dropout leave of tensors of ones, equal on all ranks.

    Args:
        overrides: As for `config_of`.
        places: Pairs of step and micro batch.

    Returns:
        For each place the two outputs.
    """
    draws = []
    with stage_of(overrides) as stage:
        stage.model.train()
        layer = stage.model.decoder.layers[0]
        for step, micro_batch in places:
            seed_dropout(stage.mesh, stage.config.run.seed, step, micro_batch)
            ones_SBH = torch.ones(16, 2, 32)
            hidden = layer.self_attn_bda(True, False)((ones_SBH, None), ones_SBH, 0.5)
            qkv_SBND = torch.ones(16, 2, 2, 8)
            inputs = AttentionInputs(None, stage.model.get_rotation(16, qkv_SBND.device))
            attention = layer.self_attention.core_attention(qkv_SBND, qkv_SBND, qkv_SBND, inputs)
            with get_cuda_rng_tracker().fork():
                private = torch.rand(4)
            draws.append(
                {
                    "hidden": hidden.numpy(),
                    "attention": attention.numpy(),
                    "private": private.numpy(),
                }
            )
    return draws


def dropout_states(overrides: Overrides, step: int) -> list[list[dict[str, Any]]]:
    """Inputs and generator at the start of each forward pass of each chunk of this stage.

    Args:
        overrides: As for `config_of`.
        step: Optimizer step.

    Returns:
        For each chunk and micro batch, in order of their passes, the inputs, the state of the
        generator, and the state that the place of this micro batch and chunk is defined to have.
    """
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        mesh, seed = stage.mesh, stage.config.run.seed
        chunks = list_chunks(stage.model)
        passes: list[list[dict[str, Any]]] = [[] for _ in chunks]

        def record(chunk: Any, _: tuple[Any, ...], kwargs: dict[str, torch.Tensor]) -> None:
            state = torch.get_rng_state().numpy().tobytes()
            inputs_BS = kwargs["inputs_BS"].numpy().copy()
            passes[chunk.vp_stage].append({"inputs": inputs_BS, "state": state})

        for chunk in chunks:
            chunk.register_forward_pre_hook(record, with_kwargs=True)
        batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
        engine.train_step(step, batches.read_step(step), 0.0)
        for chunk_index, chunk_passes in enumerate(passes):
            for micro_batch, found in enumerate(chunk_passes):
                seed_dropout(mesh, seed, step, micro_batch, chunk_index)
                found["defined"] = torch.get_rng_state().numpy().tobytes()
        return passes


def replicated_weights(overrides: Overrides, num_steps: int) -> dict[str, NDArray[np.float32]]:
    """Weights after training that every tensor-parallel rank holds whole.

    Args:
        overrides: As for `config_of`.
        num_steps: Optimizer steps.

    Returns:
        Weights by name.
    """
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(num_steps):
            engine.train_step(step, batches.read_step(step), stage.config.optimizer.lr)
        return {
            shard.name: engine.states.get(shard.parameter, "weight").numpy()
            for shard in engine.shards
            if not shard.is_split
        }


def losses_and_gradients(
    overrides: Overrides, step: int = 0, weight: float | None = None
) -> dict[str, Any]:
    """One micro batch through the model, without an engine.

    Args:
        overrides: As for `config_of`.
        step: Whose first micro batch.
        weight: Of every position; 0 predicts nothing, 1 everything. None: the objective's.

    Returns:
        The batch, weights and gradients as pieces, losses and logits.
    """
    with stage_of(overrides) as stage:
        stir_vectors(name_shards(stage.model, stage.mesh))
        batch = batches_of(stage.config, 0, 1).read_step(step)[0]
        if weight is not None:
            batch = dataclasses.replace(batch, weights_BS=np.full_like(batch.weights_BS, weight))
        arrays = {name: getattr(batch, name) for name in _INPUTS}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        more = {name: torch.from_numpy(array) for name, array in batch.model_inputs.items()}
        losses_B = stage.model(**tensors, model_inputs=more)
        losses_B.sum().backward()
        with torch.no_grad():
            logits_BSV = stage.model(
                tensors["inputs_BS"],
                lengths_B=tensors["lengths_B"],
                model_inputs=more,
            )
        shards = list(name_shards(stage.model, stage.mesh))
        return {
            "batch": {**arrays, **batch.model_inputs},
            "weights": [piece_of(shard, shard.parameter) for shard in shards],
            "gradients": [piece_of(shard, shard.parameter.grad) for shard in shards],
            "losses_B": losses_B.detach().numpy(),
            "logits_BSV": logits_BSV.numpy(),
        }


@torch.no_grad()
def logits_of(
    overrides: Overrides, weights: dict[str, NDArray[np.float32]], tokens_BS: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What the model makes of tokens with given weights.

    Args:
        overrides: As for `config_of`.
        weights: Whole tensors by global name.
        tokens_BS: int64 [B, S].

    Returns:
        Logits [B, S, vocabulary rows].
    """
    with stage_of(overrides) as stage:
        for shard in name_shards(stage.model, stage.mesh):
            whole = torch.from_numpy(weights[shard.name])
            shard.parameter.copy_(torch.cat([whole[part] for part in shard.list_slices()]))
        logits_BSV: torch.Tensor = stage.model(torch.from_numpy(tokens_BS))
        return logits_BSV.numpy()


def stir_vectors(shards: Iterable[NamedShard]) -> None:
    """Moves norms from 1, biases and sinks from 0, where a mistake could hide, in any layout alike.

    Args:
        shards: This rank's parameters, before an engine has them.
    """
    for shard in shards:
        if find_parameter(shard.name).role == "vector":
            generator = torch.Generator().manual_seed(zlib.crc32(shard.name.encode()))
            noise = 0.3 * torch.randn(shard.shape, generator=generator)
            shard.parameter.data += torch.cat([noise[part] for part in shard.list_slices()])


_INPUTS = ("inputs_BS", "targets_BS", "weights_BS", "lengths_B")


def train_with_empty_batches(overrides: Overrides) -> dict[str, list[float]]:
    """Trains where first a micro batch, then a whole step has nothing to predict.

    Args:
        overrides: As for `config_of`.

    Returns:
        The loss (nats per token) and gradient norm of three steps; the third is an ordinary one.
    """
    losses, norms = [], []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        mesh = stage.mesh
        batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
        for step in range(3):
            step_batches: list[Batch] = batches.read_step(step)
            for index, batch in enumerate(step_batches):
                is_first = mesh.dp.rank == 0 and index == 0
                if step == 1 or (step == 0 and is_first):
                    nothing = np.zeros_like(batch.weights_BS)
                    step_batches[index] = dataclasses.replace(batch, weights_BS=nothing)
            result = engine.train_step(step, step_batches, stage.config.optimizer.lr)
            size = stage.config.batch.global_batch_size
            losses.append(mean_loss(engine, result.loss_sum, size))
            norms.append(result.grad_norm)
    return {"losses": losses, "grad_norms": norms}
