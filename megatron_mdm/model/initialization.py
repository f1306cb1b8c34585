"""Initial weights as a function of (seed, global parameter name), cut to the local shard."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mdm.config import ModelConfig
from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.parameters import find_parameter, find_parameter_shape
from megatron_mdm.model.shards import NamedShard, name_shards

# Rows drawn from one counter block. A shard draws only the blocks that it needs.
_BLOCK_ROWS = 64


def initialize(module: torch.nn.Module, model: ModelConfig, seed: int, mesh: Mesh) -> None:
    """Fills a stage's parameters in place.

    Args:
        module: The stage.
        model: Sizes and standard deviations.
        seed: The run's seed.
        mesh: This rank's place.
    """
    for shard in name_shards(module, mesh):
        with torch.no_grad():
            shard.parameter.copy_(torch.from_numpy(_draw_initial_shard(shard, model, seed)))


def draw_initial_weight(
    name: str, model: ModelConfig, seed: int, rows: range | None = None
) -> NDArray[np.float32]:
    """Initial value of a whole parameter, or of some of its rows.

    Args:
        name: Global parameter name.
        model: Sizes and standard deviations.
        seed: The run's seed.
        rows: Rows to draw; None: all.

    Returns:
        float32 array: the constant of the parameter's row in the table, or normal values. Rows of
        the vocabulary that neither a token nor the mask uses are 0.
    """
    parameter, shape = find_parameter(name), find_parameter_shape(name, model)
    rows = range(shape[0]) if rows is None else rows
    if not callable(parameter.initial):
        return np.full((len(rows), *shape[1:]), parameter.initial, dtype=np.float32)
    digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype=np.uint32)
    key = seed_sequence(seed, *digest.tolist()).generate_state(2, np.uint64)
    blocks = range(rows.start // _BLOCK_ROWS, -(-rows.stop // _BLOCK_ROWS))
    drawn = np.empty((len(blocks), _BLOCK_ROWS, *shape[1:]), dtype=np.float32)

    def draw(block: int) -> None:
        counter = np.array([0, 0, 0, block], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        generator.standard_normal(dtype=np.float32, out=drawn[block - blocks.start])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, blocks))
    start = rows.start - blocks.start * _BLOCK_ROWS
    values = drawn.reshape(-1, *shape[1:])[start : start + len(rows)]
    values *= np.float32(parameter.initial(model))
    if parameter.vocabulary is not None:
        ids = np.arange(rows.start, rows.stop)
        is_mask = (ids == model.mask_id) & (parameter.vocabulary == "tokens and mask")
        values[(ids >= model.vocab_size) & ~is_mask] = 0.0
    return values


def _draw_initial_shard(shard: NamedShard, model: ModelConfig, seed: int) -> NDArray[np.float32]:
    pieces = []
    for part in shard.list_slices():
        values = draw_initial_weight(shard.name, model, seed, range(part[0].start, part[0].stop))
        pieces.append(values if len(part) == 1 else values[:, part[1]])
    return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
