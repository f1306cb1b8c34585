"""The model against a float64 network written here from the papers, in plain torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import observations
import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS
from torch import Tensor
from weight_pieces import assemble
from worlds import World

from megatron_mdm.diffusion.samples import BLOCK_SCALES, SEGMENT_IDS

GetWorld = Callable[[int], World]

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_HEADS, _WIDTH, _LAYERS, _VOCAB = 4, 8, 4, 61

VARIANTS: dict[str, dict[str, Any]] = {
    "mdm": {},
    "mdm-tied": {"model.tie_embeddings": True},
    "mdm-gqa": {"model.num_query_groups": 2},
    "mdm-cut": {"objective.stochastic_length_ratio": 1.0},
    "mdm-mask-in-vocabulary": {"model.mask_token_id": 5},
    "mdm-tied-mask-in-vocabulary": {"model.mask_token_id": 5, "model.tie_embeddings": True},
    "mdm-wide-heads-other-rope": {"model.head_dim": 8, "model.rotary_base": 500.0},
    "mdm-odd-sizes": {"data.seq_length": 13, "batch.micro_batch_size": 1},
    # With two ranks the second one's rows are all padding.
    "mdm-rank-of-padding": {"model.vocab_padding_multiple": 128},
    # As of published models whose tokenizers have fewer tokens than the vocabulary has rows.
    "mdm-unused-rows": {"model.padded_vocab_size": 83},
    "mdm-tied-unused-rows": {"model.padded_vocab_size": 83, "model.tie_embeddings": True},
    "mdm-rank-of-unused-rows": {"model.padded_vocab_size": 150},
    "mdm-mask-among-unused-rows": {"model.padded_vocab_size": 83, "model.mask_token_id": 70},
    "ar-unused-rows": {"model.padded_vocab_size": 83, "objective.kind": "ar"},
    "ar": {"objective.kind": "ar"},
    "ar-cut": {"objective.kind": "ar", "objective.stochastic_length_ratio": 1.0},
    "mdm-documents-cut": {
        "data.attention": "document",
        "model.num_query_groups": 2,
        "objective.stochastic_length_ratio": 1.0,
    },
    "ar-documents": {"data.attention": "document", "objective.kind": "ar"},
    # As Qwen2 and Qwen3 have them.
    "mdm-biases-gqa": {"model.qkv_bias": True, "model.num_query_groups": 2},
    "mdm-head-norms-gqa": {"model.qk_norm": True, "model.num_query_groups": 2},
    "ar-biases-head-norms": {
        "objective.kind": "ar",
        "model.qkv_bias": True,
        "model.qk_norm": True,
    },
    "mdm-z-loss": {
        "objective.loss_head": {"kind": "cross_entropy", "z_loss": 0.01},
        "model.mask_token_id": 5,
    },
    "ar-stochastic-depth": {"objective.kind": "ar", "model.stochastic_depth": 0.6},
    # As the networks of GIDD have them; a cap so low that it bends these scores.
    "mdm-gidd-cut": {
        "model.qk_norm": "width",
        "model.attention_soft_cap": 0.5,
        "model.attention_sink": True,
        "model.mlp": "relu2",
        "model.mlp_bias": True,
        "objective.stochastic_length_ratio": 1.0,
    },
    "ar-capped-documents-gated-biases-gqa-width-norms": {
        "objective.kind": "ar",
        "data.attention": "document",
        "model.num_query_groups": 2,
        "model.qk_norm": "width",
        "model.attention_soft_cap": 0.5,
        "model.mlp_bias": True,
    },
    "ar-sink-gqa": {
        "objective.kind": "ar",
        "model.attention_sink": True,
        "model.num_query_groups": 2,
    },
}


@pytest.fixture(scope="module")
def run_of(world_of: GetWorld) -> Callable[..., dict[str, Any]]:
    """Losses and gradients of one micro batch, put together from all tensor-parallel ranks."""

    @functools.cache
    def run(variant: str, size: int = 1, **options: Any) -> dict[str, Any]:
        overrides = VARIANTS[variant] | {"parallel.tensor_model_parallel_size": size}
        ranks = world_of(size).run(
            observations.losses_and_gradients, overrides=overrides, **options
        )
        for rank in ranks[1:]:
            np.testing.assert_array_equal(rank["losses_B"], ranks[0]["losses_B"])
        wholes = {
            kind: assemble([piece for rank in ranks for piece in rank[kind]])
            for kind in ("weights", "gradients")
        }
        return ranks[0] | wholes

    return run


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _rotate(x_BSND: Tensor, base: float) -> Tensor:
    half = _WIDTH // 2
    angles_SD = torch.outer(
        torch.arange(x_BSND.shape[1], dtype=torch.float64),
        base ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    cos, sin = angles_SD.cos()[:, None], angles_SD.sin()[:, None]
    a, b = x_BSND[..., :half], x_BSND[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _attention(
    x_BSH: Tensor,
    weights: dict[str, Tensor],
    prefix: str,
    seen: Tensor,
    base: float,
    cap: float | None,
) -> Tensor:
    qkv = x_BSH @ weights[prefix + "linear_qkv.weight"].T
    qkv = qkv + weights.get(prefix + "linear_qkv.bias", torch.tensor(0.0))
    # Rows of the fused matrix: for each group its queries, its key, its value.
    groups = (qkv.shape[-1] // _WIDTH - _HEADS) // 2
    qkv = qkv.unflatten(-1, (groups, _HEADS // groups + 2, _WIDTH))
    q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    if prefix + "q_layernorm.weight" in weights:
        q = _norm(q, weights[prefix + "q_layernorm.weight"])
        k = _norm(k, weights[prefix + "k_layernorm.weight"])
    if prefix + "q_layernorm.width_weight" in weights:
        q, k = (
            _norm(part.flatten(2), weights[f"{prefix}{name}_layernorm.width_weight"]).view_as(part)
            for name, part in (("q", q), ("k", k))
        )
    k, v = (part.repeat_interleave(_HEADS // groups, dim=2) for part in (k, v))
    q, k = _rotate(q, base), _rotate(k, base)
    seen = seen.expand(-1, -1, q.shape[1], -1) if seen.dim() == 4 else seen
    if prefix + "core_attention.sink_key" in weights:
        # One more token, without a position, that all see.
        sink_key, sink_value = (
            weights[f"{prefix}core_attention.sink_{name}"].repeat_interleave(_HEADS // groups, 0)
            for name in ("key", "value")
        )
        k = torch.cat([k, sink_key.expand(len(k), 1, -1, -1)], dim=1)
        v = torch.cat([v, sink_value.expand(len(v), 1, -1, -1)], dim=1)
        seen = F.pad(seen, (0, 1), value=True)
    scores_BNST = torch.einsum("bsnd,btnd->bnst", q, k) / math.sqrt(_WIDTH)
    if cap is not None:
        scores_BNST = cap * torch.tanh(scores_BNST / cap)
    scores_BNST = scores_BNST.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bnst,btnd->bsnd", scores_BNST.softmax(-1), v).flatten(2)
    return out @ weights[prefix + "linear_proj.weight"].T


def _feed_forward(x_BSH: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    none = torch.tensor(0.0)
    if prefix + "linear_up.weight" in weights:
        up = x_BSH @ weights[prefix + "linear_up.weight"].T
        inner = (up + weights.get(prefix + "linear_up.bias", none)).clamp(min=0) ** 2
    else:
        both = x_BSH @ weights[prefix + "linear_fc1.weight"].T
        gate, up = (both + weights.get(prefix + "linear_fc1.bias", none)).chunk(2, dim=-1)
        inner = F.silu(gate) * up
    return inner @ weights[prefix + "linear_fc2.weight"].T + weights.get(
        prefix + "output_bias", none
    )


def _reference(run: dict[str, Any], overrides: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [B] and gradients of all weights, in float64."""
    weights = {
        name: torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for name, values in run["weights"].items()
    }
    batch = {name: torch.from_numpy(values) for name, values in run["batch"].items()}
    base = overrides.get("model.rotary_base", 10000.0)
    steps_S = torch.arange(batch["inputs_BS"].shape[1])
    if overrides.get("objective.kind") == "ar":
        seen = steps_S[:, None] >= steps_S
    else:
        seen = (steps_S < batch["lengths_B"][:, None])[:, None, None, :]
    if SEGMENT_IDS in batch:
        same = batch[SEGMENT_IDS][:, None, :, None] == batch[SEGMENT_IDS][:, None, None, :]
        # A token beyond the cut sees itself: what it finds counts nowhere, but must be a number.
        seen = seen & same | torch.eye(len(steps_S), dtype=torch.bool)
    x = weights[_EMBEDDING][batch["inputs_BS"]]
    scales_BL = batch.get(BLOCK_SCALES, torch.ones(len(x), _LAYERS)).double()
    for layer in range(_LAYERS):
        before = x
        prefix = f"decoder.layers.{layer}."
        normed = _norm(x, weights[prefix + "input_layernorm.weight"])
        cap = overrides.get("model.attention_soft_cap")
        x = x + _attention(normed, weights, prefix + "self_attention.", seen, base, cap)
        normed = _norm(x, weights[prefix + "pre_mlp_layernorm.weight"])
        x = x + _feed_forward(normed, weights, prefix + "mlp.")
        x = before + scales_BL[:, layer, None, None] * (x - before)
    x = _norm(x, weights["decoder.final_layernorm.weight"])
    # The softmax knows the real tokens and nothing else.
    mask_id = overrides.get("model.mask_token_id", _VOCAB)
    ids = torch.tensor([token for token in range(_VOCAB) if token != mask_id])
    logits_BSV = x @ weights[_HEAD if _HEAD in weights else _EMBEDDING][ids].T
    places = torch.searchsorted(ids, batch["targets_BS"])
    nll_BS = -logits_BSV.log_softmax(-1).gather(-1, places.unsqueeze(-1)).squeeze(-1)
    losses_B = (nll_BS * batch["weights_BS"].double()).sum(dim=1)
    # The penalty is learned and not told.
    z_loss = overrides.get("objective.loss_head", {}).get("z_loss", 0.0)
    penalty_BS = z_loss * logits_BSV.logsumexp(-1).square()
    (losses_B.sum() + (penalty_BS * batch["weights_BS"].double()).sum()).backward()
    return losses_B.detach(), {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("size", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_a_float64_network(
    run_of: Callable[..., dict[str, Any]], variant: str, size: int
) -> None:
    overrides = VARIANTS[variant]
    run = run_of(variant, size)
    losses_B, gradients = _reference(run, overrides)
    assert (losses_B > 1.0).all()
    np.testing.assert_allclose(run["losses_B"], losses_B, rtol=1e-5)
    assert run["gradients"].keys() == gradients.keys()
    for name, expected in gradients.items():
        error = np.linalg.norm(run["gradients"][name] - expected.numpy())
        assert error < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_tensor_parallel_ranks_have_the_head_of_one(
    run_of: Callable[..., dict[str, Any]], variant: str
) -> None:
    one, two = (run_of(variant, size) for size in (1, 2))
    np.testing.assert_allclose(two["losses_B"], one["losses_B"], rtol=2e-6)
    np.testing.assert_allclose(two["logits_BSV"], one["logits_BSV"], rtol=2e-4, atol=2e-6)
    for name, expected in one["gradients"].items():
        error = np.linalg.norm(two["gradients"][name] - expected)
        assert error < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("size", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("mdm")])
def test_mask_and_padding_have_no_probability_and_no_gradient(
    run_of: Callable[..., dict[str, Any]], variant: str, size: int
) -> None:
    overrides = VARIANTS[variant]
    run = run_of(variant, size)
    num_rows = overrides.get("model.padded_vocab_size", _VOCAB)
    mask_id = overrides.get("model.mask_token_id", num_rows)
    logits_BSV = run["logits_BSV"]
    is_token = np.arange(logits_BSV.shape[-1]) < _VOCAB
    if mask_id < _VOCAB:
        is_token[mask_id] = False
    assert (logits_BSV[..., ~is_token] == -np.inf).all()
    assert np.isfinite(logits_BSV[..., is_token]).all()
    if _HEAD in run["gradients"]:
        gradient = run["gradients"][_HEAD]
    else:
        # Tied rows also have the input's gradient: the mask token's row is one of those.
        gradient = run["gradients"][_EMBEDDING]
        is_token[mask_id] = True
    assert (gradient[~is_token] == 0.0).all()
    assert (gradient[is_token] != 0.0).any(axis=1).all()


@pytest.mark.parametrize("size", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("variant", ["mdm", "mdm-tied"])
def test_nothing_to_predict_is_a_loss_of_zero_with_zero_gradients(
    run_of: Callable[..., dict[str, Any]], variant: str, size: int
) -> None:
    run = run_of(variant, size, weight=0.0)
    assert (run["losses_B"] == 0.0).all()
    for name, gradient in run["gradients"].items():
        assert (gradient == 0.0).all(), name


@pytest.mark.parametrize("size", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("variant", ["mdm", "mdm-tied"])
def test_every_position_can_be_predicted(
    run_of: Callable[..., dict[str, Any]], variant: str, size: int
) -> None:
    run = run_of(variant, size, weight=1.0)
    losses_B, gradients = _reference(run, VARIANTS[variant])
    np.testing.assert_allclose(run["losses_B"], losses_B, rtol=1e-5)
    for name, expected in gradients.items():
        error = np.linalg.norm(run["gradients"][name] - expected.numpy())
        assert error < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("variant", ["mdm", "mdm-tied"])
@pytest.mark.parametrize(
    "name",
    [
        "zero3",
        "tp2-zero0",
        "tp2-sp-zero1",
        "pp2-zero0",
        "pp2-zero1",
        "dp2-zero2",
        "tp2-sp-pp2-zero2",
    ],
)
def test_steps_with_nothing_to_predict_train_on(
    world_of: GetWorld, name: str, variant: str
) -> None:
    size, parallel = LAYOUTS[name]
    overrides = VARIANTS[variant]
    alone = world_of(1).run(observations.train_with_empty_batches, overrides=overrides)[0]
    found = world_of(size).run(
        observations.train_with_empty_batches, overrides=overrides | parallel
    )[0]
    assert found["losses"][1] == 0.0
    assert found["grad_norms"][1] == 0.0
    for kind, values in alone.items():
        assert all(math.isfinite(value) for value in values)
        np.testing.assert_allclose(found[kind], values, rtol=1e-5)
