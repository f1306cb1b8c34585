from __future__ import annotations

import pytest

from megatron_mdm.config import config_from_dict
from megatron_mdm.corpus.tokenizer import save_tokenizer, train_byte_level_bpe
from megatron_mdm.errors import DataError
from megatron_mdm.hf.from_run import _tokenizer_folder


def config_with(tokenizer):
    return config_from_dict(
        {
            "run": {"dir": "unused"},
            "model": {"preset": "smdm-6M"},
            "data": {"train": [{"path": "unused"}], "tokenizer": tokenizer},
            "batch": {"global_batch_size": 1},
            "schedule": {"steps": 1},
        }
    )


def test_the_tokenizer_of_a_run_is_found_by_folder_and_by_file(tmp_path):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    scratch = tmp_path / "scratch"
    for name in (folder, folder / "tokenizer.json"):
        assert _tokenizer_folder(config_with(str(name)), None, scratch) == folder
    assert _tokenizer_folder(config_with(None), None, scratch) is None


def test_a_tokenizer_that_is_gone_is_not_left_out_in_silence(tmp_path):
    with pytest.raises(DataError, match=r"gone/tokenizer does not exist"):
        _tokenizer_folder(config_with(f"{tmp_path}/gone/tokenizer"), None, tmp_path)
