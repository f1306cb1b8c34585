"""Plain torch models whose state dicts have the names of the SMDM, LLaDA and GIDD formats.

Written from the published descriptions alone, in another way than the package does it: rotations
are matrices, and heads are separate. They are what conversions are compared with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Rms(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def rotation(seq_length: int, width: int, base: float) -> Tensor:
    """[S, D, D]: turns the pair (j, j + D/2) by position * base ** (-2j / D)."""
    turns = torch.zeros(seq_length, width, width, dtype=torch.float64)
    for position in range(seq_length):
        for j in range(width // 2):
            angle = position * base ** (-2 * j / width)
            first, second = j, j + width // 2
            turns[position, first, first] = turns[position, second, second] = math.cos(angle)
            turns[position, first, second] = -math.sin(angle)
            turns[position, second, first] = math.sin(angle)
    return turns.float()


def attend(heads, keys, values, *, base: float, is_causal: bool) -> Tensor:
    """Lists of [B, S, D] tensors; each key serves the same number of query heads."""
    turns = rotation(heads[0].shape[1], heads[0].shape[2], base)
    out = []
    for index, query in enumerate(heads):
        group = index * len(keys) // len(heads)
        query = torch.einsum("sij,bsj->bsi", turns, query)
        key = torch.einsum("sij,bsj->bsi", turns, keys[group])
        scores = torch.einsum("bqd,bkd->bqk", query, key) / math.sqrt(query.shape[-1])
        if is_causal:
            future = torch.ones(scores.shape[1:]).triu(1).bool()
            scores = scores.masked_fill(future, -torch.inf)
        out.append(scores.softmax(-1) @ values[group])
    return torch.cat(out, -1)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every one of them matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and "bias" not in name
        # An embedding as short as real ones are, so that the norm's epsilon matters.
        scale = 0.02 if "wte" in name or "embed" in name else 0.3
        parameter.data.copy_(1 + 0.2 * values if is_norm else scale * values)
    return model.eval()


class SmdmBlock(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm_1, self.norm_2 = Rms(width, 1e-5), Rms(width, 1e-5)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.attn = nn.Linear(width, (heads + 2 * groups) * self.size, bias=False)
        self.attn.proj = nn.Linear(width, width, bias=False)
        self.mlp.swiglu = nn.Module()
        self.mlp.swiglu.w1 = nn.Linear(width, ffn, bias=False)
        self.mlp.swiglu.w2 = nn.Linear(width, ffn, bias=False)
        self.mlp.swiglu.w3 = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        heads, keys, values = [], [], []
        for group in self.attn.attn(self.norm_1(x)).chunk(self.groups, dim=-1):
            *queries, key, value = group.split(self.size, dim=-1)
            heads += queries
            keys.append(key)
            values.append(value)
        x = x + self.attn.proj(attend(heads, keys, values, base=10000.0, is_causal=is_causal))
        h, mlp = self.norm_2(x), self.mlp.swiglu
        gate = mlp.w1(h)
        return x + mlp.w3(gate / (1 + torch.exp(-gate)) * mlp.w2(h))


class Smdm(nn.Module):
    """Masked diffusion (V + 1 rows in the embedding) or autoregressive (V rows)."""

    def __init__(
        self, *, layers: int, heads: int, width: int, ffn: int, vocab: int, is_causal: bool
    ) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(vocab + (not is_causal), width)
        self.transformer.h = nn.ModuleList(
            SmdmBlock(width, heads, heads, ffn) for _ in range(layers)
        )
        self.transformer.ln_f = Rms(width, 1e-5)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x, self.is_causal)
        return self.lm_head(self.transformer.ln_f(x))


LLADA_CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "alibi": False,
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_ratio": 4,
    "mlp_hidden_size": 40,
    "vocab_size": 30,
    "embedding_size": 30,
    "mask_token_id": 27,
    "eos_token_id": 3,
    "max_sequence_length": 32,
}


class LladaBlock(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width, ffn, bias = config["d_model"], config["mlp_hidden_size"], config["include_qkv_bias"]
        self.size, self.base = width // config["n_heads"], config["rope_theta"]
        groups = self.size * config["n_kv_heads"]
        self.attn_norm = Rms(width, config["rms_norm_eps"])
        self.ff_norm = Rms(width, config["rms_norm_eps"])
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, groups, bias=bias)
        self.v_proj = nn.Linear(width, groups, bias=bias)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, ffn, bias=False)
        self.up_proj = nn.Linear(width, ffn, bias=False)
        self.ff_out = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn_norm(x)
        parts = [part(h).split(self.size, -1) for part in (self.q_proj, self.k_proj, self.v_proj)]
        x = x + self.attn_out(attend(*parts, base=self.base, is_causal=False))
        h = self.ff_norm(x)
        gate = self.ff_proj(h)
        return x + self.ff_out(gate / (1 + torch.exp(-gate)) * self.up_proj(h))


class Llada(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        rows = config["embedding_size"] or config["vocab_size"]
        self.model = nn.Module()
        self.model.transformer = nn.Module()
        self.model.transformer.wte = nn.Embedding(rows, config["d_model"])
        self.model.transformer.blocks = nn.ModuleList(
            LladaBlock(config) for _ in range(config["n_layers"])
        )
        self.model.transformer.ln_f = Rms(config["d_model"], config["rms_norm_eps"])
        self.is_tied = config["weight_tying"]
        if not self.is_tied:
            self.model.transformer.ff_out = nn.Linear(config["d_model"], rows, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.model.transformer
        x = parts.wte(tokens)
        for block in parts.blocks:
            x = block(x)
        head = parts.wte.weight if self.is_tied else parts.ff_out.weight
        return parts.ln_f(x) @ head.T


GIDD_CONFIG = {
    "model_type": "gidd",
    "architectures": ["GiddForDiffusionLM"],
    "vocab_size": 30,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 6,
    "is_causal": False,
    "attn_soft_cap": 2.0,
    "max_position_embeddings": 32,
    "resid_scale": 4.0,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
    "weight_scaling": 1.0,
    "head_scaling": 512 / 24,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "noise_type": 1000.0,
    "min_log_snr": -9.0,
    "max_log_snr": 9.0,
}


class Scaled(nn.Linear):
    """W x times a number, and then the bias."""

    def __init__(self, num_in: int, num_out: int, scale: float | str, bias: bool) -> None:
        super().__init__(num_in, num_out, bias=bias)
        fans = {"fan_in": num_in, "fan_out": num_out}
        self.scale = 1 / math.sqrt(fans[scale]) if scale in fans else scale

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("oi,bsi->bso", self.weight, x) * self.scale
        return y if self.bias is None else y + self.bias


class OffsetRms(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config["hidden_size"]))
        self.eps = config["rms_norm_eps"]

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class GiddBlock(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        width, inner = config["hidden_size"], config["intermediate_size"]
        scale, heads = config["weight_scaling"], config["num_attention_heads"]
        self.attn_layernorm, self.mlp_layernorm = OffsetRms(config), OffsetRms(config)
        self.self_attn = attention = nn.Module()
        for name in "qkvo":
            attention.add_module(f"{name}_proj", Scaled(width, width, scale, False))
        if config["use_qk_norm"]:
            attention.q_norm, attention.k_norm = OffsetRms(config), OffsetRms(config)
        if config["attention_bias"]:
            attention.k_bias = nn.Parameter(torch.zeros(heads, width // heads))
            attention.v_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.mlp = nn.Module()
        self.mlp.up_proj = Scaled(width, inner, scale, config["mlp_bias"])
        self.mlp.down_proj = Scaled(inner, width, scale, config["mlp_bias"])

    def attend(self, h: Tensor) -> Tensor:
        attention, config = self.self_attn, self.config
        q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
        if config["use_qk_norm"]:
            q, k = attention.q_norm(q), attention.k_norm(k)
        size = config["hidden_size"] // config["num_attention_heads"]
        turns = rotation(h.shape[1], size, config["rope_theta"])
        cap, out = config["attn_soft_cap"], []
        for head in range(config["num_attention_heads"]):
            part = slice(head * size, (head + 1) * size)
            query = torch.einsum("sij,bsj->bsi", turns, q[..., part])
            keys = torch.einsum("sij,bsj->bsi", turns, k[..., part])
            values = v[..., part]
            if config["attention_bias"]:
                first_key, first_value = (
                    bias[head].expand(len(h), 1, -1)
                    for bias in (attention.k_bias, attention.v_bias)
                )
                keys, values = torch.cat([first_key, keys], 1), torch.cat([first_value, values], 1)
            scores = torch.einsum("bqd,bkd->bqk", query, keys) / math.sqrt(size)
            # The hyperbolic tangent, written out.
            bent = cap * (1 - 2 / (torch.exp(2 * scores / cap) + 1))
            out.append(bent.softmax(-1) @ values)
        return attention.o_proj(torch.cat(out, -1))

    def forward(self, x: Tensor) -> Tensor:
        share = self.config["resid_scale"] / self.config["num_hidden_layers"]
        x = x + share * self.attend(self.attn_layernorm(x))
        up = self.mlp.up_proj(self.mlp_layernorm(x))
        return x + share * self.mlp.down_proj(torch.where(up > 0, up * up, 0.0))


class Gidd(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width, vocab = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, width)
        self.model.layers = nn.ModuleList(
            GiddBlock(config) for _ in range(config["num_hidden_layers"])
        )
        self.model.norm = OffsetRms(config)
        self.lm_head = Scaled(width, vocab, config["head_scaling"], False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x)
        return self.lm_head(self.model.norm(x))
