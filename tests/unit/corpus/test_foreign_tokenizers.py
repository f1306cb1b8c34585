"""Tokenizers of other libraries give the ids that these give, or are refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys

import pytest
import tiktoken
import tiktoken_ext.openai_public as openai_public
from foreign_examples import TEXTS, ranks_of, write_merges, write_ranks, write_tekken
from preprocess_helpers import assert_one_error_line, run

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import foreign_tokenizers as module
from megatron_mdm.corpus.conversations import load_chat_template
from megatron_mdm.corpus.known_ranks import KNOWN_CLASSES, KNOWN_RANKS, KnownRanks
from megatron_mdm.corpus.probes import make_adversarial_texts
from megatron_mdm.corpus.tokenizer import load_tokenizer

CL100K = next(one for one in KNOWN_RANKS.values() if one.name == "cl100k_base")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Where tiktoken would keep copies of what it reads.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def ranks():
    return ranks_of()


@pytest.fixture
def known(tmp_path, ranks, monkeypatch):
    """A file of ranks that is known: its special tokens leave a gap after the ranks."""
    path = write_ranks(tmp_path / "mine.tiktoken", ranks)
    special = {"<|endoftext|>": len(ranks) + 1, "<|other|>": len(ranks) + 9}
    told = KnownRanks("mine", CL100K.pattern, "<|endoftext|>", special)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(module.KNOWN_RANKS, digest, told)
    return path


def original_of(ranks, pattern):
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("name", ["mine.tiktoken", "tokenizer.model"])
def test_ranks_give_the_ids_of_tiktoken(known, ranks, name):
    handle = load_tokenizer(str(known.rename(known.with_name(name))))
    original = original_of(ranks, CL100K.pattern)
    assert handle.encode_batch(TEXTS) == [original.encode_ordinary(text) for text in TEXTS]
    assert [handle.decode(ids) for ids in handle.encode_batch(TEXTS)] == TEXTS
    assert (handle.eod_token, handle.eod_token_id) == ("<|endoftext|>", len(ranks) + 1)
    assert handle.special_tokens == {"<|endoftext|>": len(ranks) + 1, "<|other|>": len(ranks) + 9}
    assert handle.vocab_size == len(ranks) + 10
    # A copy in a folder that all users share could be another file's.
    assert not (known.parent / "cache").exists()


def test_ranks_of_another_file_are_refused_with_the_way_to_convert_them(tmp_path, ranks):
    path = write_ranks(tmp_path / "cl100k_base.tiktoken", ranks)
    with pytest.raises(
        DataError, match=r"do not say how text is cut, and is none of .*cl100k_base"
    ):
        load_tokenizer(str(path))
    with pytest.raises(DataError, match="TikTokenConverter") as caught:
        load_tokenizer(str(tmp_path))
    one_sentence(caught)


@pytest.mark.parametrize("known", KNOWN_RANKS.values(), ids=lambda known: known.name)
def test_known_ranks_are_cut_as_tiktoken_cuts_them(known, ranks, monkeypatch):
    """The published encodings, with a small vocabulary in place of the one to download."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: ranks)
    if known.name == "Llama 3":
        # Meta's own program has the expression written out as it is here.
        assert known.pattern == CL100K.pattern
        assert len(known.special_tokens) == 256
        assert known.special_tokens["<|eot_id|>"] == 128_009
        assert known.special_tokens["<|reserved_special_token_2|>"] == 128_012
        assert known.special_tokens["<|reserved_special_token_245|>"] == 128_255
        return
    told = getattr(openai_public, known.name)()
    assert known.special_tokens == told["special_tokens"]
    theirs, ours = original_of(ranks, told["pat_str"]), original_of(ranks, known.pattern)
    for text in [*TEXTS, *make_adversarial_texts([])]:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_hashes_are_those_that_tiktoken_expects(ranks, monkeypatch):
    expected = {}

    def load(url, expected_hash):
        expected[expected_hash] = url.rpartition("/")[2].removesuffix(".tiktoken")
        return ranks

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        getattr(openai_public, name)()
    assert {h: one.name for h, one in KNOWN_RANKS.items() if one.name != "Llama 3"} == expected


def test_tekken_gives_the_ids_of_tiktoken_after_its_special_tokens(tmp_path, ranks):
    path = write_tekken(tmp_path / "tekken.json", ranks, CL100K.pattern)
    original = original_of(ranks, CL100K.pattern)
    for given in (path, tmp_path):
        handle = load_tokenizer(str(given))
        assert handle.encode_batch(TEXTS) == [
            [rank + 20 for rank in original.encode_ordinary(text)] for text in TEXTS
        ]
        assert (handle.eod_token, handle.eod_token_id) == ("</s>", 2)
        assert handle.vocab_size == len(ranks) + 20
        assert len(handle.special_tokens) == 20
        assert handle.special_tokens["<SPECIAL_19>"] == 19


