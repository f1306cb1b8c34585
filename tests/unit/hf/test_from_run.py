from __future__ import annotations

import json

import pytest

from megatron_mdm.corpus.tokenizer import (
    end_and_size,
    load_tokenizer,
    save_tokenizer,
    train_byte_level_bpe,
)
from megatron_mdm.errors import CheckpointError, ConversionError, DataError
from megatron_mdm.hf.from_run import _tokenizer_folder, export_run


def test_the_tokenizer_is_found_by_folder_and_by_file(tmp_path):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    scratch = tmp_path / "scratch"
    for name in (folder, folder / "tokenizer.json"):
        assert _tokenizer_folder(str(name), scratch) == folder
    assert _tokenizer_folder(None, scratch) is None


def test_a_tokenizer_of_another_library_is_taken_along_converted(tmp_path):
    folder, scratch = tmp_path / "merges", tmp_path / "scratch"
    folder.mkdir()
    train_byte_level_bpe(["a few words"], 260).model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for name in (folder, folder / "merges.txt"):
        assert _tokenizer_folder(str(name), scratch) == scratch
        assert end_and_size(scratch / "tokenizer.json") == (0, 260)
        assert load_tokenizer(str(scratch)).sha256 == load_tokenizer(str(folder)).sha256
    assert not (folder / "tokenizer.json").exists()


def test_a_tokenizer_that_is_gone_is_not_left_out_in_silence(tmp_path):
    with pytest.raises(DataError, match=r"gone/tokenizer does not exist"):
        _tokenizer_folder(f"{tmp_path}/gone/tokenizer", tmp_path)


def test_weights_alone_are_exported_with_the_tokenizer_that_is_given(
    tmp_path, weights_checkpoint, tokenizer_dir
):
    path = weights_checkpoint(tmp_path / "weights")
    plain = export_run(path.parent, tmp_path / "plain").path
    assert json.loads((plain / "config.json").read_text())["eos_token_id"] is None
    assert not (plain / "tokenizer.json").exists()
    metadata = json.loads((plain / "training_metadata.json").read_text())
    assert metadata.keys() == {"kind", "versions", "config"}
    assert metadata["kind"] == "weights"
    card = (plain / "README.md").read_text()
    assert "It comes from a checkpoint of weights alone." in card
    assert "does not say how they were trained" in card
    full = export_run(path, tmp_path / "full", tokenizer=str(tokenizer_dir)).path
    assert json.loads((full / "config.json").read_text())["eos_token_id"] == 0
    assert (full / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, weights_checkpoint):
    path = weights_checkpoint(tmp_path / "run" / "checkpoints")
    assert export_run(tmp_path / "run", tmp_path / "a", step=0).path == tmp_path / "a"
    assert export_run(path.parent, tmp_path / "a", step=0).reused
    with pytest.raises(CheckpointError, match="holds no checkpoint step_00000007: give --run"):
        export_run(tmp_path / "run", tmp_path / "b", step=7)
    next(path.glob("weights-*")).unlink()
    with pytest.raises(CheckpointError, match="is missing: the checkpoint is not whole"):
        export_run(tmp_path / "run", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_of_another_size_is_refused(tmp_path, weights_checkpoint):
    path = weights_checkpoint(tmp_path / "weights")
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words " * 9, "and others"], 270), folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    with pytest.raises(ConversionError, match=rf"tokenizer has {size} tokens and the model \d+: g"):
        export_run(path, tmp_path / "out", tokenizer=str(folder))
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_tokenizer_is_read_and_nothing_is_run(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    # What an export of ours holds beside it, which transformers would offer to run.
    auto_map = {"AutoModel": "modeling_mdm.MDMModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mdm", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked to run code"))
    assert end_and_size(folder / "tokenizer.json")[0] == 0
