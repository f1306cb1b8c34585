"""Training a byte-level BPE tokenizer, and writing tokenizers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import write_errors, write_text_whole
from megatron_mdm.corpus.tokenizer import END_OF_TEXT

_NUM_BYTES = 256


def train_byte_level_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; equal documents give an equal tokenizer.

    It encodes and decodes any Unicode text without loss. `<|endoftext|>` has id 0.

    Args:
        documents: The texts to learn from.
        vocab_size: The number of tokens wanted, at least 257: the bytes and `<|endoftext|>`. A
            small corpus gives fewer than wanted.

    Returns:
        The tokenizer.

    Raises:
        DataError: The vocabulary cannot hold every byte, or there are no documents.
    """
    if vocab_size < _NUM_BYTES + 1:
        raise DataError(
            f"--vocab-size={vocab_size} is less than {_NUM_BYTES + 1}, the 256 bytes and "
            f"{END_OF_TEXT}: use {_NUM_BYTES + 1} or more."
        )
    remaining = iter(documents)
    first = next(remaining, None)
    if first is None:
        raise DataError("--input holds no documents to train on: give files with text.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], remaining), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, eos_token: str = END_OF_TEXT) -> None:
    """Writes a tokenizer so that `load_tokenizer` and transformers' `AutoTokenizer` load it.

    Args:
        tokenizer: The tokenizer.
        folder: The folder, which is made if need be.
        eos_token: The token that ends texts.

    Raises:
        DataError: The folder cannot be written to.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_text_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
