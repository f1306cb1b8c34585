from __future__ import annotations

import json

import pytest

from megatron_mdm.checkpoint.manifest import CheckpointManifest
from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import CheckpointError, ConfigError, ConversionError, DataError
from megatron_mdm.corpus.tokenizer import load_tokenizer, read_end_and_size
from megatron_mdm.corpus.tokenizer_record import record_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.hf.from_run import (
    _find_tokenizer_folder,
    _find_vocabulary,
    _list_metadata,
    export_run,
)
from megatron_mdm.inference.checkpoint import _load_tokenizer


def test_the_tokenizer_is_found_by_folder_and_by_file(tmp_path):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    scratch = tmp_path / "scratch"
    for name in (folder, folder / "tokenizer.json"):
        assert _find_tokenizer_folder(str(name), scratch) == folder
    assert _find_tokenizer_folder(None, scratch) is None


def test_a_tokenizer_of_another_library_is_taken_along_converted(tmp_path):
    folder, scratch = tmp_path / "merges", tmp_path / "scratch"
    folder.mkdir()
    train_byte_level_bpe(["a few words"], 260).model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for name in (folder, folder / "merges.txt"):
        assert _find_tokenizer_folder(str(name), scratch) == scratch
        assert read_end_and_size(scratch / "tokenizer.json") == (0, 260)
        assert load_tokenizer(str(scratch)).sha256 == load_tokenizer(str(folder)).sha256
    assert not (folder / "tokenizer.json").exists()


def test_a_tokenizer_that_is_gone_is_not_left_out_in_silence(tmp_path):
    with pytest.raises(DataError, match=r"gone/tokenizer does not exist"):
        _find_tokenizer_folder(f"{tmp_path}/gone/tokenizer", tmp_path)


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


def manifest_with(record):
    config = run_config()
    return CheckpointManifest(
        format_version=6,
        step=3,
        consumed_samples=12,
        config=config,
        versions={},
        data_fingerprint="",
        tokenizer=record,
    )


def run_config(**data):
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
    tree = {
        "run": {"dir": "run"},
        "model": sizes | {"vocab_size": 258},
        "data": {"train": [{"path": "nowhere"}], "seq_length": 8} | data,
        "batch": {"global_batch_size": 4},
        "schedule": {"steps": 5},
    }
    return parse_config(tree).model_dump(mode="json")


def made(folder, text="a few words"):
    save_tokenizer(train_byte_level_bpe([text], 258), folder)
    return record_tokenizer(load_tokenizer(str(folder)))


def test_the_tokenizer_of_the_run_is_found_from_any_folder(tmp_path, monkeypatch):
    record = made(tmp_path / "tok").model_copy(update={"name": "tok"})
    made(tmp_path / "elsewhere" / "tok", "other text")
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = _find_vocabulary(manifest_with(record), None, tmp_path)
    assert (found.folder, found.remark) == (tmp_path / "tok", None)
    with pytest.raises(DataError, match=r"elsewhere/tok .* is not the tokenizer 'tok' that made"):
        _find_vocabulary(manifest_with(record.model_copy(update={"place": None})), None, tmp_path)


def test_another_tokenizer_than_the_runs_is_told_of_or_refused(tmp_path):
    record = made(tmp_path / "tok")
    other = made(tmp_path / "other", "other text")
    found = _find_vocabulary(manifest_with(record), other.place, tmp_path)
    assert found.folder == tmp_path / "other"
    assert f"the tokenizer {other.place} (sha256 {other.sha256[:12]}) is not the" in found.remark
    assert found.eos_token_id == 0
    other_end = record.model_copy(update={"eod_token_id": 7})
    assert _find_vocabulary(manifest_with(other_end), None, tmp_path).eos_token_id == 7
    same = _find_vocabulary(manifest_with(record), record.place, tmp_path)
    assert same.remark is None
    metadata = _list_metadata(manifest_with(record), record)
    assert metadata["tokenizer"] == {
        "name": record.name,
        "sha256": record.sha256,
        "vocab_size": record.vocab_size,
        "eod_token": "<|endoftext|>",
        "eod_token_id": 0,
    }
    larger = train_byte_level_bpe(["many other words " * 9], 270)
    save_tokenizer(larger, tmp_path / "larger")
    size = larger.get_vocab_size()
    with pytest.raises(
        ConversionError, match=rf"has {size} tokens and its data {record.vocab_size}"
    ):
        _find_vocabulary(manifest_with(record), str(tmp_path / "larger"), tmp_path)


def test_generation_compares_the_tokenizer_with_the_recorded_one(tmp_path, capsys):
    record = made(tmp_path / "tok")
    other = made(tmp_path / "other", "other text")
    manifest = manifest_with(record)
    assert _load_tokenizer(tmp_path, manifest, None)[1] == 0
    assert capsys.readouterr().err == ""
    _load_tokenizer(tmp_path, manifest, other.place)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the tokenizer {other.place} (sha256 ")
    larger = train_byte_level_bpe(["many other words " * 9], 270)
    save_tokenizer(larger, tmp_path / "larger")
    message = f"has {larger.get_vocab_size()} tokens and that of the training data 258: give"
    with pytest.raises(ConfigError, match=message):
        _load_tokenizer(tmp_path, manifest, str(tmp_path / "larger"))


def test_the_end_of_a_tokenizer_is_read_and_nothing_is_run(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    # What an export of ours holds beside it, which transformers would offer to run.
    auto_map = {"AutoModel": "modeling_mdm.MDMModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mdm", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked to run code"))
    assert read_end_and_size(folder / "tokenizer.json")[0] == 0
