"""Logits of a model of another format, straight from its own tensors, to check a conversion by.

Nothing here reads the tables of names: an error there must not cancel out. A block's tensors are in
memory one block at a time.

Shapes: B batch, S sequence, H hidden, V vocabulary, N heads, D width of a head, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig

Load = Callable[[str], Tensor]


class _Block(NamedTuple):
    """Weights of a block; queries, keys and values as [heads, D, H] with biases [heads, D]."""

    attention_norm: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def smdm_logits(load: Load, saved: SavedModel, tokens_BS: Tensor) -> Tensor:
    """Runs an SMDM model.

    Args:
        load: Reads a tensor under its SMDM name.
        saved: The model.
        tokens_BS: Tokens [B, S], int64; V is the mask token.

    Returns:
        Logits [B, S, V], float32.
    """
    model = saved.model

    def block(layer: int) -> _Block:
        prefix = f"transformer.h.{layer}."
        per_group = model.num_attention_heads // model.query_groups
        # Stored group by group: the group's queries, its key, its value.
        groups = load(prefix + "attn.attn.weight").reshape(
            model.query_groups, per_group + 2, model.head_width, model.hidden_size
        )
        return _Block(
            load(prefix + "norm_1.weight"),
            groups[:, :per_group].flatten(0, 1),
            groups[:, per_group],
            groups[:, per_group + 1],
            None,
            load(prefix + "attn.proj.weight"),
            load(prefix + "norm_2.weight"),
            load(prefix + "mlp.swiglu.w1.weight"),
            load(prefix + "mlp.swiglu.w2.weight"),
            load(prefix + "mlp.swiglu.w3.weight"),
        )

    hidden_BSH = load("transformer.wte.weight")[tokens_BS]
    hidden_BSH = _run_blocks(hidden_BSH, block, saved)
    hidden_BSH = _norm(hidden_BSH, load("transformer.ln_f.weight"), model)
    return hidden_BSH @ load("lm_head.weight").T


def llada_logits(load: Load, saved: SavedModel, tokens_BS: Tensor) -> Tensor:
    """Runs a LLaDA model.

    Args:
        load: Reads a tensor under its LLaDA name.
        saved: The model.
        tokens_BS: Tokens [B, S], int64.

    Returns:
        Logits [B, S, V], float32, the mask token's included.
    """
    model = saved.model

    def block(layer: int) -> _Block:
        prefix = f"model.transformer.blocks.{layer}."

        def heads(kind: str) -> Tensor:
            return load(f"{prefix}{kind}_proj.weight").unflatten(0, (-1, model.head_width))

        def bias(kind: str) -> Tensor:
            return load(f"{prefix}{kind}_proj.bias").unflatten(0, (-1, model.head_width))

        return _Block(
            load(prefix + "attn_norm.weight"),
            heads("q"),
            heads("k"),
            heads("v"),
            (bias("q"), bias("k"), bias("v")) if model.qkv_bias else None,
            load(prefix + "attn_out.weight"),
            load(prefix + "ff_norm.weight"),
            load(prefix + "ff_proj.weight"),
            load(prefix + "up_proj.weight"),
            load(prefix + "ff_out.weight"),
        )

    hidden_BSH = load("model.transformer.wte.weight")[tokens_BS]
    hidden_BSH = _run_blocks(hidden_BSH, block, saved)
    hidden_BSH = _norm(hidden_BSH, load("model.transformer.ln_f.weight"), model)
    head = "wte" if model.tie_embeddings else "ff_out"
    return hidden_BSH @ load(f"model.transformer.{head}.weight").T


def _run_blocks(hidden_BSH: Tensor, block: Callable[[int], _Block], saved: SavedModel) -> Tensor:
    for layer in range(saved.model.num_layers):
        weights = block(layer)
        normed_BSH = _norm(hidden_BSH, weights.attention_norm, saved.model)
        hidden_BSH = hidden_BSH + _attention(normed_BSH, weights, saved)
        normed_BSH = _norm(hidden_BSH, weights.mlp_norm, saved.model)
        inner_BSF = F.silu(normed_BSH @ weights.gate.T) * (normed_BSH @ weights.up.T)
        hidden_BSH = hidden_BSH + inner_BSF @ weights.down.T
    return hidden_BSH


def _norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + model.norm_epsilon).rsqrt() * weight


def _attention(x_BSH: Tensor, weights: _Block, saved: SavedModel) -> Tensor:
    model = saved.model
    projected = [
        torch.einsum("bsh,ndh->bnsd", x_BSH, projection)
        for projection in (weights.queries, weights.keys, weights.values)
    ]
    if weights.biases is not None:
        projected = [
            x_BNSD + bias_ND[:, None]
            for x_BNSD, bias_ND in zip(projected, weights.biases, strict=True)
        ]
    query, key, value = projected
    repeats = model.num_attention_heads // model.query_groups
    key = _turn(key, model).repeat_interleave(repeats, dim=1)
    scores = _turn(query, model) @ key.transpose(2, 3) / model.head_width**0.5
    if saved.is_causal:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    mixed_BNSD = scores.softmax(dim=-1) @ value.repeat_interleave(repeats, dim=1)
    return mixed_BNSD.transpose(1, 2).flatten(2) @ weights.output.T


def _turn(x_BNSD: Tensor, model: ModelConfig) -> Tensor:
    """Rotary positions: the numbers j and j + D/2 are a complex one, turned by its angle."""
    real, imaginary = x_BNSD.chunk(2, dim=-1)
    exponents = torch.arange(0, model.head_width, 2, dtype=torch.float32) / model.head_width
    positions = torch.arange(x_BNSD.shape[2], dtype=torch.float32)
    angles = positions[:, None] / model.rotary_base**exponents
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
