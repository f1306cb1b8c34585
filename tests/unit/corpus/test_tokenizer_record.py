from __future__ import annotations

import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_record import (
    TokenizerRecord,
    find_recorded_tokenizer,
    hash_tokenizer_at,
    record_tokenizer,
    record_tokenizer_of_shards,
)
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import Manifest


def make(folder, text="a few words"):
    save_tokenizer(train_byte_level_bpe([text], 258), folder)
    return load_tokenizer(str(folder))


def manifest_of(handle, name):
    return Manifest(
        tokenizer=name,
        tokenizer_sha256=handle.sha256,
        vocab_size=handle.vocab_size,
        eod_token_id=0,
        special_tokens={"<|endoftext|>": 0},
        num_documents=0,
        num_tokens=0,
        max_token_id=0,
        dtype="uint16",
        source_files=[],
    )


def test_a_relative_path_is_recorded_with_its_absolute_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handle = make(tmp_path / "tok")
    place = str(tmp_path / "tok")
    for record in (
        record_tokenizer(load_tokenizer("tok")),
        record_tokenizer_of_shards(manifest_of(handle, "tok")),
    ):
        assert record == TokenizerRecord(
            name="tok",
            place=place,
            sha256=handle.sha256,
            vocab_size=handle.vocab_size,
            eod_token="<|endoftext|>",
            eod_token_id=0,
        )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_recorded_tokenizer(record) == place


def test_a_namesake_in_the_current_folder_is_not_taken_for_it(tmp_path, monkeypatch):
    handle = make(tmp_path / "there" / "tok")
    make(tmp_path / "here" / "tok", "other text")
    monkeypatch.chdir(tmp_path / "here")
    record = record_tokenizer_of_shards(manifest_of(handle, "tok"))
    assert record.place is None
    with pytest.raises(
        DataError, match=r"here/tok \(sha256 .*\) is not the tokenizer 'tok' that .*"
    ):
        find_recorded_tokenizer(record)
    monkeypatch.chdir(tmp_path / "there")
    assert find_recorded_tokenizer(record) == "tok"


def test_a_tokenizer_that_changed_at_its_place_is_told_of(tmp_path):
    record = record_tokenizer(make(tmp_path / "tok"))
    assert record.describe_difference(record.sha256, "it") is None
    changed = make(tmp_path / "tok", "other text")
    assert find_recorded_tokenizer(record) == str(tmp_path / "tok")
    sentence = record.describe_difference(changed.sha256, "given")
    assert f"the tokenizer given (sha256 {changed.sha256[:12]}) is not the one" in sentence


def test_a_hub_name_has_no_place():
    record = TokenizerRecord(
        name="org/name", sha256="ab", vocab_size=3, eod_token=None, eod_token_id=0
    )
    assert find_recorded_tokenizer(record) == "org/name"


def test_a_tokenizer_of_another_library_is_found_again_by_its_content(tmp_path):
    folder = tmp_path / "merges"
    folder.mkdir()
    train_byte_level_bpe(["a few words"], 260).model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    handle = load_tokenizer(str(folder))
    assert hash_tokenizer_at(folder) == hash_tokenizer_at(folder / "vocab.json") == handle.sha256
    record = record_tokenizer(handle)
    assert find_recorded_tokenizer(record) == record.place == str(folder)
    moved = record.model_copy(update={"place": str(tmp_path / "gone")})
    assert find_recorded_tokenizer(moved) == str(folder)
