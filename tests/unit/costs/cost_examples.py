"""A model small enough to reckon with by hand."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config import Config, parse_config

# d = 8, a = 8, k = 4, f = 12, 64 rows of embedding and 64 of head.
# A layer's matrices: 2 d (a + k) + 3 d f = 2 * 8 * 12 + 3 * 8 * 12 = 480; norms 2 d = 16.
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 12,
    "vocab_size": 61,
    "vocab_padding_multiple": 8,
}
LAYER = 480 + 16
EMBEDDING = HEAD = 64 * 8
# 4 * 496 + 2 * 512 + 8 = 3,016.
WHOLE = 4 * LAYER + EMBEDDING + HEAD + 8


def run_of(
    *,
    model: dict[str, Any] | None = None,
    micro: int = 1,
    batch: int = 8,
    seq: int = 16,
    kind: str = "mdm",
    **parallel: Any,
) -> Config:
    """A run of the small model."""
    return parse_config(
        {
            "run": {"dir": "r"},
            "model": {**MODEL, **(model or {})},
            "objective": {"kind": kind, "process": {"masking": "fixed_count"}},
            "data": {"train": [{"path": "a"}], "seq_length": seq},
            "batch": {"global_batch_size": batch, "micro_batch_size": micro},
            "parallel": parallel,
            "schedule": {"steps": 1},
        }
    )
