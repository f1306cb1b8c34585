"""Tiny random checkpoints and their exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_checkpoints import RandomSource, save_word_tokenizer, tiny_model

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.hf.export import export_to_hf


@pytest.fixture(scope="session")
def tiny():
    return tiny_model


@pytest.fixture(scope="session")
def random_source():
    return RandomSource


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder)
    return folder


@pytest.fixture
def export(tmp_path, tokenizer_dir):
    """Exports a random checkpoint and returns (folder, source, result)."""

    def run(saved: SavedModel, name: str = "export", **options):
        source = RandomSource(saved, seed=options.pop("seed", 0))
        defaults = {"tokenizer_dir": tokenizer_dir, "eos_token_id": 0, "metadata": {"steps": 3}}
        result = export_to_hf(source, saved, tmp_path / name, **(defaults | options))
        return result.path, source, result

    return run


@pytest.fixture
def weights_checkpoint():
    """Writes random weights of a tiny model as a checkpoint and returns its folder."""

    def write(folder: Path, *, kind: str = "mdm", seed: int = 0, **options) -> Path:
        model = ModelConfig(
            num_layers=4,
            hidden_size=16,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=24,
            vocab_size=19,
            vocab_padding_multiple=4,
            qkv_bias=True,
            qk_norm=True,
        )
        saved = SavedModel(model, kind, 32)
        source = RandomSource(saved, seed)
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        return write_weights_checkpoint(source, shapes, folder, **saved._asdict(), **options)

    return write
