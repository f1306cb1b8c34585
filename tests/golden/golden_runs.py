"""What is frozen: texts, runs as a user writes them, layouts, a tiny model and what it is asked.

Plain values alone: nothing here knows the package. Texts and weights come from SHAKE-256, which is
the same bytes on any machine and in any version of any library.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tree = dict[str, Any]

VOCAB_SIZE, SEQ_LENGTH = 61, 16
END_OF_TEXT = 0
# Steps whose batches are frozen, and steps that are trained.
NUM_BATCH_STEPS, NUM_TRAINED_STEPS = 3, 5


def uniforms(name: str, count: int) -> NDArray[np.float64]:
    """Numbers that belong to a name.

    Args:
        name: Anything.
        count: How many.

    Returns:
        float64 [count] in [0, 1), whole multiples of 2^-16.
    """
    content = hashlib.shake_256(name.encode()).digest(2 * count)
    return np.frombuffer(content, "<u2") / 65536.0


def documents(name: str, count: int, longest: int) -> list[list[int]]:
    """Texts of 1 to `longest` tokens each, none of which ends a text.

    Args:
        name: Of the corpus.
        count: Texts.
        longest: Tokens of the longest possible.
    """
    lengths = 1 + (uniforms(f"{name} lengths", count) * longest).astype(int)
    return [
        (1 + (uniforms(f"{name} {number}", length) * (VOCAB_SIZE - 1)).astype(int)).tolist()
        for number, length in enumerate(lengths)
    ]


# So small that three steps of eight windows go past the end of each.
CORPORA = {
    "stories": documents("stories", 28, 24),
    "poems": documents("poems", 14, 9),
    "notes": documents("notes", 9, 30),
    "held-out": documents("held-out", 16, 20),
}
# Prompts with their responses.
CONVERSATIONS = {
    name: list(
        zip(
            documents(f"{name} prompts", count, 4),
            documents(f"{name} responses", count, 7),
            strict=True,
        )
    )
    for name, count in (("dialogues", 30), ("held-out-dialogues", 14))
}

_BASE: Tree = {
    "run": {"seed": 7, "device": "cpu", "dtype": "fp32"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": VOCAB_SIZE,
        "vocab_padding_multiple": 8,
    },
    "objective": {"kind": "mdm", "masking": "fixed_count"},
    "data": {
        "train": [{"path": "stories"}],
        "valid": [{"path": "held-out"}],
        "seq_length": SEQ_LENGTH,
    },
    "batch": {"micro_batch_size": 2, "global_batch_size": 8},
    "parallel": {"zero_stage": 1},
    "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "clip_grad": 0.5},
    "schedule": {"steps": 9, "warmup_steps": 2},
    "validation": {
        "num_samples": 5,
        "num_train_samples": 3,
        "draws_per_sample": 2,
        "noise_seed": 3,
    },
}
_AR = {"objective": {"kind": "ar", "masking": "bernoulli"}}
_RESPONSES = {
    "data": {"train": [{"path": "dialogues"}], "valid": [{"path": "held-out-dialogues"}]},
}


def _with(*changes: Tree) -> Tree:
    """The base with fields of its sections replaced, the last word counting."""
    tree = copy.deepcopy(_BASE)
    for change in changes:
        for section, fields in change.items():
            tree.setdefault(section, {}).update(copy.deepcopy(fields))
    return tree


def _ar(objective: Tree | None = None, **sections: Tree) -> Tree:
    return _with(_AR, {"objective": objective or {}}, sections)


def _mdm(objective: Tree | None = None, **sections: Tree) -> Tree:
    return _with({"objective": objective or {}}, sections)


_MIXTURE = [
    {"path": "stories", "weight": 3},
    {"path": "poems", "epochs": 2.5},
    {"path": "notes", "weight": 1, "max_unique_tokens": 100},
]

RUNS: dict[str, Tree] = {
    "mdm-fixed-count": _mdm(),
    "mdm-bernoulli": _mdm({"masking": "bernoulli"}, schedule={"kind": "constant"}),
    "mdm-independent-times": _mdm({"masking": "bernoulli", "time_sampling": "iid", "eps": 0.05}),
    "mdm-documents": _mdm(data={"attention": "document"}),
    "mdm-cut-lengths": _mdm({"stochastic_length_ratio": 0.5}),
    "mdm-left-to-right": _mdm({"left_to_right_ratio": 0.5}),
    "mdm-annealing": _mdm({"attention_annealing_steps": 4}),
    "mdm-repeated-noise": _mdm({"noise": "repeated"}),
    "mdm-cosine-fixed-order": _mdm(
        {"masking": "bernoulli", "noise_schedule": "cosine"}, data={"order": "fixed"}
    ),
    "mdm-polynomial": _mdm({"noise_schedule": "polynomial", "schedule_power": 1.5}),
    "mdm-equal-weights": _mdm({"weighting": "equal", "t_min": 0.2, "t_max": 0.9}),
    "mdm-shifted-documents": _mdm(
        data={"order": "shifted", "attention": "document"},
        schedule={"kind": "wsd", "decay_fraction": 0.5},
    ),
    "mdm-mixture": _mdm(data={"train": _MIXTURE}),
    "mdm-responses": _with(
        _RESPONSES, {"finetuning": {"enabled": True, "fill_to": 5, "prompt_dropout": 0.3}}
    ),
    "mdm-responses-one-a-window": _with(
        _RESPONSES,
        {"objective": {"masking": "bernoulli"}},
        {"finetuning": {"enabled": True, "end_of_text": "given", "fill_to": 0, "packing": False}},
    ),
    "mdm-unused-rows": _mdm(model={"padded_vocab_size": 75, "mask_token_id": 66}),
    "mdm-tied-grouped-queries": _mdm(
        {"masking": "bernoulli"},
        model={"tie_embeddings": True, "num_query_groups": 2, "qkv_bias": True, "qk_norm": True},
    ),
    "ar": _ar(),
    "ar-cut-documents": _ar({"stochastic_length_ratio": 0.5}, data={"attention": "document"}),
    "ar-orders": _ar({"num_orders": 3}),
    "ar-key-dropout-of-queries": _ar({"key_dropout": True, "key_dropout_ratio": 0.7}),
    "ar-key-dropout-of-samples": _ar(
        {"key_dropout": True, "key_dropout_ratio": 0.5, "key_dropout_rate_per": "sample"}
    ),
    "ar-epochs": _ar(
        data={"train": [{"path": "stories", "epochs": 1.5}, {"path": "poems", "epochs": 4}]},
        schedule={"steps": None},
    ),
    "ar-responses": _with(_AR, _RESPONSES, {"finetuning": {"enabled": True}}),
}
# Their weights in the loss come from cosines and powers, whose last digit is the C library's.
ROUNDED_WEIGHTS = ("mdm-cosine-fixed-order", "mdm-polynomial", "mdm-equal-weights")
# One of each shape of the model.
INITIAL_WEIGHTS = ("mdm-fixed-count", "mdm-unused-rows", "mdm-tied-grouped-queries")

# Name: number of ranks, and their division.
LAYOUTS: dict[str, tuple[int, Tree]] = {
    "one-process": (1, {"zero_stage": 1}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 1}),
    "tp2-sequence-parallel": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 0},
    ),
    "pp2-zero2": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
}
# Model parallelism sees what is new to the model, one half in each of its layouts, initial weights
# in both; ZeRO-3, the slowest, some of all.
_OF_MODEL_PARALLELISM = (
    *("mdm-fixed-count", "mdm-cut-lengths", "mdm-annealing", "mdm-shifted-documents"),
    *("mdm-mixture", "mdm-responses", "mdm-unused-rows", "mdm-tied-grouped-queries"),
    *("ar", "ar-cut-documents", "ar-orders", "ar-responses"),
    *("ar-key-dropout-of-queries", "ar-key-dropout-of-samples"),
)
TRAINED: dict[str, tuple[str, ...]] = {
    "one-process": tuple(RUNS),
    "tp2": (*_OF_MODEL_PARALLELISM[::2], "mdm-tied-grouped-queries"),
    "tp2-sequence-parallel": ("mdm-cut-lengths", "mdm-tied-grouped-queries", "ar-orders"),
    "pp2-zero2": (*_OF_MODEL_PARALLELISM[1::2], "mdm-fixed-count", "mdm-unused-rows"),
    "dp2-zero3": ("mdm-bernoulli", "mdm-mixture", "mdm-tied-grouped-queries", "ar-cut-documents"),
}


def tree_of(run: str, shards: Path, layout: str = "one-process") -> Tree:
    """A run as a user writes it down.

    Args:
        run: One of `RUNS`.
        shards: Folder of the corpora.
        layout: One of `LAYOUTS`.

    Returns:
        Sections and fields.
    """
    tree = copy.deepcopy(RUNS[run])
    for source in (*tree["data"]["train"], *tree["data"]["valid"]):
        source["path"] = str(shards / source["path"])
    tree["run"]["dir"] = str(shards / "unused")
    tree["parallel"] = dict(LAYOUTS[layout][1])
    return tree


# The model that is asked and that generates. Its weights are so large that no two tokens are close.
MODEL: Tree = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 40,
    "vocab_size": VOCAB_SIZE,
    "vocab_padding_multiple": 8,
    "qk_norm": True,
}
MODEL_SEQ_LENGTH = 32


def model_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A weight of that model.

    Args:
        name: Of the tensor.
        shape: Its sizes.

    Returns:
        float32: around 1 for norms, around 0 for the rest.
    """
    values = 2.0 * uniforms(name, int(np.prod(shape))).reshape(shape) - 1.0
    scaled = 1.0 + 0.3 * values if "norm" in name else 0.7 * values
    return scaled.astype(np.float32)


