"""The formats of models that can be read: their names of parameters, and what they cannot hold.

Names stand in the table of parameters (`model/parameters.py`), beside shapes and divisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.hf.formats.exported_config import describe_export
from megatron_mdm.hf.formats.foreign_configs import (
    AUTOREGRESSIVE,
    Described,
    Source,
    describe_autoregressive,
    describe_llada,
    describe_smdm,
)
from megatron_mdm.hf.formats.gidd import describe_gidd, find_gidd_misfit
from megatron_mdm.model.parameters import EMBEDDING, find_parameter

# Why a model cannot be written in a format; None if it can.
Misfit = Callable[[SavedModel], str | None]


@dataclass(frozen=True)
class Format:
    """A format of models.

    Attributes:
        names: Whose names of parameters it has: a key of `Parameter.names`.
        describe: Reads what a model is from its files.
        misfit: Why a model cannot be written in it; None if it can.
        embedding_rows: Rows of its embedding.
        options: Options of reading that have a meaning for it.
    """

    names: str
    describe: Callable[[Source], Described]
    misfit: Misfit = lambda saved: None
    embedding_rows: Callable[[SavedModel], int] = lambda saved: saved.model.vocabulary_rows
    options: tuple[str, ...] = ()


# Of a block that has nothing but SwiGLU and attention.
_PLAIN: Mapping[str, object] = {
    "qkv_bias": False,
    "qk_norm": False,
    "attention_soft_cap": None,
    "attention_sink": False,
    "mlp": "swiglu",
    "mlp_bias": False,
    "time_embedding": False,
}


def _require_exactly(fields: Mapping[str, object]) -> Misfit:
    def find_misfit(saved: SavedModel) -> str | None:
        found = {name: getattr(saved.model, name) for name in fields}
        wrong = (f"{name}={value}" for name, value in found.items() if value != fields[name])
        return next(wrong, None)

    return find_misfit


def _find_smdm_misfit(saved: SavedModel) -> str | None:
    model = saved.model
    if model.tie_embeddings:
        return "tie_embeddings=True"
    if model.vocabulary_rows != model.vocab_size:
        return f"padded_vocab_size={model.padded_vocab_size}"
    if not saved.is_causal and model.mask_id != model.vocab_size:
        return f"mask_token_id={model.mask_id} inside the vocabulary"
    return _find_head_dim_misfit(saved) or _require_exactly(_PLAIN)(saved)


def _find_llada_misfit(saved: SavedModel) -> str | None:
    model = saved.model
    if saved.is_causal:
        return "autoregressive attention"
    if model.mask_id >= model.vocabulary_rows:
        return f"mask_token_id={model.mask_id} outside the vocabulary"
    # Its biases are one of its settings.
    plain = {**_PLAIN, "qkv_bias": model.qkv_bias}
    return _find_head_dim_misfit(saved) or _require_exactly(plain)(saved)


def _find_head_dim_misfit(saved: SavedModel) -> str | None:
    model = saved.model
    is_usual = model.head_width * model.num_attention_heads == model.hidden_size
    return None if is_usual else f"head_dim={model.head_width}"


def _count_vocabulary_and_mask_rows(saved: SavedModel) -> int:
    return find_parameter(EMBEDDING).count_unpadded_rows(saved.model)


def _count_smdm_rows(saved: SavedModel) -> int:
    return saved.model.vocab_size + (0 if saved.is_causal else 1)


_EXTRAS: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
FORMATS: dict[str, Format] = {
    "hf": Format("hf", describe_export, embedding_rows=_count_vocabulary_and_mask_rows),
    "smdm": Format("smdm", describe_smdm, _find_smdm_misfit, _count_smdm_rows, ("preset",)),
    "llada": Format("llada", describe_llada, _find_llada_misfit, options=("vocab_size",)),
    "gidd": Format("gidd", describe_gidd, find_gidd_misfit),
    **{
        name: Format(
            "hf",
            describe_autoregressive,
            _require_exactly({**_PLAIN, **_EXTRAS[name]}),
            options=("keep_causal", "vocab_size"),
        )
        for name in AUTOREGRESSIVE
    },
}
