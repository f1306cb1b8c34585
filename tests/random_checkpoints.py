"""Tiny random checkpoints, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.model.parameters import find_parameter_shape, list_parameter_names


def tiny_model(*, is_causal: bool = False, seq_length: int = 32, **changes: object) -> SavedModel:
    """A model of two layers.

    Args:
        is_causal: Autoregressive.
        seq_length: Longest sequence, in tokens.
        **changes: Fields of `ModelConfig`.
    """
    fields = {
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "head_dim": 6,
        "ffn_hidden_size": 40,
        "vocab_size": 19,
        "mask_token_id": 19,
        "vocab_padding_multiple": 32,
    }
    model = ModelConfig(**(fields | changes))
    return SavedModel(model, "ar" if is_causal else "mdm", seq_length)


class RandomSource:
    """A checkpoint of random float32 tensors in Megatron's layout."""

    def __init__(self, saved: SavedModel, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {}
        for name in list_parameter_names(saved.model):
            values = torch.randn(find_parameter_shape(name, saved.model), generator=generator)
            self.tensors[name] = 1 + 0.2 * values if "norm" in name else 0.3 * values

    def list_names(self) -> list[str]:
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
