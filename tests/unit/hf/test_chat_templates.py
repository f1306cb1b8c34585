"""The template of the fine-tuning travels: transformers gives the prompts that it had."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from megatron_mdm.corpus.conversations import PLAIN_CHAT_TEMPLATE
from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.chat_template import (
    BARE_CHAT_TEMPLATE,
    find_chat_template,
    list_chat_templates,
)
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.prompt_response_pairs import read_prompt_lengths
from megatron_mdm.data.store import open_tokens
from megatron_mdm.hf.tokenizer_files import write_tokenizer

MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": " Two <|mask |>? \u20ac"},
        {"role": "assistant", "content": "Dos.\n\nY m\u00e1s."},
    ],
    [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "uno dos"}],
]
PAIR = {"prompt": "Three?\nA:", "response": " Tres."}


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["one two three uno dos tres"] * 3, 270), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}
    path.write_text(json.dumps(config))
    return folder


def prepare(tmp_path, tokenizer, records, **options):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    made = prepare_finetuning(
        [path], str(tokenizer), tmp_path / "data", FinetuningOptions(**options)
    )
    return made[0]


def read_prompts(prefix):
    shards = open_tokens(prefix)
    lengths, start, found = read_prompt_lengths(shards), 0, []
    for whole, length in zip(shards.document_lengths, lengths, strict=True):
        found.append(shards.read(start, start + int(length)).tolist())
        start += int(whole)
    return found


def export(tmp_path, tokenizer, template):
    target = tmp_path / "export"
    target.mkdir()
    write_tokenizer(
        tokenizer,
        target,
        mask_token_id=load_tokenizer(str(tokenizer)).vocab_size,
        is_causal=False,
        chat_template=template,
    )
    return AutoTokenizer.from_pretrained(target)


def tell(loaded, messages):
    return loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("source", ["plain", "file", "tokenizer"])
def test_ids_of_prompts_are_those_of_the_fine_tuning(tmp_path, tokenizer, source):
    options = {}
    if source == "file":
        options["chat_template"] = tmp_path / "chat.jinja"
        options["chat_template"].write_text(MARKED)
        # The shards' goes before the tokenizer's own.
        (tokenizer / "chat_template.jinja").write_text("{{ messages | length }}")
    elif source == "tokenizer":
        (tokenizer / "chat_template.jinja").write_text(MARKED)
    made = prepare(tmp_path, tokenizer, [{"messages": one} for one in CHATS], **options)
    (template,) = list_chat_templates([made.manifest])
    assert template == (PLAIN_CHAT_TEMPLATE if source == "plain" else MARKED)
    loaded = export(tmp_path, tokenizer, template)
    answers = [(chat, at) for chat in CHATS for at, one in enumerate(chat) if one["role"][0] == "a"]
    told = [tell(loaded, chat[:at]) for chat, at in answers]
    assert told == read_prompts(made.prefix)
    assert len(told) == 3


def test_prompts_taken_as_they_stand_have_a_template_that_adds_nothing(tmp_path, tokenizer):
    made = prepare(tmp_path, tokenizer, [PAIR])
    (template,) = list_chat_templates([made.manifest])
    assert template == BARE_CHAT_TEMPLATE
    loaded = export(tmp_path, tokenizer, template)
    message = {"role": "user", "content": PAIR["prompt"]}
    assert [tell(loaded, [message])] == read_prompts(made.prefix)
    # Where there are messages too, theirs counts.
    mixed = prepare(tmp_path, tokenizer, [PAIR, {"messages": CHATS[1]}], overwrite=True)
    assert list_chat_templates([made.manifest, None, mixed.manifest]) == [
        PLAIN_CHAT_TEMPLATE,
        BARE_CHAT_TEMPLATE,
    ]


def test_shards_and_runs_of_earlier_versions_are_read(tmp_path, tokenizer):
    made = prepare(tmp_path, tokenizer, [PAIR])
    path = manifest_path(made.prefix)
    tree = json.loads(path.read_text())
    del tree["exchanges"]["has_messages"]
    path.write_text(json.dumps(tree))
    assert list_chat_templates([Manifest.read(path)]) == [PLAIN_CHAT_TEMPLATE]
    # The same request finds them again.
    assert prepare(tmp_path, tokenizer, [PAIR]).manifest.exchanges.has_messages is None
    config = {"finetuning": {"enabled": True}, "data": {"train": [{"path": str(made.prefix)}]}}
    assert find_chat_template(None, config) == PLAIN_CHAT_TEMPLATE
    assert find_chat_template("recorded", config) == "recorded"
    assert find_chat_template(None, config | {"finetuning": {"enabled": False}}) is None
    config["data"]["train"][0]["path"] = str(tmp_path / "gone")
    assert find_chat_template(None, config) is None
