"""What users train masked-diffusion models with today: the same shape without our head and loop.

`PlainTransformer` is written the way the papers' public code does it, in plain PyTorch: logits of
all positions, times drawn independently for each sequence. `llama` is transformers' class of the
same shape under a bare loop. Both begin with our initial weights, so all losses are comparable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import Config, ModelConfig
from megatron_mdm.hf.formats.translation import to_format
from megatron_mdm.model.initialization import draw_initial_weight
from megatron_mdm.model.parameters import (
    EMBEDDING,
    OUTPUT_LAYER,
    find_parameter,
    find_parameter_shape,
    list_parameter_names,
)


class PlainTransformer(nn.Module):
    """Bidirectional pre-norm transformer with SwiGLU and rotary positions, under SMDM's names.

    Args:
        sizes: As many groups as heads, no biases.
    """

    def __init__(self, sizes: ModelConfig) -> None:
        super().__init__()
        self.head_dim = sizes.head_width
        self.rotary_base = sizes.rotary_base
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(_embedding_rows(sizes), sizes.hidden_size),
                "h": nn.ModuleList(_Block(sizes) for _ in range(sizes.num_layers)),
                "ln_f": nn.RMSNorm(sizes.hidden_size, eps=sizes.norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.is_tied = sizes.tie_embeddings
        if sizes.tie_embeddings:
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
    def __init__(self, sizes: ModelConfig) -> None:
        super().__init__()
        width, inner = sizes.hidden_size, sizes.ffn_hidden_size
        self.heads, self.head_dim = sizes.num_attention_heads, sizes.head_width
        self.norm_1 = nn.RMSNorm(width, eps=sizes.norm_epsilon)
        self.norm_2 = nn.RMSNorm(width, eps=sizes.norm_epsilon)
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
    sizes = config.model
    model = PlainTransformer(sizes)
    state = _initial_state(config, "smdm")
    if sizes.tie_embeddings:
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

    sizes = config.model
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_embedding_rows(sizes),
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.query_groups,
            head_dim=sizes.head_width,
            max_position_embeddings=config.data.seq_length,
            rms_norm_eps=sizes.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rotary_base},
            tie_word_embeddings=sizes.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    state = _initial_state(config, "hf")
    head_VH = state["lm_head.weight"]
    mask_row = torch.zeros(_embedding_rows(sizes) - len(head_VH), head_VH.shape[1])
    state["lm_head.weight"] = torch.cat([head_VH, mask_row])
    if sizes.tie_embeddings:
        del state["lm_head.weight"]
    model.load_state_dict(state, strict=not sizes.tie_embeddings)
    module: nn.Module = model
    return module


def _embedding_rows(sizes: ModelConfig) -> int:
    return find_parameter(EMBEDDING).count_unpadded_rows(sizes)


def _initial_state(config: Config, format_name: str) -> dict[str, Tensor]:
    """Initial weights with an output layer of their own, of which a tied model has no need."""
    sizes = config.model.model_copy(update={"tie_embeddings": False})
    saved = SavedModel(sizes, "mdm", config.data.seq_length)
    state: dict[str, Tensor] = {}
    for name in list_parameter_names(sizes):
        is_shared = name == OUTPUT_LAYER and config.model.tie_embeddings
        rows = range(find_parameter_shape(name, sizes)[0])
        source = EMBEDDING if is_shared else name
        drawn = draw_initial_weight(source, config.model, seed=0, rows=rows)
        state |= to_format(format_name, name, torch.from_numpy(drawn), saved)
    return {name: tensor.clone() for name, tensor in state.items()}


def _rotary(length: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    inverse = base ** (-torch.arange(0, width, 2, device=like.device).float() / width)
    angles = torch.arange(length, device=like.device).float()[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD
