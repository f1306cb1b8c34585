from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import RunStopped
from megatron_mdm.training.restarts import STOPPED_FILE_NAME, adapt_to_restart

MODEL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8}


def config(folder: Path, resume: str):
    return parse_config(
        {
            "run": {"dir": str(folder)},
            "model": MODEL | {"vocab_size": 16},
            "objective": {"kind": "mdm"},
            "data": {"train": [{"path": "none"}], "seq_length": 8},
            "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            "schedule": {"steps": 1},
            "checkpoint": {"resume": resume},
        }
    )


@pytest.mark.parametrize("resume", ["auto", "never", "required"])
def test_only_a_restart_changes_whether_a_run_resumes(resume, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    before = config(tmp_path, resume)
    (tmp_path / STOPPED_FILE_NAME).touch()
    assert adapt_to_restart(before) is before
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert adapt_to_restart(before) is before
    (tmp_path / STOPPED_FILE_NAME).unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    after = adapt_to_restart(before)
    assert after.checkpoint.resume == {"never": "auto"}.get(resume, resume)
    assert before.checkpoint.resume == resume


def test_a_stopped_run_is_not_started_again(tmp_path, monkeypatch):
    (tmp_path / STOPPED_FILE_NAME).touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with pytest.raises(RunStopped):
        adapt_to_restart(config(tmp_path, "auto"))
