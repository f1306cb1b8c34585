"""Tiny random checkpoints, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.hf.formats.architecture import Architecture
from megatron_mdm.hf.formats.translation import training_names, training_shape

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


def save_word_tokenizer(folder: Path) -> None:
    """Saves a tokenizer whose words are w2 to w18, with the ids 2 to 18."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 19)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
