"""Tiny random checkpoints and their exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.formats.architecture import Architecture, architecture_of
from megatron_mdm.formats.translation import training_names, training_shape
from megatron_mdm.hf.export import export_to_hf

TINY = Architecture(
    num_layers=2,
    hidden_size=24,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=6,
    ffn_hidden_size=40,
    vocab_size=19,
    mask_token_id=19,
    tied=False,
    is_causal=False,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rotary_base=10000.0,
    embedding_rows=32,
    head_rows=32,
)


class RandomSource:
    """A checkpoint of random float32 tensors in Megatron's layout."""

    def __init__(self, arch: Architecture, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {}
        for name in training_names(arch):
            values = torch.randn(training_shape(name, arch), generator=generator)
            self.tensors[name] = 1 + 0.2 * values if "norm" in name else 0.3 * values

    def names(self) -> list[str]:
        return list(self.tensors)

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@pytest.fixture(scope="session")
def tiny():
    return lambda **changes: replace(TINY, **changes)


@pytest.fixture(scope="session")
def random_source():
    return RandomSource


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 19)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def export(tmp_path, tokenizer_dir):
    """Exports a random checkpoint and returns (folder, source, result)."""

    def run(arch: Architecture, name: str = "export", **options):
        source = RandomSource(arch, seed=options.pop("seed", 0))
        defaults = {"tokenizer_dir": tokenizer_dir, "eos_token_id": 0, "metadata": {"steps": 3}}
        result = export_to_hf(source, arch, tmp_path / name, **(defaults | options))
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
        arch = architecture_of(model, is_causal=kind == "ar", seq_length=32)
        source = RandomSource(arch, seed)
        shapes = {name: training_shape(name, arch) for name in source.names()}
        sizes = {"model": model, "kind": kind, "seq_length": 32}
        return write_weights_checkpoint(source, shapes, folder, **sizes, **options)

    return write
