from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mdm.corpus.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    train_byte_level_bpe,
)
from megatron_mdm.errors import DataError

DOCUMENTS = ["def hello(name):\n    return 'hello ' + name\n", "naïve 日本語 🙂 hello"] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(DOCUMENTS, 290), folder)
    return folder


@pytest.fixture(scope="module")
def handle(folder):
    return load_tokenizer(str(folder))


def save_word_level(folder, vocabulary, **config):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def test_attributes_of_our_own_tokenizer(handle):
    assert handle.vocab_size == 290 == handle.backend.get_vocab_size()
    assert handle.eod_token == END_OF_TEXT
    assert handle.eod_token_id == 0
    assert handle.special_tokens == {END_OF_TEXT: 0}
    assert len(handle.sha256) == 64


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips_without_loss(handle, text):
    (ids,) = handle.encode_batch([text])
    assert handle.decode(ids) == text
    assert handle.eod_token_id not in ids


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_text_never_makes_the_end_of_document(handle, before, after):
    text = before + END_OF_TEXT + after
    (ids,) = handle.encode_batch([text])
    assert handle.eod_token_id not in ids
    assert handle.decode(ids) == text


def test_end_of_document_decodes(handle):
    assert handle.decode([handle.eod_token_id]) == END_OF_TEXT


def test_training_is_deterministic_and_depends_on_the_documents():
    first = train_byte_level_bpe(iter(DOCUMENTS), 290).to_str()
    assert first == train_byte_level_bpe(DOCUMENTS, 290).to_str()
    assert first != train_byte_level_bpe(DOCUMENTS[:1] * 9, 290).to_str()


def test_training_refuses_too_small_a_vocabulary_and_no_documents():
    with pytest.raises(DataError, match="--vocab-size=256 is less than 257"):
        train_byte_level_bpe(DOCUMENTS, 256)
    with pytest.raises(DataError, match="holds no documents"):
        train_byte_level_bpe([], 290)


def test_training_hands_on_the_error_of_a_reader():
    def documents():
        yield "one"
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2 is bad"):
        train_byte_level_bpe(documents(), 290)


def test_folder_file_and_transformers_give_the_same_tokenizer(folder, handle):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    text = "def naïve():\n\treturn  1 .  🙂"
    ids = handle.encode_batch([text])[0]
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert (loaded.eos_token, loaded.eos_token_id) == (END_OF_TEXT, 0)
    assert load_tokenizer(str(folder / "tokenizer.json")).sha256 == handle.sha256


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path, folder, handle):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    texts = ["a" * 50, "b"]
    assert loaded.encode_batch(texts) == handle.encode_batch(texts)
    assert loaded.sha256 == handle.sha256


def test_vocab_size_counts_added_tokens_and_gaps(tmp_path):
    tokenizer = save_word_level(tmp_path, {"[UNK]": 0, "a": 9}, eos_token="<eos>")
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    handle = load_tokenizer(str(tmp_path))
    assert handle.vocab_size == 10
    assert handle.special_tokens == {"<eos>": 2, "<pad>": 3}


def test_end_of_sequence_token_may_be_an_object(tmp_path, folder):
    save_tokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), tmp_path)
    config = {"eos_token": {"content": END_OF_TEXT, "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).eod_token_id == 0


def test_tokenizer_without_end_of_document_needs_one_chosen(tmp_path):
    save_word_level(tmp_path, {"[UNK]": 0, "a": 1})
    with pytest.raises(DataError, match=r"names no end-of-sequence token .* --eod-token"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"has no token '<x>' .* --eod-token"):
        load_tokenizer(str(tmp_path), "<x>")


def test_end_of_document_that_text_can_make_is_refused(tmp_path):
    save_word_level(tmp_path, {"[UNK]": 0, "a": 1, "</s>": 2}, eos_token="</s>")
    with pytest.raises(DataError, match=r"encodes the text '</s>' as the end of a document"):
        load_tokenizer(str(tmp_path))


def test_chosen_end_of_document_is_used(tmp_path, folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    save_tokenizer(tokenizer, tmp_path)
    handle = load_tokenizer(str(tmp_path), "<end>")
    assert handle.eod_token_id == 290
    assert handle.vocab_size == 291


def test_bad_paths_and_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_output_folder_that_is_a_file_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        save_tokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), tmp_path / "file")


class FakeAutoTokenizer:
    result: object

    @classmethod
    def from_pretrained(cls, name):
        if isinstance(cls.result, Exception):
            raise cls.result
        return cls.result


def fake_transformers(monkeypatch, result):
    FakeAutoTokenizer.result = result
    module = type(sys)("transformers")
    module.AutoTokenizer = FakeAutoTokenizer
    monkeypatch.setitem(sys.modules, "transformers", module)


def test_name_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    fake_transformers(monkeypatch, OSError("We couldn't connect to the hub.\nCheck.\n"))
    with pytest.raises(DataError, match=r"org/name is neither .* \(We couldn't connect") as caught:
        load_tokenizer("org/name")
    assert "\n" not in str(caught.value)


def test_slow_tokenizer_is_refused(monkeypatch):
    fake_transformers(monkeypatch, type("Slow", (), {"is_fast": False})())
    with pytest.raises(DataError, match="org/name has no fast tokenizer"):
        load_tokenizer("org/name")


def test_hub_tokenizer_equals_the_file_it_came_from(monkeypatch, folder, handle):
    from transformers import AutoTokenizer

    fake_transformers(monkeypatch, AutoTokenizer.from_pretrained(folder))
    loaded = load_tokenizer("org/name")
    assert loaded.name == "org/name"
    assert loaded.eod_token_id == 0
    assert loaded.encode_batch(DOCUMENTS) == handle.encode_batch(DOCUMENTS)
