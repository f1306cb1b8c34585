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
    """Weights of a block.

    Attributes:
        norms: Of attention and of the feed-forward block, [H] each.
        projections: Queries, keys and values, [heads, D, H] each.
        biases: Theirs, [heads, D] each; None: there are none.
        output: Of attention.
        gate: First matrix of SwiGLU.
        up: Second.
        down: Third.
    """

    norms: tuple[Tensor, Tensor]
    projections: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor] | None
    output: Tensor
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

    def load_block(layer: int) -> _Block:
        prefix = f"transformer.h.{layer}."
        per_group = model.num_attention_heads // model.query_groups
        # Stored group by group: the group's queries, its key, its value.
        groups = load(prefix + "attn.attn.weight").reshape(
            model.query_groups, per_group + 2, model.head_width, model.hidden_size
        )
        queries = groups[:, :per_group].flatten(0, 1)
        keys, values = groups[:, per_group:].unbind(1)
        gate, up, down = (load(f"{prefix}mlp.swiglu.w{number}.weight") for number in (1, 2, 3))
        norms = load(prefix + "norm_1.weight"), load(prefix + "norm_2.weight")
        output = load(prefix + "attn.proj.weight")
        return _Block(norms, (queries, keys, values), None, output, gate, up, down)

    hidden_BSH = _run_blocks(load, "transformer.", load_block, saved, tokens_BS)
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

    def load_block(layer: int) -> _Block:
        prefix = f"model.transformer.blocks.{layer}."

        def load_heads(kind: str) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = (
                load(f"{prefix}{one}_proj.{kind}").unflatten(0, (-1, model.head_width))
                for one in "qkv"
            )
            return query, key, value

        names = ("ff_proj", "up_proj", "ff_out")
        gate, up, down = (load(f"{prefix}{name}.weight") for name in names)
        norms = load(prefix + "attn_norm.weight"), load(prefix + "ff_norm.weight")
        biases = load_heads("bias") if model.qkv_bias else None
        output = load(prefix + "attn_out.weight")
        return _Block(norms, load_heads("weight"), biases, output, gate, up, down)

    root = "model.transformer."
    hidden_BSH = _run_blocks(load, root, load_block, saved, tokens_BS)
    head = "wte" if model.tie_embeddings else "ff_out"
    return hidden_BSH @ load(f"{root}{head}.weight").T


def _run_blocks(
    load: Load,
    root: str,
    load_block: Callable[[int], _Block],
    saved: SavedModel,
    tokens_BS: Tensor,
) -> Tensor:
    """Normed hidden states [B, S, H]; both families have one name for embedding and last norm."""
    hidden_BSH = load(root + "wte.weight")[tokens_BS]
    for layer in range(saved.model.num_layers):
        weights = load_block(layer)
        attention_norm, mlp_norm = weights.norms
        normed_BSH = _norm(hidden_BSH, attention_norm, saved.model)
        hidden_BSH = hidden_BSH + _attention(normed_BSH, weights, saved)
        normed_BSH = _norm(hidden_BSH, mlp_norm, saved.model)
        inner_BSF = F.silu(normed_BSH @ weights.gate.T) * (normed_BSH @ weights.up.T)
        hidden_BSH = hidden_BSH + inner_BSF @ weights.down.T
    return _norm(hidden_BSH, load(root + "ln_f.weight"), saved.model)


def _norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + model.norm_epsilon).rsqrt() * weight


def _attention(x_BSH: Tensor, weights: _Block, saved: SavedModel) -> Tensor:
    model = saved.model
    projected = [
        torch.einsum("bsh,ndh->bnsd", x_BSH, projection) for projection in weights.projections
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
