"""From lines of JSON to prompts and responses, and from these to shards."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.conversations import PLAIN_CHAT_TEMPLATE, load_chat_template
from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import manifest_path
from megatron_mdm.data.prompt_response_pairs import read_prompt_lengths
from megatron_mdm.data.shards import prompts_path
from megatron_mdm.data.store import open_tokens

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Dos."},
    ]
}
PAIR = {"prompt": "Three?", "response": " Tres."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(["one two three uno dos tres"] * 3, 270), folder)
    return str(folder)


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepared(tmp_path, tokenizer, *records, **options):
    made = prepare_finetuning(
        [write(tmp_path / "in.jsonl", *records)],
        tokenizer,
        tmp_path / "out" / "data",
        FinetuningOptions(**options),
    )
    return [texts_of(one.prefix, tokenizer) for one in made]


def texts_of(prefix, tokenizer):
    """Prompt and response of every pair, decoded."""
    shards, handle = open_tokens(prefix), load_tokenizer(tokenizer)
    shards.verify()
    found, start = [], 0
    for length, prompt in zip(shards.document_lengths, read_prompt_lengths(shards), strict=True):
        tokens = shards.read(start, start + int(length)).tolist()
        assert tokens[-1] == handle.eod_token_id
        found.append((handle.decode(tokens[:prompt]), handle.decode(tokens[prompt:-1])))
        start += int(length)
    return found


def refusal(tmp_path, tokenizer, *records, **options) -> str:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tokenizer, *records, **options)
    assert not list(tmp_path.glob("out/*"))
    return str(caught.value)


def test_prompts_and_responses_are_taken_as_they_stand(tmp_path, tokenizer):
    (found,) = prepared(tmp_path, tokenizer, PAIR, {"prompt": "<|endoftext|>é", "response": "ß"})
    assert found == [("Three?", " Tres."), ("<|endoftext|>é", "ß")]


def test_other_keys_may_hold_them(tmp_path, tokenizer):
    record = {"question": "Q", "answer": "A", "level": 3}
    (found,) = prepared(tmp_path, tokenizer, record, prompt_key="question", response_key="answer")
    assert found == [("Q", "A")]


def test_each_answer_is_learned_given_all_that_was_said_before_it(tmp_path, tokenizer):
    first = "System: Be brief.\n\nUser: One?\n\nAssistant:"
    both = [
        (first, " Uno.\n\n"),
        (f"{first} Uno.\n\nUser: Two?\n\nAssistant:", " Dos.\n\n"),
    ]
    assert prepared(tmp_path, tokenizer, CHAT) == [both]
    assert prepared(tmp_path / "x", tokenizer, CHAT, turns="last") == [both[1:]]


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    (tmp_path / "x").mkdir()


def test_a_chat_template_of_a_file_or_of_the_tokenizer_is_used(tmp_path, tokenizer):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (found,) = prepared(tmp_path, tokenizer, CHAT, turns="last", chat_template=template)
    ((prompt, response),) = found
    assert prompt.endswith("<user>Two?<|endoftext|><assistant>")
    assert response == "Dos.<|endoftext|>"
    # In a rendered conversation the template's special token is itself.
    shards = open_tokens(tmp_path / "out" / "data")
    assert shards.read(0, shards.num_tokens).tolist().count(0) == 5 + 1
    assert load_chat_template(tokenizer).text == PLAIN_CHAT_TEMPLATE


def test_held_out_conversations_are_whole_and_stable(tmp_path, tokenizer):
    records = [
        {
            "messages": [
                {"role": role, "content": f"{number} {turn}"}
                for turn in range(2)
                for role in ("user", "assistant")
            ]
        }
        for number in range(60)
    ]
    train, valid = prepared(tmp_path, tokenizer, *records, valid_fraction=0.3)
    assert len(train) + len(valid) == 120
    numbers = [{prompt.split()[1] for prompt, _ in side} for side in (train, valid)]
    assert not numbers[0] & numbers[1]
    assert 8 <= len(numbers[1]) <= 30


def test_the_same_request_reuses_and_another_is_refused(tmp_path, tokenizer):
    prepared(tmp_path, tokenizer, PAIR)
    before = manifest_path(tmp_path / "out" / "data").stat().st_mtime_ns
    prepared(tmp_path, tokenizer, PAIR)
    assert manifest_path(tmp_path / "out" / "data").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="were made in another way: replace it with --overwrite"):
        prepared(tmp_path, tokenizer, PAIR, turns="last")
    with pytest.raises(DataError, match=r"its input .* is not"):
        prepared(tmp_path, tokenizer, PAIR, PAIR)
    (found,) = prepared(tmp_path, tokenizer, PAIR, PAIR, overwrite=True)
    assert len(found) == 2
    lengths = np.fromfile(prompts_path(tmp_path / "out" / "data"), "<i4")
    assert len(lengths) == 2


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ('{"prompt": "a", ', "is not valid JSON"),
        ("[1]", "holds a JSON array: write one JSON object per line."),
        ({"prompt": "a"}, "has neither messages nor 'response', only prompt: choose keys with"),
        ({"prompt": 3, "response": "b"}, "prompt is number and has to be a string"),
        ({"prompt": "", "response": "b"}, "prompt is empty: give it text"),
        ({"prompt": "a", "response": ""}, "response is empty: give it text"),
        ({"prompt": "\ud800", "response": "b"}, "half a surrogate pair"),
        ({"messages": []}, "messages has to be a list with a message"),
        ({"messages": "hi"}, "messages has to be a list with a message"),
        ({"messages": [{"role": "user"}]}, "message 0 needs role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "content of message 0 is null"),
        ({"messages": CHAT["messages"][:2]}, "has no message of the role 'assistant'"),
        ({"messages": CHAT["messages"][2:3]}, "begins with message of the role 'assistant'"),
        (
            {"messages": [CHAT["messages"][1], {"role": "assistant", "content": ""}]},
            "message 1 is empty",
        ),
        (
            {"messages": [{"role": "user", "content": "<|endoftext|>"}, CHAT["messages"][2]]},
            "message 0 spells out the special token '<|endoftext|>', which only the template may",
        ),
    ],
)
def test_a_bad_record_is_named_or_skipped(tmp_path, tokenizer, record, complaint):
    message = refusal(tmp_path, tokenizer, PAIR, record)
    assert f"{tmp_path}/in.jsonl, line 2" in message
    assert complaint in message
    made = prepare_finetuning(
        [tmp_path / "in.jsonl"],
        tokenizer,
        tmp_path / "out" / "data",
        FinetuningOptions(on_error="skip"),
    )
    assert (made[0].manifest.num_documents, made[0].manifest.num_bad_records) == (1, 1)


def test_a_template_that_does_not_only_append_is_refused(tmp_path, tokenizer):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    message = refusal(tmp_path, tokenizer, CHAT, chat_template=template)
    assert "does not continue the rendered prompt: use a template that only appends" in message
    template.write_text("{{ raise_exception('no system here') }}")
    assert "the chat template refuses it (no system here)" in refusal(
        tmp_path, tokenizer, CHAT, chat_template=template
    )
    assert "cannot be read" in refusal(
        tmp_path, tokenizer, CHAT, chat_template=tmp_path / "absent.jinja"
    )


def test_inputs_that_hold_no_lines_are_refused(tmp_path, tokenizer):
    assert "holds no conversations" in refusal(tmp_path, tokenizer, "")
    assert "has to be between 0 and 1" in refusal(tmp_path, tokenizer, PAIR, valid_fraction=1.0)
    assert "without pairs" in refusal(tmp_path, tokenizer, PAIR, valid_fraction=0.5)
    text = tmp_path / "a.txt"
    text.write_text("hello")
    with pytest.raises(DataError, match=r"a.txt is no .jsonl file"):
        prepare_finetuning([text], tokenizer, tmp_path / "o", FinetuningOptions())
