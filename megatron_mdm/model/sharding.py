"""How whole parameters are divided over tensor-parallel ranks. Plain data: it needs no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardRule:
    """How a parameter is divided over tensor-parallel ranks.

    Attributes:
        dim: Divided dimension, None when every rank holds all of it.
        blocks: Independent blocks along the dimension, each divided: gate and up projections are
            stored one after the other, and every rank holds a part of both.
    """

    dim: int | None
    blocks: int = 1


_RULES: dict[str, ShardRule] = {
    "embedding.word_embeddings.weight": ShardRule(0),
    "output_layer.weight": ShardRule(0),
    "self_attention.linear_qkv.weight": ShardRule(0),
    "self_attention.linear_qkv.bias": ShardRule(0),
    "self_attention.q_layernorm.weight": ShardRule(None),
    "self_attention.k_layernorm.weight": ShardRule(None),
    "self_attention.linear_proj.weight": ShardRule(1),
    "mlp.linear_fc1.weight": ShardRule(0, blocks=2),
    "mlp.linear_fc2.weight": ShardRule(1),
    "input_layernorm.weight": ShardRule(None),
    "pre_mlp_layernorm.weight": ShardRule(None),
    "decoder.final_layernorm.weight": ShardRule(None),
}

Slices = tuple[slice, ...]


def shard_rule(name: str) -> ShardRule:
    """The rule of a parameter.

    Args:
        name: Global name.

    Returns:
        How it is divided.

    Raises:
        KeyError: The name belongs to no known parameter.
    """
    suffix = re.sub(r"^decoder\.layers\.\d+\.", "", name)
    return _RULES[suffix]


def shard_slices(
    name: str, shape: tuple[int, ...], tensor_rank: int, tensor_size: int
) -> list[Slices]:
    """The slices of a whole parameter that a tensor-parallel rank holds, in its local order.

    Args:
        name: Global name.
        shape: Global shape.
        tensor_rank: Place in the tensor-parallel group.
        tensor_size: Size of the group.

    Returns:
        Slices whose contents, concatenated along the first dimension, are the local tensor.
    """
    rule = shard_rule(name)
    whole = tuple(slice(0, size) for size in shape)
    if rule.dim is None:
        return [whole]
    block = shape[rule.dim] // rule.blocks
    part = block // tensor_size
    result = []
    for index in range(rule.blocks):
        start = index * block + tensor_rank * part
        result.append((*whole[: rule.dim], slice(start, start + part), *whole[rule.dim + 1 :]))
    return result
