"""What users have today, written the way the papers' public code does it, to compare with.

`PlainTransformer` is a model in plain PyTorch: logits of all positions, times drawn independently
for each sequence; `llama` is transformers' class of the same shape. Both begin with our initial
weights, so all losses are comparable.

`public_sampler` reveals the surest tokens of the whole batch.

`one_at_a_time` scores requests: of masked diffusion it runs a request's masks 32 at a time, of the
chain rule a row for each token, with the logits of all positions; nothing is padded. Of an
autoregressive model it runs the harness' own loop at batch size 1: all tokens
but the last, and the log-softmax of all positions.

Shapes: B batch or draws, S sequence, V vocabulary, M masked positions of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import Config, ModelConfig
from megatron_mdm.diffusion.probes import LikelihoodEstimator, make_request_noise
from megatron_mdm.hf.formats.translation import to_format
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.model.initialization import draw_initial_weight
from megatron_mdm.model.parameters import EMBEDDING, find_parameter, list_parameter_names

# Draws of one forward pass of the public code.
_PUBLIC_BATCH = 32


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
        if not sizes.tie_embeddings:
            self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Maps tokens [B, S] to logits [B, S, V]."""
        x_BSH = self.transformer["wte"](tokens_BS)
        rotary = _rotary(tokens_BS.shape[1], self.head_dim, self.rotary_base, x_BSH)
        blocks: Any = self.transformer["h"]
        for block in blocks:
            x_BSH = block(x_BSH, *rotary)
        x_BSH = self.transformer["ln_f"](x_BSH)
        is_tied = not hasattr(self, "lm_head")
        embedding: Any = self.transformer["wte"]
        head_VH = embedding.weight[:-1] if is_tied else self.lm_head.weight
        return F.linear(x_BSH, head_VH)


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


def plain_transformer(config: Config, device: torch.device) -> PlainTransformer:
    """The plain model with our initial weights.

    Args:
        config: The run; its seed is that of the weights.
        device: Where to make it.

    Returns:
        The model, float32.
    """
    with device:
        model = PlainTransformer(config.model)
    model.load_state_dict(_initial_state(config, "smdm"))
    return model


