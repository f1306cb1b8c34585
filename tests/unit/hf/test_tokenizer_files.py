from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.hf.tokenizer_files import write_tokenizer

TEXT = "a few<|mask|> words"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    return folder


@pytest.fixture
def written(tmp_path):
    """Writes a tokenizer for a mask's id and returns its folder and what transformers loads."""

    def write(source, mask_token_id, *, is_causal=False):
        target = tmp_path / "export"
        target.mkdir()
        write_tokenizer(source, target, mask_token_id=mask_token_id, is_causal=is_causal)
        return target, AutoTokenizer.from_pretrained(target)

    return write


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("unused", [0, 5])
def test_the_mask_has_the_models_id_and_tokens_added_later_do_not(source, written, unused):
    size = load_tokenizer(str(source)).vocab_size
    folder, loaded = written(source, size + unused)
    assert (loaded.mask_token, loaded.mask_token_id) == ("<|mask|>", size + unused)
    assert loaded.encode(TEXT).count(size + unused) == 1
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded) == size + unused + 1
    loaded.add_tokens(["new"])
    assert loaded.convert_tokens_to_ids("new") == size + unused + 1
    assert (loaded.pad_token, loaded.eos_token_id) == ("<|endoftext|>", 0)
    assert set(loaded("a")) == {"input_ids", "attention_mask"}
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_export_still_holds_the_tokenizer_of_the_data(source, written):
    before = load_tokenizer(str(source))
    after = load_tokenizer(str(written(source, before.vocab_size)[0]))
    assert (after.sha256, after.vocab_size) == (before.sha256, before.vocab_size)


def test_an_autoregressive_model_keeps_the_id_free_and_has_no_mask(source, written):
    size = load_tokenizer(str(source)).vocab_size
    _, loaded = written(source, size, is_causal=True)
    assert (loaded.mask_token, loaded.pad_token) == (None, None)
    loaded.add_tokens(["new"])
    assert loaded.convert_tokens_to_ids("new") == size + 1


def test_the_tokenizer_of_an_export_is_exported_for_another_mask(tmp_path, source, written):
    size = load_tokenizer(str(source)).vocab_size
    first, _ = written(source, size + 4)
    second = tmp_path / "second"
    second.mkdir()
    write_tokenizer(first, second, mask_token_id=size, is_causal=False)
    loaded = AutoTokenizer.from_pretrained(second)
    assert (loaded.mask_token, loaded.mask_token_id, len(loaded)) == ("<|mask|>", size, size + 1)
    same = tmp_path / "same"
    same.mkdir()
    write_tokenizer(first, same, mask_token_id=size + 4, is_causal=False)
    for path in first.iterdir():
        assert (same / path.name).read_bytes() == path.read_bytes()


def test_a_mask_inside_the_vocabulary_keeps_its_token(tmp_path, source, written):
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|mdm_mask|>", special=True)])
    backend.save(str(source / "tokenizer.json"))
    mask_token_id = backend.token_to_id("<|mdm_mask|>")
    _, loaded = written(source, mask_token_id)
    assert (loaded.mask_token, loaded.mask_token_id) == ("<|mdm_mask|>", mask_token_id)
    assert len(loaded) == mask_token_id + 1


def test_a_name_that_is_taken_is_not_given_to_the_mask(source, written):
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.add_tokens(["<|mask|>"])
    backend.save(str(source / "tokenizer.json"))
    size = backend.get_vocab_size()
    _, loaded = written(source, size)
    assert (loaded.mask_token, loaded.mask_token_id) == ("<|mask_1|>", size)


def test_code_and_words_of_one_version_do_not_travel(source, written):
    size = load_tokenizer(str(source)).vocab_size
    edit(
        source / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        auto_map={"AutoTokenizer": ["their_code.Slow", "their_code.Fast"]},
        extra_special_tokens=["<|endoftext|>"],
        backend="tokenizers",
    )
    edit(source / "special_tokens_map.json", unk_token="a", eos_token="another")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "their_code.py").write_text("raise AssertionError")
    folder, loaded = written(source, size)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|endoftext|>"]
    assert not {"auto_map", "extra_special_tokens", "backend"} & set(config)
    assert (loaded.unk_token, loaded.eos_token) == ("a", "<|endoftext|>")
    assert loaded.chat_template == "{{ messages }}"
    assert not list(folder.glob("*.py"))


def test_a_tokenizer_that_leaves_ids_out_is_told_of(tmp_path):
    source, target = tmp_path / "tokenizer", tmp_path / "export"
    source.mkdir()
    target.mkdir()
    words = {"a": 0, "b": 1, "c": 7}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(source / "tokenizer.json"))
    remark = write_tokenizer(source, target, mask_token_id=8, is_causal=False)
    assert "leaves ids out, so that none of its tokens can have the mask's id 8" in remark
    loaded = AutoTokenizer.from_pretrained(target)
    assert (loaded.mask_token, loaded.encode("c")) == (None, [7])
