"""The two published model families as data.

Sources: *Scaling up Masked Diffusion Models on Text* (arXiv 2410.18514) for `smdm-*` and
*Diffusion Beats Autoregressive in Data-Constrained Settings* (arXiv 2507.15857) for `dc-*`.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_mdm.config.parameters import ParameterConvention

# How the papers' own scripts count N, and so the FLOPs of a budget. arXiv 2410.18514: layers and
# final norm alone. arXiv 2507.15857, as arXiv 2305.16264 before it: the tied embedding too.
_CONVENTIONS: dict[str, ParameterConvention] = {
    "smdm": "without_embeddings",
    "dc": "with_embeddings",
}

# name: (num_layers, num_attention_heads, hidden_size)
_SMDM: dict[str, tuple[int, int, int]] = {
    "6M": (6, 4, 256),
    "19M": (8, 6, 384),
    "34M": (8, 8, 512),
    "48M": (9, 9, 576),
    "66M": (10, 10, 640),
    "75M": (16, 8, 640),
    "85M": (13, 10, 640),
    "113M": (12, 12, 768),
    "142M": (15, 12, 768),
    "170M": (18, 12, 768),
    "180M": (14, 14, 896),
    "206M": (16, 14, 896),
    "231M": (18, 14, 896),
    "268M": (16, 16, 1024),
    "302M": (18, 16, 1024),
    "336M": (20, 16, 1024),
    "472M": (18, 10, 1280),
    "551M": (21, 10, 1280),
    "571M": (18, 11, 1408),
    "629M": (24, 10, 1280),
    "666M": (21, 11, 1408),
    "717M": (19, 12, 1536),
    "761M": (24, 11, 1408),
    "831M": (22, 12, 1536),
    "944M": (25, 12, 1536),
    "1028M": (20, 14, 1792),
    "1233M": (24, 14, 1792),
    "1476M": (22, 16, 2048),
    "1678M": (25, 16, 2048),
    "2121M": (28, 17, 2176),
}

# name: (hidden_size, num_attention_heads, num_layers)
_DATA_CONSTRAINED: dict[str, tuple[int, int, int]] = {
    "7M": (128, 4, 3),
    "14M": (224, 7, 4),
    "20M": (288, 7, 5),
    "35M": (448, 7, 6),
    "44M": (512, 8, 8),
    "57M": (576, 9, 9),
    "74M": (640, 10, 10),
    "90M": (640, 10, 13),
    "106M": (640, 10, 16),
    "117M": (768, 12, 12),
    "140M": (768, 12, 15),
    "163M": (768, 12, 18),
    "175M": (896, 14, 14),
    "196M": (896, 14, 16),
    "217M": (896, 14, 18),
    "251M": (1024, 16, 16),
    "278M": (1024, 16, 18),
    "306M": (1024, 16, 20),
    "425M": (1280, 10, 18),
    "489M": (1280, 10, 21),
    "509M": (1408, 11, 18),
    "552M": (1280, 10, 24),
    "587M": (1408, 11, 21),
    "632M": (1536, 12, 19),
    "664M": (1408, 11, 24),
    "724M": (1536, 12, 22),
    "816M": (1536, 12, 25),
    "893M": (1792, 14, 20),
    "1018M": (1792, 14, 23),
    "1143M": (1792, 14, 26),
    "1266M": (2048, 16, 22),
    "1424M": (2176, 17, 22),
    "1429M": (2048, 16, 25),
    "1593M": (2048, 16, 28),
    "1609M": (2176, 17, 25),
    "1731M": (2304, 18, 24),
    "1794M": (2176, 17, 28),
    "2007M": (2304, 18, 28),
    "2283M": (2304, 18, 32),
    "2298M": (2560, 20, 26),
    "2639M": (2560, 20, 30),
    "2980M": (2560, 20, 34),
    "3530M": (2688, 21, 36),
    "3802M": (2816, 22, 36),
    "4084M": (2944, 23, 36),
    "4516M": (3072, 24, 36),
    "6796M": (3584, 28, 40),
    "9293M": (4096, 32, 42),
    "11452M": (4352, 32, 47),
    "12295M": (4608, 36, 44),
    "12569M": (4608, 32, 47),
    "13735M": (4864, 32, 47),
    "14940M": (4992, 32, 49),
    "16183M": (5120, 40, 47),
}


def _expand_smdm(name: str) -> dict[str, Any]:
    num_layers, num_heads, hidden_size = _SMDM[name]
    return {
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 1600 if name == "75M" else 4 * hidden_size,
        "vocab_size": 32000,
        "tie_embeddings": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": math.sqrt(2 / (5 * hidden_size)),
        "output_init_std": 1 / (math.sqrt(hidden_size) * num_layers),
    }


def _expand_data_constrained(name: str) -> dict[str, Any]:
    hidden_size, num_heads, num_layers = _DATA_CONSTRAINED[name]
    return {
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_size": hidden_size,
        # 7 heads do not divide a width of 288: the published heads are 32 wide.
        "head_dim": 32 if name == "20M" else None,
        "ffn_hidden_size": (8 * hidden_size // 3) // 64 * 64,
        "vocab_size": 50257,
        "tie_embeddings": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "init_std": 0.02,
        # Megatron's scaled initialisation of the two projections that write to the residual.
        "output_init_std": 0.02 / math.sqrt(2 * num_layers),
    }


def list_presets() -> list[str]:
    """Names of all presets, smallest model first within each family.

    Returns:
        Names such as `smdm-170M` and `dc-425M`.
    """
    return [f"smdm-{name}" for name in _SMDM] + [f"dc-{name}" for name in _DATA_CONSTRAINED]


def expand_preset(preset: str) -> dict[str, Any]:
    """Fields of the `model` section that a preset stands for.

    Args:
        preset: A name from `list_presets()`.

    Returns:
        Field names and values.

    Raises:
        KeyError: The preset does not exist.
    """
    family, _, name = preset.partition("-")
    if family == "smdm" and name in _SMDM:
        return _expand_smdm(name)
    if family == "dc" and name in _DATA_CONSTRAINED:
        return _expand_data_constrained(name)
    raise KeyError(preset)


def find_convention(preset: str | None) -> ParameterConvention:
    """How the family of a preset counts parameters.

    Args:
        preset: Name of a preset or of its family; None for a model that is none.

    Returns:
        The family's convention; without embeddings for whatever belongs to none.
    """
    family = preset.partition("-")[0] if preset is not None else ""
    return _CONVENTIONS.get(family, "without_embeddings")