def llama(config: Config, device: torch.device) -> nn.Module:
    """Transformers' Llama of the same shape with our initial weights, attention bidirectional.

    Its output layer has a row for the mask token, which all but never matters to the loss.

    Args:
        config: The run.
        device: Where to make it.

    Returns:
        The model, float32.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Under a name of its own transformers makes no mask for it. For its own name it makes a causal
    # one while torch.compile traces, which would hold.
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    sizes = config.model
    shape = LlamaConfig(
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
        attn_implementation="sdpa_without_mask",
        use_cache=False,
    )
    with device:
        model: Any = LlamaForCausalLM(shape)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    state = _initial_state(config, "hf")
    if not sizes.tie_embeddings:
        head_VH = state["lm_head.weight"]
        mask_row = torch.zeros(_embedding_rows(sizes) - len(head_VH), head_VH.shape[1])
        state["lm_head.weight"] = torch.cat([head_VH, mask_row])
    model.load_state_dict(state, strict=not sizes.tie_embeddings)
    module: nn.Module = model
    return module


def public_sampler(
    model: torch.nn.Module,
    x_BS: Tensor,
    *,
    mask_token_id: int,
    num_steps: int,
    temperature: float,
    callback: Callable[[Tensor], None],
) -> Tensor:
    """Low-confidence remasking as the public code of the first paper does it.

    The whole sequence in every pass; softmax in float64 over every masked position; the number of
    tokens to reveal is truncated to an integer, over all sequences together, as is the choice of
    the surest, so that sequences compete; what truncation left over comes in the last step.

    Args:
        model: Maps tokens to an output with `logits`.
        x_BS: Tokens with masks, int64.
        mask_token_id: Id of the mask token.
        num_steps: Passes; all are made, also those that reveal nothing.
        temperature: 0 takes the best token.
        callback: Called after every step with the tokens.

    Returns:
        Filled tokens [B, S].

    Source:
        The procedure of arXiv 2410.18514, section 3.3 and its published evaluation code.
    """
    x_BS = x_BS.clone()
    times = torch.linspace(1.0, 1e-5, num_steps + 1).tolist()
    for step in range(num_steps):
        is_mask_BS = x_BS == mask_token_id
        logits_MV = model(x_BS).logits[is_mask_BS]
        noisy_MV = logits_MV
        if temperature > 0:
            uniform_MV = torch.rand_like(logits_MV, dtype=torch.float64)
            noisy_MV = logits_MV.double().exp() / (-uniform_MV.log()) ** temperature
        tokens_M = noisy_MV.argmax(-1)
        probs_MV = logits_MV.double().softmax(-1)
        confidence_M = probs_MV.gather(-1, tokens_M[:, None]).squeeze(-1)
        left = len(tokens_M)
        count = int(left * (1 - times[step + 1] / times[step])) if step < num_steps - 1 else left
        if count > 0:
            surest_K = confidence_M.topk(count).indices
            revealed_M = torch.full_like(tokens_M, mask_token_id)
            revealed_M[surest_K] = tokens_M[surest_K]
            x_BS[is_mask_BS] = revealed_M
        callback(x_BS)
    return x_BS


def one_at_a_time(
    model: Any, settings: ScoringSettings, requests: Sequence[Request]
) -> list[float]:
    """Log-likelihoods of either kind of model.

    Args:
        model: Of an export.
        settings: Estimator, draws, guidance and seed, for masked diffusion.
        requests: What is scored.

    Returns:
        The log-likelihood of each request, or its estimate, in nats.
    """
    if model.config.is_causal:
        return [_public_causal(model, request) for request in requests]
    return [_public(model, request, settings) for request in requests]


def _embedding_rows(sizes: ModelConfig) -> int:
    return find_parameter(EMBEDDING).count_unpadded_rows(sizes)


def _initial_state(config: Config, format_name: str) -> dict[str, Tensor]:
    # A tied model is one without an output layer of its own, which some formats do not know.
    model = config.model.model_copy(update={"tie_embeddings": False})
    saved = SavedModel(model, "mdm", config.data.seq_length)
    state: dict[str, Tensor] = {}
    for name in list_parameter_names(config.model):
        weight = torch.from_numpy(draw_initial_weight(name, config.model, config.run.seed))
        state |= {one: part.clone() for one, part in to_format(format_name, name, weight, saved)}
    return state


def _rotary(length: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    inverse = base ** (-torch.arange(0, width, 2, device=like.device).float() / width)
    angles = torch.arange(length, device=like.device).float()[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD


@torch.inference_mode()
def _public(model: Any, request: Request, settings: ScoringSettings) -> float:
    """Draws of one request in batches of 32, logits of all positions, as in the public code.

    Source:
        The procedure of the published evaluation code of arXiv 2410.18514, on our masks: with
        guidance, both passes in one batch and their logits combined.
    """
    kind = settings.estimator or "fixed_count"
    estimator = LikelihoodEstimator(kind, settings.draws, settings.stratified)
    size = len(request.continuation)
    noise = make_request_noise(settings.seed, request.context, request.continuation)
    probes = estimator.draw_probes(noise, request.continuation, 0)
    device = model.device
    clean_S = torch.tensor([*request.context, *request.continuation], device=device)
    found: list[float] = []
    # One target a pass in the left-to-right estimator: a row each, as many at once.
    for start in range(0, len(probes), _PUBLIC_BATCH):
        part = probes[start : start + _PUBLIC_BATCH]
        padding = (len(clean_S) - size, 0)
        hidden_BL = torch.from_numpy(np.stack([probe.hidden_L for probe in part]))
        weights_BL = torch.from_numpy(np.stack([probe.weights_L for probe in part]))
        hidden_BS = F.pad(hidden_BL.to(device), padding)
        weights_BS = F.pad(weights_BL.to(device, torch.float64), padding)
        tokens_BS = torch.where(hidden_BS, model.config.mask_token_id, clean_S)
        logits_BSV = _public_logits(model, tokens_BS, len(request.context), settings)
        targets_BS = clean_S.expand_as(tokens_BS)
        logits_MV = logits_BSV[hidden_BS].float()
        loss_M = F.cross_entropy(logits_MV, targets_BS[hidden_BS], reduction="none")
        values_BS = torch.zeros_like(weights_BS)
        values_BS[hidden_BS] = -loss_M.double()
        found += (values_BS * weights_BS).sum(1).tolist()
    return estimator.combine(size, [np.array(found)]).mean


def _public_logits(model: Any, tokens_BS: Tensor, size: int, settings: ScoringSettings) -> Tensor:
    scale = settings.guidance_scale
    if scale == 0:
        logits_BSV: Tensor = model(tokens_BS).logits
        return logits_BSV
    others_BS = tokens_BS.clone()
    others_BS[:, :size] = model.config.mask_token_id
    both_BSV, others_BSV = model(torch.cat([tokens_BS, others_BS])).logits.chunk(2)
    guided_BSV: Tensor = others_BSV + (scale + 1) * (both_BSV - others_BSV)
    return guided_BSV


@torch.inference_mode()
def _public_causal(model: Any, request: Request) -> float:
    # As the harness' own models do: the last token predicts nothing, and is not run.
    tokens_S = torch.tensor([*request.context, *request.continuation], device=model.device)
    log_probs_SV = model(tokens_S[None, :-1]).logits[0].float().log_softmax(-1)
    start = len(request.context)
    found = log_probs_SV[start - 1 :].gather(1, tokens_S[start:, None])
    return float(found.double().sum())