# Context and continuation.
REQUESTS: list[tuple[list[int], list[int]]] = [
    (context, continuation)
    for context, continuation in zip(
        [[], *documents("contexts", 5, 10)], documents("continuations", 6, 14), strict=True
    )
]
SCORINGS: dict[str, tuple[str, Tree]] = {
    "fixed-count": ("mdm", {"estimator": "fixed_count", "draws": 16}),
    "monte-carlo": ("mdm", {"estimator": "monte_carlo", "draws": 16, "seed": 3}),
    "monte-carlo-independent": (
        "mdm",
        {"estimator": "monte_carlo", "draws": 16, "stratified": False},
    ),
    "chain-rule": ("mdm", {"estimator": "chain_rule", "greedy_match": "left_to_right"}),
    "to-a-standard-error": (
        "mdm",
        {"draws": 8, "target_standard_error": 2.0, "max_draws": 64, "greedy_match": "confidence"},
    ),
    "guidance": ("mdm", {"draws": 16, "guidance_scale": 0.7}),
    "autoregressive": ("ar", {}),
}
# Options of tools/perplexity.py.
PERPLEXITIES: dict[str, tuple[str, list[str]]] = {
    "fixed-count": ("mdm", ["--estimator", "fixed_count", "--draws", "4"]),
    "monte-carlo": ("mdm", ["--estimator", "monte_carlo", "--draws", "4", "--seed", "2"]),
    "chain-rule": ("mdm", ["--estimator", "chain_rule"]),
    "autoregressive": ("ar", []),
}

