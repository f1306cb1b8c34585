"""What parity compares: references, cases, their data and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from megatron_mdm.config.objective import OBJECTIVES
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.writer import ShardWriter

Tree = dict[str, Any]

# Groups of cases besides those of objectives.
ENGINE, RESUME = "engine", "resume"
_NUM_STEPS, SAVED_STEP = 5, 3
VOCAB_SIZE, _SEQ_LENGTH, _NUM_TEXTS, _MEAN_TEXT = 512, 256, 160, 120
_END = 0
# What a reference of each objective is made with, besides whole windows.
_VARIANTS: dict[str, Tree] = {
    "whole": {},
    "documents": {"data": {"attention": "document"}},
    "cut_lengths": {"objective": {"stochastic_length_ratio": 0.5}},
    # FlexAttention with changed scores and a sink, and what else GIDD's models have.
    "scored": {
        "model": {
            "qk_norm": "width",
            "attention_soft_cap": 2.0,
            "attention_sink": True,
            "mlp": "relu2",
            "mlp_bias": True,
        },
        "objective": {
            "stochastic_length_ratio": 0.5,
            "process": {"kind": "hybrid", "shift": 1.0},
        },
    },
}
BASE: Tree = {
    "model": {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 192,
        "vocab_size": VOCAB_SIZE,
        "qk_norm": True,
    },
    "data": {"seq_length": _SEQ_LENGTH},
    "batch": {"micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4},
    "schedule": {"steps": _NUM_STEPS, "warmup_steps": 1},
    "validation": {"num_samples": 8, "noise_seed": 3},
    "checkpoint": {"every_steps": SAVED_STEP, "keep_last": 2, "background": False},
    "reporting": {"log_every_steps": 1, "peak_tflops": 1.0},
}
# Shares of what the CPU found. Layouts on CPUs differ by 5e-8 (losses) and 4e-6 (norms) in float32,
# and in bf16 by 4e-4 and 1.2e-2 from each other; a device sums in another order, and bf16 rounds
# what the reference does not.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"losses": 1e-4, "grad_norms": 1e-3, "held_out": 1e-4},
    "bf16": {"losses": 1e-2, "grad_norms": 5e-2, "held_out": 1e-2},
}


class Case(NamedTuple):
    """A run on the device.

    Attributes:
        group: The objective, or `engine`.
        name: What is special about it.
        reference: The run on a CPU that it repeats.
        dtype: `fp32` or `bf16`.
        changes: Sections and fields that differ from the reference's.
    """

    group: str
    name: str
    reference: str
    dtype: str
    changes: Tree


def list_references() -> dict[str, Tree]:
    """Runs on a CPU: every objective of the package, in each variant that it can be."""
    found = {}
    for kind in OBJECTIVES.names:
        for name, sections in _VARIANTS.items():
            if _accepts(kind, sections.get("objective", {})):
                found[f"{kind}_{name}"] = merge(sections, {"objective": {"kind": kind}})
    return found


def _accepts(kind: str, fields: Tree) -> bool:
    """Does an objective have such fields, and go with their values?"""
    section = OBJECTIVES.find(kind, "objective.kind")
    if not set(fields) <= set(section.model_fields):
        return False
    try:
        section.model_validate({"kind": kind, **fields})
    except ValidationError:
        return False
    return True


def list_cases(*, tiny: bool) -> list[Case]:
    """Runs on the device: every reference in both dtypes, then what an engine can do besides."""
    references = list_references()
    first, *_ = references
    cases = [
        Case(tree["objective"]["kind"], f"{reference}_{dtype}", reference, dtype, {})
        for reference, tree in references.items()
        for dtype in TOLERANCES
        if dtype == "fp32" or not tiny or reference == first
    ]
    documents = f"{OBJECTIVES.names[0]}_documents"
    special: list[tuple[str, str, Tree]] = [
        ("zero_0", "fp32", {"parallel": {"zero_stage": 0}}),
        ("zero_2", "bf16", {"parallel": {"zero_stage": 2}}),
        ("zero_3", "bf16", {"parallel": {"zero_stage": 3}}),
        ("overlap", "bf16", {"parallel": {"overlap_gradient_reduction": True}}),
        *(
            (f"recompute_{kind}", dtype, {"parallel": {"recompute": kind}})
            for kind in ("selective", "full")
            for dtype in TOLERANCES
        ),
        *(("compile_off", dtype, {"run": {"compile": "off"}}) for dtype in TOLERANCES),
        ("capacity", "bf16", {"batch": {"prediction_capacity": 128}}),
    ]
    chosen = special[1:2] if tiny else special
    return cases + [
        Case(ENGINE, f"{name}_{dtype}", documents, dtype, tree) for name, dtype, tree in chosen
    ]


def list_groups() -> list[str]:
    """What can be compared alone."""
    return [*OBJECTIVES.names, ENGINE, RESUME]


def write_shards(prefix: Path) -> None:
    """Writes texts of random tokens, the same on any machine.

    Args:
        prefix: Of the shards.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    # Some tokens are far more frequent than others, so there is something to learn.
    texts = [
        np.append(np.minimum(generator.geometric(0.02, length), VOCAB_SIZE - 1), _END)
        for length in generator.geometric(1 / _MEAN_TEXT, _NUM_TEXTS)
    ]
    with ShardWriter(prefix, np.uint16) as writer:
        for tokens in texts:
            writer.add_document(tokens)
        writer.finish()
    Manifest(
        tokenizer="none",
        tokenizer_sha256="0" * 64,
        vocab_size=VOCAB_SIZE,
        eod_token_id=_END,
        special_tokens={},
        num_documents=_NUM_TEXTS,
        num_tokens=sum(map(len, texts)),
        max_token_id=VOCAB_SIZE - 1,
        dtype="uint16",
        source_files=[],
    ).write(manifest_path(prefix))


def merge(*trees: Tree) -> Tree:
    """Sections of configurations, of whose fields the last word counts.

    Args:
        *trees: Sections and fields.

    Returns:
        A tree of its own.
    """
    merged: Tree = {}
    for tree in trees:
        for section, fields in tree.items():
            merged[section] = merged.get(section, {}) | fields
    return merged
