"""Logits of a model of another format, straight from its own tensors, to check a conversion by.

Nothing here reads the tables of names: an error there must not cancel out. A block's tensors are in
memory one block at a time.

Shapes: B batch, S sequence, H hidden, V vocabulary, N heads, D width of a head, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


def gidd_logits(load: Load, fields: Mapping[str, Any], tokens_BS: Tensor) -> Tensor:
    """Runs a GIDD model.

    Args:
        load: Reads a tensor under its GIDD name.
        fields: Its config.json.
        tokens_BS: Tokens [B, S], int64.

    Returns:
        Logits [B, S, V], float32, the mask token's included.
    """
    num_layers = fields["num_hidden_layers"]
    residual = fields.get("resid_scale", 4.0) / num_layers

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = x.square().mean(dim=-1, keepdim=True)
        roots = (mean_square + fields.get("rms_norm_eps", 1e-6)).rsqrt()
        return (1 + load(name + ".weight")) * (x * roots)

    def project(x: Tensor, name: str, scaling: float | str) -> Tensor:
        weight = load(name + ".weight")
        scales = {"fan_in": weight.shape[1] ** -0.5, "fan_out": weight.shape[0] ** -0.5}
        return x @ weight.T * scales.get(str(scaling), scaling)

    def run_block(x_BSH: Tensor, layer: str) -> Tensor:
        scaling, has_bias = fields.get("weight_scaling", "fan_in"), fields.get("mlp_bias")
        normed = norm(x_BSH, layer + "attn_layernorm")
        q, k, v = (project(normed, f"{layer}self_attn.{one}_proj", scaling) for one in "qkv")
        if fields.get("use_qk_norm", True):
            q, k = (norm(x, f"{layer}self_attn.{n}_norm") for x, n in ((q, "q"), (k, "k")))
        sink = None
        if fields.get("attention_bias"):
            sink = (load(layer + "self_attn.k_bias"), load(layer + "self_attn.v_bias"))
        mixed = _attend_under_cap(q, k, v, sink, fields)
        x_BSH = x_BSH + residual * project(mixed, layer + "self_attn.o_proj", scaling)
        inner = project(norm(x_BSH, layer + "mlp_layernorm"), layer + "mlp.up_proj", scaling)
        if has_bias:
            inner = inner + load(layer + "mlp.up_proj.bias")
        output = project(inner.clamp(min=0).square(), layer + "mlp.down_proj", scaling)
        if has_bias:
            output = output + load(layer + "mlp.down_proj.bias")
        return x_BSH + residual * output

    hidden_BSH = load("model.embed_tokens.weight")[tokens_BS]
    for index in range(num_layers):
        hidden_BSH = run_block(hidden_BSH, f"model.layers.{index}.")
    return project(norm(hidden_BSH, "model.norm"), "lm_head", fields.get("head_scaling", 1.0))


def _attend_under_cap(
    q_BSH: Tensor,
    k_BSH: Tensor,
    v_BSH: Tensor,
    sink: tuple[Tensor, Tensor] | None,
    fields: Mapping[str, Any],
) -> Tensor:
    num_heads, cap = fields["num_attention_heads"], fields.get("attn_soft_cap", 30.0)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BSH, k_BSH, v_BSH))
    base = fields.get("rope_theta", 10000.0)
    q, k = _turn(q, base), _turn(k, base)
    if sink is not None:
        k, v = (
            torch.cat([one_ND[None, :, None].expand(len(x), -1, -1, -1), x], dim=2)
            for one_ND, x in zip(sink, (k, v), strict=True)
        )
    scores = cap * torch.tanh(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 / cap)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


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
    key = _turn(key, model.rotary_base).repeat_interleave(repeats, dim=1)
    scores = _turn(query, model.rotary_base) @ key.transpose(2, 3) / model.head_width**0.5
    if saved.is_causal:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    mixed_BNSD = scores.softmax(dim=-1) @ value.repeat_interleave(repeats, dim=1)
    return mixed_BNSD.transpose(1, 2).flatten(2) @ weights.output.T


def _turn(x_BNSD: Tensor, base: float) -> Tensor:
    """Rotary positions: the numbers j and j + D/2 are a complex one, turned by its angle."""
    real, imaginary = x_BNSD.chunk(2, dim=-1)
    width = x_BNSD.shape[-1]
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    positions = torch.arange(x_BNSD.shape[2], dtype=torch.float32)
    angles = positions[:, None] / base**exponents
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
