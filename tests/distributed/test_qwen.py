"""The model with the weights of Qwen2 and Qwen3, against transformers' own code for these."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import observations
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from worlds import World

_VOCAB, _GROUPS, _WIDTH = 61, 2, 8
_SIZES = {
    "vocab_size": _VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": _GROUPS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
_OURS = {
    "objective.kind": "ar",
    "model.num_layers": 2,
    "model.num_query_groups": _GROUPS,
    "model.rotary_base": 500.0,
}


def _qwen(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "qwen2":
        network = Qwen2ForCausalLM(Qwen2Config(**_SIZES))
    else:
        network = Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=_WIDTH))
    with torch.no_grad():
        # Biases begin as zeros and norms as ones.
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.5 * torch.randn_like(parameter)
    return network.eval()


def _fused(state: dict[str, torch.Tensor], prefix: str, kind: str) -> torch.Tensor:
    """For each group its queries, its key, its value."""
    q, k, v = (state[f"{prefix}.{part}_proj.{kind}"].unflatten(0, (_GROUPS, -1)) for part in "qkv")
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(64 - _VOCAB, rows.shape[1])])


def _in_our_names(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    weights = {
        "embedding.word_embeddings.weight": _padded(state["model.embed_tokens.weight"]),
        "output_layer.weight": _padded(state["lm_head.weight"]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        weights |= {
            f"{ours}.input_layernorm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{ours}.pre_mlp_layernorm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.self_attention.linear_qkv.weight": _fused(state, attention, "weight"),
            f"{ours}.self_attention.linear_proj.weight": state[f"{attention}.o_proj.weight"],
            f"{ours}.mlp.linear_fc1.weight": torch.cat(
                [state[f"{mlp}.gate_proj.weight"], state[f"{mlp}.up_proj.weight"]]
            ),
            f"{ours}.mlp.linear_fc2.weight": state[f"{mlp}.down_proj.weight"],
        }
        if f"{attention}.q_proj.bias" in state:
            weights[f"{ours}.self_attention.linear_qkv.bias"] = _fused(state, attention, "bias")
        for part in "qk":
            if f"{attention}.{part}_norm.weight" in state:
                weight = state[f"{attention}.{part}_norm.weight"]
                weights[f"{ours}.self_attention.{part}_layernorm.weight"] = weight
    return {name: weight.numpy() for name, weight in weights.items()}


@pytest.mark.parametrize("size", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen2", {"model.qkv_bias": True}), ("qwen3", {"model.qk_norm": True})],
)
def test_logits_are_those_of_the_family(
    world_of: Callable[[int], World], family: str, settings: dict[str, bool], size: int
) -> None:
    network = _qwen(family)
    tokens_BS = np.random.default_rng(0).integers(0, _VOCAB, (2, 16))
    with torch.no_grad():
        expected = network(torch.from_numpy(tokens_BS)).logits.numpy()
    found = world_of(size).run(
        observations.logits_of,
        overrides=_OURS | settings | {"parallel.tensor_model_parallel_size": size},
        weights=_in_our_names(network.state_dict()),
        tokens_BS=tokens_BS,
    )
    assert expected.std() > 0.5
    for logits in found:
        error = np.abs(logits[..., :_VOCAB] - expected).max()
        assert error < 1e-5 * np.abs(expected).max()