# Options of tools/generate.py. What they leave out is what was the default when they were frozen.
_TWO = ["--num-samples", "2"]
GENERATIONS: dict[str, tuple[str, list[str]]] = {
    "confidence": ("mdm", []),
    "confidence-infilling": ("mdm", ["--suffix", "w4 w8", "--steps", "4"]),
    "entropy": ("mdm", ["--order", "entropy", "--steps", "3"]),
    "margin-in-blocks": ("mdm", ["--order", "margin", "--block-length", "3", "--steps", "5"]),
    "random": ("mdm", ["--order", "random", "--temperature", "0.8", "--steps", "4", *_TWO]),
    "left-to-right-nucleus": (
        "mdm",
        ["--order", "left_to_right", "--temperature", "0.9", "--top-p", "0.8", *_TWO],
    ),
    "ancestral-top-k": (
        "mdm",
        ["--order", "ancestral", "--steps", "6", "--temperature", "1", "--top-k", "5", *_TWO],
    ),
    "threshold-in-blocks": ("mdm", ["--threshold", "0.3", "--block-length", "4"]),
    "remasking": ("mdm", ["--remasking", "0.4", "--steps", "12", "--temperature", "0.7"]),
    "remasking-random": ("mdm", ["--order", "random", "--remasking", "0.3", "--steps", "12"]),
    "guidance": ("mdm", ["--guidance-scale", "1.5", "--steps", "5"]),
    "guidance-against-a-prompt": (
        "mdm",
        ["--guidance-scale", "1", "--guidance-prompt", "w7", "--end-of-text", "forbid"],
    ),
    "cached-blocks": ("mdm", ["--cache", "--block-length", "4", "--end-of-text", "keep"]),
    "cached-refreshed": ("mdm", ["--cache", "--cache-refresh-steps", "2"]),
    "autoregressive": ("ar", []),
    "autoregressive-nucleus": ("ar", ["--temperature", "0.9", "--top-p", "0.8", *_TWO]),
    "autoregressive-top-k": ("ar", ["--temperature", "1.2", "--top-k", "4", "--seed", "5"]),
}
FROZEN_DEFAULTS = {
    "mdm": {"order": "confidence", "temperature": 0.0},
    "ar": {"temperature": 0.0},
}
GENERATION_OPTIONS = [
    *("--prompt", "w5 w9 w17", "--prompt", "w3", "--prompt", "w12 w40 w2 w33 w8"),
    *("--length", "9", "--seed", "3", "--jsonl", "--no-progress"),
]

# Options of an export's own `generate`, whose steps are followed.
REVEAL_PROMPTS = [[5, 9, 17], [3, 12, 40]]
REVEALS: dict[str, tuple[str, Tree]] = {
    "confidence": ("mdm", {}),
    "entropy": ("mdm", {"order": "entropy", "num_steps": 3}),
    "margin-in-blocks": ("mdm", {"order": "margin", "block_length": 3, "num_steps": 5}),
    "random": ("mdm", {"order": "random", "temperature": 0.8, "num_steps": 4}),
    "left-to-right": ("mdm", {"order": "left_to_right", "temperature": 0.9, "top_p": 0.8}),
    "ancestral": ("mdm", {"order": "ancestral", "num_steps": 6, "temperature": 1.0}),
    "threshold": ("mdm", {"threshold": 0.3, "use_cache": True}),
    "remasking": ("mdm", {"remasking": 0.4, "num_steps": 10, "temperature": 0.7}),
    "guidance": ("mdm", {"guidance_scale": 1.5, "num_steps": 5}),
    "autoregressive": ("ar", {"temperature": 0.9, "top_k": 20}),
}
REVEAL_OPTIONS: Tree = {"max_new_tokens": 8, "seed": 3}
