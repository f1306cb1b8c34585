"""SentencePiece's models give SentencePiece's ids, or are refused in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
from foreign_examples import DOCUMENTS, TEXTS
from preprocess_helpers import documents_of, preprocess, write_jsonl

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import foreign_tokenizers as module
from megatron_mdm.corpus.tokenizer import load_tokenizer

LINES = [line for document in DOCUMENTS for line in document.splitlines() if line]
# As Llama, Mistral and Gemma were trained.
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "pad_id": 3,
}


@pytest.fixture(scope="module")
def sentencepiece():
    return pytest.importorskip(
        "sentencepiece", reason="sentencepiece is missing: pip install -r requirements-dev.txt"
    )


@pytest.fixture
def trained(sentencepiece, tmp_path):
    def train(**options):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 4),
            model_prefix=str(tmp_path / "tokenizer"),
            vocab_size=500,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        return tmp_path / "tokenizer.model"

    return train


@pytest.mark.parametrize(
    "changes",
    [{}, {"add_dummy_prefix": False}, {"byte_fallback": False}],
    ids=str,
)
def test_ids_are_those_of_sentencepiece(trained, sentencepiece, changes):
    path = trained(**(LLAMA | changes))
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    # Mistral counts versions behind the ending.
    for given in (path, shutil.copy(path, path.with_suffix(".model.v3"))):
        handle = load_tokenizer(str(given))
        assert handle.encode_batch(TEXTS) == original.encode(TEXTS)
        assert handle.vocab_size == len(original)
        assert (handle.eod_token, handle.eod_token_id) == ("</s>", original.eos_id())
        assert handle.special_tokens == {"<s>": 1, "</s>": 2, "<pad>": 3}


def test_text_comes_back(trained):
    handle = load_tokenizer(str(trained(**LLAMA)))
    assert [handle.decode(ids) for ids in handle.encode_batch(TEXTS)] == TEXTS


def test_shards_hold_the_ids_of_sentencepiece(trained, sentencepiece, tmp_path):
    path = trained(**LLAMA)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [text for text in TEXTS if text]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = preprocess([source], str(path), tmp_path / "p")
    assert documents_of(tmp_path / "p") == [[*original.encode(text), 2] for text in texts]
    assert (manifest.eod_token_id, manifest.vocab_size) == (2, len(original))


@pytest.mark.parametrize(
    "changes",
    [
        # Text that spells a control token would become that token.
        {"model_type": "unigram"},
        {"treat_whitespace_as_suffix": True},
        # The mark of a space, where it is written out at an end of the text.
        {"remove_extra_whitespaces": True},
        {"model_type": "word"},
        {"normalization_rule_name": "nmt_nfkc_cf"},
    ],
    ids=str,
)
def test_models_that_cannot_be_converted_are_refused(trained, changes):
    path = trained(**(LLAMA | changes))
    with pytest.raises(DataError, match="other ids after conversion than sentencepiece does") as e:
        load_tokenizer(str(path))
    assert str(e.value).endswith(".")
    assert "\n" not in str(e.value)


def test_a_configuration_beside_the_model_that_agrees_is_read(trained):
    path = trained(**LLAMA)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": {"content": "<pad>"},
        "added_tokens_decoder": {"2": {"content": "</s>"}},
    }
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(path.parent)).eod_token_id == 3
    assert load_tokenizer(str(path.parent), "</s>").eod_token_id == 2


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "XLMRobertaTokenizer"},
            "of the class XLMRobertaTokenizer, which may count otherwise: convert it once with",
        ),
        (
            "added_tokens.json",
            {"<new>": 500},
            r"adds the token '<new>' \(id 500\): convert it once",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": {"content": "<bos>"}}},
            r"adds the token '<bos>' \(id 1\): convert it once",
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.E", None]}}, None),
    ],
)
def test_a_configuration_that_changes_the_ids_is_refused_and_code_is_not_run(
    trained, name, config, message
):
    path = trained(**LLAMA)
    path.with_name(name).write_text(json.dumps(config))
    path.with_name("evil.py").write_text("raise SystemExit('code of a folder was run')\n")
    if message is None:
        assert load_tokenizer(str(path.parent)).eod_token_id == 2
        return
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path.parent))


def test_the_library_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(DataError, match="pip install sentencepiece, or give a folder that holds"):
        load_tokenizer(str(tmp_path))


def test_a_truncated_model_is_one_sentence(trained, tmp_path):
    path = trained(**LLAMA)
    cut = tmp_path / "cut" / "tokenizer.model"
    cut.parent.mkdir()
    shutil.copy(path, cut)
    cut.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"tokenizer\.model cannot be converted \(.*copy it again"):
        load_tokenizer(str(cut))
