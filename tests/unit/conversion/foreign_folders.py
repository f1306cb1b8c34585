"""Small random models of every format, written as their own programs write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from reference_models import GIDD_CONFIG, LLADA_CONFIG, Gidd, Llada, Scaled, Smdm, randomize
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_mdm.config import expand_preset

SIZES = {
    "vocab_size": 21,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 10}),
}


def save_autoregressive(folder: Path, format_name: str, shard_size: str = "5GB", **changes):
    config_class, model_class, own = CLASSES[format_name]
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    model = model_class(config_class(**(SIZES | own | {"rope_parameters": rope} | changes)))
    randomize(model).save_pretrained(folder, max_shard_size=shard_size)
    return model


def save_llada(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Llada:
    config = LLADA_CONFIG | changes
    model = randomize(Llada(config)).to(dtype)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def save_gidd(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Gidd:
    config = GIDD_CONFIG | changes
    model = randomize(Gidd(config))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # What is stored is what is added to 1.
            parameter.data.sub_(1)
    for module in model.modules():
        if isinstance(module, Scaled):
            # As much signal under any scale; squares grow, so less than elsewhere.
            module.weight.data.mul_(0.7 / module.scale)
    model.to(dtype)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.float()


def smdm_of(preset: str, *, is_causal: bool, vocab: int, **changes) -> Smdm:
    """The reference model in the sizes of a preset, or nearly."""
    fields = expand_preset(preset) | changes
    return Smdm(
        layers=fields["num_layers"],
        heads=fields["num_attention_heads"],
        width=fields["hidden_size"],
        ffn=fields["ffn_hidden_size"],
        vocab=vocab,
        is_causal=is_causal,
    )


def save_smdm(path: Path, *, is_causal: bool) -> Smdm:
    model = smdm_of("smdm-6M", is_causal=is_causal, vocab=50)
    randomize(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "wte" not in name:
            # Wider than the other models of these tests: as much signal with smaller weights.
            parameter.data.mul_(0.2)
    save_file(model.state_dict(), path)
    return model


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))