def test_tekken_without_special_tokens_needs_mistral_common(tmp_path, ranks, monkeypatch):
    from transformers.integrations.mistral import tokenizer as mistral

    def lacks(*_):
        raise ImportError("not there")

    monkeypatch.setattr(mistral, "requires_backends", lacks)
    path = write_tekken(tmp_path / "tekken.json", ranks, CL100K.pattern, special_tokens=None)
    with pytest.raises(DataError, match="pip install mistral-common, or give") as caught:
        load_tokenizer(str(path))
    one_sentence(caught)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_merges_give_the_ids_of_tiktoken(tmp_path, ranks, kind):
    folder = write_merges(tmp_path / "m", kind)
    ids = json.loads((folder / "vocab.json").read_text())
    # The end of text has the id 0, so that ids are not ranks.
    assert ids["<|endoftext|>"] == 0
    original = original_of(ranks, KNOWN_CLASSES[kind.removesuffix("Fast")])
    token_ids = module.translate(load_tokenizer(str(folder)).backend.to_str()).token_ids
    expected = [[token_ids[rank] for rank in original.encode_ordinary(text)] for text in TEXTS]
    is_same = [
        kind != "Qwen2Tokenizer" or module.normalizers.NFC().normalize_str(t) == t for t in TEXTS
    ]
    assert not all(is_same) or kind != "Qwen2Tokenizer"
    for given in (folder, folder / "vocab.json", folder / "merges.txt"):
        handle = load_tokenizer(str(given))
        found = handle.encode_batch(TEXTS)
        assert [a for a, same in zip(found, is_same, strict=True) if same] == [
            b for b, same in zip(expected, is_same, strict=True) if same
        ]
        assert handle.eod_token_id == 0


def test_the_class_may_stand_in_the_models_configuration(tmp_path):
    folder = write_merges(tmp_path / "m", None)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_tokenizer(str(folder)).eod_token_id == 0


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (None, {}, "does not say how its vocab.json and merges.txt cut text: write"),
        ("RobertaTokenizerFast", {}, r"is of the class RobertaTokenizer: convert it once"),
        ("GPT2Tokenizer", {"add_prefix_space": True}, "cannot be compared with tiktoken"),
        # What such an entry names is never imported.
        ("Evil", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "is of the class Evil"),
    ],
)
def test_merges_that_are_not_known_to_be_cut_so_are_refused(tmp_path, kind, config, message):
    folder = write_merges(tmp_path / "m", kind, **config)
    (folder / "evil.py").write_text("raise SystemExit('code of a folder was run')\n")
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(str(folder))
    one_sentence(caught)


def test_code_beside_known_merges_is_not_run(tmp_path):
    code = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    folder = write_merges(tmp_path / "m", "GPT2Tokenizer", auto_map=code)
    (folder / "evil.py").write_text("raise SystemExit('code of a folder was run')\n")
    assert load_tokenizer(str(folder)).eod_token_id == 0
    assert not any("evil" in name for name in sys.modules)


def test_merges_need_their_vocabulary(tmp_path):
    folder = write_merges(tmp_path / "m")
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"merges\.txt does not exist, and .* belong together"):
        load_tokenizer(str(folder))


def test_a_folder_of_two_tokenizers_is_refused_and_one_with_tokenizer_json_is_read(
    tmp_path, ranks, tokenizer
):
    write_tekken(tmp_path / "tekken.json", ranks, CL100K.pattern)
    write_ranks(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(DataError, match=r"tekken\.json and tokenizer\.model: give the path of one"):
        load_tokenizer(str(tmp_path))
    shutil.copy(f"{tokenizer}/tokenizer.json", tmp_path)
    assert load_tokenizer(str(tmp_path)).vocab_size == load_tokenizer(tokenizer).vocab_size


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model", "a.tiktoken", "vocab.json"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"{}", b"[1, 2]"])
def test_damaged_files_are_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if name == "vocab.json":
        (tmp_path / "merges.txt").write_bytes(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path / name))
    assert name.partition(".")[0] in one_sentence(caught) or str(tmp_path) in str(caught.value)


def test_ids_that_differ_from_the_originals_are_refused(known, monkeypatch):
    real = module.RanksFormat.convert

    def mistaken(self, path):
        conversion = real(self, path)
        return conversion._replace(
            encode=lambda text: [*conversion.encode(text), *("7" in text) * [1]]
        )

    monkeypatch.setattr(module.RanksFormat, "convert", mistaken)
    with pytest.raises(DataError, match="other ids after conversion than tiktoken does") as caught:
        load_tokenizer(str(known))
    one_sentence(caught)


def test_the_tool_writes_a_tokenizer_that_is_the_same(tmp_path, ranks):
    from transformers import AutoTokenizer

    path = write_tekken(tmp_path / "tekken.json", ranks, CL100K.pattern)
    result = run("convert_tokenizer.py", "--input", path, "--output", tmp_path / "t", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    handle, read = load_tokenizer(str(path)), load_tokenizer(str(tmp_path / "t"))
    assert (read.sha256, read.eod_token_id) == (handle.sha256, handle.eod_token_id)
    assert f"sha256 {handle.sha256[:12]}" in result.stdout
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    text = TEXTS[1]
    assert loaded(text, add_special_tokens=False)["input_ids"] == handle.encode_batch([text])[0]
    again = run("convert_tokenizer.py", "--input", path, "--output", tmp_path / "t", cwd=tmp_path)
    assert_one_error_line(again, f"{tmp_path / 't' / 'tokenizer.json'} exists: replace it with")


def test_a_chat_template_beside_a_tokenizer_of_another_library_is_used(tmp_path, ranks):
    write_tekken(tmp_path / "tekken.json", ranks, CL100K.pattern)
    config = {"chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}
    config["eos_token"] = {"content": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for given in (tmp_path, tmp_path / "tekken.json"):
        template = load_chat_template(str(given))
        assert template(messages, is_prompt=False) == "a</s>b</s>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert load_chat_template(str(tmp_path))(messages, is_prompt=False) == "2"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja cannot be read"):
        load_chat_template(str(tmp_path))
