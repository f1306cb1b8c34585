"""What every test of preprocessing begins with: a tokenizer, an input, and where shards go."""

from __future__ import annotations

from pathlib import Path

import pytest
from preprocess_helpers import TEXTS, write_jsonl

from megatron_mdm.corpus.tokenizer import save_tokenizer, train_byte_level_bpe


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    """The folder of a small tokenizer, which no test changes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(TEXTS, 280), folder)
    return str(folder)


@pytest.fixture
def source(tmp_path) -> Path:
    """A file of `TEXTS`."""
    (tmp_path / "in").mkdir()
    return write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)


@pytest.fixture
def prefix(tmp_path) -> Path:
    """The path of shards in a folder that does not exist."""
    return tmp_path / "out" / "p"
