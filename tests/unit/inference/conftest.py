"""A tiny tokenizer, and the same random weights as exported model and as checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.cli.tree import main
from megatron_mdm.config import ModelConfig
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.hf.export import export_to_hf

SEQ_LENGTH = 48


@pytest.fixture(scope="session")
def byte_tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(["the cat sat on the mat. \u20ac\n" * 3], 272), folder)
    return folder


@pytest.fixture(scope="session")
def exported(byte_tokenizer_dir, random_source, tmp_path_factory):
    """Exported models with random weights: folders by kind."""
    root = tmp_path_factory.mktemp("exported")
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer_dir)
    model = ModelConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        ffn_hidden_size=40,
        vocab_size=len(tokenizer),
    )
    for kind in ("mdm", "ar"):
        saved = SavedModel(model, kind, SEQ_LENGTH)
        export_to_hf(
            random_source(saved),
            saved,
            root / kind,
            tokenizer_dir=byte_tokenizer_dir,
            eos_token_id=tokenizer.eos_token_id,
            metadata={},
        )
    return {kind: root / kind for kind in ("mdm", "ar")}


@pytest.fixture(scope="session")
def loaded(exported):
    """Model and tokenizer of an export, by kind."""

    def load(kind):
        logging.disable_progress_bar()
        model = AutoModelForMaskedLM.from_pretrained(exported[kind], trust_remote_code=True)
        return model.eval(), AutoTokenizer.from_pretrained(exported[kind], trust_remote_code=True)

    return load


@pytest.fixture
def tool(capsys):
    """Runs mdm generate in this process and returns (exit status, stdout, stderr)."""

    def run(*arguments):
        status = main(["generate", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run
