"""Shards of tiny pairs, and a run that learns them. A token is a byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning

VOCAB = 257
SIZES = {
    "vocab_size": VOCAB,
    "mask_token_id": VOCAB,
    "vocab_padding_multiple": 16,
    "seq_length": 48,
}


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


def write_pairs(folder: Path, tokenizer: Path, num_pairs: int = 24) -> Path:
    """Prompts and responses of different lengths, as shards."""
    generator = np.random.default_rng(3)

    def letters(low, high):
        return "".join(generator.choice(list("abcdef"), generator.integers(low, high)))

    lines = [{"prompt": letters(1, 9), "response": letters(1, 9)} for _ in range(num_pairs)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prefix = folder / "pairs"
    prepare_finetuning([path], str(tokenizer), prefix, FinetuningOptions())
    return prefix


def tree_of(prefix: Path, **sections):
    """A run over them, of the tiny model."""
    tree = {
        "run": {"dir": "unused", "seed": 4, "device": "cpu"},
        "model": {
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "ffn_hidden_size": 40,
            "vocab_size": VOCAB,
        },
        "finetuning": {"enabled": True, "fill_to": 0},
        "data": {"train": [{"path": str(prefix)}], "seq_length": 48},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": {"steps": 3},
    }
    return {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {*tree, *sections}}


def write_tree(path: Path, tree) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path
