"""Weights of another checkpoint that a new run begins with: found, checked and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.checkpoint.discovery import check_headers, find_damage
from megatron_mdm.checkpoint.manifest import MANIFEST, WEIGHT, read_saved_model
from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.config import Config, ModelConfig
from megatron_mdm.core.errors import CheckpointError, ConfigError
from megatron_mdm.distributed.gathering import gather
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.shards import NamedShard

# Fields that fix names, shapes or the function, and the attribute that holds what each stands for.
# Dropout and standard deviations may differ, and how many of the vocabulary's rows are predicted.
_FIXED = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "query_groups",
    "head_dim": "head_width",
    "ffn_hidden_size": "ffn_hidden_size",
    "padded_vocab_size": "vocabulary_rows",
    "mask_token_id": "mask_id",
    "vocab_padding_multiple": "vocab_padding_multiple",
    "tie_embeddings": "tie_embeddings",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "attention_soft_cap": "attention_soft_cap",
    "attention_sink": "attention_sink",
    "mlp": "mlp",
    "mlp_bias": "mlp_bias",
    "time_embedding": "time_embedding",
    "rotary_base": "rotary_base",
    "norm_epsilon": "norm_epsilon",
}


def find_initial_weights(config: Config) -> Path | None:
    """The checkpoint that `run.initial_weights` names, checked by its manifest and headers.

    Returns:
        The checkpoint's own folder; None where the field is not set.

    Raises:
        ConfigError: It holds another model, or is no checkpoint but a Hugging Face model.
        CheckpointError: It does not exist or is not whole.
    """
    if config.run.initial_weights is None:
        return None
    given = Path(config.run.initial_weights)
    if not given.exists():
        raise CheckpointError(
            f"run.initial_weights={given} does not exist: correct the path; a Hugging Face model "
            "has to be converted by mdm convert from-hf first."
        )
    if (given / "config.json").exists() and not (given / MANIFEST).exists():
        raise ConfigError(
            f"run.initial_weights={given} is a Hugging Face model and no checkpoint: convert it "
            "with mdm convert from-hf and give the folder that this writes."
        )
    path = resolve_checkpoint(given)
    _check_same_model(config.model, read_saved_model(check_headers(path)).model, path)
    return path


def verify_initial_weights(path: Path, mesh: Mesh) -> Path:
    """Checks every byte of the checkpoint. Every rank calls it; they share the work.

    Args:
        path: What this rank found.
        mesh: This rank's place.

    Returns:
        What the first rank found: a run that goes on may have saved another in the meantime.

    Raises:
        CheckpointError: On every rank alike: it is not whole.
    """
    path = gather(path)[0]
    if problem := find_damage(path, mesh):
        raise CheckpointError(problem)
    return path


def load_float32_weights(path: Path, shards: Sequence[NamedShard], states: OptimizerStates) -> None:
    """Gives the optimizer the weights of the checkpoint, whatever the model has rounded them to."""
    reader = CheckpointReader(path)
    for shard in shards:
        value = reader.load_shard(shard.name, shard.list_slices())
        states.set(shard.parameter, WEIGHT, value)


def find_model_differences(model: ModelConfig, saved: ModelConfig) -> dict[str, tuple[str, str]]:
    """Finds what keeps a model from taking the weights of another.

    Args:
        model: Its sizes.
        saved: Those of the other.

    Returns:
        By field, as a configuration names it, both values.
    """
    fixed = dict(_FIXED)
    if (model.padded_vocab_size, saved.padded_vocab_size) == (None, None):
        # All rows are predicted, and their number has no other name.
        del fixed["padded_vocab_size"]
    if "padded_vocab_size" not in fixed or model.vocab_size > saved.vocabulary_rows:
        fixed["vocab_size"] = "vocab_size"
    return {
        f"model.{field}": (
            json.dumps(getattr(model, attribute)),
            json.dumps(getattr(saved, attribute)),
        )
        for field, attribute in fixed.items()
        if getattr(model, attribute) != getattr(saved, attribute)
    }


def _check_same_model(model: ModelConfig, saved: ModelConfig, path: Path) -> None:
    differing = find_model_differences(model, saved)
    if differing:
        ours = " and ".join(f"{field}={value}" for field, (value, _) in differing.items())
        theirs = " and ".join(value for _, value in differing.values())
        remedy = " and ".join(f"{field}={value}" for field, (_, value) in differing.items())
        raise ConfigError(
            f"{ours} cannot begin with run.initial_weights={path}, which has {theirs}: set "
            f"{remedy}, or choose other weights."
        )
