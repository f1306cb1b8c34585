"""Imports the modules of an export as they lie in an export's folder: neighbours of each other."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch

import megatron_mdm

_ROOT = Path(megatron_mdm.__file__).parent
_PACKAGE = types.ModuleType("exported_mdm")
_PACKAGE.__path__ = [str(_ROOT / "hf"), str(_ROOT / "diffusion")]
sys.modules[_PACKAGE.__name__] = _PACKAGE

caching = importlib.import_module("exported_mdm.caching_mdm")
configuration = importlib.import_module("exported_mdm.configuration_mdm")
decoding = importlib.import_module("exported_mdm.decoding")
modeling = importlib.import_module("exported_mdm.modeling_mdm")
sampler_state = importlib.import_module("exported_mdm.sampler_state")

MASK = 19


def random_model(seed: int = 0, **changes):
    """A tiny model in float64 with 19 tokens, whose logits are far from each other."""
    sizes = {
        "vocab_size": 19,
        "mask_token_id": MASK,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
    }
    model = modeling.MdmForMaskedLM(configuration.MdmConfig(**(sizes | changes))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 1 + 0.2 * noise if "norm" in name else 0.4 * noise
    return model
