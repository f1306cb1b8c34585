from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.corpus.mask_token import check_mask_token
from megatron_mdm.corpus.tokenizer import END_OF_TEXT, load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe

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
    with pytest.raises(DataError, match=r"encodes some text as .* '</s>' \(id 2\)"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"single_word": True}, {"lstrip": True, "rstrip": True}])
def test_added_token_that_is_not_special_cannot_end_documents(tmp_path, folder, options):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<end>", special=False, **options)])
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"encodes some text as .* '<end>' \(id 290\)"):
        load_tokenizer(str(tmp_path), "<end>")


def test_unreachable_ordinary_token_cannot_end_documents(tmp_path):
    # No merge leads to it here, and yet nothing promises that it stays so.
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"'<e>' \(id 2\) as an ordinary token"):
        load_tokenizer(str(tmp_path), "<e>")


def test_special_token_that_is_also_a_word_cannot_end_documents(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "end": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["end", "[UNK]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for token in ("end", "[UNK]"):
        with pytest.raises(DataError, match=rf"encodes some text as .* '{re.escape(token)}'"):
            load_tokenizer(str(tmp_path), token)


def test_special_token_with_a_marked_space_cannot_end_documents(tmp_path):
    tokenizer = Tokenizer(models.BPE({"\u2581": 0, "e": 1, "\u2581e": 2}, [("\u2581", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["\u2581e"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="encodes some text as"):
        load_tokenizer(str(tmp_path), "\u2581e")


def check_mask(mask_token_id, special_tokens, eod_token_id=0, own_id=320):
    check_mask_token(
        mask_token_id,
        special_tokens=special_tokens,
        vocab_size=290,
        eod_token_id=eod_token_id,
        own_id=own_id,
    )


def test_mask_token_is_the_models_own_or_a_special_one():
    special = {END_OF_TEXT: 0, "<mask>": 5}
    for safe in (320, 290, 5):
        check_mask(safe, special)
    with pytest.raises(ConfigError, match=r"=0 is the id that ends documents: .* 5 \('<mask>'\)"):
        check_mask(0, special)
    with pytest.raises(ConfigError, match=r"=7 is not a special token .* own id 320, or use"):
        check_mask(7, special)
    with pytest.raises(ConfigError, match=r"=7 is not a special token .* own id 320\.$"):
        check_mask(7, {END_OF_TEXT: 0})
    with pytest.raises(ConfigError, match=r"mask_token_id=5 is the id that ends documents"):
        check_mask(5, special, eod_token_id=5)
    weights = (
        r"=7 is not a special .*: set it to that of the weights, and make .* their tokenizer\.$"
    )
    with pytest.raises(ConfigError, match=weights):
        check_mask(7, special, own_id=None)


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
    def from_pretrained(cls, name, *, trust_remote_code):
        assert trust_remote_code is False
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


def load_offline(name, home):
    """Loads by name in a process without a network, with all that `home` holds in the cache."""
    code = (
        "import sys\n"
        "from megatron_mdm.corpus.tokenizer import load_tokenizer\n"
        "from megatron_mdm.core.errors import run_entry_point\n"
        "def main():\n"
        "    handle = load_tokenizer(sys.argv[1])\n"
        "    print(handle.sha256, handle.eod_token, handle.eod_token_id)\n"
        "sys.exit(run_entry_point(main))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
    )


def test_tokenizer_in_the_hub_cache_loads_without_a_network(tmp_path, folder, handle):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, cached / "blobs")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    result = load_offline("org/name", tmp_path)
    assert result.stdout.split() == [handle.sha256, END_OF_TEXT, "0"], result.stderr
    missing = load_offline("org/other", tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: org/other is neither a file or folder here nor")
    assert missing.stderr.count("\n") == 1
