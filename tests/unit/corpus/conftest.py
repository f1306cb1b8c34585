"""What every test of preprocessing begins with: a tokenizer, an input, and where shards go."""

from __future__ import annotations

from pathlib import Path

import pytest
from preprocess_helpers import TEXTS, write_jsonl

from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe


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


@pytest.fixture
def quick_choice_of_library(monkeypatch) -> None:
    """Leaves out the comparison of the libraries, which takes half a second; others test it."""
    monkeypatch.setattr("megatron_mdm.corpus.encoding.make_adversarial_texts", lambda tokens: [])
