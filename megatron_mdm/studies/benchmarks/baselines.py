"""What users train masked-diffusion models with today: the same shape without our head and loop.

`PlainTransformer` is written the way the papers' public code does it, in plain PyTorch: logits of
all positions, times drawn independently for each sequence. `llama` is transformers' class of the
same shape under a bare loop. Both begin with our initial weights, so all losses are comparable.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mdm.config import Config
from megatron_mdm.hf.formats.architecture import Architecture, architecture_of
from megatron_mdm.hf.formats.translation import to_format, training_names
from megatron_mdm.model.initialization import initial_weight

_OUTPUT_LAYER = "output_layer.weight"
_EMBEDDING = "embedding.word_embeddings.weight"


class PlainTransformer(nn.Module):
    """Bidirectional pre-norm transformer with SwiGLU and rotary positions, under SMDM's names.

    Args:
        arch: Sizes; as many groups as heads, no biases.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.head_dim = arch.head_dim
        self.rotary_base = arch.rotary_base
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(arch.exported_embedding_rows, arch.hidden_size),
                "h": nn.ModuleList(_Block(arch) for _ in range(arch.num_layers)),
                "ln_f": nn.RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        self.is_tied = arch.tied
        if arch.tied:
            del self.lm_head

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Maps tokens [B, S] to logits [B, S, V]."""
        x_BSH = self.transformer["wte"](tokens_BS)
        rotary = _rotary(tokens_BS.shape[1], self.head_dim, self.rotary_base, x_BSH)
        blocks: Any = self.transformer["h"]
        for block in blocks:
            x_BSH = block(x_BSH, *rotary)
        x_BSH = self.transformer["ln_f"](x_BSH)
        if self.is_tied:
            return F.linear(x_BSH, self.transformer["wte"].weight[:-1])  # type: ignore[index]
        logits_BSV: Tensor = self.lm_head(x_BSH)
        return logits_BSV


class _Block(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width, inner = arch.hidden_size, arch.ffn_hidden_size
        self.heads, self.head_dim = arch.num_attention_heads, arch.head_dim
        self.norm_1 = nn.RMSNorm(width, eps=arch.rms_norm_eps)
        self.norm_2 = nn.RMSNorm(width, eps=arch.rms_norm_eps)
        self.attn = nn.ModuleDict(
            {
                "attn": nn.Linear(width, 3 * self.heads * self.head_dim, bias=False),
                "proj": nn.Linear(self.heads * self.head_dim, width, bias=False),
            }
        )
        projections = {
            "w1": nn.Linear(width, inner, bias=False),
            "w2": nn.Linear(width, inner, bias=False),
            "w3": nn.Linear(inner, width, bias=False),
        }
        self.mlp = nn.ModuleDict({"swiglu": nn.ModuleDict(projections)})

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        batch, length, _ = x_BSH.shape
        qkv = self.attn["attn"](self.norm_1(x_BSH)).view(batch, length, self.heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        q, k = _rotate(q, cos_SD, sin_SD), _rotate(k, cos_SD, sin_SD)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BSH = x_BSH + self.attn["proj"](mixed)
        swiglu: Any = self.mlp["swiglu"]
        h = self.norm_2(x_BSH)
        inner = F.silu(swiglu["w1"](h)) * swiglu["w2"](h)
        result: Tensor = x_BSH + swiglu["w3"](inner)
        return result


def plain_transformer(config: Config) -> PlainTransformer:
    """The plain model with our initial weights.

    Args:
        config: The run; its seed is that of the weights.

    Returns:
        The model, float32, on the CPU.
    """
    arch = _architecture(config)
    model = PlainTransformer(arch)
    state = _initial_state(config, replace(arch, tied=False), "smdm")
    if arch.tied:
        del state["lm_head.weight"]
    model.load_state_dict(state)
    return model


def llama(config: Config) -> nn.Module:
    """Transformers' Llama of the same shape with our initial weights, attention bidirectional.

    Its output layer has a row for the mask token, which all but never matters to the loss.

    Args:
        config: The run.

    Returns:
        The model, float32, on the CPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    arch = _architecture(config)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arch.exported_embedding_rows,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_hidden_size,
            num_hidden_layers=arch.num_layers,
            num_attention_heads=arch.num_attention_heads,
            num_key_value_heads=arch.num_query_groups,
            head_dim=arch.head_dim,
            max_position_embeddings=arch.max_position_embeddings,
            rms_norm_eps=arch.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": arch.rotary_base},
            tie_word_embeddings=arch.tied,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    state = _initial_state(config, replace(arch, tied=False), "hf")
    head_VH = state["lm_head.weight"]
    mask_row = torch.zeros(arch.exported_embedding_rows - len(head_VH), head_VH.shape[1])
    state["lm_head.weight"] = torch.cat([head_VH, mask_row])
    if arch.tied:
        del state["lm_head.weight"]
    model.load_state_dict(state, strict=not arch.tied)
    module: nn.Module = model
    return module


def _architecture(config: Config) -> Architecture:
    return architecture_of(config.model, is_causal=False, seq_length=config.data.seq_length)


def _initial_state(config: Config, arch: Architecture, format_name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in training_names(arch):
        is_shared = name == _OUTPUT_LAYER and config.model.tie_embeddings
        drawn = initial_weight(_EMBEDDING if is_shared else name, config.model, seed=0)
        state |= to_format(format_name, name, torch.from_numpy(drawn), arch)
    return {name: tensor.clone() for name, tensor in state.items()}


def _rotary(length: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    inverse = base ** (-torch.arange(0, width, 2, device=like.device).float() / width)
    angles = torch.arange(length, device=like.device).float()[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD
