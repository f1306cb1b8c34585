"""Models for the benchmarks of generation and scoring: exports, and random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.hf.export import write_model_code
from megatron_mdm.studies.benchmarks.devices import choose_dtype
from megatron_mdm.studies.benchmarks.harness import find_sizes


def load_export(folder: Path, device: torch.device) -> Any:
    """Loads an exported model.

    Args:
        folder: Of the export.
        device: Where it shall compute, in that device's dtype.

    Returns:
        The model, ready to be asked.

    Raises:
        ConfigError: There is none.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model={folder} has no config.json: give an exported model.")
    model = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, dtype=choose_dtype(device)
    )
    return model.eval().to(device)


def make_random_model(
    preset: str, seq_length: int, device: torch.device, *, is_causal: bool = False
) -> Any:
    """Makes a model as an export has it, with random weights: its speed is that of any other.

    The weights are drawn where the model computes, and lie in no file.

    Args:
        preset: Its sizes, or `demo`.
        seq_length: Most tokens of a sequence.
        device: Where it shall compute, in that device's dtype.
        is_causal: An autoregressive one.

    Returns:
        The model, ready to be asked.

    Raises:
        ConfigError: There is no such preset.
    """
    model = ModelConfig.model_validate(find_sizes(preset))
    saved = SavedModel(model, "ar" if is_causal else "mdm", seq_length)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch, device:
        write_model_code(Path(scratch), saved)
        config = AutoConfig.from_pretrained(scratch, trust_remote_code=True)
        made: Any = AutoModelForMaskedLM.from_config(
            config, trust_remote_code=True, dtype=choose_dtype(device)
        )
    return made.eval()
