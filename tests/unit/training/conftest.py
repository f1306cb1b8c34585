from __future__ import annotations

import pytest
from plan_examples import SEQ, VOCAB, write_shards


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tree(tmp_path):
    """A run that can start."""
    return {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "ffn_hidden_size": 24,
            "vocab_size": VOCAB,
        },
        "data": {"train": [{"path": str(write_shards(tmp_path / "train"))}], "seq_length": SEQ},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "schedule": {"steps": 5},
    }
